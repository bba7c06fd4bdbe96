"""resume.py, durable.py, interrupt.py: what is saved comes back to the bit, what is damaged is named, what
fails leaves the rest whole. tests/ranks.py has the part with several ranks, test_train.py and test_sft.py
whole runs that are killed."""

import json
import math
import os
import pickle
import random
import shutil
import signal
import time
from types import SimpleNamespace
from unittest import mock

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, make_small, run_code, run_script

from base import durable
from base.cli import BadInput
from base.interrupt import Interrupt
from prompts import rewards
from run import resume
from run.config import MAY_CHANGE, Config


def train(model, optimizer, steps):
    """Steps whose gradients depend on the weights and on every global random generator."""
    for _ in range(steps):
        ids = [random.randrange(101), numpy.random.randint(101), torch.randint(101, ()).item()]
        optimizer.zero_grad()
        model(torch.tensor([ids])).square().mean().backward()
        optimizer.step()
    return model, optimizer


def fresh(seed=0):
    model = make_small(seed=seed)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def save(directory, step, run, keep=2, **extra):
    state = {
        "settings": {"seed": 1, "contents of --data": "abc"},
        "random": resume.random_states(),
        "before": 0.1,
    }
    resume.save(directory, step, *run, state, extra, keep)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the checkpoints of steps 2 and 4, and the weights after step 7."""
    directory = tmp_path_factory.mktemp("saved")
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    run, extra = fresh(), {"mask": torch.tensor([True, False, True]), "grid": torch.arange(6.0).view(2, 3)}
    with mock.patch.object(resume, "FILE_BYTES", 100_000):
        for step in (2, 4):
            save(directory, step, train(*run, 2), **extra)
    assert len(list(directory.glob("step-000004/shard-*"))) > 1
    return directory, [p.detach().clone() for p in train(*run, 3)[0].parameters()]


FIXED = {"seed": 1, "contents of --data": "abc"}


def test_steps_after_a_checkpoint_are_those_of_a_run_that_went_on(saved):
    directory, expected = saved
    path, state = resume.find(directory, "auto", FIXED)
    assert path.name == "step-000004" and (state["step"], state["before"]) == (4, 0.1)
    run = fresh(seed=5)
    extra = resume.load(path, *run)
    assert extra["mask"].tolist() == [True, False, True] and extra["grid"].tolist() == [[0, 1, 2], [3, 4, 5]]
    resume.set_random_states(state["random"])
    train(*run, 3)
    assert all(torch.equal(a, b) for a, b in zip(run[0].parameters(), expected, strict=True))


def test_nothing_on_the_way_back_is_a_pickle(saved, monkeypatch):
    """Files are safetensors and JSON, by content; and it comes back where unpickling is not possible."""
    for path in (saved[0] / "step-000004").iterdir():
        content = path.read_bytes()
        assert content[8:9] == b"{" if path.suffix == ".safetensors" else json.loads(content)

    def never(*arguments, **keywords):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, never)
    path, _ = resume.find(saved[0], "auto", FIXED)
    assert "mask" in resume.load(path, *fresh())
    dcp.save({"x": torch.ones(3)}, checkpoint_id=saved[0].parent / "default", no_dist=True)
    with pytest.raises(
        dcp.api.CheckpointException, match="unpickled"
    ):  # this would have noticed: torch's default does
        dcp.load({"x": torch.ones(3)}, checkpoint_id=saved[0].parent / "default", no_dist=True)


def shard(step):
    return next(step.glob("shard-*"))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": (lambda step: os.truncate(shard(step), 1000), "shard-00001.*it has 1,000 bytes, "),
    "missing": (lambda step: shard(step).unlink(), "shard-00001.*is missing"),
    "a bit of a tensor": (lambda step: flip(shard(step), -100), "shard-00001.*its SHA-256 is not"),
    "a bit of a header": (lambda step: flip(shard(step), 50), "shard-00001.*its SHA-256 is not"),
    "a bit of the state": (lambda step: flip(step / "state.json", 20), "state.json is damaged"),
    "another's shard": (
        lambda step: shutil.copy(shard(step), step / "shard-00002.safetensors"),
        "is not of this checkpoint",
    ),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "manifest.json"),
    "half a manifest": (lambda step: os.truncate(step / "manifest.json", 99), "manifest.json is damaged"),
    "other JSON": (
        lambda step: (step / "manifest.json").write_text('{"files": [1]}'),
        "manifest.json is damaged",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(kind, saved, tmp_path, capsys):
    directory = shutil.copytree(saved[0], tmp_path / "checkpoints")
    do, message = DAMAGE[kind]
    do(directory / "step-000004")
    with pytest.raises(BadInput, match=f"--resume: .*step-000004.*{message}"):
        resume.find(directory, directory / "step-000004", FIXED)
    path, state = resume.find(directory, "auto", FIXED)
    assert path.name == "step-000002" and state["step"] == 2
    assert "warning: " in (warning := capsys.readouterr().err) and "step-000004" in warning
    assert (directory / "LATEST").read_text() == "step-000002\n"  # a later kill must not go on from step 4
    do(directory / "step-000002")
    with pytest.raises(BadInput, match="none of the 1 checkpoints in .* is whole"):
        resume.find(directory, "auto", FIXED)


def test_a_damaged_latest_costs_nothing(saved, tmp_path, capsys):
    """One flipped bit made another number of it: not a reason to begin anew, or from an older checkpoint."""
    directory = shutil.copytree(saved[0], tmp_path / "checkpoints")
    for text in ("step-000001\n", "step-\n", ""):
        (directory / "LATEST").write_text(text)
        assert resume.find(directory, "auto", FIXED)[0].name == "step-000004"
        assert "which is not there; trying step-000004" in capsys.readouterr().err
    for text in (" step-000002/ \n", "./step-000002"):
        (directory / "LATEST").write_text(text)
        assert resume.find(directory, "auto", FIXED)[0].name == "step-000002"
    (directory / "LATEST").write_text("step-000004")
    assert not capsys.readouterr().err
    for step in (2, 4):
        shutil.rmtree(directory / f"step-00000{step}")
    with pytest.raises(
        BadInput, match="LATEST names 'step-000004', but there is no checkpoint; remove the run"
    ):
        resume.find(directory, "auto", FIXED)


def test_a_rank_that_is_early_does_not_look_for_a_directory_that_rank_0_makes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume.candidates_for(tmp_path / "not yet" / "checkpoints", "auto") == []


def test_without_a_checkpoint_a_run_begins_anew(tmp_path):
    assert resume.find(tmp_path / "checkpoints", "auto", FIXED) == (None, None)


@pytest.mark.parametrize("changed, message", [
    ({"seed": 2}, "step-000004: seed was 1, now it is 2"),
    ({"contents of --data": "abd"}, "the contents of --data are not what the run began with"),
    ({"rule": "top"}, "rule was None, now it is top"),
])  # fmt: skip
def test_other_settings_and_files_are_refused_and_change_nothing(changed, message, saved):
    with pytest.raises(BadInput, match=message):
        resume.find(saved[0], saved[0] / "step-000004", {**FIXED, **changed})
    assert (saved[0] / "LATEST").read_text() == "step-000004\n"


def test_a_setting_that_was_added_since_may_be_at_its_default(saved):
    """SimpleNamespace: what a dataclass of settings with its defaults is."""
    fixed, usual = {**FIXED, "new_flag": 3}, SimpleNamespace(seed=0, new_flag=3)
    assert resume.find(saved[0], "auto", fixed, usual)[0].name == "step-000004"
    with pytest.raises(BadInput, match="new_flag was 3, now it is 4"):
        resume.find(saved[0], "auto", {**fixed, "new_flag": 4}, usual)


def test_runs_without_a_name_that_begin_in_the_same_second_have_two_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda how: "now")
    assert [resume.new_name() for _ in range(3)] == ["now", "now-2", "now-3"]
    resume.lock_run(tmp_path / "runs" / "now", "", *WHO)


def test_tensors_of_another_model_or_without_value_are_refused(saved, tmp_path):
    other = make_small(num_hidden_layers=1)
    with pytest.raises(BadInput, match="step-000004 is of another model: model.layers.1"):
        resume.load(saved[0] / "step-000004", other, torch.optim.AdamW(other.parameters()))
    model, optimizer = train(*fresh(), 1)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = float("inf")
    save(tmp_path, 1, (model, optimizer))
    with pytest.raises(BadInput, match="weight model.norm.weight has values that are not finite"):
        resume.load(tmp_path / "step-000001", *fresh())
    model.save_pretrained(tmp_path / "export")
    with pytest.raises(BadInput, match="model.norm.weight has values that are not finite"):
        type(model).from_pretrained(tmp_path / "export")


def test_as_many_checkpoints_stay_as_should_and_none_of_an_earlier_life(tmp_path):
    run = train(*fresh(), 1)
    for step in (1, 2, 3):
        save(tmp_path, step, run)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-000002", "step-000003"]
    resume.find(tmp_path, tmp_path / "step-000002", FIXED)
    (tmp_path / "step-000009.partial").mkdir()
    save(tmp_path, 3, run, keep=1)  # comes again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-000003"]
    assert resume.find(tmp_path, "auto", FIXED)[0].name == "step-000003"


def test_a_moment_that_was_never_made_counts_no_step(tmp_path):
    """Every update so far was skipped: torch makes AdamW's states by a step, which must not count."""
    save(tmp_path, 1, fresh())
    run = fresh()
    resume.load(tmp_path / "step-000001", *run)
    for a, b in zip(train_once(*run).parameters(), train_once(*fresh()).parameters(), strict=True):
        assert torch.equal(a, b)


