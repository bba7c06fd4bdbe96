"""train.py run as a script, with real vLLM and real FSDP2: what it leaves behind, what it repeats, what it
refuses."""

import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    ROOT,
    output_of,
    read_metrics,
    read_samples,
    refusal,
    run_here,
    run_nodes,
    run_ranks,
    run_script,
)
from inputs import rows
from safetensors.torch import load_file

from base.cli import BadInput
from model import Qwen3
from prompts import chat, tasks
from prompts import rewards as rewards_module
from run.config import Config, check

TINY = ROOT / "assets" / "tiny"
SHORT = "--steps 2 --prompts 4 --completions 4 --eval-prompts 8 --facts 6 --filler 6 --max-rounds 30".split()


@pytest.fixture
def runs():
    """Names for runs; their directories are removed afterwards."""
    names = []

    def name(label):
        names.append(f"test-{label}")
        shutil.rmtree(ROOT / "runs" / names[-1], ignore_errors=True)
        return names[-1]

    yield name
    for label in names:
        shutil.rmtree(ROOT / "runs" / label, ignore_errors=True)


def train(name, *arguments, env=None):
    """-> the run's directory, and what was printed."""
    printed = output_of("train.py", "--name", name, *SHORT, *arguments, env=env)
    return ROOT / "runs" / name, printed


def with_module(directory, name, code):
    """The environment in which a script can import a module made of `code`: as --reward NAME:FUNCTION it is
    imported, and does what it does, before the engine starts."""
    (directory / f"{name}.py").write_text(code)
    return {"PYTHONPATH": str(directory)}


def equal_but_for_rounding(one, two):
    """Metrics of the same run in another order of summation: float32 sums of some hundred terms, whose last
    bits AdamW carries into the next step's weights."""
    assert len(one) == len(two)
    for a, b in zip(one, two):
        for key in a.keys() - {"mismatch_mean", "mismatch_max", "mismatch_k3"}:  # rounding itself
            expected = a[key] if a[key] is None else pytest.approx(a[key], rel=2e-3, abs=2e-5)
            assert b[key] == expected, key
        assert b["mismatch_mean"] < 1e-5


