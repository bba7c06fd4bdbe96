"""Hugging Face checkpoint directories: config.json and safetensors, read and written.

A model here is any module with a Qwen3Config as `.config` whose parameters have Hugging Face's names; they
may be sharded by FSDP2. transformers and vLLM load what is written as it is.
"""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from base import durable, limits
from base.cli import BadInput

FLOATS = (None, "auto", "float32", "bfloat16", "float16", "float64")  # torch_dtype in config.json
DTYPES = ("F32", "BF16", "F16", "F64")  # safetensors' names of the dtypes that weights may have
SHARD_BYTES = 5 * 10**9  # size of one safetensors file, Hugging Face's default
# Files beside the weights that transformers and vLLM need; they are copied unchanged.
COMPANIONS = (
    "tokenizer.json tokenizer_config.json generation_config.json chat_template.jinja vocab.json merges.txt "
    "added_tokens.json special_tokens_map.json"
).split()

# hidden, layers, query heads, intermediate, tied embeddings (Qwen3 technical report, Table 1)
SIZES = {
    "0.6B": (1024, 28, 16, 3072, True),
    "1.7B": (2048, 28, 16, 6144, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
    "14B": (5120, 40, 40, 17408, False),
    "32B": (5120, 64, 64, 25600, False),
}


# model_type of config.json: the class that transformers and vLLM have for it. What else tells the families
# apart is in Qwen3Config: qk_norm and qkv_bias.
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_NEEDS = {  # RoPE types, and the settings without which they are not known
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Qwen3Config:
    """The keys of Hugging Face's config.json that the model depends on, of Qwen3 or another of FAMILIES.
    rope_scaling: None, or the settings of a RoPE of type linear, llama3 or yarn."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    tie_word_embeddings: bool
    vocab_size: int = 151936
    num_key_value_heads: int = 8
    head_dim: int = 128  # independent of hidden_size / num_attention_heads
    max_position_embeddings: int = 40960
    rope_theta: float = 1e6
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    family: str = "qwen3"

    @property
    def qk_norm(self):
        """Whether each head's queries and keys are normalised before RoPE."""
        return self.family == "qwen3"

    @property
    def qkv_bias(self):
        """Whether q_proj, k_proj and v_proj have biases."""
        return self.family == "qwen2"

    @classmethod
    def preset(cls, name):
        """A published size by name: "0.6B" ... "32B", with "-Base" for the base model. Raises BadInput."""
        size = name.removesuffix("-Base")
        if size not in SIZES:
            raise BadInput(f"no Qwen3 preset {name!r}; there are {', '.join(SIZES)}, each also with -Base")
        base = {"max_position_embeddings": 32768, "eos_token_id": 151643} if name.endswith("-Base") else {}
        return cls(*SIZES[size], **base)

    @classmethod
    def from_pretrained(cls, directory):
        """Read `directory`/config.json. Raises BadInput if it is missing, unreadable or of no model that is
        supported."""
        path = Path(directory) / "config.json"
        if not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
            problem = "is not a checkpoint: it has no config.json"
            raise BadInput(f"{directory} {problem}; give a Hugging Face model directory")
        raw = durable.read_object(path)
        check_unused(raw, path)
        return cls.from_dict(raw, path)

    @classmethod
    def from_dict(cls, raw, path="config"):
        """Hugging Face's dictionary -> Qwen3Config. RoPE may be in the old form (rope_theta, rope_scaling) or
        the new (rope_parameters). Raises BadInput, which names the first thing that is not supported."""
        family = raw.get("model_type")
        if family not in list(FAMILIES):
            raise BadInput(
                f"{path}: model_type {family!r:.60} is not supported, only dense {', '.join(FAMILIES)}"
            )
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        lists = {key: raw.get(key) or [] for key in ("layer_types", "architectures")}
        for key, value in {"rope_scaling": rope, **lists}.items():
            if not isinstance(value, dict if value is rope else list):
                raise BadInput(f"{path}: {key} is {value!r:.60}, not an object or list as {family} has it")
        rope = dict(rope)
        # Qwen's files name it; Llama's first ones do not, and transformers and vLLM have this for them.
        theta = rope.pop("rope_theta", raw.get("rope_theta", 1e4 if family == "llama" else None))
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        whole = (None, 1, 1.0)
        unsupported = {
            f"architecture {lists['architectures']}": lists["architectures"] not in ([], [FAMILIES[family]]),
            "attention bias (attention_bias)": raw.get("attention_bias"),
            "bias in the MLP (mlp_bias)": raw.get("mlp_bias"),
            "sliding-window attention (use_sliding_window)": raw.get("use_sliding_window"),
            "sliding-window attention (layer_types)": any(
                layer != "full_attention" for layer in lists["layer_types"]
            ),
            f"hidden_act {raw.get('hidden_act')!r:.60}": raw.get("hidden_act", "silu") != "silu",
            "quantized weights (quantization_config)": raw.get("quantization_config"),
            f"RoPE type {kind!r:.60}": kind not in tuple(ROPE_NEEDS),
            "partial rotary embedding": rope.pop("partial_rotary_factor", None) not in whole
            or raw.get("partial_rotary_factor") not in whole,
            "interleaved RoPE (rope_interleaved)": raw.get("rope_interleaved"),
        }
        for what, present in unsupported.items():
            if present:
                raise BadInput(f"{path}: {what} is not supported")
        if theta is None:
            usual = {"qwen2": 10000, "qwen3": 1000000}[family]
            raise BadInput(f"{path}: rope_theta is missing; {FAMILIES[family]} usually has {usual}")
        check_numbers({"rope_theta": theta}, path)
        if kind == "yarn":
            original = raw.get("max_position_embeddings", cls.max_position_embeddings)
            rope.setdefault("original_max_position_embeddings", original)
        for key in ROPE_NEEDS[kind]:
            if key not in rope:
                raise BadInput(f"{path}: RoPE of type {kind} needs {key}")
        scaling = {"rope_type": kind, **rope} if kind != "default" else None
        raw = cls.with_defaults(raw, family)
        fields = set(cls.__dataclass_fields__) - {"rope_theta", "rope_scaling", "family"}
        # Sizes must be given: a default that differs from transformers' would be another model.
        required = {name for name in fields if name not in cls.__dict__}
        required |= {"num_key_value_heads", "vocab_size"}
        missing = sorted(required - raw.keys())
        if missing:
            raise BadInput(f"{path}: {', '.join(missing)} missing")
        known = {name: raw[name] for name in fields if name in raw}
        check_numbers(known, path)
        check_numbers(scaling or {}, path)
        if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise BadInput(f"{path}: low_freq_factor must be less than high_freq_factor")
        config = cls(**known, rope_theta=float(theta), rope_scaling=scaling, family=family)
        config.check_heads(path)
        return config

    @staticmethod
    def with_defaults(raw, family):
        """config.json -> the same with the values that transformers has for a family's missing keys. Qwen3's
        files name all keys."""
        if family == "qwen3":
            return raw
        heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
        defaults = {
            "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
            "qwen2": {"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None},
        }[family]
        defaults["tie_word_embeddings"] = False
        if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            defaults |= {"num_key_value_heads": heads, "head_dim": hidden // heads}
        return defaults | {key: value for key, value in raw.items() if value is not None}

    def check_heads(self, path):
        """Raises BadInput for numbers of heads that do not fit each other, or the family."""
        queries, keys = self.num_attention_heads, self.num_key_value_heads
        if queries % keys:
            raise BadInput(f"{path}: {queries} query heads cannot share {keys} key heads")
        # transformers' Llama refuses a width that is no multiple, vLLM's Qwen2 knows no head_dim.
        if self.family != "qwen3" and self.hidden_size % queries:
            raise BadInput(f"{path}: hidden_size {self.hidden_size} is no multiple of {queries} heads")
        if self.family == "qwen2" and self.head_dim * queries != self.hidden_size:
            problem = f"is not hidden_size / num_attention_heads, {self.hidden_size // queries}"
            raise BadInput(f"{path}: head_dim {self.head_dim} {problem}, which vLLM's Qwen2 has")

    def to_dict(self, dtype=torch.float32):
        """The config.json that transformers and vLLM read. RoPE is in the old form, which all their versions
        take."""
        fixed = {"model_type": self.family, "architectures": [FAMILIES[self.family]], "hidden_act": "silu"}
        if self.family != "qwen2":  # which has the biases of q, k and v without saying so
            fixed["attention_bias"] = False
        fields = {key: value for key, value in asdict(self).items() if key != "family"}
        return {**fixed, "torch_dtype": str(dtype).removeprefix("torch."), **fields}

    def context(self, asked, directory):
        """--context `asked` -> tokens: `asked`, or for 0 all that the model has. Raises BadInput for more
        than that; `directory` is for the message."""
        limit = self.context_length
        if asked > limit:
            raise BadInput(f"--context {asked} is more than the {limit} tokens of {directory}; it needs YaRN")
        return asked or self.context_length

    @property
    def context_length(self):
        """Tokens a sequence may have: YaRN's factor times the original length, or max_position_embeddings,
        which other RoPE types have extended already."""
        yarn = self.rope_scaling
        if yarn is None or yarn["rope_type"] != "yarn":
            return self.max_position_embeddings
        extended = int(yarn["factor"] * yarn["original_max_position_embeddings"])
        if extended > MOST_TOKENS:
            raise BadInput(f"YaRN makes a context of {extended:,} tokens; {MOST_TOKENS:,} are the most")
        return max(extended, self.max_position_embeddings)


LARGEST = 2**20  # of any size, so that torch can still hold a product of three
MOST_TOKENS = 2**24  # of a context: vLLM has a table of RoPE with a row for each
# {key of config.json or of its RoPE settings: (type, least, most)}
NUMBERS = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), (int, 1, LARGEST)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), (int, 1, LARGEST)),
    "num_hidden_layers": (int, 1, 1024),
    "head_dim": (int, 2, LARGEST),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings"), (int, 1, MOST_TOKENS)),
    "rope_theta": (float, 1 + 1e-6, 1e30),  # YaRN divides by its logarithm
    **dict.fromkeys(("rms_norm_eps", "initializer_range"), (float, 0, 1)),
    "factor": (float, 1, 1e6),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), (float, 1e-6, 1e6)),
}
# YaRN's: more than 0, or null.
OPTIONAL_NUMBERS = "beta_fast beta_slow attention_factor mscale mscale_all_dim".split()


