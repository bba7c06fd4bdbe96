"""What the measurements run: shapes with random weights, and one group forward and backward as in
train.py."""

import platform

import torch

from core import schedule
from core.checkpoint import Qwen3Config, local_part
from run import memory_plan

PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bf16, from NVIDIA's data sheets

# 4 layers, 256 wide, 8 query and 2 key heads of 32: small enough that one row per completion still fits two
# cores.
LAPTOP = Qwen3Config(256, 4, 8, 768, True, vocab_size=8192, num_key_value_heads=2, head_dim=32)


def build(name):
    """The Qwen3Config of "laptop" or of a published size ("0.6B", "4B", ...)."""
    return LAPTOP if name == "laptop" else Qwen3Config.preset(name)


def fill(model):
    """Random weights on the model's own device (one CPU thread takes three minutes for 8B) -> the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shard = local_part(parameter)
            if name.endswith("norm.weight"):
                shard.fill_(1)
            else:
                shard.normal_(0, model.config.initializer_range)
    return model


def card(config):
    """One line that says on which machine and with which model the figures were measured."""
    cuda, c = torch.cuda.is_available(), config
    device = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    return (
        f"{device}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"Qwen3 with {c.num_hidden_layers} layers, {c.hidden_size} wide, {c.num_attention_heads} query and "
        f"{c.num_key_value_heads} key heads of {c.head_dim}, vocabulary {c.vocab_size:,}"
    )


def peak_flops():
    """Dense bf16 FLOPs a second of this GPU by its data sheet; None for one that is not listed, or a CPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((1e12 * tflops for card, tflops in PEAK_TFLOPS.items() if card in name), None)


def model_flops(config, prompt, lengths):
    """FLOPs of a group's forward and backward by a Qwen3Config: 6 per weight and token (head: completion
    tokens only) and 12 per head size, head and pair of tokens that attend. Recomputation is not counted."""
    block, _ = memory_plan.parameter_counts(config)
    pairs = prompt**2 / 2 + sum(n * (prompt + n / 2) for n in lengths)
    linear = block * config.num_hidden_layers * (prompt + sum(lengths))
    linear += config.vocab_size * config.hidden_size * sum(lengths)
    return 6 * linear + 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs


def transformers_twin(model, dtype, device):
    """transformers' Qwen3 with the weights of `model` (each with its own copy) and its "sdpa" attention."""
    import transformers  # not all measurements need it

    with torch.device(device):
        settings = {**model.config.to_dict(dtype), "bos_token_id": None, "eos_token_id": None}
        settings = transformers.Qwen3Config(**settings)
        twin = transformers.Qwen3ForCausalLM._from_config(settings, attn_implementation="sdpa", dtype=dtype)
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin


def draw_group(config, prompt, lengths, device):
    """prompt ids (P,) and completions [(R_i,)] of random tokens."""
    ids = [torch.randint(0, config.vocab_size, (n,), device=device) for n in (prompt, *lengths)]
    return ids[0], ids[1:]


def train_on(model, prompt, completions, weights, tokens_per_pass):
    """Forward and backward of sum(weights * log-probabilities), weights [(R_i,)]; the gradients are added to
    the model's."""
    read = model.read(prompt)
    leaves = read.detach()
    for part in schedule.passes([len(c) for c in completions], tokens_per_pass):
        logprobs, _ = model.completion_logprobs(leaves, [completions[i] for i in part])
        (logprobs * torch.cat([weights[i] for i in part])).sum().backward()
    read.backward(leaves)
