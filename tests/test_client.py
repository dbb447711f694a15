"The client against servers on this machine that answer well, badly, slowly, or not at all."
import base64
import contextlib
import gzip
import json
import logging
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug.serving import make_server

from delta_go.domain import REGIMES, InputError, RetryError
from delta_go.learning.advice import LocalAdviser
from delta_go.learning.predictor import BOUNDS, PREDICTOR_FEATURES
from delta_go.learning.reading import read_market
from delta_go.learning.registry import load_models
from delta_go.market.simulate import simulate_market
from delta_go.patience import NoAnswer, Patience, ServiceDown, Timing
from delta_go.serving import detect_regime, predict_trade
from delta_go.serving.access import read_settings
from delta_go.serving.client import (
    BadAnswer,
    Credentials,
    Service,
    ServiceAdviser,
    TokenCache,
    expiry_of,
    identity_token,
    origin_of,
    read_regime,
    read_reply,
    read_trade,
    regime_question,
    retry_after,
    trade_question,
    view_of,
)
from delta_go.serving.contract import encode, parse_regimes, parse_trades
from tests.waiting import FOREVER

MODELS = Path(__file__).parent.parent / "models"
KEY = "canary-0123456789abcdef0123456789abcdef"


class Clock:
    def __init__(self):
        self.now, self.waits = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture(scope="module")
def models():
    return load_models(MODELS)


@pytest.fixture(scope="module")
def market():
    return simulate_market(bars=300, seed=8).candles


@pytest.fixture(scope="module")
def local(models):
    return LocalAdviser(models)


@pytest.fixture(scope="module")
def rows(models, market):
    return {symbol: read_market(candles, models.regimes[symbol]).inputs for symbol, candles in market.items()}


# --- the two real services ---

@contextlib.contextmanager
def served(app):
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(**more):
    return read_settings({"HMM_MODEL_DIR": str(MODELS), "TRADE_PREDICTOR_MODEL": str(MODELS), **more})


@pytest.fixture(scope="module")
def services():
    with served(detect_regime.create_app(environment())) as detector, served(predict_trade.create_app(environment())) as predictor:
        yield detector, predictor


def answers(adviser, candles, rows, bar):
    view = adviser.regime(candles[:200 + bar])
    return repr((view.posterior.tolist(), view.regime.tolist(), str(view.regime.dtype), view.confidence.tolist(), adviser.probability(candles.symbol, rows[bar])))


def test_the_services_give_the_bits_of_the_process(services, local, market, rows):
    questions = [(market[symbol], rows[symbol], bar) for bar in range(0, 100, 4) for symbol in market]
    with ServiceAdviser(*services, pin=local.versions()) as remote, ThreadPoolExecutor(3) as pool:
        got = list(pool.map(lambda question: answers(remote, *question), questions))
        assert got == [answers(local, *question) for question in questions]
        assert remote.versions() == local.versions()


def test_routes_may_stand_in_the_address(services, market, local):
    with ServiceAdviser(services[0] + "/detect_regime", services[1] + "/predict_trade") as remote:
        assert remote.regime(market["ETHUSD"]).posterior.tobytes() == local.regime(market["ETHUSD"]).posterior.tobytes()


def test_the_services_refuse_in_their_own_words(services, market, rows):
    with ServiceAdviser(*services) as remote:
        with pytest.raises(InputError, match=r"hmm-detector: refused with 422: .*at least 200 candles, got 150"):
            remote.regime(market["BTCUSD"][:150])
        hole = market["BTCUSD"][np.arange(300) != 250]
        with pytest.raises(InputError, match="422.*time"):
            remote.regime(hole)
        wild = np.where(np.array(PREDICTOR_FEATURES) == "rsi", 101.0, rows["BTCUSD"][0])
        with pytest.raises(InputError, match="trade-predictor: refused with 422: /rsi: expected 0 to 100"):
            remote.probability("BTCUSD", wild)
        assert {remote.detector.breaker.state, remote.predictor.breaker.state} == {"closed"}


def test_a_service_that_wants_a_key(market, local):
    settings = environment(SERVICE_AUTH="api_key", SERVICE_API_KEYS=f"bot:{KEY}")
    with served(detect_regime.create_app(settings)) as detector:
        with ServiceAdviser(detector, detector, key=KEY) as remote:
            assert remote.regime(market["SOLUSD"]).posterior.tobytes() == local.regime(market["SOLUSD"]).posterior.tobytes()
        with ServiceAdviser(detector, detector) as remote, pytest.raises(InputError, match="refused with 401"):
            remote.regime(market["SOLUSD"])


