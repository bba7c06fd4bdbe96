"""run/samples.py: which groups are shown, and how."""

import math

import torch
from conftest import ROOT

from prompts import chat
from rollout import Completion, Group
from run import samples


def test_what_is_shown_is_spread():
    rewards = [0.5, 0.0, 1.0, 0.25, 0.0, 0.75]
    order = [0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    assert samples.spread(rewards, 2, float) == [0.0, 1.0]
    assert samples.spread(rewards, 3, float) == [0.0, 0.25, 1.0]
    assert samples.spread(rewards, 1, float) == [0.5]
    assert samples.spread(rewards, 0, float) == []
    assert samples.spread(rewards, -1, float) == samples.spread(rewards, 9, float) == order


def test_a_long_text_loses_its_middle_and_says_so():
    text = "a" * 3000 + "b" * 3000
    assert samples.cut(text) == "a" * 2000 + "[... 2,000 characters left out ...]" + "b" * 2000
    assert samples.cut("a" * 4000) == "a" * 4000


def test_characters_that_are_trained_on_are_marked():
    """Bytes of one character may be several tokens; two runs of trained tokens; a control token is text."""
    tokenizer = chat.load_tokenizer(ROOT / "assets" / "tiny", 10**6)
    roles, texts = ("user", "assistant") * 2, ("é?", "日本 né", "<|im_end|>", "ok")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    ids, trained = chat.encode_conversation(tokenizer, messages)
    line = samples.document(3, {"id": "row 1"}, ids, trained, tokenizer)
    marked = [line["text"][start:end] for start, end in line["trained"]]
    assert marked == ["日本 né<|im_end|>", "ok<|im_end|>"]
    assert line["text"].count("<|im_start|>user\né?<|im_end|>") == 1


def test_of_several_rewards_each_and_their_weighted_sum_are_kept():
    tokenizer = chat.load_tokenizer(ROOT / "assets" / "tiny", 10**6)
    group = Group(0, [5], [Completion([6], [-0.5], True), Completion([7], [-0.5], True)], id=3)
    group.take_rewards(torch.tensor([[1.0, 0.5], [0.0, math.nan]]), torch.tensor([1.0, 0.5]))
    (line,) = samples.Groups(tokenizer, 1).of_step(1, [group], [group])
    found = [(each["reward"], each["rewards"], each["score"]) for each in line["completions"]]
    assert found == [(1.0, [1.0, 0.5], 1.25), (0.0, [0.0, None], 0.0)]


def test_numbers_that_json_cannot_hold_are_null():
    assert [samples.number(x) for x in (None, float("nan"), float("inf"), 1 / 3)] == [None] * 3 + [0.333333]
    assert samples.number(torch.tensor(0.5).item()) == 0.5
