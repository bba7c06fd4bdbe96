"""sft.py run as a script, on real chats: a golden loss, ranks, a kill and what resumes after it, and what it
refuses."""

import ast
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys

import forks
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import ROOT, read_metrics, read_samples, refusal, run_here, run_ranks, run_script
from safetensors.torch import load_file

from base import durable
from model import Qwen3
from prompts import chat

TINY = ROOT / "assets" / "tiny"
GOLDEN = 2.5916  # nats a token of assets/tiny on the first six chats, measured
FLAGS = "--steps 3 --batch 6 --tokens-per-pass 400 --learning-rate 1e-3 --warmup 2 --save-every 1".split()


def chats():
    """Twenty chats, some of two turns, some that think; their text is fixed here, as the golden loss depends
    on it."""
    names, words = "Maria Peter Anna Victor Clara Simon Laura".split(), "lamp river stone cloud apple".split()
    rng, rows = random.Random("chats"), []
    for i in range(20):
        facts = [
            f"The code for {name} is {' '.join(rng.choices(words, k=3))}." for name in names[: 2 + i % 6]
        ]
        messages = []
        for k in range(1 + i % 2):
            thought = "<think>\nhm\n</think>\n\n" if i % 3 == 0 else ""
            messages += [
                {"role": "user", "content": f"{' '.join(facts)}\n\nWhat is the code for {names[k]}?"}
            ]
            messages += [{"role": "assistant", "content": thought + facts[k]}]
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with the chats in it and the run `whole`, never interrupted, of one process."""
    directory = tmp_path_factory.mktemp("sft")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats()), directory / "chats.parquet")
    (directory / "printed").write_text(run_here(*command(directory, "whole")))
    return directory


def command(directory, name, *flags):
    """A run on the chats of `directory` that goes to directory/name."""
    return ["sft.py", "--data", directory / "chats.parquet", "--out", directory / name, *FLAGS, *flags]


def test_the_first_loss_is_the_models_by_transformers_and_a_fixed_number(runs):
    """Unpacked: transformers' own loss of every document alone, with labels where the assistant speaks."""
    first, rows = read_metrics(runs / "whole")[0], chats()
    order = list(range(20))
    random.Random("1 part 0 epoch 0").shuffle(order)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokenizer = chat.load_tokenizer(TINY, 10**6)
    total, trained, tokens = 0.0, 0, 0
    for i in order[:6]:
        ids, mask = (torch.tensor(x)[None] for x in chat.encode_conversation(tokenizer, rows[i]["messages"]))
        n = mask.sum().item()
        total += model(input_ids=ids, labels=ids.where(mask, -100)).loss.item() * n
        trained, tokens = trained + n, tokens + ids.numel()
    assert (first["tokens"], first["tokens_trained"], first["documents"]) == (tokens, trained, 6)
    assert first["passes"] > 1
    assert first["loss"] == pytest.approx(total / trained, abs=1e-5)
    assert first["loss"] == pytest.approx(GOLDEN, abs=1e-4)


