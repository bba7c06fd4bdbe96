"""plan.py against measured peaks: the same step run for real, on one process and sharded over two."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, make_small, refusal, run_here, run_ranks

from core.schedule import passes
from model import Qwen3, Qwen3Config
from run import memory_plan

sys.path.insert(0, str(ROOT / "bench"))
from measure import peak_bytes
from shapes import draw_group, train_on

WIDE = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=32)
WIDE |= dict(intermediate_size=384, vocab_size=896, tie_word_embeddings=True)
DEEP = dict(hidden_size=64, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
DEEP |= dict(intermediate_size=160, vocab_size=3000, tie_word_embeddings=False)


def give_moments(model, optimizer):
    """As after a first step; a short one will do."""
    model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def measured(model, optimizer, prompt, lengths, tokens_per_pass):
    """Bytes at the peak of an update of two equal groups, with what is held all the time (parameters and
    moments)."""
    prompt, completions = draw_group(model.config, prompt, lengths, "cpu")
    weights = [torch.ones(n) for n in lengths]

    def update():
        for _ in range(2):
            train_on(model, prompt, completions, weights, tokens_per_pass)
        optimizer.step()
        optimizer.zero_grad()

    give_moments(model, optimizer)
    held = sum(p.numel() * 4 * 3 for p in model.parameters())
    return peak_bytes(update) + held


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    "shape, prompt, lengths, tokens_per_pass",
    [
        (WIDE, 1024, [64] * 8, 8192),  # everything in one pass
        (WIDE, 1024, [64] * 16, 128),  # a long prompt: its backward is the peak
        (WIDE, 64, [40, 200, 90, 130, 250, 10], 500),  # a short one: a pass is
        (DEEP, 300, [100] * 4, 100),
        (DEEP, 32, [500] * 4, 1000),
        ({**DEEP, "family": "llama"}, 32, [500] * 4, 1000),
        ({**WIDE, "family": "qwen2", "head_dim": 16}, 1024, [64] * 16, 128),
    ],
)
def test_predicted_memory_is_within_15_percent_of_the_measured_peak(
    shape, prompt, lengths, tokens_per_pass, checkpointing
):
    model = Qwen3.from_config(Qwen3Config(**shape))
    model.checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    peak = measured(model, optimizer, prompt, lengths, tokens_per_pass)
    tokens = max(sum(lengths[i] for i in part) for part in passes(lengths, tokens_per_pass))
    lines, _ = memory_plan.training_memory(model.config, prompt, tokens, checkpointing, 1, 4, sharded=False)
    assert sum(lines.values()) == pytest.approx(peak, rel=0.15), lines


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("shape, lengths", [(WIDE, [40, 200, 90, 130, 250, 10]), (DEEP, [300] * 4)])
def test_predicted_memory_of_a_pass_of_sft_is_within_15_percent(shape, lengths, checkpointing):
    model = Qwen3.from_config(Qwen3Config(**shape))
    model.checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    ids = torch.randint(0, model.config.vocab_size, (1, sum(lengths)))
    spoken = torch.ones_like(ids, dtype=torch.bool)
    spoken[0, [sum(lengths[:i]) for i in range(len(lengths))]] = False  # nothing predicts a document's first

    def update():
        for _ in range(2):
            model.logprobs(ids, spoken, lengths).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    give_moments(model, optimizer)
    peak = peak_bytes(update) + sum(p.numel() * 4 * 3 for p in model.parameters())
    lines, _ = memory_plan.training_memory(model.config, 0, sum(lengths), checkpointing, 1, 4, sharded=False)
    assert sum(lines.values()) == pytest.approx(peak, rel=0.15), lines


def test_memory_does_not_grow_with_the_group_at_a_fixed_budget():
    model = Qwen3.from_config(Qwen3Config(**WIDE))
    model.checkpointing = True
    weights = {}

    def peak(completions):
        group = draw_group(model.config, 512, [32] * completions, "cpu")
        weights[completions] = [torch.ones(32)] * completions
        train_on(model, *group, weights[completions], 64)
        model.zero_grad()
        return peak_bytes(lambda: train_on(model, *group, weights[completions], 64))

    assert peak(32) < 1.02 * peak(4)


def test_a_long_completion_does_not_make_memory_of_short_ones():
    model = Qwen3.from_config(Qwen3Config(**WIDE))
    model.checkpointing = True

    def peak(short):
        lengths = [256] + [1] * short
        group = draw_group(model.config, 64, lengths, "cpu")
        weights = [torch.ones(n) for n in lengths]
        train_on(model, *group, weights, 600)
        return peak_bytes(lambda: train_on(model, *group, weights, 600))

    assert peak(255) < 1.3 * peak(3)  # 255 more tokens, in a pass of their own


def test_the_whole_is_the_sum_of_parts_sharded_over_ranks():
    c = Qwen3Config.preset("8B")
    for family in ("llama", "qwen2", "qwen3"):
        c = replace(c, family=family)
        block, rest = memory_plan.parameter_counts(c)
        with torch.device("meta"):
            assert block * c.num_hidden_layers + rest == sum(p.numel() for p in Qwen3(c).parameters())
    one, _ = memory_plan.training_memory(c, 28672, 8192, True, 1, 2)
    eight, _ = memory_plan.training_memory(c, 28672, 8192, True, 8, 2)
    both, _ = memory_plan.training_memory(c, 28672, 8192, True, 8, 2, reference=True)
    assert sum(both.values()) > sum(eight.values()) + 2 * (block * c.num_hidden_layers + rest) / 8
    for line in ("parameters (fp32)", "gradients (fp32)", "optimizer (fp32 moments)"):
        assert one[line] == 8 * eight[line]
    assert one["parameters (fp32)"] == 4 * (block * c.num_hidden_layers + rest)


def test_predicted_memory_of_two_ranks(tmp_path):
    make_small(True, **{**WIDE, "tie_word_embeddings": True}).save_pretrained(tmp_path / "checkpoint")
    result = run_ranks(2, ROOT / "tests" / "ranks_memory.py", tmp_path / "checkpoint")
    assert result.returncode == 0, result.stderr[-3000:]
    ratios = [float(x) for x in re.findall(r"predicted / measured ([\d.]+)", result.stdout)]
    assert len(ratios) == 4 and all(0.85 <= ratio <= 1.15 for ratio in ratios), result.stdout


def test_the_plan_of_a_preset_needs_no_files():
    flags = [
        "--model",
        "Qwen3-8B",
        "--ranks",
        8,
        "--context",
        32768,
        "--max-completion",
        4096,
        "--checkpointing",
    ]
    text = run_here("train.py", "--plan", *flags, "--prompts", 8)
    for line in (
        "parameters (fp32)",
        "optimizer",
        "prompt's keys and values",
        "vLLM weights",
        "vLLM KV cache",
        "a step: 753,664",
    ):
        assert line in text, text
    assert "fits 80 GiB (less 2 for CUDA): yes" in text
    for context in ("8,192", "16,384", "32,768", "65,536", "131,072"):
        assert re.search(rf"^ +{context} ", text, re.M)
    assert re.search(r"^ +131,072 .* NO, but needs YaRN", text, re.M)
    shared = run_here("train.py", "--plan", *flags, "--prompts", 8, "--context-parallel", 8)
    assert re.search(r"^ +131,072 .* yes, but needs YaRN", shared, re.M)
    small = run_here("train.py", "--plan", *flags, "--prompts", 8, "--gpu-memory", 40)
    assert "fits 40 GiB (less 2 for CUDA): NO" in small


def test_replicas_shard_over_fewer_ranks_and_context_groups_share_tokens():
    c = Qwen3Config.preset("8B")
    one, _ = memory_plan.training_memory(c, 131072, 8192, True, 8, 2, reference=True)
    shared, _ = memory_plan.training_memory(c, 131072, 8192, True, 8, 2, reference=True, context_parallel=8)
    for line in ("prompt, kept for its backward", "prompt's keys and values", "their gradients"):
        assert one[line] == 8 * shared[line]
    flags = [
        "--model",
        "Qwen3-8B",
        "--prompts",
        16,
        "--checkpointing",
        "--context",
        8192,
        "--max-completion",
        4096,
    ]
    one_node, two = (
        run_here("train.py", "--plan", *flags, "--ranks", ranks, "--replicate", ranks // 8)
        for ranks in (8, 16)
    )
    assert one_node.splitlines()[1:] == two.splitlines()[1:]  # a node's GPUs hold what they held


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "Qwen3-9B"], "no Qwen3 preset '9B'"),
        (["--model", "Qwen3-8B", "--context", 1000, "--max-completion", 1000], "leaves no room for a prompt"),
        (["--model", "Qwen3-8B", "--context", 65536], "more than the 40960 tokens of Qwen3-8B"),
        (["--gpu-memory", 0], "--gpu-memory must be more than 0"),
        (["--vllm-share", 1.5], "--vllm-share must be at most 1, not 1.5"),
        (["--ranks", 3], "--prompts 16 cannot be shared: 1 updates x 3 ranks"),
        (
            ["--ranks", 6, "--context-parallel", 2],
            "1 updates x 3 context groups of 2 ranks need a multiple of 3",
        ),
        (["--ranks", 8, "--context-parallel", 3], "--context-parallel 3 does not divide the 8 ranks"),
        (["--ranks", 16, "--context-parallel", 16], "does not divide the model's 2 key heads"),
        (["--ranks", 8, "--replicate", 3], "--replicate 3 does not divide the 8 ranks"),
        (["--no-plan", "--ranks", 2], "--ranks 2 is for --plan"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(flags, message):
    assert message in refusal("train.py", "--plan", *flags)


def test_the_plan_reads_only_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(Qwen3Config(**DEEP).to_dict()))
    assert "fits 80 GiB" in run_here("train.py", "--plan", "--model", tmp_path)
