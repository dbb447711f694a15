"""Run every benchmark: `python -m benchmarks`."""
from benchmarks import backtest, bot, features, pipeline, regimes, services

for each in (features, regimes, backtest, pipeline, services, bot):
    each.main()
