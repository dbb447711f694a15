"""The bot close by close against the backtest, over real requests: both policies, restarts, and what a restart must remember."""
from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

from delta_go.learning.advice import LocalAdviser
from delta_go.learning.reading import read_market
from delta_go.learning.registry import load_models
from delta_go.live.account import synchronise
from delta_go.live.emulator import running
from delta_go.live.flight import Flight, Logbook, close_bar, ledger_from, note_payments, read_on
from delta_go.live.pace import Setup
from delta_go.live.rehearse import board, window_from
from delta_go.market.load import load_market, parse_time
from delta_go.market.venue import PRODUCTS
from delta_go.trading.backtest import build_tape, ledger_of, run_backtest
from delta_go.trading.intents import Tick
from delta_go.trading.plan import make_plan
from delta_go.trading.risk import RiskLimits

SPAN, LIMITS = dict(start="2023-01-19", end="2023-01-27"), RiskLimits()


@pytest.fixture(scope="module")
def market():
    """The simulated market as far as the flights go."""
    return load_market(end=SPAN["end"])


@pytest.fixture(scope="module")
def models():
    """The committed models, with a predictor that is willing to trade half of what it sees."""
    loaded = load_models("models")
    return replace(loaded, predictor=replace(loaded.predictor, threshold=0.38, abstain_reason=None))


def columns(market, models, policy):
    """The backtest's ledger."""
    paid = {symbol: market.payments(symbol) for symbol in market.candles}
    plans = {symbol: make_plan(read_market(bars, models.regimes[symbol], paid[symbol]), models.predictor) for symbol, bars in market.candles.items()}
    return ledger_of(run_backtest(build_tape(market.candles, plans, PRODUCTS, paid, parse_time(SPAN["start"]), parse_time(SPAN["end"])), LIMITS, policy=policy))


def flown(market, models, policy, folder, restart=0):
    """The bot's ledger; with `restart` it is thrown away and made again from its journal every so many bars."""
    symbols = sorted(market.candles)

    def funding(symbol, opened):
        times, rates = market.payments(symbol)
        return times[times <= opened], rates[times <= opened]

    def take_off(url):
        hands, ahead = board(url, symbols, folder)

        def catch_up():
            for ahead[0] in (0, 6):
                hands.handle(Tick())
        return Flight(hands, LocalAdviser(models), [PRODUCTS[s] for s in symbols], LIMITS, catch_up, window_from(client, "1h"), funding, policy == "gate"), ahead

    with running(Setup(**SPAN, leverage=LIMITS.leverage)) as exchange, httpx.Client(base_url=exchange.url, trust_env=False) as client:
        flight, ahead = take_off(exchange.url)
        closes = 0
        while True:
            told = client.post("/emulator/ack", json={}).json()
            if restart and closes and closes % restart == 0:
                before = flight.log
                read_on(before, flight.executor.entries)
                flight.executor.journal.close()
                flight, ahead = take_off(exchange.url)
                assert replace(read_on(Logbook(), flight.executor.entries), read=0) == replace(before, read=0)
            ahead[0] = 0
            synchronise(flight.executor.account, 1)
            assert close_bar(flight, told["open"], 3600, told["last"]) == {} == flight.silent
            closes += 1
            if told["done"]:
                break
        flight.catch_up()
        read_on(flight.log, flight.executor.entries)
        assert note_payments(flight, told["open"])
        ledger = ledger_from(flight.executor.entries, PRODUCTS, 10_000.0)
        flight.executor.journal.close()
        return ledger


@pytest.mark.parametrize("policy, restart", [("gate", 0), ("signals", 37), ("gate", 11)])
def test_flown_ledger_is_the_backtests(market, models, tmp_path, policy, restart):
    """Row for row, digit for digit, however often the bot is started again."""
    theirs = columns(market, models, policy)
    ours = flown(market, models, policy, tmp_path, restart)
    assert len(theirs) > (5 if policy == "signals" else 1)
    assert [repr(row) for row in ours] == [repr(row) for row in theirs]
