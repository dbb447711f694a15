"""Seeded schedules of faults: the order protocol against a small model of the exchange, in virtual time.

    python -m tests.schedules --seeds 1000000     # what a night is for
    python -m tests.schedules --first 4711 --seeds 1 --log
    python -m tests.schedules --switch            # somebody pulls the kill switch at any moment

A seed decides everything: which answers the exchange gives where its documents are silent (P1 to P12), which requests are lost, late or answered
with an error, when the process dies, what the market does. The same seed gives the same log, byte for byte. The model keeps its own accounts, and
they are what the bot's are judged by.
"""
from __future__ import annotations

import argparse
import gc
import hashlib
import heapq
import itertools
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from delta_go.live import orders
from delta_go.live.journal import START, Row, chain, check_chain, open_journal
from delta_go.trading import intents
from delta_go.trading.intents import (
    DENIED,
    DOUBTFUL,
    FINAL,
    FOREIGN,
    OPEN,
    SECOND,
    Answered,
    Ask,
    Books,
    Cancel,
    Clock,
    Effect,
    Entry,
    Event,
    Place,
    Question,
    Record,
    Rules,
    Send,
    SendResult,
    State,
    Stop,
    Tick,
)
from delta_go.trading.messages import Accepted, Answer, CouldNotAsk, Fill, NotSent, Order, OrderRequest, Position, Rejected, Unknown
from delta_go.trading.news import FillSeen, Gap, OrderSeen

SYMBOLS = ("BTCUSD", "ETHUSD")
PRICE = {"BTCUSD": Decimal(60_000), "ETHUSD": Decimal(3_000)}
RULES = Rules({"BTCUSD": Decimal("0.001"), "ETHUSD": Decimal("0.01")}, {"BTCUSD": 12, "ETHUSD": 12}, Decimal(1_000), entries_a_minute=5)
BUSY, QUIET = 45 * SECOND, 38 * SECOND  # a schedule has faults in the first part and none in the second
PROMISED = 10 * SECOND                  # from the kill switch to flat and order-free, counted the same way
NAKED = 5 * SECOND                      # how long a position may lie without a stop, while calls are answered and answers are fresh


# ---------------------------------------------------------------- the answers nobody has written down

@dataclass(frozen=True, slots=True)
class Switches:
    """One answer to each open question about the exchange."""
    repeated_name: str = "accepted"       # P1: a client order id used again: accepted, refused, refused while the first is open
    deadman_spares_stops: bool = True     # P2: what the expiry of a heartbeat cancels
    finds_closed: bool = True             # P3: looking up by client order id: also orders that are over
    lag: int = 0                          # P3: how old an answer may be, seconds
    legs: str = "full"                    # P4: the legs of an entry that filled in part: full, proportional, none before it is complete
    legs_stay: bool = True                # P4: after the rest was cancelled
    future: bool = True                   # P5: a signature from the future is accepted
    limited_is_refused: bool = True       # P6: an order answered with 429 never exists
    late_5xx: bool = True                 # P7: an order answered with 504 may exist
    restart_sequence: bool = True         # P8: the stream counts from 1 again now and then
    position_lags: bool = False           # P9: the position is up to ten seconds old
    bare_cancel_all: bool = False         # P10: cancel-all without flags cancels (the protocol never calls it)
    batch_reports: bool = False           # P11: a batch names what it refused (the protocol never sends one)
    refuses_when_flat: bool = True        # P12: reduce-only without a position: refused, or accepted and cancelled


CHOICES: dict[str, tuple[Any, ...]] = {
    field_.name: {"repeated_name": ("accepted", "refused", "refused_while_open"), "lag": (0, 5), "legs": ("full", "proportional", "complete")}.get(field_.name, (True, False))
    for field_ in fields(Switches)}
COMBINATIONS = math.prod(map(len, CHOICES.values()))
NEVER_ASKED = ("bare_cancel_all", "batch_reports")  # changes nothing, so these change last
DISTINCT = COMBINATIONS // math.prod(len(CHOICES[name]) for name in NEVER_ASKED)
_ORDER = random.Random(0).sample(range(DISTINCT), DISTINCT)


def switches_of(seed: int) -> Switches:
    """The seed's answers; COMBINATIONS seeds in a row have every combination once, DISTINCT seeds every one that makes a difference."""
    number, chosen = _ORDER[seed % DISTINCT] + seed // DISTINCT % (COMBINATIONS // DISTINCT) * DISTINCT, {}
    for name in sorted(CHOICES, key=NEVER_ASKED.__contains__):
        number, place = divmod(number, len(CHOICES[name]))
        chosen[name] = CHOICES[name][place]
    return Switches(**chosen)


# ---------------------------------------------------------------- virtual time

class World:
    """Time, chance, and what happens next."""
    def __init__(self, seed: int, log: bool = False):
        self.seed, self.chance, self.now = seed, random.Random(seed), 1_000 * SECOND
        self.end_of_faults = self.now + BUSY
        self._queue: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = itertools.count()
        self.log: list[str] | None = [] if log else None

    def at(self, moment: int, call: Callable[..., None], *values: Any) -> None:
        heapq.heappush(self._queue, (max(moment, self.now), next(self._count), call, values))

    def after(self, seconds: float, call: Callable[..., None], *values: Any) -> None:
        self.at(self.now + int(seconds * SECOND), call, *values)

    def run(self, until: int) -> None:
        while self._queue and self._queue[0][0] <= until:
            self.now, _, call, values = heapq.heappop(self._queue)
            call(*values)
        self.now = until

    def note(self, words: str, *values: object) -> None:
        if self.log is not None:
            self.log.append(f"{self.now} {words} {' '.join(map(repr, values))}")

    @property
    def busy(self) -> bool:
        return self.now < self.end_of_faults

    def odds(self, probability: float) -> bool:
        return self.busy and self.chance.random() < probability


# ---------------------------------------------------------------- the exchange

