"""A checkpoint on your own data, with your own reward; or on a task of prompts/tasks.py.

    python eval_data.py Qwen3-8B --data test.jsonl --reward mine:score              # greedy, no thinking
    python eval_data.py Qwen3-8B --data test.jsonl --reward mine:score --thinking --max-tokens 8192
    python eval_data.py Qwen3-8B --data a.jsonl b.parquet --sampling paper --seeds 4   # temperature 1
    torchrun --nproc-per-node 8 eval_data.py Qwen3-8B --data test.jsonl             # shared by eight engines
    python eval_data.py assets/tiny --task tracking --filler 60                     # a task made on the fly
    python eval_data.py --compare runs/data/before runs/data/after                  # paired, with p-values

--data and --reward are as in train.py (docs/rewards.md): an answer is right if its (first) reward is 1 or
more, and accuracy is the share of right answers. Without --data the prompts are train.py's held-out ones of
--task: the same for every checkpoint, none of them trained on. --sampling:
    greedy    the most probable token each time
    paper     temperature 1, the whole distribution, as LongAct's authors evaluate
    qwen3     Qwen3's model card: 0.6, top_p 0.95, top_k 20 with --thinking, 0.7, 0.8, 20 without
With --thinking what follows the last </think> is scored, and nothing if thinking did not end.

Left in --out: settings.json, results.jsonl (a line as each sample ends; answer is the text that was scored,
rewards the functions' values, score 1 if it is right, else 0; rewards_timed_out says that one of them took
more than --reward-timeout and counts as 0), results.md and results.json. The same command
goes on where an interrupted one stopped, on any number of ranks.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from base import processes
from base.cli import BadInput, one_line_errors, option, parse
from core import hub
from evals import html, stats, subject
from evals.engine import GREEDY, NON_THINKING, PAPER, THINKING, complete, sampling_text
from evals.results import Results
from prompts import chat, scoring, sources, tasks
from prompts.rewards import source_digests

SAMPLING = {"greedy": GREEDY, "paper": PAPER}
TASK_SAMPLES, TASK_TOKENS, DATA_TOKENS = 256, 24, 2048


@dataclass
class Config(subject.Options):
    data: list[str] = option([], "files of prompts, as train.py's --data (default: none, --task)")
    reward: list[str] = option(
        ["rewards:exact"], "module:function ...; (answer text, row) -> float; of the first one 1.0 is correct"
    )
    reward_workers: int = option(
        0, "processes of each rank that score answers (0: itself)", least=0, most=1024
    )
    reward_timeout: float = option(0.0, "seconds to score an answer (0: any)", least=0)
    reward_on_timeout: str = option("stop", "then stop, or score it zero", ["stop", "zero"])
    sampling: str = option("greedy", "greedy, paper or qwen3, see above", [*SAMPLING, "qwen3"])
    thinking: bool = option(False, "the model thinks first (Qwen3's template); the answer follows </think>")
    max_tokens: int = option(
        0,
        f"tokens of a completion, thinking included (0: {TASK_TOKENS} with --task, else {DATA_TOKENS})",
        least=0,
    )
    truncate_prompts: bool = option(False, "cut the middle out of prompts that are too long, or refuse them")
    task: str = option(
        "recall", "without --data: recall, tracking or chain, see prompts/tasks.py", list(tasks.TASKS)
    )
    facts: int = option(17, "task: facts in a passage", least=1)
    filler: int = option(17, "task: filler sentences in a passage", least=0, most=10**5)
    samples: int = option(
        0,
        f"a draw of the rows, always the same (0: all); of a task's, the first (0: {TASK_SAMPLES})",
        least=0,
        most=10**5,
    )


one_line_errors()
config = parse(Config, __doc__)
if config.compare:
    print(stats.compare(config.compare))
    sys.exit()

# ------------------------------------------------------------------------------------------ what can be asked

subject.check_options(config, "python eval_data.py CHECKPOINT --data FILE --reward module:function")
workers = config.reward_workers, config.reward_timeout, config.reward_on_timeout
scoring.check(config.reward, *workers)
config.checkpoint = hub.local(config.checkpoint)
sampling = SAMPLING.get(config.sampling, THINKING if config.thinking else NON_THINKING)
subject.check_seeds(config, sampling, "--sampling paper or qwen3")
model_config, tokenizer, _ = subject.load(config.checkpoint)
clamp, clamp_about = subject.load_clamp(config.clamp, model_config, config.tensor_parallel)
max_tokens = config.max_tokens or (DATA_TOKENS if config.data else TASK_TOKENS)
limit = model_config.context_length - max_tokens
if limit < 1:
    room = model_config.context_length
    raise BadInput(f"--max-tokens {max_tokens} leaves no room for a prompt in {room} tokens")


def read_rows():
    """-> [(task's name, row), ...]: the file that a row is from, or the task."""
    if not config.data:
        source = tasks.Source(config.task, "held out", config.facts, config.filler)
        return [(config.task, source[i]) for i in range(config.samples or TASK_SAMPLES)]
    rows = []
    for path in config.data:
        rows += [(Path(path).name, row) for row in sources.read(path, sources.prompt_row)]
    ids = {}
    for name, row in rows:
        if str(row["id"]) in ids:
            raise BadInput(f"--data: the id {row['id']!r:.80} is in {ids[str(row['id'])]} and in {name}")
        ids[str(row["id"])] = name
    return subject.drawn(rows, config.samples, "--data")


rows = processes.on_rank_0(read_rows)
score_all = scoring.start(config.reward, *workers)
score_all([("", row) for _, row in rows])  # a row that the reward cannot use shows now
how = {"thinking": config.thinking, "limit": limit, "truncate": config.truncate_prompts}
items = [
    {
        "id": str(row["id"]),
        "task": name,
        "length": 0 if config.data else config.facts + config.filler,  # sentences
        "prompt_ids": chat.encode_prompt(tokenizer, row, **how),
        "max_tokens": max_tokens,
        "expected": row["answer"],
        "row": row,
    }
    for name, row in rows
]
task = {key: getattr(config, key) for key in ("task", "facts", "filler")}
settings = {
    "benchmark": "own data" if config.data else "tasks.py",
    **subject.settings(config.checkpoint, model_config, clamp_about),
    **({"data": processes.on_rank_0(lambda: sources.digest(config.data))} if config.data else task),
    "reward": config.reward,
    "reward_source": {spec: digest and digest[:16] for spec, digest in source_digests(config.reward).items()},
    "thinking": config.thinking,
    "truncate_prompts": config.truncate_prompts,
    "sampling": sampling,
    "samples": len(rows),
    "max_tokens": max_tokens,
    "seeds": config.seeds,
}
seeds = range(config.seeds)
expected = {(item["id"], seed): (item["task"], item["length"]) for item in items for seed in seeds}
results = Results(subject.results_directory(config, "data" if config.data else "task"), settings, expected)

# ------------------------------------------------------------------------------------------------ completions


def score(item, prediction):
    answer = chat.answer_text(prediction, config.thinking)
    [values] = score_all([(answer, item["row"])])
    rewards = [0.0 if math.isnan(value) else value for value in values]  # one that took too long
    made = {"answer": answer, "rewards": rewards, "score": float(rewards[0] >= 1)}
    return {**made, "rewards_timed_out": rewards != values}


context = max_tokens + max(len(item["prompt_ids"]) for item in items)
complete(config, model_config, clamp, context, results, items, sampling, tokenizer, score)
if processes.rank_and_world()[0]:
    sys.exit()

# ----------------------------------------------------------------------------------------------------- report

records = results.read()
groups = {"all": records}
names = list(dict.fromkeys(item["task"] for item in items))
if len(names) > 1:
    groups |= {name: [r for r in records if r["task"] == name] for name in names}
if config.seeds > 1:
    groups |= {f"seed {seed}": [r for r in records if r["seed"] == seed] for seed in seeds}
accuracy = {name: stats.percent(stats.summarize(group)) for name, group in groups.items()}
rewards = {}  # the mean of each function's values
for name, group in groups.items():
    columns = zip(*[r["rewards"] for r in group])
    rewards[name] = dict(zip(config.reward, [sum(values) / len(values) for values in columns]))
table = [["", "accuracy", *[f"mean of {spec}" for spec in config.reward], "prompts"]]
for name, cell in accuracy.items():
    means = [f"{mean:.3f}" for mean in rewards[name].values()]
    table.append([name, stats.shown(cell, 2), *means, str(cell["n"])])
table = stats.markdown(table)
finished = stats.finished_share(records)
timed_out = sum(r["rewards_timed_out"] for r in records)
what = ", ".join(config.data)
if not config.data:
    length = records[0]["prompt_tokens"]
    what = f"{config.task}: {config.facts} facts among {config.filler} filler sentences, {length} tokens in "
    what += "the first prompt"
thinking = "thinking" if config.thinking else "no thinking"
text = [
    f"{' and '.join(names)} of {subject.described(config.checkpoint, clamp_about)}",
    "",
    f"- {what}",
    f"- reward {' '.join(config.reward)}; {thinking}, sampling {config.sampling}: {sampling_text(sampling)}",
    f"- {stats.legend(table)}",
    *("", table, ""),
    f"- {finished:.1%} of the completions ended by themselves",
]
if timed_out:
    text.append(f"- a reward of {timed_out} of {len(records)} answers timed out and counts as 0")
report = {"accuracy": accuracy, "rewards": rewards, "rewards_timed_out": timed_out, "finished": finished}
results.write_report(config.tensor_parallel, report, text)
print(f"report: {html.write(results, records)}")
