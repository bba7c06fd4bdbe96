"""evals/engine.py, results.py and stats.py: results across interruptions, real vLLM with YaRN, statistics
worked by hand."""

import dataclasses
import json
import math
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, rows_of

from base.cli import BadInput
from evals import stats, subject
from evals.engine import GREEDY, Engine, evaluate
from evals.results import Results, weights_fingerprint
from model import Qwen3, Qwen3Config
from prompts.chat import encode_prompt, load_tokenizer

TINY = ROOT / "assets" / "tiny"
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}


def record(i, score=1.0, seed=0, task="t", length=10):
    counts = {"prompt_tokens": 9, "completion_tokens": 2, "finished": True}
    which = {"id": f"{task}-{i}", "task": task, "length": length, "seed": seed, "expected": ["é"]}
    return {**which, "score": score, "prediction": "é\n\u2028", **counts}


SETTINGS = {"checkpoint": "out", "lengths": [10]}


def opened(path, records, settings=None):
    """An evaluation of the samples of `records`, open in the directory `path`."""
    return Results(
        path, settings or SETTINGS, {(r["id"], r["seed"]): (r["task"], r["length"]) for r in records}
    )


def directory(path, records, **settings):
    """A finished evaluation."""
    results = opened(path, records, {"checkpoint": path.name, "lengths": [10], **settings})
    for r in records:
        results.write(r)
    return path


# ---------------------------------------------------------------------------------------------------- results


def test_results_are_kept_taken_in_from_ranks_and_ordered(tmp_path):
    out = directory(tmp_path / "out", [record(10), record(9)])
    (out / "results.3.jsonl").write_text(json.dumps(record(2)) + "\n" + json.dumps(record(9, seed=1)) + "\n")
    again = opened(out, [record(1), record(2), record(9), record(9, seed=1), record(10)])
    assert again.done == {("t-10", 0), ("t-9", 0), ("t-2", 0), ("t-9", 1)}
    assert [path.name for path in sorted(out.iterdir())] == ["lock", "results.jsonl", "settings.json"]
    with pytest.raises(BadInput, match="has no result of 1 of 5 samples, such as t-1, seed 0"):
        again.read()
    again.write(record(1))
    assert again.read() == [record(1), record(2), record(9), record(9, seed=1), record(10)]
    assert len((out / "results.jsonl").read_text().split("\n")) == 6
    with pytest.raises(BadInput, match="holds a sample that is not of this evaluation: t-2, seed 0"):
        opened(out, [record(1), record(9), record(9, seed=1), record(10)])


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_half_written_last_line_is_dropped_with_a_warning(cut, tmp_path, capfd):
    out = directory(tmp_path / "out", [record(1), record(2)])
    path = out / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = opened(out, [record(1), record(2)])
    assert again.done == {("t-1", 0)} and "last line is unfinished" in capfd.readouterr().err
    again.write(record(2))
    assert again.read() == [record(1), record(2)]


