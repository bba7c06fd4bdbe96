"""Figures from what a run wrote.

    python -m base.plot runs/NAME          # draws runs/NAME/reward.png and runs/NAME/magnitudes.png again

The files read here were written by train.py and sft.py and may have been damaged since, so every reader
raises BadInput. H heads, D head size.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from base import durable, limits
from base.cli import BadInput, one_line_errors, option, parse
from base.durable import json_lines

LARGEST, MOST_LAYERS = 4096, 400  # heads, or dimensions of one; what fits into a figure of 65,536 pixels


@dataclass
class Config:
    run: str = option("", "directory of a finished run of train.py", positional=True)


def subplots(rows=1, columns=1, *, figsize, **how):
    """-> a matplotlib figure to be saved, and its axes. how: further arguments of Figure.subplots. matplotlib
    takes 0.5 s to import, so it is imported only here."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **how)


def read_metrics(path, key):
    """metrics.jsonl -> list of steps, and list of the numbers under `key`, None where a line has null.

    Raises BadInput for a file that cannot be read and for a line without these numbers."""
    steps, values = [], []
    for _, where, row in json_lines(path):
        step, value = (row.get("step"), row.get(key, "")) if isinstance(row, dict) else (None, "")
        if type(step) is not int or not 0 <= step < 2**53 or not _number(value):
            raise BadInput(f'{where} is not a line of metrics: "step" and "{key}" must be numbers; remove it')
        steps.append(step)
        values.append(value)
    return steps, values


def _number(value):
    return value is None or (type(value) in (int, float) and abs(value) < 1e100)


def held_out_accuracy(path):
    """results.json -> {"before": float or None, "after": float or None}: accuracy on the first set of
    held-out prompts. Raises BadInput for a file that train.py did not write."""
    fix = "remove it to draw the reward alone"
    accuracy = {}
    try:
        results = limits.parse_json(limits.read_text(path))
        for when in ("before", "after"):
            sets = list((results[when] or {}).values())  # null: not evaluated; {}: no held-out prompts
            accuracy[when] = sets[0]["accuracy"] if sets else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path} is not what train.py leaves: {error!r}; {fix}") from error
    if not all(_number(value) for value in accuracy.values()):
        raise BadInput(f"{path} is not what train.py leaves: accuracy {accuracy}; {fix}")
    return accuracy


def load_magnitudes(path):
    """The file that save_magnitudes wrote -> {name: magnitudes (H, D) fp32, name + ".selected": (H, D) bool}.

    Raises BadInput for a file that cannot be read or holds other tensors."""
    try:
        limits.check(path)
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    layers = range(sum(name.endswith("q_proj") for name in tensors))
    names = [f"model.layers.{i}.self_attn.{which}_proj" for i in layers for which in "qk"]
    wanted = {name + of for name in names for of in ("", ".selected")}
    other = not tensors or tensors.keys() != wanted or len(layers) > MOST_LAYERS
    if other or not all(_is_pair(tensors, name) for name in names):
        fix = "a run of train.py with --rule top leaves them"
        raise BadInput(f"{path} does not hold the magnitudes of Q and K; {fix}")
    return tensors


def _is_pair(tensors, name):
    """Whether they hold magnitudes of a size that a figure can have, and which of them were selected."""
    magnitude, selected = tensors[name], tensors[name + ".selected"]
    if magnitude.dim() != 2 or not 0 < min(magnitude.shape) <= max(magnitude.shape) <= LARGEST:
        return False
    good = magnitude.dtype == torch.float32 and bool((magnitude.isfinite() & (magnitude >= 0)).all())
    return good and selected.dtype == torch.bool and selected.shape == magnitude.shape


def _save(figure, path):
    with durable.replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def reward_curve(run):
    """runs/NAME/metrics.jsonl, and results.json if there is one -> runs/NAME/reward.png: training reward, and
    held-out accuracy before and after. Raises BadInput."""
    steps, rewards = read_metrics(run / "metrics.jsonl", "reward")
    accuracy = held_out_accuracy(run / "results.json") if (run / "results.json").exists() else {}
    figure, axes = subplots(figsize=(7, 4))
    axes.plot(steps, rewards, color="tab:blue", label="mean reward of sampled completions")
    for (when, value), x in zip(accuracy.items(), (0, steps[-1])):
        if value is not None:  # --no-eval-before
            axes.plot(x, value, "o", color="tab:red", label="held-out accuracy" if when == "after" else None)
    axes.set(xlabel="training step", ylabel="reward")
    axes.set_title(run.name, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    _save(figure, run / "reward.png")


def loss_curve(run):
    """metrics.jsonl of sft.py in the directory `run` -> loss.png: the loss of each step. Raises BadInput."""
    figure, axes = subplots(figsize=(7, 4))
    axes.plot(*read_metrics(run / "metrics.jsonl", "loss"), color="tab:blue")
    axes.set(xlabel="training step", ylabel="cross entropy of the assistant's tokens, nats")
    axes.set_title(run.name, parse_math=False)
    axes.grid(alpha=0.3)
    _save(figure, run / "loss.png")


def reward_bands(path, panels):
    """{panel title: {label: rewards of each run, a list of lists (runs, steps)}} -> the PNG `path`: mean over
    runs, with its standard error as a band. Raises BadInput when the disk cannot be written."""
    figure, grid = subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False, sharey=True)
    for axes, (title, curves) in zip(grid[0], panels.items(), strict=True):
        for label, runs in curves.items():
            rewards = torch.tensor(runs)  # (runs, steps)
            steps, mean = range(1, rewards.size(1) + 1), rewards.mean(0)
            error = rewards.std(0) / len(runs) ** 0.5 if len(runs) > 1 else torch.zeros_like(mean)
            (line,) = axes.plot(steps, mean, label=f"{label} ({len(runs)} runs)")
            look = {"alpha": 0.2, "color": line.get_color(), "linewidth": 0}
            axes.fill_between(steps, mean - error, mean + error, **look)
        axes.set(xlabel="training step", title=title)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize="small")
    grid[0, 0].set_ylabel("mean reward of sampled completions")
    _save(figure, path)


