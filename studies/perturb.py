"""The paper's perturbation: which dimensions of Q and K does a model need? Hold some at their mean, and
evaluate.

    python -m studies.perturb assets/tiny                         # the recall task, greedy and at temperature 1
    python -m studies.perturb Qwen3-8B --data train.jsonl --yarn 4 -- eval_longbench.py --yarn 4 --data
    data.json --sampling paper \\
        -- eval_gsm8k.py --data test.jsonl                # a long and a short context, each on its own
    python -m studies.perturb Qwen3-8B --data train.jsonl -- .venv/bin/torchrun --nproc-per-node 8
    eval_ruler.py

After each -- stands an evaluation of this repository without its checkpoint, --clamp and --out, which are
added. Each runs
    untouched     with the same hooks in the same eager engine, which hold nothing
    bottom        the --fraction smallest dimensions of each head's Q and K held at the global mean
    random        as many random ones, --draws times
    top           the largest
The paper says "clamped to the global mean" and no more. Here a held dimension of the output of q_proj
(k_proj), before q_norm and RoPE, has in every token of prompt and completion the mean of that layer's q_proj
(k_proj) output over all tokens, heads and dimensions of --prompts prompts, on which the magnitudes are
measured too; they are not those that are scored. q_norm scales a head to unit size after the clamp, so what
is not held grows where much was taken away.

Left in --out:
    NAME.safetensors      what is held (clamp.py), for an evaluation's --clamp. NAME: untouched, bottom, random-0, ..., top
    N-EVALUATION/NAME/    an evaluation's own results; N-EVALUATION/NAME.txt, what it printed
    perturbation.json     a list, one entry an evaluation: command, and rows, one a NAME: name, score and stderr in [0, 1],
                          n (items), kept (score / untouched's) and, against untouched, item by item,
                          stats.paired's difference, low, high, p, test; output, the commonest completion,
                          which is output_share of all
The same command goes on where an interrupted one stopped.
"""

import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from base import durable
from base.cli import BadInput, one_line_errors, option, parse
from evals import clamp, stats, subject
from evals.results import different, lock_results, read_results
from studies import magnitudes

SCRIPTS = {path.name for path in Path(__file__).parent.parent.glob("eval_*.py")}
EVALUATIONS = ["eval_task.py", "eval_task.py --sampling paper --seeds 4"]
PAPER = {
    "untouched": 173,
    "bottom": 108,
    "top": 0,
}  # right answers of Qwen3-8B to LongBench v2's 503 questions


@dataclass
class Config(magnitudes.Measured):
    draws: int = option(1, "sets of random dimensions, each evaluated", least=1)
    out: str = option("", "directory of the results (default: runs/perturb/<checkpoint's name>)")


one_line_errors()
words, given = [], []  # this script's flags; each evaluation's words
for word in sys.argv[1:]:
    if word == "--":
        given.append([])
    else:
        (given[-1] if given else words).append(word)
config = parse(Config, __doc__, words)
commands = given or [shlex.split(line) for line in EVALUATIONS]
scripts = [[word for word in command if word.endswith(".py")][:1] for command in commands]
for command, script in zip(commands, scripts, strict=True):
    if not script or script[0] not in SCRIPTS:
        raise BadInput(
            f"-- {shlex.join(command)}: write an evaluation after --, one of {', '.join(sorted(SCRIPTS))}"
        )

# ----------------------------------------------------------------------------------------------------- clamps

model_config, prompts, settings = magnitudes.read_prompts(config)
out = Path(config.out or f"runs/perturb/{subject.name(config.checkpoint)}")
lock = lock_results(out, "untouched.safetensors", "perturbation")
names = ["untouched", "bottom", *[f"random-{draw}" for draw in range(config.draws)], "top"]
abouts = {}  # how each clamp is chosen
for name in names:
    rule, _, draw = name.partition("-")
    abouts[name] = {
        "rule": rule,
        "fraction": config.fraction,
        "draw": int(draw or 0),
        "site": "proj",
        **settings,
    }