def check_numbers(values, path):
    """Raises BadInput for the first of config.json's values that has a wrong type or is out of range."""
    for key, value in values.items():
        number = type(value) in (int, float) and -math.inf < value < math.inf
        if key in NUMBERS:
            kind, least, most = NUMBERS[key]
            good = number and least <= value <= most and (kind is float or type(value) is int)
            wanted = f"a{'n integer' if kind is int else ' number'} from {least:,} to {most:,}"
        elif key in OPTIONAL_NUMBERS:
            good, wanted = value is None or (number and value > 0), "a number more than 0"
        elif key in ("tie_word_embeddings", "truncate"):
            good, wanted = type(value) is bool, "true or false"
        elif key in ("bos_token_id", "eos_token_id"):
            ids = value if isinstance(value, list) else [value]
            good, wanted = value is None or all(type(i) is int and i >= 0 for i in ids), "a token id"
        else:
            good = True
        if good and key == "head_dim" and value % 2:
            good, wanted = False, "even: RoPE turns its dimensions in pairs"
        if not good:
            raise BadInput(f"{path}: {key} must be {wanted}, not {value!r:.60}")


def check_unused(raw, path):
    """Raises BadInput for values of config.json that we do not use, but at which transformers or vLLM, which
    read the same file, would fail."""
    layers, labels = raw.get("layer_types"), raw.get("id2label")
    right = {
        "torch_dtype": raw.get("torch_dtype") in FLOATS,
        "dtype": raw.get("dtype") in FLOATS,
        "sliding_window": raw.get("sliding_window") is None or type(raw["sliding_window"]) is int,
        "max_window_layers": type(raw.get("max_window_layers", 0)) is int,
        "attention_dropout": type(raw.get("attention_dropout", 0)) in (int, float),
        "layer_types": not isinstance(layers, list) or len(layers) in (0, raw.get("num_hidden_layers")),
        "id2label": labels is None or (isinstance(labels, dict) and all(map(str.isdecimal, labels))),
        "label2id": isinstance(raw.get("label2id") or {}, dict),
        "num_labels": type(raw.get("num_labels", 0)) is int,
        "use_cache": type(raw.get("use_cache", True)) is bool,
    }
    for key, good in right.items():
        if not good:
            raise BadInput(f"{path}: {key} cannot be {raw[key]!r:.60}; take it out")


