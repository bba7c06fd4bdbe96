"""studies/paired.py: what is not run again, and the numbers that runs are judged by."""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT

from base.cli import BadInput
from studies import paired
from studies.paired import Arm

ARM = Arm("recall", "dapo", "top", 0.3)


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
    return {**arm._asdict(), **made, "held_out": sets, **moved, "seconds": 7.0}


def test_interval_is_students():
    mean, half = paired.interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(
        3.1824 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=0.01
    )  # t(0.975, 3)


def test_a_run_is_judged_by_these_numbers():
    made = paired.outcomes(record(ARM, 1e-3, 0, 0.75, accuracy=0.6))
    assert made["acc. at 335"] == 60 and made["acc. at 470"] == 30 and made["accuracy"] == pytest.approx(45)
    assert made["reward area"] == pytest.approx(100 * (0.75 - 0.01 * 7.5))
    assert made["steps to 0.7"] == 11  # 0.75 - 0.05, less rounding
    assert paired.outcomes(record(ARM, 1e-3, 0, 0.5))["steps to 0.7"] == 17


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    """Its directory is read; were train.py started, it would refuse 8 prompts in 3 updates. A run of other
    flags or another model has another directory."""
    model = shutil.copytree(ROOT / "assets" / "tiny", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    train = f"--updates 3 --model {model}"
    own = paired.identity(paired.flags_of(train, ARM, 1e-3, 5))
    directory = tmp_path / "runs/ablation-runs" / f"recall-dapo-top-0.3-0.001-5-{own}"
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
    made = paired.run(train, 1, 1, ARM, 1e-3, 5)
    assert not (directory / "checkpoints").exists()
    assert made["rewards"] == [0.5, 0.5] and made["prompts_drawn"] == 16 and made["tokens_trained"] == 200
    assert made["seconds"] == 4 and made["moved_unselected"] is None and paired.key(made) == (ARM, 1e-3, 5)
    paired.check_own(train, [made], "results.jsonl")
    paired.check_own(f"{train} --keep 2", [made], "")  # the default
    for record, now in ({**made, "identity": None}, train), (made, f"{train} --steps 9"):
        with pytest.raises(BadInput, match="has a run of other flags, model or data .*choose another --out"):
            paired.check_own(now, [record], "results.jsonl")
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    paired.contents.cache_clear()  # of this process, which is another then
    monkeypatch.setattr(paired.interrupt, "run", lambda command, **how: pytest.fail(command[-3]))
    with pytest.raises(pytest.fail.Exception, match=f"ablation-runs/recall-dapo-top-0.3-0.001-5-(?!{own})"):
        paired.run(train, 1, 1, ARM, 1e-3, 5)
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput, match="--prompts 8 cannot be shared: 3 updates"):
        paired.run(train, 1, 1, ARM, 1e-3, 5)


def test_what_the_pairs_would_have_shown_is_a_t_tests():
    """Differences of 1, 2, 3 points, times 0.75 by `record`: the standard error is 0.75 / sqrt(3), the
    quantiles of Student's t with 2 degrees of freedom are 4.303 and 1.061."""
    one = {seed: record(ARM, 3e-4, seed, 0.5, accuracy=0.5 + seed / 100) for seed in (1, 2, 3)}
    other = {seed: record(ARM, 3e-4, seed, 0.5, accuracy=0.5) for seed in (1, 2, 3, 4)}
    assert paired.gained(one, other) == pytest.approx([0.75, 1.5, 2.25])
    assert float(paired.seen_from(one, other)) == pytest.approx(0.75 * (4.303 + 1.061) / 3**0.5, abs=0.06)
    assert paired.seen_from({1: one[1]}, other) == "-"
    assert paired.difference(one, other)[:3] == ["3", "+1.50 ±1.86", "0.250"]
    assert paired.difference({1: one[1]}, other) == ["1", "-", "-", "-", "-", "-"]


def test_own_data_are_named_by_a_flag_or_by_a_file(tmp_path):
    """Held-out data must be named as well."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "p", "answer": "a"}))
    (tmp_path / "c.toml").write_text(f'data = ["{rows}"]\neval_data = ["{rows}"]')
    assert paired.names_data(f"--config {tmp_path / 'c.toml'}")
    assert paired.names_data(f"--data {rows} --eval-data {rows}")
    assert not paired.names_data("--steps 3")
    assert not paired.wrong_in(json.loads(json.dumps(record(ARM, 1e-4, 0, 0.5))))
