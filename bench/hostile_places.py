"""Inputs of bench/hostile.py: where results go, who may read and write, disks, limits of a process."""

import json
import os
import shutil
import subprocess
from functools import partial

from hostile_inputs import QUESTION, SMALL, TINY, Case, directory, foreign, model, of_ruler, rl, sft, write
from hostile_left import compared, finished_run, line, plotted
from records import RESULT

WRITTEN = (
    "settings.json config.json results.jsonl metrics.jsonl summary.json checkpoint untouched.safetensors"
).split()


def made(path, make):
    path.parent.mkdir(exist_ok=True)
    make(path)


def places():
    """Where results go, and what is there already."""
    programs = {
        "sft.py": lambda t, out: [*sft(t)[:-4], "--out", out, "--steps", 1],
        "eval_data.py": lambda t, out: [
            "eval_data.py",
            TINY,
            "--samples",
            1,
            "--compare",
            "a",
            "b",
            "--out",
            out,
        ],
        "eval_gsm8k.py": lambda t, out: [
            "eval_gsm8k.py",
            TINY,
            "--max-tokens",
            1,
            "--data",
            write(t / "d", QUESTION),
            "--out",
            out,
        ],
        "studies/magnitudes.py": lambda t, out: ["studies/magnitudes.py", TINY, "--prompts", 1, "--out", out],
        "studies/perturb.py": lambda t, out: [
            "studies/perturb.py",
            TINY,
            "--prompts",
            1,
            "--out",
            out,
            "--",
            "eval_data.py",
            "--help",
        ],
        "studies/ablation.py": lambda t, out: [
            "studies/ablation.py",
            "sweep",
            "--train",
            "--steps x",
            "--out",
            out,
        ],
        "studies/tiny.py": lambda t, out: [
            "studies/tiny.py",
            "--copy-until",
            99,
            "--steps",
            1,
            "--batch",
            2,
            "--vocab-size",
            600,
            "--hidden-size",
            16,
            "--out",
            out,
        ],
        "studies/longbench_sample.py": lambda t, out: ["studies/longbench_sample.py", out],
        "eval_ruler.py": lambda t, out: ["eval_ruler.py", TINY, *of_ruler(out, foreign(t))],
    }
    odd = {
        "a FIFO": lambda p: os.mkfifo(p),
        "a device": lambda p: p.symlink_to("/dev/null"),
        "a loop": lambda p: p.symlink_to(p),
        "nowhere": lambda p: p.symlink_to(p.parent / "none" / "x"),
        "lock a FIFO": lambda p: (p.mkdir(), os.mkfifo(p / "lock")),
        "lock a directory": lambda p: (p / "lock").mkdir(parents=True),
        "partials are directories": lambda p: [made(p / f"{name}.partial", os.mkdir) for name in WRITTEN],
        "files are directories": lambda p: [made(p / name, os.mkdir) for name in WRITTEN],
        "files are FIFOs": lambda p: [made(p / name, os.mkfifo) for name in WRITTEN],
    }
    for script, arguments in programs.items():
        for name, prepare in odd.items():
            yield Case(
                "places", f"{script} {name}", lambda t, a=arguments, p=prepare: (p(t / "o"), a(t, t / "o"))[1]
            )
        for out in ("/proc/x", "/dev/null/x", "x" * 255, "y" * 300, "/" + "z/" * 3000, "a\nb", ""):
            yield Case("places", f"{script} {out:.20}", lambda t, a=arguments, o=out: a(t, o))


