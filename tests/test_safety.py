"""The repository's sources hold nothing that runs what it reads, or opens the network unasked. Each is read
as a syntax tree.

What is not on a load path, and so not looked for: torch.distributed's *_object functions (all_gather_object,
broadcast_object_list) pickle between the ranks of one run, which trust each other; no file is read that way.
"""

import ast
import subprocess

import pytest
from conftest import ROOT

CODE = {"eval", "exec", "compile", "__import__"}  # builtins that turn text into code
PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
NETWORK = {
    "urllib",
    "urllib3",
    "requests",
    "httpx",
    "aiohttp",
    "http",
    "socket",
    "ftplib",
    "huggingface_hub",
    "datasets",
}
# What a file may do nevertheless, and why.
ALLOWED = {
    (
        "core/hub.py",
        "import of huggingface_hub",
    ): "fetches --model ORG/NAME, inside the function that is asked",
    ("prompts/judge.py", "import of http"): "asks the endpoint that --reward judge:... names",
    ("prompts/judge.py", "import of urllib"): "asks the endpoint that --reward judge:... names",
    (
        "prompts/sources.py",
        "import of huggingface_hub",
    ): "fetches hf://, inside the function that is asked to",
    ("bench/peer_trl.py", "import of datasets"): "a table in memory, as TRL takes prompts",
    ("tests/core/test_hub.py", "import of http"): "is the hub",
    ("tests/conftest.py", "import of socket"): "finds a free port of this machine",
    ("tests/test_sft.py", "import of socket"): "finds a free port of this machine",
    ("tests/forks.py", "import of socket"): "a Unix socket, of this machine",
    ("tests/prompts/test_judge.py", "import of http"): "is the endpoint",
    ("tests/evals/test_longbench.py", "sleep"): "is work that takes unequally long; nothing waits for it",
    (
        "tests/run/test_resume.py",
        "import of pickle",
    ): "replaces its functions, to show that they are not called",
    ("tests/prompts/test_sources.py", "import of huggingface_hub"): "fills its cache by hand",
}
CALLS = {  # dotted names that must not be called
    "torch.load": "torch.load",
    "torch.hub.load": "code of the network",
    "numpy.load": "numpy.load",
    "np.load": "numpy.load",
    "yaml.load": "yaml.load",
    "yaml.unsafe_load": "yaml.load",
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "tempfile.mktemp": "a name that another process can take",
}


def dotted(node):
    """os.path.join -> "os.path.join"; "" for what is no plain name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def aliases(tree):
    """What a name stands for: import os as o -> {"o": "os"}; from os import system as s -> {"s":
    "os.system"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def imported(node):
    """Packages that an import statement names; of the standard library and others, not our own files."""
    modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return {module.split(".")[0] for module in modules}


def findings(source, path):
    """Python text and where it lies -> [(line, what is wrong there), ...]."""
    tree, found = ast.parse(source), []
    names = aliases(tree)
    waits = {id(node) for loop in ast.walk(tree) if isinstance(loop, ast.While) for node in ast.walk(loop)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for module in imported(node) & (PICKLES | NETWORK):
                found.append((node.lineno, f"import of {module}"))
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append((node.lineno, "bare except"))
        elif isinstance(node, ast.Assert) and not path.startswith(("tests/", "bench/")):
            found.append((node.lineno, "assert"))
        elif isinstance(node, ast.Call):
            first, _, rest = dotted(node.func).partition(".")
            name = names.get(first, first) + ("." + rest if rest else "")
            name = name.removeprefix("builtins.")
            keywords = {k.arg: k.value for k in node.keywords}
            if name in CODE:
                found.append((node.lineno, name))
            if name in CALLS:
                found.append((node.lineno, CALLS[name]))
            for key in ("shell", "trust_remote_code", "allow_pickle"):
                if key in keywords and not (
                    isinstance(keywords[key], ast.Constant) and keywords[key].value is False
                ):
                    found.append((node.lineno, key))
            if name == "time.sleep" and path.startswith("tests/") and id(node) not in waits:
                found.append((node.lineno, "sleep"))
        elif isinstance(node, ast.Dict):  # keywords that are given as **{...}
            for key in node.keys:
                if isinstance(key, ast.Constant) and key.value in ("trust_remote_code", "allow_pickle"):
                    found.append((node.lineno, key.value))
    return found


def python_files():
    """Those that git has, or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return sorted(path for path in listed.stdout.split() if (ROOT / path).exists())


def test_no_source_runs_what_it_reads_or_opens_the_network_unasked():
    files = python_files()
    assert {"train.py", "core/checkpoint.py", "bench/kill.py", "tests/test_safety.py"} <= set(files)
    found = [(path, line, what) for path in files for line, what in findings((ROOT / path).read_text(), path)]
    assert [each for each in found if each[::2] not in ALLOWED] == []
    assert {each[::2] for each in found} == set(
        ALLOWED
    )  # an entry without its finding would allow what nobody looked at


@pytest.mark.parametrize("source, what", [
    ("eval(answer)", "eval"),
    ("import builtins\nbuiltins.exec(answer)", "exec"),
    ("compile(answer, '', 'eval')", "compile"),
    ("__import__(name)", "__import__"),
    ("import pickle", "import of pickle"),
    ("def f():\n    from marshal import loads", "import of marshal"),
    ("import shelve, os", "import of shelve"),
    ("import dill as json", "import of dill"),
    ("import torch\ntorch.load(path, weights_only=True)", "torch.load"),
    ("from torch import load\nload(path)", "torch.load"),
    ("import torch as t\nt.load(path)", "torch.load"),
    ("import numpy as n\nn.load(path)", "numpy.load"),
    ("from x import read\nread(path, allow_pickle=flag)", "allow_pickle"),
    ("import yaml\nyaml.load(text)", "yaml.load"),
    ("model(path, trust_remote_code=True)", "trust_remote_code"),
    ("model(path, **{'trust_remote_code': True})", "trust_remote_code"),
    ("import subprocess\nsubprocess.run(f'ls {path}', shell=True)", "shell"),
    ("from os import system as run\nrun(path)", "a shell"),
    ("import os\nos.popen(path)", "a shell"),
    ("assert path, 'give a path'", "assert"),
    ("try:\n    f()\nexcept:\n    pass", "bare except"),
    ("import urllib.request", "import of urllib"),
    ("def f():\n    from http import client", "import of http"),
    ("import requests", "import of requests"),
    ("import socket", "import of socket"),
])  # fmt: skip
def test_the_walk_finds_each(source, what):
    assert [found for _, found in findings(source, "new.py")] == [what]


def test_the_walk_knows_where_it_is():
    assert findings("assert x", "tests/test_x.py") == findings("assert x", "bench/x.py") == []
    sleep = "import time\ntime.sleep(1)"
    assert findings(sleep, "tests/test_x.py") == [(2, "sleep")] and findings(sleep, "judge.py") == []
    assert (
        findings("import time\nwhile f():\n    time.sleep(1)", "tests/test_x.py") == []
    )  # waits for something
    assert findings("model(path, trust_remote_code=False)\nre.compile(x)\nmodel.eval()", "new.py") == []
