"The stream: what its messages mean, when its line is given up, and real sockets that drop, double, reorder, go silent and cut frames."
import contextlib
import json
import logging
import queue
import random
import socket
import threading
import time
import zlib
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.sync.server import serve

from delta_go.domain import InputError
from delta_go.live.exchange import Credentials, sign
from delta_go.live.stream import (
    APART,
    SILENCE,
    Line,
    Listening,
    Senses,
    Stream,
    channels,
    happening_in,
    login,
    refused_in,
    step_line,
)
from delta_go.trading.news import (
    Bars,
    Book,
    Books,
    CandleClosed,
    Feed,
    FillSeen,
    Gap,
    Live,
    Numbering,
    OrderSeen,
    PositionSeen,
    PriceSeen,
    StatusSeen,
)
from tests.waiting import SOON, wait_for

KEY, SECRET = "key-7f3a0191c2", "secret-5d1e77a04bb9"
NOW_US = 1_790_000_000_000_000
TRADE = {"type": "v2/user_trades", "sy": "BTCUSD", "f": "f-1", "R": "normal", "o": 9001, "S": "buy", "s": 3, "p": "60010.5", "po": 3, "r": "taker", "c": "dg-17", "t": NOW_US, "se": 4}
ORDER = {"type": "orders", "action": "update", "reason": "fill", "order_id": 9001, "client_order_id": "dg-17", "symbol": "BTCUSD", "product_id": 27, "size": 3, "unfilled_size": 0, "average_fill_price": "60010.5",
         "side": "buy", "state": "closed", "stop_order_type": None, "bracket_order": True, "bracket_stop_loss_price": "59000", "seq_no": 4, "timestamp": NOW_US}


# ---- numberings ---------------------------------------------------------------------------------------------------------------

@settings(max_examples=150)
@given(st.integers(3, 25), st.randoms(use_true_random=False))
def test_every_lost_number_is_noticed_and_no_fill_is_dropped(count, chance):
    arriving = [number for number in range(1, count) if chance.random() > .1] + [count]
    doubled = arriving + [number for number in arriving if chance.random() < .1]
    order = sorted(doubled, key=lambda number: number + chance.choice([0, 0, 0, 1.5, 2.5]))
    feed, fills, gaps = Feed("private", 60), set(), 0
    for number in order:
        for event in feed.hear(TRADE | {"se": number, "f": f"f-{number}", "t": NOW_US + number}):
            fills |= {event.fill.id} if isinstance(event, FillSeen) else set()
            gaps += isinstance(event, Gap)
    assert fills == {f"f-{number}" for number in arriving}
    lost = set(range(order[0], count + 1)) - set(arriving)
    assert gaps >= (len(lost) > 0)
    if not lost and order == sorted(order):
        assert gaps == 0


def test_a_restart_is_told_from_a_double():
    story = Numbering()
    assert [story.take(number, at) for number, at in ((500, 10), (501, 11), (500, 10), (1, 20), (2, 21), (2, 21), (5, 30), (3, 22), (501, 40))] == [
        "first", "next", "duplicate", "reset", "next", "duplicate", "jump", "late", "jump"]


def simulate(seed):
    "Our orders over a bad wire; the listener asks REST at every gap. What it believes in the end, and the truth."
    chance = random.Random(seed)
    changes, believed, feed, wire, number = [], {}, Feed("private", 60), [], 0
    restarts = {moment for moment in range(40) if chance.random() < .03}   # nothing from before one arrives after it
    for moment in range(40):
        changes.append((moment, chance.randrange(4)))
        number = 1 if moment in restarts else number + 1
        sent = ORDER | {"order_id": changes[-1][1], "size": 100, "unfilled_size": moment, "state": "open", "seq_no": number, "timestamp": NOW_US + moment}
        steady = not restarts & set(range(moment, moment + 4))
        if moment in restarts or chance.random() > .1:
            wire += [(moment + (chance.choice([0, 0, 0, 1.5, 3.5]) if steady else 0), sent) for _ in range(1 + (chance.random() < .1))]
    wire.append((60, ORDER | {"order_id": 99, "seq_no": number + 1, "timestamp": NOW_US + 60}))
    for at, message in sorted(wire, key=lambda item: item[0]):
        for event in feed.hear(message):
            if isinstance(event, Gap) or not believed:
                believed = {which: moment for moment, which in changes if moment <= at}
            elif isinstance(event, OrderSeen) and event.order.id != 99:
                believed[event.order.id] = max(event.order.unfilled_size, believed.get(event.order.id, -1))
    return believed, {which: moment for moment, which in changes}


