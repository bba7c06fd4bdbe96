"""Do high-magnitude rows matter? Runs of train.py that differ in one thing, from the same checkpoint, paired
by seed.

    python -m studies.ablation sweep         # learning rates for dense training and for LongAct alike, on seeds of their own
    python -m studies.ablation compare       # rules and fractions, each at the learning rate that won, over --seeds seeds
    python -m studies.ablation report        # the table and the figure again, from what was run
    python -m studies.ablation sweep --train "--model Qwen3-8B --data train.jsonl --eval-data held-out.jsonl"
    --ranks 8 --jobs 1 \\
        --out runs/ablation-8b      # on your own data, which --train may also name by a --config; then compare, likewise

What is run is at the top of the file: TRAIN, the arms, and one task "data" in place of ours where --train
names your own. A seed fixes the prompts, their order, and the random numbers of sampling; arms of one seed
differ in nothing but their flags. GRPO trains on every prompt it draws, so its arms see equal prompts; DAPO
draws until enough groups differ, so its arms see prompts of the same sequence, more or fewer of them. Each
rollout feeds two updates: with one, all ratios are 1 and clipping does nothing (rl.md A.1). A learning rate
wins by the mean reward of the last quarter of the sweep's steps, on prompts that it meets for the first time;
held-out prompts do not take part. bottom and random run at top's rate, and so does dense training a second
time where its own is another: that comparison differs in nothing but the rows, the other is of each at its
best.

A run that is in results.jsonl is not run again; one that was interrupted starts anew. --out holds
    results.jsonl   a run a line: task, algorithm, rule, fraction, learning_rate, seed; flags; rewards (mean reward of all
                    sampled completions in each step), held_out (train.py's results.json, after),
                    prompts_drawn, tokens_trained, moved_selected and moved_unselected (means over the steps),
                    seconds
    report.md       the tables; ablation.png the reward curves and their bands
Runs themselves are in runs/ablation/.
"""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from base import durable, plot
from base.cli import BadInput, brief, one_line_errors, option, parse
from evals import stats
from evals.results import lock_results, read_lines
from run.config import Config as Training

TRAIN = (
    "--steps 16 --prompts 8 --completions 16 --updates 2 --warmup 2 --epsilon-low 0.2 --epsilon-high 0.28 "
    "--eval-completions 8 --no-eval-before"
)
HELD_OUT = "--eval-filler 17 32 45 --eval-prompts 64"
TASKS = {
    "recall": f"--task recall --facts 17 --filler 17 {HELD_OUT}",
    "tracking": f"--task tracking --facts 16 --filler 16 {HELD_OUT}",
    "data": "",  # the user's own, which --train names
}
TARGET = 0.7  # reward whose first reaching is counted in steps


class Arm(NamedTuple):
    task: str
    algorithm: str
    rule: str
    fraction: float

    @property
    def flags(self):
        return (
            f"{TASKS[self.task]} --algorithm {self.algorithm} --rule {self.rule} --fraction {self.fraction}"
        )


FAMILIES = [("recall", "dapo"), ("recall", "grpo"), ("tracking", "dapo")]
OWN_DATA = [("data", "dapo"), ("data", "grpo")]
LEARNING_RATES, SWEEP_SEEDS = (1e-4, 3e-4, 1e-3), (1000, 1001)


def swept(families):
    return [Arm(*family, rule, 0.3) for family in families for rule in ("all", "top")]


def compared_arms(families):
    arms = [Arm(*family, rule, 0.3) for family in families for rule in ("all", "top", "bottom", "random")]
    return arms + [
        Arm(*families[0], "top", fraction) for fraction in (0.1, 0.2, 0.4)
    ]  # 1.0 is all, 0.3 is there


@dataclass
class Config:
    what: str = option("report", "sweep, compare or report", positional=True)
    seeds: int = option(8, "compare: seeds 0, 1, ... of each arm", least=1)
    train: str = option(
        "", "flags for train.py after those above, so that they win; keys of its --config do not"
    )
    ranks: int = option(1, "processes of a run, by torchrun", least=1)
    jobs: int = option(2, "runs at a time, which share the cores", least=1)
    out: str = option("runs/ablation", "directory of results.jsonl, report.md and the figure")


# ----------------------------------------------------------------------------------------------------------------- runs


