"""Does it still learn with less memory? Full training, LongAct, LoRA and 8-bit moments, paired by seed.

    python -m studies.methods sweep          # learning rates of each method, on seeds of their own
    python -m studies.methods compare        # each method at the rate that won
    python -m studies.methods report         # the table again, from finished runs

Runs are studies.ablation's: its TRAIN and recall task, or with --train your own model, data and flags; how a
rate wins, what results.jsonl holds, that a run is not made twice and goes on after a kill, is told there.
8-bit moments run at the rate of the method that they are compared with. --out holds results.jsonl and
report.md.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from base import durable
from base.cli import BadInput, one_line_errors, option, parse
from evals import stats
from evals.results import read_lines
from studies import ablation
from studies.ablation import SWEEP_SEEDS, Arm

METHODS = {
    "dense": Arm("recall", "dapo", "all", 0.3),
    "LongAct": Arm("recall", "dapo", "top", 0.3),
    "LoRA": Arm("recall", "dapo", "all", 0.3, "--lora 16"),
    "LoRA, LongAct": Arm("recall", "dapo", "top", 0.3, "--lora 16"),
    "LongAct, 8 bits": Arm("recall", "dapo", "top", 0.3, "--optimizer adamw8bit"),
}
LORA_RATES = (1e-3, 3e-3, 1e-2)  # ten times ablation's, see run/defaults.py
RATE_OF = {"LongAct, 8 bits": "LongAct"}  # the others have a sweep of their own
PAIRS = [("LongAct", "dense"), ("LoRA", "dense"), ("LoRA, LongAct", "dense"), ("LoRA, LongAct", "LoRA")]
PAIRS += [("LongAct, 8 bits", "LongAct")]


@dataclass
class Config(ablation.Config):
    out: str = option("runs/methods", "directory of results.jsonl and report.md")


def rates(method):
    """Learning rates to sweep."""
    return LORA_RATES if "--lora" in METHODS[method].more else ablation.LEARNING_RATES


def to_sweep(arms):
    """{method: its Arm} -> [(arm, rate, seed), ...]."""
    methods = [method for method in arms if method not in RATE_OF]
    return [(arms[m], rate, seed) for seed in SWEEP_SEEDS for m in methods for rate in rates(m)]


def winners(records, arms, out):
    """The sweep's records -> {method: the rate whose reward at the end of the sweep is highest}. Raises
    BadInput if runs of the sweep are missing."""
    wanted, rewards = to_sweep(arms), defaultdict(dict)
    by_run = {ablation.key(record): record["rewards"] for record in records}
    missing = [each for each in wanted if each not in by_run]
    if missing:
        fix = "python -m studies.methods sweep first"
        raise BadInput(f"{out}/results.jsonl lacks {len(missing)} runs of the sweep: {fix}")
    for arm, rate, seed in wanted:
        last = by_run[arm, rate, seed]
        rewards[arm].setdefault(rate, []).append(np.mean(last[-max(1, len(last) // 4) :]))
    won = {arm: max(of, key=lambda rate: np.mean(of[rate])) for arm, of in rewards.items()}
    return {method: won[arms[RATE_OF.get(method, method)]] for method in arms}


def report(records, arms, won):
    """The text of report.md: means of each method, and paired differences."""
    runs = {
        method: {
            seed: record
            for record in records
            for arm, rate, seed in [ablation.key(record)]
            if (arm, rate) == (arms[method], won[method]) and seed not in SWEEP_SEEDS
        }
        for method in arms
    }
    runs = {method: by_seed for method, by_seed in runs.items() if by_seed}
    if not runs:
        raise BadInput("no run to compare yet: python -m studies.methods compare")
    [first, *_] = [record for by_seed in runs.values() for record in by_seed.values()]
    means = [["method", "rate", "seeds", *ablation.outcomes(first), "moved", "others moved", "seconds"]]
    for method, by_seed in runs.items():
        row = [method, f"{won[method]:g}", str(len(by_seed))]
        for column in ablation.outcomes(first):
            values = [ablation.outcomes(record)[column] for record in by_seed.values()]
            row.append("{:.1f} ±{:.1f}".format(*ablation.interval(values)))
        for name in ("moved_selected", "moved_unselected"):
            moved = [record[name] for record in by_seed.values()]
            row.append("-" if None in moved else f"{np.mean(moved):.1e}")
        means.append([*row, f"{np.mean([record['seconds'] for record in by_seed.values()]):.0f}"])
    pairs = [["difference", "seeds", "accuracy", "p", "reward area", "p"]]
    for one, other in PAIRS:
        if one in runs and other in runs:
            pairs.append([f"{one} - {other}", *ablation.differences(runs[other], runs[one])])
    head = ablation.HEAD.partition("\n")[2].strip()
    title = "# Methods: full training, LongAct, LoRA, 8-bit moments"
    return f"{title}\n\n{head}\n\n```\n{stats.table(means)}\n\n{stats.table(pairs)}\n```\n"


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    if config.what not in ("sweep", "compare", "report"):
        raise BadInput(f"{config.what!r} is none of sweep, compare, report")
    out, task = Path(config.out), "data" if ablation.names_data(config.train) else "recall"
    arms = {method: arm._replace(task=task) for method, arm in METHODS.items()}
    lock = durable.claim(out, "comparison of methods", ["results.jsonl"])
    path = out / "results.jsonl"
    records = read_lines(path, ablation.wrong_in) if path.exists() else []
    if config.what == "sweep":
        wanted = to_sweep(arms)
    else:
        won = winners(records, arms, out)
        wanted = [(arm, won[method], seed) for seed in range(config.seeds) for method, arm in arms.items()]
    if config.what != "report":
        ablation.check_own(config, records, path)
        durable.write(path, "".join(json.dumps(record) + "\n" for record in records))
        ablation.run_all(config, out, wanted, {ablation.key(record) for record in records})
    if config.what != "sweep":
        text = report(read_lines(path, ablation.wrong_in), arms, won)
        durable.write(out / "report.md", text)
        print(text)
