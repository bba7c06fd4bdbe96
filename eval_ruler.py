"""RULER of a checkpoint: 13 synthetic long-context tasks at up to six lengths, scored as its authors do.

    python eval_ruler.py Qwen3-8B --yarn 4 --data-dir data/ruler                    # 39,000 samples, 4K to 128K
    torchrun --nproc-per-node 8 eval_ruler.py Qwen3-8B --yarn 4 --data-dir data/ruler   # dealt to eight engines
    python eval_ruler.py assets/tiny --lengths 2304 3584 --samples 10               # a laptop
    python eval_ruler.py runs/NAME/checkpoint --lengths 2304 3584 --samples 10      # the same after train.py
    python eval_ruler.py --compare runs/ruler/tiny runs/ruler/NAME                  # paired, with p-values

Samples are made by ruler.py (docs/ruler.md: what equals RULER's own, which files it takes). Each is generated
once, kept in --cache, and read by vLLM as token ids. The presets:
    chat      Qwen3's template without thinking, the answer prefix begins the assistant's turn; greedy, RULER's budgets
    thinking  Qwen3's template, no answer prefix; temperature 0.6, top_p 0.95, top_k 20; --thinking-budget more tokens;
              what follows the last </think> is scored, and nothing if thinking did not end
    base      no template, the answer prefix ends the prompt; greedy, RULER's budgets
A cell of the table is RULER's score: per cent of the answers found in the text (qa: any of them), two
decimals, with the standard error over samples. A length's average is the mean of its tasks; Avg the mean of
the lengths; wAvg(inc) weighs the shortest 1, the next 2 and so on, wAvg(dec) the other way round. Averages
without all 13 tasks or all six lengths are no RULER scores and say so.

Left in --out: settings.json, results.jsonl (a line as each sample ends), results.json, heatmap.png. The same
command goes on where an interrupted one stopped, on any number of ranks.
"""

import hashlib
import math
import sys
from dataclasses import dataclass

from base import durable, plot, processes
from base.cli import BadInput, one_line_errors, option, parse
from evals import stats, subject
from evals.engine import GREEDY, THINKING, Engine, evaluate
from evals.results import Results, environment
from evals.ruler import sets as ruler
from prompts import chat

# mode -> (template, answer prefix in the assistant's turn, sampling)
MODES = {
    "chat": ("qwen3", True, GREEDY),
    "thinking": ("qwen3-thinking", False, THINKING),
    "base": ("base", True, GREEDY),
}
LENGTHS = [4096, 8192, 16384, 32768, 65536, 131072]
MAY_DIFFER = (
    "checkpoint",
    "weights",
    "rope_scaling",
    "clamp",
    "samples",
    "seeds",
)  # between the two of --compare


@dataclass
class Config:
    checkpoint: str = option("", "directory: config.json, safetensors, tokenizer.json", positional=True)
    mode: str = option(
        "chat", "chat, thinking or base: template, sampling and budgets, see above", list(MODES)
    )
    lengths: list[int] = option(LENGTHS, "tokens of prompt and answer together", least=1)
    tasks: list[str] = option([], "names of tasks (default: all 13, less those whose files are missing)")
    samples: int = option(500, "samples of each task at each length", least=1, most=10**6)
    seed: int = option(42, "seed of the samples; RULER's is 42", least=0)
    seeds: int = option(
        1, "thinking: completions of each sample, with sampling seeds 0, 1, ...", least=1, most=1000
    )
    yarn: float = option(
        0.0, "YaRN factor instead of what config.json says (0: what it says)", least=0, most=1e6
    )
    thinking_budget: int = option(
        8192, "thinking: tokens a completion may have beyond RULER's budget", least=1
    )
    data_dir: str = option(
        "", "directory with RULER's data files, see docs/ruler.md (default: none; no qa, essays generated)"
    )
    cache: str = option("runs/ruler-cache", "directory where samples are kept")
    workers: int = option(0, "processes that make samples (0: one a core)", least=0, most=1024)
    out: str = option("", "directory of the results (default: runs/ruler/<checkpoint's name>)")
    tensor_parallel: int = option(1, "ranks that share one vLLM engine", least=1)
    vllm_share: float = option(0.9, "share of GPU memory for vLLM", above=0, most=1)
    clamp: str = option("", subject.CLAMP_HELP)
    compare: list[str] = option(
        [], "two results.jsonl or their directories: compare them, evaluate nothing (default: none)"
    )


