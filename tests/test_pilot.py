"""The pilot against the backtest: windows, an adviser, the emulated exchange's rules; the same decisions, trades and equity."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.load import running
from delta_go.learning.advice import LocalAdviser
from delta_go.learning.reading import read_market
from delta_go.learning.registry import LoadedModels, Manifest, load_models
from delta_go.live.matching import place, play
from delta_go.market.accounts import Ticket, equity_of, open_account, open_exchange
from delta_go.market.simulate import simulate_market
from delta_go.market.venue import PRODUCTS, Costs
from delta_go.serving.client import ServiceAdviser
from delta_go.trading.backtest import build_tape, decisions_of, run_backtest
from delta_go.trading.decide import Position
from delta_go.trading.pilot import absent, decide_close, first_breakers, look, next_breakers, order_for
from delta_go.trading.plan import make_plan
from delta_go.trading.risk import OPEN, RiskLimits

LIMITS = RiskLimits()


def columns(market, payments, models, policy):
    """The backtest of a market."""
    plans = {s: make_plan(read_market(bars, models.regimes[s], payments[s]), models.predictor) for s, bars in market.items()}
    return run_backtest(build_tape(market, plans, PRODUCTS, payments), LIMITS, policy=policy)


def windows(result, market, payments, adviser, policy):
    """The same market flown close by close; the decisions, the account, and its equity at every close."""
    tape, products = result.tape, result.tape.products
    exchange = open_exchange([p.symbol for p in products], Costs(), check_margin=False)
    account = open_account(exchange, 1, result.starting_equity)
    account.leverage.update({p.symbol: LIMITS.leverage for p in products})
    positions: dict[str, Position] = {}
    limits_of: dict[str, int] = {}
    breakers = first_breakers(result.starting_equity, int(tape.time[0]))
    decided, equity = [], []
    for bar, opened in enumerate(tape.time.tolist()):
        present = [p.symbol for s, p in enumerate(products) if tape.present[bar, s]]
        for s, product in enumerate(products):
            if product.symbol in present:
                row = [float(tape.market[name][bar, s]) for name in ("open", "high", "low", "close", "funding")]
                play(exchange, product.symbol, opened * 1_000_000, *row, bool(tape.last[bar, s]))
        for symbol in [s for s in positions if s not in account.positions]:
            del positions[symbol]
        for symbol, held in account.positions.items():
            positions.setdefault(symbol, Position(held.side, held.size, 0, limits_of[symbol]))
        positions = {symbol: replace(held, bars=held.bars + (symbol in present)) for symbol, held in positions.items()}
        equity.append(equity_of(exchange, account))
        breakers = next_breakers(breakers, equity[-1], opened + tape.step, LIMITS)
        seen = []
        for s, product in enumerate(products):
            candles = market[product.symbol]
            end = int(np.searchsorted(candles.time, opened, "right"))
            acts = product.symbol in present and not tape.last[bar, s]
            known = payments[product.symbol][0] <= opened
            paid = tuple(column[known] for column in payments[product.symbol])
            seen.append(look(product, candles[end - 200:end], adviser, paid, policy == "gate") if acts else absent(product, opened, float(candles.close[end - 1])))
        answer = decide_close(seen, positions, equity[-1], breakers.blocked if policy == "gate" else OPEN, LIMITS)
        decided.append(answer)
        for decision, view in zip(answer, seen):
            order = order_for(decision, positions.get(decision.symbol), f"t-{bar}-{decision.symbol}")
            if order:
                limits_of[decision.symbol] = view.max_bars if decision.action == "enter" else limits_of[decision.symbol]
                side, levels = (1 if order.side == "buy" else -1), [None if level is None else float(level) for level in (order.stop, order.target)]
                place(exchange, account, Ticket(order.symbol, side, order.size, reduce_only=order.reduce_only, stop=levels[0], target=levels[1]), (opened + tape.step) * 1_000_000)
    return decided, account, equity


def assert_same(result, decided, account, equity):
    """Every decision, every trade, every mark."""
    assert decided == [decisions_of(result, bar) for bar in range(len(decided))]
    ours = [(t.symbol, t.side, t.size, t.opened // 1_000_000, t.entry, t.closed // 1_000_000, t.exit, t.fees, t.funding, t.pnl) for t in account.trips]
    tape = result.tape
    theirs = [(tape.products[r["symbol"]].symbol, r["side"], r["size"], tape.time[r["entry_bar"]], r["entry"], tape.time[r["exit_bar"]], r["exit"], r["fees"], r["funding"], r["pnl"])
              for r in result.closed]
    assert ours == theirs and equity == result.equity.tolist()


@pytest.fixture(scope="module")
def simulated(case):
    """Two months of three symbols that the models never saw."""
    market = {symbol: bars[-1_500:] for symbol, bars in case.candles.items()}
    models = LoadedModels(case.models.regimes, case.models.predictor, Manifest("1h", 200, "a test", {}))
    return market, case.payments, models


@pytest.mark.parametrize("policy", ["signals", "gate"])
def test_pilot_on_the_emulated_exchange_is_the_backtest(simulated, policy):
    market, payments, models = simulated
    result = columns(market, payments, models, policy)
    decided, account, equity = windows(result, market, payments, LocalAdviser(models), policy)
    assert_same(result, decided, account, equity)
    assert policy == "gate" or len(result.closed) > 20


def test_a_willing_predictor_and_breakers_make_no_difference(simulated):
    market, payments, models = simulated
    willing = replace(models, predictor=replace(models.predictor, threshold=0.35, abstain_reason=None))
    result = columns(market, payments, willing, "gate")
    assert len(result.closed) > 5
    assert_same(result, *windows(result, market, payments, LocalAdviser(willing), "gate"))


def test_missing_bars_make_no_difference(simulated):
    market, payments, models = simulated
    rng = np.random.default_rng(5)
    holed = {}
    for symbol, bars in market.items():
        keep = np.ones(len(bars), bool)
        keep[rng.choice(np.arange(300, len(bars) - 5), 2, replace=False)] = False
        holed[symbol] = bars[keep]
    result = columns(holed, payments, models, "signals")
    assert_same(result, *windows(result, holed, payments, LocalAdviser(models), "signals"))


def test_advice_over_http_makes_no_difference():
    """Both services as processes; the same decisions, to the last digit of every number in them."""
    models = load_models("models")
    market = simulate_market(bars=500, seed=7)
    payments = {symbol: (paid.time, paid.rate) for symbol, paid in market.funding.items()}
    with running("hmm-detector") as detector, running("trade-predictor") as predictor, \
            ServiceAdviser(f"http://127.0.0.1:{detector.port}", f"http://127.0.0.1:{predictor.port}") as adviser:
        for policy in ("signals", "gate"):
            result = columns(market.candles, payments, models, policy)
            assert_same(result, *windows(result, market.candles, payments, adviser, policy))
