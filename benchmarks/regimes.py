"""Fitting hidden Markov models beside the usual way, one regime answer, and the whole reading of a year of five-minute bars."""
from __future__ import annotations

import numpy as np
from hmmlearn.hmm import GaussianHMM
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from benchmarks.backtest import BARS, SYMBOL
from benchmarks.timing import best_seconds, print_ratios
from delta_go.learning.features import WINDOW, compute_features, regime_inputs
from delta_go.learning.reading import read_market
from delta_go.learning.regime_fit import Chain, fit_regimes, likelihood_per_bar, search
from delta_go.learning.regimes import filter_regimes, likelihoods
from delta_go.market.simulate import simulate_market
from delta_go.market.venue import PRODUCTS
from delta_go.trading.backtest import build_tape, run_backtest
from delta_go.trading.plan import make_plan

ROWS, RESTARTS = 8_000, 20
SIX = ["returns", "volatility", "volatility_ratio", "trend", "range_position", "rsi"]


def six_features(bars) -> tuple[np.ndarray, np.ndarray]:
    """Training rows and the later rows that nobody looks at, standardised by the training rows."""
    features = compute_features(bars[:ROWS // 3 * 5 + WINDOW])
    rows = np.column_stack([features.column(name) for name in SIX])
    rows = (rows - rows[:ROWS].mean(axis=0)) / rows[:ROWS].std(axis=0)
    return rows[:ROWS], rows[ROWS:]


def usual_search(train: np.ndarray, restarts: int) -> GaussianHMM:
    """Restarts one after the other, hmmlearn's defaults, each to the end; the best training score wins."""
    with threadpool_limits(1):  # a kindness: its k-means and BLAS threads get in each other's way on a busy machine
        fits = [GaussianHMM(5, "diag", n_iter=200, random_state=seed).fit(train) for seed in range(restarts)]
    return max(fits, key=lambda fit: fit.score(train))


def our_search(train: np.ndarray, restarts: int) -> Chain:
    """The same family of models: short runs from random rows, the best few to the end, the best training score wins. No anchors: grip nil."""
    sticky, origin = np.full((5, 5), 0.025) + np.eye(5) * 0.875, np.zeros((5, len(SIX)))
    drawn = [train[np.random.default_rng(seed).choice(len(train), 5, replace=False)] for seed in range(restarts)]
    starts = [(Chain(means, np.ones(means.shape), sticky), 0.0) for means in drawn]
    return search(np.vstack([train, train]), [len(train), len(train)], len(train), starts, 2, origin)[0]


def compare_searches(bars) -> None:
    """Time and likelihood of both ways to fit the same model to the same rows."""
    train, unseen = six_features(bars)
    found: dict[str, object] = {}

    def keep(name, fit, *given):
        def run():
            found[name] = fit(*given)
        return run
    usual, ours = f"hmmlearn, {RESTARTS} full fits", f"delta_go, {RESTARTS} restarts"
    seconds = best_seconds({usual: keep(usual, usual_search, train, RESTARTS)}, rounds=1, warm_up=False)
    seconds |= best_seconds({ours: keep(ours, our_search, train, RESTARTS), "delta_go, 100 restarts": keep("delta_go, 100 restarts", our_search, train, 100)},
                            rounds=2, warm_up=False)
    print_ratios(f"HMM, {len(train):,} rows, {len(SIX)} features, 5 states", seconds, ours, target="target: ten times the usual way at an equal or better likelihood")
    table = Table("log-likelihood a row", "training rows", "later rows")
    for name, model in found.items():
        score = model.score if isinstance(model, GaussianHMM) else lambda rows, model=model: likelihood_per_bar(model, rows, [len(rows)]) * len(rows)
        table.add_row(name, *(f"{score(rows) / len(rows):.4f}" for rows in (train, unseen)))
    Console().print(table)


def step_by_step(model, inputs: np.ndarray) -> np.ndarray:
    """The forward filter as it is usually written: one bar after the other."""
    belief = model.stationary.copy()
    for likelihood in likelihoods(model, inputs).T:
        belief = (belief @ model.transition) * likelihood
        belief /= belief.sum()
    return belief


def main() -> None:
    """Fits, one answer, a year."""
    bars = simulate_market((SYMBOL,), bars=BARS, step=300).candles[SYMBOL]
    compare_searches(bars)
    kept: dict[str, object] = {}

    def whole():
        kept["model"] = fit_regimes(bars[:ROWS + 72], restarts=RESTARTS, jobs=2)[0]

    print_ratios("regimes as trained: both fits, names, quality", best_seconds({"delta_go": whole}, rounds=2), "delta_go")

    model, window = kept["model"], bars[-WINDOW:]
    print_ratios("one regime answer from 200 candles", best_seconds({
        "delta_go, its inputs included": lambda: filter_regimes(model, window),
        "delta_go, and all 18 features": lambda: (compute_features(window), filter_regimes(model, window)),
        "the filter alone, step by step": lambda: step_by_step(model, regime_inputs(window))}, rounds=200), "delta_go, its inputs included", target="target: 0.5 ms")

    def year():
        plan = make_plan(read_market(bars, model))
        return run_backtest(build_tape({SYMBOL: bars}, {SYMBOL: plan}, PRODUCTS), policy="signals")

    print_ratios(f"features, regimes and decisions, {BARS:,} bars", best_seconds({"delta_go": year}), "delta_go", "bars/s", BARS)


if __name__ == "__main__":
    main()
