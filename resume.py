"""What a run needs to go on after it was interrupted: weights, AdamW's moments, and where it was.

    DIR/step-000100/rank-0-of-2.safetensors    this rank's shards: masters, and each one's exp_avg, exp_avg_sq and step
                    state.json                 what the script wants to know: the step, its settings

A step's directory is written under another name and renamed when every rank has written its part, and only then are earlier
ones removed: there is always a whole one. Another number of ranks cannot read it.
"""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from cli import BadInput


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def tensors_of(model, optimizer):
    """{name: this rank's part} of all weights and optimizer states; the optimizer has taken a step."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight {name}"] = local(parameter.detach())
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key} {name}"] = local(value)
    return tensors


def save(directory, step, model, optimizer, state):
    """Write directory/step-<step>; `state` is what JSON can hold. Every rank must call it."""
    rank, world = rank_and_world()
    final = Path(directory) / f"step-{step:06d}"
    partial = final.with_name(final.name + ".partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "state.json").write_text(json.dumps({"step": step, "ranks": world, **state}, indent=2) + "\n")
    barrier()
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(model, optimizer).items()}
    save_file(tensors, partial / f"rank-{rank}-of-{world}.safetensors")
    barrier()
    if rank == 0:
        os.replace(partial, final)
        for other in Path(directory).iterdir():
            if other != final:
                shutil.rmtree(other)


def newest(directory):
    """(the directory of the latest whole step, its state); (None, None) if there is none. Raises BadInput for one of
    another number of ranks and for one that cannot be read."""
    steps = sorted(Path(directory).glob("step-??????"))
    if not steps:
        return None, None
    try:
        state = json.loads((steps[-1] / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{steps[-1]}/state.json cannot be read: {error}") from error
    world = rank_and_world()[1]
    if state["ranks"] != world:
        raise BadInput(f"{steps[-1]} was written by {state['ranks']} ranks and needs as many to go on, not {world}")
    return steps[-1], state


@torch.no_grad()
def load(step_directory, model, optimizer):
    """Put weights and optimizer states back, bit for bit. Raises BadInput for files that cannot be read or do not fit."""
    rank, world = rank_and_world()
    path = Path(step_directory) / f"rank-{rank}-of-{world}.safetensors"
    for parameter in model.parameters():  # the states that a first step would make
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    tensors = tensors_of(model, optimizer)
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in stored.items()}:
        raise BadInput(f"{path} does not hold this model's tensors")
    for name, tensor in tensors.items():
        tensor.copy_(stored[name])
