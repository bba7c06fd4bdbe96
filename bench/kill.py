"""Is nothing lost by kill -9? A run of train.py is killed at random moments, again and again, and goes on by
--resume auto; in the end its metrics and weights must be, bit for bit, those of a run that was left alone.

    python bench/kill.py --kills 20

The killed process does it itself: as the module of train.py's --reward this file makes the n-th call of a
function start a timer of up to 50 ms that ends in SIGKILL, so that it strikes amid generating, backward, the
optimizer's step, saving, or in what follows. KILL="save 3 0.02": 20 ms after the third os.replace begins;
without a time, at once; with a signal's name after it that signal. Under torchrun it is the last rank, and
only until torchrun starts the ranks again.

Whenever it gets to its end all the same, it is compared and begun again. Prints a line for each life, with
the steps in metrics.jsonl, and at last one JSON object: kills, places (how many of each), ends (how often it
got there), equal_metrics, equal_weights (how many of these were equal). Exit code 1 if anything differs.
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

from base.cli import option, parse  # noqa: E402
from prompts import rewards  # noqa: E402

exact = rewards.exact  # --reward kill:exact
# place -> how many calls of it random chooses from: about a step's
CALLS = {"rollout": 3, "backward": 18, "step": 4, "save": 16}
FLAGS = "--steps 6 --save-every 1 --prompts 4 --completions 4 --updates 2 --rule random --eval-prompts 0 --max-rounds 30"


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
    """Metrics without the wall-clock keys, and the bytes of the exported weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: m[key] for key in m if key not in ("seconds", "tokens_per_second")} for m in lines]
    return kept, (run / "checkpoint" / "model.safetensors").read_bytes()


def main():
    config = parse(Config, __doc__)
    rng, places, ends = random.Random(config.seed), Counter(), []
    whole, killed = ROOT / "runs" / "kill-whole", ROOT / "runs" / "kill-killed"
    path = os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])

    def live(run, kill):
        """-> whether the run reached its end."""
        command = f"train.py --name {run.name} --reward kill:exact --resume auto {FLAGS}".split()
        environment = {**os.environ, "PYTHONPATH": path, "KILL": kill}
        result = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if result.returncode not in (0, -signal.SIGKILL):
            sys.exit(result.stderr)
        return result.returncode == 0

    for run in (whole, killed):
        shutil.rmtree(run, ignore_errors=True)
    live(whole, "")
    expected = read(whole)
    while places.total() < config.kills or killed.exists():
        place = rng.choice(list(CALLS))
        kill = (
            f"{place} {rng.randint(1, CALLS[place])} {rng.uniform(0, 0.05):.4f}"
            if places.total() < config.kills
            else ""
        )
        ended = live(killed, kill)
        file = killed / "metrics.jsonl"
        print(
            f"{kill or 'left alone'}: {len(file.read_text().splitlines()) if file.exists() else 0} steps",
            flush=True,
        )
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
elif os.environ.get("KILL") and (
    os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
):
    arm(*os.environ["KILL"].split())
