"""Trackers: a run's metrics, and those of its resumed lives, as each program itself reads them again."""

import importlib.util
import json

import pytest
from conftest import refusal
from inputs import rl, write

from base.cli import BadInput
from run.tracker import Tracker

SETTINGS = {"steps": 4, "data": ["a", "b"], "name": "run"}


def needs(package):
    there = importlib.util.find_spec(package)
    return pytest.mark.skipif(not there, reason="pip install --no-deps -r requirements-trackers.txt")


def line(step):
    return {"step": step, "reward": step / 10, "mask_overlap": None, "seconds": {"rollout": 1.5}}


def two_lives(kind, directory):
    """Steps 1 to 3, a kill after the checkpoint of step 1, steps 2 to 4."""
    for steps in ((1, 2, 3), (2, 3, 4)):
        tracker = Tracker(kind, directory, SETTINGS)
        for step in steps:
            tracker.log(line(step))
        tracker.close()
    return json.loads((directory / "tracker.json").read_text())


@needs("tensorboard")
def test_tensorboard_has_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert two_lives("tensorboard", tmp_path)["step"] == 4
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["reward", "seconds/rollout"]
    rewards = [(event.step, event.value) for event in events.Scalars("reward")]
    assert rewards == [(step, pytest.approx(step / 10)) for step in (1, 2, 3, 4)]


@needs("trackio")
def test_trackio_has_every_step_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    run = tmp_path / "run"
    run.mkdir()
    name = f"run-{two_lives('trackio', run)['id']}"
    [record] = SQLiteStorage.get_run_records("longact")
    assert record["name"] == name
    logged = SQLiteStorage.get_logs("longact", name, run_id=record["id"])
    assert [(each["step"], each["reward"]) for each in logged] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert logged[0]["seconds/rollout"] == 1.5 and "mask_overlap" not in logged[0]


def test_what_is_missing_or_damaged_is_one_line(tmp_path):
    if not importlib.util.find_spec("wandb"):
        assert refusal(*rl("--tracker", "wandb")) == (
            "--tracker wandb is not installed: .venv/bin/pip install wandb"
        )
    write(tmp_path / "tracker.json", {"kind": "tensorboard", "step": "x", "id": "a"})
    with pytest.raises(BadInput, match='tracker.json is not what train.py leaves: "id", "step"'):
        Tracker("tensorboard", tmp_path, SETTINGS)
