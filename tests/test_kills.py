"""The real bot, killed without warning again and again: nothing it had written is lost, nothing is ordered twice, nothing held stands without its stop."""
from __future__ import annotations

import contextlib
import os
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from timeit import timeit

import httpx
import pytest

from delta_go.live.emulator import Emulator, running
from delta_go.live.faults import Rule, Script
from delta_go.live.journal import entry_of, read_journal, read_order_name
from delta_go.live.status import Status, read_status
from delta_go.market.accounts import Answers
from delta_go.trading.intents import DENIED, DOUBTFUL, SECOND
from tests.waiting import wait_for
from tests.whole import end, environment, minute_data, minute_market, minute_models, start, state_in

KILLS = int(os.environ.get("DELTA_TEST_KILLS", "200"))  # of all campaigns together
WORLDS = (       # what the exchange may answer where its documents are silent; a campaign of kills in each, at once
    Answers(),
    Answers(duplicate_id="accepted", lookup_finds_closed=False, read_lag=3.0),
    Answers(duplicate_id="rejected", margined_lag=5.0, registration_lag=1.0, flat_reduce_only="cancelled"),
)
DISTANCE = (     # an order is a while on its way, and so is the answer to it
    Rule("late", "POST /v2/orders", 0.7, seconds=0.06),
    Rule("slow", "POST /v2/orders", 0.7, seconds=0.1),
)
NAKED, RECOVERY = 5.0, 15.0  # seconds: of the exchange, of this machine
DECISION = re.compile(r"[A-Z]+:\d+")


World = tuple[Path, Path, float]  # folders of candles and models; seconds of the exchange in one of ours


@dataclass
class Campaign:
    """One exchange, one state folder, one bot after another."""
    exchange: Emulator            # it runs
    told: dict[str, str]          # the bot's environment
    home: Path
    fast: float                   # seconds of the exchange in one of ours
    chance: random.Random
    seen: dict[int, str] = field(default_factory=dict)      # rows that were committed, by number: their hash
    stamp: tuple[int, int] = (0, 0)                         # of the journal's file when it was last looked at
    faults: list[str] = field(default_factory=list)
    recovered: list[tuple[float, float, float]] = field(default_factory=list)  # seconds of this machine, the part of them spent waiting for a core, seconds of the exchange
    leased: list[float] = field(default_factory=list)       # seconds of this machine from a start to the right to write
    account: dict = field(default_factory=dict)             # how it ended at the exchange
    phases: Counter = field(default_factory=Counter)        # what the bot was doing when it died

    @property
    def folder(self) -> Path:
        """Where the bot writes."""
        return self.home / "testnet"

    @property
    def journal(self) -> Path:
        """What it writes."""
        return self.folder / "journal.db"


def peek(run: Campaign) -> list[tuple[int, str, str]]:
    """Rows that were committed since the last look: number, kind, key. They are kept in mind."""
    with contextlib.suppress(OSError):
        stat = run.journal.with_name("journal.db-wal").stat()
        if run.stamp == (stat.st_mtime_ns, stat.st_size):
            return []
        run.stamp = (stat.st_mtime_ns, stat.st_size)
    last = max(run.seen, default=0)
    with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(f"{run.journal.as_uri()}?mode=ro", uri=True)) as database:
        fresh = database.execute("SELECT sequence, kind, key, hash FROM journal WHERE sequence > ? ORDER BY sequence", (last,)).fetchall()
        run.seen.update({number: mark for number, _, _, mark in fresh})
        return [(number, kind, key) for number, kind, key, _ in fresh]
    return []


def status_of(run: Campaign, process: subprocess.Popen[bytes]) -> Status | None:
    """What this very process says, None while it has said nothing."""
    with contextlib.suppress(Exception):
        status = read_status(run.folder)
        return status if status and status.pid == process.pid else None
    return None


