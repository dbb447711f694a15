"""The regime filter has finite memory, the search finds the regimes of a known market, and doubts are said aloud."""

import json
import subprocess
import sys
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go.learning.features import FILTER, WINDOW, compute_features, regime_inputs
from delta_go.learning.regime_fit import (
    GRIPS,
    LEAST_STABILITY,
    RegimeQuality,
    doubts,
    fit_labelled,
    fit_regimes,
    fit_rule,
    in_order,
    name_by_agreement,
    name_by_signature,
    split_runs,
    starting_chain,
    stationary_of,
    stays,
    training_runs,
    volatility_ahead,
)
from delta_go.learning.regimes import (
    RegimeModel,
    filter_regimes,
    latest_regime,
    likelihoods,
    model_from_dict,
    model_to_dict,
)
from delta_go.market.simulate import simulate_market


def same_bits(a, b):
    return np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


@pytest.fixture(scope="module")
def market():
    return simulate_market(bars=9_000, seed=40)


@pytest.fixture(scope="module")
def bars(market):
    return market.candles["ETHUSD"]


@pytest.fixture(scope="module")
def fitted(bars):
    return fit_regimes(bars, restarts=4)


@pytest.fixture(scope="module")
def rule(bars):
    return fit_rule(bars, regime_inputs(bars), {})


def random_model(rng, kind):
    transition = rng.dirichlet(np.full(5, 0.3), 5) * 0.999 + 0.0002
    triangle = np.tril(rng.normal(0, 1, (5, 2, 2)))
    triangle[:, [0, 1], [0, 1]] = rng.uniform(0.3, 4, (5, 2))
    cuts = np.array([-0.5, 0.5, 0.7]) if kind == "rule" else np.zeros(3)
    return RegimeModel("ETHUSD", 3600, kind, rng.normal(-5, 1, 2), rng.uniform(0.2, 2, 2), rng.normal(0, 1.5, (5, 2)), triangle,
                       transition / transition.sum(axis=1, keepdims=True), rng.dirichlet(np.ones(5)), cuts)


