"""gradients.py against gradients taken one by one, and its statistics worked by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, ROOT, make_small, refusal, run_here

from base import durable
from base.cli import BadInput
from evals import subject
from prompts import tasks
from rollout import Completion
from studies import gradients

TINY = ROOT / "assets" / "tiny"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def make_groups(n):
    draw = torch.Generator().manual_seed(0)
    ids = lambda size: torch.randint(0, 101, (size,), generator=draw).tolist()  # noqa: E731
    return [
        {"prompt": ids(9 + i), "completions": [ids(2 + j) for j in range(3)], "rewards": [1.0, 0.0, i % 2]}
        for i in range(n)
    ]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_rows_are_those_of_gradients_taken_one_by_one(family):
    model, groups = make_small(**FAMILIES[family]), make_groups(6)
    rows, parts = gradients.measure(model, groups, 1)
    tokens = sum(len(ids) for group in groups for ids in group["completions"]) / 6
    each = []
    for group in groups:
        model.zero_grad()
        gradients.loss_of(model, group, tokens).backward()
        each.append({name: p.grad.double() for name, p in model.named_parameters()})
    for name in (Q, K):
        stacked = torch.stack([one[f"{name}.weight"] for one in each])  # (groups, rows, C)
        expected = {
            "squares": stacked.square().sum((0, 2)),
            "total": stacked.sum(0).square().sum(1),
            "cross": (stacked[::2].mean(0) * stacked[1::2].mean(0)).sum(1),
        }
        for b in range(6):  # six blocks of one group each
            others = stacked[[i for i in range(6) if i != b]]
            for key, values in {
                "squares": others.square().sum((0, 2)),
                "total": others.sum(0).square().sum(1),
            }.items():
                without = rows[f"{name}.{key}_without"][b].flatten().double()
                torch.testing.assert_close(without, values, rtol=1e-4, atol=1e-9)
        for key, values in expected.items():
            torch.testing.assert_close(rows[f"{name}.{key}"].flatten().double(), values, rtol=1e-4, atol=1e-9)
        assert rows[f"{name}.magnitude"].shape == rows[f"{name}.moved"].shape == (len(stacked[0]) // 16, 16)
    total = {name: sum(one[name] for one in each).square().sum().item() for name in each[0]}
    mine = sum(value for name, value in total.items() if "q_proj" in name)
    assert parts["q"] == pytest.approx(mine / sum(total.values()), rel=1e-4)
    assert sum(parts.values()) == pytest.approx(1) and min(parts.values()) > 0


def test_adamw_moves_a_weight_by_the_learning_rate_a_step_whatever_its_gradient():
    adam, gradient = gradients.Adam({"w": (2, 3)}, 2), torch.tensor([[1.0, -2, 3], [1e-3, -1e-3, 5]])
    for _ in range(6):  # three steps of two groups
        adam.add({"w": gradient.clone()})
    torch.testing.assert_close(adam.weights["w"].detach(), -3 * gradient.sign(), rtol=1e-4, atol=0)


def test_signal_noise_and_shares_by_hand():
    """Of three groups, whose gradients of a row are 1, 2 and 3, the signal is the mean product of two,
    11/3, and the variance 1. Head by head dimension 0 is the largest of four, dimension 3 the smallest."""
    of_q = torch.tensor([[[1.0, 2, 3], [2, 1, 2], [0, 2, 4], [1, 0, 2]]] * 2)  # (heads, D, groups)
    of_k = torch.tensor([[[2.0, 1, 3], [1, 1, 2], [1, 0, 1], [0, 1, 2]]])
    rows = {}
    for name, triple in ((Q, of_q), (K, of_k)):
        for layer in (0, 1):
            made = {"magnitude": torch.tensor([4.0, 2, 1, 0.5]).repeat(len(triple), 1)}
            made |= {"squares": triple.square().sum(-1), "total": triple.sum(-1).square()}
            for key, values in (("squares", triple.square()), ("total", triple)):
                without = torch.stack([values.sum(-1) - values[..., b] for b in range(3)])
                made[f"{key}_without"] = without if key == "squares" else without.square()
            made |= {key: triple.prod(-1) for key in ("cross", "gained")} | {
                "moved": torch.ones(len(triple), 4)
            }
            place = name.replace("layers.0", f"layers.{layer}")
            rows |= {f"{place}.{key}": values for key, values in made.items()}
    made = gradients.summarize(rows, 3, 0.25)
    q, k = made["q"], made["k"]
    assert q["top"]["signal"] == pytest.approx(11 / (11 + 8 + 8 + 2))
    assert q["bottom"]["signal"] == pytest.approx(2 / (11 + 8 + 8 + 2))
    assert q["top"]["snr"] == q["top"]["snr_mean"] == pytest.approx(gradients.STEP * 11 / 3)
    assert q["top"]["snr_layers"] == pytest.approx([q["top"]["snr"]] * 2)
    assert q["bottom"]["snr"] == pytest.approx(gradients.STEP * 2 / 3)
    assert q["top_minus_bottom"]["snr"] == pytest.approx(gradients.STEP * 3)
    # without one of the groups: signals 6, 3, 2 over variances 1/2, 2, 1/2
    replicates = [gradients.STEP * x for x in (12, 1.5, 4)]
    expected = math.sqrt(2 / 3 * sum((x - sum(replicates) / 3) ** 2 for x in replicates))
    assert q["errors"]["top"]["snr"] == pytest.approx(expected)
    assert q["top"]["gradient"] == pytest.approx(36 / (36 + 25 + 36 + 9))
    assert q["top"]["sgd"] == q["top"]["adam_gain"] == pytest.approx(6 / (6 + 4))
    assert q["middle"]["rows"] == 0.5 and q["middle"]["adam_moved"] == 0.5
    assert k["top"]["magnitude"] == pytest.approx(16 / 21.25)
    assert k["top"]["signal"] == pytest.approx(11 / (11 + 5 + 1 + 2))
    assert k["chosen_by"]["gradient"] == pytest.approx(11 / (11 + 5 + 1 + 2))
    assert k["rank"]["own"] > 0.5 and k["unseen"]["adam_moved"] == 0.25


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [values[[i for i in range(12) if i != b]].mean().item() for b in range(12)]
    expected = (values.std() / math.sqrt(12)).item()
    assert gradients.jackknife(parts) == pytest.approx(expected)
    made = gradients.jackknife([{"a": [part, 2 * part]} for part in parts])
    assert made["a"] == pytest.approx([expected, 2 * expected])


def test_partners_are_the_rotated_pairs_of_the_heads_that_meet():
    magnitudes = {
        Q: torch.tensor([[3.0, 0, 4, 1], [0, 0, 0, 1], [1, 1, 1, 1], [2, 2, 2, 2]]),
        K: torch.tensor([[1.0, 2, 0, 0], [5, 0, 12, 0]]),
    }
    of_q = gradients.partners(magnitudes, Q)
    assert of_q.tolist() == [[1, 2, 1, 2]] * 2 + [[13, 0, 13, 0]] * 2
    expected = [((9 + 16 + 0) / 2) ** 0.5, ((1 + 1) / 2) ** 0.5]  # of heads 0 and 1
    assert gradients.partners(magnitudes, K)[0].tolist() == pytest.approx(expected * 2)
    assert gradients.rank_correlation(magnitudes[K], 2 * magnitudes[K] + 1) == pytest.approx(1)


class ByRote:
    """In place of vLLM, as one_step.Stored is: of every second prompt all completions are right, of the
    others the first only."""

    def __init__(self, tokenizer, source):
        self.answers = [
            [tokenizer.encode(source[i]["answer"]).ids for i in range(8)],
            tokenizer.encode("no").ids,
        ]

    def generate(self, prompts, n, temperature, max_tokens, seeds, stop_ids):
        right, wrong = self.answers
        kept = [n if i % 2 else 1 for i in range(len(prompts))]
        return [
            [Completion(right[i] if j < kept[i] else wrong, [], True) for j in range(n)]
            for i in range(len(prompts))
        ]


def test_groups_whose_rewards_differ_are_kept_and_the_script_goes_on_from_them(tmp_path):
    how = {
        "tasks": ["recall"],
        "facts": 12,
        "filler": 0,
        "groups": 4,
        "step": 1,
        "completions": 3,
        "round": 8,
    }
    config = gradients.Config(str(TINY), **how)
    model_config, tokenizer, _ = subject.load(TINY)
    engine = ByRote(tokenizer, tasks.Source("recall", "train 0", 12, 0))
    out = tmp_path / "out"
    out.mkdir()
    durable.write_json(out / "settings.json", gradients.settings_of(config, model_config))
    gradients.sample(config, "recall", engine, tokenizer, out / "recall.jsonl")
    groups = [group for _, _, group in durable.json_lines(out / "recall.jsonl")]
    assert [group["drawn"] for group in groups] == [1, 3, 5, 7]
    assert all(group["rewards"] == [1, 0, 0] for group in groups)
    with pytest.raises(BadInput, match="the rewards of 4 of 8 groups differ, --groups wants 5"):
        gradients.sample(replace(config, groups=5, rounds=1), "recall", engine, tokenizer, out / "x")

    flags = [TINY, "--tasks", "recall", "--facts", 12, "--filler", 0, "--groups", 4, "--step", 1]
    flags += ["--completions", 3, "--round", 8, "--out", out]
    printed = run_here("studies/gradients.py", *flags)
    made = json.loads((out / "gradients.json").read_text())
    task = made["recall"]
    assert task["groups"] == 4 and task["sampled"] == 7 and "recall: 4 groups of 7" in printed
    for which in "qk":
        assert sum(task[which][kind]["gradient"] for kind in gradients.CLASSES) == pytest.approx(1)
        assert task[which]["top"]["rows"] == pytest.approx(9 / 32)
        assert task[which]["chosen_by"]["own"] == pytest.approx(task[which]["top"]["signal"])
    undocumented = [key for key in [*task, *task["q"], *task["q"]["top"]] if key not in gradients.__doc__]
    assert not undocumented
    assert "holds gradients of other settings" in refusal("studies/gradients.py", *flags, "--seed", 1)
    assert "needs two of AdamW's steps" in refusal("studies/gradients.py", TINY, "--groups", 5)