def queued(process: subprocess.Popen[bytes]) -> float:
    """Seconds that a process was ready to run and had no core, zero where the kernel does not count them."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def truth(run: Campaign) -> dict:
    """Everything that is true at the exchange."""
    state = httpx.get(f"{run.exchange.url}/emulator/state", timeout=30).json()
    return next(iter(state["accounts"].values()))


def live(run: Campaign, process: subprocess.Popen[bytes], until) -> list[tuple[int, str, str]]:
    """Watch a life until its end is due; when it recovered is noted, and the rows it wrote are given."""
    born, at, rows, ran = time.monotonic(), run.exchange.at, [], False
    leased = False
    while not until(rows) and process.poll() is None:
        rows += peek(run)
        if rows and not leased:
            leased = True
            run.leased.append(time.monotonic() - born)
        if not ran and (status := status_of(run, process)) is not None and status.state not in ("BOOT", "DEGRADED"):
            ran = True
            run.recovered.append((time.monotonic() - born, queued(process), run.exchange.at - at))
            if status.state != "RUNNING":
                run.faults.append(f"{status.state} after a kill: {status.halted}")
        time.sleep(0.004)
    return rows


def first(rows: list[tuple[int, str, str]], kind: str, moments: list[float]) -> float:
    """When a row of a kind was first seen, infinity before."""
    if not moments and any(what == kind for _, what, _ in rows):
        moments.append(time.monotonic())
    return moments[0] if moments else float("inf")


def aim(run: Campaign, kind: str) -> Callable[[list[tuple[int, str, str]]], bool]:
    """When to kill: at any moment of a young life, about when it takes the right to write or while it reconciles, just after a bar's close, or just after an order was written down."""
    born, at, chance, moments = time.monotonic(), run.exchange.at, run.chance.random(), []
    usual = median(run.leased[-9:]) if run.leased else 1.0
    close = (at // 60 + 1) * 60 + 60 * (at % 60 > 60 - 1.5 * usual * run.fast)  # the first that it can live to see
    match kind:
        case "any":
            return lambda rows: time.monotonic() > born + 3.0 * max(1.0, usual) * chance
        case "lease":
            return lambda rows: time.monotonic() > born + usual - 0.1 + 0.15 * chance
        case "recovery":
            return lambda rows: time.monotonic() > first(rows, "lease", moments) + 0.3 * chance
        case "close":
            return lambda rows: run.exchange.at > close + 0.4 * run.fast * chance
    return lambda rows: time.monotonic() > first(rows, "intent", moments) + 0.2 * chance or run.exchange.at > close + 0.6 * run.fast


def check_rows(run: Campaign) -> None:
    """The chain is whole, and every row that was ever seen is still what it was."""
    if not run.journal.exists():
        run.faults += [f"{len(run.seen)} rows are gone"] * bool(run.seen)
        return
    rows = {row.sequence: row.hash for row in read_journal(run.journal)}
    run.faults += [f"row {number} was acknowledged and is lost or changed" for number, mark in run.seen.items() if rows.get(number) != mark]
    run.seen.update(rows)


def check_orders(run: Campaign, account: dict) -> list[str]:
    """One intent for each order, one order for each intent, one intent for each decision; an exit that came to nothing is owed and may be made again."""
    entries = [entry_of(row) for row in read_journal(run.journal)]
    intents = {entry.key: entry.body for entry in entries if entry.kind == "intent"}
    ours = [order["client_order_id"] for order in account["orders"] if read_order_name("dg-", order["client_order_id"])]
    faults = [f"order {name} at the exchange has no intent" for name in ours if name not in intents]
    faults += [f"{name} names {len(numbers)} orders at the exchange" for name, numbers in account["by_client_order_id"].items() if len(numbers) > 1]
    ends = {entry.body["client_order_id"]: entry.body["status"] for entry in entries if entry.kind == "outcome"}
    nothing = {name for name, body in intents.items() if body["reduce_only"] and ends.get(name) in (*DENIED, "cancelled")}
    reasons = Counter(body["reason"] for name, body in intents.items() if name not in nothing and DECISION.fullmatch(body["reason"]))
    faults += [f"decision {key} became {count} intents" for key, count in reasons.items() if count > 1]
    return faults + [f"halted: {entry.body['reason']}" for entry in entries if entry.kind == "halt"]


def check_cover(account: dict) -> list[str]:
    """No position stood without its stop for long."""
    return [f"{symbol} stood without a stop for {cover['longest']:.1f} s" for symbol, cover in account["naked_seconds"].items() if cover["longest"] > NAKED]


def differences(run: Campaign) -> list[str]:
    """Where the journal and the exchange disagree, on fills and on what is held."""
    account, entries = truth(run), [entry_of(row) for row in read_journal(run.journal)]
    ours = {entry.key: entry.body for entry in entries if entry.kind == "fill"}
    theirs = {str(fill["id"]): fill for fill in account["fills"]}
    faults = [f"fill {number} is known to one side only" for number in ours.keys() ^ theirs.keys()]
    faults += [f"fill {number}: {ours[number]['size']} {ours[number]['side']} here, {theirs[number]['size']} {theirs[number]['side']} there" for number in ours.keys() & theirs.keys()
               if (ours[number]["size"], ours[number]["side"]) != (theirs[number]["size"], theirs[number]["side"])]
    held = Counter()
    for body in ours.values():
        held[body["symbol"]] += body["size"] if body["side"] == "buy" else -body["size"]
    faults += [f"{symbol}: {held[symbol]} by the journal, {account['positions'].get(symbol, 0)} at the exchange" for symbol in held.keys() | account["positions"].keys()
               if held[symbol] != account["positions"].get(symbol, 0)]
    statuses = {entry.body["client_order_id"]: entry.body["status"] for entry in entries if entry.kind == "outcome"}
    return faults + [f"{entry.key} is in doubt" for entry in entries if entry.kind == "intent" and statuses.get(entry.key, "sending") in DOUBTFUL]


def phase_of(run: Campaign, rows: list[tuple[int, str, str]]) -> str:
    """What a life had come to, by what it had written."""
    if not rows:
        return "before its lease"
    kinds = [kind for _, kind, _ in rows]
    return {"lease": "after its lease, before anything else", "intent": SENDING, "decision": "after a decision", "equity": "after a decision"}.get(kinds[-1], f"after {kinds[-1]}")


def kill(run: Campaign, kind: str) -> None:
    """One life."""
    process = start(run.told, run.home / "log")
    try:
        rows = live(run, process, aim(run, kind))
    finally:
        died = process.poll()
        process.kill()
        process.wait()
    if died is not None:
        run.faults.append(f"ended by itself with {died}: {(run.home / 'log').read_text()[-300:]}")
    rows += [(row.sequence, row.kind, row.key) for row in (read_journal(run.journal) if run.journal.exists() else []) if row.sequence > max(run.seen, default=0)]
    run.phases[phase_of(run, rows)] += 1
    check_rows(run)
    if run.journal.exists():
        account = truth(run)
        run.faults += check_orders(run, account) + check_cover(account)


def land(run: Campaign) -> None:
    """A last life that may recover and end in order; then both sides are compared."""
    process = start(run.told, run.home / "log")
    try:
        live(run, process, lambda rows: (status := status_of(run, process)) is not None and status.state == "RUNNING")
        if not wait_for(lambda: not differences(run), 30 + 120 / run.fast, 0.25):
            run.faults += differences(run)
        code = end(process, 60)
    finally:
        process.kill()
        process.wait()
    run.faults += [f"the last drain ended with {code}"] * bool(code)
    check_rows(run)
    account = truth(run)
    run.faults += check_orders(run, account) + check_cover(account)


SENDING = "between an order's intent and its outcome"
RESTLESS = """
import numpy as np
import delta_go.learning.strategies as room
settings = room.StrategySettings
settings.__init__.__defaults__ = tuple({"trend_bars": 1, "min_target_bps": 0.0}.get(name, value) for name, value in zip(settings.__slots__, settings.__init__.__defaults__))
room.find_reasons = lambda features, regimes, settings: np.where(features.column("consecutive_candles") > 0, 1, 2).astype(np.int8)
"""  # a strategy that enters with each candle and holds for one: orders at every close
PLAN = ("any", "sending", "recovery", "close", "any", "sending", "lease", "close")


def campaign(home: Path, world: World, kills: int, seed: int, answers: Answers = WORLDS[0], plan: tuple[str, ...] = PLAN, sabotage: str = "") -> Campaign:
    """Kill after kill over one market, until something is wrong; what was found."""
    home.mkdir()
    (home / "sitecustomize.py").write_text(RESTLESS + sabotage)
    data, models, fast = world
    with running(minute_market(data, speed=fast, script=Script(DISTANCE, seed, answers))) as exchange:
        told = environment(exchange.url, models, home, **{"DELTA_CLOCK_SPEED": f"{fast:g}", "TMPDIR": str(home), "PYTHONPATH": str(home)})
        run = Campaign(exchange, told, home, fast, random.Random(seed))
        for number in range(kills):
            if not run.faults:
                kill(run, plan[number % len(plan)])
        if not run.faults:
            land(run)
        run.account = truth(run)
    return run


def share(values: list[float], part: float) -> float:
    """A quantile, by rank."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else float("nan")


def doubts(run: Campaign) -> tuple[int, list[float]]:
    """Orders whose fate nobody had written down at a start, and of those that were settled in the same life, how long after the start: seconds of the exchange."""
    open_, met, took, begun = {}, 0, [], 0
    for row in read_journal(run.journal):
        entry = entry_of(row)
        if entry.kind == "lease":
            met, begun = met + len(open_), row.time_us
            open_ = dict.fromkeys(open_, begun)
        elif entry.kind == "intent":
            open_[entry.key] = 0
        elif entry.kind == "outcome" and entry.body["status"] not in DOUBTFUL and (since := open_.pop(entry.body["client_order_id"], 0)):
            took.append((row.time_us - since) / SECOND)
    return met, took


def tell(runs: list[Campaign]) -> str:
    """The figures, for a person."""
    walls, queues, markets = ([times[place] for run in runs for times in run.recovered] for place in range(3))
    phases, orders = sum((run.phases for run in runs), Counter()), [order for run in runs for order in run.account["orders"] if read_order_name("dg-", order["client_order_id"])]
    naked = max((cover["longest"] for run in runs for cover in run.account["naked_seconds"].values()), default=0.0)
    lines = [f"{sum(phases.values())} kills: " + ", ".join(f"{count} {name}" for name, count in phases.most_common()),
             f"{sum(len(run.seen) for run in runs)} rows, {len(orders)} orders of ours, {sum(len(run.account['fills']) for run in runs)} fills, longest without a stop {naked:.2f} s of the exchange",
             *(f"{len(walls)} recoveries, seconds {what}: p50 {share(times, 0.5):.2f}, p99 {share(times, 0.99):.2f}, max {max(times, default=0):.2f}"
               for what, times in (("of this machine", walls), ("of them without a core", queues), (f"of the exchange, {runs[0].fast:g} times as fast", markets)))]
    found = [doubts(run) for run in runs]
    took = [seconds for _, times in found for seconds in times]
    lines.append(f"{sum(met for met, _ in found)} orders in doubt at a start, settled after the start in seconds of the exchange: p50 {share(took, 0.5):.2f}, p99 {share(took, 0.99):.2f}, max {max(took, default=0):.2f}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """The market and the models of every campaign here, and how fast it may go: a bar must leave time for a start."""
    home = tmp_path_factory.mktemp("world")
    took = timeit(lambda: subprocess.run([sys.executable, "-c", "import delta_go.cli, delta_go.config, delta_go.live.launch"], check=True), number=2) / 2
    return minute_data(home / "data"), minute_models(home / "models"), float(min(10, max(2, 12 // took)))


def test_a_killed_bot_loses_nothing_and_doubles_nothing(world, tmp_path, capsys):
    jobs = [(number, answers, KILLS // len(WORLDS) + (number < KILLS % len(WORLDS))) for number, answers in enumerate(WORLDS)]
    with ThreadPoolExecutor(len(WORLDS)) as pool:
        runs = list(pool.map(lambda job: campaign(tmp_path / f"bot{job[0]}", world, job[2], job[0], job[1]), jobs))
    with capsys.disabled():
        print(f"\n{tell(runs)}")
    assert [fault for run in runs for fault in run.faults] == []
    assert sum(sum(run.phases.values()) for run in runs) == KILLS
    assert sum(run.phases[SENDING] for run in runs) >= KILLS // 40
    assert share([wall - queue for run in runs for wall, queue, _ in run.recovered], 0.99) < RECOVERY


SEND_FIRST = """
import time
import delta_go.live.executor as room
from delta_go.trading.intents import Send
step, place_order = room.step, room.place_order

def hasty(state, event, now):
    after, effects = step(state, event, now)
    return after, sorted(effects, key=lambda effect: not isinstance(effect, Send))

def slowly(account, request):
    outcome = place_order(account, request)
    time.sleep(0.3)
    return outcome

room.step, room.place_order, room.faults = hasty, slowly, lambda *_: []
"""
SEND_AGAIN = """
import time
import delta_go.live.executor as room
from delta_go.live.journal import order_name
from delta_go.trading.intents import DENIED, DOUBTFUL, Entry, Send
from dataclasses import replace
begin, place_order = room.Executor.__init__, room.place_order

def anew(self, account, journal, rules, rows, now_us, *more):
    begin(self, account, journal, rules, rows, now_us, *more)
    bodies = {entry.key: entry.body for entry in self.entries if entry.kind == "intent"}
    for name in [name for name in self.state.books.live if self.state.books.intents[name].status in DOUBTFUL]:
        number = max(body["number"] for body in bodies.values()) + 1
        fresh = order_name(rules.prefix, number, journal.epoch)
        bodies[fresh] = bodies[name] | {"number": number, "made_us": now_us()}
        self.write([Entry("outcome", name + ":never_arrived", {"client_order_id": name, "status": "never_arrived", "order_id": "", "detail": "started again"}),
                    Entry("intent", fresh, bodies[fresh])], now_us())
        place_order(account, replace(self.state.books.intents[name].request, client_order_id=fresh))

def slowly(account, request):
    outcome = place_order(account, request)
    time.sleep(0.3)
    return outcome

room.Executor.__init__, room.place_order = anew, slowly
"""


@pytest.mark.parametrize(("sabotage", "plan", "found"), [(SEND_FIRST, ("close",), "has no intent"), (SEND_AGAIN, ("sending", "recovery"), "became 2 intents")], ids=["sent before it is written down", "sent again under a new name"])
def test_a_bot_that_breaks_the_protocol_is_caught(world, tmp_path, sabotage, plan, found):
    run = campaign(tmp_path / "bot", world, 40, 1, plan=plan, sabotage=sabotage)
    assert any(found in fault for fault in run.faults), run.faults


ELSEWHERE = """
import socket
import delta_go.live.launch as launch
launch.claim = lambda owner: socket.socket()
"""  # a bot on another machine, whose claim this one cannot see


def told_no(process: subprocess.Popen[bytes], log: Path) -> str:
    """The one line that a bot ends with, if it does not start."""
    assert process.wait(120) == 1
    said = [line for line in log.read_text().splitlines() if not line.startswith("{")]
    assert len(said) == 1, said
    return said[0]


def bot_of(exchange: Emulator, world: World, home: Path, log: Path, change: str = RESTLESS) -> subprocess.Popen[bytes]:
    """A bot that keeps its state in a folder, with something changed in it."""
    changed = log.with_suffix(".changed")
    changed.mkdir()
    (changed / "sitecustomize.py").write_text(change)
    return start(environment(exchange.url, world[1], home, DELTA_CLOCK_SPEED=f"{world[2]:g}", TMPDIR=str(changed), PYTHONPATH=str(changed)), log)


def test_a_second_bot_is_refused(world, tmp_path):
    with running(minute_market(world[0], speed=world[2])) as exchange:
        folder = tmp_path / "a" / "testnet"
        first = bot_of(exchange, world, tmp_path / "a", tmp_path / "log")
        try:
            assert wait_for(lambda: state_in(folder) == "RUNNING", 120)
            for number, (home, change, words) in enumerate([("a", RESTLESS, "another bot trades this account"), ("b", RESTLESS, "another bot trades this account"),
                                                            ("a", ELSEWHERE, "another process writes journal")]):
                log = tmp_path / f"log{number}"
                assert words in told_no(bot_of(exchange, world, tmp_path / home, log, change), log)
            assert {row.epoch for row in read_journal(folder / "journal.db")} == {1} and first.poll() is None
            assert not (tmp_path / "b" / "testnet" / "journal.db").exists()
        finally:
            assert end(first, 60) == 0


@pytest.mark.parametrize("answers", [Answers(duplicate_id="accepted"), Answers(duplicate_id="rejected")], ids=["names may repeat", "names are unique"])
def test_two_bots_on_two_machines_stop_when_they_meet(world, tmp_path, answers):
    """Whoever can see an order of the other's halts; one that the exchange let nothing through shows nothing to the other."""
    homes = [tmp_path / name for name in "ab"]
    halted = dict.fromkeys(homes, False)
    with running(minute_market(world[0], speed=world[2], script=Script(answers=answers))) as exchange:
        bots = [bot_of(exchange, world, home, home.with_suffix(".log"), RESTLESS + ELSEWHERE) for home in homes]

        def shown(home: Path) -> bool:
            """Whether the exchange has an order of this bot's."""
            known = next(iter(httpx.get(f"{exchange.url}/emulator/state", timeout=30).json()["accounts"].values()))["by_client_order_id"]
            rows = read_journal(home / "testnet" / "journal.db") if (home / "testnet" / "journal.db").exists() else []
            return any(row.kind == "intent" and row.key in known for row in rows)

        def met() -> bool:
            halted.update({home: state_in(home / "testnet") == "HALTED" for home in homes})
            return any(halted.values()) and all(halted[home] or not shown(other) for home, other in zip(homes, reversed(homes)))
        try:
            found = wait_for(met, 60 + 300 / world[2], 1.0)
            account = next(iter(httpx.get(f"{exchange.url}/emulator/state", timeout=30).json()["accounts"].values()))
        finally:
            codes = [end(bot, 60) for bot in bots]
    assert found, halted
    assert codes == [0, 0] and check_cover(account) == []
    entries = Counter((order["product_symbol"], order["created_at"][:16]) for order in account["orders"] if order["client_order_id"] and not order["reduce_only"])
    assert entries and [order for order, count in entries.items() if count > 1] == []
    for home in homes:
        said = [entry.body["reason"] for row in read_journal(home / "testnet" / "journal.db") if (entry := entry_of(row)).kind == "halt"]
        assert bool(said) == halted[home] and all("another bot trades on this account" in reason for reason in said)
