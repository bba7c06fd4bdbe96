"""limits.py: FIFOs and devices are refused before they are read, wherever a user can name a file; so are
directories, lines without end and values nested too deep for what is done with them later."""

import json
import os

import pytest
from conftest import check_refusal
from inputs import PROMPT, TINY, at, model, rl, rows, script, sft, write

from base import durable, limits
from base.cli import BadInput

recall = script("eval_data.py", "--samples", 2)
NO_FILE = "It is a FIFO or a device, not a regular file"


def fifo(path):
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def of_model(name):
    def make(t):
        return sft(t, "--model", fifo(model(t) / name).parent)

    return make


def compared(name):
    def make(t):
        for side in ("a", "b"):
            (t / side).mkdir()
            write(t / side / "settings.json", {"checkpoint": side})
            write(t / side / "results.jsonl", "")
        fifo(t / "a" / name)
        return ["eval_gsm8k.py", "--compare", t / "a", t / "b"]

    return make


PLACES = {
    "prompts": lambda t: rl("--data", fifo(t / "rows.jsonl")),
    "Parquet": lambda t: rl("--data", fifo(t / "rows.parquet")),
    "held-out prompts": lambda t: rl("--data", rows(t / "d", PROMPT), "--eval-data", fifo(t / "e")),
    "a device": lambda t: rl("--data", "/dev/zero"),
    "a terminal": lambda t: rl("--config", "/dev/tty"),
    "chats": lambda t: ["sft.py", "--data", fifo(t / "rows.jsonl"), "--out", t / "run"],
    "TOML": lambda t: rl("--config", fifo(t / "c.toml")),
    "config.json": of_model("config.json"),
    "tokenizer.json": of_model("tokenizer.json"),
    "generation_config.json": of_model("generation_config.json"),
    "chat_template.jinja": of_model("chat_template.jinja"),
    "weights": of_model("model.safetensors"),
    "index": of_model("model.safetensors.index.json"),
    "a clamp": lambda t: recall("--clamp", fifo(t / "clamp"))(t),
    "LongBench": lambda t: ["eval_longbench.py", TINY, "--data", fifo(t / "d"), "--max-input", 9],
    "GSM8K": lambda t: ["eval_gsm8k.py", TINY, "--data", fifo(t / "d")],
    "results": compared("results.jsonl"),
    "settings": compared("settings.json"),
    "metrics": lambda t: (
        at(t, {"config.json": "{}"}) and fifo(t / "run" / "metrics.jsonl") and ["base/plot.py", t / "run"]
    ),
    "magnitudes": lambda t: (
        at(t, {"metrics.jsonl": '{"step": 1, "reward": 0}\n'})
        and fifo(t / "run" / "magnitudes.safetensors")
        and ["base/plot.py", t / "run"]
    ),
}


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
def test_what_is_no_file_is_refused_before_it_is_read(make, tmp_path):
    check_refusal(make(tmp_path), f"{NO_FILE}|No such device", tmp_path, longest=700, but=(".png",))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "merges.txt"])
def test_a_directory_is_no_file(name, tmp_path):
    path = model(tmp_path) / name
    path.unlink(missing_ok=True)
    path.mkdir()
    check_refusal(sft(tmp_path, "--model", path.parent), "Is a directory", tmp_path, longest=700)


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


@pytest.mark.parametrize("line, message", [
    (json.dumps({**PROMPT, "id": nested(900)}), "is not JSON: it is nested more than 100 deep"),
    (json.dumps({**PROMPT, "prompt": "p" * 2**24}), "has more than 16,777,216 bytes"),
])  # fmt: skip
def test_rows_have_limits(line, message, tmp_path):
    check_refusal(rl("--data", write(tmp_path / "d", line)), f"d, line 1 {message}", tmp_path, longest=300)


def test_values_as_deep_as_allowed_can_be_copied(tmp_path):
    value = limits.parse_json(json.dumps(nested(limits.DEEPEST)))
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        limits.parse_json(json.dumps([value]))
    [(_, _, row)] = durable.json_lines(write(tmp_path / "d", value))
    assert row == value


def test_a_file_without_end_is_not_read_as_a_whole(tmp_path):
    """A hole of a terabyte, which takes no room on the disk."""
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="It has 1,099,511,627,776 bytes, and may have 268,435,456"):
        limits.read_text(tmp_path / "config.json")
    with pytest.raises(BadInput, match="config.json, line 1 has more than 16,777,216 bytes"):
        durable.json_lines(tmp_path / "config.json")


CONFIG = {
    "torch_dtype": ["float33", 5, ["float32"]],
    "sliding_window": ["4096", [1]],
    "layer_types": [["full_attention"]],
    "id2label": [{"a": "b"}, [1]],
    "attention_dropout": ["0.1", None],
    "max_position_embeddings": [2**31],
    "use_cache": ["yes"],
    "num_labels": [{"a": 1}],
    "intermediate_size": [10**400],  # no float holds it
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in CONFIG.items() for value in values])
def test_what_others_would_fail_at_in_config_json(key, value, tmp_path):
    config = {**json.loads((TINY / "config.json").read_text()), key: value}
    write(model(tmp_path) / "config.json", config)
    check_refusal(sft(tmp_path, "--model", tmp_path / "model"), f"config.json: {key} ", tmp_path, longest=300)


def test_yarn_makes_no_table_that_no_memory_holds(tmp_path):
    check_refusal(
        ["eval_ruler.py", TINY, "--yarn", 10**6, "--out", tmp_path / "o"],
        "YaRN makes a context of 4,096,000,000 tokens; 16,777,216 are the most",
        tmp_path,
        longest=300,
    )
