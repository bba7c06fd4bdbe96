"""Bytes of a training step and of its rollout on one rank, from a configuration alone, line by line.

It counts the tensors that the code holds, at the moments at which memory peaks; tests/run/test_plan.py holds
it against measured peaks. `reserve` is for the rest: CUDA, NCCL, fragmentation.
"""

import math
from typing import NamedTuple

from core import schedule
from core.optimizer import SLICE, bytes_per_parameter
from model import HEAD_CHUNK_ELEMENTS

GIB = 2**30
# If more tokens than these train at once, --checkpointing is on by default. Without it Qwen3-8B keeps 8 MB of
# a token: prompts of 4,096 just fit eight GPUs of 80 GiB, 8,192 do not. With it a step has a second forward.
LONG = 4096
GRAPHS = 1.5 * GIB  # vLLM's CUDA graphs: an assumption
MOMENTS = {"adamw": "fp32", "adamw8bit": "8 bits", "adamw-offload": "in the CPU's memory"}


class Step(NamedTuple):
    """What decides how much a step of train.py takes: its numbers, and flags of the same name."""

    ranks: int
    prompts: int  # groups, over all ranks
    prompt: int  # tokens of the longest
    completion: int  # tokens of the longest
    completions: int  # of a group
    tokens_per_pass: int
    checkpointing: bool
    vllm_share: float
    context_parallel: int = 1
    tensor_parallel: int = 1
    replicate: int = 1
    beta: float = 0.0
    optimizer: str = "adamw"
    masters: str = "fp32"
    lora: int = 0
    attention_recompute: bool = True
    flash_attention: int = 2
    compile: bool = False
    kv_cache: str = "auto"
    oversample: float = 1.0

    @classmethod
    def of(cls, config, ranks, context):
        """train.py's Config, number of GPUs, tokens of the longest sequence -> Step."""
        return cls(
            ranks,
            config.prompts,
            context - config.max_completion,
            config.max_completion,
            config.completions,
            config.tokens_per_pass,
            recomputes(config, max(context, tokens_of_pass(config))),
            config.vllm_share,
            config.context_parallel,
            config.tensor_parallel,
            config.replicate,
            config.beta,
            config.optimizer,
            config.masters,
            config.lora,
            attention_recompute=config.attention_recompute,
            flash_attention=config.flash_attention,
            compile=config.compile,
            kv_cache=config.kv_cache,
            oversample=config.oversample,
        )

    @classmethod
    def of_sft(cls, config, ranks, context):
        """The same of sft.py: a pass is completions of no prompt."""
        tokens = max(context, config.tokens_per_pass)
        lengths = ranks, 0, context, -(-tokens // context)
        kept = {"optimizer": config.optimizer, "masters": config.masters, "lora": config.lora}
        return cls(ranks, *lengths, tokens, recomputes(config, tokens), 0.0, **kept)

    @property
    def context(self):
        return self.prompt + self.completion

    @property
    def own(self):
        """Tokens of a group's completions."""
        return self.completions * self.completion

    @property
    def pass_tokens(self):
        """Completion tokens in the fullest pass."""
        return sum(schedule.fullest(self.completion, self.completions, self.tokens_per_pass))

    @property
    def shards(self):
        """Ranks that one copy of the model lies over."""
        return self.ranks // self.replicate


def reserve(memory):
    """GiB of a GPU -> bytes of it to leave free, an assumption: 2 GiB for CUDA, NCCL and vLLM's graphs, which
    stay while it sleeps; a twentieth of the GPU for fragmentation."""
    return 2 * GIB + memory * GIB / 20


def parameter_counts(c):
    """Qwen3Config -> parameters of one block, and of all outside the blocks (embedding, head, last norm)."""
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    attention = c.hidden_size * c.head_dim * heads + (2 * c.head_dim if c.qk_norm else 0)
    attention += c.head_dim * (heads - c.num_attention_heads) if c.qkv_bias else 0
    block = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    return block, c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2) + c.hidden_size


def low_rank_parameters(c, rank):
    """Parameters of LoRA's updates of one block, of all its linear layers."""
    C, F = c.hidden_size, c.intermediate_size
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return rank * (2 * (C + q) + 2 * (C + k) + 3 * (C + F))


def recomputes(config, tokens):
    """Whether blocks are recomputed in backward: as --checkpointing says, else where more than LONG tokens
    train at once."""
    return tokens > LONG if config.checkpointing is None else config.checkpointing


def tokens_of_pass(config):
    """train.py's Config -> completion tokens in the fullest pass."""
    return sum(schedule.fullest(config.max_completion, config.completions, config.tokens_per_pass))