def test_a_run_leaves_what_it_promises(runs):
    run = runs / "whole"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint", "checkpoints", "config.json", "environment.json", "lock", "loss.png", "metrics.jsonl",
        "report.html", "samples.jsonl",
    ]  # fmt: skip
    metrics = read_metrics(run)
    assert [m["step"] for m in metrics] == [1, 2, 3] and metrics[-1]["epoch"] == 0.9
    rates = [m["learning_rate"] for m in metrics]
    assert rates == pytest.approx([1e-3, 0.775e-3, 0.325e-3])  # 0.55 + 0.45 cos(pi / 3); and of 2 pi / 3
    assert "warm-up: cut from 2 steps to 1 of 3, at most a tenth\n" in (runs / "printed").read_text()
    documented = ast.get_docstring(ast.parse((ROOT / "sft.py").read_text()))
    keys = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert not [key for key in keys if not re.search(rf"\b{key}\b", documented)]
    start, end = Qwen3.from_pretrained(TINY), Qwen3.from_pretrained(run / "checkpoint")
    assert all((a != b).any() for a, b in zip(start.parameters(), end.parameters(), strict=True))
    assert transformers.AutoTokenizer.from_pretrained(run / "checkpoint").chat_template
    said = {(m["content"], row["messages"][0]["content"]) for row in chats() for m in row["messages"][1::2]}
    samples = read_samples(run)
    assert [line["step"] for line in samples] == [1, 1, 2, 2, 3, 3]
    for line in samples:
        marked = [line["text"][start:end] for start, end in line["trained"]]
        question = line["text"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        assert marked and all(text.endswith("<|im_end|>") for text in marked)
        assert (marked[0].removesuffix("<|im_end|>"), question) in said
    assert len(samples[0]["text"]) < len(samples[1]["text"])  # the shortest and the longest of the step


SIGNALLED = """
import os, runpy, signal, sys, time
from base import durable
del sys.argv[0]
append = durable.append
def signalled(file, *rows):
    append(file, *rows)
    if file.name.endswith("metrics.jsonl"):
        os.kill(int(os.environ["BATCH_SCRIPT"]), signal.SIGUSR1)
        while signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL:  # it has come here
            time.sleep(0.01)
durable.append = signalled
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SRUN = """#!/bin/bash
# The command on each of SLURM_NNODES nodes, which are this machine; a signal goes to each.
while [[ $1 == --* ]]; do shift; done
export BATCH_SCRIPT=$PPID
trap 'kill -USR1 "${nodes[@]}"' USR1
for ((i = 0; i < SLURM_NNODES; i++)); do "$@" & nodes[i]=$!; done
code=0
for node in "${nodes[@]}"; do
    wait "$node"; ended=$?
    while kill -0 "$node" 2>/dev/null; do wait "$node"; ended=$?; done
    ((ended > code)) && code=$ended
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "${0%/*}/requeued"; fi
"""
# torchrun and its ranks as forks (forks.py)
TORCHRUN = """#!/bin/bash
while [[ $1 == --* ]]; do flags+=("$1"); shift; done
exec {python} -m torch.distributed.run "${{flags[@]}}" --no-python {python} "$@"
"""


def batch_job(directory, number, restarts, nodes, *arguments):
    """recipes/slurm.sh as Slurm starts it on the first of its nodes -> its exit code and what it printed."""
    (directory / "bin").mkdir(exist_ok=True)
    start = shlex.join([sys.executable, forks.__file__])
    for name, text in ("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN.format(python=start)):
        (directory / "bin" / name).write_text(text)
        (directory / "bin" / name).chmod(0o755)
    slurm = {"NNODES": nodes, "JOB_ID": number, "RESTART_COUNT": restarts, "JOB_NODELIST": "node[1-2]"}
    slurm |= {"GPUS_ON_NODE": 1, "SUBMIT_DIR": ROOT}
    environment = {f"SLURM_{key}": str(value) for key, value in slurm.items()}
    environment |= {"VENV": str(directory), "PYTHONPATH": str(ROOT)}
    command = ["bash", ROOT / "recipes" / "slurm.sh", *arguments]
    how = {"env": {**os.environ, **environment}, "capture_output": True, "text": True, "timeout": 600}
    result = subprocess.run(list(map(str, command)), **how)
    return result.returncode, result.stdout + result.stderr


def test_a_job_on_two_nodes_whose_time_ends_is_requeued_and_gives_the_metrics_of_one_process(runs):
    """Small passes, blocks recomputed, an --optimizer that computes the same. Slurm's signal comes with the
    first line of metrics.jsonl; no checkpoint was due."""
    (runs / "signalled.py").write_text(SIGNALLED)
    more = "--tokens-per-pass 250 --checkpointing --save-every 9 --optimizer adamw-offload"
    script, *flags = command(runs, "two", *more.split())
    with socket.socket() as free:
        unused = (n for n in random.sample(range(10000), 99) if free.connect_ex(("127.0.0.1", 20000 + n)))
        job = 120000 + next(unused)
    code, printed = batch_job(runs, job, 0, 2, runs / "signalled.py", script, *flags)
    assert code == 75, printed
    assert "interrupted after step 1" in printed and len(read_metrics(runs / "two")) == 1
    assert (runs / "bin" / "requeued").read_text() == f"requeue {job}\n"
    code, printed = batch_job(runs, job, 1, 1, script, *flags)
    assert code == 0 and "going on after step 1" in printed, printed
    assert (runs / "bin" / "requeued").read_text() == f"requeue {job}\n"
    for one, two in zip(read_metrics(runs / "whole"), read_metrics(runs / "two"), strict=True):
        assert two.pop("passes") > one.pop("passes")
        assert two == pytest.approx(one, rel=1e-4)


def test_lora_trains_an_update_at_ten_times_the_rate(runs):
    flags = command(runs, "lora", "--lora", 2, "--steps", 1)
    where = flags.index("--learning-rate")
    run_here(*flags[:where], *flags[where + 2 :])
    [first], whole = read_metrics(runs / "lora"), read_metrics(runs / "whole")
    assert first["loss"] == whole[0]["loss"]  # an update starts at 0
    assert first["learning_rate"] == pytest.approx(1e-4)
    made = load_file(runs / "lora" / "checkpoint" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in made.values()) and len(made) == 3 * 7 * 2
    start, end = Qwen3.from_pretrained(TINY), Qwen3.from_pretrained(runs / "lora" / "checkpoint")
    for (name, old), new in zip(start.named_parameters(), end.parameters(), strict=True):
        assert torch.equal(old, new) != ("_proj" in name), name


DIE = """
import os, runpy, signal, sys
del sys.argv[0]
replace = os.replace
def die(source, target):
    if target.name == "step-000002":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = die
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_killed_while_it_saves_goes_on_to_the_same_bits(runs):
    """It dies with two steps in metrics.jsonl, the checkpoint of step 1 whole and that of step 2 not yet."""
    (runs / "die.py").write_text(DIE)
    result = run_script(runs / "die.py", *command(runs, "killed"), env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    killed, whole = runs / "killed", runs / "whole"
    assert len(read_metrics(killed)) == 2
    left = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert left == ["LATEST", "step-000001", "step-000002.partial"]
    step = killed / "checkpoints" / "step-000001"
    assert (
        refusal(*command(runs, "killed", "--resume", "auto", "--batch", 8))
        == f"--resume {step}: batch was 6, now it is 8"
    )
    assert "exists; --resume auto goes on with it" in refusal(*command(runs, "killed"))
    run_here(*command(runs, "killed", "--resume", step, "--checkpointing"))
    assert read_metrics(killed) == read_metrics(whole) and read_samples(killed) == read_samples(whole)
    files = [load_file(run / "checkpoint" / "model.safetensors") for run in (whole, killed)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    left = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert left == ["LATEST", "step-000002", "step-000003"]  # --keep 2


def test_a_signal_makes_it_save_and_end_with_code_75(runs, monkeypatch):
    """SIGTERM comes as the first line of metrics.jsonl is written; no checkpoint was due."""
    append = durable.append

    def signalled(file, *rows):
        append(file, *rows)
        if file.name.endswith("metrics.jsonl"):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "append", signalled)
        run_here(*command(runs, "stopped", "--save-every", 9), code=75)
    assert len(read_metrics(runs / "stopped")) == 1 and not (runs / "stopped" / "checkpoint").exists()
    run_here(*command(runs, "stopped", "--save-every", 9, "--resume", "auto"))
    assert read_metrics(runs / "stopped") == read_metrics(runs / "whole")


def test_an_update_that_is_not_finite_is_skipped_and_too_many_end_the_run(runs, monkeypatch):
    """Losses of steps 2 and 3 are NaN: skipped, what is exported is what step 1 left; or refused."""
    logprobs, steps = Qwen3.logprobs, []

    def faulty(model, ids, *arguments):
        steps.append(len(read_metrics(runs / "skips")) + 1)
        return logprobs(model, ids, *arguments) * (torch.nan if steps[-1] > 1 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(Qwen3, "logprobs", faulty)
        run_here(*command(runs, "skips", "--max-skips", 2))
        assert [(m["skipped"], m["loss"] is None) for m in read_metrics(runs / "skips")] == [
            (0, False),
            (1, True),
            (1, True),
        ]
        message = refusal(
            *command(runs, "skips", "--max-skips", 1, "--resume", runs / "skips/checkpoints/step-000002")
        )
    assert message.startswith("step 3: loss or gradient was not finite in 2 updates in a row (--max-skips 1)")
    run_here(*command(runs, "once", "--steps", 1, "--schedule", "constant"))
    weights = [load_file(runs / name / "checkpoint" / "model.safetensors") for name in ("skips", "once")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


FAULTY = """
import os, runpy, sys
import torch
from model import Qwen3
logprobs, metrics = Qwen3.logprobs, sys.argv[1]
sys.argv[:2] = ["sft.py"]

def faulty(model, *arguments):
    step = 1 + (open(metrics).read().count("\\n") if os.path.exists(metrics) else 0)
    return logprobs(model, *arguments) * (torch.nan if step == 2 and os.environ["RANK"] == "1" else 1)

Qwen3.logprobs = faulty
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ranks_skip_an_update_together(runs, monkeypatch):
    """The loss of rank 1 is NaN in step 2; then all goes on as in one process that has it."""
    (runs / "faulty.py").write_text(FAULTY)
    script, *flags = command(runs, "together")
    result = run_ranks(2, runs / "faulty.py", runs / "together" / "metrics.jsonl", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    logprobs = Qwen3.logprobs

    def faulty(*arguments):
        return logprobs(*arguments) * (torch.nan if len(read_metrics(runs / "alone")) == 1 else 1)

    monkeypatch.setattr(Qwen3, "logprobs", faulty)
    run_here(*command(runs, "alone"))
    assert [m["skipped"] for m in read_metrics(runs / "alone")] == [0, 1, 0]
    for one, two in zip(read_metrics(runs / "alone"), read_metrics(runs / "together"), strict=True):
        for key in one.keys() - {"passes"}:
            assert two[key] == (one[key] if one[key] is None else pytest.approx(one[key], rel=1e-4)), key


@pytest.mark.parametrize("flags, message", [
    (["--context", 5000], "more than the 4096 tokens"),
    (["--context", 50], "not one of 20 rows fits"),
    (["--data", ROOT / "assets" / "longbench-sample.json"], "longbench-sample.json, line 1"),
    (["--data-weights", 1, 2], "2 numbers for 1 files"),
    (["--model", "nowhere"], "nowhere is not a checkpoint"),
    (["--resume", "nowhere"], "--resume nowhere is not a checkpoint of this run"),
])  # fmt: skip
def test_bad_input_gets_one_clear_line(flags, message, runs):
    assert message in refusal(*command(runs, "refused", *flags))
    assert not (runs / "refused").exists()
