"""What did training change? Checkpoints beside the one that all of them began from.

    python -m studies.changes runs/real/sft/checkpoint --beside runs/a/checkpoint runs/b/checkpoint

A --beside checkpoint's change is its weights minus those of the first. Left in --out: changes.json, with
these keys for "qk", W_Q and W_K of all layers, and for "rest", all other weights:

    norm      {checkpoint: norm of its change}
    share     {checkpoint: share of its squared change, of both together}
    cosine    {checkpoint: {checkpoint: cosine of the angle between the two changes; null if one is zero}}

The cosine is 1 for changes of the same direction, 0 for those that have none in common. Two runs whose qk is
at 0 and whose rest is at 1 were given other rows of W_Q and W_K, and learned the same elsewhere.
"""

from base.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once()  # by a signal, from here on: the imports below take seconds

from dataclasses import dataclass
from pathlib import Path

import torch

from base import bars, durable
from base.cli import BadInput, one_line_errors, option, parse
from core import hub
from core.checkpoint import open_safetensors, weight_files
from evals import stats, subject

PARTS = ("qk", "rest")
QK = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")


@dataclass
class Config:
    checkpoint: str = option("", "directory of the weights before training", positional=True)
    beside: list[str] = option([], "checkpoints after training")
    out: str = option("", "directory of changes.json (default: runs/changes/<checkpoint's name>)")


def products(before, after):
    """A checkpoint directory and a list of n others -> {part: (n, n) fp64, scalar products of their changes},
    a tensor of each in memory at a time. Raises BadInput for tensors that differ in name or shape."""
    files = [weight_files(Path(directory)) for directory in (before, *after)]

    def read(which, name):  # -> its values, fp32
        with open_safetensors(which[name]) as tensors:
            return tensors.get_tensor(name).float()

    for directory, own in zip(after, files[1:]):
        if own.keys() != files[0].keys():
            name = min(own.keys() ^ files[0].keys())
            raise BadInput(f"--beside {directory}: {name} is there or in {before}, and not in the other")
    result = {part: torch.zeros(len(after), len(after), dtype=torch.float64) for part in PARTS}
    for name in bars.bar(sorted(files[0]), desc="changes", unit="tensor"):
        old, *new = [read(which, name) for which in files]
        for directory, tensor in zip(after, new):
            if tensor.shape != old.shape:
                shapes = f"{name} is {list(tensor.shape)}, in {before} {list(old.shape)}"
                raise BadInput(f"--beside {directory}: {shapes}")
        changes = torch.stack([(tensor - old).flatten() for tensor in new])  # (n, elements)
        result["qk" if name.endswith(QK) else "rest"] += changes @ changes.T
    return result


def summarize(scalar, names):
    """What `products` gave, and the names of its checkpoints -> {"qk": ..., "rest": ...}, see above."""
    square = {part: scalar[part].diagonal().tolist() for part in PARTS}

    def cosine(part, i, j):
        norms = (square[part][i] * square[part][j]) ** 0.5
        return scalar[part][i, j].item() / norms if norms else None

    def share(part, i):
        whole = sum(square[part][i] for part in PARTS)
        return square[part][i] / whole if whole else 0.0

    return {
        part: {
            "norm": {name: square[part][i] ** 0.5 for i, name in enumerate(names)},
            "share": {name: share(part, i) for i, name in enumerate(names)},
            "cosine": {
                name: {other: cosine(part, i, j) for j, other in enumerate(names)}
                for i, name in enumerate(names)
            },
        }
        for part in PARTS
    }


def report(summary):
    """changes.json -> a table as text: checkpoints by their number."""
    names = list(summary["qk"]["norm"])
    rows = [["", "part", "norm", "share", *[f"cosine with {j}" for j in range(1, len(names) + 1)]]]
    for part in PARTS:
        own = summary[part]
        for i, name in enumerate(names, 1):
            cosines = ["-" if (c := own["cosine"][name][other]) is None else f"{c:.3f}" for other in names]
            rows.append([f"{i}", part, f"{own['norm'][name]:.4g}", f"{own['share'][name]:.1%}", *cosines])
    numbers = "\n".join(f"{i}: {name}" for i, name in enumerate(names, 1))
    return f"{numbers}\n\n{stats.table(rows)}"


if __name__ == "__main__":
    one_line_errors()
    config = parse(Config, __doc__)
    if not (config.checkpoint and config.beside):
        raise BadInput("a checkpoint, and --beside with others that began from it, are needed")
    directories = [hub.local(name) for name in (config.checkpoint, *config.beside)]
    out = Path(config.out or f"runs/changes/{subject.name(config.checkpoint)}")
    lock = durable.claim(out, "changes", ["changes.json"])
    summary = summarize(products(directories[0], directories[1:]), config.beside)
    durable.write_json(out / "changes.json", summary)
    print(f"{report(summary)}\n\nresults: {out}/changes.json")
