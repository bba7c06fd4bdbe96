"""Held-out prompts before, during and after training."""

import torch

from base import bars


def evaluate(held_out, sample, completions, when, show_bar=True):
    """Accuracy on each set of held-out prompts, {name: rows}: at temperature 1, as the paper evaluates,
    `completions` of a prompt, and greedily, one -> {name: {"prompts", "prompt_tokens" (mean), "accuracy",
    "accuracy_greedy"}}.

    sample(rows, indices, n, temperature, show_bar) -> groups with rewards, of which 1.0 and more is right,
    see train.py. when: how the line that is printed of each set begins; "" for none.
    show_bar: vLLM's, while it generates.
    """
    results = {}
    for name, rows in held_out.items():
        result = results[name] = {"prompts": len(rows)}
        for key, n, temperature in (("accuracy", completions, 1.0), ("accuracy_greedy", 1, 0.0)):
            groups = sample(
                rows, [2**24 + i for i in range(len(rows))], n, temperature, show_bar=show_bar and bool(when)
            )
            result["prompt_tokens"] = sum(len(group.prompt) for group in groups) / len(groups)
            result[key] = torch.stack([group.rewards >= 1 for group in groups]).float().mean().item()
        if when:
            text = f"{result['accuracy']:.3f} of {len(rows)} held-out prompts right at temperature 1"
            which = f" ({name})" if len(held_out) > 1 else ""
            bars.say(f"{when} {text}, {result['accuracy_greedy']:.3f} greedy{which}")
    return results
