"The emulated exchange from outside: a real server on this machine, real sockets, and clients that others wrote."
import contextlib
import hashlib
import hmac
import importlib.util
import json
import signal
import subprocess
import sys
import time as timer
import zlib

import httpx
import numpy as np
import pytest
from websockets.sync.client import connect

from delta_go.domain import EXIT_REASONS, InputError
from delta_go.live.door import sign
from delta_go.live.emulator import running
from delta_go.live.endpoints import ROUTES
from delta_go.live.faults import KINDS, MESSAGE_FAULTS, Faults, make_script, read_script, strike
from delta_go.live.pace import FIRST_USER, Setup
from delta_go.market.load import load_market
from delta_go.market.store import write_candles, write_funding
from delta_go.market.venue import PRODUCTS, Costs
from delta_go.trading.backtest import build_tape, decisions_of, run_backtest
from delta_go.trading.plan import Plan
from delta_go.trading.risk import RiskLimits
from tests.waiting import SOON

KEY, SECRET = "emulator-key", "emulator-secret-0001"
RANGE = dict(start="2023-02-01", end="2023-02-03")
HOUR = 3600
FOLDER = []


@pytest.mark.parametrize("message, signature", [
    ("GET1700000000/v2/wallet/balances", "684ef5e49268a2d58056d8a259138bf0911d90046400f0d393bc9c91ced80d8b"),
    ("GET1700000000/v2/orders?product_ids=27%2C3136&states=open%2Cpending", "60d9c867ad82a0b037dd0aa5e47a44ba2ad62be1117b0fb6ee33171b9dc4dae1"),
    ('POST1700000000/v2/orders{"product_id":27,"size":3,"side":"buy","order_type":"limit_order","limit_price":"60000.5"}',
     "76593c7b731671f36cb07ca4a1f68dd6b736a5300cac109f6efc390b5a087ad1"),
    ('DELETE1700000000/v2/orders{"id":9001,"product_id":27}', "381ff2d263f6ea24b6d3a6c99843e69398d3483016e4aef209f201abc86160be"),
    ("GET1700000000/live", "7eaebebeb7fd9e3ab2b04b5e418a053ef6db9ab8461ddeb949d4c809b7b97ff4"),
])
def test_the_sheets_signatures(message, signature):
    assert sign(SECRET, message.encode()) == signature


class Trader:
    "A client of its own: it signs with the exchange's time, and shares no line with the package."

    def __init__(self, exchange, key=KEY, secret=SECRET):
        self.exchange, self.key, self.secret = exchange, key, secret
        self.http = httpx.Client(base_url=exchange.url, trust_env=False, timeout=10, headers={"User-Agent": "test"})

    def stamp(self):
        return int(self.exchange.now // 1_000_000)

    def send(self, method, path, body=None, query="", age=0, **headers):
        text, stamp = "" if body is None else json.dumps(body), str(self.stamp() - age)
        message = method + stamp + path + (f"?{query}" if query else "") + text
        signature = hmac.new(self.secret.encode(), message.encode(), hashlib.sha256).hexdigest()
        given = {"api-key": self.key, "timestamp": stamp, "signature": signature, "Content-Type": "application/json"} | headers
        return self.http.request(method, path + (f"?{query}" if query else ""), content=text or None, headers=given)

    def get(self, path, query=""):
        return self.send("GET", path, query=query).json()["result"]

    def ack(self, **body):
        return self.http.post("/emulator/ack", json=body).json()

    def state(self):
        return self.http.get("/emulator/state").json()

    def account(self):
        return self.state()["accounts"][str(FIRST_USER)]

    def order(self, **fields):
        return self.send("POST", "/v2/orders", {"product_symbol": "BTCUSD", "size": 10, "side": "buy", "order_type": "market_order"} | fields)


@pytest.fixture(scope="session", autouse=True)
def folder(tmp_path_factory):
    "Three weeks of the simulated market, so that a server starts at once."
    FOLDER.append(str(tmp_path_factory.mktemp("market")))
    market = load_market(end="2023-02-04", start="2023-01-10")
    for symbol, bars in market.candles.items():
        write_candles(FOLDER[0], bars)
        write_funding(FOLDER[0], market.funding[symbol])


@contextlib.contextmanager
def trading(**setup):
    script = setup.pop("faults", None)
    with running(Setup(**({"script": make_script(script)} if script else {}) | {"data": FOLDER[0]} | RANGE | setup)) as exchange:
        yield Trader(exchange)


@contextlib.contextmanager
def listening(trader, kind, *channels, login=None):
    with connect(trader.exchange.url.replace("http", "ws") + f"/{kind}", proxy=None) as socket:
        socket.send(json.dumps({"type": "enable_heartbeat"}))
        if login or kind == "private" and login is not False:
            stamp = trader.stamp()
            socket.send(json.dumps({"type": "key-auth", "payload": {"api-key": KEY, "timestamp": stamp, "signature": sign(SECRET, f"GET{stamp}/live".encode())}}))
            assert heard(socket, "key-auth")["success"]
        if channels:
            socket.send(json.dumps({"type": "subscribe", "payload": {"channels": [{"name": name, "symbols": symbols} for name, symbols in channels]}}))
            heard(socket, "subscriptions")
        yield socket


def heard(socket, *kinds, timeout=5):
    while True:
        message = json.loads(socket.recv(timeout=timeout))
        if message["type"] in kinds:
            return message


def drain(socket, quiet=0.3):
    found = []
    with contextlib.suppress(TimeoutError):
        while True:
            found.append(json.loads(socket.recv(timeout=quiet)))
    return [message for message in found if message["type"] != "heartbeat"]


def test_the_door():
    with trading(keys=((KEY, SECRET), ("reader", "secret-of-reader")), readers=("reader",)) as trader:
        assert trader.send("GET", "/v2/wallet/balances").status_code == 200
        assert trader.http.get("/v2/wallet/balances").json() == {"error": "unauthorized", "success": False}
        for given, code in ((dict(age=7), "expired_signature"), (dict(age=-7), "expired_signature"), (dict(signature="0" * 64), "Signature Mismatch"), ({"api-key": "other"}, "invalid_api_key")):
            reply = trader.send("GET", "/v2/wallet/balances", **given)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, code)
        assert trader.send("GET", "/v2/wallet/balances", age=9).json()["error"]["context"]["server_time"] == trader.stamp()
        blocked = trader.http.request("GET", "/v2/products", headers={"User-Agent": ""})
        assert blocked.status_code == 403 and blocked.text.startswith("<html>")
        assert (trader.http.get("/v2/nope").status_code, trader.http.get("/v2/nope").text) == (404, "Not Found")
        assert trader.http.patch("/v2/orders").status_code == 405
        assert int(trader.http.get("/v2/settings").headers["Request-In-Time"]) == trader.http.get("/v2/settings").json()["result"]["server_time"]
        reader = Trader(trader.exchange, "reader", "secret-of-reader")
        assert reader.get("/v2/orders") == [] and reader.order().json()["error"]["code"] == "UnauthorizedApiAccess"
        assert trader.send("POST", "/v2/orders", [1]).json()["error"]["code"] == "bad_schema"


