"""A real browser without a window, driven over a pipe by the DevTools protocol.

    apt-get install chromium-headless-shell

Tests that need it are skipped where there is none.
"""

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

_PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_SECONDS = 60.0  # for an answer, on a slow machine


@contextlib.contextmanager
def opened(profile: pathlib.Path) -> Iterator["Browser"]:
    """Runs a browser with a page in it.

    Args:
      profile: a directory of its own.
    """
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        pytest.skip("No Chromium here: apt-get install chromium-headless-shell.")
    read_here, write_there = os.pipe()
    read_there, write_here = os.pipe()
    command = [
        *("bash", "-c", f'exec "$0" "$@" 3<&{read_there} 4>&{write_there}', program),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"),
    ]
    process = subprocess.Popen(
        command, pass_fds=(read_there, write_there), stderr=subprocess.DEVNULL
    )
    os.close(read_there)
    os.close(write_there)
    try:
        yield Browser(read_here, write_here)
    finally:
        process.kill()
        process.wait()
        os.close(read_here)
        os.close(write_here)


class Browser:
    """One page of a browser, and what went wrong in it."""

    def __init__(self, read: int, write: int):
        self._read, self._write = read, write
        self._number, self._buffer = 0, b""
        self._session: str | None = None
        self.complaints: list[str] = []  # exceptions, errors and what a policy refused
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def show(self, url: str, *, width: int, height: int, scheme: str) -> None:
        """Opens a page. scheme: "light" or "dark", what the reader prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Returns what a JavaScript expression is in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Returns once an expression is true in the page."""
        deadline = time.monotonic() + _SECONDS
        while not self.value(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def screenshot(self, path: pathlib.Path) -> None:
        """Writes a PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Returns what a method of the DevTools protocol answers."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._take(answer)

    def _take(self, event: dict[str, Any]) -> None:
        """Keeps an event that tells of something wrong."""
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        if event.get("method") == "Log.entryAdded":
            entry = parameters["entry"]
            if entry["level"] in ("error", "warning"):
                self.complaints.append(entry["text"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], _SECONDS)
            part = os.read(self._read, 1 << 16) if ready else b""
            assert part, "The browser doesn't answer."
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
