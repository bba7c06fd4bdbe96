"""`python`, for tests: each start is a fork of one process that has imported torch, transformers and vLLM.

    python tests/forks.py serve                # conftest starts it, one for all workers of xdist
    python tests/forks.py FILE|-m MODULE ...   # does what `python FILE|-m MODULE ...` does

A fresh process spends ten seconds of CPU on these imports, a fork none. It is a process like any other: it
has its own arguments, environment, directory, output, exit code and signals, and what it changes or breaks no
other sees. Of our modules only rollout, and what that imports, is there from the start.

The server has one thread, so a fork lacks nothing; no library here starts threads before it computes. It
listens at the Unix socket LONGACT_FORKS, and ends when its standard input does: with pytest.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# rollout first: it sets what vLLM reads when it is imported. The next six are what an engine imports.
MODULES = (
    "rollout",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.plugins.lora_resolvers.hf_hub_resolver",
    "vllm.model_executor.models.qwen3",
    "compressed_tensors",
    "transformers.models.qwen3.modeling_qwen3",
    "torch.distributed.run",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)


def connection():
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps messages apart


# ------------------------------------------------------------------------------------------------- the server


def serve():
    """-> the arguments of what is to run. Returns in forks only, one for each request."""
    with connection() as listener:
        listener.bind(os.environ["LONGACT_FORKS"])
        listener.listen()
        prepared = False
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            if not prepared:  # not before a test needs it
                prepared = prepare()
            client, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return answer(client)
            client.close()
            forget_what_ended()
    os._exit(0)


def forget_what_ended():
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def prepare():
    sys.path.insert(0, str(ROOT))
    for name in MODULES:
        importlib.import_module(name)
    del sys.path[0]
    gc.collect()
    gc.freeze()  # what is here stays: a fork's garbage collector need not look at it
    gc.unfreeze = lambda: None  # nor when vLLM's engine ends, which calls this, then collects for two seconds
    return True


def answer(client):
    """Fork once more, tell the client that process's id and then its exit code; in that process -> its
    arguments. A client that is gone takes it along."""
    request, descriptors, _, _ = socket.recv_fds(client, 2**18, 3)
    if not request:  # from `wake`
        os._exit(0)
    pid = os.fork()
    if pid == 0:
        client.close()
        return enter(json.loads(request), descriptors)
    client.send(str(pid).encode())
    if client in select.select([client, os.pidfd_open(pid)], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    else:
        client.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def enter(request, descriptors):
    for descriptor, standard in zip(descriptors, range(3), strict=True):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.chdir(request["directory"])
    os.environ.update(request["environment"])
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return request["arguments"]


def run(arguments):
    """Run them as Python would -> the exit code."""
    module, sys.argv = arguments[0] == "-m", arguments[arguments[0] == "-m" :]
    sys.path[0] = os.getcwd() if module else os.path.dirname(sys.argv[0])
    try:
        if module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def leave(code):
    """End as Python does, but for taking millions of objects apart one by one, which takes three seconds."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ------------------------------------------------------------------------------------------------- the client


def start():
    """Start the server -> its process; it ends when its standard input is closed."""
    os.environ["LONGACT_FORKS"] = str(Path(tempfile.mkdtemp(prefix="forks-")) / "socket")
    with open(server_log(), "w") as log:
        command = [sys.executable, __file__, "serve"]
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
    while not Path(os.environ["LONGACT_FORKS"]).exists():
        if server.poll() is not None:
            sys.exit(server_log().read_text())
        time.sleep(0.01)
    return server


def wake():
    """Have the server import what it needs before the first fork is asked for."""
    with connection() as server:
        server.connect(os.environ["LONGACT_FORKS"])


def stop(server):
    server.stdin.close()
    server.wait()
    shutil.rmtree(server_log().parent)


def server_log():
    return Path(os.environ["LONGACT_FORKS"]).with_name("log")


def ask(arguments):
    """-> the exit code. Signals that can be caught are handed on; one that ended the fork ends this, too."""
    request = {"arguments": arguments, "directory": os.getcwd(), "environment": dict(os.environ)}
    with connection() as server:
        server.connect(os.environ["LONGACT_FORKS"])
        socket.send_fds(server, [json.dumps(request).encode()], range(3))
        pid = int(server.recv(99) or sys.exit(f"{__file__}: the server has died, see {server_log()}"))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        code = int(server.recv(99))
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    if sys.argv[1:] != ["serve"]:
        sys.exit(ask(sys.argv[1:]))
    leave(run(serve()))
