"""studies/ablation.py: which runs there are, which learning rate wins, and what its report pairs."""

import json

import pytest
from conftest import refusal, run_here
from test_paired import record

from base.cli import BadInput, parse
from run.config import Config as Training
from run.config import check
from studies import ablation, paired
from studies.ablation import ALL, BOTTOM, COMPARISONS, RANDOM, SAME_RATE, TOP

RECALL, MEMORY = COMPARISONS["recall"], COMPARISONS["memory"]


def swept(comparison, best):
    """A sweep that `best`, {method: rate}, win."""
    return [
        record(arm, rate, seed, 0.8 if rate == best[method] else 0.7)
        for seed in comparison.seeds
        for method, rates in comparison.rates.items()
        for arm in [comparison.arms[method]]
        for rate in rates
    ]


def test_the_papers_rows_and_the_others_are_all_there():
    for of in ("recall", "grpo", "tracking", "real"):
        rules = [arm.rule for arm in COMPARISONS[of].arms.values()]
        assert rules == ["all", "top", "bottom", "random", "all"]
    fractions = COMPARISONS["fractions"].arms.values()
    assert {arm.fraction for arm in fractions if arm.rule == "top"} == {0.1, 0.2, 0.3, 0.4}


@pytest.mark.parametrize("of", COMPARISONS)
def test_every_method_is_a_run_of_train(of):
    comparison = COMPARISONS[of]
    for arm, rate, seed in ablation.to_sweep(comparison):
        flags = paired.flags_of(comparison.train, arm, rate, seed)
        training = parse(Training, "", flags.split())
        assert (training.rule, training.learning_rate, training.seed) == (arm.rule, rate, seed)
    for one, other in comparison.pairs:
        assert one in comparison.arms and other in comparison.arms
    assert set(comparison.arms) == {*comparison.rates, *comparison.rate_of}
    assert len(comparison.arms) <= len(ablation.COLOURS)


def test_each_runs_at_the_rate_that_ends_highest(tmp_path):
    """All rows at the rate of their own sweep and at the top's, as the rate moves all weights; one that is
    not swept at that of another."""
    records = swept(RECALL, {ALL: 1e-3, TOP: 1e-4})
    won, by_rate = ablation.winners(records, RECALL, tmp_path)
    assert won == {ALL: 1e-3, TOP: 1e-4, BOTTOM: 1e-4, RANDOM: 1e-4, SAME_RATE: 1e-4}
    assert by_rate[TOP][1e-4] - by_rate[TOP][1e-3] == pytest.approx(0.1)
    assert ablation.merged(RECALL, won) is RECALL
    won, _ = ablation.winners(swept(RECALL, {ALL: 3e-4, TOP: 3e-4}), RECALL, tmp_path)
    merged = ablation.merged(RECALL, won)  # all rows have won with top's rate: they are there once
    assert list(merged.arms) == [ALL, TOP, BOTTOM, RANDOM] and len(merged.pairs) == len(RECALL.pairs) - 1
    assert ablation.merged(MEMORY, dict.fromkeys(MEMORY.arms, 1e-4)) == MEMORY
    records[0]["rewards"] = [0.7] * 9  # of another length
    ablation.winners(records, RECALL, tmp_path)
    best = {"dense": 3e-4, "LongAct": 1e-4, "LoRA": 3e-3, "LoRA, LongAct": 1e-2}
    won, by_rate = ablation.winners(swept(MEMORY, best), MEMORY, tmp_path)
    assert won == {**best, "LongAct, 8 bits": 1e-4}
    assert len(by_rate) == 4 and list(by_rate["LoRA"]) == [1e-3, 3e-3, 1e-2]
    with pytest.raises(BadInput, match=r"lacks 2 runs of the sweep: python -m studies\.ablation sweep"):
        ablation.winners(records[2:], RECALL, tmp_path)


def test_the_report_pairs_by_seed(tmp_path):
    """top is better than all rows by 2 points of reward in every seed, whatever the seed does, and than all
    at its rate by 5."""
    records, arms = swept(RECALL, {ALL: 1e-3, TOP: 1e-4}), RECALL.arms
    for seed, level in enumerate([0.5, 0.6, 0.7, 0.8]):
        records.append(record(arms[ALL], 1e-3, seed, level))
        records.append(record(arms[ALL], 1e-4, seed, level - 0.03))
        records.append(record(arms[TOP], 1e-4, seed, level + 0.02))
        records.append(record(arms[BOTTOM], 3e-4, seed, 0.1))  # not at its rate: not shown
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    printed = run_here("studies/ablation.py", "report", "--out", tmp_path)
    assert (tmp_path / "report.md").read_text() in printed
    assert "top 30% - all rows" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert "+2.00 ±0.00" in lines["top 30% - all rows"] and lines["top 30%"].split()[2:4] == ["0.0001", "4"]
    assert "+5.00 ±0.00" in lines["top 30% - all rows, top's rate"]
    assert "bottom 30%" not in lines and "random 30%" not in lines
    assert any(line.startswith("- top 30%: 0.0001 ") and line.endswith(" -> 0.0001") for line in lines)
    assert "none of sweep, compare, report" in refusal("studies/ablation.py", "swept")


@pytest.mark.parametrize("of", COMPARISONS)
def test_own_data_take_the_tasks_place(tmp_path, monkeypatch, of):
    """No flag of ours is one that train.py refuses."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "p", "answer": "a"}))
    asked = []
    monkeypatch.setattr(paired, "run_all", lambda flags, *how: asked.append((flags, how[2])))
    data = f"--data {rows} --eval-data {rows}"
    run_here("studies/ablation.py", "sweep", "--of", of, "--train", data, "--out", tmp_path / "out")
    [(train, wanted)] = asked
    for each in wanted:
        training = parse(Training, "", paired.flags_of(train, *each).split())
        check(training, 1, False)
        assert training.data == [str(rows)] and not training.eval_filler


def test_a_report_on_own_data_needs_no_flags(tmp_path):
    arm = RECALL.arms[TOP]
    made = [*swept(RECALL, {ALL: 1e-4, TOP: 1e-4}), record(arm, 1e-4, 0, 0.6)]
    text = "".join(json.dumps({**each, "task": "data"}) + "\n" for each in made)
    (tmp_path / "results.jsonl").write_text(text)
    assert "top 30%" in run_here("studies/ablation.py", "report", "--out", tmp_path)
