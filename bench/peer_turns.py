"""How a process of bench/peers.py takes turns: JSON lines out, a line in for each turn. The standard library
only, as the peers' processes run in an environment of their own.

Out, first: {"ready": true, "base_mib", "versions"}. After each line in: {"seconds", "cpu_seconds",
"peak_mib", "tokens"}, the first time also what the entrant has to check. MiB are the whole process's.
"""

import json
import os
import re
import sys
import time
from pathlib import Path


class Turns:
    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to the log
        self.job = json.loads(Path(sys.argv[1]).read_text())

    def say(self, **values):
        print(json.dumps(values), file=self.out, flush=True)

    def ready(self, **versions):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.say(ready=True, base_mib=pages * os.sysconf("SC_PAGE_SIZE") / 2**20, versions=versions)

    def wait(self):
        """Until it is this process's turn, which it starts to time. Ends the process when there is none."""
        if not sys.stdin.readline():
            sys.exit()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: a turn's own
        self.begun = time.perf_counter(), time.process_time()

    def done(self, **more):
        seconds, cpu_seconds = time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]
        kibibytes = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
        self.say(seconds=seconds, cpu_seconds=cpu_seconds, peak_mib=int(kibibytes) / 2**10, **more)
