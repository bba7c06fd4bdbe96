"""Where the large values of a checkpoint's Q and K are: in every layer, as the context grows, at which RoPE
frequencies, and whether training moves them.

    python -m studies.phenomenon runs/smollm2/checkpoint                    # texts of 256 to 4,096 tokens
    python -m studies.phenomenon runs/smollm2/checkpoint --length 1024 --out runs/phenomenon/training \\
        --beside runs/real/sft/checkpoint runs/real/rl/checkpoint           # before and after training

The model reads --texts texts of each of two kinds, --length tokens each: "recall", prompts of the recall task
(prompts/tasks.py), and "manual", pieces of the Python language reference (pydoc_data, which comes with
Python). Magnitudes are saliency.py's at the site "proj", and in each head the largest --fraction of the
dimensions are selected. A causal model reads the first 256 tokens of a text as if no more came: one forward
of the whole text gives the magnitudes of every shorter length, too.

Dimensions d and d + D/2 of a head are turned together by RoPE, as pair d, by theta^(-2d/D) radians a token:
pair 0 the fastest, pair D/2 - 1 the slowest.

Left in --out: phenomenon.png, a page report.html, and phenomenon.json with these keys. Each value below
settings is {"q": {"mean": over layers, "layers": [...]}, "k": ...} unless it says otherwise.

    settings        checkpoint, weights (hash), rope_scaling, dtype, length, texts, seed, fraction, text_ids,
                    beside
    kept, head_dim, chance    dimensions selected in each head, of how many; kept / head_dim
    concentration   share of the squared magnitude in the selected rows
    peak            the largest magnitude of a head over its median, mean over heads
    massive         dimensions of a head above 5 times its mean, mean over heads (arXiv 2502.01563)
    first_token     share of the squared magnitude that is the first token's, which is an attention sink
    stability       {kind or "between kinds": share of one text's selected rows that another selects, too}
    without_first   share of the selected rows that are selected without the first token, too
    last_block      the same of the last 256 tokens alone, without the first token on either side
    heads           share of a head's selected dimensions that another head of the layer selects, too
    lengths         {tokens: share of the rows selected at that length that the whole text selects, too}
    pairs           share of the selected dimensions whose pair's other dimension is selected, too
    slow            share of the selected dimensions in pairs that turn less than once over --length tokens;
                    slow_chance: share of all dimensions (one number)
    frequencies     {"q": [layer][pair] share of heads and of the pair's two dimensions that are selected}
    beside          {checkpoint: {concentration, peak, and overlap: share of the rows that the first
                    checkpoint selects that this one selects, too; change: mean relative change of a
                    magnitude}}
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import math
import pydoc_data.topics
import random
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import torch

import saliency
from base import bars, durable, page
from base.cli import BadInput, one_line_errors, option, parse
from base.plot import BLUE, GREY, ORANGE, save, subplots
from core import hub
from core.attention import rope_frequencies
from evals import stats, subject
from prompts import chat, tasks
from studies.magnitudes import average, by_layer, concentration, kept, load_model, overlap, stability

BLOCK = 256  # tokens
MASSIVE = 5  # times the mean of the head: the criterion of arXiv 2502.01563, section 3


@dataclass
class Config:
    checkpoint: str = option("", "directory: config.json, safetensors, tokenizer.json", positional=True)
    beside: list[str] = option([], "checkpoints to compare with the first (default: none)")
    length: int = option(4096, f"tokens of each text, a multiple of {BLOCK}", least=2 * BLOCK, most=2**20)
    texts: int = option(2, "texts of each kind", least=1, most=1000)
    seed: int = option(0, "seed of the texts", least=0)
    fraction: float = option(0.3, "share of each head's dimensions that is selected", above=0, most=1)
    out: str = option("", "directory of the results (default: runs/phenomenon/<checkpoint's name>)")


# ---------------------------------------------------------------------------------------------- measurement


def read_texts(tokenizer, length, count, seed):
    """-> {kind: `count` lists of `length` token ids}."""
    manual = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    texts = {"recall": [], "manual": []}
    for i in range(count):
        rng = random.Random(f"phenomenon {seed} {i}")
        passage = " ".join(tasks.hide(rng, [tasks.fact(rng, name) for name in tasks.NAMES], length // 4))
        row = {"id": str(i), "prompt": passage}
        texts["recall"].append(chat.encode_prompt(tokenizer, row, False, limit=2**30)[:length])
        start = manual.index("\n", rng.randrange(len(manual)) // 2)
        texts["manual"].append(chat.text_ids(tokenizer, manual[start : start + 16 * length])[:length])
    if short := [kind for kind, ids in texts.items() if min(map(len, ids)) < length]:
        raise BadInput(f"--length {length}: the texts of the kind {short[0]} are shorter; give a smaller one")
    return texts


@torch.no_grad()
def squares(model, ids):
    """Token ids of a text -> {"model.layers.0.self_attn.q_proj": (1 + blocks, H, D) fp32, "...k_proj": ...}:
    sums of squares over its first token, the rest of its first block, and each further block."""
    sizes = [1, BLOCK - 1, *[BLOCK] * (len(ids) // BLOCK - 1)]
    result = {}

    def add(name, module, arguments, output):
        parts = output[0].float().square().unflatten(-1, (-1, model.config.head_dim)).split(sizes)
        result[name] = torch.stack([part.sum(0) for part in parts]).cpu()

    handles = [
        module.register_forward_hook(partial(add, name))
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "k_proj"))
    ]
    ids = torch.tensor([ids], device=next(model.parameters()).device)
    last = torch.arange(ids.size(1), device=ids.device)[None] == ids.size(1) - 1
    model.logprobs(ids, last)  # unlike model(ids): logits of one token only
    for handle in handles:
        handle.remove()
    return result


def of_tokens(blocks, rows):
    """What `squares` gave, and a slice of its rows -> a text's magnitudes over those tokens, {name: (H,
    D)}."""
    return {name: each[rows].sum(0).sqrt() for name, each in blocks.items()}


# -------------------------------------------------------------------------------------------------- summaries


def peak(magnitude):
    """(H, D) -> the largest of a head over its median, mean over heads."""
    return (magnitude.amax(-1) / magnitude.median(-1).values).mean().item()


def massive(magnitude):
    """(H, D) -> dimensions of a head above MASSIVE times its mean, mean over heads."""
    return (magnitude > MASSIVE * magnitude.mean(-1, keepdim=True)).sum(-1).float().mean().item()


def between_heads(magnitude, fraction):
    """(H, D) -> share of one head's selected dimensions that another selects, too; NaN for one head."""
    if len(magnitude) == 1:
        return math.nan
    return stability([{"": head[None]} for head in magnitude], fraction)[""]


