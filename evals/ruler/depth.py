"""Where RULER's needles lie, and how many are found, by depth and length."""

from collections import defaultdict

from evals import stats

STEP = 10  # per cent of a depth class


def depths(task_name, text, outputs):
    """How deep each of a sample's `outputs` lies in its input: per cent of the characters before it, with one
    decimal. [] for tasks without needles."""
    if not task_name.startswith("niah_"):
        return []
    return [round(100 * text.find(output) / len(text), 1) for output in outputs]


def depth_class(depth):
    """A depth in per cent -> its class, such as "40-50"."""
    low = int(min(depth, 99) // STEP) * STEP
    return f"{low}-{low + STEP}"


CLASSES = [depth_class(depth) for depth in range(0, 100, STEP)]


def by_depth(records):
    """Lines of results.jsonl, all tasks together -> {(depth class, length): {"score", "low", "high", "n"} in
    per cent}: needles found, and samples with a needle there. Lines without depths are left out."""
    cells = defaultdict(list)
    for record in records:
        for needle, depth in zip(record["expected"], record.get("depths", ())):
            one = {"id": record["id"], "score": float(needle in record["answer"])}
            cells[depth_class(depth), record["length"]].append(one)
    return {cell: stats.percent(stats.summarize(needles)) for cell, needles in cells.items()}