def test_a_service_without_models_is_no_answer(tmp_path, market):
    with served(detect_regime.create_app(environment(HMM_MODEL_DIR=str(tmp_path)))) as detector:
        clock = Clock()
        with ServiceAdviser(detector, detector, timing=Timing(clock, clock.sleep, lambda: 0.0)) as remote, pytest.raises(NoAnswer, match="503.*no model is loaded") as caught:
            remote.regime(market["BTCUSD"])
        assert caught.value.wait == 5.0 and clock.waits == [5.0]


# --- a server that does as it is told ---

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.server.connections += 1

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, dict(self.headers), body))
        mood = self.server.moods.pop(0) if self.server.moods else self.server.always
        if mood:
            mood(self)
        else:
            self.say(200, self.server.answer)

    def do_GET(self):
        self.server.get(self)

    def say(self, status, body=b"", **headers):
        self.send_response_only(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def break_off(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server():
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads, running.moods, running.seen, running.connections, running.always, running.answer = True, [], [], 0, None, b"{}"
    running.handle_error = lambda *_: None
    running.home = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=partial(running.serve_forever, 0.01), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture(scope="module")
def regime_answer(local, market):
    view, candles = local.regime(market["BTCUSD"]), market["BTCUSD"]
    return {"symbol": "BTCUSD", "regime": REGIMES[view.regime[0]], "confidence": float(view.confidence[0]), "features": {}, "warnings": [],
            "state_probabilities": dict(zip(REGIMES, view.posterior[0].tolist())), "as_of": int(candles.time[-1]) + 3600, "spacing_checked": True,
            **origin(local, "hmm_model_BTCUSD.pkl")}


def origin(local, name):
    return {"model_version": local.versions()["model_version"], "model_name": name, "model_sha256": local.versions()[name], "data_end": 1,
            "feature_schema": "f", "service_version": "1", "git_sha": "g", "request_id": "r"}


@pytest.fixture(scope="module")
def trade_answer(local, rows):
    row = rows["BTCUSD"][-1]
    advice = local.probability("BTCUSD", row)
    return {"symbol": "BTCUSD", "regime": None, "should_trade": advice.should_trade, "confidence": advice.probability, "probability": advice.probability,
            "threshold": advice.threshold, "expected_return": None, "reason": advice.reason, "contributions": None, "warnings": [],
            "missing": [name for name, value in zip(PREDICTOR_FEATURES, row) if np.isnan(value)], **origin(local, "trade_predictor.pkl")}


def adviser(server, clock=None, **more):
    clock = clock or Clock()
    return ServiceAdviser(server.home, server.home, timing=Timing(clock, clock.sleep, lambda: 0.5), **more)


BUSY_DATE = {"Date": "Wed, 01 Jan 2025 00:00:00 GMT", "Retry_After": "Wed, 01 Jan 2025 00:00:03 GMT"}
FAILURES = {  # what the server does -> words of the error
    "500": (lambda h: h.say(500, b"<html>oops"), "answered 500: no reason given"),
    "502 with a long page": (lambda h: h.say(502, b"x" * 100_000), "answered 502"),
    "503": (lambda h: h.say(503, b'{"detail": "loading"}', Retry_After="1"), "answered 503: loading"),
    "503 until a date": (lambda h: h.say(503, **BUSY_DATE), "answered 503"),
    "429": (lambda h: h.say(429, Retry_After="0"), "answered 429"),
    "408": (lambda h: h.say(408), "answered 408"),
    "closed without a word": (lambda h: h.break_off(), r"no answer \((ReadError|RemoteProtocolError)\)"),
    "closed in the body": (lambda h: (h.say(200, b'{"symbol": ', Content_Length=400), h.break_off()), r"no answer \((ReadError|RemoteProtocolError)\)"),
    "no HTTP": (lambda h: (h.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), h.break_off()), "no answer"),
    "broken chunks": (lambda h: (h.say(200, b"zz\r\n{}\r\n", Transfer_Encoding="chunked", Content_Length=None), h.break_off()), "no answer"),
    "endless headers": (lambda h: (h.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"x-a: " + b"y" * 300_000), h.break_off()), "no answer"),
}
BAD = {
    "a page": (lambda h: h.say(200, b"<html>welcome"), "expected a RegimeAnswer in JSON"),
    "nothing": (lambda h: h.say(200), "expected a RegimeAnswer in JSON"),
    "204": (lambda h: h.say(204), "expected status 200, got 204"),
    "not UTF-8": (lambda h: h.say(200, b'{"symbol": "\xff\xfe"}'), "expected a RegimeAnswer in JSON"),
    "very deep": (lambda h: h.say(200, b"[" * 200_000), "expected a RegimeAnswer in JSON"),
    "two mebibytes": (lambda h: h.say(200, b" " * 2**21), "at most 1048576 bytes"),
    "compressed unasked": (lambda h: h.say(200, gzip.compress(b"{}"), Content_Encoding="gzip"), "expected a RegimeAnswer in JSON"),
}


