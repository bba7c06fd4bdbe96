"""data.py, tasks.py: ChatML, sources, and the refusals a user meets."""

import json
import random

import pytest
import transformers
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import data
import tasks
from cli import BadInput

TINY = ROOT / "assets" / "tiny"


def test_chat_is_qwen3s_template_for_known_prompts():
    user = [{"role": "user", "content": "Hi"}]
    assert data.chat(user, thinking=True) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    empty = "<think>\n\n</think>\n\n"
    assert data.chat(user, thinking=False) == data.chat(user, thinking=True) + empty
    system = [{"role": "system", "content": "Be brief."}, *user]
    assert data.chat(system, True) == "<|im_start|>system\nBe brief.<|im_end|>\n" + data.chat(user, True)
    turns = [*user, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"}, *user]
    assert "<|im_start|>assistant\nHello<|im_end|>\n" in data.chat(turns, True)


@pytest.mark.parametrize("thinking", [True, False])
def test_chat_equals_the_template_shipped_with_the_tiny_model(thinking):
    """The jinja template that transformers and vLLM apply, and ours, which training applies, are two texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    for messages in (
        [{"role": "user", "content": "One\n\ntwo "}],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        [{"role": "user", "content": "U"}, {"role": "assistant", "content": "<think>\nt\n</think>\n\nA"}] * 2
        + [{"role": "user", "content": "V"}],
    ):
        theirs = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert data.chat(messages, thinking) == theirs


def test_the_tiny_tokenizer_is_the_same_in_transformers():
    ours, theirs = data.load_tokenizer(TINY, 10**6), transformers.AutoTokenizer.from_pretrained(TINY)
    text = data.chat(
        [{"role": "user", "content": tasks.Source("recall", 1, 8, 8)[0]["prompt"] + " Zürich 123 don't"}], False
    )
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=False) == text


def test_the_answer_follows_the_last_think_tag():
    assert data.answer_text("<think>\nno\n</think>\n\n yes ", thinking=True) == "yes"
    assert data.answer_text("never ended thinking about yes", thinking=True) == ""
    assert data.answer_text(" yes\n", thinking=False) == "yes"


# ------------------------------------------------------------------------------------------------------- recall task


@given(st.integers(0, 10**9), st.integers(1, 48), st.integers(0, 30))
def test_every_recall_question_has_its_answer_in_the_passage_once(seed, facts, filler):
    passage, questions = tasks.recall(random.Random(seed), facts, filler, asked=min(facts, 5))
    assert len(passage.split(". ")) == facts + filler
    for question, answer in questions:
        name = question.removeprefix("What is the code for ").removesuffix("?")
        assert passage.count(f"The code for {name} is ") == 1
        assert passage.count(answer) == 1 and answer.startswith(f"The code for {name} is ")
        assert len(answer.split()) == 8


def test_recall_rows_are_fixed_by_seed_and_index_and_held_out_ones_are_others():
    train, again = tasks.Source("recall", "train 0", 24, 24), tasks.Source("recall", "train 0", 24, 24)
    held_out = tasks.Source("recall", "held out", 24, 24)
    assert train[5] == again[5] and train[5] != train[6]
    drawn = {train[i]["prompt"] for i in range(3000)}
    assert len(drawn) == 3000
    assert not drawn & {held_out[i]["prompt"] for i in range(256)}


def test_recall_prompts_are_several_hundred_tokens():
    tokenizer = data.load_tokenizer(TINY, 10**6)
    source = tasks.Source("recall", "x", 24, 24)
    lengths = [len(data.encode_prompt(tokenizer, source[i], False, 4096)) for i in range(20)]
    assert 400 < min(lengths) <= max(lengths) < 600


# -------------------------------------------------------------------------------------------------------------- JSONL


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_jsonl_rows_come_in_a_new_order_each_epoch_and_the_same_for_a_seed(tmp_path):
    path = write(tmp_path / "d.jsonl", *({"prompt": f"p{i}", "answer": "a", "extra": i} for i in range(20)))
    source, again, other = (data.JsonlSource(path, seed) for seed in (1, 1, 2))
    first, second = ([source[i + 20 * epoch]["extra"] for i in range(20)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert [again[i + 20]["extra"] for i in range(20)] == second  # any place can be asked first: resuming needs it
    assert [other[i]["extra"] for i in range(20)] != first
    assert source[0]["id"].startswith("line ")


GOOD = {"prompt": "p", "answer": "a"}


@pytest.mark.parametrize("row, message", [
    ("{not json", "line 2 is not JSON"),
    ("[1, 2]", "line 2 must be an object"),
    ({"prompt": "p"}, "line 2 must be an object with"),
    ({"prompt": "", "answer": "a"}, 'line 2: "prompt"'),
    ({"prompt": [{"role": "tool", "content": "x"}], "answer": "a"}, 'line 2: "prompt"'),
    ({"prompt": [{"role": "assistant", "content": "x"}], "answer": "a"}, "end with the user's"),
    ({"prompt": "p", "answer": 3}, 'line 2: "answer"'),
    ({"prompt": "p", "answer": []}, 'line 2: "answer"'),
])  # fmt: skip
def test_a_malformed_line_is_named(row, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        data.read_jsonl(write(tmp_path / "d.jsonl", GOOD, row))


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(BadInput, match=r"none\.jsonl"):
        data.read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(BadInput, match="has no rows"):
        data.read_jsonl(write(tmp_path / "d.jsonl", "", "  "))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match=r"b\.jsonl"):
        data.read_jsonl(tmp_path / "b.jsonl")


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_prompt_over_the_limit_is_named_with_its_length():
    tokenizer = data.load_tokenizer(TINY, 10**6)
    with pytest.raises(BadInput, match=r"prompt line 7 has \d+ tokens; the context leaves 5"):
        data.encode_prompt(tokenizer, {"id": "line 7", **GOOD}, False, 5)


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"vocab_size is 100: not its tokenizer"):
        data.load_tokenizer(TINY, 100)
    with pytest.raises(BadInput, match="is missing"):
        data.load_tokenizer(tmp_path, 100)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="cannot be read"):
        data.load_tokenizer(tmp_path, 100)