def step_by_step(model, inputs):
    posterior = model.stationary
    for likelihood in likelihoods(model, inputs).T:
        posterior = (posterior @ model.transition) * likelihood
        posterior = posterior / posterior.sum()
    return posterior


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(["hmm", "rule"]), st.integers(0, 8_000), st.integers(0, 90))
def test_the_filter_is_the_textbooks_and_batch_equals_window(bars, seed, kind, start, more):
    model = random_model(np.random.default_rng(seed), kind)
    part = bars[start:start + WINDOW + more]
    view = filter_regimes(model, part)
    assert len(view) == more + 1 == len(compute_features(part))
    for row in {0, more // 2, more}:
        assert same_bits(filter_regimes(model, part[row:row + WINDOW]).posterior[0], view.posterior[row])
        truth = step_by_step(model, regime_inputs(part)[row:row + FILTER])
        assert np.abs(view.posterior[row] - truth).max() < 1e-12
    assert np.abs(view.posterior.sum(axis=1) - 1).max() < 1e-12
    assert np.array_equal(view.regime, view.posterior.argmax(axis=1)) and np.array_equal(view.confidence, view.posterior.max(axis=1))


@pytest.mark.parametrize("kind", ["fitted", "rule"])
def test_long_series_in_blocks_and_200_cuts(request, bars, kind):
    model = request.getfixturevalue(kind)
    model = model if kind == "rule" else model[0]
    whole = filter_regimes(model, bars)
    for end in np.random.default_rng(0).integers(WINDOW, len(bars) + 1, 200):
        assert same_bits(filter_regimes(model, bars[:end][-WINDOW:]).posterior[0], whole.posterior[end - WINDOW])
    assert same_bits(filter_regimes(model, bars[:5_000]).posterior, whole.posterior[:5_000 - WINDOW + 1])
    assert same_bits(filter_regimes(model, bars[777:]).posterior, whole.posterior[777:])


def test_emissions_are_normal_densities_up_to_a_common_factor(bars):
    from scipy.stats import multivariate_normal
    model = random_model(np.random.default_rng(3), "hmm")
    inputs = regime_inputs(bars[:WINDOW])
    z = (inputs - model.centre) / model.scale
    plain = np.stack([multivariate_normal(mean, np.linalg.inv(triangle @ triangle.T)).pdf(z) for mean, triangle in zip(model.means, model.precision)])
    assert np.allclose(likelihoods(model, inputs), np.maximum(plain / plain.max(axis=0), np.exp(-46)), rtol=1e-8)


def test_absurd_candles_do_not_break_the_filter(bars, fitted, rule):
    wild = replace(bars[:400], high=bars.high[:400] * np.where(np.arange(400) == 250, 1e6, 1), close=bars.close[:400].copy())
    wild.close[300:360] = wild.close[300]
    for model in (fitted[0], rule, random_model(np.random.default_rng(0), "hmm")):
        view = filter_regimes(model, wild)
        assert np.isfinite(view.posterior).all() and np.abs(view.posterior.sum(axis=1) - 1).max() < 1e-12


def test_one_window_is_strict(bars, fitted):
    model = fitted[0]
    assert same_bits(latest_regime(model, bars).posterior[0], filter_regimes(model, bars).posterior[-1])
    holed = replace(bars, time=bars.time + np.where(np.arange(len(bars)) >= len(bars) - 50, 3600, 0))
    cases = {"at least 200 candles, got 199": bars[-199:], "1h candles, got 5m": replace(bars, step=300), "got BTCUSD": replace(bars, symbol="BTCUSD"),
             "only the last 50": holed}
    for message, wrong in cases.items():
        with pytest.raises(InputError, match=message):
            latest_regime(model, wrong)
    long_ago = replace(bars, time=bars.time + np.where(np.arange(len(bars)) >= len(bars) - WINDOW, 3600, 0))
    assert len(latest_regime(model, long_ago)) == 1


def test_models_survive_a_file_and_damage_is_named(bars, fitted, rule):
    for model in (fitted[0], rule):
        plain = json.loads(json.dumps(model_to_dict(model)))
        again = model_from_dict(plain)
        assert model_to_dict(again) == plain and same_bits(filter_regimes(again, bars).posterior, filter_regimes(model, bars).posterior)
    for name in {each.name for each in fields(RegimeModel)}:
        with pytest.raises(InputError, match=name):
            model_from_dict({key: value for key, value in plain.items() if key != name})
    for name, bad in {"kind": "tree", "step": -1, "centre": [1.0], "scale": [0.0, 1.0], "means": [[float("nan")] * 2] * 5, "inputs": ["rsi"],
                      "transition": [[0.3] * 5] * 5, "stationary": [-1.0, 0.5, 0.5, 0.5, 0.5], "precision": [[[-1.0, 0], [0, 1]]] * 5, "window": 100}.items():
        with pytest.raises(InputError, match=name):
            model_from_dict(plain | {name: bad})
    with pytest.raises(InputError, match="unknown"):
        model_from_dict(plain | {"more": 1})


def test_inference_needs_numpy_only():
    heavy = ["scipy", "sklearn", "hmmlearn", "pandas", "matplotlib", "numba", "pyarrow", "joblib"]
    code = f"import sys, delta_go.learning.regimes; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def accuracy(model, candles, truth):
    return np.mean(filter_regimes(model, candles).regime == truth[WINDOW - 1:])


@pytest.mark.parametrize("symbol", ["BTCUSD", "ETHUSD", "SOLUSD"])
def test_the_search_finds_what_labels_would_have_told(market, symbol):
    candles, truth = market.candles[symbol], market.regimes[symbol]
    model, quality = fit_regimes(candles, restarts=4)
    assert model.kind == "hmm" and not quality.reasons
    assert accuracy(model, candles, truth) >= 0.97 * accuracy(fit_labelled(candles, truth), candles, truth)
    assert min(quality.mean_duration) > 10 and quality.name_stability > LEAST_STABILITY


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 108))
def test_the_search_finds_it_in_other_markets_too(seed):
    market = simulate_market(seed=seed)
    for symbol, candles in market.candles.items():
        model, _ = fit_regimes(candles)
        told = fit_labelled(candles, market.regimes[symbol])
        assert accuracy(model, candles, market.regimes[symbol]) >= 0.97 * accuracy(told, candles, market.regimes[symbol]), symbol


def test_the_fit_is_the_same_for_any_jobs_and_reports_itself(bars, fitted):
    model, quality = fitted
    again, same = fit_regimes(bars, restarts=4, jobs=3)
    assert model_to_dict(again) == model_to_dict(model)
    np.testing.assert_equal(asdict(same), asdict(quality))
    assert np.isnan(quality.champion_agreement)
    assert sum(quality.occupancy) == pytest.approx(1) and len(quality.mean_duration) == 5
    assert model.meta["grip"] in GRIPS and model.meta["span"] == [int(bars.time[0]), int(bars.time[-1])]


def test_a_retrain_keeps_the_champions_names_whatever_their_order(bars, fitted):
    model = fitted[0]
    order = np.array([3, 0, 4, 1, 2])
    renamed = replace(model, means=model.means[order], precision=model.precision[order], transition=model.transition[np.ix_(order, order)], stationary=model.stationary[order])
    again, quality = fit_regimes(bars[1_000:], restarts=1, champion=renamed)
    assert quality.champion_agreement > LEAST_STABILITY and np.allclose(again.means, renamed.means, atol=0.4)
    assert same_bits(again.centre, model.centre)
    with pytest.raises(InputError, match="champion"):
        fit_regimes(bars, restarts=1, champion=replace(model, step=900))