@pytest.mark.parametrize("name", [*FAILURES, *BAD])
def test_after_one_failure_the_answer_comes(server, name, market, regime_answer):
    mood, _ = (FAILURES | BAD)[name]
    server.answer, server.moods = encode(regime_answer), [mood]
    clock = Clock()
    with adviser(server, clock) as remote:
        assert remote.regime(market["BTCUSD"]).posterior.tolist() == [list(regime_answer["state_probabilities"].values())]
    named = {"503": 1.0, "503 until a date": 3.0}.get(name, 0.0)
    assert len(server.seen) == 2 and clock.waits == [pytest.approx(0.1 + named)]
    assert server.seen[0][2] == server.seen[1][2], "the same question is repeated"


@pytest.mark.parametrize("name", [*FAILURES, *BAD])
def test_a_service_that_stays_broken_is_told_and_left_alone(server, name, market):
    mood, words = (FAILURES | BAD)[name]
    server.always = mood
    with adviser(server) as remote:
        with pytest.raises(BadAnswer if name in BAD else NoAnswer, match=f"hmm-detector: .*{words}"):
            remote.regime(market["BTCUSD"])
        assert len(server.seen) == (3 if name == "503 until a date" else 4)
        for _ in range(2):
            with pytest.raises(RetryError):
                remote.regime(market["BTCUSD"])
        asked = len(server.seen)
        with pytest.raises(ServiceDown, match=words):
            remote.regime(market["BTCUSD"])
        assert remote.detector.breaker.state == "open" and len(server.seen) == asked == 5
        assert remote.predictor.breaker.state == "closed"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 413, 415, 418, 422, 451])
def test_a_refusal_is_told_once_and_is_no_failure(server, status, market):
    server.always = lambda h: h.say(status, json.dumps({"detail": "/close/17: expected a positive price", "request_id": "ab12",
                                                        "errors": [{"pointer": "/close/17", "reason": "expected a positive price"}, {"pointer": "/time/3", "reason": "whole seconds"}]}).encode())
    with adviser(server) as remote:
        for _ in range(6):
            with pytest.raises(InputError, match=rf"refused with {status}: /close/17: expected a positive price; /time/3: whole seconds \(request ab12\)"):
                remote.regime(market["BTCUSD"])
        assert len(server.seen) == 6 and remote.detector.breaker.state == "closed"


def test_a_redirect_is_not_followed(server, market):
    server.always = lambda h: h.say(307, Location="http://127.0.0.1:1/elsewhere")
    with adviser(server, key=KEY) as remote, pytest.raises(InputError, match="redirect"):
        remote.regime(market["BTCUSD"])
    assert len(server.seen) == 1


