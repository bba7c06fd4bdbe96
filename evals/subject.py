"""The checkpoint under evaluation: the flags that every evaluation has and their checks, the checkpoint's
config with YaRN, its tokenizer, its name, a clamp."""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from base import processes
from base.cli import BadInput, option
from evals import clamp
from evals.engine import dtype
from evals.results import weights_fingerprint
from model import Qwen3, Qwen3Config
from prompts import chat

YARN_VALIDATED = 4  # the largest factor that Qwen3's model card mentions
YARN_HELP = "YaRN factor instead of what config.json says (0: what it says)"


@dataclass
class Options:
    """The flags that every evaluation has; a script's Config inherits them and adds its own."""

    checkpoint: str = option("", "directory, or ORG/NAME on the Hugging Face hub", positional=True)
    samples: int = option(
        0,
        "items, a draw that is always the same; a smaller one is part of a larger one (0: all)",
        least=0,
        most=10**6,
    )
    seeds: int = option(1, "completions of each item, with sampling seeds 0, 1, ...", least=1, most=1000)
    out: str = option("", "directory of the results (default: runs/<benchmark>/<checkpoint's name>)")
    tensor_parallel: int = option(1, "ranks that share one vLLM engine", least=1)
    vllm_share: float = option(0.9, "share of GPU memory for vLLM", above=0, most=1)
    clamp: str = option(
        "",
        "file of studies/perturb.py: dimensions of Q and K that are held while vLLM generates, in eager mode "
        "(default: none)",
    )
    log_prompts: bool = option(False, "write each prompt's text into results.jsonl, control tokens included")
    compare: list[str] = option(
        [], "two results.jsonl or their directories: compare them, evaluate nothing (default: none)"
    )


def check_options(options, usage):
    """Raises BadInput if no checkpoint is given (`usage` is how to give one), or if the ranks cannot be
    grouped into engines of --tensor-parallel ranks."""
    if not options.checkpoint:
        raise BadInput(f"no checkpoint is given: {usage}")
    world, tensor_parallel = processes.rank_and_world()[1], options.tensor_parallel
    if world % tensor_parallel:
        raise BadInput(f"--tensor-parallel {tensor_parallel} does not divide the {world} ranks")
    if tensor_parallel > 1 and not torch.cuda.is_available():
        raise BadInput(f"--tensor-parallel {tensor_parallel} needs a GPU per rank, and there is none")


def check_seeds(options, sampling, flags):
    """Raises BadInput for more than one seed with greedy sampling; `flags` are those that choose another."""
    if options.seeds > 1 and sampling["temperature"] == 0:
        raise BadInput(f"--seeds {options.seeds} needs {flags}: greedy completions are all the same")


def drawn(items, samples, where):
    """--samples of the items, in their order. Raises BadInput if `where` has fewer."""
    if samples > len(items):
        raise BadInput(f"--samples {samples}: {where} has only {len(items)}")
    order = list(range(len(items)))
    random.Random("samples").shuffle(order)
    return [items[i] for i in sorted(order[: samples or len(items)])]


def load(checkpoint, yarn=0.0):
    """-> (config, tokenizer, original context in tokens, of which YaRN's factor is a multiple; 0 where
    config.json has another type of RoPE, which YaRN cannot extend).

    yarn: a factor that replaces the one in config.json; 0 keeps what config.json says. Raises BadInput unless
    the directory is a checkpoint of a supported model with its tokenizer, and for a factor on another type of
    RoPE."""
    config = Qwen3Config.from_pretrained(checkpoint)
    # Qwen3 was trained on 32,768 tokens; its 40,960 positions are those and room for an answer.
    trained = {40960: 32768}.get(config.max_position_embeddings, config.max_position_embeddings)
    scaling = {
        "rope_type": "yarn",
        "original_max_position_embeddings": trained,
        **(config.rope_scaling or {}),
    }
    if scaling["rope_type"] != "yarn":
        if yarn:
            raise BadInput(
                f"--yarn: the RoPE of {checkpoint} is of type {scaling['rope_type']}; leave it out"
            )
        scaling["original_max_position_embeddings"] = 0
    if yarn:
        if yarn <= 1:
            raise BadInput(f"--yarn must be more than 1, not {yarn:g}")
        config = replace(config, rope_scaling={**scaling, "factor": yarn})
    tokenizer = chat.load_tokenizer(checkpoint, config.vocab_size)
    Qwen3.check_weights(config, checkpoint)
    return config, tokenizer, scaling["original_max_position_embeddings"]


def yarn_for(tokens, trained):
    """How to extend a context of `trained` tokens to `tokens`, as a part of a message."""
    if not trained:
        return "YaRN does not extend its type of RoPE"
    factor = math.ceil(tokens / trained)
    if factor <= YARN_VALIDATED:
        return f"give --yarn {factor}"
    validated = f"Qwen3's model card validates no more than {YARN_VALIDATED}"
    return f"{tokens} need a YaRN factor of {factor}, and {validated}"


def load_clamp(path, config, tensor_parallel):
    """The file of --clamp -> (the clamp, how it was chosen); (None, None) for "".

    Raises BadInput if the file is not a clamp of the Qwen3Config, or if ranks share an engine.
    """
    if not path:
        return None, None
    if tensor_parallel > 1:
        raise BadInput(f"--clamp needs whole heads on a rank: --tensor-parallel 1, not {tensor_parallel}")
    return clamp.load(path, config)


def settings(checkpoint, config, clamp_about=None):
    """What the settings of every evaluation say about its model; clamp_about: how its clamp was chosen."""
    return {
        "checkpoint": str(Path(checkpoint)),
        "weights": processes.on_rank_0(lambda: weights_fingerprint(checkpoint)),
        "rope_scaling": config.rope_scaling,
        "dtype": dtype(),
        **({"clamp": clamp_about} if clamp_about else {}),
    }


def described(checkpoint, clamp_about):
    """The model in a report's first line."""
    return f"{checkpoint}, clamp: {clamp_about['rule']}" if clamp_about else checkpoint


def name(checkpoint):
    """The name of a checkpoint's directory, of the run in runs/NAME/checkpoint, or on the hub."""
    directory = Path(checkpoint).resolve()
    if directory.parent.name == "snapshots":  # of the hub client's cache: models--ORG--NAME/snapshots/HASH
        return directory.parent.parent.name.rpartition("--")[2]
    return directory.parent.name if directory.name == "checkpoint" else directory.name


def results_directory(options, benchmark):
    """--out, or its default."""
    return options.out or f"runs/{benchmark}/{name(options.checkpoint)}"
