"""Flights with one thing gone wrong in each, explained: every fault lands in its own cause, to the cent."""
from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError, Trade
from delta_go.learning.advice import LocalAdviser
from delta_go.learning.registry import load_models
from delta_go.live import explain as room
from delta_go.live.account import synchronise
from delta_go.live.emulator import running
from delta_go.live.explain import CAUSES, explain_journal, show_explanation, to_plain, write_explanation
from delta_go.live.flight import Flight, close_bar, note_payments, read_on
from delta_go.live.pace import Setup
from delta_go.live.rehearse import board
from delta_go.market.load import load_market
from delta_go.market.venue import PRODUCTS, Costs
from delta_go.trading.intents import Stop, Tick
from delta_go.trading.risk import RiskLimits

SPAN, LIMITS, MODELS = dict(start="2023-01-19", end="2023-01-26"), RiskLimits(), Path("models")


@pytest.fixture(scope="module")
def market():
    """The simulated market, whole."""
    return load_market()


@dataclass
class Faults:
    """What goes wrong in a flight; times are opens."""
    missed: tuple[int, ...] = ()
    most: dict[str, int] = field(default_factory=dict)      # contracts by symbol
    by_hand: dict[int, str] = field(default_factory=dict)   # close what is held in a symbol after this bar
    stranger: dict[int, tuple[str, str, int]] = field(default_factory=dict)  # symbol, side, size
    halt: dict[int, bool] = field(default_factory=dict)     # flatten or not
    models: object = None
    limits: RiskLimits = LIMITS
    setup: dict = field(default_factory=dict)
    until: int = 2**62
    silent: tuple[int, ...] = ()


class Sometimes(LocalAdviser):
    """Models that do not answer on some bars."""
    quiet = False

    def regime(self, candles):
        if self.quiet:
            raise InputError("the detector is down")
        return super().regime(candles)


def flown(market, folder, faults):
    """The journal of one flight, every signal taken."""
    symbols = sorted(market.candles)
    with running(Setup(**SPAN, leverage=LIMITS.leverage, **faults.setup)) as exchange, httpx.Client(base_url=exchange.url, trust_env=False) as client:
        hands, ahead = board(exchange.url, symbols, folder)
        hands.state.rules = replace(hands.state.rules, max_size={**hands.state.rules.max_size, **faults.most})
        adviser = Sometimes(faults.models or load_models(MODELS))

        def catch_up():
            for ahead[0] in (0, 6):
                hands.handle(Tick())

        def window(symbol, opened):
            bars = market.candles[symbol]
            return bars[:int(np.searchsorted(bars.time, opened, "right"))][-250:]

        def funding(symbol, opened):
            times, rates = market.payments(symbol)
            return times[times <= opened], rates[times <= opened]

        flight = Flight(hands, adviser, [PRODUCTS[s] for s in symbols], faults.limits, catch_up, window, funding, gated=False)
        told = {"done": False}
        while not told["done"]:
            told, ahead[0] = client.post("/emulator/ack", json={}).json(), 0
            synchronise(hands.account, 1)
            opened = told["open"]
            adviser.quiet = opened in faults.silent
            if opened in faults.halt:
                hands.handle(Stop("kill switch: a test", faults.halt[opened]))
            if opened not in faults.missed:
                close_bar(flight, opened, 3600, told["last"])
            for symbol, side, size in ([(faults.by_hand[opened], "", 0)] if opened in faults.by_hand else []) + ([faults.stranger[opened]] if opened in faults.stranger else []):
                held = hands.state.books.held.get(symbol, 0)
                body = {"product_id": hands.account.listings[symbol].product_id, "size": size or abs(held), "side": side or ("sell" if held > 0 else "buy"), "order_type": "market_order"}
                assert "success" in str(hands.account.send("POST", "/v2/orders", body=body))
            if opened >= faults.until:
                break
        catch_up()
        read_on(flight.log, hands.entries)
        note_payments(flight, opened)
        hands.journal.close()
    return folder / "journal.db"


@pytest.fixture(scope="module")
def plain(market, tmp_path_factory):
    """A flight in which nothing goes wrong, explained."""
    return explain_journal(flown(market, tmp_path_factory.mktemp("plain"), Faults()), "", MODELS, policy="signals")


def explained(market, folder, **changes):
    """A flight with faults, explained; whatever the faults, the parts add up."""
    told = explain_journal(flown(market, folder, Faults(**changes)), "", MODELS, policy="signals")
    assert abs(sum(told.causes.values()) - (told.bot - told.backtest)) < 1e-6
    for row in told.rows:
        if row.bot or row.backtest:
            assert abs(sum(row.parts.values()) - ((row.bot.pnl if row.bot else 0) - (row.backtest.pnl if row.backtest else 0))) < 1e-6
    return told


def causes(told, at_least=1e-4):
    """The causes that matter."""
    return {cause: money for cause, money in told.causes.items() if abs(money) >= at_least}


def test_nothing_wrong_is_all_zeros(plain):
    """Exactly."""
    print([row.parts for row in plain.rows])
    assert len(plain.rows) > 5 and plain.bot == plain.backtest != 0
    assert not any(plain.causes.values()) and not plain.differing and not plain.first and plain.compared == 7 * 24 * 3
