"""The processes of a run: which of them this is, how they meet, and that they end together, with one reason.

torchrun starts one process for each GPU. Started by python alone, a script is one of one.
"""

import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from base.cli import BadInput, one_line, print_error, tell_torchrun


def rank_and_world():
    """This process's rank and the number of ranks, as torchrun gives them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def compute_dtype():
    """The dtype to compute in: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def rank_and_device():
    """-> rank, world (number of ranks), device."""
    if "RANK" not in os.environ:
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    return *rank_and_world(), device


def nodes():
    """Machines that torchrun has started ranks on: its --nnodes."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def check_restarts(resume, flags):
    """Raises BadInput if torchrun is to start failed ranks again (--max-restarts) and --resume does not let
    them go on, as they would with `flags`."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not resume:
        raise BadInput(f"torchrun's --max-restarts needs {flags}: ranks it starts again would begin anew")


def deterministic(cuda):
    """Have every operation that has a way to give the same bits twice take it, and name those that have none
    in a warning. To be called before vLLM is imported."""
    if cuda:
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "VLLM_BATCH_INVARIANT": "1"}
    torch.use_deterministic_algorithms(True, warn_only=True)


def connect(device, timeout=timedelta(minutes=30)):
    """init_process_group on every rank. From here on the first error of any rank is the last thing on the
    screen: what the others then run into, since it is gone, is one line each. timeout: how long a rank waits
    for the others.

    torchrun may start all ranks again; torch 2.13 keeps one store over all starts, in which they would find
    the addresses of those that died. Hence a name of its own for each start.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)

    def hook(kind, error, traceback):
        line = one_line(kind, error)
        text = line or f"{kind.__name__}: {error}"
        try:
            first = json.loads(store.compare_set("first error", "", json.dumps([rank, text])))
        except RuntimeError:  # whoever kept the store is gone as well
            first = [rank, text]
        if first[0] == rank:
            print_error(line, kind, error, traceback)
        elif first[1] != text:
            print(f"rank {rank} ends, since rank {first[0]} did: {first[1]}", file=sys.stderr, flush=True)
        tell_torchrun(first[1])

    sys.excepthook = hook


def gather_or_fail(function, *arguments):
    """Call on every rank -> what it returned, of each rank. A BadInput, or what a disk says, on any rank is a
    BadInput on all of them, so that none waits for one that is gone."""
    result = problem = None
    try:
        result = function(*arguments)
    except (OSError, BadInput) as error:
        problem = str(error)
    except CheckpointException as error:  # torch's: what went wrong on which rank
        problem = str(next(iter(error.failures.values()))[0])
    everyone = [(result, problem)] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(everyone, (result, problem))
    for _, problem in everyone:
        if problem:
            raise BadInput(problem)
    return [result for result, _ in everyone]


def on_rank_0(function):
    """function() of rank 0, given to every rank; a BadInput on rank 0 is one on all. The first call connects
    the ranks, after rank 0 has done its work, which may start processes, and take hours."""
    rank, world = rank_and_world()
    if world == 1:
        return function()
    value = problem = None
    if rank == 0:
        try:
            value = function()
        except BadInput as error:
            problem = str(error)
    if not dist.is_initialized():
        connect(rank_and_device()[2], timeout=timedelta(days=1))
    shared = [value, problem]
    dist.broadcast_object_list(shared)
    if shared[1]:
        raise BadInput(shared[1])
    return shared[0]
