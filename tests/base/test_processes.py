"""processes.py: ranks that fail together, one of which is why."""

import pytest
from conftest import run_ranks

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
