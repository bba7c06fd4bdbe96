"""run/best.py: the best step so far, over the lives of a run; run/export.py: what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import make_small, refusal

from base.cli import BadInput
from model import Qwen3
from run import best, resume
from run.config import Config

HELD_OUT = {"a/b.jsonl": [{}], "c.jsonl": [{}]}
CONFIG = Config(model=None, eval_every=2, steps=7)


def offers(values, tmp_path, monkeypatch, done=0, config=CONFIG):
    """Values of the metric at steps done + 1, ... -> {step: whether it was evaluated}, with best/ made."""
    keeper, evaluated = best.Best(config, HELD_OUT), {}
    keeper.go_on(tmp_path, done)
    for step, value in enumerate(values, done + 1):
        results = {"a/b.jsonl": {"accuracy": value}}
        monkeypatch.setattr(best, "evaluate", lambda *_, results=results, **__: results)
        model = make_small(num_hidden_layers=1)
        torch.nn.init.constant_(model.model.norm.weight, step)
        evaluated[step] = "held_out" in keeper.evaluate(step, None, model, torch.float32, False)
    return evaluated


def kept(tmp_path):
    note = json.loads((tmp_path / "best" / "best.json").read_text())
    weight = Qwen3.from_pretrained(tmp_path / "best").model.norm.weight
    assert (weight == note["step"]).all()
    return note["step"], note["metric"], note["value"]


def test_the_best_step_stays_through_later_ones_and_a_crash(tmp_path, monkeypatch):
    evaluated = offers([0.9, 0.3, 0.9, 0.5, 0.9, 0.5, 0.1], tmp_path, monkeypatch)
    assert [step for step in evaluated if evaluated[step]] == [2, 4, 6, 7]  # every second, and the last
    assert kept(tmp_path) == (4, "a/b.jsonl/accuracy", 0.5)  # the first of equals
    (tmp_path / "best").rename(tmp_path / "best.old")  # a crash between two renames
    offers([0.4], tmp_path, monkeypatch, done=5)
    assert kept(tmp_path) == (4, "a/b.jsonl/accuracy", 0.5)
    offers([0.6], tmp_path, monkeypatch, done=5)
    assert kept(tmp_path) == (6, "a/b.jsonl/accuracy", 0.6)
    offers([0, 0.2], tmp_path, monkeypatch)  # a run that begins knows of no earlier one
    assert kept(tmp_path) == (2, "a/b.jsonl/accuracy", 0.2)


def test_a_note_that_no_run_wrote_is_refused(tmp_path, monkeypatch):
    offers([0.9, 0.3], tmp_path, monkeypatch)
    (tmp_path / "best" / "best.json").write_text('{"value": "abc"}')
    with pytest.raises(
        BadInput, match="best.json is not what a run has written: value 'abc'; remove .*/best"
    ):
        best.Best(CONFIG, HELD_OUT).go_on(tmp_path, 2)


def test_a_metric_that_there_is_not_is_refused():
    assert best.Best(replace(CONFIG, best="c.jsonl/accuracy_greedy"), HELD_OUT).set == "c.jsonl"
    assert best.Best(replace(CONFIG, best="accuracy_greedy"), HELD_OUT).key == "accuracy_greedy"
    for wrong in ("c.jsonl/reward", "d.jsonl/accuracy"):
        with pytest.raises(BadInput, match=f"--best {wrong} is not among a/b.jsonl/accuracy, "):
            best.Best(replace(CONFIG, best=wrong), HELD_OUT)


def test_a_step_of_another_model_is_not_exported(tmp_path):
    model, other = make_small(), make_small(num_hidden_layers=3)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"settings": {}, "random": None}
    resume.save(tmp_path / "checkpoints", 3, model, optimizer, state, {}, keep=1)
    step = tmp_path / "checkpoints" / "step-000003"
    assert "is not there; give --model" in refusal("run/export.py", step, tmp_path / "out")
    other.save_pretrained(tmp_path / "other")
    wrong = refusal("run/export.py", step, tmp_path / "out", "--model", tmp_path / "other")
    assert "step-000003 is of another model: model.layers.2" in wrong and not (tmp_path / "out").exists()
    (step / "state.json").write_text("{}")
    assert "state.json is damaged" in refusal("run/export.py", step, tmp_path / "out")
