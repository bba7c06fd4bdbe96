"""What finished samples say: means with standard errors, tables, and two evaluations compared item by
item."""

import math
from collections import defaultdict

import numpy as np

from base.cli import BadInput
from evals.results import different, read_results, read_settings, results_file

RESAMPLES = 10_000  # of the bootstrap, and sign flips of the permutation test


def by_item(records):
    """{id: mean score over its seeds}: items are independent of each other, an item's seeds are not."""
    scores = defaultdict(list)
    for record in records:
        scores[record["id"]].append(record["score"])
    return {item: float(np.mean(values)) for item, values in scores.items()}


def summarize(records):
    """-> {"score", "stderr", "n"}: mean over items in [0, 1], its standard error (None for one item),
    items."""
    scores = list(by_item(records).values())
    stderr = float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None
    return {"score": float(np.mean(scores)), "stderr": stderr, "n": len(scores)}


def percent(summary):
    """What `summarize` gives, with score and stderr in per cent."""
    return {key: value if key == "n" or value is None else 100 * value for key, value in summary.items()}


def shown(percent, digits):
    """ "40.0 ±2.2" of what `percent` gives; "-" of None, which stands for no items."""
    if percent is None:
        return "-"
    return f"{percent['score']:.{digits}f}" + (
        "" if percent["stderr"] is None else f" ±{percent['stderr']:.{digits}f}"
    )


def table(rows):
    """Rows of strings -> text with aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]
    return "\n".join(lines)


def paired(a, b):
    """Two equally long sequences of scores of the same items -> {"n", "a", "b", "difference" (b - a), "low",
    "high" (95% bootstrap interval of the difference), "p" (two-sided), "test"}. Scores 0 and 1 only:
    McNemar's exact test; otherwise random sign flips. The same input gives the same output."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    d, rng = b - a, np.random.default_rng(0)
    # Few differences are distinct: how often each is drawn is multinomial, how many of a size keep their sign
    # binomial.
    values, often = np.unique(d.round(12), return_counts=True)
    sizes, alike = np.unique(np.abs(values), return_inverse=True)
    alike = np.bincount(alike, often)
    means, extreme = [], 0
    observed = abs(d.sum()) - 1e-9 * max(
        1.0, np.abs(d).sum()
    )  # equal sums count as extreme whatever their rounding
    for _ in range(RESAMPLES // 100):  # in parts: resamples x values may be large
        means.append(rng.multinomial(len(d), often / len(d), size=100) @ values / len(d))
        flipped = (2 * rng.binomial(alike.astype(int), 0.5, size=(100, len(sizes))) - alike) @ sizes
        extreme += int((np.abs(flipped) >= observed).sum())
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5]).tolist()
    if np.isin(np.concatenate([a, b]), [0.0, 1.0]).all():
        p, test = mcnemar(int((d < 0).sum()), int((d > 0).sum())), "McNemar exact"
    else:
        p, test = (1 + extreme) / (1 + RESAMPLES), "sign flips"
    means = {"a": float(a.mean()), "b": float(b.mean()), "difference": float(d.mean())}
    return {"n": len(d), **means, "low": low, "high": high, "p": p, "test": test}


def mcnemar(losses, wins):
    """Two-sided exact p-value: losses and wins are the tails of a fair coin thrown losses + wins times."""
    n, term, tail = losses + wins, 1, 0
    for k in range(min(losses, wins) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def compare(paths, may_differ, order=()):
    """The report of --compare A B: scores, difference, interval and p-value of all items both have, then of
    each task and of each length where there are several. paths: two results.jsonl or their directories;
    order: names of classes that have an order of their own. Each p-value is of one test: among 20 rows
    without a difference one has p < 0.05. Raises BadInput if settings outside `may_differ` differ."""
    if len(paths) != 2:
        raise BadInput(f"--compare takes two results.jsonl or their directories, not {len(paths)}")
    files = [results_file(path) for path in paths]
    settings = [read_settings(file.with_name("settings.json")) for file in files]
    difference = different(*[{k: v for k, v in s.items() if k not in may_differ} for s in settings])
    if difference:
        raise BadInput(
            f"{files[0]} and {files[1]} are of other settings and cannot be compared: {difference}"
        )
    records = [read_results(file) for file in files]
    scores = [by_item(r) for r in records]
    both = [item for item in scores[0] if item in scores[1]]
    if not both:
        raise BadInput(f"{files[0]} and {files[1]} have no sample in common")
    groups = {"all": both}
    for kind in ("task", "length"):
        names = {record["id"]: record[kind] for record in records[0] if record["id"] in scores[1]}
        classes = sorted(
            set(names.values()),
            key=lambda name: (order.index(name) if name in order else 0, str(type(name)), name),
        )
        if len(classes) > 1:
            groups |= {str(name): [item for item in both if names[item] == name] for name in classes}
    rows = [["", "n", "A", "B", "B - A", "95% interval", "p", "test"]]
    for name, items in groups.items():
        r = paired(*[[s[item] for item in items] for s in scores])
        numbers = [f"{100 * r[key]:.2f}" for key in ("a", "b")] + [f"{100 * r['difference']:+.2f}"]
        rows.append(
            [
                name,
                str(r["n"]),
                *numbers,
                f"{100 * r['low']:+.2f} {100 * r['high']:+.2f}",
                f"{r['p']:.3g}",
                r["test"],
            ]
        )
    left = [f"{len(s) - len(both)} only in {label}" for s, label in zip(scores, "AB") if len(s) > len(both)]
    head = [f"A: {files[0]} ({settings[0]['checkpoint']})", f"B: {files[1]} ({settings[1]['checkpoint']})"]
    return "\n".join(
        [*head, f"{len(both)} samples in both" + "".join(f", {text}" for text in left), "", table(rows)]
    )
