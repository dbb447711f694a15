"""Run every benchmark: `python -m benchmarks`."""
from benchmarks import backtest, bot, features, regimes, services

for each in (features, regimes, backtest, services, bot):
    each.main()