def train_once(model, optimizer):
    model(torch.arange(9)[None]).square().mean().backward()
    optimizer.step()
    return model


def test_a_disk_that_takes_nothing_more_is_one_line_and_earlier_checkpoints_stay(saved, tmp_path, full):
    directory = shutil.copytree(saved[0], tmp_path / "checkpoints")
    run = train(*fresh(), 1)
    full(20_000)
    with pytest.raises(
        BadInput, match="step 6 cannot be saved in .*: .*File too large; earlier checkpoints are as they were"
    ):
        save(directory, 6, run)
    with pytest.raises(BadInput, match=r"model.safetensors cannot be written: .*File too large"):
        run[0].save_pretrained(tmp_path / "export")
    assert sorted(p.name for p in directory.iterdir()) == ["LATEST", "step-000002", "step-000004"]
    assert resume.find(directory, "auto", FIXED)[0].name == "step-000004"
    with (
        open("/dev/full", "ab", buffering=0) as file,
        pytest.raises(BadInput, match="/dev/full cannot be written: No space left"),
    ):
        durable.append(file, {"step": 1})


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(BadInput, match="step 1 cannot be saved in .*: .*Not a directory"):
        save(tmp_path / "checkpoints", 1, train(*fresh(), 1))
    code = (
        "from base import cli; cli.one_line_errors(); print(end='x', file=open('/dev/full', 'w'), flush=True)"
    )
    result = run_code(code)
    assert (
        result.returncode == 1
        and result.stderr.splitlines()[0] == "-c: error: [Errno 28] No space left on device"
    )


