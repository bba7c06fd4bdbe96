"""Plain forward and backward of model.py beside transformers' Qwen3: same weights, same tokens, in turn.

    python bench/dense.py            # the laptop's shape on a CPU, Qwen3-0.6B's on a GPU; fp32 and bf16

transformers runs its "sdpa" attention. A line per shape and dtype: the seconds of each, and ours / theirs
(below 1: ours is faster). On a GPU it also prints which attention kernels ran, and fails if none is flash
attention.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from measure import seconds
from shapes import build, card, transformers_twin
from torch.profiler import ProfilerActivity, profile

from base.cli import one_line_errors, option, parse
from model import Qwen3


@dataclass
class Config:
    rounds: int = option(
        12, "timed rounds of each; always 1 for bf16 on a CPU, where one may take half a minute", least=1
    )


def run(model, ids):
    result = model(ids)
    getattr(result, "logits", result).mean().backward()
    model.zero_grad()


one_line_errors()
flags = parse(Config, __doc__)
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
config = build("0.6B" if device.type == "cuda" else "laptop")
print(card(config))
for dtype in (torch.float32, torch.bfloat16):
    ours = Qwen3.from_config(config, dtype, device)
    theirs = transformers_twin(ours, dtype, device)
    for rows, length in ((4, 512), (1, 4096)):
        ids = torch.randint(0, config.vocab_size, (rows, length), device=device)
        slow = device.type == "cpu" and dtype == torch.bfloat16  # without bf16 units, half a minute a run
        rounds = 1 if slow else flags.rounds
        mine, other = seconds(partial(run, ours, ids), partial(run, theirs, ids), rounds=rounds)
        print(
            f"{dtype!s:15} {rows} x {length}: ours {mine:.3f} s, transformers {other:.3f} s, "
            f"ratio {mine / other:.2f}"
        )
    if device.type == "cuda" and dtype == torch.bfloat16:
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            run(ours, ids)
        kernels = sorted({event.key for event in record.key_averages() if "flash" in event.key})
        print("attention kernels:", *kernels or ["none of them flash"], sep="\n  ")
        sys.exit(not kernels)