def users():
    """Another user, who may not read or write what is the user's."""
    nobody, ruler = {"user": 65534}, ["eval_ruler.py", TINY, "--lengths", 640, "--tasks", "vt"]

    def without(mode, command, *parts):
        """command, but may not open the file or directory at t/parts."""

        def make(t):
            words = command(t)
            t.joinpath(*parts).chmod(mode)
            return words

        return make

    def of_model(t):
        return sft(t, model=model(t))

    shut = {
        "data": without(0o600, sft, "chats"),
        "out": sft,
        "parent": lambda t: (directory(t / "run").chmod(0o700), sft(t))[1],
        "model": without(0o700, of_model, "model"),
        "config.json": without(0o600, of_model, "model", "config.json"),
        "weights": without(0o600, of_model, "model", "model.safetensors"),
        "tokenizer": without(0o600, of_model, "model", "tokenizer.json"),
        "template": without(0o600, of_model, "model", "chat_template.jinja"),
        "TOML": without(0o600, lambda t: ["train.py", "--config", write(t / "c", "plan = true")], "c"),
        "results": without(0o600, lambda t: compared(t, ""), "a", "results.jsonl"),
        "settings": without(0o600, lambda t: compared(t, ""), "a", "settings.json"),
        "a directory of results": without(0o700, lambda t: compared(t, ""), "a"),
        "metrics": without(0o600, lambda t: plotted(t, line()), "run", "metrics.jsonl"),
        "figures": without(0o755, lambda t: plotted(t, line()), "run"),
        "a run": lambda t: (shutil.copytree(finished_run(), t / "run"), sft(t, "--resume", "auto"))[1],
        "a cache": without(0o755, lambda t: [*ruler, "--samples", 1, "--cache", directory(t / "c")], "c"),
        "an evaluation": lambda t: ["eval_data.py", TINY, "--samples", 1, "--out", directory(t / "out")],
        "magnitudes": lambda t: ["studies/magnitudes.py", TINY, "--prompts", 1, "--out", directory(t / "o")],
        "an ablation": lambda t: ["studies/ablation.py", "sweep", "--out", directory(t / "out")],
        "tiny": lambda t: ["studies/tiny.py", "--out", directory(t / "out")],
        "runs": without(0o755, rl, "runs", "used"),
        "a data directory": without(0o700, lambda t: [*ruler, "--data-dir", directory(t / "d")], "d"),
    }
    for name, make in shut.items():
        if os.geteuid() == 0:
            yield Case("users", name, lambda t, m=make: [nobody, *m(t)])


WRITERS = {
    "sft.py": lambda t, out: [*sft(t)[:-4], "--out", out, "--steps", 1],
    "eval_data.py": lambda t, out: ["eval_data.py", TINY, "--samples", 1, "--out", out],
    "studies/magnitudes.py": lambda t, out: ["studies/magnitudes.py", TINY, "--prompts", 1, "--out", out],
    "studies/tiny.py": lambda t, out: ["studies/tiny.py", *SMALL, "--out", out],
    "studies/longbench_sample.py": lambda t, out: ["studies/longbench_sample.py", out / "x"],
}


def disks():
    """Small file systems, read-only ones, and files that may not grow."""

    def mounted(t, options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory(t / "disk")], check=True)
        return t / "disk"

    for script, arguments in WRITERS.items():
        for size in (0, 1, 500, 20_000, 300_000):
            how = {"bytes": size}
            yield Case(
                "disks", f"{script}, files of {size} bytes", lambda t, a=arguments, h=how: [h, *a(t, t / "o")]
            )
        for options in ("size=4k", "size=64k", "size=1m", "nr_inodes=3", "nr_inodes=6", "ro"):
            if os.geteuid() == 0:
                yield Case(
                    "disks",
                    f"{script}, tmpfs {options}",
                    lambda t, a=arguments, o=options: a(
                        t, mounted(t, o) / ("" if "sample" in a(t, t)[0] else "o")
                    ),
                )


def planned(t):
    return ["train.py", "--plan", "--model", TINY]


def one_compared(t):
    return compared(t, json.dumps(RESULT) + "\n")


def rewarded(code, workers, t):
    where = {"PYTHONPATH": str(write(t / "mine.py", code).parent)}
    return [{"variables": where}, *rl(t, "--reward", "mine:f", "--reward-workers", workers)]


