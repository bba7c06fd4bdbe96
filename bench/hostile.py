"""Wrong inputs that no table of the tests has, given to every program as a user would give them. Each must
end with one line and exit code 1, or do no harm.

    python bench/hostile.py                      # all that have no result yet
    python bench/hostile.py --only rows metrics  # some kinds, again

The inputs are made from the tables of hostile_inputs.py (odd values for every flag; odd TOML, rows,
checkpoints, tensors), hostile_left.py (metrics, results, checkpoints of a run, changed since) and
hostile_places.py (directories, another user's files, which needs root, full disks, limits and variables of a
process). Each runs in a fork of this process, which has imported what the programs import.

--out holds results.jsonl, a line for each input as it ends (kind, name, command, outcome, code, seconds, the
end of what it printed), and summary.json: for each kind the number of inputs by outcome, which is one of

    clean      one line, "NAME: error: ...", alone and last, and exit code 1
    harmless   exit code 0, or 75 (base/interrupt.py)
    traceback  a traceback was printed
    hang       it was killed after --limit seconds
    other      anything else

Exit code 1 if there is one of the last three.
"""

import contextlib
import gc
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import forks  # noqa: E402
import hostile_inputs  # noqa: E402
import hostile_left  # noqa: E402
import hostile_places  # noqa: E402
from hostile_inputs import Case  # noqa: E402

from base import durable  # noqa: E402
from base.cli import one_line_errors, option, parse  # noqa: E402

MODULES = (
    *forks.MODULES,
    "model run.plan run.dry_run run.journal evals.engine evals.subject evals.stats evals.longbench",
    "evals.gsm8k evals.clamp evals.ruler.sets losses prompts.load prompts.judge pyarrow.parquet core.memory",
)


@dataclass
class Config:
    out: str = option("runs/hostile", "directory of the results")
    only: list[str] = option([], "kinds of inputs to give again (default: all that have no result)")
    limit: int = option(60, "seconds after which a program hangs", least=1)
    jobs: int = option(2, "inputs at the same time", least=1, most=64)


GOOD = ("clean", "harmless")
ERROR = re.compile(r"^[\w.-]+: error: .*$", re.M)


def outcome(code, printed, own):
    """An exit code (None: killed), standard error, Case.own -> one of the words above."""
    if code is None:
        return "hang"
    if not own and "Traceback (most recent call last)" in printed:
        return "traceback"
    if code in (0, 75):
        return "harmless"
    lines = ERROR.findall(printed)
    clean = code == 1 and len(lines) == 1 and (own or printed.rstrip().endswith(lines[0]))
    return "clean" if clean else "other"


