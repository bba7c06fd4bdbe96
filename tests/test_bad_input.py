"""What training reads and what may be wrong with it: one clear line for each, before anything is written.

A case is a script's arguments, made in a directory of its own, and what its line must say. It runs in this
process up to the BadInput; vLLM is not imported before it. What scripts of evaluation refuse is beside the
tests of what they do.
"""

import re
import subprocess
import sys

import pyarrow
import pytest
import torch
from conftest import check_refusal, files_in, refusal, run_script
from inputs import (
    CHAT,
    DEEP,
    DOWN,
    NORM,
    PROMPT,
    QUOTES,
    TINY,
    at,
    chat,
    config,
    emptied,
    file,
    flags,
    header,
    judged,
    model,
    parquet,
    prompts,
    renamed,
    reward,
    rl,
    rows,
    said,
    set_norm,
    sft,
    table,
    tensors,
    tiny,
    tokenizer,
    toml,
    weight_map,
    with_file,
    with_index_of_two,
    write,
    yarn,
)
from tokenizers import Tokenizer

from prompts import chat as chat_format
from prompts import judge

# -------------------------------------------------------------------------------------------------- the table

CONFIG = {
    "missing": (with_file("config.json", None), "model is not a checkpoint: it has no config.json"),
    "name too long": (lambda t: sft(t, "--model", "m" * 300), "is not a checkpoint"),
    "no JSON": (with_file("config.json", '{"hidden'), "config.json cannot be read: Unterminated string"),
    "bad UTF-8": (with_file("config.json", b'{"a": "\xff"}'), "config.json cannot be read: 'utf-8' codec"),
    "empty": (with_file("config.json", ""), "config.json cannot be read: Expecting value"),
    "nested deep": (with_file("config.json", DEEP), "config.json cannot be read: maximum recursion"),
    "a list": (with_file("config.json", []), "config.json cannot be used: it is not a JSON object"),
    "another architecture": (config(model_type="mamba"), "'mamba' is not supported"),
    "other layers": (config(num_hidden_layers=9), "lacks tensor model.layers.3"),
    "architecture of a wrong type": (
        config(model_type=["qwen3"]),
        r"model_type \['qwen3'\] is not supported",
    ),
    "size as text": (
        config(hidden_size="128"),
        "hidden_size must be an integer from 1 to 1,048,576, not '128'",
    ),
    "size as float": (config(hidden_size=128.0), "hidden_size must be an integer .* not 128.0"),
    "size as truth": (config(num_attention_heads=True), "num_attention_heads must be an integer .* not True"),
    "size null": (config(vocab_size=None), "vocab_size must be an integer .* not None"),
    "negative": (config(intermediate_size=-384), "intermediate_size must be an integer .* not -384"),
    "zero key heads": (config(num_key_value_heads=0), "num_key_value_heads must be an integer"),
    "enormous": (config(hidden_size=10**30), "hidden_size must be an integer .* not 10000"),
    "a billion layers": (
        config(num_hidden_layers=10**9),
        "num_hidden_layers must be an integer from 1 to 1,024",
    ),
    "not a number": (config(rms_norm_eps=float("nan")), "rms_norm_eps must be a number from 0 to 1, not nan"),
    "odd head": (config(head_dim=31), "head_dim must be even"),
    "no context": (config(max_position_embeddings=0), "max_position_embeddings must be an integer"),
    "tie as text": (
        config(tie_word_embeddings="false"),
        "tie_word_embeddings must be true or false, not 'false'",
    ),
    "stop token as text": (config(eos_token_id="<|im_end|>"), "eos_token_id must be a token id"),
    "layer types no list": (config(layer_types=3), "layer_types is 3, not an object or list"),
    "rope no object": (config(rope_scaling="yarn"), "rope_scaling is 'yarn', not an object"),
    "rope unknown": (
        config(rope_scaling={"rope_type": "dynamic", "factor": 2}),
        "RoPE type 'dynamic' is not supported",
    ),
    "rope of a wrong type": (
        config(rope_scaling={"rope_type": ["yarn"]}),
        r"RoPE type \['yarn'\] is not supported",
    ),
    "rope base 1": (config(rope_theta=1), "rope_theta must be a number from"),
    "rope base as text": (config(rope_theta="1e6"), "rope_theta must be a number .* not '1e6'"),
    "YaRN without factor": (config(rope_scaling={"rope_type": "yarn"}), "RoPE of type yarn needs factor"),
    "YaRN factor as text": (yarn(factor="4"), "factor must be a number from 1 to 1,000,000.0, not '4'"),
    "YaRN factor below 1": (yarn(factor=0.5), "factor must be a number"),
    "YaRN from nothing": (
        yarn(original_max_position_embeddings=0),
        "original_max_position_embeddings must be an integer",
    ),
    "YaRN option": (yarn(beta_fast="32"), "beta_fast must be a number more than 0, not '32'"),
}

