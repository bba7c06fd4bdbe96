"""DAPO (arXiv 2503.14476): clip-higher with a token mean, dynamic sampling, soft overlong punishment."""

import torch

import grpo
from base.cli import BadInput

EPSILONS = 0.2, 0.28  # clip-higher (section 4.1)


def loss(
    logprobs, old_logprobs, advantages, lengths, totals, importance=1.0, epsilons=EPSILONS, dual_clip=10.0
):
    """grpo.loss with DAPO's constants and a token mean (eq. 8; dual_clip from the authors' recipe) -> (loss,
    LossStats). The KL term is left out."""
    terms = logprobs, old_logprobs, advantages, lengths, totals, importance
    return grpo.loss(*terms, epsilons, dual_clip, aggregation="token")


def keep_group(rewards):
    """Dynamic sampling's test (eq. 11): does the group teach anything, i.e. do its rewards (G,) differ?

    Give it the correctness rewards, not the shaped ones: a length penalty would make every group differ.
    """
    return bool((rewards != rewards[0]).any())


def fill_batch(draw, keep, wanted, max_rounds, interrupted):
    """Dynamic sampling (section 3.2): draw rounds of groups until `wanted` of them pass `keep`; the surplus
    is dropped -> groups to train on, all groups that were sampled, rounds.

    draw(number) -> groups with .rewards; keep(rewards) -> bool, keep_group in DAPO; interrupted() -> whether
    to end early, with fewer. Raises BadInput when `max_rounds` are not enough.
    """
    batch, sampled, rounds = [], [], 0
    while len(batch) < wanted and not interrupted():
        if rounds == max_rounds:
            raise BadInput(
                f"{rounds} rounds of {wanted} prompts gave {len(batch)} groups whose rewards differ, "
                f"{wanted} are needed; the task is too hard or too easy, or raise --max-rounds or "
                "--completions"
            )
        groups = draw(rounds)
        batch += [group for group in groups if keep(group.rewards)]
        sampled += groups
        rounds += 1
    return batch[:wanted], sampled, rounds


def shape_rewards(rewards, lengths, max_length, cache):
    """Rewards (G,) of completions of `lengths` tokens -> (G,), what advantages are made of: 2 r - 1, plus the
    overlong punishment. Right is then +1 and wrong -1, which the punishment's range of 1 is relative to."""
    return 2 * rewards - 1 + torch.tensor([overlong_penalty(length, max_length, cache) for length in lengths])


def overlong_penalty(length, max_length, cache):
    """Soft overlong punishment (eq. 13): 0 up to max_length - cache tokens, then linearly down to -1 at
    max_length.

    Added to the correctness reward. With cache 0 there is none.
    """
    if length > max_length:
        return -1.0
    if length <= max_length - cache:
        return 0.0
    return (max_length - cache - length) / cache
