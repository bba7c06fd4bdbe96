"""What takes which share of a training step with the real engine: saliency, weight sync, prefill; and how
near to the machine's peak forward and backward are. Needs vLLM.

    python bench/engine.py                        # assets/tiny, 16 prompts x 16 completions of recall
    python bench/engine.py --model DIRECTORY --prompts 8 --completions 8 --context 1024 --rounds 1

Saliency is the time inside its own functions (sums of squares, magnitudes, rows, masks). The memory of the
sync is the peak of what is allocated during it. Prefill is what vLLM's own counters say. The peak is that of
a product of two square matrices of 2,048, FLOPs are the model's (shapes.model_flops), shares of forward and
backward are of operators' own time, by the profiler.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from measure import peak_bytes, seconds, synchronize
from shapes import card, model_flops, train_on
from torch.profiler import ProfilerActivity, profile

import saliency
from base import processes
from base.cli import one_line_errors, option, parse
from model import Qwen3
from prompts import chat, tasks


@dataclass
class Config:
    model: str = option("assets/tiny", "checkpoint directory")
    prompts: int = option(16, "groups of the step", least=1)
    completions: int = option(16, "completions of a prompt", least=2)
    max_completion: int = option(24, "maximum completion length, in tokens", least=1)
    context: int = option(512, "maximum length of a sequence in vLLM, in tokens", least=2)
    checkpointing: bool = option(False, "recompute blocks in backward")
    rounds: int = option(5, "timed rounds", least=1)


one_line_errors()
config = parse(Config, __doc__)

from rollout import Rollout  # noqa: E402 - importing vLLM takes seconds, and the flags are checked before

_, _, device = processes.rank_and_device()
dtype = processes.compute_dtype()
processes.connect(device)
engine = Rollout(config.model, config.context, str(dtype).removeprefix("torch."))
model = Qwen3.from_pretrained(config.model, dtype, device)
model.checkpointing = config.checkpointing
optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
tokenizer = chat.load_tokenizer(config.model, model.config.vocab_size)
rows = tasks.Source("recall", "bench", 17, 17)
prompts = [chat.encode_prompt(tokenizer, rows[i], False, config.context) for i in range(config.prompts)]
stop = chat.stop_ids(tokenizer)


def counters():
    return {metric.name: metric.value for metric in engine.engine.get_metrics() if hasattr(metric, "value")}


def rollout():
    seeds = [i * 2**20 for i in range(len(prompts))]
    return engine.generate(prompts, config.completions, 1.0, config.max_completion, seeds, stop)


before = counters()
groups = rollout()
counted = {name: value - before[name] for name, value in counters().items()}
queried, cached = counted["vllm:prefix_cache_queries"], counted["vllm:prefix_cache_hits"]


def train():
    for prompt, group in zip(prompts, groups):
        completions = [torch.tensor(completion.ids, device=device) for completion in group]
        weights = [torch.full((len(c),), 1e-3, device=device) for c in completions]
        train_on(model, torch.tensor(prompt, device=device), completions, weights, 8192)


def track():
    with saliency.Tracker(model) as tracker:
        train()
    masks = saliency.select_rows(tracker.magnitudes())
    saliency.mask_gradients(model, masks)
    optimizer.zero_grad()


spent = 0.0


def timed(function):
    """The function, with its time added to `spent`. On a GPU that includes waiting for it, which overstates
    it."""

    def run(*args):
        global spent
        synchronize()
        started = time.perf_counter()
        result = function(*args)
        synchronize()
        spent += time.perf_counter() - started
        return result

    return run


def kinds():
    """-> {kind of operator: its share of train()'s time}"""
    which = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as record:
        train()
        synchronize()
    times = dict.fromkeys(("matrix products", "attention kernels", "the rest"), 0.0)
    for event in record.key_averages():
        product = any(name in event.key for name in ("aten::mm", "aten::addmm", "gemm", "nvjet"))
        kind = "matrix products" if product else "attention kernels" if "flash" in event.key else "the rest"
        times[kind] += getattr(event, which)
    return {kind: time / sum(times.values()) for kind, time in times.items()}


def step_optimizer():
    for parameter in model.parameters():
        parameter.grad = gradients[parameter]
    optimizer.step()


def generate():
    engine.engine.reset_prefix_cache()
    rollout()


def sync():
    engine.sync(model)


square = torch.randn(2048, 2048, device=device, dtype=dtype)
(square_seconds,) = seconds(lambda: square @ square, rounds=3, least=1.0)
peak = 2 * 2048**3 / square_seconds
train()
gradients = {parameter: parameter.grad for parameter in model.parameters()}
rollout_seconds, tracked_seconds, step_seconds, sync_seconds = seconds(
    generate, track, step_optimizer, sync, rounds=config.rounds
)
saliency.Squares.fill = timed(saliency.Squares.fill)
saliency.Tracker.add = timed(saliency.Tracker.add)
saliency.Tracker.magnitudes = timed(saliency.Tracker.magnitudes)
saliency.select_rows, saliency.mask_gradients = timed(saliency.select_rows), timed(saliency.mask_gradients)
shares = []
for _ in range(config.rounds):
    spent, started = 0.0, time.perf_counter()
    track()
    synchronize()
    shares.append(spent / (time.perf_counter() - started))
saliency_seconds = min(shares) * tracked_seconds
step = rollout_seconds + tracked_seconds + step_seconds + sync_seconds
size = sum(p.numel() * p.element_size() for p in model.parameters())
block = engine.engine.llm_engine.vllm_config.cache_config.block_size
# Each completion computes an incomplete last block itself.
whole = sum(len(prompt) // block * block for prompt in prompts)
rest = config.completions * sum(len(prompt) % block for prompt in prompts)
memory = peak_bytes(sync) / size
print(card(model.config), dtype)
print(
    f"step {step:.3f} s: rollout {rollout_seconds:.3f}, forward and backward {tracked_seconds:.3f}, "
    f"AdamW {step_seconds:.4f}"
)
lengths = [[len(c.ids) for c in group] for group in groups]
flops = sum(model_flops(model.config, len(prompt), own) for prompt, own in zip(prompts, lengths))
tokens = sum(map(len, prompts)), sum(map(sum, lengths))
print(
    f"forward and backward: {tokens[0]:,} prompt and {tokens[1]:,} completion tokens, "
    f"{flops / 1e12:.3f} TFLOP, "
    f"{flops / tracked_seconds / 1e9:,.0f} GFLOP/s, {flops / tracked_seconds / peak:.0%} of the peak, "
    f"{peak / 1e9:,.0f}; " + ", ".join(f"{kind} {share:.0%}" for kind, share in kinds().items())
)
print(
    f"saliency (tracking, selecting, masking): {saliency_seconds:.4f} s, "
    f"{saliency_seconds / step:.1%} of the step"
)
print(
    f"weight sync: {sync_seconds:.4f} s, {sync_seconds / step:.1%} of the step; "
    f"its memory {memory:.2f} x the model"
)
print(
    f"prefill: {queried:,.0f} prompt tokens asked for, {queried - cached:,.0f} computed, "
    f"{rest:,} in incomplete last blocks of {block}, "
    f"the others {(queried - cached - rest) / whole:.2f} x the prompts (each prompt once: 1.00)"
)
engine.close()