CHANGES = {
    "another symbol": ({"symbol": "ETHUSD"}, "about BTCUSD, got ETHUSD"),
    "a newline in the symbol": ({"symbol": "BTC\nUSD"}, r"got BTC\?USD"),
    "yesterday": ({"as_of": 1_600_000_000}, "regime as of"),
    "no time": ({"as_of": None}, "regime as of"),
    "unchecked spacing": ({"spacing_checked": False}, "checked spacing"),
    "wrong sum": ({"state_probabilities": dict(zip(REGIMES, [0.2, 0.2, 0.2, 0.2, 0.2 + 2e-9]))}, "sum to 1"),
    "negative": ({"state_probabilities": dict(zip(REGIMES, [1.2, -0.2, 0, 0, 0]))}, "from 0 to 1"),
    "four regimes": ({"state_probabilities": dict(zip(REGIMES[:4], [0.25] * 4))}, "one a regime"),
    "six regimes": ({"state_probabilities": {**dict(zip(REGIMES, [0.2] * 5)), "sideways": 0.0}}, "one a regime"),
    "an unknown regime": ({"regime": "sideways"}, "RegimeAnswer in JSON"),
    "not the likeliest": ({"regime": "?"}, "likeliest regime"),
    "another confidence": ({"confidence": 0.123}, "likeliest regime"),
    "text for a number": ({"confidence": "0.5"}, "got `str`"),
    "a yes for a number": ({"confidence": True}, "got `bool`"),
    "null probability": ({"state_probabilities": dict(zip(REGIMES, [None, 0.5, 0.5, 0, 0]))}, "got `null`"),
    "other models": ({"model_version": "0123456789ab"}, "model_version"),
    "another file": ({"model_sha256": "0" * 64}, "hmm_model_BTCUSD.pkl"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_answers_that_were_touched(name, market, regime_answer, local):
    change, words = CHANGES[name]
    if change == {"regime": "?"}:
        change = {"regime": next(regime for regime in REGIMES if regime != regime_answer["regime"])}
    with pytest.raises(BadAnswer, match=words):
        read_regime(json.dumps(regime_answer | change).encode(), market["BTCUSD"], local.versions())
    read_regime(encode(regime_answer), market["BTCUSD"], local.versions())


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999", "null", "[]", '"0.5"'])
def test_a_probability_that_is_none(word, market, rows, regime_answer, trade_answer):
    with pytest.raises(BadAnswer):
        read_regime(re.sub(rb'"confidence":[^,]+', b'"confidence":' + word.encode(), encode(regime_answer)), market["BTCUSD"])
    with pytest.raises(BadAnswer):
        read_trade(re.sub(rb'"probability":[^,]+', b'"probability":' + word.encode(), encode(trade_answer)), "BTCUSD", rows["BTCUSD"][-1])


@pytest.mark.parametrize("change, words", [
    ({"symbol": None}, "about BTCUSD"), ({"symbol": "SOLUSD"}, "about BTCUSD"), ({"probability": 1.5, "confidence": 1.5}, "from 0 to 1"),
    ({"probability": -1e-9, "confidence": -1e-9}, "from 0 to 1"), ({"confidence": 0.111}, "twice the same"), ({"threshold": 2.0}, "threshold"),
    ({"should_trade": True}, "should_trade"), ({"threshold": 0.0, "should_trade": False}, "should_trade"), ({"missing": []}, "missing inputs"),
    ({"missing": ["rsi", "hour", "trend"]}, "missing inputs"), ({"model_version": "0123456789ab"}, "model_version"), ({"reason": 5}, "got `int`")])
def test_advice_that_was_touched(change, words, rows, trade_answer, local):
    row = np.where(np.array(PREDICTOR_FEATURES) == "funding", np.nan, rows["BTCUSD"][-1])
    answer = {**trade_answer, "threshold": None, "should_trade": False, "missing": [name for name, value in zip(PREDICTOR_FEATURES, row) if np.isnan(value)]}
    read_trade(encode(answer), "BTCUSD", row, local.versions())
    with pytest.raises(BadAnswer, match=words):
        read_trade(encode(answer | change), "BTCUSD", row, local.versions())


def test_a_mixed_pair_is_refused_without_a_pin(server, market, rows, regime_answer, trade_answer):
    answer, row = encode(regime_answer), rows["BTCUSD"][-1]
    older = encode({**trade_answer, "model_version": "0123456789ab"})
    with adviser(server) as remote:
        server.answer = older
        assert remote.probability("BTCUSD", row).model_version == "0123456789ab"
        server.answer = answer
        remote.regime(market["BTCUSD"])
        server.answer = older
        with pytest.raises(BadAnswer, match=f"expected model_version {trade_answer['model_version']}, got 0123456789ab"):
            remote.probability("BTCUSD", row)
        server.answer = encode(trade_answer)
        assert remote.probability("BTCUSD", row).model_version == trade_answer["model_version"]


# --- time ---

@contextlib.contextmanager
def door(serve):
    "A listening socket whose callers are served by hand."
    listening = socket.create_server(("127.0.0.1", 0))

    def run():
        with contextlib.suppress(OSError):
            while True:
                caller, _ = listening.accept()
                threading.Thread(target=quietly, args=(caller,), daemon=True).start()

    def quietly(caller):
        with contextlib.suppress(OSError), caller:
            serve(caller)

    threading.Thread(target=run, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()


def drip(caller, first=b"", byte=b"x", pause=0.03):
    caller.sendall(first)
    while True:
        caller.sendall(byte)
        time.sleep(pause)


UNBOUNDED = 5.0  # seconds: what the library waits for if nobody tells it otherwise

SLOW = {
    "silence": lambda caller: time.sleep(FOREVER),
    "dripping status": partial(drip, byte=b"H"),
    "dripping headers": partial(drip, first=b"HTTP/1.1 200 OK\r\n", byte=b"a: b\r\n"),
    "dripping body": partial(drip, first=b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", byte=b" "),
    "dripping chunks": partial(drip, first=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", byte=b"1\r\n \r\n"),
    "endless 1xx": partial(drip, byte=b"HTTP/1.1 103 Early Hints\r\n\r\n"),
}


@pytest.mark.parametrize("name", SLOW)
def test_no_try_outlasts_its_time(name, market):
    with door(SLOW[name]) as home, ServiceAdviser(home, home, patience=Patience(answer=0.25, total=0.6, connect=0.2, first=0.01)) as remote:
        began = time.monotonic()
        with pytest.raises(NoAnswer, match=r"no answer \((ReadTimeout|TimeoutException)\)"):
            remote.regime(market["BTCUSD"])
        assert 0.45 < time.monotonic() - began < 0.8 * UNBOUNDED


def test_a_host_that_does_not_pick_up(market):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        home = f"http://127.0.0.1:{full.getsockname()[1]}"
        with ServiceAdviser(home, home, patience=Patience(connect=0.2, retries=0)) as remote:
            began = time.monotonic()
            with pytest.raises(NoAnswer, match="ConnectTimeout"):
                remote.regime(market["BTCUSD"])
            assert 0.15 < time.monotonic() - began < 0.8 * UNBOUNDED


def test_nobody_home(market):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        home = f"http://127.0.0.1:{gone.getsockname()[1]}"
    with ServiceAdviser(home, home, patience=Patience(first=0.001)) as remote, pytest.raises(NoAnswer, match="ConnectError"):
        remote.regime(market["BTCUSD"])


@pytest.mark.parametrize("headers, wait", [
    ({"retry-after": "7"}, 7.0), ({"retry-after": " 0 "}, 0.0), ({}, None), ({"retry-after": "-3"}, None), ({"retry-after": "9" * 5000}, None), ({"retry-after": "²"}, None),
    ({"retry-after": "1.5"}, None), ({"retry-after": "Wed, 01 Jan 2025 00:00:10 GMT"}, None), ({"retry-after": "nonsense", "date": "Wed, 01 Jan 2025 00:00:00 GMT"}, None),
    ({"retry-after": "Wed, 01 Jan 2025 00:00:10 GMT", "date": "Wed, 01 Jan 2025 00:00:07 GMT"}, 3.0),
    ({"retry-after": "Wed, 01 Jan 2025 00:00:00 GMT", "date": "Wed, 01 Jan 2025 00:00:07 GMT"}, 0.0),
    ({"retry-after": "Wed, 01 Jan 2025 00:00:10", "date": "Wed, 01 Jan 2025 00:00:07 GMT"}, None)])
def test_when_to_come_back(headers, wait):
    assert retry_after(headers) == wait


@given(st.integers(100, 599), st.dictionaries(st.sampled_from(["retry-after", "date"]), st.text(max_size=40)), st.binary(max_size=200))
def test_any_reply_is_an_answer_or_an_error_of_ours(status, headers, body):
    try:
        assert read_reply(status, headers, body) == body and status == 200
    except (InputError, RetryError) as error:
        assert status != 200 and (isinstance(error, InputError) == (300 <= status < 500 and status not in (408, 429)))


# --- connections ---

def test_one_connection_serves_many_questions(server, market, regime_answer):
    server.answer = encode(regime_answer)
    with adviser(server) as remote:
        for _ in range(20):
            remote.regime(market["BTCUSD"])
    assert server.connections == 1 and len(server.seen) == 20


def test_a_connection_that_was_closed_meanwhile_costs_nothing(server, market, regime_answer):
    server.answer = encode(regime_answer)
    server.moods = [lambda h: (h.say(200, server.answer), h.break_off())] * 5
    clock = Clock()
    with adviser(server, clock) as remote:
        for _ in range(5):
            remote.regime(market["BTCUSD"])
            time.sleep(0.02)
    assert server.connections == 5 and clock.waits == []


def test_a_closed_adviser_asks_no_more(server, market):
    remote = adviser(server)
    remote.close()
    with pytest.raises(RuntimeError, match="closed"):
        remote.regime(market["BTCUSD"])
    assert server.seen == [] and remote.detector.breaker.state == "closed"


# --- bits ---

@given(st.lists(st.floats(0, 1e-300) | st.floats(0, 1), min_size=5, max_size=5).filter(lambda shares: sum(shares) > 1e-290))
def test_probabilities_keep_their_bits(market, regime_answer, shares):
    total = sum(shares)
    posterior = [share / total for share in shares]
    best = int(np.argmax(posterior))
    answer = {**regime_answer, "state_probabilities": dict(zip(REGIMES, posterior)), "regime": REGIMES[best], "confidence": posterior[best]}
    view = view_of(read_regime(encode(answer), market["BTCUSD"]))
    assert view.posterior.tobytes() == np.array(posterior).tobytes() and view.regime.tolist() == [best] and view.confidence.tolist() == [posterior[best]]


@settings(max_examples=60)
@given(st.lists(st.floats(1e-9, 1e12), min_size=200, max_size=200), st.integers(0, 2**31))
def test_candles_keep_their_bits(market, prices, volume):
    values = np.array(prices)
    candles = market["BTCUSD"][:200]
    asked = parse_regimes(regime_question(type(candles)("BTCUSD", 3600, candles.time, values, values * 1.1, values / 1.1, values, np.full(200, volume / 3))))[0][0]
    for column, sent in (("open", values), ("high", values * 1.1), ("low", values / 1.1), ("volume", np.full(200, volume / 3))):
        assert np.array(getattr(asked, column)).tobytes() == sent.tobytes()
    assert asked.time == candles.time.tolist() and asked.resolution == "1h"


INPUTS = st.tuples(*[st.just(np.nan) | (st.sampled_from([-1.0, 1.0]) if name == "side" else st.floats(low, high)) for name, (low, high, _) in BOUNDS.items()])


@given(INPUTS)
def test_rows_keep_their_bits(values):
    row = np.array(values)
    row[0] = np.nan  # five probabilities need not sum to 1 then
    asked = parse_trades(trade_question("BTCUSD", row))[0][0]
    assert predict_trade.row_of(asked).tobytes() == np.where(np.isnan(row), np.nan, row).tobytes()


def test_only_the_last_window_is_sent(market):
    assert regime_question(market["BTCUSD"]) == regime_question(market["BTCUSD"][-200:])


def test_questions_that_are_not_sent(server, market, rows):
    candles = market["BTCUSD"]
    close = candles.close.copy()
    close[-3] = np.nan
    broken = type(candles)("BTCUSD", 3600, candles.time, candles.open, candles.high, candles.low, close, candles.volume)
    with adviser(server) as remote:
        for question in (broken, candles[:0]):
            with pytest.raises(InputError, match="expected finite numbers"):
                remote.regime(question)
        with pytest.raises(InputError, match="expected 25 inputs"):
            remote.probability("BTCUSD", rows["BTCUSD"])
    assert server.seen == []


# --- who is asking ---

def token_for(audience, ends):
    claims = base64.urlsafe_b64encode(json.dumps({"aud": audience, "exp": ends}).encode()).decode().rstrip("=")
    return f"eyJhbGciOiJSUzI1NiJ9.{claims}.c2lnbmF0dXJl"


def test_each_service_gets_its_own_token(server, market, rows, regime_answer, trade_answer):
    audiences = []

    def token(audience):
        audiences.append(audience)
        return token_for(audience, time.time() + 3600)

    with adviser(server, token=token) as remote:
        for _ in range(3):
            server.answer = encode(regime_answer)
            remote.regime(market["BTCUSD"])
            server.answer = encode(trade_answer)
            remote.probability("BTCUSD", rows["BTCUSD"][-1])
    assert audiences == [server.home], "one audience here, asked once and kept"
    assert all(headers["Authorization"].startswith("Bearer eyJ") and "X-API-Key" not in headers for _, headers, _ in server.seen)


def test_tokens_are_kept_until_five_minutes_before_their_end():
    clock, made = Clock(), []

    def fetch(audience):
        made.append(clock.now)
        return token_for(audience, clock.now + 3600)

    tokens = TokenCache(fetch, clock)
    for clock.now in (0.0, 1.0, 3299.0, 3300.0, 6599.9, 6600.0):
        assert expiry_of(tokens("https://a.invalid")) - clock.now > 300
    assert made == [0.0, 3300.0, 6600.0]
    tokens("https://b.invalid")
    assert len(made) == 4


def test_a_text_without_an_end_is_used_once():
    made = []
    tokens = TokenCache(lambda audience: made.append(audience) or "opaque-token")
    assert tokens("a") == tokens("a") == "opaque-token" and len(made) == 2


@pytest.mark.parametrize("token", ["", "a", "a.b", "a.%%%.c", "a.bnVsbA.c", "a.eyJleHAiOiAieCJ9.c", "a.eyJleHAiOm51bGx9.c", "a.\u00e9.c"])
def test_tokens_that_tell_no_end(token):
    assert expiry_of(token) is None


def test_threads_fetch_a_token_once():
    made, gate = [], threading.Barrier(8)

    def fetch(audience):
        made.append(audience)
        time.sleep(0.02)
        return token_for(audience, time.time() + 3600)

    tokens = TokenCache(fetch)

    def ask(_):
        gate.wait()
        return tokens("https://a.invalid")

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1 and len(made) == 1


def test_the_metadata_server(server):
    def answer(h):
        query = parse_qs(urlsplit(h.path).query)
        assert h.headers["Metadata-Flavor"] == "Google" and query["format"] == ["full"]
        h.say(200, token_for(query["audience"][0], 9e9).encode() + b"\n", Metadata_Flavor="Google")

    server.get = answer
    assert identity_token("https://a.invalid", server.home + "/identity") == token_for("https://a.invalid", 9e9)
    for reply, error, words in ((lambda h: h.say(404), InputError, "service account"), (lambda h: h.say(200, b"<html>"), InputError, "Google's metadata server"),
                                (lambda h: h.say(503), NoAnswer, "answered 503"), (lambda h: h.break_off(), NoAnswer, "gave no answer")):
        server.get = reply
        with pytest.raises(error, match=words):
            identity_token("https://a.invalid", server.home + "/identity")


def test_without_a_token_nothing_is_sent(server, market):
    def no_token(audience):
        raise NoAnswer("no identity token: the metadata server answered 503")

    with adviser(server, token=no_token) as remote:
        for _ in range(2):
            with pytest.raises(NoAnswer, match="hmm-detector: no identity token"):
                remote.regime(market["BTCUSD"])
        with pytest.raises(ServiceDown):
            remote.regime(market["BTCUSD"])
    assert server.seen == []


@pytest.mark.parametrize("address, words", [
    ("ftp://host", "https:// and a host"), ("host:8080", "https:// and a host"), ("", "https:// and a host"), ("https://", "https:// and a host"),
    ("https://host/v1", "at most /detect_regime"), ("https://host?x=1", "at most"), ("https://u:hunter22@host", "at most"), ("https://host:notaport", "something that is none"),
    ("https://[::1", "something that is none"), ("http://host.example", "in the clear"), ("http://127.0.0.1.example.com", "in the clear"), ("http://10.0.0.1", "in the clear")])
def test_addresses_that_are_refused(address, words):
    with pytest.raises(InputError, match=words) as caught:
        origin_of(address, "/detect_regime", secret=True)
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize("address, origin", [
    ("https://hmm-x.a.run.app", "https://hmm-x.a.run.app"), (" https://hmm-x.a.run.app/ ", "https://hmm-x.a.run.app"), ("http://localhost:8080/detect_regime", "http://localhost:8080"),
    ("http://[::1]:8080", "http://[::1]:8080"), ("https://host:8443", "https://host:8443")])
def test_addresses_that_are_good(address, origin):
    assert origin_of(address, "/detect_regime", secret=True) == origin


def test_plain_http_elsewhere_needs_no_secret_to_be_allowed():
    assert origin_of("http://10.0.0.1:8080", "/x", secret=False) == "http://10.0.0.1:8080"


@pytest.mark.parametrize("key", ["", "short", "with a space in it", "line\nbreak-0123456789", "schlüssel-0123456789", "x" * 9000])
def test_keys_that_cannot_be_sent(key):
    with pytest.raises(InputError, match="key: expected 8 to 8192 printable") as caught:
        ServiceAdviser("https://a.invalid", "https://b.invalid", key=key)
    assert not key or key not in str(caught.value)


def test_a_key_and_tokens_are_one_too_many():
    with pytest.raises(InputError, match="got both"):
        ServiceAdviser("https://a.invalid", "https://b.invalid", key=KEY, token=lambda audience: "token-token")


LEAKS = {
    "an answer": lambda h: h.say(200, b"{}"),
    "a refusal that repeats it": lambda h: h.say(403, json.dumps({"detail": "x" * 390 + h.secret, "errors": [{"pointer": h.secret, "reason": h.secret}], "request_id": h.secret}).encode()),
    "an error that repeats it": lambda h: h.say(500, json.dumps({"detail": f"bad key {h.secret}\n{h.secret}"}).encode()),
    "a broken line": lambda h: h.break_off(),
}


@pytest.mark.parametrize("how", ["key", "token"])
@pytest.mark.parametrize("name", LEAKS)
def test_secrets_are_seen_nowhere(server, market, caplog, name, how):
    caplog.set_level(logging.DEBUG)
    secret = KEY if how == "key" else token_for("canary", time.time() + 3600)
    server.always = lambda h: (setattr(h, "secret", secret), LEAKS[name](h))
    with adviser(server, **({"key": KEY} if how == "key" else {"token": lambda audience: secret})) as remote:
        with pytest.raises((InputError, RetryError)) as caught:
            remote.regime(market["BTCUSD"])
        told = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + str(caught.value) + repr(remote) + repr(vars(remote)) + repr(vars(remote.detector))
        with contextlib.suppress(InputError, RetryError):
            remote.regime(market["BTCUSD"])
    told += repr(Credentials(KEY)) + caplog.text + repr([record.__dict__ for record in caplog.records])
    assert server.seen and secret in "".join(server.seen[0][1].values())
    for place in range(0, len(secret) - 12, 4):
        assert secret[place:place + 12] not in told


# --- encrypted ---

@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-days", "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    return folder


def encrypted(server, certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.home = f"https://localhost:{server.server_port}"


def test_https_is_checked_and_works(server, certificate, market, regime_answer, monkeypatch):
    encrypted(server, certificate)
    server.answer = encode(regime_answer)
    with adviser(server, key=KEY) as stranger, pytest.raises(NoAnswer, match="ConnectError"):
        stranger.regime(market["BTCUSD"])
    assert server.seen == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    with adviser(server, key=KEY) as remote:
        assert remote.regime(market["BTCUSD"]).confidence.tolist() == [regime_answer["confidence"]]
        remote.regime(market["BTCUSD"])
    assert len(server.seen) == 2


def test_an_encrypted_answer_has_its_time_too(server, certificate, market, monkeypatch):
    encrypted(server, certificate)
    server.always = lambda h: drip(h.connection, b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" ")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    with adviser(server, patience=Patience(answer=0.3, retries=0)) as remote:
        began = time.monotonic()
        with pytest.raises(NoAnswer, match="Timeout"):
            remote.regime(market["BTCUSD"])
        assert time.monotonic() - began < 0.8 * UNBOUNDED


# --- the room itself ---

def test_the_client_needs_no_server(tmp_path):
    code = "import sys, delta_go.serving.client; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"flask", "werkzeug", "prometheus_client", "pandas", "sklearn", "hmmlearn", "matplotlib", "scipy", "numba", "pyarrow", "xgboost", "requests"}
    assert {"httpx", "msgspec", "numpy"} <= loaded


def test_proxies_and_password_files_are_not_looked_at(server, market, regime_answer, monkeypatch, tmp_path):
    server.answer = encode(regime_answer)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password hunter22\n")
    for name, value in {"HTTP_PROXY": "http://127.0.0.1:1", "ALL_PROXY": "http://127.0.0.1:1", "NETRC": str(tmp_path / ".netrc")}.items():
        monkeypatch.setenv(name, value)
    with adviser(server) as remote:
        remote.regime(market["BTCUSD"])
    assert "Authorization" not in server.seen[0][1]


def test_any_service_can_be_asked_with_patience(server):
    server.answer = b'{"n": 1}'
    service = Service("echo", server.home, "/echo")
    assert service.ask("/echo", b"{}", json.loads) == {"n": 1}
    service.close()
    assert server.seen[0][0] == "/echo" and server.seen[0][1]["Content-Type"] == "application/json"
