"""Inputs of bench/hostile.py: what programs have left and others have changed since, read again."""

import hashlib
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import torch
from hostile_inputs import VALUES, Case, nested, sft, write
from records import ARM, RESULT
from safetensors.torch import save_file


def plotted(t, metrics, results=None, tensors=None):
    names = [f"model.layers.0.self_attn.{which}_proj" for which in "qk"]
    usual = {
        name + of: torch.ones(2, 4, dtype=torch.bool if of else torch.float32)
        for name in names
        for of in ("", ".selected")
    }
    write(t / "run" / "metrics.jsonl", metrics)
    save_file(tensors(usual) if tensors else usual, t / "run" / "magnitudes.safetensors")
    if results is not None:
        write(t / "run" / "results.json", results)
    return ["base/plot.py", t / "run"]


def line(**changes):
    return json.dumps({"step": 1, "reward": 0.5, **changes})


METRICS = {
    "step huge": line(step=10**400),
    "step large": line(step=2**63),
    "step below 0": line(step=-5) + "\n" + line(step=-9),
    "step true": line(step=True),
    "step a float": line(step=1.0),
    "reward true": line(reward=True),
    "reward huge": line(reward=1e299) + "\n" + line(reward=-1e299),
    "reward tiny": line(reward=5e-324),
    "rewards null": line(reward=None),
    "reward a list": line(reward=[1]),
    "infinite": '{"step": 1, "reward": Infinity}',
    "not a number": '{"step": 1, "reward": NaN}',
    "backwards": "\n".join(line(step=9 - i) for i in range(9)),
    "twice": line() + "\n" + line(),
    "a hundred thousand": "\n".join(line(step=i) for i in range(100_000)),
    "UTF-16": line().encode("utf-16"),
    "zeros": bytes(999),
    "a list": "[1]",
    "deep": nested(950),
}  # fmt: skip
ACCURACY = [None, True, "x", [], {}, -1, 1e308, 2, float("nan")]


def metrics():
    for name, content in METRICS.items():
        yield Case("metrics", name, lambda t, c=content: plotted(t, c))
    for value in ACCURACY:
        yield Case(
            "metrics",
            f"accuracy {value!r}",
            lambda t, v=value: plotted(t, line(), {"before": None, "after": {"a": {"accuracy": v}}}),
        )
        yield Case(
            "metrics", f"after {value!r}", lambda t, v=value: plotted(t, line(), {"before": {}, "after": v})
        )
        yield Case(
            "metrics",
            f"a set {value!r}",
            lambda t, v=value: plotted(t, line(), {"before": {}, "after": {"a": v}}),
        )
    for name in ("$x^", "\\", "a" * 200, "%s", "\u0627\u0628", "\U0001f600", "_{", "\t"):

        def make(t, name=name):
            plotted(t, line())
            (t / "run").rename(t / name)
            return ["base/plot.py", t / name]

        yield Case("metrics", f"run {name!r:.30}", make)


def tensors():
    names = [f"model.layers.0.self_attn.{which}_proj" for which in "qk"]

    def all_with(change, of=("", ".selected")):
        return lambda usual: {
            n: change(x) if any(n == name + o for name in names for o in of) else x for n, x in usual.items()
        }

    odd = {
        "no heads": all_with(lambda x: x[:0]),
        "no dimensions": all_with(lambda x: x[:, :0]),
        "one": all_with(lambda x: x[:1, :1].contiguous()),
        "nan": all_with(lambda x: x * float("nan"), [""]),
        "infinite": all_with(lambda x: x * float("inf"), [""]),
        "zeros": all_with(lambda x: x * 0, [""]),
        "below 0": all_with(lambda x: x * -1, [""]),
        "bfloat16": all_with(lambda x: x.bfloat16()),
        "float8": all_with(lambda x: x.to(torch.float8_e4m3fn), [""]),
        "complex": all_with(lambda x: x.to(torch.complex64), [""]),
        "integers": all_with(lambda x: x.to(torch.int64)),
        "float64": all_with(lambda x: x.double()),
        "selected floats": all_with(lambda x: x.float(), [".selected"]),
        "selected other shape": all_with(lambda x: x[:1].contiguous(), [".selected"]),
        "selected none": all_with(lambda x: x & False, [".selected"]),
        "long": all_with(lambda x: x.repeat(1, 50_000)),
        "tall": all_with(lambda x: x.repeat(20_000, 1)),
        "flat": all_with(lambda x: x.flatten()),
        "cubes": all_with(lambda x: x[None]),
        "many layers": lambda usual: {
            n.replace("layers.0", f"layers.{i}"): x.clone() for i in range(500) for n, x in usual.items()
        },
        "layers with a gap": lambda usual: {
            **usual,
            **{n.replace("layers.0", "layers.2"): x.clone() for n, x in usual.items()},
        },
    }
    for name, change in odd.items():
        yield Case("tensors", name, lambda t, c=change: plotted(t, line(), tensors=c))


