"""What a second thread gives a default step, what a busy neighbour takes from it, and how long threads that
wait should spin.

    python bench/threads.py        # 5 minutes on 2 cores that are idle otherwise

A process for each line of the table, in turn: ours of bench/peers.py, forward, backward and AdamW of --groups
groups. GOMP_SPINCOUNT says how often a waiting thread of libgomp looks before it sleeps; 300000 is libgomp's
own, base/__init__.py sets 2000. "beside": while another process keeps one core busy. Seconds are the median
turn and the worst. --out FILE gets {"card", "lines": [{"threads", "spins", "alone": [seconds], "beside":
[seconds], "cpu_seconds"}]}.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from peers import Entrant, given_tokens
from shapes import card
from tqdm import tqdm

from base.cli import BadInput, one_line_errors, option, parse
from model import Qwen3Config

BUSY = "while True: pass"


@dataclass
class Config:
    model: str = option("assets/tiny", "checkpoint directory")
    threads: list[int] = option([1, 2], "OpenMP threads", least=1)
    spins: list[int] = option([300_000, 20_000, 2000, 0], "values of GOMP_SPINCOUNT", least=0)
    rounds: int = option(5, "timed turns of each, alone and beside the busy process", least=1)
    prompt: int = option(335, "tokens of a prompt", least=1)
    groups: int = option(16, "groups", least=1)
    completions: int = option(16, "completions of a group", least=2)
    length: int = option(8, "tokens of a completion", least=1)
    out: str = option("runs/bench-threads", "directory for results.json and the logs")


def start(config, out):
    """-> [(line of the result, its process), ...]; with one thread nobody waits, so there is one line."""
    shape = config.prompt, config.groups, config.completions, config.length
    job, started = given_tokens(config.model, *shape), []
    for threads in config.threads:
        for spins in config.spins if threads > 1 else config.spins[-1:]:
            how = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": str(spins)}
            line = {"threads": threads, "spins": spins, "alone": [], "beside": []}
            started.append((line, Entrant("ours", job, sys.executable, out, how)))
    return started


def measure(config, started):
    turns = [
        where for where in ("warm", "alone", "beside") for _ in range(1 if where == "warm" else config.rounds)
    ]
    busy = None
    try:
        for number, where in enumerate(tqdm(turns, unit="round")):
            if where == "beside" and not busy:
                busy = subprocess.Popen([sys.executable, "-c", BUSY])
                os.sched_setaffinity(busy.pid, {min(os.sched_getaffinity(0))})
            for line, entrant in started[:: -1 if number % 2 else 1]:
                said = entrant.turn()
                if not said:
                    raise BadInput(f"a step has failed: {entrant.result['error']}; {entrant.log}")
                if where != "warm":
                    line[where].append(said["seconds"])
                    line.setdefault("cpu_seconds", said["cpu_seconds"])
    finally:
        if busy:
            busy.kill()
        for _, entrant in started:
            entrant.end()


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    started = start(config, out)
    measure(config, started)
    lines = [line for line, _ in started]
    print(card(Qwen3Config.from_pretrained(config.model)))
    print("threads   spins   alone   worst  beside   worst   CPU s  faster than the first, alone")
    for line in lines:
        alone, beside = line["alone"], line["beside"]
        seconds = [median(alone), max(alone), median(beside), max(beside), line["cpu_seconds"]]
        shown = " ".join(f"{value:7.2f}" for value in (*seconds, median(lines[0]["alone"]) / median(alone)))
        print(f"{line['threads']:7} {line['spins']:7,} {shown}")
    results = {"card": card(Qwen3Config.from_pretrained(config.model)), "lines": lines}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(out / "results.json")
