"""Does a long run leak memory, files or processes, or slow down? Trains 2,000 small steps; after each 100 the
process ends, and a new one goes on by --resume auto.

    python bench/soak.py --steps 2000 --life 100
    python bench/soak.py --steps 700 --life 700 --warm 200    # one life, for its slope once caches are full

Trainer and engine are one process, with a worker of --reward-workers beside it. Whenever metrics.jsonl has a
new line, the process is looked up in /proc. A life is the steps of one process. Prints a line for each life,
and finally one JSON object:

    steps, lives         the number of each
    rss_mib              resident memory at step --warm of a life, mean of the first and of the last three
    rss_slope_mib        growth in MiB per 1,000 steps, least squares within lives from step --warm on, mean
                         over lives
    rss_slope_error      its standard error over lives
    files, processes     maximum number of open files and of processes in the first life and in the last
    seconds_a_step       median over steps from --warm on, of the first three lives and of the last three
    tokens_per_second    the same of what metrics.jsonl says
Exit code 1 if the number of open files or processes grew.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

import numpy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from base.cli import one_line_errors, option, parse  # noqa: E402

FLAGS = (
    "--algorithm grpo --prompts 4 --completions 4 --updates 2 --eval-prompts 0 --facts 6 --filler 6 "
    "--reward-workers 1 --learning-rate 1e-6"
).split()


@dataclass
class Config:
    steps: int = option(2000, "steps in total", least=100)
    life: int = option(100, "steps after which the process ends and another goes on", least=50)
    warm: int = option(20, "first steps of a life, left out of memory and speed", least=0)
    name: str = option("soak", "the run's directory in runs/, removed before and after")


def look(pid):
    """-> resident MiB, open files, and processes: this one and its children."""
    proc = Path("/proc", str(pid))
    resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    children = sum(len((task / "children").read_text().split()) for task in (proc / "task").iterdir())
    return resident, len(os.listdir(proc / "fd")), 1 + children


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def live(name, last):
    """Run train.py up to step `last` -> what `look` saw after each step."""
    flags = [*FLAGS, *f"--steps {last} --save-every 100000 --resume auto".split()]
    command = [sys.executable, "train.py", "--name", name, *flags]
    metrics, seen = ROOT / "runs" / name / "metrics.jsonl", []
    before = lines_in(metrics)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.02)
        done = lines_in(metrics) - before
        if done > len(seen):
            seen += [look(process.pid)] * (done - len(seen))
    if process.returncode:
        raise SystemExit(f"train.py ended with code {process.returncode} before step {last}")
    return seen


one_line_errors()
config = parse(Config, __doc__)
run = ROOT / "runs" / config.name
shutil.rmtree(run, ignore_errors=True)
lives = []
for last in range(config.life, config.steps + 1, config.life):
    lives.append(live(config.name, last))
    resident, files, processes = lives[-1][-1]
    print(f"{last} steps: {resident:.0f} MiB, {files} open files, {processes} processes", flush=True)
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
warm = [lines[i : i + config.life][config.warm :] for i in range(0, len(lines), config.life)]
slopes = []
for life in lives:
    resident = [moment[0] for moment in life[config.warm :]]
    slopes.append(1000 * numpy.polyfit(range(len(resident)), resident, 1)[0])


def first_and_last(value):
    """value(which lives) of the first three lives and of the last three."""
    return [round(value(part), 3) for part in (slice(3), slice(-3, None))]


def median_of(value):
    """The median of value(line of metrics.jsonl), of the first three lives and of the last three."""
    return first_and_last(lambda part: median(value(line) for life in warm[part] for line in life))


most_files, most_processes = [[max(moment[i] for moment in life) for life in lives] for i in (1, 2)]
report = {
    "steps": len(lines),
    "lives": len(lives),
    "rss_mib": first_and_last(lambda part: mean(life[config.warm][0] for life in lives[part])),
    "rss_slope_mib": round(mean(slopes), 2),
    "rss_slope_error": round(stdev(slopes) / len(slopes) ** 0.5, 2) if len(slopes) > 1 else None,
    "files": [most_files[0], most_files[-1]],
    "processes": [most_processes[0], most_processes[-1]],
    "seconds_a_step": median_of(lambda line: line["seconds"]["total"]),
    "tokens_per_second": median_of(lambda line: line["tokens_per_second"]),
}
print(json.dumps(report, indent=1))
shutil.rmtree(run)
sys.exit(any(last > first for first, last in (report["files"], report["processes"])))
