"""A task of prompts/tasks.py, of a checkpoint: questions on passages of made-up facts, which assets/tiny was
made for.

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

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import sys
from dataclasses import dataclass

from base import hub, processes
from base.cli import BadInput, one_line_errors, option, parse
from evals import stats, subject
from evals.engine import GREEDY, PAPER, Engine, evaluate
from evals.results import Results
from prompts import chat, rewards, tasks

SAMPLING = {"greedy": GREEDY, "paper": PAPER}


@dataclass
class Config(subject.Options):
    sampling: str = option("greedy", "greedy or paper, see above", list(SAMPLING))
    task: str = option("recall", "recall or tracking, see prompts/tasks.py", list(tasks.TASKS))
    facts: int = option(17, "facts in a passage", least=1)
    filler: int = option(17, "filler sentences in a passage", least=0, most=10**5)
    samples: int = option(256, "prompts", least=1, most=10**5)
    max_tokens: int = option(24, "tokens of an answer", least=1)


one_line_errors()
config = parse(Config, __doc__)
if config.compare:
    print(stats.compare(config.compare, (*stats.MAY_DIFFER, "samples")))
    sys.exit()

# ------------------------------------------------------------------------------------------ what can be asked

sampling = SAMPLING[config.sampling]
subject.check_options(config, "python eval_task.py CHECKPOINT")
subject.check_seeds(config, sampling, "--sampling paper")
config.checkpoint = hub.local(config.checkpoint)
model_config, tokenizer, _ = subject.load(config.checkpoint)
clamp, clamp_about = subject.load_clamp(config.clamp, model_config, config.tensor_parallel)
source = tasks.Source(config.task, "held out", config.facts, config.filler)
limit = model_config.context_length - config.max_tokens
if limit < 1:
    room = model_config.context_length
    raise BadInput(f"--max-tokens {config.max_tokens} leaves no room for a prompt in {room} tokens")
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
    "benchmark": "tasks.py",  # the name that settings.json has always had
    **subject.settings(config.checkpoint, model_config, clamp_about),
    "sampling": sampling,
    **{key: getattr(config, key) for key in ("task", "facts", "filler", "samples", "max_tokens", "seeds")},
}
seeds = range(config.seeds)
expected = {(item["id"], seed): (item["task"], item["length"]) for item in items for seed in seeds}
results = Results(subject.results_directory(config, "task"), settings, expected)

# ------------------------------------------------------------------------------------------------ completions


def score(item, prediction):
    return rewards.exact(chat.answer_text(prediction, False), {"answer": item["expected"]})


if len(results.done) < len(expected):
    context = config.max_tokens + max(len(item["prompt_ids"]) for item in items)
    rope = model_config.rope_scaling
    engine = Engine(config.checkpoint, context, config.tensor_parallel, rope, config.vllm_share, clamp)
    stop_ids = chat.stop_ids(tokenizer)
    evaluate(engine, results, items, len(items), config.seeds, sampling, stop_ids, tokenizer, score)
    engine.close()
if processes.rank_and_world()[0]:
    sys.exit()

# ----------------------------------------------------------------------------------------------------- report

records = results.read()
total = stats.percent(stats.summarize(records))
finished = stats.finished_share(records)
model, length = subject.described(config.checkpoint, clamp_about), records[0]["prompt_tokens"]
print(f"{config.task} of {model}, {config.sampling}, ± standard error over prompts")
print(f"{config.facts} facts among {config.filler} filler sentences, {length} tokens in the first prompt")
print(f"\naccuracy {stats.shown(total, 2)}, {total['n']} prompts; {finished:.1%} ended by themselves\n")
print(f"results: {results.write_report(config.tensor_parallel, {'score': total, 'finished': finished})}")
