"""What tests share: small random models, and scripts run as scripts."""

import contextlib
import gc
import io
import json
import os
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; with 2 and 4 they are green as well
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # with more, one that waits leaves its core to the others
# vLLM compiles one function, which counts ranks of tokens that nobody asks for: ten seconds of g++.
if not {"COMPILE_TESTS", "GPU_TESTS"} & os.environ.keys():
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
if "GPU_TESTS" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same on every machine

import forks  # noqa: E402

from base.cli import BadInput  # noqa: E402
from base.interrupt import SIGNALS  # noqa: E402
from model import Qwen3, Qwen3Config  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
gc.unfreeze = lambda: None  # vLLM's engines call it as they end, and then search all that was ever imported
hypothesis.settings.register_profile("any machine", deadline=None)  # no test fails for being slow
hypothesis.settings.load_profile("any machine")

SMALL = dict(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # 4 * 16 is not 48: the head size is its own
    intermediate_size=80,
    vocab_size=101,
    max_position_embeddings=256,
    initializer_range=0.2,  # large enough that wrong attention or rope shows
)

# Changes to SMALL: a model of each family, and of the types of RoPE that it comes with.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
FAMILIES = {
    "qwen3": {},
    "llama": dict(family="llama", hidden_size=64, rope_scaling=LLAMA3),
    "qwen2": dict(family="qwen2", hidden_size=64),
}


@pytest.fixture
def small():
    return make_small()


def make_small(tied=True, seed=0, **changes):
    config = Qwen3Config(**{**SMALL, "tie_word_embeddings": tied, **changes})
    model = Qwen3.from_config(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():  # norms of 1 would hide a forgotten norm weight
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed + 1))
    return model


def pytest_configure(config):
    """The process that starts xdist's workers starts the server that all of them use."""
    if not hasattr(config, "workerinput"):
        config.forks = forks.start()


def pytest_unconfigure(config):
    if hasattr(config, "forks"):
        forks.stop(config.forks)


LONG = (
    "train rollout one_step evaluation eval_ruler sft distributed longbench recipes bad_input ruler".split()
)


def pytest_collection_modifyitems(items):
    """The long files first: what is left for the end is short, and no worker waits for another."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))
    if any(item.path.name in order for item in items):
        forks.wake()


def module(script):
    """The module that a path below ROOT with a folder in it, such as studies/perturb.py, is; None for
    others."""
    path = Path(script)
    return ".".join(path.with_suffix("").parts) if path.parent.name and not path.is_absolute() else None


def python(script, *arguments):
    """The command that runs a script of the repository, or a Python file, in a process of its own (forks.py).
    A script in a room, such as studies/perturb.py, runs as a module."""
    start = ["-m", module(script)] if module(script) else [script]
    return [str(part) for part in (sys.executable, forks.__file__, *start, *arguments)]


def run_script(script, *arguments, timeout=600, env=None):
    """Run a script as a user would -> CompletedProcess with text output."""
    how = {"cwd": ROOT, "env": {**os.environ, **(env or {})}, "capture_output": True, "text": True}
    return subprocess.run(python(script, *arguments), timeout=timeout, **how)


@contextlib.contextmanager
def killed(count, *command):
    """An evaluation that is killed when it has written `count` results (evals/killed.py) -> its Popen. Within
    the block it waits; after it, it is dead."""
    command = python(ROOT / "tests" / "evals" / "killed.py", count, *command)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        while process.stdout.readline() not in ("here\n", ""):
            pass
        yield process
        process.communicate()


def run_code(code):
    """Run some lines in a fresh Python, which has imported nothing -> CompletedProcess with text output."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)


