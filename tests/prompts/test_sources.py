"""sources.py: the published schemas as Parquet and JSONL, mixtures whose cursor resumes, and the refusals a
user meets."""

import json
from collections import Counter

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from base.cli import BadInput
from prompts import sources
from prompts.sources import Mixture, prompt_row


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def write_parquet(path, *rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


# ---------------------------------------------------------------------------------------------------- schemas


def user(text):
    return [{"role": "user", "content": text}]


DOCQA = [
    {
        "data_source": source,
        "prompt": user(
            f"Please read the following text and answer the question below.\n\n<text>\nDoc "
            f"{i}.\n</text>\n\nQ{i}?\n\n"
            'Format your response as follows: "Therefore, the answer is (insert answer here)".'
        ),
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": gold},
        "extra_info": {"index": i, "split": "train"},
    }
    for i, (source, ability, gold) in enumerate(
        (
            ("long_toc_choices_0_20000", "doc-mc", "The correct answer is (B)"),
            ("docmath_20000_40000", "doc-math", "the answer is 3.5"),
            ("musique_0_20000", "doc-qa", "the answer is Zürich"),
        )
    )
]
MEMAGENT = [
    {
        "data_source": "hotpotqa",
        "prompt": user("Who wrote {it}?"),
        "context": f"Document 1:\nIt\nAnna wrote {{it}} {i}.",
        "ability": "memory",
        "reward_model": {"style": "rule", "ground_truth": ["Anna", "anna b"]},
        "extra_info": {"index": i, "question": "Who wrote {it}?", "num_docs": 200},
    }
    for i in range(2)
]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_docqa_rows_keep_their_prompt_and_get_their_ground_truth_as_answer(suffix, tmp_path):
    path = (write_parquet if suffix == ".parquet" else write)(tmp_path / f"train{suffix}", *DOCQA)
    rows = sources.read(path, prompt_row)
    assert [row["answer"] for row in rows] == [
        "The correct answer is (B)",
        "the answer is 3.5",
        "the answer is Zürich",
    ]
    for row, published in zip(rows, DOCQA, strict=True):
        assert {key: row[key] for key in published} == published  # what a reward may want to read
    assert rows[2]["id"] == ("train.parquet row 3" if suffix == ".parquet" else "train.jsonl line 3")


def test_memagent_rows_put_document_and_question_into_one_prompt(tmp_path):
    rows = sources.read(write_parquet(tmp_path / "hotpotqa_train_32k.parquet", *MEMAGENT), prompt_row)
    assert rows[1]["prompt"] == (
        "Please read the following text and answer the question below.\n\n<text>\nDocument 1:\nIt\nAnna "
        "wrote {it} 1.\n"
        "</text>\n\nWho wrote {it}?\n\nPut the answer in \\boxed{}."
    )
    assert rows[1]["answer"] == ["Anna", "anna b"] and rows[1]["data_source"] == "hotpotqa"


def test_chats_are_read_as_they_are(tmp_path):
    chat = [*user("q"), {"role": "assistant", "content": "a"}]
    for path in (
        write(tmp_path / "c.jsonl", {"messages": chat}),
        write_parquet(tmp_path / "c.parquet", {"messages": chat}),
    ):
        assert sources.read(path, sources.messages_row)[0]["messages"] == chat


GOOD = {"prompt": "p", "answer": "a"}


@pytest.mark.parametrize("row, message", [
    ("{not json", "line 2 is not JSON"),
    ("[1, 2]", "line 2 must be an object"),
    ({"prompt": "p"}, 'line 2 must have "prompt" and "answer"'),
    ({"prompt": "", "answer": "a"}, 'line 2: "prompt"'),
    ({"prompt": [{"role": "tool", "content": "x"}], "answer": "a"}, 'line 2: "prompt"'),
    ({"prompt": [{"role": "assistant", "content": "x"}], "answer": "a"}, "end with the user's"),
    ({"prompt": "p", "answer": 3}, 'line 2: "answer"'),
    ({"prompt": "p", "answer": []}, 'line 2: "answer"'),
    ({"prompt": "p", "reward_model": {"style": "rule"}}, 'line 2: "answer"'),
])  # fmt: skip
def test_a_malformed_line_is_named(row, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        sources.read(write(tmp_path / "d.jsonl", GOOD, row), prompt_row)


@pytest.mark.parametrize("messages, message", [
    (None, 'row 2: "messages" must be'),
    ([], 'row 2: "messages" must be'),
    ([*user("q")], "end with the assistant's"),
    ([*user("q"), {"role": "assistant", "content": ""}], "row 2.*says nothing"),
    ([{"role": "function", "content": "q"}, {"role": "assistant", "content": "a"}], "row 2"),
])  # fmt: skip
def test_a_malformed_chat_is_named_by_its_row(messages, message, tmp_path):
    good = [*user("q"), {"role": "assistant", "content": "a"}]
    with pytest.raises(BadInput, match=message):
        sources.read(
            write_parquet(tmp_path / "c.parquet", {"messages": good}, {"messages": messages}),
            sources.messages_row,
        )


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "b.parquet").write_text("not parquet")
    write(tmp_path / "d.jsonl", "", "  ")
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), tmp_path / "e.parquet"
    )
    for name in ("none.jsonl", "none.parquet", "b.parquet"):
        with pytest.raises(BadInput, match=rf"{name} cannot be read"):
            sources.read(tmp_path / name, prompt_row)
    for name in ("d.jsonl", "e.parquet"):
        with pytest.raises(BadInput, match=rf"{name} has no rows"):
            sources.read(tmp_path / name, prompt_row)
    for name, message in (
        ("hf://org/name", "write hf://ORG/NAME/PATH"),
        ("hf://org/name/f.parquet", "cannot be fetched"),
    ):
        with pytest.raises(BadInput, match=message):  # HF_HUB_OFFLINE is set: nobody asked for the network
            sources.read(name, prompt_row)


