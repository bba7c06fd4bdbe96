"""The file of LongBench v2: read without holding it, malformed items named, our sample of it."""

import hashlib
import json

import pytest
from conftest import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from test_longbench import ITEMS, SAMPLE, item, written

from base.cli import BadInput
from evals import longbench
from studies import longbench_sample

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    objects=st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 1, 30]),
    ascii_only=st.booleans(),
    space=st.text("\n\t\r ", max_size=4),
)
def test_the_stream_reads_what_json_reads(objects, chunk, indent, ascii_only, space, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "stream.json"
    text = space + json.dumps(objects, indent=indent, ensure_ascii=ascii_only) + space
    content = text.encode("utf-8", "surrogatepass")
    if not ascii_only and b"\xed" in content and content.decode("utf-8", "ignore") != text:
        return  # a lone surrogate, which no UTF-8 file holds
    path.write_bytes(content)
    digest = hashlib.sha256()
    found = list(longbench.stream(path, digest, chunk))
    assert [value for value, _, _ in found] == json.loads(text)
    assert [json.loads(content[start : start + size]) for _, start, size in found] == json.loads(text)
    assert digest.digest() == hashlib.sha256(content).digest()


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "byte 0 is the end, not ["),
        ("{}", "byte 0 is {, not ["),
        ("[", "byte 1 is the end, not { or ]"),
        ("\0", r"byte 0 is '\x00', not ["),
        ("[1]", "byte 1 is 1, not { or ]"),
        ("[{},]", "after item 1, byte 4 is ], not {"),
        ("[{} {}]", "byte 4 is {, not , or ]"),
        ("[{}", "byte 3 is the end, not , or ]"),
        ("[{}] x", "byte 5 is x, not the end"),
        ('[{}, {"a": tru', "item 2 (from byte 5 on) is not JSON"),
        ('[{"a": "b', "item 1 (from byte 1 on) is not JSON"),
        ('[{"a": nope, "b": 111111111111111111111}, {}]', "item 1 (from byte 1 on) is not JSON"),
        ('[{"a": ' + "[" * 100_000, "item 1 (from byte 1 on) is not JSON: maximum recursion depth"),
        ('[{"a": ' + "1" * 9999 + "}]", "item 1 (from byte 1 on) is not JSON: Exceeds the limit"),
        ('[{"\u00e9": 1}, nope]', "after item 1, byte 12 is n, not {"),
    ],
)
def test_files_that_are_no_list_of_objects(text, message, chunk, tmp_path):
    with pytest.raises(BadInput) as error:
        list(longbench.stream(written(tmp_path, text), chunk=chunk))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'[{"a": "\xe9"}]')
    for path, message in (
        (tmp_path / "latin.json", "not JSON"),
        (tmp_path, "cannot be read"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(BadInput, match=message):
            longbench.index(path)


def test_a_malformed_object_early_is_refused_without_reading_all_of_the_file(tmp_path):
    path = written(tmp_path, '[{"a": nope, "b": ' + "1" * 100_000 + "}]")
    digest = hashlib.sha256()
    with pytest.raises(BadInput, match="not JSON"):
        list(longbench.stream(path, digest, 1000))
    assert digest.digest() == hashlib.sha256(path.read_bytes()[:1000]).digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "item 2 (_id 'x1'): 'answer' is 'E', not one of A, B, C, D"),
        ({"answer": ["A"]}, "item 2 (_id 'x1'): 'answer' is not a text"),
        ({"length": "huge"}, "(_id 'x1'): 'length' is 'huge', not one of short, medium, long"),
        ({"difficulty": "Easy"}, "(_id 'x1'): 'difficulty' is 'Easy'"),
        ({"context": None}, "(_id 'x1'): 'context' is not a text"),
        ({"context": " \n"}, "(_id 'x1'): 'context' is empty"),
        ({"question": "\ud800"}, "(_id 'x1'): 'question' is not valid text"),
        ({"_id": "x0"}, "item 2 (_id 'x0'): an earlier item has the same _id"),
        ({"_id": 3}, "item 2 (_id 3): '_id' is not a text"),
        (
            {"_id": "a\nb" + "c" * 9999, "answer": "E"},
            r"item 2 (_id 'a\nbcccccccc...ccccccccccccc'): 'answer' is 'E'",
        ),
        ({"_id": "\ud800"}, r"item 2 (_id '\ud800'): '_id' is not valid text"),
        ({"answer": "A" * 9999}, "'answer' is 'AAAAAAAAAAAA...AAAAAAAAAAAAA', not one of A, B, C, D"),
    ],
)
def test_malformed_items_are_named(change, message, tmp_path):
    with pytest.raises(BadInput) as error:
        longbench.index(written(tmp_path, [item(0), item(1, **change)]))
    assert message in str(error.value) and "\n" not in str(error.value)
    missing = item(1)
    del missing["choice_C"]
    with pytest.raises(BadInput, match=r"item 2 \(_id 'x1'\): 'choice_C' is missing"):
        longbench.index(written(tmp_path, [item(0), missing]))
    with pytest.raises(BadInput, match="has no items"):
        longbench.index(written(tmp_path, []))


def test_503_items_must_be_the_official_ones(tmp_path):
    lengths = ["short"] * 180 + ["medium"] * 215 + ["long"] * 108
    entries, _ = longbench.index(written(tmp_path, [item(i, length=n) for i, n in enumerate(lengths)]))
    assert longbench.counts(entries)["length"] == {"short": 180, "medium": 215, "long": 108}
    lengths[0] = "long"
    with pytest.raises(
        BadInput, match="short 179, medium 215, long 109; LongBench v2 has short 180, medium 215, long 108"
    ):
        longbench.index(written(tmp_path, [item(i, length=n) for i, n in enumerate(lengths)]))
    assert len(longbench.index(written(tmp_path, [item(i) for i in range(502)]))[0]) == 502


def test_the_sample_file_is_what_its_script_writes(tmp_path):
    result = run_script("studies/longbench_sample.py", tmp_path / "again.json")
    assert result.returncode == 0 and (tmp_path / "again.json").read_bytes() == SAMPLE.read_bytes()
    entries, digest = longbench.index(SAMPLE)
    assert [longbench.read_item(SAMPLE, entry) for entry in entries] == ITEMS and len(
        SAMPLE.read_bytes()
    ) < 300_000
    assert {(i["difficulty"], i["length"]) for i in ITEMS} == {
        (d, n) for d in ("easy", "hard") for n in longbench_sample.FILLER
    }
    assert (
        len({i["domain"] for i in ITEMS}) == 6
        and digest == hashlib.sha256(SAMPLE.read_bytes()).hexdigest()[:16]
    )
    for i in ITEMS:  # the question can be answered, and only by the answer
        name = i["question"].removeprefix("What is the code for ").removesuffix("?")
        told = [c for c in "ABCD" if f"The code for {name} is {i['choice_' + c]}." in i["context"]]
        assert told == [i["answer"]] and len({i[f"choice_{c}"] for c in "ABCD"}) == 4