WHO = "train.py", "--name"


def test_a_run_is_entered_by_one_process_at_a_time_and_only_when_asked(tmp_path):
    lock = resume.lock_run(tmp_path / "run", "", *WHO)
    again = tmp_path / "again.py"
    again.write_text(
        f"from run import resume\nresume.lock_run(resume.Path({str(tmp_path / 'run')!r}), 'auto', *{WHO})"
    )
    result = run_script(again, env={"PYTHONPATH": str(ROOT)})
    assert "another process is running there" in result.stderr
    lock.close()
    resume.lock_run(tmp_path / "run", "", *WHO)  # a start that failed left a lock only
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="exists; --resume auto goes on with it"):
        resume.lock_run(tmp_path / "run", "", *WHO)
    (tmp_path / "step-000001").mkdir()
    for path in (tmp_path / "step-000001", tmp_path / "run" / "checkpoints" / "step-000001"):
        with pytest.raises(BadInput, match="is not a checkpoint of this run"):
            resume.lock_run(tmp_path / "run", path, *WHO)


def test_metrics_are_cut_to_the_step_and_missing_lines_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with pytest.raises(BadInput, match="does not have the lines of steps 1 to 4"):
        resume.open_metrics(path, 4)
    with resume.open_metrics(path, 2) as file:
        durable.append(file, {"step": 3, "new": True})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "new": true}\n'
    resume.open_metrics(path, 0).close()
    assert path.read_text() == ""
    with pytest.raises(BadInput, match="does not have"):
        resume.open_metrics(tmp_path / "none.jsonl", 1)


