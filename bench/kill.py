"""Does kill -9 lose anything? A run of train.py is killed at random moments, again and again, and goes on by
--resume auto. In the end its metrics and weights must be, bit for bit, those of a run that was left alone.

    python bench/kill.py --kills 20

The process kills itself. This file is also the module of train.py's --reward (kill:exact); there it makes
call number n of a function start a timer of up to 50 ms that ends in SIGKILL. So the signal arrives during
generation, backward, the optimizer's step or saving, or in what follows. KILL="save 3 0.02" means 20 ms after
the third os.replace begins; without a time, at once; with the name of a signal after the time, that signal.
Under torchrun it is the last rank that is killed, and only until torchrun starts the ranks again.

A run that reaches its end before all kills are done is compared and started again. Prints a line for each
process, with the number of steps in metrics.jsonl, and finally one JSON object: kills, places (the number of
kills at each), ends (how many runs ended), equal_metrics, equal_weights (how many of these were equal). Exit
code 1 if anything differs.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from base import processes  # noqa: E402
from base.cli import one_line_errors, option, parse  # noqa: E402
from prompts import rewards  # noqa: E402

exact = rewards.exact  # --reward kill:exact
# place -> number of its calls to draw from: about as many as a step makes
CALLS = {"rollout": 3, "backward": 18, "step": 4, "save": 16}
FLAGS = (
    "--steps 6 --save-every 1 --prompts 4 --completions 4 --updates 2 --rule random --eval-prompts 0 "
    "--max-rounds 30"
)


@dataclass
class Config:
    kills: int = option(20, "kills before the run may end", least=1)
    seed: int = option(0, "seed of places and moments", least=0)


def arm(place, count, delay="0", name="SIGKILL"):
    """Have this process send itself a signal `delay` seconds after call number `count` of the place's
    function begins."""
    import torch

    import rollout

    number = signal.Signals[name]
    owner, attribute = {
        "rollout": (rollout.Rollout, "generate"),
        "backward": (torch.Tensor, "backward"),
        "step": (torch.optim.AdamW, "step"),
        "save": (os, "replace"),
    }[place]
    function, calls = getattr(owner, attribute), 0

    def counted(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == int(count) and float(delay):
            threading.Timer(float(delay), os.kill, (os.getpid(), number)).start()
        elif calls == int(count):
            os.kill(os.getpid(), number)
        return function(*arguments, **keywords)

    setattr(owner, attribute, counted)


def read(run):
    """-> metrics without those that depend on the clock, and the bytes of the exported weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: m[key] for key in m if key not in ("seconds", "tokens_per_second")} for m in lines]
    return kept, (run / "checkpoint" / "model.safetensors").read_bytes()


def main():
    one_line_errors()
    config = parse(Config, __doc__)
    rng, places, ends = random.Random(config.seed), Counter(), []
    whole, killed = ROOT / "runs" / "kill-whole", ROOT / "runs" / "kill-killed"
    path = os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])

    def train(run, kill):
        """-> whether the run reached its end."""
        flags = f"--name {run.name} --reward kill:exact --resume auto {FLAGS}".split()
        environment = {**os.environ, "PYTHONPATH": path, "KILL": kill}
        command = [sys.executable, "train.py", *flags]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if result.returncode not in (0, -signal.SIGKILL):
            sys.exit(result.stderr)
        return result.returncode == 0

    for run in (whole, killed):
        shutil.rmtree(run, ignore_errors=True)
    train(whole, "")
    expected = read(whole)
    while places.total() < config.kills or killed.exists():
        place, kill = rng.choice(list(CALLS)), ""
        if places.total() < config.kills:
            kill = f"{place} {rng.randint(1, CALLS[place])} {rng.uniform(0, 0.05):.4f}"
        ended = train(killed, kill)
        file = killed / "metrics.jsonl"
        steps = len(file.read_text().splitlines()) if file.exists() else 0
        print(f"{kill or 'left alone'}: {steps} steps", flush=True)
        if ended:
            metrics, weights = read(killed)
            ends.append((metrics == expected[0], weights == expected[1]))
            shutil.rmtree(killed)
        else:
            places[place] += 1
    summary = {"kills": places.total(), "places": dict(places), "ends": len(ends)}
    summary |= {"equal_metrics": sum(m for m, _ in ends), "equal_weights": sum(w for _, w in ends)}
    print(json.dumps(summary))
    sys.exit(any(end != (True, True) for end in ends))


if __name__ == "__main__":
    main()
elif os.environ.get("KILL"):
    rank, world = processes.rank_and_world()
    if rank == world - 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        arm(*os.environ["KILL"].split())
