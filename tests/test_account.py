"One account against real servers on this machine: one that keeps the exchange's rules, and many that break them."
import ast
import contextlib
import gzip
import itertools
import json
import logging
import socket
import struct
import threading
import time
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError, RetryError
from delta_go.live import account as account_module
from delta_go.live.account import (
    Account,
    Budget,
    ExchangeClock,
    acknowledge,
    balances,
    cancel_all,
    cancel_order,
    check_key,
    create_heartbeat,
    edit_bracket,
    fills,
    leverage,
    open_orders,
    order_by_client_id,
    order_history,
    place_order,
    position,
    positions,
    set_leverage,
    synchronise,
    weight_of,
)
from delta_go.live.exchange import Credentials, Listing, sign
from delta_go.trading.messages import (
    Accepted,
    Answer,
    CouldNotAsk,
    NotSent,
    OrderRequest,
    Rejected,
    Unknown,
    Unreadable,
    judge,
    read_order,
    same_code,
    what_next,
)

KEY, SECRET = "key-7f3a0191c2", "secret-5d1e77a04bb9"
CREDENTIALS = Credentials(KEY, SECRET)
BITCOIN = Listing("BTCUSD", 27, Decimal("0.001"), Decimal("0.5"), 125_000, Decimal("0.005"), Decimal("0.0025"), Decimal("0.0005"), "operational")
WANTED = OrderRequest("dg-000017", "BTCUSD", "buy", 3, stop=Decimal(59000), target=Decimal(62000))
ROW = {"id": 9001, "product_symbol": "BTCUSD", "side": "buy", "order_type": "market_order", "size": 3, "unfilled_size": 0, "client_order_id": "dg-000017", "state": "closed",
       "limit_price": None, "average_fill_price": "60010.5", "stop_order_type": None, "stop_price": None, "reduce_only": False, "bracket_order": True,
       "bracket_stop_loss_price": "59000", "bracket_take_profit_price": "62000", "created_at": "2026-10-05T10:11:12.123456Z", "updated_at": "1790000000123456"}
SUCCESS = json.dumps({"success": True, "result": ROW})
REFUSAL = json.dumps({"success": False, "error": {"code": "insufficient_margin", "context": {"required_additional_balance": "2.89"}}})


def make_account(url, quick=.4, known=True, budget=None):
    account = Account(url, CREDENTIALS, {"BTCUSD": BITCOIN}, time.monotonic, budget)
    account.client.timeout = httpx.Timeout(quick)
    if known:
        for back in (.3, .2, .1):
            at = time.monotonic() - back
            account.clock.learn(at, at + .001, time.time() - back)
    return account


# ---- a server that misbehaves -------------------------------------------------------------------------------------------------

class Villain:
    "A listening port; each connection is handed to `act`, and what it sent is kept."
    def __init__(self, act):
        self.act, self.connections, self.heard = act, 0, bytearray()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection = self.listener.accept()[0]
                self.connections += 1
                threading.Thread(target=self.one, args=(connection,), daemon=True).start()

    def one(self, connection):
        with contextlib.suppress(OSError), connection:
            connection.settimeout(3)
            self.act(self, connection)

    def request(self, connection):
        "Read one whole request."
        data = bytearray()
        while b"\r\n\r\n" not in data:
            data += connection.recv(65536) or b"\r\n\r\n"
        head, _, body = bytes(data).partition(b"\r\n\r\n")
        length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0)
        while len(body) < length:
            body += connection.recv(65536)
        self.heard += data

    def close(self):
        self.listener.close()


def after_request(*pieces, pause=0.0, end="close"):
    def act(villain, connection):
        villain.request(connection)
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        if end == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if end == "silence":
            time.sleep(1.2)
    return act


def at_once(end, greeting=b""):
    def act(_, connection):
        time.sleep(.05)
        if greeting:
            connection.sendall(greeting)
        if end == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if end == "silence":
            time.sleep(1.2)
    return act


