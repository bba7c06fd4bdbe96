"""plot.py with runs whose files are damaged: one clear line for each."""

import json

import pytest
import torch
from conftest import check_full_disk, check_refusal, run_here
from inputs import write
from safetensors.torch import save_file

FIGURES = (".png",)  # drawn again with what can be read, before what cannot

STEPS = '{"step": 1, "reward": 0.5}\n{"step": 2, "reward": null}\n'


def drawn(metrics=STEPS, results=None, tensors=None):
    """plot.py with a run of these files; tensors: of its magnitudes, or the file's bytes."""

    def make(t):
        run = t / "run"
        run.mkdir()
        write(run / "metrics.jsonl", metrics)
        if results is not None:
            write(run / "results.json", results)
        if isinstance(tensors, dict):
            save_file(tensors, run / "magnitudes.safetensors")
        elif tensors is not None:
            write(run / "magnitudes.safetensors", tensors)
        return ["base/plot.py", run]

    return make


def magnitudes(shape=(2, 4), of=("", ".selected"), change=lambda name, tensor: tensor, layers=1):
    made = {}
    for layer in range(layers):
        for which in "qk":
            for part in of:
                tensor = torch.ones(shape, dtype=torch.bool if part else torch.float32)
                name = f"model.layers.{layer}.self_attn.{which}_proj{part}"
                made[name] = change(name, tensor).contiguous()
    return made


def of_other(change, of=""):
    """The same, but for the magnitudes, or what was selected of them."""
    return drawn(tensors=magnitudes(change=lambda name, x: change(x) if name.endswith("proj" + of) else x))


PLOT = {
    "nothing": (
        lambda t: ["base/plot.py", t],
        "metrics.jsonl is missing; give the directory of a run",
    ),
    "metrics empty": (drawn(""), "metrics.jsonl has no rows"),
    "metrics cut off": (drawn(STEPS + '{"step"\n'), "metrics.jsonl, line 3 is not JSON"),
    "metrics no numbers": (
        drawn('{"step": 1, "reward": "a"}\n'),
        'line 1 is not a line of metrics: "reward" must be a number',
    ),
    "metrics too large": (drawn(f'{{"step": 1, "reward": {10**400}}}\n'), "line 1 is not a line of metrics"),
    "metrics of sft": (drawn('{"step": 1, "loss": 1}\n'), 'metrics.jsonl has no "reward"'),
    "results no JSON": (drawn(results="{"), "results.json is not what train.py leaves: Expecting"),
    "results without": (drawn(results={}), 'results.json is not what train.py leaves: no "before"'),
    "results text": (
        drawn(results={"before": None, "after": {"a": {"accuracy": "x"}}}),
        "not what train.py leaves: held-out accuracy",
    ),
    "magnitudes damaged": (drawn(tensors="x"), "magnitudes.safetensors cannot be read"),
    "magnitudes of a model": (
        drawn(tensors={"model.norm.weight": torch.ones(2)}),
        "does not hold the magnitudes of Q and K",
    ),
    "magnitudes without rows": (
        drawn(tensors=magnitudes(of=[""])),
        "does not hold the magnitudes of Q and K",
    ),
    "magnitudes flat": (drawn(tensors=magnitudes((4,))), "does not hold the magnitudes of Q and K"),
    **{
        f"magnitudes {name}": (make, "does not hold the magnitudes of Q and K")
        for name, make in {
            "without heads": drawn(tensors=magnitudes((0, 4))),
            "not finite": of_other(lambda x: x * torch.nan),
            "below 0": of_other(lambda x: -x),
            "of bf16": of_other(lambda x: x.bfloat16()),
            "complex": of_other(lambda x: x.to(torch.complex64)),
            "selected as numbers": of_other(lambda x: x.float(), ".selected"),
            "selected of others": of_other(lambda x: x[:1], ".selected"),
            "wider than a figure": drawn(tensors=magnitudes((1, 5000))),
            "of more layers than a figure has pixels for": drawn(tensors=magnitudes(layers=401)),
        }.items()
    },
    "a step that no float holds": (
        drawn(f'{{"step": {10**400}, "reward": 1}}\n'),
        "line 1 is not a line of metrics",
    ),
    "no run": (lambda t: ["base/plot.py"], "no run is given: python -m base.plot runs/NAME"),
}


@pytest.mark.parametrize("make, line", PLOT.values(), ids=PLOT)
def test_a_damaged_run_gets_one_line_and_nothing_is_lost(make, line, tmp_path):
    check_refusal(make(tmp_path), line, tmp_path, longest=700, but=FIGURES)


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, full):
    check_full_disk(drawn(tensors=magnitudes())(tmp_path), 99, "magnitudes.png", tmp_path, full)


def test_a_run_under_way_is_drawn(tmp_path):
    run = drawn(STEPS + '{"st', tensors=magnitudes((4, 8), layers=1))(tmp_path)[1]
    shown = {"accuracy": 0.5, "prompts": 4}
    line = {"step": 1, "reward": 1.0, "held_out": {"a": shown}}
    write(run / "metrics.jsonl", json.dumps(line) + '\n{"st')
    assert run_here("base/plot.py", run) == f"{run}/magnitudes.png\n{run}/reward.png\n"
