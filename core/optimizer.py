"""AdamW of --optimizer and --masters: what is kept of a parameter between steps, in how many bytes and where.

    adamw          two fp32 moments beside the weight: torch.optim.AdamW, fused on CUDA
    adamw8bit      two moments of 8 bits, each block of 256 with a scale of its own (arXiv 2110.02861)
    adamw-offload  two fp32 moments in the CPU's memory; some rows at a time visit the GPU

The step itself is PyTorch's in all of them, in fp32. --masters bf16 keeps weights, and so gradients, in bf16
and rounds each new weight up or down at random, so that it is right on average. Rounded to the nearest, a
change of less than half a step of bf16 (1/512 to 1/256 of the weight) would never move it.

What is kept for a row lies in that row: a block ends where its row ends. So a frozen row can be put back
exactly (saliency.masked_step), any number of ranks computes the same, and moments are sharded, saved and read
as the weights are. Why no library, and what was measured: docs/optimizers.md.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

from core.checkpoint import local_part

OPTIMIZERS = ("adamw", "adamw8bit", "adamw-offload")
MASTERS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCK = 256  # elements of a row that share a scale
SLICE = 2**22  # elements whose moments are unpacked at a time, in whole rows


class Bytes(NamedTuple):
    """Bytes of a parameter: on the GPU its weight, gradient and moments; in the CPU's memory."""

    weight: float
    gradient: float
    moments: float
    host: float


def bytes_per_parameter(optimizer, masters):
    """Choices of --optimizer and --masters -> Bytes, of a matrix whose rows are a multiple of BLOCK."""
    width = MASTERS[masters].itemsize
    moments = {"adamw": 8, "adamw8bit": 2 * (1 + 4 / BLOCK), "adamw-offload": 0}[optimizer]
    return Bytes(width, width, moments, 8 if optimizer == "adamw-offload" else 0)


def make_optimizer(config, parameters):
    """The optimizer of --optimizer, --masters, --learning-rate, --adam-beta2 and --weight-decay."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    how = {"betas": (0.9, config.adam_beta2), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw" and config.masters == "fp32":
        # Without `fused` CUDA would make fp32 copies of everything during the step.
        return torch.optim.AdamW(parameters, config.learning_rate, **how, fused=parameters[0].is_cuda)
    return SlicedAdamW(parameters, config.learning_rate, config.optimizer, **how)


class SlicedAdamW(torch.optim.Optimizer):
    """AdamW, some rows at a time: unpack their moments, step in fp32, pack them again.

    The state of a parameter has `step` and, of its shape or at least with its rows and sharded with them,
    exp_avg and exp_avg_sq (fp32), or first, first_scale, second and second_scale (`pack`). Vectors, of which
    there are few, are never packed.
    """

    def __init__(self, parameters, lr, kind, betas, weight_decay):
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})
        self.kind = kind

    @torch.no_grad()
    def step(self, closure=None):
        number = 0  # of the parameter, which makes its random numbers its own
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.state[parameter] = self.new_state(parameter)
                    self.step_of(group, parameter, self.state[parameter], number)

    def new_state(self, parameter):
        step = torch.zeros(())
        if self.kind == "adamw8bit" and parameter.dim() == 2:
            rows, blocks = parameter.size(0), -(-parameter.size(1) // BLOCK)
            state = {"step": step}
            for name in ("first", "second"):
                state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
                state[name + "_scale"] = as_rows_of(parameter, torch.zeros(rows, blocks))
            return state
        host = self.kind == "adamw-offload"
        how = {"device": "cpu", "pin_memory": parameter.is_cuda} if host else {}
        first, second = (torch.zeros_like(parameter, dtype=torch.float32, **how) for _ in range(2))
        return {"step": step, "exp_avg": first, "exp_avg_sq": second}

    def step_of(self, group, parameter, state, number):
        weight, grad = local_part(parameter), local_part(parameter.grad)
        kept = {name: local_part(value) for name, value in state.items() if name != "step"}
        beta1, beta2 = group["betas"]
        how = {"beta1": beta1, "beta2": beta2, "eps": group["eps"], "amsgrad": False, "maximize": False}
        how |= {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        how |= {"foreach": False, "fused": weight.is_cuda}
        row_numbers = local_part(as_rows_of(parameter, torch.arange(parameter.size(0))))
        count = max(1, SLICE // math.prod(parameter.shape[1:]))
        for start in range(0, len(weight), count):
            rows = slice(start, start + count)
            own = {name: values[rows] for name, values in kept.items()}
            first, second = unpack_moments(own, weight.device)
            wide = weight[rows].float()  # of fp32 it is no copy, and the step changes it in place
            steps = [state["step"].to(weight.device, copy=True)]
            adamw([wide], [grad[rows].float()], [first], [second], [], steps, **how)
            pack_moments(own, first, second)
            if weight.dtype == torch.bfloat16:
                bits = random_16_bits(places(row_numbers[rows], wide), state["step"].long(), number)
                weight[rows] = round_at_random(wide, bits)
        state["step"] += 1


def as_rows_of(parameter, values):
    """values (rows, ...), equal on all ranks -> the same on the parameter's device, sharded as it is."""
    values = values.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return values
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)


