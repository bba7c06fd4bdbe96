"""Is nothing lost by kill -9? A run of train.py is killed at random moments, again and again, and goes on by --resume auto;
in the end its metrics and weights must be, bit for bit, those of a run that was left alone.

    python bench/kill.py --kills 20

The killed process does it itself: as the module of train.py's --reward this file makes the n-th call of a function start a
timer of up to 50 ms that ends in SIGKILL, so that it strikes amid generating, backward, the optimizer's step, saving, or in
what follows. KILL="save 3 0.02": 20 ms after the third os.replace begins; without a time, at once. Under torchrun it is
the last rank, and only until torchrun starts the ranks again.

Prints a line for each life, and at last one JSON object: kills, places (how many of each), lives_that_made_a_step,
equal_metrics, equal_weights. Exit code 1 if anything differs.
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

import rewards  # noqa: E402
from cli import option, parse  # noqa: E402

exact = rewards.exact  # --reward kill:exact
# place -> how many calls of it random chooses from: about a step's
CALLS = {"rollout": 3, "backward": 18, "step": 4, "save": 16}
FLAGS = "--steps 6 --save-every 1 --prompts 4 --completions 4 --updates 2 --rule random --eval-prompts 0 --max-rounds 30"


@dataclass
class Config:
    kills: int = option(20, "kills before the run may end", least=1)
    seed: int = option(0, "seed of places and moments", least=0)


def arm(place, count, delay):
    """Make call number `count` of the place's function the last thing but `delay` seconds that this process does."""
    import torch

    import rollout

    owner, name = {
        "rollout": (rollout.Rollout, "generate"),
        "backward": (torch.Tensor, "backward"),
        "step": (torch.optim.AdamW, "step"),
        "save": (os, "replace"),
    }[place]
    function, calls = getattr(owner, name), 0

    def counted(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == count and delay:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)

    setattr(owner, name, counted)


def read(run):
    """Metrics without the wall-clock keys, and the bytes of the exported weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: m[key] for key in m if key not in ("seconds", "tokens_per_second")} for m in lines]
    return kept, (run / "checkpoint" / "model.safetensors").read_bytes()


def main():
    config = parse(Config, __doc__)
    rng, places, progress = random.Random(config.seed), Counter(), 0
    for name in ("kill-whole", "kill-killed"):
        shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    path = os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])

    def live(name, kill):
        command = [sys.executable, "train.py", "--name", name, "--reward", "kill:exact", *FLAGS.split(), "--resume", "auto"]
        environment = {**os.environ, "PYTHONPATH": path, "KILL": kill}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    def steps(run):
        return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0

    whole, killed = ROOT / "runs" / "kill-whole", ROOT / "runs" / "kill-killed"
    result = live("kill-whole", "")
    if result.returncode:
        sys.exit(result.stderr)
    kills = 0
    while kills < config.kills:
        before = steps(killed)
        if (
            before == 6 and (killed / "checkpoint").exists()
        ):  # it got through: from the start again, from its last checkpoint
            shutil.rmtree(killed)
            before = 0
        place = rng.choice(list(CALLS))
        kill = f"{place} {rng.randint(1, CALLS[place])} {rng.uniform(0, 0.05):.4f}"
        result = live("kill-killed", kill)
        if result.returncode not in (0, -signal.SIGKILL):
            sys.exit(result.stderr)
        dead = result.returncode != 0
        kills += dead
        places[place] += dead
        progress += steps(killed) > before
        print(f"{kills}: {kill}: {'killed' if dead else 'ended'} with {steps(killed)} steps written", flush=True)
    result = live("kill-killed", "")
    if result.returncode:
        sys.exit(result.stderr)
    (metrics, weights), (other_metrics, other_weights) = read(whole), read(killed)
    summary = {"kills": kills, "places": dict(places), "lives_that_made_a_step": progress}
    summary |= {"equal_metrics": metrics == other_metrics, "equal_weights": weights == other_weights}
    print(json.dumps(summary))
    sys.exit(not (summary["equal_metrics"] and summary["equal_weights"]))


if __name__ == "__main__":
    main()
elif os.environ.get("KILL") and (
    os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
):
    place, count, *delay = os.environ["KILL"].split()
    arm(place, int(count), float(delay[0]) if delay else 0.0)
