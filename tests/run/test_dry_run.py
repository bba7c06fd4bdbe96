"""dry_run.py: what it leaves in the system's temporary directory."""

import os
import subprocess
import tempfile

from conftest import ROOT, python

from run import dry_run

MADE = "print(dry_run.temporary_directory(), flush=True)"


def start(directory, end):
    """-> the Popen of a process that makes a directory, prints it, and ends so."""
    code = "import os, sys, signal, tempfile\nfrom run import dry_run\n"
    code += f"tempfile.tempdir = {str(directory)!r}\n{MADE}\n{end}"
    (directory / "start.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(python(directory / "start.py"), cwd=ROOT, env=env, **pipes)


def test_a_dry_run_removes_what_a_killed_one_left_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "dry-run-mine").mkdir()
    (tmp_path / "dry-run-mine" / "thesis.tex").write_text("")
    with start(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)") as killed:
        left = killed.stdout.readline().strip()
    with start(tmp_path, "sys.stdin.read()") as live:
        used = live.stdout.readline().strip()
        own = dry_run.temporary_directory()
        now = {str(path) for path in tmp_path.glob("*dry-run-*")}
        assert now == {used, str(own), str(tmp_path / "dry-run-mine")} and left not in now
        live.communicate()
    assert str(own) in {str(path) for path in tmp_path.iterdir()} and not (tmp_path / used).exists()