def run(config, arm, learning_rate, seed):
    """One run of train.py -> its line of results.jsonl. Raises BadInput with its last words if it fails."""
    name = f"{arm.task}-{arm.algorithm}-{arm.rule}-{arm.fraction}-{learning_rate:g}-{seed}"
    directory = Path("runs/ablation") / name
    flags = f"{TRAIN} {arm.flags} --learning-rate {learning_rate} --seed {seed} {config.train}"
    if not (directory / "results.json").exists():
        shutil.rmtree(directory, ignore_errors=True)  # interrupted
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.ranks)]
        command = [sys.executable, *(start if config.ranks > 1 else []), "train.py", *shlex.split(flags)]
        threads = str(max(1, os.cpu_count() // (config.jobs * config.ranks)))
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        made = subprocess.run(
            [*command, "--name", f"ablation/{name}"],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if made.returncode:
            raise BadInput(f"{' '.join(command)} failed: {made.stderr.strip()[-300:]}")
    try:
        return line_of(arm, learning_rate, seed, flags, directory)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadInput(
            f"{directory} is not what a run of train.py leaves: {error!r}; remove it to have it run again"
        ) from error


def line_of(arm, learning_rate, seed, flags, directory):
    """The directory of a finished run -> its line of results.jsonl."""
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    mean = lambda key: float(np.mean([m[key] for m in steps])) if steps[0][key] is not None else None  # noqa: E731
    return {
        **arm._asdict(),
        "learning_rate": learning_rate,
        "seed": seed,
        "flags": flags,
        "rewards": [m["reward"] for m in steps],
        "held_out": json.loads((directory / "results.json").read_text())["after"],
        "prompts_drawn": steps[-1]["prompts_drawn"],
        "tokens_trained": sum(m["tokens_trained"] for m in steps),
        "moved_selected": mean("moved_selected"),
        "moved_unselected": mean("moved_unselected"),
        "seconds": round(sum(m["seconds"]["total"] for m in steps), 1),
    }


def is_number(value, most=1e9):
    return type(value) in (int, float) and abs(value) <= most


def wrong_in(record):
    """What keeps a line of results.jsonl from being a run; "" if nothing does."""
    if not isinstance(record, dict):
        return "no JSON object"
    rewards, held_out = record.get("rewards"), record.get("held_out")
    good = {
        **{name: isinstance(record.get(name), str) for name in ("task", "algorithm", "rule")},
        **{name: is_number(record.get(name)) for name in ("fraction", "learning_rate")},
        "seed": type(record.get("seed")) is int,
        "rewards": isinstance(rewards, list) and rewards and all(map(is_number, rewards)),
        "held_out": isinstance(held_out, dict)
        and held_out
        and all(
            isinstance(each, dict)
            and is_number(each.get("prompt_tokens"))
            and is_number(each.get("accuracy"), 1)
            for each in held_out.values()
        ),
        **{
            f"moved_{of}": (value := record.get(f"moved_{of}")) is None or is_number(value)
            for of in ("selected", "unselected")
        },
    }
    return next((f"{name} is {brief(record.get(name))}" for name, right in good.items() if not right), "")


def key(record):
    return Arm(*(record[field] for field in Arm._fields)), record["learning_rate"], record["seed"]


def run_all(config, out, wanted, done):
    """Every (arm, learning rate, seed) of `wanted` that is not in `done`; each is written when it ends."""
    todo = [each for each in wanted if each not in done]
    with (
        open(out / "results.jsonl", "ab", buffering=0) as file,
        ThreadPoolExecutor(config.jobs) as pool,
        tqdm(total=len(wanted), initial=len(wanted) - len(todo), desc=config.what, unit="run") as bar,
    ):
        try:
            for record in pool.map(lambda each: run(config, *each), todo):
                durable.append(file, record)
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def winners(records, families, out):
    """{(family, whether dense): learning rate} by reward at the end of the sweep, and the rewards."""
    rewards = defaultdict(list)
    for record in records:
        arm, learning_rate, seed = key(record)
        if arm in swept(families) and seed in SWEEP_SEEDS and learning_rate in LEARNING_RATES:
            last = record["rewards"][-max(1, len(record["rewards"]) // 4) :]
            rewards[(arm[:2], arm.rule == "all"), learning_rate].append(float(np.mean(last)))
    missing = len(swept(families)) * len(LEARNING_RATES) * len(SWEEP_SEEDS) - sum(map(len, rewards.values()))
    if missing:
        raise BadInput(
            f"{out}/results.jsonl lacks {missing} runs of the sweep: python -m studies.ablation sweep first"
        )
    table = defaultdict(dict)  # (family, dense) -> {learning rate: reward}
    for (who, learning_rate), values in rewards.items():
        table[who][learning_rate] = float(np.mean(values))
    return table, {who: max(by_rate, key=by_rate.get) for who, by_rate in table.items()}


# --------------------------------------------------------------------------------------------------------------- report

HEAD = f"""# Ablation: which rows of W_Q and W_K are updated

Means over seeds ± half a 95% interval (Student's t). acc. at N: accuracy on held-out prompts of N tokens at temperature
1, per cent; accuracy: mean over those lengths. reward area: mean training reward over the steps, per cent. steps to
{TARGET:g}: the first whose training reward reaches it (one more than there were if none does). moved: root mean square
change of a weight in an update, in selected rows and in others. Differences pair runs of the same seed; p: random sign
flips.
"""


def interval(values):
    """Mean of independent values and half the width of its 95% interval by Student's t, whose quantile is
    simulated."""
    values, n = np.asarray(values, dtype=float), len(values)
    if n < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(t_quantile(n) * values.std(ddof=1) / np.sqrt(n))


@functools.cache
def t_quantile(n):
    """Student's t for n values at 97.5%."""
    return np.quantile(np.random.default_rng(0).standard_t(n - 1, 1_000_000), 0.975)


def outcomes(record):
    """What a run is judged by -> {column: number}."""
    sets = record["held_out"].values()
    reached = [step for step, reward in enumerate(record["rewards"], 1) if reward >= TARGET]
    return {
        **{f"acc. at {each['prompt_tokens']:.0f}": 100 * each["accuracy"] for each in sets},
        "accuracy": 100 * float(np.mean([each["accuracy"] for each in sets])),
        "reward area": 100 * float(np.mean(record["rewards"])),
        f"steps to {TARGET:g}": reached[0] if reached else len(record["rewards"]) + 1,
    }


def label(arm, rate, own):
    """A row's name; dense training at a rate that is not its own says so."""
    if arm.rule != "all":
        return f"{arm.rule} {arm.fraction:.0%}"
    return "all" if rate == own else f"all, at {rate:g}"


def differences(baseline, by_seed):
    """Cells of by_seed minus baseline, {seed: record} both: seeds in both, then for accuracy and reward area
    the mean with its 95% interval and the p-value."""
    both = [seed for seed in by_seed if seed in baseline]
    cells = [str(len(both))]
    for column in ("accuracy", "reward area"):
        a, b = [[outcomes(source[seed])[column] for seed in both] for source in (baseline, by_seed)]
        mean, half = interval(np.subtract(b, a)) if both else (float("nan"), float("nan"))
        cells += (
            [f"{mean:+.2f} ±{half:.2f}", f"{stats.paired(a, b)['p']:.3f}"] if len(both) > 1 else ["-", "-"]
        )
    return cells


def tables(runs, rates, winning):
    """runs: {(arm, learning rate): {seed: record}} -> lines of report.md."""
    yield HEAD
    for family in dict.fromkeys(family for family, _ in winning):
        own = {who: by_seed for who, by_seed in runs.items() if who[0][:2] == family}
        if not own:
            continue
        columns = list(outcomes(next(iter(next(iter(own.values())).values()))))
        rows = [["rows updated", "rate", "seeds", *columns, "moved", "others moved"]]
        pairs = [["difference", "seeds", "accuracy", "p", "reward area", "p"]]
        dense = [who for who in own if who[0].rule == "all"]
        others = [who for who in own if who[0].rule in ("bottom", "random")]
        for (arm, rate), by_seed in own.items():
            name = label(arm, rate, winning[family, True])
            cells = [interval([outcomes(r)[column] for r in by_seed.values()]) for column in columns]
            moved = [[r[key] for r in by_seed.values()] for key in ("moved_selected", "moved_unselected")]
            moved = ["-" if None in values else f"{np.mean(values):.1e}" for values in moved]
            shown = [f"{mean:.1f} ±{half:.1f}" for mean, half in cells]
            rows.append([name.partition(",")[0], f"{rate:g}", str(len(by_seed)), *shown, *moved])
            for baseline in ([] if arm.rule == "all" else dense) + (
                others if (arm.rule, arm.fraction) == ("top", 0.3) else []
            ):
                against = label(*baseline, winning[family, True])
                pairs.append([f"{name} - {against}", *differences(own[baseline], by_seed)])
        yield f"## {family[0]}, {family[1]}\n"
        yield f"```\n{stats.table(rows)}\n\n{stats.table(pairs)}\n```\n"
        yield "Learning rates, by reward of the sweep's last quarter: " + "; ".join(
            f"{'all' if whether else 'top'}: "
            + ", ".join(f"{rate:g} {reward:.3f}" for rate, reward in sorted(rates[family, whether].items()))
            + f" -> {winning[family, whether]:g}"
            for whether in (True, False)
        )
        yield ""


def compared(winning):
    """(arm, learning rate) of every run that `compare` makes for each seed, dense training also at top's
    rate."""
    rates = lambda arm: {
        winning[arm[:2], dense] for dense in ((True, False) if arm.rule == "all" else (False,))
    }  # noqa: E731
    families = list(dict.fromkeys(family for family, _ in winning))
    return [(arm, rate) for arm in compared_arms(families) for rate in sorted(rates(arm))]


def report(records, families, out):
    rates, winning = winners(records, families, out)
    wanted, runs = compared(winning), defaultdict(dict)
    for record in records:
        arm, rate, seed = key(record)
        if (arm, rate) in wanted and seed not in SWEEP_SEEDS:
            runs[arm, rate][seed] = record
    runs = {who: runs[who] for who in wanted if who in runs}
    text = "\n".join(tables(runs, rates, winning))
    durable.write(out / "report.md", text)
    print(text)
    panels = {}
    for family in families:
        panels[", ".join(family)] = [who for who in runs if who[0][:2] == family and who[0].fraction == 0.3]
    first = [who for who in runs if who[0][:2] == families[0]]
    panels[f"{', '.join(families[0])}, top rows"] = [who for who in first if who[0].rule in ("top", "all")]
    for title, arms in panels.items():
        own = winning[arms[0][0][:2], True] if arms else None
        panels[title] = {label(*who, own): [r["rewards"] for r in runs[who].values()] for who in arms}
    plot.reward_bands(out / "ablation.png", {title: curves for title, curves in panels.items() if curves})
    print(f"{out}/report.md  {out}/ablation.png")


# ----------------------------------------------------------------------------------------------------------------- main


def names_data(flags):
    """Whether the flags for train.py name the user's own data. Raises BadInput for wrong ones, before
    anything is run."""
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise BadInput(f"--train {flags!r}: {error}") from error
    training = parse(Training, "the flags that --train gives to train.py", words)
    if training.data and not training.eval_data:
        raise BadInput(
            "--train has data and no held-out data, on which runs are compared: add --eval-data FILE"
        )
    return bool(training.data)


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    if config.what not in ("sweep", "compare", "report"):
        raise BadInput(f"{config.what!r} is none of sweep, compare, report")
    out = Path(config.out)
    path = out / "results.jsonl"
    own_data = names_data(config.train)
    records = read_lines(path, wrong_in) if path.exists() else []
    families = OWN_DATA if own_data or any(record["task"] == "data" for record in records) else FAMILIES
    winning = None if config.what == "sweep" else winners(records, families, out)[1]
    if config.what != "report":
        lock = lock_results(out, "results.jsonl", "ablation")
        records = read_lines(path, wrong_in) if path.exists() else []
        durable.write(
            path, "".join(json.dumps(record) + "\n" for record in records)
        )  # without a line that was cut off
        if config.what == "sweep":
            wanted = [
                (arm, rate, seed)
                for seed in SWEEP_SEEDS
                for arm in swept(families)
                for rate in LEARNING_RATES
            ]
        else:
            wanted = [(*who, seed) for seed in range(config.seeds) for who in compared(winning)]
        run_all(config, out, wanted, {key(record) for record in records})
    if config.what != "sweep":
        report(read_lines(path, wrong_in), families, out)