WEIGHTS = {
    "none": (
        with_file("model.safetensors", None),
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
    "empty": (with_file("model.safetensors", ""), "model.safetensors is not a readable safetensors file"),
    "truncated": (
        with_file("model.safetensors", (TINY / "model.safetensors").read_bytes()[:-4]),
        "model.safetensors is not a readable safetensors file",
    ),
    "a huge header": (with_file("model.safetensors", b"\xff" * 99), "is not a readable safetensors file"),
    "a pickle": (
        with_file("model.safetensors", b"\x80\x04\x95" + bytes(99)),
        "is not a readable safetensors file",
    ),
    "tensors on the same bytes": (
        with_file(
            "model.safetensors", header({n: dict(dtype="F32", shape=[2], data_offsets=[0, 8]) for n in "ab"})
        ),
        "is not a readable safetensors file",
    ),
    "missing": (tensors(lambda stored: stored.pop(DOWN)), f"the checkpoint lacks tensor {DOWN}"),
    "unexpected": (
        tensors(lambda s: s.update(extra=torch.ones(2))),
        "the checkpoint has unexpected tensor extra",
    ),
    "misshapen": (
        tensors(set_norm(torch.ones(127))),
        rf"{NORM} has shape \[127\], config.json makes it \[128\]",
    ),
    "transposed": (
        tensors(lambda s: s.update({DOWN: s[DOWN].T.contiguous()})),
        rf"{DOWN} has shape \[384, 128\]",
    ),
    "integers": (
        tensors(set_norm(torch.ones(128, dtype=torch.int8))),
        f"{NORM} is of I8; weights are of F32",
    ),
    "eight bits": (tensors(set_norm(torch.ones(128).to(torch.float8_e4m3fn))), f"{NORM} is of F8_E4M3"),
    "not finite": (
        tensors(set_norm(torch.full([128], torch.nan)), "saliency"),
        f"{NORM} has values that are not finite",
    ),
    "index no JSON": (with_file("model.safetensors.index.json", "{"), "index.json cannot be read"),
    "index nested deep": (
        with_file("model.safetensors.index.json", DEEP),
        "index.json cannot be read: maximum recursion",
    ),
    "index without map": (with_file("model.safetensors.index.json", {}), '"weight_map" must be an object'),
    "map a list": (weight_map(list), '"weight_map" must be an object'),
    "file a number": (
        weight_map(lambda m: {**m, NORM: 3}),
        f"{NORM} must be in a .safetensors file beside the index, not in 3",
    ),
    "file above": (
        weight_map(lambda m: {**m, NORM: "../one.safetensors"}),
        "beside the index, not in '../one.safetensors'",
    ),
    "file elsewhere": (
        weight_map(lambda m: {**m, NORM: str(TINY / "model.safetensors")}),
        "beside the index, not in '/",
    ),
    "no safetensors": (weight_map(lambda m: {**m, NORM: "pytorch_model.bin"}), "not in 'pytorch_model.bin'"),
    "file gone": (
        weight_map(lambda m: {**m, NORM: "two.safetensors"}),
        "two.safetensors is missing, but .* names it",
    ),
    "not in its file": (
        lambda t: with_index_of_two(t, NORM),
        f"two.safetensors does not hold {NORM}, which the index says it does",
    ),
}


TOKENIZER = {
    "missing": (with_file("tokenizer.json", None), "tokenizer.json is missing"),
    "no JSON": (with_file("tokenizer.json", "{"), "tokenizer.json cannot be read"),
    "empty": (with_file("tokenizer.json", ""), "tokenizer.json cannot be read"),
    "bad UTF-8": (with_file("tokenizer.json", b"\xff\xfe"), "tokenizer.json cannot be read"),
    "no tokens": (
        tokenizer(emptied),
        r"tokenizer.json has no token <\|im_start\|>, which the chat template writes",
    ),
    "other chat tokens": (
        tokenizer(renamed),
        r"tokenizer.json has no token <\|im_end\|>, which the chat template writes",
    ),
    "more tokens than rows": (config(vocab_size=300), "has token id 885, but the model's vocab_size is 300"),
    "generation no JSON": (with_file("generation_config.json", "{"), "generation_config.json cannot be read"),
    "generation a list": (with_file("generation_config.json", []), "generation_config.json cannot be used"),
}

DATA = {
    "missing": (flags("--data", "none.jsonl"), "none.jsonl cannot be read"),
    "a directory": (flags("--data", TINY), "tiny cannot be read: .*Is a directory"),
    "empty": (file("rows.jsonl", "\n \n"), "rows.jsonl has no rows"),
    "bad UTF-8": (prompts(b'{"prompt": "\xff"}'), "rows.jsonl, line 2 is not valid text: 'utf-8' codec"),
    "half a character": (
        prompts(b'{"prompt": "\\ud800", "answer": "a"}'), "rows.jsonl, line 2 is not valid text"
    ),
    "byte order mark": (file("rows.jsonl", b"\xef\xbb\xbf{}"), "line 1 is not JSON: .*BOM"),
    "zero bytes": (prompts(bytes(9)), "rows.jsonl, line 2 is not JSON"),
    "half a line": (prompts(b'{"prompt": "p", "ans'), "rows.jsonl, line 2 is not JSON"),
    "nested deep": (prompts(DEEP.encode()), "rows.jsonl, line 2 is not JSON: maximum recursion"),
    "a number too long": (
        prompts(b'{"prompt": ' + b"9" * 5000 + b"}"), "rows.jsonl, line 2 is not JSON: Exceeds the limit"
    ),
    "a list": (prompts([PROMPT]), "rows.jsonl, line 2 must be an object"),
    "a chat for RL": (prompts(CHAT), 'line 2 must have "prompt" and "answer"'),
    "a prompt for SFT": (
        lambda t: sft(t, "--data", rows(t / "rows.jsonl", PROMPT)), 'line 1 must have "messages"'
    ),
    "prompt null": (prompts({**PROMPT, "prompt": None}), 'line 2: "prompt" must be messages'),
    "prompt a number": (prompts({**PROMPT, "prompt": 7}), 'line 2: "prompt" must be messages'),
    "answer a number": (
        prompts({**PROMPT, "answer": 7}), 'line 2: "answer" must be a string or a list of strings'
    ),
    "no answers": (
        prompts({**PROMPT, "answer": []}), 'line 2: "answer" must be a string or a list of strings'
    ),
    "role missing": (
        chat({"content": "q"}, said("assistant", "a")), 'line 2: "messages" must be messages with role'
    ),
    "role unknown": (
        chat(said("tool", "q"), said("assistant", "a")), 'line 2: "messages" must be messages with role'
    ),
    "role a list": (
        chat(said(["user"], "q"), said("assistant", "a")), 'line 2: "messages" must be messages with role'
    ),
    "content parts": (
        chat(said("user", [{"text": "q"}]), said("assistant", "a")), 'line 2: "messages" must be messages'
    ),
    "message as text": (chat("q", "a"), 'line 2: "messages" must be messages'),
    "no messages": (chat(), 'line 2: "messages" must be messages'),
    "too many messages": (
        chat(*[said("user", "q"), said("assistant", "a")] * 201), "402 messages; 400 are the most"
    ),
    "user last": (chat(said("user", "q")), "line 2: .* end with the assistant's"),
    "assistant silent": (
        chat(said("user", "q"), said("assistant", "")), "line 2: .* the assistant says nothing"
    ),
    "nothing fits": (
        lambda t: rl("--context", 40, "--data", rows(t / "rows.jsonl", {**PROMPT, "prompt": "p" * 99})),
        "not one of 1 rows fits in the 16 tokens",
    ),
    "held-out prompt too long": (
        lambda t: [*prompts()(t), "--context", 60, "--eval-data", rows(t / "held.jsonl", QUOTES)],
        "prompt held.jsonl line 1 has .* tokens; the context leaves 36",
    ),
    "reward needs another answer": (
        lambda t: [*prompts()(t), "--reward", "rewards:numeric"],
        '^row rows.jsonl line 1: "answer" .* rewards:numeric'
    ),
    "no Parquet": (file("rows.parquet", "no Parquet"), "rows.parquet cannot be read"),
    "Parquet empty": (file("rows.parquet", ""), "rows.parquet cannot be read"),
    "Parquet truncated": (parquet(lambda content: content[:-99]), "rows.parquet cannot be read"),
    "Parquet damaged": (
        parquet(lambda content: content[:4] + bytes(60) + content[64:]), "rows.parquet cannot be read"
    ),
    "Parquet without rows": (table(prompt=pyarrow.array([], pyarrow.string())), "rows.parquet has no rows"),
    "Parquet of numbers": (table(prompt=[1], answer=["a"]), 'rows.parquet, row 1: "prompt" must be'),
    "Parquet of bytes": (
        table(prompt=[b"p"], answer=["a"]),
        "rows.parquet: column 'prompt' is binary, which JSON cannot represent",
    ),
    "Parquet with bad UTF-8": (
        table(prompt=pyarrow.array([b"\xff"]).cast(pyarrow.binary()).view(pyarrow.string()), answer=["a"]),
        "rows.parquet cannot be read: .*utf-8",
    ),
    "Parquet with far dates": (
        table(prompt=["p"], answer=["a"], when=pyarrow.array([2**60], pyarrow.timestamp("us"))),
        r"rows.parquet: column 'when' is timestamp\[us\], which JSON cannot represent; drop it or make it "
        "text",
    ),
    "the same id twice": (
        prompts({**PROMPT, "id": 1}, {**PROMPT, "id": 1}), 'line 3: "id" 1 is that of line 2 too'
    ),
    "no id": (prompts({**PROMPT, "id": None}), 'line 2: "id" must be a string or an integer, not None'),
    "hub path too short": (flags("--data", "hf://org/name"), "write hf://ORG/NAME/PATH"),
}  # fmt: skip

TOML = {
    "missing": (flags("--config", "none.toml"), "--config none.toml: .*No such file"),
    "no TOML": (toml("steps ="), "c.toml: Invalid value"),
    "bad UTF-8": (toml(b"\xff"), "c.toml: 'utf-8' codec"),
    "nested deep": (toml("steps = " + DEEP), "c.toml: maximum recursion"),
    "a number too long": (toml("steps = " + "9" * 5000), "c.toml: Exceeds the limit"),
    "no float holds it": (toml("learning_rate = 1" + "0" * 400), "learning_rate must be a float"),
    "unknown key": (toml("learning_rat = 1"), "unknown key 'learning_rat'"),
    "a table": (toml("[train]\nsteps = 3"), "unknown key 'train'"),
    "text for a number": (toml('steps = "3"'), "steps must be a int, not '3'"),
    "truth for a number": (toml("steps = true"), "steps must be a int, not True"),
    "float for an integer": (toml("steps = 3.0"), "steps must be a int, not 3.0"),
    "number for truth": (toml("thinking = 1"), "thinking must be a bool, not 1"),
    "empty list": (toml("data = []"), "data must be a list of str"),
    "mixed list": (toml('data = ["a", 3]'), "data must be a list of str"),
    "not a number": (toml("learning_rate = nan"), "--learning-rate must be more than 0, not nan"),
    "unknown choice": (toml('rule = "best"'), "rule must be one of top, bottom, random, all, not 'best'"),
}

FLAGS = {
    "infinite": (flags("--learning-rate", "inf"), "--learning-rate must be at most 1, not inf"),
    "not a number": (flags("--temperature", "nan"), "--temperature must be at least 0.01, not nan"),
    "negative decay": (flags("--weight-decay", "-0.1"), "--weight-decay must be at least 0"),
    "negative seed": (flags("--seed", -1), "--seed must be at least 0, not -1"),
    "enormous seed": (flags("--seed", 2**31), "--seed must be at most 2147483647"),
    "enormous context": (flags("--context", 10**9), "is more than the 4096 tokens of assets/tiny"),
    "fraction": (flags("--fraction", "nan"), "--fraction must be more than 0, not nan"),
    "no room": (flags("--context", 24), "--max-completion 24 leaves no room for a prompt in 24 tokens"),
    "uneven": (flags("--prompts", 5, "--updates", 2), "--prompts 5 cannot be shared"),
    "more rows than there are": (
        lambda t: [*prompts()(t), "--data-rows", 10**9],
        "rows.jsonl has only 1 rows",
    ),
    "weights without files": (flags("--data-weights", 1), "need --data"),
    "weight 0": (lambda t: [*prompts()(t), "--data-weights", 0], "--data-weights must be more than 0"),
    "rows of nothing": (flags("--truncate-prompts"), "--truncate-prompts need --data"),
    "fillers with files": (
        lambda t: [*prompts()(t), "--eval-filler", 3],
        "--eval-filler applies only to --task",
    ),
    "prompt too long": (flags("--context", 300), "tokens; the context leaves 276"),
    "no ranks": (flags("--tensor-parallel", 2), "--tensor-parallel 2 does not divide the 1 ranks"),
    "name elsewhere": (flags("--name", "/tmp/run"), "--name /tmp/run is not below runs/"),
    "name above": (flags("--name", "a/../../run"), "is not below runs/"),
    "no steps": (flags("--steps", 0), "--steps must be at least 1, not 0"),
    "too many facts": (flags("--facts", 49), "--facts 49: the task recall can have 1 to 48"),
    "no pair": (flags("--task", "tracking", "--facts", 1), "the task tracking can have 2 to 96"),
    "copies until never": (tiny("--copy-until", "nan"), "--copy-until must be more than 0, not nan"),
    "no layers": (tiny("--layers", 0), "--layers must be at least 1, not 0"),
    "no tokens": (tiny("--vocab-size", 5), "--vocab-size must be at least 261, not 5"),
    "odd new head": (tiny("--head-dim", 31), "--heads and --head-dim must be even"),
    "facts": (tiny("--min-facts", 9, "--max-facts", 3), "--min-facts and --max-facts must be ordered"),
    "no data": (lambda t: ["sft.py", "--out", t / "run"], "no --data is given"),
}

REWARD = {
    "no module": (flags("--reward", "nowhere:f"), "--reward nowhere:f: No module named 'nowhere'"),
    "no name": (flags("--reward", "rewards"), "--reward rewards: .* write module:function"),
    "no function": (flags("--reward", "rewards:none"), "--reward rewards:none: .* no attribute 'none'"),
    "not callable": (flags("--reward", "rewards:SOURCES"), "SOURCES is not a function"),
    "no Python": (reward("def score(:"), "--reward .*invalid syntax"),
    "fails on import": (
        reward("1 / 0"),
        r"fails when it is imported: ZeroDivisionError\('division by zero'\)",
    ),
    "fails on a row": (
        reward("def score(answer, row): return row['none']"),
        r"failed on row recall-.*: KeyError\('none'\)",
    ),
    "gives nothing": (reward("def score(answer, row): pass"), "returned no finite number for row recall-"),
    "gives too much": (
        reward("def score(answer, row): return 10**400"),
        "returned no finite number for row recall-",
    ),
    "time without workers": (flags("--reward-timeout", 9), "--reward-timeout needs --reward-workers"),
    "judge without address": (judged(url=None), "LONGACT_JUDGE_URL is not set"),
    "judge elsewhere": (
        judged(url="file:///etc/passwd"),
        "LONGACT_JUDGE_URL must begin with http:// or https://",
    ),
    "judge nowhere": (judged(url="http://"), "LONGACT_JUDGE_URL must be http://HOST"),
    "judge in brackets": (judged(url="http://[1/v1"), "LONGACT_JUDGE_URL must be http://HOST"),
    "judge waits forever": (judged(timeout="inf"), "LONGACT_JUDGE_TIMEOUT must be more than 0"),
    "judge waits backwards": (judged(timeout="-1"), "LONGACT_JUDGE_TIMEOUT must be more than 0"),
    "judge's key": (judged(key="a\nb"), "LONGACT_JUDGE_KEY has characters"),
    "judge's cache": (
        judged(cache=str(TINY / "config.json" / "c.sqlite")),
        "LONGACT_JUDGE_CACHE .* cannot be used",
    ),
}

RUNS = {
    "used": (lambda t: at(t, {"metrics.jsonl": ""}), "run exists; --resume auto goes on with it"),
    "somebody's": (
        lambda t: at(t, {"config.json": "{}"}),
        r"run is not empty and holds no run of sft.py \(metrics.jsonl or checkpoints\); choose another --out",
    ),
    "a file": (
        lambda t: sft(t, "--out", write(t / "file", "x")),
        "file cannot be written: File exists; choose another --out",
    ),
    "a loop": (
        lambda t: (t / "run").symlink_to(t / "run") or sft(t), "run cannot be written: File exists"
    ),
    "below a file": (
        lambda t: sft(t, "--out", write(t / "file", "x") / "run"), "run cannot be written: Not a directory"
    ),
    "name too long": (
        lambda t: sft(t, "--out", t / ("r" * 300)), "cannot be written: File name too long"
    ),
    "resume elsewhere": (lambda t: sft(t, "--resume", TINY), "tiny is not a checkpoint of this run"),
    "resume a damaged one": (
        lambda t: at(
            t, {"checkpoints/step-000001/manifest.json": "{", "config.json": "{}"}, "--resume", "auto"
        ),
        "none of the 1 checkpoints in .* is whole",
    ),
    "saliency below a file": (
        lambda t: ["studies/magnitudes.py", TINY, "--out", write(t / "file", "x") / "run"],
        "run cannot be written: Not a directory; choose another --out"
    ),
    "figures of a broken run": (
        lambda t: at(t, {"metrics.jsonl": '{"step\n'}) and ["base/plot.py", t / "run"],
        "metrics.jsonl, line 1 is not JSON",
    ),
    "saliency of nothing": (
        lambda t: ["studies/magnitudes.py", t / "none", "--out", t / "run"], "none is not a checkpoint"
    ),
}  # fmt: skip


TABLE = {"config": CONFIG, "weights": WEIGHTS, "tokenizer": TOKENIZER, "data": DATA, "toml": TOML}
TABLE |= {"flags": FLAGS, "reward": REWARD, "runs": RUNS}
CASES = [
    pytest.param(*case, id=f"{kind}, {name}") for kind, cases in TABLE.items() for name, case in cases.items()
]


@pytest.mark.parametrize("make, line", CASES)
def test_bad_input_gets_one_line_and_nothing_is_written(make, line, tmp_path, monkeypatch):
    made = make(tmp_path)
    arguments, settings = made if isinstance(made, tuple) else (made, {})
    for name, value in {"cache": str(tmp_path / "run" / "judge.sqlite"), **settings}.items():
        if value is not None:
            monkeypatch.setenv(f"LONGACT_JUDGE_{name.upper()}", value)
    judge.judge.cache_clear()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    check_refusal(arguments, line, tmp_path, longest=600)


@pytest.mark.parametrize("make, line", [DATA["half a line"], TOML["no TOML"]])
def test_a_user_sees_one_line_and_exit_code_1(make, line, tmp_path):
    arguments = make(tmp_path)
    result = run_script(*arguments)
    [seen] = result.stderr.splitlines()
    assert result.returncode == 1 and result.stdout == ""
    assert seen.startswith(f"{arguments[0]}: error: ") and re.search(line, seen)


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_directory_that_a_live_run_is_in_is_left_alone(tmp_path):
    """Another process holds the lock, as durable.lock does; when it has ended, the command goes on."""
    arguments = at(tmp_path, {"lock": "", "metrics.jsonl": "{}"}, "--resume", "auto")
    command = [sys.executable, "-c", HOLD, tmp_path / "run" / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        before = files_in(tmp_path)
        assert (
            refusal(*arguments)
            == f"{tmp_path}/run: another process is running there; wait for it, or stop it"
        )
        assert files_in(tmp_path) == before
        other.communicate()
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    assert "none of the 1 checkpoints" in refusal(*arguments)


def test_a_tokenizer_file_does_not_cut_or_pad_what_it_is_given(tmp_path):
    """Files as transformers may leave them: lengths are for train.py to judge."""
    model(tmp_path)
    cutting = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    cutting.enable_truncation(3)
    cutting.enable_padding(length=99)
    cutting.save(str(tmp_path / "model" / "tokenizer.json"))
    ids = [
        chat_format.load_tokenizer(path, 896).encode("code " * 20).ids for path in (TINY, tmp_path / "model")
    ]
    assert ids[0] == ids[1] and 20 <= len(ids[0]) < 99