def test_a_run_leaves_what_it_promises_and_a_killed_one_the_same_to_the_last_bit(runs):
    run, printed = train(runs("first"), "--eval-every", 1, "--oversample", 1.5)
    config = json.loads((run / "config.json").read_text())
    assert (config["steps"], config["rule"], config["fraction"], config["context"]) == (2, "top", 0.3, 4096)
    assert config["learning_rate"] == 3e-4 and config["checkpointing"] is False
    assert "learning rate: 0.0003, by the model's 0.8 million parameters\n" in printed
    assert re.search(r"before: [01]\.\d+ of 8 held-out", printed)
    assert re.search(r"step 1: [01]\.\d+ of 8 held-out.*\nstep 2: [01]\.\d+ of 8 held-out", printed)
    for picture in ("reward.png", "magnitudes.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert "finished: step 2 of 2" in (run / "report.html").read_text()
    assert "train.py --name test-first" in json.loads((run / "environment.json").read_text())["command"]
    metrics = read_metrics(run)
    assert [m["step"] for m in metrics] == [1, 2]
    rounds = [m["rounds"] for m in metrics]  # a step's first draws 6 prompts, each other one 4
    assert [m["prompts_drawn"] for m in metrics] == [2 + 4 * rounds[0], 4 + 4 * sum(rounds)]
    for m in metrics:
        assert m["mismatch_mean"] < 1e-5
        assert 0.3 < m["selected_share"] <= 1 and m["grad_norm_masked"] < m["grad_norm"]
        assert 0 < m["gradient_share"] < 1
        assert m["ratio"] == pytest.approx(1) and m["clip_fraction"] == 0
        assert m["tokens_trained"] < m["tokens_unshared"]
    keys = json.loads((run / "metrics.jsonl").read_text().splitlines()[0]).keys()
    help_text = output_of("train.py", "--help")
    undocumented = [key for key in keys if not re.search(rf"\b{key}\b", help_text)]
    assert not undocumented
    check_samples(read_samples(run), metrics)
    best, accuracies = json.loads((run / "best" / "best.json").read_text()), []
    for m in metrics:
        accuracies.append(m["held_out"]["filler 6"]["accuracy"])
    assert best == {
        "step": 1 + accuracies.index(max(accuracies)), "metric": "filler 6/accuracy", "value": max(accuracies)
    }  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    assert results["after"] == metrics[-1]["held_out"] and results["before"]["filler 6"]["prompts"] == 8

    ours = Qwen3.from_pretrained(run / "checkpoint")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "checkpoint", dtype=torch.float32)
    ids = torch.randint(0, 800, (1, 60))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(run / "checkpoint").chat_template
    start = Qwen3.from_pretrained(TINY)
    assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), start.parameters(), strict=True))

    # Killed between a checkpoint's own name and LATEST, then sent SIGTERM amid generating, then left alone;
    # bench/kill.py is the module of its reward, and has more of it.
    name = runs("second")
    killed = ROOT / "runs" / name
    flags = [*SHORT, "--save-every", 1, "--eval-every", 1, "--reward", "kill:exact", "--resume", "auto"]
    flags += ["--oversample", 1.5]
    for place, code, left in (
        ("save 10", -signal.SIGKILL, ["LATEST", "LATEST.partial", "step-000001"]),
        ("rollout 1 0 SIGTERM", 75, ["LATEST", "step-000001"]),
    ):
        env = {"PYTHONPATH": str(ROOT / "bench"), "KILL": place}
        result = run_script("train.py", "--name", name, *flags, env=env)
        assert result.returncode == code, result.stderr[-3000:]
        assert len(read_metrics(killed)) == 1
        assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == left
    assert "interrupted after step 1; --name test-second --resume auto goes on" in result.stderr
    more = "--reward-workers", 2, "--deterministic"
    train(name, *flags[len(SHORT) :], *more, env={"PYTHONPATH": str(ROOT / "bench")})
    assert read_metrics(killed) == metrics
    same = "results.json", "samples.jsonl", "best/best.json", "best/model.safetensors"
    for name in (*same, "checkpoint/model.safetensors"):
        assert (killed / name).read_bytes() == (run / name).read_bytes(), name
    exported, step = killed / "exported", killed / "checkpoints" / "step-000002"
    run_here("run/export.py", step, exported)
    for path in exported.iterdir():
        assert path.read_bytes() == (run / "checkpoint" / path.name).read_bytes(), path.name
    assert "exported exists; choose another directory" in refusal("run/export.py", step, exported)
    assert "checkpoint is no checkpoint of a run" in refusal("run/export.py", run / "checkpoint", "x")


def check_samples(lines, metrics):
    """Of a run whose steps each draw more than 2 groups beyond the 4 that they train."""
    assert [(line["step"], line["used"]) for line in lines] == [
        (step, used) for step in (1, 2) for used in ("trained", "trained", "dropped", "dropped")
    ]
    drawn, tokenizer = [m["prompts_drawn"] for m in metrics], chat.load_tokenizer(TINY, 10**6)
    for line in lines:
        step, trained = line["step"], line["used"] == "trained"
        number = int(line["prompt_id"].removeprefix("recall-train 0-"))
        assert ([0, *drawn][step - 1]) <= number < drawn[step - 1]
        row = tasks.Source("recall", "train 0", 6, 6)[number]
        assert line["prompt"] == chat.render(tokenizer, [{"role": "user", "content": row["prompt"]}], False)
        assert line["prompt_tokens"] > 100 and len(line["completions"]) == 4
        rewards = []
        for completion in line["completions"]:
            text = completion["text"].removesuffix("<|im_end|>")
            assert (text != completion["text"]) == completion["finished"]
            assert completion["reward"] == rewards_module.exact(text, row)
            assert 0 < completion["tokens"] <= 24 and completion["logprob"] < 0
            assert trained == (completion["advantage"] is not None) == (completion["entropy"] is not None)
            rewards.append(completion["reward"])
        assert len(set(rewards)) == 2 or not trained  # what is too many in a round may differ, too
    for first, last in zip(lines[::2], lines[1::2]):  # from the worst to the best
        worst, best = (sum(c["reward"] for c in line["completions"]) for line in (first, last))
        assert worst <= best
    entropies = [c["entropy"] for line in lines for c in line["completions"] if c["entropy"] is not None]
    assert 0 < min(entropies) <= metrics[0]["entropy"] * 3 and max(entropies) < 7