def test_what_is_believed_equals_the_truth_after_any_wire():
    assert [seed for seed in range(400) if (pair := simulate(seed))[0] != pair[1]] == []


@pytest.mark.slow
def test_what_is_believed_equals_the_truth_after_many_wires():
    assert [seed for seed in range(5000) if (pair := simulate(seed))[0] != pair[1]] == []


# ---- books --------------------------------------------------------------------------------------------------------------------

def levels(first, step, size, count, up=True):
    return [(str(Decimal(first) + Decimal(step) * row * (1 if up else -1)), str(size + row)) for row in range(count)]


def test_the_sheets_checksums():
    book = Book()
    book.change([("60000.5", "120"), ("60001.0", "75"), ("60002.0", "300")], [("60000.0", "90"), ("59999.5", "210"), ("59998.0", "15")])
    assert book.checksum() == 2304673843
    book.change([("60000.5", "0"), ("60001.0", "80"), ("60003.5", "44")], [("60000.5", "33")])
    assert book.checksum() == 1573940917
    book.change([], [(price, "0") for price in ("60000.5", "60000.0", "59999.5", "59998.0")])
    assert book.checksum() == 3997956287 and book.best() == (None, (Decimal("60001.0"), 80))
    deep = Book()
    deep.change(levels("60000.5", "0.5", 10, 12), levels("60000.0", "0.5", 20, 12, up=False))
    assert deep.checksum() == 777864882


@settings(max_examples=50)
@given(st.lists(st.lists(st.tuples(st.booleans(), st.integers(90, 110), st.integers(0, 3)), max_size=5), min_size=1, max_size=20), st.integers(0, 19), st.sampled_from(["none", "lose", "spoil", "double"]))
def test_a_book_is_right_or_not_told(updates, where, fault):
    model, books, told = {True: {}, False: {}}, Books(), []
    for number, changes in enumerate([[], *updates]):
        for ask, price, size in changes:
            model[ask][price] = size
        sides = [{price: size for price, size in model[ask].items() if size} for ask in (True, False)]
        text = "|".join(",".join(f"{price}:{side[price]}" for price in sorted(side, reverse=rising)[:10]) for side, rising in zip(sides, (False, True)))
        message = {"sy": "BTCUSD", "ts": number, "seq": number + 7, "cs": zlib.crc32(text.encode()), "action": "update" if number else "snapshot",
                   "a": [[str(price), str(size)] for ask, price, size in changes if ask], "b": [[str(price), str(size)] for ask, price, size in changes if not ask]}
        if number == where + 1 and fault == "lose":
            continue
        if number == where + 1 and fault == "spoil":
            message["cs"] ^= 1
        for _ in range(1 + (number == where + 1 and fault == "double")):
            events = books.hear(message)
            told += events
            for event in events:
                if not isinstance(event, Gap):
                    assert event.ask == (min(sides[0].items()) if sides[0] else None) and event.bid == (max(sides[1].items()) if sides[1] else None)
    gaps = [event for event in told if isinstance(event, Gap)]
    hit = where + 1 <= len(updates) - (fault == "lose")
    assert len(gaps) == (fault in ("lose", "spoil") and hit)
    assert bool(books.lost) == bool(gaps)


def test_a_lost_book_is_stale_until_it_comes_whole():
    feed, whole = Feed("public", 60), {"type": "ob_updates", "action": "snapshot", "sy": "BTCUSD", "ts": 1, "seq": 5, "a": [["2", "1"]], "b": [], "cs": zlib.crc32(b"2:1|")}
    assert feed.hear(whole)[0].ask == (2, 1) and feed.stale == []
    assert isinstance(feed.hear({"type": "ob_updates", "action": "error", "symbol": "BTCUSD", "msg": "try again"})[0], Gap)
    assert feed.stale == [("ob_updates", "BTCUSD")] and feed.hear(whole | {"action": "update", "seq": 6}) == []
    assert feed.hear(whole | {"seq": 9})[0].ask == (2, 1) and feed.stale == []


# ---- candles ------------------------------------------------------------------------------------------------------------------

def candle(time, close=5.0, symbol="BTCUSD"):
    return CandleClosed(symbol, 60, time, 5.0, 6.0, 4.0, close, 1.0)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 40), st.booleans()), max_size=40))
