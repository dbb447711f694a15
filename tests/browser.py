"""A headless Chromium, driven over the DevTools protocol."""
from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str:
    """The browser's path; Debian's package is installed where we may, and the test fails with the cure where we may not."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found and os.geteuid() == 0 and shutil.which("apt-get"):
        for words in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "-qq", *words], check=False, stdout=subprocess.DEVNULL, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        found = shutil.which("chromium")
    if not found:
        pytest.fail("browser: expected chromium on PATH, found none; run `apt-get install chromium`, or set CHROMIUM to its path")
    return found


class Tab:
    """One page."""
    def __init__(self, socket: Any) -> None:
        self.socket, self.numbers, self.errors = socket, itertools.count(1), []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def note(self, message: dict[str, Any]) -> None:
        """Keep what a page complains of."""
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(message["params"]["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.errors.append(message["params"]["entry"]["text"])

    def call(self, method: str, **words: Any) -> dict[str, Any]:
        """One command and its answer."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": words}))
        while (message := json.loads(self.socket.recv(30))).get("id") != number:
            self.note(message)
        assert "error" not in message, message
        return message["result"]

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """The window, and which colours the reader prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def run(self, script: str) -> Any:
        """The value of an expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 10.0) -> Any:
        """The value of an expression once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script} did not come true; the page says: {self.run('document.body.innerText')[:800]}"
            time.sleep(0.05)
        return value

    def open(self, address: str) -> None:
        """Go to an address, and wait for the page to be there."""
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def picture(self, path: Path, whole: bool = False) -> None:
        """A screenshot."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


class Browser:
    """Chromium, with as many tabs as one opens."""
    def __init__(self, port: int, stack: contextlib.ExitStack) -> None:
        self.port, self.stack = port, stack

    def tab(self) -> Tab:
        """A new page."""
        made = httpx.put(f"http://127.0.0.1:{self.port}/json/new?about:blank", trust_env=False).json()
        return Tab(self.stack.enter_context(connect(made["webSocketDebuggerUrl"], max_size=None, compression=None, proxy=None)))


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser for as long as a with statement lasts."""
    words = ["--headless=new", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage", "--no-proxy-server", "--hide-scrollbars", "--remote-debugging-port=0",
             f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank"]
    process = subprocess.Popen([find_chromium(), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        told, deadline = profile / "DevToolsActivePort", time.monotonic() + 40
        while not told.exists() or not told.read_text().strip():
            assert process.poll() is None and time.monotonic() < deadline, "chromium did not start; run it by hand with --headless=new to see why"
            time.sleep(0.05)
        with contextlib.ExitStack() as stack:
            yield Browser(int(told.read_text().split()[0]), stack)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
