"""The paper's perturbation: which dimensions of Q and K does a model need? Hold some at their mean, then
evaluate.

    python -m studies.perturb assets/tiny               # the recall task, greedy and at temperature 1
    python -m studies.perturb Qwen3-8B --data train.jsonl --yarn 4 \\
        -- eval_longbench.py --yarn 4 --data data.json --sampling paper \\
        -- eval_gsm8k.py --data test.jsonl              # a long and a short context, each on its own
    python -m studies.perturb Qwen3-8B --data train.jsonl \\
        -- .venv/bin/torchrun --nproc-per-node 8 eval_ruler.py

After each -- comes an evaluation of this repository without its checkpoint, --clamp and --out, which are
added. Each evaluation runs under these clamps:

    untouched     nothing is held; the same hooks in the same eager engine
    bottom        the --fraction smallest dimensions of each head's Q and K are held at the global mean
    random        as many random ones, drawn --draws times
    top           the largest

The paper says "clamped to the global mean" and no more. Here a held dimension of q_proj's (k_proj's) output,
before q_norm and RoPE, has one value in every token of prompt and completion: the mean of that layer's q_proj
(k_proj) output over all tokens, heads and dimensions of --prompts prompts. The magnitudes are measured on
these prompts, too; the evaluations score others. After the clamp, q_norm scales a head to unit size, so
dimensions that are not held grow if much was taken away.

Left in --out:

    NAME.safetensors      what is held (evals/clamp.py), for an evaluation's --clamp. NAME is untouched,
                          bottom, random-0, ..., top
    N-EVALUATION/NAME/    an evaluation's own results; N-EVALUATION/NAME.txt: what it printed
    perturbation.json     a list with one entry for each evaluation: command, and rows, one for each NAME:
                          name, score in [0, 1], score_low, score_high (its 95% interval), n (items), kept
                          (score / untouched's); compared with untouched item by item, stats.paired's
                          difference, low, high, p, test; output, the most frequent completion, and
                          output_share, its share of all

The same command goes on where an interrupted one stopped.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from base import durable, interrupt
from base.cli import BadInput, one_line_errors, option, parse
from evals import clamp, stats, subject
from evals.results import different, read_results
from studies import magnitudes

SCRIPTS = {path.name for path in Path(__file__).parent.parent.glob("eval_*.py")}
EVALUATIONS = ["eval_data.py", "eval_data.py --sampling paper --seeds 4"]
# Right answers of Qwen3-8B to LongBench v2's 503 questions.
PAPER = {"untouched": 173, "bottom": 108, "top": 0}


@dataclass
class Config(magnitudes.Measured):
    draws: int = option(1, "sets of random dimensions, each evaluated", least=1, most=1000)
    out: str = option("", "directory of the results (default: runs/perturb/<checkpoint's name>)")


def split_command_line(words):
    """sys.argv's words -> this script's flags, and the words of each evaluation, those after each --."""
    own, evaluations = [], []
    for word in words:
        if word == "--":
            evaluations.append([])
        else:
            (evaluations[-1] if evaluations else own).append(word)
    return own, evaluations


def script_of(command):
    """The words of an evaluation -> its script, one of SCRIPTS. Raises BadInput if there is none."""
    script = next((word for word in command if word.endswith(".py")), None)
    if script not in SCRIPTS:
        known = ", ".join(sorted(SCRIPTS))
        raise BadInput(f"-- {shlex.join(command)}: write an evaluation after --, one of {known}")
    return script


def clamp_exists(path, model_config, about):
    """Whether an interrupted run left this clamp. Raises BadInput for one that was chosen in another way."""
    if not path.exists():
        return False
    found = clamp.load(path, model_config)[1]
    found.pop("values")
    if difference := different(found, about):
        problem = f"{path.parent} holds clamps of other settings: {difference}"
        raise BadInput(f"{problem}; choose another --out or remove it")
    return True


def evaluate(command, script, checkpoint, clamp_file, place):
    """Run one evaluation under one clamp, or let it finish -> its finished samples, a list of dict. Its
    results are in the directory `place`. Raises BadInput if it fails."""
    after = command.index(script) + 1
    words = [*command[:after], checkpoint, *command[after:]]
    words += ["--clamp", str(clamp_file), "--out", str(place)]
    start = [sys.executable] if after == 1 else []  # else the command says how to start it: torchrun ...
    print(f"{place.name}: {shlex.join(words)}", file=sys.stderr)
    with open(f"{place}.txt", "w") as text:
        if code := interrupt.run([*start, *words], stdout=text).returncode:
            raise BadInput(f"{script} with {place.name} ended with exit code {code}; its message is above")
    return read_results(place / "results.jsonl")


def row(name, records, untouched):
    """The samples of one clamp and of `untouched` -> the clamp's row in perturbation.json."""
    summary, whole = stats.summarize(records), stats.summarize(untouched)["score"]
    before, after = stats.by_item(untouched), stats.by_item(records)
    pair = stats.paired([before[item] for item in before], [after[item] for item in before])
    compared = {key: pair[key] for key in ("difference", "low", "high", "p", "test")}
    kept = summary["score"] / whole if whole else None
    [(output, count)] = Counter(record["prediction"] for record in records).most_common(1)
    said = {"output": output, "output_share": count / len(records)}
    bounds = {f"score_{key}": summary.pop(key) for key in ("low", "high")}
    return {"name": name, **summary, **bounds, "kept": kept, **compared, **said}