def save_magnitudes(path, magnitudes, masks):
    """Magnitudes {name: (H, D) fp32} and masks {name.weight: (H * D,) bool} of one step -> a safetensors
    file, see load_magnitudes. Raises BadInput when the disk cannot be written."""
    tensors = {}
    for name, magnitude in magnitudes.items():
        tensors[name] = magnitude.cpu()
        tensors[f"{name}.selected"] = masks[f"{name}.weight"].view_as(magnitude).cpu().contiguous()
    try:
        with durable.replacing(path) as partial:
            save_file(tensors, partial)
    except SafetensorError as error:
        raise BadInput(f"{path} cannot be written: {error}") from error


def heatmap(run):
    """runs/NAME/magnitudes.safetensors -> runs/NAME/magnitudes.png: heads x dimensions, a row of panels for
    each layer, Q and K side by side. Raises BadInput."""
    tensors = load_magnitudes(run / "magnitudes.safetensors")
    layers = len(tensors) // 4
    figure, grid = subplots(layers, 2, figsize=(14, 1.0 + 1.3 * layers), squeeze=False)
    for layer in range(layers):
        for axes, which in zip(grid[layer], "qk", strict=True):
            image = _panel(axes, tensors, layer, which, dot=5)
            if layer == 0:
                axes.set_title(f"{which.upper()}: magnitude / largest of the head; red: selected rows")
    for axes in grid[-1]:
        axes.set_xlabel("dimension of the head")
    figure.colorbar(image, ax=grid, fraction=0.02)
    _save(figure, run / "magnitudes.png")


def heads_and_dimensions(path, title, magnitudes, which, layers):
    """The file `magnitudes`, written by save_magnitudes -> the PNG `path`: heads x dimensions of Q or K
    (`which`: "q" or "k"), a panel for each of `layers`, one below the other. Raises BadInput."""
    tensors = load_magnitudes(magnitudes)
    heads = len(tensors[f"model.layers.0.self_attn.{which}_proj"])
    height = 0.8 + 0.14 * heads  # inches of a panel
    figure, grid = subplots(len(layers), 1, figsize=(11, 0.8 + height * len(layers)), squeeze=False)
    for layer, axes in zip(layers, grid[:, 0], strict=True):
        image = _panel(axes, tensors, layer, which, dot=4)
    axes.set_xlabel("dimension of the head")
    figure.suptitle(f"{title} / largest of the head; red: selected rows", parse_math=False, fontsize=10)
    figure.colorbar(image, ax=grid, fraction=0.02)
    _save(figure, path)


def _panel(axes, tensors, layer, which, dot):
    """One layer's heads x dimensions -> the image. Colour: the magnitude divided by the largest of its head,
    so that every head is readable; a red dot of `dot` square points marks a selected row."""
    name = f"model.layers.{layer}.self_attn.{which}_proj"
    magnitude, selected = tensors[name], tensors[name + ".selected"]
    relative = magnitude / magnitude.amax(-1, keepdim=True)
    image = axes.imshow(relative, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    heads, dims = torch.nonzero(selected, as_tuple=True)
    axes.scatter(dims, heads, s=dot, color="red", marker="o", linewidths=0)
    axes.set(ylabel=f"layer {layer}\nhead", yticks=range(0, len(magnitude), max(1, len(magnitude) // 4)))
    return image


def score_heatmap(path, title, rows, columns, cells):
    """cells {(row, column): {"score": per cent, "stderr": per cent or None, "n": samples}}; a pair without a
    cell stays empty -> the PNG `path`: each cell says its score, standard error and n. Raises BadInput when
    the disk cannot be written."""
    figure, axes = subplots(figsize=(2.5 + 0.95 * len(columns), 1.5 + 0.5 * len(rows)))
    grid = [
        [cells[row, column]["score"] if (row, column) in cells else math.nan for column in columns]
        for row in rows
    ]
    image = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=100)
    axes.set(xticks=range(len(columns)), yticks=range(len(rows)), xlabel="length, tokens")
    axes.set_xticklabels([f"{column:,}" for column in columns])
    axes.set_yticklabels(rows)
    for (row, column), cell in cells.items():
        error = "" if cell["stderr"] is None else f" ±{cell['stderr']:.1f}"
        look = {"ha": "center", "va": "center", "fontsize": 7}
        look["color"] = "black" if cell["score"] > 50 else "white"
        text = f"{cell['score']:.1f}{error}\nn = {cell['n']:,}"
        axes.text(columns.index(column), rows.index(row), text, **look)
    axes.set_title(title, parse_math=False, fontsize=9)
    figure.colorbar(image, ax=axes, fraction=0.05, label="score, per cent; ± is a standard error")
    _save(figure, path)


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    if not config.run:
        raise BadInput("no run is given: python -m base.plot runs/NAME")
    directory = Path(config.run)
    for file in ("metrics.jsonl", "magnitudes.safetensors"):
        if not (directory / file).exists():
            raise BadInput(f"{directory / file} is missing; give the directory of a finished run")
    reward_curve(directory)
    heatmap(directory)
    print(f"{directory}/reward.png {directory}/magnitudes.png")
