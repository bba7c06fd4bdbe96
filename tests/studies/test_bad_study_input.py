"""What the studies read, and what may be wrong with it: one clear line for each, and nothing is written or
lost; as test_bad_input.py has it of training."""

import itertools
import json

import pytest
from conftest import check_full_disk, check_refusal
from inputs import foreign, script, write
from records import ARM

perturb = script("studies/perturb.py", "--prompts", 1)


def ablation(what, *lines, train=""):
    """ablation.py whose --out has these lines in its results.jsonl."""

    def make(t):
        if lines:
            (t / "out").mkdir()
            write(
                t / "out" / "results.jsonl",
                "".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
            )
        return ["studies/ablation.py", what, "--out", t / "out", *(["--train", train] if train else [])]

    return make


def ran(**changes):
    """A line of ablation.py's."""
    return json.dumps({**ARM, **changes}) + "\n"


def swept():
    """Lines of all runs of a sweep."""
    made = itertools.product(("all", "top"), (1e-4, 3e-4, 1e-3), (1000, 1001))
    return [ran(rule=rule, learning_rate=rate, seed=seed) for rule, rate, seed in made]


PERTURB = {
    "no evaluation": (
        perturb("--", "nothing.py"),
        "-- nothing.py: write an evaluation after --, one of eval_data.py, eval_gsm8k.py, eval_",
    ),
    "another script": (perturb("--", "train.py"), "-- train.py: write an evaluation"),
    "a path": (perturb("--", "/tmp/eval_data.py"), "-- /tmp/eval_data.py: write an evaluation"),
    "nothing": (perturb("--"), "write an evaluation"),
    "fraction": (perturb("--fraction", 2), "--fraction must be at most 1, not 2"),
    "data": (perturb("--data", "{t}/d", d="{"), "d, line 1 is not JSON"),
    "too long": (
        perturb("--data", "{t}/d", d={"prompt": "a b " * 3000, "answer": "x"}),
        "the context leaves 4096",
    ),
    "somebody's": (
        foreign(perturb()),
        r"holds no perturbation \(untouched.safetensors\); choose another --out",
    ),
    "a clamp damaged": (
        lambda t: ((t / "out").mkdir(), write(t / "out" / "untouched.safetensors", "x"), perturb()(t))[-1],
        "untouched.safetensors cannot be read",
    ),
}

ABLATION = {
    "no command": (ablation("train"), "'train' is none of sweep, compare, report"),
    "nothing swept": (
        ablation("compare"),
        "lacks 12 runs of the sweep: python -m studies.ablation sweep first",
    ),
    "nothing to report": (ablation("report"), "lacks 12 runs of the sweep"),
    "no JSON": (ablation("report", "{\n"), "results.jsonl, line 1 is not a result: no JSON object"),
    "a list": (ablation("sweep", ran(), [], "\n"), "line 2 is not a result: no JSON object"),
    "nothing in it": (ablation("sweep", "{}\n"), "line 1 is not a result: task is null"),
    "task a list": (ablation("sweep", ran(task=["recall"])), r'line 1 is not a result: task is \["recall"\]'),
    "more flags no text": (ablation("sweep", ran(more=[])), r"line 1 is not a result: more is \[\]"),
    "no such task": (ablation("sweep", ran(task="recal")), 'line 1 is not a result: task is "recal"'),
    "another sweep": (ablation("compare", *swept()), "has a run of other flags, model or data"),
    "no rewards": (ablation("sweep", ran(rewards=[])), r"line 1 is not a result: rewards is \[\]"),
    "rewards no numbers": (ablation("sweep", ran(rewards=[float("nan")])), r"rewards is \[NaN\]"),
    "accuracy of 5": (
        ablation("sweep", ran(held_out={"a": {"prompt_tokens": 9, "accuracy": 5}})),
        "held_out is ",
    ),
    "steps differ": (
        ablation("report", *swept(), ran(seed=0), ran(seed=1, rewards=[0.5, 0.5])),
        "has runs that cannot be compared: their steps or held-out prompts differ",
    ),
    "held-out prompts differ": (
        ablation(
            *("report", *swept(), ran(seed=0)),
            ran(seed=1, held_out={"b": {"prompt_tokens": 8, "accuracy": 0.5}}),
        ),
        "their steps or held-out prompts differ; remove those of another --train",
    ),
    "somebody's": (foreign(ablation("sweep")), r"out is not empty and holds no ablation \(results.jsonl\)"),
    "open quote": (ablation("sweep", train="'--rank"), "--train .*: No closing quotation"),
    "flag": (ablation("sweep", train="--steps 0"), "--steps must be at least 1, not 0"),
    "data alone": (ablation("sweep", train="--data x.jsonl"), "--train has data and no held-out data"),
}

SAMPLE = {
    "a directory": (lambda t: ["studies/longbench_sample.py", t], "cannot be written: Is a directory"),
    "nowhere": (
        lambda t: ["studies/longbench_sample.py", t / "none" / "x.json"],
        "x.json cannot be written: No such file",
    ),
}

TABLE = {"perturb": PERTURB, "ablation": ABLATION, "sample": SAMPLE}
CASES = [
    pytest.param(*case, id=f"{kind}, {name}") for kind, cases in TABLE.items() for name, case in cases.items()
]


@pytest.mark.parametrize("make, line", CASES)
def test_bad_input_gets_one_line_and_nothing_is_written_or_lost(make, line, tmp_path):
    check_refusal(make(tmp_path), line, tmp_path, longest=700)


def test_a_full_disk_is_one_line_that_names_the_file_and_what_was_there_stays(tmp_path, full):
    check_full_disk(perturb()(tmp_path), 4000, "untouched.safetensors", tmp_path, full)
