"""LongAct: activations -> magnitudes -> rows of each head -> masks -> masked gradients (paper, Algorithm 1).

    with Tracker(model) as tracker:
        loss = ...group_logprobs...            # every forward inside is counted, once
        loss.backward()
    masks = select_rows(tracker.magnitudes(), fraction=0.3)
    mask_gradients(model, masks)               # before clipping, before optimizer.step()

This file knows nothing of RL; of FSDP2 it knows that a gradient may be a DTensor.
Shapes: S sequences of T tokens, H heads (Hk: key heads), D head size.
"""

import math
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

RULES = ("top", "bottom", "random", "all")
SITES = ("proj", "norm")
TOKENS = ("all", "prompt", "not-first")
UNSELECTED = ("grad", "frozen")


class Squares:
    """One layer's sums of squares over the tokens of each sequence: q (S, H, D) and k (S, Hk, D), fp32.

    The layer's first forward fills it. When activation checkpointing runs the layer again in backward it is
    full, so nothing is counted or computed twice. `site` as in Tracker; tokens before `start` do not count.
    """

    def __init__(self, site, start):
        self.site, self.start, self.q, self.k = site, start, None, None

    @property
    def full(self):
        return self.q is not None

    @torch.no_grad()
    def fill(self, q, k):
        """q (S, T, H, D), k (S, T, Hk, D): sum_s x[s, h, d]^2 of each sequence. Padding must be zeros. Of
        tokens that ranks share, each rank counts its own; Tracker.add adds them up."""
        self.q, self.k = (x[:, self.start :].float().square().sum(1) for x in (q, k))


class Tracker:
    """Context manager that gathers the magnitudes of a model's queries and keys.

    site "proj" measures the outputs of q_proj and k_proj, one to one with the rows of their weights (the
    paper's reading); "norm" measures after q_norm and k_norm, which Qwen3 has, Llama and Qwen2 have not.
    Neither is mixed by RoPE. tokens "all" counts every token, "prompt" those of prompts only (a sequence that
    is not a group's is all prompt), "not-first" leaves out the first of each sequence, an attention sink.
    """

    def __init__(self, model, site="proj", tokens="all"):
        if site not in SITES:
            raise ValueError(f"site must be 'proj' or 'norm', not {site!r}")
        if site == "norm" and not model.config.qk_norm:
            raise ValueError("site 'norm' needs a model with q_norm and k_norm, as Qwen3's")
        if tokens not in TOKENS:
            raise ValueError(f"tokens must be one of {TOKENS}, not {tokens!r}")
        self.model, self.site, self.tokens = model, site, tokens
        self.norms, self.sequences = None, 0
        self.counts = True  # False while a rank goes along with others' forwards, with nothing of its own

    def __enter__(self):
        if self.model.tracker is not None:
            raise RuntimeError("another Tracker is active on this model")
        self.model.tracker = self
        return self

    def __exit__(self, *exc):
        self.model.tracker = None

    def new_squares(self, layers, has_first):
        """Called by the model at the start of a forward -> a Squares for each layer, to be filled. has_first:
        whether the tokens that come are the first of their sequences."""
        start = 1 if self.tokens == "not-first" and has_first else 0
        return [Squares(self.site, start) for _ in range(layers)]

    def add(self, squares, prompt=None):
        """Called by the model once per forward, by the ranks of a context group together: adds
        sqrt(sum_s x[s, h, d]^2) of each of the S sequences.

        squares: of each layer, filled; prompt: those of the one prompt (S = 1) that all sequences share. A
        sequence's sum is then the prompt's and its completion's, exactly as in the dense layout."""
        totals = [each for layer in squares for each in (layer.q, layer.k)]
        if prompt:
            counted = 0 if self.tokens == "prompt" else 1
            shared = (each for layer in prompt for each in (layer.q, layer.k))
            totals = [counted * each + of_prompt for each, of_prompt in zip(totals, shared, strict=True)]
            if self.model.context:  # each of its ranks has counted its own tokens; one message, not 72
                flat = torch.cat([each.flatten() for each in totals])
                dist.all_reduce(flat, group=self.model.context)
                parts = flat.split([each.numel() for each in totals])
                totals = [part.view_as(each) for part, each in zip(parts, totals)]
        norms = [each.sqrt().sum(0) * self.counts for each in totals]  # of each sequence, added up
        if self.norms:
            norms = [before + now for before, now in zip(self.norms, norms, strict=True)]
        self.norms, self.sequences = norms, self.sequences + len(totals[0]) * self.counts

    def magnitudes(self):
        """M[h, d] = (1/B) sum_i sqrt(sum_s x_i[s, h, d]^2), B the sequences of all ranks (paper, section 3).

        -> {"model.layers.0.self_attn.q_proj": (H, D) fp32, "model.layers.0.self_attn.k_proj": (Hk, D) fp32,
        ...}. One all-reduce when torch.distributed is initialised; every rank must call it. RuntimeError if
        nothing was seen.
        """
        if self.norms is None:
            raise RuntimeError("no forward ran inside the Tracker")
        flat = torch.cat(
            [norm.flatten() for norm in self.norms] + [self.norms[0].new_tensor([self.sequences])]
        )
        if dist.is_initialized():
            dist.all_reduce(flat)
        sizes = [norm.numel() for norm in self.norms]
        means = (flat[:-1] / flat[-1]).split(sizes)
        names = (f"model.layers.{i // 2}.self_attn.{'qk'[i % 2]}_proj" for i in range(len(sizes)))
        return {name: mean.view_as(total) for name, mean, total in zip(names, means, self.norms, strict=True)}


