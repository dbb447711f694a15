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
from tests.waiting import wait_for
from tests.whole import KEY, SECRET, environment, minute_data, minute_market, minute_models, start, state_in

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
    lead: float   # seconds that a bot needs to start, generously
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
        """What the bot has written down."""
        path = self.folder / "journal.db"
        return [entry_of(row) for row in read_journal(path)] if path.exists() else []

    def intents(self) -> list[Entry]:
        return [entry for entry in self.entries() if entry.kind == "intent"]

    def log(self) -> str:
        return (self.home / "log").read_text()


def held(truth: dict[str, Any]) -> dict[str, int]:
    return {symbol: size for symbol, size in truth["positions"].items() if size}


def resting(truth: dict[str, Any]) -> list[dict[str, Any]]:
    return [order for order in truth["orders"] if order["state"] in ("open", "pending")]


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> tuple[Path, Path, float]:
    """Candles, models, and how many seconds before a close a bot had better start on this machine."""
    home = tmp_path_factory.mktemp("ground")
    data, models = minute_data(home / "data", first=7_868 - 250, bars=300), minute_models(home / "models")
    with running(minute_market(data, speed=1.0)) as exchange:
        began, bot = time.monotonic(), start(environment(exchange.url, models, home, DELTA_CLOCK_SPEED="1"), home / "log")
        assert wait_for(lambda: state_in(home / "testnet") == "RUNNING", 60)
        took = time.monotonic() - began
        bot.kill()
        bot.wait()
    return data, models, min(50.0, 4.0 + 2.0 * took)


@pytest.fixture
def stage(ground, tmp_path) -> Iterator[Callable[..., Stage]]:
    """Makes a stage whose first close comes when a bot has had time to start."""
    data, models, lead = ground
    with contextlib.ExitStack() as stack:
        def make(*rules: Rule) -> Stage:
            clock = Hands()
            exchange = stack.enter_context(running(minute_market(data, speed=1.0, script=Script(tuple(rules))), clock))
            made = Stage(exchange, clock, models, tmp_path / "bot", lead)
            made.home.mkdir()
            stack.callback(lambda: [(bot.kill(), bot.wait()) for bot in made.bots if bot.poll() is None])
            made.wind(FIRST - lead)
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


def stays_halted(stage: Stage) -> None:
    """The bot says so, and again after a restart; no entry was made since."""
    assert wait_for(lambda: state_in(stage.folder) == "HALTED", 15), stage.log()[-3000:]
    before, bot = len(stage.intents()), stage.bots[-1]
    bot.send_signal(signal.SIGTERM)
    assert bot.wait(25) == 0
    stage.wind(AGAIN - stage.lead)
    bot = stage.board()
    time.sleep(1)
    assert wait_for(lambda: state_in(stage.folder) == "HALTED", 15), stage.log()[-3000:]
    assert wait_for(lambda: stage.truth()["at"] > AGAIN + 4, 60)
    truth = stage.truth()
    assert held(truth) == {} and not resting(truth) and len(stage.intents()) == before and bot.poll() is None
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


@pytest.mark.parametrize("positions, way", [pytest.param(1, "file", marks=pytest.mark.slow), pytest.param(2, "page", marks=pytest.mark.slow), (3, "signal")])
def test_positions_are_closed(stage, positions, way):
    here = stage()
    enter(here, positions)
    kill(here, way)


def test_while_an_entry_is_on_its_way(stage):
    """The order has arrived, its answer has not; two more entries wait behind it."""
    here = stage(Rule("slow", "POST /v2/orders", times=3, seconds=4.0))
    here.board()
    assert wait_for(lambda: held(here.truth()), 150, 0.02), here.log()
    kill(here, "signal")
    assert len([entry for entry in here.intents() if not entry.body["reduce_only"]]) == 1


@pytest.mark.slow
def test_while_all_answers_are_slow(stage):
    """The same with the file, which is only seen when somebody looks."""
    here = stage(Rule("slow", "POST /v2/orders", times=3, seconds=5.0))
    here.board()
    assert wait_for(lambda: held(here.truth()), 150, 0.02), here.log()
    kill(here, "file")
    assert len([entry for entry in here.intents() if not entry.body["reduce_only"]]) == 1


@pytest.mark.parametrize("rule", [Rule("reply_lost", "POST /v2/orders", times=1), pytest.param(Rule("late", "POST /v2/orders", times=1, seconds=3.0), marks=pytest.mark.slow),
                                  pytest.param(Rule("slow", "POST /v2/orders", times=1, seconds=8.0), marks=pytest.mark.slow)], ids=lambda rule: rule.kind)
def test_while_an_order_is_in_doubt(stage, rule):
    """Accepted, and nobody has told the bot."""
    here = stage(rule)
    here.board(symbols=1)
    assert wait_for(lambda: here.exchange.faults.log, 150, 0.02), here.log()
    kill(here, "file")
    assert wait_for(lambda: not held(here.truth()) and any(entry.kind == "fill" and entry.body["owner"].startswith(OURS) for entry in here.entries()), 20)
    time.sleep(2)
    assert not held(here.truth()) and not resting(here.truth())