def test_samples_are_cut_to_the_step_and_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    resume.open_samples(path, 3).close()
    assert path.read_text() == ""
    lines = [f'{{"step": {step}, "text": "}}"}}\n' for step in (1, 1, 2, 3)]
    path.write_text("".join(lines) + '{"step": 3, "te')
    with resume.open_samples(path, 2) as file:
        durable.append(file, {"step": 3, "x": 1}, {"step": 3, "x": math.inf})
    kept = path.read_text()
    assert kept == "".join(lines[:3]) + '{"step": 3, "x": 1}\n{"step": 3, "x": null}\n'
    path.write_text(kept.replace("{", "[", 1))
    with pytest.raises(BadInput, match="samples.jsonl: line 1 is damaged; remove that line"):
        resume.open_samples(path, 2)


def test_a_signal_is_noted_and_the_second_ends_at_once(capfd):
    before = signal.getsignal(signal.SIGTERM)
    interrupt = Interrupt()
    assert not interrupt.asked()
    signal.raise_signal(signal.SIGTERM)
    assert interrupt.asked() and "SIGTERM: saving and ending soon" in capfd.readouterr().err
    interrupt.close()
    assert signal.getsignal(signal.SIGTERM) == before
    code = "import signal; from base.interrupt import Interrupt; i = Interrupt(); signal.raise_signal(2); "
    result = run_code(code + "print(1, flush=True); signal.raise_signal(2); print(2)")
    assert result.returncode == -signal.SIGINT and result.stdout == "1\n"


def test_a_changed_reward_file_is_noticed_and_one_name_is_a_list_of_one(tmp_path, monkeypatch, capsys):
    file = tmp_path / "noticed.py"
    file.write_text("score = max")
    monkeypatch.syspath_prepend(tmp_path)
    rewards.load_reward("noticed:score")
    config = Config(reward=["noticed:score"])
    before = resume.settings(config, MAY_CHANGE)
    before["reward"] = "noticed:score"  # as it was once
    resume.compare("step-1", {"settings": before}, resume.settings(config, MAY_CHANGE), config)
    assert capsys.readouterr().err == ""
    file.write_text("score = min")
    resume.compare("step-1", {"settings": before}, resume.settings(config, MAY_CHANGE), config)
    told = "warning: the file of --reward noticed:score is another than when step-1 was written"
    assert capsys.readouterr().err == f"{told}; from here on it scores\n"


@pytest.mark.parametrize("changed", [
    {"step": -1}, {"settings": 3}, {"random": []}, {"random": None}, {"random": {"a": 1}}
])  # fmt: skip
def test_a_state_that_save_did_not_write_is_refused_though_its_manifest_says_it_is_whole(
    changed, saved, tmp_path
):
    path = shutil.copytree(saved[0] / "step-000004", tmp_path / "step-000004")
    state = {**json.loads((path / "state.json").read_text()), **changed}
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = resume.digest(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="state.json is not what a run has written; remove .*/step-000004"):
        resume.find(tmp_path, path, FIXED)


@pytest.mark.parametrize(
    "states", [["x"], [{}], [{**resume.random_states(), "numpy": {"state": {"key": [-1]}}}]]
)
def test_random_states_that_nobody_saved_are_refused(states):
    kept = resume.random_states()
    with pytest.raises(BadInput, match="random generators in state.json are not what a run has written"):
        resume.set_random_states(states)
    resume.set_random_states([kept])
