"""Run by torchrun from test_distributed.py: the same step on one process and sharded over ranks must agree.

torchrun --nproc-per-node 2 tests/ranks.py CHECKPOINT {tied,untied}
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

import grpo
from checkpoint import full_tensor
from model import Qwen3
from saliency import Tracker, mask_gradients, select_rows

dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # a mismatch fails, it does not hang
rank, world = dist.get_rank(), dist.get_world_size()
mesh = dist.init_device_mesh("cpu", (world,))
checkpoint, export = sys.argv[1:]

generator = torch.Generator().manual_seed(0)
draw = lambda n: torch.randint(0, 101, (n,), generator=generator)  # noqa: E731
groups = [(draw(5 + 9 * i), [draw(n) for n in (3, 1, 1 + i)]) for i in range(6)]
advantages = torch.randn(6, 3, generator=generator)
tokens = sum(len(c) for _, completions in groups for c in completions)


def step(model, indices, scale, checkpointing):
    """Masked gradients of `indices` of the groups, and the norm that clipping saw."""
    model.checkpointing = checkpointing
    with Tracker(model) as tracker:
        for i in indices:
            prompt, completions = groups[i]
            logprobs = torch.cat(model.group_logprobs(prompt, completions, 1.3))
            lengths = torch.tensor([len(c) for c in completions])
            weights = grpo.token_weights(lengths, "token", 18, tokens, 8)
            loss, _ = grpo.loss(logprobs, logprobs.detach(), advantages[i].repeat_interleave(lengths), weights)
            (loss * scale).backward()
    magnitudes = tracker.magnitudes()
    masks = select_rows(magnitudes, 0.3)
    mask_gradients(model, masks)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    return magnitudes, masks, norm


sharded = Qwen3.from_pretrained(checkpoint, mesh=mesh)
magnitudes, masks, norm = step(sharded, range(rank, 6, world), world, checkpointing=True)
sharded_gradients = {name: full_tensor(p.grad) for name, p in sharded.named_parameters()}
empty = any(p.grad.to_local().numel() == 0 for p in sharded.parameters())
sharded.save_pretrained(export)

whole = Qwen3.from_pretrained(checkpoint)
expected_magnitudes, expected_masks, expected_norm = step(whole, range(6), 1.0, checkpointing=False)
for name, magnitude in magnitudes.items():  # every rank saw all groups, so both are averages over 18 sequences
    torch.testing.assert_close(magnitude, expected_magnitudes[name], rtol=1e-5, atol=1e-6)
for name, mask in masks.items():
    assert torch.equal(mask, expected_masks[name]), name
for name, parameter in whole.named_parameters():
    torch.testing.assert_close(sharded_gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    if name in masks:
        assert sharded_gradients[name][~masks[name]].abs().max() == 0, name
torch.testing.assert_close(norm.full_tensor(), expected_norm, rtol=1e-5, atol=0)
for a, b in zip(Qwen3.from_pretrained(export).parameters(), whole.parameters(), strict=True):
    assert torch.equal(a, b)
if rank == world - 1:
    print(f"agree; empty shards: {empty}")
dist.destroy_process_group()
