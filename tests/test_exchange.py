"Public candles and funding from a real server on this machine that has the exchange's habits."
import contextlib
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time as timer
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError, RetryError
from delta_go.live.exchange import (
    BASE_URL,
    PAGE,
    ask,
    download,
    download_funding,
    fetch_candles,
    fetch_funding,
    missing_windows,
    open_client,
    read_candle_rows,
    read_reply,
)
from delta_go.market.candles import COLUMNS, RESOLUTIONS, check_candles, step_of
from delta_go.market.store import append_candles, read_candles, read_funding
from delta_go.patience import NoAnswer, Patience

NOW = 1_700_006_400 + 900.0  # a quarter past midnight UTC
QUICK = Patience(retries=4, total=20, first=.01, longest=.02, answer=2)


def truth(symbol, time, step):
    "The bar the exchange has for a time: a pure function, so that any two answers must agree."
    if symbol.startswith("FUNDING:"):
        rate = ((time // 28_800) % 7 - 3) * .01
        return {"time": time, "open": rate, "high": rate, "low": rate, "close": rate, "volume": None}
    price = 1000 + (time // step) % 97
    return {"time": time, "open": price, "high": price + 2, "low": price - 1, "close": price + .5, "volume": time // step % 11}


@dataclass
class Exchange:
    "What the server knows and how it behaves today."
    now: float = NOW
    holes: set = field(default_factory=set)      # opens that it does not have
    moods: list = field(default_factory=list)    # answers to give before behaving: functions of the handler
    limit: int = 2000
    says_time: bool = True
    spoil: dict = field(default_factory=dict)    # open -> fields to overwrite
    asked: list = field(default_factory=list)    # (seconds, query)
    symbols: tuple = ("BTCUSD", "ETHUSD")
    began: int = 0                               # no history before this


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body, kind="application/json", **headers):
        payload = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(payload)))
        if self.server.exchange.says_time:
            self.send_header("Request-In-Time", str(int(self.server.exchange.now * 1e6)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(payload)

    def do_GET(self):
        exchange, url = self.server.exchange, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        exchange.asked.append((timer.monotonic(), query))
        if exchange.moods:
            mood = exchange.moods.pop(0)
            if mood is not None:
                return mood(self)
        if not self.headers.get("User-Agent"):
            return self.reply(403, "<html>Forbidden</html>", "text/html")
        if url.path != "/v2/history/candles":
            return self.reply(404, "Not Found", "text/plain")
        absent = [name for name in ("symbol", "resolution", "start", "end") if name not in query]
        if absent or query["resolution"] not in RESOLUTIONS:
            errors = [{"code": "validation_error", "message": "is wrong", "param": name} for name in absent or ["resolution"]]
            return self.reply(400, {"success": False, "error": {"code": "bad_schema", "context": {"schema_errors": errors}}})
        if query["symbol"].removeprefix("FUNDING:") not in exchange.symbols:
            return self.reply(400, {"error": {"code": "invalid_contract"}, "success": False})
        self.reply(200, {"success": True, "result": self.rows(exchange, query)})

    def rows(self, exchange, query):
        "Inclusive after rounding the start up and the end down, newest first, the forming bar included."
        step = step_of(query["resolution"])
        first = max(math.ceil(int(query["start"]) / step) * step, exchange.began)
        last = min(int(query["end"]), int(exchange.now)) // step * step
        opens = [time for time in range(last, first - 1, -step) if time not in exchange.holes]
        return [{**truth(query["symbol"], time, step), **exchange.spoil.get(time, {})} for time in opens[:exchange.limit]]


@contextlib.contextmanager
def serve(exchange):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.exchange = True, exchange
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": .01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def exchange():
    return Exchange()


@pytest.fixture
def url(exchange):
    with serve(exchange) as address:
        yield address


def fetch(url, start, end, resolution="1h", symbol="BTCUSD", clock=lambda: NOW):
    return fetch_candles(url, symbol, resolution, int(start), int(end), clock, QUICK)


def expected(candles):
    rows = [truth(candles.symbol, time, candles.step) for time in candles.time.tolist()]
    return all(getattr(candles, name).tolist() == [row[name] for row in rows] for name in COLUMNS)


def status(code, body="", kind="application/json", **headers):
    return lambda handler: handler.reply(code, body, kind, **headers)


def hang_up(handler):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut_short(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"success": tr')
    handler.wfile.flush()
    hang_up(handler)


def test_a_range_of_several_pages_is_dense_sorted_and_right(url, exchange):
    exchange.says_time = False
    start = NOW - 900 - 4500 * 3600
    candles = fetch(url, start, NOW)
    assert len(candles) == 4500 and expected(candles) and check_candles(candles, now=NOW) is candles
    assert candles.time[0] == start and candles.time[-1] == NOW - 900 - 3600
    assert [len(range(int(q["start"]), int(q["end"]) + 1, 3600)) for _, q in exchange.asked] == [2000, 2000, 500]


@pytest.mark.parametrize("late, first", [(0, 0), (1, 3600), (3599, 3600), (3600, 3600), (-1, 0)])
def test_a_start_off_the_grid_is_rounded_up_here(url, late, first):
    base = int(NOW - 900) - 10 * 3600
    assert fetch(url, base + late, NOW).time[0] == base + first


@pytest.mark.parametrize("end, last", [(0, -3600), (1, 0), (3600, 0), (-1, -3600)])
def test_the_end_is_not_included(url, end, last):
    base = int(NOW - 900) - 10 * 3600
    assert fetch(url, base - 5 * 3600, base + end).time[-1] == base + last


def test_the_forming_bar_is_dropped_by_either_clock(url, exchange):
    for ours, theirs in ((NOW, NOW), (NOW + 7200, NOW), (NOW, NOW + 7200)):
        exchange.now = theirs
        candles = fetch(url, NOW - 10 * 3600, NOW + 10 * 3600, clock=lambda ours=ours: ours)
        assert candles.time[-1] + 3600 <= NOW
    exchange.now, exchange.says_time = NOW, False
    assert fetch(url, NOW - 10 * 3600, NOW + 10 * 3600).time[-1] + 3600 <= NOW


def test_a_bar_that_closes_while_we_wait_for_the_answer_is_not_trusted(url, exchange):
    "The answer was made before the close: our clock is read before asking."
    exchange.says_time = False
    ticks = iter([NOW - 900 + 3599, NOW - 900 + 3599, NOW - 900 + 3601])
    exchange.now = NOW - 900 + 3599
    assert fetch(url, NOW - 9 * 3600, NOW + 9 * 3600, clock=lambda: next(ticks)).time[-1] == NOW - 900 - 3600


def test_holes_doubles_nulls_and_impossible_bars(url, exchange):
    base = int(NOW - 900) - 20 * 3600
    exchange.holes = {base + 3 * 3600, base + 4 * 3600}
    exchange.spoil = {base + 6 * 3600: {"volume": None}, base + 8 * 3600: {"close": None}, base + 9 * 3600: {"high": 1},
                      base + 10 * 3600: {"time": base + 11 * 3600}}
    candles = fetch(url, base, base + 20 * 3600)
    gone = [3, 4, 8, 9, 10]
    assert ((candles.time - base) // 3600).tolist() == [hour for hour in range(20) if hour not in gone]
    assert candles.volume[list((candles.time - base) // 3600).index(6)] == 0


def test_a_server_that_caps_lower_leaves_holes_not_wrong_bars(url, exchange, tmp_path):
    exchange.limit = 500
    start = NOW - 900 - 2500 * 3600
    runs = [download(url, tmp_path, ["BTCUSD"], "1h", int(start), int(NOW), lambda: NOW, patience=QUICK)[0] for _ in range(5)]
    assert runs[0].missing > 0 and runs[-1].missing == 0
    assert expected(read_candles(tmp_path, "BTCUSD", "1h", allow_gaps=False))


@pytest.mark.parametrize("mood", [status(502, "<html>bad gateway"), status(500, {"success": False}), status(503), status(504),
                                  status(200, "<html>maintenance"), status(200, "[1]"), status(429), hang_up, cut_short])
def test_trouble_is_asked_again(url, exchange, mood):
    exchange.moods = [mood, mood]
    assert len(fetch(url, NOW - 5 * 3600, NOW)) == 4
    assert len(exchange.asked) == 3


def test_the_stated_wait_is_kept(url, exchange):
    exchange.moods = [status(429, {"success": False, "error": {"code": "rate_limit_exceeded"}}, X_RATE_LIMIT_RESET="400")]
    fetch(url, NOW - 5 * 3600, NOW)
    (first, _), (second, _) = exchange.asked
    assert .4 <= second - first < 10


def test_trouble_without_end_is_one_clear_error(url, exchange):
    exchange.moods = [status(502)] * 50
    with pytest.raises(RetryError, match=r"in trouble \(502\)"):
        fetch(url, NOW - 5 * 3600, NOW)
    assert len(exchange.asked) == QUICK.retries + 1


def test_a_slow_answer_is_asked_again(url, exchange):
    exchange.moods = [lambda handler: timer.sleep(.6)]
    candles = fetch_candles(url, "BTCUSD", "1h", int(NOW) - 5 * 3600, int(NOW), lambda: NOW, Patience(retries=1, first=.01, answer=.2))
    assert len(candles) == 4 and len(exchange.asked) == 2


@pytest.mark.parametrize("mood, words", [
    (status(403, "<html>Forbidden</html>", "text/html"), "403 and no JSON.*User-Agent"),
    (status(404, "Not Found", "text/plain"), "404 and no JSON.*base URL"),
    (status(401, {"error": "unauthorized", "success": False}), "401: unauthorized"),
    (status(400, {"success": False, "error": {"code": "bad_schema"}}), "400: bad_schema"),
    (status(200, {"success": False, "error": {"code": "odd"}}), "200: odd"),
    (status(302, "", Location="/elsewhere"), "302"),
])
def test_a_refusal_is_not_asked_again(url, exchange, mood, words):
    exchange.moods = [mood]
    with pytest.raises(InputError, match=words):
        fetch(url, NOW - 5 * 3600, NOW)
    assert len(exchange.asked) == 1


def test_unknown_symbol_resolution_and_addresses(url, exchange):
    with pytest.raises(InputError, match="invalid_contract"):
        fetch(url, NOW - 5 * 3600, NOW, symbol="NOPE")
    with pytest.raises(InputError, match="expected one of 1m"):
        fetch(url, NOW - 5 * 3600, NOW, resolution="7d")
    for wrong in ("api.india.delta.exchange", BASE_URL + "/v2", "ftp://x", ""):
        with pytest.raises(InputError, match="base URL: expected scheme and host"):
            open_client(wrong)
    with open_client(url) as client, pytest.raises(InputError, match="base URL"):
        ask(client, "/v2/nope", {}, QUICK)


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RetryError, match="could not be reached .*check the network"):
        fetch_candles(address, "BTCUSD", "1h", 0, 7200, lambda: NOW, Patience(retries=1, first=.01))


def test_an_empty_result_is_an_empty_table(url, exchange):
    exchange.moods = [status(200, {"success": True, "result": None}), status(200, {"success": True, "result": []})]
    assert [len(fetch(url, NOW - 5 * 3600, NOW)) for _ in range(2)] == [0, 0]
    assert len(fetch(url, NOW + 5, NOW + 86_400)) == 0


def test_every_odd_body_is_an_answer_or_one_of_two_errors():
    bodies = ["", "null", "[]", "{}", "nonsense", "[" * 100_000, '{"success": true}', '{"success": false}', '{"success": false, "error": 5}', "<html>",
              '{"success": false, "error": {"context": []}}', '{"success": false, "error": {"code": "x", "context": {"schema_errors": ["y"]}}}']
    for code in (200, 201, 301, 400, 401, 403, 404, 406, 429, 500, 502, 503):
        for body in bodies:
            with contextlib.suppress(InputError, RetryError):
                assert read_reply(code, body) is None and code == 200
    with pytest.raises(NoAnswer) as caught:
        read_reply(429, "", {"x-rate-limit-reset": "soon"})
    assert caught.value.wait is None


@settings(max_examples=60)
@given(st.integers(0, 9000), st.integers(0, 9000), st.sets(st.integers(0, 9000), max_size=30), st.integers(0, 9000), st.integers(0, 59))
def test_windows_cover_what_is_missing_and_no_page_is_too_long(start, end, kept_out, now, late):
    have = np.setdiff1d(np.arange(2000, 7000), list(kept_out)) * 60
    windows = missing_windows(start * 60 + late, end * 60, 60, now * 60, have)
    wanted = {slot * 60 for slot in range(start + (late > 0), min(end, now))} - set(have.tolist())
    assert all((last - first) // 60 < PAGE and first in wanted and last in wanted for first, last in windows)
    assert all(before[1] < after[0] for before, after in zip(windows, windows[1:]))
    assert wanted <= {slot for first, last in windows for slot in range(first, last + 60, 60)}


@pytest.mark.parametrize("rows", [[{"time": 1}], {"a": 1}, "candles", [["1", 2]], [truth("BTCUSD", 0, 60) | {"open": "x"}], 5])
def test_rows_that_make_no_sense_are_no_candles(rows):
    with pytest.raises(NoAnswer, match="BTCUSD: .* cannot be read"):
        read_candle_rows(rows, "BTCUSD", 60, 1e9)


def test_rows_in_any_order_give_the_same_candles():
    rows = [truth("BTCUSD", time, 60) for time in range(0, 6000, 60)]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(100)] + rows[:5]
    for given_rows in (rows, rows[::-1], shuffled):
        assert expected(candles := read_candle_rows(given_rows, "BTCUSD", 60, 1e9)) and len(candles) == 100


def test_a_download_goes_on_where_it_stopped(url, exchange, tmp_path):
    start, end = int(NOW - 900) - 9000 * 3600, int(NOW)
    exchange.moods = [None, None] + [status(502)] * (QUICK.retries + 1)
    with pytest.raises(RetryError):
        download(url, tmp_path, ["BTCUSD"], "1h", start, end, lambda: NOW, patience=QUICK)
    assert len(read_candles(tmp_path, "BTCUSD", "1h")) == 4000
    exchange.asked.clear()
    told = []
    (result,) = download(url, tmp_path, ["BTCUSD"], "1h", start, end, lambda: NOW, lambda *told_now: told.append(told_now), QUICK)
    assert told == [("BTCUSD", done, 3) for done in range(4)] and len(exchange.asked) == 3
    assert (result.pages, result.added, result.changed, result.dropped, result.missing) == (3, 5000, (), 0, 0)
    assert expected(read_candles(tmp_path, "BTCUSD", "1h", allow_gaps=False))
    exchange.asked.clear()
    download(url, tmp_path, ["BTCUSD"], "1h", start, end, lambda: NOW, patience=QUICK)
    assert exchange.asked == [], "a finished range is not asked for again"


def test_earlier_later_and_inner_bars_are_filled(url, exchange, tmp_path):
    start = int(NOW - 900) - 3000 * 3600
    for first, last in ((1000, 1200), (2500, 2600)):
        append_candles(tmp_path, fetch(url, start + first * 3600, start + last * 3600), NOW)
    exchange.now = later = NOW + 5 * 3600
    (result,) = download(url, tmp_path, ["BTCUSD"], "1h", start, int(later), lambda: later, patience=QUICK)
    candles = read_candles(tmp_path, "BTCUSD", "1h", allow_gaps=False)
    assert len(candles) == 3005 and expected(candles) and result.added == 2705


def test_holes_of_the_exchange_are_counted_and_looked_into_again(url, exchange, tmp_path):
    start = int(NOW - 900) - 100 * 3600
    exchange.holes = {start + 50 * 3600}
    assert download(url, tmp_path, ["BTCUSD"], "1h", start, int(NOW), lambda: NOW, patience=QUICK)[0].missing == 1
    exchange.holes, exchange.asked = set(), []
    assert download(url, tmp_path, ["BTCUSD"], "1h", start, int(NOW), lambda: NOW, patience=QUICK)[0].added == 1
    assert [(q["start"], q["end"]) for _, q in exchange.asked] == [(str(start + 50 * 3600),) * 2]


def test_impossible_bars_are_dropped_and_counted(url, exchange, tmp_path):
    start = int(NOW - 900) - 100 * 3600
    exchange.spoil = {start + 7 * 3600: {"low": 1e9}}
    (result,) = download(url, tmp_path, ["BTCUSD", "ETHUSD"], "1h", start, int(NOW), lambda: NOW, patience=QUICK)[:1]
    assert (result.dropped, result.missing, result.added) == (1, 1, 99)


def test_a_download_of_nothing_says_so(url, exchange, tmp_path):
    exchange.began = int(NOW) * 2
    with pytest.raises(InputError, match="BTCUSD 1h: the exchange has no candles from"):
        download(url, tmp_path, ["BTCUSD"], "1h", int(NOW) - 86_400, int(NOW), lambda: NOW, patience=QUICK)
    with pytest.raises(InputError, match="expected the end after the start"):
        download(url, tmp_path, ["BTCUSD"], "1h", int(NOW), int(NOW), lambda: NOW, patience=QUICK)


def test_a_killed_download_goes_on(url, exchange, tmp_path):
    start, end = int(NOW - 900) // 60 * 60 - 20_000 * 60, int(NOW)
    exchange.moods = [lambda handler: (timer.sleep(.05), handler.reply(502, ""))] * 4 + [None, None]
    code = ("import sys; from delta_go.live.exchange import download; from delta_go.patience import Patience; "
            f"download({url!r}, {str(tmp_path)!r}, ['BTCUSD'], '1m', {start}, {end}, lambda: {NOW}, "
            "lambda *told: print(*told, flush=True), Patience(retries=5, first=.01, longest=.02, failures=9))")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert any("BTCUSD 3 " in line for line in child.stdout), "it ended by itself"
        child.send_signal(signal.SIGKILL)
    assert len(read_candles(tmp_path, "BTCUSD", "1m", allow_gaps=False)) >= 6000
    download(url, tmp_path, ["BTCUSD"], "1m", start, end, lambda: NOW, patience=QUICK)
    candles = read_candles(tmp_path, "BTCUSD", "1m", allow_gaps=False)
    assert expected(candles) and len(candles) == 20_015


def test_funding_is_a_fraction_at_exchange_times(url, exchange, tmp_path):
    start = int(NOW) - 100 * 86_400
    day = int(NOW - 900)
    exchange.holes = {day - 86_400, *(day - 3 * 86_400 + hour * 3600 for hour in range(8, 16)), day - 4 * 86_400 + 3600}
    funding = fetch_funding(url, "BTCUSD", start, int(NOW), lambda: NOW, QUICK)
    assert (funding.time % 28_800 == 0).all() and (np.diff(funding.time) > 0).all()
    assert funding.rate.tolist() == [((time // 28_800) % 7 - 3) * .01 / 100 for time in funding.time.tolist()]
    assert day - 86_400 in funding.time and day - 3 * 86_400 + 8 * 3600 not in funding.time and day not in funding.time
    assert len(funding) == 298
    assert download_funding(url, tmp_path, ["BTCUSD"], start, int(NOW), lambda: NOW, patience=QUICK) == {"BTCUSD": 298}
    exchange.asked.clear()
    assert download_funding(url, tmp_path, ["BTCUSD"], start, int(NOW), lambda: NOW, patience=QUICK) == {"BTCUSD": 0}
    assert len(exchange.asked) <= 1 and np.array_equal(read_funding(tmp_path, "BTCUSD").rate, funding.rate)
    exchange.now = NOW + 7200
    assert download_funding(url, tmp_path, ["BTCUSD"], start, int(NOW) + 7200, lambda: NOW + 7200, patience=QUICK) == {"BTCUSD": 1}
