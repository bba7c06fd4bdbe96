"""Figures from what a run wrote.

    python -m base.plot runs/NAME     # draws its reward.png and magnitudes.png again; it may be under way

Colours are Okabe and Ito's, which colour-blind readers tell apart; a quantity has the same one in every
figure, and in report.html. What files are read, base/run_files.py checks; it raises BadInput.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from base import durable, run_files
from base.chart import wilson
from base.cli import BadInput, one_line_errors, option, parse

BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, GREY, OUTLINE = "#cc79a7", "#56b4e9", "#8a929c", "#ff7a00"


@dataclass
class Config:
    run: str = option("", "directory of a run of train.py", positional=True)


def subplots(rows=1, columns=1, *, figsize, **how):
    """-> a matplotlib figure to be saved, and its axes. how: further arguments of Figure.subplots. matplotlib
    takes 0.5 s to import, so it is imported only here."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **how)


def save(figure, path, dpi=120):
    """Make or replace a PNG. Raises BadInput when the disk cannot be written."""
    with durable.replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png")


def reward_curve(run):
    """runs/NAME/metrics.jsonl, and results.json if there is one -> runs/NAME/reward.png: reward; accuracy, of
    training and held out; groups that teach; length, entropy and mismatch. Raises BadInput."""
    path = run / "metrics.jsonl"
    rows = run_files.read_metrics(path)
    if all("reward" not in row for row in rows):
        raise BadInput(f'{path} has no "reward": it is not a run of train.py')
    held_out = run_files.held_out(run, rows)
    run_files.add_kept(path, rows)
    figure, grid = subplots(2, 3, figsize=(12, 6.2))
    draw = (
        ("mean reward", {"reward": BLUE}),
        ("accuracy", {"accuracy": GREEN}),
        ("share of sampled groups", {"kept": GREEN, "all_right": BLUE, "all_wrong": ORANGE}),
        ("tokens of a completion", {"completion_tokens": PURPLE}),
        ("entropy, nats a token", {"entropy": VERMILLION}),
        ("mismatch, nats a token", {"mismatch_mean": BLUE, "mismatch_max": ORANGE}),
    )
    for axes, (label, keys) in zip(grid.flat, draw, strict=True):
        for key, colour in keys.items():
            numbers = [math.nan if y is None else y for y in run_files.column(path, rows, key)]
            axes.plot([row["step"] for row in rows], numbers, color=colour, label=key)
        axes.set(xlabel="training step", ylabel=label)
    _held_out(grid[0, 1], held_out)
    grid[0, 1].set_ylim(0, 1)
    grid[0, 2].set_ylim(0, 1)
    grid[1, 2].set_yscale("log")
    _finish(grid)
    figure.suptitle(run.name, parse_math=False)
    save(figure, run / "reward.png")


def _held_out(axes, held_out):
    """What run_files.held_out returned -> accuracy at temperature 1 on the first set, with 95% intervals."""
    for name, points in list(held_out.items())[:1]:
        shares = [result["accuracy"] for _, result in points]
        ends = [wilson(result["accuracy"], result["prompts"]) for _, result in points]
        errors = [
            [y - low for y, (low, _) in zip(shares, ends)],
            [high - y for y, (_, high) in zip(shares, ends)],
        ]
        label = f"held out, n = {points[0][1]['prompts']:,}: {name}"
        look = {"fmt": "o-", "color": VERMILLION, "capsize": 3, "linewidth": 1, "label": label}
        axes.errorbar([step for step, _ in points], shares, torch.tensor(errors).clamp(min=0), **look)


def _finish(grid):
    """Grid lines, whole steps, and legends above the axes, where no line is."""
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        _whole_steps(axes)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize="small", frameon=False)


def _whole_steps(axes):
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def loss_curve(run):
    """metrics.jsonl of sft.py in the directory `run` -> loss.png: the loss of each step. Raises BadInput."""
    rows = run_files.read_metrics(run / "metrics.jsonl")
    losses = run_files.column(run / "metrics.jsonl", rows, "loss")
    figure, axes = subplots(figsize=(7, 4), squeeze=False)
    numbers = [math.nan if loss is None else loss for loss in losses]
    axes[0, 0].plot([row["step"] for row in rows], numbers, color=BLUE)
    axes[0, 0].set(xlabel="training step", ylabel="cross entropy of the assistant's tokens, nats")
    axes[0, 0].set_title(run.name, parse_math=False)
    _finish(axes)
    save(figure, run / "loss.png")


