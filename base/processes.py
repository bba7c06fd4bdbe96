"""The processes of a run: which one this is, how they connect, and how they end together, with one reason.

torchrun starts one process, a rank, for each GPU. Started by python alone, a script is rank 0 of 1.
"""

import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from base.cli import BadInput, one_line, print_error, tell_torchrun

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets


def number_of(variable, default):
    """A number that torchrun sets in the environment. Raises BadInput for anything else."""
    text = os.environ.get(variable, str(default))
    if not (text.isascii() and text.isdecimal()):
        raise BadInput(f"{variable} is {text!r} in the environment; torchrun sets it to a number: unset it")
    return int(text)


def rank_and_world():
    """-> this process's rank and the number of ranks, from torchrun's environment; (0, 1) without it. Raises
    BadInput for an environment that torchrun does not make."""
    rank, world = number_of("RANK", 0), number_of("WORLD_SIZE", 1)
    if not rank < world:
        raise BadInput(
            f"RANK is {rank} and WORLD_SIZE {world} in the environment; unset them, or use torchrun"
        )
    return rank, world


def rank_and_device():
    """-> rank, world (number of ranks), torch.device: the GPU of this rank, or the CPU.

    Without torchrun it first sets the environment variables of one process, which `connect` and vLLM read.
    """
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    rank, world = rank_and_world()
    if missing := [name for name in TORCHRUN if name not in os.environ]:
        raise BadInput(f"RANK is set in the environment and {missing[0]} is not; unset it, or use torchrun")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", number_of("LOCAL_RANK", 0)) if cuda else torch.device("cpu")
    return rank, world, device


def compute_dtype():
    """The dtype to compute in: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def nodes():
    """The number of machines that torchrun has started ranks on: its --nnodes."""
    return number_of("GROUP_WORLD_SIZE", 1)


def check_restarts(resume, flags):
    """Raises BadInput if torchrun may restart failed ranks (--max-restarts) but `resume`, the value of
    --resume, is empty. flags: what the message says to add."""
    if number_of("TORCHELASTIC_MAX_RESTARTS", 0) and not resume:
        raise BadInput(f"torchrun's --max-restarts needs {flags}: restarted ranks would begin anew")


def deterministic(cuda):
    """Make every operation that can be deterministic so; those that cannot are named in a warning. To be
    called before vLLM is imported."""
    if cuda:
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "VLLM_BATCH_INVARIANT": "1"}
    torch.use_deterministic_algorithms(True, warn_only=True)


def connect(device, timeout=timedelta(hours=2)):
    """init_process_group, to be called on every rank. timeout: how long a rank waits for the others, which
    may generate 128K tokens, or ask a slow judge. torchrun ends all at once when a rank has died, so only one
    that hangs is waited for that long.

    From here on only the first error of any rank is printed in full. The others, which fail because that rank
    is gone, print one line each that names it.

    torchrun may restart all ranks. torch 2.13 keeps one store over all starts, in which they would find the
    addresses of ranks that died; hence each start has its own prefix.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)

    def hook(kind, error, traceback):
        text = one_line(error)
        try:
            first = store.compare_set("first error", "", json.dumps([rank, text]))
            first_rank, first_text = json.loads(first)
        except RuntimeError:  # the process that kept the store is gone as well
            first_rank, first_text = rank, text
        if first_rank == rank:
            print_error(kind, error, traceback)
        elif first_text != text:
            print(f"rank {rank} ends, since rank {first_rank} did: {first_text}", file=sys.stderr, flush=True)
        tell_torchrun(first_text)

    sys.excepthook = hook


def gather_or_fail(function, *arguments):
    """Call function(*arguments) on every rank -> [what it returned on rank 0, on rank 1, ...], on every rank.

    A BadInput or OSError on any rank becomes a BadInput on all, so that none waits for one that is gone.
    """
    result = problem = None
    try:
        result = function(*arguments)
    except (OSError, BadInput) as error:
        problem = str(error)
    except CheckpointException as error:  # torch's; .failures is {rank: (error, traceback)}
        problem = str(next(iter(error.failures.values()))[0])
    everyone = [(result, problem)] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(everyone, (result, problem))
    for _, problem in everyone:
        if problem:
            raise BadInput(problem)
    return [result for result, _ in everyone]


def on_rank_0(function):
    """Call function() on rank 0 -> what it returned, on every rank. A BadInput on rank 0 is one on all.

    The first call connects the ranks, but only after rank 0 has called the function, which may start
    processes and take hours.
    """
    rank, world = rank_and_world()
    if world == 1:
        return function()
    shared = outcome(function) if rank == 0 else [None, None]
    if not dist.is_initialized():
        connect(rank_and_device()[2], timeout=timedelta(days=1))
    dist.broadcast_object_list(shared)
    return value_of(shared)


def from_rank_0(function, name):
    """The same, by torchrun's store, for what comes before the ranks connect: they are not connected
    afterwards. The value is a text; `name` is new to each call."""
    rank, world = rank_and_world()
    if world == 1:
        return function()
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"{name}, start {start}", next(dist.rendezvous("env://"))[0])
    if rank == 0:
        store.set("result", json.dumps(outcome(function)))
    store.wait(["result"], timedelta(days=1))
    return value_of(json.loads(store.get("result")))


def outcome(function):
    """Call function() -> [what it returned, None], or [None, the text of the BadInput that it raised]."""
    try:
        return [function(), None]
    except BadInput as error:
        return [None, str(error)]


def value_of(outcome):
    """What a function returned, from its `outcome` on another rank. Raises the BadInput that it raised."""
    value, problem = outcome
    if problem:
        raise BadInput(problem)
    return value
