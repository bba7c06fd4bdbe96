"""run/config.py: settings that contradict each other."""

import re

import pytest
import torch
from conftest import ROOT

from base.cli import BadInput, parse
from run.config import MAY_CHANGE, Config, check, of_engine


@pytest.mark.parametrize("settings, message", [
    (
        {"algorithm": "dapo", "aggregation": "constant"},
        "--aggregation needs --algorithm grpo: dapo has a mean"
    ),
    ({"eval_every": 2, "eval_prompts": 0}, "--eval-every needs held-out prompts"),
    ({"eval_every": 2, "data": ["rows.jsonl"]}, "--eval-every needs held-out prompts: --eval-data"),
    ({"best": "filler 17/accuracy"}, "--best needs --eval-every"),
    ({"algorithm": "gspo", "updates": 2, "dual_clip": 3.0}, "--dual-clip is not for --algorithm gspo"),
    ({"algorithm": "clip-cov", "dual_clip": 3.0}, "--dual-clip is not for --algorithm clip-cov"),
    ({"algorithm": "grpo", "overlong_cache": 8}, "--overlong-cache needs --algorithm dapo: grpo does not"),
    ({"reward_weights": [0.0]}, "--reward-weights are all 0"),
    ({"reward_weights": [1.0, 1.0]}, "--reward-weights has 2 numbers for 1 rewards"),
    ({"reward": ["rewards:exact"] * 2}, "--reward rewards:exact rewards:exact names a function twice"),
    ({"reward_on_timeout": "zero"}, "--reward-on-timeout zero needs --reward-timeout"),
    ({"algorithm": "grpo", "overlong_cache": 4, "oversample": 1.5}, "--oversample 1.5 needs dynamic samp"),
    ({"kv_cache": "fp8"}, "--kv-cache fp8 needs a GPU, and there is none"),
    ({"vllm_offload_graphs": True}, "--vllm-offload-graphs needs a GPU, and there is none"),
    ({"flash_attention": 3}, r"--flash-attention 3 needs a Hopper GPU \(H100, H200, GH200\), and there"),
    ({"overlong_cache": 25}, "--overlong-cache 25 is more than --max-completion 24: it is the last of"),
])  # fmt: skip
def test_flags_of_another_algorithm_are_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        check(Config(**settings), world=1, cuda=False)


def test_the_docs_say_what_is_free_to_change():
    text = (ROOT / "docs" / "interrupted.md").read_text().split("Free to change:")[1].split("|")[0]
    listed = {name.replace("-", "_") for name in re.findall("`--([a-z-]+)`", text)}
    elsewhere = {"model", "data", "eval_data"}  # "where these files lie"
    of_a_start = {"resume", "plan", "find", "dry_run", "ranks", "gpu", "gpu_memory"}  # what to do, not how
    assert listed == set(MAY_CHANGE) - elsewhere - of_a_start


@pytest.mark.parametrize("ranks, tensor_parallel, sequences", [(1, 1, 96), (8, 1, 64), (8, 4, 64)])
def test_an_engine_is_made_for_the_completions_of_a_round(ranks, tensor_parallel, sequences):
    """Of 4 prompts x 1.5 x 16, by the engines there are, and not for 1,024, which vLLM would prepare for."""
    config = Config(prompts=4, oversample=1.5, tensor_parallel=tensor_parallel, kv_cache="fp8")
    made = of_engine(config, torch.bfloat16, ranks)
    assert (made["sequences"], made["dtype"], made["kv_cache"]) == (sequences, "bfloat16", "fp8")
    assert of_engine(Config(prompts=1000), torch.float32, 1)["sequences"] == 1024


def test_a_dual_clip_that_would_clip_every_loss_is_refused():
    with pytest.raises(BadInput, match="--dual-clip must be more than 1, not 0.5"):
        parse(Config, "", ["--dual-clip", "0.5"])


@pytest.mark.parametrize("value, bound", [("2.5", "at most 2"), ("0.001", "at least 0.01")])
def test_a_temperature_that_vllm_would_refuse_or_change_is_refused(value, bound):
    with pytest.raises(BadInput, match=f"--temperature must be {bound}, not {value}"):
        parse(Config, "", ["--temperature", value])
