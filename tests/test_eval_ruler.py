"""eval_ruler.py run as a script with real vLLM on assets/tiny: scores, interruption, ranks, YaRN, thinking, refusals."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run_ranks, run_script
from tokenizers import Tokenizer

import ruler
from model import Qwen3, Qwen3Config

TINY = ROOT / "assets" / "tiny"
TASKS = ["niah_single_1", "fwe"]
ARGUMENTS = [TINY, "--tasks", *TASKS, "--lengths", 640, 700, "--samples", 4]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("ruler") / "cache"


def evaluate(cache, out, *arguments, run=run_script):
    """-> (results.json, records, stdout)"""
    result = run(*(["eval_ruler.py"] if run is run_script else []), *arguments, "--cache", cache, "--out", out)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((out / "results.json").read_text()), lines(out), result.stdout


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def whole(cache, tmp_path_factory):
    """An uninterrupted evaluation by one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, *evaluate(cache, out, *ARGUMENTS)


def test_scores_are_those_of_the_predictions(whole, cache):
    out, results, records, stdout = whole
    assert sorted(path.name for path in out.iterdir()) == ["heatmap.png", "results.json", "results.jsonl", "settings.json"]
    samples = {}
    for path in cache.iterdir():
        name, length = path.name.split("-")[:2]
        samples |= {f"{name}-{length}-{row['index']}": row for row in ruler.read(path, 4)}
    assert len(records) == 16 and {r["id"] for r in records} == set(samples)
    for r in records:
        assert r["score"] == ruler.score(r["task"], r["prediction"], samples[r["id"]]["outputs"])
        budget = ruler.TASKS[r["task"]].tokens_to_generate
        assert r["prompt_tokens"] + budget == samples[r["id"]]["length"] <= r["length"]
        assert r["completion_tokens"] <= budget and (r["finished"] or r["completion_tokens"] == budget) and r["seed"] == 0
    for task in TASKS:
        for length in (640, 700):
            scores = [r["score"] for r in records if (r["task"], r["length"]) == (task, length)]
            cell = results["scores"][task][str(length)]
            assert cell["n"] == 4 and cell["score"] == round(100 * sum(scores) / 4, 2)
            error = 100 * torch.tensor(scores, dtype=torch.float64).std().item() / 2
            assert cell["stderr"] == pytest.approx(error)
            assert f"{cell['score']:.2f} ±{error:.2f}" in next(s for s in stdout.splitlines() if s.startswith(task))
    assert results["complete"] is False and "2 of 13 tasks, 0 of its 6 lengths" in stdout
    assert results["settings"]["mode"] == "chat" and results["settings"]["sampling"]["temperature"] == 0
    assert set(results["versions"]) >= {"torch", "tokenizers", "python", "commit"} and "generated substitute" in stdout
    assert "left out: qa_1: not asked for" in stdout and results["left_out"]["qa_1"] == "not asked for"


def test_averages_by_hand(cache, tmp_path, whole):
    """Results written by hand: cells 100, 50 / 0, 25 at the two lengths; the script only reports them."""
    out, _, records, _ = whole
    shutil.copytree(out, tmp_path / "out")
    scores = {("niah_single_1", 640): [1, 1, 1, 1], ("niah_single_1", 700): [1, 0, 1, 0]}
    scores |= {("fwe", 640): [0, 0, 0, 0], ("fwe", 700): [1 / 3, 1 / 3, 1 / 3, 0]}
    made = [{**r, "score": scores[r["task"], r["length"]][int(r["id"][-1])]} for r in records]
    (tmp_path / "out" / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    results, _, stdout = evaluate(cache, tmp_path / "out", *ARGUMENTS)
    averages = results["averages"]
    assert results["scores"]["fwe"]["700"]["score"] == 25 and averages["by_length"]["640"]["score"] == 50
    assert averages["by_length"]["700"]["score"] == 37.5 and averages["Avg"]["score"] == 43.75
    assert averages["wAvg(inc)"]["score"] == pytest.approx((50 + 2 * 37.5) / 3)
    assert averages["wAvg(dec)"]["score"] == pytest.approx((2 * 50 + 37.5) / 3)
    deviation = (100 * (1 / 3) ** 0.5 / 2) / 2, (100 / 6) / 2 / 2  # of the cells 50 and 25, in a mean of two
    assert averages["by_length"]["700"]["stderr"] == pytest.approx((deviation[0] ** 2 + deviation[1] ** 2) ** 0.5)
    assert "Avg 43.75" in stdout
    compared = run_script("eval_ruler.py", "--compare", out, tmp_path / "out")
    assert compared.returncode == 0 and "16 samples in both" in compared.stdout and "sign flips" in compared.stdout


def test_a_killed_run_goes_on_and_equals_an_uninterrupted_one(cache, tmp_path, whole):
    out, command = (
        tmp_path / "out",
        [sys.executable, "eval_ruler.py", *ARGUMENTS, "--cache", cache, "--out", tmp_path / "out"],
    )
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE)
    path = out / "results.jsonl"
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()
    kept = lines(out)
    assert 0 < len(kept) < 16 and not (out / "results.json").exists()
    with open(path, "a") as file:
        file.write(json.dumps(kept[0])[:40])  # as a kill within a write leaves it
    refused = run_script("eval_ruler.py", *ARGUMENTS, "--seed", 43, "--cache", cache, "--out", out)
    assert refused.returncode == 1 and "other settings: seed 42 there, 43 here" in refused.stderr
    result = run_script("eval_ruler.py", *ARGUMENTS, "--cache", cache, "--out", out)
    assert result.returncode == 0 and "last line is unfinished" in result.stderr
    assert lines(out) == whole[2]
    assert json.loads((out / "results.json").read_text())["scores"] == whole[1]["scores"]


