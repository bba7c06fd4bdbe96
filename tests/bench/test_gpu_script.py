"""bench/gpu.sh without a GPU: its parts in small shapes, and what becomes of one that fails or hangs."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, refusal, run_here, run_script
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(ROOT / "bench"))
import gpu
import gpu_parts
import shapes

from run import roofline


def check(rows):
    """Keys are those of the docstring, numbers make sense."""
    documented = set(re.findall(r"^    ((?:\w+, )*\w+)  ", gpu.__doc__, re.M))
    keys = {key for keys in documented for key in keys.split(", ")}
    for row in rows:
        assert row.keys() <= keys and row["what"] and gpu.line(row)
        for key in row.keys() & {"seconds", "tflops", "tokens_per_second", "gib", "planned_gib"}:
            assert row[key] > 0, row


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("part", ["machine", "ceilings", "attention", "step", "kept", "flash3"])
def test_a_part_yields_documented_rows(part):
    """All but `compiled`: importing the compiler takes seconds, and tests/core/test_compiled.py has it."""
    rows = list(getattr(gpu_parts, part)(gpu_parts.SMALL))
    check({"part": part, "state": "ok", **row} for row in rows)
    if part == "step":
        [whole, times] = rows
        assert 0.5 < whole["planned_gib"] / whole["gib"] < 2
        assert sum(times["shares"].values()) == pytest.approx(1)
        assert {"attention forward", "attention backward", "matrix products"} <= times["shares"].keys()
    if part == "flash3":
        assert [row["state"] for row in rows] == ["not here"]


def test_a_whole_update_on_fsdp(tmp_path):
    rows = in_a_process("update", tmp_path)
    assert 0.5 < rows[0]["planned_gib"] / rows[0]["gib"] < 2  # of one rank: nothing is sharded
    assert rows[0]["seconds"] == pytest.approx(sum(row["seconds"] for row in rows[1:4]))


def test_every_optimizers_step(tmp_path):
    kinds = {row["what"]: row["gib"] for row in in_a_process("optimizers", tmp_path)}
    assert kinds["--optimizer adamw8bit"] < kinds["--optimizer adamw"]


def in_a_process(part, directory):
    """The rows of a part that connects ranks, checked."""
    result = run_script(ROOT / "bench" / "gpu_parts.py", part, directory / "rows")
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read(directory / "rows")
    check(rows)
    return rows


def test_scales_lines_become_rows(tmp_path):
    config = gpu.Config(str(tmp_path), "cpu")
    _, script, *flags = gpu.command("scale-4B", config)
    run_here(ROOT / script, *flags)
    rows = list(gpu.scale_rows("scale-4B", tmp_path / "scale-4B.jsonl"))
    assert [row["what"] for row in rows] == ["prompt 32 + 4 x 16"]
    check(rows)


def test_flops_are_those_of_every_matrix_product_and_score():
    """A prompt of 3, completions of 2 and 1 tokens: 6 tokens in all layers, 3 in the head, and half of each
    causal square."""
    c = shapes.LAPTOP
    products = 4 * (2 * 256 * 8 * 32 + 2 * 256 * 2 * 32 + 3 * 256 * 768)  # q, o; k, v; gate, up, down
    norms = 4 * (2 * 256 + 2 * 32)  # counted as if they were products
    pairs = 3 * 3 / 2 + (2 * 3 + 2 * 2 / 2) + (1 * 3 + 1 / 2)
    expected = 6 * ((products + norms) * 6 + 3 * 8192 * 256) + 12 * 4 * 8 * 32 * pairs
    assert shapes.model_flops(c, 3, [2, 1]) == expected


def test_the_roofline_stands_beside_a_step():
    """8B's 36 layers take 34 s by hand (docs/scale.md's case, of 16 completions); here are 6 layers and 4."""
    [row] = gpu_parts.by_roofline(gpu_parts.CARD, roofline.CARDS[:1])
    assert 2 < row["seconds"] < 6 and sum(row["shares"].values()) == pytest.approx(1)


def test_cudnns_kernels_take_what_flashs_do():
    """On tensors of device cuda that have no values."""
    with FakeTensorMode():
        q, k, v, grad = (
            torch.empty(1, T, heads, 64, device="cuda") for T, heads in ((9, 4), (7, 2), (7, 2), (9, 4))
        )
        out, lse, rest = gpu_parts.cudnn(q, k, v, False)
        gradients = gpu_parts.cudnn_backward(grad, q, k, v, out, lse + 1, rest, False)
    assert out.shape == q.shape and [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


def test_it_wants_a_gpu_or_to_be_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    assert "--device cpu" in refusal(ROOT / "bench" / "gpu.py", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_that_hangs_is_ended(tmp_path):
    with open(tmp_path / "log", "wb") as log:
        assert gpu.run(["sleep", "600"], 0.01, log, os.environ) == "out of time"
        assert gpu.run(["true"], 60, log, os.environ) == "ok"


def test_a_part_that_fails_does_not_stop_the_rest(tmp_path):
    """The whole command, on a machine without pytest."""
    (tmp_path / "pytest.py").write_text("raise ModuleNotFoundError('no pytest here')\n")
    command = ["bash", ROOT / "bench" / "gpu.sh", "out", "--device", "cpu", "--parts", "tests", "machine"]
    how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(tmp_path)}, "timeout": 600}
    result = subprocess.run(command, **how, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = read(tmp_path / "out" / "results.jsonl")
    assert [(row["part"], row["what"], row["state"]) for row in rows] == [
        ("tests", "the part", "failed"),
        ("machine", "card", "ok"),
        ("machine", "model", "ok"),
        ("machine", "the part", "ok"),
    ]
    assert rows[0]["note"] == "ModuleNotFoundError: no pytest here"
    check(rows)
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table.splitlines() == result.stdout.splitlines()[:-1]
    assert "==== machine" in (tmp_path / "out" / "log.txt").read_text()
