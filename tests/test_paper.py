"The paper exchange against a source: another emulator that plays the live exchange, over real HTTP and WebSockets, twenty times as fast."
import contextlib
import hashlib
import hmac
import json
import math
import time as timer
from dataclasses import replace

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta_go.domain import DeltaGoError, InputError
from delta_go.live.emulator import running
from delta_go.live.exchange import fetch_candles
from delta_go.live.faults import make_script
from delta_go.live.matching import place, play
from delta_go.live.pace import FIRST_USER, Setup
from delta_go.live.paper import ACCOUNT, Track, paper_exchange, play_on, rate_at, take_news
from delta_go.market.accounts import Ticket, open_account, open_exchange
from delta_go.market.replay import Bar
from delta_go.market.store import FUNDING_STEP, Funding, write_candles, write_funding
from delta_go.market.candles import Candles
from tests.waiting import wait_for

FAST, KEY, SECRET = 20.0, "emulator-key", "emulator-secret-0001"
SYMBOLS = ("BTCUSD", "ETHUSD")


class Clock:
    "A clock that runs fast, from a moment just after the start of a minute."

    def __init__(self, at):
        self.at, self.began = at, timer.monotonic()

    def __call__(self):
        return self.at + (timer.monotonic() - self.began) * FAST


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A saw of prices, in minutes: every bar goes 40 dollars down and 50 up, or the other way round, on the tick."
    place_, times = tmp_path_factory.mktemp("saw"), np.arange(0, 40 * 3600, 60, dtype=np.int64)
    for symbol, level in (("BTCUSD", 60_000.0), ("ETHUSD", 3_000.0)):
        scale = level / 60_000.0
        close = level + scale * 10.0 * np.round(20 * np.sin(np.arange(len(times)) / 7))
        open_ = np.concatenate([[level], close[:-1]])
        write_candles(place_, Candles(symbol, 60, times, open_, np.maximum(open_, close) + 40 * scale, np.minimum(open_, close) - 40 * scale, close, np.full(len(times), 600.0)))
        write_funding(place_, Funding(symbol, np.arange(0, 40 * 3600, FUNDING_STEP, dtype=np.int64), np.full(5, 0.0003)))
    return str(place_)


@contextlib.contextmanager
def source(folder, at=1_800_000_000.0, faults=()):
    clock = Clock(at)
    with running(Setup(data=folder, resolution="1m", today=True, speed=1.0, script=make_script({"faults": list(faults)})), clock) as exchange:
        yield exchange


def paper(live, **given):
    return paper_exchange(live.url, live.url.replace("http", "ws") + "/public", SYMBOLS, "1m", monotonic=lambda: timer.monotonic() * FAST, **given)


def trades(exchange, *symbols):
    return lambda: all(exchange.desk.exchange.status.get(symbol) == "operational" for symbol in symbols or SYMBOLS)


