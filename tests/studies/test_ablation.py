"""ablation.py: which runs there are, what is not run again, which learning rate wins, and the statistics of
its report."""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT

from base.cli import BadInput, parse
from run.config import Config as Training
from run.config import check
from studies import ablation
from studies.ablation import FAMILIES, LEARNING_RATES, OWN_DATA, SWEEP_SEEDS, Arm

SWEEP, COMPARE = ablation.swept(FAMILIES), ablation.compared_arms(FAMILIES)


def record(arm, learning_rate, seed, reward, accuracy=0.5):
    """A line of results.jsonl whose rewards rise by 0.01 a step up to `reward`."""
    sets = {
        "a": {"prompt_tokens": 335.0, "accuracy": accuracy},
        "b": {"prompt_tokens": 470.2, "accuracy": accuracy / 2},
    }
    made = {
        "learning_rate": learning_rate,
        "seed": seed,
        "rewards": [reward - 0.01 * (15 - i) for i in range(16)],
    }
    moved = {"moved_selected": 1e-4, "moved_unselected": None if arm.rule == "all" else 1e-5}
    return {**arm._asdict(), **made, "held_out": sets, **moved}


def swept():
    """A sweep in which 1e-3 wins for dense training and 1e-4 for LongAct."""
    best = {True: 1e-3, False: 1e-4}
    return [
        record(arm, rate, seed, 0.8 if rate == best[arm.rule == "all"] else 0.7)
        for arm in SWEEP
        for rate in LEARNING_RATES
        for seed in SWEEP_SEEDS
    ]


def test_the_issues_arms_are_all_there_once():
    assert len(set(COMPARE)) == len(COMPARE)
    for algorithm in ("dapo", "grpo"):
        assert {arm.rule for arm in COMPARE if arm[:2] == ("recall", algorithm)} == {
            "all",
            "top",
            "bottom",
            "random",
        }
    assert {a.fraction for a in COMPARE if a.rule == "top" and a[:2] == ("recall", "dapo")} == {
        0.1,
        0.2,
        0.3,
        0.4,
    }
    assert {arm.rule for arm in SWEEP} == {"all", "top"} and {arm[:2] for arm in SWEEP} == set(FAMILIES)


def test_the_learning_rate_that_ends_highest_wins_for_each(tmp_path):
    _, winning = ablation.winners(swept(), FAMILIES, tmp_path)
    assert winning == {
        (family, dense): (1e-3 if dense else 1e-4) for family in FAMILIES for dense in (True, False)
    }
    with pytest.raises(BadInput, match="lacks 2 runs of the sweep"):
        ablation.winners(swept()[2:], FAMILIES, tmp_path)


def test_interval_is_students(tmp_path):
    mean, half = ablation.interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(
        3.1824 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=0.01
    )  # t(0.975, 3)


def test_a_run_is_judged_by_these_numbers():
    made = ablation.outcomes(record(COMPARE[0], 1e-3, 0, 0.75, accuracy=0.6))
    assert made["acc. at 335"] == 60 and made["acc. at 470"] == 30 and made["accuracy"] == pytest.approx(45)
    assert made["reward area"] == pytest.approx(100 * (0.75 - 0.01 * 7.5))
    assert made["steps to 0.7"] == 11  # 0.75 - 0.05, less rounding
    assert ablation.outcomes(record(COMPARE[0], 1e-3, 0, 0.5))["steps to 0.7"] == 17


def test_what_is_compared_at_which_rate(tmp_path):
    """Each at the rate it won by; dense training at LongAct's as well, since the rate moves all weights."""
    _, winning = ablation.winners(swept(), FAMILIES, tmp_path)
    wanted = ablation.compared(winning)
    assert {rate for arm, rate in wanted if arm.rule == "all"} == {1e-3, 1e-4}
    assert {rate for arm, rate in wanted if arm.rule != "all"} == {1e-4}
    assert len(wanted) == len(set(wanted)) == len(COMPARE) + len(FAMILIES)
    assert len(ablation.compared(dict.fromkeys(winning, 3e-4))) == len(COMPARE)