one_line_errors()
config = parse(Config, __doc__)
if config.compare:
    print(stats.compare(config.compare, MAY_DIFFER))
    sys.exit()

# --------------------------------------------------------------------------------------------------- what can be asked

if not config.checkpoint:
    raise BadInput(
        "no checkpoint is given: python eval_ruler.py CHECKPOINT, its directory before lists like --lengths"
    )
if unknown := [name for name in config.tasks if name not in ruler.TASKS]:
    raise BadInput(f"--tasks: {unknown[0]!r} is not a RULER task; they are {', '.join(ruler.TASKS)}")
model_config, tokenizer, trained = subject.load(config.checkpoint, config.yarn)

template, answer_prefix, sampling = MODES[config.mode]
thinking = config.mode == "thinking"
budget = config.thinking_budget if thinking else 0
lengths = sorted(set(config.lengths))
if config.seeds > 1 and not thinking:
    raise BadInput(f"--seeds {config.seeds} needs --mode thinking: greedy completions are all the same")
subject.check_ranks(config.tensor_parallel)
context, validated = model_config.context_length, subject.YARN_VALIDATED * trained
if beyond := [length for length in lengths if length + budget > context]:
    ways, fits = {"": context}, []
    if context < validated < lengths[-1] + budget:
        ways[f" --yarn {subject.YARN_VALIDATED}"] = validated
    for flag, most in ways.items():
        if most > budget:
            fitting = " ".join(str(length) for length in lengths if length + budget <= most)
            fits.append(
                f"--lengths {fitting}{flag} (up to {most - budget})"
                if fitting
                else f"up to {most - budget}{flag}"
            )
    raise BadInput(
        f"--lengths {' '.join(map(str, beyond))}{f' with --thinking-budget {budget}' if thinking else ''}: "
        f"{config.checkpoint} has a context of {context} tokens; {subject.yarn_for(lengths[-1] + budget, trained)}; "
        + (f"without that: {', or '.join(fits)}" if fits else "or lower --thinking-budget")
    )
held, clamped = subject.load_clamp(config.clamp, model_config, config.tensor_parallel)

# ------------------------------------------------------------------------------------------------------------ samples


def prepare():
    """-> tasks, {task left out: why}, where essays come from, {(task, length): its samples}."""
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
    **subject.settings(config.checkpoint, model_config, clamped),
    "mode": config.mode,
    "template": ruler.TEMPLATES[template],
    "answer_prefix": answer_prefix,
    "sampling": sampling,
    "thinking_budget": budget,
    "tasks": tasks,
    "lengths": lengths,
    "samples": config.samples,
    "seed": config.seed,
    "seeds": config.seeds,
    "essays": essays,
    # The sets' names carry hashes of all that they are made from: generator, tokenizer, data files, seed.
    "prompts": hashlib.sha256(" ".join(sorted(path.name for path in paths.values())).encode()).hexdigest()[
        :16
    ],
}
name = subject.name(config.checkpoint)
seeds = range(config.seeds)
expected = {(f"{t}-{n}-{i}", s): (t, n) for t, n in paths for i in range(config.samples) for s in seeds}
results = Results(config.out or f"runs/ruler/{name}", settings, expected)


def items():
    """The longest first: what does not fit in memory shows at once, and the ranks end together."""
    for (task, length), path in sorted(paths.items(), key=lambda entry: -entry[0][1]):
        for record in ruler.read(path, config.samples):
            text = record["input"] + record["answer_prefix"]
            yield {
                "id": f"{task}-{length}-{record['index']}",
                "task": task,
                "length": length,
                "prompt_ids": lambda task=task, text=text: ruler.encode(
                    task, text, tokenizer, ruler.TEMPLATES[template]
                ),
                "max_tokens": ruler.TASKS[task].tokens_to_generate + budget,
                "expected": record["outputs"],
            }


def score(item, prediction):
    return ruler.score(
        item["task"], chat.answer_text(prediction, True) if thinking else prediction, item["expected"]
    )


# --------------------------------------------------------------------------------------------------------- completions

total = len(paths) * config.samples
if len(results.done) < total * config.seeds:
    engine = Engine(
        *(
            config.checkpoint,
            lengths[-1] + budget,
            config.tensor_parallel,
            model_config.rope_scaling,
            config.vllm_share,
        ),
        clamp=held,
    )
    evaluate(
        engine, results, items(), total, config.seeds, sampling, chat.stop_ids(tokenizer), tokenizer, score
    )
    engine.close()
