"""Methods against each other, paired by seed: what needs less memory, and LongAct's rows in a real model.

    python -m studies.methods sweep --of memory     # learning rates of each method, on seeds of their own
    python -m studies.methods compare --of memory   # each method at the rate that won
    python -m studies.methods report --of memory    # the table again, from finished runs

--of memory: full training, LongAct, LoRA and 8-bit moments, on the tiny model's recall task, or with --train
on your own model, data and flags. --of real: all rows, the top, bottom and random 30%, of SmolLM2-135M as
`make real` left it after SFT, on the task that RL has there; some hours, which may be cut into pieces.

Runs are studies.ablation's: how a rate wins, what results.jsonl holds, that a run is not made twice and goes
on after a kill, is told there. --out holds results.jsonl, report.md and methods.png. "seen from": the
smallest true difference in accuracy that the pairs would have shown (p below 0.05) in four of five such
experiments.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base import durable, plot
from base.cli import BadInput, one_line_errors, option, parse
from evals import stats
from evals.results import read_lines
from studies import ablation
from studies.ablation import Arm


class Comparison(NamedTuple):
    """title: of the report; arms: {method: its Arm}; rates: {method: learning rates to sweep}; rate_of: whose
    rate a method without a sweep takes; pairs: (one, other) whose difference is reported; seeds: of the
    sweep; train: flags for train.py."""

    title: str
    arms: dict
    rates: dict
    rate_of: dict
    pairs: list
    seeds: tuple
    train: str


def tiny(rule, more=""):
    return Arm("recall", "dapo", rule, 0.3, more)


LORA_RATES = (1e-3, 3e-3, 1e-2)  # ten times ablation's, see run/defaults.py
MEMORY = Comparison(
    title="full training, LongAct, LoRA, 8-bit moments",
    arms={
        "dense": tiny("all"),
        "LongAct": tiny("top"),
        "LoRA": tiny("all", "--lora 16"),
        "LoRA, LongAct": tiny("top", "--lora 16"),
        "LongAct, 8 bits": tiny("top", "--optimizer adamw8bit"),
    },
    rates={
        "dense": ablation.LEARNING_RATES,
        "LongAct": ablation.LEARNING_RATES,
        "LoRA": LORA_RATES,
        "LoRA, LongAct": LORA_RATES,
    },
    rate_of={"LongAct, 8 bits": "LongAct"},
    pairs=[
        *[(method, "dense") for method in ("LongAct", "LoRA", "LoRA, LongAct")],
        ("LoRA, LongAct", "LoRA"),
        ("LongAct, 8 bits", "LongAct"),
    ],
    seeds=ablation.SWEEP_SEEDS,
    train="",
)
ROWS = {"all rows": "all", "top 30%": "top", "bottom 30%": "bottom", "random 30%": "random"}
REAL = Comparison(
    title="which rows are updated, SmolLM2-135M",
    arms={name: Arm("tracking", "dapo", rule, 0.3) for name, rule in ROWS.items()},
    rates=dict.fromkeys(("all rows", "top 30%"), (2e-5, 4e-5)),
    rate_of={"bottom 30%": "top 30%", "random 30%": "top 30%"},
    pairs=[("top 30%", other) for other in ("all rows", "bottom 30%", "random 30%")],
    seeds=ablation.SWEEP_SEEDS[:1],
    train="--model runs/real/sft/checkpoint --facts 20 --filler 10 --eval-filler 10 --eval-prompts 48 "
    "--eval-completions 2 --steps 6 --prompts 4 --completions 8 --updates 1 --warmup 0 --no-checkpointing",
)
COLOURS = (plot.GREY, plot.BLUE, plot.VERMILLION, plot.GREEN, plot.PURPLE)  # of the methods, in their order
COMPARISONS = {"memory": MEMORY, "real": REAL}


@dataclass
class Config(ablation.Config):
    of: str = option("memory", "which comparison, see above", list(COMPARISONS))
    out: str = option("", "directory of results.jsonl and report.md (default: runs/methods-OF)")


def to_sweep(comparison):
    """-> [(arm, rate, seed), ...]."""
    swept = [(method, rate) for method, rates in comparison.rates.items() for rate in rates]
    return [(comparison.arms[method], rate, seed) for seed in comparison.seeds for method, rate in swept]


def winners(records, comparison, out):
    """The sweep's records -> won, by_rate: {method: the rate whose reward at the end of the sweep is
    highest}, {method with a sweep: {rate: that reward}}. Raises BadInput if runs of the sweep are missing."""
    by_run = {ablation.key(record): record["rewards"] for record in records}
    if missing := [each for each in to_sweep(comparison) if each not in by_run]:
        fix = "python -m studies.methods sweep first, with the same --of"
        raise BadInput(f"{out}/results.jsonl lacks {len(missing)} runs of the sweep: {fix}")
    arms, rate_of = comparison.arms, comparison.rate_of

    def at_the_end(method, rate):  # mean over the last quarter of the steps, and over seeds
        runs = [by_run[arms[method], rate, seed] for seed in comparison.seeds]
        return float(np.mean([rewards[-max(1, len(rewards) // 4) :] for rewards in runs]))

    by_rate = {
        method: {rate: at_the_end(method, rate) for rate in rates}
        for method, rates in comparison.rates.items()
    }
    won = {method: max(of := by_rate[rate_of.get(method, method)], key=of.get) for method in arms}
    return won, by_rate


def gained(one, other):
    """Two rows, each {seed: record} -> one minus other, points of accuracy, of each seed that both have."""
    both = [seed for seed in one if seed in other]
    a, b = [[ablation.outcomes(each[seed])["accuracy"] for seed in both] for each in (one, other)]
    return np.subtract(a, b)


def seen_from(one, other):
    """Two rows, each {seed: record} -> the smallest true difference in accuracy, in points, that a paired t
    test finds (p below 0.05) in 80 of 100 such experiments; text."""
    apart = gained(one, other)
    if len(apart) < 2:
        return "-"
    error = apart.std(ddof=1) / np.sqrt(len(apart))
    return f"{(ablation.t_quantile(len(apart)) + ablation.t_quantile(len(apart), 0.8)) * error:.1f}"


def compared(records, comparison, won):
    """The records -> {method: {seed: its record at the rate that won}}. Raises BadInput if there are none."""
    arms = comparison.arms
    runs = {
        method: {
            seed: record
            for record in records
            for arm, rate, seed in [ablation.key(record)]
            if (arm, rate) == (arms[method], won[method]) and seed not in comparison.seeds
        }
        for method in arms
    }
    runs = {method: by_seed for method, by_seed in runs.items() if by_seed}
    if not runs:
        raise BadInput("no run to compare yet: python -m studies.methods compare, with the same --of")
    return runs


def report(runs, comparison, won, by_rate):
    """The text of report.md: means of each method, paired differences, and the sweep."""
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
    pairs = [["difference", "seeds", "accuracy", "p", "reward area", "p", "accuracy seen from"]]
    for one, other in comparison.pairs:
        if one in runs and other in runs:
            difference = ablation.differences(runs[other], runs[one])
            pairs.append([f"{one} - {other}", *difference, seen_from(runs[one], runs[other])])
    head = ablation.HEAD.partition("\n")[2].strip()
    swept = []
    for method, of in by_rate.items():
        shown = ", ".join(f"{rate:g} {reward:.3f}" for rate, reward in of.items())
        swept.append(f"- {method}: {shown} -> {won[method]:g}")
    tables = f"{stats.table(means)}\n\n{stats.table(pairs)}"
    sweep = "Learning rates, by reward of the sweep's last quarter:\n\n" + "\n".join(swept)
    return f"# Methods: {comparison.title}\n\n{head}\n\n```\n{tables}\n```\n\n{sweep}\n"


def figure(path, runs, comparison):
    """methods.png: the training reward of each method over the steps, and the paired differences."""
    colours = dict(zip(comparison.arms, COLOURS))
    curves = {
        method: (colours[method], [record["rewards"] for record in by_seed.values()])
        for method, by_seed in runs.items()
    }
    rows = []
    for one, other in comparison.pairs:
        apart = gained(runs.get(one, {}), runs.get(other, {}))
        if len(apart) > 1:
            rows.append((f"{one} - {other}", colours[other], *ablation.interval(apart), len(apart)))
    plot.reward_bands(path, {comparison.title: curves}, rows)


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    if config.what not in ("sweep", "compare", "report"):
        raise BadInput(f"{config.what!r} is none of sweep, compare, report")
    comparison, out = COMPARISONS[config.of], Path(config.out or f"runs/methods-{config.of}")
    if ablation.names_data(config.train):
        own = {method: arm._replace(task="data") for method, arm in comparison.arms.items()}
        comparison = comparison._replace(arms=own)
    config.train = f"{comparison.train} {config.train}".strip()
    lock = durable.claim(out, "comparison of methods", ["results.jsonl"])
    path = out / "results.jsonl"
    records = read_lines(path, ablation.wrong_in) if path.exists() else []
    if config.what == "sweep":
        wanted = to_sweep(comparison)
    else:
        (won, by_rate), arms = winners(records, comparison, out), comparison.arms
        wanted = [(arm, won[method], seed) for seed in range(config.seeds) for method, arm in arms.items()]
    if config.what != "report":
        ablation.check_own(config, records, path)
        durable.write(path, "".join(json.dumps(record) + "\n" for record in records))
        ablation.run_all(config, out, wanted, {ablation.key(record) for record in records})
    if config.what != "sweep":
        runs = compared(read_lines(path, ablation.wrong_in), comparison, won)
        text = report(runs, comparison, won, by_rate)
        durable.write(out / "report.md", text)
        figure(out / "methods.png", runs, comparison)
        print(text)
