"""What does not fit shows at once, and in words."""

from contextlib import contextmanager

import torch

from base.cli import BadInput
from core import schedule


@contextmanager
def explain(what, fix):
    """An out-of-memory error in here, CUDA's or a CPU's, becomes a BadInput that says in training on what,
    and what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise BadInput(
            f"out of memory in training on {what}: lower {fix}; --plan shows what takes how much"
        ) from error


def explained(config, prompt_tokens):
    """`explain` for a group of train.py."""
    what = f"{prompt_tokens} prompt tokens and up to {config.tokens_per_pass} completion tokens a pass"
    flags = f"--tokens-per-pass or --context ({config.context}), or use --checkpointing, more ranks or --context-parallel"
    return explain(what, flags)


def rehearse(config, model, reference, prompt_tokens):
    """The worst that can come, for nothing but its memory: the longest prompt and one pass of the most
    completions, forward and backward. Gradients of 0 are added to the model's. Raises BadInput where it does
    not fit."""
    lengths = schedule.fullest(config.max_completion, config.completions, config.tokens_per_pass)
    ids = torch.zeros(max(prompt_tokens, *lengths), dtype=torch.int64, device=next(model.parameters()).device)
    completions = [ids[:length] for length in lengths]
    with explained(config, prompt_tokens):
        prompt = model.read(ids[:prompt_tokens])
        leaves = prompt.detach()
        if reference:
            with torch.no_grad():
                reference.completion_logprobs(reference.read(ids[:prompt_tokens]), completions)
        logprobs, _ = model.completion_logprobs(leaves, completions)
        (0 * logprobs.sum()).backward()
        prompt.backward(leaves)
