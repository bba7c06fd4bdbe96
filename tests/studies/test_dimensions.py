"""dimensions.py: which dimensions a cell holds, whether its questions have right answers, and its report."""

import pytest
import torch
from conftest import ROOT, refusal

from prompts import chat, tasks
from studies import dimensions

TINY = ROOT / "assets" / "tiny"
Q = "model.layers.0.self_attn.q_proj"
MAGNITUDE = {Q: torch.arange(32.0).view(2, 16)}  # in each head the last are the largest


def dims(rule, n, draw=0, spare=3):
    held = ~dimensions.held(MAGNITUDE, {Q: 0.5}, rule, n, draw, spare)[Q].view(2, 16).isnan()
    return [head.nonzero().flatten().tolist() for head in held]


def test_each_rule_holds_what_its_name_says():
    assert dims("untouched", 0) == [[], []]
    assert dims("top", 2) == [[14, 15]] * 2 and dims("bottom", 3) == [[0, 1, 2]] * 2
    assert dims("next", 2) == [[11, 12]] * 2
    assert dims("random", 5) == dims("random", 5) != dims("random", 5, draw=1)
    for draw in range(20):
        for head in dims("spared", 13, draw):
            assert head == list(range(13))  # all but the three largest
    assert [len(head) for head in dims("random", 16)] == [16, 16]


def test_cells_come_by_what_they_tell():
    config = dimensions.Config(dimensions=[6, 1], draws=2, spare=2)
    names = [cell[0] for cell in dimensions.cells(config)]
    assert names[:6] == ["untouched", "top-6", "bottom-6", "random-6-0", "next-6", "spared-6-0"]
    assert len(set(names)) == len(names) == 15
    assert names[11:] == ["random-6-1", "random-1-1", "spared-6-1", "spared-1-1"]
    assert not any("next" in name for name, *_ in dimensions.cells(dimensions.Config(spare=0)))


@pytest.mark.parametrize("name", dimensions.FACTS)
def test_an_answer_is_what_the_passage_says_last(name):
    config = dimensions.Config(passages=2, questions=3)
    for text, asked in dimensions.passages(name, config):
        assert len(asked) == 3
        for question, answer in asked:
            person = question.removeprefix("What is the code for ").removesuffix("?")
            assert person in tasks.NAMES and question == tasks.question(person)
            told = [
                s + "." for s in text.rstrip(".").split(". ") if s.startswith(f"The code for {person} is ")
            ]
            assert told[-1] == answer and len(told) == (2 if name == "tracking" else 1)


def test_needles_are_rulers():
    tokenizer = chat.load_tokenizer(TINY, 896)
    [item] = dimensions.make_items(dimensions.Config(sets=["needle"], passages=1), tokenizer, 4096)
    assert item["id"] == "needle-0" and 512 < len(item["prompt_ids"]) <= 1024
    [number] = item["expected"]
    assert dimensions.score(item, f"it is {number}.")["score"] == 1
    assert dimensions.score(item, "it is 1.")["score"] == 0


def test_cells_are_reported_with_their_draws_averaged(tmp_path):
    def records(scores, said):
        about = {"task": "short", "expected": "yes", "prediction": said}
        return [{**about, "score": score} for score in scores]

    made = {
        ("untouched", "untouched", 0, 0): records([1.0, 1.0, 0.0, 1.0], " yes, and"),
        ("top-9", "top", 9, 0): records([0.0] * 4, "3333"),
        ("random-9-0", "random", 9, 0): records([1.0, 0.0, 0.0, 0.0], "a"),
        ("random-9-1", "random", 9, 1): records([1.0, 1.0, 0.0, 0.0], "b"),
    }
    entries = [dimensions.entry(cell, said) for cell, said in made.items()]
    assert entries[0]["scores"] == {"short": 0.75} and entries[0]["questions"] == {"short": 4}
    assert (entries[1]["name"], entries[1]["output"], entries[1]["output_share"]) == ("top-9", "3333", 1.0)
    lines = [line.split() for line in dimensions.report(entries).splitlines()]
    assert lines[1][:4] == ["untouched", "75", "100", "1"]  # begun right, but one does not stop
    assert ["random", "9", "38", "0", "2"] in [line[:5] for line in lines]  # 37.5
    dimensions.figure(tmp_path / "x.png", "t", entries, 32)
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_more_dimensions_than_a_head_has_are_refused():
    message = refusal("studies/dimensions.py", TINY, "--prompts", 1, "--dimensions", 30)
    assert "34 of a head's 32 dimensions cannot be held" in message