def reply(status, body, *headers):
    body = body.encode() if isinstance(body, str) else body
    return "\r\n".join([f"HTTP/1.1 {status} Words", f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


WHOLE = reply(200, SUCCESS)
LOST = {  # everything after the first byte has left and before a whole reply has come
    "closed without reading": at_once("close"),
    "reset without reading": at_once("reset"),
    "silence without reading": at_once("silence"),
    "closed after the request": after_request(),
    "reset after the request": after_request(end="reset"),
    "silence after the request": after_request(end="silence"),
    "half a status line": after_request(WHOLE[:10]),
    "half a status line, then silence": after_request(WHOLE[:10], end="silence"),
    "half a status line, then reset": after_request(WHOLE[:10], end="reset"),
    "headers cut off": after_request(WHOLE[:40]),
    "headers cut off, then silence": after_request(WHOLE[:40], end="silence"),
    "no body": after_request(WHOLE.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"),
    "half a body": after_request(WHOLE[:-20]),
    "half a body, then reset": after_request(WHOLE[:-20], end="reset"),
    "half a body, then silence": after_request(WHOLE[:-20], end="silence"),
    "chunks cut off": after_request(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"suc\r\n"),
    "a chunk that lies": after_request(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + SUCCESS.encode()),
    "garbage": after_request(b"\x00\xff\x16\x03 what"),
    "another protocol": after_request(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "a header that is none": after_request(b"HTTP/1.1 200 OK\r\nContent Length 3\r\n\r\n{}"),
    "two lengths": after_request(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    "endless headers": after_request(b"HTTP/1.1 200 OK\r\n", b"X: " + b"y" * 200_000 + b"\r\n\r\n"),
    "promised more to come": after_request(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "packed badly": after_request(reply(200, b"not gzip at all", "Content-Encoding: gzip")),
    "packed and cut off": after_request(reply(200, gzip.compress(SUCCESS.encode())[:-12], "Content-Encoding: gzip")),
    "a body that does not end": after_request(b"HTTP/1.1 200 OK\r\n\r\n{", *[b" "] * 60, pause=.02),
    "a body without end and too large": after_request(b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 300_000),
}


@pytest.fixture
def patient(monkeypatch):
    monkeypatch.setattr(account_module, "LONGEST", .3)
    monkeypatch.setattr(account_module, "LARGEST", 200_000)


@pytest.mark.parametrize("name", LOST)
def test_a_request_that_left_and_was_not_answered_whole_is_unknown(name, patient):
    villain = Villain(LOST[name])
    account = make_account(f"http://127.0.0.1:{villain.port}")
    before = account.clock.now()
    outcome = place_order(account, WANTED)
    assert isinstance(outcome, Unknown), outcome
    assert before - 1 < outcome.signed_at <= before + .5
    assert SECRET not in repr(outcome) and KEY not in repr(outcome)
    assert villain.connections == 1, "sent once"
    assert bytes(villain.heard).count(b"POST /v2/orders") <= 1
    villain.close()


def blocked_port():
    "A port whose queue is full, so that nobody can connect."
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    waiting = []
    for _ in range(8):
        waiting.append(socket.socket())
        waiting[-1].setblocking(False)
        waiting[-1].connect_ex(listener.getsockname())
    return listener, waiting


def dead_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


UNREACHED = {
    "nobody listens": None,
    "no such host": "http://exchange.invalid",
    "nobody listens, encrypted": None,
    "encryption answered with text": at_once("close", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "encryption closed": at_once("close"),
    "encryption reset": at_once("reset"),
    "encryption silent": at_once("silence"),
    "encryption cut off": at_once("close", b"\x16\x03\x03\x00\x7a\x02\x00"),
}


@pytest.mark.parametrize("name", UNREACHED)
def test_a_request_that_never_left_is_not_sent(name):
    act = UNREACHED[name]
    villain = Villain(act) if callable(act) else None
    scheme = "https" if "encrypt" in name else "http"
    url = act if isinstance(act, str) else f"{scheme}://127.0.0.1:{villain.port if villain else dead_port()}"
    outcome = place_order(make_account(url), WANTED)
    assert isinstance(outcome, NotSent), outcome
    assert outcome.reason.startswith("could not reach")
    assert villain is None or villain.connections == 1


def test_a_connection_that_is_never_taken_is_not_sent():
    listener, waiting = blocked_port()
    outcome = place_order(make_account(f"http://127.0.0.1:{listener.getsockname()[1]}", quick=.3), WANTED)
    assert isinstance(outcome, NotSent), outcome
    for each in (listener, *waiting):
        each.close()


BODIES = {"order": SUCCESS, "another order": json.dumps({"success": True, "result": ROW | {"client_order_id": "dg-1"}}), "no result": '{"success": true}',
          "impossible order": json.dumps({"success": True, "result": ROW | {"unfilled_size": 9}}), "a code": REFUSAL, "a word": '{"error": "unauthorized", "success": false}',
          "its own trouble": '{"success": false, "error": {"code": "internal_server_error"}}', "no code": '{"success": false, "error": {}}', "a page": "<html>", "nothing": "", "a list": "[1]",
          "deep": "[" * 100_000}
SETTLED = {200: {"order": Accepted}, **{status: {"a code": Rejected, "a word": Rejected} for status in (400, 401, 403, 404, 405, 406, 409, 422)}}


@pytest.mark.parametrize("status, body", list(itertools.product((200, 201, 204, 302, 400, 401, 403, 404, 405, 406, 408, 409, 422, 425, 429, 500, 502, 503, 504), BODIES)))
def test_only_the_exchanges_own_words_settle_a_change(status, body):
    def own(result):
        order = read_order(result)
        if order.client_order_id != "dg-000017":
            raise Unreadable("another order")
        return order
    assert type(judge(status, BODIES[body], 1_700_000_000, own)) is SETTLED.get(status, {}).get(body, Unknown)


@pytest.mark.parametrize("status, body", [(200, "order"), (200, "another order"), (200, "no result"), (200, "a page"), (201, "order"), (302, "nothing"), (400, "a code"), (400, "its own trouble"),
                                          (400, "a page"), (401, "a word"), (403, "a page"), (404, "a page"), (404, "a code"), (429, "a code"), (429, "nothing"), (500, "a code"), (502, "a page"), (503, "nothing"), (504, "nothing")])
def test_replies_over_the_wire(status, body):
    villain = Villain(after_request(reply(status, BODIES[body])))
    outcome = place_order(make_account(f"http://127.0.0.1:{villain.port}"), WANTED)
    assert type(outcome) is SETTLED.get(status, {}).get(body, Unknown)
    assert villain.connections == 1 and bytes(villain.heard).count(b"POST /v2/orders") == 1
    villain.close()


CHANGES = {"cancel": lambda account: cancel_order(account, "BTCUSD", 9001), "cancel all": lambda account: cancel_all(account, "BTCUSD"), "bracket": lambda account: edit_bracket(account, "BTCUSD", 9001, Decimal(59500)),
           "leverage": lambda account: set_leverage(account, "BTCUSD", 10), "arm": lambda account: create_heartbeat(account, "dg", ["BTCUSD"]), "alive": lambda account: acknowledge(account, "dg", 30)}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["closed after the request", "reset after the request", "silence after the request", "half a body", "closed without reading"])
def test_every_change_is_sent_once_whatever_happens(change, name, patient):
    villain = Villain(LOST[name])
    outcome = CHANGES[change](make_account(f"http://127.0.0.1:{villain.port}", quick=.2))
    assert isinstance(outcome, Unknown) and villain.connections == 1
    assert isinstance(CHANGES[change](make_account(f"http://127.0.0.1:{dead_port()}")), NotSent)
    villain.close()


def test_a_kept_connection_that_the_server_closed_is_opened_anew():
    villain = Villain(after_request(WHOLE))   # says keep-alive, closes
    account = make_account(f"http://127.0.0.1:{villain.port}")
    for _ in range(3):
        assert isinstance(place_order(account, WANTED), Accepted)
        time.sleep(.05)
    assert villain.connections == 3


def test_a_kept_connection_that_closes_on_the_next_request_is_unknown_and_not_repeated():
    def act(villain, connection):
        villain.request(connection)
        connection.sendall(WHOLE)
        villain.request(connection)
    villain = Villain(act)
    account = make_account(f"http://127.0.0.1:{villain.port}")
    assert isinstance(place_order(account, WANTED), Accepted)
    assert isinstance(place_order(account, WANTED), Unknown)
    assert villain.connections == 1 and bytes(villain.heard).count(b"POST /v2/orders") == 2


# ---- doors on our side --------------------------------------------------------------------------------------------------------

def doors():
    def jittery(account):
        account.clock.learn(time.monotonic() - .01, time.monotonic(), time.time() + 3)
    def forgotten(account):
        account.clock.forget()
    def spent(account):
        while account.budget.take(25, time.monotonic()) == 0:
            pass
    def shut(account):
        account.budget.close(12, time.monotonic())
    return {"no time": forgotten, "no agreement on the time": jittery, "no room": spent, "told to stay away": shut}


@pytest.mark.parametrize("door", doors())
def test_a_closed_door_means_not_sent_and_no_connection(door):
    villain = Villain(after_request(WHOLE))
    account = make_account(f"http://127.0.0.1:{villain.port}")
    doors()[door](account)
    outcome = place_order(account, WANTED)
    assert isinstance(outcome, NotSent)
    assert (outcome.wait > 0) == (door in ("no room", "told to stay away"))
    assert villain.connections == 0
    villain.close()


def test_protection_goes_on_when_entries_have_spent_their_share():
    villain = Villain(after_request(reply(200, '{"success": true, "result": {}}')))
    account = make_account(f"http://127.0.0.1:{villain.port}")
    doors()["no room"](account)
    assert isinstance(place_order(account, WANTED), NotSent)
    assert isinstance(open_orders(account), CouldNotAsk)
    assert cancel_all(account, "BTCUSD") == Accepted(None)
    assert isinstance(place_order(account, OrderRequest("dg-9", "BTCUSD", "sell", 3, reduce_only=True)), Unknown), "sent; the reply has no order in it"


@pytest.mark.parametrize("change, words", [(dict(stop=Decimal("59000.3")), "tick 0.5, got 59000.3"), (dict(target=Decimal("62000.25")), "62000.25"), (dict(symbol="XRPUSD", stop=None, target=None), "XRPUSD")])
def test_prices_off_the_tick_and_unknown_products_never_leave(change, words):
    fields = {"client_order_id": "dg-1", "symbol": "BTCUSD", "side": "buy", "size": 1} | change
    outcome = place_order(make_account(f"http://127.0.0.1:{dead_port()}"), OrderRequest(**fields))
    assert isinstance(outcome, NotSent) and words in outcome.reason and "reach" not in outcome.reason


def test_the_named_time_is_kept_by_everyone():
    villain = Villain(after_request(reply(429, "", "X-RATE-LIMIT-RESET: 2500")))
    account = make_account(f"http://127.0.0.1:{villain.port}")
    assert isinstance(place_order(account, WANTED), Unknown)
    refused = [cancel_order(account, "BTCUSD", 1), place_order(account, WANTED)]
    assert all(isinstance(outcome, NotSent) and 0 < outcome.wait <= 2.5 for outcome in refused)
    assert isinstance(question := order_by_client_id(account, "dg-1"), CouldNotAsk) and question.wait > 0
    assert villain.connections == 1
    time.sleep(2.6)
    assert isinstance(place_order(account, WANTED), Unknown) and villain.connections == 2


# ---- an exchange that keeps the rules -----------------------------------------------------------------------------------------

class Exchange:
    "Checks signatures over the raw bytes with its own clock, and answers what it was told."
    def __init__(self, skew=0.0):
        self.skew, self.answers, self.seen = skew, [], []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, payload = owner.judge(self, body)
                text = json.dumps(payload).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(text)), "Request-In-Time": f"{int(owner.now() * 1e6)}"}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)
            do_GET = do_POST = do_PUT = do_DELETE = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def now(self):
        return time.time() + self.skew

    def judge(self, request, body):
        if request.path == "/v2/settings":
            return 200, {"success": True, "result": {"server_time": int(self.now() * 1e6)}}
        at = int(request.headers["timestamp"])
        if abs(at - self.now()) > 5:
            return 401, {"success": False, "error": {"code": "expired_signature", "context": {"request_time": at, "server_time": int(self.now())}}}
        if request.headers["api-key"] != KEY:
            return 401, {"success": False, "error": {"code": "invalid_api_key"}}
        if request.headers["signature"] != sign(SECRET, request.command, at, request.path, body=body):
            return 401, {"success": False, "error": {"code": "Signature Mismatch"}}
        assert request.headers["User-Agent"] and (not body or request.headers["Content-Type"] == "application/json")
        self.seen.append((request.command, request.path, json.loads(body) if body else None))
        status, payload = self.answers.pop(0)
        return status, payload if isinstance(payload, dict) and "success" in payload else {"success": True, "result": payload}


@pytest.fixture
def exchange():
    made = Exchange(skew=10)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def account(exchange):
    made = make_account(exchange.url, quick=3, known=False)
    assert made.clock.trouble() and synchronise(made) is None
    yield made
    made.client.close()


def test_the_sheets_vectors():
    secret, at = "emulator-secret-0001", 1_700_000_000
    body = b'{"product_id":27,"size":3,"side":"buy","order_type":"limit_order","limit_price":"60000.5"}'
    assert sign(secret, "POST", at, "/v2/orders", "", body) == "76593c7b731671f36cb07ca4a1f68dd6b736a5300cac109f6efc390b5a087ad1"
    assert sign(secret, "GET", at, "/v2/orders", "?product_ids=27%2C3136&states=open%2Cpending") == "60d9c867ad82a0b037dd0aa5e47a44ba2ad62be1117b0fb6ee33171b9dc4dae1"
    assert sign(secret, "DELETE", at, "/v2/orders", "", b'{"id":9001,"product_id":27}') == "381ff2d263f6ea24b6d3a6c99843e69398d3483016e4aef209f201abc86160be"
    assert sign(secret, "GET", at, "/v2/wallet/balances") == "684ef5e49268a2d58056d8a259138bf0911d90046400f0d393bc9c91ced80d8b"
    assert sign(secret, "GET", at, "/live") == "7eaebebeb7fd9e3ab2b04b5e418a053ef6db9ab8461ddeb949d4c809b7b97ff4"


def test_a_whole_life_with_valid_signatures(exchange, account):
    exchange.answers = [(200, {"user_id": 4455}), (200, {"leverage": "10"}), (200, {"leverage": "10"}), (200, ROW), (200, ROW), (200, ROW | {"state": "cancelled", "unfilled_size": 1}),
                        (200, {}), (200, {"size": -2, "entry_price": "60000"}), (200, [{"asset_symbol": "USD", "balance": "1E+4", "available_balance": "9880", "blocked_margin": "120"}])]
    assert check_key(account) == 4455
    assert set_leverage(account, "BTCUSD", 10) == Accepted(None) and leverage(account, "BTCUSD") == Answer(Decimal(10))
    placed = place_order(account, WANTED)
    assert placed.order.filled_size == 3 and placed.order.bracket_stop == 59000 and placed.order.updated_us == 1_790_000_000_123_456
    assert order_by_client_id(account, "dg-000017") == Answer(placed.order)
    assert cancel_order(account, "BTCUSD", "dg-000017").order.filled_size == 2
    assert edit_bracket(account, "BTCUSD", 9001, target=Decimal("62500.5")) == Accepted(None)
    assert position(account, "BTCUSD").value.size == -2
    assert balances(account).value["USD"].balance == 10_000
    bodies = {path: body for _, path, body in exchange.seen}
    assert bodies["/v2/orders"] == {"product_id": 27, "client_order_id": "dg-000017"} and bodies["/v2/orders/bracket"]["bracket_take_profit_price"] == "62500.5"
    assert exchange.seen[3][2] == {"product_id": 27, "size": 3, "side": "buy", "order_type": "market_order", "client_order_id": "dg-000017", "reduce_only": False,
                                   "bracket_stop_loss_price": "59000", "bracket_take_profit_price": "62000", "bracket_stop_trigger_method": "last_traded_price"}


def test_cancelling_all_names_every_kind(exchange, account):
    exchange.answers = [(200, {}), (200, {"success": True})]
    assert cancel_all(account, "BTCUSD") == cancel_all(account, "BTCUSD", stops=True, reduce_only=True) == Accepted(None)
    assert [list(body.values()) for _, _, body in exchange.seen] == [[27, True, False, False], [27, True, True, True]]


@pytest.mark.parametrize("answer, expected", [
    ((404, {"success": False, "error": {"code": "open_order_not_found"}}), Answer(None)),
    ((400, {"success": False, "error": {"code": "OpenOrderNotFound"}}), Answer(None)),
    ((400, {"success": False, "error": {"code": "bad_schema"}}), CouldNotAsk),
    ((404, {"success": False}), CouldNotAsk),
    ((502, {"success": False, "error": {"code": "open_order_not_found"}}), CouldNotAsk),
    ((200, {"success": True, "result": None}), CouldNotAsk),
    ((200, ROW | {"client_order_id": "dg-2"}), CouldNotAsk),
    ((200, ROW | {"state": "filled"}), CouldNotAsk),
])
def test_not_found_and_could_not_ask_are_different(exchange, account, answer, expected):
    exchange.answers = [answer]
    got = order_by_client_id(account, "dg-000017")
    assert got == expected if isinstance(expected, Answer) else isinstance(got, expected)


def test_questions_survive_the_villains(patient):
    for name in ("closed after the request", "half a body", "garbage", "silence after the request", "packed badly"):
        villain = Villain(LOST[name])
        account = make_account(f"http://127.0.0.1:{villain.port}", quick=.2)
        assert isinstance(order_by_client_id(account, "dg-1"), CouldNotAsk), name
        assert isinstance(open_orders(account), CouldNotAsk), name
        villain.close()


def page(rows, after=None):
    return 200, {"success": True, "result": rows, "meta": {"after": after, "before": None}}


def fill_row(number):
    return {"id": f"f{number}", "order_id": str(number), "product_symbol": "BTCUSD", "side": "sell", "size": 2, "price": "60000.5", "commission": "-0.01", "created_at": "2026-10-05T10:11:12Z", "role": "maker"}


def test_lists_are_whole(exchange, account):
    exchange.answers = [page([fill_row(1), fill_row(2)], "g3Qa+/=="), page([fill_row(2), fill_row(3)], "h4"), page([])]
    answer = fills(account, 1_790_000_000_000_000)
    assert [fill.id for fill in answer.value] == ["f1", "f2", "f3"] and answer.value[0].commission == Decimal("-0.01")
    assert exchange.seen[1][1].endswith("after=g3Qa%2B%2F%3D%3D&start_time=1790000000000000")
    exchange.answers = [page([ROW], "a"), (503, {"success": False})]
    assert isinstance(open_orders(account), CouldNotAsk), "half a list is no list"
    exchange.answers = [page([ROW], "a"), page([ROW], "a")]
    assert order_history(account, 1) == CouldNotAsk("the list does not end")
    exchange.answers = [page([ROW | {"side": "hold"}])]
    assert isinstance(open_orders(account), CouldNotAsk)
    exchange.answers = [page([{"product": {"symbol": "BTCUSD"}, "size": 5, "entry_price": "60000", "liquidation_price": "58950"}])]
    assert positions(account).value[0].liquidation_price == 58950


# ---- keys ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("code, words", [("invalid_api_key", "testnet keys do not work on production"), ("InvalidApiKey", "DELTA_MODE"), ("Signature Mismatch", "DELTA_API_SECRET"), ("ip_blocked_for_api_key", "address")])
def test_a_key_that_cannot_work_is_named_at_the_start(exchange, account, code, words):
    exchange.answers = [(401, {"success": False, "error": {"code": code}})]
    with pytest.raises(InputError, match=words):
        check_key(account)


def test_a_key_that_could_not_be_checked_is_another_matter():
    with pytest.raises(RetryError, match="could not be checked"):
        check_key(make_account(f"http://127.0.0.1:{dead_port()}"))


def test_a_wrong_secret_and_a_wrong_environment_are_told_apart(exchange):
    for credentials, words in ((Credentials(KEY, "wrong"), "DELTA_API_SECRET"), (Credentials("other", SECRET), "does not know the key")):
        other = Account(exchange.url, credentials, {"BTCUSD": BITCOIN}, time.monotonic)
        synchronise(other)
        with pytest.raises(InputError, match=words):
            check_key(other)


def test_key_and_secret_appear_nowhere(exchange, account, caplog):
    caplog.set_level(logging.DEBUG)
    echo = {"success": False, "error": {"code": "ip_not_whitelisted_for_api_key", "context": {"key": KEY, "secret": SECRET, "client_ip": "10.1.2.3"}}}
    exchange.answers = [(200, ROW), (401, echo), (401, echo)]
    told = [place_order(account, WANTED), place_order(account, WANTED), order_by_client_id(account, "dg-1"), account, CREDENTIALS, account.budget, account.clock]
    for name in ("reset after the request", "garbage"):
        villain = Villain(LOST[name])
        told.append(place_order(make_account(f"http://127.0.0.1:{villain.port}"), WANTED))
    told.append(place_order(make_account(f"http://127.0.0.1:{dead_port()}"), WANTED))
    text = repr(told) + str(told) + caplog.text
    assert "10.1.2.3" in text and KEY not in text and SECRET not in text
    for bad in ("", "two words", "s\u00e9cret", "line\n"):
        with pytest.raises(InputError) as error:
            Credentials("k", bad)
        assert not bad or bad not in str(error.value)


# ---- time ---------------------------------------------------------------------------------------------------------------------

def test_a_clock_that_is_turned_at_the_exchange_stops_changes_until_it_is_known_again(exchange, account):
    exchange.skew += 3600
    exchange.answers = [(200, ROW)]
    refused = place_order(account, WANTED)
    assert isinstance(refused, Rejected) and refused.code == "expired_signature" and what_next(refused.code) == "synchronise"
    assert isinstance(place_order(account, WANTED), NotSent)
    assert synchronise(account) is None
    assert isinstance(place_order(account, WANTED), Accepted)


def test_this_computers_calendar_is_never_read():
    folder = Path(account_module.__file__).parent
    for name in (folder / "account.py", folder.parent / "trading" / "messages.py", folder / "stream.py", folder.parent / "trading" / "news.py"):
        tree = ast.parse(name.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not imported & {"time", "random", "uuid"} and not calls & {"datetime.now", "datetime.utcnow"}


@given(st.lists(st.tuples(st.floats(0, 1.9), st.floats(0, 1)), min_size=3, max_size=12), st.floats(-1e6, 1e6))
def test_the_clock_is_wrong_by_less_than_half_a_round_trip(trips, offset):
    now = [0.0]
    clock = ExchangeClock(lambda: now[0])
    for trip, share in trips:
        clock.learn(now[0], now[0] + trip, now[0] + trip * share + offset)
        now[0] += trip
    worst = max(trip for trip, _ in trips[-5:]) / 2
    assert abs(clock.now() - (now[0] + offset)) <= worst + 1e-6
    if worst < .25:
        assert clock.trouble() is None
    now[0] += 1000
    assert clock.trouble() and clock.now() is not None


def test_slow_samples_teach_nothing():
    clock = ExchangeClock(lambda: 100.0)
    for sent in range(5):
        clock.learn(sent, sent + 2.5, 1000)
        clock.learn(sent, sent - .1, 1000)
    assert clock.now() is None


# ---- budget -------------------------------------------------------------------------------------------------------------------

@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 40), st.sampled_from([1, 3, 5, 10, 25]), st.booleans()), min_size=50, max_size=200), st.floats(0, 300))
def test_no_window_of_theirs_sees_more_than_the_quota(calls, phase):
    budget, now, spent, own = Budget(quota=200), 0.0, {}, {}
    for wait, weight, protective in calls:
        now += wait / 10
        free = budget.take(weight, now, protective) == 0
        if free:
            window = (now + phase) // 300
            spent[window] = spent.get(window, 0) + weight
            own[protective] = own.get(protective, 0) + weight
    assert max(spent.values(), default=0) <= 200


