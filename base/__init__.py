"""What any program needs: flags, one-line errors, files that no crash can tear, ranks, figures.

base/ imports nothing of ours. Programs import it before torch, whose OpenMP (libgomp) reads once how long a
thread that waits may spin. By itself it spins 300,000 times, 8 to 17 ms: on a machine with another busy
process two threads may share a core, and each of some thousand waits in a step then takes as long. 2,000
spins, about 0.1 ms, are enough from one operator to the next; bench/threads.py measures it."""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # of the user, who then has the last word
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
