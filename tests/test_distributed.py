"""FSDP2 shards against one process, under a real torchrun."""

import pytest
import torch
from conftest import ROOT, make_small, run_ranks

import resume


def agree(ranks, directory, model, make):
    """Run ranks.py on `model`; what it saved on those ranks is bit for bit what one process had saved. `make`: another such
    model -> its output."""
    model.save_pretrained(directory / "checkpoint")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(torch.arange(50)[None]).square().mean().backward()
        optimizer.step()
    mask = torch.tensor([True, False, True])
    resume.save(directory / "one", 2, model, optimizer, {"settings": {}, "random": {}}, {"mask": mask}, 1)
    model.save_pretrained(directory / "trained")
    result = run_ranks(ranks, ROOT / "tests" / "ranks.py", directory / "checkpoint", directory / "export", directory)
    assert result.returncode == 0, result.stderr[-3000:]

    other = make()
    other_optimizer = torch.optim.AdamW(other.parameters())
    step, state = resume.find(directory / "many", "auto", {})
    assert len(list(step.glob("shard-*"))) == ranks and state["random"] == [{"rank": rank} for rank in range(ranks)]
    assert torch.equal(resume.load(step, other, other_optimizer)["mask"], mask)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, other_optimizer.state[b][key]), key
    return result.stdout


@pytest.mark.parametrize("ranks, tied", [(1, True), (2, True), (2, False), (3, False)])
def test_sharded_gradients_masks_exports_and_checkpoints_equal_one_process(ranks, tied, tmp_path):
    """heads and sizes are chosen so that shards are uneven (48 rows on 3 ranks are not, 101 are)."""
    assert "agree" in agree(ranks, tmp_path, make_small(tied), lambda: make_small(tied, seed=1))


def test_masks_and_checkpoints_reach_rows_of_empty_shards(tmp_path):
    """One key head of two dimensions on three ranks: the last rank holds no row of k_proj."""
    small = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=2, num_hidden_layers=1)
    printed = agree(3, tmp_path, make_small(True, **small), lambda: make_small(True, seed=1, **small))
    assert "empty shards: True" in printed
