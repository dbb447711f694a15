"""Run every benchmark: `python -m benchmarks`."""
from benchmarks import backtest, features, regimes, services

for each in (features, regimes, backtest, services):
    each.main()
