"""One run of the whole pipeline, from a market to a verdict: what a calibration does hundreds of times."""
from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.timing import best_seconds, print_ratios
from delta_go.calibration.case import Case, make_market
from delta_go.evidence.metrics import sharpe_ci95
from delta_go.evidence.verdict import weigh
from delta_go.evidence.walk_forward import WalkSettings, play_fold, trade_folds, walk_forward
from delta_go.learning.training import TrainSettings, collect_examples, fit_all_regimes, read_all
from delta_go.learning.predictor_fit import fit_predictor
from delta_go.market.simulate import simulate_market

YEAR = 8_760


def main() -> None:
    """One year and two years of hourly candles of three symbols, on one core, and where the time goes."""
    whole, made = {}, {}
    with threadpool_limits(1):
        for years, settings in ((1, WalkSettings(first_train_days=182)), (2, WalkSettings())):
            market = make_market(Case("simulated", 0.0, 7, years * YEAR))
            made[years] = market, {symbol: market.payments(symbol) for symbol in market.candles}, settings

            def run(market=market, payments=made[years][1], settings=settings) -> None:
                with TemporaryDirectory() as folder:
                    weigh(walk_forward(market.candles, payments, settings), market.candles, Path(folder, "trials.jsonl"), "benchmark")
            whole[f"{years} year{'s' * (years > 1)}: {365 * years - settings.first_train_days} days walked"] = run
        seconds = best_seconds(whole, rounds=2)
        print_ratios("market to verdict, three symbols, hourly, one core", seconds, next(iter(seconds)), target="target: a year in seconds; two years in under 14 s")

        market, payments, settings = made[2]
        train, start = TrainSettings(restarts=3), int(market.candles["BTCUSD"].time[0]) + 546 * 86_400
        fold = play_fold(market.candles, payments, start, start + 91 * 86_400, settings)
        regimes = fold.models.regimes
        past = {symbol: bars[:546 * 24] for symbol, bars in market.candles.items()}
        examples = collect_examples(past, read_all(past, regimes, payments, train), payments, train)
        parts = best_seconds({"regimes fitted": lambda: fit_all_regimes(past, train), "read": lambda: read_all(past, regimes, payments, train),
                              "predictor fitted": lambda: fit_predictor(examples), "traded, all variants": lambda: trade_folds(market.candles, payments, [fold], settings)}, rounds=3)
        print_ratios("a fold with a year and a half of past", parts, "read")

        daily = np.random.default_rng(0).normal(0.001, 0.02, 1_800)
        around = best_seconds({"two years of a market simulated": lambda: simulate_market(seed=7), "interval of a Sharpe ratio": lambda: sharpe_ci95(daily)}, rounds=3)
        print_ratios("around it", around, "interval of a Sharpe ratio", target="target: the market in under a second")


if __name__ == "__main__":
    main()
