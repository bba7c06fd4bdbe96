"""Inputs of bench/hostile.py: what users write. Each table of TABLES yields Cases, always the same.

A case's `make` writes what it needs into an empty directory t, where the program runs, and returns the words
of its command, the script first. A dictionary before the script says how it runs (hostile.enter): as another
user, with limits, with other variables.
"""

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny"
SAMPLE = ROOT / "assets" / "longbench-sample.json"


@dataclass
class Case:
    kind: str
    name: str
    make: Callable
    own: bool = False  # the user's own code fails, and its traceback may be shown before the line

    def __post_init__(self):
        self.name = self.name.encode(errors="backslashreplace").decode()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


def directory(path):
    path.mkdir(parents=True)
    return path


PROMPT = {"prompt": "What is it?", "answer": "a"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
QUESTION = {"question": "How many?", "answer": "#### 3"}


def nested(depth, text="[]"):
    return text[0] * depth + text[1] * depth


def sft(t, *more, model=TINY):
    usual = ["--data", write(t / "chats", CHAT), "--model", model, "--out", t / "run", "--steps", 1]
    return ["sft.py", *usual, *more]


def rl(t, *more):
    """Up to the engine: a run of that name exists."""
    write(t / "runs" / "used" / "metrics.jsonl", "{}")
    return ["train.py", "--model", TINY, "--eval-prompts", 1, "--name", "used", *more]


def of_ruler(cache, out):
    return ["--lengths", 640, "--tasks", "vt", "--samples", 1, "--cache", cache, "--out", out]


def foreign(t):
    write(t / "out" / "thesis.tex", "")
    return t / "out"


# ------------------------------------------------------------------------------------------------------ flags

ODD = {
    "int": [
        "",
        "x",
        "1.5",
        "1e9",
        "-1",
        "0",
        "2147483648",
        "9" * 5000,
        "1000000000",
        "0x10",
        "٣",
        "nan",
        "--",
    ],
    "float": ["", "x", "nan", "inf", "-inf", "1e300", "-1e300", "1e-320", "-0.0", "1e9", "0x1p3", "9" * 400],
    "str": [
        "",
        "\udcff",
        "a\nb",
        "\x1b[31m",
        "x" * 5000,
        "/dev/zero",
        "..",
        "/",
        "~root",
        "{}",
        "%s%n",
        "\u202e",
        "-",
    ],
    "bool": ["1", "false"],
}
SMALL = "--copy-until 99 --steps 1 --batch 2 --vocab-size 600 --hidden-size 16".split()  # a tiny tiny.py
# Each program: what has its options, and arguments with which it ends early.
PROGRAMS = {
    "train.py": (["run/config.py"], lambda t: ["--plan", "--model", TINY]),
    "sft.py": (
        ["run/config.py", "sft.py"],
        lambda t: ["--plan", "--data", write(t / "c", CHAT), "--model", TINY],
    ),
    "eval_data.py": (
        ["evals/subject.py", "eval_data.py"],
        lambda t: [TINY, "--samples", 2, "--out", foreign(t)],
    ),
    "eval_gsm8k.py": (
        ["evals/subject.py", "eval_gsm8k.py"],
        lambda t: [TINY, "--data", write(t / "d", QUESTION), "--out", foreign(t)],
    ),
    "eval_longbench.py": (
        ["evals/subject.py", "eval_longbench.py"],
        lambda t: [TINY, "--data", SAMPLE, "--max-input", 500, "--out", foreign(t)],
    ),
    "eval_ruler.py": (
        ["evals/subject.py", "eval_ruler.py"],
        lambda t: [TINY, *of_ruler(t / "c", foreign(t))],
    ),
    "studies/magnitudes.py": (["studies/magnitudes.py"], lambda t: [TINY, "--out", write(t / "f", "")]),
    "studies/perturb.py": (
        ["studies/magnitudes.py", "studies/perturb.py"],
        lambda t: [TINY, "--out", foreign(t)],
    ),
    "studies/ablation.py": (["studies/ablation.py"], lambda t: ["report", "--out", t / "out"]),
    "studies/tiny.py": (["studies/tiny.py"], lambda t: [*SMALL, "--out", foreign(t)]),
    "prompts/inspect.py": (["prompts/inspect.py"], lambda t: [write(t / "d", PROMPT), "--model", TINY]),
}
OPTION = re.compile(r"^    (\w+): (?:list\[)?(\w+)\]? = option\(", re.M)


def with_word(script, usual, word, t):
    return [script, *usual(t), word]


def flags():
    rng = random.Random(0)
    for script, (sources, usual) in PROGRAMS.items():
        found = {name: kind for path in sources for name, kind in OPTION.findall((ROOT / path).read_text())}
        for name, kind in found.items():
            flag = "--" + name.replace("_", "-")
            for value in rng.sample(ODD[kind], 1):
                given = partial(with_word, script, usual, f"{flag}={value}")
                yield Case("flags", f"{script} {flag}={value:.40}", given)
        for words in rng.sample(
            ["-h x", "--", "---", "-1", "--=1", "--help=1", "\udcff --x", "--config", "--config /", "@x"], 4
        ):
            yield Case("flags", f"{script} {words}", lambda t, s=script, w=words: [s, *w.split(" ")])


# ------------------------------------------------------------------------------------------------- TOML, rows

TOML = {
    "dotted": "run.steps = 3",
    "array of tables": "[[steps]]\na = 1",
    "twice": "steps = 1\nsteps = 2",
    "a date": "steps = 2020-01-01",
    "inline table": "steps = {a = 1}",
    "hexadecimal": "steps = 0xffffffffffff",
    "negative zero": "learning_rate = -0.0",
    "infinite": "learning_rate = inf",
    "minus nan": "temperature = -nan",
    "a huge list": f"data_rows = [{'1,' * 100_000}]",
    "deep list": f"data = {nested(900)}",
    "deep table": "steps = " + "{a=" * 400 + "1" + "}" * 400,
    "deep key": "a." * 5000 + "b = 1",
    "quoted key": '"" = 1',
    "a key of controls": '"\\u001b[2J" = 1',
    "escaped surrogate": 'name = "\\ud800"',
    "line ends in a name": 'name = "a\\nb"',
    "zero byte": 'name = "a\\u0000"',
    "byte order mark": b"\xef\xbb\xbfsteps = 3",
    "UTF-16": "steps = 3".encode("utf-16"),
    "Windows lines": b"steps = 3\r\nplan = true\r\n",
    "old Mac lines": b"steps = 3\rplan = true\r",
    "JSON": '{"steps": 3}',
    "YAML": "steps: 3",
    "binary": bytes(range(256)),
    "only zeros": bytes(9999),
    "boolean for text": "name = true",
    "float for seed": "seed = 1e3",
    "list for one": "steps = [3]",
    "empty text": 'rule = ""',
    "choice in capitals": 'rule = "TOP"',
    "a long text": f'model = "{"m" * 10**6}"',
    "a long key": f"{'k' * 10**6} = 1",
    "config in config": 'config = "c.toml"',
    "help": "help = true",
    "checkpoint": 'plan = true\nmodel = "/dev/stdin"',
}  # fmt: skip


def toml():
    for name, content in TOML.items():
        yield Case(
            "TOML",
            name,
            lambda t, c=content: ["train.py", "--plan", "--model", TINY, "--config", write(t / "c", c)],
        )
    for script in PROGRAMS:
        yield Case(
            "TOML", f"{script} of another", lambda t, s=script: [s, "--config", write(t / "c", "nothing = 1")]
        )


ROWS = {
    "numbers for keys": '{1: "a"}',
    "single quotes": "{'prompt': 'p'}",
    "comments": '// a\n{"prompt": "p", "answer": "a"}',
    "trailing comma": '{"prompt": "p", "answer": "a",}',
    "a list file": json.dumps([PROMPT, PROMPT]),
    "two on a line": json.dumps(PROMPT) * 2,
    "nan": '{"prompt": "p", "answer": "a", "x": NaN}',
    "infinity": '{"prompt": "p", "answer": "a", "x": -Infinity}',
    "huge integer": '{"prompt": "p", "answer": "a", "x": 1' + "0" * 4000 + "}",
    "huge float": '{"prompt": "p", "answer": "a", "x": 1e999}',
    "key twice": '{"prompt": "p", "prompt": "q", "answer": "a"}',
    "prompt empty": {**PROMPT, "prompt": ""},
    "prompt white": {**PROMPT, "prompt": " \n\t"},
    "prompt of zeros": {**PROMPT, "prompt": "\0" * 99},
    "prompt of controls": {**PROMPT, "prompt": "".join(map(chr, range(32)))},
    "prompt of marks": {**PROMPT, "prompt": "<|im_start|>system\nx<|im_end|>" * 9},
    "prompt of accents": {**PROMPT, "prompt": "e" + "\u0301" * 9999},
    "right to left": {**PROMPT, "prompt": "\u202e\u2066abc"},
    "private use": {**PROMPT, "prompt": "\U0010ffff\ue000"},
    "half surrogate in answer": '{"prompt": "p", "answer": "\\udfff"}',
    "half surrogate in a key": '{"prompt": "p", "answer": "a", "\\ud800": 1}',
    "deep 99": '{"prompt": "p", "answer": "a", "x": ' + nested(99) + "}",
    "deep 600": '{"prompt": "p", "answer": "a", "x": ' + nested(600) + "}",
    "deep 950 objects": '{"prompt": "p", "answer": "a", "x": ' + '{"a":' * 950 + "1" + "}" * 951,
    "wide": {**PROMPT, **{f"k{i}": i for i in range(50_000)}},
    "answer empty": {**PROMPT, "answer": ""},
    "answers of answers": {**PROMPT, "answer": [["a"]]},
    "answer true": {**PROMPT, "answer": True},
    "id true": {**PROMPT, "id": True},
    "id a float": {**PROMPT, "id": 1.5},
    "id long": {**PROMPT, "id": "i" * 10**6},
    "id of lines": {**PROMPT, "id": "a\nb\x1b[2J"},
    "verl without truth": {**PROMPT, "reward_model": {}},
    "verl's truth a number": {**PROMPT, "reward_model": {"ground_truth": 3}},
    "reward_model a list": {**PROMPT, "reward_model": [1]},
    "context a list": {**PROMPT, "reward_model": {"ground_truth": "a"}, "context": [1]},
    "context and braces": {**PROMPT, "reward_model": {"ground_truth": "a"}, "context": "{question} {x} {{"},
    "messages and prompt": {**PROMPT, **CHAT},
    "messages null": {"messages": None},
    "messages an object": {"messages": {"role": "user"}},
    "role assistant first": {"messages": [{"role": "assistant", "content": "a"}]},
    "role system only": {"messages": [{"role": "system", "content": "a"}]},
    "many turns": {"messages": CHAT["messages"] * 2000},
    "content of thoughts": {"messages": [{"role": "assistant", "content": "</think>" * 999}]},
    "extra keys in messages": {"messages": [{**m, "tool_calls": [1], "name": 3} for m in CHAT["messages"]]},
    "UTF-16": json.dumps(PROMPT).encode("utf-16"),
    "UTF-32": json.dumps(PROMPT).encode("utf-32"),
    "compressed": b"\x1f\x8b\x08\0" + bytes(99),
    "a Parquet file by another name": b"PAR1" + bytes(99) + b"PAR1",
    "a line of 17 million": {**PROMPT, "prompt": "p" * 17_000_000},
    "a million empty lines": b"\n" * 10**6 + json.dumps(PROMPT).encode(),
    "a long word": {**PROMPT, "prompt": "x" * 300_000},
    "an emoji family": {**PROMPT, "prompt": "👨‍👩‍👧‍👦" * 999},
    "null": "null",
    "a number": "3",
    "text": '"prompt"',
    "HTML": "<!DOCTYPE html><title>404</title>",
    "git-LFS": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "carriage returns": json.dumps(PROMPT) + "\r" + json.dumps(PROMPT),
    "vertical tabs": json.dumps(PROMPT) + "\v" + json.dumps(PROMPT),
}  # fmt: skip


def rows():
    for name, content in ROWS.items():
        yield Case(
            "rows",
            f"inspect {name}",
            lambda t, c=content: ["prompts/inspect.py", write(t / "d", c), "--model", TINY],
        )
        yield Case("rows", f"train {name}", lambda t, c=content: rl(t, "--data", write(t / "d", c)))


def chats():
    for name, content in ROWS.items():
        yield Case(
            "chats",
            name,
            lambda t, c=content: [
                "sft.py",
                "--data",
                write(t / "d", c),
                "--model",
                TINY,
                "--out",
                t / "r",
                "--steps",
                1,
                "--batch",
                1,
            ],
        )
    for name in (
        "rewards:numeric",
        "rewards:choice",
        "rewards:boxed",
        "rewards:by_source",
        "rewards:published",
        "rewards:",
        ":exact",
        "os:system",
        "os:getpid",
        "builtins:float",
        "a.b.c:d",
        "..:x",
        "rewards:exact:x",
        "json:loads",
        "sys:exit",
        "prompts.rewards:score",
    ):
        yield Case(
            "chats",
            f"reward {name}",
            lambda t, n=name: rl(t, "--data", write(t / "d", PROMPT), "--reward", n),
            own=True,
        )


# ------------------------------------------------------------------------------------------------ checkpoints

VALUES = [None, "", "x", -1, 0, 1.5, 2**31, 10**400, True, [], [1], {}, {"a": 1}, "\ud800", float("inf")]


def split_at(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def model(t):
    return Path(shutil.copytree(TINY, t / "model"))


def checkpoints():
    """Odd values in config.json, and files of it that are another's; read by a plan, by sft.py, by vLLM."""
    rng, known = random.Random(1), json.loads((TINY / "config.json").read_text())
    more = (
        "layer_types dtype sliding_window max_window_layers id2label label2id attention_dropout use_cache "
        "rope_parameters pad_token_id quantization_config auto_map use_sliding_window num_labels "
        "tokenizer_class transformers_version _name_or_path problem_type is_decoder tie_encoder_decoder "
        "return_dict output_attentions chunk_size_feed_forward text_config torchscript"
    ).split()
    for key in [*known, *more]:
        for value in rng.sample(VALUES, 3):

            def make(t, key=key, value=value):
                write(model(t) / "config.json", {**known, key: value})
                return rl(t, "--model", t / "model")

            yield Case("checkpoints", f"sft {key} {value!r:.30}", make)
        if key in more:

            def make(t, key=key, value=value):
                write(model(t) / "config.json", {**known, key: value})
                return ["eval_data.py", t / "model", "--samples", 1, "--out", t / "out"]

            yield Case("checkpoints", f"vLLM {key} {value!r:.30}", make)
    files = (
        "config.json tokenizer.json generation_config.json tokenizer_config.json chat_template.jinja "
        "model.safetensors model.safetensors.index.json"
    ).split()
    contents = {
        "nothing": b"",
        "zeros": bytes(99),
        "null": b"null",
        "deep": nested(900).encode(),
        "bytes": bytes(range(256)),
        "a list": b"[]",
        "an object": b"{}",
    }
    for file in files:
        for name, content in contents.items():

            def make(t, file=file, content=content):
                write(model(t) / file, content)
                if file in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
                    return ["eval_data.py", t / "model", "--samples", 1, "--out", t / "out"]
                return rl(t, "--model", t / "model")

            yield Case("checkpoints", f"{file} of {name}", make)
    changes = {
        "normalizer unknown": lambda k: k.update(normalizer={"type": "Magic"}),
        "no decoder": lambda k: k.update(decoder=None),
        "no pre-tokenizer": lambda k: k.update(pre_tokenizer=None),
        "ids far apart": lambda k: k["model"]["vocab"].update({"zzz": 2**31}),
        "an id below 0": lambda k: k["model"]["vocab"].update({"zzz": -1}),
        "an id twice": lambda k: k["model"]["vocab"].update({"zzz": 5}),
        "merges of nothing": lambda k: k["model"].update(merges=[["\u2603", "\u2604"]]),
        "added tokens a number": lambda k: k.update(added_tokens=3),
        "stop and start the same": lambda k: [
            a.update(id=k["added_tokens"][0]["id"]) for a in k["added_tokens"]
        ],
        "another model": lambda k: k["model"].update(type="WordPiece"),
        "dropout": lambda k: k["model"].update(dropout=0.9),
        "a regex that is slow": lambda k: k.update(pre_tokenizer=split_at("(a+)+$")),
        "a regex that is wrong": lambda k: k.update(pre_tokenizer=split_at("((")),
        "template processor": lambda k: k.update(
            post_processor={"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
        ),
        "version": lambda k: k.update(version="99"),
    }
    for name, change in changes.items():

        def make(t, change=change):
            path = model(t) / "tokenizer.json"
            change(stored := json.loads(path.read_text()))
            write(path, stored)
            return rl(t, "--model", t / "model")

        yield Case("checkpoints", f"tokenizer: {name}", make)


def header(entries, size=8):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def weights():
    """Safetensors of odd headers, as weights, as a clamp, as magnitudes of a run."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    odd = {
        "no tensors": header({}),
        "only metadata": header({"__metadata__": {"about": "{}"}}),
        "metadata of numbers": header({"__metadata__": {"a": 1}, "a": entry}),
        "shape below 0": header({"a": {**entry, "shape": [-2]}}),
        "shape of 2^63": header({"a": {**entry, "shape": [2**63]}}),
        "shape of zeros": header({"a": {**entry, "shape": [0], "data_offsets": [0, 0]}}, 0),
        "a scalar": header({"a": {**entry, "shape": [], "data_offsets": [0, 4]}}, 4),
        "offsets backwards": header({"a": {**entry, "data_offsets": [8, 0]}}),
        "offsets beyond": header({"a": {**entry, "data_offsets": [0, 2**40]}}),
        "dtype unknown": header({"a": {**entry, "dtype": "F3"}}),
        "name empty": header({"": entry}),
        "name long": header({"n" * 10**6: entry}),
        "name of lines": header({"a\nb\x1b[2J": entry}),
        "a header of 2^60": struct.pack("<Q", 2**60) + bytes(99),
        "a header of half": header({"a": entry})[:20],
        "a hole": header({"a": entry, "b": {**entry, "data_offsets": [100, 108]}}, 108),
        "more at the end": header({"a": entry}, 999),
    }
    for name, content in odd.items():

        def of_model(t, content=content):
            write(model(t) / "model.safetensors", content)
            return sft(t, model=t / "model")

        def of_run(t, content=content):
            write(t / "run" / "metrics.jsonl", {"step": 1, "reward": 0.5})
            write(t / "run" / "magnitudes.safetensors", content)
            return ["base/plot.py", t / "run"]

        yield Case("weights", f"model, {name}", of_model)
        yield Case("weights", f"magnitudes, {name}", of_run)
        yield Case(
            "weights",
            f"clamp, {name}",
            lambda t, c=content: ["eval_data.py", TINY, "--clamp", write(t / "c", c), "--out", foreign(t)],
        )


TABLES = flags, toml, rows, chats, checkpoints, weights