class Sleepy(BaseHTTPRequestHandler):
    """A service that answers after four seconds, with nothing of use."""
    def do_POST(self) -> None:
        self.server.asked.set()  # type: ignore[attr-defined]
        time.sleep(4)
        with contextlib.suppress(OSError):
            self.send_error(503)

    def log_message(self, *words: object) -> None:
        """Nothing."""


@pytest.fixture
def sleepy() -> Iterator[tuple[str, threading.Event]]:
    """Its address, and whether it was asked."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Sleepy) as server:
        server.asked = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", server.asked  # type: ignore[attr-defined]
        server.shutdown()


def die(stage: Stage) -> None:
    stage.bots[-1].kill()
    stage.bots[-1].wait()


def back(stage: Stage) -> float:
    """Start again; the exchange's second at which the new one is there."""
    leases = len([entry for entry in stage.entries() if entry.kind == "lease"])
    stage.board()
    assert wait_for(lambda: len([entry for entry in stage.entries() if entry.kind == "lease"]) > leases, 60, 0.02), stage.log()
    return float(stage.truth()["at"])


@pytest.mark.parametrize("way", [pytest.param("signal", marks=pytest.mark.slow), "file", pytest.param("page", marks=pytest.mark.slow)])
def test_while_the_services_are_slow(stage, sleepy, way):
    """A close is under way, and every question to a model takes as long as it may."""
    here, (address, asked) = stage(), sleepy
    enter(here)
    die(here)
    here.wind(AGAIN - here.lead)
    here.board(HMM_ENDPOINT=address, TRADE_PREDICTOR_ENDPOINT=address)
    assert asked.wait(60)
    time.sleep(0.2)
    assert len(held(here.truth())) == 3
    kill(here, way)


def test_while_streams_break(stage):
    """Every message breaks its connection."""
    here = stage(Rule("disconnect", start=FIRST + 6))
    enter(here)
    assert wait_for(lambda: state_in(here.folder) == "DEGRADED", 60), here.log()
    kill(here, "page")


@pytest.mark.slow
def test_while_streams_are_silent(stage):
    here = stage(Rule("silent", start=FIRST + 6, seconds=3_600))
    enter(here)
    assert wait_for(lambda: state_in(here.folder) == "DEGRADED", 120), here.log()
    kill(here, "file")


@pytest.mark.parametrize("way", ["file", pytest.param("signal", marks=pytest.mark.slow)])
def test_in_a_storm_of_refusals(stage, way):
    """The limit of calls is used up for some seconds; what counts is the time since."""
    here = stage(Rule("status", start=FIRST + 5, until=FIRST + 10, status=429, seconds=1.0))
    enter(here)
    assert wait_for(lambda: here.truth()["at"] > FIRST + 5.5, 30)
    kill(here, way, reachable=FIRST + 10)


def test_while_it_drains(stage):
    """One order is in doubt, so the drain lasts; the exits that the switch sends are filled in part."""
    here = stage(Rule("lost", "POST /v2/orders", after=2, times=1), Rule("partial", "POST /v2/orders", after=3, times=2, part=0.4, rest_cancelled=True))
    here.board()
    assert wait_for(lambda: any(entry.kind == "outcome" and entry.body["status"] == "unknown" for entry in here.entries()), 150, 0.02), here.log()
    here.bots[-1].send_signal(signal.SIGTERM)
    assert wait_for(lambda: state_in(here.folder) == "DRAIN", 10)
    kill(here, "signal")
    assert here.bots[-1].wait(25) == 0


def test_with_an_entry_filled_in_part(stage):
    """The rest never finds anybody, and the first exit finds only some."""
    here = stage(Rule("partial", "POST /v2/orders", times=4, part=0.4, rest_cancelled=True))
    enter(here)
    first = {fill["order_id"]: fill["size"] for fill in reversed(here.truth()["fills"])}
    assert all(order["size"] > first[str(order["id"])] for order in here.truth()["orders"] if order["client_order_id"])
    kill(here, "page")


@pytest.mark.slow
def test_while_it_starts(stage):
    """Killed with positions, told to stop while nobody is there."""
    here = stage()
    enter(here)
    die(here)
    by_file(here)
    kill(here, "file", reachable=back(here))


def test_told_to_stop_twice(stage):
    """The switch, and SIGTERM at once after it; the exits find only some, so that it must not end with the first of them."""
    here = stage(Rule("partial", "POST /v2/orders", after=1, times=2, part=0.4, rest_cancelled=True))
    enter(here, 1)
    by_file(here)
    time.sleep(0.05)
    here.bots[-1].send_signal(signal.SIGTERM)
    kill(here, "signal")
    assert here.bots[-1].wait(25) == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["signal", "page"])