def block_bytes(c, size, exchanged=False, lora=0):
    """What one block keeps of a token for its backward, and the most that its backward adds to that; bytes.

    size: bytes of the compute dtype. exchanged: attention's output is there twice, by heads and by tokens.
    Each norm keeps what it normalised, in fp32, and, unless its weight is frozen, its result before that.
    """
    C, F = c.hidden_size, c.intermediate_size
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    wide = 4 if size == 2 else 0  # fp32 copies that fp32 compute does not make
    normed = q + k if c.qk_norm else 0
    norms = (wide if lora else size + wide) * (2 * C + normed)
    # Inputs of q, k, v and of the MLP; q and k before their norms (in bf16 the fp32 copy replaces them);
    # rotated q and k, and v.
    projections = 2 * size * C + (size if size == 4 else 0) * normed + size * (q + k + k)
    # Attention's output and log-sum-exp; the sum after it.
    attention = size * q * (1 + exchanged) + 4 * c.num_attention_heads + size * C
    mlp = 4 * size * F  # gate, silu(gate), up, product
    low_rank = 7 * size * lora  # x A, of each linear layer
    return norms + projections + attention + mlp + low_rank, size * (C + 2 * F)


def last_block_bytes(c, size, lora=0):
    """What the last block keeps of a prompt's token, whose result nobody asks for: what its keys, values and
    measured queries come from, as in block_bytes."""
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    wide, normed = 4 if size == 2 else 0, q + k if c.qk_norm else 0
    norms = (size + wide) * (c.hidden_size + normed)
    return norms + size * (c.hidden_size + 2 * k + 3 * lora) + (size if size == 4 else 0) * normed


