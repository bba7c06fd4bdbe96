"""--dry-run of train.py and sft.py: one step in small, before a long run.

It comes when the script has checked all it checks before training: settings, the checkpoint's config.json,
tokenizer and tensors (their headers), every row of the data, its length in tokens, its reward. From there on
it goes the same way as training, vLLM included, with another model, shorter texts and one step:
    model        LAYERS layers of random weights, about HIDDEN wide, with the heads and RoPE of the model's
                 config.json; an embedding of as many rows as its tokenizer has ids
    texts        at most TOKENS tokens: prompts without their middle, chats without their beginning
    completions  GROUP to a prompt, as many prompts as the ranks need
    rewards      the reward is called on each answer, but counts 1 and 0 in turn: random weights answer
                 nothing, and dynamic sampling wants groups whose rewards differ
Its temporary files are removed, those of one killed with -9 by the next. It does not say whether the
real model fits into memory; --plan does.
"""

import atexit
import contextlib
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from base import durable, interrupt
from base.cli import BadInput
from model import Qwen3

LAYERS, HIDDEN = 2, 64
TOKENS, COMPLETION, GROUP = 256, 16, 4
KIND, locks = "dry run", []  # what its directory is; the lock, held as long as the process lives
PASSED = "dry run: passed; its temporary files are removed"


def stand_in(model_config, tokenizer, checkpoint):
    """Write the small model with the tokenizer files of `checkpoint` to a temporary directory, removed when
    the process ends -> the directory, in which the model is `model`. Every rank must call it."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    directory = [None]
    if rank == 0:
        directory = [str(temporary_directory())]
    if dist.is_initialized():
        dist.broadcast_object_list(directory)
    directory = Path(directory[0])
    vocabulary = 1 + max(tokenizer.get_vocab().values())
    small = replace(model_config, **small_sizes(model_config), vocab_size=vocabulary)
    model = Qwen3.from_config(small, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(directory / "model", companions_from=checkpoint)
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        print(
            f"dry run: 1 step of {LAYERS} layers of random weights, {small.hidden_size} wide, "
            f"{small.num_attention_heads} query and {small.num_key_value_heads} key heads of "
            f"{small.head_dim}; texts of at most {TOKENS} tokens; in {directory}"
        )
    return directory


def small_sizes(model_config):
    """-> the fields of a Qwen3Config that make a small model of another: a width that its family can have."""
    heads, head_dim = model_config.num_attention_heads, model_config.head_dim
    if model_config.family == "qwen2":  # vLLM's is as wide as its heads, of which it has none smaller
        head_dim = min(head_dim, 32)
        width = heads * head_dim
    elif model_config.family == "llama":  # transformers' is a multiple of the number of heads
        width = heads * -(-HIDDEN // heads)
    else:
        width = HIDDEN
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": width, "intermediate_size": 2 * width}
    return {**sizes, "head_dim": head_dim}


def temporary_directory():
    """A new directory, removed when this process ends, by a signal too. What one that was killed with -9 left
    is removed now: its lock is free."""
    place = Path(tempfile.gettempdir())
    for left in place.glob("dry-run-*"):
        with contextlib.suppress(BadInput, OSError):  # it is in use, or another user's
            lock = durable.claim(left, KIND, [])
            shutil.rmtree(left)
            lock.close()
    fresh = Path(tempfile.mkdtemp(prefix="new-dry-run-"))  # not yet of the names above: it has no lock
    locks.append(durable.claim(fresh, KIND, []))
    directory = fresh.rename(place / fresh.name.removeprefix("new-"))
    remove = partial(shutil.rmtree, directory, ignore_errors=True)
    atexit.register(remove)
    interrupt.before_end.append(remove)
    return directory


def of_rl(config, model_config, tokenizer, world):
    """train.py's settings -> those of the dry run."""
    directory = stand_in(model_config, tokenizer, config.model)
    return replace(
        config,
        model=str(directory / "model"),
        name=str(directory / "run"),  # an absolute path stays one behind "runs" /
        truncate_prompts=True,
        context=TOKENS,
        max_completion=COMPLETION,
        overlong_cache=min(config.overlong_cache, COMPLETION),
        prompts=config.updates * world,
        completions=GROUP,
        steps=1,
        eval_every=0,
        resume="",
    )


def of_sft(config, model_config, tokenizer, world):
    """sft.py's settings -> those of the dry run."""
    directory = stand_in(model_config, tokenizer, config.model)
    places = {"model": str(directory / "model"), "out": str(directory / "run")}
    return replace(config, **places, batch=2 * world, steps=1, resume="")


def in_turn(score_all):
    """scoring.start's, called as it is, with 1.0 and 0.0 in turn for what it says."""

    def called(pairs):
        return [[float(i % 2 == 0)] * len(values) for i, values in enumerate(score_all(pairs))]

    return called


def endings(encode):
    """What turns a row into (token ids, which are trained on) -> the same of the last TOKENS only."""

    def ending(row):
        ids, trained = encode(row)
        return ids[-TOKENS:], [False, *trained[-TOKENS:][1:]]  # nothing predicts the first

    return ending