def compared(t, content, settings=None):
    for side in ("a", "b"):
        write(
            t / side / "settings.json", {"checkpoint": side} if side == "b" or settings is None else settings
        )
        write(t / side / "results.jsonl", json.dumps(RESULT) + "\n" if side == "b" else content)
    return ["eval_gsm8k.py", "--compare", t / "a", t / "b"]


def results():
    rng = random.Random(2)
    for key in RESULT:
        for value in rng.sample(VALUES, 4):
            yield Case(
                "results",
                f"{key} {value!r:.30}",
                lambda t, k=key, v=value: compared(t, json.dumps({**RESULT, k: v}) + "\n"),
            )
        yield Case(
            "results",
            f"no {key}",
            lambda t, k=key: compared(t, json.dumps({n: RESULT[n] for n in RESULT if n != k}) + "\n"),
        )
    contents = {
        "nothing": "",
        "zeros": bytes(99),
        "no line end": json.dumps(RESULT),
        "deep": nested(950) + "\n",
        "twice": (json.dumps(RESULT) + "\n") * 2,
        "UTF-16": json.dumps(RESULT).encode("utf-16"),
        "empty lines": "\n\n" + json.dumps(RESULT) + "\n",
        "many": "".join(json.dumps({**RESULT, "id": f"i{i}"}) + "\n" for i in range(20_000)),
    }
    for name, content in contents.items():
        yield Case("results", f"of {name}", lambda t, c=content: compared(t, c))
    for value in (
        *VALUES,
        {"checkpoint": 3},
        {"checkpoint": "a", "x": [nested(9)]},
        {"checkpoint": "a\nb"},
        {"checkpoint": ""},
    ):
        yield Case(
            "results", f"settings {value!r:.40}", lambda t, v=value: compared(t, json.dumps(RESULT) + "\n", v)
        )
    for words in (
        "a",
        "a b c",
        "a a",
        "none none",
        "/ /",
        "/dev/null /dev/null",
        "a/results.jsonl b/settings.json",
    ):
        yield Case(
            "results",
            f"compare {words}",
            lambda t, w=words: [
                *compared(t, json.dumps(RESULT) + "\n")[:2],
                *[t / word for word in w.split()],
            ],
        )


def swept():
    """Lines of a whole sweep, and of a comparison."""
    for task, algorithm in (("recall", "dapo"), ("recall", "grpo"), ("tracking", "dapo")):
        for rule in ("all", "top"):
            for rate in (1e-4, 3e-4, 1e-3):
                for seed in (1000, 1001, 0, 1):
                    yield {
                        **ARM,
                        "task": task,
                        "algorithm": algorithm,
                        "rule": rule,
                        "learning_rate": rate,
                        "seed": seed,
                    }


