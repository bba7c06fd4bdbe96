"""An HTML page in one file: text, tables, figures, and samples to leaf through. It needs no network.

    page.write(out / "report.html", "RULER of assets/tiny", page.section("Scores", page.table(rows)))

The functions return HTML as text; whatever they are given is escaped. The look and the script stand in
page.html. A browser runs that script only, by its hash, and loads nothing: see its Content-Security-Policy.
"""

import base64
import hashlib
import json
import re
from html import escape
from pathlib import Path

from base import durable
from base.cli import BadInput

TEMPLATE = Path(__file__).with_name("page.html")
LONGEST_TEXT = 6_000  # characters of one text that are shown; the middle of a longer one is left out


def write(path, title, *parts):
    """Make or replace the page at `path` of `parts`, which functions here and chart.chart returned. Raises
    BadInput when the disk cannot be written."""
    template = TEMPLATE.read_text()
    script = re.search(r"<script>(.*?)</script>", template, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    fill = {"title": escape(title), "script": f"'sha256-{digest}'", "body": "".join(parts)}
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: fill[match[1]], template)
    durable.write(path, text.encode("utf-8", "replace").decode())  # JSON may hold half a surrogate pair


def section(title, *parts):
    """A heading and what follows it. "" if there is nothing."""
    return f"<section><h2>{escape(title)}</h2>\n{''.join(parts)}</section>\n" if any(parts) else ""


def text(words, style=""):
    """A paragraph. style: "error" for what went wrong, "small" for a note."""
    return f'<p class="{style}">{escape(words)}</p>\n'


def pre(words):
    """A text as it is, such as a table that a terminal shows."""
    return f'<div class="wide"><pre>{escape(words)}</pre></div>\n'


def fold(title, *parts):
    """What is shown when its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>\n{''.join(parts)}</details>\n"


def table(rows):
    """Rows of values, the head first -> a table; numbers stand to the right."""
    head, *rows = [[escape(str(cell)) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>\n"


def facts(pairs):
    """(name, value) pairs -> a list of two columns."""
    lines = [f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in pairs]
    return "<dl>" + "\n".join(lines) + "</dl>\n"


def tiles(pairs):
    """(name, value) pairs of what a reader wants to know first."""
    lines = [f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in pairs]
    return '<div class="tiles">' + "\n".join(lines) + "</div>\n" if lines else ""


def progress(done, of):
    return f'<progress value="{done}" max="{of}" aria-label="{done} of {of} steps"></progress>\n'


def grid(*figures):
    """Figures side by side, as many as the window is wide enough for."""
    return f'<div class="charts">{"".join(figures)}</div>\n' if any(figures) else ""


def image(path, description):
    """The PNG at `path`, in the page itself. Raises BadInput if it cannot be read."""
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    return f'<img class="figure" alt="{escape(description)}" src="data:image/png;base64,{data}">\n'


def cut(words, longest=LONGEST_TEXT):
    """A text without its middle if it is longer than `longest` characters."""
    left_out = len(words) - longest
    half = longest // 2
    return words if left_out <= 0 else f"{words[:half]} [... {left_out:,} characters ...] {words[-half:]}"


def cut_end(words, longest=2 * LONGEST_TEXT):
    """The first `longest` characters of a text, so places in it stay where they are."""
    return words if len(words) <= longest else words[:longest] + " [...]"


def samples(groups, filtered="reward"):
    """What was asked and answered, with a search and filters -> HTML; "" without any.

    filtered: what the number is that is filtered by, `score` here.
    groups: [{"title", "kind" (such as "trained", one of the filters), "prompt", "marks" ([start, end] of
    what is marked in the prompt), "answers": [{"score" (a number or None), "facts", "text"}]}]."""
    if not groups:
        return ""
    data = json.dumps(groups, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    form = SAMPLES.replace("FILTERED", filtered)
    return form + f'<script type="application/json" id="groups">{data}</script>\n'


SAMPLES = """<form class="filters" id="filters">
<label>search <input type="search" id="search" placeholder="text of prompts and answers"></label>
<label>FILTERED <select id="reward"><option value="">any</option><option value="right">1 and more</option>
<option value="wrong">below 1</option></select></label>
<label>used <select id="kind"><option value="">any</option></select></label>
<span class="turn"><button type="button" id="previous" aria-label="previous">&larr;</button>
<output id="place"></output>
<button type="button" id="next" aria-label="next">&rarr;</button></span>
</form>
<noscript><p>To leaf through the samples, allow this page its script.</p></noscript>
<article id="sample"></article>
"""
