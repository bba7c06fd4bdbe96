"""DAPO (arXiv 2503.14476): GRPO's loss with clip-higher and a token mean, dynamic sampling, soft overlong punishment."""

import grpo


def loss(logprobs, old_logprobs, advantages, tokens, epsilon_low=0.2, epsilon_high=0.28, dual_clip=10.0, **terms):
    """grpo.loss with DAPO's constants (eq. 8; section 4.1; dual_clip from the authors' recipe) -> (loss, LossStats).

    tokens: completion tokens of the whole optimizer step, over all groups and ranks. The KL term is left out.
    """
    weights = logprobs.new_full(logprobs.shape, 1.0 / tokens)
    return grpo.loss(logprobs, old_logprobs, advantages, weights, epsilon_low, epsilon_high, dual_clip, **terms)


def keep_group(rewards):
    """Dynamic sampling's test (eq. 11): does the group teach anything, i.e. do its rewards (G,) differ?

    Give it the correctness rewards, not the shaped ones: a length penalty would make every group differ.
    """
    return bool((rewards != rewards[0]).any())


def overlong_penalty(length, max_length, cache):
    """Soft overlong punishment (eq. 13): 0 up to max_length - cache tokens, then linearly down to -1 at max_length.

    Added to the correctness reward. cache 0 turns it off below max_length.
    """
    if length > max_length:
        return -1.0
    if length <= max_length - cache:
        return 0.0
    return (max_length - cache - length) / cache
