"""Blind and broken: whatever fails around the bot, it begins nothing new, what it holds stays protected, and a person is told once."""
from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.load import Running, running
from delta_go.live.emulator import running as emulated
from delta_go.live.faults import Rule
from delta_go.live.status import ask_kill
from tests.blind import DEAF, EAGER, REFUSING, RUN, Ill, Mangler, Trial, inject, trial
from tests.whole import environment, minute_data, minute_market, minute_models, wait_for

PATIENCE = 150.0  # seconds for anything to come about on a busy machine; nothing here is a promise about time
SERVICE_KEY = "service-key-of-these-tests-0123456789"


@dataclass(frozen=True)
class Ground:
    """What all flights share."""
    data: Path
    models: Path
    home: Path
    detector: Running
    predictor: Running


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """Candles and models of a minute, and both services with a key."""
    home = tmp_path_factory.mktemp("blind")
    models, data = minute_models(home / "models"), minute_data(home / "data")
    told = {"SERVICE_AUTH": "api_key", "SERVICE_API_KEYS": f"bot:{SERVICE_KEY}"}
    with running("hmm-detector", models, environ=told) as detector, running("trade-predictor", models, environ=told) as predictor:
        yield Ground(data, models, home, detector, predictor)


# What holds in every trial --------------------------------------------------------------------------------------------------

def until(truth: Callable[[], object], what: str, bot: Trial) -> None:
    """Wait, and fail with everything that helps to understand it."""
    if not wait_for(lambda: bool(truth()), PATIENCE, 0.2):
        status = bot.status()
        pytest.fail(f"{what}: it did not come about; {status and (status.state, status.causes, status.streams, status.quota)}\nheld {bot.held()}, naked {bot.naked()}\n" + "\n".join(bot.messages()[-25:]))


def well(bot: Trial) -> None:
    """It trades: something new was entered, and is held with its stop."""
    until(lambda: bot.is_in("RUNNING"), "RUNNING", bot)
    before = len(bot.entries())
    until(lambda: len(bot.entries()) > before and bot.held() and not bot.naked() and bot.is_in("RUNNING"), "an entry", bot)


def pairs(messages: list[str], pattern: str) -> tuple[int, int]:
    """How often it was told that something began, and that it ended."""
    return (sum(bool(re.match(f"no entries: .*({pattern})", words)) for words in messages), sum(bool(re.match(f"over after .*({pattern})", words)) for words in messages))


@dataclass
class Spell:
    """A time of trouble."""
    bot: Trial
    told: int         # messages before it
    entered: list[str]
    rows: int         # of the journal, all kinds that matter
    left: list[str]

    def enters(self) -> int:
        """Decisions to enter that became nothing, since."""
        rows = self.bot.rows("decision", "refused", "intent")[self.rows:]
        wanted = {row.key for row in rows if row.kind == "decision" and row.body["action"] == "enter"}
        return len(wanted & {row.key for row in rows if row.kind == "refused"})

    def silent(self, words: str) -> int:
        """Decisions without a word from the models, since."""
        return sum(words in row.body["words"] for row in self.bot.rows("decision", "refused", "intent")[self.rows:] if row.kind == "decision")

    def time_exits(self) -> int:
        """Positions that were left because their time was over, at the exchange."""
        rows = self.bot.rows("decision", "refused", "intent")[self.rows:]
        wanted = {row.key for row in rows if row.kind == "decision" and row.body["reason"] == "maximum bars reached"}
        return len({row.key for row in rows if row.kind == "intent" and row.body["reason"] in wanted} and set(self.bot.exits()) - set(self.left))


@contextlib.contextmanager
def spell(bot: Trial, cause: str, pattern: str, once: bool = True, over: Callable[[], None] = lambda: None) -> Iterator[Spell]:
    """From when the bot knows of its trouble to when it is over: no entry arrives, no stop is missing; one message begins it and one ends it."""
    told = len(bot.messages())
    until(lambda: cause in bot.causes() and bot.is_in("DEGRADED"), f"DEGRADED because of {cause}", bot)
    assert re.search(pattern, bot.causes()[cause]), bot.causes()
    this = Spell(bot, told, bot.entries(), len(bot.rows("decision", "refused", "intent")), bot.exits())
    yield this
    assert bot.entries() == this.entered, "an entry was made in the dark"
    assert not [row for row in bot.rows("decision", "refused", "intent")[this.rows:] if row.kind == "intent" and not row.body["reduce_only"]]
    assert bot.is_in("DEGRADED") and cause in bot.causes()
    assert not bot.naked() or bot.longest_naked() <= 5
    over()
    until(lambda: bot.is_in("RUNNING"), "RUNNING again", bot)
    messages = bot.messages()[told:]
    if once:
        assert pairs(messages, pattern) == (1, 1), messages
    well(bot)
    assert bot.longest_naked() <= 5


# The trials -----------------------------------------------------------------------------------------------------------------

