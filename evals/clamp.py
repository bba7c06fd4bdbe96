"""Clamps: dimensions of Q and K that are held at a value while a model runs, in vLLM or in model.py.

    clamp = choose(magnitudes, means, fraction=0.3, rule="top")
    save("top.safetensors", clamp, {"rule": "top"})              # what the evaluations' --clamp reads
    rollout.clamp(clamp)                                         # from now on; rollout.clamp({}) ends it

A clamp is {"model.layers.0.self_attn.q_proj": (H * D,) fp32, "...k_proj": (Hk * D,) fp32, ...} for every
layer: the value that a dimension of the projection's output is held at, NaN where it is left alone. H query
heads, Hk key heads, D head size.
"""

import json
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import saliency
from base import durable, limits
from base.cli import BadInput


class Means:
    """Context manager: the global mean of each projection's output, over all tokens, heads and dimensions of
    what our model reads inside it. Afterwards .values is {"model.layers.0.self_attn.q_proj": float,
    ...k_proj..., ...}.
    """

    def __init__(self, model):
        self.model, self.sums, self.counts = model, {}, {}

    def __enter__(self):
        self.handles = [
            module.register_forward_hook(partial(self._add, name))
            for name, module in self.model.named_modules()
            if name.endswith(("q_proj", "k_proj"))
        ]
        return self

    def _add(self, name, module, arguments, output):
        self.sums[name] = self.sums.get(name, 0) + output.sum(dtype=torch.float64)
        self.counts[name] = self.counts.get(name, 0) + output.numel()

    def __exit__(self, *exc):
        for handle in self.handles:
            handle.remove()
        self.values = {name: (total / self.counts[name]).item() for name, total in self.sums.items()}


def choose(magnitudes, means, fraction, rule, generator=None):
    """saliency's magnitudes {name: (H, D)} and Means.values -> the clamp that holds the rows which
    saliency.select_rows selects by `rule` at their projection's mean; rule "untouched": one that holds
    none."""
    free = {name: torch.full((magnitude.numel(),), torch.nan) for name, magnitude in magnitudes.items()}
    if rule == "untouched":
        return free
    masks = saliency.select_rows(magnitudes, fraction, rule, generator)
    return {name: values.masked_fill(masks[f"{name}.weight"], means[name]) for name, values in free.items()}


# ------------------------------------------------------------------------------------------------------ files


def save(path, clamp, about):
    """A safetensors file with the dictionary `about`, which says how the clamp was chosen, in its metadata.
    Raises BadInput when the disk does not take it."""
    try:
        with durable.replacing(path) as partial:
            save_file(clamp, partial, {"about": json.dumps(about)})
    except SafetensorError as error:
        raise BadInput(f"{path} cannot be written: {error}") from error


def load(path, config):
    """-> clamp, about; about also has a hash of the clamp. Raises BadInput unless the file is a clamp of this
    Qwen3Config."""
    try:
        limits.check(path)
        with safe_open(path, "pt") as file:
            clamp = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise BadInput(f"--clamp {path} cannot be read: {error}") from error
    try:
        about = json.loads(metadata["about"])
        about["rule"]  # evaluations name a clamp by it
    except (KeyError, TypeError, ValueError, RecursionError):
        raise BadInput(f"--clamp {path} is no clamp; studies/perturb.py makes them") from None
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    wanted = {
        f"model.layers.{i}.self_attn.{which}_proj": ((n * config.head_dim,), torch.float32)
        for i in range(config.num_hidden_layers)
        for which, n in heads.items()
    }
    if {name: (tuple(values.shape), values.dtype) for name, values in clamp.items()} != wanted:
        raise BadInput(
            f"--clamp {path} is of a model with other layers or heads; "
            "make one of this checkpoint by studies/perturb.py"
        )
    values = b"".join(clamp[name].numpy().tobytes() for name in wanted)
    return clamp, {**about, "values": durable.digest(values)}
