"""Ranks that work together: on the weights by FSDP2's mesh, on one long prompt by a context group.

    mesh, copies = weight_mesh("cuda", replicate=2) # two nodes: a copy of the weights on each, sharded there
    group = context_group("cuda", 8)                # eight neighbours train on the same prompt
    model = Qwen3.from_pretrained(directory, mesh=mesh, context=group)
    ...                                             # forwards and backwards of an update
    add_copies(model.parameters(), copies)          # once: the gradients of both nodes

Context parallelism is DeepSpeed-Ulysses (arXiv 2309.14509) for completions that share a prompt. The n ranks
of a context group are given the same prompt and completions. Outside attention a rank holds its share of the
tokens, with all heads; in attention it holds all tokens, with its share of the heads. An all-to-all before
attention and one after it exchange the two. The prompt's keys and values stay as attention had them, so
completions find those of their heads on their own rank. What grows with tokens is thus 1/n on each rank:
activations, keys and values, and their gradients.

Log-probabilities are gathered on every rank of a context group, so each computes the same loss and the same
statistics. A sum of statistics over all ranks therefore counts a group n times, and is divided by n
(run/metrics.py). Gradients are not divided: a rank's backward reaches the weights only through its own
tokens, so the ranks' gradients are parts that add up to the group's.
"""

from itertools import pairwise

import torch
import torch.distributed as dist

from base.cli import BadInput
from core.checkpoint import local_part


def weight_mesh(device_type, replicate=1, bf16_masters=False):
    """-> mesh, copies. mesh: the DeviceMesh of the ranks that hold one copy of the weights together, for
    fully_shard, which averages gradients over them; None on a CPU whose rank holds a copy alone, but with
    bf16 masters it is needed there, too, to compute in fp32 from them. copies: the ProcessGroup of the ranks
    that hold the same part, each of its copy, for add_copies; None if there is one copy."""
    shape = replicate, dist.get_world_size() // replicate
    both = dist.init_device_mesh(device_type, shape, mesh_dim_names=("copy", "shard"))
    copies = both.get_group("copy") if replicate > 1 else None
    alone = device_type == "cpu" and shape[1] == 1 and not bf16_masters
    return None if alone else both["shard"], copies


@torch.no_grad()
def add_copies(parameters, copies):
    """After the last backward of an update: adds up the gradients of all copies of the weights, in fp32. A
    gradient so crosses the network between nodes once an update. FSDP2's own replicas (HSDP) would send it
    at each backward, of which a group has one a pass and one more."""
    if copies:
        for parameter in filter(lambda each: each.requires_grad, parameters):
            gradient = local_part(parameter.grad)
            wide = gradient.float()  # of fp32 it is no copy
            dist.all_reduce(wide, group=copies)
            gradient.copy_(wide)


def context_group(device_type, ranks):
    """-> the ProcessGroup of this rank and its neighbours, `ranks` in total, which train on the same prompts;
    None if ranks is 1."""
    if ranks == 1:
        return None
    shape = dist.get_world_size() // ranks, ranks
    return dist.init_device_mesh(device_type, shape, mesh_dim_names=("data", "context")).get_group("context")


def check_heads(ranks, model_config):
    """Raises BadInput unless the Qwen3Config's key heads can be divided evenly among `ranks` of a context
    group."""
    heads = model_config.num_key_value_heads
    if heads % ranks:
        problem = f"does not divide the model's {heads} key heads"
        raise BadInput(f"--context-parallel {ranks} {problem}, which its ranks share")


class Share:
    """A rank's share of T tokens in a context group: those from `start` to before `end`, the slice `own`.
    Without a group, all tokens."""

    def __init__(self, tokens, group=None):
        ranks, rank = (group.size(), group.rank()) if group else (1, 0)
        # With fewer tokens than ranks some shares are empty, but never the last rank's.
        bounds = [tokens * r // ranks for r in range(ranks + 1)]
        self.group, self.tokens, self.is_last = group, tokens, rank == ranks - 1
        self.sizes = [end - start for start, end in pairwise(bounds)]
        self.start, self.end = bounds[rank], bounds[rank + 1]
        self.own = slice(self.start, self.end)

    def last(self):
        """-> the Share of the last of the T tokens alone, which only the last rank has, and the slice of this
        rank's own tokens that it is, empty on the others."""
        own = self.end - self.start
        return Share(1, self.group), slice(own - self.is_last, own)

    def to_heads(self, x):
        """x (1, own tokens, heads, ...) -> (1, T, own heads, ...), differentiable."""
        return Exchange.apply(x, self, True) if self.group else x

    def to_tokens(self, x):
        """x (1, T, own heads, ...) -> (1, own tokens, heads, ...), differentiable."""
        return Exchange.apply(x, self, False) if self.group else x

    def predictions(self, predictors):
        """predictors (T,) int64: which row of [the prompt's last token | the T tokens] predicts each token.

        -> two (n,) int64: the tokens that this rank predicts, and the row that predicts each, of [the
        prompt's last token, only on the last rank | this rank's own tokens]."""
        own = (predictors > self.start) & (predictors <= self.end)
        first = (predictors == 0) & self.is_last
        predicted = (own | first).nonzero()[:, 0]
        rows = torch.where(first, 0, predictors - self.start - 1 + self.is_last)
        return predicted, rows[predicted]

    def whole(self, x, predicted):
        """Each rank's values of its predicted tokens, x (n,) -> those of all T tokens, (T,), on every rank of
        the group; differentiable."""
        if not self.group:
            return x
        return Whole.apply(x.new_zeros(self.tokens).index_copy(0, predicted, x), self.group)


class Exchange(torch.autograd.Function):
    """Share.to_heads and Share.to_tokens; each is the other's backward. Shares may differ in size, which gloo
    and NCCL both allow."""

    @staticmethod
    def forward(ctx, x, share, to_heads):
        ctx.share, ctx.to_heads = share, to_heads
        ranks, own, heads = len(share.sizes), share.end - share.start, x.shape[2:]
        if to_heads:
            by_rank = x[0].unflatten(1, (ranks, -1)).transpose(0, 1)  # (ranks, own, heads / ranks, ...)
            sent = by_rank.flatten(0, 1)
            received = x.new_empty(1, share.tokens, *sent.shape[1:])
            dist.all_to_all_single(received[0], sent, share.sizes, [own] * ranks, group=share.group)
            return received
        received = x.new_empty(ranks * own, *heads)
        dist.all_to_all_single(received, x[0].contiguous(), [own] * ranks, share.sizes, group=share.group)
        return received.unflatten(0, (ranks, own)).transpose(0, 1).flatten(1, 2)[None]

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad, ctx.share, not ctx.to_heads), None, None


class Whole(torch.autograd.Function):
    """Sum over the ranks of a group. Every rank computes the same loss from the sum, so the gradient that
    comes back is already the whole one on each: backward sums nothing."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None
