"""A page in a real browser: Chromium without a window, asked by its own protocol (DevTools)."""

import base64
import itertools
import json
import shutil
import subprocess
from contextlib import contextmanager

from websockets.sync.client import connect  # vLLM's server needs it, so it is there

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars "
    "--disable-extensions --disable-background-networking --remote-debugging-port=0 about:blank"
).split()


class Page:
    """.errors: what the console called a warning or an error, and exceptions, so far."""

    def __init__(self, socket):
        self.socket, self.errors, self.session, self.numbers = socket, [], {}, itertools.count(1)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **parameters):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters, **self.session}))
        answer = self.wait(lambda message: message.get("id") == number)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def wait(self, wanted):
        """-> the next message that is wanted(message)."""
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            loud = message.get("params", {}).get("type") in ("error", "warning", "assert")
            method = message.get("method")
            if method in ("Runtime.exceptionThrown", "Log.entryAdded") or (
                method == "Runtime.consoleAPICalled" and loud
            ):
                self.errors.append(message["params"])
            if wanted(message):
                return message

    def open(self, path, width, dark=False):
        """Show the file in a window of this width, when it has loaded."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=path.resolve().as_uri())
        self.wait(lambda message: message.get("method") == "Page.loadEventFired")

    def run(self, script):
        """-> the value of an expression of JavaScript."""
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path, whole=True):
        image = self.ask("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(image["data"]))


@contextmanager
def browser(profile):
    """A Page of a browser that keeps its files in the directory `profile`."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = next(line.split()[-1] for line in process.stderr if line.startswith("DevTools listening"))
            with connect(url, max_size=None) as socket:
                yield Page(socket)
                socket.send(json.dumps({"id": 0, "method": "Browser.close"}))
            process.stderr.read()  # to its end
        except BaseException:
            process.kill()
            raise