def made(name):
    """Is this clamp there, from an interrupted run?"""
    if not (out / f"{name}.safetensors").exists():
        return False
    about = clamp.load(out / f"{name}.safetensors", model_config)[1]
    about.pop("values")
    if difference := different(about, abouts[name]):
        raise BadInput(
            f"{out} holds clamps of other settings: {difference}; choose another --out or remove it"
        )
    return True


if missing := [name for name in names if not made(name)]:
    model = magnitudes.load_model(config.checkpoint, model_config)
    with clamp.Means(model) as means:
        measured = magnitudes.average(magnitudes.measure(model, prompts, "proj", config.tokens))
    for name in missing:
        generator = torch.Generator().manual_seed(abouts[name]["draw"])
        values = clamp.choose(measured, means.values, config.fraction, abouts[name]["rule"], generator)
        clamp.save(out / f"{name}.safetensors", values, abouts[name])
    del model
    torch.cuda.empty_cache()  # the evaluations are other processes

# ------------------------------------------------------------------------------------------------ evaluations


def evaluate(command, script, place, name):
    """Run one evaluation under one clamp -> its finished samples."""
    after = command.index(script) + 1
    words = [*command[:after], config.checkpoint, *command[after:]]
    words += ["--clamp", str(out / f"{name}.safetensors"), "--out", str(place / name)]
    start = [sys.executable] if after == 1 else []
    print(f"{name}: {shlex.join(words)}", file=sys.stderr)
    with open(place / f"{name}.txt", "w") as text:
        if code := subprocess.run([*start, *words], stdout=text).returncode:
            raise BadInput(f"{script} with {name} ended with exit code {code}; its message is above")
    return read_results(place / name / "results.jsonl")


def row(name, records, untouched):
    """One clamp's line of an evaluation's table."""
    summary, pairs = stats.summarize(records), [stats.by_item(untouched), stats.by_item(records)]
    pair = stats.paired(*[[scores[item] for item in pairs[0]] for scores in pairs])
    whole = stats.summarize(untouched)["score"]
    compared = {key: pair[key] for key in ("difference", "low", "high", "p", "test")}
    kept = summary["score"] / whole if whole else None
    [(output, count)] = Counter(record["prediction"] for record in records).most_common(1)
    said = {"output": output, "output_share": count / len(records)}
    return {"name": name, **summary, "kept": kept, **compared, **said}


def shown(row):
    error = "" if row["stderr"] is None else f" ±{100 * row['stderr']:.1f}"
    kept = "-" if row["kept"] is None else f"{100 * row['kept']:.0f}%"
    difference = [
        f"{100 * row['difference']:+.1f}",
        f"{100 * row['low']:+.1f} {100 * row['high']:+.1f}",
        f"{row['p']:.2g}",
    ]
    return [
        row["name"],
        f"{100 * row['score']:.1f}{error}",
        kept,
        *(difference if row["name"] != "untouched" else "---"),
    ]


entries = []
for number, (command, [script]) in enumerate(zip(commands, scripts, strict=True), 1):
    place = out / f"{number}-{Path(script).stem.removeprefix('eval_')}"
    place.mkdir(exist_ok=True)
    records = {name: evaluate(command, script, place, name) for name in names}
    rows = [row(name, records[name], records["untouched"]) for name in names]
    entries.append({"command": shlex.join(command), "rows": rows})
durable.write_json(out / "perturbation.json", entries)

kept = magnitudes.kept(config.fraction, model_config.head_dim)
print(
    f"{config.checkpoint}: {kept} of {model_config.head_dim} dimensions of each head's Q and K held at the global mean"
)
for entry in entries:
    table = [["", "score", "of untouched", "difference", "95% interval", "p"], *map(shown, entry["rows"])]
    print(f"\n{entry['command']}: {entry['rows'][0]['n']} items, ± standard error\n{stats.table(table)}")
    for line in entry["rows"]:
        print(f"  {line['name']}: {line['output_share']:.0%} of the completions are {line['output'][:60]!r}")
print("\nThe paper's, not ours: Qwen3-8B's right answers on LongBench v2, of 503")
print(
    stats.table(
        [[name, str(right), f"{100 * right / PAPER['untouched']:.0f}%"] for name, right in PAPER.items()]
    )
)
print(f"\nresults: {out}/perturbation.json")
