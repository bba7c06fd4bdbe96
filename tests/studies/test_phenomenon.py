"""phenomenon.py: lengths out of one forward, and statistics worked by hand."""

import json

import pytest
import torch
from conftest import ROOT, make_small, refusal, run_here

from model import Qwen3Config
from studies import magnitudes, phenomenon

TINY = ROOT / "assets" / "tiny"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def test_one_forward_gives_the_magnitudes_of_every_length(small, monkeypatch):
    monkeypatch.setattr(phenomenon, "BLOCK", 8)
    ids = torch.randint(0, 101, (32,)).tolist()
    blocks = phenomenon.squares(small, ids)
    parts = {
        "all": (slice(None), ids, "all"),
        "16 tokens": (slice(3), ids[:16], "all"),
        "without the first": (slice(1, None), ids, "not-first"),
    }
    for rows, tokens, counted in parts.values():
        [expected] = magnitudes.measure(small, [tokens], "proj", counted)
        for name, magnitude in phenomenon.of_tokens(blocks, rows).items():
            torch.testing.assert_close(magnitude, expected[name], rtol=1e-5, atol=1e-6)
    assert not small.model.layers[0].self_attn.q_proj._forward_hooks


def test_peaks_pairs_and_heads_by_hand():
    magnitude = torch.tensor([[9.0, 1, 1, 1, 8, 1, 1, 1], [1, 1, 1, 90, 1, 1, 80, 1]])
    assert phenomenon.peak(magnitude) == (9 + 90) / 2
    assert phenomenon.massive(torch.tensor([[41.0, 1, 1, 1, 1, 1, 1, 1], [1] * 8])) == 0.5  # 41 > 5 * 6
    selected = phenomenon.in_pairs(magnitude, 0.25)
    assert (
        selected[0, :, 0].all() and selected[1, 0, 3] and selected[1, 1, 2]
    )  # 0 and 4 are a pair; 3 and 6 not
    assert phenomenon.between_heads(magnitude, 0.25) == 0
    assert phenomenon.between_heads(magnitude[[0, 0, 1]], 0.25) == pytest.approx(1 / 3)
    same = [{Q: magnitude}] * 2
    result = phenomenon.stabilities({"a": same, "b": [{Q: magnitude.flip(0)}]}, 0.25)
    assert result == {"a": {Q: 1.0}, "between kinds": {Q: 0.0}}


def test_slow_pairs_and_lengths_by_hand(monkeypatch):
    """Over 32 tokens RoPE turns pair 0 of 8 by 32 radians, and the two slowest by less than one turn."""
    monkeypatch.setattr(phenomenon, "BLOCK", 8)
    config = make_small().config
    blocks = torch.zeros(5, 1, 16)
    blocks[1:3, 0, [7, 15, 6, 14]] = 1.0  # all slow, in the first 16 tokens
    blocks[3:, 0, [0, 8, 6, 14]] = 9.0  # later two of the fastest pair
    text = {Q: blocks, K: blocks}
    made = phenomenon.summarize({"a": [text, text], "b": [text, text]}, config, 32, 0.25)
    assert made["slow"]["q"]["mean"] == 0.5 and made["pairs"]["k"]["mean"] == 1.0
    assert {n: made["lengths"][n]["q"]["mean"] for n in made["lengths"]} == {8: 0.5, 16: 0.5, 32: 1.0}
    assert made["frequencies"]["q"] == [[1.0, 0, 0, 0, 0, 0, 1.0, 0]]
    assert made["last_block"]["q"]["mean"] == 1.0 and made["first_token"]["q"]["mean"] == 0.0


def test_the_script_compares_checkpoints(tmp_path):
    out = tmp_path / "out"
    printed = run_here(
        "studies/phenomenon.py", TINY, "--length", 512, "--texts", 1, "--beside", TINY, "--out", out
    )
    made = json.loads((out / "phenomenon.json").read_text())
    assert (made["kept"], made["head_dim"], list(made["lengths"])) == (9, 32, ["256", "512"])
    beside = made["beside"][str(TINY)]
    assert beside["overlap"]["q"]["mean"] == 1 and beside["change"]["k"]["mean"] == 0
    assert f"{100 * made['slow']['q']['mean']:.1f}" in printed and len(made["frequencies"]["k"][0]) == 16
    undocumented = [key for key in made if key not in phenomenon.__doc__]
    assert not undocumented and (out / "phenomenon.png").read_bytes()[:4] == b"\x89PNG"


def test_refusals(tmp_path):
    assert "--length 600 is not a multiple of 256" in refusal("studies/phenomenon.py", TINY, "--length", 600)
    make_small(vocab_size=896).save_pretrained(tmp_path / "c", companions_from=TINY)
    assert Qwen3Config.from_pretrained(tmp_path / "c").head_dim == 16
    message = refusal("studies/phenomenon.py", TINY, "--length", 512, "--beside", tmp_path / "c")
    assert "its configuration differs" in message
    assert "reads at most 4096 tokens" in refusal("studies/phenomenon.py", TINY, "--length", 8192)