def test_two_ranks_give_the_results_of_one(cache, tmp_path, whole):
    results, records, _ = evaluate(
        cache, tmp_path / "out", *ARGUMENTS, run=lambda *a: run_ranks(2, ROOT / "eval_ruler.py", *a)
    )
    assert records == whole[2] and results["scores"] == whole[1]["scores"] and results["machine"]["ranks"] == 2
    assert not list((tmp_path / "out").glob("results.*.jsonl"))


def test_two_ranks_refuse_in_one_line(cache, whole):
    result = run_ranks(2, ROOT / "eval_ruler.py", *ARGUMENTS, "--seed", 44, "--cache", cache, "--out", whole[0])
    assert result.returncode != 0 and len(re.findall("error: .*other settings: seed", result.stderr)) == 1


def test_lengths_beyond_the_context_need_yarn(cache, tmp_path):
    """In base mode, which has no template."""
    arguments = [TINY, "--mode", "base", "--tasks", "fwe", "--samples", 1, "--lengths", 5000]
    result = run_script("eval_ruler.py", *arguments, "--cache", cache, "--out", tmp_path / "out")
    assert result.returncode == 1 and "give --yarn 2, or --lengths up to 4096" in result.stderr
    results, records, stdout = evaluate(cache, tmp_path / "out", *arguments, "--yarn", 2)
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 4096, "factor": 2.0}
    assert results["settings"]["rope_scaling"] == rope and "'factor': 2.0" in stdout
    assert records[0]["prompt_tokens"] > 4096 and results["settings"]["template"] == "{task_template}"


