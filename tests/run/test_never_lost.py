"""run/resume.py never removes or overwrites what it did not write, or what it cannot go on from."""

import shutil

import pytest
import torch
from conftest import make_small

from base.cli import BadInput
from run import resume


def save(directory, step):
    model = make_small()
    optimizer = torch.optim.AdamW(model.parameters())
    resume.save(directory, step, model, optimizer, {"settings": {}, "random": None}, {}, keep=1)


def test_saving_removes_its_own_steps_and_nothing_else(tmp_path):
    directory = tmp_path / "checkpoints"
    save(directory, 6)
    for name in ("step-000006-backup", "step-best", "step-000099"):  # the last: a copy that looks like a step
        shutil.copytree(directory / "step-000006", directory / name)
    (directory / "step-notes.txt").write_text("mine")
    (directory / "step-000007.partial").mkdir()  # what a killed save leaves
    save(directory, 8)
    left = sorted(path.name for path in directory.iterdir())
    assert left == [
        "LATEST",
        "step-000006-backup",
        "step-000008",
        "step-000099",
        "step-best",
        "step-notes.txt",
    ]


@pytest.mark.parametrize("written", ["metrics.jsonl", "config.json", "checkpoint"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(tmp_path, written):
    (tmp_path / written).write_text("of a run")
    with pytest.raises(
        BadInput, match=f"has {written} of a run, but no checkpoint .* remove the run to begin"
    ):
        resume.find(tmp_path / "checkpoints", "auto", {})


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    resume.open_metrics(tmp_path / "metrics.jsonl", 0).close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert resume.find(tmp_path / "checkpoints", "auto", {}) == (None, None)
    resume.open_metrics(tmp_path / "metrics.jsonl", 0).close()
    assert not (tmp_path / "metrics.jsonl").read_text()


def test_a_step_published_before_latest_named_it_is_gone_on_from(tmp_path):
    resume.open_metrics(tmp_path / "metrics.jsonl", 0).close()
    save(tmp_path / "checkpoints", 3)
    (tmp_path / "checkpoints" / "LATEST").write_text(resume.NONE_YET)
    assert resume.find(tmp_path / "checkpoints", "auto", {})[0].name == "step-000003"