class Exchange:
    """A model of the exchange: orders, brackets, positions, fills, and a memory of how everything looked before."""
    def __init__(self, world: World, switches: Switches):
        self.world, self.switches = world, switches
        self.orders: dict[int, list[tuple[int, Order]]] = {}   # every state an order was in, and since when
        self.named: dict[str, list[int]] = defaultdict(list)
        self.fills: list[Fill] = []
        self.positions = {symbol: [(0, 0)] for symbol in SYMBOLS}
        self.legs: dict[str, list[int]] = {symbol: [] for symbol in SYMBOLS}
        self.listeners: list[Callable[[Order | Fill], None]] = []
        self.naked_since: dict[str, int] = {}
        self.naked_longest = 0   # while something could be done about it
        self.bare_at: dict[str, int] = {}  # when a position last lacked a stop
        self.pulled = 0          # when somebody pulled the kill switch
        self.clean_since = 0     # from then on: since when nothing is held and nothing rests, 0 if something does
        self.outages: list[tuple[int, int]] = []   # nothing gets through
        self.absences: list[tuple[int, int]] = []  # nobody is there
        self.on_accept: Callable[[OrderRequest], None] = lambda request: None
        self._only_orders_lag = random.Random(~world.seed).random() < 0.2  # fills and positions come from another copy of the books
        self._lag_now = self._lag_until = 0
        self._ids = itertools.count(1)

    def size(self, symbol: str) -> int:
        return self.positions[symbol][-1][1]

    def order(self, order_id: int) -> Order:
        return self.orders[order_id][-1][1]

    def live(self, symbol: str) -> list[Order]:
        return [states[-1][1] for states in self.orders.values() if states[-1][1].symbol == symbol and states[-1][1].live]

    def _put(self, order: Order) -> None:
        self.orders.setdefault(order.id, []).append((self.world.now, order))
        self.world.note("exchange", order.id, order.client_order_id, order.state, order.unfilled_size)
        self._watch(order.symbol)
        for listener in self.listeners:
            listener(order)

    def _watch(self, symbol: str) -> None:
        size = self.size(symbol)
        if self.pulled:
            self.look_whether_clean()
        covered = any((stop := self.order(leg)).live and stop.stop_order_type == "stop_loss_order" and stop.unfilled_size >= abs(size)
                      and (stop.side == "sell") == (size > 0) for leg in self.legs[symbol])
        if self.naked_since.get(symbol, self.world.now) < self.world.now:
            self.bare_at[symbol] = self.world.now
        if size and not covered:
            self.naked_since.setdefault(symbol, self.world.now)
        elif symbol in self.naked_since:
            self.look_again()
            del self.naked_since[symbol]

    def look_whether_clean(self) -> None:
        """Once the switch is pulled."""
        clean = not any(self.size(symbol) or self.live(symbol) for symbol in SYMBOLS)
        self.clean_since = (self.clean_since or self.world.now) if clean else 0

    def unreachable(self, start: int, end: int) -> int:
        """Time in which nobody could have done anything: outages, nobody there, calls that failed."""
        total, reached = 0, start
        for begin, stop in sorted((*self.outages, *self.absences)):
            if stop > reached and begin < end:
                total += min(stop, end) - max(begin, reached)
                reached = min(stop, end)
        return total

    def look_again(self) -> None:
        """Somebody has just arrived, and needs as long as anybody to see that a stop is missing."""
        for symbol, since in self.naked_since.items():
            self.naked_longest = max(self.naked_longest, self.world.now - since - self.unreachable(since, self.world.now))
            self.naked_since[symbol] = self.world.now

    def blind(self, seconds: float) -> None:
        """From now on nobody can do anything for so long."""
        self.absences.append((self.world.now, self.world.now + int(seconds * SECOND)))

    def submit(self, request: OrderRequest, stamp: int) -> Accepted | Rejected:
        """An order arrives."""
        age, switches = self.world.now // SECOND - stamp, self.switches
        if age > 5 or (age < 0 and not switches.future) or age < -5:
            return Rejected("expired_signature")
        earlier = [self.order(order_id) for order_id in self.named[request.client_order_id]]
        if earlier and (switches.repeated_name == "refused" or switches.repeated_name == "refused_while_open" and any(order.live for order in earlier)):
            return Rejected("duplicate_client_order_id")
        size = self.size(request.symbol)
        if request.reduce_only and size * (1 if request.side == "buy" else -1) >= 0:
            if switches.refuses_when_flat:
                return Rejected("no_position_for_reduce_only")
            return Accepted(self._accept(request, "cancelled"))
        if not request.reduce_only and request.stop and any(self.order(leg).live for leg in self.legs[request.symbol]):
            return Rejected("bracket_order_position_exists")
        if not request.reduce_only and self.world.odds(0.05):
            return Rejected("insufficient_margin")
        order = self._accept(request, "open")
        self._match(order.id, first=True)
        return Accepted(self.order(order.id))

    def _accept(self, request: OrderRequest, state: Any) -> Order:
        order = Order(next(self._ids), request.client_order_id, request.symbol, request.side, request.size, request.size, state, request.order_type, request.reduce_only,
                      request.limit, None, None, None, request.stop is not None, request.stop, request.target, None, self.world.now, self.world.now)
        self.named[request.client_order_id].append(order.id)
        self.on_accept(request)
        self._put(order)
        return order

    def _match(self, order_id: int, first: bool = False) -> None:
        order, chance = self.order(order_id), self.world.chance
        if not order.live:
            return
        if order.order_type == "limit_order" and first:
            if chance.random() < 0.7:
                self.world.after(chance.uniform(0.5, 12), self._match, order_id)
            return
        whole = order.reduce_only or not self.world.busy or chance.random() < 0.6
        self._fill(order_id, order.unfilled_size if whole else chance.randint(1, order.unfilled_size))
        if (order := self.order(order_id)).live:
            if order.order_type == "market_order" and chance.random() < 0.5:
                self._end(order_id)  # the rest finds nobody
            else:
                self.world.after(chance.uniform(0.1, 6), self._match, order_id)

    def _fill(self, order_id: int, size: int) -> None:
        order = self.order(order_id)
        held = self.size(order.symbol)
        signed = 1 if order.side == "buy" else -1
        if order.reduce_only:
            size = min(size, max(0, -held * signed))
            if size == 0:
                return self._end(order_id)
        left = order.unfilled_size - size
        self.positions[order.symbol].append((self.world.now, held + signed * size))
        price = PRICE[order.symbol]
        fill = Fill(f"f{len(self.fills) + 1}", str(order.id), None, order.symbol, order.side, size, price, size * price / 2_000_000, self.world.now, "taker")
        self.fills.append(fill)
        self._put(replace(order, unfilled_size=left, state="closed" if left == 0 else order.state, average_fill_price=price, updated_us=self.world.now))
        if order.bracket_order and not order.reduce_only:
            self._arm(order_id)
        if self.size(order.symbol) == 0 and not self.world.odds(0.1):
            self._drop_legs(order.symbol)
        if order.reduce_only and left and order.stop_order_type is None and self.size(order.symbol) == 0:
            self._end(order_id)
        self._watch(order.symbol)
        for listener in self.listeners:
            listener(fill)

    def _arm(self, order_id: int) -> None:
        order, legs = self.order(order_id), self.switches.legs
        if legs == "complete" and order.live or self.world.odds(0.04):  # a leg may be refused altogether
            return
        size = order.size if legs == "full" else order.filled_size
        for leg in [self.order(leg) for leg in self.legs[order.symbol] if self.order(leg).live]:
            if leg.size != size:
                self._put(replace(leg, size=size, unfilled_size=size))
        if not any(self.order(leg).live for leg in self.legs[order.symbol]):
            for kind, price in (("stop_loss_order", order.bracket_stop), ("take_profit_order", order.bracket_target)):
                leg = Order(next(self._ids), None, order.symbol, "sell" if order.side == "buy" else "buy", size, size, "pending", "market_order", True, None, None,
                            kind, price, True, None, None, None, self.world.now, self.world.now)  # type: ignore[arg-type]
                self.legs[order.symbol].append(leg.id)
                self._put(leg)

    def _drop_legs(self, symbol: str) -> None:
        for leg in self.legs[symbol]:
            self._end(leg)

    def _end(self, order_id: int) -> None:
        order = self.order(order_id)
        if order.live:
            self._put(replace(order, state="cancelled", cancellation_reason="cancelled_by_user", updated_us=self.world.now))
            if order.bracket_order and not order.reduce_only and order.filled_size:
                if self.switches.legs == "complete":
                    self._arm(order_id)
                if not self.switches.legs_stay:
                    self._drop_legs(order.symbol)

    def cancel(self, order_id: int) -> None:
        self._end(order_id)

    def trigger(self, symbol: str) -> None:
        """The market reaches one of the legs."""
        legs = [leg for leg in self.legs[symbol] if self.order(leg).live]
        if legs and self.size(symbol):
            leg = self.world.chance.choice(legs)
            self._fill(leg, self.order(leg).unfilled_size)
            self._end(leg)

    def deadman(self) -> None:
        """A heartbeat runs out."""
        for symbol in SYMBOLS:
            for order in self.live(symbol):
                if order.stop_order_type is None or not self.switches.deadman_spares_stops:
                    self._end(order.id)

    # what it answers, as it was a while ago

    def _then(self, order_id: int, moment: int) -> Order | None:
        found = None
        for since, order in self.orders[order_id]:
            if since > moment:
                break
            found = order
        return found

    def _lag(self) -> int:
        """Answers come from one copy of the exchange's books, which stays behind for a while and catches up again."""
        if self.switches.lag and self.world.now >= self._lag_until:
            self._lag_now = int(self.world.chance.choice((0.0, self.world.chance.uniform(0, self.switches.lag), self.switches.lag - 0.1)) * SECOND)
            self._lag_until = self.world.now + int(self.world.chance.uniform(5, 15) * SECOND)
        return self._lag_now

    def answer(self, question: Question) -> Answer[Any]:
        kind, about = question.key
        lag = 0 if self._only_orders_lag and kind in ("fills", "position") else self._lag()
        if kind == "position" and self.switches.position_lags:
            lag = max(lag, int(self.world.chance.uniform(0, 10) * SECOND))
        moment = self.world.now - lag
        if kind == "position":
            return Answer(Position(about, next(size for since, size in reversed(self.positions[about]) if since <= moment)))
        if kind == "fills":
            return Answer([fill for fill in self.fills if question.since_us <= fill.time_us <= moment])
        if kind == "order":
            seen = [order for order_id in self.named.get(about, ()) if (order := self._then(order_id, moment)) and (order.live or self.switches.finds_closed)]
            return Answer(seen[-1] if seen else None)
        seen = [order for order_id in self.orders if (order := self._then(order_id, moment))]
        return Answer([order for order in seen if (order.live if kind == "open" else not order.live and order.created_us >= question.since_us)])


