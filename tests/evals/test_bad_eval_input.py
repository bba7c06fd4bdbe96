"""What evaluations read, and what may be wrong with it: one clear line for each, and
nothing is written or lost. A case is a script's arguments, made in a directory of its own, and what its line
must say; as in test_bad_input.py, which has what training reads. Engines start after all of these checks.
"""

import json
import resource

import pytest
import torch
from conftest import ROOT, check_full_disk, check_refusal, refusal, run_here
from inputs import DEEP, TINY, foreign, model, script, write
from records import RESULT
from safetensors.torch import save_file

from base import durable
from base.cli import BadInput
from evals import gsm8k, subject
from evals.engine import GREEDY
from evals.results import Results

SAMPLE = ROOT / "assets" / "longbench-sample.json"
QUESTION = {"question": "How many?", "answer": "#### 3"}
ITEM = {"_id": "x", "question": "q", **{f"choice_{c}": c for c in "ABCD"}, "answer": "A", "context": "c"}
ITEM |= {"difficulty": "easy", "length": "short"}

# ----------------------------------------------------------------------------------------------- the commands


longbench = script("eval_longbench.py", "--max-input", 500)
math = script("eval_gsm8k.py", "--max-tokens", 5)
ruler = script("eval_ruler.py", "--lengths", 640, "--cache", "{t}/cache")
recall = script("eval_data.py", "--samples", 2)


def of_model(name, content):
    """eval_data.py with a model whose file `name` is another."""

    def make(t):
        write(model(t) / name, content)
        return ["eval_data.py", t / "model", "--out", t / "out"]

    return make


def config(**changes):
    return {**json.loads((TINY / "config.json").read_text()), **changes}


def with_data(command, content, *more):
    return lambda t: command("--data", write(t / "data", content), *more)(t)


def held(tensors, about):
    """eval_data.py under a clamp of these tensors, {name: ...} of those of assets/tiny, and this metadata."""

    def make(t):
        heads = {"q": 8, "k": 2}
        good = {
            f"model.layers.{i}.self_attn.{w}_proj": torch.zeros(n * 32)
            for i in range(3)
            for w, n in heads.items()
        }
        save_file(tensors(good), t / "clamp", about)
        return recall("--clamp", t / "clamp")(t)

    return make


# ------------------------------------------------------------------------------------- directories of results


def result(**changes):
    return json.dumps({**RESULT, **changes}) + "\n"


def finished(*lines, of=(), **settings):
    """eval_gsm8k.py of one problem, whose --out holds these lines; of: what its settings lack. settings: what
    is other."""

    def make(t):
        data, out = write(t / "data", QUESTION), t / "out"
        usual = {
            "benchmark": "GSM8K",
            **subject.settings(TINY, subject.load(TINY)[0]),
            "data": durable.digest(repr(gsm8k.read(data))),
            **{"mode": "chat", "sampling": GREEDY, "max_tokens": 5, "seeds": 1},
            **settings,
        }
        out.mkdir()
        if "settings" not in of:
            write(out / "settings.json", usual)
        write(out / "lock", "")
        write(out / "results.jsonl", "".join(lines).encode("utf-8", "surrogatepass"))
        return math("--data", data)(t)

    return make


def compared(a, b, of_a=None, of_b=None):
    def make(t):
        for name, lines, settings in (("a", a, of_a), ("b", b, of_b)):
            (t / name).mkdir()
            write(t / name / "settings.json", settings or {"checkpoint": name})
            write(t / name / "results.jsonl", lines)
        return ["eval_gsm8k.py", "--compare", t / "a", t / "b"]

    return make


# -------------------------------------------------------------------------------------------------- the table

