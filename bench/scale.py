"""A group forward and backward at real size: seconds, tokens/s, model FLOPs utilisation, peak memory, without
vLLM.

    python bench/scale.py --shape 0.6B --prompts 8192 16384 32768        # random weights, bf16, one GPU
    python bench/scale.py --shape laptop --prompts 512 1024 --completion 64

Weights and gradients are in bf16 and there is no optimizer: one GPU cannot hold the fp32 weights and moments
of a 4B model, which FSDP2 shards. FLOPs are the model's (bench/shapes.py): what --checkpointing computes
again is not counted.
"""

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from measure import peak_bytes, seconds
from shapes import build, card, draw_group, fill, model_flops, peak_flops, train_on
from tqdm import tqdm

from base import processes
from base.cli import one_line_errors, option, parse
from core.attention import use_flash_attention_3
from model import Qwen3


@dataclass
class Config:
    shape: str = option("0.6B", "laptop, or the name of a published size")
    prompts: list[int] = option([8192, 16384, 32768], "prompt lengths", least=1)
    completions: int = option(16, "completions of the prompt", least=1)
    completion: int = option(512, "tokens of each", least=1)
    tokens_per_pass: int = option(8192, "completion tokens that train at once", least=1)
    checkpointing: bool = option(True, "recompute blocks in backward")
    attention_recompute: bool = option(True, "attention too; --no-attention-recompute keeps its results")
    flash_attention: int = option(
        2, "attention kernels; 3 needs a Hopper GPU and flash_attn_interface", [2, 3]
    )
    compile: bool = option(False, "norms, rotation and SwiGLU by torch.compile")
    rounds: int = option(3, "timed rounds", least=1)
    least: float = option(4.0, "time more rounds until so many seconds have passed", least=0)
    out: str = option("", "file for the results as JSON lines")


one_line_errors()
config = parse(Config, __doc__)
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = processes.compute_dtype()
shape = build(config.shape)
model = fill(Qwen3.empty(shape, dtype, device))
model.compute_as(config)
if config.flash_attention == 3:
    use_flash_attention_3()
peak = peak_flops()
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
    (taken,) = seconds(step, rounds=config.rounds, least=config.least)
    tokens, flops = P + G * R, model_flops(shape, P, [R] * G)
    result = {
        "card": card(shape),
        "settings": asdict(config),
        "P": P,
        "G": G,
        "R": R,
        "seconds": taken,
        "tokens_per_second": tokens / taken,
        "unshared_tokens_per_second": G * (P + R) / taken,
        "flops_utilisation": flops / taken / peak if peak else None,
        "tflops": flops / taken / 1e12,
        "peak_bytes": peak_bytes(step),
    }
    utilisation = f"{result['flops_utilisation']:.1%}" if peak else "unknown for this device"
    bar.write(
        f"P {P:6} G {G} R {R}: {taken:.3f} s, {tokens / taken:,.0f} tokens/s (unshared it would take "
        f"{G * (P + R) / taken:,.0f}), {result['tflops']:.2f} TFLOP/s, utilisation {utilisation}, "
        f"peak {result['peak_bytes'] / 2**30:.2f} GiB beyond weights"
    )
    if out:
        print(json.dumps(result), file=out, flush=True)
