"""The figures of docs/one-step.md, which studies/one_step.py writes. Each is below 40 kB."""

from matplotlib import colormaps
from matplotlib.colors import ListedColormap

from base import plot
from base.plot import subplots

ORANGE, BLUE, GREY = "#D55E00", "#0072B2", "#BBBBBB"  # Okabe and Ito's, told apart without red and green
COLUMNS = 64  # of a matrix that are drawn, in few colours: small files


def draw(s, directory, q, k, head):
    """Five PNG into `directory`. s: what one_step.take_step gave; q, k: a layer's projections; head: of q."""
    D = s.model_config.head_dim
    masks = {name: s.masks[f"{name}.weight"].view(-1, D) for name in (q, k)}
    own = slice(head * D, (head + 1) * D), slice(COLUMNS)
    rewards(s.group.rewards, s.group.advantages, directory / "rewards.png")
    magnitudes(s.magnitudes[q][head], masks[q][head], directory / "magnitudes.png")
    rows(masks[q], masks[k], directory / "rows.png")
    gradients = [each[q][own].abs() for each in (s.gradients, s.masked_gradients)]
    most = gradients[0].quantile(0.98)
    titles = "before the mask", "after the mask"
    figure, axes = matrices(gradients, titles, [(0, most)] * 2, "Purples", own[0].start)
    figure.colorbar(axes[1].images[0], ax=axes, label="absolute gradient", extend="max", fraction=0.04)
    save(figure, directory / "gradient.png")
    old, new = (weights[f"{q}.weight"][own] for weights in (s.before, s.after))
    most = old.abs().quantile(0.98)
    titles = "weights before the step", "after - before, in learning rates"
    values = [old, (new - old) / s.learning_rate]
    figure, axes = matrices(values, titles, [(-most, most), (-1.5, 1.5)], "PuOr", own[0].start)
    for axis in axes:
        figure.colorbar(axis.images[0], ax=axis, fraction=0.05)
    save(figure, directory / "weights.png")


def rewards(scores, advantages, path):
    figure, axes = subplots(1, 2, figsize=(7, 2.4))
    for axis, title, values in zip(axes, ("reward", "advantage"), (scores, advantages)):
        axis.bar(range(len(values)), values, color=[BLUE if score else ORANGE for score in scores])
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="completion", xticks=range(len(values)))
    axes[0].set_yticks([0, 1])
    for i in (scores == 0).nonzero():
        axes[0].text(i, 0.03, "0", ha="center", color=ORANGE)
    save(figure, path)


def magnitudes(magnitude, mask, path):
    figure, axis = subplots(figsize=(7, 2.6))
    axis.bar(range(len(mask)), magnitude, color=[ORANGE if chosen else GREY for chosen in mask])
    axis.axhline(magnitude[mask].min(), color="black", linewidth=0.8, linestyle=":")
    axis.set(xlabel="dimension d of the head", ylabel="M[h, d]", xticks=range(0, len(mask), 4))
    save(figure, path)


def rows(q_mask, k_mask, path):
    figure, axes = subplots(2, 1, figsize=(7, 3.4), height_ratios=[len(q_mask), len(k_mask)], sharex=True)
    for axis, mask, name in zip(axes, (q_mask, k_mask), ("W_Q", "W_K")):
        (heads, D), colours = mask.shape, ListedColormap(["#E5E5E5", ORANGE])
        axis.pcolormesh(mask, cmap=colours, edgecolors="white", linewidth=1)
        axis.invert_yaxis()
        axis.set(ylabel=name, yticks=[h + 0.5 for h in range(heads)])
        axis.set_yticklabels([f"head {h}: rows {h * D} to {h * D + D - 1}" for h in range(heads)], fontsize=7)
        axis.set_xticks([d + 0.5 for d in range(0, D, 4)], range(0, D, 4))
    axes[1].set_xlabel("dimension d of the head")
    save(figure, path)


def matrices(values, titles, limits, colours, first_row):
    """Two matrices side by side -> figure, axes."""
    figure, axes = subplots(1, 2, figsize=(7, 2.8), sharey=True)
    for axis, matrix, title, (low, high) in zip(axes, values, titles, limits):
        how = {"cmap": colormaps[colours].resampled(9), "vmin": low, "vmax": high}
        axis.imshow(matrix, aspect="auto", interpolation="nearest", **how)
        axis.set(title=title, xlabel="column", xticks=range(0, COLUMNS, 16), yticks=range(0, len(matrix), 8))
    axes[0].set_yticklabels(range(first_row, first_row + len(values[0]), 8))
    axes[0].set_ylabel("row of W_Q")
    return figure, axes


def save(figure, path):
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10)
    plot.save(figure, path, dpi=100)
