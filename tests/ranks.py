"""Run by torchrun from test_distributed.py: the same step on one process and over ranks must agree, sharded
and replicated, a group of completions on each rank or shared by several; all weights, or LoRA's updates of
them.

torchrun --nproc-per-node 2 tests/ranks.py CHECKPOINT EXPORT SAVED REPLICATE CONTEXT_PARALLEL LORA

SAVED/one is of one process (resume.py), SAVED/trained the export of the same model; SAVED/many is made of
what came back.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import grpo
from core import lora
from core.checkpoint import full_tensor, local_part, weight_shard
from core.optimizer import SlicedAdamW, as_rows_of
from core.parallel import add_copies, context_group, weight_mesh
from model import Qwen3, logprobs_in_passes
from run import resume
from saliency import Tracker, mask_gradients, masked_step, select_rows

dist.init_process_group("gloo", timeout=timedelta(minutes=5))  # a mismatch fails, it does not hang
rank, world = dist.get_rank(), dist.get_world_size()
checkpoint, export, saved = map(Path, sys.argv[1:4])
replicate, context_parallel, rank_of_updates = map(int, sys.argv[4:])
low_rank = lora.Settings(rank_of_updates, 6) if rank_of_updates else None
mesh, copies = weight_mesh("cpu", replicate)
sharing = mesh.size() if mesh else 1  # ranks

generator = torch.Generator().manual_seed(0)
draw = lambda n: torch.randint(0, 101, (n,), generator=generator)  # noqa: E731
groups = [(draw(1 + 9 * i), [draw(n) for n in (3, 1, 1 + i)]) for i in range(6)]
advantages = torch.randn(6, 3, generator=generator)
tokens = sum(len(c) for _, completions in groups for c in completions)


def loss(i, part, logprobs, scale):
    """The loss of some completions of group i, given the log-probabilities of their tokens."""
    lengths = [len(groups[i][1][j]) for j in part]
    totals = grpo.Totals(18, tokens, 8)
    per_token = advantages[i][part].repeat_interleave(torch.tensor(lengths))
    return grpo.loss(logprobs, logprobs.detach(), per_token, lengths, totals, aggregation="token")[0] * scale


def load(**where):
    """The checkpoint, with LoRA with updates that are not 0."""
    model, generator = Qwen3.from_pretrained(checkpoint, low_rank=low_rank, **where), torch.Generator()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            (local, first), values = (
                weight_shard(parameter),
                torch.randn(parameter.shape, generator=generator),
            )
            local.data.copy_(values[first : first + len(local)] / 10)
    return model


def trained(model):
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def step(model, indices, scale, checkpointing, two_stage, copies=None):
    """Leaves masked gradients of `indices` of the groups, added up over copies -> their log-probabilities and
    entropies {group: (N, 2)}, with LoRA followed by what its reference says, magnitudes, masks,
    mask_gradients' result, the norm that clipping saw."""
    model.checkpointing, values = checkpointing, {}
    model.attention_recompute = not two_stage
    with Tracker(model, tokens="not-first") as tracker:
        for i in indices:
            prompt, completions = groups[i]
            read = model.read(prompt)
            leaves = read.detach() if two_stage else read
            for part in ([0, 2], [1]) if two_stage else ([0, 2, 1],):  # one token alone is fewer than ranks
                logprobs, entropies = model.completion_logprobs(leaves, [completions[j] for j in part], 1.3)
                (loss(i, part, logprobs, scale) - 0.01 * scale * entropies.sum()).backward()
                values.setdefault(i, []).append(torch.stack((logprobs, entropies), 1).detach())
            if low_rank:
                base = logprobs_in_passes(lora.Base(model), prompt, completions, [[0, 2], [1]], 1.3)
                values[i].append(torch.cat(base)[:, None].expand(-1, 2))
            if two_stage:
                read.backward(leaves)
    add_copies(model.parameters(), copies)
    values = {i: torch.cat(parts) for i, parts in values.items()}
    magnitudes = tracker.magnitudes()
    masks = select_rows(magnitudes, 0.3)
    squares = mask_gradients(model, masks)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    return values, magnitudes, masks, squares, norm


whole = load()
expected_values, expected_magnitudes, expected_masks, *expected = step(whole, range(6), 1.0, False, False)