CHECKPOINT = {
    "none": (
        lambda t: ["eval_data.py", "--out", t / "out"],
        "no checkpoint is given: python eval_data.py CHECKPOINT",
    ),
    "none for LongBench": (lambda t: ["eval_longbench.py", "--data", SAMPLE], "no checkpoint is given"),
    "swallowed by a list": (lambda t: ["eval_ruler.py", "--tasks", "vt", TINY], "no checkpoint is given"),
    "missing": (lambda t: ["eval_gsm8k.py", t / "none", "--data", SAMPLE], "none is not a checkpoint"),
    "not its weights": (
        of_model("model.safetensors", "x"),
        "model.safetensors is not a readable safetensors file",
    ),
    "no tokenizer": (of_model("tokenizer.json", "{}"), "tokenizer.json cannot be read"),
    "YaRN of 1": (longbench("--data", SAMPLE, "--yarn", 1), "--yarn must be more than 1, not 1"),
    "YaRN beyond sense": (longbench("--data", SAMPLE, "--yarn", 1e300), "--yarn must be at most 1000000"),
    "YaRN no number": (longbench("--data", SAMPLE, "--yarn", "nan"), "--yarn must be at least 0"),
    "uneven ranks": (recall("--tensor-parallel", 2), "--tensor-parallel 2 does not divide the 1 ranks"),
    "more than the GPU": (recall("--vllm-share", 2), "--vllm-share must be at most 1, not 2"),
    "seeds without end": (recall("--seeds", 10**12), "--seeds must be at most 1000"),
}

DATA = {
    "LongBench without": (longbench(), "no --data is given: download data.json"),
    "LongBench missing": (longbench("--data", "{t}/no.json"), "no.json cannot be read: No such file"),
    "LongBench a directory": (longbench("--data", "{t}"), "cannot be read: Is a directory"),
    "LongBench as JSONL": (
        with_data(longbench, ITEM),
        r"data is not a JSON list of objects: byte 0 is {, not \[",
    ),
    "LongBench with a byte order mark": (
        with_data(longbench, b"\xef\xbb\xbf[]"),
        r"byte 0 is '\\ufeff', not \[",
    ),
    "LongBench compressed": (
        with_data(longbench, b"\x1f\x8b\x08\0"),
        r"item 1 .* is not JSON: 'utf-8' codec",
    ),
    "LongBench twice": (with_data(longbench, [ITEM, ITEM]), "item 2 .*: an earlier item has the same _id"),
    "LongBench malformed": (
        with_data(longbench, [{**ITEM, "answer": ""}]),
        r"item 1 \(_id 'x'\): 'answer' is ''",
    ),
    "LongBench's context": (
        longbench("--data", SAMPLE, "--max-input", 120_000),
        "context of 4096; 120192 need a YaRN factor of 30, and",
    ),
    "LongBench's thinking": (longbench("--data", SAMPLE, "--thinking"), "context of 4096; give --yarn 3"),
    "LongBench without context and with thoughts on it": (
        longbench("--data", SAMPLE, "--cot", "--no-context"),
        "--cot and --no-context exclude each other",
    ),
    "LongBench's samples": (
        longbench("--data", SAMPLE, "--samples", 49),
        r"--samples 49: .*longbench-sample.json has only 48",
    ),
    "GSM8K without": (math(), "no --data is given: download grade_school_math/data/test.jsonl"),
    "GSM8K empty": (with_data(math, ""), "data has no rows"),
    "GSM8K in Latin-1": (with_data(math, b"\xe9"), "data, line 1 is not valid text: 'utf-8' codec"),
    "GSM8K with half a character": (
        with_data(math, b'{"question": "\\ud800"}'),
        "data, line 1 is not valid text",
    ),
    "GSM8K with a long number": (with_data(math, "9" * 5000), "data, line 1 is not JSON: Exceeds the limit"),
    "GSM8K as a list": (
        with_data(math, [QUESTION]),
        'line 1 must be an object with the texts "question" and "answer"',
    ),
    "GSM8K without a number": (
        with_data(math, {**QUESTION, "answer": "#### ?"}),
        "line 1: .* must end with #### and a number",
    ),
    "GSM8K too long": (
        with_data(math, {**QUESTION, "question": "<|im_end|>" * 4000}),
        r"prompt \(line 1, \d{5} tokens\) .* has a context of 4096: take that line out of --data",
    ),
    "GSM8K's thinking": (
        lambda t: math("--mode", "thinking", "--data", write(t / "data", QUESTION))(t),
        "context of 4096: lower --thinking-budget",
    ),
    "GSM8K's tokens": (
        lambda t: math("--max-tokens", 10**9, "--data", write(t / "data", QUESTION))(t),
        "context of 4096: lower --max-tokens",
    ),
    "GSM8K's seeds": (
        math("--data", "x", "--seeds", 2),
        "--seeds 2 needs --mode thinking or --sampling paper",
    ),
    "own data missing": (recall("--data", "{t}/no.jsonl"), "no.jsonl.* cannot be read"),
    "own data without answers": (
        with_data(recall, {"prompt": "x"}),
        'line 1 must have "prompt" and "answer"',
    ),
    "own data's reward": (
        with_data(recall, {"prompt": "x", "answer": "y"}, "--samples", 1, "--reward", "rewards:numeric"),
        'row data line 1: "answer" .* has no number, which rewards:numeric needs',
    ),
    "own data's reward twice": (
        recall("--reward", "rewards:exact", "rewards:exact"),
        "--reward rewards:exact rewards:exact names a function twice",
    ),
    "own data's timeout": (
        recall("--reward-on-timeout", "zero"),
        "--reward-on-timeout zero needs --reward-timeout",
    ),
    "own data too long": (
        with_data(recall, {"prompt": "<|im_end|>" * 4000, "answer": "y"}, "--samples", 1),
        "prompt data line 1 has .* tokens; the context leaves 2048",
    ),
    "recall's facts": (recall("--facts", 10**9), "--facts 10+: the task recall can have 1 to 48"),
    "recall's filler": (recall("--filler", 10**12), "--filler must be at most 100000"),
    "recall too long": (
        recall("--filler", 600),
        r"prompt recall-held out-0 has \d+ tokens; the context leaves 4072",
    ),
    "recall's tokens": (
        recall("--max-tokens", 10**9),
        "--max-tokens 10+ leaves no room for a prompt in 4096 tokens",
    ),
    "recall's seeds": (recall("--seeds", 2), "--seeds 2 needs --sampling paper"),
    "recall's samples": (recall("--samples", 10**15), "--samples must be at most 100000"),
}

