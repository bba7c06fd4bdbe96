"""DAPO (arXiv 2503.14476): clip-higher with a token mean, dynamic sampling, soft overlong punishment."""

import math

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


def fill_batch(draw, keep, wanted, least, max_rounds, interrupted, oversample=1.0):
    """Dynamic sampling (section 3.2): draw rounds of groups until `wanted` of them pass `keep`; the surplus
    is dropped -> groups to train on, all groups that were sampled, rounds.

    draw(start, count) -> groups with .rewards, of `count` prompts from the step's `start`-th on;
    keep(rewards) -> bool, keep_group in DAPO; interrupted() -> whether to end early, with fewer. The first
    round draws oversample * wanted prompts, rounded up, the others `wanted`. Trained on are the first that
    pass, in the order of prompts. After `max_rounds` it makes do with `least`. Raises BadInput for fewer.
    """
    batch, sampled, rounds = [], [], 0
    while len(batch) < wanted and not interrupted():
        if rounds == max_rounds:
            if len(batch) < least:
                tried = f"after --max-rounds {rounds} of {wanted} prompts"
                raise BadInput(f"{tried} {too_few(batch, sampled, least)}")
            break
        count = wanted if rounds else first_round(wanted, oversample)
        groups = draw(len(sampled), count)
        batch += [group for group in groups if keep(group.rewards)]
        sampled += groups
        rounds += 1
    return batch[:wanted], sampled, rounds


def first_round(wanted, oversample):
    """Prompts of a step's first round: oversample * wanted, rounded up."""
    return math.ceil(oversample * wanted - 1e-9)  # 1.1 * 10 is 11.000000000000002


def too_few(batch, sampled, least):
    """Why a batch could not be filled, and what to do about it, in words."""
    equal = [group.rewards[0] for group in sampled if not keep_group(group.rewards)]
    right = sum(bool(reward >= 1) for reward in equal)
    wrong = len(equal) - right
    counts = f"the rewards of {len(batch)} groups differ ({least} needed)"
    counts += f", {right} are all right, {wrong} all wrong"
    if right > wrong:
        advice = "the task is too easy: give harder prompts, or a higher --temperature"
    else:
        advice = "the task is too hard: give easier prompts, or a model that can do some of them"
    more = "--max-rounds or --completions" + ", or use --underfull train" * bool(batch)
    return f"{counts}: {advice}; or raise {more}"


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
