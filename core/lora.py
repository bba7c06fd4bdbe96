"""LoRA (arXiv 2106.09685): weights W are frozen, and train by an update of low rank, W + scale * B A.

    settings = lora.Settings(rank=16)                           # scale = alpha / rank
    model = Qwen3.from_pretrained(directory, low_rank=settings) # reads and answers as before
    loss(model.group_logprobs(...)).backward()                  # gradients for A and B only
    lora.merged(model, "model.layers.0.self_attn.q_proj.weight")    # W + scale * B A, whole
    reference = lora.Base(model)                                # the model without its update

W (out, in), A (rank, in), B (out, rank). A starts random, B at 0, so the model starts as W. Gradients and
moments exist for A and B alone, in fp32; W and all else that is frozen is held in the compute dtype. Names
are PEFT's: q_proj.weight, q_proj.lora_A.weight, q_proj.lora_B.weight.

LongAct's mask says which rows of W_Q and W_K a step may move. Row r of B A is row r of B, times A. So
saliency.py masks rows of B where it would mask rows of W.

- This holds: a row that no step has selected is exactly W's, as its row of B is still 0. And a row that a
  step does not select gets nothing from that step's gradient of B.
- This does not: all rows share A, which trains at every step. So a row that was selected once moves with A
  ever after, also with --unselected frozen, which keeps its row of B. With dense training's mask it rests.

saliency.masked_step measures what rows of W + scale * B A really do: moved_selected, moved_unselected.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from core.checkpoint import full_tensor, stored_parameters, weight_shard

TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()  # all linear layers of a block
PEFT = "base_model.model."  # what PEFT puts before a parameter's name


class Settings(NamedTuple):
    """rank of each update; alpha: scale is alpha / rank; targets: of TARGETS; seed: that A is drawn from."""

    rank: int
    alpha: int = 32
    targets: tuple = tuple(TARGETS)
    seed: int = 0


def of_config(config):
    """A run's settings, with lora, lora_alpha, lora_targets and seed -> Settings, or None for rank 0."""
    if not config.lora:
        return None
    return Settings(config.lora, config.lora_alpha, tuple(config.lora_targets), config.seed)


class Linear(nn.Linear):
    """x (..., in) -> x W^T + bias + scale * (x A^T) B^T (..., out). `on`: whether the update counts."""

    def __init__(self, frozen, settings, dtype):
        super().__init__(frozen.in_features, frozen.out_features, frozen.bias is not None)
        self.weight, self.bias = frozen.weight, frozen.bias
        self.lora_A = nn.Linear(self.in_features, settings.rank, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(settings.rank, self.out_features, bias=False, dtype=dtype)
        self.scale, self.on = settings.alpha / settings.rank, True

    def forward(self, x):
        y = super().forward(x)
        return y + self.lora_B(self.lora_A(x) * self.scale) if self.on else y


def add(model, settings, dtype):
    """Freeze a model and give its targets an update to train, in `dtype`; all in place, on the meta device.
    `start` fills the update when there is memory for it."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in settings.targets:
            setattr(model.get_submodule(parent), child, Linear(module, settings, dtype))
    model.low_rank = settings


@torch.no_grad()
def start(model):
    """A uniform in ±1 / sqrt(in), as PEFT draws it, on the CPU, the same on any number of ranks; B zeros."""
    generator = torch.Generator().manual_seed(model.low_rank.seed)
    for name, parameter in model.named_parameters():
        local, first = weight_shard(parameter)
        if name.endswith("lora_A.weight"):
            bound = parameter.size(1) ** -0.5
            whole = torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=generator)
            local.copy_(whole[first : first + len(local)])
        elif name.endswith("lora_B.weight"):
            local.zero_()


# ----------------------------------------------------------------------------------------- without the update


@contextmanager
def without_update(model):
    """Inside, the model is W alone, and no Tracker of its counts."""
    updates = [module for module in model.modules() if isinstance(module, Linear)]
    tracker, model.tracker = model.tracker, None
    for update in updates:
        update.on = False
    try:
        yield
    finally:
        model.tracker = tracker
        for update in updates:
            update.on = True


class Base:
    """What a model was before its update, for the KL term: nothing is held twice. Read it as a model, under
    no_grad."""

    def __init__(self, model):
        self.model = model

    def read(self, *prompt):
        with without_update(self.model):
            return self.model.read(*prompt)

    def completion_logprobs(self, *completions):
        with without_update(self.model):
            return self.model.completion_logprobs(*completions)


# -------------------------------------------------------------------------------------------- with the update


@torch.no_grad()
def merged(model, name, read=None):
    """The weight of a Hugging Face checkpoint that has this name, whole, in its own dtype: W + scale * B A,
    added in fp32, where a model has an update. Every rank must call it.

    read(name) -> a whole parameter, in place of the model's own, which may then be on the meta device.
    """
    read = read or (lambda name: full_tensor(model.get_parameter(name)))
    module, _, which = name.rpartition(".")
    linear, W = model.get_submodule(module), read(name)
    if not isinstance(linear, Linear) or which != "weight":
        return W
    A, B = (read(f"{module}.lora_{factor}.weight").float() for factor in "AB")
    return torch.addmm(W.float(), B, A, alpha=linear.scale).to(W.dtype)


def all_merged(model):
    """-> yields (name, tensor) of a whole Hugging Face checkpoint, one at a time: there is never a second
    model."""
    for name in stored_parameters(model):
        yield name, merged(model, name)


def adapter(model, base, read):
    """A and B as PEFT's adapter_config.json, a dict, and adapter_model.safetensors, {name: tensor on the
    CPU}; (None, {}) for a model without an update. base: the checkpoint that the update is for; read: as in
    `merged`. Every rank must call it."""
    if model.low_rank is None:
        return None, {}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base or ""),
        "r": model.low_rank.rank,
        "lora_alpha": model.low_rank.alpha,
        "target_modules": list(model.low_rank.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    return config, {PEFT + name: read(name).cpu().contiguous() for name in names}
