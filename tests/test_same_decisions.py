"""The notebook, the backtest, the bot and the services say the same of a thousand bars, to the last bit."""
from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.load import Running, running
from delta_go.domain import REGIMES, Decision
from delta_go.learning.features import WINDOW
from delta_go.learning.predictor import PREDICTOR_FEATURES
from delta_go.learning.reading import Reading, read_market
from delta_go.learning.registry import describe_candles, load_models, save_models
from delta_go.live.account import synchronise
from delta_go.live.emulator import running as emulated
from delta_go.live.flight import Flight, close_bar
from delta_go.live.pace import Setup
from delta_go.live.rehearse import board, window_from
from delta_go.market.load import load_market, parse_time
from delta_go.market.venue import PRODUCTS
from delta_go.serving.client import ServiceAdviser
from delta_go.trading.backtest import Backtest, build_tape, decisions_of, run_backtest
from delta_go.trading.intents import Tick
from delta_go.trading.plan import Plan, make_plan
from delta_go.trading.risk import RiskLimits

START, END = "2023-01-19", "2023-02-03"   # a day more than is looked at: nothing ends before it
CLOSES, STEP = 336, 3600
LIMITS = RiskLimits()
Rows = dict[tuple[str, int], dict[str, Any]]   # by symbol and open of the bar


