"""report.html of an evaluation: scores with intervals, figures, and samples to leaf through, in one file."""

import json
from html import escape

from base import page
from evals import stats
from evals.subject import name

SHOWN = 300  # samples, spread over all


def write(results, records):
    """The results (evals/results.py) of an evaluation that is done, and all its samples -> out/report.html,
    and its path; PNGs in `out` are in it, too. Raises BadInput when the disk cannot be written."""
    cells = {}
    for record in records:
        cells.setdefault((record["task"], record["length"]), []).append(record)
    rows = [["task", "length", "samples", "score, per cent", "ended by themselves"]]
    for (task, length), of_cell in sorted(cells.items(), key=str):
        score = stats.shown(stats.percent(stats.summarize(of_cell)), 2)
        rows.append([task, length, len(of_cell), score, f"{stats.finished_share(of_cell):.1%}"])
    figures = [page.image(path, path.stem) for path in sorted(results.out.glob("*.png"))]
    shown = records[:: max(1, -(-len(records) // SHOWN))]
    title = f"{name(results.settings['checkpoint'])}: {results.out.name}"
    path = results.out / "report.html"
    page.write(
        path,
        title,
        f"<h1>{escape(title)}</h1>\n",
        page.section("Scores", page.table(rows), page.text("[low, high]: 95% interval over items.", "small")),
        page.section("Figures", *figures),
        page.section("Samples", page.samples([group_of(record) for record in shown])),
        page.section("Settings", page.fold("settings.json", page.facts(results.settings.items()))),
    )
    return path


def group_of(record):
    """A line of results.jsonl -> a group for page.samples. An evaluation keeps no prompts."""
    expected = json.dumps(record.get("expected"), ensure_ascii=False)
    facts = f"score {record['score']:.3g}, {record['completion_tokens']:,} tokens"
    facts += ", finished" if record["finished"] else ", cut off"
    return {
        "title": f"{record['id']}, seed {record['seed']}, {record['prompt_tokens']:,} tokens",
        "kind": record["task"],
        "prompt": page.cut(f"expected: {expected}"),
        "answers": [{"score": record["score"], "facts": facts, "text": page.cut(record["prediction"])}],
    }
