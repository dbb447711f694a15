"""No look-ahead in the real pipeline: 200 random cuts a symbol change nothing, and six planted leaks are all found."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from delta_go.evidence.lookahead import find_lookahead, random_cuts
from delta_go.learning.outcomes import label_outcomes
from delta_go.learning.reading import read_market
from delta_go.market.candles import closed, resample
from delta_go.market.venue import PRODUCTS, Costs
from delta_go.trading.backtest import build_tape, run_backtest
from delta_go.trading.plan import make_plan


def tradable(predictor):
    """The predictor with a threshold, so that its word matters."""
    return replace(predictor, threshold=predictor.threshold or 0.3, abstain_reason=None)


def clean_pipeline(case, symbol, drop_forming=True):
    """Everything a decision rests on, as columns: what the package does with candles at a moment."""
    def run(candles, now):
        bars = closed(candles, now) if drop_forming else candles
        reading = read_market(bars, case.models.regimes[symbol], case.payments[symbol])
        plan = make_plan(reading, tradable(case.models.predictor))
        tape = build_tape({symbol: bars}, {symbol: plan}, PRODUCTS, {symbol: case.payments[symbol]})
        result = run_backtest(replace(tape, last=np.zeros_like(tape.last)))
        return {"time": reading.features.time, "features": reading.features.values, "posterior": reading.regimes.posterior,
                "side": plan.side, "stop": plan.stop, "target": plan.target, "probability": plan.probability,
                "decision": np.column_stack([result.action, result.reason, result.size]), "equity": result.equity}
    return run


@pytest.mark.parametrize("symbol", ["BTCUSD", "ETHUSD", "SOLUSD"])
def test_cutting_the_future_off_changes_nothing(case, symbol):
    bars = case.later(symbol)[:2_600]
    cuts = random_cuts(bars, 200, seed=1)
    assert len(cuts) == 200
    assert not [leak.words for leak in find_lookahead(clean_pipeline(case, symbol), bars, cuts, rows=50)]


def test_the_pipeline_says_something_at_the_cuts(case):
    columns = clean_pipeline(case, "BTCUSD")(case.later("BTCUSD"), 2**62)
    assert (columns["side"] != 0).sum() > 20 and np.isfinite(columns["probability"]).sum() > 20
    assert (columns["decision"][:, 0] == 1).sum() > 0


def centred_window(case, symbol, columns, bars):
    moved = np.convolve(bars.close, np.ones(5) / 5, "same")[-len(columns["time"]):]
    return {**columns, "features": np.column_stack([columns["features"], moved])}


def scaler_on_all_data(case, symbol, columns, bars):
    values = columns["features"]
    return {**columns, "features": (values - np.nanmean(values, axis=0)) / np.nanstd(values, axis=0)}


def smoothed_posterior(case, symbol, columns, bars):
    backward = np.empty_like(columns["posterior"])
    belief = np.full(5, 0.2)
    for row in range(len(backward) - 1, -1, -1):
        belief = case.models.regimes[symbol].transition @ (columns["posterior"][row] * belief)
        belief /= belief.sum()
        backward[row] = belief
    joint = columns["posterior"] * backward
    return {**columns, "posterior": joint / joint.sum(axis=1, keepdims=True)}


def label_among_features(case, symbol, columns, bars):
    outcomes = label_outcomes(bars, columns["side"], columns["stop"], columns["target"], np.full(len(columns["side"]), 48),
                              np.full(len(bars), np.nan), PRODUCTS[symbol], Costs())
    earned = np.zeros(len(bars))
    earned[outcomes.bar] = outcomes.net_return
    return {**columns, "features": np.column_stack([columns["features"], earned[-len(columns["time"]):]])}


def left_labelled_resample(case, symbol, columns, bars):
    import pandas as pd
    frame = pd.Series(bars.close, pd.to_datetime(bars.time, unit="s")).resample("4h").last()
    at = np.searchsorted(frame.index.as_unit("s").asi8, columns["time"], "right") - 1
    return {**columns, "features": np.column_stack([columns["features"], frame.to_numpy()[at]])}


LEAKS = [centred_window, scaler_on_all_data, smoothed_posterior, label_among_features, left_labelled_resample]


@pytest.mark.parametrize("plant", LEAKS, ids=lambda plant: plant.__name__)
def test_a_planted_leak_is_found(case, plant):
    clean, bars = clean_pipeline(case, "BTCUSD"), case.later("BTCUSD")[:1_600]
    leaky = lambda candles, now: plant(case, "BTCUSD", clean(candles, now), closed(candles, now))  # noqa: E731
    assert find_lookahead(leaky, bars, random_cuts(bars, 200, seed=2), rows=100)


def test_the_forming_bar_is_found(case):
    leaky, bars = clean_pipeline(case, "BTCUSD", drop_forming=False), case.later("BTCUSD")[:1_600]
    found = find_lookahead(leaky, bars, random_cuts(bars, 200, seed=3), rows=5)
    assert {"unclosed"} <= {leak.kind for leak in found}


def test_our_own_resampling_does_not_leak(case):
    def last_coarse_close(candles, now):
        bars = closed(candles, now)
        coarse = resample(bars, 4 * bars.step)
        known = np.searchsorted(coarse.time + coarse.step, bars.time + bars.step, "right") - 1
        return {"time": bars.time, "close": np.where(known >= 0, coarse.close[known], np.nan)}
    bars = case.later("BTCUSD")[:1_600]
    assert not find_lookahead(last_coarse_close, bars, random_cuts(bars, 50, seed=4))