def test_the_report_pairs_by_seed(tmp_path, capsys):
    """top is better than all by 2 points of reward in every seed, whatever the seed does, and than all at its
    rate by 5."""
    records, dense = swept(), Arm("recall", "dapo", "all", 0.3)
    for seed, level in enumerate([0.5, 0.6, 0.7, 0.8]):
        records.append(record(dense, 1e-3, seed, level))
        records.append(record(dense, 1e-4, seed, level - 0.03))
        records.append(record(dense._replace(rule="top"), 1e-4, seed, level + 0.02))
        records.append(record(dense._replace(rule="bottom"), 3e-4, seed, 0.1))  # not at its rate: not shown
    ablation.report(records, FAMILIES, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in text.splitlines() if line.startswith("top 30% - ")}
    assert lines.keys() == {"top 30% - all", "top 30% - all, at 0.0001"}
    assert "+2.00 ±0.00" in lines["top 30% - all"] and "+5.00 ±0.00" in lines["top 30% - all, at 0.0001"]
    assert "bottom" not in text and (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    """Its directory is read; were train.py started, it would refuse 8 prompts in 3 updates. A run of other
    flags or another model has another directory."""
    model = shutil.copytree(ROOT / "assets" / "tiny", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    arm, config = COMPARE[0], ablation.Config(train=f"--updates 3 --model {model}")
    own = ablation.identity(ablation.flags_of(config, arm, 1e-3, 5))
    directory = tmp_path / "runs/ablation-runs" / f"recall-dapo-{arm.rule}-0.3-0.001-5-{own}"
    directory.mkdir(parents=True)
    step = {
        "reward": 0.5,
        "prompts_drawn": 8,
        "tokens_trained": 100,
        "moved_selected": 1.0,
        "moved_unselected": None,
    }
    lines = [
        json.dumps({**step, "step": i, "prompts_drawn": 8 * i, "seconds": {"total": 2.0}}) for i in (1, 2)
    ]
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    (directory / "results.json").write_text(json.dumps({"before": None, "after": {"a": {"accuracy": 0.5}}}))
    (directory / "checkpoints/2").mkdir(parents=True)  # to go on from, which a finished run does not need
    made = ablation.run(config, arm, 1e-3, 5)
    assert not (directory / "checkpoints").exists()
    assert made["rewards"] == [0.5, 0.5] and made["prompts_drawn"] == 16 and made["tokens_trained"] == 200
    assert made["seconds"] == 4 and made["moved_unselected"] is None and ablation.key(made) == (arm, 1e-3, 5)
    ablation.check_own(config, [made], "results.jsonl")
    ablation.check_own(ablation.Config(train=config.train + " --keep 2"), [made], "")  # the default
    others = ({**made, "identity": None}, config), (made, ablation.Config(train=config.train + " --steps 9"))
    for record, now in others:
        with pytest.raises(BadInput, match="has a run of other flags, model or data .*choose another --out"):
            ablation.check_own(now, [record], "results.jsonl")
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    ablation.contents.cache_clear()  # of this process, which is another then
    monkeypatch.setattr(ablation.interrupt, "run", lambda command, **how: pytest.fail(command[-3]))
    with pytest.raises(
        pytest.fail.Exception, match=f"ablation-runs/recall-dapo-{arm.rule}-0.3-0.001-5-(?!{own})"
    ):
        ablation.run(config, arm, 1e-3, 5)
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput, match="--prompts 8 cannot be shared: 3 updates"):
        ablation.run(config, arm, 1e-3, 5)


def test_own_data_are_a_task_of_their_own(tmp_path):
    """Named by a flag or by a file; held-out data must be named as well. No flag of ours is one that train.py
    refuses."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "p", "answer": "a"}))
    (tmp_path / "c.toml").write_text(f'data = ["{rows}"]\neval_data = ["{rows}"]')
    named = f"--config {tmp_path / 'c.toml'}"
    assert ablation.names_data(named) and ablation.names_data(f"--data {rows} --eval-data {rows}")
    assert not ablation.names_data("--steps 3")
    arms = ablation.compared_arms(OWN_DATA)
    assert {arm.task for arm in arms} == {"data"} and len(set(arms)) == len(arms) == 11
    training = parse(Training, "", f"{ablation.TRAIN} {arms[0].flags} {named}".split())
    check(training, 1, False)
    assert training.data == [str(rows)] and not training.eval_filler
    made = [
        record(arm, rate, seed, 0.5)
        for arm in ablation.swept(OWN_DATA)
        for rate in LEARNING_RATES
        for seed in SWEEP_SEEDS
    ]
    made += [record(arm, 1e-4, seed, 0.6) for arm in arms for seed in (0, 1)]
    ablation.report(made, OWN_DATA, tmp_path)
    assert "## data, grpo" in (tmp_path / "report.md").read_text()
    assert "## data, grpo" in (tmp_path / "report.html").read_text()
    assert all(not ablation.wrong_in(json.loads(json.dumps(each))) for each in made)
