"""interrupt.py: code 75 from any moment, signals handed on to what was started, nothing left when torchrun is
killed."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run_code

from base.interrupt import EXIT_CODE, SIGNALS


def start(code, **environment):
    """Lines of Python in a process of its own, which import nothing heavy -> its Popen, once it has printed
    "ready"."""
    command = [sys.executable, "-c", code]
    env = {**os.environ, **environment}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


WAITS = "from base import interrupt; interrupt.end_at_once(); print('ready', flush=True); import time\n"
WAITS += "while True: time.sleep(9)"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_program_ends_with_75_before_it_has_imported_anything(number):
    with start(WAITS) as process:
        process.send_signal(number)
    assert process.returncode == EXIT_CODE


def test_every_script_takes_hold_of_signals_before_its_long_imports():
    """Its first statement imports interrupt, the second calls end_at_once; no module that takes long has been
    imported by then."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("studies/*.py")]
    scripts = {path for path in files if "parse(Config" in path.read_text()}
    assert len(scripts) > 9
    for path in scripts - {ROOT / "studies" / "longbench_sample.py"}:  # which takes a second
        code = path.read_text().partition('"""\n\n')[2]
        assert code.startswith("from base.interrupt import ") and "end_at_once()" in code[:160], path
    result = run_code("import sys, base.interrupt; print({'torch', 'numpy', 'vllm'} & set(sys.modules))")
    assert result.stdout == "set()\n"


PARENT = """
import sys
from base import interrupt
interrupt.end_at_once()
interrupt.before_end.append(lambda: print("cleaned"))
interrupt.run([sys.executable, "-c", sys.argv[1]])
"""
CHILD = """
from base.interrupt import *
i = Interrupt()
print("ready", flush=True)
import time
while not i.pending: time.sleep(0.01)
print("saved", flush=True)
"""


def test_a_signal_is_handed_on_once_and_what_was_started_is_waited_for():
    parent = PARENT.replace("sys.argv[1]", repr(CHILD))
    with start(parent) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "saved\ncleaned\n"
    assert process.returncode == EXIT_CODE


POOL = """
import sys, threading
from base import interrupt
interrupt.end_at_once()
def run_two():
    for _ in range(2):
        interrupt.run([sys.executable, "-c", sys.argv[1]])
threads = [threading.Thread(target=run_two) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_a_signal_begins_nothing_new_in_the_threads_of_a_pool():
    """Two threads with two commands each: the second ones do not begin when the first ones have ended."""
    with start(POOL.replace("sys.argv[1]", repr(CHILD))) as process:
        assert process.stdout.readline() == "ready\n"  # of the other thread's first
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "saved\nsaved\n"
    assert process.returncode == EXIT_CODE


TORCHRUN = """
import subprocess, sys, threading
for _ in range(20):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""


@pytest.mark.parametrize(
    "code, said", [(WAITS, ""), (CHILD.replace("\ni =", "\nend_at_once()\ni ="), "saved\n")]
)
def test_ranks_end_when_torchrun_is_killed(code, said):
    """Their end closes the pipe that they print into. Linux sends a signal for each thread that dies."""
    with start(TORCHRUN.replace("sys.argv[1]", repr(code)), TORCHELASTIC_RUN_ID="x") as process:
        process.kill()
        assert process.stdout.read() == said
