"""Wrong inputs for test_bad_*input.py: what makes each in a directory `t`, and the command that reads it.

A maker gives a command as a list, the script first; a judge's gives its settings, too.
"""

import json
import shutil
import struct
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

TINY = ROOT / "assets" / "tiny"
NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"
PROMPT = {"prompt": "p", "answer": "a"}
QUOTES = {**PROMPT, "prompt": "<|im_end|>" * 99}  # letters, many more than 99 tokens
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
DEEP = "[" * 100_000


def write(path, content):
    """What is not text or bytes becomes JSON."""
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def model(t):
    """A copy of assets/tiny."""
    return Path(shutil.copytree(TINY, t / "model"))


def rl(*flags):
    return ["train.py", "--eval-prompts", 1, *flags]


def sft(t, *flags):
    chats = write(t / "good.jsonl", CHAT)
    return ["sft.py", "--data", chats, "--out", t / "run", *flags]


def with_file(name, content):
    """sft.py with a model whose file `name` is another, or missing (None)."""

    def make(t):
        path = model(t) / name
        path.unlink(missing_ok=True)
        if content is not None:
            write(path, content)
        return sft(t, "--model", path.parent)

    return make


def config(**changes):
    return with_file("config.json", {**json.loads((TINY / "config.json").read_text()), **changes})


def yarn(**changes):
    return config(rope_scaling={"rope_type": "yarn", "factor": 2.0, **changes})


def tensors(change, script="sft"):
    """sft.py, or studies/magnitudes.py, with a model whose tensors `change` has changed."""

    def make(t):
        path = model(t) / "model.safetensors"
        change(stored := load_file(path))
        save_file(stored, path)
        return (
            sft(t, "--model", path.parent)
            if script == "sft"
            else ["studies/magnitudes.py", path.parent, "--out", t / "run"]
        )

    return make


def set_norm(value):
    return lambda stored: stored.update({NORM: value})


def weight_map(change):
    """sft.py with an index whose weight map is what `change` makes of a good one."""

    def make(t):
        directory = model(t)
        (directory / "model.safetensors").rename(directory / "one.safetensors")
        names = change(dict.fromkeys(load_file(directory / "one.safetensors"), "one.safetensors"))
        write(directory / "model.safetensors.index.json", {"weight_map": names})
        return sft(t, "--model", directory)

    return make


def header(entries):
    """Bytes of a safetensors file with this header and no more than eight bytes after it."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


def tokenizer(change):
    def make(t):
        path = model(t) / "tokenizer.json"
        change(tokens := json.loads(path.read_text()))
        write(path, tokens)
        return rl("--model", path.parent)

    return make


def renamed(tokens):
    for token in tokens["added_tokens"]:
        token["content"] = token["content"].replace("im_end", "eot")


def emptied(tokens):
    tokens["added_tokens"], tokens["model"]["vocab"], tokens["model"]["merges"] = [], {}, []


def prompts(*lines, name="rows.jsonl"):
    """train.py with a file of these lines after a good one."""
    return lambda t: rl("--data", rows(t / name, PROMPT, *lines))


def chat(*messages):
    return lambda t: sft(t, "--data", rows(t / "rows.jsonl", CHAT, {"messages": list(messages)}))


def rows(path, *lines):
    return write(path, b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))


def said(role, content):
    return {"role": role, "content": content}


def file(name, content):
    return lambda t: rl("--data", write(t / name, content))


def table(**columns):
    def make(t):
        pyarrow.parquet.write_table(pyarrow.table(columns), t / "rows.parquet")
        return rl("--data", t / "rows.parquet")

    return make


def parquet(damage):
    """Bytes of a good Parquet file, damaged."""

    def make(t):
        pyarrow.parquet.write_table(
            pyarrow.table({"prompt": ["p"] * 999, "answer": ["a"] * 999}), t / "rows.parquet"
        )
        return rl("--data", write(t / "rows.parquet", damage((t / "rows.parquet").read_bytes())))

    return make


def toml(content):
    return lambda t: rl("--config", write(t / "c.toml", content))


def reward(code, name="score"):
    """train.py with a reward function of a module made for it."""

    def make(t):
        write(t / f"reward_{t.name}.py", code)
        return rl("--reward", f"reward_{t.name}:{name}")

    return make


def flags(*arguments):
    return lambda t: rl(*arguments)


def tiny(*arguments):
    return lambda t: ["studies/tiny.py", "--out", t / "run", *arguments]


def judged(**settings):
    """The arguments, and the environment."""
    return lambda t: (
        rl("--reward", "judge:by_source"),
        {"url": "http://127.0.0.1:9/v1", "model": "m", **settings},
    )


def with_index_of_two(t, name):
    arguments = weight_map(lambda m: {**m, name: "two.safetensors"})(t)
    save_file({"other": torch.ones(1)}, t / "model" / "two.safetensors")
    return arguments


def at(t, files, *flags):
    """sft.py in a run directory with these files."""
    for name, content in files.items():
        (t / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        write(t / "run" / name, content)
    return sft(t, *flags)


# ------------------------------------------------------------------------------------ evaluations and studies


def script(name, *usual, checkpoint=TINY):
    """-> (flags of a case) -> its maker; "{t}" in a flag is the directory of the case."""

    def case(*flags, **files):
        def make(t):
            for file, content in files.items():
                write(t / file, content)
            return [
                name,
                checkpoint,
                "--out",
                t / "out",
                *[str(flag).format(t=t) for flag in (*usual, *flags)],
            ]

        return make

    return case


def foreign(command):
    """A command whose --out is a directory with somebody's work in it."""

    def make(t):
        (t / "out").mkdir()
        write(t / "out" / "thesis.tex", "")
        return command(t)

    return make