def test_each_bar_is_told_once_in_order_and_over(events):
    bars, now, told = Bars(60), 0, []
    for bar, later, ticks in events:
        now += later
        heard = bars.tick(now) if ticks else bars.hear(candle(bar * 60, close=float(now + 1)))
        told += heard
        assert not ticks or all(bar.time + 62 <= now for bar in heard)
    assert [bar.time for bar in told] == sorted({bar.time for bar in told})


def test_a_bar_with_a_gap_in_it_is_not_told():
    feed = Feed("public", 60)
    assert feed.hear({"type": "candlestick_1m", "sy": "BTCUSD", "res": "1m", "ts": 90_000_000, "o": 5, "h": 6, "l": 4, "c": 5, "v": 1}) == []
    feed.forget()
    assert feed.tick(500) == []


def test_both_dialects_of_candles():
    short = {"type": "candlestick_1m", "sy": "BTCUSD", "res": "1m", "ts": 119_999_999, "o": 5, "h": 6, "l": 4, "c": 5, "v": 7}
    long = {"type": "candlestick_1m", "symbol": "BTCUSD", "resolution": "1m", "candle_start_time": 60_000_000, "open": 5, "high": 6, "low": 4, "close": 5, "volume": 7, "timestamp": 1}
    for message in (short, long):
        feed = Feed("public", 60)
        assert feed.hear(message) == [] and feed.tick(121.9) == []
        assert feed.tick(122) == [CandleClosed("BTCUSD", 60, 60, 5, 6, 4, 5, 7)]
    assert isinstance(Feed("public", 60).hear(short | {"c": float("nan")})[0], Gap)


# ---- messages -----------------------------------------------------------------------------------------------------------------

def test_private_messages():
    feed = Feed("private", 60)
    snapshot = {"type": "orders", "action": "snapshot", "symbol": "BTCUSD", "success": True, "meta": {"seq_no": 9, "timestamp": NOW_US},
                "result": [{"id": 1, "side": "sell", "size": 3, "unfilled_size": 3, "state": "pending", "stop_order_type": "stop_loss_order", "stop_price": "59000", "reduce_only": True}]}
    (stop,) = feed.hear(snapshot)
    assert stop.snapshot and stop.order.stop_price == 59000 and stop.order.reduce_only and stop.order.live
    assert feed.hear(ORDER | {"seq_no": 10, "timestamp": NOW_US + 1})[0].order.filled_size == 3
    jump = feed.hear(ORDER | {"seq_no": 13, "timestamp": NOW_US + 2})
    assert isinstance(jump[0], Gap) and isinstance(jump[1], OrderSeen) and feed.stale == [("orders", "BTCUSD")]
    assert feed.hear(ORDER | {"seq_no": 12, "timestamp": NOW_US + 1}) == [], "an old state"
    feed.hear(snapshot | {"meta": {"seq_no": 20, "timestamp": NOW_US + 3}})
    assert feed.stale == []
    assert feed.hear({"type": "positions", "action": "update", "symbol": "BTCUSD", "size": -3, "entry_price": "60000", "margin": "12"})[0].position.size == -3
    assert feed.hear({"type": "positions", "action": "delete", "symbol": "BTCUSD"}) == [PositionSeen(replace(feed.hear({"type": "positions", "action": "update", "symbol": "BTCUSD", "size": 0})[0].position))]
    assert feed.hear({"type": "system_status", "event": "snapshot", "status": "maintenance"}) == [StatusSeen(None, "maintenance")]
    assert feed.hear({"type": "product_updates", "event": "market_disruption", "product": {"id": 27, "symbol": "BTCUSD", "trading_status": "disrupted_cancel_only"}}) == [StatusSeen("BTCUSD", "disrupted_cancel_only")]
    assert feed.hear({"type": "something new"}) == []


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["p", "sy", "meta", "seq_no"]), inner, max_size=3), max_leaves=5)
MESSAGES = [TRADE, ORDER, {"type": "ticker", "ts": 1, "d": [{"s": "BTCUSD", "m": "1", "ohlc": [1, 1, 1, 1], "q": ["2", "1", "1", "1", None]}]}, {"type": "mark_price", "sy": "MARK:BTCUSD", "p": "1", "ts": 1},
            {"type": "candlestick_1m", "sy": "BTCUSD", "res": "1m", "ts": 1, "o": 5, "h": 6, "l": 4, "c": 5, "v": 7}, {"type": "positions", "action": "snapshot", "result": [{"symbol": "BTCUSD", "size": 1}]},
            {"type": "ob_updates", "action": "snapshot", "sy": "BTCUSD", "ts": 1, "seq": 5, "a": [["2", "1"]], "b": [], "cs": 1}, {"type": "system_status", "status": "live"}]


