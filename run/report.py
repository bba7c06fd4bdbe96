"""report.html: a run in one file, to look at while it learns.

    python -m run.report runs/NAME      # writes runs/NAME/report.html again, also of a run that is under way

train.py and sft.py write it every --report-every steps and at the end. It is drawn from the other files of
the run's directory only. Whatever number of steps there are, curves keep about 500 points each, and of the
samples some from each part of the run are shown, most of them the newest; samples.jsonl has all.
"""

import html
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from base import limits, page, run_files
from base.chart import Line, chart, heads, number, wilson
from base.cli import BadInput, one_line_errors, option, parse
from run.report_samples import read_samples, samples_note

SHARE = {"limits": (0, 1)}
SETS = ("blue", "vermillion", "green", "purple")  # colours of held-out sets


@dataclass
class Config:
    run: str = option("", "directory of a run of train.py or sft.py", positional=True)


def write(directory, state=""):
    """The files of the run in `directory` -> directory/report.html, and its path. state: what the run is
    doing, such as "running"; one that begins with "stopped" is shown as an error. Without one the page says
    what is on disk, or as the last page why the run stopped.

    Raises BadInput for a file that is damaged, and when the disk cannot be written."""
    metrics, settings = directory / "metrics.jsonl", run_files.read_json(directory / "config.json")
    if type(settings.get("steps")) is not int or settings["steps"] < 1:
        raise BadInput(f'{directory / "config.json"} is not what train.py leaves: "steps" must be a number')
    rows = run_files.read_metrics(metrics) if has_lines(metrics) else []
    held_out = run_files.held_out(directory, rows)
    samples = read_samples(directory / "samples.jsonl")
    parts = [
        *header(directory, settings, rows, held_out, state),
        page.section("Curves", page.grid(held_out_chart(held_out), *charts(metrics, rows))),
        page.section("Held-out prompts", held_out_table(held_out)),
        page.section("Samples", page.samples(samples, filtered_by(settings)), samples_note(samples)),
        magnitudes(directory / "magnitudes.safetensors"),
        page.section("Settings", page.fold("every setting (config.json)", page.facts(settings.items()))),
    ]
    path = directory / "report.html"
    page.write(path, directory.name, *parts)
    return path


def has_lines(path):
    return path.exists() and path.stat().st_size > 0


# ---------------------------------------------------------------------------------------------------- header


def header(directory, settings, rows, held_out, state):
    """-> parts of the page: what was run, where, how far it is, and the numbers to know first."""
    done, steps = rows[-1]["step"] if rows else 0, settings["steps"]
    if not state:
        finished = steps <= done and (directory / "checkpoint").exists()
        state = "finished" if finished else why_stopped(directory) or "not finished"
    what = ("model", "algorithm", "rule", "data" if settings.get("data") else "task")
    said = [f"{key} {shown(settings[key])}" for key in what if settings.get(key)]
    seconds = [row.get("seconds/total", row.get("seconds")) for row in rows[-20:]]
    seconds = [each for each in seconds if run_files.is_number(each)]
    left, stopped = "", state.startswith("stopped")
    if state != "finished" and not stopped:
        left = time.strftime(", as of %Y-%m-%d %H:%M")  # a killed run cannot say that it was
        if seconds and done < steps:
            left += f", about {duration(statistics.median(seconds) * (steps - done))} left"
    when = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime((directory / "config.json").stat().st_mtime))
    about = [("started", when), ("written", time.strftime("%Y-%m-%d %H:%M:%S %Z"))]
    environment = directory / "environment.json"
    if environment.exists():
        about += [
            (key, shown(value)) for key, value in run_files.flat(run_files.read_json(environment)).items()
        ]
    line = f"{state}: step {done:,} of {steps:,}{left}"
    return [
        f"<h1>{html.escape(directory.name)}</h1>\n",
        page.text(", ".join(said), "small"),
        page.text(line, "error" if stopped else ""),
        page.progress(done, steps),
        page.tiles(first_numbers(rows, held_out)),
        page.fold("command, versions, machine", page.facts(about)),
    ]


