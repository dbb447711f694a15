"""The kill switch on the real bot: flat and without an order within ten seconds from any state, halted until a person clears it."""
from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import pytest

from benchmarks.load import free_port
from delta_go.live.account import Account, ExchangeClock, place_order, synchronise
from delta_go.live.emulator import running
from delta_go.live.exchange import Credentials, fetch_listings
from delta_go.live.faults import Rule, Script
from delta_go.live.journal import entry_of, read_journal
from delta_go.live.pace import Emulator
from delta_go.trading.intents import Entry
from delta_go.trading.messages import Accepted, OrderRequest
from tests.whole import KEY, SECRET, environment, minute_data, minute_market, minute_models, start, state_in, wait_for

SYMBOLS = ("BTCUSD", "ETHUSD", "SOLUSD")
FIRST, AGAIN = 60.0, 180.0   # seconds of the market after which all three symbols signal
PROMISE = 10.0               # seconds of the exchange, while it can be reached
OURS = "dg-"
DASHBOARD = "a-key-for-the-page-of-thirty-two-or-more"


class Hands:
    """A clock that can be moved forward while no bot looks at it."""
    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@dataclass
class Stage:
    """An exchange, and bots that come and go."""
    exchange: Emulator
    clock: Hands
    models: Path
    home: Path
    port: int = 0
    bots: list[Popen[bytes]] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.home / "testnet"

    def truth(self) -> dict[str, Any]:
        """What is true at the exchange."""
        told = httpx.get(f"{self.exchange.url}/emulator/state", trust_env=False, timeout=10).json()
        return {"at": told["elapsed"], **next(iter(told["accounts"].values()))}

    def wind(self, elapsed: float) -> None:
        """Let it be later. No bot may be running."""
        assert not self.bots or self.bots[-1].poll() is not None
        self.clock.ahead += max(0.0, elapsed - self.truth()["at"])

    def board(self, *words: str, symbols: int = 3, **told: str) -> Popen[bytes]:
        """Start a bot."""
        self.port = free_port()
        told = {"DELTA_CLOCK_SPEED": "1", "DELTA_SYMBOLS": ",".join(SYMBOLS[:symbols]), "DELTA_STATUS_PORT": str(self.port), "DELTA_DASHBOARD_KEY": DASHBOARD, **told}
        self.bots.append(start(environment(self.exchange.url, self.models, self.home, **told), self.home / "log", *words))
        return self.bots[-1]

    def entries(self) -> list[Entry]:
        return [entry_of(row) for row in read_journal(self.folder / "journal.db")]

    def intents(self) -> list[Entry]:
        return [entry for entry in self.entries() if entry.kind == "intent"]

    def log(self) -> str:
        return (self.home / "log").read_text()


def held(truth: dict[str, Any]) -> dict[str, int]:
    return {symbol: size for symbol, size in truth["positions"].items() if size}


def resting(truth: dict[str, Any]) -> list[dict[str, Any]]:
    return [order for order in truth["orders"] if order["state"] in ("open", "pending")]


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> tuple[Path, Path]:
    """Candles and models."""
    home = tmp_path_factory.mktemp("ground")
    return minute_data(home / "data", first=7_868 - 250, bars=300), minute_models(home / "models")


@pytest.fixture
def stage(ground, tmp_path) -> Iterator[Callable[..., Stage]]:
    """Makes a stage whose market is so many seconds old."""
    data, models = ground
    with contextlib.ExitStack() as stack:
        def make(*rules: Rule, at: float = FIRST - 6) -> Stage:
            clock = Hands()
            exchange = stack.enter_context(running(minute_market(data, speed=1.0, script=Script(tuple(rules))), clock))
            made = Stage(exchange, clock, models, tmp_path / "bot")
            made.home.mkdir()
            stack.callback(lambda: [(bot.kill(), bot.wait()) for bot in made.bots if bot.poll() is None])
            made.wind(at)
            return made
        yield make


# What is asked, and what is promised -----------------------------------------------------------------------------------------

def by_file(stage: Stage) -> None:
    stage.folder.mkdir(parents=True, exist_ok=True)
    (stage.folder / "KILL").write_text("a person with a file")


def by_signal(stage: Stage) -> None:
    stage.bots[-1].send_signal(signal.SIGUSR1)


def by_page(stage: Stage) -> None:
    reply = httpx.post(f"http://127.0.0.1:{stage.port}/kill", json={"who": "a person", "why": "a test"}, headers={"X-API-Key": DASHBOARD}, trust_env=False, timeout=10)
    assert reply.status_code == 202


WAYS = {"file": by_file, "signal": by_signal, "page": by_page}


def kill(stage: Stage, way: str, spared: dict[str, int] | None = None, reachable: float = 0.0) -> float:
    """Ask, and wait until nothing is held or rests at the exchange; the exchange's seconds that took, at most the promise."""
    asked = stage.truth()["at"]
    WAYS[way](stage)
    spared = spared or {}
    found: dict[str, Any] = {}

    def over() -> bool:
        found.update(stage.truth())
        return held(found) == spared and not resting(found)

    assert wait_for(over, 60, 0.02), (held(found), resting(found), stage.log()[-3000:])
    took = found["at"] - max(asked, reachable)
    print(f"{way}: flat and order-free after {took:.2f} s")
    assert took <= PROMISE, f"{took:.1f} s by {way}; {stage.log()[-3000:]}"
    return took


def stays_halted(stage: Stage, spared: dict[str, int] | None = None) -> None:
    """The bot says so, and again after a restart; no entry was made since."""
    assert wait_for(lambda: state_in(stage.folder) == "HALTED", 15), stage.log()[-3000:]
    before, bot = len(stage.intents()), stage.bots[-1]
    bot.send_signal(signal.SIGTERM)
    assert bot.wait(25) == 0
    stage.wind(AGAIN - 5)
    bot = stage.board()
    time.sleep(1)
    assert wait_for(lambda: state_in(stage.folder) == "HALTED", 15), stage.log()[-3000:]
    assert wait_for(lambda: stage.truth()["at"] > AGAIN + 4, 60)
    truth = stage.truth()
    assert held(truth) == (spared or {}) and not resting(truth) and len(stage.intents()) == before and bot.poll() is None
    assert state_in(stage.folder) == "HALTED"


def enter(stage: Stage, positions: int = 3, **told: str) -> None:
    """A bot that has entered."""
    stage.board(symbols=positions, **told)
    assert wait_for(lambda: len(held(stage.truth())) == positions, 150), stage.log()[-3000:]


def test_flat_and_running(stage):
    here = stage()
    here.board()
    assert wait_for(lambda: state_in(here.folder) == "RUNNING", 30)
    kill(here, "signal")
    stays_halted(here)


@pytest.mark.parametrize("positions, way", [(1, "file"), (2, "page"), (3, "signal")])
def test_positions_are_closed(stage, positions, way):
    here = stage()
    enter(here, positions)
    kill(here, way)
