"""Scoring answers with the user's reward functions, in this process or in worker processes.

    score_all = start(["mine:correct", "mine:format"], workers=4, timeout=30)
    score_all([(answer, row), ...])       # -> [[1.0, 0.5], ...], in the order given

A function is the user's code: it may be slow, raise, hang, fork or kill its process. So a worker is two
processes. The first, the keeper, is this file run as a program; it forks the second, in which the functions
run. That one reads [number, function, answer, row] as a line of JSON and writes [number, score, error] as
another: nothing is pickled, and what a function prints goes to standard error.

    trainer -- pipes --> the functions' process, in a session of its own, with what it starts
       \\-- signal --> keeper, which kills that session's processes

The keeper does so when the trainer asks it to (an answer took too long, the run ends), when the trainer is
gone, however it ended, and when the functions' process ends. So a function may use pools, subprocesses,
threads and signals as in a program of its own; only what it puts into another session is left. A terminal's
Ctrl-C does not reach it. Where SIGTERM is sent to all processes of a job, a new worker is asked.

The score does not depend on the number of workers if the reward depends only on answer and row. A reward that
draws random numbers should seed them by the row.
"""

import contextlib
import itertools
import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from base.cli import BadInput, brief
from prompts.rewards import load_reward, score

END = signal.SIGRTMIN  # to a keeper
FOR_ALL = signal.SIGTERM, signal.SIGUSR1  # may be sent to all processes of a job
# A keeper's own code, and what it makes of the functions'.
FOR_ALL_CODES = {-number for number in FOR_ALL} | {128 + number for number in FOR_ALL}
LOST = 113  # exit code of a worker whose pipes the reward closed
LONGEST = 300  # characters of an answer that a message shows


def check(specs, workers, timeout, on_timeout, weights=()):
    """Raises BadInput for flags of rewards that contradict each other; arguments as `start`'s, and the
    weights of --reward-weights, none for 1 each."""
    if timeout and not workers:
        raise BadInput("--reward-timeout needs --reward-workers: a process cannot stop what it is itself in")
    if on_timeout != "stop" and not timeout:
        raise BadInput(f"--reward-on-timeout {on_timeout} needs --reward-timeout SECONDS")
    if len(set(specs)) < len(specs):
        raise BadInput(f"--reward {' '.join(specs)} names a function twice; leave one out")
    if weights and len(weights) != len(specs):
        raise BadInput(
            f"--reward-weights has {len(weights)} numbers for {len(specs)} rewards; give one for each"
        )
    if weights and not any(weights):
        raise BadInput("--reward-weights are all 0, so that no answer is better; give one that is not 0")


def start(specs, workers, timeout, on_timeout="stop"):
    """The reward functions "module:function" -> score_all, which maps [(answer text, row), ...] to a list of
    lists of float, for each pair the functions' values.

    workers: processes; 0 for this one. timeout: seconds for one value, only with workers; 0 for any time.
    on_timeout "zero": a value that takes longer is NaN, to be counted as 0; "stop": it is an error. Raises
    BadInput as rewards.load_reward, and if a worker cannot be started. score_all raises BadInput, which names
    the row, if a function raises, is too slow, ends its process, or does not return a finite number.
    """
    functions = [load_reward(spec) for spec in specs]  # with workers too, so that an error is printed once
    names = [name_of(spec, specs) for spec in specs]
    if workers:
        return Workers(specs, names, workers, timeout, on_timeout)
    named = list(zip(functions, names))
    return lambda pairs: [[score(function, *pair, name) for function, name in named] for pair in pairs]


def name_of(spec, specs):
    """How messages call a reward function."""
    return f"the reward function {spec}" if len(specs) > 1 else "the reward function"


# ------------------------------------------------------------------------------------------------ the trainer


class Workers:
    """score_all of `start` with workers. They end with this object, at the latest with the process."""

    def __init__(self, specs, names, count, timeout, on_timeout):
        self.names, self.timeout, self.on_timeout = names, timeout, on_timeout
        self.pool, self.idle, self.numbers = ThreadPoolExecutor(count), queue.SimpleQueue(), itertools.count()
        self.workers = []
        self.close = weakref.finalize(self, end_all, self.workers)
        for _ in range(count):
            self.workers.append(Worker(specs))
            self.idle.put(self.workers[-1])

    def __call__(self, pairs):
        which = range(len(self.names))
        jobs = [(function, answer, row) for answer, row in pairs for function in which]
        try:
            values = list(self.pool.map(self.ask, jobs))
        except BaseException:
            end_all(self.workers)  # so that no thread waits for one that hangs
            raise
        return [values[i : i + len(which)] for i in range(0, len(values), len(which))]

    def ask(self, job):
        """One value of one function, by the next worker that is free."""
        (function, answer, row), worker = job, self.idle.get()
        name = self.names[function]
        request = [next(self.numbers), *job]
        try:
            try:
                reply = worker.ask(request, self.timeout)
            except EOFError:
                if worker.process.returncode not in FOR_ALL_CODES:
                    raise
                worker.start()
                reply = worker.ask(request, self.timeout)
            if reply is None:  # too late
                worker.end()
                if self.on_timeout == "stop":
                    what = f"{name} took more than --reward-timeout {self.timeout:g} seconds for the answer"
                    raise BadInput(f"row {row['id']}: {what} {brief(answer, LONGEST)}")
                worker.start()
                return math.nan
        except EOFError as error:
            raise BadInput(f"row {row['id']}: {name} {error}") from error
        finally:
            self.idle.put(worker)
        value, problem = reply
        if problem:
            raise BadInput(problem)
        return value