def processes():
    """Limits and variables of a process."""
    judge = {"LONGACT_JUDGE_URL": "http://127.0.0.1:9/v1", "LONGACT_JUDGE_MODEL": "m"}
    odd = {
        "RANK x": {"RANK": "x", "WORLD_SIZE": "1"},
        "RANK empty": {"RANK": ""},
        "RANK beyond": {"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "5"},
        "WORLD_SIZE 0": {"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"},
        "WORLD_SIZE alone": {"WORLD_SIZE": "2"},
        "no LOCAL_RANK": {"RANK": "0", "WORLD_SIZE": "1"},
        "restarts x": {"TORCHELASTIC_MAX_RESTARTS": "x"},
        "no home": {"HOME": "/none"},
        "no temporary directory": {"TMPDIR": "/none"},
        "a language": {"LANG": "xx_YY", "LC_ALL": "xx_YY.UTF-9"},
        "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        "a narrow terminal": {"COLUMNS": "0", "LINES": "-1"},
        "threads": {"OMP_NUM_THREADS": "x"},
        "a judge's answer limit": {**judge, "LONGACT_JUDGE_TIMEOUT": "1e400"},
        "a judge away": {**judge, "LONGACT_JUDGE_AWAY": "\udcff"},
        "a judge's cache": {**judge, "LONGACT_JUDGE_CACHE": "/proc/self/mem"},
    }
    for name, variables in odd.items():
        reward = ["--reward", "judge:by_source"] if "judge" in name else []
        yield Case(
            "processes", f"train {name}", lambda t, v=variables, r=reward: [{"variables": v}, *rl(t, *r)]
        )
        yield Case("processes", f"sft {name}", lambda t, v=variables: [{"variables": v}, *sft(t)])
        yield Case(
            "processes",
            f"plan {name}",
            lambda t, v=variables: [{"variables": v}, "train.py", "--plan", "--model", TINY],
        )
    for files in (3, 10, 30, 100):
        yield Case("processes", f"sft {files} files", lambda t, n=files: [{"files": n}, *sft(t)])
        yield Case(
            "processes",
            f"300 workers, {files} files",
            lambda t, n=files: [{"files": n}, *rl(t, "--reward-workers", 300)],
        )
    for name in ("stdout", "stderr", "stdin"):
        for script in ("train.py", "eval_gsm8k.py"):
            what = planned if script == "train.py" else one_compared
            yield Case(
                "processes", f"{script} without {name}", lambda t, n=name, w=what: [{"closed": n}, *w(t)]
            )
            yield Case("processes", f"{script}, {name} full", lambda t, n=name, w=what: [{"full": n}, *w(t)])
    modules = {
        "closes stdout": "import sys; sys.stdout.close()\ndef f(a, r): return 1",
        "is interrupted": "raise KeyboardInterrupt",
        "exits with text": "import sys; sys.exit('no')",
        "raises a group": "raise ExceptionGroup('g', [ValueError()])",
        "recurses": "def f(a, r): return f(a, r)",
        "changes directory": "import os; os.chdir('/')\ndef f(a, r): return 1",
        "returns a tensor": "import torch\ndef f(a, r): return torch.ones(2)",
        "returns itself": "def f(a, r): return f",
        "returns text": "def f(a, r): return 'nan'",
        "is a class": "class f: pass",
        "takes one": "def f(a): return 1",
        "is async": "async def f(a, r): return 1",
        "yields": "def f(a, r): yield 1",
        "raises a BaseException": "class E(BaseException): pass\ndef f(a, r): raise E('x')",
        "prints a lot": "def f(a, r): print('x' * 99999); return 1",
        "float fails": "class N:\n def __float__(s): raise KeyError('k')\ndef f(a, r): return N()",
    }  # fmt: skip
    for name, code in modules.items():
        for workers in (0, 1):
            yield Case(
                "processes",
                f"a reward that {name}, {workers} workers",
                partial(rewarded, code, workers),
                own=True,
            )


TABLES = places, users, disks, processes
