"""core/hub.py with a hub of our own: a local HTTP server that speaks what the hub's client asks."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import ROOT, refusal

from base.cli import BadInput
from core import hub

SHA = "a" * 40
KEPT = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{ }"}
FILES = {**KEPT, "evil.py": b"x", "pytorch_model.bin": b"x", "onnx/model.safetensors": b"x"}


class Hub(BaseHTTPRequestHandler):
    """One repository, org/name; `asked`: the files that were downloaded."""

    asked = []  # noqa: RUF012 - of all requests

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/org/name/resolve/{SHA}/")
        if path.startswith("/api/models/org/name/tree/"):
            each = [
                {"type": "file", "path": f, "size": len(b), "oid": f.ljust(40, "0")} for f, b in FILES.items()
            ]
            self.answer(200, json.dumps(each).encode())
        elif path.startswith("/api/models/org/name"):
            files = [{"rfilename": file} for file in FILES]
            self.answer(200, json.dumps({"id": "org/name", "sha": SHA, "siblings": files}).encode())
        elif name in FILES:
            if self.command == "GET":
                self.asked.append(name)
            self.answer(200, FILES[name], {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": SHA})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def fetch(names, home, endpoint):
    """In a process of its own, as the hub's client reads its environment once -> a line for each name."""
    code = "import sys\nfrom core import hub\nfrom base.cli import BadInput\nfor name in sys.argv[1:]:\n    "
    code += "try:\n        print(hub.local(name))\n    except BadInput as error:\n        print(error)"
    env = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    how = {"cwd": ROOT, "env": env, "capture_output": True, "text": True, "check": True}
    result = subprocess.run([sys.executable, "-c", code, *names], **how)
    return result.stdout.splitlines(), result.stderr


def test_a_checkpoint_is_downloaded_by_name_and_what_cannot_be_gets_one_line(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    names = ["hf://org/name", "org/name", "org/nobody"]
    (first, again, unknown), shown = fetch(names, tmp_path, endpoint)
    assert first == again and first.endswith(f"models--org--name/snapshots/{SHA}")
    assert {p.name: p.read_bytes() for p in (tmp_path / first).iterdir()} == KEPT
    assert sorted(Hub.asked) == sorted(KEPT)  # once
    assert "100%" in shown  # the client's bar
    assert unknown.startswith("org/nobody is no directory here, and cannot be downloaded from the hub: ")
    server.shutdown()
    server.server_close()


def test_directories_win_over_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for path in ("org/name", "org/other", "nothing", "a/b/c", "../x", str(tmp_path / "gone")):
        assert hub.local(path) == path  # and whether it is a checkpoint is another's question
    with pytest.raises(BadInput, match="a checkpoint on the hub is hf://ORG/NAME"):
        hub.local("hf://name")


@pytest.mark.parametrize("script", ["train.py --model", "sft.py --data x.jsonl --model", "eval_data.py"])
def test_scripts_take_names_and_say_in_one_line_that_they_are_offline(script):
    message = refusal(*script.split(), "nobody/nothing")  # the tests set HF_HUB_OFFLINE
    assert message.startswith("nobody/nothing is no directory here, and cannot be downloaded from the hub: ")
    assert "\n" not in message