RULER = {
    "too long": (
        lambda t: ["eval_ruler.py", TINY],
        "--lengths 8192 16384 32768 65536 131072: .* has a context of 4096 tokens; 131072 need a YaRN "
        "factor of 32, and "
        r"Qwen3's model card validates no more than 4; without that: --lengths 4096 \(up to 4096\), or "
        r"--lengths 4096 8192 "
        r"16384 --yarn 4 \(up to 16384\)",
    ),
    "too long to think": (
        lambda t: [
            *("eval_ruler.py", of_model("config.json", config(max_position_embeddings=40960))(t)[1]),
            *("--mode", "thinking", "--yarn", 4),
        ],
        "--lengths 131072 with --thinking-budget 8192: .* has a context of 131072 tokens; 139264 need a "
        "YaRN factor of 5, "
        "and Qwen3's model card validates no more than 4; without that: --lengths 4096 8192 16384 32768 "
        "65536 "
        r"\(up to 122880\)",
    ),
    "no room": (
        ruler("--mode", "thinking"),
        "context of 4096 tokens; give --yarn 3; or lower --thinking-budget",
    ),
    "task": (ruler("--tasks", "niah"), "'niah' is not a RULER task; they are niah_single_1, "),
    "missing": (ruler("--tasks", "vt", "qa_1"), "--tasks qa_1: squad.json or dev-v2.0.json is needed"),
    "damaged": (
        ruler("--data-dir", "{t}", **{"squad.json": "{}"}),
        'squad.json cannot be used: the file has no "data"; it is',
    ),
    "words": (
        ruler(
            "--data-dir",
            "{t}",
            "--tasks",
            "cwe",
            "--lengths",
            4000,
            **{"english_words.json": {"1": "<|im_end|>"}},
        ),
        r'english_words.json cannot be used: "<\|im_end\|>" is no word',
    ),
    "too short": (
        ruler("--lengths", 300, "--tasks", "fwe"),
        r"fwe at 300 \(586 and more are enough\); choose",
    ),
    "some too short": (
        ruler("--lengths", 4096, 1200),
        r"niah_multivalue at 1200 \(2051 and more are enough\); niah_multiquery at 1200 \(2121 and more "
        r"are enough\); cwe "
        r"at 1200, 4096 \(1470 to 4095, or 5433 and more are enough\); --tasks niah_single_1 niah_multikey_2 "
        "niah_multikey_3 vt fwe fit",
    ),
    "no directory": (ruler("--data-dir", "{t}/none"), "none is not a directory"),
    "seeds": (ruler("--seeds", 2), "--seeds 2 needs --mode thinking"),
    "samples": (ruler("--samples", 0), "--samples must be at least 1"),
    "length": (ruler("--lengths", 640, 0), "--lengths must be at least 1"),
    "length beyond all": (ruler("--lengths", 10**9), "--lengths 10+: .* has a context of 4096"),
    "cache a file": (ruler("--tasks", "fwe", "--cache", "{t}/c", c=""), "c cannot keep samples: File exists"),
    "cache not ours": (
        ruler("--tasks", "fwe", "--cache", "/proc/c"),
        "/proc/c cannot keep samples: No such file",
    ),
    "a list in TOML": (ruler("--config", "{t}/c", c='lengths = ["a"]'), "lengths must be a list of int"),
    "a path with a zero byte": (ruler("--config", "{t}/c", c='cache = "a\\u0000b"'), "cache has a zero byte"),
}