@settings(max_examples=120)
@given(st.sampled_from(MESSAGES).flatmap(lambda message: st.tuples(st.just(message), st.sampled_from(list(message)))), JSON)
def test_no_message_breaks_the_feed(where, value):
    message, name = where
    feed = Feed("public", 60)
    feed.hear(message)
    events = feed.hear(message | {name: value})
    feed.tick(1e12)
    assert all(not isinstance(event, PriceSeen) or event.mark.is_finite() for event in events)
    assert {channel for channel, _ in feed.stale} <= {"ob_updates", "orders"}


# ---- the line -----------------------------------------------------------------------------------------------------------------

@settings(max_examples=60)
@given(st.booleans(), st.lists(st.tuples(st.sampled_from(["tick", "tick", "tick", "opened", "login", "subscribed", "heartbeat", "pong", "lost", "too_often"]), st.floats(0, 40), st.floats(0, 1)), max_size=200))
def test_the_line_keeps_its_promises(private, happenings):
    line, now, connects, told = Line(private), 0.0, [], []
    for what, later, chance in happenings:
        now += later / 4
        if what == "opened" and line.phase != "connecting" or what in ("login", "subscribed") and line.phase != "login":
            continue
        line, doing = step_line(line, what, now, chance, "why")
        connects += [now] * ("connect" in doing)
        told += [(word, line.reason if word == "tell_gap" else "") for word in doing if word.startswith("tell")]
        assert "close" not in doing or line.phase == "waiting" and line.due >= now
        assert "subscribe" not in doing or line.phase == ("live" if private else "login")
        assert "tell_live" not in doing or what == ("login" if private else "subscribed")
        assert len(line.connects) <= 200
    assert all(second - first >= APART for first, second in zip(connects, connects[1:]))
    assert all(first != second for first, second in zip(told, told[1:])), "the same is never told twice in a row"


def test_a_line_that_dies_at_once_never_comes_near_the_limit():
    line, now, connects = Line(False), 0.0, []
    while now < 3000:
        line, doing = step_line(line, "tick", now, 0.0)
        if "connect" in doing:
            connects.append(now)
            line, _ = step_line(line, "opened", now, 0.0)
            line, _ = step_line(line, "subscribed", now, 0.0)
            line, _ = step_line(line, "lost", now + (70 if len(connects) % 2 else 0), 0.0)
            now += 70 if len(connects) % 2 else 0
        now += .25
    assert max(sum(at <= other < at + 300 for other in connects) for at in connects) <= 100
    quick = Line(False, connects=tuple(float(second) for second in range(100)))
    assert step_line(quick, "lost", 100.0, 0.0)[0].due == 300.0


def test_after_a_refusal_for_haste_it_stays_away_for_five_to_ten_minutes():
    dues = [step_line(replace(Line(True), phase="connecting"), "too_often", 50.0, chance)[0].due - 50 for chance in (0.0, 1.0)]
    assert dues == [300, 600]


def test_silence_is_noticed():
    deaf, doing = step_line(replace(Line(False), phase="connecting"), "opened", 0.0, 0.0)
    assert doing == ("greet", "subscribe") and step_line(deaf, "tick", 10.1, 0.0)[0].reason == "no answer to the subscription for 10 s"
    line, doing = step_line(deaf, "subscribed", 0.0, 0.0)
    assert doing == ("tell_live",)
    line, doing = step_line(line, "tick", 30.0, 0.0)
    assert doing == ("ping",)
    answered, _ = step_line(line, "pong", 30.1, 0.0)
    beaten, _ = step_line(line, "heartbeat", 34.0, 0.0)
    assert step_line(beaten, "tick", 35.0, 0.0)[1] == () and step_line(beaten, "tick", 35.1, 0.0)[0].reason == "no pong for 5 s"
    assert step_line(answered, "tick", SILENCE, 0.0)[1] == () and step_line(answered, "tick", SILENCE + .1, 0.0)[0].reason == "no heartbeat for 35 s"
    beating, _ = step_line(answered, "heartbeat", 34.0, 0.0)
    assert step_line(beating, "tick", 59.0, 0.0)[1] == ()
    waiting, _ = step_line(replace(Line(True), phase="connecting"), "opened", 0.0, 0.0)
    assert step_line(waiting, "tick", 10.1, 0.0)[0].reason.startswith("no answer to the login")


