"""How a step's cost grows with its prompts, from 1,024 to 131,072 tokens: seconds, GiB, and what takes them.

    python bench/cost.py                  # measures and draws; a few minutes on 2 idle cores. Needs vLLM
    python bench/cost.py --no-measure     # draws again, with what --out has of an earlier measurement

Above, a small model on this machine: points are measured (forward and backward of a group by model.py, its
sampling by vLLM), lines are run/roofline.py's with rates measured here first. Below, Qwen3-8B on 8 H100, a
group a GPU, by the same roofline with the rates that --plan assumes; nothing of it is measured.

--out gets cost.png, cost.md (the table below as Markdown) and results.json:
  card                        machine and small model, in words
  rates                       of this machine: TFLOP/s of matrix products (matrices), of attention forward and
                              backward; TB/s of reading and writing (stream), of reading (read)
  small                       one object a length: prompt; training, prefill, decoding: seconds; bytes: peak
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from measure import peak_bytes, seconds
from shapes import LAPTOP, card, draw_group, train_on
from tqdm import tqdm

from base import durable, plot, processes
from base.cli import BadInput, one_line_errors, option, parse
from core import attention
from core.checkpoint import Qwen3Config
from model import Qwen3
from run import find, roofline
from run.memory_plan import GIB, Step, engine_memory, training_memory

PROMPTS = [2**n for n in range(10, 18)]
G, R = 16, 64  # completions of the small model, and their tokens
BIG, H100 = Qwen3Config.preset("8B"), roofline.card_of("H100", None)
COLOURS = {
    "matrices": plot.BLUE,
    "attention": plot.VERMILLION,
    "head": plot.GREEN,
    "other kernels": plot.SKY,
    "prefill": plot.PURPLE,
    "reading weights": plot.GREY,
    "reading keys and values": plot.ORANGE,
}


@dataclass
class Config:
    measure: bool = option(True, "measure the small model; else take what --out has, if it has")
    longest: int = option(16384, "longest prompt that is measured, tokens", least=1024)
    out: str = option("runs/bench-cost", "directory of the results, see above")


# ---------------------------------------------------------------------------------------------- measured here


def rates():
    """-> this machine's rates as a roofline.Card has them, by kernels of the small model's shapes."""
    x, weight = (
        torch.randn(4096, LAPTOP.hidden_size),
        torch.randn(LAPTOP.intermediate_size, LAPTOP.hidden_size),
    )
    T, heads, D = 4096, LAPTOP.num_attention_heads, LAPTOP.head_dim
    q, k, v = (
        torch.randn(1, T, n, D) for n in (heads, LAPTOP.num_key_value_heads, LAPTOP.num_key_value_heads)
    )
    out, lse, rest = attention.flash(q, k, v, causal=True)
    wide = torch.randn(2**24)

    def fastest(function):
        return seconds(function, least=1.0)[0]

    pairs = 4 * heads * D * T * T / 2
    return {
        "matrices": 2 * x.numel() * len(weight) / fastest(lambda: F.linear(x, weight)) / 1e12,
        "attention": pairs / fastest(lambda: attention.flash(q, k, v, causal=True)) / 1e12,
        "attention_back": 2.5
        * pairs
        / fastest(lambda: attention.flash_backward(out, q, k, v, out, lse, rest, causal=True))
        / 1e12,
        "stream": 8 * wide.numel() / fastest(lambda: torch.mul(wide, 2, out=wide)) / 1e12,
        "read": 4 * wide.numel() / fastest(wide.sum) / 1e12,
    }


def small_step(prompt):
    """The small model's group on one process."""
    return Step(1, 1, prompt, R, G, 8192, False, 0.5)