def generation_config(directory):
    """`directory`/generation_config.json -> dict, {} if there is none. vLLM reads it when it starts. Raises
    BadInput as durable.read_object."""
    path = Path(directory) / "generation_config.json"
    return durable.read_object(path) if path.exists() else {}


def check_weights(model, directory):
    """Check that the tensors of `directory` are the parameters of `model`, which may be on the meta device.
    Only headers are read -> {tensor name: file}.

    Raises BadInput for unreadable files, COMPANIONS too, and for tensors that are missing, unexpected, of
    another shape or not of floating point.
    """
    for path in (Path(directory) / name for name in COMPANIONS):
        if path.exists():
            check_readable(path)
    files = weight_files(Path(directory))
    parameters = stored_parameters(model)
    if model.config.tie_word_embeddings:
        files.pop("lm_head.weight", None)  # some exports write the tied head a second time
    # Llama's first exports wrote RoPE's frequencies, which follow from config.json.
    files = {name: file for name, file in files.items() if not name.endswith("rotary_emb.inv_freq")}
    missing, unexpected = sorted(parameters.keys() - files.keys()), sorted(files.keys() - parameters.keys())
    if missing or unexpected:
        what, names = ("lacks", missing) if missing else ("has unexpected", unexpected)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        tensor = f"tensor {names[0]}{more}"
        raise BadInput(f"{directory}: the checkpoint {what} {tensor}; is it the model of config.json?")
    for name, stored in stored_tensors(files):
        file, dtype = files[name], stored.get_dtype()
        wanted, found = list(parameters[name].shape), stored.get_shape()
        if wanted != found:
            raise BadInput(f"{file}: {name} has shape {found}, config.json makes it {wanted}")
        if dtype not in DTYPES:
            raise BadInput(f"{file}: {name} is of {dtype}; weights are of {', '.join(DTYPES)}")
    return files