# ---- real sockets -------------------------------------------------------------------------------------------------------------

class Theatre:
    "A real server; each connection plays the next scene."
    def __init__(self, *scenes):
        self.scenes, self.heard, self.opened = list(scenes), [], []
        self.server = serve(self.act, "127.0.0.1", 0, process_request=self.door)
        self.refusals = 0
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"ws://127.0.0.1:{self.server.socket.getsockname()[1]}"

    def door(self, connection, _):
        self.opened.append(time.monotonic())
        if self.refusals:
            self.refusals -= 1
            return connection.respond(429, "too often\n")

    def act(self, connection):
        connection.scene = self.scenes.pop(0) if self.scenes else idle
        with contextlib.suppress(Exception):
            connection.scene(self, connection)

    def read(self, connection, count=1):
        for _ in range(count):
            self.heard.append(json.loads(connection.recv(timeout=SOON)))
        return self.heard[-1]


def say(connection, *messages):
    for message in messages:
        connection.send(message if isinstance(message, str | bytes) else json.dumps(message))


def idle(theatre, connection):
    while True:
        message = theatre.read(connection)
        if message["type"] == "subscribe":
            say(connection, {"type": "subscriptions", "channels": []})
        if message["type"] == "ping":
            say(connection, {"type": "pong"}, {"type": "heartbeat"})
        if message["type"] == "key-auth":
            say(connection, {"type": "key-auth", "success": True, "status_code": 200, "status": "authenticated"})


@pytest.fixture
def listen():
    made = []

    def begin(theatre, house="private", speed=1.0, books=False, **world):
        events = queue.Queue()
        senses = Senses(lambda: speed * time.monotonic(), world.get("exchange_now", lambda: time.time() + 10), lambda: .0, time.sleep)
        stream = Stream(Listening(house, theatre.url, ("BTCUSD",), "1m", Credentials(KEY, SECRET) if house == "private" else None, books), senses, events)
        made.append((theatre, stream))
        stream.start()
        return events, stream
    yield begin
    for theatre, stream in made:
        stream.stop()
        assert not stream._thread.is_alive()
        theatre.server.shutdown()


def take(events, count, timeout=SOON):
    return [events.get(timeout=timeout) for _ in range(count)]


def enter(theatre, connection):
    theatre.read(connection, 2)
    say(connection, {"type": "key-auth", "success": True, "status_code": 200, "status": "authenticated"})
    theatre.read(connection)


def test_login_with_exchange_time_then_subscriptions(listen):
    def scene(theatre, connection):
        enter(theatre, connection)
        say(connection, {"type": "subscriptions", "channels": [{"name": "orders", "symbols": ["BTCUSD"]}]}, TRADE, ORDER)
        idle(theatre, connection)
    theatre = Theatre(scene)
    began = time.time()
    events, _ = listen(theatre)
    live, fill, order = take(events, 3)
    assert live == Live("private") and fill.fill.client_order_id == order.order.client_order_id == "dg-17"
    first, second, third = theatre.heard[:3]
    at = second["payload"]["timestamp"]
    assert first == {"type": "enable_heartbeat"} and second["payload"]["signature"] == sign(SECRET, "GET", at, "/live") and began + 9 <= at <= time.time() + 10
    assert [entry["name"] for entry in third["payload"]["channels"]] == ["orders", "positions", "v2/user_trades"]


def test_doubled_lost_reordered_and_restarted(listen):
    numbers = [(1, 0), (2, 1), (2, 1), (5, 4), (4, 3), (6, 5), (1, 9), (2, 10)]
    def scene(theatre, connection):
        enter(theatre, connection)
        say(connection, *(TRADE | {"se": number, "f": f"f{later}", "t": NOW_US + later} for number, later in numbers))
        idle(theatre, connection)
    events, _ = listen(Theatre(scene))
    told = take(events, 10)[1:]
    assert [event.reason.split(": ")[1] if isinstance(event, Gap) else event.fill.id for event in told] == ["f0", "f1", "numbers jump to 5", "f4", "f3", "f5", "numbers reset to 1", "f9", "f10"]