def why_stopped(directory):
    """-> "stopped: ..." if the page says so and the run has not gone on since, else ""."""
    path, settings = directory / "report.html", directory / "config.json"
    if not path.exists() or path.stat().st_mtime < settings.stat().st_mtime:  # each start writes settings
        return ""
    line = re.search(
        r'<p class="error">(stopped: .*?): step [\d,]+ of [\d,]+</p>', limits.read_text(path), re.S
    )
    return html.unescape(line[1]) if line else ""


def filtered_by(settings):
    several = isinstance(settings.get("reward"), list) and len(settings["reward"]) > 1
    return "first reward" if several else "reward"


def shown(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def duration(seconds):
    """Seconds -> such as "2 h 5 min"."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def first_numbers(rows, held_out):
    """-> (name, value) pairs."""
    result, last = [], rows[-10:]

    def mean(key):
        values = [row[key] for row in last if run_files.is_number(row.get(key))]
        return statistics.fmean(values) if values else None

    for name, points in held_out.items():
        values = " → ".join(f"{points[i][1]['accuracy']:.3f}" for i in ((0, -1) if len(points) > 1 else (0,)))
        result.append((f"held-out accuracy, {name}", values))
    names = {
        "reward": "reward",
        "loss": "loss, nats",
        "completion_tokens": "tokens of a completion",
        "mismatch_mean": "sampler against trainer, nats",
        "seconds/total": "seconds of a step",
        "seconds": "seconds of a step",
        "tokens_per_second": "tokens/s",
    }
    for key, name in names.items():
        value = mean(key)
        if value is not None and not (key == "loss" and mean("reward") is not None):
            result.append((f"{name}, last {len(last)} steps", number(value)))
    return result[:6]


# -------------------------------------------------------------------------------------------------- held out


def held_out_chart(held_out):
    lines = []
    for (name, points), colour in zip(held_out.items(), SETS * len(held_out)):
        steps = [step for step, _ in points]
        for key, how in (("accuracy", "temperature 1"), ("accuracy_greedy", "greedy")):
            known = [result[key] for _, result in points if key in result]
            if len(known) == len(points):
                intervals = [wilson(result[key], result["prompts"]) for _, result in points]
                label = f"{name}, {how}" if len(held_out) > 1 else how
                lines.append(Line(label, colour, steps, known, intervals, dashed=key != "accuracy"))
    return chart("Held-out accuracy", lines, unit="share, with 95% intervals", **SHARE)


def held_out_table(held_out):
    rows = [["set", "step", "prompts", "tokens of a prompt", "temperature 1", "greedy"]]

    def cell(result, key):
        if key not in result:
            return "-"
        low, high = wilson(result[key], result["prompts"])
        return f"{result[key]:.3f} [{low:.3f}, {high:.3f}]"

    for name, points in held_out.items():
        for step, result in points:
            tokens = (
                f"{result['prompt_tokens']:,.0f}" if run_files.is_number(result.get("prompt_tokens")) else "-"
            )
            shares = cell(result, "accuracy"), cell(result, "accuracy_greedy")
            rows.append([name, step, result["prompts"], tokens, *shares])
    note = "Share of right answers, and its 95% interval by Wilson with n the number of prompts."
    return page.table(rows) + page.text(note, "small") if len(rows) > 1 else ""


# ---------------------------------------------------------------------------------------------------- curves


def charts(metrics, rows):
    """metrics.jsonl, and what read_metrics made of it -> its curves, called as their keys in the file; "" for
    a chart whose keys the run does not have."""
    if not rows:
        return []
    steps, rl = [row["step"] for row in rows], "reward" in rows[0]

    def draw(title, unit, how={}, **colours):  # noqa: B006  (never changed)
        columns = {key: run_files.column(metrics, rows, key) for key in colours}
        lines = [
            Line(key.removeprefix("seconds/"), colour, steps, columns[key]) for key, colour in colours.items()
        ]
        return chart(title, lines, unit=unit, **how)

    run_files.add_kept(metrics, rows)
    stages = {"rollout": "blue", "reward": "purple", "logprobs": "green", "backward": "orange"}
    stages |= {"mask": "vermillion", "step": "yellow", "sync": "sky", "rehearsal": "grey"}
    time_of = {f"seconds/{stage}": colour for stage, colour in stages.items()} if rl else {"seconds": "blue"}
    several = [key for key in rows[0] if key.startswith("rewards/") and key.endswith("/mean")]
    clipped = any(row.get("clip_fraction") or row.get("importance_capped") for row in rows)
    nats, log = "nats a token", {"log": True}
    return [
        draw("Reward", "mean of sampled completions", reward="blue"),
        draw("Each reward", "mean", **dict(zip(several, SETS * len(several)))),
        draw("Accuracy", "share of sampled completions", SHARE, accuracy="green"),
        "" if rl else draw("Loss", nats, loss="blue"),  # the policy's says nothing, see run/metrics.py
        draw("Groups", "share", SHARE, kept="green", all_right="blue", all_wrong="orange"),
        draw("Completion length", "tokens", completion_tokens="purple"),
        draw("Completions that ended by themselves", "share", SHARE, finished="sky"),
        draw("Entropy", nats, entropy="vermillion"),
        draw("Sampler against trainer", nats, log, mismatch_mean="blue", mismatch_max="orange"),
        draw("Gradient norm", "before clipping", log, grad_norm="grey", grad_norm_masked="vermillion"),
        draw(
            "Selected rows",
            "share: kept since the last update; of squared magnitude; of squared gradient",
            SHARE,
            mask_overlap="purple",
            selected_share="vermillion",
            gradient_share="blue",
        ),
        draw("Clipped", "share of tokens", clip_fraction="orange", importance_capped="purple")
        if clipped
        else "",
        draw("Time of a step", "seconds", {"stacked": True}, **time_of),
        draw("Throughput", "tokens a second", tokens_per_second="sky"),
        draw("Learning rate", "", learning_rate="grey"),
    ]


# ------------------------------------------------------------------------------------------------ magnitudes


def magnitudes(path):
    """magnitudes.safetensors -> a section: heads of four layers, and how concentrated each layer is. Raises
    BadInput."""
    if not path.exists():
        return ""
    tensors = run_files.load_magnitudes(path)
    panels = []
    for layer in run_files.some_layers(tensors):
        for which in "qk":
            name = f"model.layers.{layer}.self_attn.{which}_proj"
            panels.append(
                heads(f"Layer {layer}, {which.upper()}", tensors[name], tensors[name + ".selected"])
            )
    layers, lines = list(range(len(tensors) // 4)), []
    for which, colour in (("q", "blue"), ("k", "orange")):
        lines.append(Line(which.upper(), colour, layers, run_files.concentration(tensors, which)))
    share = run_files.selected_share(tensors, "q")
    lines.append(Line("if all were equal", "grey", layers, [share] * len(layers), dashed=True))
    curve = chart(
        "Concentration",
        lines,
        unit="share of squared magnitude in the selected rows",
        **SHARE,
        x="layer",
    )
    note = (
        "Of the last update: bright is large, each head divided by its largest; outlined rows were updated."
    )
    figures = f'<div class="heads">{"".join(panels)}</div>\n'
    return page.section("Magnitudes of Q and K", page.text(note, "small"), figures, page.grid(curve))


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    if not config.run:
        raise BadInput("no run is given: python -m run.report runs/NAME")
    if not (Path(config.run) / "config.json").exists():
        raise BadInput(f"{config.run} has no config.json; give the directory of a run of train.py or sft.py")
    print(write(Path(config.run)))
