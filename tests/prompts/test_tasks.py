"""prompts/tasks.py: a reader without a model finds every answer in its passage."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passages import TOLD, read

from base.cli import BadInput
from prompts import tasks


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(tasks.TASKS)), st.integers(0, 2**20), st.integers(3, 48), st.integers(0, 40))
def test_answers_are_in_the_passage(task, i, facts, filler):
    row = tasks.Source(task, 0, facts, filler)[i]
    passage, question = row["prompt"].split("\n\n")
    name = question.removeprefix("What is the code for ").removesuffix("?")
    code, hops = read(passage, name)
    assert row["answer"] == f"The code for {name} is {code}."
    assert hops == (2 if task == "chain" else 0)
    told = len(TOLD.findall(passage))
    assert told == facts // {"recall": 1, "tracking": 2, "chain": 3}[task] * {"tracking": 2, "chain": 3}.get(
        task, 1
    )
    assert passage.count(".") == told + filler


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 12))
def test_chains_of_any_length_are_asked_about_their_last_names_first(seed, hops, asked):
    facts = 12 // (hops + 1) * (hops + 1)
    passage, asked_and_answers = tasks.chain(random.Random(seed), 12, 0, hops, asked)
    found = []
    for question, answer in asked_and_answers:
        name = question.removeprefix("What is the code for ").removesuffix("?")
        code, far = read(passage, name)
        assert answer == f"The code for {name} is {code}."
        found.append(far == hops)
    assert len(found) == min(asked, facts)
    assert found == sorted(found, reverse=True) and sum(found) == min(asked, facts // (hops + 1))


def test_a_row_depends_on_its_seed_and_place_alone():
    source = tasks.Source("chain", "train 1", 24, 12)
    assert source[5] == tasks.Source("chain", "train 1", 24, 12)[5] != source[6]
    with pytest.raises(BadInput, match="--facts 2: the task chain can have 3 to 48"):
        tasks.Source("chain", 0, 2, 0)
