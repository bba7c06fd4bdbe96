"""How often the 95% intervals of evals/stats.py hold the truth, with few samples: a table in Markdown.

    python bench/coverage.py           # about a minute

Each number is of --draws evaluations whose true score is known: the share whose interval holds it, in per
cent, then the mean width of the interval in points of the score.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from base.cli import one_line_errors, option, parse
from evals import stats

SIZES = (10, 25, 100)
# What one sample scores -> how probable.
SCORES = {
    "right or wrong, 0.5": {1: 0.5, 0: 0.5},
    "right or wrong, 0.8": {1: 0.8, 0: 0.2},
    "right or wrong, 0.95": {1: 0.95, 0: 0.05},
    "right or wrong, 0.98": {1: 0.98, 0: 0.02},
    "RULER vt, fifths, spread": {0: 0.1, 0.2: 0.1, 0.4: 0.1, 0.6: 0.2, 0.8: 0.2, 1: 0.3},
    "RULER vt, most 0.2": {0: 0.05, 0.2: 0.85, 0.4: 0.1},
    "RULER niah, quarters, most 1": {0: 0.03, 0.75: 0.07, 1: 0.9},
    "RULER fwe, thirds, most 0": {0: 0.6, 1 / 3: 0.3, 2 / 3: 0.08, 1: 0.02},
    "RULER cwe, tenths, most 0": {0: 0.7, 0.1: 0.2, 0.2: 0.1},
}
# What one pair differs by -> how probable.
DIFFERENCES = {
    "pair of right or wrong, 10% won, 10% lost": {1: 0.1, -1: 0.1, 0: 0.8},
    "pair of right or wrong, 30% won, 10% lost": {1: 0.3, -1: 0.1, 0: 0.6},
    "pair of right or wrong, 5% won, 0% lost": {1: 0.05, 0: 0.95},
    "pair of right or wrong, 50% won, 10% lost": {1: 0.5, -1: 0.1, 0: 0.4},
    "pair of fractions, fifths": {-0.4: 0.05, -0.2: 0.1, 0: 0.6, 0.2: 0.15, 0.4: 0.1},
    "pair of fractions, quarters and whole": {-1: 0.03, -0.25: 0.1, 0: 0.65, 0.25: 0.15, 1: 0.07},
}


@dataclass
class Config:
    draws: int = option(2000, "evaluations of each kind and size", least=1)


def coverage(interval, probabilities, n, draws):
    """-> text: the share of intervals that hold the true mean, and their mean width, both in per cent."""
    values, shares = np.array(list(probabilities)), list(probabilities.values())
    truth = float(values @ shares)
    drawn = np.random.default_rng(0).choice(values, size=(draws, n), p=shares)
    bounds = np.array([interval(scores.tolist()) for scores in drawn])  # (draws, 2)
    held = (bounds[:, 0] <= truth + 1e-12) & (truth - 1e-12 <= bounds[:, 1])
    return f"{100 * held.mean():.1f}, {100 * (bounds[:, 1] - bounds[:, 0]).mean():.1f}"


def coverage_of_mean(kinds, n, draws):
    """The same of the mean of several kinds of scores, n samples of each, as RULER's averages are made."""
    rng, held, widths = np.random.default_rng(0), 0, []
    truth = np.mean([sum(value * share for value, share in kind.items()) for kind in kinds])
    for _ in range(draws):
        cells = []
        for kind in kinds:
            scores = rng.choice(list(kind), size=n, p=list(kind.values())).tolist()
            cells.append(dict(zip(("low", "high"), stats.interval(scores)), score=sum(scores) / n))
        mean = stats.weighted_mean(cells, [1] * len(cells))
        held += mean["low"] <= truth <= mean["high"]
        widths.append(mean["high"] - mean["low"])
    return f"{100 * held / draws:.1f}, {100 * np.mean(widths):.1f}"


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    rows = [["scores", *[f"n {n}" for n in SIZES]]]
    for kinds, interval in ((SCORES, stats.interval), (DIFFERENCES, stats.difference_interval)):
        for name, probabilities in kinds.items():
            rows.append([name, *[coverage(interval, probabilities, n, config.draws) for n in SIZES]])
    means = [coverage_of_mean(SCORES.values(), n, config.draws) for n in SIZES]
    print(stats.markdown([*rows, ["the mean of the first nine", *means]]))
