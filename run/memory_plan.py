"""Bytes of a training step and of its rollout on one rank, from a configuration alone, line by line.

It counts the tensors that the code holds, at the moments at which memory peaks; tests/run/test_plan.py holds
it against measured peaks.
"""

from core import schedule
from model import HEAD_CHUNK_ELEMENTS

# If more tokens than these train at once, --checkpointing is on by default. Without it Qwen3-8B keeps 8 MB of
# a token: prompts of 4,096 just fit eight GPUs of 80 GiB, 8,192 do not. With it a step has a second forward.
LONG = 4096


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