# ---------------------------------------------------------------- the way there

class Network:
    """Loses, delays, repeats and garbles what passes between a client and the exchange."""
    def __init__(self, world: World, exchange: Exchange):
        self.world, self.exchange = world, exchange
        self.rate = world.chance.choice((0.05, 0.15, 0.3, 0.6))  # how bad this schedule is
        self.stream_rate = world.chance.choice((0.0, 0.1, 0.5, 1.0))  # 1: it says nothing at all
        for _ in range(world.chance.choice((0, 0, 1, 2))):
            begin = world.now + int(world.chance.uniform(0, 40) * SECOND)
            exchange.outages.append((begin, min(begin + int(world.chance.choice((world.chance.uniform(1, 12), world.chance.uniform(12, 30))) * SECOND), world.end_of_faults)))

    def down(self) -> bool:
        return any(begin <= self.world.now < end for begin, end in self.exchange.outages)

    def send(self, request: OrderRequest, stamp: int, reply: Callable[[Any], None]) -> None:
        """One attempt to send an order."""
        world, chance = self.world, self.world.chance
        there, back = chance.uniform(0.01, 0.3), chance.uniform(0.01, 0.3)
        if self.down():
            return world.after(there, reply, NotSent("the name could not be resolved"))
        if not world.odds(self.rate):
            return world.after(there, self._deliver, request, stamp, partial(world.after, back, reply))
        lost = Unknown("no reply within 6 seconds", stamp)
        self.exchange.blind(8)
        fault = chance.choice(("refused", "lost", "late", "reply lost", "reply lost", "503", "504", "429", "twice"))
        if fault == "refused":
            world.after(there, reply, NotSent("connection refused"))
        elif fault == "lost":
            world.after(6, reply, lost)
        elif fault == "late":
            world.after(6, reply, lost)
            world.after(chance.choice((chance.uniform(1, 7), chance.uniform(1, 30))), self._deliver, request, stamp, lambda outcome: None)
        elif fault == "reply lost":
            world.after(6, reply, lost)
            world.after(there, self._deliver, request, stamp, lambda outcome: None)
        elif fault == "twice" and self.exchange.switches.repeated_name == "refused":
            world.after(there, self._deliver_twice, request, stamp, chance.random() < 0.5, partial(world.after, back, reply))
        else:
            arrives = {"503": False, "504": self.exchange.switches.late_5xx and chance.random() < 0.7, "429": not self.exchange.switches.limited_is_refused and chance.random() < 0.7}
            if arrives.get(fault):
                world.after(there + chance.choice((0, 0, 3)), self._deliver, request, stamp, lambda outcome: None)
            world.after(there + back, reply, Unknown(f"a reply with {fault}", stamp))

    def _deliver(self, request: OrderRequest, stamp: int, reply: Callable[[Any], None]) -> None:
        outcome = self.exchange.submit(request, stamp)
        self.world.note("arrived", request.client_order_id, outcome)
        reply(outcome)

    def _deliver_twice(self, request: OrderRequest, stamp: int, first_heard: bool, reply: Callable[[Any], None]) -> None:
        """A copy of an accepted request arrives as well, and either answer may be the one that comes back."""
        first = self.exchange.submit(request, stamp)
        second = self.exchange.submit(request, stamp) if isinstance(first, Accepted) else first
        self.world.note("arrived twice", request.client_order_id, first, second)
        reply(first if first_heard else second)

    def cancel(self, order_id: int) -> None:
        if self.down() or self.world.odds(self.rate / 2):
            self.exchange.blind(3)
        else:
            self.world.after(self.world.chance.uniform(0.01, 2 if self.world.busy else 0.3), self.exchange.cancel, order_id)

    def ask(self, question: Question, reply: Callable[[Any], None]) -> None:
        chance = self.world.chance
        if self.down() or self.world.odds(self.rate / 2):
            slow, wait = chance.uniform(0.01, 3), chance.choice((0.0, 0.0, 2.0))
            self.exchange.blind(slow + max(wait, 8))  # and it will be asked again later
            return self.world.after(slow, reply, CouldNotAsk("no answer", wait))
        self.world.after(chance.uniform(0.01, 0.15), self._answer, question, reply)

    def _answer(self, question: Question, reply: Callable[[Any], None]) -> None:
        self.world.after(self.world.chance.uniform(0.01, 0.15), reply, self.exchange.answer(question))