def bigrams(path, chain):
    """A checkpoint that after a token of `chain` always says the next one."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    config = json.loads((TINY / "config.json").read_text())
    model = Qwen3(Qwen3Config.from_dict({**config, "tie_word_embeddings": False, "num_hidden_layers": 1}))
    ids = [tokenizer.encode(token, add_special_tokens=False).ids for token in chain]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == len(ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        for place, (now, following) in enumerate(itertools.pairwise(ids)):
            model.model.embed_tokens.weight[now[0], place] = 1
            model.lm_head.weight[following[0], place] = 30
    model.save_pretrained(path, companions_from=TINY)
    return path


def test_thinking_scores_what_follows_it(cache, tmp_path):
    """Models that say the number of the first sample after </think>, or before it only, or never end thinking."""
    tokenizer, corpora = Tokenizer.from_file(str(TINY / "tokenizer.json")), ruler.Corpora()
    for seed in range(1000):  # a number of seven different digits
        made = ruler.generate("niah_single_1", 640, 1, seed, tokenizer, ruler.TEMPLATES["qwen3-thinking"], corpora, False)
        digits = made[0]["outputs"][0]
        if len(set(digits)) == 7:
            break
    fixed = ["--mode", "thinking", "--tasks", "niah_single_1", "--lengths", 640, "--samples", 1, "--seed", seed]
    for label, chain, score in (
        ("after", ["\n", "</think>", *digits, "<|im_end|>"], 100),
        ("before", ["\n", *digits, "</think>", "<|im_end|>"], 0),
    ):
        model = bigrams(tmp_path / label, chain)
        results, records, stdout = evaluate(
            cache, tmp_path / f"{label}-out", model, *fixed, "--thinking-budget", 300, "--seeds", 2
        )
        assert results["averages"]["Avg"]["score"] == score and results["averages"]["Avg_by_seed"] == [score, score]
        assert [r["seed"] for r in records] == [0, 1] and all(r["finished"] for r in records)
        assert digits in records[0]["prediction"] and "temperature 0.6, top_p 0.95, top_k 20" in stdout


# ------------------------------------------------------------------------------------------------------------- refusals


def edited(tmp_path, **changes):
    shutil.copytree(TINY, tmp_path / "edited")
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "edited" / "config.json").write_text(json.dumps({**config, **changes}))
    return tmp_path / "edited"


def without_tokenizer(tmp_path):
    (edited(tmp_path) / "tokenizer.json").unlink()
    return tmp_path / "edited"


REFUSALS = {
    "no checkpoint": (lambda t: [], "no checkpoint is given"),
    "swallowed": (lambda t: ["--lengths", 640, "--tasks", "vt", TINY], "no checkpoint is given"),
    "no directory": (lambda t: [t / "none"], "none is not a checkpoint"),
    "no tokenizer": (lambda t: [without_tokenizer(t)], "tokenizer.json is missing"),
    "not its weights": (lambda t: [edited(t, intermediate_size=300)], "has shape"),
    "too long": (lambda t: [TINY], "give --yarn 32, or --lengths 4096"),
    "no room": (lambda t: [TINY, "--lengths", 640, "--mode", "thinking"], "--thinking-budget 8192"),
    "yarn": (lambda t: [TINY, "--lengths", 640, "--yarn", 1], "--yarn must be more than 1"),
    "task": (lambda t: [TINY, "--lengths", 640, "--tasks", "niah"], "'niah' is not a RULER task; they are"),
    "blocked": (lambda t: [TINY, "--lengths", 640, "--tasks", "vt", "qa_1"], "--tasks qa_1: squad.json or dev-v2.0.json"),
    "too short": (lambda t: [TINY, "--lengths", 300, "--tasks", "fwe"], "300 tokens are too few; from 586 on"),
    "data": (lambda t: [TINY, "--lengths", 640, "--data-dir", t / "none"], "none is not a directory"),
    "seeds": (lambda t: [TINY, "--lengths", 640, "--seeds", 2], "--seeds 2 needs --mode thinking"),
    "samples": (lambda t: [TINY, "--samples", 0], "--samples must be at least 1"),
    "length": (lambda t: [TINY, "--lengths", 640, 0], "--lengths must be at least 1"),
    "no GPU": (lambda t: [TINY, "--lengths", 640, "--tensor-parallel", 2], "--tensor-parallel 2"),
    "toml": (lambda t: ["--config", toml(t, 'lengths = ["a"]')], "lengths must be a list of int"),
    "occupied": (
        lambda t: [TINY, "--lengths", 640, "--tasks", "fwe", "--samples", 1, "--out", ROOT / "tests"],
        "no evaluation",
    ),
    "compare": (lambda t: ["--compare", t / "a", t / "b"], "settings.json cannot be read"),
}


def toml(tmp_path, text):
    (tmp_path / "c.toml").write_text(text)
    return tmp_path / "c.toml"


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_gets_one_clear_line_and_leaves_nothing(case, cache, tmp_path):
    make, message = REFUSALS[case]
    arguments = ["--cache", cache, *([] if case == "occupied" else ["--out", tmp_path / "out"])]
    made = make(tmp_path)
    result = run_script("eval_ruler.py", *arguments, *made)
    assert result.returncode == 1, result.stderr[-2000:]
    errors = [line for line in result.stderr.splitlines() if "eval_ruler.py: error: " in line]
    assert len(errors) == 1 and message in errors[0], result.stderr[-2000:]
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()


def test_help_and_a_toml_file(cache, tmp_path):
    result = run_script("eval_ruler.py", "--help")
    assert result.returncode == 0 and "wAvg(inc)" in result.stdout and "--thinking-budget" in result.stdout
    file = toml(tmp_path, f'checkpoint = "{TINY}"\nlengths = [640]\ntasks = ["vt"]\nyarn = 1')
    result = run_script("eval_ruler.py", "--config", file, env={**os.environ})
    assert result.returncode == 1 and "--yarn must be more than 1" in result.stderr
