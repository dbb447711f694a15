"""The bot: from a candle's close to the entry order's first byte, seven days with faults and restarts, start-up and memory."""
from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from unittest.mock import patch

import httpx
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.borrowed import World, borrowed_bot, borrowed_exchange, borrowed_setup, prepared, settings_for
from benchmarks.load import drive, post, running
from delta_go.config import Settings
from delta_go.domain import RetryError
from delta_go.learning.strategies import StrategySettings
from delta_go.live import executor, flight, stream
from delta_go.live.bot import Bot, run
from delta_go.live.faults import Rule, Script
from delta_go.live.flight import read_on
from delta_go.live.journal import entry_of, read_journal
from delta_go.live.pace import Setup
from delta_go.live.rehearse import child, says_where
from delta_go.live.stream import open_socket
from delta_go.market.candles import step_of
from delta_go.serving.client import regime_question, trade_question
from delta_go.trading.intents import Entry
from delta_go.trading.pilot import look
from delta_go.trading.risk import DAY
from tests import whole

EAGER = StrategySettings(min_confidence=0.2, min_target_bps=1.0, trend_bars=1, edge_bars=1, breakout_bars=1, scalp=True, scalp_bars=1, edge_share=0.5, edge_rsi=70.0, trend_rsi=90.0)
PARTS = ("other symbols' candles", "window fetch", "funding fetch", "hmm-detector", "trade-predictor", "wallet", "positions", "journal", "orders before it", "questions", "order signed", "our own code")


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
            patch.object(flight, "balances", watch.timed("wallet", flight.balances)), \
            patch.object(flight, "position", watch.timed("positions", flight.position)), patch.object(flight, "look", partial(look, settings=EAGER)):
        yield


def quantile(values: list[float], share: float) -> float:
    """What a share of the values stays under."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else float("nan")


def fly_for_entries(home: Path, entries: int) -> tuple[Stopwatch, dict[str, tuple[float, float]]]:
    """So many entries of the real bot, both services over HTTP; and each service's own p50 and p99 on one kept connection."""
    (models, data), watch = prepared(home, "5m", 2_500), Stopwatch()
    with running("hmm-detector", models) as detector, running("trade-predictor", models) as predictor, borrowed_exchange(borrowed_setup(data, "5m"), home) as world:
        world.note = watch.note
        settings = settings_for(world, models, home / "state", detector=f"http://127.0.0.1:{detector.port}", predictor=f"http://127.0.0.1:{predictor.port}")
        with patch.object(stream, "open_socket", watch.socket), borrowed_bot(world, settings) as (bot, events), watched(bot, watch):
            world.watch = lambda: len(watch.entries) >= entries
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
    table = Table("part", "p50", "p99", "of all time", title=f"from a candle's close on the socket to the first byte of its entry order: {len(told)} entries at {len(firsts)} closes of three symbols", title_justify="left", min_width=80)
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


def trouble(seed: int, seconds: float) -> Script:
    """Everything that goes wrong in a week, and each restart of the exchange with its auction."""
    rules = [Rule("reply_lost", "POST /v2/orders", 0.15), Rule("lost", "*", 0.004), Rule("status", "*", 0.006, status=503), Rule("status", "*", 0.002, status=429, seconds=4.0),
             Rule("status", "POST /v2/orders", 0.05, status=502), Rule("garbage", "GET *", 0.003), Rule("slow", "*", 0.002, seconds=0.2), Rule("duplicated", "POST /v2/orders", 0.03),
             Rule("gap", "orders", 0.03), Rule("gap", "v2/user_trades", 0.05), Rule("repeated", "v2/user_trades", 0.05), Rule("gap", "candlestick_*", 0.01),
             Rule("disconnect", "candlestick_*", 0.0008), Rule("disconnect", "orders", 0.02), Rule("skew", start=seconds * 0.6, seconds=1_200.0, by=10.0)]
    return Script((*rules, *(Rule("down", start=seconds * part, seconds=300.0, auction=300.0) for part in (0.2, 0.45, 0.8))), seed)


@dataclass
class Body:
    """What the process holds on to."""
    resident: float   # MB
    files: int        # open descriptors
    threads: int


def body_of(pid: int) -> Body:
    """As the kernel sees it."""
    told = Path(f"/proc/{pid}/status").read_text()
    number = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in told.splitlines()) if name in ("VmRSS", "Threads")}
    return Body(number["VmRSS"] / 1024, len(os.listdir(f"/proc/{pid}/fd")), number["Threads"])


@dataclass
class Log:
    """What is noted of a long flight."""
    bodies: list[Body] = field(default_factory=list)     # after each close
    told: Counter[str] = field(default_factory=Counter)  # to a person
    failed: list[str] = field(default_factory=list)      # exceptions that nobody caught
    boots: int = 0


