"""studies/methods.py: which runs there are, at which rates, and what its report pairs."""

import json

import pytest
from conftest import refusal, run_here
from test_ablation import record

from base.cli import BadInput, parse
from run.config import Config as Training
from studies import ablation, methods


def swept(comparison):
    """A sweep in which the middle rate wins for each method."""
    return [
        record(arm, rate, seed, 0.8 if rate in (3e-4, 3e-3, 2e-5) else 0.7)
        for arm, rate, seed in methods.to_sweep(comparison)
    ]


def test_every_method_is_a_run_of_train_and_lora_is_swept_ten_times_higher(tmp_path):
    for comparison in methods.COMPARISONS.values():
        for arm, rate, seed in methods.to_sweep(comparison):
            config = ablation.Config(train=comparison.train)
            training = parse(Training, "", ablation.flags_of(config, arm, rate, seed).split())
            assert (training.rule, training.learning_rate, training.seed) == (arm.rule, rate, seed)
    won, by_rate = methods.winners(swept(methods.MEMORY), methods.MEMORY, tmp_path)
    assert won == {
        "dense": 3e-4,
        "LongAct": 3e-4,
        "LoRA": 3e-3,
        "LoRA, LongAct": 3e-3,
        "LongAct, 8 bits": 3e-4,
    }
    assert len(by_rate) == 4 and list(by_rate["LoRA"]) == [1e-3, 3e-3, 1e-2]
    assert by_rate["LoRA"][3e-3] - by_rate["LoRA"][1e-3] == pytest.approx(0.1)
    with pytest.raises(BadInput, match=r"lacks 1 runs of the sweep: python -m studies\.methods sweep"):
        methods.winners(swept(methods.MEMORY)[1:], methods.MEMORY, tmp_path)
    won, _ = methods.winners(swept(methods.REAL), methods.REAL, tmp_path)
    assert set(won.values()) == {2e-5} and list(won) == list(methods.ROWS)


def test_the_report_pairs_methods_by_seed(tmp_path):
    """LoRA is 2 points of reward above dense in every seed, whatever the seed does, with the mask 1 above."""
    records = swept(methods.MEMORY)
    for seed, level in enumerate([0.5, 0.6, 0.7]):
        for method, rate, more in (("dense", 3e-4, 0), ("LoRA", 3e-3, 0.02), ("LoRA, LongAct", 3e-3, 0.01)):
            records.append(record(methods.MEMORY.arms[method], rate, seed, level + more))
    for each in records:
        each["seconds"] = 7.0
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    printed = run_here("studies/methods.py", "report", "--out", tmp_path)
    assert (tmp_path / "report.md").read_text() in printed
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert "+2.00 ±0.00" in lines["LoRA - dense"] and "-1.00 ±0.00" in lines["LoRA, LongAct - LoRA"]
    assert "LongAct - dense" not in lines and lines["LoRA"].split()[1:3] == ["0.003", "3"]
    assert any(line.startswith("- LoRA: 0.001 ") and line.endswith(" -> 0.003") for line in lines)
    assert "none of sweep, compare, report" in refusal("studies/methods.py", "swept")


def test_what_the_pairs_would_have_shown_is_a_t_tests():
    """Differences of 1, 2, 3 points, times 0.75 by `record`: the standard error is 0.75 / sqrt(3), the
    quantiles of Student's t with 2 degrees of freedom are 4.303 and 1.061."""
    arm = methods.MEMORY.arms["dense"]
    one = {seed: record(arm, 3e-4, seed, 0.5, accuracy=0.5 + seed / 100) for seed in (1, 2, 3)}
    other = {seed: record(arm, 3e-4, seed, 0.5, accuracy=0.5) for seed in (1, 2, 3)}
    assert float(methods.seen_from(one, other)) == pytest.approx(0.75 * (4.303 + 1.061) / 3**0.5, abs=0.06)
    assert methods.seen_from({1: one[1]}, other) == "-"
