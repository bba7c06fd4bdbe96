"""Others' real trainers beside ours: same weights, same tokens, in turn, each in a process of its own.

    make peers                                  # installs them into .venv-peers, then the line below
    python bench/peers.py --threads 2           # 10 to 20 minutes on 2 idle cores
    python bench/peers.py --cases long --prompt 128 --length 8      # quick, to see that it works

long    one group of 16 completions of 64 tokens after a prompt of 2,048: loss, backward, AdamW
small   16 groups of 16 completions of 8 tokens after prompts of 335, the size of train.py's default step
step    a whole step on 16 prompts of recall, with generation: vLLM here, transformers in TRL

Entrants: ours (bench/peer_ours.py, all completions of a group in a pass; ours-compile: with --compile), TRL's
GRPOTrainer at micro-batches of 1, 4 and 16 rows (bench/peer_trl.py), verl's actor at 16 without and with its
prefix grouper (bench/peer_verl.py). The first turn of each is not timed; in long and small it gives loss and
gradients, which must agree with ours to 1e-4 of a gradient's norm. An entrant that fails, or does not agree,
is reported with its error, and the others go on.

--out DIR gets a log of each process and results.json: {"card", "threads", "rounds", "cases": [{"case",
"prompt_tokens" (of all), "groups", "completions", "completion_tokens" (of one; in step at most), "entrants":
[...]}]}. Of an entrant:

    name, micro_batch      which; rows of a forward (null: ours)
    versions               of its libraries
    seconds                of each timed turn
    cpu_seconds            the least of a turn, all threads together
    tokens                 through the network in a training forward, padding included
    base_mib, peak_mib     resident memory of the process before its first turn, and the most in its last
    loss, differs          of the first turn; largest difference of a gradient from ours, over its norm
    error                  its last line, or in how far it does not agree; then nothing was timed
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors.torch import load_file
from shapes import card
from tqdm import tqdm

from base.cli import BadInput, one_line_errors, option, parse
from model import Qwen3Config
from prompts import chat, tasks

ROOT = Path(__file__).resolve().parent.parent
CASES = {"long": (2048, 1, 64), "small": (335, 16, 8), "step": (335, 16, 24)}  # P, groups, R
MOST_DIFFERENCE = (
    1e-4  # of a gradient, over its norm: fp32 sums in another order, backward through all layers
)


@dataclass
class Config:
    model: str = option("assets/tiny", "checkpoint directory, of a model that all of them know")
    cases: list[str] = option(list(CASES), "what to run", list(CASES))
    entrants: list[str] = option(
        ["ours", "trl-1", "trl-4", "trl-16", "verl", "verl-prefix"], "who runs; a number is a micro-batch"
    )
    python: str = option(".venv-peers/bin/python", "Python of the peers' environment")
    threads: int = option(2, "OpenMP threads of each", least=1)
    rounds: int = option(3, "timed turns of each, after one that is not", least=1)
    prompt: int = option(0, "tokens of a prompt, instead of the case's", least=0)
    groups: int = option(0, "groups, instead of the case's", least=0)
    completions: int = option(16, "completions of a group", least=2)
    length: int = option(0, "tokens of a completion, at most, instead of the case's", least=0)
    out: str = option("runs/bench-peers", "directory for results.json and the logs")


class Entrant:
    """A process that takes turns (peer_turns.py). name: ours, or peer[-how]; how: a micro-batch, or a word.
    python: of the peers' environment; environment: variables of the process."""

    def __init__(self, name, job, python, out, environment):
        peer, _, how = name.partition("-")
        script = ROOT / f"bench/peer_{peer}.py"
        micro_batch = None if peer == "ours" else int(how) if how.isdecimal() else job["completions"]
        self.result = {"name": name, "micro_batch": micro_batch, "seconds": []}
        self.directory = Path(tempfile.mkdtemp(dir=out, prefix=f"{name}-"))
        self.job = {**job, "micro_batch": micro_batch, "how": how, "directory": str(self.directory)}
        if "completions" in job["groups"][0]:
            self.job["gradients"] = str(self.directory / "gradients.safetensors")
        (self.directory / "job.json").write_text(json.dumps(self.job))
        quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = self.directory / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable if peer == "ours" else python, script, self.directory / "job.json"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **quiet, **environment},
                cwd=ROOT,
                text=True,
            )
        ready = self.hear()
        self.result |= {key: ready[key] for key in ("versions", "base_mib") if key in ready}

    @property
    def runs(self):
        return self.process.poll() is None and "error" not in self.result

    def hear(self):
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        last = self.log.read_text().strip().splitlines()[-1:]
        self.result["error"] = last[0] if last else f"it ended with code {self.process.returncode}"
        return {}

    def turn(self):
        """One step. -> what it says of it; {} if it has failed."""
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `hear` finds out why
        return self.hear()

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def check(entrant, said, ours):
    """The first turn: takes down the loss, and how far the gradients are from ours; too far is an error."""
    entrant.result["loss"] = said["loss"]
    if "gradients" not in entrant.job:
        return
    mine, theirs = load_file(ours.job["gradients"]), load_file(entrant.job["gradients"])
    if set(mine) != set(theirs):
        entrant.result["error"] = "no race: it has gradients of other weights than ours"
        return
    differs = max(((mine[name] - theirs[name]).norm() / mine[name].norm()).item() for name in mine)
    entrant.result["differs"] = differs
    if not differs < MOST_DIFFERENCE:
        entrant.result["error"] = f"no race: a gradient differs from ours by {differs:.1e} of its norm"


