"""An evaluation that is killed amid its work.

    python tests/evals/killed.py COUNT eval_ruler.py ...

When it has written COUNT results it says "here", waits for the end of its standard input and sends itself
SIGKILL.
"""

import os
import runpy
import signal
import sys

from evals.results import Results

_, count, *sys.argv = sys.argv
write, written = Results.write, []


def counted(results, record):
    write(results, record)
    written.append(record)
    if len(written) == int(count):
        print("here", flush=True)
        while os.read(0, 99):
            pass
        os.kill(os.getpid(), signal.SIGKILL)


Results.write = counted
runpy.run_path(sys.argv[0], run_name="__main__")
