"""What finished samples say: means with 95% intervals, tables, and two evaluations compared item by item.

Intervals are made for few samples too; docs/evaluate.md has how often they cover the truth, measured by
bench/coverage.py.
"""

import itertools
import math
from collections import defaultdict

import numpy as np

from base.cli import BadInput
from evals.results import different, read_results, read_settings, results_file

MAY_DIFFER = (
    "checkpoint",
    "weights",
    "rope_scaling",
    "clamp",
    "context",  # LongBench v2 without the documents
    "seeds",
    "samples",
)  # of two that are compared
FLIPS = 10_000  # sign flips of the permutation test
LEAST = 5  # items: fewer say too little for an interval
Z = 1.959964  # the normal distribution's 97.5% quantile

# -------------------------------------------------------------------------------------------------- intervals


def interval(scores):
    """Independent scores in [0, 1] -> (low, high), a 95% interval of their mean; (None, None) for fewer than
    LEAST.

    Scores that are all 0 or 1 get Wilson's (1927), others Student's t after a 0 and a 1 are added to them. So
    equal scores do not have an interval of no width."""
    if len(scores) < LEAST:
        return None, None
    if not np.isin(scores, [0.0, 1.0]).all():
        return student([*scores, 0.0, 1.0], least=0.0)
    n, mean = len(scores), float(np.mean(scores))
    centre = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_interval(differences):
    """Differences in [-1, 1] of paired scores -> (low, high), a 95% interval of their mean; (None, None) for
    fewer than LEAST. Student's t after a 1 and a -1 are added to them, as Bonett and Price (2012) do for
    pairs of 0 and 1."""
    return student([*differences, 1.0, -1.0], least=-1.0) if len(differences) >= LEAST else (None, None)


def student(values, least):
    """Student's t interval of the mean of `values`, of which two were added, within [least, 1]."""
    n, mean = len(values), float(np.mean(values))
    half = t_quantile(n - 1) * float(np.std(values)) / math.sqrt(n)
    return max(least, mean - half), min(1.0, mean + half)


