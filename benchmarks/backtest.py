"""The backtest beside backtesting.py and vectorbt: one symbol, 43,777 five-minute bars, the same entries, brackets and costs."""
from __future__ import annotations

import warnings

import numpy as np
import pandas as pd

from benchmarks.timing import best_seconds, print_ratios
from delta_go.market.simulate import simulate_market
from delta_go.market.venue import PRODUCTS, Costs, fee_rate
from delta_go.trading.backtest import build_tape, run_backtest
from delta_go.trading.plan import Plan
from delta_go.trading.sweep import sweep_brackets

BARS, SYMBOL, STOP, TARGET = 43_777, "BTCUSD", 0.004, 0.008


def make_case(seed: int = 0):
    """Candles, and entries on one bar in a hundred."""
    candles = simulate_market((SYMBOL,), bars=BARS, step=300, seed=seed).candles[SYMBOL]
    rng = np.random.default_rng(seed)
    side = np.where(rng.random(BARS) < 0.01, rng.choice([-1, 1], BARS), 0)
    return candles, side


def plan_of(candles, side, stop=STOP, target=TARGET) -> Plan:
    """The entries with stop and target as fractions of the close."""
    close, none = candles.close, np.zeros(BARS, np.int64)
    return Plan(side, close * (1 - side * stop), close * (1 + side * target), np.full(BARS, 10**6), none, np.full(BARS, 0.9),
                np.full(BARS, np.nan), np.ones(BARS, np.int64), none, ("bench",))


def with_metrics(result) -> tuple[float, float, float]:
    """Net return, Sharpe ratio of bars, drawdown: what vectorbt is asked for too."""
    equity = result.equity
    returns = np.diff(equity) / equity[:-1]
    return equity[-1] / equity[0] - 1, returns.mean() / returns.std(), (1 - equity / np.maximum.accumulate(equity)).max()


def vectorbt_run(frame, side, stop=STOP, target=TARGET, metrics=True):
    """The same entries through vectorbt, brackets inside the bar, fees and slippage the same."""
    import vectorbt as vbt
    costs = Costs()
    entries = pd.Series(side).shift(1, fill_value=0).to_numpy()
    portfolio = vbt.Portfolio.from_signals(
        frame["Close"], entries=entries > 0, short_entries=entries < 0, price=frame["Open"], open=frame["Open"], high=frame["High"], low=frame["Low"],
        sl_stop=stop, tp_stop=target, fees=fee_rate(PRODUCTS[SYMBOL], costs), slippage=costs.slippage, size=1.0, size_type="percent",
        init_cash=10_000, upon_opposite_entry="ignore", freq="5min")
    return (portfolio.total_return(), portfolio.sharpe_ratio(), portfolio.max_drawdown()) if metrics else portfolio.total_return()


def backtesting_run(frame, side):
    """The same entries through backtesting.py."""
    from backtesting import Backtest, Strategy

    class Bracketed(Strategy):
        def init(self): pass

        def next(self):
            way, close = side[len(self.data) - 1], self.data.Close[-1]
            if way and not self.position:
                order = self.buy if way > 0 else self.sell
                order(size=0.5, sl=close * (1 - way * STOP), tp=close * (1 + way * TARGET))

    return Backtest(frame, Bracketed, cash=10_000_000, commission=0.00109, trade_on_close=False, finalize_trades=True).run()


def main() -> None:
    """One run of all three, then a sweep of a thousand brackets."""
    warnings.simplefilter("ignore")
    candles, side = make_case()
    frame = pd.DataFrame({"Open": candles.open, "High": candles.high, "Low": candles.low, "Close": candles.close, "Volume": candles.volume},
                         index=pd.to_datetime(candles.time, unit="s"))
    tape = build_tape({SYMBOL: candles}, {SYMBOL: plan_of(candles, side)}, PRODUCTS)
    rivals = {"delta_go": lambda: with_metrics(run_backtest(tape, policy="signals")), "vectorbt": lambda: vectorbt_run(frame, side)}
    try:
        import backtesting  # noqa: F401
        slow = best_seconds({"backtesting.py": lambda: backtesting_run(frame, side)}, rounds=2)
    except ImportError:
        slow = {}
    print_ratios("backtest, one symbol, with metrics", best_seconds(rivals) | slow, "delta_go", "bars/s", BARS, "target: ten times vectorbt")

    brackets = np.random.default_rng(1).uniform(0.002, 0.02, (1_000, 2))

    def ours():
        return sweep_brackets(tape, brackets)

    def theirs():
        wide = pd.DataFrame(np.repeat(frame["Close"].to_numpy()[:, None], 100, axis=1))
        return [vectorbt_run_many(frame, wide, side, brackets[at:at + 100]) for at in range(0, 1_000, 100)]

    print_ratios("sweep of 1,000 brackets, with metrics", best_seconds({"delta_go": ours, "vectorbt": theirs}, rounds=2, warm_up=False), "delta_go", target="target: fifty times vectorbt")


def vectorbt_run_many(frame, wide, side, brackets):
    """A hundred brackets at once, as vectorbt likes it."""
    import vectorbt as vbt
    costs, entries = Costs(), pd.Series(side).shift(1, fill_value=0).to_numpy()[:, None]
    tile = {name: np.broadcast_to(frame[name].to_numpy()[:, None], wide.shape) for name in ("Open", "High", "Low")}
    portfolio = vbt.Portfolio.from_signals(
        wide, entries=np.broadcast_to(entries > 0, wide.shape), short_entries=np.broadcast_to(entries < 0, wide.shape), price=tile["Open"], open=tile["Open"],
        high=tile["High"], low=tile["Low"], sl_stop=brackets[:, 0], tp_stop=brackets[:, 1], fees=fee_rate(PRODUCTS[SYMBOL], costs), slippage=costs.slippage,
        size=1.0, size_type="percent", init_cash=10_000, upon_opposite_entry="ignore", freq="5min")
    return portfolio.total_return(), portfolio.sharpe_ratio(), portfolio.max_drawdown()


if __name__ == "__main__":
    main()
