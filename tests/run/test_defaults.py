"""run/defaults.py: what follows from the model and from lengths."""

import pytest

from model import Qwen3Config
from run import defaults, memory_plan
from run.config import Config


@pytest.mark.parametrize("size, rate", [("0.6B", 5e-6), ("1.7B", 2e-6), ("4B", 1e-6), ("8B", 1e-6)])
def test_the_learning_rate_falls_with_the_models_size(size, rate):
    assert defaults.learning_rate(Qwen3Config.preset(size))[0] == rate


def test_lora_s_learning_rate_is_ten_times_that_of_all_weights():
    config = Config(context=4096, lora=8)
    text = defaults.fill(config, Qwen3Config.preset("8B"), bf16=True)
    assert "1e-05, by the model's 8,190.7 million parameters, times 10 for LoRA" in text
    assert config.learning_rate == pytest.approx(1e-5)
    config = Config(context=4096, lora=8, learning_rate=1e-4)
    assert "LoRA" not in defaults.fill(config, Qwen3Config.preset("8B"), bf16=True)
    assert config.learning_rate == 1e-4


def test_what_is_given_stays_and_what_is_long_is_recomputed():
    c = Qwen3Config.preset("8B")
    config = Config(context=32768, learning_rate=1e-4)
    assert defaults.fill(config, c, bf16=True).startswith("learning rate: 0.0001\nactivations are recomputed")
    assert (config.checkpointing, config.mismatch_limit) == (True, 0.1)
    config = Config(context=32768, checkpointing=False)
    lines = defaults.fill(config, c, bf16=True)
    assert lines == "learning rate: 1e-06, by the model's 8,190.7 million parameters"
    assert config.checkpointing is False
    config = Config(context=4096, max_completion=2048)  # the pass is longer than the context
    lines = defaults.fill(config, c, bf16=True)
    assert config.checkpointing and "up to 8,192 tokens train at once (--no-checkpointing" in lines
    assert not memory_plan.recomputes(Config(), 4096) and memory_plan.recomputes(Config(), 4097)
