"""Shards, replicas and shared prompts against one process, under a real torchrun."""

import pytest
from conftest import ROOT, make_small, run_nodes, run_ranks

EMPTY = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=2, num_hidden_layers=1)


@pytest.mark.parametrize(
    "run, ranks, tied, replicate, context_parallel, shape",
    [
        (run_ranks, 3, False, 1, 1, EMPTY),  # k_proj has two rows, the last rank none; 101 rows are uneven
        (run_ranks, 2, True, 1, 2, {}),  # each rank has one of the two key heads
        (run_ranks, 4, False, 2, 2, {}),
        (run_nodes, 2, True, 2, 1, {}),
    ],
)
def test_values_gradients_masks_steps_and_exports_equal_one_process(
    run, ranks, tied, replicate, context_parallel, shape, tmp_path
):
    """Prompts and passes of 1 token to 46, most not a multiple of the ranks; with and without recomputing."""
    make_small(tied, **shape).save_pretrained(tmp_path / "checkpoint")
    flags = tmp_path / "checkpoint", tmp_path / "export", replicate, context_parallel
    result = run(ranks, ROOT / "tests" / "ranks.py", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"agree; empty shards: {bool(shape)}" in result.stdout
