"""What a training step takes, from a configuration alone: memory by line, tokens with and without sharing.

    python train.py --plan --model Qwen3-8B --ranks 8 --gpu-memory 80 --context 32768 --max-completion 4096
    python sft.py --plan --data chats.jsonl --model Qwen3-8B-Base --ranks 8 --context 16384 --checkpointing

--model is a checkpoint directory, of which only config.json is read, or the name of a published size. The
plan is for the worst that can come: a prompt of --context less --max-completion tokens, completions that fill
a pass; in sft.py a full pass all of which the assistant says.

The bytes are counted in run/memory_plan.py. RESERVE is for what CUDA and NCCL take for themselves, about 1 to
2 GiB, and for fragmentation.
"""

from pathlib import Path
from typing import NamedTuple

from base.cli import BadInput
from core.checkpoint import Qwen3Config
from core.parallel import check_heads
from run.memory_plan import recomputes, rollout_memory, tokens_of_pass, training_memory
from run.preflight import prompt_room

GIB = 2**30
CONTEXTS = (8192, 16384, 32768, 65536, 131072)
RESERVE = 2 * GIB  # for CUDA, NCCL and fragmentation, when saying whether it fits


def model_and_context(config):
    """-> Qwen3Config of config.model, and the longest sequence. Raises BadInput for a model that is neither a
    directory nor a published size, and for a context beyond it."""
    if Path(config.model).exists():
        c = Qwen3Config.from_pretrained(config.model)
    else:
        try:
            c = Qwen3Config.preset(Path(config.model).name.removeprefix("Qwen3-"))
        except BadInput as error:
            raise BadInput(f"--model {config.model} is no directory, and {error}") from error
    return c, c.context(config.context, config.model)


def gib(value):
    return f"{value / GIB:9.2f} GiB"


def memory_table(lines):
    """{line: bytes} -> lines of text, the last their sum."""
    shown = {**{line: value for line, value in lines.items() if value}, "total": sum(lines.values())}
    return [f"  {line:48}{gib(value)}" for line, value in shown.items()]


def blocks(config, tokens):
    return ", blocks recomputed (--checkpointing)" if recomputes(config, tokens) else ""


def gpus(ranks):
    return f"{ranks} GPU{'s' if ranks > 1 else ''}"


def verdict(config, fits):
    return f"fits {config.gpu_memory:g} GiB (less {RESERVE // GIB} for CUDA): {'yes' if fits else 'NO'}"


def sft_report(config, ranks):
    """The text of sft.py --plan. Raises BadInput as `model_and_context`."""
    c, context = model_and_context(config)
    tokens = max(context, config.tokens_per_pass)
    lines, moment = training_memory(c, 0, tokens, recomputes(config, tokens), ranks, 2)
    text = [
        f"SFT of {config.model} on {gpus(ranks)}: {config.batch} documents of up to {context:,} tokens a "
        f"step, {tokens:,} tokens in the fullest pass",
        "",
        f"training, one rank, at its worst moment ({moment}){blocks(config, tokens)}:",
        *memory_table(lines),
        verdict(config, sum(lines.values()) + RESERVE <= config.gpu_memory * GIB),
    ]
    return "\n".join(text) + "\n"


class Needs(NamedTuple):
    """What a step of train.py takes of a rank at one context; bytes but for the prompt's tokens."""

    prompt: int
    training: dict  # {line: bytes} at the worst moment
    moment: str
    asleep: float  # parameters and optimizer, held while vLLM generates
    vllm_weights: float
    room: float  # what --vllm-share leaves for vLLM's KV cache
    group: float  # KV cache of a group
    fits: bool


def needs(config, c, ranks, context):
    """-> Needs of a step whose longest sequence has `context` tokens, by a Qwen3Config on `ranks` GPUs."""
    prompt, R, G = context - config.max_completion, config.max_completion, config.completions
    pass_tokens = tokens_of_pass(config)
    recompute = recomputes(config, max(context, pass_tokens))
    training, moment = training_memory(
        *(c, prompt, pass_tokens, recompute, ranks // config.replicate, 2),
        reference=bool(config.beta),
        context_parallel=config.context_parallel,
    )
    weights, one, group = rollout_memory(c, prompt, R, G, config.tensor_parallel)
    asleep = training["parameters (fp32)"] + training["optimizer (fp32 moments)"]
    capacity = config.gpu_memory * GIB
    share = config.vllm_share * capacity
    fits = sum(training.values()) + RESERVE <= capacity and asleep + share + RESERVE <= capacity
    room = share - weights
    return Needs(prompt, training, moment, asleep, weights, room, group, fits and room >= one)


def report(config, ranks):
    """The text of train.py --plan. Raises BadInput as `model_and_context`, and for no room for a prompt."""
    c, context = model_and_context(config)
    prompt_room(context, config.max_completion)
    check_heads(config.context_parallel, c)
    longest = max(context, tokens_of_pass(config))
    G, R, share = config.completions, config.max_completion, config.vllm_share * config.gpu_memory * GIB
    need, pass_tokens = needs(config, c, ranks, context), tokens_of_pass(config)
    shared, unshared = config.prompts * (need.prompt + G * R), config.prompts * G * (need.prompt + R)
    cache = f"{gib(need.room)}   a group takes {need.group / GIB:.2f} GiB"
    text = [
        f"{config.model} on {gpus(ranks)}: {config.prompts} prompts of {need.prompt:,} tokens x {G} "
        f"completions of up to {R:,}, {pass_tokens:,} completion tokens in the fullest pass",
        "",
        f"training, one rank, at its worst moment ({need.moment}){blocks(config, longest)}:",
        *memory_table(need.training),
        "rollout, one rank:",
        f"  {'parameters and optimizer, as above':48}{gib(need.asleep)}",
        f"  {'vLLM weights (bf16)':48}{gib(need.vllm_weights)}",
        f"  {'vLLM KV cache (what --vllm-share leaves)':48}{cache}",
        f"  {'total':48}{gib(need.asleep + share)}",
        f"tokens through the network a step: {shared:,}; with the prompt once per completion {unshared:,} "
        f"({unshared / shared:.1f} times as many)",
        verdict(config, need.fits),
        "",
        "   context   training   rollout   KV of a group   fewer tokens   fits",
    ]
    for context in filter(lambda context: context > R, CONTEXTS):
        need = needs(config, c, ranks, context)
        training, rollout = sum(need.training.values()) / GIB, (need.asleep + share) / GIB
        times = G * (need.prompt + R) / (need.prompt + G * R)
        says = f"{'yes' if need.fits else 'NO'}{', but needs YaRN' if context > c.context_length else ''}"
        sizes = f"{training:6.1f} GiB {rollout:5.1f} GiB{need.group / GIB:12.2f} GiB"
        text.append(f"{context:10,} {sizes}{times:12.1f} x   {says}")
    return "\n".join(text) + "\n"