@pytest.fixture(scope="module")
def market():
    """The simulated market, and what its positions are paid."""
    return load_market(end=END)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The committed models with a predictor that is willing to trade half of what it sees."""
    loaded, home = load_models("models"), tmp_path_factory.mktemp("models")
    predictor = replace(loaded.predictor, threshold=0.38, abstain_reason=None)
    windows = {symbol: bars[:300] for symbol, bars in load_market(end="2023-02-01").candles.items()}
    save_models(home, loaded.regimes, predictor, replace(loaded.manifest, verdict="trade"), windows, np.full((2, len(predictor.features)), 0.5))
    return home


@pytest.fixture(scope="module")
def services(folder):
    """Both, as processes of their own."""
    with ExitStack() as stack:
        yield [stack.enter_context(running(name, folder)) for name in ("hmm-detector", "trade-predictor")]


@dataclass(frozen=True)
class Batch:
    """What is computed from many bars at once."""
    readings: Mapping[str, Reading]
    plans: Mapping[str, Plan]
    result: Backtest


def in_bytes(row: Mapping[str, Any]) -> bytes:
    """Every field with its name; floats as their eight bytes."""
    def pack(value: Any) -> bytes:
        if isinstance(value, float):
            return b"f" + struct.pack("<d", value)
        if isinstance(value, list | tuple):
            return b"[" + b"".join(map(pack, value)) + b"]"
        assert value is None or isinstance(value, str | int), value
        return repr(value).encode()
    return b"".join(name.encode() + b"=" + pack(row[name]) + b"\n" for name in sorted(row))


def rows_of(batch: Batch, market) -> Rows:
    """Decisions and what they rest on, as a bot writes them down."""
    tape, rows = batch.result.tape, {}
    for bar in range(CLOSES):
        for decision in decisions_of(batch.result, bar):
            symbol, reading, plan = decision.symbol, batch.readings[decision.symbol], batch.plans[decision.symbol]
            row, bars = int(np.searchsorted(reading.features.time, decision.time)), market.candles[symbol]
            assert reading.features.time[row] == decision.time == tape.time[bar] and reading.features.usable[row]
            signal, chance, last = plan.side[row] != 0, float(plan.probability[row]), int(np.searchsorted(bars.time, decision.time)) + 1
            rows[symbol, decision.time] = {
                **asdict(decision), "max_bars": int(plan.max_bars[row]) if signal else 0, "regime": REGIMES[plan.regime[row]],
                "confidence": float(plan.confidence[row]) if signal else 0.0, "probability": None if chance != chance else chance,
                "words": plan.words[plan.reason[row]] if signal else "", "posterior": reading.regimes.posterior[row].tolist(),
                "window": describe_candles(bars[last - WINDOW:last])["sha256"]}
    return rows


def in_the_backtest(market, models) -> Batch:
    """The whole market read at once, the compiled loop: as `delta-go backtest` and the workflows do."""
    paid = {symbol: market.payments(symbol) for symbol in market.candles}
    readings = {symbol: read_market(bars, models.regimes[symbol], paid[symbol]) for symbol, bars in market.candles.items()}
    plans = {symbol: make_plan(reading, models.predictor) for symbol, reading in readings.items()}
    return Batch(readings, plans, run_backtest(build_tape(market.candles, plans, PRODUCTS, paid, parse_time(START), parse_time(END)), LIMITS))


def in_the_notebook(market, models) -> Batch:
    """Only what is shown is read, and the loop is plain Python: as the research notebook does, cell by cell."""
    paid, shown = {symbol: market.payments(symbol) for symbol in market.candles}, {}
    for symbol, bars in market.candles.items():
        first = int(np.searchsorted(bars.time + STEP, parse_time(START)))
        shown[symbol] = bars[first - WINDOW + 1:]
    readings = {symbol: read_market(bars, models.regimes[symbol], paid[symbol]) for symbol, bars in shown.items()}
    plans = {symbol: make_plan(reading, models.predictor) for symbol, reading in readings.items()}
    return Batch(readings, plans, run_backtest(build_tape(shown, plans, PRODUCTS, paid), LIMITS, interpreted=True))


def in_the_bot(market, services: list[Running], home) -> Rows:
    """Flown close by close, window by window, the models asked over HTTP."""
    symbols = sorted(market.candles)

    def funding(symbol, opened):
        times, rates = market.payments(symbol)
        return times[times <= opened], rates[times <= opened]

    addresses = [f"http://127.0.0.1:{service.port}" for service in services]
    with emulated(Setup(start=START, end=END, leverage=LIMITS.leverage)) as exchange, httpx.Client(base_url=exchange.url, trust_env=False) as client, ServiceAdviser(*addresses) as adviser:
        hands, ahead = board(exchange.url, symbols, home)

        def catch_up():
            for ahead[0] in (0, 6):
                hands.handle(Tick())

        flight = Flight(hands, adviser, [PRODUCTS[symbol] for symbol in symbols], LIMITS, catch_up, window_from(client, "1h"), funding)
        for _ in range(CLOSES):
            told = client.post("/emulator/ack", json={}).json()
            ahead[0] = 0
            synchronise(hands.account, 1)
            assert close_bar(flight, told["open"], STEP, told["last"]) == {} == flight.silent
        hands.journal.close()
    bodies = [dict(entry.body) for entry in hands.entries if entry.kind == "decision"]
    assert all(body.pop("present") and body.pop("models")["model_version"] for body in bodies)
    return {(body["symbol"], body["time"]): body for body in bodies}


@pytest.fixture(scope="module")
def told(market, folder, services, tmp_path_factory) -> dict[str, Rows]:
    """What each of the three says."""
    models = load_models(folder)
    return {"notebook": rows_of(in_the_notebook(market, models), market), "backtest": rows_of(in_the_backtest(market, models), market),
            "bot": in_the_bot(market, services, tmp_path_factory.mktemp("bot"))}


def test_decisions(told):
    """A thousand bars of three symbols, decided three times."""
    keys = told["bot"].keys()
    assert len(keys) == 3 * CLOSES > 1_000 and {symbol for symbol, _ in keys} == set(PRODUCTS)
    assert keys == told["notebook"].keys() == told["backtest"].keys()
    different = [key for key in sorted(keys) if len({in_bytes(rows[key]) for rows in told.values()}) > 1]
    assert different == [], [rows[different[0]] for rows in told.values()]


def test_they_are_not_all_the_same_kind(told):
    """Entries, exits, positions held on, signals that were permitted and refused: otherwise it would prove little."""
    rows = list(told["bot"].values())
    counted = {action: sum(row["action"] == action for row in rows) for action in ("enter", "exit", "hold", "skip")}
    assert counted["enter"] >= 10 and counted["exit"] >= 3 and counted["hold"] > 100, counted
    assert sum(row["probability"] is not None for row in rows) > 30 and {row["regime"] for row in rows} == set(REGIMES)
    assert len({row["reason"] for row in rows}) >= 5


def test_services(told, market, folder, services):
    """Regime view and probability, as they stand in the services' own words."""
    detector, predictor = services
    keys, models, different = sorted(told["backtest"]), load_models(folder), []
    inputs = {symbol: reading for symbol, reading in in_the_backtest(market, models).readings.items()}
    for start in range(0, len(keys), 48):
        part = keys[start:start + 48]
        status, answer = detector.post({"requests": [question(market, *key) for key in part]})
        assert status == 200, answer
        for key, said in zip(part, answer["answers"], strict=True):
            row = told["backtest"][key]
            posterior = [said["state_probabilities"][name] for name in REGIMES]
            if in_bytes({"p": posterior, "regime": said["regime"]}) != in_bytes({"p": row["posterior"], "regime": row["regime"]}):
                different.append(("regime", key))
    asked = [key for key in keys if told["backtest"][key]["probability"] is not None]
    for symbol, time in asked:
        reading = inputs[symbol]
        values = reading.inputs[int(np.searchsorted(reading.features.time, time))].tolist()
        said = predictor.post({"symbol": symbol, **{name: value for name, value in zip(PREDICTOR_FEATURES, values) if value == value}})[1]
        if in_bytes({"p": said["probability"]}) != in_bytes({"p": told["backtest"][symbol, time]["probability"]}):
            different.append(("probability", (symbol, time)))
    assert different == [] and len(asked) > 30


def question(market, symbol: str, time: int) -> dict[str, Any]:
    """The window that ends with a bar."""
    bars = market.candles[symbol]
    last = int(np.searchsorted(bars.time, time)) + 1
    part = bars[last - WINDOW:last]
    return {"symbol": symbol, "resolution": "1h", **{name: getattr(part, name).tolist() for name in ("time", "open", "high", "low", "close", "volume")}}


def test_a_difference_would_be_seen(told):
    """One bit of one float, or a field that is missing."""
    row = next(row for row in told["bot"].values() if row["action"] == "enter")
    assert in_bytes(row) == in_bytes(json.loads(json.dumps(row))) != in_bytes({**row, "stop": float(np.nextafter(row["stop"], 0))})
    assert in_bytes({**row, "posterior": [*row["posterior"][:4], float(np.nextafter(row["posterior"][4], 1))]}) != in_bytes(row)
    assert set(asdict(Decision("BTCUSD", 0, "skip"))) <= set(row)
