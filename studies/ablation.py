"""Do rows of high magnitude matter, and what does training with less memory cost? Methods compared by runs of
train.py that are paired by seed (studies/paired.py).

    python -m studies.ablation sweep --of recall       # learning rates, on seeds of their own
    python -m studies.ablation compare --of recall     # each method at the rate that won; then the report
    python -m studies.ablation report --of recall      # the report again, from finished runs

--of    recall      all rows, the top, bottom and random 30%: DAPO, the tiny model's recall task
        grpo        the same by GRPO, tracking: the same by DAPO on the tracking task
        fractions   the top 10, 20, 30 and 40% on recall
        qk          the rules of recall where W_Q and W_K alone are trained, by LoRA
        memory      full training, LongAct, LoRA and 8-bit moments on recall
        real        the rules of recall in SmolLM2-135M as `make real` left it after SFT, on the task that RL
                    has there; some hours, which may be cut into pieces

On your own data, which --train may also name by a --config; then compare with the same flags:

    python -m studies.ablation sweep --of recall --ranks 8 --jobs 1 --out runs/ablation-8b \\
        --train "--model Qwen3-8B --data train.jsonl --eval-data held-out.jsonl"

A learning rate wins by the mean reward of the last quarter of the sweep's steps, on prompts that the model
meets for the first time; held-out prompts are not used, nor are the sweep's seeds used again. bottom, random
and other fractions run at top's rate. All rows run at the rate of their own sweep, and at top's: the first
compares each method at its best, the second differs only in the rows.

--out holds results.jsonl (keys: studies/paired.py), report.md, report.html and ablation.png. At a signal runs
save and end; the same command goes on with them.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base import durable, page, plot
from base.cli import BadInput, one_line_errors, option, parse
from evals import stats
from studies import paired
from studies.paired import Arm


class Comparison(NamedTuple):
    """title: of the report; arms: {method: its Arm}; rates: {method: learning rates to sweep}; rate_of: whose
    rate a method without a sweep takes; pairs: (one, other) whose difference is reported; seeds: of the
    sweep; train: flags for train.py."""

    title: str
    arms: dict
    rates: dict
    rate_of: dict
    pairs: list
    seeds: tuple = (1000, 1001)
    train: str = ""


RATES = (1e-4, 3e-4, 1e-3)
LORA_RATES = (1e-3, 3e-3, 1e-2)  # ten times those, see run/defaults.py
ALL, TOP, BOTTOM, RANDOM = "all rows", "top 30%", "bottom 30%", "random 30%"
SAME_RATE = "all rows, top's rate"
RULES = {ALL: "all", TOP: "top", BOTTOM: "bottom", RANDOM: "random", SAME_RATE: "all"}


def of_rules(title, task, algorithm, rates=RATES, **more):
    """Every rule at 30%."""
    return Comparison(
        title=title,
        arms={method: Arm(task, algorithm, rule, 0.3) for method, rule in RULES.items()},
        rates={ALL: rates, TOP: rates},
        rate_of=dict.fromkeys((BOTTOM, RANDOM, SAME_RATE), TOP),
        pairs=[
            *[(TOP, other) for other in (SAME_RATE, ALL, BOTTOM, RANDOM)],
            *[(other, SAME_RATE) for other in (BOTTOM, RANDOM)],
        ],
        **more,
    )


def tiny(rule, fraction=0.3, more=""):
    return Arm("recall", "dapo", rule, fraction, more)


OTHERS = {f"top {fraction:.0%}": tiny("top", fraction) for fraction in (0.1, 0.2, 0.4)}
MEMORY = {
    "dense": tiny("all"),
    "LongAct": tiny("top"),
    "LoRA": tiny("all", more="--lora 16"),
    "LoRA, LongAct": tiny("top", more="--lora 16"),
    "LongAct, 8 bits": tiny("top", more="--optimizer adamw8bit"),
}
COMPARISONS = {
    "recall": of_rules("which rows are updated, recall by DAPO", "recall", "dapo"),
    "grpo": of_rules("which rows are updated, recall by GRPO", "recall", "grpo"),
    "tracking": of_rules("which rows are updated, tracking by DAPO", "tracking", "dapo"),
    "fractions": Comparison(
        title="how many rows are updated, recall by DAPO",
        arms={ALL: tiny("all"), TOP: tiny("top"), **OTHERS, SAME_RATE: tiny("all")},
        rates={ALL: RATES, TOP: RATES},
        rate_of=dict.fromkeys((*OTHERS, SAME_RATE), TOP),
        pairs=[(method, SAME_RATE) for method in (TOP, *OTHERS)],
    ),
    "qk": of_rules(
        "which rows are updated, W_Q and W_K alone by LoRA, recall by DAPO",
        "recall",
        "dapo",
        rates=LORA_RATES,
        train="--lora 16 --lora-targets q_proj k_proj",
    ),
    "memory": Comparison(
        title="full training, LongAct, LoRA, 8-bit moments",
        arms=MEMORY,
        rates={"dense": RATES, "LongAct": RATES, "LoRA": LORA_RATES, "LoRA, LongAct": LORA_RATES},
        rate_of={"LongAct, 8 bits": "LongAct"},
        pairs=[
            *[(method, "dense") for method in ("LongAct", "LoRA", "LoRA, LongAct")],
            ("LoRA, LongAct", "LoRA"),
            ("LongAct, 8 bits", "LongAct"),
        ],
    ),
    "real": of_rules(
        "which rows are updated, SmolLM2-135M",
        "tracking",
        "dapo",
        rates=(2e-5, 4e-5),
        seeds=(1000,),
        train="--model runs/real/sft/checkpoint --facts 20 --filler 10 --eval-filler 10 --eval-prompts 48 "
        "--eval-completions 2 --steps 6 --prompts 4 --completions 8 --updates 1 --warmup 0 "
        "--no-checkpointing",
    ),
}
COLOURS = (plot.GREY, plot.BLUE, plot.VERMILLION, plot.GREEN, plot.PURPLE, plot.ORANGE)  # in their order


@dataclass
class Config:
    what: str = option("report", "sweep, compare or report", positional=True)
    of: str = option("recall", "which comparison, see above", list(COMPARISONS))
    seeds: int = option(8, "compare: seeds 0, 1, ... of each method", least=1, most=1000)
    train: str = option("", "flags for train.py, which override ours; keys of a --config in them do not")
    ranks: int = option(1, "processes of a run, by torchrun", least=1, most=10**4)
    jobs: int = option(2, "runs at the same time, which share the cores", least=1, most=1000)
    out: str = option("", "directory of results.jsonl and the report (default: runs/ablation-OF)")


# ------------------------------------------------------------------------------------------------- which runs


def to_sweep(comparison):
    """-> [(arm, rate, seed), ...]."""
    swept = [(method, rate) for method, rates in comparison.rates.items() for rate in rates]
    return [(comparison.arms[method], rate, seed) for seed in comparison.seeds for method, rate in swept]


def winners(records, comparison, path):
    """The records of the file `path` -> won, by_rate: {method: the rate whose reward at the end of the sweep
    is highest}, {method with a sweep: {rate: that reward}}. Raises BadInput if runs of the sweep are
    missing."""
    by_run = {paired.key(record): record["rewards"] for record in records}
    if missing := [each for each in to_sweep(comparison) if each not in by_run]:
        fix = "python -m studies.ablation sweep first, with the same --of"
        raise BadInput(f"{path} lacks {len(missing)} runs of the sweep: {fix}")
    arms, rate_of = comparison.arms, comparison.rate_of

    def at_the_end(method, rate):  # mean over the last quarter of the steps, and over seeds
        runs = [by_run[arms[method], rate, seed] for seed in comparison.seeds]
        return float(np.mean([np.mean(rewards[-max(1, len(rewards) // 4) :]) for rewards in runs]))

    by_rate = {
        method: {rate: at_the_end(method, rate) for rate in rates}
        for method, rates in comparison.rates.items()
    }
    won = {method: max(of := by_rate[rate_of.get(method, method)], key=of.get) for method in arms}
    return won, by_rate


def merged(comparison, won):
    """-> the comparison; if all rows won with top's rate, without all rows at top's rate, as they are one."""
    if won.get(SAME_RATE) != won.get(ALL):
        return comparison
    arms = {method: arm for method, arm in comparison.arms.items() if method != SAME_RATE}
    pairs = [(one, ALL if other == SAME_RATE else other) for one, other in comparison.pairs]
    return comparison._replace(arms=arms, pairs=list(dict.fromkeys(pairs)))


def compared(records, comparison, won, path):
    """The records of the file `path` -> {method: {seed: its record at the rate that won}}. Raises BadInput if
    there are none, and for runs that cannot be compared."""
    runs = {method: {} for method in comparison.arms}
    shapes = set()
    for record in records:
        arm, rate, seed = paired.key(record)
        for method in runs:
            if (arm, rate) == (comparison.arms[method], won[method]) and seed not in comparison.seeds:
                runs[method][seed] = record
                shapes.add((len(record["rewards"]), *paired.outcomes(record)))
    if not shapes:
        fix = "python -m studies.ablation compare, with the same --of"
        raise BadInput(f"{path} has no run to compare: {fix}")
    if len(shapes) > 1:
        problem = f"{path} has runs that cannot be compared: their steps or held-out prompts differ"
        raise BadInput(f"{problem}; remove those of another --train")
    return {method: by_seed for method, by_seed in runs.items() if by_seed}


# ----------------------------------------------------------------------------------------------------- report

HEAD = f"""Means over seeds ± half a 95% interval (Student's t). acc. at N: accuracy on held-out prompts of N
tokens at temperature 1, per cent; accuracy: mean over those lengths. reward area: mean training reward over
the steps, per cent. steps to {paired.TARGET:g}: the first whose training reward reaches it (the number of
steps plus one if none does). moved: root mean square change of a weight in an update, in selected rows and in
others. seconds: wall time of all steps, beside whatever else ran. Differences pair runs of the same seed; p:
sign flips. seen from: the smallest true difference in accuracy for which a paired t test, not the sign flips,
would have a p below 0.05 in four of five such experiments, were the spread what it is in these pairs.
"""


def report(runs, comparison, won, by_rate):
    """The text of report.md: means of each method, paired differences, and the sweep."""
    [first, *_] = [record for by_seed in runs.values() for record in by_seed.values()]
    means = [["method", "rate", "seeds", *paired.outcomes(first), "moved", "others moved", "seconds"]]
    for method, by_seed in runs.items():
        row = [method, f"{won[method]:g}", str(len(by_seed))]
        for column in paired.outcomes(first):
            values = [paired.outcomes(record)[column] for record in by_seed.values()]
            row.append("{:.1f} ±{:.1f}".format(*paired.interval(values)))
        for name in ("moved_selected", "moved_unselected"):
            moved = [record[name] for record in by_seed.values()]
            row.append("-" if None in moved else f"{np.mean(moved):.1e}")
        means.append([*row, f"{np.mean([record['seconds'] for record in by_seed.values()]):.0f}"])
    pairs = [["difference", "seeds", "accuracy", "p", "reward area", "p", "accuracy seen from"]]
    for one, other in comparison.pairs:
        if one in runs and other in runs:
            pairs.append([f"{one} - {other}", *paired.difference(runs[one], runs[other])])
    swept = []
    for method, of in by_rate.items():
        shown = ", ".join(f"{rate:g} {reward:.3f}" for rate, reward in of.items())
        swept.append(f"- {method}: {shown} -> {won[method]:g}")
    tables = f"{stats.table(means)}\n\n{stats.table(pairs)}"
    sweep = "Learning rates, by reward of the sweep's last quarter:\n\n" + "\n".join(swept)
    return f"# Ablation: {comparison.title}\n\n{HEAD}\n```\n{tables}\n```\n\n{sweep}\n"


def figure(path, runs, comparison):
    """The training reward of each method over the steps, and the paired differences -> the PNG `path`."""
    colours = dict(zip(comparison.arms, COLOURS))
    curves = {
        method: (colours[method], [record["rewards"] for record in by_seed.values()])
        for method, by_seed in runs.items()
    }
    rows = []
    for one, other in comparison.pairs:
        apart = paired.gained(runs.get(one, {}), runs.get(other, {}))
        if len(apart) > 1:
            rows.append((f"{one} - {other}", colours[one], *paired.interval(apart), len(apart)))
    plot.reward_bands(path, {comparison.title: curves}, rows)


# ------------------------------------------------------------------------------------------------------- main


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    if config.what not in ("sweep", "compare", "report"):
        raise BadInput(f"{config.what!r} is none of sweep, compare, report")
    comparison, out = COMPARISONS[config.of], Path(config.out or f"runs/ablation-{config.of}")
    path = out / "results.jsonl"
    records = paired.read(path)
    if paired.names_data(config.train) or any(record["task"] == "data" for record in records):
        own = {method: arm._replace(task="data") for method, arm in comparison.arms.items()}
        comparison = comparison._replace(arms=own, train="")
    flags = f"{comparison.train} {config.train}".strip()
    if config.what != "report":
        paired.check_own(flags, records, path)
    if config.what == "sweep":
        wanted = to_sweep(comparison)
    else:
        won, by_rate = winners(records, comparison, path)
        comparison = merged(comparison, won)
        seeds, arms = range(config.seeds), comparison.arms
        wanted = [(arm, won[method], seed) for seed in seeds for method, arm in arms.items()]

    lock = durable.claim(out, "ablation", ["results.jsonl"])
    if config.what != "report":
        paired.run_all(flags, config.ranks, config.jobs, wanted, path)
    if config.what != "sweep":
        runs = compared(paired.read(path), comparison, won, path)
        text = report(runs, comparison, won, by_rate)
        durable.write(out / "report.md", text)
        figure(out / "ablation.png", runs, comparison)
        picture = page.image(out / "ablation.png", "rewards over the steps, and paired differences")
        page.write(out / "report.html", "Ablation", picture, page.pre(text))
        print(f"{text}\n{out}/report.md  {out}/report.html  {out}/ablation.png")