def storm(ground: Ground, home: Path) -> None:
    """Every answer of the exchange is 500, then 429, for a while."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        for status in (500, 429):
            inject(bot.exchange, Rule("status", on="* /v2/*", status=status, seconds=3.0))
            before = bot.held()
            with spell(bot, "exchange", "our orders were last read", over=lambda: inject(bot.exchange)):
                close = bot.status().next_close + 65  # the next bar is over and could not be decided
                until(lambda: bot.status().at > close, "a bar", bot)
                assert set(bot.held()) <= set(before) and not bot.naked()
        assert bot.end() == 0


def refused_login(ground: Ground, home: Path) -> None:
    """The private socket lets us in no more."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        REFUSING.add(id(bot.exchange.desk))
        inject(bot.exchange, Rule("down", seconds=1.0))
        with spell(bot, "stream", "private stream is not heard", over=lambda: REFUSING.discard(id(bot.exchange.desk))) as dark:
            until(lambda: "login refused" in bot.status().streams["private"], "the reason", bot)
            until(lambda: dark.enters() and dark.time_exits(), "a refused signal and a time exit", bot)
        assert bot.end() == 0


def silent_sockets(ground: Ground, home: Path) -> None:
    """Both sockets are open and say nothing."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        inject(bot.exchange, Rule("silent", on="*", seconds=1e6))
        DEAF.add(id(bot.exchange.desk))

        def over() -> None:
            DEAF.discard(id(bot.exchange.desk))
            inject(bot.exchange)
        with spell(bot, "stream", "stream is not heard", over=over) as dark:
            until(lambda: dark.enters() and dark.time_exits(), "a refused signal and a time exit", bot)
        assert bot.end() == 0


def stale_candles(ground: Ground, home: Path) -> None:
    """No candle comes any more, neither way."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        inject(bot.exchange, Rule("gap", on="candlestick_1m"), Rule("status", on="GET /v2/history/candles*", status=503))
        entered = bot.entries()
        with spell(bot, "candles", "no bar for", over=lambda: inject(bot.exchange)):
            assert bot.entries() == entered or set(bot.entries()) > set(entered)
            assert not bot.naked()
        ill = (Rule("gap", on="candlestick_1m"), Rule("status", on="GET /v2/history/candles*", status=503))
        inject(bot.exchange, *ill)
        until(lambda: "candles" in bot.causes(), "stale again", bot)
        kill(bot)


def kill(bot: Trial) -> None:
    """The switch works in any trouble that leaves the exchange within reach: flat and order-free, in the exchange's seconds."""
    ask_kill(bot.folder, "a test")
    began = bot.exchange.at
    until(lambda: not bot.held() and not [order for order in bot.truth()["orders"] if order["state"] in ("open", "pending")], "flat", bot)
    took = (bot.exchange.at - began) / bot.exchange.setup.speed
    assert took < 10, f"flat after {took:.1f} s"
    until(lambda: bot.is_in("HALTED"), "HALTED", bot)


def closed_exchange(ground: Ground, home: Path) -> None:
    """Maintenance, an auction, and a restart without warning."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        bot.exchange.market = Ill("maintenance", "disrupted_cancel_only")

        def open_again() -> None:
            bot.exchange.market = Ill("live", "operational")
        with spell(bot, "exchange", "is maintenance|is disrupted", over=open_again) as dark:
            until(dark.enters, "a refused signal", bot)
            bot.exchange.market = Ill("live", "disrupted_post_only")
            before = dark.enters()
            until(lambda: dark.enters() > before, "a refused signal in the auction", bot)
        assert bot.end() == 0


def restarted_exchange(ground: Ground, home: Path) -> None:
    """Gone without warning, then an auction."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        inject(bot.exchange, Rule("down", seconds=40.0, auction=150.0))
        with spell(bot, "exchange", "our orders|is disrupted", once=False, over=lambda: None) as dark:
            until(lambda: any("disrupted_post_only" in words for words in bot.causes().values()), "the auction is known", bot)
            until(dark.enters, "a refused signal", bot)
        assert bot.end() == 0


def scarce_quota(ground: Ground, home: Path) -> None:
    """Our share of the rate limit is nearly used, until the next window."""
    small = "from delta_go.live.account import Budget\nBudget.__init__.__defaults__ = (1_200, .5, .1, 300.0)\n"
    with trial(minute_market(ground.data), home, ground.models, EAGER + small) as bot:
        well(bot)
        with spell(bot, "quota", "rate limit is used", once=False) as dark:
            until(dark.enters, "a refused signal", bot)
        assert bot.end() == 0


