"""Scoring answers with the user's reward function, in this process or in others beside it.

    score_all = start("rewards:exact", workers=4, timeout=30)
    score_all([(answer, row), ...])                 # -> [1.0, ...], in the order given, whatever the workers

The function is the user's code: it may be slow, raise, hang or kill its process. A worker is this file run as
a program. It imports the reward itself, reads (answer, row) as a line of JSON and writes what came of it as
another. So nothing is pickled, and what the function prints goes to standard error. The timer is the worker's
own: it ends the process even where compiled code, as a regular expression's, lets no Python run, and where
the trainer is gone. A second later the trainer does.

A reward gives the same with any number of workers if it depends on answer and row alone. One that draws at
random should seed itself by the row.
"""

import atexit
import json
import os
import queue
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from base.cli import BadInput
from prompts.rewards import load_reward, score


def start(spec, workers, timeout):
    """The reward function "module:function" -> score_all([(answer text, row), ...]) -> list of float.

    workers: processes; 0 for this one. timeout: seconds for one answer, with workers only; 0 for any time.
    score_all raises BadInput, which names the row, when the function raises, is too slow, ends its process,
    or gives no finite number.
    """
    reward = load_reward(spec)  # here too: what is wrong with it is said once
    if not workers:
        return lambda pairs: [score(reward, answer, row) for answer, row in pairs]
    command = [sys.executable, "-P", "-m", "prompts.scoring", spec, str(timeout)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    path = os.pathsep.join(
        [str(Path(__file__).parent.parent), *sys.path]
    )  # ours, and where the reward is found here
    processes = [
        subprocess.Popen(command, **pipes, env={**os.environ, "PYTHONPATH": path}) for _ in range(workers)
    ]
    idle, pool, ready = queue.SimpleQueue(), ThreadPoolExecutor(workers), set()
    for process in processes:
        idle.put(process)
        atexit.register(process.kill)

    def ask(pair):
        process, late = idle.get(), False
        try:
            if process not in ready:  # it may take long to import what the function needs
                process.stdout.readline()
                ready.add(process)
            process.stdin.write(json.dumps(pair) + "\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], timeout + 1 if timeout else None)[0]:
                reply = process.stdout.readline()
            else:  # the function has made the timer its own
                process.kill()
                reply, late = "", True
        except BrokenPipeError:
            reply = ""
        finally:
            idle.put(process)
        if not reply:
            row, code = pair[1]["id"], process.wait()
            if code == -signal.SIGALRM or late:
                raise BadInput(
                    f"row {row}: the reward function took more than --reward-timeout {timeout:g} seconds"
                )
            raise BadInput(f"row {row}: the reward function ended its process with code {code}")
        value, problem = json.loads(reply)
        if problem:
            raise BadInput(problem)
        return value

    def score_all(pairs):
        try:
            return list(pool.map(ask, pairs))
        except BadInput:
            for process in processes:  # no thread shall wait for one that hangs
                process.kill()
            raise

    return score_all


def serve(spec, timeout):
    """A worker's life: it ends with its standard input, which is the trainer."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a terminal sends them to all; they are for the trainer to act on
        signal.signal(number, signal.SIG_IGN)
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what the function reads and prints is not for them
    os.dup2(2, 1)
    reward = load_reward(spec)
    print("ready", file=replies, flush=True)
    for line in requests:
        answer, row = json.loads(line)
        value = problem = None
        signal.setitimer(signal.ITIMER_REAL, timeout)  # its signal's usual effect is the end of the process
        try:
            value = score(reward, answer, row)
        except BadInput as error:
            problem = str(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps([value, problem]), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
