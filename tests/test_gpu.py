"""What only a GPU can show. GPU_TESTS=1 python -m pytest tests/test_gpu.py; skipped everywhere else."""

import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, make_small
from torch.nn.attention import restore_flash_attention_impl
from torch.profiler import ProfilerActivity, profile

from base import environment
from core.attention import GroupAttention, Layout, causal_attention, use_flash_attention_3
from core.parallel import Share
from model import Qwen3, Qwen3Config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and GPU_TESTS=1")

sys.path.insert(0, str(ROOT / "bench"))
BIG = dict(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=128)
BIG |= dict(intermediate_size=1536, vocab_size=20000, max_position_embeddings=32768)


def kernels(function):
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        function()
        torch.cuda.synchronize()
    return {event.key for event in record.key_averages()}


def heads(tokens, n, batch=1):
    return torch.randn(batch, tokens, n, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def test_causal_attention_with_grouped_queries_runs_flash_kernels():
    def run():
        causal_attention(heads(1000, 8), heads(1000, 2), heads(1000, 2)).sum().backward()

    assert any("flash" in name and "bwd" in name for name in kernels(run))


@pytest.mark.parametrize("lengths", [[64] * 4, [5, 200, 33]])
def test_completions_attend_to_a_longer_prompt_by_flash_kernels_and_rightly(lengths):
    N = sum(lengths)
    layout = Layout(700, lengths, "cuda", Share(N))
    tensors = heads(N, 8), heads(N, 2), heads(N, 2), heads(700, 2), heads(700, 2)
    q, k, v, prompt_k, prompt_v = tensors
    weights = torch.randn(1, N, 8, 128, device="cuda")
    names = kernels(lambda: (GroupAttention.apply(*tensors, layout) * weights).sum().backward())
    assert any("flash" in name and "bwd" in name for name in names)
    out, gradients = GroupAttention.apply(*tensors, layout), [x.grad.clone() for x in tensors]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    parts = []
    for own in torch.arange(N, device="cuda").split(lengths):
        keys = torch.cat((wide[3][0], wide[1][0, own])).repeat_interleave(4, 1)  # (700 + R, H, D)
        values = torch.cat((wide[4][0], wide[2][0, own])).repeat_interleave(4, 1)
        scores = torch.einsum("qhd,khd->hqk", wide[0][0, own], keys) / 128**0.5
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(701)
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    expected = torch.cat(parts)[None]
    (expected * weights).sum().backward()
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    for gradient, x in zip(gradients, wide):
        torch.testing.assert_close(
            gradient.double(), x.grad, atol=3e-2 * x.grad.abs().max().item(), rtol=2e-2
        )


@pytest.mark.skipif(not find_spec("flash_attn_interface"), reason="needs FlashAttention 3")
def test_flash_attention_3_agrees_with_2():
    lengths = [5, 200, 33]
    layout, weights = Layout(700, lengths, "cuda", Share(238)), torch.randn(1, 238, 8, 128, device="cuda")
    tensors = heads(238, 8), heads(238, 2), heads(238, 2), heads(700, 2), heads(700, 2)

    def run():
        out = GroupAttention.apply(*tensors, layout)
        return [out, *torch.autograd.grad((out * weights).sum(), tensors)]

    two = run()
    use_flash_attention_3()
    try:
        three, names = run(), kernels(run)
    finally:
        restore_flash_attention_impl()
    assert names != kernels(run)
    for a, b in zip(two, three):
        torch.testing.assert_close(b, a, atol=3e-2 * a.abs().max().item(), rtol=2e-2)


def test_group_logprobs_in_bf16_are_near_the_dense_layout_in_fp32():
    model = Qwen3.from_config(Qwen3Config(**BIG, tie_word_embeddings=True))
    dense = model.cuda()
    prompt = torch.randint(0, 20000, (900,), device="cuda")
    completions = [torch.randint(0, 20000, (n,), device="cuda") for n in (40, 7, 120)]
    with torch.no_grad():
        tables = [dense(torch.cat((prompt, c))[None]).log_softmax(-1)[0, 899:-1] for c in completions]
        expected = [table.gather(-1, c[:, None])[:, 0] for table, c in zip(tables, completions)]
        half = Qwen3.from_config(model.config, torch.bfloat16, "cuda")
        half.load_state_dict(model.state_dict())
        for ours, theirs in zip(half.group_logprobs(prompt, completions), expected):
            assert (ours - theirs).abs().mean() < 0.05


def test_the_plan_predicts_the_peak_in_bf16():
    from measure import peak_bytes
    from shapes import draw_group, train_on

    from run import memory_plan

    model = Qwen3.from_config(Qwen3Config(**BIG, tie_word_embeddings=True), torch.bfloat16, "cuda")
    model.checkpointing = True
    lengths = [256] * 8
    prompt, completions = draw_group(model.config, 8192, lengths, "cuda")
    weights = [torch.ones(256, device="cuda")] * 8
    train_on(model, prompt, completions, weights, 1024)  # gradients exist
    measured = peak_bytes(lambda: train_on(model, prompt, completions, weights, 1024))
    moments = memory_plan.activations(model.config, 8192, 1024, True, 2)
    assert max(sum(lines.values()) for lines in moments.values()) == pytest.approx(measured, rel=0.15)


def test_a_checkpoint_loads_on_the_gpu(tmp_path):
    make_small().save_pretrained(tmp_path)
    model = Qwen3.from_pretrained(tmp_path, torch.bfloat16, "cuda")
    assert model(torch.arange(10, device="cuda")[None]).isfinite().all()


def test_a_run_notes_what_it_computes_with():
    versions = environment.describe()["versions"]
    assert versions["cuda"] == torch.version.cuda and versions["cudnn"] > 9000
    assert versions["nccl"].count(".") == 2
