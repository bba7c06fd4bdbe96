"""The cheapest way to take a step that fits: which flags, from those that change nothing to those that do.

`weigh` says what a Step takes on a card. `ladder` gives up one thing after the other. On each rung `arranged`
may recompute blocks, make passes smaller, share tokens or an engine between ranks, and move vLLM's share:
none of that changes what is computed but for rounding. `table` is --plan --find.
"""

import math
from typing import NamedTuple

from core.checkpoint import SIZES, Qwen3Config
from run import roofline
from run.memory_plan import GIB, Engine, Step, engine_memory, reserve, step_memory

SHARE = 1 / 20  # --vllm-share is chosen in such steps
MOST_SHARE = 18  # of them
NEARLY = 1.2  # what gains less time is not worth a flag
RANK = 32  # of LoRA where it is proposed
CONTEXTS = (8192, 16384, 32768, 65536, 131072)
SHORTER = 2048  # a shorter context is found in such steps

# What is given up, in this order, each instead of the one before it: nothing; exactness of moments; time, and
# memory of the CPU; exactness of weights; training every weight.
RUNGS = {
    "what you asked for": {},
    "8-bit moments": {"optimizer": "adamw8bit"},
    "moments in the CPU's memory": {"optimizer": "adamw-offload"},
    "bf16 weights, 8-bit moments": {"masters": "bf16", "optimizer": "adamw8bit"},
    "LoRA": {"lora": RANK},
}
NAMES = dict(zip(RUNGS, ("all", "8bit", "cpu", "bf16", "LoRA"), strict=True))  # in cells of the table


class Weighed(NamedTuple):
    """A Step on a card: bytes of a rank, and seconds."""

    step: Step
    lines: dict  # {line: bytes} of training at its worst moment
    moment: str
    asleep: float  # what the trainer holds while vLLM generates
    engine: Engine
    share: float  # vLLM's
    room: float  # of it, for the KV cache
    over_training: float  # bytes too much; with 0 or less it fits
    over_rollout: float
    training: dict  # {kind of work: seconds}
    sampling: dict  # the same, of one round

    @property
    def over(self):
        return max(self.over_training, self.over_rollout)

    @property
    def seconds(self):
        return roofline.total(self.training) + sum(self.sampling.values())


def weigh(c, step, card):
    """Qwen3Config, Step, roofline.Card -> Weighed."""
    capacity = card.memory * GIB
    free = capacity - reserve(card.memory)
    lines, moment, asleep = step_memory(c, step)
    engine, share = engine_memory(c, step, card.memory), step.vllm_share * capacity
    room = share - engine.weights - engine.working
    over = sum(lines.values()) - free, max(asleep + share - free, engine.one - room)
    seconds = (
        roofline.training_seconds(c, step, card),
        roofline.sampling_seconds(c, step, card, engine, room),
    )
    return Weighed(step, lines, moment, asleep, engine, share, room, *over, *seconds)


def best(choices, over):
    """Of Weighed ones the first that fits by the field `over` and takes little longer than the fastest that
    does; else the one that comes nearest."""
    fitting = [each for each in choices if getattr(each, over) <= 0]
    if not fitting:
        return min(choices, key=lambda each: getattr(each, over))
    limit = NEARLY * min(each.seconds for each in fitting)
    return next(each for each in fitting if each.seconds <= limit)


def divisors(number, of):
    return [n for n in (1, 2, 4, 8) if number % n == 0 and of % n == 0]


