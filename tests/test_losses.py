"""grpo.py and dapo.py against the vectors of the papers and against hand-written loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dapo
import grpo


def test_advantages_of_the_known_vector():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(grpo.advantages(rewards), torch.tensor([1.499997, -0.499999, -0.499999, -0.499999]))
    torch.testing.assert_close(grpo.advantages(rewards, eps=1e-4)[:2], torch.tensor([1.49970, -0.49990]), atol=1e-5, rtol=0)
    torch.testing.assert_close(grpo.advantages(rewards, normalize_std=False), torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_advantages_of_equal_rewards_and_of_one_completion_are_zero():
    assert grpo.advantages(torch.ones(4)).tolist() == [0, 0, 0, 0]
    assert grpo.advantages(torch.tensor([3.0])).tolist() == [0]


def test_overlong_penalty_of_the_known_vector():
    assert [dapo.overlong_penalty(n, 100, 20) for n in (0, 80, 90, 100, 101)] == [0, 0, -0.5, -1, -1]
    assert [dapo.overlong_penalty(n, 100, 0) for n in (99, 100, 101)] == [0, 0, -1]


def test_keep_group_wants_differing_rewards():
    assert dapo.keep_group(torch.tensor([0.0, 1.0, 0.0]))
    assert dapo.keep_group(torch.tensor([0.2, 0.3]))  # fractional rewards: any difference teaches
    assert not dapo.keep_group(torch.tensor([1.0, 1.0, 1.0]))
    assert not dapo.keep_group(torch.tensor([0.0, 0.0]))


def random_batch(lengths, seed, groups=1):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    old = -torch.rand(n, generator=generator) * 3
    logprobs = (old + 0.4 * torch.randn(n, generator=generator)).requires_grad_()
    advantages = torch.randn(len(lengths), generator=generator)
    ref = old + 0.2 * torch.randn(n, generator=generator)
    importance = torch.rand(n, generator=generator) + 0.5
    return logprobs, old, advantages, ref, importance


def by_hand(logprobs, old, advantages, lengths, how, low, high, dual, beta, ref, importance, max_length):
    """Equation 3 of the GRPO paper and equation 8 of DAPO, token by token in Python floats and scalar tensors."""
    total, t = 0.0 * logprobs.sum(), 0
    for i, n in enumerate(lengths):
        for _ in range(n):
            a, r = advantages[i].item(), (logprobs[t] - old[t]).exp()
            objective = min(r * a, min(max(r, torch.tensor(1 - low)), torch.tensor(1 + high)) * a, key=lambda x: x.item())
            if dual is not None and a < 0 and objective.item() < dual * a:
                objective = torch.tensor(dual * a)
            objective = objective * importance[t].item()
            if beta:
                d = ref[t] - logprobs[t]
                objective = objective - beta * (d.exp() - d - 1)
            denominator = {"token": sum(lengths), "sequence": len(lengths) * n, "constant": len(lengths) * max_length}[how]
            total = total - objective / denominator
            t += 1
    return total


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 10**6),
    st.sampled_from(grpo.AGGREGATIONS),
    st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.05, 0.1)]),
    st.sampled_from([None, 1.3, 3.0]),
    st.sampled_from([0.0, 0.04]),
)
def test_loss_and_gradient_equal_a_loop_by_hand(lengths, seed, how, clip, dual, beta):
    logprobs, old, advantages, ref, importance = random_batch(lengths, seed)
    expected = by_hand(logprobs, old, advantages, lengths, how, *clip, dual, beta, ref, importance, 10)
    (expected_gradient,) = torch.autograd.grad(expected, logprobs)
    per_token = advantages.repeat_interleave(torch.tensor(lengths))
    weights = grpo.token_weights(lengths, how, len(lengths), sum(lengths), 10)
    loss, stats = grpo.loss(logprobs, old, per_token, weights, *clip, dual, importance, beta, ref)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], expected_gradient)
    assert stats.ratio.item() == pytest.approx((logprobs - old).exp().sum().item(), rel=1e-5)


def test_dapo_loss_is_grpo_with_clip_higher_and_a_token_mean():
    logprobs, old, advantages, _, _ = random_batch([2, 3], 1)
    per_token = advantages.repeat_interleave(torch.tensor([2, 3]))
    expected = by_hand(logprobs, old, advantages, [2, 3], "token", 0.2, 0.28, 10.0, 0, None, torch.ones(5), 1)
    torch.testing.assert_close(dapo.loss(logprobs, old, per_token, tokens=5)[0], expected)


@pytest.mark.parametrize("advantage, ratio, moves", [
    (1.0, 1.27, True), (1.0, 1.29, False), (1.0, 0.5, True),
    (-1.0, 0.81, True), (-1.0, 0.79, False), (-1.0, 2.9, True), (-1.0, 3.1, False),
])  # fmt: skip
def test_clipping_stops_the_gradient_exactly_where_it_should(advantage, ratio, moves):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    arguments = torch.zeros(1), torch.tensor([advantage]), torch.ones(1)
    loss, stats = grpo.loss(logprobs, *arguments, epsilon_low=0.2, epsilon_high=0.28, dual_clip=3.0)
    loss.backward()
    assert (logprobs.grad.item() != 0) == moves
    assert stats.clipped.item() == (not moves)


def test_gradient_at_ratio_one_is_the_policy_gradient():
    logprobs, advantages = torch.randn(7, requires_grad=True), torch.randn(7)
    dapo.loss(logprobs, logprobs.detach(), advantages, tokens=7)[0].backward()
    torch.testing.assert_close(logprobs.grad, -advantages / 7)


@pytest.mark.parametrize("how", grpo.AGGREGATIONS)
def test_any_split_into_micro_batches_gives_the_same_gradient(how):
    lengths = [3, 1, 4, 2, 5, 6]
    logprobs, old, advantages, ref, importance = random_batch(lengths, 3)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]

    def gradient(splits):
        for first, last in splits:
            part, span = slice(first, last), slice(starts[first], starts[last])
            weights = grpo.token_weights(lengths[part], how, len(lengths), sum(lengths), 8)
            per_token = advantages[part].repeat_interleave(torch.tensor(lengths[part]))
            terms = logprobs[span], old[span], per_token, weights
            grpo.loss(*terms, importance=importance[span], beta=0.1, ref_logprobs=ref[span])[0].backward()
        result, logprobs.grad = logprobs.grad, None
        return result

    whole = gradient([(0, 6)])
    torch.testing.assert_close(gradient([(i, i + 1) for i in range(6)]), whole)
    torch.testing.assert_close(gradient([(0, 2), (2, 4), (4, 6)]), whole)


def test_importance_weights_are_one_on_policy_capped_above_and_without_gradient():
    old = torch.tensor([0.0, math.log(5.0), math.log(0.25)], requires_grad=True)
    weights = grpo.importance_weights(old, torch.zeros(3), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 0.25]))
    assert not weights.requires_grad
    logprobs, reference, advantages, _, _ = random_batch([4], 5)
    plain = dapo.loss(logprobs, reference, advantages.repeat(4), 4)[0]
    assert dapo.loss(logprobs, reference, advantages.repeat(4), 4, importance=torch.ones(4))[0] == plain


def test_importance_weights_leave_the_kl_term_alone():
    logprobs, old, advantages, ref, _ = random_batch([5], 7)
    arguments = logprobs, old, torch.zeros(5), torch.full((5,), 0.2)
    with_zero = grpo.loss(*arguments, importance=torch.zeros(5), beta=0.5, ref_logprobs=ref)[0]
    assert with_zero.item() == pytest.approx(grpo.loss(*arguments, beta=0.5, ref_logprobs=ref)[0].item())
    assert with_zero.item() > 0
