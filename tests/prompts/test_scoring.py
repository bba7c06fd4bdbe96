"""scoring.py: workers change how long it takes, and nothing else; what goes wrong in one is said in one
line, and nothing that a function starts is left."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_code

from base.cli import BadInput
from prompts import scoring

MINE = """
import concurrent.futures, multiprocessing, os, re, signal, subprocess, sys, threading, time

def length(answer, row):
    print("prints", answer)
    return len(answer) / row["most"]

def half(answer, row):
    return 0.5

def square(x):
    return x * x

def pools(answer, row):
    with multiprocessing.Pool(1) as pool, concurrent.futures.ThreadPoolExecutor(2) as threads:
        return pool.map(square, [3])[0] + threads.submit(square, 4).result()

def ends_its_processes(answer, row):
    forked = multiprocessing.Process(target=time.sleep, args=(99,))
    forked.start(), forked.terminate(), forked.join(60)
    run = subprocess.Popen(["sleep", "99"])
    run.terminate()
    return -forked.exitcode - run.wait(60)

def alarm(answer, row):
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    try:
        signal.pause()
    except KeyboardInterrupt:
        return 1

def forks(answer, row):
    return 0.25 if os.fork() == 0 else 0.5  # returns twice

def waits(answer, row):
    forked = os.fork()
    if forked == 0:
        sys.exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1])

def writes(answer, row):
    for file in range(32):  # one is the worker's pipe
        try:
            os.write(file, b"[0, 9, null]\\ngarbage")
        except OSError:
            pass
    return 1

def reads(answer, row):
    row["id"] = None  # a copy
    return len(sys.stdin.read())

def session(answer, row):
    return os.getsid(0)

def thread(answer, row):
    threading.Thread(target=time.sleep, args=(99,)).start()
    return 1

def told_to_end(answer, row):  # as all processes of a job
    if not os.path.exists(row["once"]):
        open(row["once"], "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
    return 1

FREE = "pools ends_its_processes alarm forks waits writes reads session thread told_to_end".split()

class Odd:
    def __float__(self):
        raise KeyboardInterrupt("odd")

    def __repr__(self):
        raise SystemExit

def faulty(answer, row):
    how = row["how"] if answer == "x7" else ""
    if how in RETURNED:
        return RETURNED[how]
    if how == "raises":
        raise ZeroDivisionError("seven")
    if how == "leaves":
        sys.exit(0)
    if how == "is interrupted":
        raise KeyboardInterrupt
    if how == "cannot be shown":
        raise type("Silent", (BaseException,), {"__repr__": lambda self: 1 / 0})
    if how == "closes":
        sys.stderr.close()
        raise ValueError("unseen")
    if how == "hangs":
        child = subprocess.Popen(["sleep", "99"])
        open(row["pids"], "a").write(f"{os.getpid()} {child.pid} ")
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        re.match(r"(a+)+$", "a" * 50 + "b")  # one call into compiled code, of years
    if how == "ends":
        os._exit(3)
    if how == "is killed":
        os.killpg(0, signal.SIGKILL)
    if how == "closes all":
        os.closerange(3, 64), open(os.devnull), open(os.devnull)
    return 1

RETURNED = {"nan": float("nan"), "none": None, "1e39": 1e39, "huge": 10**400, "text": "right", "odd": Odd()}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_scored.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))


def one(name, *how):
    return scoring.start([f"mine_scored:{name}"], *how)


def rows(how="", pids=""):
    return [(f"x{i}", {"id": i, "how": how, "pids": str(pids)}) for i in range(12)]


def alive(pids):
    """Of the processes that `faulty` has noted, those that still run."""
    states = [Path(f"/proc/{pid}/status") for pid in pids.read_text().split()]
    return [path for path in states if path.exists() and "State:\tZ" not in path.read_text()]


def test_workers_score_as_this_process_does_in_the_order_given(mine):
    pairs = [("é" * (i % 7), {"id": i, "most": 3, "answer": ["\ud800", "x"]}) for i in range(40)]
    specs = ["mine_scored:length", "mine_scored:half"]
    alone = scoring.start(specs, 0, 0)(pairs)
    assert alone == [[(i % 7) / 3, 0.5] for i in range(40)]
    beside = scoring.start(specs, 3, 60)
    assert beside(pairs) == alone and beside(pairs[:1]) == alone[:1] and beside([]) == []


