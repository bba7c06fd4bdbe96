"""changes.py: norms and angles of what training changed, worked by hand."""

import json

import pytest
import torch
from conftest import refusal, run_here
from safetensors.torch import save_file

Q, REST = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


def checkpoint(directory, q, rest):
    directory.mkdir()
    tensors = {Q: torch.tensor(q), REST: torch.tensor(rest)}
    save_file({name: values.bfloat16() for name, values in tensors.items()}, directory / "model.safetensors")
    return directory


def test_norms_shares_and_angles_by_hand(tmp_path):
    """Changes (3, 0) and 4, (0, 3) and 4, none and -4: other rows, the same elsewhere, the opposite."""
    before = checkpoint(tmp_path / "before", [[1.0], [1.0]], [8.0])
    top = checkpoint(tmp_path / "top", [[4.0], [1.0]], [12.0])
    bottom = checkpoint(tmp_path / "bottom", [[1.0], [4.0]], [12.0])
    frozen = checkpoint(tmp_path / "frozen", [[1.0], [1.0]], [4.0])
    out = tmp_path / "out"
    printed = run_here("studies/changes.py", before, "--beside", top, bottom, frozen, "--out", out)
    made, names = json.loads((out / "changes.json").read_text()), [str(top), str(bottom), str(frozen)]
    assert list(made["qk"]["norm"].values()) == [3, 3, 0] and list(made["rest"]["norm"].values()) == [4, 4, 4]
    assert list(made["qk"]["share"].values()) == pytest.approx([9 / 25, 9 / 25, 0])
    cosines = {part: [made[part]["cosine"][names[0]][name] for name in names] for part in made}
    assert cosines == {"qk": [1, 0, None], "rest": [1, 1, -1]}
    assert ["1", "qk", "3", "36.0%", "1.000", "0.000", "-"] in [line.split() for line in printed.splitlines()]


def test_what_cannot_be_compared_is_refused(tmp_path):
    before = checkpoint(tmp_path / "before", [[1.0], [1.0]], [8.0])
    other = checkpoint(tmp_path / "other", [[1.0]], [8.0])
    more = ("--out", tmp_path / "out")
    assert "q_proj.weight is [1, 1], in" in refusal("studies/changes.py", before, "--beside", other, *more)
    save_file({Q: torch.ones(2, 1)}, other / "model.safetensors")
    assert f"{REST} is there or in" in refusal("studies/changes.py", before, "--beside", other, *more)
    assert "--beside with others" in refusal("studies/changes.py", before)
