"""Do rows of high magnitude matter? Runs of train.py that differ in one setting, paired by seed.

    python -m studies.ablation sweep         # learning rates, for dense training and for LongAct alike
    python -m studies.ablation compare       # rules and fractions, each at the learning rate that won
    python -m studies.ablation report        # the tables and the figure again, from finished runs

On your own data, which --train may also name by a --config; then compare with the same flags:

    python -m studies.ablation sweep --ranks 8 --jobs 1 --out runs/ablation-8b \\
        --train "--model Qwen3-8B --data train.jsonl --eval-data held-out.jsonl"

What is run is at the top of the file: TRAIN, and the arms. If --train names your own data, one task "data"
takes the place of ours.

All runs start from one checkpoint. A seed fixes the prompts, their order, and the random numbers of sampling,
so arms of one seed differ only in their flags. GRPO trains on every prompt it draws, so its arms see the same
prompts. DAPO draws until enough groups have differing rewards, so its arms see more or fewer prompts of the
same sequence. Each rollout feeds two updates: with one, all ratios are 1 and clipping does nothing.

The sweep has seeds of its own. A learning rate wins by the mean reward of the last quarter of the sweep's
steps, on prompts that the model meets for the first time; held-out prompts are not used. bottom and random
run at top's rate. Dense training runs at its own rate, and at top's if that differs: the first compares each
method at its best, the second differs only in the rows.

A run that is in results.jsonl is not run again; one that was interrupted goes on. A run belongs to its flags
and to what is in the files of its model and data: `identity` is a digest of both. results.jsonl with runs of
other flags or files is refused. --out holds

    results.jsonl   one line for each run: task, algorithm, rule, fraction, learning_rate, seed; flags;
                    identity; rewards (mean reward of all sampled completions of each step); held_out
                    (train.py's results.json, after); prompts_drawn; tokens_trained; moved_selected and
                    moved_unselected (means over the steps); seconds
    report.md       the tables
    report.html     the same and the figure, for a browser
    ablation.png    the reward curves and their bands

The runs are in runs/ablation-runs/, each named by its arm, learning rate, seed and identity; what a finished
one could go on from is removed. At a signal runs save and end; the same command goes on with them.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import functools
import json
import os
import shlex
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

import numpy as np

from base import bars, durable, interrupt, limits, page, plot
from base.cli import BadInput, brief, one_line_errors, option, parse
from evals import stats
from evals.results import read_lines
from run import resume
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
    """What is compared. Arms of one family, (task, algorithm), differ in the rest."""

    task: str
    algorithm: str
    rule: str
    fraction: float
    more: str = ""  # flags, of studies/methods.py

    @property
    def flags(self):
        """train.py's flags for this arm."""
        rows = f"--rule {self.rule} --fraction {self.fraction} {self.more}"
        return f"{TASKS[self.task]} --algorithm {self.algorithm} {rows}"


FAMILIES = [("recall", "dapo"), ("recall", "grpo"), ("tracking", "dapo")]
OWN_DATA = [("data", "dapo"), ("data", "grpo")]
LEARNING_RATES, SWEEP_SEEDS = (1e-4, 3e-4, 1e-3), (1000, 1001)


def swept(families):
    """-> the arms whose learning rates are swept."""
    return [Arm(*family, rule, 0.3) for family in families for rule in ("all", "top")]


def compared_arms(families):
    """-> the arms that are compared: every rule in each family, and in the first one more fractions."""
    arms = [Arm(*family, rule, 0.3) for family in families for rule in ("all", "top", "bottom", "random")]
    return arms + [Arm(*families[0], "top", fraction) for fraction in (0.1, 0.2, 0.4)]


@dataclass
class Config:
    what: str = option("report", "sweep, compare or report", positional=True)
    seeds: int = option(8, "compare: seeds 0, 1, ... of each arm", least=1, most=1000)
    train: str = option("", "flags for train.py, which override ours; keys of a --config in them do not")
    ranks: int = option(1, "processes of a run, by torchrun", least=1, most=10**4)
    jobs: int = option(2, "runs at the same time, which share the cores", least=1, most=1000)
    out: str = option("runs/ablation", "directory of results.jsonl, report.md and the figure")


# ------------------------------------------------------------------------------------------------------- runs


