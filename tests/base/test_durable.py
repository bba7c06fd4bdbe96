"""durable.py: a directory belongs to one kind of thing and one process; nothing else is lost."""

import errno
import fcntl
import os

import pytest
import torch
from conftest import files_in, make_small, refusal
from inputs import TINY, script, sft, write

from base import durable
from base.cli import BadInput

recall = script("eval_data.py", "--samples", 2)
EVALUATION = "evaluation", ["settings.json"]


def test_a_directory_says_what_it_is_for_and_refuses_another_kind(tmp_path):
    out = tmp_path / "out"
    durable.claim(out, "run of sft.py", ["metrics.jsonl"]).close()  # nothing came of it
    durable.claim(out, *EVALUATION).close()
    write(out / "results.jsonl", "")
    durable.claim(out, *EVALUATION).close()
    assert (out / "lock").read_text() == "evaluation\n"
    with pytest.raises(
        BadInput, match="out holds another kind: evaluation, not ablation; choose another --x"
    ):
        durable.claim(out, "ablation", ["results.jsonl"], "--x")
    assert (out / "lock").read_text() == "evaluation\n"


@pytest.mark.parametrize("lock", [None, ""])
def test_a_directory_of_before_is_known_by_its_files(lock, tmp_path):
    write(tmp_path / "settings.json", "{}")
    if lock is not None:
        write(tmp_path / "lock", lock)
    before = files_in(tmp_path), (tmp_path / "lock").exists()
    with pytest.raises(BadInput, match=r"holds no run of sft.py \(metrics.jsonl or checkpoints\)"):
        durable.claim(tmp_path, "run of sft.py", ["metrics.jsonl", "checkpoints"])
    assert (files_in(tmp_path), (tmp_path / "lock").exists()) == before
    durable.claim(tmp_path, *EVALUATION).close()
    assert (tmp_path / "lock").read_text() == "evaluation\n"


def test_programs_refuse_what_another_has_made(tmp_path):
    """As they are started; before anything is written."""
    for kind in ("run of train.py", "run of sft.py", "evaluation", "magnitudes"):
        directory = tmp_path / kind.replace(" ", "-")
        durable.claim(directory, kind, []).close()
        write(directory / "metrics.jsonl", "")
    run, evaluation = tmp_path / "run-of-train.py", tmp_path / "evaluation"
    before = files_in(tmp_path)
    there = "holds another kind: run of train.py, not "
    assert there + "evaluation; choose another --out" in refusal(*recall("--out", run)(tmp_path))
    assert there + "magnitudes; choose" in refusal("studies/magnitudes.py", TINY, "--out", run)
    assert there + "perturbation; choose" in refusal("studies/perturb.py", TINY, "--out", run)
    assert there + "ablation; choose" in refusal("studies/ablation.py", "sweep", "--out", run)
    assert there + "run of studies.tiny; choose" in refusal("studies/tiny.py", "--out", run)
    for flags in ([], ["--resume", "auto"]):
        message = refusal(*sft(tmp_path, "--out", evaluation, *flags))
        assert "evaluation holds another kind: evaluation, not run of sft.py; choose another --out" in message
    (tmp_path / "good.jsonl").unlink()  # sft's data
    assert files_in(tmp_path) == before


def test_a_disk_without_locks_is_one_line(tmp_path, monkeypatch):
    def refused(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refused)
    with pytest.raises(
        BadInput, match=r"is on a disk without locks \(No locks available\): .* Lustre: -o flock"
    ):
        durable.claim(tmp_path, *EVALUATION)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("elsewhere")])
def test_a_lock_that_is_no_file_is_one_line(make, tmp_path):
    make(tmp_path / "lock")
    with pytest.raises(BadInput, match=r"lock is no file; remove it|cannot be written: (Is a dir|Too many)"):
        durable.claim(tmp_path, *EVALUATION)
    assert not (tmp_path / "elsewhere").exists()


def test_what_lies_under_the_name_of_an_unfinished_file_is_replaced_not_followed(tmp_path):
    thesis = write(tmp_path / "thesis.tex", "mine")
    (tmp_path / "a.json.partial").symlink_to(thesis)
    durable.write(tmp_path / "a.json", "ours")
    assert thesis.read_text() == "mine" and (tmp_path / "a.json").read_text() == "ours"
    (tmp_path / "b.json.partial").mkdir()
    with pytest.raises(BadInput, match="b.json cannot be written: Is a directory"):
        durable.write(tmp_path / "b.json", "ours")
    for name in ("model.partial", "model.old"):
        (tmp_path / name).symlink_to(tmp_path)
    for _ in range(2):
        make_small().save_pretrained(tmp_path / "model")
    assert thesis.read_text() == "mine" and not (tmp_path / "model.old").is_symlink()


def test_weights_may_be_read_by_those_who_may_read_their_neighbours(tmp_path):
    make_small().save_pretrained(tmp_path / "model", torch.bfloat16)
    modes = {path.name: oct(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 2 and len(set(modes.values())) == 1, modes
