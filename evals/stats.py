"""What finished samples say: means with standard errors, tables, and two evaluations compared item by
item."""

import math
from collections import defaultdict

import numpy as np

from base.cli import BadInput
from evals.results import different, read_results, read_settings, results_file

MAY_DIFFER = ("checkpoint", "weights", "rope_scaling", "clamp", "seeds")  # settings of two that are compared
RESAMPLES = 10_000  # of the bootstrap, and sign flips of the permutation test


def by_item(records):
    """-> {id: mean score over its seeds}: items are independent of each other, an item's seeds are not."""
    scores = defaultdict(list)
    for record in records:
        scores[record["id"]].append(record["score"])
    return {item: float(np.mean(values)) for item, values in scores.items()}


def summarize(records):
    """-> {"score", "stderr", "n"}: the mean over items in [0, 1], its standard error (None for one item), the
    number of items."""
    scores = list(by_item(records).values())
    stderr = float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None
    return {"score": float(np.mean(scores)), "stderr": stderr, "n": len(scores)}


def finished_share(records):
    """The share of completions that ended by themselves, before their maximum length."""
    return sum(record["finished"] for record in records) / len(records)


def percent(summary):
    """What `summarize` returns, with score and stderr in per cent."""
    return {key: value if key == "n" or value is None else 100 * value for key, value in summary.items()}


def shown(percent, digits):
    """What `percent` returns -> text such as "40.0 ±2.2"; None, for no items -> "-"."""
    if percent is None:
        return "-"
    error = "" if percent["stderr"] is None else f" ±{percent['stderr']:.{digits}f}"
    return f"{percent['score']:.{digits}f}{error}"


def table(rows):
    """Rows of strings -> text with aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def paired(a, b):
    """Two equally long sequences of scores of the same items -> {"n", "a", "b", "difference" (b - a), "low",
    "high" (95% bootstrap interval of the difference), "p" (two-sided), "test"}.

    The test is McNemar's exact one for scores of only 0 and 1, and random sign flips for others. The same
    input gives the same output."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    differences, rng = b - a, np.random.default_rng(0)
    # Few differences are distinct. How often a resample draws each of them is multinomial, and how many of
    # one size keep their sign is binomial.
    values, often = np.unique(differences.round(12), return_counts=True)
    sizes, size_of_value = np.unique(np.abs(values), return_inverse=True)
    often_of_size = np.bincount(size_of_value, often)
    means, extreme = [], 0
    # Sums that are equal but for rounding count as extreme.
    observed = abs(differences.sum()) - 1e-9 * max(1.0, np.abs(differences).sum())
    n = len(differences)
    for _ in range(RESAMPLES // 100):  # in parts: resamples x values may be large
        means.append(rng.multinomial(n, often / n, size=100) @ values / n)
        kept = rng.binomial(often_of_size.astype(int), 0.5, size=(100, len(sizes)))
        extreme += int((np.abs((2 * kept - often_of_size) @ sizes) >= observed).sum())
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5]).tolist()
    if np.isin(np.concatenate([a, b]), [0.0, 1.0]).all():
        p, test = mcnemar(int((differences < 0).sum()), int((differences > 0).sum())), "McNemar exact"
    else:
        p, test = (1 + extreme) / (1 + RESAMPLES), "sign flips"
    means = {"a": float(a.mean()), "b": float(b.mean()), "difference": float(differences.mean())}
    return {"n": n, **means, "low": low, "high": high, "p": p, "test": test}


def mcnemar(losses, wins):
    """Two-sided exact p-value: losses and wins are the tails of a fair coin thrown losses + wins times."""
    n, term, tail = losses + wins, 1, 0
    for k in range(min(losses, wins) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def compare(paths, may_differ, order=()):
    """The report of --compare A B: scores, difference, interval and p-value of all items that both have, then
    of each task and of each length where there are several.

    paths: two results.jsonl or their directories; order: names of classes that have an order of their own.
    Each p-value is of one test: of 20 rows without a difference one has p < 0.05 on average. Raises BadInput
    if settings outside `may_differ` differ."""
    if len(paths) != 2:
        raise BadInput(f"--compare takes two results.jsonl or their directories, not {len(paths)}")
    files = [results_file(path) for path in paths]
    settings = [read_settings(file.with_name("settings.json")) for file in files]
    difference = different(*[{k: v for k, v in s.items() if k not in may_differ} for s in settings])
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
        interval = f"{100 * r['low']:+.2f} {100 * r['high']:+.2f}"
        rows.append([name, str(r["n"]), *numbers, interval, f"{r['p']:.3g}", r["test"]])
    head = [f"A: {files[0]} ({settings[0]['checkpoint']})", f"B: {files[1]} ({settings[1]['checkpoint']})"]
    alone = [f"{len(s) - len(both)} only in {label}" for s, label in zip(scores, "AB") if len(s) > len(both)]
    return "\n".join([*head, ", ".join([f"{len(both)} samples in both", *alone]), "", table(rows)])
