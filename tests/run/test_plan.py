"""Bytes of a plan against measured peaks, the same step run for real, on one process and sharded over two;
what it says, and what it finds."""

import itertools
import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, make_small, refusal, run_here, run_ranks

from base.cli import parse
from core import lora
from core.checkpoint import SIZES
from core.optimizer import MASTERS, make_optimizer
from core.schedule import passes
from model import Qwen3, Qwen3Config
from run import find, memory_plan, roofline
from run.config import Config
from run.memory_plan import GIB, Step

sys.path.insert(0, str(ROOT / "bench"))
from measure import peak_bytes
from shapes import draw_group, train_on

WIDE = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=32)
WIDE |= dict(intermediate_size=384, vocab_size=896, tie_word_embeddings=True)
DEEP = dict(hidden_size=64, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
DEEP |= dict(intermediate_size=160, vocab_size=3000, tie_word_embeddings=False)
HEAVY = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=32)
HEAVY |= dict(intermediate_size=768, vocab_size=1000, tie_word_embeddings=True)


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
    held = [*model.parameters()]
    if getattr(optimizer, "kind", "") != "adamw-offload":  # whose moments are no memory of a GPU
        held += [x for state in optimizer.state.values() for x in state.values()]
    return peak_bytes(update) + sum(x.numel() * x.element_size() for x in held)


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


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer adamw8bit",
        "--optimizer adamw-offload",
        "--optimizer adamw8bit --masters bf16",
        "--lora 8",
        "--lora 32 --optimizer adamw8bit",
    ],
)
def test_predicted_memory_of_what_is_kept_is_within_15_percent(flags):
    """Of a model whose weights are most of it."""
    config = parse(Config, "", f"{flags} --learning-rate 1e-6 --replicate 1".split())
    model = Qwen3.empty(Qwen3Config(**HEAVY), MASTERS[config.masters], low_rank=lora.of_config(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    model.checkpointing = True
    peak = measured(model, make_optimizer(config, model.parameters()), 100, [20] * 4, 40)
    how = {"optimizer": config.optimizer, "masters": config.masters, "lora": config.lora}
    size = MASTERS[config.masters].itemsize  # one process computes with the masters
    lines, _ = memory_plan.training_memory(model.config, 100, 40, True, 1, size, sharded=False, **how)
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
    for line in ("weights (fp32)", "gradients (fp32)", "moments (fp32)"):
        assert one[line] == 8 * eight[line]
    assert one["weights (fp32)"] == 4 * (block * c.num_hidden_layers + rest)


def test_predicted_memory_of_two_ranks(tmp_path):
    make_small(True, **{**WIDE, "tie_word_embeddings": True}).save_pretrained(tmp_path / "checkpoint")
    result = run_ranks(2, ROOT / "tests" / "ranks_memory.py", tmp_path / "checkpoint")
    assert result.returncode == 0, result.stderr[-3000:]
    ratios = re.findall(r"predicted / measured ([\d.]+) to ([\d.]+)", result.stdout)
    assert len(ratios) == 4, result.stdout
    assert all(float(least) <= 1.15 and float(most) >= 0.85 for least, most in ratios), result.stdout


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
        "weights (fp32)",
        "moments",
        "prompt's keys and values",
        "vLLM weights",
        "vLLM activations and graphs",
        "vLLM KV cache",
        "a step: 753,664",
    ):
        assert line in text, text
    assert "fits 79.1 GiB (a card of 80 GB), of which 6.0 stay free: yes" in text
    for context in ("8,192", "16,384", "32,768", "65,536", "131,072"):
        assert re.search(rf"^ +{context} ", text, re.M)
    assert re.search(r"^ +131,072 .* NO, but needs YaRN", text, re.M)
    shared = run_here("train.py", "--plan", *flags, "--prompts", 8, "--context-parallel", 8)
    assert re.search(r"^ +131,072 .* yes, but needs YaRN", shared, re.M)
    small = run_here("train.py", "--plan", *flags, "--prompts", 8, "--gpu-memory", 40)
    assert re.search("fits 40 GiB .* stay free: NO, .* too much", small)


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
    held = [text.partition("tokens through")[0].splitlines()[1:] for text in (one_node, two)]
    assert held[0] == held[1] and len(held[0]) > 10  # a node's GPUs hold what they held


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
        (["--no-plan", "--find"], "--find is for --plan"),
        (["--gpu", "H1000"], "argument --gpu: invalid choice: 'H1000'"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(flags, message):
    assert message in refusal("train.py", "--plan", *flags)


def test_the_plan_reads_only_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(Qwen3Config(**DEEP).to_dict()))
    assert "fits 79.1 GiB" in run_here("train.py", "--plan", "--model", tmp_path)


# ---------------------------------------------------------------------------------------- seconds, what fits


def step(ranks, context, **changes):
    """The paper's step on so many GPUs, a group each."""
    return Step(ranks, ranks, context - 4096, 4096, 16, 8192, True, 0.5)._replace(**changes)


H100 = roofline.card_of("H100", None)


@pytest.mark.parametrize(
    "how, expected",
    [
        # Worked out by hand beside the model's formulas: Qwen3-8B, 16 completions of 4,096 tokens.
        (step(1, 32768), {"matrices": 8.7, "head": 0.9, "attention": 7.7 + 11.9, "other kernels": 4.7}),
        (step(8, 131072, context_parallel=8), {"matrices": 17.8, "attention": 133.9}),
    ],
)
def test_the_roofline_gives_what_was_worked_out_by_hand(how, expected):
    c = Qwen3Config.preset("8B")
    kinds = roofline.training_seconds(c, how, H100)
    for kind, seconds in expected.items():
        assert kinds[kind] == pytest.approx(seconds, rel=0.2), kind
    whole = 34 if how.ranks == 1 else 162
    assert roofline.total(kinds) == pytest.approx(whole, rel=0.03)


def test_decoding_takes_what_reading_weights_and_cache_takes():
    c, how = Qwen3Config.preset("8B"), step(1, 32768)
    engine = memory_plan.engine_memory(c, how, H100.memory)
    many = memory_plan.engine_memory(c, how._replace(prompts=64), H100.memory)
    assert many.working == pytest.approx(4 * GIB, rel=0.15)  # of 1,024 sequences
    assert memory_plan.engine_memory(c, how._replace(kv_cache="fp8"), 80).group == engine.group / 2
    seconds = roofline.sampling_seconds(c, how, H100, engine, engine.group)
    assert sum(seconds.values()) - seconds["prefill"] == pytest.approx(4096 * 0.031, rel=0.03)
    waiting = roofline.sampling_seconds(c, how, H100, engine, engine.group / 2)
    assert waiting["reading weights"] == pytest.approx(2 * seconds["reading weights"])


@pytest.mark.parametrize(
    "change, gain",
    [({"attention_recompute": False}, 3.9), ({"flash_attention": 3}, 8), ({"compile": True}, 3)],
)
def test_options_gain_what_docs_scale_says(change, gain):
    c, how = Qwen3Config.preset("8B"), step(1, 32768)
    before, after = (roofline.training_seconds(c, each, H100) for each in (how, how._replace(**change)))
    assert roofline.total(before) - roofline.total(after) == pytest.approx(gain, rel=0.25)


def test_kept_attention_takes_what_docs_scale_says():
    c = Qwen3Config.preset("8B")
    recomputed, kept = (
        memory_plan.activations(c, 28672, 8192, True, 2, attention_recompute=again)["a block of a pass"]
        for again in (True, False)
    )
    for line, gib in (("prompt, kept for its backward", 8.0), ("tokens of a pass, kept", 4.6)):
        assert kept[line] - recomputed[line] == pytest.approx(gib * GIB, rel=0.02)


def test_more_gpus_never_train_slower_and_sent_bytes_are_counted():
    c = Qwen3Config.preset("8B")
    for ranks in (2, 8):
        one, many = (roofline.training_seconds(c, step(n, 32768, prompts=8), H100) for n in (1, ranks))
        assert roofline.total(many) == pytest.approx(roofline.total(one) / ranks, rel=0.01)
    weights = sum(p.numel() for p in meta("8B").parameters())
    stages = 1 + 65536 // 8192
    assert roofline.sent(c, step(8, 32768)) == pytest.approx(stages * (2 + 2 + 4) * weights * 7 / 8)


def meta(size):
    with torch.device("meta"):
        return Qwen3(Qwen3Config.preset(size))


@pytest.mark.parametrize(
    "flags, name, memory",
    [
        (("", None), "H100", 79.1),
        (("", 24), "RTX4090", 23.6),
        (("", 48), "L40S", 44.4),
        (("A100", None), "A100", 79.1),
        (("A100", 40), "A100", 40),
        (("", 64), "H100", 64),
    ],
)
def test_a_card_is_known_by_name_or_by_its_memory(flags, name, memory):
    card = roofline.card_of(*flags)
    assert (card.name, card.memory) == (name, memory)


def weighed_again(c, how, words):
    """What a Step takes after its flags are changed as the plan says, by train.py's own parser."""
    config = parse(
        Config, "", f"--prompts {how.prompts} --max-completion 4096 --replicate 1".split() + words.split()
    )
    changed = Step.of(config, how.ranks, config.context or how.context)
    return find.weigh(c, changed, H100)


@pytest.mark.parametrize("size, ranks, context", [("4B", 1, 32768), ("8B", 2, 131072), ("32B", 8, 65536)])
def test_the_flags_of_a_plan_give_what_it_promised(size, ranks, context):
    c, how = Qwen3Config.preset(size), step(ranks, context)
    *before, (_, found) = find.ladder(c, how, H100)
    assert all(each.over > 0 for _, each in before) and found.over <= 0
    again = weighed_again(c, how, find.flags(how, found.step))
    assert again == found
    [(_, same)] = find.ladder(c, found.step, H100)
    assert same.over <= 0 and same.seconds <= found.seconds


def test_where_nothing_fits_the_plan_says_so():
    text = run_here(
        "train.py", "--plan", "--model", "Qwen3-32B", "--context", 32768, "--max-completion", 4096
    )
    assert "nothing fits: use more GPUs" in text and "cheapest" not in text


def test_a_table_of_models_contexts_and_cards():
    text = run_here("train.py", "--plan", "--find")
    blocks = [block.splitlines() for block in text.split("\n\n")[1:]]
    cards = [re.match(r"(\d) x (\w+), (\d+) GB", block[0]).groups() for block in blocks]
    assert cards == [
        (n, name, gb) for name, gb in (("RTX4090", "24"), ("L40S", "48"), ("H100", "80")) for n in "1248"
    ]
    for block in blocks:
        assert [line.split()[0] for line in block[1:]] == [*SIZES]
    fits = {card: [line.count("-") for line in block[1:]] for card, block in zip(cards, blocks, strict=True)}
    for fewer, more in itertools.pairwise(fits):
        if fewer[1] == more[1]:
            assert all(a >= b for a, b in zip(fits[fewer], fits[more], strict=True)), more


def test_the_plans_in_docs_scale_are_what_the_commands_print():
    text = (ROOT / "docs" / "scale.md").read_text()
    blocks = re.findall(r"```\n\$ python ((?:.*\\\n)*.*)\n\.\.\.\n([^`]*)```", text)
    assert len(blocks) == 3
    for command, shown in blocks:
        assert run_here(*command.replace("\\\n", "").split()).endswith(f"\n{shown}")


def test_the_table_of_costs_in_the_docs_is_what_the_script_prints(tmp_path):
    printed = run_here("bench/cost.py", "--no-measure", "--out", tmp_path)
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 10 and "\n".join(table) in (ROOT / "docs" / "scale.md").read_text()
    assert (tmp_path / "cost.md").read_text().splitlines() == table
    assert (tmp_path / "cost.png").stat().st_size > 10_000 and not (tmp_path / "results.json").exists()