if processes.rank_and_world()[0]:
    sys.exit()

# -------------------------------------------------------------------------------------------------------------- report

records = results.read()
cells, errors, found = {}, {}, {}  # (task, length) -> per cent, its standard error, samples
for task, length in paths:
    summary = stats.summarize([r for r in records if (r["task"], r["length"]) == (task, length)])
    cells[task, length] = round(100 * summary["score"], 2)  # RULER rounds here, and averages what it rounded
    errors[task, length] = None if summary["stderr"] is None else 100 * summary["stderr"]
    found[task, length] = summary["n"]


def average(values, deviations, weights):
    """Weighted mean of independent values and its standard error, None if one is unknown."""
    mean = sum(w * v for w, v in zip(weights, values)) / sum(weights)
    if None in deviations:
        return {"score": mean, "stderr": None}
    return {"score": mean, "stderr": math.hypot(*[w * e for w, e in zip(weights, deviations)]) / sum(weights)}


def averages(cells, errors):
    rows = {
        n: average([cells[t, n] for t in tasks], [errors[t, n] for t in tasks], [1] * len(tasks))
        for n in lengths
    }
    columns = [row["score"] for row in rows.values()], [row["stderr"] for row in rows.values()]
    up = range(1, len(lengths) + 1)
    overall = {"Avg": [1] * len(up), "wAvg(inc)": up, "wAvg(dec)": up[::-1]}
    return rows, {name: average(*columns, weights) for name, weights in overall.items()}


rows, overall = averages(cells, errors)
per_seed = []
for seed in seeds:
    own = {
        key: [r["score"] for r in records if (r["task"], r["length"], r["seed"]) == (*key, seed)]
        for key in paths
    }
    own = {key: round(100 * sum(scores) / len(scores), 2) for key, scores in own.items()}
    per_seed.append(averages(own, errors)[1]["Avg"]["score"])
complete = len(tasks) == len(ruler.TASKS) and lengths == LENGTHS
finished = sum(r["finished"] for r in records) / len(records)
completion_tokens = sum(r["completion_tokens"] for r in records) / len(records)


def shown(value, error):
    return f"{value:.2f}" + ("" if error is None else f" ±{error:.2f}")


text = [["task", *map(str, lengths)]]
text += [[task, *[shown(cells[task, length], errors[task, length]) for length in lengths]] for task in tasks]
text += [[f"average of {len(tasks)}", *[shown(*rows[length].values()) for length in lengths]]]
print(
    f"RULER of {subject.described(config.checkpoint, clamped)}, {config.samples} samples a cell, ± standard error"
)
print(
    f"mode {config.mode}: {', '.join(f'{key} {value:g}' for key, value in sampling.items())}"
    + (f", thinking budget {budget} tokens" if thinking else "")
)
print(f"RoPE scaling: {model_config.rope_scaling or 'none'}; essays: {settings['essays']}")
print(f"\n{stats.table(text)}\n")
print("; ".join(f"{key} {shown(*value.values())}" for key, value in overall.items()))
if config.seeds > 1:
    print("Avg by seed: " + ", ".join(f"{value:.2f}" for value in per_seed))
print(f"{finished:.1%} of the completions ended by themselves; {completion_tokens:.1f} tokens on average")
if not complete:
    print(
        f"Not RULER's average: {len(tasks)} of 13 tasks, {len(set(lengths) & set(LENGTHS))} of its 6 lengths."
    )
for task, reason in left_out.items():
    print(f"left out: {task}: {reason}")

durable.write_json(
    results.out / "results.json",
    {
        "settings": settings,
        **environment(config.tensor_parallel),
        "complete": complete,
        "left_out": left_out,
        "scores": {
            t: {n: {"score": cells[t, n], "stderr": errors[t, n], "n": found[t, n]} for n in lengths}
            for t in tasks
        },
        "averages": {"tasks": len(tasks), "by_length": rows, **overall, "Avg_by_seed": per_seed},
        "finished": finished,
        "completion_tokens": completion_tokens,
    },
)
title = f"RULER, {name}, {config.mode}: Avg {overall['Avg']['score']:.2f}" + (
    "" if complete else " (incomplete)"
)
plot.score_heatmap(results.out / "heatmap.png", title, tasks, lengths, cells)
print(f"results: {results.out}/results.json  heatmap: {results.out}/heatmap.png")