def ablations():
    rng = random.Random(3)

    def make(t, change):
        write(
            t / "out" / "results.jsonl",
            "".join(json.dumps(change(line, i)) + "\n" for i, line in enumerate(swept())),
        )
        return ["studies/ablation.py", "report", "--out", t / "out"]

    yield Case("ablation", "as it is", lambda t: make(t, lambda line, i: line))
    for key in ARM:
        for value in rng.sample(VALUES, 3):
            yield Case(
                "ablation",
                f"{key} {value!r:.30}",
                lambda t, k=key, v=value: make(t, lambda line, i: {**line, k: v} if i % 5 == 2 else line),
            )
    odd = {
        "lengths differ": lambda line, i: {**line, "rewards": [0.5] * (4 + i % 5)},
        "sets differ": lambda line, i: {**line, "held_out": {str(i): {"prompt_tokens": i, "accuracy": 0.5}}},
        "huge rewards": lambda line, i: {**line, "rewards": [1e9]},
        "an accuracy below 0": lambda line, i: {
            **line,
            "held_out": {"a": {"prompt_tokens": 9, "accuracy": -1}},
        },
        "seeds far": lambda line, i: {**line, "seed": line["seed"] + 10**30},
    }
    for name, change in odd.items():
        yield Case("ablation", name, lambda t, c=change: make(t, c))


WHOLE = Path(tempfile.gettempdir()) / "hostile-run"


def finished_run():
    """The directory of a run of sft.py that has ended, on the data and the model of `sft`; hostile.main makes
    it."""
    return WHOLE / "in" / "run"


def resumed():
    """A run of sft.py whose files are another's when it goes on."""
    contents = {
        "nothing": b"",
        "zeros": bytes(99),
        "null": b"null",
        "a number": b"3",
        "a list": b"[]",
        "an object": b"{}",
        "deep": nested(900).encode(),
        "bytes": bytes(range(256)),
        "a surrogate": b'"\\ud800"',
    }
    for place in (
        "checkpoints/LATEST",
        "checkpoints/step-000001/state.json",
        "checkpoints/step-000001/manifest.json",
        "metrics.jsonl",
        "config.json",
        "lock",
    ):
        for name, content in contents.items():

            def make(t, place=place, content=content):
                shutil.copytree(finished_run(), t / "run")
                write(t / "run" / place, content)
                if place.endswith("state.json"):  # damaged before the manifest was written
                    manifest = t / "run" / "checkpoints/step-000001/manifest.json"
                    files = json.loads(manifest.read_text())
                    files["files"]["state.json"] = {
                        "bytes": len(content),
                        "sha256": hashlib.sha256(content).hexdigest(),
                    }
                    write(manifest, files)
                return sft(t, "--resume", "auto")

            yield Case("resumed", f"{place} of {name}", make)

        def instead(t, place=place, make=os.mkfifo):
            shutil.copytree(finished_run(), t / "run")
            (t / "run" / place).unlink()
            make(t / "run" / place)
            return sft(t, "--resume", "auto")

        yield Case("resumed", f"{place} a FIFO", instead)
        yield Case("resumed", f"{place} a directory", lambda t, i=instead: i(t, make=os.mkdir))
        yield Case(
            "resumed", f"{place} a loop", lambda t, i=instead: i(t, make=lambda path: path.symlink_to(path))
        )
    rng, settings = random.Random(4), "step random settings skips_in_a_row".split()
    for key in settings:
        for value in rng.sample(VALUES, 5):

            def make(t, key=key, value=value):
                shutil.copytree(finished_run(), t / "run")
                step = t / "run" / "checkpoints/step-000001"
                content = json.dumps({**json.loads((step / "state.json").read_text()), key: value}).encode()
                write(step / "state.json", content)
                files = json.loads((step / "manifest.json").read_text())
                files["files"]["state.json"] = {
                    "bytes": len(content),
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
                write(step / "manifest.json", files)
                return sft(t, "--resume", "auto")

            yield Case("resumed", f"state's {key} {value!r:.30}", make)
    for name in (
        "step-000001",
        "step-999999",
        "x",
        "/",
        "..",
        "step-000001/manifest.json",
        "\udcff",
        "auto ",
        "AUTO",
    ):

        def make(t, name=name):
            shutil.copytree(finished_run(), t / "run")
            return sft(
                t, "--resume", name if name.isupper() or name == "auto " else t / "run" / "checkpoints" / name
            )

        yield Case("resumed", f"--resume {name!r}", make)


TABLES = metrics, tensors, results, ablations, resumed
