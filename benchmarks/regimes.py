"""Fitting regimes beside the usual way, one regime answer, and the whole reading of a year of five-minute bars."""
from __future__ import annotations

import numpy as np
from hmmlearn.hmm import GaussianHMM
from rich.console import Console

from benchmarks.backtest import BARS, SYMBOL
from benchmarks.timing import best_seconds, print_ratios
from delta_go.learning.features import WINDOW, regime_inputs
from delta_go.learning.reading import read_market
from delta_go.learning.regime_fit import fit_regimes
from delta_go.learning.regimes import filter_regimes, likelihoods
from delta_go.market.simulate import simulate_market
from delta_go.market.venue import PRODUCTS
from delta_go.trading.backtest import build_tape, run_backtest
from delta_go.trading.plan import make_plan

ROWS, RESTARTS = 8_000, 20


def usual_fit(inputs: np.ndarray) -> GaussianHMM:
    """Twenty restarts one after the other, each to the end, the best training score wins."""
    fits = [GaussianHMM(5, "full", n_iter=200, tol=1e-2, random_state=seed).fit(inputs) for seed in range(RESTARTS)]
    return max(fits, key=lambda fit: fit.score(inputs))


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
    train = bars[:ROWS + 72]
    inputs = regime_inputs(train)
    scaled = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    kept: dict[str, object] = {}

    def usual():
        kept["usual"] = usual_fit(scaled)

    def ours():
        kept["ours"] = fit_regimes(train, restarts=RESTARTS, jobs=2)

    print_ratios(f"HMM, {RESTARTS} restarts, {len(inputs):,} rows", best_seconds({"delta_go (two fits: held-out and final, names, quality)": ours, "hmmlearn, 20 full fits": usual}, rounds=1),
                 "delta_go (two fits: held-out and final, names, quality)", target="target: ten times the usual way at an equal or better likelihood")
    Console().print(f"log-likelihood a row: usual way {kept['usual'].score(scaled) / len(scaled):.4f}; ours, held out: {kept['ours'][1].held_out_log_likelihood:.4f}")

    model, window = kept["ours"][0], bars[-WINDOW:]
    print_ratios("one regime answer from 200 candles", best_seconds({
        "delta_go, features included": lambda: filter_regimes(model, window),
        "the filter alone, step by step": lambda: step_by_step(model, regime_inputs(window))}, rounds=200), "delta_go, features included", target="target: 0.5 ms")

    def year():
        plan = make_plan(read_market(bars, model))
        return run_backtest(build_tape({SYMBOL: bars}, {SYMBOL: plan}, PRODUCTS), policy="signals")

    print_ratios(f"features, regimes and decisions, {BARS:,} bars", best_seconds({"delta_go": year}), "delta_go", "bars/s", BARS)


if __name__ == "__main__":
    main()
