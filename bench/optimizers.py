"""Memory and time of a step of each --optimizer and --masters, on random weights.

    python bench/optimizers.py                      # 32 million parameters on a CPU, 2 billion on a GPU
    python bench/optimizers.py --million 512

A line of JSON for each, in a process of its own
  optimizer, masters, device, parameters
  held_bytes           weight, gradient and moments of a parameter, on the device, as counted in the tensors
  host_bytes           of them in the CPU's memory, beside a GPU
  step_peak_bytes      the most that a step allocates besides, in all (for any number of parameters alike,
                       but for adamw on a CPU, whose copies are as large as the largest matrix)
  resident_bytes       a parameter's share of the most memory that the process had (on a CPU)
  seconds              of a step
"""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from measure import peak_bytes, seconds

from base.cli import one_line_errors, option, parse
from core.optimizer import MASTERS, OPTIMIZERS, make_optimizer


@dataclass
class Config:
    million: int = option(0, "parameters (default: 32 million on a CPU, 2 billion on a GPU)", least=0)
    optimizer: str = option("", "only this one; needs --masters (default: all)", ["", *OPTIMIZERS])
    masters: str = option("fp32", "with --optimizer", list(MASTERS))
    learning_rate: float = option(1e-6, "of the steps", above=0)
    weight_decay: float = option(0.0, "of the steps", least=0)
    adam_beta2: float = option(0.999, "of the steps")


def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(config):
    """One optimizer in this process -> {key: value} of its line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrices = (config.million or (2048 if device.type == "cuda" else 32)) // 4
    before, shape = resident(), (1024, 4096)  # 4 million and a little
    weights = [torch.randn(shape, device=device).to(MASTERS[config.masters]) for _ in range(matrices)]
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    for parameter in parameters:
        parameter.grad = torch.randn(shape, device=device).to(parameter.dtype)
    optimizer = make_optimizer(config, parameters)
    optimizer.step()
    kept = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    tensors = [*parameters, *(parameter.grad for parameter in parameters), *kept]
    count = sum(parameter.numel() for parameter in parameters)
    held = {kind: sum(x.nbytes for x in tensors if x.device.type == kind) for kind in ("cuda", "cpu")}
    (time,) = seconds(optimizer.step, rounds=3, least=0)
    most = resident()  # before the profiler, which has memory of its own
    return {
        "optimizer": config.optimizer,
        "masters": config.masters,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "parameters": count,
        "held_bytes": round(held[device.type] / count, 3),
        "host_bytes": round(held["cpu"] / count, 3) if device.type == "cuda" else 0,
        "step_peak_bytes": peak_bytes(optimizer.step),
        "resident_bytes": round((most - before) / count, 2) if device.type == "cpu" else None,
        "seconds": round(time, 4),
    }


one_line_errors()
flags = parse(Config, __doc__)
if flags.optimizer:
    print(json.dumps(measure(flags)), flush=True)
else:
    for masters in MASTERS:
        for optimizer in OPTIMIZERS:
            more = ["--optimizer", optimizer, "--masters", masters, "--million", str(flags.million)]
            subprocess.run([sys.executable, __file__, *more], check=True)
