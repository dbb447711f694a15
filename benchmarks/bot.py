"""The bot: from a candle's close to the entry order's first byte, seven days with faults and restarts, start-up and memory."""
from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from benchmarks.borrowed import World, borrowed_bot, borrowed_data, borrowed_exchange, borrowed_setup, settings_for, willing_models
from benchmarks.load import drive, post, running
from delta_go.learning.strategies import StrategySettings
from delta_go.live import executor, flight, stream
from delta_go.live.bot import Bot, run
from delta_go.live.stream import open_socket
from delta_go.serving.client import regime_question, trade_question
from delta_go.trading.pilot import look

EAGER = StrategySettings(min_confidence=0.2, min_target_bps=1.0, trend_bars=1, edge_bars=1, breakout_bars=1, scalp=True, scalp_bars=1, edge_share=0.5, edge_rsi=70.0, trend_rsi=90.0)
PARTS = ("other symbols' candles", "window fetch", "funding fetch", "hmm-detector", "trade-predictor", "wallet", "journal", "orders before it", "questions", "order signed", "our own code")


@dataclass
class Stopwatch:
    """What a bot does when, in seconds of one clock."""
    arrived: dict[tuple[str, int], float] = field(default_factory=dict)   # by symbol and open: the message that closed the bar
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    entries: list[tuple[str, int, float]] = field(default_factory=list)   # symbol, open, first byte
    asked: dict[str, bytes] = field(default_factory=dict)                 # the last question, by service
    leaving: tuple[str, int] | None = None                                # the entry that is being sent
    heard: threading.local = field(default_factory=threading.local)

    def timed(self, part: str, work: Callable) -> Callable:
        """The same, with its spans noted."""
        @wraps(work)
        def noted(*given, **named):
            began = time.perf_counter()
            try:
                return work(*given, **named)
            finally:
                self.spans.append((part, began, time.perf_counter()))
        return noted

    def socket(self, url: str):
        """A connection whose messages are stamped as they come."""
        connection = open_socket(url)
        receive = connection.recv

        def stamped(timeout=None):
            message = receive(timeout=timeout)
            self.heard.at = time.perf_counter()
            return message
        connection.recv = stamped
        return connection

    def note(self, event, at: float) -> None:
        """A bar was closed, by a message or, long after one, by the clock."""
        heard = getattr(self.heard, "at", at)
        self.arrived[event.symbol, event.time] = heard if at - heard < 0.005 else at

    def trace(self, request) -> None:
        """Note when the first byte of an entry leaves."""
        before = request.extensions.get("trace", lambda event, info: None)

        def traced(event, info):
            if self.leaving and event.endswith("send_request_headers.started"):
                self.entries.append((*self.leaving, time.perf_counter()))
                self.leaving = None
            before(event, info)
        if request.method == "POST" and request.url.path == "/v2/orders":
            request.extensions["trace"] = traced

    def split(self, symbol: str, opened: int, left: float) -> dict[str, float]:
        """Where the time of one entry went."""
        began, last = self.arrived[symbol, opened], max(at for (_, bar), at in self.arrived.items() if bar == opened)
        parts = dict.fromkeys(PARTS, 0.0) | {PARTS[0]: min(last, left) - began}
        for name, start, end in self.spans:
            if name != "order" and last <= start and end <= left:
                parts[name] += end - start
            elif name == "order" and last <= start < left:
                parts["orders before it" if end <= left else "order signed"] += min(end, left) - start
        return parts | {PARTS[-1]: left - began - sum(parts.values())}


@contextlib.contextmanager
def watched(bot: Bot, watch: Stopwatch) -> Iterator[None]:
    """Take the time of everything a close waits for."""
    hands, air = bot.flight.executor, bot.flight
    bot.recent.window = air.window = watch.timed("window fetch", bot.recent.window)
    air.funding = watch.timed("funding fetch", air.funding)
    hands.journal.append = watch.timed("journal", hands.journal.append)
    hands.account.client.event_hooks["request"].append(watch.trace)
    regime, probability = air.adviser.regime, air.adviser.probability

    def ask_regime(candles):
        watch.asked["hmm-detector"] = regime_question(candles)
        return watch.timed("hmm-detector", regime)(candles)

    def ask_probability(symbol, row):
        watch.asked["trade-predictor"] = trade_question(symbol, row)
        return watch.timed("trade-predictor", probability)(symbol, row)

    def place(account, request):
        watch.leaving = None if request.reduce_only else (request.symbol, bot.next_open)
        return watch.timed("order", executor_place)(account, request)

    air.adviser.regime, air.adviser.probability = ask_regime, ask_probability
    executor_place = executor.place_order
    with patch.object(executor, "place_order", place), patch.object(executor, "put_question", watch.timed("questions", executor.put_question)), \
            patch.object(flight, "balances", watch.timed("wallet", flight.balances)), patch.object(flight, "look", partial(look, settings=EAGER)):
        yield