def test_an_order_gap_brings_a_fresh_picture(listen):
    def scene(theatre, connection):
        enter(theatre, connection)
        say(connection, ORDER, ORDER | {"seq_no": 9, "timestamp": NOW_US + 1})
        assert [theatre.read(connection)["type"], theatre.read(connection)["type"]] == ["unsubscribe", "subscribe"]
        say(connection, {"type": "orders", "action": "snapshot", "symbol": "BTCUSD", "meta": {"seq_no": 30, "timestamp": NOW_US + 2}, "result": []}, ORDER | {"seq_no": 31, "timestamp": NOW_US + 3})
        idle(theatre, connection)
    events, stream = listen(Theatre(scene))
    live, first, gap, second, third = take(events, 5)
    assert isinstance(gap, Gap) and gap.symbol == "BTCUSD" and third.order.id == 9001
    assert stream._feed.stale == [] and events.empty()


def test_a_frame_cut_in_the_middle(listen):
    def scene(theatre, connection):
        enter(theatre, connection)
        say(connection, TRADE)
        connection.socket.sendall(b"\x81\x7e\x10\x00" + b'{"type":"v2/user_trades","sy"')
        connection.socket.shutdown(socket.SHUT_RDWR)
    theatre = Theatre(scene)
    events, _ = listen(theatre)
    live, fill, gap, again = take(events, 4)
    assert isinstance(fill, FillSeen) and gap.reason.startswith("connection lost") and again == Live("private")
    assert theatre.opened[1] - theatre.opened[0] >= 2 - .05


@pytest.mark.parametrize("ending", ["close", "reset", "garbage"])
def test_lost_connections_are_told_once(listen, ending):
    def scene(theatre, connection):
        enter(theatre, connection)
        if ending == "garbage":
            connection.socket.sendall(b"HTTP/1.1 200 OK\r\n\r\n" * 4)
        connection.socket.close() if ending == "reset" else connection.close(1012, "restart")
    events, stream = listen(Theatre(scene), speed=20.0)
    told = take(events, 3)
    assert [type(event) for event in told] == [Live, Gap, Live]
    time.sleep(.2)
    assert events.empty()


def test_silence_is_a_gap_and_noise_without_heartbeats_is_silence(listen):
    def silent(theatre, connection):
        enter(theatre, connection)
        time.sleep(3)
    def noisy(theatre, connection):
        enter(theatre, connection)
        for _ in range(300):
            say(connection, {"type": "pong"})
            time.sleep(.01)
    events, _ = listen(Theatre(silent, noisy), speed=100.0)
    told = take(events, 5)
    assert [type(event) for event in told] == [Live, Gap, Live, Gap, Live]
    assert told[1].reason.startswith("no ") and told[3].reason == "no heartbeat for 35 s"


def test_a_refused_login_is_told_once_with_its_reason_and_tried_again(listen):
    def scene(theatre, connection):
        theatre.read(connection, 2)
        say(connection, {"type": "key-auth", "success": False, "status_code": 404, "status": f"api_key_not_found {KEY}"})
        idle(theatre, connection)
    theatre = Theatre(scene, scene)
    events, _ = listen(theatre, speed=50.0)
    gap, live = take(events, 2)
    assert gap == Gap("private", "login refused: api_key_not_found *** (404)") and live == Live("private") and len(theatre.opened) == 3


def test_nobody_there_and_no_time_are_gaps(listen):
    with socket.create_server(("127.0.0.1", 0)) as dead:
        port = dead.getsockname()[1]
    theatre = Theatre()
    theatre.url, url = f"ws://127.0.0.1:{port}", theatre.url
    events, _ = listen(theatre)
    assert events.get(timeout=SOON).reason.startswith("connection lost (ConnectionRefused")
    theatre.url = url
    events, _ = listen(theatre, exchange_now=lambda: None)
    assert events.get(timeout=SOON) == Gap("private", "the exchange's time is not known")


def test_a_refusal_for_haste_waits_minutes(listen):
    theatre = Theatre()
    theatre.refusals = 1
    events, stream = listen(theatre, house="public", speed=250.0)
    gap, live = take(events, 2)
    assert gap.reason == "refused with 429" and live == Live("public")
    assert (theatre.opened[1] - theatre.opened[0]) * 250 >= 300


