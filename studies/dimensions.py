"""How many dimensions of Q and K does a model need, and which? The perturbation of studies/perturb.py for
many numbers of dimensions, in one engine.

    python -m studies.dimensions runs/smollm2/checkpoint                  # SmolLM2: 1 to 19 of its 64
    python -m studies.dimensions assets/tiny --sets recall short --dimensions 1 3 6 9 --spare 1

In every head of every layer N dimensions of q_proj's and of k_proj's output are held at the global mean, as
studies/perturb.py has it, while vLLM answers greedily. Which N, a cell's name says:

    untouched    none
    top-N        the largest; bottom-N: the smallest
    random-N-i   N at random, in --draws draws
    next-N       the N that follow the --spare largest, which stay free
    spared-N-i   N at random of all but the --spare largest

next and spared say whether the few largest do what top and random do. The sets of questions:

    short        3 facts, and a question about one: about 60 tokens, a short context
    recall       12 facts: the recall task (prompts/tasks.py)
    tracking     6 names, the code of each told twice; the later one is right
    needle       RULER's niah_single_1 at 1,024 tokens (evals/ruler)

A passage is asked about several facts, and vLLM reads it once for all of them; so answers about one passage
are not independent. An answer is right if the reward `exact` (needle: RULER's score) is 1; it has begun right
if what is right comes first, whatever follows, as a model that cannot stop may know the answer. Random
dimensions of one draw are nested: those of a smaller N are among those of a larger one.

Left in --out: CELL/ (an evaluation's own results, from which the same command goes on after a kill),
dimensions.json and dimensions.png. The keys of dimensions.json: settings (all that the scores depend on), and
cells, a list of {name, rule, n (dimensions held in each head), draw, scores: {set: share of right answers},
begun: {set: share of answers begun right}, questions: {set: number}, output: the commonest answer,
output_share}.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import saliency
from base import durable
from base.cli import BadInput, one_line_errors, option, parse
from base.plot import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION, save, subplots
from evals import clamp, stats, subject
from evals.engine import GREEDY, Engine, evaluate
from evals.results import Results
from evals.ruler import sets as ruler
from prompts import chat, rewards, tasks
from studies import magnitudes

NEEDLE, NEEDLE_TOKENS = "niah_single_1", 1024
FACTS = {"short": 3, "recall": 12, "tracking": 12}  # facts told in a passage
SETS = [*FACTS, "needle"]
MAX_TOKENS = 24  # of an answer
COLOURS = {"top": VERMILLION, "bottom": BLUE, "random": GREY, "next": ORANGE, "spared": GREEN}


@dataclass
class Config(magnitudes.Measured):
    sets: list[str] = option(SETS, "sets of questions, see above", SETS)
    dimensions: list[int] = option([19, 6, 2, 12, 4, 1], "numbers N of dimensions, in this order", least=1)
    draws: int = option(3, "draws of random dimensions", least=1, most=100)
    spare: int = option(4, "largest dimensions that next and spared leave free (0: no such cells)", least=0)
    passages: int = option(6, "passages of each set; of needle, each with one question", least=1, most=10**4)
    questions: int = option(6, "questions about a passage, at most its facts", least=1, most=48)
    out: str = option("", "directory of the results (default: runs/dimensions/<checkpoint's name>)")


# ------------------------------------------------------------------------------------------------------ cells


def cells(config):
    """-> [(name, rule, n, draw), ...], what tells most first: the first draw of every N, then the others."""
    result = [("untouched", "untouched", 0, 0)]
    others = ("next", "spared") if config.spare else ()
    for n in config.dimensions:
        for rule in ("top", "bottom", "random", *others):
            drawn = rule in ("random", "spared")
            result.append((f"{rule}-{n}-0" if drawn else f"{rule}-{n}", rule, n, 0))
    for draw in range(1, config.draws):
        for rule in ("random", *others[1:]):
            result += [(f"{rule}-{n}-{draw}", rule, n, draw) for n in config.dimensions]
    return result


def held(measured, means, rule, n, draw, spare):
    """Magnitudes {name: (H, D)} and clamp.Means.values -> the clamp of a cell."""
    if rule == "untouched":
        return clamp.choose(measured, means, 0, rule)
    size, keys = next(iter(measured.values())).size(-1), dict(measured)  # of which the n largest are held
    generator = torch.Generator().manual_seed(draw)
    if rule in ("random", "spared"):
        keys = {name: torch.rand(magnitude.shape, generator=generator) for name, magnitude in keys.items()}
    if rule in ("next", "spared"):
        largest = saliency.select_rows(measured, spare / size)
        keys = {
            name: key.masked_fill(largest[f"{name}.weight"].view_as(key), -torch.inf)
            for name, key in keys.items()
        }
    return clamp.choose(keys, means, n / size, "bottom" if rule == "bottom" else "top")


# -------------------------------------------------------------------------------------------------- questions


def passages(name, config):
    """A set of FACTS -> yields for each passage its text and [(question, answer), ...]."""
    facts = FACTS[name]
    for i in range(config.passages):
        rng = random.Random(f"dimensions {config.seed} {name} {i}")
        if name == "tracking":
            people = rng.sample(tasks.NAMES, facts // 2)
            sentences = tasks.hide(rng, [tasks.fact(rng, p) for p in people for _ in range(2)], 0)
            told = {p: [s for s in sentences if s.startswith(f"The code for {p} is ")] for p in people}
            asked = [(tasks.question(p), told[p][-1]) for p in people[: config.questions]]
            yield " ".join(sentences), asked
        else:
            yield tasks.recall(rng, facts, 0, min(facts, config.questions))


def make_items(config, tokenizer, context):
    """-> the items of all sets, as evals/engine.py has them. Raises BadInput for a context that is too
    small."""
    items, limit = [], context - MAX_TOKENS
    for name in config.sets:
        if name == "needle":
            corpora = ruler.Corpora(None)
            template = chat.render(tokenizer, [{"role": "user", "content": "{task_template}"}], False)
            how = NEEDLE_TOKENS, config.passages, config.seed, tokenizer, template, corpora
            for sample in ruler.generate(NEEDLE, *how):
                ids = ruler.encode(NEEDLE, sample["input"] + sample["answer_prefix"], tokenizer, template)
                items.append((name, f"{name}-{sample['index']}", ids, sample["outputs"]))
        else:
            for i, (text, asked) in enumerate(passages(name, config)):
                for j, (question, answer) in enumerate(asked):
                    row = {"id": f"{name}-{i}-{j}", "prompt": f"{text}\n\n{question}"}
                    items.append((name, row["id"], chat.encode_prompt(tokenizer, row, False, limit), answer))
    keys = "task", "id", "prompt_ids", "expected"
    return [{**dict(zip(keys, item)), "length": 0, "max_tokens": MAX_TOKENS} for item in items]


def score(item, prediction):
    if item["task"] == "needle":
        return {"answer": prediction, "score": float(ruler.score(NEEDLE, prediction, item["expected"]) == 1)}
    right = rewards.exact(prediction, {"answer": item["expected"]})
    return {"answer": prediction, "score": float(right >= 1)}


# ----------------------------------------------------------------------------------------------------- report


def begins_right(record):
    """A sample -> whether its answer begins with the right one, whatever follows; of needles, its score."""
    if record["task"] == "needle":
        return record["score"]
    return float(record["prediction"].strip().startswith(record["expected"]))


def entry(cell, records):
    """A cell and its samples -> its entry in dimensions.json."""
    scores, begun = {}, {}
    for record in records:
        scores.setdefault(record["task"], []).append(record["score"])
        begun.setdefault(record["task"], []).append(begins_right(record))
    [(output, count)] = Counter(record["prediction"] for record in records).most_common(1)
    return {
        **dict(zip(("name", "rule", "n", "draw"), cell)),
        "scores": {name: sum(values) / len(values) for name, values in scores.items()},
        "begun": {name: sum(values) / len(values) for name, values in begun.items()},
        "questions": {name: len(values) for name, values in scores.items()},
        "output": output,
        "output_share": count / len(records),
    }


def report(entries):
    """-> a table as text: a line for each number of dimensions and rule, draws averaged, in per cent."""
    groups = {}
    for each in entries:
        groups.setdefault((each["n"], each["rule"]), []).append(each)
    sets = list(entries[0]["scores"])
    rows = [
        ["held in each head", *sets, *[f"{name}, begun" for name in sets], "draws", "commonest, of the first"]
    ]
    for (n, rule), group in sorted(groups.items()):
        columns = [[each[key][name] for each in group] for key in ("scores", "begun") for name in sets]
        means = [f"{100 * sum(column) / len(column):.0f}" for column in columns]
        said = f"{group[0]['output_share']:.0%} {group[0]['output'][:24]!r}"
        rows.append([f"{rule} {n}" if n else rule, *means, str(len(group)), said])
    return stats.table(rows)


def figure(path, title, entries, size):
    """Right answers, and below them those begun right, against the number of dimensions held, a panel for
    each set -> the PNG `path`."""
    sets = list(entries[0]["scores"])
    drawn, grid = subplots(2, len(sets), figsize=(3.4 * len(sets), 6.4), squeeze=False, sharey=True)
    for key, what, row in zip(("scores", "begun"), ("right", "begun right"), grid):
        for axes, name in zip(row, sets):
            axes.axhline(entries[0][key][name], color=PURPLE, linestyle="--", label="untouched")
            for rule, colour in COLOURS.items():
                points = {}
                for each in entries:
                    if each["rule"] == rule:
                        points.setdefault(each["n"], []).append(each[key][name])
                places = sorted(points)
                means = [sum(points[n]) / len(points[n]) for n in places]
                axes.plot(places, means, "o-", color=colour, label=rule, markersize=3)
            axes.set(title=f"{name}, n = {entries[0]['questions'][name]}", xlabel=f"held, of {size}")
            axes.grid(alpha=0.3)
        row[0].set(ylabel=f"share of answers {what}", ylim=(-0.03, 1.03))
    grid[0, -1].legend(fontsize="small")
    drawn.suptitle(title, parse_math=False)
    save(drawn, path, dpi=90)


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    model_config, prompts, settings = magnitudes.read_prompts(config)
    size, most = model_config.head_dim, max(config.dimensions) + config.spare
    if most > size:
        raise BadInput(f"--dimensions and --spare: {most} of a head's {size} dimensions cannot be held")
    tokenizer = subject.load(config.checkpoint)[1]
    items = make_items(config, tokenizer, model_config.context_length)
    asked = {"sets": config.sets, "passages": config.passages, "questions": config.questions}
    settings |= {**asked, "seed": config.seed, "spare": config.spare, "max_tokens": MAX_TOKENS}
    settings |= {"question_ids": durable.digest(repr([item["prompt_ids"] for item in items]))}
    out = Path(config.out or f"runs/dimensions/{subject.name(config.checkpoint)}")
    lock = durable.claim(out, "dimensions", ["untouched"])
    wanted = {(item["id"], 0): (item["task"], 0) for item in items}
    results = {}
    for cell in cells(config):
        about = settings | dict(zip(("clamp", "rule", "n", "draw"), cell))
        results[cell] = Results(out / cell[0], about, wanted)

    missing = [cell for cell, own in results.items() if len(own.done) < len(wanted)]
    if missing:
        model = magnitudes.load_model(config.checkpoint, model_config)
        with clamp.Means(model) as means:
            measured = magnitudes.average(magnitudes.measure(model, prompts, "proj", config.tokens))
        del model
        context = MAX_TOKENS + max(len(item["prompt_ids"]) for item in items)
        engine = Engine(config.checkpoint, context, rope_scaling=model_config.rope_scaling, clamp={})
        for number, cell in enumerate(missing, 1):
            print(f"{cell[0]}: {number} of {len(missing)} cells", flush=True)
            engine.rollout.clamp(held(measured, means.values, *cell[1:], config.spare))
            options = subject.Options(config.checkpoint)
            evaluate(engine, results[cell], items, options, GREEDY, tokenizer, score)

    entries = [entry(cell, own.read()) for cell, own in results.items()]
    durable.write_json(out / "dimensions.json", {"settings": settings, "cells": entries})
    figure(out / "dimensions.png", f"{subject.name(config.checkpoint)}: dimensions held", entries, size)
    print(f"\n{report(entries)}\n\nresults: {out}/dimensions.json  figure: {out}/dimensions.png")
    if missing:
        engine.close()