def test_while_every_answer_takes_its_time(stage, way):
    """The exchange can be reached, and is slow; a close is under way."""
    here = stage(Rule("slow", "GET /v2/*", start=AGAIN - 1.0, seconds=2.5))
    enter(here)
    die(here)
    here.wind(AGAIN - here.lead)
    here.board()
    assert wait_for(lambda: here.truth()["at"] > AGAIN + 0.5, 30)
    assert held(here.truth())
    kill(here, way)


# Somebody else's -------------------------------------------------------------------------------------------------------------

def by_hand(stage: Stage, symbol: str, side: str, size: int) -> None:
    """A person trades with the bot's key."""
    account = Account(stage.exchange.url, Credentials(KEY, SECRET), fetch_listings(stage.exchange.url, list(SYMBOLS)), time.monotonic, clock=ExchangeClock(time.monotonic))
    for _ in range(3):  # the market may just have been wound forward
        if not (trouble := synchronise(account)):
            break
        account.clock.forget()
    assert not trouble
    assert isinstance(place_order(account, OrderRequest("by-hand", symbol, side, size)), Accepted)  # type: ignore[arg-type]
    account.client.close()


def test_a_position_opened_by_hand_is_left_alone(stage):
    """And the bot makes no entry where somebody else trades."""
    here = stage()
    by_hand(here, "ETHUSD", "buy", 7)
    by_hand(here, "SOLUSD", "sell", 3)
    here.board(symbols=2)
    assert wait_for(lambda: "BTCUSD" in held(here.truth()), 150), here.log()
    assert "is not ours; it is left alone" in here.log()
    kill(here, "file", spared={"ETHUSD": 7, "SOLUSD": -3})
    assert all(entry.body["symbol"] == "BTCUSD" for entry in here.intents())


def test_what_was_added_by_hand_is_left_alone(stage):
    """Ours is closed, theirs stays, and none of our stops could close it later."""
    here = stage()
    enter(here, 1)
    size = held(here.truth())["BTCUSD"]
    by_hand(here, "BTCUSD", "buy" if size > 0 else "sell", 5)
    time.sleep(2)
    kill(here, "signal", spared={"BTCUSD": 5 if size > 0 else -5})


@pytest.mark.slow
def test_what_was_closed_by_hand_is_closed(stage):
    """The bot closes what is left of it."""
    here = stage()
    enter(here, 1)
    size = held(here.truth())["BTCUSD"]
    by_hand(here, "BTCUSD", "sell" if size > 0 else "buy", abs(size) // 3)
    kill(here, "file")


# After it --------------------------------------------------------------------------------------------------------------------

def test_killed_while_it_flattens(stage):
    """It dies between two exits; whoever starts next finishes, and enters nothing."""
    here = stage(Rule("slow", "POST /v2/orders", after=3, times=2, seconds=3.0))
    enter(here)
    by_file(here)
    assert wait_for(lambda: len(held(here.truth())) < 3, 30, 0.01)
    die(here)
    assert len(held(here.truth())) == 2
    kill(here, "file", reachable=back(here))
    stays_halted(here)


def test_a_person_clears_it(stage):
    """Then, and only then, it enters again."""
    here = stage()
    enter(here)
    kill(here, "page")
    here.bots[-1].send_signal(signal.SIGTERM)
    assert here.bots[-1].wait(25) == 0
    here.wind(AGAIN - here.lead)
    here.board("--clear", "Ada")
    assert wait_for(lambda: held(here.truth()), 150), here.log()
    assert state_in(here.folder) == "RUNNING" and not (here.folder / "KILL").exists()
    assert [entry.body.get("person") for entry in here.entries() if entry.kind == "halt"][-1] == "Ada"


# The gentle way --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [pytest.param("", marks=pytest.mark.slow), "reply_lost", pytest.param("lost", marks=pytest.mark.slow)])
def test_a_drain_ends_in_order(stage, kind):
    """SIGTERM: nothing is in doubt at the end, and what is held keeps its bracket."""
    here = stage(*([Rule(kind, "POST /v2/orders", after=2, times=1)] if kind else []))
    here.board()
    assert wait_for(lambda: len([entry for entry in here.entries() if entry.kind == "outcome"]) >= 3, 150, 0.02), here.log()
    asked = here.truth()["at"]
    here.bots[-1].send_signal(signal.SIGTERM)
    assert here.bots[-1].wait(40) == 0
    took = here.truth()["at"] - asked
    print(f"drained in {took:.1f} s")
    truth = here.truth()
    ended = {entry.body["client_order_id"] for entry in here.entries() if entry.kind == "outcome" and entry.body["status"] not in ("unknown", "open")}
    assert ended == {entry.key for entry in here.intents()} and took < 20 and state_in(here.folder) == "STOPPED"
    assert len(held(truth)) == (2 if kind == "lost" else 3)
    stops = {order["product_symbol"]: order for order in resting(truth) if order["stop_order_type"] == "stop_loss_order"}
    assert {symbol: abs(size) for symbol, size in held(truth).items()} == {symbol: order["unfilled_size"] for symbol, order in stops.items()}