def activations(
    c, prompt, pass_tokens, checkpointing, size, context_parallel=1, lora=0, attention_recompute=True
):
    """{moment: {line: bytes}}: what there is while a pass's head, a pass's block, or the prompt goes back."""
    prompt, pass_tokens = -(-prompt // context_parallel), -(-pass_tokens // context_parallel)  # of one rank
    L, C, kv = c.num_hidden_layers, c.hidden_size, 2 * c.num_key_value_heads * c.head_dim
    kept, transient = block_bytes(c, size, context_parallel > 1, lora)
    per_layer, attended = (size * C if checkpointing else kept), 0
    if checkpointing and not attention_recompute:  # the output of an attention and its log-sum-exp
        attended = L * c.num_attention_heads * (size * c.head_dim + 4)
    of_prompt = (
        L * per_layer + attended if checkpointing else (L - 1) * kept + last_block_bytes(c, size, lora)
    )
    cache = prompt * size * kv * L
    prompt_lines = {
        "prompt, kept for its backward": prompt * (of_prompt + 2 * size * c.head_dim),
        # Without checkpointing they are among what blocks keep.
        "prompt's keys and values": cache if checkpointing else 0,
        "their gradients": cache,
    }
    pass_kept = {"tokens of a pass, kept": pass_tokens * (L * per_layer + 2 * attended + 5 * size * C)}
    chunk = min(pass_tokens, max(1, HEAD_CHUNK_ELEMENTS // c.vocab_size)) * c.vocab_size
    head = {"head: a chunk of logits and their gradient": chunk * (8 + (2 if size == 2 else 0))}
    # What is frozen has none; those of LoRA are small.
    of_head, largest = (0, 0) if lora else (size * c.vocab_size * C, size * C * c.intermediate_size)
    one_weight = "gradient of one weight before it is added"

    def working(tokens):
        return tokens * (transient + (kept if checkpointing else 0))

    far = prompt * size * kv  # a pass's gradient of one layer's keys and values, before it is added
    going_back = "one block, recomputed and going back"
    block = {going_back: max(working(pass_tokens), far), one_weight: largest}
    back = {going_back: working(prompt), one_weight: largest}
    return {
        "the head of a pass": prompt_lines | pass_kept | head | {one_weight: of_head},
        "a block of a pass": prompt_lines | pass_kept | block,
        "the prompt's backward": prompt_lines | back,
    }


def trained_parameters(c, lora):
    """Parameters that train: all of them, or those of LoRA's updates of rank `lora`."""
    block, rest = parameter_counts(c)
    return low_rank_parameters(c, lora) * c.num_hidden_layers if lora else block * c.num_hidden_layers + rest


def model_memory(c, ranks, size, optimizer="adamw", masters="fp32", lora=0):
    """{line: bytes} of weights, gradients and moments on each of `ranks` ranks, and how much of it stays
    while vLLM generates. size: bytes of the compute dtype, in which LoRA holds what is frozen."""
    each, trained = bytes_per_parameter(optimizer, masters), trained_parameters(c, lora)
    lines, of = {}, ""
    if lora:
        lines["frozen weights"], of = size * trained_parameters(c, 0) / ranks, " of LoRA"
    gradients = each.gradient * trained / ranks
    lines[f"weights{of} ({masters})"] = each.weight * trained / ranks
    lines[f"gradients{of} ({masters})"] = gradients
    lines[f"moments{of} ({MOMENTS[optimizer]})"] = each.moments * trained / ranks
    return lines, sum(lines.values()) - gradients


def update_memory(c, ranks, optimizer, masters, lora, masked):
    """{line: bytes} of what there is only during the optimizer's step. masked: by LongAct."""
    copies = 0
    if masked and not lora:  # saliency.masked_step says how far they moved; of LoRA's they are small
        rows = (c.num_attention_heads + c.num_key_value_heads) * c.head_dim * c.num_hidden_layers
        copies = bytes_per_parameter(optimizer, masters).weight * rows * c.hidden_size / ranks
    largest = lora * c.intermediate_size if lora else c.hidden_size * max(c.vocab_size, c.intermediate_size)
    # Bytes an element while core/optimizer.py unpacks moments, steps and packs, rounds at random; measured.
    element = {"adamw": 0, "adamw8bit": 24, "adamw-offload": 12}[optimizer] + 22 * (masters == "bf16")
    return {
        "W_Q and W_K before it": copies,
        "a slice of weights and moments in fp32": element * min(SLICE, largest / ranks),
    }


def training_memory(
    c,
    prompt,
    pass_tokens,
    checkpointing,
    ranks,
    size,
    sharded=True,
    reference=False,
    context_parallel=1,
    optimizer="adamw",
    masters="fp32",
    lora=0,
    attention_recompute=True,
):
    """{line: bytes} of one rank at the worst moment of an update, and that moment's name.

    prompt: 0 for sft.py; pass_tokens: of the fullest pass; reference: a second model for the KL term; size:
    bytes of the compute dtype; sharded: by FSDP2 over `ranks`, else everything is on one device and computes
    with the masters themselves; context_parallel: ranks that share prompt and pass; lora: its rank.
    """
    block, rest = parameter_counts(c)
    ranks = ranks if sharded else 1
    lines, _ = model_memory(c, ranks, size, optimizer, masters, lora)
    if sharded:
        # Embedding, head and two blocks gathered, one of them still in its buffer too; a block's gradient, as
        # computed and in fp32 for its reduction, beside the one before it.
        trained = low_rank_parameters(c, lora) if lora else block
        gathered = size * (rest + 3 * block) + (size + 8) * trained
        lines["gathered weights and a block's gradient"] = gathered
    if reference and not lora:  # its shards, what of it is gathered, and the prompt's keys and values by it
        cache = prompt * 2 * c.num_key_value_heads * c.head_dim * c.num_hidden_layers / context_parallel
        gathered = rest + 2 * block if sharded else 0
        lines["reference model at work"] = size * (trained_parameters(c, 0) / ranks + gathered + cache)
    how = context_parallel, lora, attention_recompute
    moments = activations(c, prompt, pass_tokens, checkpointing, size, *how)
    moments["the optimizer's step"] = update_memory(c, ranks, optimizer, masters, lora, prompt > 0)
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    return lines | moments[worst], worst


def step_memory(c, step):
    """`training_memory` of a Step on GPUs, and the bytes of it that stay while vLLM generates."""
    kept = {"optimizer": step.optimizer, "masters": step.masters, "lora": step.lora}
    tokens, reference = (step.prompt, step.pass_tokens, step.checkpointing), step.beta > 0 and not step.lora
    _, asleep = model_memory(c, step.shards, 2, **kept)
    if reference:
        asleep += 2 * trained_parameters(c, 0) / step.shards
    shared = {"reference": reference, "context_parallel": step.context_parallel}
    shared["attention_recompute"] = step.attention_recompute
    return *training_memory(c, *tokens, step.shards, 2, **shared, **kept), asleep


class Engine(NamedTuple):
    """Bytes of a vLLM engine on one rank. Its share of the GPU is weights, working memory, KV cache."""

    weights: float  # bf16
    working: float  # activations of its largest batch, or logits and probabilities of its sampler; graphs
    one: float  # KV cache of a completion and its prompt
    group: float  # KV cache of a group


def engine_memory(c, step, memory):
    """-> Engine on a GPU of `memory` GiB, by which vLLM 0.32 chooses its batch (engine/arg_utils.py)."""
    tokens, engines = 16384 if memory >= 70 else 8192, max(1, step.ranks // step.tensor_parallel)
    sequences = schedule.sequences(math.ceil(step.prompts * step.oversample), step.completions, engines)
    weights = 2 * trained_parameters(c, 0) / step.tensor_parallel
    batch = 2 * tokens * (2 * c.hidden_size + 3 * c.intermediate_size / step.tensor_parallel)
    sampler = sequences * c.vocab_size * (2 + 3 * 4)
    size = 1 if step.kv_cache == "fp8" else 2
    token = size * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim / step.tensor_parallel
    return Engine(
        weights, max(batch, sampler) + GRAPHS, token * step.context, token * (step.prompt + step.own)
    )