sharded = load(mesh=mesh, context=context_group("cpu", context_parallel))
indices = range(rank // context_parallel, 6, world // context_parallel)
for checkpointing, two_stage in ((True, False), (False, True), (True, True)):
    sharded.zero_grad()
    values, magnitudes, masks, squares, norm = step(
        sharded, indices, sharing, checkpointing, two_stage, copies
    )
    for i in indices:
        torch.testing.assert_close(values[i], expected_values[i], rtol=1e-5, atol=1e-5)
    for name, magnitude in magnitudes.items():  # averages over all 18 sequences on every rank
        torch.testing.assert_close(magnitude, expected_magnitudes[name], rtol=1e-5, atol=1e-6)
    for name, mask in masks.items():
        assert torch.equal(mask, expected_masks[name]), name
    gradients = {name: full_tensor(p.grad) for name, p in trained(sharded).items()}
    for name, parameter in trained(whole).items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        if (mask := masks.get(name.replace("bias", "weight").replace("lora_B.", ""))) is not None:
            assert gradients[name][~mask].abs().max() == 0, name
    torch.testing.assert_close(full_tensor(norm), expected[1], rtol=1e-5, atol=0)
if copies:  # of bf16 masters
    half = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    half.grad = torch.ones_like(half)
    add_copies([half], copies)
    assert (half.grad == copies.size()).all() and half.grad.dtype == torch.bfloat16
empty = any(local_part(p.grad).numel() == 0 for p in trained(sharded).values())
sharded.save_pretrained(export)
dist.barrier()  # rank 0 writes
for name, parameter in Qwen3.from_pretrained(export).named_parameters():
    assert torch.equal(parameter, lora.merged(whole, name))
# Steps with other rows each: the first leaves momentum in rows that the second does not select. AdamW divides
# by the gradient's size: with its usual epsilon it makes of the rounding of a gradient that is nearly 0 a
# whole step. With this one an error of 1e-6 in a gradient moves a weight by lr / eps = 1 times that.
optimizers = {
    model: torch.optim.AdamW(trained(model).values(), lr=0.1, eps=0.1, weight_decay=0.1)
    for model in (whole, sharded)
}
for unselected, rule in (("grad", "top"), ("frozen", "bottom"), ("grad", "random")):
    masks = select_rows(expected_magnitudes, 0.3, rule, torch.Generator().manual_seed(1))
    of_whole = masked_step(optimizers[whole], whole, masks, expected[0], unselected)
    of_ranks = masked_step(optimizers[sharded], sharded, masks, squares, unselected)
    torch.testing.assert_close(of_ranks, of_whole, rtol=1e-4, atol=1e-12)
for (name, parameter), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
    torch.testing.assert_close(full_tensor(other), parameter, rtol=1e-4, atol=1e-6, msg=name)
# 8-bit moments and bf16 masters, of the same gradients: each rank's rows are those of one process. Rounding
# may differ in a last bit, which decides 1 in 2^16 random roundings, and fewer of the levels.
packed = {}
for label, own_mesh in (("one", None), ("many", mesh)):
    model = Qwen3.from_pretrained(checkpoint, torch.bfloat16, mesh=own_mesh)
    optimizer = SlicedAdamW(model.parameters(), 1e-3, "adamw8bit", (0.9, 0.999), 0.1)
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
            parameter.grad = as_rows_of(parameter, values)
        squares = mask_gradients(model, expected_masks)
        masked_step(optimizer, model, expected_masks, squares, "frozen" if number == 2 else "grad")
    packed[label] = model, optimizer


def kept(model, optimizer):
    """{what: tensor} of each parameter's rows and moments, whole."""
    named = model.named_parameters()
    states = {f"{key} {name}": x for name, p in named for key, x in optimizer.state[p].items() if x.dim()}
    return {key: full_tensor(x) for key, x in (states | dict(model.named_parameters())).items()}


one, many = kept(*packed["one"]), kept(*packed["many"])
differing = 0
for key, value in one.items():
    if value.dtype == torch.float32:
        torch.testing.assert_close(many[key], value, rtol=1e-5, atol=0, msg=key)
    else:
        differing += (many[key] != value).sum().item()
assert differing <= 20, differing
resume.save(saved / "packed", 1, *packed["many"], {"settings": {}, "random": {}}, {}, 1)
model = Qwen3.from_pretrained(checkpoint, torch.bfloat16)
optimizer = SlicedAdamW(model.parameters(), 1e-3, "adamw8bit", (0.9, 0.999), 0.1)
resume.load(saved / "packed" / "step-000001", model, optimizer)
for key, value in kept(model, optimizer).items():
    assert torch.equal(value, many[key]), key
if low_rank:  # as on GPUs: what is frozen in bf16, the update and its gradients in fp32
    half = load(mesh=mesh, context=sharded.context, compute_dtype=torch.bfloat16)
    values = step(half, indices, sharing, True, True)[0]
    for parameter in half.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
        assert not parameter.requires_grad or parameter.grad.dtype == torch.float32
    differences = torch.cat([(values[i] - expected_values[i]).flatten() for i in indices])
    assert differences.abs().mean() < 0.1, differences.abs().mean()
# What one process saved goes on on these ranks, and back.
model = load(mesh=mesh)
optimizer = torch.optim.AdamW(trained(model).values())
step, state = resume.find(saved / "one", "auto", {})
extra = resume.load(step, model, optimizer)
for name, parameter in Qwen3.from_pretrained(saved / "trained").named_parameters():
    assert torch.equal(lora.merged(model, name), parameter)
resume.save(saved / "many", 2, model, optimizer, {**state, "random": {"rank": rank}}, extra, 1)
if rank == world - 1:
    print(f"agree; empty shards: {empty}")
dist.destroy_process_group()