def stored_parameters(model):
    """{Hugging Face's name: parameter} of what a checkpoint directory holds: all but the factors of LoRA's
    updates, which come after the weights are read and are merged before they are written."""
    return {name: each for name, each in model.named_parameters() if ".lora_" not in name}


@torch.no_grad()
def load_weights(model, directory):
    """Fill `model` in place from safetensors, one tensor at a time, converted to the parameters' dtype. Of a
    sharded parameter each rank reads only its own rows. Raises BadInput as check_weights, and for values that
    are not finite."""
    parameters = stored_parameters(model)
    for name, stored in stored_tensors(check_weights(model, directory)):
        local, first = weight_shard(parameters[name])
        local.copy_(stored[first : first + len(local)])
        if not local.isfinite().all():
            raise BadInput(f"{directory}: {name} has values that are not finite")


def stored_tensors(files):
    """{tensor name: file} -> yields (name, safetensors slice), each file opened once. Raises BadInput."""
    for file in sorted(set(files.values())):
        with open_safetensors(file) as tensors:
            for name in sorted(name for name in files if files[name] == file):
                try:
                    stored = tensors.get_slice(name)
                except SafetensorError as error:
                    raise BadInput(f"{file} does not hold {name}, which the index says it does") from error
                yield name, stored


def save_checkpoint(model, directory, read, dtype=None, companions_from=None, notes=None, adapter=(None, {})):
    """Write a Hugging Face directory: config.json, and safetensors in shards of at most 5 GB, with an index
    if there are several.

    read(name) -> the whole tensor of that name; the model itself may be on the meta device. dtype: of the
    weights on disk; default: the model's. companions_from: directory whose tokenizer files are copied. notes:
    more JSON files, {name: content}. adapter: lora.adapter's, which makes the directory adapter/ in it. Every
    rank must call it, as sharded parameters are gathered, one at a time. Rank 0 writes to a temporary name
    beside `directory`, syncs it to disk and renames it. Raises BadInput for weights that cannot be written.
    """
    directory = Path(directory)
    writer = not dist.is_initialized() or dist.get_rank() == 0
    partial = directory.with_name(directory.name + ".partial")
    dtype = dtype or next(model.parameters()).dtype
    parameters, index = stored_parameters(model), {}
    shards, room = [], 0  # lists of parameter names
    for name, parameter in parameters.items():
        size = parameter.numel() * dtype.itemsize
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    if writer:
        durable.new_directory(partial)
    for i, names in enumerate(shards):
        numbered = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        file = numbered if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for name in names:
            tensor = read(name)
            if writer:
                tensors[name] = tensor.to("cpu", dtype).contiguous()
            index[name] = file
        if writer:
            write_tensors(tensors, partial / file)
    if not writer:
        return
    if adapter[0]:
        (partial / "adapter").mkdir()
        durable.write_json(partial / "adapter" / "adapter_config.json", adapter[0])
        write_tensors(adapter[1], partial / "adapter" / "adapter_model.safetensors")
    if len(shards) > 1:
        total = sum(p.numel() for p in parameters.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": index}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (partial / "config.json").write_text(json.dumps(model.config.to_dict(dtype), indent=2) + "\n")
    for name, content in (notes or {}).items():
        durable.write_json(partial / name, content)
    for name in COMPANIONS if companions_from else ():
        if (Path(companions_from) / name).exists():
            shutil.copyfile(Path(companions_from) / name, partial / name)
    durable.publish(partial, directory)


def write_tensors(tensors, path):
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what safetensors raises instead of an OSError
        raise BadInput(f"{path} cannot be written: {error}") from error


def full_tensor(parameter):
    """The whole value of a parameter, detached. An FSDP2 DTensor is gathered, so every rank must call it."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def local_part(tensor):
    """This rank's part of a DTensor; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def weight_shard(parameter):
    """-> this rank's rows of a parameter, and the index of the first. FSDP2 splits dimension 0 like
    torch.chunk, over the last dimension of its mesh."""
    if not isinstance(parameter, DTensor):
        return parameter, 0
    rank, world = parameter.device_mesh.get_local_rank(-1), parameter.device_mesh.size(-1)
    return parameter.to_local(), min(rank * -(-len(parameter) // world), len(parameter))


def weight_files(directory):
    """A checkpoint directory, sharded or not -> {tensor name: safetensors file}. Raises BadInput."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if index.exists():
        names = durable.read_object(index).get("weight_map")
        if not isinstance(names, dict):
            raise BadInput(f'{index} is not an index of safetensors: "weight_map" must be an object')
        for name, file in names.items():
            # A plain name: an index must not make us read outside of its directory.
            if not (isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file):
                what = "must be in a .safetensors file beside the index"
                raise BadInput(f"{index}: {name} {what}, not in {file!r:.60}")
        for file in sorted(set(names.values())):
            if not (directory / file).exists():
                raise BadInput(f"{directory / file} is missing, but {index.name} names it")
        return {name: directory / file for name, file in names.items()}
    if not single.exists():
        raise BadInput(f"{directory} has neither model.safetensors nor model.safetensors.index.json")
    with open_safetensors(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def open_safetensors(file):
    """-> safetensors' handle of the file. Raises BadInput."""
    check_readable(file)
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file} is not a readable safetensors file: {error}") from error


def check_readable(path):
    """Raises BadInput for what is no regular file, or may not be read."""
    try:
        limits.check(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
