"""GRPO (arXiv 2402.03300) on plain tensors: advantages of a group, and the clipped policy loss.

A group is G completions of one prompt. Token tensors are flat: (N,), the completions one after the other,
N = sum(R_i). The loss of an update is a sum over groups and ranks. No divisor depends on how they are split
(Totals are of the whole update), so any split into passes or ranks gives the same gradient.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

AGGREGATIONS = ("token", "sequence", "constant")
EPSILONS = 0.2, 0.2  # how far a ratio may fall below 1 and rise above it before clipping stops its gradient


class Totals(NamedTuple):
    """Of a whole update, over all ranks: completions, their tokens; and the maximum completion length."""

    sequences: int
    tokens: int
    max_length: int


def advantages(rewards, normalize_std=True, eps=1e-6):
    """rewards (G,) -> advantages (G,): reward minus the group's mean, over its standard deviation (eq. in
    section 4.1.2).

    The deviation has Bessel's correction, as in TRL and verl. normalize_std=False is Dr. GRPO (arXiv
    2503.20783). A group of equal rewards has advantages 0. A group of one keeps no baseline: its advantage is
    0 too.
    """
    if (rewards == rewards[0]).all():  # their mean may differ from them by rounding, which eps would blow up
        return torch.zeros_like(rewards)
    centered = rewards - rewards.mean()
    if not normalize_std:
        return centered
    return centered / (rewards.std() + eps)


def token_weights(lengths, how, totals):
    """What each token's loss is multiplied by before the sum -> (N,) fp32, on the CPU.

    "token": 1 / tokens, the mean over all tokens of the update (DAPO). "sequence": 1 / (sequences * R_i), the
    mean over sequences of the mean over tokens (GRPO). "constant": 1 / (sequences * max_length) (Dr. GRPO).
    """
    sizes = torch.as_tensor(lengths)
    per_completion = {
        "token": torch.full(sizes.shape, 1.0 / totals.tokens),
        "sequence": 1.0 / (totals.sequences * sizes.float()),
        "constant": torch.full(sizes.shape, 1.0 / (totals.sequences * totals.max_length)),
    }[how]
    return per_completion.repeat_interleave(sizes)


@dataclass
class LossStats:
    """Sums over the tokens of one call, detached 0-dim tensors; divide by the number of tokens of the
    step."""

    ratio: torch.Tensor  # pi / pi_old
    clipped: torch.Tensor  # tokens whose gradient the clipping removed
    kl: torch.Tensor  # k3 estimate of KL(pi || reference)


def token_ratios(logprobs, old_logprobs):
    """pi / pi_old of each token, (N,)."""
    return (logprobs - old_logprobs).clamp(-20, 20).exp()


def clipped_term(ratio, advantages, epsilons):
    """-min(r A, clip(r, 1 - low, 1 + high) A), (N,), and where clipping took the gradient away, (N,) bool."""
    low, high = epsilons
    unclipped = -ratio * advantages
    per_token = torch.maximum(unclipped, -ratio.clamp(1 - low, 1 + high) * advantages)
    return per_token, per_token > unclipped


def aggregate(per_token, lengths, how, totals, ratio, clipped, kl=None):
    """Loss of each token (N,) -> (0-dim loss, LossStats): how every algorithm's loss ends."""
    weights = token_weights(lengths, how, totals).to(per_token.device)
    kl = per_token.new_zeros(()) if kl is None else kl.detach().sum()
    return (per_token * weights).sum(), LossStats(ratio.detach().sum(), clipped.sum(), kl)


def loss(
    logprobs,
    old_logprobs,
    advantages,
    lengths,
    totals,
    importance=1.0,
    epsilons=EPSILONS,
    dual_clip=None,
    aggregation="sequence",
    beta=0.0,
    ref_logprobs=None,
):
    """The policy loss of some completions -> (0-dim loss, LossStats). Minimise the sum of it over the update.

    logprobs (N,): differentiable; old_logprobs (N,): of the policy that the update started from; advantages
    (N,): each token has its completion's; all fp32. lengths: R_i of each completion, N in total.
    loss_t = -min(r A, clip(r, 1 - low, 1 + high) A), r = exp(logprobs - old)     (eq. 3 of the paper)
    importance (N,): factor on the policy term that corrects for the sampler, see `importance_weights`.
    dual_clip: for A < 0 the loss is at most -dual_clip * A (arXiv 1912.09729). beta > 0 adds beta * k3,
    k3 = exp(d) - d - 1 with d = ref - logprobs (eq. 4).
    """
    ratio = token_ratios(logprobs, old_logprobs)
    per_token, clipped = clipped_term(ratio, advantages, epsilons)
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        too_far = (advantages < 0) & (per_token > ceiling)
        per_token = torch.where(too_far, ceiling, per_token)
        clipped |= too_far
    per_token, kl = per_token * importance, None
    if beta > 0:
        d = (ref_logprobs - logprobs).clamp(-20, 20)
        kl = d.exp() - d - 1
        per_token = per_token + beta * kl
    return aggregate(per_token, lengths, aggregation, totals, ratio, clipped, kl)


@torch.no_grad()
def importance_weights(old_logprobs, sampler_logprobs, cap=2.0):
    """Truncated importance sampling, token level: min(pi_old / pi_sampler, cap), (N,) -> (N,), no gradient.

    vLLM and the trainer hold equal weights but round differently, so what was sampled is slightly off-policy.
    """
    return (old_logprobs - sampler_logprobs).clamp(-20, 20).exp().clamp(max=cap)