def jumping_clock(ground: Ground, home: Path) -> None:
    """Our clock falls ten seconds behind the exchange's, runs ten ahead, and the wall clock is wrong all the time."""
    late = home / "late"
    wrong = f"""
import os, time
monotonic, wall = time.monotonic, time.time
time.monotonic = lambda: monotonic() - (10 / 6 if os.path.exists({str(late)!r}) else 0)
time.time = lambda: wall() + 3610
"""
    with trial(minute_market(ground.data), home, ground.models, wrong + EAGER) as bot:
        well(bot)
        for jump in (late.touch, late.unlink):
            told = len(bot.messages())
            jump()
            well(bot)
            begun, ended = pairs(bot.messages()[told:], ".*")
            assert begun == ended <= 2, bot.messages()[told:]
        intents = [row.key for row in bot.rows("intent") if not row.body["reduce_only"]]
        assert set(bot.entries()) <= set(intents) and len(set(bot.entries())) == len(bot.entries())
        assert bot.end() == 0


def leaping_exchange(ground: Ground, home: Path) -> None:
    """The exchange's clock leaps by ten seconds for half a minute; then it cannot make up its mind."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        for by in (10.0, -10.0):
            inject(bot.exchange, Rule("skew", by=by, seconds=30.0))
            until(lambda: bot.exchange.elapsed > bot.exchange.setup.script.rules[0].start + 31, "the leap back", bot)
            well(bot)
            assert not bot.naked()
        inject(bot.exchange, *[Rule("skew", by=10.0, start=3.0 * n, seconds=1.5) for n in range(200)])
        with spell(bot, "clock", "disagree|not known", once=False, over=lambda: inject(bot.exchange)) as dark:
            until(lambda: dark.enters() or any("was not decided" in words for words in bot.messages()[dark.told:]), "a bar", bot)
        assert bot.end() == 0


def services(ground: Ground, home: Path, mode: str, words: str) -> None:
    """Both services answer badly in one way, for a while."""
    first, second = Mangler(ground.detector.port), Mangler(ground.predictor.port)
    told = {"HMM_ENDPOINT": first.url, "TRADE_PREDICTOR_ENDPOINT": second.url, "DELTA_SERVICE_AUTH": "api_key", "DELTA_SERVICE_KEY": SERVICE_KEY}
    with contextlib.closing(first), contextlib.closing(second), trial(minute_market(ground.data), home, ground.models, **told) as bot:
        def turn(how: str) -> None:
            first.turn(how)
            second.turn(how)
        well(bot)
        turn(mode)
        with spell(bot, "services", words, over=lambda: turn("good")) as dark:
            until(lambda: dark.silent("hmm-detector") and dark.time_exits(), "silence and a time exit", bot)
        turn(mode)
        until(lambda: "services" in bot.causes() and bot.held(), "silent again", bot)
        kill(bot)


def strange_key(ground: Ground, home: Path) -> None:
    """The services want a key that this bot lacks; it is told, and started again."""
    told = {"HMM_ENDPOINT": f"http://127.0.0.1:{ground.detector.port}", "TRADE_PREDICTOR_ENDPOINT": f"http://127.0.0.1:{ground.predictor.port}"}
    with trial(minute_market(ground.data), home, ground.models, **told) as bot:
        until(lambda: "services" in bot.causes() and bot.is_in("DEGRADED"), "DEGRADED", bot)
        until(lambda: len(bot.rows("decision")) >= 9, "three bars", bot)
        assert bot.is_in("DEGRADED") and not bot.entries() and "401" in bot.causes()["services"]
        assert pairs(bot.messages(), "401") == (1, 0)
        assert bot.end() == 0
        bot.told |= {"DELTA_SERVICE_AUTH": "api_key", "DELTA_SERVICE_KEY": SERVICE_KEY}
        bot.start()
        well(bot)
        assert bot.end() == 0


TRIALS: dict[str, Callable[[Ground, Path], None]] = {
    "500s and 429s": storm, "login refused": refused_login, "silent sockets": silent_sockets, "stale candles": stale_candles, "maintenance": closed_exchange, "restart": restarted_exchange,
    "quota": scarce_quota, "our clock": jumping_clock, "their clock": leaping_exchange, "no key for the services": strange_key,
    "services down": lambda ground, home: services(ground, home, "down", "no answer"), "services garbage": lambda ground, home: services(ground, home, "garbage", "expected"),
    "services slow": lambda ground, home: services(ground, home, "slow", "no answer"), "services of other models": lambda ground, home: services(ground, home, "others", "deploy both services")}


@pytest.fixture(scope="module")
def flights(ground: Ground, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[None]]]:
    """Every trial that was asked for, all in the air at once: they wait most of the time."""
    names = [item.callspec.params["name"] for item in request.session.items if getattr(item, "function", None) is test_blind]
    with ThreadPoolExecutor(int(os.environ.get("BLIND_AT_ONCE", "7"))) as pool:
        yield {name: pool.submit(TRIALS[name], ground, ground.home / name.replace(" ", "_")) for name in names}


@pytest.mark.parametrize("name", TRIALS)
def test_blind(name: str, flights: dict[str, Future[None]]) -> None:
    """No entry, exits and stops still managed, one clear message; and well again afterwards."""
    flights[name].result()
