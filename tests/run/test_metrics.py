"""run/metrics.py: several rewards, and those that took too long."""

import math

import torch

from rollout import Completion, Group
from run import metrics


def test_accuracy_is_the_first_rewards_and_what_took_too_long_counts_as_zero():
    group = Group(0, [1, 2], [Completion([3], [-0.5], True)] * 4)
    values = torch.tensor([[1.0, 0.5], [0.0, 2.0], [math.nan, 0.5], [1.0, math.nan]])
    group.take_rewards(values, torch.tensor([1.0, -0.5]))
    assert group.rewards.tolist() == [1, 0, 0, 1] and group.scores.tolist() == [0.75, -1, -0.25, 1]
    line = metrics.of_rollout([group], [group], ["mine:right", "mine:form"])
    assert (line["reward"], line["accuracy"], line["rewards_timed_out"]) == (0.125, 0.5, 2)
    assert line["rewards"] == {
        "mine:right": {"mean": 0.5, "std": 0.5},
        "mine:form": {"mean": 0.75, "std": 0.75},  # of 0.5, 2, 0.5, 0
    }


def test_one_reward_is_all_that_it_was():
    group = Group(0, [1, 2], [Completion([3], [-0.5], True)] * 3)
    values = torch.tensor([0.1, 1 / 3, 3e30])
    group.take_rewards(values[:, None], torch.tensor([1.0]))
    assert torch.equal(group.rewards, values) and torch.equal(group.scores, values)
    line = metrics.of_rollout([group], [group], ["mine:right"])
    assert "rewards" not in line and line["reward"] == values.mean().item()