def test_hostile_frames_and_refused_channels(listen):
    def scene(theatre, connection):
        theatre.read(connection, 2)
        say(connection, "not JSON", b"\x00\x01", "[1]", "null", "[" * 100_000, "{}", {"type": 7}, {"type": "subscriptions", "channels": [{"name": "ticker", "error": "subscription forbidden on this invalid channel"}, 3]},
            {"type": "mark_price", "sy": "MARK:BTCUSD", "p": "NaN", "ts": 1}, {"type": "mark_price", "sy": "MARK:BTCUSD", "p": "60000.5", "ts": 1})
        idle(theatre, connection)
    events, _ = listen(Theatre(scene), house="public")
    live, refused, unreadable, price = take(events, 4)
    assert "invalid channel" in refused.reason and unreadable.symbol == "BTCUSD" and price.mark == Decimal("60000.5")


def test_a_book_that_does_not_match_is_asked_for_again(listen):
    whole = {"type": "ob_updates", "action": "snapshot", "sy": "BTCUSD", "ts": 1, "seq": 5, "a": [["2", "1"]], "b": [], "cs": zlib.crc32(b"2:1|")}
    def scene(theatre, connection):
        theatre.read(connection, 2)
        say(connection, {"type": "subscriptions", "channels": []}, whole, whole | {"action": "update", "seq": 6, "cs": 1}, whole | {"action": "update", "seq": 7})
        theatre.read(connection, 2)
        say(connection, whole | {"seq": 40})
        idle(theatre, connection)
    theatre = Theatre(scene)
    events, _ = listen(theatre, house="public", books=True)
    assert [type(event).__name__ for event in take(events, 4)] == ["Live", "BookSeen", "Gap", "BookSeen"]
    assert theatre.heard[2]["payload"]["channels"] == [{"name": "ob_updates", "symbols": ["BTCUSD"]}]


def test_key_and_secret_appear_nowhere(listen, caplog):
    caplog.set_level(logging.DEBUG)
    def scene(theatre, connection):
        enter(theatre, connection)
        connection.socket.close()
    logging.getLogger("websockets.server").setLevel(logging.CRITICAL)
    events, stream = listen(Theatre(scene), speed=20.0)
    told = take(events, 3)
    text = repr(told) + repr(stream._to) + repr(stream.line) + caplog.text
    assert KEY not in text and SECRET not in text


def test_old_prices_are_dropped_when_nobody_reads_and_nothing_else_is(monkeypatch, listen):
    monkeypatch.setattr("delta_go.live.stream.CROWDED", 5)
    def scene(theatre, connection):
        theatre.read(connection, 2)
        say(connection, *({"type": "mark_price", "sy": "MARK:BTCUSD", "p": "1", "ts": 1} for _ in range(50)), {"type": "system_status", "status": "maintenance"})
        idle(theatre, connection)
    events, _ = listen(Theatre(scene), house="public")
    assert wait_for(lambda: StatusSeen(None, "maintenance") in events.queue) and events.qsize() < 10


@pytest.mark.parametrize("change, words", [(dict(url="https://x"), "wss://"), (dict(house="private"), "expected a key"), (dict(resolution="7d"), "resolution")])
def test_mistakes_are_named(change, words):
    with pytest.raises(InputError, match=words):
        Listening(**({"house": "public", "url": "ws://127.0.0.1:1", "symbols": ("BTCUSD",), "resolution": "1m"} | change))


def test_words():
    assert login(Credentials("k", "emulator-secret-0001"), 1_700_000_000)["payload"]["signature"] == "7eaebebeb7fd9e3ab2b04b5e418a053ef6db9ab8461ddeb949d4c809b7b97ff4"
    assert channels("public", ["BTCUSD"], "1h", books=True)[-1] == {"name": "ob_updates", "symbols": ["BTCUSD"]}
    assert happening_in({"type": "error", "message": "Subscription forbidden: Invalid channel array"})[0] == "lost"
    assert refused_in({"type": "subscriptions"}) == []


def test_a_new_reason_is_told_an_old_one_is_not():
    line, doing = step_line(replace(Line(True), phase="live"), "lost", 0.0, 0.0, "connection lost")
    assert "tell_gap" in doing
    line, doing = step_line(line, "lost", 9.0, 0.0, "login refused")
    assert "tell_gap" in doing
    assert "tell_gap" not in step_line(line, "lost", 19.0, 0.0, "login refused")[1]
