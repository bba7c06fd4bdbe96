"""Checkpoints by name: ORG/NAME is downloaded from the Hugging Face hub, if no directory has that name.

The files go into the hub client's own cache (HF_HOME), with its progress bars; what is there already is not
downloaded again. HF_ENDPOINT names another hub, HF_TOKEN opens gated repositories.
"""

import os
import re
from pathlib import Path

from base import processes
from base.cli import BadInput
from core.checkpoint import COMPANIONS

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# No code, no weights in other formats, nothing from folders within.
WEIGHTS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
FILES = [*WEIGHTS, "config.json", *COMPANIONS]


def local(checkpoint):
    """A directory, or ORG/NAME or hf://ORG/NAME -> the directory (str) on this machine. Rank 0 downloads, the
    others wait for it; every rank must call it. A name whose first half is a directory here is a path.

    Raises BadInput for hf:// names of another form, and for what cannot be downloaded.
    """
    asked = str(checkpoint).startswith("hf://")
    name = str(checkpoint).removeprefix("hf://")
    if not asked and (os.path.exists(name) or Path(name).parent.is_dir() or not NAME.fullmatch(name)):
        return str(checkpoint)
    if not NAME.fullmatch(name):
        raise BadInput(f"{checkpoint}: a checkpoint on the hub is hf://ORG/NAME")
    directory = processes.from_rank_0(lambda: download(name), "hub")
    if not os.path.isdir(directory):
        where = f"rank 0 has downloaded {name} to {directory}, which this machine does not see"
        raise BadInput(f"{where}: give the nodes one HF_HOME, or a directory each")
    return directory


def download(name):
    """ORG/NAME -> its directory in the hub client's cache. Raises BadInput."""
    from huggingface_hub import snapshot_download  # imported only if the network is asked for

    try:
        return snapshot_download(name, allow_patterns=FILES)
    # The client's errors, its HTTP library's, the disk's: each means that there is no checkpoint.
    except Exception as error:
        reason = " ".join(str(error).split())[:250] or type(error).__name__
        raise BadInput(
            f"{name} is no directory here, and cannot be downloaded from the hub: {reason}"
        ) from error
