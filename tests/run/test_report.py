"""report.html: what it says of a run, that nothing in it is markup that a model wrote, and how it looks in a
browser."""

import itertools
import json
import os
import re
import time
from html.parser import HTMLParser

import pytest
import torch
from browser import CHROMIUM, browser
from conftest import check_refusal, run_here
from inputs import write

from base import run_files
from base.chart import Line, chart, thin, ticks, wilson
from run import report, report_samples

EVIL = '</script><script>document.title = "hacked"</script><img src=x onerror="document.title = 1">'


def metrics(step):
    """A line as train.py's, that rises and has a gap."""
    return {
        "step": step,
        "reward": min(1.0, step / 100),
        "accuracy": min(1.0, step / 100),
        "all_right": 0.25,
        "all_wrong": 0.5,
        "completion_tokens": 10.0 + step % 3,
        "finished": 1.0,
        "entropy": 0.3,
        "mismatch_mean": 1e-6,
        "mismatch_max": 1e-5,
        "grad_norm": None if step == 7 else 2.0,
        "grad_norm_masked": 1.0,
        "mask_overlap": None if step == 1 else 0.9,
        "selected_share": 0.6,
        "gradient_share": 0.4,
        "learning_rate": 3e-4,
        "seconds": {"rollout": 1.0, "backward": 2.0, "total": 3.5},
        "tokens_per_second": 1234.5,
        "rewards": {"mine:correct": {"mean": 0.5, "std": 0.1}, "mine:format": {"mean": 0.7, "std": 0.1}},
    }


def sample(step, used, rewards=(0.0, 1.0), text="an answer"):
    completions = [
        {"text": f"{text} {reward:g}", "tokens": 5, "finished": True, "reward": reward, "advantage": 0.5}
        | {"logprob": -0.1, "entropy": 0.2}
        for reward in rewards
    ]
    about = {"step": step, "prompt_id": step, "used": used, "prompt": f"question {step}", "prompt_tokens": 9}
    return {**about, "completions": completions}


def make_run(directory, steps=30, of=60, held_out=None):
    """The files of a run under way, as train.py leaves them."""
    directory.mkdir()
    write(directory / "config.json", {"steps": of, "model": "assets/tiny", "rule": "top", "name": EVIL})
    write(directory / "environment.json", {"command": "python train.py", "versions": {"torch": "2"}})
    lines = [metrics(step) for step in range(1, steps + 1)]
    if held_out:
        lines[9]["held_out"] = held_out
    write(directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    samples = [sample(1, "trained"), sample(2, "dropped", (0.0, 0.0)), sample(3, "trained", text=EVIL)]
    write(directory / "samples.jsonl", "".join(json.dumps(each) + "\n" for each in samples) + '{"ste')
    projections = [f"model.layers.{layer}.self_attn.{q}_proj" for layer in range(6) for q in "qk"]
    magnitudes = {name: torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) for name in projections}
    masks = {f"{name}.weight": (m > m.median()).flatten() for name, m in magnitudes.items()}
    run_files.save_magnitudes(directory / "magnitudes.safetensors", magnitudes, masks)
    return directory


HELD_OUT = {"data/a.jsonl": {"prompts": 64, "prompt_tokens": 40.0, "accuracy": 0.5, "accuracy_greedy": 0.75}}


