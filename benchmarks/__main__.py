"""Run every benchmark: `python -m benchmarks`."""
from benchmarks import backtest, features, regimes

for each in (features, regimes, backtest):
    each.main()