def test_only_selected_rows_of_q_and_k_move_in_a_step(runs):
    run, _ = train(runs("rows"), "--steps", 1, "--warmup", 0)
    start, end = Qwen3.from_pretrained(TINY), Qwen3.from_pretrained(run / "checkpoint")
    for (name, old), new in zip(start.named_parameters(), end.parameters(), strict=True):
        if "q_proj" in name or "k_proj" in name:
            moved = (old != new).any(1).view(-1, 32).sum(1)  # per head
            assert (moved == 9).all(), name  # floor(0.3 * 32)
        elif "embed" not in name:
            assert (old != new).float().mean() > 0.9, name


def test_two_ranks_give_the_metrics_of_one_process_killed_or_not(runs):
    """Several updates per rollout, dynamic sampling, a choice among all tokens, KL to a reference: everything
    that crosses ranks. Passes so small that each rank would need another number of them. The two are nodes
    with a replica each, and train LoRA's updates; then a context group, of which rank 1 is killed in step 2,
    and torchrun starts both again."""
    cov = [
        "--algorithm",
        "clip-cov",
        "--updates",
        2,
        "--unselected",
        "frozen",
        "--saliency-tokens",
        "not-first",
        "--max-rounds",
        1,  # a batch that is not full: 2 updates, of which one has less work than there are ranks
        "--lora",
        4,
        "--learning-rate",
        3e-4,
    ]
    grpo = ["--algorithm", "grpo", "--beta", 0.04]
    killed = "--save-every 1 --resume auto --reward kill:exact --context-parallel 2".split()
    again = {"restarts": 1, "env": {"KILL": "step 2"}}
    for label, flags, run, more, how in (
        ("cov", cov, run_nodes, [], {}),
        ("grpo", grpo, run_ranks, killed, again),
    ):
        alone, _ = train(runs(f"{label}-1"), *flags)
        name = runs(f"{label}-2")
        result = run(2, "train.py", "--name", name, *SHORT, *flags, *more, "--tokens-per-pass", 25, **how)
        assert result.returncode == 0, result.stderr[-3000:]
        assert ("going on after step 1" in result.stdout) == bool(how), result.stderr[-6000:]
        settings = json.loads((ROOT / "runs" / name / "config.json").read_text())
        assert settings["replicate"] == (2 if run is run_nodes else 1)
        equal_but_for_rounding(read_metrics(alone), read_metrics(ROOT / "runs" / name))
        if label == "cov":
            assert any(m["ratio"] != 1 for m in read_metrics(alone))
            assert any(m["clip_fraction"] > 0 for m in read_metrics(alone))
            assert any(m["underfull"] % 2 for m in read_metrics(alone))
            check_lora(alone)
        else:
            assert read_metrics(alone)[1]["kl"] > 0


