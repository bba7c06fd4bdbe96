"""Any step of a run as a Hugging Face directory, which transformers, vLLM and the evaluations load.

    python -m run.export runs/NAME/checkpoints/step-000040 runs/NAME/step-40

The checkpoint's files are verified first. Tensors are read one at a time, so it takes the memory of one
safetensors file, at most 5 GB. The model's config.json, tokenizer and generation settings come from the
checkpoint directory that the run began with, which its config.json names. Of a run with --lora its weights
come from there, too: the step has the update alone, which is added, and is in OUT/adapter as PEFT's.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed.checkpoint as dcp

from base import durable
from base.cli import BadInput, one_line_errors, option, parse
from core import lora
from core.checkpoint import check_weights, generation_config, open_safetensors
from model import Qwen3, Qwen3Config
from prompts import chat
from run import resume

MODEL = "contents of --model"  # the key of resume.contents


@dataclass
class Config:
    checkpoint: str = option("", "checkpoints/step-N of a run of train.py or sft.py", positional=True)
    out: str = option("", "directory to make", positional=True)
    model: str = option("", "what the run began with, if it lies elsewhere now (default: its --model)")
    dtype: str = option("", "of the weights (default: the run's)", ["", "float32", "bfloat16"])


def export(config):
    """Write config.out. Raises BadInput for what is not a whole checkpoint, or not one of the model, and for
    an `out` that exists."""
    path, out = Path(config.checkpoint), Path(config.out)
    if not config.checkpoint or not config.out:
        raise BadInput("give a checkpoint, runs/NAME/checkpoints/step-N, and a directory to make")
    if not (path / "manifest.json").exists():
        raise BadInput(f"{path} is no checkpoint of a run: it has no manifest.json")
    if out.exists():
        raise BadInput(f"{out} exists; choose another directory, or remove it")
    if problem := resume.damage(path):
        raise BadInput(problem)
    settings = path.parent.parent / "config.json"  # of the run
    run = durable.read_object(settings) if settings.exists() else {}
    source = config.model or run.get("model", "")
    if not source or not Path(source).is_dir():
        raise BadInput(f"{path}: the model that the run began with, {source!r}, is not there; give --model")
    model_config = Qwen3Config.from_pretrained(source)
    settings = resume.checked_state(path)["settings"]
    low_rank = lora.of_config(SimpleNamespace(**{"lora": 0, **settings}))
    if low_rank and settings[MODEL] != resume.contents(SimpleNamespace(model=source, data=[]))[MODEL]:
        raise BadInput(f"{path}: the {MODEL} are not what the run began with; give that by --model")
    model = Qwen3.empty(model_config, device="meta", low_rank=low_rank)
    trained_in = "bfloat16" if str(run.get("device", "")).startswith("cuda") else "float32"
    read = reader(path, model, source, getattr(torch, trained_in))
    model.save_pretrained(out, getattr(torch, config.dtype or trained_in), source, read=read)
    if "schedule" in run:  # sft.py's, whose model ends its turn whatever the base model stops at
        tokenizer = chat.load_tokenizer(source, model_config.vocab_size)
        generation = {**generation_config(source), "eos_token_id": chat.stop_ids(tokenizer)}
        durable.write_json(out / "generation_config.json", generation)


def reader(path, model, source, dtype):
    """-> read(name): one parameter of the checkpoint, as it was trained, in fp32; one that was frozen, from
    the model directory `source`, in `dtype`. Raises BadInput if the weights are not the model's; read does
    for values that are not finite."""
    storage = dcp.HuggingFaceStorageReader(path)
    stored, frozen = storage.read_metadata().state_dict_metadata, {}
    if model.low_rank:
        frozen = check_weights(model, source)  # {name: file}
    for name, parameter in model.named_parameters():
        there = f"weight {name}" in stored and stored[f"weight {name}"].size == parameter.shape
        if name not in frozen and not there:
            raise BadInput(f"{path} is of another model: {name} differs; give --model")

    def read(name):
        if name in frozen:
            with open_safetensors(frozen[name]) as tensors:
                return tensors.get_tensor(name).to(dtype)
        entry = stored[f"weight {name}"]
        tensors = {f"weight {name}": torch.empty(entry.size, dtype=entry.properties.dtype)}
        dcp.load(tensors, storage_reader=storage, no_dist=True)
        [tensor] = tensors.values()
        if not tensor.isfinite().all():
            raise BadInput(f"{path}: {name} has values that are not finite")
        return tensor

    return read


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    export(config)
    print(config.out)
