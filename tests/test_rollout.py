"""rollout.py: a real vLLM engine against our model, across weight syncs, seeds, prefix caching, and under a
clamp."""

from dataclasses import fields
from typing import get_args

import pytest
import torch
from conftest import FAMILIES, make_small

from base.cli import BadInput
from evals import clamp
from model import Qwen3Config
from rollout import Rollout, cache_bytes, cuda_options, hold, why_not_started
from run.config import KV_CACHES
from studies import magnitudes

# What vllm 0.32 says, of a context of 4 million tokens on a CPU, and of a GPU that others use.
SAID = {
    "To serve at least one request with the model's max seq len (9), (5.72 GiB KV cache is needed, which is "
    "larger than the available KV cache memory (1.0 GiB).": (
        "keys and values: set VLLM_CPU_KVCACHE_SPACE to more GiB, or allow fewer tokens (To serve",
        "keys and values: raise --vllm-share, or allow fewer tokens",
    ),
    "Free memory on device (9/79 GiB) on startup is less than desired GPU memory utilization (0.9).": (
        "lower --vllm-share, or free the GPU",
    )
    * 2,
    "1 validation error for ModelConfig\n  Value error, Not\nknown. [type=value_error]": (
        "vLLM cannot start with 9 tokens a text: Not known. [type=value_error]",
    )
    * 2,
}
PROMPTS = [list(range(1, 70)), list(range(5, 12)), list(range(30, 95))]


@pytest.mark.parametrize("cuda", [False, True])
def test_what_vllm_says_at_its_start_becomes_one_line_with_the_fix(cuda):
    for text, expected in SAID.items():
        line = why_not_started(ValueError(text), 9, cuda)
        assert expected[cuda] in line and "\n" not in line and len(line) < 500


def test_settings_for_a_gpu_are_vllms():
    """None of them can act here; but vLLM has them, by these names and with these values."""
    from vllm.config.cache import CacheDType  # after rollout.py, which sets what vLLM reads when imported
    from vllm.engine.arg_utils import EngineArgs

    settings = cuda_options(0.5, eager=False, sequences=64, kv_cache="fp8", offload_graphs=True)
    assert settings.keys() <= {field.name for field in fields(EngineArgs)}
    assert {*KV_CACHES} <= {*get_args(CacheDType)} and settings["kv_cache_dtype"] in KV_CACHES
    unlimited = cuda_options(0.5, eager=False, sequences=0, kv_cache="auto", offload_graphs=False)
    defaults = {field.name: field.default for field in fields(EngineArgs)}
    for name in ("max_num_seqs", "kv_cache_dtype", "sleep_mode_offload_cudagraph"):
        assert unlimited[name] == defaults[name]


def test_too_little_memory_beside_the_trainer_is_one_line_with_the_fix(setup, monkeypatch):
    """What vLLM's allocator raises when it wakes up."""
    model, engine = setup

    def wake(*arguments, **keywords):
        raise RuntimeError("CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62")

    monkeypatch.setattr(engine.engine, "collective_rpc", wake)
    with pytest.raises(BadInput, match="out of memory in waking vLLM up .*: lower --vllm-share \\(0.5\\)"):
        engine.sync(model)