def reward_bands(path, panels, differences):
    """panels: {title: {label: (colour, rewards of each run, a list of lists (runs, steps))}}: mean over runs,
    its standard error as a band, dashed where the label has a comma. differences: [(label, colour, mean, half
    of its 95% interval, n), ...] in points of accuracy, paired by seed -> the PNG `path`. Raises BadInput
    when the disk cannot be written."""
    from matplotlib.figure import Figure

    heights = [4, 0.8 + 0.24 * len(differences)]  # inches
    figure = Figure(figsize=(max(9, 4.5 * len(panels)), sum(heights)), layout="constrained")
    rows = [list(panels), ["differences"] * len(panels)] if differences else [list(panels)]
    places = figure.subplot_mosaic(rows, height_ratios=heights[: len(rows)])
    for title, curves in panels.items():
        axes = places[title]
        for label, (colour, runs) in curves.items():
            rewards = torch.tensor(runs)  # (runs, steps)
            steps, mean = range(1, rewards.size(1) + 1), rewards.mean(0)
            error = rewards.std(0) / len(runs) ** 0.5 if len(runs) > 1 else torch.zeros_like(mean)
            style = "--" if "," in label else "-"
            axes.plot(steps, mean, style, color=colour, label=f"{label} (n = {len(runs)})")
            axes.fill_between(steps, mean - error, mean + error, alpha=0.2, color=colour, linewidth=0)
        axes.set(xlabel="training step", title=title)
        _whole_steps(axes)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize="small")  # curves rise, so it is over none
        axes.sharey(places[next(iter(panels))])
    places[next(iter(panels))].set_ylabel("mean reward of sampled completions")
    if differences:
        axes = places["differences"]
        for place, (_, colour, mean, half, _) in enumerate(differences):
            axes.errorbar(mean, place, xerr=half, fmt="o", color=colour, capsize=3)
        axes.set_yticks(range(len(differences)), [f"{label} (n = {n})" for label, *_, n in differences])
        axes.axvline(0, color=GREY, linewidth=1)
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
        axes.set(xlabel="difference in accuracy paired by seed, points, with 95% intervals")
    save(figure, path)


# ------------------------------------------------------------------------------------------------ magnitudes


def heatmap(run):
    """runs/NAME/magnitudes.safetensors -> runs/NAME/magnitudes.png: heads x dimensions of four layers, Q
    and K side by side, and how concentrated each layer is. Raises BadInput."""
    tensors = run_files.load_magnitudes(run / "magnitudes.safetensors")
    layers = run_files.some_layers(tensors)
    heads = len(tensors["model.layers.0.self_attn.q_proj"])
    tall = min(4.0, 0.8 + 0.09 * heads)  # inches of a layer
    sizes = {"height_ratios": [tall] * len(layers) + [2.4]}
    figure, grid = subplots(len(layers) + 1, 2, figsize=(14, tall * len(layers) + 3), gridspec_kw=sizes)
    for layer, row in zip(layers, grid):
        for axes, which in zip(row, "qk", strict=True):
            image = _panel(axes, tensors, layer, which)
    for axes, which in zip(grid[0], "qk", strict=True):
        axes.set_title(f"{which.upper()}: magnitude / largest of the head; outlined: selected rows")
    for axes in grid[-2]:
        axes.set_xlabel("dimension of the head")
    figure.colorbar(image, ax=grid[:-1], fraction=0.02)
    for axes, which, colour in zip(grid[-1], "qk", (BLUE, ORANGE)):
        shares = run_files.concentration(tensors, which)
        axes.plot(range(len(shares)), shares, "o-", color=colour, markersize=3, label="in the selected rows")
        axes.axhline(
            run_files.selected_share(tensors, which), color=GREY, linestyle="--", label="if all were equal"
        )
        axes.set(xlabel="layer", ylabel="share of squared\nmagnitude", ylim=(0, 1.02))
    _finish(grid[-1:])
    save(figure, run / "magnitudes.png")