def test_a_reward_may_use_what_a_program_may(mine, tmp_path):
    from mine_scored import FREE

    score_all = scoring.start([f"mine_scored:{name}" for name in FREE], 1, 0)
    pair = "x", {"id": 1, "once": str(tmp_path / "once")}
    for values in score_all([pair, pair]):
        made = dict(zip(FREE, values, strict=True))
        assert made.pop("session") not in (os.getsid(0), 0)  # a terminal's Ctrl-C does not reach it
        assert list(made.values()) == [25, 30, 1, 0.5, 7, 1, 0, 1, 1], made
    assert pair[1]["id"] == 1


FAILS = {
    "raises": r"the reward function failed on row 7: ZeroDivisionError\('seven'\)",
    "leaves": r"the reward function failed on row 7: SystemExit\(0\)",
    "is interrupted": r"the reward function failed on row 7: KeyboardInterrupt\(\)",
    "cannot be shown": "the reward function failed on row 7: a Silent$",
    "nan": "the reward function returned no finite number for row 7, but nan",
    "none": "the reward function returned no finite number for row 7, but None: TypeError",
    "huge": r"the reward function returned no finite number for row 7, but 10{196}\.\.\.: OverflowError",
    "text": "the reward function returned no finite number for row 7, but 'right': ValueError",
    "1e39": r"the reward function returned 1e\+39 for row 7, which fp32 cannot hold: at most 3.4e38",
    "odd": r"the reward function returned no finite number for row 7, but a Odd: KeyboardInterrupt\('odd'\)",
}
ENDS = {
    "raises": FAILS["raises"],
    "closes": "row 7: the reward function closes stderr",
    "hangs": 'row 7: the reward function took more than --reward-timeout 1 seconds for the answer "x7"',
    "ends": "row 7: the reward function ended its process with code 3",
    "is killed": "row 7: the reward function ended its process by SIGKILL",
    "closes all": "row 7: the reward function closed files that are not its own: its worker's pipes",
}


@pytest.mark.parametrize("how, workers", [(how, 0) for how in FAILS] + [(how, 2) for how in ENDS])
def test_what_fails_names_the_row_in_one_line(how, workers, mine, capfd, tmp_path):
    # On a busy machine a row that is as it should be takes a while.
    score_all = one("faulty", workers, 1 if how == "hangs" else 300 if workers else 0)
    with pytest.raises(BadInput, match=(ENDS if workers else FAILS)[how]):
        score_all(rows(how, tmp_path / "pids"))
    shown = "ZeroDivisionError: seven\n" in capfd.readouterr().err  # with its traceback
    assert shown == (how == "raises")
    if how == "hangs":
        assert not alive(tmp_path / "pids")


def test_a_late_value_counts_as_zero_where_that_is_asked_for(mine, tmp_path):
    score_all = scoring.start(["mine_scored:faulty", "mine_scored:half"], 2, 1, "zero")
    values = score_all(rows("hangs", tmp_path / "pids"))
    assert math.isnan(values[7][0]) and [v for v in values if v != values[7]] == [[1.0, 0.5]] * 11
    assert values[7][1] == 0.5 and score_all(rows()[:8]) == [[1.0, 0.5]] * 8  # the worker has begun anew


def test_nothing_is_left_of_a_trainer_that_is_killed(mine, tmp_path):
    pids = tmp_path / "pids"
    code = f"""from prompts import scoring
scoring.start(["mine_scored:faulty"], 1, 0)([("x7", {{"id": 7, "how": "hangs", "pids": {str(pids)!r}}})])"""
    trainer, until = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT), time.monotonic() + 120
    while not (pids.exists() and pids.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    assert len(alive(pids)) == 2
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(pids)


@pytest.mark.parametrize("code, message", [
    ("import sys; sys.stdout.close(); score = max", "importing imported_0 closes stdout"),
    ("raise KeyboardInterrupt", r"imported_1 fails when it is imported: KeyboardInterrupt\(\)"),
    ("def score(answer, row): pass\ndef check_reward(): return 1 / 0", "check_reward.* fails: ZeroDivision"),
])  # fmt: skip
def test_a_module_that_cannot_be_imported_is_one_line(code, message, request, tmp_path, monkeypatch):
    name = f"imported_{request.node.callspec.indices['code']}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    with pytest.raises(BadInput, match=message):
        scoring.start([f"{name}:score"], 0, 0)


def test_a_worker_starts_in_no_time_for_it_needs_no_torch():
    result = run_code(
        "import sys; from prompts import judge, rewards, scoring; print('torch' in sys.modules)"
    )
    assert result.stdout == "False\n"
