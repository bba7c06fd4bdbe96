"""A training step with all weights and with LoRA: memory and time, on random weights.

    python bench/lora_step.py                    # 82 million parameters, 512 prompt and 4 x 32 other tokens
    python bench/lora_step.py --ranks 0 1 16 64 --prompt 2048

A line of JSON for each rank of the updates, 0 for all weights, without and with recomputing, in a process of
its own
  lora, checkpointing  the rank; whether blocks are recomputed
  parameters, trained  all of them, A and B among them; how many train
  resident_bytes       the most memory that the process had beyond what it had before the model (on a CPU)
  step_peak_bytes      the most that a step allocates besides weights and moments
  seconds              of a step: forward, backward, masks, clipping, AdamW; the fastest of three
"""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from measure import peak_bytes, seconds
from shapes import draw_group, fill, train_on

import saliency
from base.cli import one_line_errors, option, parse
from core import lora
from core.checkpoint import Qwen3Config
from model import Qwen3

SHAPE = Qwen3Config(768, 12, 12, 2048, True, vocab_size=8192, num_key_value_heads=4, head_dim=64)


@dataclass
class Config:
    ranks: list[int] = option([0, 16], "ranks of the updates; 0: all weights train", least=0)
    prompt: int = option(512, "tokens of the prompt", least=1)
    completions: int = option(4, "completions of 32 tokens, two to a pass", least=1)
    checkpointing: bool = option(None, "recompute blocks in backward (default: without, then with)")


def measure(rank, config):
    """A step in this process -> {key: value} of its line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = fill(Qwen3.empty(SHAPE, device=device, low_rank=lora.Settings(rank) if rank else None))
    model.checkpointing = config.checkpointing
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-6, fused=device.type == "cuda")
    prompt, completions = draw_group(SHAPE, config.prompt, [32] * config.completions, device)
    weights = [torch.ones(len(completion), device=device) for completion in completions]

    def step():
        with saliency.Tracker(model) as tracker:
            train_on(model, prompt, completions, weights, 64)
        masks = saliency.select_rows(tracker.magnitudes())
        squares = saliency.mask_gradients(model, masks)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        saliency.masked_step(optimizer, model, masks, squares)
        optimizer.zero_grad()

    (time,) = seconds(step, rounds=3, least=0)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # before the profiler, which has its own memory
    return {
        "lora": rank,
        "checkpointing": config.checkpointing,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained": sum(parameter.numel() for parameter in trained),
        "resident_bytes": (most - before) * 1024 if device.type == "cpu" else None,
        "step_peak_bytes": peak_bytes(step),
        "seconds": round(time, 4),
    }


one_line_errors()
config = parse(Config, __doc__)
if len(config.ranks) == 1 and config.checkpointing is not None:
    print(json.dumps(measure(config.ranks[0], config)), flush=True)
else:
    sizes = ["--prompt", str(config.prompt), "--completions", str(config.completions)]
    for how in ["--no-checkpointing", "--checkpointing"]:
        for rank in config.ranks:
            subprocess.run([sys.executable, __file__, *sizes, "--ranks", str(rank), how], check=True)