def heads_and_dimensions(path, title, magnitudes, which, layers):
    """The file `magnitudes`, written by run_files.save_magnitudes -> the PNG `path`: heads x dimensions of Q
    or K (`which`: "q" or "k"), a panel for each of `layers`, one below the other. Raises BadInput."""
    tensors = run_files.load_magnitudes(magnitudes)
    heads = len(tensors[f"model.layers.0.self_attn.{which}_proj"])
    height = 0.8 + 0.14 * heads  # inches of a panel
    figure, grid = subplots(len(layers), 1, figsize=(11, 0.8 + height * len(layers)), squeeze=False)
    for layer, axes in zip(layers, grid[:, 0], strict=True):
        image = _panel(axes, tensors, layer, which)
    axes.set_xlabel("dimension of the head")
    figure.suptitle(f"{title} / largest of the head; outlined: selected rows", parse_math=False, fontsize=10)
    figure.colorbar(image, ax=grid, fraction=0.02)
    save(figure, path)


def _panel(axes, tensors, layer, which):
    """One layer's heads x dimensions -> the image. Brightness: the magnitude divided by the largest of its
    head, so that every head is readable; a line goes around selected rows."""
    from matplotlib.collections import LineCollection

    name = f"model.layers.{layer}.self_attn.{which}_proj"
    magnitude = tensors[name]
    relative = magnitude / magnitude.amax(-1, keepdim=True).clamp(min=1e-30)
    image = axes.imshow(relative, aspect="auto", cmap="Greys_r", vmin=0, vmax=1)
    lines = [
        ((x - 0.5, y - 0.5), (x + dx - 0.5, y + dy - 0.5))
        for x, y, dx, dy in run_files.outline(tensors[name + ".selected"])
    ]
    axes.add_collection(LineCollection(lines, colors=OUTLINE, linewidths=0.8))
    axes.set(ylabel=f"layer {layer}\nhead", yticks=range(0, len(magnitude), max(1, len(magnitude) // 4)))
    return image


def score_heatmap(path, title, rows, columns, cells, label=""):
    """cells {(row, column): {"score", "low", "high", "n"}} in per cent; low and high, a 95% interval, may be
    None, and a pair without a cell stays empty -> the PNG `path`: each cell says its score, interval and n.
    label: what the rows are. Raises BadInput when the disk cannot be written."""
    figure, axes = subplots(figsize=(2.5 + 0.95 * len(columns), 1.5 + 0.5 * len(rows)))
    grid = [
        [cells[row, column]["score"] if (row, column) in cells else math.nan for column in columns]
        for row in rows
    ]
    image = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=100)
    axes.set(xticks=range(len(columns)), yticks=range(len(rows)), xlabel="length, tokens", ylabel=label)
    axes.set_xticklabels([f"{column:,}" for column in columns])
    axes.set_yticklabels(rows)
    for (row, column), cell in cells.items():
        interval = "" if cell["low"] is None else f"[{cell['low']:.0f}, {cell['high']:.0f}]\n"
        look = {"ha": "center", "va": "center", "fontsize": 7, "linespacing": 1}
        look["color"] = "black" if cell["score"] > 50 else "white"
        text = f"{cell['score']:.1f}\n{interval}n = {cell['n']:,}"
        axes.text(columns.index(column), rows.index(row), text, **look)
    axes.set_title(title, parse_math=False, fontsize=9)
    figure.colorbar(image, ax=axes, fraction=0.05, label="score, per cent; [95% interval]")
    save(figure, path)


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    if not config.run:
        raise BadInput("no run is given: python -m base.plot runs/NAME")
    directory = Path(config.run)
    if not (directory / "metrics.jsonl").exists():
        raise BadInput(f"{directory / 'metrics.jsonl'} is missing; give the directory of a run")
    if (directory / "magnitudes.safetensors").exists():  # a run writes it with its first report
        heatmap(directory)
        print(f"{directory}/magnitudes.png")
    reward_curve(directory)
    print(f"{directory}/reward.png")
