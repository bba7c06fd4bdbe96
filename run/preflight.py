"""What train.py and sft.py check of a checkpoint before anything takes time."""

from base.cli import BadInput
from core.checkpoint import generation_config
from model import Qwen3, Qwen3Config
from prompts import chat


def check_model(directory, context, site="proj"):
    """-> Qwen3Config, tokenizer, context in tokens (--context, or for 0 all the model has),
    generation_config.json as a dict. Of the weights only headers are read. Raises BadInput for what is no
    checkpoint of a supported model with its tokenizer, for a context beyond the model's, and for a --site
    that it has not."""
    config = Qwen3Config.from_pretrained(directory)
    context = config.context(context, directory)
    if site == "norm" and not config.qk_norm:
        raise BadInput(
            f"--site norm: {directory} is of {config.family}, which has no q_norm; use --site proj"
        )
    tokenizer = chat.load_tokenizer(directory, config.vocab_size)
    Qwen3.check_weights(config, directory)
    return config, tokenizer, context, generation_config(directory)


def prompt_room(context, max_completion):
    """-> tokens that a prompt may have. Raises BadInput where there are none."""
    if max_completion >= context:
        raise BadInput(f"--max-completion {max_completion} leaves no room for a prompt in {context} tokens")
    return context - max_completion
