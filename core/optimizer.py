"""AdamW of --optimizer and --masters: what is kept of a parameter between steps, in how many bytes and where.

    adamw          two fp32 moments beside the weight: torch.optim.AdamW, fused on CUDA
    adamw8bit      two moments of 8 bits, each block of 256 with a scale of its own (arXiv 2110.02861)
    adamw-offload  two fp32 moments in the CPU's memory; a slice of rows at a time visits the GPU

The step itself is PyTorch's in all of them, in fp32. --masters bf16 keeps weights (and so gradients) in bf16
and rounds each updated weight up or down at random, so that it is right on average: rounded to the nearest,
an update of less than half a step of bf16, 1/512 of the weight, would never move it.

What all this needs of a row lies in that row: blocks end where a row ends. So a frozen row can be put back
exactly (saliency.masked_step), any number of ranks computes the same, and FSDP2's shards are saved and read
as those of the weights are. Why no library: docs/optimizers.md.
"""

from typing import NamedTuple

import torch

BLOCK = 256  # elements of a row that share a scale
SLICE = 2**22  # elements that are in fp32 at a time, in whole rows
OPTIMIZERS = ("adamw", "adamw8bit", "adamw-offload")
MASTERS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Bytes(NamedTuple):
    """Bytes of a parameter: on the GPU its weight, gradient and moments; in the CPU's memory."""

    weight: float
    gradient: float
    moments: float
    host: float


def bytes_per_parameter(optimizer, masters):
    """Choices of --optimizer and --masters -> Bytes, of rows of a multiple of BLOCK elements."""
    width = MASTERS[masters].itemsize
    moments = {"adamw": 8, "adamw8bit": 2 * (1 + 4 / BLOCK), "adamw-offload": 0}[optimizer]
    return Bytes(width, width, moments, 8 if optimizer == "adamw-offload" else 0)
