"""Running out of memory: found before the first step, and explained in words."""

from contextlib import contextmanager

import torch

from base.cli import BadInput
from core import schedule


@contextmanager
def explain(what, fix):
    """Context manager: an out-of-memory error inside it, CUDA's, vLLM's or a CPU's, becomes a BadInput. what:
    what was being done; fix: the flags to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        ours = "allocate memory", "out of memory"  # a CPU's; what vLLM raises when it wakes up
        if not isinstance(error, torch.OutOfMemoryError) and not any(word in str(error) for word in ours):
            raise
        plan = "--plan shows what takes the memory"
        raise BadInput(f"out of memory in {what}: lower {fix}; {plan}") from error


def explained(config, prompt_tokens):
    """`explain` for a group of train.py. config: train.py's Config."""
    most = f"up to {config.tokens_per_pass} completion tokens a pass"
    what = f"training on {prompt_tokens} prompt tokens and {most}"
    flags = f"--tokens-per-pass or --context ({config.context})"
    return explain(what, f"{flags}, or use --checkpointing, more ranks or --context-parallel")


def rehearse(config, model, reference, prompt_tokens):
    """Forward and backward of the largest group that can come, to see that it fits in memory: the longest
    prompt, and the pass that takes the most. It leaves no gradients.

    config: train.py's Config; reference: the KL term's model, or None. Raises BadInput if it does not fit.
    """
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
    model.zero_grad()