def send(exchange, method, path, body=None):
    "Ask as a client does: again if the machine paused for so long that the signature was too old on arrival."
    stamp, text = str(int(exchange.now // 1_000_000)), "" if body is None else json.dumps(body)
    signature = hmac.new(SECRET.encode(), (method + stamp + path + text).encode(), hashlib.sha256).hexdigest()
    headers = {"User-Agent": "test", "api-key": KEY, "timestamp": stamp, "signature": signature, "Content-Type": "application/json"}
    reply = httpx.request(method, exchange.url + path, content=text or None, headers=headers, trust_env=False).json()
    return send(exchange, method, path, body) if reply.get("error", {}).get("code") == "expired_signature" else reply


def order(exchange, **fields):
    return send(exchange, "POST", "/v2/orders", {"product_symbol": "BTCUSD", "size": 10, "side": "buy", "order_type": "market_order"} | fields)


def account(exchange):
    return exchange.desk.exchange.accounts[FIRST_USER]


PRICES = st.integers(900, 1100).map(lambda ticks: round(ticks * 0.05, 2))


@given(st.lists(PRICES, min_size=2, max_size=30), st.data(), st.integers(1, 60), st.integers(1, 60))
def test_a_bar_told_in_any_pieces_ends_as_the_whole(path, data, below, above):
    "Messages may be missing: whoever hears of some of them has his stop hit if and only if the bar reached it."
    stop, target = round(path[0] - below * 0.05, 2), round(path[0] + above * 0.05, 2)
    def position():
        exchange = open_exchange(["ETHUSD"], instant=True)
        trader = open_account(exchange, 1)
        trader.leverage["ETHUSD"] = 1.0
        play(exchange, "ETHUSD", 0, *[path[0]] * 4)
        place(exchange, trader, Ticket("ETHUSD", +1, 5, stop=stop, target=target), 0)
        play(exchange, "ETHUSD", 0, *[path[0]] * 4)
        assert trader.positions["ETHUSD"].size == 5
        return exchange, trader
    def bar(count):
        return Bar("ETHUSD", 0, path[0], max(path[:count]), min(path[:count]), path[count - 1], float(count), math.nan, False)
    heard = sorted({*data.draw(st.sets(st.integers(1, len(path)))), len(path)})
    exchange, trader = position()
    before = None
    for count in heard:
        play_on(exchange, before, bar(count), count)
        before = bar(count)
    assert exchange.last["ETHUSD"] == path[-1]
    assert ("ETHUSD" not in trader.positions) == (min(path) <= stop or max(path) >= target)


def test_old_news_and_late_names():
    track, first = Track(60), Bar("ETHUSD", 60, 100.0, 101.0, 99.0, 100.0, 5.0, math.nan, False)
    take_news(track, first)
    for stale in (replace(first, volume=4.0), replace(first, time=0, volume=9.0), replace(first, time=120, volume=5.5)):
        take_news(track, stale)
        assert track.newest == first
    take_news(track, replace(first, time=120, volume=0.1))
    assert track.newest.time == 120
    assert rate_at({}, FUNDING_STEP, FUNDING_STEP + 1.0) is None and math.isnan(rate_at({}, FUNDING_STEP + 60, 0.0))


def test_the_same_candles_the_same_clock_and_a_fill_near_the_price(folder):
    with source(folder) as live, paper(live) as exchange:
        assert wait_for(trades(exchange))
        begun = exchange.desk.replay.candles["BTCUSD"].time[-1]
        assert len(exchange.desk.replay.candles["BTCUSD"]) >= 250
        price = live.desk.exchange.last["BTCUSD"]
        assert order(exchange, client_order_id="one")["result"]["state"] == "closed"
        assert abs(float(account(exchange).fills[0].price) - price) < 60
        assert live.desk.exchange.accounts[FIRST_USER].fills == []
        assert wait_for(lambda: all(exchange.desk.replay.candles[symbol].time[-1] >= begun + 120 for symbol in SYMBOLS))
        now = exchange.at
        for symbol in SYMBOLS:
            here, there = (fetch_candles(where.url, symbol, "1m", int(now) - 260 * 60, int(now) - 60, lambda: now) for where in (exchange, live))
            assert len(here) >= 250
            for name in ("time", "open", "high", "low", "close", "volume"):
                assert np.array_equal(getattr(here, name), getattr(there, name)), name
        before, there, after = exchange.at, live.at, exchange.at
        assert before - 0.3 * FAST < there < after + 0.3 * FAST
        assert exchange.desk.replay.rates["BTCUSD"] and set(exchange.desk.replay.rates["BTCUSD"].values()) == {0.0003}


def test_a_stop_is_hit_when_the_source_goes_through_it(folder):
    with source(folder) as live, paper(live) as exchange:
        assert wait_for(trades(exchange))
        last = exchange.desk.exchange.last["BTCUSD"]
        reply = order(exchange, bracket_stop_loss_price=str(last - 30), bracket_take_profit_price=str(last + 2000))
        assert reply["success"], reply
        assert wait_for(lambda: account(exchange).trips)
        trip = account(exchange).trips[0]
        assert trip.why == "stop_loss" and last - 70 < trip.exit <= last - 30


def test_an_outage_is_recognised_and_caught_up(folder):
    "Minutes of silence, and a level that only they reach: nothing is invented, then every bar is there and the level was hit."
    with source(folder, faults=[{"kind": "down", "start": 55, "seconds": 150}]) as live, paper(live) as exchange:
        assert wait_for(trades(exchange))
        begun, coming = int(live.began), live.desk.replay.candles["BTCUSD"]
        early, silent = (coming[(coming.time >= begun + first) & (coming.time < begun + last)] for first, last in ((-60, 60), (60, 180)))
        rising = silent.high.max() > early.high.max() + 4
        assert rising or silent.low.min() < early.low.min() - 4
        target, stop = (silent.high.max() - 2, early.low.min() - 2000) if rising else (early.high.max() + 2000, silent.low.min() + 2)
        assert order(exchange, bracket_stop_loss_price=str(stop), bracket_take_profit_price=str(target))["success"]
        assert wait_for(lambda: live.at > begun + 60 and not trades(exchange, "BTCUSD")())
        frozen, seen = exchange.desk.exchange.last["BTCUSD"], 0
        while (now := (exchange.desk.exchange.last["BTCUSD"], exchange.desk.system, len(account(exchange).positions), order(exchange).get("error"))) and live.clock() < begun + 205:
            assert now[:3] == (frozen, "degraded_mode", 1) and now[3]["code"] == "trading_blocked"
            seen += 1
            timer.sleep(0.2)
        assert seen
        assert wait_for(trades(exchange))
        times = exchange.desk.replay.candles["BTCUSD"].time
        assert (np.diff(times) == 60).all() and times[-1] >= exchange.at - 130
        trip = account(exchange).trips[0]
        assert trip.why == ("take_profit" if rising else "stop_loss") and begun + 60 <= trip.closed / 1e6 < begun + 180


def test_funding_is_charged_with_the_sources_rate(folder):
    at = (1_800_000_000 // FUNDING_STEP + 1) * FUNDING_STEP - 50.0
    with source(folder, at=at) as live, paper(live) as exchange:
        assert wait_for(trades(exchange))
        assert order(exchange)["success"]
        assert wait_for(lambda: any(move[1] == "funding" for move in account(exchange).moves))
        when, _, symbol, amount, _ = next(move for move in account(exchange).moves if move[1] == "funding")
        assert when == (int(at) + 50) * 1_000_000 and symbol == "BTCUSD"
        assert amount == pytest.approx(-0.0003 * 10 * 0.001 * 60_000, rel=0.01)


def test_an_account_outlives_its_process(folder, tmp_path):
    with source(folder) as live:
        with paper(live, folder=tmp_path) as exchange:
            assert wait_for(trades(exchange))
            last = exchange.desk.exchange.last["BTCUSD"]
            assert order(exchange, client_order_id="kept", bracket_stop_loss_price=str(last - 400), bracket_take_profit_price=str(last + 2000))["success"]
            assert order(exchange, product_symbol="ETHUSD", bracket_stop_loss_price="2900", bracket_take_profit_price=str(round(exchange.desk.exchange.last["ETHUSD"] + 1.5, 2)))["success"]
            before = account(exchange)
        timer.sleep(120 / FAST)
        with paper(live, folder=tmp_path) as exchange:
            after = account(exchange)
            assert after.positions["BTCUSD"] == before.positions["BTCUSD"] and len(after.live) == 2
            assert after.by_client == before.by_client
            assert [trip.why for trip in after.trips] == ["take_profit"], "the target that was reached meanwhile"
            assert wait_for(trades(exchange))
            assert send(exchange, "GET", "/v2/orders/client_order_id/kept")["result"]["state"] == "closed"
        with pytest.raises(InputError, match="choose another folder"), paper_exchange(live.url, "ws://127.0.0.1:1", ["BTCUSD"], "1m", folder=tmp_path):
            pass
        (tmp_path / ACCOUNT).write_text("[]")
        with pytest.raises(InputError, match="move it away"), paper(live, folder=tmp_path):
            pass


def test_without_a_source_it_does_not_begin():
    with pytest.raises(DeltaGoError, match="does not answer"), paper_exchange("http://127.0.0.1:9", "ws://127.0.0.1:9", ["BTCUSD"], "1m"):
        pass
