"""Runs of train.py that differ in one setting, paired by seed: how they are made, and the numbers they are
judged by. studies/ablation.py says which runs.

All runs start from one checkpoint. A seed fixes the prompts, their order, and the random numbers of sampling,
so arms of one seed differ only in their flags. GRPO trains on every prompt it draws, so its arms see the same
prompts. DAPO draws until enough groups have differing rewards, so its arms see more or fewer prompts of the
same sequence.

A run that is in results.jsonl is not made again; one that was interrupted goes on. A run belongs to its flags
and to what is in the files of its model and data: `identity` is a digest of both. The runs are in
runs/ablation-runs/, each named by its arm, learning rate, seed and identity; what a finished one could go on
from is removed. A line of results.jsonl is one run:

    task, algorithm, rule, fraction, more   the arm
    learning_rate, seed, flags, identity    what made it
    rewards                                 mean reward of all sampled completions of each step
    held_out                                train.py's results.json, after
    prompts_drawn, tokens_trained           in total
    moved_selected, moved_unselected        means over the steps
    seconds                                 of all steps
"""

import functools
import json
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

import numpy as np

from base import bars, durable, interrupt, limits
from base.cli import BadInput, brief, parse
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
    """What is compared."""

    task: str
    algorithm: str
    rule: str
    fraction: float
    more: str = ""  # flags

    @property
    def flags(self):
        """train.py's flags for this arm."""
        rows = f"--rule {self.rule} --fraction {self.fraction} {self.more}"
        return f"{TASKS[self.task]} --algorithm {self.algorithm} {rows}"


# ------------------------------------------------------------------------------------------------------- runs


def flags_of(train, arm, learning_rate, seed):
    """A run's flags for train.py, as text. train: those that override ours."""
    return f"{TRAIN} {arm.flags} --learning-rate {learning_rate} --seed {seed} {train}"


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


def run(train, ranks, jobs, arm, learning_rate, seed):
    """One run of train.py, by `ranks` processes, beside jobs - 1 others -> its line of results.jsonl. One
    that is finished is read, one that was interrupted goes on. Raises BadInput, with the end of its output,
    if it fails."""
    flags = flags_of(train, arm, learning_rate, seed)
    own = identity(flags)
    name = f"{arm.task}-{arm.algorithm}-{arm.rule}-{arm.fraction}-{learning_rate:g}-{seed}-{own}"
    directory = Path("runs/ablation-runs") / name
    if not (directory / "results.json").exists():
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *(start if ranks > 1 else []), "train.py", *shlex.split(flags)]
        threads = str(max(1, os.cpu_count() // (jobs * ranks)))
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
    good = {"task": record.get("task") in list(TASKS)}
    good |= {name: isinstance(record.get(name), str) for name in ("algorithm", "rule")}
    good["more"] = isinstance(record.get("more", ""), str)
    good |= {name: is_number(record.get(name)) for name in ("fraction", "learning_rate", "seconds")}
    good["seed"] = type(record.get("seed")) is int
    good["rewards"] = isinstance(rewards, list) and rewards and all(map(is_number, rewards))
    good["held_out"] = isinstance(held_out, dict) and held_out and all(map(is_set, held_out.values()))
    for name in ("moved_selected", "moved_unselected"):
        good[name] = record.get(name) is None or is_number(record[name])
    return next((f"{name} is {brief(record.get(name))}" for name, right in good.items() if not right), "")


def read(path):
    """results.jsonl, if it is there -> its lines, checked."""
    return read_lines(path, wrong_in) if path.exists() else []


def key(record):
    """A line of results.jsonl -> (arm, learning rate, seed): which run it is of."""
    return Arm(*(record.get(field, "") for field in Arm._fields)), record["learning_rate"], record["seed"]


def check_own(train, records, path):
    """Raises BadInput for a record that is not of what the command line says now: flags or files differ."""
    for record in records:
        if record.get("identity") != identity(flags_of(train, *key(record))):
            what = f"{record['task']}, {record['algorithm']}, {record['rule']}, seed {record['seed']}"
            fix = "choose another --out, or give the --train that it began with"
            raise BadInput(f"{path} has a run of other flags, model or data ({what}); {fix}")


def run_all(train, ranks, jobs, wanted, path):
    """Make every run, (arm, learning rate, seed), of `wanted` that is not in the file `path` yet, and append
    its line when it ends. Raises BadInput for a run that fails, and for a file with runs of other flags."""
    records = read(path)
    check_own(train, records, path)
    durable.write(path, "".join(json.dumps(record) + "\n" for record in records))  # without half a last line
    done = {key(record) for record in records}
    todo = [each for each in wanted if each not in done]
    with (
        open(path, "ab", buffering=0) as file,
        ThreadPoolExecutor(jobs) as pool,
        bars.bar(total=len(wanted), initial=len(wanted) - len(todo), desc="runs", unit="run") as bar,
    ):
        try:
            for record in pool.map(lambda each: run(train, ranks, jobs, *each), todo):
                durable.append(file, record)
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


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


# ---------------------------------------------------------------------------------------------------- numbers


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


def gained(one, other, column="accuracy"):
    """Two rows, each {seed: record} -> one minus other in `outcomes`, of each seed that both have."""
    both = [seed for seed in one if seed in other]
    a, b = [[outcomes(each[seed])[column] for seed in both] for each in (one, other)]
    return np.subtract(a, b)


def seen_from(one, other):
    """Two rows, each {seed: record} -> the smallest true difference in accuracy, in points, that a paired t
    test finds (p below 0.05) in 80 of 100 such experiments whose spread is that of these pairs; text."""
    apart = gained(one, other)
    if len(apart) < 2:
        return "-"
    error = apart.std(ddof=1) / np.sqrt(len(apart))
    return f"{(t_quantile(len(apart)) + t_quantile(len(apart), 0.8)) * error:.1f}"


def difference(one, other):
    """Two rows, each {seed: record} -> cells of one minus other: the seeds in both; for accuracy and for
    reward area the mean with its 95% interval, and the p-value; the accuracy it would be seen from."""
    cells = [str(len(gained(one, other)))]
    for column in ("accuracy", "reward area"):
        apart = gained(one, other, column)
        if len(apart) < 2:
            cells += ["-", "-"]
            continue
        mean, half = interval(apart)
        cells += [f"{mean:+.2f} ±{half:.2f}", f"{stats.sign_flips(apart):.3f}"]
    return [*cells, seen_from(one, other)]