def test_a_file_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    """As the hub's client leaves it there after a download, the part that needs the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "datasets--Tongyi-Zhiwen--DocQA-RL-1.6K", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    write_parquet(repository / "snapshots" / commit / "train.parquet", *DOCQA)
    rows = sources.read("hf://Tongyi-Zhiwen/DocQA-RL-1.6K/train.parquet", prompt_row)
    assert len(rows) == 3 and rows[0]["id"] == "train.parquet row 1"


# ------------------------------------------------------------------------------------------------------ order


def test_rows_come_in_a_new_order_each_epoch_and_the_same_for_a_seed():
    files = [list(range(12)), list(range(12, 20))]
    source, other = Mixture(files, [], 1), Mixture(files, [], 2)
    first, second = ([source[i + 20 * epoch] for i in range(20)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert [
        Mixture(files, [], 1)[i] for i in range(40)
    ] == first + second  # any place can be asked first: resuming needs it
    assert [other[i] for i in range(20)] != first


@given(
    st.lists(st.floats(0.05, 20), min_size=1, max_size=4),
    st.integers(0, 300),
    st.integers(1, 60),
    st.integers(0, 9),
)
def test_weights_hold_in_every_stretch_and_a_draw_depends_on_its_place_only(weights, start, n, seed):
    sizes = [3 + 4 * part for part in range(len(weights))]
    files = [[(part, k) for k in range(size)] for part, size in enumerate(sizes)]
    source = Mixture(files, weights, seed)
    draws = [source[i] for i in range(start + n)]
    assert Mixture(files, weights, seed)[start + n - 1] == draws[-1]
    counts = Counter(part for part, _ in draws[start:])
    for part, weight in enumerate(weights):
        assert abs(counts[part] - n * weight / sum(weights)) < len(weights) + 1
        own = [k for p, k in draws if p == part]
        for epoch in range(len(own) // sizes[part]):  # all rows of a file, before any comes again
            assert sorted(own[epoch * sizes[part] :][: sizes[part]]) == list(range(sizes[part]))


def test_another_number_of_weights_is_refused():
    with pytest.raises(BadInput, match="1 numbers for 2 files"):
        Mixture([[1], [2]], [1.0], 0)


def test_held_out_rows_that_are_trained_on_are_counted():
    rows = [{"prompt": text} for text in "aabc"]
    assert sources.duplicates(rows) == 1
    assert sources.shared([{"prompt": "b"}, {"prompt": "z"}], [rows]) == 1
