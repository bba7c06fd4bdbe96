"""recipes/: every row of the paper's table parses, fits its eight GPUs by the plan, and takes a step in
small, on stand-ins in the published schemas: a checkpoint with the real shapes (and holes for weights), data
of every source."""

import itertools
import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import ROOT, names_of_runs, output_of, refusal, run_here
from safetensors.torch import load_file

from base.cli import parse
from model import Qwen3, Qwen3Config
from prompts import chat
from run import find, plan, roofline
from run.config import Config, check
from run.dry_run import PASSED, small_sizes
from run.memory_plan import GIB, Step
from saliency import select_rows

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
# recipe for one card -> GB of that card
ONE_GPU = {"4b": 80, "8b-lora": 80, "24gb-1.7b": 24, "24gb-4b-lora": 24}


SFT = ["--config", "recipes/sft.toml"]


def rl(row):
    return ["--config", "recipes/rl.toml", f"recipes/{row}.toml"]


# -------------------------------------------------------------------------------------------------- stand-ins


def write_checkpoint(directory, size):
    """A directory as Hugging Face has Qwen3-8B-Base, two shards whose tensors are holes in the files; tiny's
    tokenizer."""
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
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def verl_row(i, source, prompt, gold, **more):
    style = {"style": "rule", "ground_truth": gold}
    prompt = [{"role": "user", "content": prompt}]
    return {
        "data_source": source,
        "prompt": prompt,
        "reward_model": style,
        "extra_info": {"index": i},
        **more,
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with 8B/, 4B/, docqa.parquet, memagent.parquet and chats.parquet."""
    directory = tmp_path_factory.mktemp("recipes")
    for size in ("8B", "4B"):
        write_checkpoint(directory / size, size + "-Base")
    text = "Please read the following text.\n\n<text>\n{}\n</text>\n\nWhich?\n\n"
    text += "Format your response as follows: ..."
    golds = {
        "long_toc_choices_0_20000": "The correct answer is (B)",
        "docmath_20000_40000": "the answer is 3.5",
        "musique_0_20000": "the answer is Zürich",
        "multihoprag_0_20000": "the answer is Yes",
    }
    docqa = [
        verl_row(i, name, text.format(f"{name} {i} " * 99), golds[name])
        for i, name in enumerate([*golds] * 2)
    ]
    docqa.append(verl_row(99, "musique_0_20000", text.format("a word " * 20_000), "the answer is Oslo"))
    memagent = [
        verl_row(i, "hotpotqa", f"Who is {i}?", ["Anna"], context="Document 1:\nAnna." * (1 + i % 30))
        for i in range(1001)
    ]
    said = ["short", "long " * 400] * 9 + ["long " * 9000] + ["short"]
    chats = [
        {"messages": [{"role": "user", "content": f"{i}? " * 300}, {"role": "assistant", "content": words}]}
        for i, words in enumerate(said)
    ]
    for name, rows in (("docqa", docqa), ("memagent", memagent), ("chats", chats)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / f"{name}.parquet")
    return directory


# ------------------------------------------------------------------------------------------------------ tests


def test_there_is_a_recipe_for_every_row_and_each_value_says_where_it_is_from():
    assert {path.stem for path in (ROOT / "recipes").glob("*.toml")} == {"sft", "rl", *ROWS}
    assert {path.stem for path in (ROOT / "recipes" / "one-gpu").iterdir()} == {*ONE_GPU}
    for path in [*(ROOT / "recipes").glob("*.toml"), *(ROOT / "recipes" / "one-gpu").iterdir()]:
        lines = ["", *path.read_text().splitlines()]
        for above, line in itertools.pairwise(lines):
            assert not re.match(r"\w+ =", line) or " # " in line or above.startswith("# "), line


@pytest.mark.parametrize("row", ROWS)
def test_every_rl_recipe_is_what_its_row_says(row):
    """Parsed and checked as train.py does; test_the_plans_in_the_docs also starts it."""
    config = parse(Config, "", rl(row))
    check(config, world=8, cuda=True)
    algorithm, rule, selected = ROWS[row]
    assert (config.algorithm, config.rule) == (algorithm, rule)
    assert (config.learning_rate, config.warmup) == (1e-6, 20)
    projection = "model.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    masks = select_rows({projection: torch.rand(32, 128)}, config.fraction, config.rule, generator)
    assert (masks[f"{projection}.weight"].view(32, 128).sum(1) == selected).all()


KEEP = """
import os, runpy, shutil, sys
_, keep, *sys.argv = sys.argv
rmtree = shutil.rmtree

def kept(directory, **how):
    if os.path.basename(directory).startswith("dry-run-"):
        shutil.copytree(directory, keep)
    rmtree(directory, **how)

shutil.rmtree = kept
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def dry_run(script, files, size, directory, *flags):
    """-> what it printed, and what its temporary directory had in it before it was removed."""
    (directory / "keep.py").write_text(KEEP)
    how = directory / "kept", script, *flags, "--model", files / size, "--dry-run"
    printed = output_of(directory / "keep.py", *how, env={"PYTHONPATH": str(ROOT)})
    assert "32 query and 8 key heads of 128" in printed and printed.endswith(f"{PASSED}\n")
    assert not Path(re.search(r"dry run: .* in (/.+)\n", printed)[1]).exists()
    return printed, directory / "kept" / "run"


@pytest.mark.parametrize(
    "row, size, one_gpu, rate", [("dapo-longact", "8B", "8b-lora", 1e-5), ("grpo-longact", "4B", "4b", 1e-6)]
)
def test_a_dry_run_of_an_rl_recipe_takes_a_step(row, size, one_gpu, rate, files, tmp_path):
    flags = *rl(row), f"recipes/one-gpu/{one_gpu}.toml", "--data"
    data = [files / "docqa.parquet", files / "memagent.parquet"]
    printed, run = dry_run("train.py", files, size, tmp_path, *flags, *data)
    assert "8 of 9 rows of docqa.parquet, 1 over 28,672 tokens dropped" in printed
    assert "1,000 of 1,001 rows of memagent.parquet" in printed
    assert run.name not in names_of_runs()  # its run was in the temporary directory
    settings = json.loads((run / "config.json").read_text())
    assert (settings["algorithm"], settings["rule"]) == ROWS[row][:2]
    [metrics] = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert metrics["reward"] == 0.5 and metrics["mismatch_mean"] < 1e-4
    assert metrics["learning_rate"] == pytest.approx(rate / 20)  # the first of 20 steps of warm-up
    tensors = load_file(run / "magnitudes.safetensors").items()
    masks = {name: t for name, t in tensors if t.dtype == torch.bool}
    assert len(masks) == 4 and all((mask.view(-1, 128).sum(1) == 38).all() for mask in masks.values())


@pytest.mark.parametrize("size", ["8B", "4B"])
def test_a_dry_run_of_sft(size, files, tmp_path):
    flags = *SFT, "--data", files / "chats.parquet", "--out", files / "out"
    printed, run = dry_run("sft.py", files, size, tmp_path, *flags)
    assert "19 of 20 rows of chats.parquet, 1 over 16,384 tokens dropped" in printed
    [metrics] = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    vocabulary = 1 + max(chat.load_tokenizer(TINY, math.inf).get_vocab().values())
    assert metrics["loss"] == pytest.approx(math.log(vocabulary), rel=0.1)  # random weights know nothing
    assert metrics["tokens"] == 512 and metrics["learning_rate"] == pytest.approx(1e-5 / 50)
    assert not (files / "out").exists()


@pytest.mark.parametrize("family, heads, head_dim", [("llama", 9, 64), ("qwen2", 14, 64), ("qwen3", 16, 128)])
def test_the_small_model_of_a_dry_run_is_one_that_its_family_can_have(family, heads, head_dim):
    """The heads of SmolLM2-135M, Qwen2.5-0.5B, Qwen3-0.6B."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": head_dim}
    small = replace(Qwen3Config.preset("0.6B"), family=family, **sizes)
    small = replace(small, **small_sizes(small))
    assert small.hidden_size < 500
    assert Qwen3Config.from_dict(json.loads(json.dumps(small.to_dict()))) == small
    transformers.AutoConfig.for_model(**small.to_dict())  # checks it as vLLM will


def test_a_dry_run_refuses_what_training_would(files, tmp_path):
    flags = [*rl("dapo"), "--dry-run", "--data", files / "docqa.parquet", "--data-rows", 0]
    assert "9B is not a checkpoint" in refusal("train.py", *flags, "--model", files / "9B")
    for file in (files / "8B").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config = json.loads((files / "8B" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 12287}))
    wrong = "has shape [4096, 12288], config.json makes it [4096, 12287]"
    assert wrong in refusal("train.py", *flags, "--model", tmp_path)
    flags += ["--model", files / "8B"]
    assert "not one of 9 rows fits" in refusal("train.py", *flags, "--max-completion", 32760)
    assert "is not one of A to D" in refusal("train.py", *flags, "--reward", "rewards:choice")
    assert "nowhere.parquet cannot be read" in refusal("train.py", *flags, "--data", "nowhere.parquet")


def test_the_plans_in_the_docs_are_what_the_commands_print():
    """For every recipe, on eight GPUs; a plan passes config.check for them."""
    blocks = re.findall(
        r"```\n\$ python ((?:.*\\\n)*.*)\n([^`]*)```", (ROOT / "docs" / "recipes.md").read_text()
    )
    plans = {command: run_here(*command.replace("\\\n", "").split()) for command, _ in blocks}
    assert plans == dict(blocks) and len(plans) == 4
    for row in ROWS:
        plan = run_here("train.py", "--plan", *rl(row), "--model", "Qwen3-8B-Base", "--ranks", 8)
        assert plan in plans.values() and "stay free: yes" in plan


@pytest.mark.parametrize("name", ONE_GPU)
def test_a_recipe_for_one_gpu_fits_it_as_the_docs_say(name):
    config = parse(Config, "", [*rl("dapo-longact"), f"recipes/one-gpu/{name}.toml"])
    config.replicate = 1
    check(config, world=1, cuda=True)
    c, context = plan.model_and_context(config)
    card = roofline.card_of("", ONE_GPU[name])
    weighed = find.weigh(c, Step.of(config, 1, context), card)
    assert weighed.over <= 0
    [(_, found)] = find.ladder(c, weighed.step, card)
    assert found == weighed  # there is nothing cheaper
    held = f"{sum(weighed.lines.values()) / GIB:.1f}, {(weighed.asleep + weighed.share) / GIB:.1f}"
    spent = f"{roofline.total(weighed.training):.0f} s, {sum(weighed.sampling.values()):.0f} s"
    row = f"| `recipes/one-gpu/{name}.toml` | {card.sold} GB | {context:,} | {held} | {spent} |"
    assert row in (ROOT / "docs" / "recipes.md").read_text(), row


def test_8b_trains_every_weight_on_two_cards():
    config = parse(Config, "", [*rl("dapo-longact"), "recipes/one-gpu/4b.toml", "--model", "Qwen3-8B"])
    card = roofline.card_of("H100", None)
    weighed = find.weigh(Qwen3Config.preset("8B"), Step.of(config, 2, 32768)._replace(replicate=1), card)
    assert weighed.over <= 0


def commands(base, *variables):
    """The lines `make -n row` would run, but for those that set up .venv."""
    there = f"BASE={base}", "LONGBENCH=assets/longbench-sample.json"
    made = subprocess.run(["make", "-n", "row", *there, *variables], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    found = [
        line.partition(".venv/bin/")[2]
        for line in made.stdout.splitlines()
        if re.search(r" (sft|train|eval_\w+).py ", line)
    ]
    return [re.sub("torchrun --standalone --nproc-per-node 8 |python ", "", line).strip() for line in found]


def test_make_row_goes_from_data_to_the_comparison(files):
    """What each command misses is what an earlier one makes; to say so it must have taken its flags."""
    sft, train, after, before, compare = map(str.split, commands(files / "4B", "ROW=fraction-0.2", "SIZE=0B"))
    assert sft[-4:] == ["--out", "runs/0B-sft", "--resume", "auto"]
    assert "nowhere.parquet cannot be read" in refusal(*sft, "--data", "nowhere.parquet")
    assert train[1:4] == rl("fraction-0.2") and train[-3:] == ["0B-fraction-0.2", "--resume", "auto"]
    assert refusal(*train).startswith("runs/0B-sft/checkpoint is not a checkpoint")
    assert refusal(*after).startswith("runs/0B-fraction-0.2/checkpoint is not a checkpoint")
    assert refusal(*before).startswith("runs/0B-sft/checkpoint is not a checkpoint")
    assert (before[-1], after[-1]) == ("runs/longbench/0B-sft", "runs/longbench/0B-fraction-0.2")
    assert compare == ["eval_longbench.py", "--compare", before[-1], after[-1]]


def test_make_row_of_other_rows(files):
    sft, after, before, _ = commands(files / "8B", "ROW=sft", "SIZE=0B")
    assert sft.startswith("sft.py") and " runs/0B-sft/checkpoint " in after and f" {files}/8B " in before
    lines = commands(files / "8B", "AGAINST=dapo", "SIZE=0B")
    trained = [line.split()[3] for line in lines if line.startswith("train.py")]
    assert trained == ["recipes/dapo-longact.toml", "recipes/dapo.toml"]
    assert lines[-1] == "eval_longbench.py --compare runs/longbench/0B-dapo runs/longbench/0B-dapo-longact"
