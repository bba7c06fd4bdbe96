"""FSDP2 shards against one process, under a real torchrun."""

import pytest
from conftest import ROOT, make_small, run_ranks


@pytest.mark.parametrize("ranks, tied", [(1, True), (2, True), (2, False), (3, False)])
def test_sharded_gradients_masks_and_exports_equal_one_process(ranks, tied, tmp_path):
    """heads and sizes are chosen so that shards are uneven (48 rows on 3 ranks are not, 101 are)."""
    make_small(tied).save_pretrained(tmp_path / "checkpoint")
    result = run_ranks(ranks, ROOT / "tests" / "ranks.py", tmp_path / "checkpoint", tmp_path / "export")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "agree" in result.stdout


def test_masks_reach_rows_of_empty_shards(tmp_path):
    """One key head of two dimensions on three ranks: the last rank holds no row of k_proj."""
    small = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=2, num_hidden_layers=1)
    make_small(True, **small).save_pretrained(tmp_path / "checkpoint")
    result = run_ranks(3, ROOT / "tests" / "ranks.py", tmp_path / "checkpoint", tmp_path / "export")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "empty shards: True" in result.stdout
