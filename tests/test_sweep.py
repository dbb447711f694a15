"""A sweep is the backtest of each bracket, to the bit."""

from dataclasses import replace

import numpy as np
import pytest

from delta_go.domain import InputError
from delta_go.market.simulate import simulate_market
from delta_go.market.venue import PRODUCTS
from delta_go.trading.backtest import build_tape, run_backtest
from delta_go.trading.plan import Plan
from delta_go.trading.sweep import bar_statistics, sweep_brackets

SYMBOLS, BARS = ("BTCUSD", "ETHUSD"), 3_000


@pytest.fixture(scope="module")
def tape():
    "Two symbols, one of which starts later; signals on one bar in thirty, a few of them refused."
    rng, market = np.random.default_rng(3), simulate_market(SYMBOLS, bars=BARS, step=3600, seed=3).candles
    market = {"BTCUSD": market["BTCUSD"], "ETHUSD": market["ETHUSD"][40:]}

    def plan(candles):
        n, close = len(candles), candles.close
        side = np.where(rng.random(n) < 1 / 30, rng.choice([-1, 1], n), 0)
        return Plan(side, close * (1 - side * 0.01), close * (1 + side * 0.02), rng.integers(1, 60, n), rng.integers(0, 5, n), rng.random(n),
                    np.full(n, np.nan), rng.choice(3, n).astype(np.int8), np.zeros(n, np.int64), ("test",))
    funding = {"BTCUSD": (np.arange(0, BARS, 8) * 3600 + market["BTCUSD"].time[0], np.full((BARS + 7) // 8, 1e-4))}
    return build_tape(market, {symbol: plan(candles) for symbol, candles in market.items()}, PRODUCTS, funding)


def alone(tape, stop, target, policy):
    side, close = tape.plan["side"], tape.market["close"]
    wide = {"stop": np.where(side, close * (1 - side * stop), np.nan), "target": np.where(side, close * (1 + side * target), np.nan)}
    return run_backtest(replace(tape, plan=tape.plan | wide), policy=policy)


@pytest.mark.parametrize("policy", ["signals", "gate"])
@pytest.mark.parametrize("jobs", [1, 3])
def test_each_run_is_the_backtest_of_its_bracket(tape, policy, jobs):
    brackets = np.random.default_rng(0).uniform(0.002, 0.05, (40, 2))
    swept = sweep_brackets(tape, brackets, policy=policy, jobs=jobs, measure=lambda equity, closed: (equity.tobytes(), closed.tobytes()))
    singles = [alone(tape, *bracket, policy) for bracket in brackets]
    assert swept == [(run.equity.tobytes(), run.closed.tobytes()) for run in singles]
    assert min(len(run.closed) for run in singles) > 10


def test_the_tape_is_left_as_it_was(tape):
    before = {name: column.copy() for name, column in tape.plan.items()}
    sweep_brackets(tape, np.full((5, 2), 0.01))
    assert all(np.array_equal(before[name], column, equal_nan=name not in ("side",)) for name, column in tape.plan.items())


def test_three_numbers_are_those_of_the_whole_curve(tape):
    [numbers] = sweep_brackets(tape, np.array([[0.01, 0.02]]))
    equity = alone(tape, 0.01, 0.02, "signals").equity
    returns = equity[1:] / equity[:-1] - 1
    assert numbers == pytest.approx((equity[-1] / equity[0] - 1, returns.mean() / returns.std(), (1 - equity / np.maximum.accumulate(equity)).max()), rel=1e-9)


def test_a_curve_that_never_moves_has_no_sharpe_ratio():
    for bars in (1, 2, 50):
        net, sharpe, drawdown = bar_statistics(np.full(bars, 1e4), None)
        assert net == drawdown == 0 and np.isnan(sharpe)


def test_no_brackets_no_runs(tape):
    assert sweep_brackets(tape, np.empty((0, 2))) == []


@pytest.mark.parametrize("brackets, message", [
    (np.array([0.01, 0.02]), r"rows of a stop and a target, got an array of shape \(2,\)"),
    (np.array([[0.01, 0.02], [0.01, 2.0]]), r"fractions between 0 and 1, got \[0.01, 2.0\] in row 1"),
    (np.array([[0.01, np.nan]]), r"got \[0.01, nan\] in row 0"),
])
def test_odd_brackets_are_refused(tape, brackets, message):
    with pytest.raises(InputError, match=message):
        sweep_brackets(tape, brackets)
