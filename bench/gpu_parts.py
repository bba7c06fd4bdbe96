"""The parts of bench/gpu.py that measure. Each yields rows of its results.jsonl, without "part" and "state".

python bench/gpu_parts.py PART RESULTS    # what bench/gpu.py starts; appends to RESULTS
"""

import dataclasses
import json
import re
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from measure import peak_bytes, seconds, synchronize
from shapes import LAPTOP, build, card, draw_group, fill, model_flops, peak_flops, train_on
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.profiler import ProfilerActivity, profile

import saliency
from base import environment, processes
from base.cli import BadInput
from core.attention import GroupAttention, Layout, flash, flash_backward, use_flash_attention_3
from core.optimizer import OPTIMIZERS, make_optimizer
from core.parallel import Share
from model import HEAD_CHUNK_ELEMENTS, Qwen3, Qwen3Config, compile_elementwise
from run import memory_plan, roofline
from run.config import Config

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda", 0) if CUDA else torch.device("cpu"), processes.compute_dtype()
GIB = 2**30


@dataclasses.dataclass
class Sizes:
    """What is measured: a model, a group in passes, and the sides of a matrix product M x K x N."""

    model: Qwen3Config
    prompt: int
    lengths: list
    tokens_per_pass: int
    product: tuple
    copied: int  # bytes


# Layers of 8B, so few that fp32 weights, gradients and moments fit one GPU beside the activations.
CARD = Sizes(
    dataclasses.replace(build("8B"), num_hidden_layers=6), 28672, [4096] * 4, 8192, (8192, 4096, 12288), 2**31
)
SMALL = Sizes(
    dataclasses.replace(LAPTOP, num_hidden_layers=1, vocab_size=512),
    96,
    [16, 9, 16, 7],
    32,
    (64, 64, 64),
    2**20,
)
SIZES = CARD if CUDA else SMALL


def per_second(flops, taken):
    """FLOPs in `taken` seconds -> the keys tflops and, for a card whose peak is known, mfu."""
    peak = peak_flops()
    return {"tflops": flops / taken / 1e12} | ({"mfu": flops / taken / peak} if peak else {})


def machine(sizes):
    """The card, its memory, and the versions of what runs on it."""
    found = environment.describe()
    memory = f"{torch.cuda.get_device_properties(0).total_memory / GIB:.2f} GiB, " if CUDA else ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield {"what": "card", "note": f"{found['machine']['device']}, {memory}{versions}"}
    yield {"what": "model", "note": card(sizes.model)}


