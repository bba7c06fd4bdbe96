"""docs/one-step.md: it is what studies/one_step.py writes, train.py's own step, and its links are true."""

import contextlib
import re
import shutil

import pytest
import torch
from conftest import ROOT, refusal, run_here

import rollout
import saliency
from base import durable
from base.cli import parse
from model import Qwen3
from run.config import Config
from run.metrics import OF_UPDATE
from studies import one_step

PAGE, FOLDER = ROOT / "docs" / "one-step.md", ROOT / "docs" / "one-step"
STORED = FOLDER / "completions.json"
NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-\d+)?")
LINK = re.compile(r"\[(\S+) `([^`]+)`\]\(\.\./(\S+)#L(\d+)-L(\d+)\)")


@pytest.fixture(scope="module")
def step():
    with contextlib.chdir(ROOT):
        return one_step.take_step(parse(Config, "", one_step.FLAGS.split()), one_step.Stored(STORED))


def same_number(a, b):
    """Whole numbers are equal, others within two units of the last digit that is shown: digits are shown as
    far as fp32 holds them on every machine. What is shown as 1e-06 is rounding and nothing else."""
    if "e" in a + b:
        return max(float(a), float(b)) < 1e-4
    if "." not in a + b:
        return a == b
    return abs(float(a) - float(b)) < 2.5 * 10.0 ** -len(a.split(".")[1])


def test_the_page_is_what_the_study_writes_now(step):
    written, now = PAGE.read_text(), one_step.page(step)
    again = "write it again: python -m studies.one_step --completions docs/one-step/completions.json"
    for old, new in zip(written.splitlines(), now.splitlines(), strict=True):
        assert NUMBER.sub("#", old) == NUMBER.sub("#", new), again
        pairs = list(zip(NUMBER.findall(old), NUMBER.findall(new), strict=True))
        assert all(same_number(a, b) for a, b in pairs), f"{old}\n{new}\n{again}"


def test_a_directory_of_another_kind_is_left_alone(tmp_path):
    durable.claim(tmp_path, "run of sft.py", []).close()
    (tmp_path / "metrics.jsonl").write_text("")
    message = refusal("studies/one_step.py", "--out", tmp_path, "--completions", STORED)
    assert "another kind: run of sft.py, not one step" in message and len(list(tmp_path.iterdir())) == 2


def test_a_number_that_is_another_is_seen():
    assert same_number("1.25", "1.27") and same_number("8e-06", "2e-05") and same_number("-0.00", "0.01")
    for a, b in (
        ("12", "13"),
        ("1.25", "1.29"),
        ("+0.000030", "-0.000030"),
        ("8e-06", "1e-03"),
        ("1,000", "1"),
    ):
        assert not same_number(a, b)


def test_every_part_points_at_code_and_each_link_is_true():
    parts = PAGE.read_text().split("\n## ")
    assert len(parts) == 13 and all(LINK.search(part) for part in parts)
    for text, what, file, first, last in LINK.findall("".join(parts)):
        lines = (ROOT / file).read_text().splitlines()
        begins, inside = lines[int(first) - 1], lines[int(first) : int(last)]
        after = next((line for line in lines[int(last) :] if line.strip()), "end")
        name = re.escape(what.split(".")[-1])
        assert text == file and (
            begins.strip().startswith(what) or re.match(rf"\s*(def|class) {name}\b", begins)
        )
        indent = len(begins) - len(begins.lstrip())
        assert all(not line[: indent + 1].strip() or line.lstrip().startswith(")") for line in inside)
        assert after[: indent + 1].strip(), f"{what} goes on after line {last}"


def test_links_to_code_that_is_not_there_or_twice_are_refused():
    for pointer in ("@[grpo.py:advantage]", "@[model.py:forward]", "@[train.py~if main]"):
        with pytest.raises(KeyError):
            one_step.POINTER.sub(one_step.link, pointer)


def test_it_is_the_step_that_train_py_makes(step, monkeypatch):
    """The same completions in place of vLLM's: the same weights to the bit, the same metrics."""
    given = []
    monkeypatch.setattr(rollout, "Rollout", lambda **how: given.append(one_step.Stored(STORED)) or given[0])
    run = ROOT / "runs" / "test-one-step"
    shutil.rmtree(run, ignore_errors=True)
    try:
        run_here("train.py", "--name", run.name, *one_step.FLAGS.split())
        weights = dict(Qwen3.from_pretrained(run / "checkpoint").named_parameters())
        metrics = (run / "metrics.jsonl").read_text()
    finally:
        shutil.rmtree(run, ignore_errors=True)
    assert len(given) == 1 and weights.keys() == step.after.keys()
    assert all(torch.equal(weight, step.after[name]) for name, weight in weights.items())
    values = {name: step.tally.of_update[name] for name in OF_UPDATE}
    values |= {"loss": sum(turn.loss.item() for turn in step.turns), "tokens_trained": step.group.tokens}
    for name, value in values.items():
        assert f'"{name}": {value}' in metrics


def test_what_the_page_says_in_words(step):
    """Chosen rows moved and no others, right became more probable, where a completion went wrong."""
    for name, old in step.before.items():
        moved = (old != step.after[name]).flatten(1).any(1) if old.dim() > 1 else (old != step.after[name])
        assert torch.equal(moved, step.masks[name]) if name in step.masks else moved.any()
    t = one_step.derived(step)
    gains = [(new.sum() - t.logprobs[i].sum()).item() for i, new in enumerate(step.of_earlier)]
    assert [gain > 0 for gain in gains] == [score == 1 for score in t.scores]
    right = step.group.completions[t.scores.index(1)].ids
    other = next(i for i, (a, b) in enumerate(zip(step.group.completions[t.wrong].ids, right)) if a != b)
    assert t.logprobs[t.wrong].argmin() == other and t.lowest < 0 < t.highest
    assert t.prompt_root > 0.9 * t.largest and max(t.far, t.fresh) < 1e-4 < t.stale
    assert step.learning_rate == pytest.approx(step.config.learning_rate / 10)
    assert saliency.select_rows(step.magnitudes)[f"{one_step.Q}.weight"].sum() == 72


def test_the_command_samples_and_its_completions_give_the_page_again(tmp_path, monkeypatch):
    """With a real engine, whose completions may be others than the page's on another CPU."""
    monkeypatch.chdir(ROOT)
    one_step.main(one_step.Config(out=str(tmp_path / "first"), completions=""))
    sampled = tmp_path / "first" / "one-step" / "completions.json"
    one_step.main(one_step.Config(out=str(tmp_path / "second"), completions=str(sampled)))
    first, second = ((tmp_path / which / "one-step.md").read_text() for which in ("first", "second"))
    assert first == second and re.findall(r"^## .*", first, re.M) == re.findall(
        r"^## .*", PAGE.read_text(), re.M
    )
    assert sampled.read_text() == (tmp_path / "second" / "one-step" / "completions.json").read_text()
    drawn = {path.name: path.read_bytes() for path in sampled.parent.glob("*.png")}
    for folder in (sampled.parent, FOLDER):
        pictures = {path.name: path.read_bytes() for path in folder.glob("*.png")}
        assert pictures.keys() == drawn.keys() == set(re.findall(r"one-step/(\w+\.png)", first))
        assert all(len(png) < 40_000 and png.startswith(b"\x89PNG") for png in pictures.values())
