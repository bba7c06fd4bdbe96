"""Run by torchrun from test_plan.py: every rank's measured peak of an FSDP2 update beside what memory_plan.py
predicts, each rank with a group of its own and all with one.

torchrun --nproc-per-node 2 tests/ranks_memory.py CHECKPOINT
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from measure import peak_bytes
from shapes import draw_group, train_on

from core.parallel import context_group
from model import Qwen3
from run import memory_plan

dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
model = Qwen3.from_pretrained(sys.argv[1], mesh=mesh)
model.checkpointing = True
optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
lengths = [64] * 8
prompt, completions = draw_group(model.config, 512, lengths, "cpu")
weights = [torch.ones(n) for n in lengths]


def update():
    for _ in range(2):
        train_on(model, prompt, completions, weights, 256)
    optimizer.step()
    optimizer.zero_grad()


update()
held = sum(p.to_local().numel() * 4 * 3 for p in model.parameters())
world = dist.get_world_size()
for sharing in (1, world):
    model.context = context_group("cpu", sharing)
    # The most of two updates: how many blocks are gathered at once depends on which rank waits for which.
    peak = torch.tensor(max(peak_bytes(update) for _ in range(2)) + held)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    measured = peak.item()
    lines, _ = memory_plan.training_memory(model.config, 512, 256, True, world, 4, context_parallel=sharing)
    # Where ranks wait for each other (on one core they do) a block less is gathered, or reduced, at a time.
    block, _ = memory_plan.parameter_counts(model.config)
    most = sum(lines.values())
    least = most - (4 + 4) * block
    ratios = f"{least / measured:.3f} to {most / measured:.3f}"
    print(f"{sharing} sharing: predicted / measured {ratios}, {measured:,} bytes, {lines}", flush=True)
dist.destroy_process_group()
