"""One bot as a process over an exchange of its own that can be made to fail, and everything a test may ask of both."""
from __future__ import annotations

import contextlib
import http.server
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from delta_go.live import channels, emulator
from delta_go.live.faults import Faults, Rule, Script
from delta_go.live.journal import entry_of, read_journal
from delta_go.live.pace import FIRST_USER, Emulator, Recorded
from delta_go.live.status import Status, read_status
from delta_go.trading.intents import Entry
from tests.whole import environment

# The same models, but every bar is a signal, and what it opens is left after one or two bars.
EAGER = """
import numpy as np
from delta_go.learning import reading
from delta_go.learning.strategies import Signals
def eager(features, regimes, settings=None):
    close, rows, atr = features.close, len(features), features.column("atr")
    odd = (close * 100).astype(np.int64) // 3 % 2
    return Signals(np.ones(rows, np.int8), close - 3 * atr, close + 3 * atr, regimes.confidence, (1 + odd).astype(np.int16), np.ones(rows, np.int8))
reading.propose = eager
"""
RUN = "from delta_go.cli import main; main()"


@dataclass
class Trial:
    """A bot and its exchange."""
    exchange: Emulator
    home: Path
    told: dict[str, str]          # environment
    code: str = EAGER + RUN
    process: subprocess.Popen[bytes] | None = None
    told_well: int = 0            # messages when it was last seen to be well

    def start(self, *words: str) -> None:
        """Begin, or begin again."""
        with self.log.open("ab") as file:
            self.process = subprocess.Popen([sys.executable, "-c", self.code, "bot", *words], env=self.told, stdout=file, stderr=subprocess.STDOUT)

    def end(self, seconds: float = 40.0) -> int:
        """Drain; the exit code."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()

    @property
    def folder(self) -> Path:
        """Of the bot."""
        return Path(self.told["DELTA_STATE_DIR"]) / "testnet"

    @property
    def log(self) -> Path:
        """All it printed."""
        return self.home / "log"

    def messages(self) -> list[str]:
        """What a person was told, oldest first."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if row.get("logger") == "delta_go.notify":
                    found.append(row["message"])
        return found

    def status(self) -> Status | None:
        """What it says of itself, None while it says nothing."""
        with contextlib.suppress(Exception):
            return read_status(self.folder)
        return None

    def is_in(self, state: str) -> bool:
        """Whether it says so."""
        status = self.status()
        return status is not None and status.state == state and bool(self.process) and status.pid == self.process.pid

    def causes(self) -> dict[str, str]:
        """Why it makes no entries."""
        status = self.status()
        return {cause.name: cause.words for cause in status.causes} if status else {}

    def rows(self, *kinds: str) -> list[Entry]:
        """Of the journal."""
        return [entry for entry in map(entry_of, read_journal(self.folder / "journal.db")) if entry.kind in kinds]

    def truth(self) -> dict[str, Any]:
        """The account as the exchange knows it."""
        with urllib.request.urlopen(f"{self.exchange.url}/emulator/state", timeout=10) as reply:
            return json.load(reply)["accounts"][str(FIRST_USER)]

    def entries(self) -> list[str]:
        """Client order ids of the entry orders that reached the exchange."""
        return [order["client_order_id"] for order in self.truth()["orders"] if order["client_order_id"] and not order["reduce_only"]]

    def exits(self) -> list[str]:
        """The same of orders that close."""
        return [order["client_order_id"] for order in self.truth()["orders"] if order["client_order_id"] and order["reduce_only"]]

    def held(self) -> dict[str, int]:
        """Positions by symbol, signed."""
        return {symbol: size for symbol, size in self.truth()["positions"].items() if size}

    def naked(self) -> list[str]:
        """Symbols that are held without a live stop of the whole size."""
        truth = self.truth()
        stops = [order for order in truth["orders"] if order["stop_order_type"] == "stop_loss_order" and order["state"] in ("pending", "open")]
        covered = {order["product_symbol"]: int(order["unfilled_size"]) for order in stops}
        return [symbol for symbol, size in truth["positions"].items() if size and covered.get(symbol, 0) < abs(size)]

    def longest_naked(self) -> float:
        """Market seconds, the longest time that anything was held without a stop while the exchange could be reached."""
        return max((cover["longest"] for cover in self.truth()["naked_seconds"].values()), default=0.0)