WRONG = [
    *(
        ("{", "no JSON object"),
        ("3", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ("", "no JSON object"),
    ),
    *(
        ("{}", "no id"),
        ('{"id": "a"}', "no task"),
        (dict(id=["t-1"]), 'id is ["t-1"]'),
        (dict(score=None), "score is null"),
    ),
    *(
        (dict(score="1"), 'score is "1"'),
        (dict(score=math.nan), "score is NaN"),
        (dict(score=True), "score is true"),
    ),
    *(
        (dict(score=1.5), "score is 1.5"),
        (dict(score=-1), "score is -1"),
        (dict(score=10**400), "score is 1000"),
    ),
    *(
        (dict(completion_tokens=10**400), "completion_tokens is 1000"),
        (dict(task="\ud800"), "task has an unpaired surrogate"),
    ),
    ({}, "another result of t-1, seed 0"),
    *(
        (dict(finished=None), "finished is null"),
        (dict(seed=0.5), "seed is 0.5"),
        (dict(length=[1]), "length is [1]"),
    ),
    (dict(prediction=["x" * 999]), 'prediction is ["xxx'),
]


def test_a_line_that_is_no_result_is_refused(tmp_path):
    a = directory(tmp_path / "out", [record(1)])
    b = directory(tmp_path / "b", [record(1)])
    for line, message in WRONG:
        where = "is another" if line == {} else "is not a result: "
        line = line if isinstance(line, str) else json.dumps({**record(1), **line})
        (a / "results.jsonl").write_text(json.dumps(record(1)) + f"\n{line}\n" + json.dumps(record(2)) + "\n")
        for use in (lambda: opened(a, [record(1)]), lambda: stats.compare([b, a])):
            with pytest.raises(BadInput, match=rf"out/results.jsonl, line 2 {where}") as error:
                use()
            assert message in str(error.value) and len(str(error.value)) < 400


def test_settings_that_are_none_are_refused(tmp_path):
    a = directory(tmp_path / "out", [record(1)])
    b = directory(tmp_path / "b", [record(1)])
    for text, message in (
        *((t, 'must be an object with the "checkpoint"') for t in ("[]", "{}", '{"checkpoint": 3}', "null")),
        *((t, "cannot be read: ") for t in ("", "{", "[" * 100_000, b"\xff")),
    ):
        (a / "settings.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        for use in (lambda: opened(a, [record(1)]), lambda: stats.compare([b, a])):
            with pytest.raises(BadInput, match=f"{a}/settings.json .*{message}") as error:
                use()
            assert "\n" not in str(error.value)


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


def test_one_evaluation_at_a_time_writes_to_a_directory(tmp_path):
    out = directory(tmp_path / "out", [record(1)])
    before = {path: path.read_bytes() for path in out.iterdir()}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    other.stdout.readline()
    for settings in (SETTINGS, {"checkpoint": "y"}):  # nothing is read
        with pytest.raises(BadInput, match=f"{out}: another process is running there; wait for it"):
            opened(out, [record(1)], settings)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    assert opened(out, [record(1)]).done == {("t-1", 0)}
    for path, settings_file in (
        (tmp_path / "new", False),
        (tmp_path / "half", True),
    ):  # killed before there were settings
        path.mkdir()
        (path / "lock").write_text("evaluation\n")
        (path / "settings.json.partial").write_text("{" * settings_file)
        assert opened(path, [record(1)]).done == set()
    for path in ("/proc/out", "/dev/null/out"):
        with pytest.raises(BadInput, match=f"{path} cannot be written: .*; choose another --out"):
            opened(path, [])


def test_other_settings_and_other_directories_are_refused_untouched(tmp_path):
    out = directory(tmp_path / "out", [record(1)])
    before = {path: path.read_bytes() for path in out.iterdir()}
    for settings, message in (
        ({"checkpoint": "out", "lengths": [20]}, "other settings: lengths [10] there, [20] here"),
        ({"checkpoint": "out"}, "lengths [10] there, absent here"),
        ({"checkpoint": "out", "lengths": [10], "mode": "chat"}, 'mode absent there, "chat" here'),
        ({"checkpoint": "out", "lengths": [10], "mode": None}, "mode absent there, null here"),
    ):
        with pytest.raises(BadInput) as error:
            opened(out, [record(1)], settings)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for path in (tmp_path / "other", tmp_path / "other" / "thesis.tex"):
        with pytest.raises(BadInput, match="holds no evaluation|cannot be written: File exists"):
            opened(path, [])


def test_the_fingerprint_changes_with_the_weights_only(tmp_path):
    for name, value in (("a", 0.0), ("b", 0.0), ("c", 1e-3)):
        model = Qwen3.from_pretrained(TINY)
        with torch.no_grad():
            next(model.parameters())[0, 0] += value
        model.save_pretrained(tmp_path / name)
    a, b, c = (weights_fingerprint(tmp_path / name) for name in "abc")
    assert a == b == weights_fingerprint(str(tmp_path / "a")) and a != c


# ----------------------------------------------------------------------------------------------------- engine


@pytest.fixture(scope="module")
def engine():
    engine = Engine(TINY, 6000, rope_scaling=YARN)
    yield engine
    engine.close()


def test_yarn_reaches_vllm_beyond_the_context(engine):
    """The engine's own configuration, and a prompt of 5,000 tokens continued as our model does with the same
    RoPE."""
    config = engine.rollout.engine.llm_engine.model_config
    assert (
        config.hf_config.rope_parameters == {**YARN, "rope_theta": 10000.0} and config.max_model_len == 6000
    )
    ids = torch.randint(0, 800, (5000,), generator=torch.Generator().manual_seed(3)).tolist()
    requests = [("a", ids, {**GREEDY, "max_tokens": 6})]
    [(_, completion, _)] = engine.stream(requests)
    model = Qwen3.from_pretrained(TINY)
    wanted = {}
    for rope_scaling in (YARN, None):
        model.config = dataclasses.replace(Qwen3Config.from_pretrained(TINY), rope_scaling=rope_scaling)
        scaled = Qwen3(model.config)
        scaled.load_state_dict(model.state_dict())
        with torch.no_grad():
            logits = scaled(torch.tensor([ids + completion]))[0, 4999:-1]
        wanted[str(rope_scaling)] = logits.argmax(-1).tolist()
    assert completion == wanted[str(YARN)] != wanted["None"]


def test_run_writes_each_sample_once_and_goes_on(engine, tmp_path, capfd):
    tokenizer = load_tokenizer(TINY, 896)
    asked = []

    def ids(i):
        asked.append(i)
        return [5 + i, 6, 7]

    items = [
        {
            "id": f"x-{i}",
            "task": "x",
            "length": 8,
            "prompt_ids": lambda i=i: ids(i),
            "max_tokens": 5,
            "expected": i,
        }
        for i in range(700)
    ]  # more than the engine holds at once

    def go(out, items, seeds=2):
        expected = {
            (item["id"], seed): (item["task"], item["length"]) for item in items for seed in range(seeds)
        }
        results = Results(out, {"checkpoint": str(seeds)}, expected)

        def score(item, said):
            return {"answer": said[:3], "score": (item["expected"] + len(said)) / 1000}

        hot = {**GREEDY, "temperature": 2.0}
        options = subject.Options(seeds=seeds, log_prompts=True)
        evaluate(engine, results, iter(items), options, hot, tokenizer, score)
        return results.read()

    records = go(tmp_path / "a", items)
    assert [(r["id"], r["seed"]) for r in records] == [(f"x-{i}", s) for i in range(700) for s in (0, 1)]
    assert asked == list(range(700)) and len({r["prediction"] for r in records}) > 1000
    for r in records:
        assert (
            r["score"] == (r["expected"] + len(r["prediction"])) / 1000
            and r["prompt_tokens"] == 3
            and r["answer"] == r["prediction"][:3]
            and r["prompt"] == tokenizer.decode([5 + r["expected"], 6, 7], skip_special_tokens=False)
            and r["length"] == 8
        )
        assert r["completion_tokens"] <= 5 and (r["finished"] or r["completion_tokens"] == 5)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "settings.json").write_text('{"checkpoint": "2"}')
    kept = [r for i, r in enumerate(records) if i % 5 and i < 1000]
    (tmp_path / "b" / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    capfd.readouterr()
    assert go(tmp_path / "b", items) == records
    bar = re.findall(r"(\d+)/(\S+) \[", capfd.readouterr().err)
    assert bar[0] == (str(len(kept)), "1400") and bar[-1] == ("1400", "1400")


def test_a_text_ends_a_completion(engine, tmp_path):
    tokenizer = load_tokenizer(TINY, 896)
    item = {"id": "x", "task": "x", "length": 8, "max_tokens": 40, "expected": ""}
    item["prompt_ids"] = encode_prompt(
        tokenizer, {"id": "x", "prompt": "What is the code for Max?"}, False, 99
    )

    def go(stop):
        results = Results(tmp_path / f"out{stop}", {"checkpoint": "x"}, {("x", 0): ("x", 8)})
        how = subject.Options(), GREEDY, tokenizer, lambda *_: {"answer": None, "score": 0.0}, stop
        evaluate(engine, results, [item], *how)
        return results.read()[0]

    whole = go("")
    stop = whole["prediction"][9:12]
    cut = go(stop)
    assert whole["prediction"].startswith(cut["prediction"]) and cut["finished"]
    assert cut["prediction"].count(stop) == 1 and cut["completion_tokens"] < whole["completion_tokens"]


def test_an_engine_that_cannot_start_says_so_in_one_line():
    with pytest.raises(BadInput, match="vLLM cannot start with 9000 tokens a text: User-specified max_model"):
        Engine(TINY, 9000)


# ------------------------------------------------------------------------------------------------- statistics


def test_mean_and_standard_error_are_over_items():
    records = [
        record(i, score, seed)
        for i, pair in enumerate([(1, 1), (0, 1), (0, 0), (1, 0)])
        for seed, score in enumerate(pair)
    ]
    few = {"low": None, "high": None}
    assert stats.summarize(records) == {"score": 0.5, **few, "n": 4}  # item means 1, 1/2, 0, 1/2
    assert stats.shown(stats.percent(stats.summarize(records)), 2) == "50.00 [-]"
    assert stats.summarize(records[:1]) == {"score": 1.0, **few, "n": 1}
    records += [record(4, 1, seed) for seed in (0, 1)]
    summary = stats.summarize(records)  # with 0 and 1 seven values, of mean 4/7 and mean square 3.5/7
    half = 2.447 * math.sqrt((3.5 / 7 - (4 / 7) ** 2) / 7)  # Student's t of 6
    assert summary["score"] == 0.6 and summary["n"] == 5
    assert summary["low"] == pytest.approx(4 / 7 - half, abs=1e-3)
    assert summary["high"] == pytest.approx(4 / 7 + half, abs=1e-3)


def test_intervals_by_hand():
    """Wilson's of 0 and 5 of 5, 81 of 263 (Newcombe 1998, table 1); equal fractions have a width, too."""
    assert stats.interval([0.0] * 5) == (pytest.approx(0, abs=1e-9), pytest.approx(0.4345, abs=1e-4))
    assert stats.interval([1.0] * 5) == (pytest.approx(0.5655, abs=1e-4), pytest.approx(1))
    wilson = pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4)
    assert stats.interval([1.0] * 81 + [0.0] * 182) == wilson
    assert stats.interval([1.0, 0.0, 1.0, 0.0]) == (None, None)
    low, high = stats.interval([0.5] * 10)
    assert 0.3 < low < 0.5 < high < 0.7 and low + high == pytest.approx(1)
    table = {6: 2.4469, 7: 2.3646, 10: 2.2281, 30: 2.0423, 101: 1.9837}
    assert {v: stats.t_quantile(v) for v in table} == pytest.approx(table, abs=2e-3)


def test_a_score_is_rounded_as_rulers():
    """string_match_all sums a cell's scores one by one, as here; numpy's sum differs in one cell of ten."""
    rng = random.Random(0)
    for _ in range(200):
        scores = [rng.randint(0, 10) / 10 for _ in range(80)]
        summary = stats.summarize([record(i, score) for i, score in enumerate(scores)])
        assert round(100 * summary["score"], 2) == round(sum(scores) / len(scores) * 100, 2)


def test_a_weighted_mean_has_the_intervals_of_its_parts():
    parts = [{"score": 50, "low": 47, "high": 54}, {"score": 90, "low": 86, "high": 93}]
    assert stats.weighted_mean(parts, [1, 1]) == {"score": 70, "low": 67.5, "high": 72.5}  # 3, 4, 5
    assert stats.weighted_mean(parts, [3, 1])["score"] == 60
    none = {"score": 0, "low": None, "high": None}
    assert stats.weighted_mean([parts[0], none], [1, 1]) == {"score": 25, "low": None, "high": None}


def test_mcnemar_by_hand():
    assert stats.mcnemar(0, 0) == 1 and stats.mcnemar(3, 3) == 1
    assert stats.mcnemar(0, 5) == stats.mcnemar(5, 0) == 2 / 32
    assert stats.mcnemar(1, 7) == 2 * (1 + 8) / 256
    assert stats.mcnemar(2, 8) == 2 * (1 + 10 + 45) / 1024
    assert 0 < stats.mcnemar(9000, 10_000) < 1e-10  # (1000 / sqrt(19000) is 7 standard deviations)


def test_paired_by_hand():
    a, b = [1, 0, 0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]  # five won, none lost
    r = stats.paired(a, b)
    assert (r["n"], r["a"], r["b"], r["difference"]) == (8, 0.25, 0.875, 0.625)
    assert r["p"] == 2 / 32 and r["test"] == "McNemar exact"
    half = 2.262 * math.sqrt((7 / 10 - 0.25) / 10)  # with 1 and -1 ten differences, six of 1, one of -1
    assert r["low"] == pytest.approx(0.5 - half, abs=1e-3) and r["high"] == pytest.approx(
        0.5 + half, abs=1e-3
    )
    assert r == stats.paired(a, b)
    assert stats.paired(b, a)["difference"] == -0.625 and stats.paired(a, a)["p"] == 1


def test_paired_fractions():
    """Sign flips: of the 2^6 sign patterns of six equal differences two are as extreme. The interval of many
    is the normal one; three differences are too few, and equal ones have an interval of some width."""
    assert [stats.paired([1, 1, 1], [0, 0, 0])[key] for key in ("low", "high", "p")] == [None, None, 0.25]
    r = stats.paired([0.25] * 6, [0.5] * 6)
    assert r["test"] == "sign flips" and r["p"] == 2 / 64 and r["low"] < 0.1 < 0.3 < r["high"]
    few, many = [stats.sign_flips(np.array([1.0] * 9 + [-1.0] * 3 + [0.0] * n)) for n in (0, 1)]
    assert few == 2 * (220 + 66 + 12 + 1) / 4096  # at least 9 of 12 alike: all signs
    assert many == pytest.approx(few, abs=0.02)  # random ones, standard deviation 0.0035
    assert stats.paired([0.5, 0.25], [0.5, 0.25])["p"] == 1
    d = [math.sin(i) for i in range(400)]
    r = stats.paired([0.0] * 400, d)
    spread = 1.96 * math.sqrt(0.5 / 400)
    assert r["low"] == pytest.approx(sum(d) / 400 - spread, abs=0.002)
    assert r["high"] == pytest.approx(sum(d) / 400 + spread, abs=0.002)


def compared(text):
    """The table of --compare without its head."""
    return dict(list(rows_of(text).items())[2:])


def test_compare_pairs_what_both_have(tmp_path):
    a = directory(tmp_path / "a", [record(i, i % 2, task=t) for t in "uv" for i in range(8)], samples=8)
    b = directory(tmp_path / "b", [record(i, 1, task=t) for t in "uv" for i in range(6)], samples=6)
    text = stats.compare([a, b / "results.jsonl"])
    assert "12 samples in both, 4 only in A" in text and text == stats.compare([a, b])
    rows = compared(text)
    assert rows["all"][:4] == ["12", "50.00", "100.00", "+50.00"] and rows["all"][5] == "0.0312"  # 2 / 2^6
    assert rows["u"][:4] == ["6", "50.00", "100.00", "+50.00"] and rows["u"][5] == "0.25"  # 2 / 2^3


def test_compare_has_a_row_for_each_class_of_task_and_length(tmp_path):
    """Task x gains 1 of 3 short, loses 1 of 2 long; task y is equal."""
    made = [
        ("x", "short", 0, 1),
        ("x", "short", 1, 1),
        ("x", "short", 0, 0),
        ("x", "long", 1, 0),
        ("x", "long", 1, 1),
    ]
    made += [("y", "medium", 1, 1), ("y", "short", 0, 0)]
    paths = []
    for name, column in (("a", 2), ("b", 3)):
        records = [record(i, row[column], task=row[0], length=row[1]) for i, row in enumerate(made)]
        paths.append(directory(tmp_path / name, records))
    rows = compared(stats.compare(paths, ("short", "medium", "long")))
    assert [[name, *row[:5]] for name, row in rows.items()] == [
        ["all", "7", "57.14", "57.14", "+0.00", rows["all"][4]],
        ["x", "5", "60.00", "60.00", "+0.00", rows["x"][4]],
        ["y", "2", "50.00", "50.00", "+0.00", "too few samples"],
        ["short", "4", "25.00", "50.00", "+25.00", "too few samples"],
        ["medium", "1", "100.00", "100.00", "+0.00", "too few samples"],
        ["long", "2", "100.00", "50.00", "-50.00", "too few samples"],
    ]
    # Two of seven differ, one each way: (1 + 1 + 2) / 9 is the mean square of nine, t of 8 is 2.306.
    low, high = (float(bound) for bound in rows["all"][4].split(" to "))
    assert -low == high == pytest.approx(100 * 2.306 * (4 / 9 / 9) ** 0.5, abs=0.05)
    directory(
        tmp_path / "c", [record(i, length=n) for i, n in enumerate([64, 1000, 8])]
    )  # by size; no row for one task
    rows = compared(stats.compare([tmp_path / "c", tmp_path / "c"]))
    assert {name: row[0] for name, row in rows.items()} == {"all": "3", "8": "1", "64": "1", "1000": "1"}
    assert list(rows) == ["all", "8", "64", "1000"]


def test_compare_refuses(tmp_path):
    a = directory(tmp_path / "a", [record(1)], tasks=["t"])
    for name, settings in (
        ("b", {"tasks": ["u"]}),
        ("c", {"tasks": ["t"], "lengths": [20]}),
        ("d", {"tasks": ["t"], "reward_source": {"mine:score": "ab"}}),
    ):
        other = directory(tmp_path / name, [record(1)], **settings)
        changed = {"b": "tasks", "c": "lengths", "d": "reward source"}[name]
        with pytest.raises(BadInput, match=f"cannot be compared: {changed} "):
            stats.compare([a, other])
    without = directory(tmp_path / "without", [record(1)], tasks=["t"], context=False)
    assert "1 samples in both" in stats.compare([without, a])  # eval_longbench.py --no-context
    with pytest.raises(BadInput, match="no sample in common"):
        stats.compare([a, directory(tmp_path / "e", [record(2)], tasks=["t"])])
    for path in ("none", "none/results.jsonl", "f"):
        (tmp_path / "f").mkdir(exist_ok=True)
        with pytest.raises(BadInput, match=f"{tmp_path / path}(/results.jsonl)? does not exist"):
            stats.compare([a, tmp_path / path])
    (tmp_path / "e" / "settings.json").unlink()
    with pytest.raises(BadInput, match=r"e/settings.json cannot be read: No such file"):
        stats.compare([a, tmp_path / "e"])
    with pytest.raises(BadInput, match="two"):
        stats.compare([a])


def test_table():
    assert stats.table([["a", "long"], ["name", "1"]]) == "a     long\nname     1"
    rows = ["| a    | long |", "| ---- | ---: |", "| name |    1 |"]
    assert stats.markdown([["a", "long"], ["name", "1"]]) == "\n".join(rows)