def test_no_regimes_no_model_and_the_reasons_are_said(bars):
    rng = np.random.default_rng(3)
    path = 2_000 * np.exp(np.cumsum(rng.normal(0, 0.002, (6_000, 4)).ravel())).reshape(6_000, 4)
    dull = replace(bars[:6_000], open=path[:, 0].copy(), high=path.max(axis=1), low=path.min(axis=1), close=path[:, 3].copy())
    model, quality = fit_regimes(dull, restarts=4)
    assert model.kind == "rule" and model.meta["reasons"] == list(quality.reasons) and "volatility ahead" in " ".join(quality.reasons)
    assert np.isnan(quality.held_out_log_likelihood) and len(filter_regimes(model, dull)) == 6_000 - WINDOW + 1


def test_the_rule_follows_volatility_then_trend(bars, rule):
    inputs = np.array([[2.0, 0], [-2, 0], [0, 3], [0, -3], [0, 0]]) * rule.scale + rule.centre
    assert likelihoods(rule, inputs).argmax(axis=0).tolist() == [3, 4, 0, 1, 2]
    z = (regime_inputs(bars) - rule.centre) / rule.scale
    assert np.mean(z[:, 0] < rule.cuts[0]) == pytest.approx(1 / 3, abs=0.01) and np.mean(z[:, 0] > rule.cuts[1]) == pytest.approx(1 / 3, abs=0.01)


def test_gaps_and_shortage(bars):
    holed = replace(bars, time=bars.time + 3_600 * (np.arange(len(bars)) // 3_000))
    inputs, lengths, rows = training_runs(holed)
    assert lengths == [3_000 - 72] * 3 and same_bits(inputs, regime_inputs(holed)[rows])
    assert fit_regimes(holed, restarts=1)[0].meta["rows"] == sum(lengths)
    assert split_runs([4, 3, 5], 6) == ([4, 2], [1, 5]) and split_runs([4, 3], 4) == ([4], [3])
    for wrong in (bars[:1_199], replace(bars, time=bars.time + 3_600 * (np.arange(len(bars)) // 100))):
        with pytest.raises(InputError, match="load more history"):
            training_runs(wrong)
    with pytest.raises(InputError, match="restarts"):
        fit_regimes(bars, restarts=0)


def test_small_parts():
    chain = starting_chain(7)
    order = np.array([4, 2, 0, 1, 3])
    shuffled = in_order(chain, order)
    assert np.array_equal(in_order(shuffled, name_by_signature(shuffled)).means, in_order(chain, name_by_signature(chain)).means)
    path = np.random.default_rng(0).integers(0, 5, 400)
    assert np.array_equal(order[path], np.argsort(name_by_agreement(path, order[path]))[path])
    share = stationary_of(chain.transition)
    assert np.allclose(share @ chain.transition, share) and share.sum() == pytest.approx(1)
    regime, length = stays(np.array([1, 1, 2, 2, 2, 0]), np.array([True, True, True, False, True, True]))
    assert regime.tolist() == [1, 2, 2, 0] and length.tolist() == [2, 1, 1, 1]


def test_volatility_ahead_looks_ahead_and_stops_at_gaps(bars):
    ahead = volatility_ahead(bars[:500])
    returns = np.diff(np.log(bars.close[:500]))
    assert ahead[100] == pytest.approx(np.sqrt(np.mean(returns[100:124] ** 2))) and np.isnan(ahead[-24:]).all()
    holed = replace(bars[:500], time=bars.time[:500] + np.where(np.arange(500) >= 300, 3_600, 0))
    assert np.flatnonzero(np.isnan(volatility_ahead(holed)[:-24])).tolist() == list(range(276, 300))


def test_doubts_name_the_regime_and_the_number():
    fine = RegimeQuality((0.2,) * 5, (30.0,) * 5, (0.01,) * 5, 1e-6, 1e-3, 0.97, float("nan"), -1.0)
    assert doubts(fine) == ()
    words = " ".join(doubts(replace(fine, occupancy=(0.01, 0.3, 0.3, 0.3, 0.09), mean_duration=(30.0, 4.5, 30.0, float("nan"), 30.0), volatility_p_value=float("nan"), name_stability=0.5)))
    assert all(part in words for part in ("bull holds 1.0%", "bear lasts 4.5 bars", "p = nan", "50.0%")) and "high_volatility holds" not in words