def given_tokens(model, P, groups, G, R):
    """-> a job of tokens drawn at random: `groups` prompts of P tokens with G completions of R."""
    vocabulary = Qwen3Config.from_pretrained(model).vocab_size
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    job = {"model": model, "completions": G, "max_completion": R, "groups": []}
    for i in range(groups):
        rewards = (torch.arange(G) % (i + 2) == 0).float().tolist()  # they differ, and so do groups
        group = {"prompt": draw(P), "completions": [draw(R) for _ in rewards], "rewards": rewards}
        job["groups"].append(group)
    return job


def prompts_of_recall(model, groups, G, R):
    """-> a job without completions."""
    config = Qwen3Config.from_pretrained(model)
    tokenizer = chat.load_tokenizer(model, config.vocab_size)
    rows = tasks.Source("recall", "bench", 17, 17)
    job = {"model": model, "completions": G, "max_completion": R, "groups": []}
    for row in (rows[i] for i in range(groups)):
        ids = chat.encode_prompt(tokenizer, row, False, config.context_length - R)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        job["groups"].append({"prompt": ids, "text": text, "answer": row["answer"]})
    return job


def race(case, config, out):
    """-> the case with its entrants' results."""
    P, groups, R = CASES[case]
    P, groups, R = config.prompt or P, config.groups or groups, config.length or R
    if case == "step":
        job = prompts_of_recall(config.model, groups, config.completions, R)
    else:
        job = given_tokens(config.model, P, groups, config.completions, R)
    job["turns"] = config.rounds + 1
    names = [name for name in config.entrants if case != "step" or not name.startswith("verl")]
    entrants = []
    bar = tqdm(total=len(names) * (config.rounds + 2), desc=case, unit="turn")
    try:
        for name in names:
            entrants.append(Entrant(name, job, config.python, out, {"OMP_NUM_THREADS": str(config.threads)}))
            bar.update()
        for number in range(config.rounds + 1):
            for entrant in entrants[:: -1 if number % 2 else 1]:
                said = entrant.turn() if entrant.runs else {}
                bar.update()
                if not entrants[0].runs:
                    raise BadInput(f"ours has failed: {entrants[0].result.get('error')}; {entrants[0].log}")
                if said and number == 0:
                    check(entrant, said, entrants[0])
                elif said:
                    entrant.result["seconds"].append(said["seconds"])
                    cpu = min(said["cpu_seconds"], entrant.result.get("cpu_seconds", math.inf))
                    entrant.result |= {"cpu_seconds": cpu}
                    entrant.result |= {key: said[key] for key in ("peak_mib", "tokens")}
    finally:
        bar.close()
        for entrant in entrants:
            entrant.end()
    return {
        "case": case,
        "prompt_tokens": sum(len(group["prompt"]) for group in job["groups"]),
        "groups": len(job["groups"]),
        "completions": config.completions,
        "completion_tokens": R,
        "entrants": [entrant.result for entrant in entrants],
    }


def table(case):
    """The case -> its lines."""
    lines = ["           seconds  over ours  CPU s   MiB above base  whole MiB   tokens  gradients differ"]
    ours = min(case["entrants"][0]["seconds"], default=math.nan)
    for each in case["entrants"]:
        if "error" in each:
            lines.append(f"{each['name']:11} {each['error']}")
            continue
        seconds, above = min(each["seconds"]), each["peak_mib"] - each["base_mib"]
        differs = f"{each['differs']:.0e}" if "differs" in each else "-"
        lines.append(
            f"{each['name']:11}{seconds:7.2f} {seconds / ours:9.1f} {each['cpu_seconds']:7.2f} {above:15.0f} "
            f"{each['peak_mib']:10.0f} {each['tokens']:8,} {differs:>10}"
        )
    return lines


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    if config.entrants[0] != "ours":
        raise BadInput("--entrants must begin with ours, which the others are compared with")
    for name in config.entrants[1:]:
        if not re.fullmatch(r"ours-compile|trl-[1-9]\d*|verl|verl-prefix", name):
            known = "ours, ours-compile, trl-N (a micro-batch of N), verl, verl-prefix"
            raise BadInput(f"--entrants {name}: there are {known}")
    if not all(name.startswith("ours") for name in config.entrants) and not Path(config.python).exists():
        raise BadInput(f"{config.python} is missing: make peers installs TRL and verl there")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.threads)  # for card
    results = {"card": card(Qwen3Config.from_pretrained(config.model)), "threads": config.threads}
    results |= {"rounds": config.rounds, "cases": []}
    print(results["card"])
    for case in config.cases:
        results["cases"].append(race(case, config, out))
        print(case, *table(results["cases"][-1]), sep="\n", flush=True)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(out / "results.json")