def check_lora(run):
    """What a run with --lora leaves: an update of what it began with, merged and alone; the same from its
    last step, which has the update only."""
    run_here("run/export.py", run / "checkpoints" / "step-000002", run / "exported")
    files = [path.relative_to(run / "exported") for path in (run / "exported").rglob("*") if path.is_file()]
    assert {Path("adapter/adapter_config.json"), Path("adapter/adapter_model.safetensors")} < set(files)
    for path in files:
        assert (run / "exported" / path).read_bytes() == (run / "checkpoint" / path).read_bytes(), path
    merged, start = (Qwen3.from_pretrained(path) for path in (run / "checkpoint", TINY))
    for (name, parameter), old in zip(merged.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(parameter, old) != ("_proj" in name), name
    factors = load_file(run / "checkpoint" / "adapter" / "adapter_model.safetensors")
    B = factors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    moved = B.any(1).view(-1, 32).sum(1)  # rows that an update has selected, which are 9 of each head's 32
    assert moved.min() >= 9 and moved.sum() < 32 * len(moved)


MINE = """
import torch
import grpo, rollout
generate, aggregate, batches, losses = rollout.Rollout.generate, grpo.aggregate, [], []

def without_a_logprob(*arguments):
    groups = generate(*arguments)
    batches.append(1)
    if len(batches) == 1:
        groups[0][0].logprobs[0] = float("-inf")
        groups[1][1].logprobs[:] = [float("nan")] * len(groups[1][1].logprobs)
    return groups

def without_a_value(per_token, *arguments, **keywords):
    losses.append(1)  # 4 groups in 2 updates: 4 a step
    return aggregate(per_token * (torch.nan if len(losses) in (5, 9, 11) else 1), *arguments, **keywords)

rollout.Rollout.generate, grpo.aggregate = without_a_logprob, without_a_value

def length(answer, row):
    assert row['wanted'] == 'The'
    return (len(answer) % 7) / 7

def odd(answer, row):
    return 2 * (len(answer) % 2)
"""


def test_own_data_and_reward_through_a_toml_file_and_numbers_that_are_not_finite(runs, tmp_path):
    """The reward module spoils the sampler's log-probability of a token and of a whole completion in step 1,
    the loss of the first update of step 2, and of both of step 3."""
    rows = [
        {"prompt": f"What is the code for {name}?", "answer": "x", "wanted": "The"}
        for name in ("Leo", "Eva") * 4
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    toml = f'data = "{tmp_path}/rows.jsonl"\nreward = ["mine:length", "mine:odd"]\ntemperature = 1\n'
    toml += 'data_weights = [1]\nalgorithm = "sapo"\nupdates = 2\nreward_weights = [1, 0.25]\n'
    (tmp_path / "config.toml").write_text(toml)
    name = runs("own")
    arguments = "--name", name, *SHORT, "--steps", 3, "--max-skips", 1, "--config", tmp_path / "config.toml"
    result = run_script("train.py", *arguments, env=with_module(tmp_path, "mine", MINE))
    run = ROOT / "runs" / name
    assert "held-out" not in result.stdout  # no --eval-data, no accuracy
    assert (
        result.returncode == 1 and "train.py: error: step 3: loss or gradient was not finite" in result.stderr
    )
    failed = read_samples(run)[-2:]
    assert [(line["step"], line["used"]) for line in failed] == [(3, "failed")] * 2
    assert failed[0]["prompt_id"].startswith("rows.jsonl line ")
    assert any(c["entropy"] is not None for line in failed for c in line["completions"])
    first, second = read_metrics(run)
    assert (first["skipped"], second["skipped"]) == (0, 1)
    length, odd = first.pop("rewards").values()
    second.pop("rewards")
    assert first["accuracy"] == 0 < length["mean"] < 1 < odd["mean"] + odd["std"]  # accuracy: the first's
    assert first["reward"] == pytest.approx(length["mean"] + odd["mean"] / 4, abs=1e-5)
    [shown, *_] = read_samples(run)[0]["completions"]
    assert shown["rewards"][0] == shown["reward"] and shown["rewards"][1] in (0, 2)
    assert first["tokens_dropped"] > 1 and second["tokens_dropped"] == 0
    assert all(math.isfinite(line[key]) for line in (first, second) for key in line if line[key] is not None)
    assert json.loads((run / "config.json").read_text())["reward"] == ["mine:length", "mine:odd"]


FAILS = """
calls = []

def score(answer, row):
    calls.append(answer)
    if len(calls) == 9 + 10 + 16 + 3:
        raise ZeroDivisionError("mine")
    return len(calls) % 2
"""


@pytest.mark.parametrize("every, where", [(0, "step 2"), (1, "held out, after step 1")])
def test_a_reward_that_fails_costs_no_step(every, where, runs, tmp_path):
    """One worker scores 9 rows with an empty answer, 10 answers to held-out prompts, 16 of step 1, then
    fails, in step 2 or on held-out prompts again; its trainer saves step 1."""
    name, prompts = runs("fails"), [{"prompt": f"p{i}", "answer": "a"} for i in range(9)]
    data, held_out = rows(tmp_path / "rows.jsonl", *prompts[:8]), rows(tmp_path / "held.jsonl", prompts[8])
    flags = *SHORT, "--data", data, "--eval-data", held_out, "--eval-completions", 9
    flags += "--reward", "fails:score", "--reward-workers", 1, "--reward-timeout", 99, "--algorithm", "grpo"
    flags += "--eval-every", every
    result = run_script("train.py", "--name", name, *flags, env=with_module(tmp_path, "fails", FAILS))
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and "ZeroDivisionError: mine" in lines
    last = [line for line in lines if line.strip()][-1]
    assert last.startswith(f"train.py: error: {where}: the reward function failed on row ")
    assert (ROOT / "runs" / name / "checkpoints" / "LATEST").read_text() == "step-000001\n"
    assert len(read_metrics(ROOT / "runs" / name)) == 1
    assert f"stopped: train.py: error: {where}" in (ROOT / "runs" / name / "report.html").read_text()
    failed = [line for line in read_samples(ROOT / "runs" / name) if line["used"] == "failed"]
    assert [line["step"] for line in failed] == ([] if every else [2, 2])
    assert {c["reward"] for line in failed for c in line["completions"]} <= {None}


STALE = """
import rollout
from prompts import rewards
rollout.Rollout.sync = lambda self, model: None
score = rewards.exact
"""


def test_a_skipped_sync_stops_the_run(runs, tmp_path):
    """The reward module makes sync a no-op: the proof of the next step must notice."""
    arguments = "--name", runs("stale"), *SHORT, "--steps", 5, "--warmup", 0, "--reward", "stale:score"
    result = run_script("train.py", *arguments, env=with_module(tmp_path, "stale", STALE))
    assert result.returncode != 0
    assert "vLLM does not have the trainer's weights" in result.stderr


GREEDY = """
import model, torch
from prompts import rewards
model.Qwen3.read = lambda self, ids: torch.empty(2**50)
score = rewards.exact
"""


def test_running_out_of_memory_in_the_first_step_says_what_to_lower(runs, tmp_path):
    """The reward module makes the model's first stage ask the real allocator for more than there is."""
    arguments = "--name", runs("memory"), *SHORT, "--tokens-per-pass", 77, "--reward", "greedy:score"
    result = run_script("train.py", *arguments, env=with_module(tmp_path, "greedy", GREEDY))
    (line,) = [line for line in result.stderr.splitlines() if "train.py: error: " in line]
    found = re.search(r"out of memory in training on \d+ prompt tokens and up to 77", line)
    assert found and result.returncode != 0
    assert "lower --tokens-per-pass or --context" in line and "Traceback" not in result.stderr


ALIVE = """
import weakref
import model, rollout
from prompts import rewards
read, detach, sync, made = model.Qwen3.read, model.Prompt.detach, rollout.Rollout.sync, []

def remembering(function):
    def made_by(*arguments):
        prompt = function(*arguments)
        made.extend(map(weakref.ref, [prompt.last, *prompt.keys, *prompt.values]))
        return prompt
    return made_by

def looking(engine, trained):
    alive = sum(reference() is not None for reference in made)
    print(f"{len(made)} tensors made, {alive} alive")
    made.clear()
    sync(engine, trained)

model.Qwen3.read, model.Prompt.detach = remembering(read), remembering(detach)
rollout.Rollout.sync = looking
score = rewards.exact
"""


def test_what_belongs_to_a_group_dies_with_it(runs, tmp_path):
    """While vLLM takes the weights and samples for the next step, no prompt's keys and values are in memory,
    nor the leaves in which their gradients gather. Masters in bf16, from which it computes in fp32."""
    flags = "--reward", "alive:score", "--optimizer", "adamw8bit", "--masters", "bf16"
    run, printed = train(runs("alive"), *flags, env=with_module(tmp_path, "alive", ALIVE))
    counts = [
        (int(made) > 0, alive) for made, alive in re.findall(r"(\d+) tensors made, (\d+) alive", printed)
    ]
    assert counts == [(False, "0"), (True, "0"), (True, "0")]  # vLLM has taken rounded weights at the start
    assert all(0 < m["moved_unselected"] < m["moved_selected"] for m in read_metrics(run)[1:])


def test_small_passes_give_the_metrics_of_one(runs):
    """GSPO's ratio and clipping need whole completions, which every pass has."""
    gspo = ["--algorithm", "gspo", "--updates", 2, "--warmup", 0]
    whole, _ = train(runs("whole"), *gspo)
    parts, _ = train(runs("parts"), *gspo, "--tokens-per-pass", 20, "--checkpointing")
    assert any(m["clip_fraction"] > 0 for m in read_metrics(whole))
    assert json.loads((whole / "config.json").read_text())["epsilon_high"] == 4e-4
    equal_but_for_rounding(read_metrics(whole), read_metrics(parts))
    assert json.loads((parts / "metrics.jsonl").read_text().splitlines()[0])["seconds"]["rehearsal"] > 0


# -------------------------------------------------------------------------------------------------- bad input


def test_a_refusal_is_one_line_and_exit_code_1(runs):
    """Here one that comes late: a batch that does not fill."""
    cold = "--temperature", 0.01  # all completions of a group are the same
    flags = *cold, "--max-rounds", 1, "--eval-prompts", 0
    result = run_script("train.py", "--name", runs("refused"), *SHORT, *flags)
    (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
    what = r"the rewards of 0 groups differ \(1 needed\), (\d) are all right, (\d) all wrong"
    end = r"the task is too (hard|easy): give .*; or raise --max-rounds or --completions"
    found = re.search(rf"error: step 1: after --max-rounds 1 of 4 prompts {what}: {end}$", line)
    right, wrong = int(found[1]), int(found[2])
    assert result.returncode == 1 and right + wrong == 4 and (found[3] == "easy") == (right > wrong)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("settings, message", [
    ({"algorithm": "gspo"}, "--algorithm gspo needs --updates 2 or more"),
    ({"algorithm": "kl-cov"}, "--algorithm kl-cov needs --updates 2 or more"),
    ({"algorithm": "sapo", "updates": 2, "epsilon_high": 0.2}, "not for --algorithm sapo: it does not clip"),
    ({"resume": "auto"}, "--resume auto needs the --name"),
    ({"algorithm": "gspo", "updates": 2, "beta": 0.1}, "--beta needs --algorithm grpo: gspo has no KL term"),
])  # fmt: skip
def test_settings_that_do_not_go_with_an_algorithm_are_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        check(Config(**settings), world=1, cuda=False)


def test_torchrun_restarts_only_what_can_go_on(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(BadInput, match="--max-restarts needs --name NAME --resume auto"):
        check(Config(name="mine"), world=1, cuda=False)
    check(Config(name="mine", resume="auto"), world=1, cuda=False)


def test_unknown_flags_and_used_names_are_refused(runs):
    assert "did you mean --learning-rate?" in refusal("train.py", "--learning-rat", 1)
    name = runs("used")
    Path(ROOT / "runs" / name).mkdir(parents=True)
    (ROOT / "runs" / name / "metrics.jsonl").write_text("")
    result = run_script("train.py", "--name", name)
    assert result.returncode != 0 and "exists; --resume auto goes on with it" in result.stderr


def test_scripts_explain_themselves():
    for script, start in (
        ("train.py", "torchrun train.py"),
        ("sft.py", "sft.py"),
        ("base/plot.py", "-m base.plot"),
    ):
        assert start in output_of(script, "--help")
    result = run_script("base/plot.py", "nowhere")
    assert result.returncode != 0 and "nowhere/metrics.jsonl is missing" in result.stderr


def test_the_shipped_model_is_what_the_readme_says():
    size = sum(file.stat().st_size for file in TINY.iterdir())
    model = Qwen3.from_pretrained(TINY)
    config = model.config
    assert size < 8e6
    assert 0.7e6 < sum(p.numel() for p in model.parameters()) < 1.3e6
    assert config.num_attention_heads > config.num_key_value_heads and config.tie_word_embeddings
    assert 3 <= config.num_hidden_layers <= 6 and config.head_dim >= 32
