"""Progress bars. On a terminal a bar is one line, written over; in a file or a pipe each state is a line of
its own, every half minute. So an error that comes while a bar is shown stands alone on its line.
"""

import sys

from tqdm import tqdm


def bar(*arguments, **how):
    """tqdm's bar on standard error, see above. Arguments as tqdm's."""
    if not sys.stderr.isatty():
        how = {"mininterval": 30, **how, "file": _Lines()}
    return tqdm(*arguments, **how)


def say(text):
    """Print a line to standard output, above the bars that are shown."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(text, flush=True)


def clear():
    """Close the bars that are shown, and leave nothing of them on a terminal."""
    for shown in list(getattr(tqdm, "_instances", ())):
        shown.leave = False
        shown.close()


class _Lines:
    """Standard error as a file for tqdm, which begins each state with a carriage return."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()