def select_rows(magnitudes, fraction=0.3, rule="top", generator=None):
    """Choose floor(fraction * D) dimensions, at least one, in every head -> {weight name: bool (H * D,)}.

    rule "top": the largest magnitudes (LongAct); "bottom": the smallest; "random": drawn from `generator` (a
    CPU torch.Generator, equal on every rank); "all": every row, which is dense training. Equal magnitudes:
    the lower dimension wins, so all ranks agree. Row h * D + d of W_Q is dimension d of head h (Algorithm 1,
    steps 2 and 3).
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, not {rule!r}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], not {fraction}")
    masks = {}
    for name, magnitude in magnitudes.items():
        if rule == "all":
            mask = torch.ones_like(magnitude, dtype=torch.bool)
        else:
            key = torch.rand(magnitude.shape, generator=generator) if rule == "random" else magnitude
            order = key.to(magnitude.device).sort(dim=-1, descending=rule != "bottom", stable=True).indices
            kept = max(
                1, math.floor(fraction * magnitude.size(-1) + 1e-9)
            )  # 0.29 * 100 is 28.999999999999996
            mask = torch.zeros_like(magnitude, dtype=torch.bool).scatter_(-1, order[:, :kept], True)
        masks[name + ".weight"] = mask.flatten()
    return masks


@torch.no_grad()
def mask_gradients(model, masks):
    """Zero the gradient rows outside the masks, in place (Algorithm 1, step 4), those of a projection's bias,
    if it has one, with those of its weight; with LoRA, rows of its factor B (core/lora.py). Nothing else is
    touched. -> the squared gradient as it was, added up over the selected rows and over the others that this
    rank holds, (2,) fp64; masked_step wants it.

    Gradients may be plain tensors or FSDP2 DTensors with uneven or empty shards; nothing is communicated.
    Call it after the last backward of a step and before clipping. KeyError for a mask without a parameter.
    """
    squares = []
    for parameter, mask, _ in masked_parameters(model, masks):
        gradient, rows = local_part(parameter.grad), mask_rows(mask, parameter.grad)
        squares.append(sums(gradient.float().square(), rows))
        gradient.mul_(rows)
    return torch.stack(squares).sum(0)


@torch.no_grad()
def masked_step(optimizer, model, masks, squares, unselected="grad"):
    """optimizer.step() after mask_gradients, whose result is `squares`, and how far it moved W_Q and W_K (and
    their biases; with LoRA the whole W + scale * B A) -> moved_selected, moved_unselected, gradient_share,
    three 0-dim fp64 tensors: root mean square change of a weight in selected rows and in the others, NaN
    where there are no such rows; share of the squared gradient (with LoRA, B's) that lay in selected rows
    before the mask, NaN if all of it was 0. Of all ranks.

    unselected "grad": the optimizer moves a row without gradient as it does, AdamW by the momentum of steps
    that had selected it and by weight decay. "frozen": the row and its moments are afterwards what they were
    before; with LoRA the row of B, which A still turns. Every rank must call it. It holds a copy of W_Q and
    W_K, or their factors ("frozen": and of their moments) during the step.
    """
    kept = []
    for parameter, mask, update in masked_parameters(model, masks):
        state = optimizer.state.get(parameter, {}) if unselected == "frozen" else {}
        moments = [x for x in state.values() if x.dim()]  # all but the count of steps; they have its rows
        tensors = [local_part(x) for x in (parameter, *moments)]
        A = whole(update.lora_A.weight).float().clone() if update else None
        kept.append((mask_rows(mask, parameter), tensors, [x.clone() for x in tensors], update, A))
    optimizer.step()
    changes, weights = torch.zeros_like(squares), torch.zeros_like(squares)  # squared; how many
    for rows, tensors, before, update, A in kept:
        if unselected == "frozen":
            for now, old in zip(tensors, before):
                now.copy_(torch.where(rows.to(now.device), now, old))
        change = tensors[0].float() - before[0].float()
        if update:  # B' A' - B A, without the difference of two numbers that are nearly equal
            A_now = whole(update.lora_A.weight).float()
            change = update.scale * (change @ A_now + before[0].float() @ (A_now - A))
        change = change.square()
        changes += sums(change, rows)
        weights += sums(torch.ones_like(change), rows)
    totals = torch.cat((changes, weights, squares))
    if dist.is_initialized():
        dist.all_reduce(totals)
    changes, weights, squares = totals.split(2)
    return *(changes / weights).sqrt(), squares[0] / squares.sum()


def sums(values, rows):
    """`values` of a weight or a bias, `rows` of mask_rows -> their sums over these rows and over the others,
    (2,) fp64."""
    return torch.stack([(values * part).sum(dtype=torch.float64) for part in (rows, ~rows)])


def masked_parameters(model, masks):
    """select_rows' masks -> yields (parameter, its mask, update): each weight, and its projection's bias if
    there is one, whose elements belong to the weight's rows; update is None. With LoRA the factor B of each
    projection, of whose update row r is row r of B times A; update is the projection. KeyError for a mask
    without a parameter."""
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        projection = modules[name.removesuffix(".weight")]
        if hasattr(projection, "lora_B"):
            yield projection.lora_B.weight, mask, projection
            continue
        yield projection.weight, mask, None
        if projection.bias is not None:
            yield projection.bias, mask, None


def local_part(tensor):
    """This rank's part of a DTensor; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    """A DTensor's whole value, for which every rank must call it; a plain tensor is its own."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mask_rows(mask, tensor):
    """mask (rows,) bool -> of the rows of `tensor` that this rank holds, (rows, 1) bool for a weight, (rows,)
    for a bias."""
    rows = mask.view(-1, *[1] * (tensor.dim() - 1))
    if isinstance(tensor, DTensor):
        rows = distribute_tensor(rows, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    return rows


def selected_share(magnitudes, masks):
    """Share of the squared magnitude in the selected rows, over all layers; a 0-dim tensor in [0, 1]."""
    squares = [
        (magnitude.flatten().square(), masks[name + ".weight"]) for name, magnitude in magnitudes.items()
    ]
    return sum((square * mask).sum() for square, mask in squares) / sum(square.sum() for square, _ in squares)


def overlap(masks, others):
    """Share of the selected rows that `others` selected too; a 0-dim tensor in [0, 1]."""
    both = sum((mask & others[name]).sum() for name, mask in masks.items())
    return both / sum(mask.sum() for mask in masks.values())


if __name__ == "__main__":
    sys.exit("saliency.py: error: it is a part, not a program; run python -m studies.magnitudes CHECKPOINT")