def trainings(c, step):
    """Steps that train alike, `step` first, then those that differ little from it."""
    shared = [n for n in divisors(c.num_key_value_heads, step.ranks) if step.prompts % (step.ranks // n) == 0]
    for context_parallel in dict.fromkeys((step.context_parallel, *shared)):
        for checkpointing in (step.checkpointing, not step.checkpointing):
            for n in (1, 2, 4):
                tokens = max(step.completion, step.tokens_per_pass // n)
                how = {"checkpointing": checkpointing, "tokens_per_pass": tokens}
                yield step._replace(context_parallel=context_parallel, **how)


def engines(c, step, card, asleep):
    """Steps that sample alike, by an engine on as many ranks as the step's, or on others; its share is the
    smallest that holds all that it samples at once, or all there is beside `asleep` bytes."""
    capacity = card.memory * GIB
    most = math.floor((capacity - reserve(card.memory) - asleep) / capacity / SHARE)
    several = step.tensor_parallel, *divisors(c.num_key_value_heads, step.ranks)
    for tensor_parallel in dict.fromkeys(several):
        step = step._replace(tensor_parallel=tensor_parallel)
        engine = engine_memory(c, step, card.memory)
        groups = -(-step.prompts * tensor_parallel // step.ranks)
        wanted = math.ceil((engine.weights + engine.working + groups * engine.group) / capacity / SHARE)
        yield step._replace(vllm_share=round(max(1, min(wanted, most, MOST_SHARE)) * SHARE, 2))


def arranged(c, step, card, samples=True):
    """-> Weighed, of what computes the same as `step` the `best`. samples: False for sft.py, which has no
    rollout."""
    training = best([weigh(c, each, card) for each in trainings(c, step)], "over_training")
    if not samples:
        return training._replace(over_rollout=training.over_training)
    if training.over_rollout <= 0 and training.room >= training.engine.group:
        return training
    choices = [weigh(c, each, card) for each in engines(c, training.step, card, training.asleep)]
    return best(choices, "over_rollout")


def ladder(c, step, card, samples=True):
    """-> yields (rung, Weighed), the last the first that fits, if one does: what `step` computes, then every
    change of RUNGS, then a shorter context with the last of them."""
    tried = []
    for rung, changes in RUNGS.items():
        changed = step._replace(**changes)
        if changed not in tried and not (step.lora and changes):  # with LoRA there is nothing more to give up
            tried.append(changed)
            found = arranged(c, changed, card, samples)
            yield rung, found
            if found.over <= 0:
                return
    for context in range(step.context - SHORTER, step.completion, -SHORTER):
        found = arranged(c, tried[-1]._replace(prompt=context - step.completion), card)
        if found.over <= 0:
            yield f"{rung}, shorter context", found
            return


def flags(before, after):
    """The flags of train.py that turn one Step into another."""
    words = []
    for field, old, new in zip(Step._fields, before, after, strict=True):
        if field == "prompt" and old != new:
            words.append(f"--context {after.context}")
        elif old != new and type(new) is bool:
            words.append(f"--{'' if new else 'no-'}{field.replace('_', '-')}")
        elif old != new:
            words.append(f"--{field.replace('_', '-')} {new}")
    return " ".join(words)


def table(completions, completion):
    """The text of --plan --find: for each card and number of cards, models by contexts."""
    text = [
        f"The first that fits, and seconds a step: one group of {completions} completions of up to "
        f"{completion:,} tokens a GPU, sampled once.",
    ]
    for card in [card for card in reversed(roofline.CARDS) if card.name in ("RTX4090", "L40S", "H100")]:
        for ranks in (1, 2, 4, 8):
            gpus = f"{ranks} x {card.name}, {card.sold} GB"
            text += ["", f"{gpus:22}" + "".join(f"{context:>13,}" for context in CONTEXTS)]
            for size in SIZES:
                cells = [cell(size, card, ranks, context, completions, completion) for context in CONTEXTS]
                text.append(f"{size:>22}" + "".join(f"{each:>13}" for each in cells))
    return "\n".join(text) + "\n"


def cell(size, card, ranks, context, completions, completion):
    """What fits, in a word, and its seconds; or "-"."""
    c = Qwen3Config.preset(size)
    step = Step(ranks, ranks, context - completion, completion, completions, 2 * completion, True, 0.5)
    for rung, changes in RUNGS.items():
        found = arranged(c, step._replace(**changes), card)
        if found.over <= 0:
            return f"{NAMES[rung]} {found.seconds:,.0f}"
    return "-"
