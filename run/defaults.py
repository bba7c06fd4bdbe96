"""What settings are that follow from the model and from the length of what trains, unless they are given."""

from run import memory_plan

# Parameters below -> AdamW's learning rate. assets/tiny's was measured (docs/ablation.md), the paper has 1e-6
# for 8B, which is TRL's default for every size; those between are ours, on the safe side. docs/run.md.
LEARNING_RATES = ((10**7, 3e-4), (10**8, 5e-5), (10**9, 5e-6), (3 * 10**9, 2e-6), (float("inf"), 1e-6))
SFT_LEARNING_RATE = 1e-5
# LoRA's best rate is about 10 times that of all weights, at every rank if its scale is 32 / rank (Schulman et
# al., "LoRA Without Regret", Thinking Machines Lab, 2025; 15 times in runs of fewer than some 100 steps).
LORA_TIMES = 10


def learning_rate(model_config):
    """Qwen3Config -> the learning rate of RL, and the number of parameters that it follows from."""
    block, rest = memory_plan.parameter_counts(model_config)
    parameters = block * model_config.num_hidden_layers + rest
    return next(rate for most, rate in LEARNING_RATES if parameters < most), parameters


def fill(config, model_config, bf16):
    """Give train.py's Config what was left out of it: --learning-rate, --checkpointing, --mismatch-limit; its
    context is known -> text that says what was chosen."""
    by_size, parameters = learning_rate(model_config)
    size = f", by the model's {parameters / 1e6:,.1f} million parameters" * (config.learning_rate is None)
    size += f", times {LORA_TIMES} for LoRA" * bool(size and config.lora)
    config.learning_rate = config.learning_rate or by_size * lora_times(config)
    config.mismatch_limit = config.mismatch_limit or (0.1 if bf16 else 1e-3)
    lines = fill_checkpointing(config, max(config.context, memory_plan.tokens_of_pass(config)))
    return "\n".join([f"learning rate: {config.learning_rate:g}{size}", *lines])


def lora_times(config):
    """-> what a learning rate for all weights is to be multiplied by."""
    return LORA_TIMES if config.lora else 1


def fill_checkpointing(config, tokens):
    """Set --checkpointing, unless it was given, by the most tokens that train at once -> lines of text."""
    given, config.checkpointing = config.checkpointing, memory_plan.recomputes(config, tokens)
    why = f"up to {tokens:,} tokens train at once (--no-checkpointing keeps them)"
    return [f"activations are recomputed in backward: {why}"] * (given is None and config.checkpointing)
