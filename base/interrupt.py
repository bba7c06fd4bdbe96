"""SIGTERM and SIGINT (Ctrl-C): the loop ends at the next safe point; its script saves and exits with code 75.

75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command with --resume auto goes on. A second
signal of the same kind has its usual effect: the process ends at once. What is on disk is still whole
(run/resume.py).
"""

import os
import signal
import sys

import torch
import torch.distributed as dist

EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """From construction until `close` the two signals are only noted. torchrun passes a signal on to every
    rank, but not at the same moment; `asked`, which every rank must call, is what the ranks agree on."""

    def __init__(self):
        self.pending, self.agreed = False, False
        self.before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def close(self):
        """Restore the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        self.pending = True
        signal.signal(number, signal.SIG_DFL)
        text = f"\n{signal.Signals(number).name}: saving and ending soon; once more ends at once\n"
        os.write(sys.stderr.fileno(), text.encode())  # print may be what was interrupted

    def asked(self):
        """Whether any rank got a signal -> bool, the same on every rank. Once true, it stays true."""
        flag = torch.tensor(float(self.pending))
        if dist.is_initialized() and not self.agreed:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.agreed = self.agreed or bool(flag)
        return self.agreed
