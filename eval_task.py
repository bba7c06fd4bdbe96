"""A task of tasks.py, of a checkpoint: questions on passages of made-up facts, which assets/tiny was made
for.

    python eval_task.py assets/tiny                                            # recall, greedy
    python eval_task.py assets/tiny --sampling paper --seeds 4                 # temperature 1, mean of 4
    python eval_task.py assets/tiny --task tracking --filler 60                # another task, longer passages
    python eval_task.py --compare runs/task/before runs/task/after             # paired, with p-values

The prompts are train.py's held-out ones: the same for every checkpoint, none of them trained on. An answer is
right if it is the fact, up to case and punctuation. --sampling greedy, or paper: temperature 1, the whole
distribution.

Left in --out: settings.json, results.jsonl (a line as each sample ends), results.json. The same command goes
on where an interrupted one stopped, on any number of ranks.
"""

import sys
from dataclasses import dataclass

from base import durable, processes
from base.cli import BadInput, one_line_errors, option, parse
from evals import stats, subject
from evals.engine import GREEDY, PAPER, Engine, evaluate
from evals.results import Results, environment
from prompts import chat, rewards, tasks

SAMPLING = {"greedy": GREEDY, "paper": PAPER}
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
    sampling: str = option("greedy", "greedy or paper, see above", list(SAMPLING))
    task: str = option("recall", "recall or tracking, see tasks.py", list(tasks.TASKS))
    facts: int = option(17, "facts in a passage", least=1)
    filler: int = option(17, "filler sentences in a passage", least=0, most=10**6)
    samples: int = option(256, "prompts", least=1, most=10**6)
    max_tokens: int = option(24, "tokens of an answer", least=1)
    seeds: int = option(
        1, "paper: completions of each prompt, with sampling seeds 0, 1, ...", least=1, most=1000
    )
    out: str = option("", "directory of the results (default: runs/task/<checkpoint's name>)")
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
if not config.checkpoint:
    raise BadInput("no checkpoint is given: python eval_task.py CHECKPOINT")
if config.seeds > 1 and config.sampling == "greedy":
    raise BadInput(f"--seeds {config.seeds} needs --sampling paper: greedy completions are all the same")
subject.check_ranks(config.tensor_parallel)
model_config, tokenizer, _ = subject.load(config.checkpoint)
held, clamped = subject.load_clamp(config.clamp, model_config, config.tensor_parallel)

source = tasks.Source(config.task, "held out", config.facts, config.filler)
limit = model_config.context_length - config.max_tokens
if limit < 1:
    raise BadInput(
        f"--max-tokens {config.max_tokens} leaves no room for a prompt in {model_config.context_length} tokens"
    )
items = [
    {
        "id": row["id"],
        "task": config.task,
        "length": config.facts + config.filler,  # sentences
        "prompt_ids": chat.encode_prompt(tokenizer, row, False, limit),
        "max_tokens": config.max_tokens,
        "expected": row["answer"],
    }
    for row in (source[i] for i in range(config.samples))
]
settings = {
    "benchmark": "tasks.py",
    **subject.settings(config.checkpoint, model_config, clamped),
    "sampling": SAMPLING[config.sampling],
    **{key: getattr(config, key) for key in ("task", "facts", "filler", "samples", "max_tokens", "seeds")},
}
expected = {
    (item["id"], seed): (item["task"], item["length"]) for item in items for seed in range(config.seeds)
}
results = Results(config.out or f"runs/task/{subject.name(config.checkpoint)}", settings, expected)


def score(item, prediction):
    return rewards.exact(chat.answer_text(prediction, False), {"answer": item["expected"]})


if len(results.done) < len(items) * config.seeds:
    context = config.max_tokens + max(len(item["prompt_ids"]) for item in items)
    engine = Engine(
        *(config.checkpoint, context, config.tensor_parallel, model_config.rope_scaling, config.vllm_share),
        clamp=held,
    )
    stop_ids = chat.stop_ids(tokenizer)
    evaluate(
        engine, results, items, len(items), config.seeds, settings["sampling"], stop_ids, tokenizer, score
    )
    engine.close()
if processes.rank_and_world()[0]:
    sys.exit()

records = results.read()
total = stats.summarize(records)
finished = sum(r["finished"] for r in records) / len(records)
error = "" if total["stderr"] is None else f" ±{100 * total['stderr']:.2f}"
model, length = subject.described(config.checkpoint, clamped), records[0]["prompt_tokens"]
print(f"{config.task} of {model}, {config.sampling}, ± standard error over prompts")
print(f"{config.facts} facts among {config.filler} filler sentences, {length} tokens in the first prompt")
print(
    f"\naccuracy {100 * total['score']:.2f}{error}, {total['n']} prompts; {finished:.1%} ended by themselves\n"
)
durable.write_json(
    results.out / "results.json",
    {
        "settings": settings,
        **environment(config.tensor_parallel),
        "score": {key: total[key] if key == "n" or total[key] is None else 100 * total[key] for key in total},
        "finished": finished,
    },
)
print(f"results: {results.out}/results.json")
