"""Scoring answers with the user's reward function, in this process or in worker processes.

    score_all = start("rewards:exact", workers=4, timeout=30)
    score_all([(answer, row), ...])                 # -> [1.0, ...], in the order given

The function is the user's code: it may be slow, raise, hang or kill its process. A worker is this file run as
a program. It imports the reward itself, reads (answer, row) as one line of JSON and writes [score, error] as
another. So nothing is pickled, and what the function prints goes to standard error.

Each worker has its own timer, a signal. It ends the worker even while compiled code, such as a regular
expression, keeps Python from running, and even if the trainer is gone. If a worker is still there a second
later, the trainer kills it.

The score does not depend on the number of workers if the reward depends only on answer and row. A reward that
draws random numbers should seed them by the row.
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
    """The reward function "module:function" -> score_all, which maps [(answer text, row), ...] to a list of
    float.

    workers: processes; 0 for this one. timeout: seconds for one answer, only with workers; 0 for any time.
    Raises BadInput as rewards.load_reward. score_all raises BadInput, which names the row, if the function
    raises, is too slow, ends its process, or does not return a finite number.
    """
    reward = load_reward(spec)  # with workers too, so that an error in it is printed once
    if not workers:
        return lambda pairs: [score(reward, answer, row) for answer, row in pairs]
    command = [sys.executable, "-P", "-m", "prompts.scoring", spec, str(timeout)]
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    path = [str(Path(__file__).parent.parent), *sys.path]  # of our modules, and of the reward's
    how["env"] = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    processes = [subprocess.Popen(command, **how) for _ in range(workers)]
    idle, pool, ready = queue.SimpleQueue(), ThreadPoolExecutor(workers), set()
    for process in processes:
        idle.put(process)
        atexit.register(process.kill)

    def ask(pair):
        process, late = idle.get(), False
        try:
            if process not in ready:  # importing what the function needs may take long
                process.stdout.readline()
                ready.add(process)
            process.stdin.write(json.dumps(pair) + "\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], timeout + 1 if timeout else None)[0]:
                reply = process.stdout.readline()
            else:  # the function has replaced the worker's timer
                process.kill()
                reply, late = "", True
        except BrokenPipeError:
            reply = ""
        finally:
            idle.put(process)
        if not reply:
            row, code = pair[1]["id"], process.wait()
            if code == -signal.SIGALRM or late:
                limit = f"--reward-timeout {timeout:g} seconds"
                raise BadInput(f"row {row}: the reward function took more than {limit}")
            raise BadInput(f"row {row}: the reward function ended its process with code {code}")
        value, problem = json.loads(reply)
        if problem:
            raise BadInput(problem)
        return value

    def score_all(pairs):
        try:
            return list(pool.map(ask, pairs))
        except BadInput:
            for process in processes:  # so that no thread waits for one that hangs
                process.kill()
            raise

    return score_all


def serve(spec, timeout):
    """What a worker does, until its standard input ends, which the trainer holds."""
    # A terminal sends these to workers too, but it is for the trainer to act on them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the function must not read requests
    os.dup2(2, 1)  # or print among the replies
    reward = load_reward(spec)
    print("ready", file=replies, flush=True)
    for line in requests:
        answer, row = json.loads(line)
        value = problem = None
        signal.setitimer(signal.ITIMER_REAL, timeout)  # SIGALRM ends the process
        try:
            value = score(reward, answer, row)
        except BadInput as error:
            problem = str(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps([value, problem]), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
