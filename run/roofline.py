"""Seconds of a step by a roofline: each kind of work at the rate that its kernels reach on a card, added up.

The work follows from lengths and shapes alone; every completion has its full length. A card's rates are
assumptions (CARDS), which `assumptions` says in words for --plan to print. Not counted: ranks that wait for
each other, rewards, weights to vLLM, what a kernel's start takes (decoding with a small model is slower).
"""

from typing import NamedTuple

from run.memory_plan import low_rank_parameters, parameter_counts, trained_parameters

GIGA, TERA = 1e9, 1e12
FLASH_3 = 1.6  # times as fast as flash attention 2, on Hopper
COMPILED = 0.4  # what is left of the bytes of norms, rotation and SwiGLU, compiled


class Card(NamedTuple):
    """A card: "GB" as it is sold, GiB that a program sees of it, and rates that kernels reach on it."""

    name: str
    sold: int  # GB
    memory: float  # GiB, torch.cuda's total_memory
    matrices: float  # TFLOP/s of large matrix products in bf16
    attention: float  # TFLOP/s of flash attention 2, head size 128, forward
    attention_back: float  # the same, backward
    stream: float  # TB/s of kernels that read and write
    read: float  # TB/s of kernels that only read, as decoding does
    link: float  # GB/s that a card sends to the others of its node
    host: float  # GB/s to the host's memory


# Rates are 60 to 85% of the data sheets', by published measurements of such kernels, none of them ours: dense
# bf16 with fp32 sums 989 TFLOP/s (H100, H200), 312 (A100), 362 (L40S), 165 (RTX 4090); memory 3.35, 4.8, 2.0,
# 0.86, 1.0 TB/s. On the H100 flash attention 2 reaches less than 40%. Links are NVLink; PCIe of the last two.
CARDS = (
    Card("H100", 80, 79.1, 600, 370, 300, 2.6, 2.85, 360, 50),
    Card("A100", 80, 79.1, 240, 200, 160, 1.6, 1.75, 240, 25),
    Card("H200", 141, 139.8, 600, 370, 300, 3.7, 4.1, 360, 50),
    Card("L40S", 48, 44.4, 230, 180, 150, 0.67, 0.73, 20, 25),
    Card("RTX4090", 24, 23.6, 130, 120, 100, 0.78, 0.85, 12, 25),
)
NAMES = [card.name for card in CARDS]


def card_of(name, gb):
    """--gpu and --gpu-memory, either of which may be left out ("" or None) -> Card, with the memory that a
    card of so many GB has, or with so many GiB if none is sold with it."""
    named = [card for card in CARDS if card.name == name]
    card = min(named or CARDS, key=lambda card: abs(card.sold - (gb or CARDS[0].sold)))
    return card._replace(sold=gb, memory=gb) if gb and gb != card.sold else card


def assumptions(card):
    """-> lines that say what the seconds are made of."""
    return [
        f"assumed of {card.name}, not measured: {card.matrices:g} TFLOP/s in matrix products; in attention "
        f"{card.attention:g}, and {card.attention_back:g} backward;",
        f"{card.stream:g} TB/s in other kernels, {card.read:g} in decoding; {card.link:g} GB/s between GPUs, "
        "beside the arithmetic;",
        "every completion of full length; no rank waits for another; DAPO may sample several rounds",
    ]


def pairs(step):
    """Pairs of tokens that attend, in a group: the prompt's own, completions' with it and with themselves."""
    return step.prompt**2 / 2 + step.own * (step.prompt + step.completion / 2)


def streamed(c, lora, size):
    """Bytes that one block's eager kernels read and write of a token in a forward, without matrix products
    and attention: norms, rotation, residuals, the MLP's gate; LoRA's sums. size: bytes of the dtype."""
    C, F = c.hidden_size, c.intermediate_size
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    norm = 36 if size == 2 else 28  # an element: to fp32, square, mean, scale, back, times the weight
    sums = 3 * size * (q + 2 * k + 2 * C + 2 * F) if lora else 0
    heads = ((norm if c.qk_norm else 0) + 10 * size) * (q + k)
    return (2 * norm + 6 * size) * C + heads + 5 * size * F + sums