def test_a_query_is_signed_as_it_was_sent():
    with trading() as trader:
        assert trader.send("GET", "/v2/orders", query="product_ids=27%2C3136&states=open%2Cpending").status_code == 200
        stamp = str(trader.stamp())
        decoded = sign(SECRET, f"GET{stamp}/v2/orders?product_ids=27,3136".encode())
        reply = trader.http.get(trader.exchange.url + "/v2/orders?product_ids=27%2C3136", headers={"api-key": KEY, "timestamp": stamp, "signature": decoded})
        assert reply.json()["error"]["code"] == "Signature Mismatch"


def test_the_quota_says_when_to_come_back():
    with trading(quota=20) as trader:
        codes = [trader.send("GET", "/v2/fills").status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        reply = trader.send("GET", "/v2/fills")
        assert reply.json() == {"success": False, "error": {"code": "rate_limit_exceeded"}} and 0 < int(reply.headers["X-RATE-LIMIT-RESET"]) <= 300_000
        assert trader.http.get("/v2/settings").status_code == 200  # counted by address, not by user
        trader.ack()
        assert trader.send("GET", "/v2/fills").status_code == 200
        assert trader.send("GET", "/v2/rate_limits/quota").json()["current_quota"] == 13


def test_public_data():
    with trading(environment="testnet") as trader:
        trader.ack()
        products = trader.http.get("/v2/products?contract_types=perpetual_futures&states=live").json()["result"]
        assert {row["symbol"]: row["id"] for row in products} == {"BTCUSD": 84, "ETHUSD": 1699, "SOLUSD": 92572}
        assert trader.http.get("/v2/products/SOLUSD").json()["result"]["tick_size"] == "0.0001"
        for path in ("/v2/products/NOPE", "/v2/l2orderbook/NOPE"):
            assert trader.http.get(path).json() == {"success": False, "error": {"code": "invalid_contract"}}
        assert trader.http.get("/v2/tickers/NOPE").json() == {"success": True, "result": None}
        ticker = trader.http.get("/v2/tickers/BTCUSD").json()["result"]
        assert isinstance(ticker["close"], float) and isinstance(ticker["mark_price"], str) and ticker["timestamp"] == trader.exchange.now
        assert len(trader.http.get("/v2/tickers?underlying_asset_symbols=BTC,ETH").json()["result"]) == 2
        book = trader.http.get("/v2/l2orderbook/BTCUSD?depth=50").json()["result"]
        assert len(book["buy"]) == 20 and float(book["buy"][0]["price"]) < float(book["sell"][0]["price"])
        assert trader.http.get("/v2/l2orderbook/BTCUSD?depth=abc").json()["error"]["context"]["schema_errors"][0]["param"] == "depth"
        assert {row["symbol"] for row in trader.http.get("/v2/assets").json()["result"]} >= {"USD", "BTC"}
        assert trader.http.get("/v2/trades/ETHUSD").json()["result"][0]["buyer_role"] == "taker"


def test_candles_never_tell_the_future():
    truth = load_market(**RANGE | {"start": None}).candles["BTCUSD"]
    with trading() as trader:
        for _ in range(4):
            rows = trader.http.get(f"/v2/history/candles?symbol=BTCUSD&resolution=1h&start=0&end={2**33}").json()["result"]
            times = [row["time"] for row in rows]
            assert times == sorted(times, reverse=True) and times[0] + HOUR == trader.stamp()
            row = list(truth.time).index(times[0])
            assert rows[0] == {"time": times[0]} | {name: float(getattr(truth, name)[row]) for name in ("open", "high", "low", "close", "volume")}
            trader.ack()
        at = times[3]
        inside = trader.http.get(f"/v2/history/candles?symbol=BTCUSD&resolution=1h&start={at - HOUR + 1}&end={at + HOUR - 1}").json()["result"]
        assert [row["time"] for row in inside] == [at]
        assert trader.http.get("/v2/history/candles?symbol=MARK%3ABTCUSD&resolution=1h&start=0&end=9999999999").json()["result"][0]["volume"] is None
        assert trader.http.get("/v2/history/candles?symbol=BTCUSD&resolution=7d&start=0&end=1").json()["error"]["code"] == "bad_schema"


def test_a_life_cycle_in_lock_step():
    with trading(leverage=3.0) as trader:
        trader.ack()
        last = trader.state()["last"]["BTCUSD"]
        entry = trader.order(client_order_id="a", bracket_stop_loss_price=str(round(last * 0.8)), bracket_take_profit_price=str(round(last * 1.2))).json()["result"]
        assert (entry["state"], entry["unfilled_size"], entry["bracket_order"], entry["client_order_id"]) == ("open", 10, True, "a")
        assert trader.order(client_order_id="a").json()["error"]["code"] == "duplicate_client_order_id"
        told = trader.ack(time=int(trader.exchange.at))
        assert told["present"] == ["BTCUSD", "ETHUSD", "SOLUSD"] and told["absent"] == [] and not told["done"]
        by_client = trader.get("/v2/orders/client_order_id/a")
        assert by_client == trader.get(f"/v2/orders/{entry['id']}") and by_client["state"] == "closed"
        legs = {row["stop_order_type"]: row for row in trader.get("/v2/orders", "states=pending&product_ids=27")}
        assert set(legs) == {"stop_loss_order", "take_profit_order"} and all(row["reduce_only"] and row["side"] == "sell" and row["size"] == 10 for row in legs.values())
        fill = trader.get("/v2/fills")[0]
        assert (fill["order_id"], fill["size"], fill["role"], fill["fill_type"]) == (str(entry["id"]), 10, "taker", "normal")
        assert float(fill["commission"]) == pytest.approx(0.00059 * 10 * 0.001 * float(fill["price"]), rel=1e-12)
        assert trader.get("/v2/positions", "product_id=27")["size"] == 10
        margined = trader.get("/v2/positions/margined")[0]
        assert float(margined["margin"]) == pytest.approx(float(fill["price"]) * 0.01 / 3) and margined["product"]["symbol"] == "BTCUSD"
        moved = trader.send("PUT", "/v2/orders/bracket", {"id": entry["id"], "product_id": 27, "bracket_stop_loss_price": str(round(last * 0.85))}).json()["result"]
        assert moved["bracket_stop_loss_price"] == str(round(last * 0.85))
        assert trader.order(size=10, side="sell", reduce_only="true", client_order_id="b").json()["result"]["state"] == "open"
        trader.ack()
        assert trader.get("/v2/orders") == [] and trader.get("/v2/positions", "product_id=27") == {"size": 0, "entry_price": None, "timestamp": trader.exchange.now}
        assert [row["client_order_id"] for row in trader.get("/v2/orders/history")].count("b") == 1
        account = trader.account()
        assert account["by_client_order_id"].keys() == {"a", "b"} and account["trades"][0]["why"] == "order" and account["naked_seconds"]["BTCUSD"]["total"] == 0
        assert float(trader.get("/v2/wallet/balances")[0]["balance"]) == account["balance"]
        assert [row["transaction_type"] for row in trader.get("/v2/wallet/transactions")][:2] == ["commission", "cashflow"]


def test_a_backtests_decisions_sent_over_http_write_its_ledger():
    market, limits = load_market(FOLDER[0], start="2023-01-25", end="2023-02-03"), RiskLimits(leverage=3.0)
    rng, plans = np.random.default_rng(3), {}
    for symbol, bars in market.candles.items():
        n, close = len(bars), bars.close
        side = np.where(rng.random(n) < 0.3, rng.choice([-1, 1], n), 0)
        plans[symbol] = Plan(side, close * (1 - side * 0.006), close * (1 + side * 0.009), rng.integers(2, 12, n), rng.integers(0, 5, n), rng.random(n),
                             np.full(n, np.nan), np.ones(n, int), np.zeros(n, int))
    tape = build_tape(market.candles, plans, PRODUCTS, {symbol: market.payments(symbol) for symbol in plans}, start=int(market.candles["BTCUSD"].time[72]), end=int(market.candles["BTCUSD"].time[-1]) + HOUR)
    result = run_backtest(tape, limits, Costs(), "signals")
    with trading(start="2023-01-28", leverage=3.0) as trader:
        for bar, opened in enumerate(tape.time.tolist()):
            assert trader.ack()["open"] == opened
            held = trader.account()["positions"]
            for decision in decisions_of(result, bar):
                if decision.action == "enter":
                    prices = {"bracket_stop_loss_price": str(decision.stop), "bracket_take_profit_price": str(decision.target)}
                    assert trader.order(product_symbol=decision.symbol, size=decision.size, side="buy" if decision.side > 0 else "sell", **prices).status_code == 200
                elif decision.action == "exit":
                    size = held[decision.symbol]
                    assert trader.order(product_symbol=decision.symbol, size=abs(size), side="sell" if size > 0 else "buy", reduce_only=True).status_code == 200
        account = trader.account()
    words = {"time": "order", "signal": "order"}
    assert [(t["symbol"], t["side"], t["size"], t["opened"] // 1_000_000, t["entry"], t["closed"] // 1_000_000, t["exit"], t["why"], t["fees"], t["funding"], t["pnl"]) for t in account["trades"]] == [
        (tape.products[row["symbol"]].symbol, row["side"], row["size"], tape.time[row["entry_bar"]], row["entry"], tape.time[row["exit_bar"]], row["exit"],
         words.get(EXIT_REASONS[row["code"] - 1], EXIT_REASONS[row["code"] - 1]), row["fees"], row["funding"], row["pnl"]) for row in result.closed]
    assert len(account["trades"]) > 40 and account["balance"] == result.equity[-1]
    assert all(naked["total"] == 0 for naked in account["naked_seconds"].values())


def test_orders_edits_and_cancels():
    with trading() as trader:
        trader.ack()
        low = str(round(trader.state()["last"]["BTCUSD"] * 0.9))
        resting = [trader.order(order_type="limit_order", limit_price=low, client_order_id=f"r{n}").json()["result"] for n in range(3)]
        assert trader.send("PUT", "/v2/orders", {"id": resting[0]["id"], "product_id": 27, "size": 4}).json()["result"]["size"] == 4
        assert trader.send("DELETE", "/v2/orders", {"id": resting[0]["id"], "product_id": 27}).json()["result"]["state"] == "cancelled"
        again = trader.send("DELETE", "/v2/orders", {"client_order_id": "r0", "product_id": 27})
        assert again.status_code == 400 and again.json()["error"]["code"] == "open_order_not_found"
        assert trader.send("GET", "/v2/orders/client_order_id/nobody").status_code == 404
        trader.order(order_type="market_order", side="sell", stop_order_type="stop_loss_order", stop_price=low)
        assert trader.send("DELETE", "/v2/orders/all", {"product_id": 27}).json()["result"] == {} and len(trader.get("/v2/orders")) == 3
        trader.send("DELETE", "/v2/orders/all", {"product_id": 27, "cancel_limit_orders": "true", "cancel_stop_orders": "false"})
        assert [row["state"] for row in trader.get("/v2/orders")] == ["pending"]
        trader.send("DELETE", "/v2/orders/all", {"contract_types": "perpetual_futures", "cancel_stop_orders": True})
        assert trader.get("/v2/orders") == []
        made = trader.send("POST", "/v2/orders/batch", {"product_id": 27, "orders": [{"size": n, "side": "buy", "order_type": "limit_order", "limit_price": low} for n in (1, 0, 2)]}).json()["result"]
        assert [row["size"] for row in made] == [1, 2]
        assert len(trader.send("DELETE", "/v2/orders/batch", {"product_id": 27, "orders": [{"id": row["id"]} for row in made]}).json()["result"]) == 2
        page = trader.send("GET", "/v2/orders/history", query="page_size=2").json()
        following = trader.send("GET", "/v2/orders/history", query="page_size=50&after=" + page["meta"]["after"].replace("=", "%3D")).json()
        assert len(page["result"]) == 2 and following["meta"]["after"] is None and len(following["result"]) == 4
        assert trader.order(limit_price="16000.3", order_type="limit_order").json()["error"]["code"] == "bad_schema"


def test_leverage_margin_and_closing_everything():
    with trading(speed=1.0) as trader:
        timer.sleep(0.2)
        assert trader.get("/v2/products/27/orders/leverage")["leverage"] == "200"
        assert trader.send("POST", "/v2/products/27/orders/leverage", {"leverage": 10}).json()["result"]["leverage"] == "10"
        assert trader.send("POST", "/v2/products/27/orders/leverage", {"leverage": "500"}).json()["error"]["code"] == "max_leverage_exceeded"
        filled = trader.order().json()["result"]
        assert (filled["state"], filled["unfilled_size"]) == ("closed", 0)
        before = trader.get("/v2/positions/margined")[0]
        more = trader.send("POST", "/v2/positions/change_margin", {"product_id": 27, "delta_margin": "5"}).json()["result"]
        assert float(more["margin"]) == pytest.approx(float(before["margin"]) + 5) and float(more["liquidation_price"]) < float(before["liquidation_price"])
        assert trader.account()["naked_seconds"]["BTCUSD"]["now"]
        timer.sleep(0.3)
        assert trader.send("POST", "/v2/orders/bracket", {"product_id": 27, "stop_loss_order": {"order_type": "market_order", "stop_price": "10000"}}).json()["success"]
        naked = trader.account()["naked_seconds"]["BTCUSD"]
        assert not naked["now"] and 0.3 <= naked["longest"] < SOON
        trader.send("POST", "/v2/positions/close_all", {"close_all_portfolio": True, "close_all_isolated": True, "user_id": FIRST_USER})
        assert trader.account()["positions"] == {} and trader.get("/v2/orders") == []
        assert trader.get("/v2/users/trading_preferences")["user_id"] == FIRST_USER


def test_every_call_answers_in_the_envelope():
    with trading() as trader:
        trader.ack()
        for method, path, _, private, _ in ROUTES:
            path = path.replace("(?P<symbol>[^/]+)", "BTCUSD").replace(r"(?P<id>\d+)", "27").replace("(?P<client>[^/]+)", "x").replace("(?P<create>create)", "create")
            reply = trader.send(method, path, None if method == "GET" else {}) if private else trader.http.request(method, path)
            assert reply.status_code in (200, 400, 404), (method, path, reply.text)
            assert path == "/v2/rate_limits/quota" or reply.json()["success"] == (reply.status_code == 200), (method, path)


def test_lock_step_publishes_then_waits():
    with trading() as trader, listening(trader, "public", ("candlestick_1h", ["BTCUSD", "ETHUSD"]), ("ob_updates", ["BTCUSD"]), ("ticker", ["BTCUSD"]), ("emulator", [])) as socket:
        drain(socket)
        for n in range(3):
            told = trader.ack()
            step, books, bars = None, [], {}
            while step is None:
                message = json.loads(socket.recv(timeout=5))
                if message["type"].startswith("candlestick"):
                    bars[message["sy"]] = message
                books += [message] if message["type"] == "ob_updates" else []
                step = message if message["type"] == "emulator" else None
            assert set(bars) == {"BTCUSD", "ETHUSD"} and step["time"] == told["time"] and books[0]["seq"] == n + 2
            assert bars["BTCUSD"]["ts"] // 1_000_000 // HOUR * HOUR + HOUR == told["time"]
            rest = trader.http.get(f"/v2/history/candles?symbol=BTCUSD&resolution=1h&start={told['open']}&end={told['open']}").json()["result"][0]
            assert [bars["BTCUSD"][name] for name in "ohlcv"] == [rest[name] for name in ("open", "high", "low", "close", "volume")]
        assert drain(socket) == []
        assert trader.http.post("/emulator/ack", json={"time": told["time"] - HOUR}).status_code == 409
        while not told["done"]:
            told = trader.ack()
            drain(socket, 0)
        assert told["last"] == ["BTCUSD", "ETHUSD", "SOLUSD"] and trader.ack()["done"]
        assert trader.order().json()["error"]["code"] == "trading_blocked"


def test_the_book_can_be_followed_by_checksum():
    with trading(speed=2000.0) as trader, listening(trader, "public", ("ob_updates", ["BTCUSD"])) as socket:
        asks, bids, number, updates = {}, {}, 0, 0
        while updates < 5:
            message = heard(socket, "ob_updates")
            if message["action"] == "snapshot":
                asks, bids = {}, {}
            else:
                assert message["seq"] == number + 1
                updates += 1
            number = message["seq"]
            for side, levels in ((asks, message["a"]), (bids, message["b"])):
                for price, size in levels:
                    side.pop(price, None) if size == "0" else side.__setitem__(price, size)
            best = [sorted(side.items(), key=lambda level: float(level[0]), reverse=back)[:10] for side, back in ((asks, False), (bids, True))]
            assert zlib.crc32("|".join(",".join(f"{price}:{size}" for price, size in side) for side in best).encode()) == message["cs"]


def test_private_channels_tell_every_step_of_an_order():
    with trading() as trader:
        trader.ack()
        with listening(trader, "private", ("orders", ["all"]), ("user_trades", ["BTCUSD"]), ("v2/user_trades", ["BTCUSD"]), ("positions", ["BTCUSD"]), ("margins", [])) as socket:
            drain(socket)
            trader.order(client_order_id="a", bracket_stop_loss_price="10000")
            trader.ack()
            trader.send("POST", "/v2/positions/close_all", {})
            trader.ack()
            messages = drain(socket)
            orders = [message for message in messages if message["type"] == "orders"]
            assert [message["seq_no"] for message in orders] == list(range(1, len(orders) + 1)) and "id" not in orders[0]
            assert [(message["action"], message["reason"], message["state"]) for message in orders if message["client_order_id"] == "a"] == [("create", None, "open"), ("delete", "fill", "closed")]
            fills = [message for message in messages if message["type"] == "user_trades"]
            short = [message for message in messages if message["type"] == "v2/user_trades"]
            assert [(f["fill_id"], f["seq_no"], f["price"]) for f in fills] == [(f["f"], f["se"], f["p"]) for f in short] and [f["po"] for f in short] == [10, 0]
            assert {f["fill_id"] for f in fills} == {row["id"] for row in trader.get("/v2/fills")}
            assert [message["size"] for message in messages if message["type"] == "positions"] == [10, 0]
            assert float([message for message in messages if message["type"] == "margins"][-1]["balance"]) == pytest.approx(trader.account()["balance"], abs=1)


def test_the_sockets_manners():
    with trading(idle=0.5) as trader:
        with listening(trader, "private", login=False) as socket:
            for payload, status in (({}, 400), ({"api-key": "no", "timestamp": 1, "signature": "x"}, 404), ({"api-key": KEY, "timestamp": trader.stamp() - 9, "signature": "x"}, 408),
                                    ({"api-key": KEY, "timestamp": str(trader.stamp()), "signature": "x"}, 401)):
                socket.send(json.dumps({"type": "key-auth", "payload": payload}))
                assert heard(socket, "key-auth")["status_code"] == status
            socket.send("no json")
            socket.send(json.dumps({"type": "ping"}))
            assert heard(socket, "pong", "error") == {"type": "pong"}
            socket.send(json.dumps({"type": "subscribe", "payload": {"channels": [{"name": "orders", "symbols": ["all"]}]}}))
            assert "Unauthorized user" in heard(socket, "subscriptions")["channels"][0]["error"]
        with listening(trader, "public", ("ticker", ["NOPE"])) as socket:
            assert drain(socket) == []
            for entry, words in (({"name": "orders", "symbols": ["all"]}, "appropriate pod"), ({"name": "x", "symbols": ["all"]}, "invalid channel"), ({"name": "ob_l2"}, "without symbol array"),
                                 ({"name": "ob_l2", "symbols": [str(n) for n in range(101)]}, "more than 100")):
                socket.send(json.dumps({"type": "subscribe", "payload": {"channels": [entry]}}))
                assert words in heard(socket, "subscriptions")["channels"][-1]["error"]
            socket.send(json.dumps({"type": "unsubscribe", "payload": {"channels": [{"name": "ticker"}]}}))
            assert heard(socket, "subscriptions")["channels"] == []
        with connect(trader.exchange.url.replace("http", "ws") + "/public", proxy=None) as idle, pytest.raises(Exception, match="close|1011|1006"):
            idle.recv(timeout=5)


def test_too_many_connections_are_refused():
    with trading() as trader:
        trader.exchange.handshakes = [timer.monotonic()] * 150
        with pytest.raises(Exception, match="429"):
            connect(trader.exchange.url.replace("http", "ws") + "/public", proxy=None)


def test_the_dead_mans_switch():
    for spares, left in ((False, []), (True, ["stop_loss_order"])):
        with trading(speed=4.0, faults={"answers": {"heartbeat_spares_stops": spares}}) as trader:
            timer.sleep(0.15)
            trader.order(bracket_stop_loss_price="10000")
            trader.order(order_type="limit_order", limit_price="11000")
            config = {"heartbeat_id": "h", "impact": "contracts", "contract_types": ["perpetual_futures"], "config": [{"action": "cancel_orders", "unhealthy_count": 1}]}
            assert trader.send("POST", "/v2/heartbeat/create", config).json()["result"]["heartbeat_id"] == "h"
            assert trader.send("POST", "/v2/heartbeat", {"heartbeat_id": "h", "ttl": 1_000}).json()["result"]["process_enabled"] == "true"
            timer.sleep(0.5)
            live = [order for order in trader.account()["orders"] if order["state"] in ("open", "pending")]
            assert [order["stop_order_type"] for order in live] == left
            assert trader.get("/v2/heartbeat")[0]["process_enabled"] == "false"


# faults

def test_a_lost_request_and_a_lost_reply_look_alike():
    with trading(faults={"faults": [{"kind": "lost", "on": "POST /v2/orders", "times": 1}, {"kind": "reply_lost", "on": "POST /v2/orders", "times": 2}]}) as trader:
        trader.ack()
        for name in ("lost", "kept"):
            with pytest.raises(httpx.TransportError):
                trader.order(client_order_id=name)
        assert trader.account()["by_client_order_id"].keys() == {"kept"}
        assert trader.state()["faults"] == [["lost", "POST /v2/orders"], ["reply_lost", "POST /v2/orders"], ["reply_lost", "POST /v2/orders"]]


@pytest.mark.parametrize("fault, answers, status, orders", [
    ({"kind": "status", "status": 429, "seconds": 2}, {}, 429, 0), ({"kind": "status", "status": 429}, {"limited_create_accepted": True}, 429, 1),
    ({"kind": "status", "status": 502}, {}, 502, 0), ({"kind": "reply_lost"}, {"lost_reply_is_504": True}, 504, 1), ({"kind": "garbage"}, {}, 200, 1),
    ({"kind": "duplicated"}, {"duplicate_id": "accepted"}, 200, 2), ({"kind": "duplicated"}, {"duplicate_id": "rejected"}, 200, 1), ({"kind": "slow", "seconds": 0.2}, {}, 200, 1),
])
def test_faults_of_requests(fault, answers, status, orders):
    with trading(faults={"answers": answers, "faults": [fault | {"on": "POST /v2/orders"}]}) as trader:
        trader.ack()
        began = timer.monotonic()
        reply = trader.order(client_order_id="a")
        assert reply.status_code == status and len(trader.account()["orders"]) == orders
        assert timer.monotonic() - began >= (0.2 if fault["kind"] == "slow" else 0)
        assert status != 429 or reply.headers["X-RATE-LIMIT-RESET"] == str(int(fault.get("seconds", 1) * 1000))


def test_a_late_request_dies_with_its_signature():
    with trading(speed=10.0, faults={"faults": [{"kind": "late", "on": "POST /v2/orders", "seconds": 0.7}]}) as trader:
        timer.sleep(0.15)
        assert trader.order().json()["error"]["code"] == "expired_signature" and trader.account()["orders"] == []


def test_a_partial_fill_and_its_bracket():
    with trading(leverage=3.0, faults={"answers": {"bracket_on_partial": "on_completion"}, "faults": [{"kind": "partial", "on": "POST /v2/orders", "part": 0.3, "times": 1}]}) as trader:
        trader.ack()
        trader.order(client_order_id="a", bracket_stop_loss_price="10000")
        trader.ack()
        order = trader.get("/v2/orders/client_order_id/a")
        assert (order["state"], order["unfilled_size"]) == ("open", 7) and trader.account()["naked_seconds"]["BTCUSD"]["now"]
        trader.ack()
        assert trader.get("/v2/orders/client_order_id/a")["state"] == "closed" and trader.account()["naked_seconds"]["BTCUSD"]["total"] == HOUR


def test_views_that_lag():
    with trading(speed=1.0, faults={"answers": {"read_lag": 1.0, "margined_lag": 1.0, "lookup_finds_closed": True}}) as trader:
        timer.sleep(0.15)
        trader.order(client_order_id="a")
        assert trader.send("GET", "/v2/orders/client_order_id/a").status_code == 404 and trader.get("/v2/positions/margined") == []
        assert trader.get("/v2/positions", "product_id=27")["size"] == 10
        timer.sleep(1.1)
        assert trader.get("/v2/orders/client_order_id/a")["state"] == "closed" and trader.get("/v2/positions/margined")[0]["size"] == 10


@pytest.mark.parametrize("fault, seen", [({"kind": "gap"}, [1, 3, 4]), ({"kind": "repeated"}, [1, 2, 2, 3, 4]), ({"kind": "swapped"}, [1, 3, 2, 4]), ({"kind": "delayed", "seconds": 0.1}, [1, 3, 4, 2])])
def test_faults_of_messages(fault, seen):
    with trading(faults={"faults": [fault | {"on": "orders", "after": 4, "times": 1}]}) as trader, listening(trader, "private", ("orders", ["all"])) as socket:
        trader.ack()
        assert len(drain(socket)) == 3  # a snapshot for each product
        for name in "ab":
            number = trader.order(client_order_id=name, order_type="limit_order", limit_price="11000").json()["result"]["id"]
            trader.send("DELETE", "/v2/orders", {"id": number, "product_id": 27})
        found = [message["seq_no"] for message in drain(socket)]
        assert sorted(found) == sorted(seen) and (fault["kind"] == "delayed" or found == seen)


def test_a_disconnect_silence_and_a_bad_checksum():
    with trading(faults={"faults": [{"kind": "bad_checksum", "on": "ob_updates", "after": 1, "times": 1}, {"kind": "silent", "on": "ticker", "after": 3, "times": 1, "seconds": 2 * HOUR},
                                    {"kind": "disconnect", "on": "ob_l1", "after": 6}]}) as trader, \
            listening(trader, "public", ("ob_updates", ["BTCUSD"]), ("ticker", ["BTCUSD"]), ("ob_l1", ["BTCUSD"])) as socket:
        drain(socket)
        counts = []
        with pytest.raises(Exception, match="close|1011|1006|drop"):
            for _ in range(9):
                trader.ack()
                counts.append(len([message for message in drain(socket, 0.15) if message["type"] == "ob_updates"]))
                socket.ping()
        assert counts[:2] == [1, 1] and 0 in counts


def test_an_outage_ends_with_an_auction_and_new_sequence_numbers():
    with trading(faults={"faults": [{"kind": "down", "start": HOUR * 2, "seconds": HOUR, "auction": HOUR * 2}]}) as trader:
        trader.ack()
        trader.order(client_order_id="a", order_type="limit_order", limit_price="11000")
        assert trader.state()["sequence"] == {f"{FIRST_USER} orders BTCUSD": 1}
        with listening(trader, "private", ("orders", ["all"])) as socket:
            drain(socket)
            trader.ack()
            with pytest.raises(Exception, match="close|1011|1006"):
                drain(socket, 2)
        with pytest.raises(httpx.TransportError):
            trader.order()
        trader.ack()
        assert trader.state()["sequence"] == {} and trader.order().json()["error"]["code"] == "trading_blocked"
        assert trader.http.get("/v2/products/BTCUSD").json()["result"]["trading_status"] == "disrupted_post_only"
        assert trader.send("DELETE", "/v2/orders", {"client_order_id": "a", "product_id": 27}).status_code == 200
        trader.ack(), trader.ack()
        assert trader.order().status_code == 200


def test_a_skewed_clock():
    with trading(faults={"faults": [{"kind": "skew", "by": -30, "seconds": 2 * HOUR, "start": 0}]}) as trader:
        honest = int(trader.exchange.at)
        assert trader.http.get("/v2/settings").json()["result"]["server_time"] == (honest - 30) * 1_000_000
        assert trader.send("GET", "/v2/orders", age=-30).json()["error"]["code"] == "expired_signature"


@pytest.mark.parametrize("answers, sent, code, live", [
    ({"bare_cancel_all": "nothing"}, ("DELETE", "/v2/orders/all", {"product_id": 27}), 200, 1),
    ({"bare_cancel_all": "everything"}, ("DELETE", "/v2/orders/all", {"product_id": 27}), 200, 0),
    ({"batch_names_errors": True}, ("POST", "/v2/orders/batch", {"product_id": 27, "orders": [{"size": 0, "side": "buy", "order_type": "market_order"}]}), 400, 1),
    ({"batch_names_errors": False}, ("POST", "/v2/orders/batch", {"product_id": 27, "orders": [{"size": 0, "side": "buy", "order_type": "market_order"}]}), 200, 1),
    ({"flat_reduce_only": "refused"}, ("POST", "/v2/orders", {"product_id": 27, "size": 1, "side": "sell", "order_type": "market_order", "reduce_only": True}), 400, 1),
    ({"flat_reduce_only": "cancelled"}, ("POST", "/v2/orders", {"product_id": 27, "size": 1, "side": "sell", "order_type": "market_order", "reduce_only": True}), 200, 1),
    ({"off_tick": "rounded"}, ("POST", "/v2/orders", {"product_id": 27, "size": 1, "side": "buy", "order_type": "limit_order", "limit_price": "9000.3"}), 200, 2),
    ({"duplicate_id": "accepted"}, ("POST", "/v2/orders", {"product_id": 27, "size": 1, "side": "buy", "order_type": "limit_order", "limit_price": "9000", "client_order_id": "a"}), 200, 2),
])
def test_answers_to_open_questions(answers, sent, code, live):
    with trading(faults={"answers": answers}) as trader:
        trader.order(client_order_id="a", order_type="limit_order", limit_price="9000")
        assert trader.send(*sent).status_code == code
        trader.ack()
        assert len(trader.get("/v2/orders")) == live


def test_how_far_ahead_a_signature_may_be():
    with trading(faults={"answers": {"future_tolerance": 0.0}}) as trader:
        assert trader.send("GET", "/v2/orders", age=-2).status_code == 401 and trader.send("GET", "/v2/orders", age=5).status_code == 200


def test_sequence_numbers_that_survive_a_restart():
    with trading(faults={"answers": {"sequence_resets": False}, "faults": [{"kind": "down", "start": HOUR, "seconds": HOUR}]}) as trader:
        trader.order(order_type="limit_order", limit_price="9000")
        trader.ack(), trader.ack()
        assert trader.state()["sequence"] == {f"{FIRST_USER} orders BTCUSD": 1} and trader.order().status_code == 200


def test_the_server_as_a_process_ends_cleanly_on_a_signal():
    code = "import sys; from delta_go.live.emulator import serve; from delta_go.live.pace import Setup; serve(Setup(data=sys.argv[1], port=int(sys.argv[2])), lambda url: print(url, flush=True))"
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen([sys.executable, "-c", code, FOLDER[0], "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        url = process.stdout.readline().strip()
        assert httpx.get(url + "/v2/settings", trust_env=False).json()["success"]
        if number == signal.SIGTERM:
            taken = subprocess.run([sys.executable, "-c", code, FOLDER[0], url.rpartition(":")[2]], capture_output=True, text=True, timeout=60)
            assert "cannot be used" in taken.stderr.strip().splitlines()[-1]
        process.send_signal(number)
        output, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")


SCRIPT = {"seed": 3, "faults": [{"kind": "lost", "on": "POST /v2/orders", "chance": 0.3}, {"kind": "status", "on": "GET /v2/*", "status": 503, "chance": 0.4},
                                {"kind": "duplicated", "on": "POST /v2/orders", "chance": 0.3}, {"kind": "partial", "on": "POST /v2/orders", "chance": 0.5}]}


def _troubled(seed):
    with trading(faults=SCRIPT | {"seed": seed}) as trader:
        for n in range(12):
            trader.ack()
            with contextlib.suppress(httpx.TransportError):
                trader.order(client_order_id=f"c{n}", size=4, side="buy" if n % 2 else "sell")
            trader.send("GET", "/v2/fills")
        state = trader.state()
        return state["faults"], state["accounts"]


def test_one_seed_one_story():
    first = _troubled(3)
    assert first == _troubled(3) and len(first[0]) > 5 and first[0] != _troubled(4)[0]


def test_luck_belongs_to_a_rule_and_its_match():
    plain, among = Faults(make_script({"seed": 1, "faults": [{"kind": "gap", "on": "orders", "chance": 0.5}]})), None
    among = Faults(make_script({"seed": 1, "faults": [{"kind": "gap", "on": "orders", "chance": 0.5}, {"kind": "repeated", "on": "*", "chance": 0.5}]}))
    for n in range(50):
        strike(among, MESSAGE_FAULTS, "ticker", n)
        alone, together = (any(rule.kind == "gap" for rule in strike(faults, MESSAGE_FAULTS, "orders", n)) for faults in (plain, among))
        assert alone == together


def test_a_script_with_a_mistake_is_refused(tmp_path):
    for given in ({"faults": [{"kind": "nope"}]}, {"faults": [{"on": "x"}]}, {"faults": [{"kind": "lost", "chance": 2}]}, {"answers": {"x": 1}}, {"seeds": 1}, {"seed": "x"}, {"faults": 5}, {"faults": [3]},
                  {"answers": {"duplicate_id": "acepted"}}, {"answers": {"read_lag": "long"}}, {"faults": [{"kind": "lost", "chance": "often"}]}):
        with pytest.raises(InputError, match="^faults: "):
            make_script(given)
    with pytest.raises(InputError, match="cannot be read"):
        read_script(tmp_path / "none.json")
    (tmp_path / "all.json").write_text(json.dumps({"faults": [{"kind": kind} for kind in KINDS]}))
    assert len(read_script(tmp_path / "all.json").rules) == len(KINDS)


# clients that others wrote

def installed(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@installed("ccxt")
def test_ccxt_completes_a_life_cycle():
    import ccxt
    with running(Setup(data=FOLDER[0], today=True, speed=1.0)) as exchange:
        timer.sleep(0.2)
        client = ccxt.delta({"apiKey": KEY, "secret": SECRET, "urls": {"api": {"public": exchange.url, "private": exchange.url}}, "enableRateLimit": False})
        client.session.trust_env = False
        market = client.load_markets()["BTC/USD:USD"]
        assert (market["contractSize"], market["precision"]["price"], market["id"]) == (0.001, 0.5, "BTCUSD")
        assert client.fetch_ticker("BTC/USD:USD")["last"] > 0 and client.fetch_order_book("BTC/USD:USD")["bids"][0][0] > 0
        rows = client.fetch_ohlcv("BTC/USD:USD", "1h", since=int((timer.time() - 5 * HOUR) * 1000), limit=5)
        assert [row[0] for row in rows] == sorted(row[0] for row in rows) and len(rows) >= 4
        client.set_leverage(10, "BTC/USD:USD")
        low = client.fetch_ticker("BTC/USD:USD")["last"] // 2
        order = client.create_order("BTC/USD:USD", "limit", "buy", 3, low, {"client_order_id": "cx"})
        assert order["status"] == "open" and [o["id"] for o in client.fetch_open_orders("BTC/USD:USD")] == [order["id"]]
        assert client.edit_order(order["id"], "BTC/USD:USD", "limit", "buy", 5, low + 1)["amount"] == 5
        assert client.cancel_order(order["id"], "BTC/USD:USD")["status"] == "canceled"
        filled = client.create_order("BTC/USD:USD", "market", "buy", 3, None, {"bracket_stop_loss_price": str(low)})
        assert (filled["status"], filled["filled"]) == ("closed", 3.0)
        position = client.fetch_positions(["BTC/USD:USD"])[0]
        assert position["contracts"] == 3 and position["liquidationPrice"] < position["entryPrice"]
        assert client.create_order("BTC/USD:USD", "market", "sell", 3, None, {"reduceOnly": True})["status"] == "closed"
        assert client.fetch_positions(["BTC/USD:USD"]) == [] and len(client.fetch_my_trades("BTC/USD:USD")) == 2
        assert client.fetch_balance()["USD"]["total"] < 10_000
        assert len(client.fetch_closed_orders("BTC/USD:USD")) >= 2
        client.secret = "wrong"
        with pytest.raises(ccxt.BaseError):
            client.fetch_balance()


@installed("delta_rest_client")
def test_the_exchanges_own_client_completes_a_life_cycle(monkeypatch):
    from delta_rest_client import DeltaRestClient, OrderType
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running(Setup(data=FOLDER[0], today=True, speed=1.0)) as exchange:
        timer.sleep(0.2)
        client = DeltaRestClient(exchange.url, KEY, SECRET, raise_for_status=False)
        assert client.get_product("BTCUSD")["id"] == 27 and client.get_assets()
        assert client.set_leverage(27, "10")["leverage"] == "10" == client.get_order_leverage(27)["leverage"]
        last = client.get_ticker("BTCUSD")["close"]
        order = client.place_order(27, 3, "buy", limit_price=last // 2, client_order_id="own")
        assert order["state"] == "open" and client.get_order_by_client_id("own")["id"] == order["id"] == client.get_order_by_id(order["id"])["id"]
        assert client.edit_order({"id": order["id"], "product_id": 27, "size": 4})["size"] == 4
        assert [row["id"] for row in client.get_live_orders({"product_ids": 27, "states": "open,pending"})] == [order["id"]]
        assert client.cancel_order(27, order["id"])["state"] == "cancelled"
        assert client.place_order(27, 3, "buy", order_type=OrderType.MARKET)["state"] == "closed"
        client.place_bracket_order({"product_id": 27, "stop_loss_order": {"order_type": "market_order", "stop_price": str(last // 2)}})
        assert client.get_position(27)["size"] == 3 and client.get_margined_position(27)["margin_mode"] == "isolated"
        client.close_all_positions(close_all_isolated=True)
        assert client.get_position(27)["size"] == 0 and client.get_margined_position(27) is None
        assert len(client.fills()["result"]) == 2 and len(client.order_history()["result"]) >= 3
        assert float(client.get_balances(14)["balance"]) < 10_000
        client.cancel_all_orders({"product_id": 27, "cancel_limit_orders": "true", "cancel_stop_orders": "true", "cancel_reduce_only_orders": "true"})
        made = client.batch_create(27, [{"size": 1, "side": "buy", "order_type": "limit_order", "limit_price": str(last // 2)}])
        assert len(client.batch_cancel(27, [{"id": made[0]["id"]}])) == 1
