"""GRPO (arXiv 2402.03300) on plain tensors: advantages of a group, and the clipped policy loss. Knows nothing of the model.

A group is G completions of one prompt. Token tensors are flat: (N,), the completions one after the other, N = sum(R_i).
The loss of a step is a sum over groups (and over ranks): every term is divided by the same global count, given by the
caller, so any split into micro-batches or ranks gives the same gradient.
"""

from dataclasses import dataclass

import torch

AGGREGATIONS = ("token", "sequence", "constant")


def advantages(rewards, normalize_std=True, eps=1e-6):
    """rewards (G,) -> advantages (G,): reward minus the group's mean, over its standard deviation (eq. in section 4.1.2).

    The deviation has Bessel's correction, as in TRL and verl. normalize_std=False is Dr. GRPO (arXiv 2503.20783).
    A group of equal rewards has advantages 0. A group of one keeps no baseline: its advantage is 0 too.
    """
    centered = rewards - rewards.mean()
    if not normalize_std or len(rewards) == 1:
        return centered
    return centered / (rewards.std() + eps)


def token_weights(lengths, how, sequences, tokens, max_length):
    """What each token's loss is multiplied by before the sum -> (N,) fp32.

    "token": 1 / tokens, the mean over all tokens of the step (DAPO). "sequence": 1 / (sequences * R_i), the mean over
    sequences of the mean over tokens (GRPO). "constant": 1 / (sequences * max_length) (Dr. GRPO). `sequences`, `tokens`:
    counts of the whole optimizer step over all ranks.
    """
    sizes = torch.as_tensor(lengths)
    per_completion = {
        "token": torch.full(sizes.shape, 1.0 / tokens),
        "sequence": 1.0 / (sequences * sizes.float()),
        "constant": torch.full(sizes.shape, 1.0 / (sequences * max_length)),
    }[how]
    return per_completion.repeat_interleave(sizes)


@dataclass
class LossStats:
    """Sums over the tokens of one call, detached 0-dim tensors; divide by the number of tokens of the step."""

    ratio: torch.Tensor  # pi / pi_old
    clipped: torch.Tensor  # tokens whose gradient the clipping removed
    kl: torch.Tensor  # k3 estimate of KL(pi || reference)


def loss(
    logprobs,
    old_logprobs,
    advantages,
    weights,
    epsilon_low=0.2,
    epsilon_high=0.2,
    dual_clip=None,
    importance=None,
    beta=0.0,
    ref_logprobs=None,
):
    """The policy loss of some tokens -> (0-dim loss, LossStats). Minimise the sum of it over the step.

    logprobs (N,): differentiable; old_logprobs (N,): of the policy that the update started from; advantages (N,): each
    token has its completion's; weights (N,): from token_weights. All fp32.
    loss_t = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A), r = exp(logprobs - old)     (eq. 3 of the paper)
    dual_clip: for A < 0 the loss is at most -dual_clip * A (arXiv 1912.09729). importance (N,): factor on the policy
    term that corrects for the sampler, see `importance_weights`. beta > 0 adds beta * k3, k3 = exp(d) - d - 1 with
    d = ref - logprobs (eq. 4).
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    unclipped = -ratio * advantages
    per_token = torch.maximum(unclipped, -ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages)
    clipped = per_token > unclipped
    if dual_clip is not None:
        ceiling = -dual_clip * advantages
        too_far = (advantages < 0) & (per_token > ceiling)
        per_token = torch.where(too_far, ceiling, per_token)
        clipped |= too_far
    if importance is not None:
        per_token = per_token * importance
    kl = torch.zeros_like(logprobs)
    if beta > 0:
        d = (ref_logprobs - logprobs).clamp(-20, 20)
        kl = d.exp() - d - 1
        per_token = per_token + beta * kl
    stats = LossStats(ratio.detach().sum(), clipped.sum(), kl.detach().sum())
    return (per_token * weights).sum(), stats


@torch.no_grad()
def importance_weights(old_logprobs, sampler_logprobs, cap=2.0):
    """Truncated importance sampling, token level: min(pi_old / pi_sampler, cap), (N,) -> (N,), no gradient.

    vLLM and the trainer hold equal weights but round differently, so what was sampled is slightly off-policy.
    """
    return (old_logprobs - sampler_logprobs).clamp(-20, 20).exp().clamp(max=cap)