class Tags(HTMLParser):
    """.tags: how often each stands there; .words: all text but scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.within = {}, "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag], self.within = self.tags.get(tag, 0) + 1, tag
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.words += data if self.within not in ("script", "style") else ""


def test_a_run_under_way_is_shown(tmp_path):
    run = make_run(tmp_path / "run", held_out=HELD_OUT)
    page = Tags(report.write(run, "running").read_text())
    for words in (
        f"running: step 30 of 60, as of {time.strftime('%Y-%m-%d')} ",
        ", about 2 min left",
        "Held-out accuracy",
        "0.500 [0.381, 0.619]",  # Wilson's interval of 32 of 64
        "python train.py",
        "Layer 0, Q",
        "Layer 5, K",
        "Concentration",
        "rewards/mine:format/mean",
    ):
        assert words in page.words
    assert "Layer 1, Q" not in page.words  # four of the six: 0, 2, 3, 5
    assert page.tags["figure"] == 13 + 8 + 2
    # The page's script, and the samples' JSON; no other, whatever a completion says.
    assert page.tags["script"] == 2 and "img" not in page.tags


def test_held_out_results_of_a_finished_run_and_an_error(tmp_path):
    run = make_run(tmp_path / "run", steps=60)
    write(run / "results.json", {"before": HELD_OUT, "after": HELD_OUT})
    assert "stopped: disk full: step 60 of 60" in report.write(run, "stopped: disk full").read_text()
    (run / "checkpoint").mkdir()
    assert run_here("run/report.py", run) == f"{run}/report.html\n"
    text = (run / "report.html").read_text()
    assert "finished: step 60 of 60" in text and "0.500 → 0.500" in text


def test_why_a_run_stopped_stays_until_it_goes_on(tmp_path):
    run = make_run(tmp_path / "run")
    report.write(run, "stopped: a <b> & 'c'")
    for _ in range(2):
        assert "stopped: a <b> & 'c': step 30 of 60" in Tags(report.write(run).read_text()).words
    os.utime(run / "config.json", (time.time() + 9,) * 2)  # as a start does
    assert "not finished: step 30 of 60, as of" in report.write(run).read_text()


def test_several_rewards_are_shown_with_the_score_that_advantages_are_made_of(tmp_path):
    run = make_run(tmp_path / "run")
    write(run / "config.json", {"steps": 60, "reward": ["a:one", "a:two"]})
    line = sample(1, "trained")
    line["completions"][0] |= {"rewards": [0.0, 0.5], "score": 0.25}
    line["completions"][1] |= {"rewards": [1.0, None], "score": 1.0}
    group = report_samples.group_of(line)
    assert group["title"].endswith("mean score 0.625")
    assert group["answers"][0]["facts"].startswith("reward 0, score 0.25, each reward 0 and 0.5, advantage")
    write(run / "samples.jsonl", json.dumps(line) + "\n")
    assert "first reward" in Tags(report.write(run).read_text()).words


@pytest.mark.parametrize(
    "seconds, words",
    [(89, "89 s"), (90, "2 min"), (3569, "59 min"), (3599, "1 h 0 min"), (7170, "2 h 0 min")],
)
def test_a_duration_never_has_sixty_minutes(seconds, words):
    assert report.duration(seconds) == words


@pytest.mark.parametrize("given, line", [
    ([], "no run is given: python -m run.report runs/NAME"),
    (["nowhere"], "nowhere has no config.json; give the directory of a run of train.py or sft.py"),
    (["evaluation"], "evaluation has no config.json; give the directory of a run of train.py or sft.py"),
])  # fmt: skip
def test_what_is_no_run_is_one_line(given, line, tmp_path):
    (tmp_path / "evaluation").mkdir()
    write(tmp_path / "evaluation" / "settings.json", {})
    check_refusal(["run/report.py", *(tmp_path / each for each in given)], line, tmp_path, longest=400)


def test_sft_is_shown_with_what_it_trains_on(tmp_path):
    line = {"step": 1, "loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-5, "seconds": 2.0}
    write(tmp_path / "config.json", {"steps": 4, "model": "m"})
    write(tmp_path / "metrics.jsonl", json.dumps(line | {"tokens_per_second": 9.0}) + "\n")
    document = {"step": 1, "id": 7, "text": "question answer", "trained": [[9, 15]]}
    write(tmp_path / "samples.jsonl", json.dumps(document) + "\n")
    text = report.write(tmp_path).read_text()
    assert ">Loss " in text and ">Reward " not in text and '"marks":[[9,15]]' in text


def test_the_report_of_a_long_run_is_small(tmp_path):
    run = make_run(tmp_path / "run", steps=10_000, of=10_000)
    lines = [json.dumps(sample(i, "trained", [0.0] * 16, "\x01<" * 1_000)) + "\n" for i in range(50)]
    write(run / "samples.jsonl", "".join(lines))
    assert report.write(run).stat().st_size < 5e6


def test_only_some_lines_of_a_long_file_are_read(tmp_path):
    lines = [f"{i} {'x' * (i % 70)}\n".encode() for i in range(9_000)]
    (tmp_path / "lines").write_bytes(b"".join(lines) + b"unfinished")
    found = report_samples.some_lines(tmp_path / "lines", tail=9_999)
    numbers = [int(line.split()[0]) for line in found.values()]
    assert numbers[0] == 0 and numbers[-30:] == list(range(8_970, 9_000)) and len(numbers) == 60
    assert {sum(map(len, lines[:i])): lines[i] for i in numbers} == found
    assert max(b - a for a, b in itertools.pairwise(numbers)) < 9_000 / 30 * 1.2
    (tmp_path / "lines").write_bytes(b"a\nb\nc")
    assert list(report_samples.some_lines(tmp_path / "lines").values()) == [b"a\n", b"b\n"]


DAMAGED = {
    "metrics": ("metrics.jsonl", '{"step": 1}\n{\n', "metrics.jsonl, line 2 is not JSON"),
    "metrics text": ("metrics.jsonl", '{"step": 1, "reward": "a"}\n', 'line 1 .* "reward" must be a number'),
    "metrics step": ("metrics.jsonl", f'{{"step": {10**400}}}\n', "line 1 is not a line of metrics"),
    "held out": (
        "metrics.jsonl",
        '{"step": 1, "held_out": {"a": {"accuracy": 2}}}\n',
        "metrics.jsonl, step 1 is not what train.py leaves: held-out",
    ),
    "config": ("config.json", "[]", "config.json is not what train.py leaves: no JSON object"),
    "config steps": ("config.json", {"steps": "x"}, 'config.json .* "steps" must be a number'),
    "environment": ("environment.json", "{", "environment.json is not what train.py leaves: Expecting"),
    "results": ("results.json", {"before": 3, "after": {}}, "results.json is not what train.py leaves: held"),
    "samples": ("samples.jsonl", '{"step": 1}\n', "the line at byte 0 is not a sample as train"),
    "samples deep": ("samples.jsonl", "[" * 10**5 + "\n", "the line at byte 0 is not a sample as train"),
    "magnitudes": ("magnitudes.safetensors", "x", "magnitudes.safetensors cannot be read"),
}


@pytest.mark.parametrize("name, content, line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_line(name, content, line, tmp_path):
    write(make_run(tmp_path / "run") / name, content)
    check_refusal(["run/report.py", tmp_path / "run"], line, tmp_path, longest=400)


# ---------------------------------------------------------------------------------------------------- pieces


def test_thinning_keeps_every_extreme():
    xs, ys = list(range(10_000)), [0.0] * 10_000
    ys[1234], ys[5678], ys[9000:9100] = 9.0, -9.0, [None] * 100
    places, means, lows, highs = thin(xs, ys)
    assert len(places) == 250 and max(y for y in highs if y) == 9 and min(y for y in lows if y) == -9
    assert None in means and sum(y or 0 for y in means) == pytest.approx(0)
    assert thin(xs[:500], ys[:500])[1] == ys[:500]


@pytest.mark.parametrize("low, high", [(0, 1), (0.3, 0.31), (-5, 12345), (1e-9, 3e-9), (0, 5e8)])
def test_ticks_are_few_and_within(low, high):
    marks = ticks(low, high)
    assert 3 <= len(marks) <= 7 and low <= marks[0] and marks[-1] <= high * (1 + 1e-9)
    assert all(mark == int(mark) for mark in ticks(low, high, whole=True))


def test_wilson_is_statsmodels():
    # statsmodels.stats.proportion.proportion_confint(214, 256, method="wilson")
    assert wilson(214 / 256, 256) == pytest.approx((0.785637, 0.876313), abs=1e-4)
    assert wilson(0.0, 10)[0] == pytest.approx(0) and wilson(1.0, 10)[1] == pytest.approx(1)


def test_a_chart_of_odd_numbers_is_drawn():
    assert chart("none", [Line("a", "blue", [1, 2], [None, None])]) == ""
    assert chart("none", [Line("a", "blue", [1, 2], [0.0, -1.0])], log=True) == ""
    for ys in ([0.0], [3.0], [1e-300, 1e299, None, 5.0], [-2.0, -2.0]):
        for log in (False, True):
            text = chart("a <b>", [Line("x & y", "blue", list(range(len(ys))), ys)], log=log)
            assert not re.search('nan[^<>]*[,"]|inf[,"]', text.removeprefix("<figure")), text


def test_the_outline_goes_around_what_is_selected():
    selected = torch.tensor([[False, True, True], [False, False, False]])
    lines = [(1, 0, 2, 0), (1, 1, 2, 0), (1, 0, 0, 1), (3, 0, 0, 1)]
    assert sorted(run_files.outline(selected)) == sorted(lines)


# --------------------------------------------------------------------------------------------------- browser


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
def test_a_browser_shows_it(tmp_path):
    run = make_run(tmp_path / "run", held_out=HELD_OUT)
    path = report.write(run, "running")
    with browser(tmp_path / "profile") as page:
        for width, dark in ((1280, False), (375, True)):
            page.open(path, width, dark)
            assert page.run("document.title") == "run"
            assert page.run("document.documentElement.scrollWidth") == width  # nothing sticks out
            sizes = "[...document.querySelectorAll('svg polyline')].map((line) => line.getTotalLength())"
            lengths = page.run(sizes)
            assert len(lengths) >= 20 and min(lengths) > 1
            ground = page.run("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, ground[4:-1].split(","))) < 100) == dark

        def shown():
            return page.run("[place.textContent, sample.innerText]")

        def choose(name, value):
            event = "dispatchEvent(new Event('input'))"
            page.run(f"(({name}.value = {json.dumps(value)}), {name}.{event})")
            return shown()

        place, text = shown()  # the newest, and what it says is text
        assert place == "3 of 3" and EVIL in text
        page.run("previous.click()")
        assert shown()[0] == "2 of 3" and "dropped" in shown()[1]
        place, text = choose("reward", "right")
        assert place == "2 of 2" and "reward 1," in text and "reward 0," not in text
        assert choose("search", "question 1")[0] == "1 of 1"
        assert choose("reward", "")[1].count("an answer") == 2
        assert choose("search", "nowhere")[0] == "none"
        choose("search", "")
        assert choose("kind", "dropped")[0] == "1 of 1"
        # The legend says what is under the pointer.
        moved = "new PointerEvent('pointermove', {clientX: svg.getBoundingClientRect().left})"
        page.run(f"var svg = document.querySelector('svg[aria-label^=Reward]'); svg.dispatchEvent({moved})")
        assert page.run("svg.parentElement.querySelector('.where').textContent") == "step 1"
        assert page.run("svg.parentElement.querySelector('.key b').textContent") == "0.01"
        assert page.run("document.title") == "run" and not page.errors