@contextlib.contextmanager
def trial(setup: Any, home: Path, models: Path, code: str = EAGER, **told: str) -> Iterator[Trial]:
    """A bot in the air, and its end."""
    home.mkdir(parents=True)
    with emulator.running(setup) as exchange:
        made = Trial(exchange, home, environment(exchange.url, models, home / "state", **told), code + RUN)
        made.start()
        try:
            yield made
        finally:
            if made.process:
                made.process.kill()
                made.process.wait()


# The exchange's faults, begun and ended by hand ----------------------------------------------------------------------------

def inject(exchange: Emulator, *rules: Rule) -> None:
    """From now on these faults and no others; `start` counts from now, in market seconds."""
    script = Script(tuple(replace(rule, start=rule.start + exchange.elapsed) for rule in rules), answers=exchange.setup.script.answers)
    exchange.setup, exchange.faults = replace(exchange.setup, script=script), Faults(script)


class Ill(Recorded):
    """A market that is not open as usual."""
    def __init__(self, system: str, status: str):
        self._system, self._status = system, status

    def status(self, emulator: Emulator, symbol: str) -> str:
        """Of every product."""
        return self._status

    def system(self, emulator: Emulator) -> str:
        """Of the exchange."""
        return self._system


REFUSING, DEAF = set[int](), set[int]()  # exchanges that let nobody in, and that answer nothing on a socket
_log_in, _hear = channels._log_in, channels.hear


def _strict(desk: Any, *given: Any) -> dict[str, Any]:
    if id(desk) not in REFUSING:
        return _log_in(desk, *given)
    return {"type": "key-auth", "success": False, "status_code": 401, "status": f"invalid_signature for {' and '.join(desk.keys)}"}  # a server that repeats what it was told


def _deaf(desk: Any, *given: Any) -> list[tuple[str, dict[str, Any]]]:
    return [] if id(desk) in DEAF else _hear(desk, *given)


channels._log_in, emulator.hear = _strict, _deaf


# Services that answer badly ------------------------------------------------------------------------------------------------

GARBAGE = [b"", b"<html>Bad Gateway</html>", b"\xff\xfe\x00{", b"[]", b'{"probability": NaN}', b'{"symbol": "BTCUSD", "regime": "bull"}', b"9" * 100_000]


class Mangler:
    """Stands before a good service and passes on, or does not, what it says."""
    def __init__(self, upstream: int):
        self.mode, self.upstream, self.asked, outer = "good", upstream, 0, self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *given: Any) -> None:
                """Quiet."""

        self._handler, self._server = Handler, http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.open()

    def open(self) -> None:
        """Listen."""
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def turn(self, mode: str) -> None:
        """Behave like this from now on: good, down, garbage, slow, others, echo."""
        before, self.mode = self.mode, mode
        if mode == "down":
            self._server.shutdown()
            self._server.server_close()
        elif before == "down":
            self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
            self.open()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """One question."""
        body = request.rfile.read(int(request.headers["Content-Length"]))
        self.asked += 1
        if self.mode == "down":
            request.close_connection = True
            return
        if self.mode == "slow":
            time.sleep(20)
        status, said = (200, GARBAGE[self.asked % len(GARBAGE)]) if self.mode == "garbage" else self._forward(request, body)
        if self.mode == "echo":
            status, said = 400, json.dumps({"detail": f"bad key {request.headers['X-API-Key']}", "request_id": request.headers["X-API-Key"]}).encode()
        if self.mode == "others":
            answer = json.loads(said)
            said = json.dumps(answer | {"model_sha256": answer["model_sha256"][::-1]}).encode()
        with contextlib.suppress(OSError):
            request.send_response(status)
            request.send_header("Content-Type", "application/json")
            request.send_header("Content-Length", str(len(said)))
            request.end_headers()
            request.wfile.write(said)

    def _forward(self, request: http.server.BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        names = ("Content-Type", "X-API-Key")
        asked = urllib.request.Request(f"http://127.0.0.1:{self.upstream}{request.path}", body, {name: request.headers[name] for name in names if request.headers[name]})
        try:
            with urllib.request.urlopen(asked, timeout=10) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def close(self) -> None:
        """Stop."""
        if self.mode != "down":
            self._server.shutdown()
            self._server.server_close()


class Phone:
    """Takes letters, and fails now and then."""
    def __init__(self, letters: list[bytes]):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                letters.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_error(500 if len(letters) == 2 else 200)

            def log_message(self, *given: Any) -> None:
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