def training_seconds(c, step, card, size=2):
    """{kind of work: seconds} of the training of a step on each rank. What is sent between ranks goes on
    beside the rest (see `total`). Backward is two forwards, in attention two and a half; LoRA's needs no
    gradients of what is frozen. size: bytes of the compute dtype."""
    (block, _), low_rank = parameter_counts(c), low_rank_parameters(c, step.lora)
    L = c.num_hidden_layers
    tokens, forwards = step.prompt + step.own, 2 if step.checkpointing else 1
    back = 1 if step.lora else 2
    matrices = 2 * L * tokens * ((forwards + back) * block + (forwards + 2) * low_rank)
    attention = 4 * L * c.num_attention_heads * c.head_dim * pairs(step)  # FLOPs of a forward
    head = (4 + 2 * back) * c.vocab_size * c.hidden_size * step.own
    logits = 130 * c.vocab_size * step.own  # bytes: a table in fp32, read and written some 30 times
    groups = step.prompts / step.ranks  # a rank's, or as much work in parts of more
    faster = FLASH_3 if step.flash_attention == 3 else 1
    again = forwards if step.attention_recompute else 1
    attention *= (again / card.attention + 2.5 / card.attention_back) / faster
    other = L * tokens * (forwards + 2) * streamed(c, step.lora, size) * (COMPILED if step.compile else 1)
    update = {"adamw": 28, "adamw8bit": 16, "adamw-offload": 28}[step.optimizer] / TERA / card.stream
    update += 16 / GIGA / card.host if step.optimizer == "adamw-offload" else 0
    return {
        "matrices": groups * matrices / TERA / card.matrices,
        "attention": groups * attention / TERA,
        "head": groups * (head / card.matrices + logits / card.stream) / TERA,
        "other kernels": groups * other / TERA / card.stream,
        "optimizer": update * trained_parameters(c, step.lora) / step.shards,
        "communication": sent(c, step) / GIGA / card.link,
    }


def sent(c, step):
    """Bytes that a rank receives while a step trains: weights in bf16 for every forward and backward of a
    prompt or pass, their gradients in fp32; heads and tokens, which a context group exchanges."""
    weights = 2 * 2 * trained_parameters(c, 0) + 4 * trained_parameters(c, step.lora)
    stages = 1 + -(-step.own // step.pass_tokens)
    n, shards = step.context_parallel, step.shards
    heads = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim  # q, k, v and the output
    passed = (3 if step.checkpointing else 2) * 2 * heads * c.num_hidden_layers * (step.prompt + step.own)
    groups = step.prompts * n / step.ranks
    return groups * (stages * weights * (1 - 1 / shards) + passed * (1 - 1 / n) / n)


def total(kinds):
    """{kind of work: seconds} of `training_seconds` -> seconds. Communication goes on beside the rest."""
    return max(sum(kinds.values()) - kinds["communication"], kinds["communication"])


def sampling_seconds(c, step, card, engine, room):
    """{kind of work: seconds} of a round on each rank, by its memory_plan.Engine, which has `room` bytes for
    its KV cache. A step of decoding reads the weights, and keys and values of every sequence: vLLM shares
    what a prompt takes, not its reading. What does not fit waits for its turn."""
    block, _ = parameter_counts(c)
    L = c.num_hidden_layers
    groups = step.oversample * step.prompts / step.ranks  # of a rank; an engine's ranks have its part of more
    attention = 4 * L * c.num_attention_heads * c.head_dim * step.prompt**2 / 2
    prefill = 2 * block * L * step.prompt / TERA / card.matrices + attention / TERA / card.attention
    turns = max(1, groups * step.tensor_parallel * engine.group / max(room, engine.one))
    token = engine.one / step.context * step.tensor_parallel
    cached = groups * step.completions * token * (step.prompt + step.completion / 2)
    steps = step.completion / TERA / card.read
    return {
        "prefill": groups * prefill,
        "reading weights": steps * turns * engine.weights,
        "reading keys and values": steps * cached,
    }
