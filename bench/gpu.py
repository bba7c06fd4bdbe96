"""What a GPU does with this repository: tests, kernels, steps at real size, the plan against what was used.

    bash bench/gpu.sh OUT_DIR                    # within 8 minutes; docs/gpu.md says what each number decides
    python bench/gpu.py runs/gpu --device cpu    # the same in small shapes, to try it without a GPU

It needs PyTorch, Triton and transformers with what they bring, no vLLM and no network. Each part runs in a
process of its own (bench/gpu_parts.py, bench/scale.py, tests/test_gpu.py) with its own time limit: one that
fails, hangs or runs out of memory takes no other along, and what it had measured stays. Rows are printed and
table.txt is written after each part. log.txt has all that the parts print, a table of kernels among it, and
results.jsonl one object a line; a key that does not apply is absent:

    part, what            the part; what of it was measured, "the part" for its end
    state                 ok, failed, out of time; not here: a package that it needs
    seconds               the fastest of a few runs; of a part its whole time
    tflops, mfu           model FLOPs a second / 1e12, recomputation not counted; the same over the card's
                          dense bf16 peak by its data sheet
    tokens_per_second     of prompt and completions, each once
    gib, planned_gib      peak of allocated memory, and by run/memory_plan.py: of what comes on top
                          of weights and gradients; in "update" of everything
    terabytes_per_second  of memory, read and written
    difference            of two kernels' gradients, |a - b| / |a|
    shares                of GPU time, by kind of kernel
    note                  the card and versions; the last line of a part that failed
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from base.cli import BadInput, one_line_errors, option, parse  # noqa: E402

# Seconds that each may take, the most wanted first.
PARTS = {
    "machine": 30,
    "ceilings": 40,
    "attention": 60,
    "step": 60,
    "update": 90,
    "tests": 120,
    "kept": 60,
    "scale-0.6B": 60,
    "scale-1.7B": 60,
    "scale-4B": 100,
    "compiled": 100,
    "optimizers": 60,
    "flash3": 90,
}
SCALE = {
    "cuda": "--prompts 8192 16384 32768 --completions 16 --completion 512 --rounds 1 --least 1".split(),
    "cpu": "--prompts 32 --completions 4 --completion 16 --rounds 1 --least 0".split(),
}


@dataclass
class Config:
    out: str = option("runs/gpu", "directory for the results, see above", positional=True)
    device: str = option("cuda", "cpu: in small shapes, to try it", ["cuda", "cpu"])
    parts: list[str] = option([], "parts to run, in this order (default: all)", list(PARTS))
    minutes: float = option(8.0, "after these no part goes on or begins", above=0)


def command(part, config):
    """-> the command line of a part."""
    if part == "tests":
        return [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "tests/test_gpu.py"]
    if part.startswith("scale-"):
        shape = part.removeprefix("scale-") if config.device == "cuda" else "laptop"
        out = Path(config.out, f"{part}.jsonl")
        return [sys.executable, "bench/scale.py", "--shape", shape, *SCALE[config.device], "--out", str(out)]
    return [sys.executable, "bench/gpu_parts.py", part, str(Path(config.out, "results.jsonl"))]


def run(command, limit, log, environment):
    """Run a command in ROOT for at most `limit` seconds, its output to the file `log` -> "ok", "failed" or
    "out of time". It leaves no process behind."""
    how = {"cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, start_new_session=True, **how) as process:
        try:
            return "failed" if process.wait(limit) else "ok"
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def scale_rows(part, path):
    """bench/scale.py's lines -> rows of results.jsonl."""
    for line in path.read_text().splitlines() if path.exists() else []:
        r = json.loads(line)
        what = f"prompt {r['P']:,} + {r['G']} x {r['R']:,}"
        row = {"part": part, "what": what, "state": "ok", "seconds": r["seconds"], "tflops": r["tflops"]}
        row |= {"mfu": r["flops_utilisation"], "tokens_per_second": r["tokens_per_second"]}
        yield {key: value for key, value in row.items() if value is not None} | {
            "gib": r["peak_bytes"] / 2**30
        }


HEAD = f"{'part':11}{'what':53}{'seconds':>9}{'TFLOP/s':>9}{'MFU':>7}{'GiB':>8}{'planned':>9}{'tokens/s':>10}"


def line(row):
    """A row as a line of the table."""

    def cell(key, form, width):
        return f"{row[key]:{form}}".rjust(width) if row.get(key) is not None else " " * width

    text = f"{row['part']:11}{row['what']:53}" + cell("seconds", ".3g", 9) + cell("tflops", ".3g", 9)
    text += cell("mfu", ".1%", 7) + cell("gib", ".2f", 8) + cell("planned_gib", ".2f", 9)
    text += cell("tokens_per_second", ",.0f", 10) + "  " + (row["state"] if row["state"] != "ok" else "")
    if "terabytes_per_second" in row:
        text += f"{row['terabytes_per_second']:.2f} TB/s "
    if "difference" in row:
        text += f"gradients differ by {row['difference']:.1e} "
    if "shares" in row:
        text += ", ".join(f"{kind} {share:.0%}" for kind, share in row["shares"].items())
    return f"{text} {row.get('note', '')}".rstrip()


def last_line(path, start):
    """The last line that is not blank of a file from `start` on, in bytes; at most 200 characters of it."""
    with open(path, "rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def main():
    config = parse(Config, __doc__)
    if config.device == "cuda" and not shutil.which("nvidia-smi"):
        raise BadInput("there is no NVIDIA GPU here (no nvidia-smi); --device cpu tries it in small shapes")
    out, end = Path(config.out), time.monotonic() + 60 * config.minutes
    out.mkdir(parents=True, exist_ok=True)
    results, log = out / "results.jsonl", out / "log.txt"
    for path in (results, log, *out.glob("scale-*.jsonl")):
        path.unlink(missing_ok=True)
    environment = {**os.environ, "GPU_TESTS": "1", "PYTHONUNBUFFERED": "1"}
    if config.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
        del environment["GPU_TESTS"]
    lines = [HEAD]
    print(HEAD, flush=True)
    for part in config.parts or PARTS:
        started, state = time.monotonic(), "out of time"
        limit = min(PARTS[part] * (1 if config.device == "cuda" else 10), end - started)
        with open(log, "ab") as file:
            file.write(f"\n==== {part}\n".encode())
            file.flush()
            begin = file.tell()
            if limit > 0:
                state = run(command(part, config), limit, file, environment)
        whole = {"part": part, "what": "the part", "state": state, "seconds": time.monotonic() - started}
        if state != "ok" or part == "tests":
            whole["note"] = last_line(log, begin)
        with open(results, "a") as file:
            for row in (*scale_rows(part, out / f"{part}.jsonl"), whole):
                print(json.dumps(row), file=file)
        rows = [json.loads(text) for text in results.read_text().splitlines()]
        new = [line(row) for row in rows if row["part"] == part]
        print("\n".join(new), flush=True)
        lines += new
        (out / "table.txt").write_text("\n".join(lines) + "\n")
    print(f"{out}/results.jsonl {out}/table.txt {out}/log.txt")


if __name__ == "__main__":
    one_line_errors()
    main()