def fly_on(world: World, settings: Settings, log: Log, closes: int) -> None:
    """One life of the bot, until it has seen so many closes in all."""
    log.boots += 1
    with borrowed_bot(world, settings) as (bot, events):
        seen, tell = read_on(bot.flight.log, bot.flight.executor.entries).last_close, bot._tell

        def enough() -> bool:
            nonlocal seen
            if bot.flight.log.last_close != seen:
                seen = bot.flight.log.last_close
                log.bodies.append(body_of(os.getpid()))
            return len(log.bodies) >= closes

        def told(words: str, urgent: bool) -> None:
            log.told[re.sub(r"[\d.]+", "#", words)] += 1
            tell(words, urgent)
        bot._tell = told
        with patch.object(world, "watch", enough):
            run(bot, events)


def fly_through(world: World, settings: Settings, stops: list[int]) -> Log:
    """Life after life, each until its close; a start that fails is tried again."""
    log = Log()
    with patch.object(threading, "excepthook", lambda told: log.failed.append(repr(told.exc_value))):
        while stops:
            try:
                fly_on(world, settings, log, stops[0])
            except RetryError as error:
                log.told[f"start again: {error}"] += 1
            except Exception:
                log.failed.append(traceback.format_exc())
                if len(log.failed) > 20:
                    break
            stops = [stop for stop in stops if stop > len(log.bodies)]
            world.pass_by(20)
    return log


def soak(resolution: str, days: float = 7.0, seed: int = 1, restarts: int = 7) -> None:
    """One bot process through days of faults and restarts, in borrowed time."""
    step, began = step_of(resolution), time.perf_counter()
    wanted = int(days * DAY) // step
    stops = [*sorted(Random(seed).sample(range(5, wanted - 5), restarts)), wanted - 2]
    with TemporaryDirectory() as place:
        home = Path(place)
        models, data = prepared(home, resolution, wanted + 300)
        with borrowed_exchange(borrowed_setup(data, resolution, script=trouble(seed, days * DAY)), home) as world:
            log = fly_through(world, settings_for(world, models, home / "state"), stops)
            state = httpx.get(f"{world.url}/emulator/state", trust_env=False, timeout=30).json()
        entries = [entry_of(row) for row in read_journal(home / "state" / "testnet" / "journal.db")]
        size = sum(path.stat().st_size for path in (home / "state" / "testnet").glob("journal.db*")) / 2**20
    show_soak(f"{days:g} days of {resolution} bars, in borrowed time", log, entries, size, days, time.perf_counter() - began, state)


