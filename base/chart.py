"""Curves, and heads x dimensions, as SVG for an HTML page (base/page.py), drawn without a library.

A chart is 420 x 230 units; page.html gives each about that many pixels, so its letters keep their size on a
phone. Colours are the names of page.html's variables, from the palette of Okabe and Ito, which colour-blind
readers tell apart; a quantity has the same one everywhere.
"""

import base64
import io
import itertools
import json
import math
from html import escape
from typing import NamedTuple

import torch
from PIL import Image

from base import run_files

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 230, 50, 410, 10, 190
MOST = 500  # points of a curve; more are thinned


class Line(NamedTuple):
    """A curve: numbers ys at xs, None where there is none. intervals: (low, high) of each y, for means of
    samples, which are drawn as dots."""

    name: str
    colour: str
    xs: list
    ys: list
    intervals: list | None = None
    dashed: bool = False


def wilson(share, n):
    """A share of n independent trials -> its 95% interval (low, high), by Wilson."""
    z2 = 1.96**2
    centre, half = share + z2 / (2 * n), math.sqrt(z2 * share * (1 - share) / n + z2 * z2 / (4 * n * n))
    return (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)


def thin(xs, ys):
    """-> xs, means, lows, highs of at most MOST / 2 buckets of neighbours; a bucket without a number has
    None. Up to MOST points stay as they are, each its own low and high."""
    if len(xs) <= MOST:
        return xs, ys, ys, ys
    edges = [round(i * len(xs) / (MOST // 2)) for i in range(MOST // 2 + 1)]
    rows = []
    for start, end in itertools.pairwise(edges):
        known = [y for y in ys[start:end] if y is not None]
        of = (sum(known) / len(known), min(known), max(known)) if known else (None, None, None)
        rows.append((xs[(start + end - 1) // 2], *of))
    return tuple(map(list, zip(*rows)))


def ticks(low, high, whole=False):
    """Round numbers within [low, high], three to six of them (fewer if they must be whole)."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= max(factor for factor in (1, 2, 2.5, 5) if factor * step <= (high - low) / 3 or factor == 1)
    if whole:
        step = max(1, math.ceil(step))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value):
    """As a reader wants it: 12,345 or 0.123 or 1.2e-06."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def chart(title, lines, *, unit="", limits=None, log=False, stacked=False, x="step"):
    """-> HTML: a figure of `lines` with axes, and a legend that says the last values; the page's script makes
    it say those under the pointer. "" without any number.

    limits: (low, high) of the y axis. log: a logarithmic one, which leaves out what is not positive. stacked:
    the lines' areas lie on each other, and each has all xs."""
    usable = (lambda y: y is not None and y > 0) if log else (lambda y: y is not None)
    lines = [line._replace(ys=[y if usable(y) else None for y in line.ys]) for line in lines]
    lines = [line for line in lines if any(y is not None for y in line.ys)]
    if not lines:
        return ""
    thinned = [thin(line.xs, line.ys) for line in lines]
    curves = []
    if stacked:
        floor = [0.0] * len(thinned[0][0])
        for xs, ys, _, _ in thinned:
            top = [below + (y or 0) for below, y in zip(floor, ys)]
            curves.append((xs, top, floor, top))
            floor = top
    else:
        curves = thinned

    values = [y for curve in curves for part in curve[1:] for y in part if y is not None]
    values += [y for line in lines for pair in line.intervals or [] for y in pair]
    x_low, x_high = min(min(line.xs) for line in lines), max(max(line.xs) for line in lines)
    x_low, x_high = (x_low - 1, x_high + 1) if x_low == x_high else (x_low, x_high)
    low, high, marks = y_axis(values, limits, log)

    def at_x(value):
        return round(LEFT + (value - x_low) / (x_high - x_low) * (RIGHT - LEFT), 1)

    def at_y(value):
        value = math.log10(value) if log else value
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return round(BOTTOM - share * (BOTTOM - TOP), 1)

    parts = [axis_y(at_y(mark), number(mark)) for mark in marks]
    parts += [axis_x(at_x(mark), number(mark)) for mark in ticks(x_low, x_high, whole=True)]
    parts.append(f'<text class="label" x="{(LEFT + RIGHT) / 2:g}" y="{HEIGHT - 6}">{escape(x)}</text>')
    for line, (xs, ys, lows, highs) in zip(lines, curves):
        if stacked or lows is not ys:
            look = f'fill="var(--{line.colour})" opacity="{0.85 if stacked else 0.25}"'
            parts += [f'<polygon points="{area}" {look}/>' for area in areas(xs, lows, highs, at_x, at_y)]
        if not stacked:
            look = f'stroke="var(--{line.colour})"' + ' stroke-dasharray="5 4"' * line.dashed
            parts += [f'<polyline points="{run}" {look}/>' for run in runs(xs, ys, at_x, at_y)]
        for place, y, (bottom, top) in zip(line.xs, line.ys, line.intervals or []):
            ends = f'x1="{at_x(place)}" x2="{at_x(place)}" y1="{at_y(bottom)}" y2="{at_y(top)}"'
            parts.append(f'<line {ends} stroke="var(--{line.colour})"/>')
            parts.append(f'<circle cx="{at_x(place)}" cy="{at_y(y)}" r="3.5" fill="var(--{line.colour})"/>')
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{BOTTOM}" x1="-9" x2="-9"/>')

    shown = [[list(pair) for pair in zip(xs, map(rounded, ys))] for xs, ys, _, _ in thinned]
    data = escape(json.dumps({"x": [x_low, x_high], "lines": shown}, separators=(",", ":")))
    last = ["-" if line.ys[-1] is None else number(line.ys[-1]) for line in lines]
    keys = "".join(
        f'<span class="key"><i class="{"dashed" if line.dashed else ""}" style="color:var(--{line.colour})">'
        f"</i>{escape(line.name)} <b>{y}</b></span>"
        for line, y in zip(lines, last)
    )
    said = f"{title}: " + "; ".join(f"{line.name}, last {y}" for line, y in zip(lines, last))
    caption = f"<figcaption>{escape(title)}{f' <small>{escape(unit)}</small>' if unit else ''}</figcaption>"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}" data-chart="{data}">'
    where = f'<span class="where" data-x="{escape(x)}">{escape(x)} {number(x_high)}</span>'
    return f'<figure class="chart">{caption}{svg}{"".join(parts)}</svg><p>{keys}{where}</p></figure>\n'


def rounded(y):
    return None if y is None else float(f"{y:.4g}")


def y_axis(values, limits, log):
    """-> low, high (both logarithms for log), and the values that are marked."""
    low, high = limits or (min(values), max(values))
    if log:
        low, high = math.log10(low), math.log10(high)
        low, high = low - 0.1, high + 0.1
        whole = range(math.ceil(low), math.floor(high) + 1)
        if len(whole) < 2:
            return low, high, [10**low * 1.05, 10 ** ((low + high) / 2), 10**high * 0.95]
        return low, high, [10.0**i for i in whole][:: math.ceil(len(whole) / 6)]
    if not limits:
        low = 0.0 if 0 <= low < high / 2 or low == high == 0 else low
        room = 0.05 * (high - low) or abs(high) or 1.0
        low, high = (low if low == 0 else low - room), high + room
    return low, high, ticks(low, high)


def axis_y(y, text):
    return f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>' + (
        f'<text class="tick-y" x="{LEFT - 6}" y="{y + 4}">{text}</text>'
    )


def axis_x(x, text):
    side = ' style="text-anchor:end"' if x > RIGHT - 12 and len(text) > 3 else ""  # not beyond the edge
    return f'<line class="grid" x1="{x}" x2="{x}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>' + (
        f'<text class="tick-x" x="{x}" y="{BOTTOM + 17}"{side}>{text}</text>'
    )


def stretches(*columns):
    """Parallel lists -> the stretches of them without a None, as lists of tuples."""
    stretch = []
    for row in zip(*columns):
        if None in row:
            if stretch:
                yield stretch
            stretch = []
        else:
            stretch.append(row)
    if stretch:
        yield stretch


def runs(xs, ys, at_x, at_y):
    """-> the points of each polyline; a number alone is drawn as a short dash."""
    for stretch in stretches(xs, ys):
        points = [f"{at_x(x)},{at_y(y)}" for x, y in stretch]
        if len(points) == 1:
            x, y = stretch[0]
            points.append(f"{at_x(x) + 2},{at_y(y)}")
        yield " ".join(points)


def areas(xs, lows, highs, at_x, at_y):
    """-> the points of each polygon between lows and highs."""
    for stretch in stretches(xs, lows, highs):
        top = [f"{at_x(x)},{at_y(high)}" for x, _, high in stretch]
        yield " ".join(top + [f"{at_x(x)},{at_y(low)}" for x, low, _ in reversed(stretch)])


# ---------------------------------------------------------------------------------------- heads x dimensions


def heads(title, magnitudes, selected):
    """A layer's magnitudes (H, D) fp32 and selected rows (H, D) bool -> HTML: a figure of heads x dimensions,
    each head divided by its largest, with an outline around what is selected."""
    rows, columns = magnitudes.shape
    relative = magnitudes / magnitudes.amax(-1, keepdim=True).clamp(min=1e-30)
    data = base64.b64encode(png(relative)).decode()
    size = f'width="{columns}" height="{rows}" preserveAspectRatio="none"'
    look = f'viewBox="0 0 {columns} {rows}" preserveAspectRatio="none"'
    look += f' style="height:{min(14, max(8, 112 // rows)) * rows}px"'
    path = "".join(f"M{x} {y}l{dx} {dy}" for x, y, dx, dy in run_files.outline(selected))
    said = f"{title}: magnitudes of {rows} heads, {columns} dimensions each"
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg {look} role="img" aria-label="{escape(said)}">'
        f'<image href="data:image/png;base64,{data}" {size}/><path d="{path}"/></svg>'
        f'<p class="small ends"><span>dimension 0</span><span>{rows} heads, downwards</span>'
        f"<span>{columns - 1}</span></p></figure>\n"
    )


def png(values):
    """(rows, columns) in [0, 1], from black to white -> a PNG of as many pixels."""
    buffer = io.BytesIO()
    Image.fromarray((255 * values).round().to(torch.uint8).numpy()).save(buffer, "png")
    return buffer.getvalue()
