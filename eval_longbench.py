"""LongBench v2 of a checkpoint: 503 multiple-choice questions on texts of 8 thousand to 2 million words.
Chance is 25.

    python eval_longbench.py Qwen3-8B --yarn 4 --data data.json           # the benchmark, zero-shot
    python eval_longbench.py Qwen3-8B --yarn 4 --data data.json --cot     # reasoning first, then the answer
    python eval_longbench.py Qwen3-8B --yarn 4 --data data.json --no-context    # without their texts
    torchrun --nproc-per-node 8 eval_longbench.py Qwen3-8B --yarn 4 --data data.json    # on eight engines
    python eval_longbench.py assets/tiny --data assets/longbench-sample.json --max-input 3900    # a laptop
    python eval_longbench.py --compare runs/longbench/before runs/longbench/after    # paired, with p-values

--data is huggingface.co/datasets/THUDM/LongBench-v2's data.json. evals/longbench.py says what is as
published: prompts, answers, and the middle left out of prompts of more than --max-input tokens, before the
chat template is added. Control tokens that a document spells (<|im_end|>) stay text, where the official code
lets them act. --sampling:
    official  temperature 0.1, and top_p 0.95, top_k 20 as vLLM takes them from Qwen3's generation_config.json
    paper     temperature 1, the whole distribution, as LongAct's authors evaluate (their seed 0 is our first)
    qwen3     Qwen3's model card: 0.6, 0.95, 20 with --thinking, 0.7, 0.8, 20 without
A completion may have 128 tokens (--cot: 1,024 of reasoning, then 128), and --thinking-budget more with
--thinking.

Only the text after the last </think> is read, and with --thinking none if thinking did not end;
--keep-thinking reads all text, as the official code does. An empty or unreadable answer is wrong, and counted
below the table. The official code leaves samples with an empty output out (--skip-empty) and can give a
quarter for an unreadable answer (--compensated). Both change the table only: the same command with them
reports a finished evaluation again. --compare ignores them.

Left in --out: settings.json, results.jsonl (a line as each sample ends; answer is the letter read),
results.md and results.json; with --cot also reasoning/, the first stage. The same command goes on where an
interrupted one stopped, on any number of ranks.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import os
import sys
from dataclasses import dataclass

from base import processes
from base.cli import BadInput, one_line_errors, option, parse
from core import hub
from evals import html, longbench, stats, subject
from evals.engine import NON_THINKING, PAPER, THINKING, Engine, evaluate, sampling_text
from evals.results import Results
from prompts import chat, rewards

SAMPLING = {"official": {"temperature": 0.1, "top_p": 0.95, "top_k": 20, "min_p": 0.0}, "paper": PAPER}
ANSWER_TOKENS, REASONING_TOKENS = 128, 1024
SLACK = 64  # tokens: the chat template, and what a cut prompt may gain when its text is encoded again
# Requests in an engine at once: a GPU holds a few prompts of 120,000 tokens, and the next ones should wait.
IN_FLIGHT = 16


@dataclass
class Config(subject.Options):
    data: str = option("", "LongBench v2's data.json, or a file like it (needed)")
    cot: bool = option(False, "chain of thought, two stages")
    context: bool = option(True, "give the document; without, what the model knows or guesses is measured")
    max_input: int = option(
        120_000, "tokens of a prompt without chat template, beyond which its middle is left out", least=2
    )
    sampling: str = option("official", "official, paper or qwen3, see above", [*SAMPLING, "qwen3"])
    thinking: bool = option(False, "let the model think first, by its chat template")
    thinking_budget: int = option(
        8192, "thinking: tokens a completion may have beyond the official limit", least=1
    )
    keep_thinking: bool = option(False, "official: read the answer from all text, thinking included")
    skip_empty: bool = option(False, "official: leave samples with an empty output out of the table")
    compensated: bool = option(False, "official: an unreadable answer counts 0.25")
    yarn: float = option(0.0, subject.YARN_HELP, least=0, most=1e6)
    workers: int = option(0, "threads that prepare prompts (0: one per core)", least=0, most=1024)


one_line_errors()
config = parse(Config, __doc__)
if config.compare:
    print(stats.compare(config.compare, longbench.CLASSES["length"]))
    sys.exit()

# ------------------------------------------------------------------------------------------ what can be asked

subject.check_options(config, "python eval_longbench.py CHECKPOINT --data data.json")
if not config.data:
    raise BadInput("no --data is given: download data.json of huggingface.co/datasets/THUDM/LongBench-v2")
config.checkpoint = hub.local(config.checkpoint)
if config.cot and not config.context:
    raise BadInput("--cot and --no-context exclude each other, as in the official code: leave one out")
model_config, tokenizer, trained = subject.load(config.checkpoint, config.yarn)
clamp, clamp_about = subject.load_clamp(config.clamp, model_config, config.tensor_parallel)
budget = config.thinking_budget if config.thinking else 0
needed = (REASONING_TOKENS if config.cot else ANSWER_TOKENS) + budget + SLACK
context = model_config.context_length
if config.max_input + needed > context:
    room = f", or --max-input {context - needed}" if context > needed + 1 else ""
    raise BadInput(
        f"--max-input {config.max_input} and {needed} tokens for template and completion: "
        f"{config.checkpoint} has a context of {context}; "
        f"{subject.yarn_for(config.max_input + needed, trained)}{room}"
    )
entries, digest = processes.on_rank_0(lambda: longbench.index(config.data))
entries = subject.drawn(entries, config.samples, config.data)
sampling = SAMPLING.get(config.sampling, THINKING if config.thinking else NON_THINKING)
settings = {
    "benchmark": "LongBench v2",
    **subject.settings(config.checkpoint, model_config, clamp_about),
    "data": digest,
    "cot": config.cot,
    "max_input": config.max_input,
    "thinking": config.thinking,
    "thinking_budget": budget,
    "keep_thinking": config.keep_thinking,
    "sampling": sampling,
    "seeds": config.seeds,
    # Left out where it was not there in earlier versions, so that their results still go on.
    **({"samples": config.samples} if config.samples else {}),
    **({} if config.context else {"context": False}),
}
seeds = range(config.seeds)
expected = {(entry.id, seed): (entry.difficulty, entry.length) for entry in entries for seed in seeds}
results = Results(subject.results_directory(config, "longbench"), settings, expected)
first = Results(results.out / "reasoning", settings, expected) if config.cot else results

# ------------------------------------------------------------------------------------------------ completions

encode = longbench.encoder(tokenizer, config.thinking)


def read(prediction):
    """The part of a completion in which the answer is looked for."""
    return prediction if config.keep_thinking else chat.answer_text(prediction, config.thinking)


def score(item, prediction):
    answer = rewards.stated_choice(read(prediction))
    return {"answer": answer, "score": float(answer == item["expected"])}


def prompt(entry):
    template = longbench.COT if config.cot else longbench.ZERO_SHOT
    template = template if config.context else longbench.NO_CONTEXT
    return encode(longbench.fill(template, longbench.read_item(config.data, entry)), config.max_input)


def answer_prompts(entry):
    """The prompts of the second stage: {seed: token ids}."""
    item = longbench.read_item(config.data, entry)
    texts = [longbench.fill(longbench.COT_ANSWER, item, reasoned[entry.id, seed]) for seed in seeds]
    return {seed: encode(text, config.max_input) for seed, text in enumerate(texts)}


def ask(results, todo, prompt_ids, max_tokens, score):
    items = [
        {
            "id": entry.id,
            "task": entry.difficulty,
            "length": entry.length,
            "prompt_ids": lambda entry=entry: prompt_ids(entry),
            "max_tokens": max_tokens + budget,
            "expected": entry.answer,
        }
        for entry in todo
    ]
    evaluate(engine, results, items, config, sampling, tokenizer, score)


def unfinished(results):
    left = [entry for entry in entries if any((entry.id, seed) not in results.done for seed in seeds)]
    return longbench.by_document(left, engine.engines)


if len(results.done) < len(expected):
    engine = Engine(
        config.checkpoint,
        config.max_input + needed,
        config.tensor_parallel,
        model_config.rope_scaling,
        config.vllm_share,
        clamp,
        in_flight=IN_FLIGHT,
    )
    todo = unfinished(first)
    # `evaluate` asks for the prompts of this engine's items, in order.
    own = todo[engine.number :: engine.engines]
    prompts = longbench.ahead(prompt, own, config.workers or os.cpu_count(), IN_FLIGHT)
    if config.cot:
        ask(
            first,
            todo,
            lambda entry: next(prompts),
            REASONING_TOKENS,
            lambda *_: {"answer": None, "score": 0.0},
        )
        reasoned = {(r["id"], r["seed"]): read(r["prediction"]) for r in processes.on_rank_0(first.read)}
        ask(results, unfinished(results), answer_prompts, ANSWER_TOKENS, score)
    else:
        ask(results, todo, lambda entry: next(prompts), ANSWER_TOKENS, score)
    engine.close()
if processes.rank_and_world()[0]:
    sys.exit()

# ----------------------------------------------------------------------------------------------------- report

records = results.read()
texts = [read(r["prediction"]) for r in records]
# Empty: nothing was written, in either stage. Thinking that did not end is unreadable, and stays in the
# table.
silent = {(r["id"], r["seed"]) for r in [*first.read(), *records] if not r["prediction"]}
empty = [(r["id"], r["seed"]) in silent for r in records]
unreadable = [rewards.stated_choice(text) is None for text in texts]
counted = [
    {**r, "score": 0.25 if config.compensated and bad else r["score"]}
    for r, bad, nothing in zip(records, unreadable, empty)
    if not (config.skip_empty and nothing)
]
COLUMNS = {
    "Overall": lambda r: True,
    "Easy": lambda r: r["task"] == "easy",
    "Hard": lambda r: r["task"] == "hard",
    "Short": lambda r: r["length"] == "short",
    "Medium": lambda r: r["length"] == "medium",
    "Long": lambda r: r["length"] == "long",
}
domain = {entry.id: entry.domain for entry in entries}
DOMAINS = {name: (lambda r, name=name: domain[r["id"]] == name) for name in sorted(set(domain.values()))}


def scores(records, classes):
    """Class -> {"score", "low", "high", "n"} in per cent, None for an empty one."""
    chosen = {name: [r for r in records if inside(r)] for name, inside in classes.items()}
    return {name: stats.percent(stats.summarize(rs)) if rs else None for name, rs in chosen.items()}


def shown(columns):
    return [stats.shown(cell, 1) for cell in columns.values()]


def number(cell):
    return str(cell["n"]) if cell else "0"


total, by_domain = scores(counted, COLUMNS), scores(counted, DOMAINS)
by_seed = [scores([r for r in counted if r["seed"] == seed], COLUMNS) for seed in seeds]
rows = [["", *COLUMNS]]
if config.seeds > 1:
    rows += [[f"seed {seed}", *shown(columns)] for seed, columns in enumerate(by_seed)]
rows += [["mean" if config.seeds > 1 else "score", *shown(total)]]
rows += [["items", *map(number, total.values())]]
rows += [["chance", *["25.0"] * len(COLUMNS)]]
domains = [["domain", "score", "items"]]
domains += [[name, stats.shown(cell, 1), number(cell)] for name, cell in by_domain.items()]
official = len(entries) == longbench.OFFICIAL_ITEMS
variants = [name for name in ("keep_thinking", "skip_empty", "compensated") if getattr(config, name)]
finished = stats.finished_share(records)
tables = [stats.markdown(rows), "", stats.markdown(domains)]

flags = "".join(f", --{name.replace('_', '-')}" for name in variants)
kind = "chain of thought" if config.cot else "zero-shot" if config.context else "no context"
thinking = f", thinking budget {budget} tokens" if config.thinking else ""
text = [
    f"LongBench v2 of {subject.described(config.checkpoint, clamp_about)}{flags}",
    "",
    f"- {kind}, sampling {config.sampling}: {sampling_text(sampling)}{thinking}",
    f"- at most {config.max_input} tokens of prompt; RoPE scaling: {model_config.rope_scaling or 'none'}",
    f"- {stats.legend(str(tables))}",
    *("", *tables, ""),
    f"- {sum(empty)} of {len(records)} outputs are empty, {sum(unreadable)} of {len(records)} give no "
    "readable answer",
    f"- {finished:.1%} of the completions ended by themselves",
]
if not official:
    counts = [f"{name} {n}" for kind in longbench.counts(entries).values() for name, n in kind.items()]
    numbers = f"{len(entries)} items ({', '.join(counts)})"
    text.append(f"- Not LongBench v2's score: {numbers}, not its {longbench.OFFICIAL_ITEMS}.")
report = {
    "official_items": official,
    "variants": variants,
    "scores": total,
    "scores_by_domain": by_domain,
    "scores_by_seed": by_seed,
    "empty": sum(empty),
    "unreadable": sum(unreadable),
    "finished": finished,
}
results.write_report(config.tensor_parallel, report, text)
print(f"report: {html.write(results, records)}")