CLAMP = {
    "missing": (recall("--clamp", "{t}/none"), "--clamp .*none cannot be read: .*No such file"),
    "no tensors": (recall("--clamp", "{t}/c", c="text"), "--clamp .* cannot be read: .*header"),
    "a model": (recall("--clamp", TINY / "model.safetensors"), "is no clamp; studies/perturb.py makes them"),
    "metadata no JSON": (held(dict, {"about": "{"}), "is no clamp; studies/perturb.py makes them"),
    "metadata a list": (held(dict, {"about": "[]"}), "is no clamp; studies/perturb.py makes them"),
    "no rule": (held(dict, {"about": "{}"}), "is no clamp; studies/perturb.py makes them"),
    "other layers": (
        held(lambda good: dict(list(good.items())[:4]), {"about": '{"rule": "top"}'}),
        "of a model with other",
    ),
    "another dtype": (
        held(
            lambda good: {name: values.bfloat16() for name, values in good.items()},
            {"about": '{"rule": "top"}'},
        ),
        "of a model with other layers or heads",
    ),
}

OUT = {
    "somebody's": (
        foreign(recall()),
        r"out is not empty and holds no evaluation \(settings.json\); choose another --out",
    ),
    "a file": (recall(out=""), "out cannot be written: File exists; choose another --out"),
    "below a file": (
        recall("--out", "{t}/f/x", f=""),
        "f/x cannot be written: Not a directory; choose another --out",
    ),
    "name too long": (recall("--out", "{t}/" + "x" * 300), "cannot be written: File name too long"),
    "other settings": (
        finished(result(), max_tokens=7),
        "holds results of other settings: max tokens 7 there, 5 here",
    ),
    "another model": (
        finished(result(), weights="0"),
        'holds results of other settings: weights "0" there, "',
    ),
    "another benchmark": (
        finished(result(), benchmark="RULER"),
        'other settings: benchmark "RULER" there, "GSM8K" here',
    ),
    "settings gone": (
        lambda t: [
            finished(result(), of=["settings"])(t),
            write(t / "out" / "lock", "evaluation\n"),
        ][0],
        "has results and no settings.json: settings unknown",
    ),
    "settings damaged": (
        finished(checkpoint=3),
        'settings.json is not an evaluation\'s: .* the "checkpoint"',
    ),
    "another problem": (
        finished(result(id="line 2")),
        "a sample that is not of this evaluation: line 2, seed 0; remove",
    ),
    "another seed": (
        finished(result(seed=10**15)),
        "not of this evaluation: line 1, seed 10+; remove its line",
    ),
    "another task": (
        finished(result(task="recall")),
        r'holds line 1 as one of \["recall", 0\], not \["gsm8k", 0\]; remove',
    ),
    "another length": (
        finished(result(length="0")),
        r'holds line 1 as one of \["gsm8k", "0"\], not \["gsm8k", 0\]',
    ),
    "twice": (
        finished(result(), result(score=0.0)),
        "results.jsonl, line 2 is another result of line 1, seed 0; remove one",
    ),
    "half a character": (
        finished(result(task="\ud800")),
        "line 1 is not a result: task has an unpaired surrogate",
    ),
    "bytes": (finished("\0\0\n"), "line 1 is not a result: no JSON object"),
    "nested deep": (finished(DEEP, "\n"), "line 1 is not a result: no JSON object"),
    "a score beyond 1": (finished(result(score=10**400)), "line 1 is not a result: score is 1000"),
    "fewer than no tokens": (
        finished(result(completion_tokens=-1)),
        "line 1 is not a result: completion_tokens is -1",
    ),
    "no score": (finished(result(score=None)), "line 1 is not a result: score is null"),
}

