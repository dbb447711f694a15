"""Indicators beside TA-Lib and pandas, and the whole reading of a year of five-minute bars."""
from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.backtest import BARS, SYMBOL
from benchmarks.timing import best_seconds, print_ratios
from delta_go.learning.features import FEATURES, compute_features
from delta_go.market.simulate import simulate_market


def talib_indicators(bars) -> list[np.ndarray]:
    """Sixteen of TA-Lib's, of the same kinds and lengths as ours."""
    import talib
    c, h, low, v = bars.close, bars.high, bars.low, bars.volume
    upper, middle, lower = talib.BBANDS(c, 20)
    return [talib.RSI(c, 14), upper, middle, lower, talib.ATR(h, low, c, 14), talib.NATR(h, low, c, 14), talib.SMA(v, 20), talib.MOM(c, 12), talib.MOM(c, 48),
            talib.STDDEV(c, 48), talib.STDDEV(c, 16), talib.EMA(c, 12), talib.EMA(c, 48), talib.MAX(h, 24), talib.MIN(low, 24), talib.ROC(c, 1)]


def pandas_indicators(bars) -> list[pd.Series]:
    """The same, as they are usually written."""
    c, h, low, v = (pd.Series(x) for x in (bars.close, bars.high, bars.low, bars.volume))
    move, before = c.diff(), c.shift()
    span = pd.concat([h, before], axis=1).max(axis=1) - pd.concat([low, before], axis=1).min(axis=1)
    mean, deviation = c.rolling(20).mean(), c.rolling(20).std()
    return [move.clip(lower=0).rolling(14).mean() / move.abs().rolling(14).mean(), mean + 2 * deviation, mean, mean - 2 * deviation, span.rolling(14).mean(),
            span.rolling(14).mean() / c, v.rolling(20).mean(), c.diff(12), c.diff(48), c.rolling(48).std(), c.rolling(16).std(), c.ewm(span=12).mean(),
            c.ewm(span=48).mean(), h.rolling(24).max(), low.rolling(24).min(), c.pct_change()]


def main() -> None:
    """Indicators alone, then features, regimes and proposals together."""
    bars = simulate_market((SYMBOL,), bars=BARS, step=300).candles[SYMBOL]
    rivals = {f"delta_go ({len(FEATURES)} features, finite memory)": lambda: compute_features(bars), "pandas (16)": lambda: pandas_indicators(bars)}
    try:
        import talib  # noqa: F401
        rivals["TA-Lib (16)"] = lambda: talib_indicators(bars)
    except ImportError:
        pass
    print_ratios(f"indicators, {BARS:,} bars", best_seconds(rivals), next(iter(rivals)), "bars/s", BARS, "target: within twice TA-Lib")


if __name__ == "__main__":
    main()
