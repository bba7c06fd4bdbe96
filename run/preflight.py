"""What train.py and sft.py check of a checkpoint before anything takes time."""

from base.cli import BadInput
from core.checkpoint import generation_config
from model import Qwen3, Qwen3Config
from prompts import chat


def check_model(directory, context):
    """-> Qwen3Config, tokenizer, context in tokens (--context, or for 0 all the model has),
    generation_config.json as a dict. Of the weights only headers are read. Raises BadInput for what is no
    checkpoint of Qwen3 with a Qwen tokenizer, and for a context beyond the model's."""
    config = Qwen3Config.from_pretrained(directory)
    context = config.context(context, directory)
    tokenizer = chat.load_tokenizer(directory, config.vocab_size)
    Qwen3.check_weights(config, directory)
    return config, tokenizer, context, generation_config(directory)


def prompt_room(context, max_completion):
    """-> tokens that a prompt may have. Raises BadInput where there are none."""
    if max_completion >= context:
        raise BadInput(f"--max-completion {max_completion} leaves no room for a prompt in {context} tokens")
    return context - max_completion
