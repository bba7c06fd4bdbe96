"""What a training step takes, from a configuration alone: memory by line, tokens with and without sharing.

    python train.py --plan --model Qwen3-8B --ranks 8 --gpu-memory 80 --context 32768 --max-completion 4096
    python sft.py --plan --data chats.jsonl --model Qwen3-8B-Base --ranks 8 --context 16384 --checkpointing

--model is a checkpoint directory, of which only config.json is read, or the name of a published size. The
plan is for the worst that can come: a prompt of --context less --max-completion tokens, completions that fill
a pass; in sft.py a full pass all of which the assistant says.

It counts the tensors that the code holds, at the moments at which memory peaks (tests/test_plan.py holds it
against measured peaks). It leaves out what CUDA and NCCL take for themselves, about 1 to 2 GiB, and
fragmentation.
"""

from pathlib import Path
from typing import NamedTuple

from base.cli import BadInput
from core import schedule
from core.checkpoint import Qwen3Config
from core.parallel import check_heads
from model import HEAD_CHUNK_ELEMENTS
from run.preflight import prompt_room

GIB = 2**30
CONTEXTS = (8192, 16384, 32768, 65536, 131072)
# If more tokens than these train at once, --checkpointing is on by default. Without it Qwen3-8B keeps 8 MB of
# a token: prompts of 4,096 just fit eight GPUs of 80 GiB, 8,192 do not. With it a step has a second forward.
LONG = 4096
RESERVE = 2 * GIB  # for CUDA, NCCL and fragmentation, when saying whether it fits


def parameter_counts(c):
    """Qwen3Config -> parameters of one block, and of all outside the blocks (embedding, head, last norm)."""
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    attention = c.hidden_size * c.head_dim * heads + (2 * c.head_dim if c.qk_norm else 0)
    attention += c.head_dim * (heads - c.num_attention_heads) if c.qkv_bias else 0
    block = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    return block, c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2) + c.hidden_size


def recomputes(config, tokens):
    """Whether blocks are recomputed in backward: as --checkpointing says, else where more than LONG tokens
    train at once."""
    return tokens > LONG if config.checkpointing is None else config.checkpointing


def tokens_of_pass(config):
    """train.py's Config -> completion tokens in the fullest pass."""
    return sum(schedule.fullest(config.max_completion, config.completions, config.tokens_per_pass))


def block_bytes(c, size, exchanged=False):
    """What one block keeps of a token for its backward, and the most that its backward adds to that; bytes.

    size: bytes of the compute dtype. Each norm keeps what it normalised, in fp32, and its result before the
    weight. exchanged: attention's output is there twice, by heads and by tokens.
    """
    C, F = c.hidden_size, c.intermediate_size
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    wide = 4 if size == 2 else 0  # fp32 copies that fp32 compute does not make
    normed = q + k if c.qk_norm else 0
    norms = (size + wide) * (2 * C + normed)
    # Inputs of q, k, v and of the MLP; q and k before their norms (in bf16 the fp32 copy replaces them);
    # rotated q and k, and v.
    projections = 2 * size * C + (size if size == 4 else 0) * normed + size * (q + k + k)
    # Attention's output and log-sum-exp; the sum after it.
    attention = size * q * (1 + exchanged) + 4 * c.num_attention_heads + size * C
    mlp = 4 * size * F  # gate, silu(gate), up, product
    return norms + projections + attention + mlp, size * (C + 2 * F)


def activations(c, prompt, pass_tokens, checkpointing, size, context_parallel=1):
    """{moment: {line: bytes}}: what there is while a pass's head, a pass's block, or the prompt goes back."""
    prompt, pass_tokens = -(-prompt // context_parallel), -(-pass_tokens // context_parallel)  # of one rank
    L, C, kv = c.num_hidden_layers, c.hidden_size, 2 * c.num_key_value_heads * c.head_dim
    kept, transient = block_bytes(c, size, context_parallel > 1)
    per_layer = size * C if checkpointing else kept
    cache = prompt * size * kv * L
    prompt_lines = {
        "prompt, kept for its backward": prompt * (L * per_layer + 2 * size * c.head_dim),
        # Without checkpointing they are among what blocks keep.
        "prompt's keys and values": cache if checkpointing else 0,
        "their gradients": cache,
    }
    pass_kept = {"tokens of a pass, kept": pass_tokens * (L * per_layer + 5 * size * C)}
    chunk = min(pass_tokens, max(1, HEAD_CHUNK_ELEMENTS // c.vocab_size)) * c.vocab_size
    head = {"head: a chunk of logits and their gradient": chunk * (8 + (2 if size == 2 else 0))}
    grad_weight = {"gradient of one weight before it is added": size * c.vocab_size * C}

    def working(tokens):
        return tokens * (transient + (kept if checkpointing else 0))

    far = prompt * size * kv  # a pass's gradient of one layer's keys and values, before it is added
    largest = size * C * c.intermediate_size
    block = {
        "one block, recomputed and going back": max(working(pass_tokens), far),
        "gradient of one weight before it is added": largest,
    }
    back = {
        "one block, recomputed and going back": working(prompt),
        "gradient of one weight before it is added": largest,
    }
    return {
        "the head of a pass": prompt_lines | pass_kept | head | grad_weight,
        "a block of a pass": prompt_lines | pass_kept | block,
        "the prompt's backward": prompt_lines | back,
    }


def training_memory(
    c, prompt, pass_tokens, checkpointing, ranks, size, sharded=True, reference=False, context_parallel=1
):
    """{line: bytes} of one rank at the worst moment of an update, and that moment's name.

    prompt: 0 for sft.py; pass_tokens: of the fullest pass; reference: a second model for the KL term; size:
    bytes of the compute dtype; sharded: by FSDP2 over `ranks` (masters, gradients and moments in fp32), else
    everything is on one device and computes with the masters themselves; context_parallel: ranks that share
    prompt and pass.
    """
    block, rest = parameter_counts(c)
    total = block * c.num_hidden_layers + rest
    ranks = ranks if sharded else 1
    lines = {
        "parameters (fp32)": 4 * total / ranks,
        "gradients (fp32)": 4 * total / ranks,
        "optimizer (fp32 moments)": 8 * total / ranks,
    }
    if sharded:
        # Embedding, head and two blocks gathered, one of them still in its buffer too; a block's gradient, as
        # computed and in fp32 for its reduction, beside the one before it.
        lines["gathered weights and a block's gradient"] = size * (rest + 3 * block) + (size + 8) * block
    if reference:  # its shards, what of it is gathered, and the prompt's keys and values by it
        cache = prompt * 2 * c.num_key_value_heads * c.head_dim * c.num_hidden_layers / context_parallel
        gathered = rest + 2 * block if sharded else 0
        lines["reference model at work"] = size * (total / ranks + gathered + cache)
    moments = activations(c, prompt, pass_tokens, checkpointing, size, context_parallel)
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    return lines | moments[worst], worst


def rollout_memory(c, prompt, completion, completions, tensor_parallel):
    """Bytes on a rank: vLLM's bf16 weights, the KV cache of one completion with its prompt, of a group."""
    block, rest = parameter_counts(c)
    weights = 2 * (block * c.num_hidden_layers + rest) / tensor_parallel
    token = 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim / tensor_parallel
    return weights, token * (prompt + completion), token * (prompt + completions * completion)


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