# ---------------------------------------------------------------- the bot around the protocol

class MemoryJournal:
    """A journal that forgets at the end of the schedule, with the same chain as the one on disk."""
    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.epoch = 0

    def open(self, time_us: int) -> list[Row]:
        self.epoch += 1
        self.append([Entry("lease", str(self.epoch), {"holder": "schedule"})], time_us)
        return self.rows

    def append(self, entries: Iterable[Entry], time_us: int) -> None:
        for entry in entries:
            self.rows.append(chain(self.rows[-1].hash if self.rows else START, len(self.rows) + 1, self.epoch, time_us, entry))


class FileJournal:
    """The journal on disk, behind the same three names."""
    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal: Any = None
        self.rows: list[Row] = []

    def open(self, time_us: int) -> list[Row]:
        if self._journal is not None:
            self._journal.close()
        self._journal, self.rows = open_journal(self.path, time_us, "schedule")
        return self.rows

    def append(self, entries: Iterable[Entry], time_us: int) -> None:
        self.rows += self._journal.append(entries, time_us)

    def close(self) -> None:
        self._journal.close()


@dataclass
class Bot:
    """Carries out what the protocol says, dies now and then, and starts again from its journal."""
    world: World
    exchange: Exchange
    network: Network
    journal: Any = field(default_factory=MemoryJournal)
    plants: frozenset[str] = frozenset()  # faults of the shell
    faults: list[str] = field(default_factory=list)
    state: State | None = None
    life: int = 0
    error: int = 0                        # of its idea of the exchange's time
    steps: int = 0
    ended: dict[str, str] = field(default_factory=dict)
    pull_at: int = 0                      # the step after which somebody pulls the kill switch; 0: nobody

    def __post_init__(self) -> None:
        chance = self.world.chance
        self._deaths = {chance.randint(1, 200) for _ in range(chance.choice((0, 0, 1, 2, 4)))}
        self._boundary = 0
        self._tick_at = 0
        self._heard = 0
        self._stream = 0
        self.exchange.listeners.append(self._emit)
        self.exchange.on_accept = self._check_known
        self.start()

    def now(self) -> int:
        return self.world.now + self.error

    def start(self) -> None:
        """The one way to begin: read the journal, trust nothing, ask."""
        self.life += 1
        self.error = int(self.world.chance.uniform(-0.9, 0.9) * SECOND)
        self._heard, self._tick_at = self._stream, 0
        self.exchange.look_again()
        self.state = orders.recover(RULES, self.journal.open(self.now()), self.now())
        if self.state.books.halted != self._halt_in_rows():
            self.faults.append("the halt was forgotten")
        self.world.note("start", self.life, self.state.books.held)
        self.hear(Tick(), self.life)

    def _halt_in_rows(self) -> str:
        halts = [json.loads(row.body)["reason"] for row in self.journal.rows if row.kind == "halt"]
        return halts[-1] if halts else ""

    def die(self) -> None:
        self.world.note("dies", self.life)
        self.state, self.life = None, self.life + 1
        away = self.world.chance.uniform(0.2, 8)
        self.exchange.blind(away)
        self.world.after(away, self.start)

    def hear(self, event: Event, life: int) -> None:
        """One turn of the loop."""
        if life != self.life or self.state is None:
            return
        before = self.state
        self.state, effects = orders.step(before, event, self.now())
        self.steps += 1
        self.world.note("heard", event, effects)
        if before.books is not self.state.books:
            self.faults += orders.faults(before, effects, self.state)
            self._check_absorbing(before.books, self.state.books)
        for effect in effects:
            self._boundary += 1
            if self._boundary in self._deaths and self.world.busy:
                return self._fall(effect)
            self._do(effect, life)
        if self.steps == self.pull_at:
            self.world.after(0, kill_switch, self.world, self)
        self._set_alarm()

    def _fall(self, effect: Effect) -> None:
        if self.world.chance.random() < 0.5:  # the effect happens, its result is never heard
            self._do(effect, self.life)
        self.die()

    def _do(self, effect: Effect, life: int) -> None:
        if isinstance(effect, Record):
            self.journal.append(effect.entries, self.now())
        elif isinstance(effect, Send):
            if self.state is not None and not self.state.trusted:
                return self.world.after(0, self._reply, effect.request, life, NotSent("the exchange's time is not known"))
            request = effect.request
            if self.state is not None:
                self._check_needed(request, self.state)
            if "the stop comes later" in self.plants:
                request = replace(request, stop=None, target=None)
            if "an exit that may open" in self.plants:
                request = replace(request, reduce_only=False)
            self.network.send(request, self.now() // SECOND, partial(self._reply, effect.request, life))
        elif isinstance(effect, Cancel):
            self.network.cancel(effect.order_id)
        elif isinstance(effect, Ask):
            self.network.ask(effect.question, partial(self._answered, effect.question, life))

    def _reply(self, request: OrderRequest, life: int, outcome: Any) -> None:
        if "blind retry" in self.plants and isinstance(outcome, Unknown) and life == self.life:
            return self.network.send(request, self.now() // SECOND, partial(self._reply, request, life))
        if isinstance(outcome, Unknown) and ("a timeout is a refusal" in self.plants or "429 is a refusal" in self.plants and "429" in outcome.reason):
            outcome = Rejected("insufficient_margin")
        if isinstance(outcome, Rejected) and outcome.code == "expired_signature" and life == self.life and abs(self.error) < SECOND:
            self.error = int(self.world.chance.uniform(-0.05, 0.05) * SECOND)  # the account learns the time again
            self.exchange.blind(2.5)
        self.hear(SendResult(request.client_order_id, outcome), life)

    def _answered(self, question: Question, life: int, answer: Any) -> None:
        if "no answer is absence" in self.plants and isinstance(answer, CouldNotAsk):
            kind = question.key[0]
            answer = Answer(None if kind == "order" else Position(question.key[1], self.state.positions.get(question.key[1], 0) if self.state else 0) if kind == "position" else [])
        self.hear(Answered(question, answer), life)

    def _set_alarm(self) -> None:
        if self.state is None:
            return
        at = max(self.state.wake_us - self.error, self.world.now + SECOND // 10)
        if not self.world.now < self._tick_at <= at:
            self._tick_at = at
            self.world.at(at, self._ring, self.life, at)

    def _ring(self, life: int, at: int) -> None:
        if life == self.life and at == self._tick_at:
            self._tick_at = 0
            self.hear(Tick(), life)

    def _emit(self, news: Order | Fill) -> None:
        """The private stream: numbered, and not reliable."""
        world, rate = self.world, self.network.stream_rate
        self._stream += 1
        if self.exchange.switches.restart_sequence and world.odds(0.01):
            self._stream = 1
        if world.odds(rate if rate == 1 else rate / 2) or self.network.down():
            return self.exchange.blind(5)  # until the next listing
        for _ in range(2 if world.odds(rate / 4) else 1):
            late = world.odds(rate)
            self.exchange.blind(3 if late else 0)
            world.after(world.chance.uniform(0.01, 3 if late else 0.1), self._streamed, self._stream, news, self.life)

    def _streamed(self, number: int, news: Order | Fill, life: int) -> None:
        if self.state is None or life != self.life:
            return
        if number != self._heard + 1:
            self.hear(Gap("private", "the numbers jump"), life)
        self._heard = number
        self.hear(OrderSeen(news, None, False) if isinstance(news, Order) else FillSeen(news), life)

    # promises that only the exchange's own books can judge

    def _check_known(self, request: OrderRequest) -> None:
        if not any(row.kind == "intent" and row.key == request.client_order_id for row in self.journal.rows):
            self.faults.append(f"{request.client_order_id} was sent and is not in the journal")
        if not request.reduce_only and request.stop is None:
            self.faults.append(f"{request.client_order_id} could open a position without a stop")
        if len(self.exchange.named[request.client_order_id]) > 1:
            self.faults.append(f"{request.client_order_id} exists twice")

    def _check_needed(self, request: OrderRequest, state: State) -> None:
        """No exit for want of a stop where there was one ten seconds before the newest listing, and is."""
        bare, read = self.exchange.bare_at.get(request.symbol, 0), state.answered.get(OPEN, 0)
        covered = self.exchange.size(request.symbol) and request.symbol not in self.exchange.naked_since and read - bare > 2 * NAKED
        if covered and state.books.intents[request.client_order_id].reason == orders.NO_STOP:
            self.faults.append(f"{request.client_order_id} closes a position that had its stop all the time")

    def _check_absorbing(self, before: Books, after: Books) -> None:
        if before.intents is not after.intents:
            for name, intent in before.intents.items():
                if intent.status in FINAL and after.intents[name].status != intent.status:
                    self.faults.append(f"{name} was {intent.status} and is {after.intents[name].status}")
        if before.halted and not after.halted:
            self.faults.append("a halt cleared itself")


# ---------------------------------------------------------------- a schedule

def wish(world: World, bot: Bot) -> None:
    """What a strategy might want at any time."""
    chance = world.chance
    if bot.state is not None:
        symbol = chance.choice(SYMBOLS)
        held, price = bot.state.books.held.get(symbol, 0), PRICE[symbol]
        if held:
            order = OrderRequest("wish", symbol, "sell" if held > 0 else "buy", abs(held), reduce_only=True)
        else:
            sign, limit = chance.choice((1, -1)), chance.random() < 0.3
            order = OrderRequest("wish", symbol, "buy" if sign > 0 else "sell", chance.randint(1, 10), False, price * (100 - sign) / 100, price * (100 + 2 * sign) / 100,
                                 "limit_order" if limit else "market_order", price if limit else None)
        bot.hear(Place(order, price, "wish"), bot.life)


def disturb_clock(world: World, bot: Bot) -> None:
    """The machine's clock jumps; the bot notices, and learns the time again three seconds later."""
    if bot.state is None:
        return
    life, jump = bot.life, world.chance.choice((-10, 10)) * SECOND
    bot.error += jump
    if "an unguarded clock" not in bot.plants:
        bot.exchange.blind(3)  # nothing can be signed
        bot.hear(Clock(False), life)
        world.after(3, restore_clock, bot, life, jump)


def restore_clock(bot: Bot, life: int, jump: int) -> None:
    if bot.life == life:
        bot.error -= jump
        bot.exchange.look_again()
        bot.hear(Clock(True), life)


def play(seed: int, plants: frozenset[str] = frozenset(), log: bool = False, journal: Any = None, switch: bool = False) -> tuple[World, Exchange, Bot]:
    """A whole schedule; with `switch` somebody pulls the kill switch for certain, after any step."""
    world = World(seed, log)
    exchange = Exchange(world, switches_of(seed))
    bot = Bot(world, exchange, Network(world, exchange), journal or MemoryJournal(), plants)
    chance, start = world.chance, world.now
    moment = 2.0
    while (moment := moment + chance.uniform(1, 7)) < BUSY / SECOND:
        world.after(moment, wish, world, bot)
    for _ in range(chance.choice((0, 1, 2, 3))):
        world.after(chance.uniform(5, 48), exchange.trigger, chance.choice(SYMBOLS))
    if chance.random() < 0.15:
        world.after(chance.uniform(5, 43), exchange.deadman)
    if chance.random() < 0.15:
        world.after(chance.uniform(5, 39), disturb_clock, world, bot)
    if kill := chance.random() < 0.2 or switch:
        bot.pull_at = random.Random(~seed).randint(1, 250) if switch else 0
        world.after(43 if switch else chance.uniform(5, 43), kill_switch, world, bot)
    world.run(start + BUSY + QUIET // 4)
    while world.now < start + BUSY + QUIET and not settled(exchange, bot, kill):
        world.run(world.now + 4 * SECOND)
    judge(world, exchange, bot, kill)
    return world, exchange, bot


def settled(exchange: Exchange, bot: Bot, kill: bool) -> bool:
    """Whether nothing is left to happen, so that waiting longer would show nothing new."""
    state = bot.state
    if state is None or exchange.naked_since or state.loose or state.odd or not all(_rests(exchange, name) for name in state.books.live):
        return False
    still = {symbol: exchange.live(symbol) for symbol in SYMBOLS}
    return (len(state.books.fills) == len(exchange.fills) and all(exchange.size(symbol) == state.books.held.get(symbol, 0) for symbol in SYMBOLS)
            and not any(still[symbol] for symbol in SYMBOLS if kill or exchange.size(symbol) == 0 and not state.books.live))


def kill_switch(world: World, bot: Bot) -> None:
    """A person pulls the switch, and insists."""
    exchange = bot.exchange
    if not exchange.pulled:
        exchange.pulled = world.now
        exchange.look_whether_clean()
    if bot.state is None:
        return world.after(1, kill_switch, world, bot)
    bot.hear(Stop("the switch", flatten=True), bot.life)
    if bot.state is None and "the switch" not in bot._halt_in_rows():
        world.after(1, kill_switch, world, bot)


def judge(world: World, exchange: Exchange, bot: Bot, kill: bool) -> None:
    """Compare the bot's books with the exchange's, when all is quiet."""
    faults, state = bot.faults, bot.state
    if state is None:
        return faults.append("the bot is not running")
    books = state.books
    rows = bot.journal.rows
    again = orders.recover(RULES, rows, bot.now())
    if again.books != books:
        faults.append("the journal and the bot disagree")
    if world.seed % 16 == 0 and orders.recover(RULES, check_chain(rows), bot.now()) != again:
        faults.append("recovery depends on more than the journal")
    faults += [f"{name} is still {books.intents[name].status}" for name in books.live if not _rests(exchange, name)]
    told = {row.key: json.loads(row.body) for row in rows if row.kind == "fill"}
    truth = {fill.id: fill for fill in exchange.fills}
    faults += [f"fill {fill_id} is not in the journal" for fill_id in truth.keys() - told.keys()]
    faults += [f"fill {fill_id} is invented" for fill_id in told.keys() - truth.keys()]
    faults += [f"fill {fill_id} is wrong" for fill_id in told.keys() & truth.keys()
               if (told[fill_id]["side"], told[fill_id]["size"], told[fill_id]["symbol"]) != (truth[fill_id].side, truth[fill_id].size, truth[fill_id].symbol)]
    faults += [f"{symbol}: the exchange holds {exchange.size(symbol)}, the bot {books.held.get(symbol, 0)}" for symbol in SYMBOLS
               if exchange.size(symbol) != books.held.get(symbol, 0)]
    for name, intent in books.intents.items():
        exists = bool(exchange.named.get(name))
        faults += [f"{name} is {intent.status} and exists"] * (intent.status in DENIED and exists)
        faults += [f"{name} is {intent.status} and does not exist"] * (intent.status in ("open", "filled", "cancelled") and not exists)
    exchange.look_again()
    for symbol in SYMBOLS:
        faults += [f"{symbol} reached {size} contracts" for _, size in exchange.positions[symbol] if abs(size) > RULES.max_size[symbol]]
        faults += [f"{symbol}: legs without a position"] * (exchange.size(symbol) == 0 and any(order.stop_order_type for order in exchange.live(symbol)) and not books.live)
    if kill:
        faults += [f"{symbol} is not flat and order-free after the switch" for symbol in SYMBOLS if exchange.size(symbol) or exchange.live(symbol)]
        faults += ["the switch did not latch"] * (not books.halted)
        if (took := flattened_in(exchange)) > PROMISED:
            faults.append(f"flat and order-free only after {took / SECOND:.1f} s")
    elif books.halted:
        faults.append(f"halted: {books.halted}")
    if exchange.naked_longest > NAKED + (15 * SECOND if exchange.switches.lag else 0):  # what an old listing shows is not known to be missing
        faults.append(f"no stop for {exchange.naked_longest / SECOND:.1f} s")


def flattened_in(exchange: Exchange) -> int:
    """From the switch to the last moment at which anything was held or rested, without the time in which nobody could have done anything."""
    end = exchange.clean_since or exchange.world.now
    return end - exchange.pulled - exchange.unreachable(exchange.pulled, end)


def _rests(exchange: Exchange, name: str) -> bool:
    """A limit order may rest for ever, if the exchange says so as well."""
    return any(exchange.order(order_id).live and exchange.order(order_id).order_type == "limit_order" for order_id in exchange.named.get(name, ()))


def digest(seed: int, plants: frozenset[str] = frozenset(), switch: bool = False) -> tuple[str, int]:
    """The hash of everything that happened, and the number of lines."""
    world, _, bot = play(seed, plants, log=True, switch=switch)
    lines = world.log or []
    return hashlib.sha256("\n".join([*lines, *bot.faults]).encode()).hexdigest(), len(lines)


# ---------------------------------------------------------------- a client that tries again

class Naive:
    """What one writes first: no journal, and on an error the same request again, at most three times; then it must have failed."""
    def __init__(self, world: World, network: Network):
        self.world, self.network = world, network
        self.held = dict.fromkeys(SYMBOLS, 0)
        self.waiting: set[str] = set()
        self._names = itertools.count(1)

    def wish(self) -> None:
        symbol = self.world.chance.choice(SYMBOLS)
        if symbol in self.waiting:
            return
        held, price = self.held[symbol], PRICE[symbol]
        sign = (-1 if held > 0 else 1) if held else self.world.chance.choice((1, -1))
        size = abs(held) or self.world.chance.randint(1, 10)
        bracket = (None, None) if held else (price * (100 - sign) / 100, price * (100 + 2 * sign) / 100)
        request = OrderRequest(f"naive-{next(self._names)}", symbol, "buy" if sign > 0 else "sell", size, bool(held), *bracket)
        self.waiting.add(symbol)
        self._send(request, 3)

    def _send(self, request: OrderRequest, tries: int) -> None:
        self.network.send(request, self.world.now // SECOND, partial(self._reply, request, tries))

    def _reply(self, request: OrderRequest, tries: int, outcome: Any) -> None:
        if isinstance(outcome, Accepted):
            filled = outcome.order.filled_size if outcome.order else request.size
            self.held[request.symbol] += filled if request.side == "buy" else -filled
        elif isinstance(outcome, Unknown | NotSent) and tries > 1:
            return self.world.after(1, self._send, request, tries - 1)
        self.waiting.discard(request.symbol)


def play_naive(seed: int) -> list[str]:
    """The same weather, without a single crash; what is wrong at the end."""
    world = World(seed)
    exchange = Exchange(world, switches_of(seed))
    naive = Naive(world, Network(world, exchange))
    moment, start = 2.0, world.now
    while (moment := moment + world.chance.uniform(1, 7)) < BUSY / SECOND:
        world.after(moment, naive.wish)
    world.run(start + BUSY + QUIET)
    twice = [f"{name} exists {len(ids)} times" for name, ids in exchange.named.items() if len(ids) > 1]
    return twice + [f"{symbol}: the exchange holds {exchange.size(symbol)}, the client {held}" for symbol, held in naive.held.items() if exchange.size(symbol) != held]


# ---------------------------------------------------------------- faults planted in the protocol

def _written_late(step: Any) -> Any:
    def late(*values: Any) -> Any:
        after, effects = step(*values)
        return after, sorted(effects, key=lambda effect: isinstance(effect, Record))
    return late


def _changed_books(change: Callable[[Books], Books]) -> Callable[[Any], Any]:
    def plant(recover: Any) -> Any:
        def changed(*values: Any) -> State:
            state = recover(*values)
            state.books = change(state.books)
            return state
        return changed
    return plant


def _no_doubt(books: Books) -> Books:
    doubtful = [name for name in books.live if books.intents[name].status in DOUBTFUL]
    intents = {name: replace(intent, status="never_arrived") if name in doubtful else intent for name, intent in books.intents.items()}
    return replace(books, intents=intents, live=tuple(name for name in books.live if name not in doubtful))


def _concluded_when(enough: Callable[[State, str], bool]) -> Callable[[Any], Any]:
    def plant(conclude: Any) -> Any:
        def early(turn: Any, name: str) -> None:
            if enough(turn.state, name):
                turn.settle(name, "never_arrived")
            else:
                conclude(turn, name)
        return early
    return plant


def _over_at_once(close: Any) -> Any:
    def early(turn: Any, name: str) -> None:
        if name in turn.state.over and turn.state.books.intents[name].status == "open":
            turn.settle(name, "filled")
        else:
            close(turn, name)
    return early


def _foreign_at_once(sort: Any) -> Any:
    def hasty(turn: Any) -> None:
        turn.state.strangers = {**{fill.order_id: FOREIGN for fill in turn.state.loose}, **turn.state.strangers}
        sort(turn)
    return hasty


def _no_memory_of_fills(post_fill: Any) -> Any:
    return lambda books, fill_id, body: replace(post_fill(books, fill_id, body), fills=books.fills)


def _only_halted(blocked: Any) -> Any:
    return lambda state, symbol, now: state.books.halted


def _only_held(exposure: Any) -> Any:
    return lambda books, symbol: abs(books.held.get(symbol, 0))


SHELL = ("blind retry", "a timeout is a refusal", "429 is a refusal", "no answer is absence", "an unguarded clock", "the stop comes later", "an exit that may open")
PLANTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    **{name: {} for name in SHELL},  # these lie in what surrounds the protocol: see Bot
    "no fence": {"FENCE": lambda _: 0},
    "a fence that forgets the lag": {"FENCE": lambda _: 7 * SECOND},
    "an old listing is believed": {"LAG": lambda _: 2 * SECOND},
    "not found is failed": {"_conclude": _concluded_when(lambda state, name: ("order", name) in state.answered)},
    "one way to ask": {"_conclude": _concluded_when(lambda state, name: state.answered.get(("order", name), -1) >= state.fences.get(name, 1 << 60))},
    "sent before it is written": {"step": _written_late},
    "doubt forgotten at the start": {"recover": _changed_books(_no_doubt)},
    "numbers start again": {"recover": _changed_books(lambda books: replace(books, number=0, epoch=1))},
    "a halt forgotten at the start": {"recover": _changed_books(lambda books: replace(books, halted="", flatten=False))},
    "fills counted twice": {"intents._post_fill": _no_memory_of_fills},
    "over before its fills are known": {"_close": _over_at_once},
    "unknown fills are foreign": {"_sort_fills": _foreign_at_once},
    "nobody looks for the stop": {"_protect": lambda _: lambda turn, symbol: None},
    "entries while in doubt": {"intents.blocked": _only_halted, "intents.exposure": _only_held},
    "undocumented refusals are final": {"DEFINITE": lambda known: known | {"duplicate_client_order_id"}},
    "a lost cancel is believed": {"_may": lambda may: lambda turn, what, pause=0: what not in turn.state.tried and may(turn, what)},
}


@contextmanager
def planted(name: str) -> Iterator[frozenset[str]]:
    """The protocol with one fault."""
    places = {path: (intents if path.startswith("intents.") else orders, path.removeprefix("intents.")) for path in PLANTS[name]}
    kept = {path: getattr(*place) for path, place in places.items()}
    try:
        for path, place in places.items():
            setattr(*place, PLANTS[name][path](kept[path]))
        yield frozenset({name})
    finally:
        for path, place in places.items():
            setattr(*place, kept[path])


def caught(name: str, seeds: Iterable[int]) -> tuple[int, str] | None:
    """The first seed that shows a planted fault, and what it shows."""
    with planted(name) as plants:
        for seed in seeds:
            try:
                _, _, bot = play(seed, plants)
            except Exception as error:
                return seed, f"{type(error).__name__}: {error}"
            if bot.faults:
                return seed, bot.faults[0]
    return None


# ---------------------------------------------------------------- many

def play_many(seeds: range, switch: bool = False) -> dict[str, Any]:
    """Faults by seed, and what the schedules held."""
    found, counts = {}, Counter[str]()
    gc.collect()
    gc.disable()  # a schedule makes much that lives shortly, and few cycles
    for seed in seeds:
        try:
            _, exchange, bot = play(seed, switch=switch)
            faults = bot.faults
            counts["starts"] += len([row for row in bot.journal.rows if row.kind == "lease"])
            counts["rows"] += len(bot.journal.rows)
            counts["fills"] += len(exchange.fills)
            counts["steps"] += bot.steps
            counts.update(f"orders {intent.status}" for intent in (bot.state.books.intents.values() if bot.state else ()))
        except Exception as error:
            faults = [f"{type(error).__name__}: {error}"]
        if faults:
            found[seed] = faults
    gc.enable()
    return {"seeds": len(seeds), "faults": found, "counts": counts}


def play_all(first: int, seeds: int, processes: int | None = None, each: Callable[[dict[str, Any]], None] = lambda part: None, switch: bool = False) -> dict[str, Any]:
    """Many seeds on all processors."""
    chunk = max(1, min(250, seeds // 8))
    parts = [range(start, min(start + chunk, first + seeds)) for start in range(first, first + seeds, chunk)]
    total: dict[str, Any] = {"seeds": 0, "faults": {}, "counts": Counter()}
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count()) as pool:
        for part in pool.imap(partial(play_many, switch=switch), parts):
            total["seeds"] += part["seeds"]
            total["faults"] |= part["faults"]
            total["counts"] += part["counts"]
            each(total)
    return total


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Play seeded schedules of faults against the order protocol.")
    parser.add_argument("--seeds", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    parser.add_argument("--plant", choices=sorted(PLANTS), help="with one fault planted: how soon is it found?")
    parser.add_argument("--naive", action="store_true", help="the client that tries again")
    parser.add_argument("--switch", action="store_true", help="somebody pulls the kill switch, after any step")
    parser.add_argument("--log", action="store_true", help="print everything that happens")
    chosen = parser.parse_args(arguments)
    seeds, began = range(chosen.first, chosen.first + chosen.seeds), time.monotonic()
    if chosen.plant:
        found = caught(chosen.plant, seeds)
        print(f"{chosen.plant}: {f'seed {found[0]}: {found[1]}' if found else 'not found'}")
        return 0 if found else 1
    if chosen.naive:
        print(f"the naive client is wrong in {sum(bool(play_naive(seed)) for seed in seeds)} of {chosen.seeds} schedules")
        return 0
    if chosen.log:
        for seed in seeds:
            world, _, bot = play(seed, log=True, switch=chosen.switch)
            print(f"seed {seed} {switches_of(seed)}", *(world.log or []), *bot.faults, f"sha256 {digest(seed, switch=chosen.switch)[0]}", sep="\n")
        return 0
    def show(total: dict[str, Any]) -> None:
        if sys.stderr.isatty():
            print(f"\r{total['seeds']:,} of {chosen.seeds:,}, {len(total['faults'])} wrong", end="", file=sys.stderr, flush=True)
    total = play_all(chosen.first, chosen.seeds, each=show, switch=chosen.switch)
    print(f"\n{total['seeds']:,} schedules in {time.monotonic() - began:.0f} s, {COMBINATIONS:,} combinations of P1 to P12: {len(total['faults'])} wrong")
    print(", ".join(f"{count:,} {name}" for name, count in sorted(total["counts"].items())))
    for seed, faults in list(total["faults"].items())[:20]:
        print(f"  seed {seed}: {'; '.join(faults[:3])}   (python -m tests.schedules --first {seed} --seeds 1 --log{' --switch' * chosen.switch})")
    return 1 if total["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