def test_the_reserve_is_for_protection_alone():
    budget = Budget(quota=1000)
    assert sum(budget.take(5, 0.0) == 0 for _ in range(200)) == 90
    assert sum(budget.take(5, 0.0, protective=True) == 0 for _ in range(200)) == 10
    assert budget.take(5, 299.0, True) == 1.0 and budget.take(5, 300.0) == 0


@pytest.mark.parametrize("method, path, weight", [("GET", "/v2/orders", 3), ("POST", "/v2/orders", 5), ("DELETE", "/v2/orders/all", 5), ("PUT", "/v2/orders/bracket", 5), ("GET", "/v2/orders/history", 10), ("GET", "/v2/fills", 10),
                                                  ("POST", "/v2/orders/batch", 25), ("GET", "/v2/positions/margined", 3), ("POST", "/v2/positions/change_margin", 5), ("POST", "/v2/heartbeat", 1), ("GET", "/v2/settings", 1)])
def test_weights(method, path, weight):
    assert weight_of(method, path) == weight


def test_the_truth_check_costs_a_fraction_of_the_quota():
    "Orders every 5 s, positions every 15 s, fills every 30 s, a sign of life every 25 s: per five minutes."
    cost = 60 * weight_of("GET", "/v2/orders") + 20 * weight_of("GET", "/v2/positions/margined") + 10 * weight_of("GET", "/v2/fills") + 12 * weight_of("POST", "/v2/heartbeat")
    assert cost <= .1 * 5000