def output_of(script, *arguments, env=None):
    """Run a script as a user would, to its end -> what it printed."""
    result = run_script(script, *arguments, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def run_here(script, *arguments, code=0):
    """Run a script of the repository in this process, which has imported what it imports -> what it printed.
    It must end with exit code `code`. A BadInput comes through; run_script shows what the user sees of
    one."""
    argv, printed = [str(ROOT / script), *map(str, arguments)], io.StringIO()
    start = partial(runpy.run_module, module(script)) if module(script) else partial(runpy.run_path, argv[0])
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    gc.freeze()  # what was there before is not looked at from here on
    try:
        with (
            contextlib.chdir(ROOT),
            contextlib.redirect_stdout(printed),
            mock.patch.multiple(sys, argv=argv, excepthook=sys.excepthook),
        ):
            start(run_name="__main__")
    except SystemExit as end:
        assert (end.code or 0) == code
    else:
        assert code == 0
    finally:
        gc.collect()  # the script's variables, as at the end of a process: open files, locks
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return printed.getvalue()


def rows_of(text):
    """The Markdown tables in what a script printed -> {first cell: list of the others}, heads included."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in others] for first, *others in lines}


def read_metrics(run):
    """metrics.jsonl of a run without the wall-clock keys."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: m[key] for key in m if key not in ("seconds", "tokens_per_second")} for m in lines]


def read_samples(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def refusal(script, *arguments):
    """The message of the BadInput that a script run here ends with."""
    with pytest.raises(BadInput) as caught:
        run_here(script, *arguments)
    return str(caught.value)


def files_in(directory, but=()):
    """All files but locks, which a start that failed may leave, and those with a suffix in `but` -> {path:
    bytes}."""
    kept = (
        path
        for path in directory.rglob("*")
        if path.is_file() and path.name != "lock" and path.suffix not in but
    )
    return {path: path.read_bytes() for path in kept}


def names_of_runs():
    """But for those of tests beside this one."""
    return {path.name for path in ROOT.glob("runs/*") if not path.name.startswith("test-")}


def check_refusal(arguments, pattern, directory, longest, but=()):
    """A script run here ends with a BadInput of one line of at most `longest` characters that has the
    pattern. Neither what `files_in` sees of `directory` nor runs/ is another then, and vLLM was not imported
    for it."""
    before, names, vllm = files_in(directory, but), names_of_runs(), "vllm" in sys.modules
    message = refusal(*arguments)
    assert re.search(pattern, message), message
    assert "\n" not in message and len(message) < longest
    assert files_in(directory, but) == before
    assert names_of_runs() == names
    assert ("vllm" in sys.modules) == vllm


@pytest.fixture
def full():
    """full(bytes): from now on files of this process end there, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def check_full_disk(arguments, size, name, directory, full):
    """A script run here, while files end after `size` bytes, ends with one line that names the file `name`;
    what was in `directory` is as it was."""
    before = files_in(directory)
    full(size)
    assert re.search(rf"/{name} cannot be written: .*File too large", refusal(*arguments))
    assert files_in(directory) == before


def run_ranks(ranks, code, *arguments, timeout=600, restarts=0, env=None, where=("--standalone",)):
    """Run a Python file under torchrun with `ranks` gloo processes."""
    torchrun = ["-m", "torch.distributed.run", *where, "--nproc-per-node", ranks, "--max-restarts", restarts]
    folders = [ROOT, ROOT / "tests", ROOT / "bench", os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), **(env or {})}
    command = [sys.executable, forks.__file__, *torchrun, "--no-python", *python(code, *arguments)]
    how = {"cwd": ROOT, "env": env, "capture_output": True, "text": True, "timeout": timeout}
    return subprocess.run(list(map(str, command)), **how)


def run_nodes(nodes, code, *arguments):
    """The same on `nodes` nodes of one process each, which this machine plays -> the last node's
    CompletedProcess."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nnodes", nodes, "--master-addr", "127.0.0.1", "--master-port", port]
    with ThreadPoolExecutor(nodes) as pool:
        results = [
            pool.submit(run_ranks, 1, code, *arguments, where=[*where, "--node-rank", i])
            for i in range(nodes)
        ]
    return results[-1].result()
