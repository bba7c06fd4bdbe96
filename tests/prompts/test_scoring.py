"""scoring.py: workers change how long it takes, and nothing else; what goes wrong in one is said in one
line."""

import os

import pytest
from conftest import ROOT, run_code

from base.cli import BadInput
from prompts import scoring

MINE = """
import os, re, signal, sys, time

def length(answer, row):
    print("prints", answer)
    return len(answer) / row["most"]

def selfish(answer, row):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # as graders do that have a timer of their own
    time.sleep(9)

def curious(answer, row):
    row["id"] = None  # a copy
    return len(sys.stdin.read())

def faulty(answer, row):
    if answer == "x7" and row["how"] == "leaves":
        sys.exit(0)
    if answer == "x7" and row["how"] == "raises":
        raise ZeroDivisionError("seven")
    if answer == "x7" and row["how"] == "hangs":
        re.match(r"(a+)+$", "a" * 50 + "b")  # one call into compiled code, of years
    if answer == "x7" and row["how"] == "ends":
        os._exit(3)
    return float("nan") if answer == "x7" else 1
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_scored.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))


def test_workers_score_as_this_process_does_in_the_order_given(mine):
    pairs = [("é" * (i % 7), {"id": i, "most": 3, "answer": ["\ud800", "x"]}) for i in range(40)]
    alone = scoring.start("mine_scored:length", 0, 0)(pairs)
    assert alone == [(i % 7) / 3 for i in range(40)]
    beside = scoring.start("mine_scored:length", 3, 60)
    assert beside(pairs) == alone and beside(pairs[:1]) == alone[:1] and beside([]) == []


@pytest.mark.parametrize("how, message", [
    ("raises", r"the reward function failed on row 7: ZeroDivisionError\('seven'\)"),
    ("hangs", "row 7: the reward function took more than --reward-timeout 2 seconds"),
    ("leaves", r"the reward function failed on row 7: SystemExit\(0\)"),
    ("ends", "row 7: the reward function ended its process with code 3"),
    ("is no number", "the reward function returned no finite number for row 7"),
])  # fmt: skip
def test_what_fails_in_a_worker_names_the_row(how, message, mine, capfd):
    timeout = 2 if how == "hangs" else 300  # on a busy machine a row that is as it should be takes a while
    score_all = scoring.start("mine_scored:faulty", 2, timeout)
    with pytest.raises(BadInput, match=message):
        score_all([(f"x{i}", {"id": i, "how": how}) for i in range(12)])
    assert ("ZeroDivisionError: seven\n" in capfd.readouterr().err) == (how == "raises")  # with its traceback


def test_a_worker_keeps_its_time_and_its_pipe_to_itself(mine):
    pairs = [("x", {"id": i}) for i in range(3)]
    with pytest.raises(
        BadInput, match="row 0: the reward function took more than --reward-timeout 0.5 seconds"
    ):
        scoring.start("mine_scored:selfish", 1, 0.5)(pairs)
    assert scoring.start("mine_scored:curious", 1, 9)(pairs) == [0.0, 0.0, 0.0]
    assert [row["id"] for _, row in pairs] == [0, 1, 2]


def test_a_worker_starts_in_no_time_for_it_needs_no_torch():
    result = run_code(
        "import sys; from prompts import judge, rewards, scoring; print('torch' in sys.modules)"
    )
    assert result.stdout == "False\n"
