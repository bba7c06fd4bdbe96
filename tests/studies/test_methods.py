"""studies/methods.py: which runs there are, at which rates, and what its report pairs."""

import json

import pytest
from conftest import refusal, run_here
from test_ablation import record

from base.cli import BadInput, parse
from run.config import Config as Training
from studies import ablation, methods


def swept(arms):
    """A sweep in which the middle rate wins for each method."""
    return [
        record(arm, rate, seed, 0.8 if rate in (3e-4, 3e-3) else 0.7)
        for arm, rate, seed in methods.to_sweep(arms)
    ]


def test_every_method_is_a_run_of_train_and_lora_is_swept_ten_times_higher(tmp_path):
    for arm, rate, seed in methods.to_sweep(methods.METHODS):
        parse(Training, "", ablation.flags_of(ablation.Config(), arm, rate, seed).split())
    won = methods.winners(swept(methods.METHODS), methods.METHODS, tmp_path)
    assert won == {
        "dense": 3e-4,
        "LongAct": 3e-4,
        "LoRA": 3e-3,
        "LoRA, LongAct": 3e-3,
        "LongAct, 8 bits": 3e-4,
    }
    with pytest.raises(BadInput, match=r"lacks 1 runs of the sweep: python -m studies\.methods sweep"):
        methods.winners(swept(methods.METHODS)[1:], methods.METHODS, tmp_path)


def test_the_report_pairs_methods_by_seed(tmp_path):
    """LoRA is 2 points of reward above dense in every seed, whatever the seed does, with the mask 1 above."""
    records = swept(methods.METHODS)
    for seed, level in enumerate([0.5, 0.6, 0.7]):
        for method, rate, more in (("dense", 3e-4, 0), ("LoRA", 3e-3, 0.02), ("LoRA, LongAct", 3e-3, 0.01)):
            records.append(record(methods.METHODS[method], rate, seed, level + more))
    for each in records:
        each["seconds"] = 7.0
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    printed = run_here("studies/methods.py", "report", "--out", tmp_path)
    assert (tmp_path / "report.md").read_text() in printed
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert "+2.00 ±0.00" in lines["LoRA - dense"] and "-1.00 ±0.00" in lines["LoRA, LongAct - LoRA"]
    assert "LongAct - dense" not in lines and lines["LoRA"].split()[1:3] == ["0.003", "3"]
    assert "none of sweep, compare, report" in refusal("studies/methods.py", "swept")
