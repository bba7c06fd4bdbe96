"""GSM8K of a checkpoint: 1,319 grade-school problems with a number for an answer.

    python eval_gsm8k.py Qwen3-8B --data test.jsonl                         # chat, zero-shot, no thinking
    python eval_gsm8k.py Qwen3-8B --data test.jsonl --mode thinking
    python eval_gsm8k.py Qwen3-8B-Base --data test.jsonl --mode base        # eight examples, no template
    torchrun --nproc-per-node 8 eval_gsm8k.py Qwen3-8B --data test.jsonl    # shared by eight engines
    python eval_gsm8k.py --compare runs/gsm8k/before runs/gsm8k/after       # paired, with p-values

--data is github.com/openai/grade-school-math's grade_school_math/data/test.jsonl. The modes:
    chat      the question and how to end ("#### answer", our words), the chat template without thinking
    thinking  the same with thinking; what follows the last </think> is scored, and nothing if thinking did
              not end
    base      the eight examples of Wei et al. (2022), then "Q: ... A:"; what the model says before its next
              "Q:" is scored
--sampling default is greedy, and 0.6, top_p 0.95, top_k 20 for thinking; paper is temperature 1, the whole
distribution. The answer is the number after the last ####, "answer is", "answer:" or \\boxed{, if it is clear
which one is meant (docs/evaluate.md has a table); it must equal the file's as a number. A completion without
one is wrong, and counted below the score; so is a part of a number (of 1/2, 2 + 3, 3:00, 1e3), which the
official pattern reads.

Left in --out: settings.json, results.jsonl (a line as each sample ends; answer is the number read),
results.md and results.json. The same command goes on where an interrupted one stopped, on any number of
ranks.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import math
import sys
from dataclasses import dataclass

from base import durable, processes
from base.cli import BadInput, one_line_errors, option, parse
from core import hub
from evals import gsm8k, html, stats, subject
from evals.engine import GREEDY, PAPER, THINKING, complete, sampling_text
from evals.results import Results
from prompts import chat

OFFICIAL_ITEMS = 1319


@dataclass
class Config(subject.Options):
    data: str = option("", "GSM8K's test.jsonl (needed)")
    mode: str = option("chat", "chat, thinking or base, see above", ["chat", "thinking", "base"])
    sampling: str = option("default", "default or paper, see above", ["default", "paper"])
    max_tokens: int = option(512, "tokens of an answer", least=1)
    thinking_budget: int = option(8192, "thinking: tokens a completion may have beyond --max-tokens", least=1)


one_line_errors()
config = parse(Config, __doc__)
if config.compare:
    print(stats.compare(config.compare))
    sys.exit()

# ------------------------------------------------------------------------------------------ what can be asked

subject.check_options(config, "python eval_gsm8k.py CHECKPOINT --data test.jsonl")
if not config.data:
    source = "grade_school_math/data/test.jsonl of github.com/openai/grade-school-math"
    raise BadInput(f"no --data is given: download {source}")
config.checkpoint = hub.local(config.checkpoint)
model_config, tokenizer, _ = subject.load(config.checkpoint)
clamp, clamp_about = subject.load_clamp(config.clamp, model_config, config.tensor_parallel)
thinking = config.mode == "thinking"
sampling = PAPER if config.sampling == "paper" else THINKING if thinking else GREEDY
subject.check_seeds(config, sampling, "--mode thinking or --sampling paper")


def prompt_ids(key, question):
    if config.mode == "base":
        return chat.encode_parts(tokenizer, [(gsm8k.base_prompt(question), False)])[0]
    row = {"id": key, "prompt": gsm8k.chat_prompt(question)}
    return chat.encode_prompt(tokenizer, row, thinking, math.inf)


rows = subject.drawn(processes.on_rank_0(lambda: gsm8k.read(config.data)), config.samples, config.data)
max_tokens = config.max_tokens + (config.thinking_budget if thinking else 0)
items = [
    {
        "id": key,
        "task": "gsm8k",
        "length": 0,
        "prompt_ids": prompt_ids(key, question),
        "max_tokens": max_tokens,
        "expected": str(gold),
        "gold": gold,
    }
    for key, question, gold in rows
]
longest = max(items, key=lambda item: len(item["prompt_ids"]))
longest_tokens, limit = len(longest["prompt_ids"]), model_config.context_length
context = longest_tokens + max_tokens
if context > limit:
    if longest_tokens >= limit:
        fix = "take that line out of --data"
    else:
        fix = f"lower {'--thinking-budget' if thinking else '--max-tokens'}"
    raise BadInput(
        f"the longest prompt ({longest['id']}, {longest_tokens} tokens) and {max_tokens} tokens of completion"
        f" need {context}; {config.checkpoint} has a context of {limit}: {fix}"
    )
settings = {
    "benchmark": "GSM8K",
    **subject.settings(config.checkpoint, model_config, clamp_about),
    "data": durable.digest(repr(rows)),
    "mode": config.mode,
    "sampling": sampling,
    "max_tokens": max_tokens,
    "seeds": config.seeds,
    **({"samples": config.samples} if config.samples else {}),
}
seeds = range(config.seeds)
expected = {(item["id"], seed): (item["task"], item["length"]) for item in items for seed in seeds}
results = Results(subject.results_directory(config, "gsm8k"), settings, expected)

# ------------------------------------------------------------------------------------------------ completions


def answer(prediction):
    if config.mode == "base":
        return gsm8k.extract(gsm8k.base_answer(prediction))
    return gsm8k.extract(chat.answer_text(prediction, thinking))


def score(item, prediction):
    number = answer(prediction)
    text = None if number is None else str(number)
    return {"answer": text, "score": float(number == item["gold"])}


stop = gsm8k.STOP if config.mode == "base" else ""
complete(config, model_config, clamp, context, results, items, sampling, tokenizer, score, stop)
if processes.rank_and_world()[0]:
    sys.exit()

# ----------------------------------------------------------------------------------------------------- report

records = results.read()
total = stats.percent(stats.summarize(records))
by_seed = [stats.percent(stats.summarize([r for r in records if r["seed"] == seed])) for seed in seeds]
unreadable = sum(answer(r["prediction"]) is None for r in records)
finished = stats.finished_share(records)
official = len(items) == OFFICIAL_ITEMS
table = [["", "accuracy", "problems"]]
if config.seeds > 1:
    table += [[f"seed {seed}", stats.shown(cell, 2), str(cell["n"])] for seed, cell in enumerate(by_seed)]
table += [["mean" if config.seeds > 1 else "all", stats.shown(total, 2), str(total["n"])]]
table = stats.markdown(table)
text = [
    f"GSM8K of {subject.described(config.checkpoint, clamp_about)}",
    "",
    f"- mode {config.mode}: {sampling_text(sampling)}",
    f"- {stats.legend(table)}",
    *("", table, ""),
    f"- {unreadable} of {len(records)} completions give no readable number",
    f"- {finished:.1%} of the completions ended by themselves",
]
if not official:
    text.append(f"- Not GSM8K's score: {len(items)} problems, not its {OFFICIAL_ITEMS}.")
report = {
    "official_items": official,
    "score": total,
    "score_by_seed": by_seed,
    "unreadable": unreadable,
    "finished": finished,
}
results.write_report(config.tensor_parallel, report, text)
print(f"report: {html.write(results, records)}")