def begin(case, t):
    """Fork; in the fork make the case's files in the directory t and run its program -> the fork's id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.chdir(t / "in")
    sys.path.insert(0, "")  # forks.run puts another there
    try:
        words = case.make(t / "in")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    how = words.pop(0) if isinstance(words[0], dict) else {}
    script, *arguments = [os.fsdecode(str(word).encode("utf-8", "surrogateescape")) for word in words]
    module = script.removesuffix(".py").replace("/", ".")
    start = ["-m", module] if "." in module else [str(ROOT / script)]
    (t / "command").write_text(json.dumps([how, script, *(ascii(word)[:80] for word in arguments)]))
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    for number in (1, 2):
        with open(t / str(number), "w") as file:
            # Through a pipe: limits of this process are not for what it prints.
            cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file, start_new_session=True)
            os.dup2(cat.stdin.fileno(), number)
            cat.stdin.close()
    enter(how)
    code = forks.run([*start, *arguments])
    try:
        forks.leave(code)
    finally:  # where standard output is closed
        os._exit(code)


def enter(how):
    """Set variables and limits of this process, close or fill its standard files, become another user."""
    os.environ.update(how.get("variables", {}))
    sys.path[1:1] = filter(None, how.get("variables", {}).get("PYTHONPATH", "").split(os.pathsep))
    number = {"stdin": 0, "stdout": 1, "stderr": 2}
    if "closed" in how:
        os.close(number[how["closed"]])
    if "full" in how:
        os.dup2(os.open("/dev/full", os.O_RDWR), number[how["full"]])
    for key, limit in (("bytes", resource.RLIMIT_FSIZE), ("files", resource.RLIMIT_NOFILE)):
        if key in how:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does when it starts
            resource.setrlimit(limit, (how[key], how[key]))
    if "user" in how:
        os.setgroups([])
        os.setgid(how["user"])
        os.setuid(how["user"])


def end(case, t, code, seconds):
    """A case has ended -> its line of results.jsonl; its directory is removed."""
    time.sleep(0.1)  # until what it printed is written
    printed = [
        (t / name).read_bytes().decode(errors="replace") if (t / name).exists() else "" for name in "12"
    ]
    command = json.loads((t / "command").read_text()) if (t / "command").exists() else []
    subprocess.run(["umount", "-l", t / "in" / "disk"], capture_output=True)
    shutil.rmtree(t, ignore_errors=True)
    line = {
        "kind": case.kind,
        "name": case.name,
        "command": command,
        "outcome": outcome(code, printed[1], case.own),
    }
    if not command:
        line["outcome"] = "not made"
    return {**line, "code": code, "seconds": round(seconds, 1), "printed": "".join(printed)[-3000:]}


def give(cases, jobs, limit):
    """Yields a line of results.jsonl for each case, as it ends."""
    running, waiting = {}, list(cases)[::-1]
    while running or waiting:
        while waiting and len(running) < jobs:
            t = Path(tempfile.mkdtemp(prefix="hostile-"))
            for path in (t, t / "in"):
                path.mkdir(exist_ok=True)
                path.chmod(0o777)
            case = waiting.pop()
            running[begin(case, t)] = case, t, time.time()
        time.sleep(0.02)
        for pid, (case, t, started) in list(running.items()):
            late = time.time() - started > limit
            if late:
                os.killpg(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if ended:
                del running[pid]
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # what it has started
                code = None if late else os.waitstatus_to_exitcode(status)
                yield end(case, t, code, time.time() - started)


def main():
    one_line_errors()
    config = parse(Config, __doc__)
    out = Path(config.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    file, results = out / "results.jsonl", {}
    for _, _, line in durable.json_lines(file) if file.exists() and file.stat().st_size else ():
        if line["kind"] not in config.only:
            results[line["kind"], line["name"]] = line
    durable.write(file, "".join(json.dumps(line) + "\n" for line in results.values()))
    tables = (*hostile_inputs.TABLES, *hostile_left.TABLES, *hostile_places.TABLES)
    cases = [case for table in tables for case in table() if not config.only or case.kind in config.only]
    todo = [case for case in cases if (case.kind, case.name) not in results]
    for name in " ".join(MODULES).split():
        importlib.import_module(name)
    warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
    gc.freeze()
    shutil.rmtree(hostile_left.WHOLE, ignore_errors=True)
    (hostile_left.WHOLE / "in").mkdir(parents=True)
    os.waitpid(begin(Case("", "", hostile_inputs.sft), hostile_left.WHOLE), 0)
    hostile_left.WHOLE.chmod(0o755)
    with open(file, "ab", buffering=0) as written:
        for number, line in enumerate(give(todo, config.jobs, config.limit), 1):
            durable.append(written, line)
            results[line["kind"], line["name"]] = line
            if line["outcome"] not in GOOD:
                shown = line["printed"][-500:]
                print(
                    f"{number} of {len(todo)}: {line['outcome']}: {line['kind']}, {line['name']}: {shown}",
                    flush=True,
                )
    counts = defaultdict(Counter)
    for line in results.values():
        counts[line["kind"]][line["outcome"]] += 1
        counts["all"][line["outcome"]] += 1
    durable.write_json(out / "summary.json", counts)
    for kind, of_kind in counts.items():
        print(f"{kind:12}", ", ".join(f"{name} {number}" for name, number in sorted(of_kind.items())))
    sys.exit(any(name not in GOOD for name in counts["all"]))


if __name__ == "__main__":
    main()
