"""RULER of a checkpoint: 13 synthetic long-context tasks at up to six lengths, scored as its authors do.

    python eval_ruler.py Qwen3-8B --yarn 4 --data-dir data/ruler                # 39,000 samples, 4K to 128K
    torchrun --nproc-per-node 8 eval_ruler.py Qwen3-8B --yarn 4 --data-dir data/ruler    # on eight engines
    python eval_ruler.py assets/tiny --lengths 2304 3584 --samples 10           # a laptop
    python eval_ruler.py runs/NAME/checkpoint --lengths 2304 3584 --samples 10  # the same after train.py
    python eval_ruler.py --compare runs/ruler/tiny runs/ruler/NAME              # paired, with p-values

Samples are made by evals/ruler (docs/ruler.md: what equals RULER's own, which files it takes). Each is
generated once, kept in --cache, and read by vLLM as token ids. The modes:
    chat      the checkpoint's chat template without thinking, the answer prefix begins the assistant's turn;
              greedy, RULER's budgets
    thinking  the chat template with thinking, no answer prefix; temperature 0.6, top_p 0.95, top_k 20;
              --thinking-budget more tokens; what follows the last </think> is scored, and nothing if thinking
              did not end
    base      no template, the answer prefix ends the prompt; greedy, RULER's budgets
A cell of the table is RULER's score: per cent of the answers found in the text (qa: any of them), two
decimals, with a 95% interval. A length's average is the mean of its tasks; Avg is the mean
of the lengths; wAvg(inc) weighs the shortest length 1, the next 2 and so on, wAvg(dec) the other way round.
Averages without all 13 tasks or all six lengths are not RULER's scores, and the report says so.

Left in --out: settings.json, results.jsonl (a line as each sample ends; answer lists what was found of what
was expected, niah tasks add depths, see docs/ruler.md), results.md, results.json, heatmap.png, report.html
and, with niah tasks, depth.png: needles found, by depth and length. The same command goes on where an
interrupted one stopped, on any number of ranks.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import sys
from dataclasses import dataclass
from functools import partial

from base import durable, plot, processes
from base.cli import BadInput, one_line_errors, option, parse
from core import hub
from evals import html, stats, subject
from evals.engine import GREEDY, THINKING, complete, sampling_text
from evals.results import Results
from evals.ruler import depth
from evals.ruler import sets as ruler
from prompts import chat

# mode -> (answer prefix in the assistant's turn, sampling)
MODES = {"chat": (True, GREEDY), "thinking": (False, THINKING), "base": (True, GREEDY)}
LENGTHS = [4096, 8192, 16384, 32768, 65536, 131072]


@dataclass
class Config(subject.Options):
    mode: str = option(
        "chat", "chat, thinking or base: template, sampling and budgets, see above", list(MODES)
    )
    lengths: list[int] = option(LENGTHS, "tokens of prompt and answer together", least=1)
    tasks: list[str] = option([], "names of tasks (default: all 13, less those whose files are missing)")
    samples: int = option(500, "samples of each task at each length, the first", least=1, most=10**6)
    seed: int = option(42, "seed of the samples; RULER's is 42", least=0)
    yarn: float = option(0.0, subject.YARN_HELP, least=0, most=1e6)
    thinking_budget: int = option(
        8192, "thinking: tokens a completion may have beyond RULER's budget", least=1
    )
    data_dir: str = option(
        "", "directory with RULER's data files, see docs/ruler.md (default: none; no qa, essays generated)"
    )
    cache: str = option("runs/ruler-cache", "directory where samples are kept")
    workers: int = option(0, "processes that make samples (0: one per core)", least=0, most=1024)


one_line_errors()
config = parse(Config, __doc__)
if config.compare:
    print(stats.compare(config.compare))
    sys.exit()

# ------------------------------------------------------------------------------------------ what can be asked

subject.check_options(config, "python eval_ruler.py CHECKPOINT, its directory before lists like --lengths")
if unknown := [name for name in config.tasks if name not in ruler.TASKS]:
    raise BadInput(f"--tasks: {unknown[0]!r} is not a RULER task; they are {', '.join(ruler.TASKS)}")
config.checkpoint = hub.local(config.checkpoint)
model_config, tokenizer, trained = subject.load(config.checkpoint, config.yarn)
clamp, clamp_about = subject.load_clamp(config.clamp, model_config, config.tensor_parallel)
answer_prefix, sampling = MODES[config.mode]
subject.check_seeds(config, sampling, "--mode thinking")
thinking, template = config.mode == "thinking", "{task_template}"
if config.mode != "base":
    template = chat.render(tokenizer, [{"role": "user", "content": template}], thinking)
budget = config.thinking_budget if thinking else 0
lengths = sorted(set(config.lengths))
context, validated = model_config.context_length, subject.YARN_VALIDATED * trained
if beyond := [length for length in lengths if length + budget > context]:
    limits, ways = {"": context}, []  # flags to add: the context with them
    if context < validated < lengths[-1] + budget:
        limits[f" --yarn {subject.YARN_VALIDATED}"] = validated
    for flag, limit in limits.items():
        fitting = " ".join(str(length) for length in lengths if length + budget <= limit)
        if fitting:
            ways.append(f"--lengths {fitting}{flag} (up to {limit - budget})")
        elif limit > budget:
            ways.append(f"up to {limit - budget}{flag}")
    asked = " ".join(map(str, beyond)) + (f" with --thinking-budget {budget}" if thinking else "")
    without = f"without that: {', or '.join(ways)}" if ways else "or lower --thinking-budget"
    raise BadInput(
        f"--lengths {asked}: {config.checkpoint} has a context of {context} tokens; "
        f"{subject.yarn_for(lengths[-1] + budget, trained)}; {without}"
    )

# ---------------------------------------------------------------------------------------------------- samples


def prepare():
    """-> tasks, {task left out: why}, where essays come from, {(task, length): file of its samples}."""
    corpora = ruler.Corpora(config.data_dir or None)
    asked = config.tasks or list(ruler.TASKS)
    blocked = corpora.blocked([ruler.TASKS[name] for name in asked], lengths)
    for name, reason in blocked.items():
        if config.tasks:
            raise BadInput(f"--tasks {name}: {reason}")
        print(f"warning: {name} is left out: {reason}", file=sys.stderr)
    tasks = [name for name in ruler.TASKS if name in asked and name not in blocked]
    paths = ruler.build(
        *(config.cache, tasks, lengths, config.samples, config.seed, config.checkpoint, template, corpora),
        workers=config.workers or None,
        answer_prefix=answer_prefix,
    )
    return tasks, blocked, f"{corpora.essay_source}; sentences by {corpora.sentence_splitter}", paths


tasks, left_out, essays, paths = processes.on_rank_0(prepare)
settings = {
    "benchmark": "RULER",
    **subject.settings(config.checkpoint, model_config, clamp_about),
    "mode": config.mode,
    "template": template,
    "answer_prefix": answer_prefix,
    "sampling": sampling,
    "thinking_budget": budget,
    "tasks": tasks,
    "lengths": lengths,
    "samples": config.samples,
    "seed": config.seed,
    "seeds": config.seeds,
    "essays": essays,
    # The names of the sets hold hashes of all that they are made from: generator, tokenizer, data files,
    # seed.
    "prompts": durable.digest(" ".join(sorted(path.name for path in paths.values()))),
}
seeds = range(config.seeds)
expected = {(f"{t}-{n}-{i}", s): (t, n) for t, n in paths for i in range(config.samples) for s in seeds}
results = Results(subject.results_directory(config, "ruler"), settings, expected)


def encode(task, text):
    return ruler.encode(task, text, tokenizer, template)


def items():
    """The longest first: what does not fit in memory shows at once, and the ranks end together."""
    for (task, length), path in sorted(paths.items(), key=lambda entry: -entry[0][1]):
        for record in ruler.read(path, config.samples):
            yield {
                "id": f"{task}-{length}-{record['index']}",
                "task": task,
                "length": length,
                "prompt_ids": partial(encode, task, record["input"] + record["answer_prefix"]),
                "max_tokens": ruler.TASKS[task].tokens_to_generate + budget,
                "expected": record["outputs"],
                "depths": depth.depths(task, record["input"], record["outputs"]),
            }


def score(item, prediction):
    text = chat.answer_text(prediction, True) if thinking else prediction
    answer = ruler.found(text, item["expected"])
    more = {"depths": item["depths"]} if item["depths"] else {}
    return {"answer": answer, "score": ruler.score(item["task"], text, item["expected"]), **more}


# ------------------------------------------------------------------------------------------------ completions

longest = lengths[-1] + budget
complete(config, model_config, clamp, longest, results, items(), sampling, tokenizer, score)
if processes.rank_and_world()[0]:
    sys.exit()

# ----------------------------------------------------------------------------------------------------- report

records = results.read()


def summarize(records):
    """-> {(task, length): {"score", "low", "high", "n"} in per cent}; RULER rounds a score here, and averages
    what it rounded."""
    groups = {key: [] for key in paths}
    for record in records:
        groups[record["task"], record["length"]].append(record)
    cells = {key: stats.percent(stats.summarize(group)) for key, group in groups.items()}
    return {key: {**cell, "score": round(cell["score"], 2)} for key, cell in cells.items()}


def averages(cells):
    """-> {length: its average over tasks}, {"Avg": ..., "wAvg(inc)": ..., "wAvg(dec)": ...}"""
    by_length = {n: stats.weighted_mean([cells[t, n] for t in tasks], [1] * len(tasks)) for n in lengths}
    up = range(1, len(lengths) + 1)
    weights = {"Avg": [1] * len(up), "wAvg(inc)": up, "wAvg(dec)": up[::-1]}
    return by_length, {name: stats.weighted_mean(by_length.values(), w) for name, w in weights.items()}


cells = summarize(records)
by_length, overall = averages(cells)
per_seed = [averages(summarize([r for r in records if r["seed"] == s]))[1]["Avg"]["score"] for s in seeds]
complete_set = len(tasks) == len(ruler.TASKS) and lengths == LENGTHS
finished = stats.finished_share(records)
completion_tokens = sum(r["completion_tokens"] for r in records) / len(records)

table = [["task", *map(str, lengths)]]
table += [[task, *[stats.shown(cells[task, length], 2) for length in lengths]] for task in tasks]
table += [[f"average of {len(tasks)}", *[stats.shown(by_length[length], 2) for length in lengths]]]
table = stats.markdown(table)
model, name = subject.described(config.checkpoint, clamp_about), subject.name(config.checkpoint)
thinking_text = f", thinking budget {budget} tokens" if thinking else ""
text = [
    f"RULER of {model}, {config.samples} samples a cell",
    "",
    f"- mode {config.mode}: {sampling_text(sampling)}{thinking_text}",
    f"- RoPE scaling: {model_config.rope_scaling or 'none'}; essays: {essays}",
    f"- {stats.legend(table)}",
    *("", table, ""),
    "- " + "; ".join(f"{key} {stats.shown(value, 2)}" for key, value in overall.items()),
    f"- {finished:.1%} of the completions ended by themselves; {completion_tokens:.1f} tokens on average",
]
if config.seeds > 1:
    text.append("- Avg by seed: " + ", ".join(f"{value:.2f}" for value in per_seed))
if not complete_set:
    known = len(set(lengths) & set(LENGTHS))
    text.append(f"- Not RULER's average: {len(tasks)} of 13 tasks, {known} of its 6 lengths.")
text += [f"- left out: {task}: {reason}" for task, reason in left_out.items()]

# -------------------------------------------------------------------------------------------- what is left

needles = depth.by_depth(records)
report = {
    "complete": complete_set,
    "left_out": left_out,
    "scores": {task: {length: cells[task, length] for length in lengths} for task in tasks},
    "averages": {"tasks": len(tasks), "by_length": by_length, **overall, "Avg_by_seed": per_seed},
    "needles": [{"depth": where, "length": n, **needles[where, n]} for where, n in sorted(needles)],
    "finished": finished,
    "completion_tokens": completion_tokens,
}
incomplete = "" if complete_set else " (incomplete)"
title = f"RULER, {name}, {config.mode}: Avg {overall['Avg']['score']:.2f}{incomplete}"
plot.score_heatmap(results.out / "heatmap.png", title, tasks, lengths, cells)
if needles:
    title = f"needles found, {name}, {config.mode}"
    label = "depth of the needle, %"
    plot.score_heatmap(results.out / "depth.png", title, depth.CLASSES, lengths, needles, label)
results.write_report(config.tensor_parallel, report, text)
print(f"figures: {results.out}/*.png")
print(f"report: {html.write(results, records)}")
