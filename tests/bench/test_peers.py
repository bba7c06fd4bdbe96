"""bench/peers.py without the peers' environment: jobs, a process that fails, gradients that are compared."""

import math
import sys

import pytest
import torch
from conftest import ROOT, refusal
from safetensors.torch import save_file

sys.path.insert(0, str(ROOT / "bench"))
import peers

TINY = str(ROOT / "assets" / "tiny")


def test_every_group_of_a_job_has_rewards_that_differ():
    job = peers.given_tokens(TINY, 7, 5, 4, 3)
    assert job == peers.given_tokens(TINY, 7, 5, 4, 3)
    for group in job["groups"]:
        assert len(group["prompt"]) == 7 and [len(ids) for ids in group["completions"]] == [3] * 4
        assert len(set(group["rewards"])) == 2
        assert min(map(min, group["completions"])) >= 0 and max(map(max, group["completions"])) < 896


def test_prompts_of_recall_are_texts_and_their_tokens():
    group = peers.prompts_of_recall(TINY, 2, 4, 24)["groups"][1]
    assert len(group["prompt"]) > 300 and group["answer"] in group["text"]


def test_an_entrant_that_fails_leaves_its_error_and_its_turns_are_empty(tmp_path):
    """TRL is not in this environment, so its real process ends when it is imported."""
    entrant = peers.Entrant("trl-4", peers.given_tokens(TINY, 7, 1, 4, 3), sys.executable, tmp_path, {})
    entrant.end()
    assert entrant.result["error"].startswith("ModuleNotFoundError") and not entrant.runs
    assert entrant.result["micro_batch"] == 4
    case = {"case": "long", "entrants": [entrant.result]}
    assert "ModuleNotFoundError" in peers.table(case)[1]


def test_there_is_no_race_if_gradients_differ(tmp_path):
    def entrant(name, scale):
        one = object.__new__(peers.Entrant)
        one.result, one.job = {"name": name}, {"gradients": str(tmp_path / name)}
        save_file({"w": scale * torch.ones(3), "v": torch.ones(2)}, one.job["gradients"])
        return one

    ours, near, far = entrant("ours", 1.0), entrant("near", 1.00001), entrant("far", 1.001)
    peers.check(near, {"loss": 0.5}, ours)
    assert near.result["loss"] == 0.5 and math.isclose(near.result["differs"], 1e-5, rel_tol=0.1)
    peers.check(far, {"loss": 0.5}, ours)
    assert far.result["error"] == "no race: a gradient differs from ours by 1.0e-03 of its norm"
    assert "error" not in near.result


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--entrants", "trl-1"], "must begin with ours"),
        (["--entrants", "ours", "trl"], "there are ours, ours-compile, trl-N"),
        (["--python", "no/python"], "no/python is missing: make peers installs TRL and verl there"),
    ],
)
def test_wrong_flags_are_one_line(flags, expected):
    assert expected in refusal("bench/peers.py", *flags)
