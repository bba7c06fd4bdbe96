"""Shapes that the measurements run: random weights, no files."""

import platform

import torch

from checkpoint import Qwen3Config

# 4 layers, 256 wide, 8 query and 2 key heads of 32: small enough that one row per completion still fits two cores.
LAPTOP = Qwen3Config(256, 4, 8, 768, True, vocab_size=8192, num_key_value_heads=2, head_dim=32)


def build(name):
    """ "laptop" or the name of a published size ("0.6B", "4B", ...) -> Qwen3Config."""
    return LAPTOP if name == "laptop" else Qwen3Config.preset(name)


def card(config):
    """One line that says on what and with what the figures were measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    c = config
    return (
        f"{device}, torch {torch.__version__}, Python {platform.python_version()}; Qwen3 with {c.num_hidden_layers} layers, "
        f"{c.hidden_size} wide, {c.num_attention_heads} query and {c.num_key_value_heads} key heads of {c.head_dim}, "
        f"vocabulary {c.vocab_size:,}"
    )