@pytest.fixture(scope="module", params=FAMILIES)
def setup(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    # Heads of 32 are the smallest that vLLM has on a CPU, and Qwen2 is as wide as its heads.
    model = make_small(**{**FAMILIES[request.param], "head_dim": 32, "hidden_size": 128})
    model.save_pretrained(path)
    random_state = torch.get_rng_state()
    engine = Rollout(path, 256, "float32")
    assert torch.equal(torch.get_rng_state(), random_state)  # an in-process engine reseeds; we undo it
    yield model, engine
    engine.close()


def test_on_a_cpu_the_cache_takes_no_more_than_131072_tokens_need(setup):
    model, engine = setup
    c, cache = model.config, engine.engine.llm_engine.vllm_config.cache_config
    token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 4
    assert cache_bytes(c, 256, "float32") == cache.kv_cache_memory_bytes == 2**17 * token < 2**30
    assert 0.99 * 2**17 <= cache.num_gpu_blocks * cache.block_size <= 2**17
    assert cache_bytes(Qwen3Config.preset("8B"), 32768, "bfloat16") == 2**30


def mismatch(model, groups, temperature):
    """Largest difference between the sampler's and the trainer's log-probabilities."""
    worst = 0.0
    for prompt, completions in zip(PROMPTS, groups, strict=True):
        ids = [torch.tensor(completion.ids) for completion in completions]
        with torch.no_grad():
            ours = torch.cat(model.group_logprobs(torch.tensor(prompt), ids, temperature))
        theirs = torch.cat([torch.tensor(completion.logprobs) for completion in completions])
        worst = max(worst, (ours - theirs).abs().max().item())
    return worst


def generate(engine, n=3, temperature=1.0, seeds=(1, 100, 200), max_tokens=12, stop=(7,)):
    return engine.generate(PROMPTS, n, temperature, max_tokens, list(seeds), list(stop))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_logprobs_equal_the_trainers_before_and_after_updates_and_not_without_sync(
    setup, temperature
):
    model, engine = setup
    assert mismatch(model, generate(engine, temperature=temperature), temperature) < 1e-4
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        stale = generate(engine, temperature=temperature)
        assert mismatch(model, stale, temperature) > 1e-2  # the proof would notice a skipped sync
        engine.sync(model)
        assert mismatch(model, generate(engine, temperature=temperature), temperature) < 1e-4


def test_sync_forgets_the_prefix_cache_of_the_old_weights(setup):
    model, engine = setup
    engine.sync(model)
    first = generate(engine, temperature=0.0, n=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    engine.sync(model)
    assert mismatch(model, generate(engine, n=1), 1.0) < 1e-4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(1.3)
    engine.sync(model)
    assert [g[0].ids for g in generate(engine, temperature=0.0, n=1)] == [g[0].ids for g in first]


def test_a_seed_fixes_each_completion_whatever_is_sampled_beside_it(setup):
    _, engine = setup
    together = generate(engine)
    assert [[c.ids for c in group] for group in generate(engine)] == [
        [c.ids for c in group] for group in together
    ]
    alone = engine.generate(PROMPTS[1:2], 3, 1.0, 12, [100], [7])
    assert [c.ids for c in alone[0]] == [c.ids for c in together[1]]
    one = engine.generate(PROMPTS[1:2], 1, 1.0, 12, [101], [7])  # sample j has seed + j
    assert one[0][0].ids == together[1][1].ids
    endless = generate(engine, stop=())  # those that end at once may be equal by chance
    assert len({tuple(c.ids) for c in endless[0]}) == 3
    assert [c.ids for c in generate(engine, seeds=(9, 9, 9))[0]] != [c.ids for c in together[0]]


def test_completions_end_at_a_stop_token_or_are_cut(setup):
    _, engine = setup
    completions = [c for group in generate(engine, n=16, max_tokens=4, stop=range(0, 101, 5)) for c in group]
    assert {c.finished for c in completions} == {True, False}
    for completion in completions:
        assert len(completion.ids) == len(completion.logprobs) <= 4
        assert all(token % 5 for token in completion.ids[:-1])
        assert (completion.ids[-1] % 5 == 0) == completion.finished


def test_a_groups_prompt_is_prefilled_once(setup):
    """vLLM's own counters: of 8 x 69 prompt tokens, 7 x 64 (full blocks of 32) come from the cache."""
    model, engine = setup
    engine.sync(model)  # empties the cache

    def counters():
        wanted = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits")
        return [
            metric.value for name in wanted for metric in engine.engine.get_metrics() if metric.name == name
        ]

    before = counters()
    engine.generate(PROMPTS[:1], 8, 1.0, 4, [0], [7])
    assert [after - earlier for after, earlier in zip(counters(), before, strict=True)] == [8 * 69, 7 * 64]


# ----------------------------------------------------------------------------------------------------- clamps


def clamped_by_hand(model, chosen):
    """Our model with the same dimensions of q_proj's and k_proj's outputs held -> handles of its hooks."""

    def hook(values, output):
        output = output.clone()
        for row in (~values.isnan()).nonzero().flatten().tolist():
            output[..., row] = values[row]
        return output

    modules = [(values, model.get_submodule(name)) for name, values in chosen.items()]
    return [
        m.register_forward_hook(lambda module, args, output, values=values: hook(values, output))
        for values, m in modules
    ]


def same(groups, others):
    """Equal token ids and bit-equal log-probabilities."""
    return [[(c.ids, c.logprobs) for c in g] for g in groups] == [
        [(c.ids, c.logprobs) for c in g] for g in others
    ]


@pytest.mark.parametrize("rule", ["top", "bottom", "random"])
def test_a_clamp_acts_in_vllm_as_in_our_model_and_lets_go(setup, rule):
    model, engine = setup
    engine.sync(model)
    untouched = generate(engine)
    with clamp.Means(model) as means:
        magnitude = magnitudes.average(magnitudes.measure(model, PROMPTS, "proj"))
    engine.clamp(clamp.choose(magnitude, means.values, 0.3, "untouched"))
    assert len(engine.clamped) == 2 and same(
        generate(engine), untouched
    )  # hooks that hold nothing change nothing
    chosen = clamp.choose(magnitude, means.values, 0.3, rule, torch.Generator().manual_seed(0))
    engine.clamp(chosen)
    clamped = generate(engine)
    assert mismatch(model, clamped, 1.0) > 1e-2  # it acts
    handles = clamped_by_hand(model, chosen)
    # As it should, and with no KV cache of before: rounding is a hundredth of what the clamp does.
    assert mismatch(model, clamped, 1.0) < 1e-4
    for handle in handles:
        handle.remove()
    engine.clamp({})
    assert not engine.clamped and same(generate(engine), untouched)


def test_what_is_held_is_at_its_value_and_the_rest_as_it_was():
    output = torch.randn(5, 64)
    assert torch.equal(hold(output, torch.full((64,), torch.nan)), output)
    assert hold(output.bfloat16(), torch.arange(64.0)).tolist() == [list(range(64))] * 5


def test_an_engine_whose_hooks_would_not_run_refuses_a_clamp(setup, monkeypatch):
    monkeypatch.setattr(setup[1], "clampable", False)
    with pytest.raises(RuntimeError, match="eager"):
        setup[1].clamp({})
