"""SAPO (arXiv 2511.20347): a smooth gate in place of clipping; far ratios fade out instead of being cut off.

Only the loss differs from GRPO: advantages, sampling and rewards are GRPO's; there is no KL term. The gate needs at least
two updates per rollout: at ratio 1 its slope is 1, and the gradient is GRPO's.
"""

import torch

import grpo


def loss(logprobs, old_logprobs, advantages, lengths, totals, importance=1.0, tau_pos=1.0, tau_neg=1.05):
    """-f(r) A, f(r) = sigmoid(tau (r - 1)) * 4 / tau; mean over sequences of the mean over tokens.

    -> (0-dim loss, LossStats). tau is tau_pos where A > 0, else tau_neg: what is to become rarer fades sooner. Nothing is
    clipped, so LossStats.clipped is 0. Arguments are grpo.loss's.
    """
    ratio = grpo.token_ratios(logprobs, old_logprobs)
    tau = torch.where(advantages > 0, tau_pos, tau_neg)
    per_token = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages * importance
    return grpo.aggregate(per_token, lengths, "sequence", totals, ratio, torch.zeros_like(ratio))