def show_soak(title: str, log: Log, entries: list[Entry], size: float, days: float, seconds: float, state: dict) -> None:
    """What a long flight has shown."""
    account = next(iter(state["accounts"].values()))
    kinds, warm, last = Counter(entry.kind for entry in entries), log.bodies[len(log.bodies) // 6], log.bodies[-1]
    table = Table("what", "", title=f"{title}: {seconds:.0f} s", title_justify="left", show_header=False, min_width=100)
    for what, value in {
        "closes decided": f"{len(log.bodies):,}", "trades": f"{len(account['trades']):,}", "starts of the bot": f"{log.boots}",
        "exceptions nobody caught": f"{len(log.failed)}", "orders with one name": f"{sum(len(numbers) > 1 for numbers in account['by_client_order_id'].values())}",
        "longest without a stop": f"{max((cover['longest'] for cover in account['naked_seconds'].values()), default=0):.1f} s of the exchange",
        "faults": ", ".join(f"{count} {kind}" for kind, count in Counter(kind for kind, _ in state["faults"]).most_common()),
        "resident": f"{', '.join(f'{log.bodies[len(log.bodies) * part // 6 - 1].resident:.1f}' for part in range(1, 7))} MB after each sixth", "open files": f"{warm.files}, then {last.files}; most {max(body.files for body in log.bodies)}",
        "threads": f"{warm.threads}, then {last.threads}; most {max(body.threads for body in log.bodies)}",
        "journal": f"{len(entries):,} rows ({', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common())}), {size:.2f} MB, {size / days:.2f} MB a day",
    }.items():
        table.add_row(what, value)
    console = Console(width=118)
    console.print(table)
    for words, count in log.told.most_common(12):
        console.print(f"  told {count} times: {words}", highlight=False)
    for words in log.failed[:3]:
        console.print(words, highlight=False)


LOADS = "import sys; from delta_go import cli, config; from delta_go.live import launch; "
UNWANTED = ("pandas", "scipy", "numba", "sklearn", "hmmlearn", "xgboost", "matplotlib", "pyarrow", "aiohttp", "apprise", "flask")


def start_up(top: int = 10) -> None:
    """What the bot's process loads before its first request, by package; best of three."""
    best: dict[str, float] = {}
    for _ in range(3):
        told = subprocess.run([sys.executable, "-X", "importtime", "-c", LOADS], capture_output=True, text=True, check=True).stderr
        spent: Counter[str] = Counter()
        for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", told, re.M):
            spent[name.split(".")[0]] += int(own)
        best = {name: min(value, best.get(name, value)) for name, value in spent.items()}
    code = LOADS + f"print([name for name in {UNWANTED} if name in sys.modules], len(sys.modules), open('/proc/self/status').read().split('VmRSS:')[1].split()[0])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    table = Table("package", "import", title=f"what the bot loads: {sum(best.values()) / 1e3:.0f} ms of imports; heavy packages, modules and kB: {told}", title_justify="left", min_width=80)
    for name, spent in sorted(best.items(), key=lambda item: -item[1])[:top]:
        table.add_row(name, f"{spent / 1e3:.0f} ms")
    Console(width=118).print(table)


def real_loop(minutes: float, over_http: bool) -> None:
    """The real process at six times the speed of the clock, minute bars: start-up, memory, files and what it said."""
    with TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        home, began = Path(place), time.perf_counter()
        models, data = prepared(home, "1m", 400 + int(minutes * 6))
        told = {}
        if over_http:
            services = [stack.enter_context(running(name, models)) for name in ("hmm-detector", "trade-predictor")]
            told = dict(zip(("HMM_ENDPOINT", "TRADE_PREDICTOR_ENDPOINT"), (f"http://127.0.0.1:{service.port}" for service in services)))
        rules = (Rule("disconnect", "candlestick_*", 0.002), Rule("reply_lost", "POST /v2/orders", 0.2), Rule("status", "*", 0.01), Rule("gap", "orders", 0.05))
        exchange = stack.enter_context(whole_exchange(whole.minute_market(data, script=Script(rules, 1))))
        folder, began = home / "state" / "testnet", time.perf_counter()
        process = whole.start(whole.environment(exchange, models, home / "state", **told), home / "log")
        try:
            ready = whole.wait_for(lambda: whole.state_in(folder) == "RUNNING", 60, 0.01)
            first, bodies, end = time.perf_counter() - began, [], time.monotonic() + minutes * 60
            while time.monotonic() < end and process.poll() is None:
                time.sleep(1)
                bodies.append(body_of(process.pid))
        finally:
            code = whole.end(process) if process.poll() is None else process.returncode
        entries = [entry_of(row) for row in read_journal(folder / "journal.db")]
        kinds, size = Counter(entry.kind for entry in entries), sum(path.stat().st_size for path in folder.glob("journal.db*")) / 2**20
        words = (home / "log").read_text()
    closes, warm, last = kinds["equity"], bodies[len(bodies) // 4], bodies[-1]
    table = Table("what", "", title=f"the real process for {minutes:g} min at six times the clock, minute bars, models {'in two services' if over_http else 'in the process'}", title_justify="left", show_header=False, min_width=100)
    for what, value in {
        "running after": f"{first:.1f} s" if ready else "never", "exit code": str(code), "closes decided": f"{closes}", "entries": f"{kinds['intent']}", "tracebacks": str(words.count("Traceback")),
        "resident": f"{warm.resident:.1f} MB after a quarter, {last.resident:.1f} MB at the end, {max(body.resident for body in bodies):.1f} MB at most",
        "open files, threads": f"{warm.files}, {warm.threads}, then {last.files}, {last.threads}",
        "journal": f"{len(entries)} rows, {size / max(closes, 1) * 1e3:.1f} kB a close",
        "left of 1 GB": f"about {1024 - 150 - last.resident:.0f} MB beside 150 MB of a small system",
    }.items():
        table.add_row(what, value)
    Console(width=118).print(table)


@contextlib.contextmanager
def whole_exchange(setup: Setup) -> Iterator[str]:
    """An exchange in a process of its own that follows the real clock."""
    code = "import msgspec, sys; from delta_go.live.emulator import serve; from delta_go.live.pace import Setup; serve(msgspec.msgpack.decode(bytes.fromhex(sys.argv[1]), type=Setup), lambda url: print(url, flush=True))"
    with child(["-c", code, msgspec.msgpack.encode(setup).hex()], {}, says_where) as url:
        yield url


def main() -> None:
    """All of it, in about eight minutes; `soak 5m 7` flies one of the long flights only, `latency`, `start`, `real 3` the other parts."""
    match sys.argv[1:]:
        case ["soak", resolution, days, *seed]:
            soak(resolution, float(days), *map(int, seed))
        case ["latency"]:
            latency()
        case ["start"]:
            start_up()
        case ["real", minutes, *where]:
            real_loop(float(minutes), where != ["local"])
        case _:
            for words in (["start"], ["latency"], ["real", "1"], ["real", "0.5", "local"], ["soak", "1h", "7"], ["soak", "15m", "7"]):
                subprocess.run([sys.executable, "-m", "benchmarks.bot", *words], check=True)


if __name__ == "__main__":
    main()
