"""Shards, replicas and shared prompts against one process, under a real torchrun."""

import pytest
import torch
from conftest import FAMILIES, ROOT, make_small, run_nodes, run_ranks

from core import lora
from model import Qwen3
from run import resume

EMPTY = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=2, num_hidden_layers=1)


@pytest.mark.parametrize(
    "run, ranks, tied, replicate, context_parallel, low_rank, shape",
    [
        (run_ranks, 3, False, 1, 1, 0, EMPTY),  # k_proj has two rows, the last rank none; 101 rows are uneven
        (run_ranks, 2, True, 1, 2, 0, FAMILIES["qwen2"]),  # each rank has one of the two key heads
        (run_ranks, 4, False, 2, 2, 0, FAMILIES["qwen3"]),
        (run_nodes, 2, True, 2, 1, 0, FAMILIES["llama"]),
        (run_ranks, 2, False, 1, 2, 3, FAMILIES["qwen2"]),  # LoRA: A has three rows
    ],
)
def test_values_gradients_masks_steps_exports_and_checkpoints_equal_one_process(
    run, ranks, tied, replicate, context_parallel, low_rank, shape, tmp_path
):
    """Prompts and passes of 1 token to 46, most not a multiple of the ranks, with and without recomputing.
    What ranks.py saved on those ranks is bit for bit what one process had saved."""
    model = make_small(tied, **shape)
    model.save_pretrained(tmp_path / "checkpoint")

    def started(seed):
        if low_rank:
            settings = lora.Settings(low_rank, 6, seed=seed)
            return Qwen3.from_pretrained(tmp_path / "checkpoint", low_rank=settings)
        return make_small(tied, seed=seed, **shape)

    model = started(seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(torch.arange(50)[None]).square().mean().backward()
        optimizer.step()
    mask = torch.tensor([True, False, True])
    resume.save(tmp_path / "one", 2, model, optimizer, {"settings": {}, "random": {}}, {"mask": mask}, 1)
    model.save_pretrained(tmp_path / "trained")
    directories = tmp_path / "checkpoint", tmp_path / "export", tmp_path
    result = run(ranks, ROOT / "tests" / "ranks.py", *directories, replicate, context_parallel, low_rank)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"agree; empty shards: {shape is EMPTY}" in result.stdout

    other = started(seed=1)
    other_optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad])
    step, state = resume.find(tmp_path / "many", "auto", {})
    assert state["random"] == [{"rank": rank} for rank in range(ranks)]
    assert torch.equal(resume.load(step, other, other_optimizer)["mask"], mask)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizer.state[a].items() if a.requires_grad else ():
            assert torch.equal(value, other_optimizer.state[b][key]), key