def quantile(values: list[float], share: float) -> float:
    """What a share of the values stays under."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else float("nan")


def stop_after(world: World, enough: Callable[[], bool]) -> None:
    """Let the bot drain once it has done enough."""
    move = world.move

    def moved() -> None:
        if world.bot is not None and enough():
            world.bot.asked = "enough"
        move()
    world.move = moved


def fly_for_entries(home: Path, entries: int) -> tuple[Stopwatch, dict[str, tuple[float, float]]]:
    """So many entries of the real bot, both services over HTTP; and each service's own p50 and p99 on one kept connection."""
    models, data, watch = willing_models(home / "models", "5m"), borrowed_data(home / "data", "5m", 2_500), Stopwatch()
    with running("hmm-detector", models) as detector, running("trade-predictor", models) as predictor, borrowed_exchange(borrowed_setup(data, "5m"), home) as world:
        world.note = watch.note
        settings = settings_for(world, models, home / "state", detector=f"http://127.0.0.1:{detector.port}", predictor=f"http://127.0.0.1:{predictor.port}")
        with patch.object(stream, "open_socket", watch.socket), borrowed_bot(world, settings) as (bot, events), watched(bot, watch):
            stop_after(world, lambda: len(watch.entries) >= entries)
            run(bot, events)
        own = {}
        for name, service, path in (("hmm-detector", detector, "/detect_regime"), ("trade-predictor", predictor, "/predict_trade?explain=0")):
            crowd = drive(service.port, post(path, watch.asked[name]), connections=1, seconds=3)
            assert set(crowd.statuses) == {200}, crowd.statuses
            own[name] = crowd.quantile(0.5), crowd.quantile(0.99)
    return watch, own


def latency(entries: int = 200) -> None:
    """The way of an entry, part by part."""
    with TemporaryDirectory() as home:
        watch, own = fly_for_entries(Path(home), entries)
    told = [entry for entry in watch.entries if entry[:2] in watch.arrived]
    splits = [watch.split(*entry) for entry in told]
    totals = [left - watch.arrived[symbol, opened] for symbol, opened, left in told]
    firsts = {opened: left - watch.arrived[symbol, opened] for symbol, opened, left in reversed(told)}
    table = Table("part", "p50", "p99", "of all time", title=f"from a candle's close on the socket to the first byte of its entry order: {len(told)} entries at {len(firsts)} closes of three symbols", title_justify="left")
    for part in PARTS:
        values = [split[part] for split in splits]
        table.add_row(part, *(f"{quantile(values, share) * 1e3:.2f} ms" for share in (0.5, 0.99)), f"{sum(values) / sum(totals):.0%}")
    for label, values in (("all of it", totals), ("first entry of its close", list(firsts.values()))):
        table.add_row(label, *(f"{quantile(values, share) * 1e3:.2f} ms" for share in (0.5, 0.99)), "")
    both = sum(most for _, most in own.values())
    for name, (half, most) in own.items():
        calls = [end - start for part, start, end in watch.spans if part == name]
        table.add_row(f"{name}, asked alone", f"{half * 1e3:.2f} ms", f"{most * 1e3:.2f} ms", "")
        table.add_row(f"{name}, as the bot asked", *(f"{quantile(calls, share) * 1e3:.2f} ms" for share in (0.5, 0.99)), "")
    console = Console(width=118)
    console.print(table)
    console.print(f"p99 is {quantile(totals, 0.99) / both:.1f} times the two services' own p99 together ({both * 1e3:.1f} ms); of first entries {quantile(list(firsts.values()), 0.99) / both:.1f} times, p50 {quantile(totals, 0.5) / both:.1f} times")


def main() -> None:
    """All of it."""
    latency()


if __name__ == "__main__":
    main()
