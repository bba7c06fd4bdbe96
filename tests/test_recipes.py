"""recipes/: every row of the paper's table parses, fits its eight GPUs by the plan, and takes a step in small, on stand-ins
in the published schemas: a checkpoint with the real shapes (and holes for weights), data of every source."""

import json
import re
import shlex
import subprocess
import tomllib

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, refusal, run_here
from safetensors.torch import load_file

import config as train_config
from cli import parse
from model import Qwen3, Qwen3Config

TINY = ROOT / "assets" / "tiny"
# row of the table -> algorithm, rule, selected of a head's 128 dimensions
ROWS = {
    "dapo": ("dapo", "all", 128),
    "dapo-longact": ("dapo", "top", 38),
    "grpo-longact": ("grpo", "top", 38),
    "random": ("dapo", "random", 38),
    "bottom": ("dapo", "bottom", 38),
    "fraction-0.2": ("dapo", "top", 25),
    "fraction-0.4": ("dapo", "top", 51),
}


def configs(row):
    return ["--config", "recipes/rl.toml", f"recipes/{row}.toml"]


# ---------------------------------------------------------------------------------------------------------- stand-ins


def write_checkpoint(directory, size):
    """A directory as Hugging Face has Qwen3-8B-Base, in two shards, whose tensors are holes in the files; tiny's tokenizer."""
    config = Qwen3Config.preset(size)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_dict(torch.bfloat16)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((TINY / name).read_bytes())
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in Qwen3(config).named_parameters()}
    weight_map = {name: f"model-{1 + ('layers.2' in name):05}-of-00002.safetensors" for name in shapes}
    for file in set(weight_map.values()):
        header, end = {}, 0
        for name in (name for name in shapes if weight_map[name] == file):
            start, end = end, end + 2 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with open(directory / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def verl_row(i, source, prompt, gold, **more):
    style = {"style": "rule", "ground_truth": gold}
    prompt = [{"role": "user", "content": prompt}]
    return {"data_source": source, "prompt": prompt, "reward_model": style, "extra_info": {"index": i}, **more}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with 8B/, 4B/, docqa.parquet, memagent.parquet and chats.parquet."""
    directory = tmp_path_factory.mktemp("recipes")
    for size in ("8B", "4B"):
        write_checkpoint(directory / size, size + "-Base")
    text = "Please read the following text.\n\n<text>\n{}\n</text>\n\nWhich?\n\nFormat your response as follows: ..."
    golds = {
        "long_toc_choices_0_20000": "The correct answer is (B)",
        "docmath_20000_40000": "the answer is 3.5",
        "musique_0_20000": "the answer is Zürich",
        "multihoprag_0_20000": "the answer is Yes",
    }
    docqa = [verl_row(i, name, text.format(f"{name} {i} " * 99), golds[name]) for i, name in enumerate([*golds] * 2)]
    docqa.append(verl_row(99, "musique_0_20000", text.format("a word " * 20_000), "the answer is Oslo"))
    memagent = [
        verl_row(i, "hotpotqa", f"Who is {i}?", ["Anna"], context="Document 1:\nAnna." * (1 + i % 30)) for i in range(1001)
    ]
    said = ("short", "long " * 400)
    chats = [
        {"messages": [{"role": "user", "content": f"{i}? " * 300}, {"role": "assistant", "content": said[i % 2]}]}
        for i in range(20)
    ]
    for name, rows in (("docqa", docqa), ("memagent", memagent), ("chats", chats)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / f"{name}.parquet")
    return directory


# -------------------------------------------------------------------------------------------------------------- tests


def test_there_is_a_recipe_for_every_row():
    assert {path.stem for path in (ROOT / "recipes").iterdir()} == {"sft", "rl", *ROWS}


@pytest.mark.parametrize("size", ["8B", "4B"])
@pytest.mark.parametrize("row", ROWS)
def test_a_dry_run_of_every_recipe_does_what_the_row_says(row, size, files):
    data = [files / "docqa.parquet", files / "memagent.parquet"]
    printed = run_here("train.py", *configs(row), "--model", files / size, "--data", *data, "--dry-run")
    assert "8 of 9 rows of docqa.parquet, 1 over 28,672 tokens dropped" in printed
    assert "1,000 of 1,001 rows of memagent.parquet" in printed
    assert "32 query and 8 key heads of 128" in printed and "dry run: passed" in printed
    run = ROOT / re.search("run directory: (.+)", printed)[1]
    assert not run.is_relative_to(ROOT)
    settings = json.loads((run / "config.json").read_text())
    algorithm, rule, selected = ROWS[row]
    assert (settings["algorithm"], settings["rule"]) == (algorithm, rule)
    [metrics] = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert metrics["reward"] == 0.5 and metrics["mismatch_mean"] < 1e-4 and metrics["learning_rate"] == 1e-6 / 20
    masks = {k: v for k, v in load_file(run / "magnitudes.safetensors").items() if v.dtype == torch.bool}
    assert masks and all((mask.view(-1, 128).sum(1) == selected).all() for mask in masks.values())
