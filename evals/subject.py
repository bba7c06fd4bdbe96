"""The checkpoint that an evaluation is about: its config with YaRN, its tokenizer, its name, a clamp; wrong
ones refused early."""

import math
from dataclasses import replace
from pathlib import Path

import torch

from base import processes
from base.cli import BadInput
from evals import clamp
from evals.engine import dtype
from evals.results import weights_fingerprint
from model import Qwen3, Qwen3Config
from prompts import chat

YARN_VALIDATED = 4  # the largest factor that Qwen3's model card speaks of
CLAMP_HELP = "file of studies/perturb.py: dimensions of Q and K that are held while vLLM generates, in eager mode (default: none)"


def load(checkpoint, yarn=0.0):
    """-> (config, tokenizer, original context in tokens, of which YaRN's factor is a multiple). yarn: factor
    instead of what config.json says, 0 for what it says. Raises BadInput for what is no checkpoint of Qwen3
    with a Qwen tokenizer."""
    config = Qwen3Config.from_pretrained(checkpoint)
    # Qwen3 was trained on 32,768; its 40,960 positions are those and room for an answer.
    trained = {40960: 32768}.get(config.max_position_embeddings, config.max_position_embeddings)
    scaling = {
        "rope_type": "yarn",
        "original_max_position_embeddings": trained,
        **(config.rope_scaling or {}),
    }
    if yarn:
        if yarn <= 1:
            raise BadInput(f"--yarn must be more than 1, not {yarn:g}")
        config = replace(config, rope_scaling={**scaling, "factor": yarn})
    tokenizer = chat.load_tokenizer(checkpoint, config.vocab_size)
    Qwen3.check_weights(config, checkpoint)
    return config, tokenizer, scaling["original_max_position_embeddings"]


def yarn_for(tokens, trained):
    """What gives a checkpoint whose original context is `trained` one of `tokens`, as a part of a message."""
    factor = math.ceil(tokens / trained)
    if factor <= YARN_VALIDATED:
        return f"give --yarn {factor}"
    return f"{tokens} need a YaRN factor of {factor}, and Qwen3's model card validates no more than {YARN_VALIDATED}"


def check_ranks(tensor_parallel):
    """Raises BadInput unless the ranks can be grouped into engines of `tensor_parallel`."""
    world = processes.rank_and_world()[1]
    if world % tensor_parallel:
        raise BadInput(f"--tensor-parallel {tensor_parallel} does not divide the {world} ranks")
    if tensor_parallel > 1 and not torch.cuda.is_available():
        raise BadInput(f"--tensor-parallel {tensor_parallel} needs a GPU per rank, and there is none")


def load_clamp(path, config, tensor_parallel):
    """--clamp -> (the clamp, how it was chosen), (None, None) for "". Raises BadInput for a file that is no
    clamp of the Qwen3Config, and where ranks share an engine."""
    if not path:
        return None, None
    if tensor_parallel > 1:
        raise BadInput(f"--clamp needs whole heads on a rank: --tensor-parallel 1, not {tensor_parallel}")
    return clamp.load(path, config)


def settings(checkpoint, config, clamped=None):
    """What every evaluation's settings say about its model; clamped: load_clamp's how."""
    return {
        "checkpoint": str(Path(checkpoint)),
        "weights": processes.on_rank_0(lambda: weights_fingerprint(checkpoint)),
        "rope_scaling": config.rope_scaling,
        "dtype": dtype(),
        **({"clamp": clamped} if clamped else {}),
    }


def described(checkpoint, clamped):
    """The model in a report's first line."""
    return f"{checkpoint}, clamp: {clamped['rule']}" if clamped else checkpoint


def name(checkpoint):
    place = Path(checkpoint).resolve()
    return place.parent.name if place.name == "checkpoint" else place.name  # runs/NAME/checkpoint