# ---------------------------------------------------------------------------------------------- 8-bit moments


@cache
def levels(signed):
    """The 256 values that a code stands for, from -1 (signed) or 0 to 1, increasing, fp32: of dynamic tree
    quantization (arXiv 1511.04561), seven decades of which the k-th has half as many values as that above it.
    They are bitsandbytes' and torchao's."""
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1)
        means = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += means.tolist() + (-means).tolist() * signed
    return torch.tensor(sorted(values))


def pack(values, codes, scales, signed):
    """values (n, C) fp32, not negative unless signed -> in place codes (n, C) uint8 and scales (n, blocks)
    fp32, the largest magnitude of each block: values are about levels[codes] * scales."""
    C = values.size(1)
    blocks = F.pad(values, (0, -C % BLOCK)).unflatten(1, (-1, BLOCK))
    scales.copy_(blocks.abs().amax(-1))
    table = levels(signed).to(values.device)
    relative = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    nearest = torch.bucketize(relative, (table[1:] + table[:-1]) / 2, out_int32=True).flatten(1)[:, :C]
    # What is not negative is a root that the step divides by: too small for the levels it is the smallest,
    # not 0. In a block of zeros it is 0 by its scale.
    codes.copy_(nearest if signed else nearest.clamp(min=1))


def unpack(codes, scales, signed):
    """What `pack` made -> (n, C) fp32."""
    scale_of_each = scales.repeat_interleave(BLOCK, 1)[:, : codes.size(1)]
    return levels(signed).to(codes.device)[codes.int()] * scale_of_each


def unpack_moments(kept, device):
    """Some rows of a parameter's state -> its two moments, fp32 on the device; in place where they are so."""
    if "exp_avg" in kept:
        return kept["exp_avg"].to(device), kept["exp_avg_sq"].to(device)
    root = unpack(kept["second"], kept["second_scale"], False)
    return unpack(kept["first"], kept["first_scale"], True), root.square_()


def pack_moments(kept, first, second):
    """The reverse. Of the second moment the root is packed: 8 bits then hold gradients over seven decades of
    size, as of the first moment, not three and a half."""
    if "exp_avg" in kept:
        kept["exp_avg"].copy_(first)
        kept["exp_avg_sq"].copy_(second)
    else:
        pack(first, kept["first"], kept["first_scale"], True)
        pack(second.sqrt_(), kept["second"], kept["second_scale"], False)


# ---------------------------------------------------------------------------------------- stochastic rounding


def round_at_random(values, bits):
    """fp32 -> bf16, one of the two neighbours: the one away from 0 with the probability that the expected
    value is the value itself. bits: as many int32, uniform in [0, 2^16)."""
    return ((values.view(torch.int32) + bits) & -(2**16)).view(torch.float32).to(torch.bfloat16)


def places(numbers, rows):
    """The numbers (n,) of some rows of a parameter, and these rows -> int64 of the rows' shape: the place of
    each element in the parameter."""
    width = math.prod(rows.shape[1:])
    within = torch.arange(width, device=rows.device).view(rows.shape[1:])
    return numbers.view(-1, *[1] * within.dim()) * width + within


def random_16_bits(places, step, number):
    """places (...) int64 -> int32 in [0, 2^16), other ones at each step and in each parameter (number). They
    follow from these three alone: any number of ranks draws the same, and so does a run that goes on."""
    return (scramble(scramble(places) ^ scramble(scramble(step) ^ number)) & 0xFFFF).int()


def scramble(x):
    """A hash of 32 bits, each of which depends on all bits of x; int or int64 tensor."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x
