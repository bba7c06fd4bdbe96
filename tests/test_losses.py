"""The losses of all algorithms against the vectors of the papers and against hand-written loops."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dapo
import grpo
import losses
from base.cli import BadInput


def test_advantages_of_the_known_vector():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(
        grpo.advantages(rewards), torch.tensor([1.499997, -0.499999, -0.499999, -0.499999])
    )
    torch.testing.assert_close(
        grpo.advantages(rewards, eps=1e-4)[:2], torch.tensor([1.49970, -0.49990]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        grpo.advantages(rewards, normalize_std=False), torch.tensor([0.75, -0.25, -0.25, -0.25])
    )


def groups_of(*rewards):
    return [SimpleNamespace(rewards=torch.tensor(own)) for own in rewards]


RIGHT, WRONG, MIXED = [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]


def fill(rounds, wanted, least):
    how = dapo.keep_group, wanted, least, len(rounds), lambda: False
    coming = iter(rounds)
    batch, sampled, count = dapo.fill_batch(lambda start, count: groups_of(*next(coming)), *how)
    return len(batch), len(sampled), count


def test_a_batch_is_filled_or_trains_on_what_it_has():
    assert fill([[MIXED, WRONG], [MIXED, MIXED], [MIXED]], 2, 2) == (2, 4, 2)  # the surplus is dropped
    assert fill([[MIXED, WRONG], [RIGHT, RIGHT]], 2, 1) == (1, 4, 2)
    easy = (
        r"after --max-rounds 2 of 2 prompts the rewards of 1 groups differ \(2 needed\), 2 are all right, 1 "
    )
    with pytest.raises(
        BadInput, match=easy + "all wrong: the task is too easy: .*, or use --underfull train"
    ):
        fill([[MIXED, WRONG], [RIGHT, RIGHT]], 2, 2)
    hard = r"of 0 groups differ \(1 needed\), 1 are all right, 2 all wrong: the task is too hard: give easier"
    with pytest.raises(BadInput, match=hard):
        fill([[WRONG, WRONG, RIGHT]], 3, 1)


def test_an_oversampled_first_round_draws_more_prompts_and_trains_on_the_first_that_differ():
    groups, asked = groups_of(*[WRONG, MIXED] * 5), []

    def draw(start, count):
        asked.append((start, count))
        return groups[start : start + count]

    batch, sampled, rounds = dapo.fill_batch(draw, dapo.keep_group, 4, 1, 9, lambda: False, oversample=1.4)
    assert asked == [(0, 6), (6, 4)] and rounds == 2  # 5.6 prompts, of which 3 groups differ
    assert batch == groups[1:8:2] and sampled == groups
    assert [dapo.first_round(10, times) for times in (1, 1.1, 1.11, 2.5)] == [10, 11, 12, 25]


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
    """Equation 3 of the GRPO paper and equation 8 of DAPO, token by token in Python floats and scalar
    tensors."""
    total, t = 0.0 * logprobs.sum(), 0
    for i, n in enumerate(lengths):
        for _ in range(n):
            a, r = advantages[i].item(), (logprobs[t] - old[t]).exp()
            objective = min(
                r * a, min(max(r, torch.tensor(1 - low)), torch.tensor(1 + high)) * a, key=lambda x: x.item()
            )
            if dual is not None and a < 0 and objective.item() < dual * a:
                objective = torch.tensor(dual * a)
            objective = objective * importance[t].item()
            if beta:
                d = ref[t] - logprobs[t]
                objective = objective - beta * (d.exp() - d - 1)
            denominator = {
                "token": sum(lengths),
                "sequence": len(lengths) * n,
                "constant": len(lengths) * max_length,
            }[how]
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
    totals = grpo.Totals(len(lengths), sum(lengths), 10)
    loss, stats = grpo.loss(logprobs, old, per_token, lengths, totals, importance, clip, dual, how, beta, ref)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], expected_gradient)
    assert stats.ratio.item() == pytest.approx((logprobs - old).exp().sum().item(), rel=1e-5)


def test_dapo_loss_is_grpo_with_clip_higher_and_a_token_mean():
    logprobs, old, advantages, _, _ = random_batch([2, 3], 1)
    per_token = advantages.repeat_interleave(torch.tensor([2, 3]))
    expected = by_hand(logprobs, old, advantages, [2, 3], "token", 0.2, 0.28, 10.0, 0, None, torch.ones(5), 1)
    torch.testing.assert_close(dapo.loss(logprobs, old, per_token, [2, 3], grpo.Totals(2, 5, 1))[0], expected)


@pytest.mark.parametrize("advantage, ratio, moves", [
    (1.0, 1.27, True), (1.0, 1.29, False), (1.0, 0.5, True),
    (-1.0, 0.81, True), (-1.0, 0.79, False), (-1.0, 2.9, True), (-1.0, 3.1, False),
])  # fmt: skip
def test_clipping_stops_the_gradient_exactly_where_it_should(advantage, ratio, moves):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    arguments = torch.zeros(1), torch.tensor([advantage]), [1], grpo.Totals(1, 1, 1)
    loss, stats = grpo.loss(logprobs, *arguments, epsilons=(0.2, 0.28), dual_clip=3.0)
    loss.backward()
    assert (logprobs.grad.item() != 0) == moves
    assert stats.clipped.item() == (not moves)


LOSSES = {
    **{f"grpo {how}": partial(grpo.loss, aggregation=how, beta=0.1) for how in grpo.AGGREGATIONS},
    "dapo": dapo.loss,
    "gspo": losses.gspo_loss,
    "sapo": losses.sapo_loss,
    "clip-cov": losses.clip_cov_loss,
    "kl-cov": losses.kl_cov_loss,
}


def terms_of(name, ref, chosen):
    if name.startswith("grpo"):
        return {"ref_logprobs": ref}
    return {"marked": chosen} if "cov" in name else {}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_at_ratio_one_is_the_policy_gradient(name):
    """Where the policy has not moved since the rollout, all algorithms are one, up to the mean that they
    take."""
    lengths, logprobs = [2, 1, 4], torch.randn(7, requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 2.0]).repeat_interleave(torch.tensor(lengths))
    terms = terms_of(name, logprobs.detach(), torch.zeros(7, dtype=torch.bool))
    loss, stats = LOSSES[name](
        logprobs, logprobs.detach(), advantages, lengths, grpo.Totals(3, 7, 9), **terms
    )
    loss.backward()
    by_sequence = torch.tensor([1 / (3 * n) for n in lengths for _ in range(n)])
    mean = {
        "grpo token": 1 / 7,
        "dapo": 1 / 7,
        "clip-cov": 1 / 7,
        "kl-cov": 1 / 7,
        "grpo constant": 1 / (3 * 9),
    }
    torch.testing.assert_close(logprobs.grad, -advantages * mean.get(name, by_sequence))
    assert stats.ratio.item() == 7 and stats.clipped.item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_any_split_into_micro_batches_gives_the_same_gradient(name):
    lengths = [3, 1, 4, 2, 5, 6]
    logprobs, old, advantages, ref, importance = random_batch(lengths, 3)
    chosen = importance > 1
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]

    def gradient(splits):
        for first, last in splits:
            part, span = slice(first, last), slice(starts[first], starts[last])
            per_token = advantages[part].repeat_interleave(torch.tensor(lengths[part]))
            arguments = (
                logprobs[span],
                old[span],
                per_token,
                lengths[part],
                grpo.Totals(6, 21, 8),
                importance[span],
            )
            LOSSES[name](*arguments, **terms_of(name, ref[span], chosen[span]))[0].backward()
        result, logprobs.grad = logprobs.grad, None
        return result

    whole = gradient([(0, 6)])
    assert whole.abs().max() > 0
    torch.testing.assert_close(gradient([(i, i + 1) for i in range(6)]), whole)
    torch.testing.assert_close(gradient([(0, 2), (2, 4), (4, 6)]), whole)


# ------------------------------------------------------------------------------------------------- GSPO, SAPO


def test_gspo_ratio_of_the_known_vector():
    log_ratios = torch.tensor([0.1, -0.05, 0.02])
    loss, stats = losses.gspo_loss(log_ratios, torch.zeros(3), -torch.ones(3), [3], grpo.Totals(1, 3, 3))
    assert loss.item() == pytest.approx(1.023608, abs=1e-6) and stats.ratio.item() / 3 == pytest.approx(
        1.023608, abs=1e-6
    )


def test_gspo_clips_whole_completions_and_at_its_own_epsilons():
    old = torch.zeros(4)
    logprobs = torch.tensor(
        [5e-4, 5e-4, 2e-4, 2e-4], requires_grad=True
    )  # s: 1.0005 and 1.0002, bounds 0.9997 and 1.0004
    loss, stats = losses.gspo_loss(logprobs, old, torch.ones(4), [2, 2], grpo.Totals(2, 4, 4))
    loss.backward()
    assert stats.clipped.item() == 2 and (logprobs.grad != 0).tolist() == [False, False, True, True]
    s = math.exp(2e-4)
    torch.testing.assert_close(logprobs.grad[2:], torch.full((2,), -s / (2 * 2)))  # -s A / (R B)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 10**6),
    st.sampled_from([losses.EPSILONS["gspo"], (0.1, 0.2)]),
)
def test_gspo_loss_and_gradient_equal_a_loop_by_hand(lengths, seed, epsilons):
    logprobs, old, advantages, _, importance = random_batch(lengths, seed)
    expected, start = 0.0 * logprobs.sum(), 0
    for a, n in zip(advantages.tolist(), lengths, strict=True):
        span = slice(start, start + n)
        s = (sum(logprobs[span] - old[span]) / n).exp()
        clipped = min(max(s.item(), 1 - epsilons[0]), 1 + epsilons[1])
        objective = s * a if s.item() * a <= clipped * a else torch.tensor(clipped * a)
        expected = expected - objective * (sum(importance[span]) / n) / len(lengths)
        start += n
    per_token = advantages.repeat_interleave(torch.tensor(lengths))
    loss, _ = losses.gspo_loss(
        logprobs, old, per_token, lengths, grpo.Totals(len(lengths), sum(lengths), 9), importance, epsilons
    )
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(value, logprobs)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("advantage, ratio, value, slope", [
    (1.0, 1.0, 2.0, 1.0), (-1.0, 1.0, 2 / 1.05, 1.0), (1.0, 1.5, 2.48984, 0.94001),
    (-1.0, 1.5, None, 0.93414),
])  # fmt: skip
def test_sapo_gate_of_the_known_vector(advantage, ratio, value, slope):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, _ = losses.sapo_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), [1], grpo.Totals(1, 1, 1))
    loss.backward()
    if value:
        assert loss.item() == pytest.approx(-advantage * value, abs=1e-5)
    assert logprobs.grad.item() == pytest.approx(-advantage * slope * ratio, abs=2e-5)  # d r / d log pi = r


def test_sapo_equals_a_loop_by_hand():
    lengths = [2, 3, 1]
    logprobs, old, advantages, _, importance = random_batch(lengths, 4)
    expected, t = 0.0, 0
    for a, n in zip(advantages.tolist(), lengths, strict=True):
        for _ in range(n):
            tau, r = (1.0 if a > 0 else 1.05), math.exp((logprobs[t] - old[t]).item())
            expected -= 4 / (tau * (1 + math.exp(-tau * (r - 1)))) * a * importance[t].item() / (n * 3)
            t += 1
    per_token = advantages.repeat_interleave(torch.tensor(lengths))
    loss, _ = losses.sapo_loss(logprobs, old, per_token, lengths, grpo.Totals(3, 6, 9), importance)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------- Clip-Cov and KL-Cov


def test_covariance_of_the_known_vector():
    """(A - 1) (log pi + 2) by hand."""
    covariances = losses.covariance(torch.tensor([3.0, 1.0, -1.0]), torch.tensor([-1.0, -2.0, -3.0]))
    assert covariances.tolist() == [2.0, 0.0, 2.0]


def test_clip_cov_chooses_so_many_at_random_between_the_bounds():
    covariances = torch.linspace(-10, 10, 20_001)
    chosen = losses.clip_cov_tokens(covariances, seed=1)
    assert chosen.sum() == 4  # floor(2e-4 * 20001)
    assert ((covariances[chosen] > 1) & (covariances[chosen] < 5)).all()
    assert torch.equal(chosen, losses.clip_cov_tokens(covariances, seed=1))  # ranks agree
    assert not torch.equal(chosen, losses.clip_cov_tokens(covariances, seed=2))
    assert losses.clip_cov_tokens(covariances[:100], seed=1).sum() == 0  # none between the bounds
    assert (
        losses.clip_cov_tokens(torch.tensor([0.0, 2.0, 3.0]), seed=1).sum() == 1
    )  # at least one, of those that may be


def test_kl_cov_chooses_the_largest():
    covariances = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    chosen = losses.kl_cov_tokens(covariances, seed=0)
    assert chosen.sum() == 10 and covariances[chosen].min() > covariances[~chosen].max()
    assert losses.kl_cov_tokens(covariances[:9], seed=0).sum() == 1


def test_choose_is_over_the_whole_minibatch_and_hands_back_what_belongs_to_each_completion():
    def group(advantages, *logprobs):
        completions = [SimpleNamespace(logprobs=row) for row in logprobs]
        lengths = [len(row) for row in logprobs]
        return SimpleNamespace(advantages=torch.tensor(advantages), completions=completions, lengths=lengths)

    groups = [group([1.0, -1.0], [-3.0, -2.0], [-2.5]), group([2.0, -2.0], [-1.0, -0.1, -2.0], [-1.5])]
    losses.mark(
        groups, losses.kl_cov_tokens, seed=0
    )  # largest A times largest log pi, both above their means
    lists = [[part.tolist() for part in group.marked] for group in groups]
    assert lists == [[[False, False], [False]], [[False, True, False], [False]]]


def test_cov_losses_equal_a_loop_by_hand():
    lengths = [4, 2, 5]
    logprobs, old, advantages, _, importance = random_batch(lengths, 6)
    per_token, chosen = advantages.repeat_interleave(torch.tensor(lengths)), importance > 1
    clip_expected = kl_expected = 0.0 * logprobs.sum()
    for t in range(11):
        r, a, w = (logprobs[t] - old[t]).exp(), per_token[t].item(), importance[t].item()
        if not chosen[t]:
            objective = r * a if r.item() * a <= min(r.item(), 1.2) * a else torch.tensor(1.2 * a)
            clip_expected = clip_expected - objective * w / 11
        kl_expected = kl_expected - r * a * w / 11
        if chosen[t]:
            kl_expected = kl_expected + 0.5 * (logprobs[t] - old[t]).abs() / 11
    arguments = logprobs, old, per_token, lengths, grpo.Totals(3, 11, 9), importance
    clip, stats = losses.clip_cov_loss(*arguments, marked=chosen, epsilons=(1.0, 0.2))
    kl, _ = losses.kl_cov_loss(*arguments, marked=chosen, coefficient=0.5)
    for loss, expected in ((clip, clip_expected), (kl, kl_expected)):
        torch.testing.assert_close(loss, expected.detach())
        gradients = [torch.autograd.grad(value, logprobs, retain_graph=True)[0] for value in (loss, expected)]
        torch.testing.assert_close(*gradients)
    assert stats.clipped.item() == (torch.autograd.grad(clip, logprobs)[0] == 0).sum()


# --------------------------------------------------------------------------- what the sampler's rounding does


def test_importance_weights_are_one_on_policy_capped_above_and_without_gradient():
    old = torch.tensor([0.0, math.log(5.0), math.log(0.25)], requires_grad=True)
    weights = grpo.importance_weights(old, torch.zeros(3), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 0.25]))
    assert not weights.requires_grad
    logprobs, reference, advantages, _, _ = random_batch([4], 5)
    arguments = logprobs, reference, advantages.repeat(4), [4], grpo.Totals(1, 4, 4)
    assert dapo.loss(*arguments, importance=torch.ones(4))[0] == dapo.loss(*arguments)[0]


def test_importance_weights_leave_the_kl_term_alone():
    logprobs, old, advantages, ref, _ = random_batch([5], 7)
    arguments = logprobs, old, torch.zeros(5), [5], grpo.Totals(1, 5, 5)
    with_zero = grpo.loss(*arguments, importance=torch.zeros(5), beta=0.5, ref_logprobs=ref)[0]
    assert with_zero.item() == pytest.approx(grpo.loss(*arguments, beta=0.5, ref_logprobs=ref)[0].item())
    assert with_zero.item() > 0


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1.0, -1.0, 100.3, 1e-30, 3e30])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_equal_rewards_of_any_value_teach_nothing(reward, size):
    """Their mean differs from them by rounding; over a deviation of rounding it would be a whole step."""
    for normalize_std in (True, False):
        assert not grpo.advantages(torch.full((size,), reward), normalize_std).any()