def in_pairs(magnitude, fraction):
    """(H, D) -> (H, 2, D/2) bool: the selected dimensions, the two of a rotated pair below each other."""
    return saliency.select_rows({"": magnitude}, fraction)[".weight"].view(len(magnitude), 2, -1)


def stabilities(texts, fraction):
    """{kind: each text's magnitudes} -> {kind, and "between kinds": {name: share}}; a kind of one text has
    none."""
    result = {kind: stability(each, fraction) for kind, each in texts.items() if len(each) > 1}
    between = [
        stability([a, b], fraction)
        for one, other in combinations(texts.values(), 2)
        for a in one
        for b in other
    ]
    return result | {
        "between kinds": {name: sum(x[name] for x in between) / len(between) for name in between[0]}
    }


def summarize(texts, model_config, length, fraction):
    """{kind: what `squares` gave for each text} -> the keys of phenomenon.json but settings and beside."""
    blocks = [each for group in texts.values() for each in group]
    magnitudes = {kind: [of_tokens(each, slice(None)) for each in group] for kind, group in texts.items()}
    whole, without = (average([of_tokens(each, slice(i, None)) for each in blocks]) for i in (0, 1))
    last = average([of_tokens(each, slice(-1, None)) for each in blocks])
    first = average([of_tokens(each, slice(0, 1)) for each in blocks])
    selected = {name: in_pairs(magnitude, fraction) for name, magnitude in whole.items()}
    lengths = [BLOCK * 2**i for i in range(int(math.log2(length / BLOCK)) + 1)]
    shorter = {n: average([of_tokens(each, slice(1 + n // BLOCK)) for each in blocks]) for n in lengths}
    turns = length * rope_frequencies(model_config)[0] / (2 * math.pi)
    slow, size = turns < 1, model_config.head_dim

    def each(function):
        return by_layer({name: function(name) for name in whole})

    return {
        "kept": kept(fraction, size),
        "head_dim": size,
        "chance": kept(fraction, size) / size,
        "concentration": by_layer(concentration(whole, fraction)),
        "peak": each(lambda name: peak(whole[name])),
        "massive": each(lambda name: massive(whole[name])),
        "first_token": each(lambda n: (first[n].square().sum() / whole[n].square().sum()).item()),
        "stability": {kind: by_layer(s) for kind, s in stabilities(magnitudes, fraction).items()},
        "without_first": by_layer(overlap(whole, without, fraction)),
        "last_block": by_layer(overlap(last, without, fraction)),
        "heads": each(lambda name: between_heads(whole[name], fraction)),
        "lengths": {n: by_layer(overlap(shorter[n], whole, fraction)) for n in lengths},
        "pairs": each(lambda n: (2 * selected[n].all(1).sum() / selected[n].sum()).item()),
        "slow": each(lambda n: (selected[n][..., slow].sum() / selected[n].sum()).item()),
        "slow_chance": slow.float().mean().item(),
        "frequencies": {
            which: [
                mask.float().mean((0, 1)).tolist()
                for name, mask in selected.items()
                if name.endswith(f"{which}_proj")
            ]
            for which in "qk"
        },
    }


def compared(ours, theirs, fraction):
    """Magnitudes of the first checkpoint and of another, {name: (H, D)} -> an entry of "beside"."""
    change = {name: ((theirs[name] - m).abs() / m).mean().item() for name, m in ours.items()}
    return {
        "concentration": by_layer(concentration(theirs, fraction)),
        "peak": by_layer({name: peak(magnitude) for name, magnitude in theirs.items()}),
        "overlap": by_layer(overlap(ours, theirs, fraction)),
        "change": by_layer(change),
    }


# ----------------------------------------------------------------------------------------------------- report


def report(summary):
    """phenomenon.json -> the means as a table, in per cent but for peak and massive."""

    def row(name, value, scale=100):
        return [name, *[f"{scale * value[which]['mean']:.1f}" for which in "qk"]]

    rows = [["mean over layers", "Q", "K"], row("share of the selected", summary["concentration"])]
    rows += [
        row("largest over median", summary["peak"], 1),
        row("dimensions above 5 means", summary["massive"], 1),
    ]
    rows += [row("of the first token", summary["first_token"])]
    rows += [row(f"same rows, {kind}", value) for kind, value in summary["stability"].items()]
    rows += [row(f"same rows, {int(n):,} tokens", value) for n, value in summary["lengths"].items()]
    rows += [row("same rows, without first token", summary["without_first"])]
    rows += [row("same rows, last 256 tokens", summary["last_block"])]
    rows += [row("same dimensions, other head", summary["heads"])]
    rows += [row("the pair's other one, too", summary["pairs"])]
    rows += [row(f"in slow pairs ({100 * summary['slow_chance']:.1f} of all)", summary["slow"])]
    for name, other in summary["beside"].items():
        rows += [row(f"{name}: share of the selected", other["concentration"])]
        rows += [row(f"{name}: same rows", other["overlap"]), row(f"{name}: change", other["change"])]
    return stats.table(rows)


def figure(path, title, summary):
    """phenomenon.json -> the PNG `path`: by layer the share of the selected rows and the peak; the lengths;
    which pairs are selected in each layer."""
    drawn, grid = subplots(2, 3, figsize=(13, 7))
    lengths = [int(n) for n in summary["lengths"]]
    for which, colour in (("q", BLUE), ("k", ORANGE)):
        look = {"color": colour, "label": which.upper(), "marker": "o", "markersize": 3}
        for axes, key in ((grid[0, 0], "concentration"), (grid[1, 0], "peak")):
            axes.plot(summary[key][which]["layers"], **look)
        overlaps = [value[which]["mean"] for value in summary["lengths"].values()]
        grid[0, 1].plot(lengths, overlaps, **look)
        rates = torch.tensor(summary["frequencies"][which])  # (layers, D/2)
        grid[1, 1].plot(rates.mean(0), **look)
    for axes, which in zip(grid[:, 2], "qk", strict=True):
        image = axes.imshow(summary["frequencies"][which], aspect="auto", cmap="cividis", vmin=0, vmax=1)
        axes.set(title=f"{which.upper()}: share selected", xlabel="pair, fast to slow", ylabel="layer")
        drawn.colorbar(image, ax=axes, fraction=0.05)
    for axes in (grid[0, 0], grid[0, 1], grid[1, 1]):
        axes.axhline(summary["chance"], color=GREY, linestyle="--", label="chance")
        axes.set_ylim(0, 1.02)
    grid[0, 0].set(xlabel="layer", ylabel="share of squared magnitude\nin the selected rows")
    grid[1, 0].set(xlabel="layer", ylabel="largest over median of a head")
    grid[0, 1].set(xlabel="tokens", ylabel="rows that the whole text selects, too", xscale="log")
    grid[0, 1].set_xticks(lengths, [f"{n:,}" for n in lengths])
    grid[0, 1].minorticks_off()
    grid[1, 1].set(xlabel="pair, fast to slow", ylabel="share selected, mean over layers")
    for axes in grid[:, :2].flat:
        axes.grid(alpha=0.3)
    grid[0, 0].legend(loc="lower right", fontsize="small")
    drawn.suptitle(title, parse_math=False)
    save(drawn, path, dpi=90)


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    if not config.checkpoint:
        raise BadInput("no checkpoint is given; its directory comes before lists like --beside")
    if config.length % BLOCK:
        raise BadInput(f"--length {config.length} is not a multiple of {BLOCK}")
    checkpoints = [hub.local(name) for name in (config.checkpoint, *config.beside)]
    model_config, tokenizer, _ = subject.load(checkpoints[0])
    configs = [model_config, *[subject.load(name)[0] for name in checkpoints[1:]]]
    if model_config.context_length < config.length:
        room = model_config.context_length
        raise BadInput(f"--length {config.length}: {config.checkpoint} reads at most {room} tokens")
    for name, other in zip(checkpoints, configs):
        if other != model_config:
            raise BadInput(f"--beside {name}: its configuration differs from that of {config.checkpoint}")
    texts = read_texts(tokenizer, config.length, config.texts, config.seed)
    out = Path(config.out or f"runs/phenomenon/{subject.name(checkpoints[0])}")
    lock = durable.claim(out, "phenomenon", ["phenomenon.json"])
    settings = subject.settings(checkpoints[0], model_config)
    settings |= {"length": config.length, "texts": config.texts, "seed": config.seed}
    settings |= {"text_ids": durable.digest(repr(texts)), "fraction": config.fraction}
    settings |= {"beside": config.beside}
    path = out / "phenomenon.json"
    if path.exists() and durable.read_object(path).get("settings") != settings:
        raise BadInput(f"{path} is of other settings; choose another --out or remove it")

    measured = []  # of each checkpoint {kind: what `squares` gave for each text}
    bar = bars.bar(total=len(checkpoints) * len(texts) * config.texts, desc="phenomenon", unit="text")
    for name in checkpoints:
        model = load_model(name, model_config)
        measured.append({kind: [] for kind in texts})
        for kind, ids in ((kind, ids) for kind, group in texts.items() for ids in group):
            measured[-1][kind].append(squares(model, ids))
            bar.update()
    bar.close()

    summary = {"settings": settings, **summarize(measured[0], model_config, config.length, config.fraction)}
    means = [
        average([of_tokens(blocks, slice(None)) for group in each.values() for blocks in group])
        for each in measured
    ]
    summary["beside"] = {
        name: compared(means[0], theirs, config.fraction)
        for name, theirs in zip(config.beside, means[1:], strict=True)
    }
    durable.write_json(path, summary)
    name = subject.name(checkpoints[0])
    figure(out / "phenomenon.png", f"Q and K of {name}, {config.length:,} tokens", summary)
    picture = page.image(out / "phenomenon.png", "by layer, length and frequency")
    page.write(out / "report.html", f"Q and K of {name}", page.pre(report(summary)), picture)
    print(report(summary))
    print(f"\nresults: {out}/phenomenon.json {out}/report.html  figure: {out}/phenomenon.png")
