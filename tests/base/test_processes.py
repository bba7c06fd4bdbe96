"""processes.py: ranks that fail together, one of which is why."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_ranks

CODE = """
import sys
import torch
import torch.distributed as dist
from base import processes
from base.cli import BadInput, one_line_errors

class Weird(BaseException):
    pass

def work():
    if rank == 1:
        raise BadInput("what rank 1 read is wrong")

one_line_errors()
def refuse():
    raise BadInput("rank 0 cannot")

rank, world, device = processes.rank_and_device()
assert processes.from_rank_0(lambda: f"by rank {rank}", "first") == "by rank 0"
try:
    processes.from_rank_0(refuse, "second")
except BadInput as error:
    assert str(error) == "rank 0 cannot"
else:
    raise Weird("no refusal")
processes.connect(device)  # as if nothing had been
if sys.argv[1] == "alone" and rank == 1:
    raise Weird("on rank 1 alone")
if sys.argv[1] == "together":
    processes.gather_or_fail(work)
dist.barrier()
"""


@pytest.mark.parametrize(
    "how, text", [("alone", "Weird: on rank 1 alone"), ("together", "error: what rank 1 read is wrong")]
)
def test_ranks_end_at_once_with_the_first_cause_last_on_the_screen(how, text, tmp_path):
    """Nothing waits for the collective's half hour: run_ranks does not, either."""
    (tmp_path / "code.py").write_text(CODE)
    result = run_ranks(2, tmp_path / "code.py", how)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    root = next(i for i, line in enumerate(lines) if line.startswith("Root Cause"))
    assert any(line.strip().startswith("traceback : ") and line.endswith(text) for line in lines[root:])
    own = [line for line in lines if line.startswith(("code.py: ", "Weird: ", "rank "))]
    if how == "alone":
        assert own[0] == text  # the other says why it ends, unless torchrun ends it before
        assert own[1:] in ([], [f"rank 0 ends, since rank 1 did: {text}"])
    else:
        assert own == [f"code.py: {text}"]  # by one of the two


@pytest.mark.parametrize(
    "given, spins", [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_threads_that_wait_spin_shortly_unless_the_user_says_how_long(given, spins):
    """libgomp itself says what it took from the environment that `import base` leaves."""
    [torch] = importlib.util.find_spec("torch").submodule_search_locations
    code = f"import base, ctypes; ctypes.CDLL({torch + '/lib/libgomp.so.1'!r})"
    ours = ("OMP_", "GOMP_", "LD_PRELOAD")  # vLLM, if it has run in this process, preloads libgomp
    free = {name: os.environ[name] for name in os.environ if not name.startswith(ours)}
    env = {**free, **given, "OMP_DISPLAY_ENV": "VERBOSE"}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in said.stderr, said.stderr


def test_programs_import_base_before_torch():
    programs = [
        path
        for path in (*ROOT.glob("*.py"), *ROOT.glob("studies/*.py"))
        if "parse(Config" in path.read_text()
    ]
    assert len(programs) > 9
    for path in programs:
        text = path.read_text()
        torch = re.search(r"^(import|from) torch", text, re.M)
        base = re.search(r"^from base", text, re.M)
        assert base and (torch is None or base.start() < torch.start()), path