# ---- words --------------------------------------------------------------------------------------------------------------------

@given(st.lists(st.sampled_from(["invalid", "api", "key", "order", "not", "found"]), min_size=1, max_size=4))
def test_all_spellings_are_one_code(words):
    spellings = {"_".join(words), "-".join(words), " ".join(words), "".join(word.title() for word in words), " ".join(word.title() for word in words), "_".join(words).upper()}
    assert len({same_code(spelling) for spelling in spellings}) == 1


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*ROW, "error", "code"]), inner, max_size=4), max_leaves=6)


@settings(max_examples=100)
@given(JSON, st.sampled_from(list(ROW)))
def test_no_row_breaks_the_reader(value, name):
    with contextlib.suppress(Unreadable):
        order = read_order(ROW | {name: value})
        assert 0 <= order.filled_size <= order.size and order.state in ("open", "pending", "closed", "cancelled")


@settings(max_examples=100)
@given(st.sampled_from([200, 400, 401, 500]), JSON | st.builds(lambda result, flag: {"success": flag, "result": result, "error": result}, JSON, JSON))
def test_no_reply_is_accepted_by_accident(status, payload):
    outcome = judge(status, json.dumps(payload), 1, read_order)
    assert isinstance(outcome, Unknown | Rejected)
    assert isinstance(outcome, Unknown) or status in (400, 401)


@pytest.mark.parametrize("change", [dict(size=0), dict(size=True), dict(size=1.5), dict(side="long"), dict(client_order_id=""), dict(client_order_id="a b"), dict(client_order_id="x" * 33), dict(client_order_id="é"), dict(stop=59000.0),
                                    dict(stop=Decimal("NaN")), dict(target=Decimal(-1)), dict(limit=Decimal(60000)), dict(order_type="limit_order"), dict(order_type="stop"), dict(reduce_only=True, stop=Decimal(59000))])
def test_a_request_that_makes_no_sense_cannot_be_built(change):
    with pytest.raises(InputError, match="expected"):
        OrderRequest(**({"client_order_id": "dg-1", "symbol": "BTCUSD", "side": "buy", "size": 1} | change))