def measured(prompts):
    """-> [{"prompt": tokens, "training": s, "prefill": s, "decoding": s, "bytes": peak}, ...]"""
    from rollout import Rollout  # importing vLLM takes seconds

    _, _, device = processes.rank_and_device()
    processes.connect(device)
    model = Qwen3.from_config(LAPTOP, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        engine = Rollout(directory, max(prompts) + R, "float32")
    moments = 4 * 4 * sum(p.numel() for p in model.parameters())  # with weights and gradients
    weights, rows = [torch.full((R,), 1e-3)] * G, []
    for prompt in tqdm(prompts, unit="length"):
        ids, completions = draw_group(LAPTOP, prompt, [R] * G, "cpu")

        def train():
            train_on(model, ids, completions, weights, 8192)  # noqa: B023 (called at once)

        def sample(n, tokens):
            engine.engine.reset_prefix_cache()
            engine.generate([ids.tolist()], n, 1.0, tokens, [0], [])  # noqa: B023

        training, prefill, whole = (
            seconds(each, rounds=1, least=0)[0]
            for each in (train, lambda: sample(1, 1), lambda: sample(G, R))
        )
        row = {"prompt": prompt, "training": training, "prefill": prefill, "decoding": whole - prefill}
        rows.append({**row, "bytes": peak_bytes(train) + moments})
    engine.close()
    return rows


def small_costs(results):
    """{"training": [s], "sampling": [s], "bytes": [...]} of PROMPTS by the roofline, and {kind: [s]}."""
    here = roofline.Card("this machine", 0, 0, **results["rates"], link=1, host=1)
    costs, kinds = {"training": [], "sampling": [], "bytes": []}, []
    for prompt in PROMPTS:
        step = small_step(prompt)
        engine = engine_memory(LAPTOP, step, 0)
        engine = engine._replace(weights=2 * engine.weights, one=2 * engine.one)  # in fp32
        training = roofline.training_seconds(LAPTOP, step, here, size=4)
        sampling = roofline.sampling_seconds(LAPTOP, step, here, engine, engine.group)
        lines, _ = training_memory(LAPTOP, prompt, step.pass_tokens, False, 1, 4, sharded=False)
        costs["training"].append(roofline.total(training))
        costs["sampling"].append(sum(sampling.values()))
        costs["bytes"].append(sum(lines.values()))
        kinds.append(training | sampling)
    return costs, kinds


# -------------------------------------------------------------------------------------- Qwen3-8B, by roofline


def big_costs():
    """-> find.Weighed of each of PROMPTS: the paper's group on each of 8 H100, with the flags that fit."""
    steps = [Step(8, 8, prompt, 4096, 16, 8192, True, 0.5) for prompt in PROMPTS]
    return [find.arranged(BIG, step, H100) for step in steps]


def table(costs):
    """-> lines of Markdown: seconds and GiB by length, and what takes most."""
    lines = [
        "| prompt | training | most of it | sampling | most of it | GiB training, rollout | flags |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in costs:
        before = Step(8, 8, each.step.prompt, 4096, 16, 8192, True, 0.5)
        training, sampling = roofline.total(each.training), sum(each.sampling.values())
        most = [
            f"{kind}, {kinds[kind] / sum(kinds.values()):.0%}"
            for kinds in (each.training, each.sampling)
            for kind in [max(kinds, key=kinds.get)]
        ]
        sizes = f"{sum(each.lines.values()) / GIB:.1f}, {(each.asleep + each.share) / GIB:.1f}"
        words = find.flags(before, each.step)
        cells = f"{each.step.prompt:,}", f"{training:.0f} s", most[0], f"{sampling:.0f} s", most[1], sizes
        lines.append(f"| {' | '.join(cells)} | {f'`{words}`' if words else 'none'} |")
    return lines


# --------------------------------------------------------------------------------------------------- a figure


def shares(axes, kinds, title):
    """Stacked bars: which share of a step each kind of work takes, by length."""
    bottom = [0.0] * len(kinds)
    whole = [sum(each[kind] for kind in COLOURS) for each in kinds]
    for kind, colour in COLOURS.items():
        part = [each[kind] / total for each, total in zip(kinds, whole, strict=True)]
        axes.bar(range(len(part)), part, bottom=bottom, color=colour, label=kind)
        bottom = [a + b for a, b in zip(bottom, part, strict=True)]
    axes.set_xticks(range(len(kinds)), [f"{prompt // 1024}K" for prompt in PROMPTS[: len(kinds)]])
    axes.set(title=title, xlabel="tokens of the prompt", ylim=(0, 1))


def curves(axes, lines, title, label):
    """lines: {label: (colour, numbers of PROMPTS)}, on logarithmic axes."""
    for name, (colour, numbers) in lines.items():
        axes.plot(PROMPTS[: len(numbers)], numbers, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(PROMPTS, [f"{prompt // 1024}K" for prompt in PROMPTS])
    axes.set(title=title, xlabel="tokens of the prompt", ylabel=label)
    axes.grid(alpha=0.3)


def draw(path, results, big):
    rows = 2 if results else 1
    figure, grid = plot.subplots(rows, 3, figsize=(13, 4 * rows), squeeze=False)
    if results:
        costs, kinds = small_costs(results)
        above, found = grid[0], results["small"]
        at = [row["prompt"] for row in found]
        name = "small model, this CPU"
        lines = {f"{kind}, roofline": (colour, costs[kind]) for kind, colour in SIDES.items()}
        curves(above[0], lines, f"{name}: a group", "seconds")
        above[0].plot(
            at, [row["training"] for row in found], "o", color=plot.BLUE, label="training, measured"
        )
        sampled = [row["prefill"] + row["decoding"] for row in found]
        above[0].plot(at, sampled, "o", color=plot.ORANGE, label="sampling, measured")
        above[0].set_yscale("log")
        curves(
            above[1], {"counted": (plot.BLUE, [each / GIB for each in costs["bytes"]])}, name, "GiB, training"
        )
        above[1].plot(at, [row["bytes"] / GIB for row in found], "o", color=plot.BLUE, label="measured")
        above[1].set_yscale("log")
        shares(above[2], kinds, "share of a step, roofline")
        for axes in above[:2]:
            axes.legend(fontsize="small")
    below, name = grid[-1], "Qwen3-8B, 8 H100"
    seconds_of = {"training": [roofline.total(each.training) for each in big]}
    seconds_of["sampling"] = [sum(each.sampling.values()) for each in big]
    curves(
        below[0],
        {kind: (SIDES[kind], seconds_of[kind]) for kind in SIDES},
        f"{name}: a step, roofline",
        "seconds",
    )
    below[0].set_yscale("log")
    held = {
        "training": (plot.BLUE, [sum(each.lines.values()) / GIB for each in big]),
        "rollout": (plot.ORANGE, [(each.asleep + each.share) / GIB for each in big]),
        "the card": (plot.GREY, [H100.memory] * len(big)),
    }
    curves(below[1], held, f"{name}: counted", "GiB of a GPU")
    below[1].set_ylim(0)
    for each in big:
        if each.step.context_parallel > 1:
            below_it = 2 * each.step.context_parallel  # GiB: neighbours' labels at different heights
            place = each.step.prompt, sum(each.lines.values()) / GIB - below_it
            below[1].annotate(
                f"{each.step.context_parallel} ranks", place, ha="center", va="top", size="x-small"
            )
    shares(below[2], [each.training | each.sampling for each in big], "share of a step, roofline")
    for axes in below[:2]:
        axes.legend(fontsize="small")
    figure.suptitle("\n".join(roofline.assumptions(H100)), fontsize="small")
    figure.legend(
        *below[2].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize="small"
    )
    figure.savefig(path, dpi=120)


SIDES = {"training": plot.BLUE, "sampling": plot.ORANGE}


def main(config):
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    file = out / "results.json"
    if config.measure:
        if torch.cuda.is_available():
            raise BadInput("a CPU is measured here, and there is a GPU: use --no-measure, or bench/gpu.sh")
        measuring = [prompt for prompt in PROMPTS if prompt <= config.longest]
        results = {"card": card(LAPTOP), "rates": rates(), "small": measured(measuring)}
        durable.write_json(file, results)
    results = json.loads(file.read_text()) if file.exists() else None
    big = big_costs()
    lines = table(big)
    durable.write(out / "cost.md", "\n".join(lines) + "\n")
    draw(out / "cost.png", results, big)
    print(*lines, *roofline.assumptions(H100), f"{out}/cost.png", sep="\n")


if __name__ == "__main__":
    one_line_errors()
    main(parse(Config, __doc__))