def t_quantile(v):
    """The 97.5% quantile of Student's t with v degrees of freedom, from v = 6 on within 0.002 (Abramowitz and
    Stegun 26.7.5)."""
    z = Z
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    terms += ((3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,)
    return z + sum(term / v**power for power, term in enumerate(terms, 1))


def weighted_mean(summaries, weights):
    """Summaries of independent groups of items (`summarize`, `percent`) -> {"score", "low", "high"} of their
    weighted mean. How far it lies above and below adds up as variances do (Zou and Donner 2008)."""
    total = sum(weights)
    score = sum(w * s["score"] for w, s in zip(weights, summaries)) / total
    if any(s["low"] is None for s in summaries):
        return {"score": score, "low": None, "high": None}
    below, above = (
        math.hypot(*[w * (s[key] - s["score"]) for w, s in zip(weights, summaries)]) / total
        for key in ("low", "high")
    )
    return {"score": score, "low": score - below, "high": score + above}


# -------------------------------------------------------------------------------------------------- summaries


def by_item(records):
    """-> {id: mean score over its seeds}: items are independent of each other, an item's seeds are not."""
    scores = defaultdict(list)
    for record in records:
        scores[record["id"]].append(record["score"])
    return {item: sum(values) / len(values) for item, values in scores.items()}


def summarize(records):
    """-> {"score", "low", "high", "n"}: the mean over items in [0, 1], its 95% interval (None for fewer than
    LEAST items), the number of items."""
    scores = list(by_item(records).values())
    low, high = interval(scores)
    return {"score": sum(scores) / len(scores), "low": low, "high": high, "n": len(scores)}


def finished_share(records):
    """The share of completions that ended by themselves, before their maximum length."""
    return sum(record["finished"] for record in records) / len(records)


def percent(summary):
    """What `summarize` returns, with score, low and high in per cent."""
    return {key: value if key == "n" or value is None else 100 * value for key, value in summary.items()}


# ----------------------------------------------------------------------------------------------------- tables


def shown(percent, digits):
    """What `percent` returns -> text such as "40.0 [35.1, 45.2]"; "40.0 [-]" where there are too few samples;
    None, for no items -> "-"."""
    if percent is None:
        return "-"
    bounds = "-" if percent["low"] is None else f"{percent['low']:.1f}, {percent['high']:.1f}"
    return f"{percent['score']:.{digits}f} [{bounds}]"


def legend(shown_cells):
    """What the brackets of `shown` mean, for a report; shown_cells: all of its text."""
    few = f"; [-]: too few samples, fewer than {LEAST}" if "[-]" in shown_cells else ""
    return f"[low, high]: 95% interval{few}"


def aligned(rows):
    """Rows of strings -> the same, padded: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]


def table(rows):
    """Rows of strings -> text with aligned columns."""
    return "\n".join("  ".join(cells).rstrip() for cells in aligned(rows))


def markdown(rows):
    """Rows of strings, the first of them the head -> a Markdown table, which is aligned as text, too."""
    head, *rest = aligned(rows)
    rule = ["-" * max(3, len(head[0])), *["-" * max(2, len(cell) - 1) + ":" for cell in head[1:]]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rest])


# -------------------------------------------------------------------------------------------------- comparing


def paired(a, b):
    """Two equally long sequences of scores of the same items -> {"n", "a", "b", "difference" (b - a), "low",
    "high" (its 95% interval for scores in [0, 1], None for fewer than LEAST), "p" (two-sided), "test"}.

    The test is McNemar's exact one for scores of only 0 and 1, and sign flips for others: all of
    them for up to 12 items, FLIPS random ones for more. The same input gives the same output."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    differences = b - a
    if np.isin(np.concatenate([a, b]), [0.0, 1.0]).all():
        p, test = mcnemar(int((differences < 0).sum()), int((differences > 0).sum())), "McNemar exact"
    else:
        p, test = sign_flips(differences), "sign flips"
    low, high = difference_interval(differences)
    means = {"a": float(a.mean()), "b": float(b.mean()), "difference": float(differences.mean())}
    return {"n": len(differences), **means, "low": low, "high": high, "p": p, "test": test}


def sign_flips(differences):
    """Two-sided p-value: how often differences of any signs have a sum at least as far from 0. Of up to 12
    differences all signs are taken, of more FLIPS random ones."""
    # Sums that are equal but for rounding count as extreme.
    observed = abs(differences.sum()) - 1e-9 * max(1.0, np.abs(differences).sum())
    if len(differences) <= 12:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))  # (2^n, n)
        return float((np.abs(signs @ differences) >= observed).mean())
    # Few differences are distinct. How many of one size keep their sign is binomial.
    sizes, often = np.unique(np.abs(differences).round(12), return_counts=True)
    rng, extreme = np.random.default_rng(0), 0
    for _ in range(FLIPS // 100):  # in parts: flips x sizes may be large
        kept = rng.binomial(often, 0.5, size=(100, len(sizes)))
        extreme += int((np.abs((2 * kept - often) @ sizes) >= observed).sum())
    return (1 + extreme) / (1 + FLIPS)


def mcnemar(losses, wins):
    """Two-sided exact p-value: losses and wins are the tails of a fair coin thrown losses + wins times."""
    n, term, tail = losses + wins, 1, 0
    for k in range(min(losses, wins) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def compare(paths, order=()):
    """The report of --compare A B: scores, difference, interval and p-value of all items that both have, then
    of each task and of each length where there are several.

    paths: two results.jsonl or their directories; order: names of classes that have an order of their own.
    Each p-value is of one test: of 20 rows without a difference one has p < 0.05 on average. Raises BadInput
    if settings outside MAY_DIFFER differ."""
    if len(paths) != 2:
        raise BadInput(f"--compare takes two results.jsonl or their directories, not {len(paths)}")
    files = [results_file(path) for path in paths]
    settings = [read_settings(file.with_name("settings.json")) for file in files]
    difference = different(*[{k: v for k, v in s.items() if k not in MAY_DIFFER} for s in settings])
    if difference:
        raise BadInput(
            f"{files[0]} and {files[1]} have different settings and cannot be compared: {difference}"
        )
    records = [read_results(file) for file in files]
    scores = [by_item(r) for r in records]
    both = [item for item in scores[0] if item in scores[1]]
    if not both:
        raise BadInput(f"{files[0]} and {files[1]} have no sample in common")

    def place(name):
        return order.index(name) if name in order else 0, str(type(name)), name

    groups = {"all": both}
    for kind in ("task", "length"):
        names = {record["id"]: record[kind] for record in records[0] if record["id"] in scores[1]}
        classes = sorted(set(names.values()), key=place)
        if len(classes) > 1:
            groups |= {str(name): [item for item in both if names[item] == name] for name in classes}
    rows = [["", "n", "A", "B", "B - A", "95% interval", "p", "test"]]
    for name, items in groups.items():
        r = paired(*[[s[item] for item in items] for s in scores])
        numbers = [f"{100 * r[key]:.2f}" for key in ("a", "b")] + [f"{100 * r['difference']:+.2f}"]
        few = r["low"] is None
        bounds = "too few samples" if few else f"{100 * r['low']:+.2f} to {100 * r['high']:+.2f}"
        rows.append([name, str(r["n"]), *numbers, bounds, f"{r['p']:.3g}", r["test"]])
    head = [f"A: {files[0]} ({settings[0]['checkpoint']})", f"B: {files[1]} ({settings[1]['checkpoint']})"]
    alone = [f"{len(s) - len(both)} only in {label}" for s, label in zip(scores, "AB") if len(s) > len(both)]
    return "\n".join([*head, ", ".join([f"{len(both)} samples in both", *alone]), "", markdown(rows)])
