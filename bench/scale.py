"""A group forward and backward at real size: seconds, tokens/s, model FLOPs utilisation, peak memory, without
vLLM.

    python bench/scale.py --shape 0.6B --prompts 8192 16384 32768        # random weights, bf16, one GPU
    python bench/scale.py --shape laptop --prompts 512 1024 --completion 64

Weights and gradients are in bf16 and there is no optimizer: one GPU cannot hold the fp32 weights and moments
of a 4B model, which FSDP2 shards. FLOPs are the model's: 6 per weight and token (head: completion tokens
only) and 12 per head size, head and pair of tokens that attend; what --checkpointing computes again is not
counted.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from measure import peak_bytes, seconds
from shapes import build, card, draw_group, train_on
from tqdm import tqdm

from base import processes
from base.cli import one_line_errors, option, parse
from model import Qwen3
from run import memory_plan

PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bf16, from NVIDIA's data sheets


@dataclass
class Config:
    shape: str = option("0.6B", "laptop, or the name of a published size")
    prompts: list[int] = option([8192, 16384, 32768], "prompt lengths", least=1)
    completions: int = option(16, "completions of the prompt", least=1)
    completion: int = option(512, "tokens of each", least=1)
    tokens_per_pass: int = option(8192, "completion tokens that train at once", least=1)
    checkpointing: bool = option(True, "recompute blocks in backward")
    rounds: int = option(3, "timed rounds", least=1)
    out: str = option("", "file for the results as JSON lines")


one_line_errors()
config = parse(Config, __doc__)
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = processes.compute_dtype()
shape = build(config.shape)
model = Qwen3.from_config(shape, dtype, device)
model.checkpointing = config.checkpointing
block, _ = memory_plan.parameter_counts(shape)
name = torch.cuda.get_device_name() if device.type == "cuda" else ""
peak_flops = next((1e12 * tflops for card_name, tflops in PEAK_TFLOPS.items() if card_name in name), None)
G, R = config.completions, config.completion
weights = [torch.full((R,), 1e-3, device=device) for _ in range(G)]


def run(prompt, completions):
    train_on(model, prompt, completions, weights, config.tokens_per_pass)
    model.zero_grad()


print(card(shape), dtype, "recomputing blocks" if config.checkpointing else "")
out = open(config.out, "a") if config.out else None
bar = tqdm(config.prompts, unit="length")
for P in bar:
    prompt, completions = draw_group(shape, P, [R] * G, device)
    step = partial(run, prompt, completions)
    (taken,) = seconds(step, rounds=config.rounds)
    tokens, pairs = P + G * R, P * P / 2 + G * R * (P + R / 2)
    linear = 6 * (block * shape.num_hidden_layers * tokens + shape.vocab_size * shape.hidden_size * G * R)
    attention = 12 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * pairs
    result = {
        "card": card(shape),
        "P": P,
        "G": G,
        "R": R,
        "seconds": taken,
        "tokens_per_second": tokens / taken,
        "unshared_tokens_per_second": G * (P + R) / taken,
        "flops_utilisation": (linear + attention) / taken / peak_flops if peak_flops else None,
        "tflops": (linear + attention) / taken / 1e12,
        "peak_bytes": peak_bytes(step),
    }
    utilisation = f"{result['flops_utilisation']:.1%}" if peak_flops else "unknown for this device"
    bar.write(
        f"P {P:6} G {G} R {R}: {taken:.3f} s, {tokens / taken:,.0f} tokens/s (unshared it would take "
        f"{G * (P + R) / taken:,.0f}), {result['tflops']:.2f} TFLOP/s, utilisation {utilisation}, "
        f"peak {result['peak_bytes'] / 2**30:.2f} GiB beyond weights"
    )
    if out:
        print(json.dumps(result), file=out, flush=True)