COMPARE = {
    "one": (
        lambda t: ["eval_ruler.py", "--compare", t],
        "--compare takes two results.jsonl or their directories, not 1",
    ),
    "missing": (lambda t: ["eval_data.py", "--compare", t / "a", t / "b"], "a does not exist"),
    "nothing": (compared("", ""), "have no sample in common"),
    "other data": (
        compared(result(), result(), {"checkpoint": "a", "data": 1}, {"checkpoint": "b", "data": 2}),
        "have different settings and cannot be compared: data 1 there, 2 here",
    ),
    "damaged": (
        compared(result(), result(score=1e308)),
        "b/results.jsonl, line 1 is not a result: score is 1e",
    ),
    "half a character": (
        compared(result(), result(), {"checkpoint": "\ud800"}),
        "settings.json is not an evaluation's",
    ),
}

TABLE = {
    "checkpoint": CHECKPOINT,
    "data": DATA,
    "RULER": RULER,
    "clamp": CLAMP,
    "out": OUT,
    "compare": COMPARE,
}
CASES = [
    pytest.param(*case, id=f"{kind}, {name}") for kind, cases in TABLE.items() for name, case in cases.items()
]


@pytest.mark.parametrize("make, line", CASES)
def test_bad_input_gets_one_line_and_nothing_is_written_or_lost(make, line, tmp_path):
    check_refusal(make(tmp_path), line, tmp_path, longest=700)


# ------------------------------------------------------------------------------------------------- full disks


FULL = {
    "settings": (lambda t: math("--data", write(t / "data", QUESTION))(t), 99, "settings.json"),
    "report": (finished(result()), 600, "results.json"),
    "what ranks wrote": (finished(result()), 99, "results.jsonl"),
}


@pytest.mark.parametrize("make, size, name", FULL.values(), ids=FULL)
def test_a_full_disk_is_one_line_that_names_the_file_and_what_was_there_stays(
    make, size, name, tmp_path, full
):
    check_full_disk(make(tmp_path), size, name, tmp_path, full)


def test_a_sample_that_the_disk_does_not_take_is_made_again(tmp_path, full):
    """What was finished before stays; half a line is left out."""
    settings, samples = {"checkpoint": "x"}, {("line 1", 0): ("gsm8k", 0), ("line 2", 0): ("gsm8k", 0)}
    results = Results(tmp_path / "out", settings, samples)
    results.write(json.loads(result()))
    full(len(result()) + 9)
    with pytest.raises(BadInput, match=r"out/results.jsonl cannot be written: File too large"):
        results.write(json.loads(result(id="line 2")))
    results.file.close()
    full(resource.RLIM_INFINITY)
    del results
    again = Results(tmp_path / "out", settings, samples)
    assert again.done == {("line 1", 0)}
    again.write(json.loads(result(id="line 2")))
    assert len(again.read()) == 2


def test_a_report_is_made_again_when_there_is_room(tmp_path, full):
    arguments = finished(result())(tmp_path)
    full(600)
    refusal(*arguments)
    full(resource.RLIM_INFINITY)
    assert "100.00 [-]" in run_here(*arguments)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["score"]["n"] == 1
