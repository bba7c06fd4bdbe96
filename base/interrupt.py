"""SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning): a program saves and exits with 75, at any moment.

75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command goes on (a run with --resume auto).
From `end_at_once`, with which a script begins, a signal ends the process there and then: what is finished is
on disk (base/durable.py). In the loop of a training, within `Interrupt`, it is only noted: the loop ends at
the next safe point, and its script saves. A second signal of the same kind has its usual effect: the process
ends at once, and what is on disk is still whole.

Nothing here imports torch before it must, so that a script can begin with it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # of Linux's prctl

children = []  # Popen of what `run` has started
ending = False  # whether a signal is ending this process: `run` begins nothing new
before_end = []  # functions without arguments that are called when a signal ends this process at once


def end_at_once():
    """From now on a signal ends this process with code 75, after its `children` got it and ended, too.

    A rank of torchrun also asks Linux for SIGTERM when torchrun dies, which cannot end its ranks when it is
    killed with -9.
    """
    for number in SIGNALS:
        signal.signal(number, _end)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _at_parents_death(signal.SIGTERM)


def _at_parents_death(number):
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _end(number, frame):
    global ending
    _take(number, "ending; what is finished is saved")
    ending = True
    started = children.copy()  # threads remove those that end
    for child in started:
        child.send_signal(number)
    for child in started:
        with contextlib.suppress(ChildProcessError):  # its thread was first
            # Not child.wait: `run`, which the signal may have interrupted, holds its lock.
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    for function in before_end:
        function()
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # a print may be under way
        sys.stdout.flush()
    os._exit(EXIT_CODE)  # an exception might be caught, or wait for threads of vLLM


def _take(number, text):
    """The first signal: say so; the next one ends the process at once."""
    _at_parents_death(0)  # else Linux sends one for each thread of torchrun that dies
    signal.signal(number, signal.SIG_DFL)
    os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())  # print may be what was interrupted


def run(command, **how):
    """subprocess.run, but that a signal which ends this process is handed on -> CompletedProcess. The command
    has a session of its own, so that a terminal's Ctrl-C does not reach it a second time. Once a signal ends
    this process a thread that calls it waits for that: the next command of a pool is not begun."""
    if ending:
        threading.Event().wait()
    with subprocess.Popen(command, start_new_session=True, **how) as process:
        children.append(process)
        if ending:  # the signal came between the two
            process.terminate()
        try:
            output, errors = process.communicate()
        finally:
            children.remove(process)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


class Interrupt:
    """From construction until `close` signals are only noted. torchrun passes a signal on to every rank, but
    not at the same moment; `asked`, which every rank must call, is what the ranks agree on."""

    def __init__(self):
        self.pending, self.agreed = False, False
        self.before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def close(self):
        """Restore the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        self.pending = True
        _take(number, "saving and ending soon; once more ends at once")

    def asked(self):
        """Whether any rank got a signal -> bool, the same on every rank. Once true, it stays true."""
        import torch
        import torch.distributed as dist

        flag = torch.tensor(float(self.pending))
        if dist.is_initialized() and not self.agreed:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.agreed = self.agreed or bool(flag)
        return self.agreed