def ceilings(sizes):
    """What the card gives at best to what a step is made of: a matrix product of the MLP's shape, one of the
    head's, a copy."""
    M, K, N = sizes.product
    V, C = sizes.model.vocab_size, sizes.model.hidden_size
    chunk = max(1, min(M, HEAD_CHUNK_ELEMENTS // V))
    for what, m, k, n in (
        ("product of the MLP", M, K, N),
        ("product of a chunk of the head", chunk, C, V),
    ):
        a, b = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for shape in ((m, k), (k, n)))
        (taken,) = seconds(partial(torch.mm, a, b), rounds=10, least=0)
        yield {"what": f"{what}, {m} x {k} x {n}", "seconds": taken, **per_second(2 * m * k * n, taken)}
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    (taken,) = seconds(partial(target.copy_, source), rounds=10, least=0)
    yield {"what": "copy", "seconds": taken, "terabytes_per_second": 2 * sizes.copied / taken / 1e12}


def cudnn(q, k, v, causal):
    """flash and flash_backward (core/attention.py) by cuDNN's kernels: the same arguments and results."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *rest = operator(q, k, v, None, True, 0.0, causal)
    return out.transpose(1, 2), lse, rest[:6]


def cudnn_backward(grad, q, k, v, out, lse, rest, causal):
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    *lengths, seed, offset = rest
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    gradients = operator(grad, q, k, v, out, lse, seed, offset, None, *lengths, 0.0, causal)
    return tuple(x.transpose(1, 2) for x in gradients)


def there_and_back(tensors, layout, grad):
    GroupAttention.apply(*tensors, layout).backward(grad)


def attention(sizes):
    """The kernels of a pass's queries to the prompt's keys, and of the prompt to itself; then GroupAttention
    whole, with completions of equal and of unequal lengths. Backward gets an output and a log-sum-exp that
    are not this softmax's own, as GroupAttention gives it: `difference` is flash's gradients to cuDNN's."""
    c, P, R = sizes.model, sizes.prompt, sizes.lengths[0]
    H, Hk, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim

    def draw(tokens, heads):
        return torch.randn(1, tokens, heads, D, device=DEVICE, dtype=DTYPE)

    kernels = {"flash": (flash, flash_backward)} | ({"cuDNN": (cudnn, cudnn_backward)} if CUDA else {})
    for N, causal in (sizes.tokens_per_pass, False), (P, True):
        q, k, v, grad, foreign = draw(N, H), draw(P, Hk), draw(P, Hk), draw(N, H), draw(N, H)
        flops, gradients = 4 * D * H * N * P / (1 + causal), {}
        for name, (forward, backward) in kernels.items():
            _, lse, rest = forward(q, k, v, causal)
            go_back = partial(backward, grad, q, k, v, foreign, lse + 1, rest, causal)
            gradients[name] = go_back()
            where = f"{name}, {N:,} queries, {P:,} keys" + causal * ", causal"
            times = seconds(partial(forward, q, k, v, causal), go_back, rounds=5, least=0)
            for direction, work, taken in zip(("forward", "backward"), (flops, 2.5 * flops), times):
                yield {"what": f"{where}, {direction}", "seconds": taken, **per_second(work, taken)}
        if CUDA:
            for x, a, b in zip("qkv", gradients["flash"], gradients["cuDNN"]):
                difference = ((a - b).float().norm() / a.float().norm()).item()
                yield {"what": f"gradient of {x}, flash and cuDNN", "difference": difference}
    for lengths in [R] * (sizes.tokens_per_pass // R), [R, *range(1, R, max(1, R // 3))]:
        N = sum(lengths)
        layout = Layout(P, lengths, DEVICE, Share(N))
        tensors = [x.requires_grad_() for x in (draw(N, H), *(draw(n, Hk) for n in (N, N, P, P)))]
        grad = draw(N, H)
        (taken,) = seconds(partial(there_and_back, tensors, layout, grad), rounds=3, least=0)
        flops = 14 * D * H * sum(n * (P + n / 2) for n in lengths)
        what = f"GroupAttention, completions of {min(lengths):,} to {max(lengths):,}"
        yield {"what": what, "seconds": taken, **per_second(flops, taken)}


KINDS = {  # of kernels, by their names: the first that fits
    "attention backward": "flash.*(bwd|bprop|backward)",
    "attention forward": "flash",
    "matrix products": "gemm|nvjet|cutlass|xmma|::mm|::addmm",
    "communication": "nccl",
    "copies": "memcpy|memset|copy_",
    "other": "",
}


def shares(function):
    """Of what function() runs on the device, the share of time of each of KINDS -> {kind: share}; prints the
    25 longest."""
    with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as record:
        function()
        synchronize()
    which = "self_device_time_total" if CUDA else "self_cpu_time_total"
    averages, times = record.key_averages(), dict.fromkeys(KINDS, 0)
    print(averages.table(sort_by=which, row_limit=25, max_name_column_width=90), flush=True)
    for event in averages:
        kind = next(kind for kind, names in KINDS.items() if re.search(names, event.key.lower()))
        times[kind] += getattr(event, which)
    return {kind: time / sum(times.values()) for kind, time in times.items() if time}


def group(sizes):
    """-> train_on's arguments but the model."""
    prompt, completions = draw_group(sizes.model, sizes.prompt, sizes.lengths, DEVICE)
    return (
        prompt,
        completions,
        [torch.full((n,), 1e-3, device=DEVICE) for n in sizes.lengths],
        sizes.tokens_per_pass,
    )


def of_step(sizes, taken):
    """Seconds of a group's forward and backward -> the keys that follow."""
    tokens = sizes.prompt + sum(sizes.lengths)
    flops = model_flops(sizes.model, sizes.prompt, sizes.lengths)
    return {"seconds": taken, "tokens_per_second": tokens / taken, **per_second(flops, taken)}


def timed(sizes, run, **flags):
    """The row of a forward and backward, run(), beside the plan's memory; and what run/roofline.py, which
    --plan's seconds come from, says of it, if it knows the card. flags: those of memory_plan.Step."""
    (taken,) = seconds(run, rounds=2, least=0)
    recomputed = {"attention_recompute": flags.get("attention_recompute", True)}
    work = sizes.model, sizes.prompt, sizes.tokens_per_pass, True, DTYPE.itemsize
    planned = max(sum(lines.values()) for lines in memory_plan.activations(*work, **recomputed).values())
    memory = {"gib": peak_bytes(run) / GIB, "planned_gib": planned / GIB}
    yield {"what": "forward and backward", **of_step(sizes, taken), **memory}
    name = torch.cuda.get_device_name() if CUDA else ""
    yield from by_roofline(sizes, [known for known in roofline.CARDS if known.name in name], **flags)


def by_roofline(sizes, cards, **flags):
    """Rows of what the roofline says of a step on each of its cards."""
    for known in cards:
        lengths = max(sizes.lengths), len(sizes.lengths), sizes.tokens_per_pass
        work = memory_plan.Step(1, 1, sizes.prompt, *lengths, checkpointing=True, vllm_share=0.0, **flags)
        kinds = roofline.training_seconds(sizes.model, work, known)
        del kinds["optimizer"], kinds["communication"]
        whole = sum(kinds.values())
        of_kind = {kind: taken / whole for kind, taken in kinds.items()}
        yield {"what": f"the same by the roofline of {known.name}", "seconds": whole, "shares": of_kind}


def forward_and_backward(sizes):
    """-> a model with weights and gradients in the compute dtype, and a function that trains on a group."""
    model = fill(Qwen3.empty(sizes.model, DTYPE, DEVICE))
    model.checkpointing = True
    return model, partial(train_on, model, *group(sizes))


def step(sizes, **flags):
    """A group's forward and backward; where its time goes."""
    _, run = forward_and_backward(sizes)
    yield from timed(sizes, run, **flags)
    yield {"what": "where its time goes", "shares": shares(run)}


def kept(sizes):
    """The same with attention's results kept, --no-attention-recompute."""
    model, run = forward_and_backward(sizes)
    model.attention_recompute = False
    yield from timed(sizes, run, attention_recompute=False)


def compiled(sizes):
    """The same with compiled norms, rotation and SwiGLU, --compile; the first time, which compiles."""
    compile_elementwise()
    _, run = forward_and_backward(sizes)
    started = time.perf_counter()
    run()
    synchronize()
    yield {"what": "the first one", "seconds": time.perf_counter() - started}
    yield from timed(sizes, run, compile=True)
    yield {"what": "where its time goes", "shares": shares(run)}


def flash3(sizes):
    """attention and step by FlashAttention 3, --flash-attention 3, where its package is."""
    try:
        use_flash_attention_3()
    except BadInput as error:
        yield {"what": "FlashAttention 3", "state": "not here", "note": str(error)}
        return
    yield from attention(sizes)
    yield from step(sizes, flash_attention=3)


def sharded(sizes):
    """-> the model on FSDP2 as train.py has it, but for one rank: fp32 masters, the compute dtype."""
    _, _, device = processes.rank_and_device()
    processes.connect(device)
    mesh = dist.init_device_mesh(device.type, (1,))
    return fill(Qwen3.empty(sizes.model, torch.float32, device, mesh, DTYPE))


def update(sizes):
    """A whole update as in train.py: forward and backward with magnitudes, LongAct's mask, clipping, AdamW;
    each stage's time, and the peak of all memory beside the plan."""
    model = sharded(sizes)
    model.checkpointing = True
    optimizer = make_optimizer(Config(learning_rate=1e-6), model.parameters())
    arguments, best = group(sizes), {}
    stages = "forward and backward", "norm, magnitudes, rows, mask", "clipping and AdamW"

    def run():
        times = [now()]
        with saliency.Tracker(model) as tracker:
            train_on(model, *arguments)
        times.append(now())
        get_total_norm([parameter.grad for parameter in model.parameters()]).item()
        masks = saliency.select_rows(tracker.magnitudes())
        squares = saliency.mask_gradients(model, masks)
        times.append(now())
        clip_grad_norm_(model.parameters(), 1.0).item()
        saliency.masked_step(optimizer, model, masks, squares)
        optimizer.zero_grad()
        times.append(now())
        for stage, begin, end in zip(stages, times, times[1:]):
            best[stage] = min(best.get(stage, end - begin), end - begin)

    def now():
        synchronize()
        return time.perf_counter()

    run()  # the optimizer has its moments now
    best.clear()
    run()
    run()
    times = dict(best)
    held = 3 * sum(parameter.numel() * 4 for parameter in model.parameters())  # masters and two moments
    how = sizes.model, sizes.prompt, sizes.tokens_per_pass, True, 1, DTYPE.itemsize
    planned, moment = memory_plan.training_memory(*how)
    memory = {"gib": (held + peak_bytes(run)) / GIB, "planned_gib": sum(planned.values()) / GIB}
    yield {
        "what": "the whole",
        **of_step(sizes, sum(times.values())),
        **memory,
        "note": f"the plan's worst: {moment}",
    }
    yield {"what": stages[0], **of_step(sizes, times[stages[0]])}
    for stage in stages[1:]:
        yield {"what": stage, "seconds": times[stage]}
    (taken,) = seconds(partial(train_on, model, *arguments), rounds=2, least=0)
    yield {"what": "forward and backward without magnitudes", **of_step(sizes, taken)}
    dist.destroy_process_group()


def optimizers(sizes):
    """A step of each --optimizer, on gradients that are there; the memory of what it adds to them."""
    model = sharded(sizes)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    for kind in OPTIMIZERS:
        times = []
        memory = peak_bytes(partial(steps_of, kind, model, times))
        yield {"what": f"--optimizer {kind}", "seconds": times[0], "gib": memory / GIB}
    dist.destroy_process_group()


def steps_of(kind, model, times):
    """A new optimizer's steps; appends their seconds."""
    optimizer = make_optimizer(Config(optimizer=kind, learning_rate=1e-6), model.parameters())
    times += seconds(optimizer.step, rounds=2, least=0)


if __name__ == "__main__":
    part, results = sys.argv[1:]
    torch.manual_seed(0)
    with open(results, "a") as file:
        for row in globals()[part](SIZES):
            print(json.dumps({"part": part, "state": "ok", **row}), file=file, flush=True)