def end_all(workers):
    for worker in workers:
        worker.end()


class Worker:
    """One worker, as the trainer sees it."""

    def __init__(self, specs):
        self.specs = specs
        self.start()

    def start(self):
        command = [sys.executable, "-P", "-m", "prompts.scoring", str(os.getpid()), *self.specs]
        path = [str(Path(__file__).parent.parent), *sys.path]  # of our modules, and of the reward's
        how = {"env": {**os.environ, "PYTHONPATH": os.pathsep.join(path)}, "start_new_session": True}
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, **how
            )
        except OSError as error:
            raise BadInput(f"--reward-workers: a worker cannot be started: {error.strerror}") from error
        self.read, self.is_ready = b"", False

    def end(self):
        """Kill it and what it has started. A second time it does nothing."""
        if self.process.poll() is None:
            self.process.send_signal(END)
            self.process.wait()

    def ask(self, request, timeout):
        """-> [score, error], or None if it took more than `timeout` seconds (0: any time). Raises EOFError
        for a worker that has ended, with what to say of it, and BadInput if it cannot load the reward."""
        if not self.is_ready:  # importing what the function needs may take long
            [problem] = self._reply("ready")
            if problem:
                raise BadInput(problem)
            self.is_ready = True
        with contextlib.suppress(BrokenPipeError):  # then there is no reply either
            write_line(self.process.stdin.fileno(), request)
        return self._reply(request[0], timeout)

    def _reply(self, number, timeout=0):
        """-> what follows `number` in the reply that begins with it. What else is in the pipe is not of
        `serve`."""
        deadline, file = time.monotonic() + timeout, self.process.stdout.fileno()
        waiting = select.poll()
        waiting.register(file, select.POLLIN)
        while True:
            while b"\n" in self.read:
                line, _, self.read = self.read.partition(b"\n")
                with contextlib.suppress(ValueError):
                    reply = json.loads(line)
                    if isinstance(reply, list) and reply[:1] == [number]:
                        return reply[1:]
            left = max(0, deadline - time.monotonic()) * 1000 if timeout else None  # milliseconds
            if not waiting.poll(left):
                return None
            more = os.read(file, 2**16)
            if not more:
                raise EOFError(self._how_it_ended())
            self.read += more

    def _how_it_ended(self):
        code = self.process.wait()
        if code == LOST:
            return "closed files that are not its own: its worker's pipes"
        if code > 128:
            with contextlib.suppress(ValueError):
                return f"ended its process by {signal.Signals(code - 128).name}"
        return f"ended its process with code {code}"


def write_line(file, value):
    """Write a value as a line of JSON to a file descriptor, all of it."""
    text = memoryview(json.dumps(value).encode() + b"\n")
    while text:
        text = text[os.write(file, text) :]


# ----------------------------------------------------------------------------------------------- the keeper


def keep(trainer):
    """Fork, and return in the new process, where the functions will run. The other one, the keeper, waits for
    its end, for the signal END, or for the end of the process `trainer`; then it kills all that is left."""
    awaited, ignored = {signal.SIGCHLD, END}, {*FOR_ALL, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited | ignored)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (*FOR_ALL, signal.SIGHUP):  # it may have been started with other handlers
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited | ignored)
        return
    nothing = os.open(os.devnull, os.O_RDWR)
    for pipe in (0, 1):  # they are the other's; the trainer sees them end with it
        os.dup2(nothing, pipe)
    # Not reaped before its group is killed: so long the number is its own.
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        got = signal.sigtimedwait(awaited, 1)  # seconds
        if (got and got.si_signo == END) or os.getppid() != trainer:
            break
    for kill in (os.killpg, os.kill):  # it may have no group yet
        with contextlib.suppress(ProcessLookupError):
            kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)  # as a shell does


# ------------------------------------------------------------------------------- where the functions run


def serve(specs):
    """Answer requests until they end, which the trainer holds."""
    pipes = [os.dup(0), os.dup(1)]
    places = [os.fstat(pipe).st_ino for pipe in pipes]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a function must not read requests
    os.dup2(2, 1)  # or print among the replies

    def reply(*what):
        try:
            whole = [os.fstat(pipe).st_ino for pipe in pipes] == places
        except OSError:
            whole = False
        if not whole:  # closed, and perhaps another file by now
            os._exit(LOST)
        os.write(pipes[1], b"\n")  # after what a function may have written there
        write_line(pipes[1], what)

    try:
        functions = [load_reward(spec) for spec in specs]
    except BadInput as error:
        return reply("ready", str(error))
    reply("ready", None)
    for line in open(pipes[0], closefd=False):
        number, function, answer, row = json.loads(line)
        value = problem = None
        try:
            value = score(functions[function], answer, row, name_of(specs[function], specs))
        except BadInput as error:
            problem = str(error)
        reply(number, value, problem)


if __name__ == "__main__":
    keep(int(sys.argv[1]))
    serve(sys.argv[2:])
