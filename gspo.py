"""GSPO (arXiv 2507.18071): ratio and clipping belong to a whole completion, not to its tokens.

Only the loss differs from GRPO: advantages, sampling and rewards are GRPO's; there is no KL term. The ratio needs at least
two updates per rollout (the paper has four): in the first it is 1, and the gradient is GRPO's.
"""

import torch

import grpo

EPSILONS = 3e-4, 4e-4  # section 5.1: a mean over tokens moves far less than a token does


def loss(logprobs, old_logprobs, advantages, lengths, totals, importance=1.0, epsilons=EPSILONS):
    """-min(s A, clip(s, 1 - low, 1 + high) A), s_i = exp(mean over tokens of logprobs - old), mean over completions (eq. 5)
    -> (0-dim loss, LossStats). Arguments are grpo.loss's; completions must be whole.

    Each token carries its completion's s, so LossStats counts tokens as elsewhere; a completion's factor for the sampler is
    the mean of its tokens' importance. Against an epsilon of 3e-4 rounding counts: logprobs and old_logprobs must be fp32
    and come from the same forward code in the same passes, not old_logprobs from the sampler.
    """
    sizes = torch.tensor(lengths, device=logprobs.device)
    log_ratios = torch.stack([part.mean() for part in (logprobs - old_logprobs).split(lengths)])  # (completions,)
    ratio = log_ratios.clamp(-20, 20).exp().repeat_interleave(sizes)  # (N,)
    per_token, clipped = grpo.clipped_term(ratio, advantages, epsilons)
    return grpo.aggregate(per_token * importance, lengths, "sequence", totals, ratio, clipped)
