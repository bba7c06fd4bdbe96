"""eval_ruler.py with real vLLM on assets/tiny: scores, interruption, ranks, YaRN, thinking, refusals."""

import itertools
import json
import shutil
import signal

import pytest
import torch
from conftest import ROOT, killed, output_of, refusal, rows_of, run_here, run_ranks, run_script
from tokenizers import Tokenizer

from base.cli import BadInput
from evals.ruler import depth
from evals.ruler import sets as ruler
from model import Qwen3, Qwen3Config

TINY = ROOT / "assets" / "tiny"
TASKS = ["niah_single_1", "fwe"]
ARGUMENTS = [TINY, "--tasks", *TASKS, "--lengths", 640, 700, "--samples", 4]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("ruler") / "cache"


def evaluate(cache, out, *arguments, run=output_of):
    """-> (results.json, records, stdout)"""
    stdout = run("eval_ruler.py", *arguments, "--cache", cache, "--out", out)
    return json.loads((out / "results.json").read_text()), lines(out), stdout


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def whole(cache, tmp_path_factory):
    """An uninterrupted evaluation by one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, *evaluate(cache, out, *ARGUMENTS)


def test_scores_are_those_of_the_predictions(whole, cache):
    out, results, records, stdout = whole
    files = "depth.png heatmap.png lock report.html results.json results.jsonl results.md settings.json"
    files = files.split()
    assert sorted(path.name for path in out.iterdir()) == files
    assert stdout.startswith((out / "results.md").read_text())
    samples = {}
    for path in cache.glob("*.jsonl"):
        name, length = path.name.split("-")[:2]
        samples |= {f"{name}-{length}-{row['index']}": row for row in ruler.read(path, 4)}
    assert len(records) == 16 and {r["id"] for r in records} == set(samples)
    for r in records:
        assert r["expected"] == samples[r["id"]]["outputs"]
        assert r["answer"] == [a for a in r["expected"] if a.lower() in r["prediction"].lower()]
        assert ("depths" in r) == (r["task"] == "niah_single_1")
        for value, deep in zip(r["expected"], r.get("depths", [])):
            text = samples[r["id"]]["input"]
            assert deep == pytest.approx(100 * text.index(value) / len(text), abs=0.05)
        assert r["score"] == ruler.score(r["task"], r["prediction"], r["expected"])
        budget = ruler.TASKS[r["task"]].tokens_to_generate
        assert r["prompt_tokens"] + budget == samples[r["id"]]["length"] <= r["length"]
        assert (
            r["completion_tokens"] <= budget
            and (r["finished"] or r["completion_tokens"] == budget)
            and r["seed"] == 0
        )
    for task in TASKS:
        for length in (640, 700):
            scores = [r["score"] for r in records if (r["task"], r["length"]) == (task, length)]
            cell = results["scores"][task][str(length)]
            assert cell == {"score": round(100 * sum(scores) / 4, 2), "low": None, "high": None, "n": 4}
            assert rows_of(stdout)[task][length > 640] == f"{cell['score']:.2f} [-]"
    assert results["complete"] is False and "2 of 13 tasks, 0 of its 6 lengths" in stdout
    assert results["settings"]["mode"] == "chat" and results["settings"]["sampling"]["temperature"] == 0
    assert set(results["versions"]) >= {"torch", "tokenizers", "python", "commit", "numpy", "wonderwords"}
    assert "generated substitute" in stdout and "left out" not in stdout and results["left_out"] == {}


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
    assert (
        averages["by_length"]["700"] == {"score": 37.5, "low": None, "high": None}
        and averages["Avg"]["score"] == 43.75
    )
    assert averages["wAvg(inc)"]["score"] == pytest.approx((50 + 2 * 37.5) / 3)
    assert averages["wAvg(dec)"]["score"] == pytest.approx((2 * 50 + 37.5) / 3)
    assert "Avg 43.75" in stdout
    compared = output_of("eval_ruler.py", "--compare", out, tmp_path / "out")
    assert "16 samples in both" in compared and "sign flips" in compared


def test_needles_by_depth():
    """Of two needles at 12% one is found, by one of two seeds; samples are counted, not needles."""
    records = [
        {
            "id": "a",
            "length": 64,
            "depths": [12.0, 18.5, 100.0],
            "expected": ["1", "2", "3"],
            "answer": ["1"],
        },
        {"id": "a", "length": 64, "depths": [12.0, 18.5, 100.0], "expected": ["1", "2", "3"], "answer": []},
        {"id": "b", "length": 64, "expected": ["1"], "answer": []},
        {"id": "c", "length": 32, "depths": [0.0], "expected": ["1"], "answer": ["1"]},
    ]
    few = {"low": None, "high": None, "n": 1}
    assert depth.by_depth(records) == {
        ("10-20", 64): {"score": 25.0, **few},
        ("90-100", 64): {"score": 0.0, **few},
        ("0-10", 32): {"score": 100.0, **few},
    }
    assert len(depth.CLASSES) == 10 and depth.depths("vt", "x 1", ["1"]) == []


def test_a_killed_run_goes_on_and_equals_an_uninterrupted_one(cache, tmp_path, whole):
    out = tmp_path / "out"
    command = "eval_ruler.py", *ARGUMENTS, "--cache", cache, "--out", out
    with killed(6, *command) as process:  # it lives, and is in the middle
        assert f"{out}: another process is running there" in refusal(*command)
    assert process.returncode == -signal.SIGKILL
    kept = lines(out)
    assert len(kept) == 6 and not (out / "results.json").exists()
    with open(out / "results.jsonl", "a") as file:
        file.write(json.dumps(kept[0])[:40])  # as a kill within a write leaves it
    with pytest.raises(BadInput, match="other settings: seed 42 there, 43 here"):
        run_here("eval_ruler.py", *ARGUMENTS, "--seed", 43, "--cache", cache, "--out", out)
    result = run_script(*command)
    assert result.returncode == 0 and "last line is unfinished" in result.stderr
    results, records = json.loads((out / "results.json").read_text()), lines(out)
    assert records == whole[2] and results["scores"] == whole[1]["scores"]


def test_two_ranks_give_the_results_of_one(cache, tmp_path, whole):
    def ranks(script, *arguments):
        result = run_ranks(2, ROOT / script, *arguments)
        assert result.returncode == 0, result.stderr[-3000:]

    results, records, _ = evaluate(cache, tmp_path / "out", *ARGUMENTS, run=ranks)
    assert (
        records == whole[2] and results["scores"] == whole[1]["scores"] and results["machine"]["ranks"] == 2
    )
    assert not list((tmp_path / "out").glob("results.*.jsonl"))


def test_two_ranks_refuse_in_one_line(cache, whole, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "out")  # whose lock this process cannot still hold
    result = run_ranks(2, ROOT / "eval_ruler.py", *ARGUMENTS, "--seed", 44, "--cache", cache, "--out", out)
    said = [
        line for line in result.stderr.splitlines() if "error: " in line and "traceback :" not in line
    ]  # torchrun's last
    assert result.returncode != 0 and len(said) == 1 and "other settings: seed 42 there, 44 here" in said[0]


def test_lengths_beyond_the_context_need_yarn(cache, tmp_path):
    """In base mode, which has no template."""
    arguments = [TINY, "--mode", "base", "--tasks", "fwe", "--samples", 1, "--lengths", 5000]
    with pytest.raises(BadInput, match="4096 tokens; give --yarn 2; without that: up to 4096"):
        run_here("eval_ruler.py", *arguments, "--cache", cache, "--out", tmp_path / "out")
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
    """Models that say the number of the first sample after </think>, or before it only, or never end
    thinking."""
    tokenizer, corpora = Tokenizer.from_file(str(TINY / "tokenizer.json")), ruler.Corpora()
    for seed in range(1000):  # a number of seven different digits
        made = ruler.generate(
            "niah_single_1", 640, 1, seed, tokenizer, ruler.TEMPLATES["qwen3-thinking"], corpora, False
        )
        digits = made[0]["outputs"][0]
        if len(set(digits)) == 7:
            break
    fixed = [
        "--mode",
        "thinking",
        "--tasks",
        "niah_single_1",
        "--lengths",
        640,
        "--samples",
        1,
        "--seed",
        seed,
    ]
    for label, chain, score in (
        ("after", ["\n", "</think>", *digits, "<|im_end|>"], 100),
        ("before", ["\n", *digits, "</think>", "<|im_end|>"], 0),
    ):
        model = bigrams(tmp_path / label, chain)
        results, records, stdout = evaluate(
            cache, tmp_path / f"{label}-out", model, *fixed, "--thinking-budget", 300, "--seeds", 2
        )
        assert results["averages"]["Avg"]["score"] == score and results["averages"]["Avg_by_seed"] == [
            score,
            score,
        ]
        assert [r["seed"] for r in records] == [0, 1] and all(r["finished"] for r in records)
        assert digits in records[0]["prediction"] and "temperature 0.6, top_p 0.95, top_k 20" in stdout


# --------------------------------------------------------------------------------------------------- refusals


def test_missing_files_are_told_before_samples_are_made(tmp_path, capfd):
    """And the other tasks would run: here their windows are too small."""
    with pytest.raises(BadInput, match="too few tokens for niah_single_1 at 400"):
        run_here(
            "eval_ruler.py", TINY, "--lengths", 400, "--cache", tmp_path / "cache", "--out", tmp_path / "out"
        )
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("warning: qa_1 is left out: squad.json or dev-v2.0.json is needed")
    assert second.startswith(
        "warning: qa_2 is left out: hotpotqa.json or hotpot_dev_distractor_v1.json is needed"
    )


def test_help_and_a_toml_file(cache, tmp_path):
    """As a user sees it: a BadInput is one line and exit code 1."""
    help_text = run_here("eval_ruler.py", "--help")
    assert "wAvg(inc)" in help_text and "--thinking-budget" in help_text
    (tmp_path / "c.toml").write_text(f'checkpoint = "{TINY}"\nlengths = [640]\ntasks = ["vt"]\nyarn = 1')
    result = run_script("eval_ruler.py", "--config", tmp_path / "c.toml")
    assert (
        result.returncode == 1
        and result.stderr == "eval_ruler.py: error: --yarn must be more than 1, not 1\n"
    )