def flags_of(config, arm, learning_rate, seed):
    """A run's flags for train.py, as text."""
    return f"{TRAIN} {arm.flags} --learning-rate {learning_rate} --seed {seed} {config.train}"


@functools.cache
def contents(model, data, eval_data):
    """Digests of the files of a model and of data, which are read once."""
    return resume.contents(Training(model=model, data=data, eval_data=eval_data))


def identity(flags):
    """Of a run: the digest of its settings that are not defaults, and of what is in its files."""
    training, usual = parse(Training, "", shlex.split(flags)), asdict(Training())
    settings = {key: value for key, value in asdict(training).items() if value != usual[key]}
    settings |= contents(training.model, tuple(training.data), tuple(training.eval_data))
    return durable.digest(json.dumps(settings, sort_keys=True))


def run(config, arm, learning_rate, seed):
    """One run of train.py -> its line of results.jsonl. One that is finished is read, one that was
    interrupted goes on. Raises BadInput, with the end of its output, if it fails."""
    flags = flags_of(config, arm, learning_rate, seed)
    own = identity(flags)
    name = f"{arm.task}-{arm.algorithm}-{arm.rule}-{arm.fraction}-{learning_rate:g}-{seed}-{own}"
    directory = Path("runs/ablation-runs") / name
    if not (directory / "results.json").exists():
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.ranks)]
        command = [sys.executable, *(start if config.ranks > 1 else []), "train.py", *shlex.split(flags)]
        threads = str(max(1, os.cpu_count() // (config.jobs * config.ranks)))
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        how = {"env": environment, "stdout": PIPE, "stderr": PIPE, "text": True, "errors": "replace"}
        finished = interrupt.run([*command, "--name", f"ablation-runs/{name}", "--resume", "auto"], **how)
        if finished.returncode:
            raise BadInput(f"{' '.join(command)} failed: {finished.stderr.strip()[-300:]}")
    durable.remove(directory / "checkpoints")  # several times the model's size
    try:
        return line_of(arm, learning_rate, seed, {"flags": flags, "identity": own}, directory)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        problem = f"{directory} is not what a run of train.py leaves: {error!r}"
        raise BadInput(f"{problem}; remove it to have it run again") from error


def line_of(arm, learning_rate, seed, made_by, directory):
    """The directory of a finished run -> its line of results.jsonl. made_by: its flags and identity."""
    steps = [value for _, _, value in durable.json_lines(directory / "metrics.jsonl")]

    def mean(key):
        return float(np.mean([m[key] for m in steps])) if steps[0][key] is not None else None

    return {
        **arm._asdict(),
        "learning_rate": learning_rate,
        "seed": seed,
        **made_by,
        "rewards": [m["reward"] for m in steps],
        "held_out": limits.parse_json(limits.read_text(directory / "results.json"))["after"],
        "prompts_drawn": steps[-1]["prompts_drawn"],
        "tokens_trained": sum(m["tokens_trained"] for m in steps),
        "moved_selected": mean("moved_selected"),
        "moved_unselected": mean("moved_unselected"),
        "seconds": round(sum(m["seconds"]["total"] for m in steps), 1),
    }


def is_number(value, most=1e9):
    """Whether a value from JSON is a finite number of at most this size."""
    return type(value) in (int, float) and abs(value) <= most


def wrong_in(record):
    """A line of results.jsonl -> what is wrong with it; "" if nothing is."""
    if not isinstance(record, dict):
        return "no JSON object"

    def is_set(each):
        of = each if isinstance(each, dict) else {}
        return is_number(of.get("prompt_tokens")) and is_number(of.get("accuracy"), 1)

    rewards, held_out = record.get("rewards"), record.get("held_out")
    good = {name: isinstance(record.get(name), str) for name in ("task", "algorithm", "rule")}
    good |= {name: is_number(record.get(name)) for name in ("fraction", "learning_rate")}
    good["seed"] = type(record.get("seed")) is int
    good["rewards"] = isinstance(rewards, list) and rewards and all(map(is_number, rewards))
    good["held_out"] = isinstance(held_out, dict) and held_out and all(map(is_set, held_out.values()))
    for name in ("moved_selected", "moved_unselected"):
        good[name] = record.get(name) is None or is_number(record[name])
    return next((f"{name} is {brief(record.get(name))}" for name, right in good.items() if not right), "")


def key(record):
    """A line of results.jsonl -> (arm, learning rate, seed): which run it is of."""
    return Arm(*(record.get(field, "") for field in Arm._fields)), record["learning_rate"], record["seed"]


def check_own(config, records, path):
    """Raises BadInput for a record that is not of what the command line says now: flags or files differ."""
    for record in records:
        if record.get("identity") != identity(flags_of(config, *key(record))):
            what = f"{record['task']}, {record['algorithm']}, {record['rule']}, seed {record['seed']}"
            fix = "choose another --out, or give the --train that it began with"
            raise BadInput(f"{path} has a run of other flags, model or data ({what}); {fix}")


def run_all(config, out, wanted, done):
    """Run every (arm, learning rate, seed) of `wanted` that is not in `done`, and append each to
    out/results.jsonl when it ends. Raises BadInput for a run that fails."""
    todo = [each for each in wanted if each not in done]
    with (
        open(out / "results.jsonl", "ab", buffering=0) as file,
        ThreadPoolExecutor(config.jobs) as pool,
        bars.bar(total=len(wanted), initial=len(wanted) - len(todo), desc=config.what, unit="run") as bar,
    ):
        try:
            for record in pool.map(lambda each: run(config, *each), todo):
                durable.append(file, record)
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def winners(records, families, out):
    """The sweep's records -> by_rate, winning: {(family, whether dense): {learning rate: reward at the end of
    the sweep}}, and {(family, whether dense): the learning rate whose reward is highest}. Raises BadInput if
    runs of the sweep are missing."""
    rewards = defaultdict(list)
    for record in records:
        arm, learning_rate, seed = key(record)
        if arm in swept(families) and seed in SWEEP_SEEDS and learning_rate in LEARNING_RATES:
            last = record["rewards"][-max(1, len(record["rewards"]) // 4) :]
            rewards[(arm[:2], arm.rule == "all"), learning_rate].append(float(np.mean(last)))
    missing = len(swept(families)) * len(LEARNING_RATES) * len(SWEEP_SEEDS) - sum(map(len, rewards.values()))
    if missing:
        fix = "python -m studies.ablation sweep first"
        raise BadInput(f"{out}/results.jsonl lacks {missing} runs of the sweep: {fix}")
    by_rate = defaultdict(dict)
    for (who, learning_rate), values in rewards.items():
        by_rate[who][learning_rate] = float(np.mean(values))
    return by_rate, {who: max(rates, key=rates.get) for who, rates in by_rate.items()}


# ----------------------------------------------------------------------------------------------------- report

HEAD = f"""# Ablation: which rows of W_Q and W_K are updated

Means over seeds ± half a 95% interval (Student's t). acc. at N: accuracy on held-out prompts of N tokens at
temperature 1, per cent; accuracy: mean over those lengths. reward area: mean training reward over the steps,
per cent. steps to {TARGET:g}: the first whose training reward reaches it (the number of steps plus one if
none does). moved: root mean square change of a weight in an update, in selected rows and in others.
Differences pair runs of the same seed; p: random sign flips.
"""


def interval(values):
    """Independent values -> their mean, and half the width of its 95% interval by Student's t (NaN for one
    value)."""
    values, n = np.asarray(values, dtype=float), len(values)
    if n < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(t_quantile(n) * values.std(ddof=1) / np.sqrt(n))


@functools.cache
def t_quantile(n, share=0.975):
    """The quantile of Student's t for n values below which `share` of it lies, simulated."""
    return np.quantile(np.random.default_rng(0).standard_t(n - 1, 1_000_000), share)


def outcomes(record):
    """A line of results.jsonl -> {column of the table: number}."""
    sets = record["held_out"].values()
    reached = [step for step, reward in enumerate(record["rewards"], 1) if reward >= TARGET]
    return {
        **{f"acc. at {each['prompt_tokens']:.0f}": 100 * each["accuracy"] for each in sets},
        "accuracy": 100 * float(np.mean([each["accuracy"] for each in sets])),
        "reward area": 100 * float(np.mean(record["rewards"])),
        f"steps to {TARGET:g}": reached[0] if reached else len(record["rewards"]) + 1,
    }


# Of an arm's rule and fraction, in every panel.
COLOURS = {
    ("all", 0.3): plot.GREY,
    ("top", 0.3): plot.BLUE,
    ("bottom", 0.3): plot.VERMILLION,
    ("random", 0.3): plot.GREEN,
    ("top", 0.1): plot.SKY,
    ("top", 0.2): plot.PURPLE,
    ("top", 0.4): plot.ORANGE,
}


def label(arm, rate, own):
    """A row's name. own: dense training's own learning rate; at another rate the name says so."""
    if arm.rule != "all":
        return f"{arm.rule} {arm.fraction:.0%}"
    return "all" if rate == own else f"all, at {rate:g}"


def differences(baseline, by_seed):
    """Two rows, each {seed: record} -> the cells of by_seed minus baseline: the number of seeds in both; then
    for accuracy and for reward area the mean with its 95% interval, and the p-value."""
    both = [seed for seed in by_seed if seed in baseline]
    cells = [str(len(both))]
    for column in ("accuracy", "reward area"):
        if len(both) < 2:
            cells += ["-", "-"]
            continue
        a, b = [[outcomes(source[seed])[column] for seed in both] for source in (baseline, by_seed)]
        mean, half = interval(np.subtract(b, a))
        cells += [f"{mean:+.2f} ±{half:.2f}", f"{stats.paired(a, b)['p']:.3f}"]
    return cells


def table_of_means(runs, own):
    """{(arm, learning rate): {seed: record}} of one family, dense training's own rate -> a table as text."""
    [first, *_] = [record for by_seed in runs.values() for record in by_seed.values()]
    rows = [["rows updated", "rate", "seeds", *(columns := outcomes(first)), "moved", "others moved"]]
    for (arm, rate), by_seed in runs.items():
        records = list(by_seed.values())
        cells = [label(arm, rate, own).partition(",")[0], f"{rate:g}", str(len(records))]
        for column in columns:
            mean, half = interval([outcomes(record)[column] for record in records])
            cells.append(f"{mean:.1f} ±{half:.1f}")
        for name in ("moved_selected", "moved_unselected"):
            moved = [record[name] for record in records]
            cells.append("-" if None in moved else f"{np.mean(moved):.1e}")
        rows.append(cells)
    return stats.table(rows)


def table_of_differences(runs, own):
    """As table_of_means: every arm minus dense training, and LongAct also minus bottom and random."""
    rows = [["difference", "seeds", "accuracy", "p", "reward area", "p"]]
    for (arm, rate), by_seed in runs.items():
        rules = () if arm.rule == "all" else ("all",)
        if (arm.rule, arm.fraction) == ("top", 0.3):
            rules = ("all", "bottom", "random")
        baselines = [who for who in runs if who[0].rule in rules]
        for baseline in sorted(baselines, key=lambda who: who[0].rule != "all"):
            name = f"{label(arm, rate, own)} - {label(*baseline, own)}"
            rows.append([name, *differences(runs[baseline], by_seed)])
    return stats.table(rows)


def of_figure(runs, winning):
    """What report draws beside the curves: [(label, colour, mean difference in accuracy, half of its 95%
    interval, seeds), ...] of every arm minus dense training in its family."""
    rows = []
    for (arm, rate), by_seed in runs.items():
        own = winning[arm[:2], True]
        for baseline in [who for who in runs if who[0][:2] == arm[:2] and who[0].rule == "all" != arm.rule]:
            both = [seed for seed in by_seed if seed in runs[baseline]]
            a, b = [[outcomes(each[seed])["accuracy"] for seed in both] for each in (runs[baseline], by_seed)]
            if len(both) > 1:
                name = f"{arm.task}, {arm.algorithm}: {label(arm, rate, own)} - {label(*baseline, own)}"
                rows.append((name, COLOURS[arm[2:4]], *interval(np.subtract(b, a)), len(both)))
    return rows


def tables(runs, by_rate, winning):
    """{(arm, learning rate): {seed: record}}, and what `winners` returns -> yields the parts of report.md."""
    yield HEAD
    for family in dict.fromkeys(family for family, _ in winning):
        of_family = {who: by_seed for who, by_seed in runs.items() if who[0][:2] == family}
        if not of_family:
            continue
        own = winning[family, True]
        yield f"## {family[0]}, {family[1]}\n"
        yield f"```\n{table_of_means(of_family, own)}\n\n{table_of_differences(of_family, own)}\n```\n"
        swept_rates = []
        for dense, name in ((True, "all"), (False, "top")):
            rewards = sorted(by_rate[family, dense].items())
            shown = ", ".join(f"{rate:g} {reward:.3f}" for rate, reward in rewards)
            swept_rates.append(f"{name}: {shown} -> {winning[family, dense]:g}")
        yield f"Learning rates, by reward of the sweep's last quarter: {'; '.join(swept_rates)}"
        yield ""


def compared(winning):
    """-> [(arm, learning rate), ...] of the runs that `compare` makes for each seed; dense training at its
    own rate and at top's."""
    families = list(dict.fromkeys(family for family, _ in winning))
    result = []
    for arm in compared_arms(families):
        rates = {winning[arm[:2], False]}
        if arm.rule == "all":
            rates.add(winning[arm[:2], True])
        result += [(arm, rate) for rate in sorted(rates)]
    return result


def report(records, families, out):
    """The records of results.jsonl -> out/report.md, which is printed, and out/ablation.png. Raises BadInput
    as winners."""
    by_rate, winning = winners(records, families, out)
    wanted, runs, made = compared(winning), defaultdict(dict), {}
    for record in records:
        arm, rate, seed = key(record)
        if (arm, rate) in wanted and seed not in SWEEP_SEEDS:
            runs[arm, rate][seed] = record
            steps_and_columns = len(record["rewards"]), list(outcomes(record))
            if made.setdefault(arm[:2], steps_and_columns) != steps_and_columns:
                what = f"{out}/results.jsonl has runs of {', '.join(arm[:2])} that cannot be compared"
                raise BadInput(
                    f"{what}: their steps or held-out prompts differ; remove those of another --train"
                )
    runs = {who: runs[who] for who in wanted if who in runs}
    text = "\n".join(tables(runs, by_rate, winning))
    durable.write(out / "report.md", text)
    print(text)
    panels = {}
    for family in families:
        panels[", ".join(family)] = [who for who in runs if who[0][:2] == family and who[0].fraction == 0.3]
    first = [who for who in runs if who[0][:2] == families[0]]
    panels[f"{', '.join(families[0])}, top rows"] = [who for who in first if who[0].rule in ("top", "all")]
    for title, arms in panels.items():
        own = winning[arms[0][0][:2], True] if arms else None
        panels[title] = {
            label(*who, own): (COLOURS[who[0][2:4]], [r["rewards"] for r in runs[who].values()])
            for who in arms
        }
    panels = {title: curves for title, curves in panels.items() if curves}
    plot.reward_bands(out / "ablation.png", panels, of_figure(runs, winning))
    figure = page.image(out / "ablation.png", "rewards over the steps, and paired differences")
    page.write(out / "report.html", "Ablation", figure, page.pre(text))
    print(f"{out}/report.md  {out}/report.html  {out}/ablation.png")


# ------------------------------------------------------------------------------------------------------- main


def names_data(flags):
    """Whether the flags for train.py name the user's own data. Raises BadInput for wrong flags, before
    anything is run."""
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise BadInput(f"--train {flags!r}: {error}") from error
    training = parse(Training, "the flags that --train gives to train.py", words)
    if training.data and not training.eval_data:
        problem = "--train has data and no held-out data, on which runs are compared"
        raise BadInput(f"{problem}: add --eval-data FILE")
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

    # What is to be run: (arm, learning rate, seed).
    if config.what == "sweep":
        who = [(arm, rate) for arm in swept(families) for rate in LEARNING_RATES]
        seeds = SWEEP_SEEDS
    else:
        who, seeds = compared(winners(records, families, out)[1]), range(config.seeds)
    wanted = [(*each, seed) for seed in seeds for each in who]

    lock = durable.claim(out, "ablation", ["results.jsonl"])
    if config.what != "report":
        records = read_lines(path, wrong_in) if path.exists() else []  # again: they are ours from here on
        check_own(config, records, path)
        lines = [json.dumps(record) + "\n" for record in records]
        durable.write(path, "".join(lines))  # without a last line that was cut off
        run_all(config, out, wanted, {key(record) for record in records})
    if config.what != "sweep":
        report(read_lines(path, wrong_in), families, out)