def cells(row):
    """A row of perturbation.json -> its cells in the table that is printed."""
    score = {"score": row["score"], "low": row["score_low"], "high": row["score_high"]}
    kept = "-" if row["kept"] is None else f"{100 * row['kept']:.0f}%"
    compared = ["-", "-", "-"]
    if row["name"] != "untouched":
        few = row["low"] is None
        interval = "too few samples" if few else f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
        compared = [f"{100 * row['difference']:+.1f}", interval, f"{row['p']:.2g}"]
    return [row["name"], stats.shown(stats.percent(score), 1), kept, *compared]


if __name__ == "__main__":
    one_line_errors()
    words, commands = split_command_line(sys.argv[1:])
    config = parse(Config, __doc__, words)
    commands = commands or [shlex.split(line) for line in EVALUATIONS]
    scripts = [script_of(command) for command in commands]
    model_config, prompts, settings = magnitudes.read_prompts(config)
    out = Path(config.out or f"runs/perturb/{subject.name(config.checkpoint)}")
    lock = durable.claim(out, "perturbation", ["untouched.safetensors"])

    # The clamps: {name: how it is chosen}; those that an interrupted run left are kept.
    abouts = {}
    for name in ["untouched", "bottom", *[f"random-{draw}" for draw in range(config.draws)], "top"]:
        rule, _, draw = name.partition("-")
        about = {"rule": rule, "fraction": config.fraction, "draw": int(draw or 0), "site": "proj"}
        abouts[name] = about | settings
    files = {name: out / f"{name}.safetensors" for name in abouts}
    missing = [name for name in abouts if not clamp_exists(files[name], model_config, abouts[name])]
    if missing:
        model = magnitudes.load_model(config.checkpoint, model_config)
        with clamp.Means(model) as means:
            measured = magnitudes.average(magnitudes.measure(model, prompts, "proj", config.tokens))
        for name in missing:
            rule, generator = abouts[name]["rule"], torch.Generator().manual_seed(abouts[name]["draw"])
            values = clamp.choose(measured, means.values, config.fraction, rule, generator)
            clamp.save(files[name], values, abouts[name])
        del model
        torch.cuda.empty_cache()  # the evaluations are other processes

    # Every evaluation under every clamp.
    entries = []
    for number, (command, script) in enumerate(zip(commands, scripts, strict=True), 1):
        place = out / f"{number}-{Path(script).stem.removeprefix('eval_')}"
        place.mkdir(exist_ok=True)
        records = {}
        for name, file in files.items():
            records[name] = evaluate(command, script, config.checkpoint, file, place / name)
        rows = [row(name, records[name], records["untouched"]) for name in records]
        entries.append({"command": shlex.join(command), "rows": rows})
    durable.write_json(out / "perturbation.json", entries)

    # The report.
    kept, size = magnitudes.kept(config.fraction, model_config.head_dim), model_config.head_dim
    print(f"{config.checkpoint}: {kept} of {size} dimensions of each head's Q and K held at the global mean")
    for entry in entries:
        head = ["", "score", "of untouched", "difference", "95% interval", "p"]
        table = stats.table([head, *map(cells, entry["rows"])])
        print(f"\n{entry['command']}: {entry['rows'][0]['n']} items; {stats.legend(table)}\n{table}")
        for line in entry["rows"]:
            share, output = line["output_share"], line["output"][:60]
            print(f"  {line['name']}: {share:.0%} of the completions are {output!r}")
    print("\nThe paper's, not ours: Qwen3-8B's right answers on LongBench v2, of 503")
    shares = [[name, str(right), f"{right / PAPER['untouched']:.0%}"] for name, right in PAPER.items()]
    print(stats.table(shares))
    print(f"\nresults: {out}/perturbation.json")
