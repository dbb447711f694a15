"""Signals: right sides, right regimes, once per setup, one row as good as many."""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import BEAR, BULL, HIGH_VOLATILITY, LOW_VOLATILITY, RANGING, InputError, Signal
from delta_go.learning.features import FEATURES, Features, compute_features
from delta_go.learning.regimes import RegimeView
from delta_go.learning.strategies import REASONS, RULES, Signals, StrategySettings, check_settings, propose, signal_at
from delta_go.market.candles import Candles


def view(posterior):
    return RegimeView(posterior, posterior.argmax(axis=1).astype(np.int8), posterior.max(axis=1))


def walk(seed, size=900, volatility=0.006):
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.standard_t(4, size) * volatility))
    open_ = np.append(100.0, close[:-1])
    reach = close * np.abs(rng.normal(0, volatility / 2, size))
    return Candles("SOLUSD", 3600, np.arange(size) * 3600, open_, np.maximum(open_, close) + reach, np.minimum(open_, close) - reach,
                   close, rng.lognormal(0, 0.7, size))


def beliefs(seed, rows, spell=30):
    return np.random.default_rng(seed).dirichlet(np.full(5, 0.4), rows // spell + 1).repeat(spell, axis=0)[:rows]


@pytest.fixture(scope="module")
def many():
    parts = []
    for seed in range(6):
        features = compute_features(walk(seed))
        regimes = view(beliefs(seed, len(features)))
        parts.append((features, regimes, propose(features, regimes, StrategySettings(scalp=True))))
    return parts


def test_brackets_stand_on_their_sides_and_are_worth_their_costs(many):
    for features, _, signals in many:
        some = signals.side != 0
        assert some.any()
        side, close = signals.side[some], features.close[some]
        assert (side * (close - signals.stop[some]) > 0).all() and (side * (signals.target[some] - close) > 0).all()
        assert (np.abs(signals.target[some] - close) / close >= 0.0066 - 1e-12).all()
        assert (signals.max_bars[some] > 0).all() and (signals.reason[some] > 0).all()
        assert np.isnan(signals.stop[~some]).all() and np.isnan(signals.target[~some]).all()
        assert not signals.max_bars[~some].any() and not signals.reason[~some].any() and not signals.confidence[~some].any()


def test_every_reason_belongs_to_its_regime_and_side(many):
    seen = set()
    for _, regimes, signals in many:
        for place, (regime, side, _, _) in enumerate(RULES, 1):
            rows = signals.reason == place
            assert (regimes.regime[rows] == regime).all() and (signals.side[rows] == side).all()
            assert (signals.confidence[rows] == regimes.confidence[rows]).all() and (signals.confidence[rows] >= 0.5).all()
            seen |= {place} if rows.any() else set()
    assert len(seen) >= 7 and len(REASONS) == len(RULES) + 1


def test_a_setup_does_not_fire_twice_running(many):
    for _, _, signals in many:
        same = (signals.side[1:] != 0) & (signals.side[1:] == signals.side[:-1])
        rows = np.flatnonzero(same)
        assert set(signals.reason[rows + 1]) <= {5, 6}
        assert not (same[1:] & same[:-1]).any()


@given(st.integers(0, 10**6), st.integers(0, 150))
@settings(max_examples=15)
def test_one_window_gives_the_bits_of_the_batch(seed, back):
    candles = walk(seed, 400)
    features = compute_features(candles)
    belief = beliefs(seed, len(features))
    whole = propose(features, view(belief))
    end = len(candles) - back
    alone = propose(compute_features(candles[end - 200:end]), view(belief[end - 200:end - 199]))
    for name in Signals.__slots__:
        np.testing.assert_array_equal(getattr(alone, name)[0], getattr(whole, name)[end - 200])


@given(st.integers(0, 10**6), st.sampled_from(FEATURES))
@settings(max_examples=30)
def test_a_missing_feature_never_adds_a_signal(seed, name):
    features = compute_features(walk(seed, 400))
    regimes = view(beliefs(seed, len(features)))
    before = propose(features, regimes)
    values = features.values.copy()
    values[:, FEATURES.index(name)] = np.nan
    after = propose(replace(features, values=values), regimes)
    assert (before.side[after.side != 0] == after.side[after.side != 0]).all()
    if name in ("atr", "consecutive_candles"):
        assert not after.side.any()


def test_unusable_or_unsure_rows_propose_nothing():
    features = compute_features(walk(3))
    belief = beliefs(3, len(features))
    assert not propose(replace(features, usable=np.zeros(len(features), bool)), view(belief)).side.any()
    assert not propose(features, view(belief), StrategySettings(min_confidence=1.0)).side.any()


CALM = dict(rsi=50.0, bb_position=0.5, atr=1.0, atr_pct=0.01, volume_ratio=1.0, consecutive_candles=1.0, momentum_12=0.0, momentum_48=0.0,
            volatility=0.008, volatility_ratio=1.0, trend=0.0, range_position=0.5, breakout_high=-2.0, breakout_low=2.0, ema_gap=0.0,
            pullback=0.0, returns=0.0, hour=12.0)


def one(regime, options=None, **case):
    values = np.array([[{**CALM, **case}[name] for name in FEATURES]])
    features = Features(FEATURES, values, np.array([100.0]), np.array([0]), np.array([True]))
    belief = np.full((1, 5), 0.05)
    belief[0, regime] = 0.8
    return propose(features, view(belief), options or StrategySettings())


@pytest.mark.parametrize("regime, side, case", [
    (BULL, 1, dict(trend=2)), (BULL, 0, dict(trend=-2)), (BULL, 0, dict(trend=2, pullback=2)), (BULL, 0, dict(trend=2, rsi=80)),
    (BEAR, -1, dict(trend=-2, consecutive_candles=-1)), (BEAR, 0, dict(trend=-2)), (BEAR, 0, dict(trend=-2, consecutive_candles=-1, rsi=20)),
    (RANGING, 1, dict(range_position=0.1, rsi=35)), (RANGING, -1, dict(range_position=0.9, rsi=65, consecutive_candles=-1)),
    (RANGING, 0, dict(range_position=0.5)), (HIGH_VOLATILITY, 1, dict(breakout_high=0.5, volume_ratio=2)),
    (HIGH_VOLATILITY, -1, dict(breakout_low=-0.5, volume_ratio=2, consecutive_candles=-2)),
    (HIGH_VOLATILITY, 0, dict(breakout_high=0.5, volume_ratio=2, consecutive_candles=3)),
    (HIGH_VOLATILITY, 0, dict(breakout_high=1.5, volume_ratio=2)), (HIGH_VOLATILITY, 0, dict(breakout_high=0.5)),
    (LOW_VOLATILITY, 0, dict(range_position=0.1, rsi=35)), (LOW_VOLATILITY, 0, dict(trend=2))])
def test_cases_by_hand(regime, side, case):
    assert one(regime, **case).side[0] == side


def test_brackets_by_hand():
    signals = one(BULL, trend=2)
    assert (signals.stop[0], signals.target[0], signals.max_bars[0]) == (98.0, 104.0, 48)
    assert signal_at(signals, np.array([100.0]), 0) == Signal(1, 100.0, 98.0, 104.0, 0.8, "pullback in an uptrend")
    assert signal_at(one(BULL), np.array([100.0]), -1) is None
    assert one(LOW_VOLATILITY, StrategySettings(scalp=True), range_position=0.1, rsi=35).max_bars[0] == 12
    assert one(BULL, trend=2, atr=0.1).side[0] == 0          # target 40 basis points away
    assert one(BEAR, trend=-2, consecutive_candles=-1, atr=30.0).side[0] == 0   # target below zero


@pytest.mark.parametrize("field, value", [("edge_stop", 0), ("trend_reward", -1), ("trend_rsi", 101), ("min_confidence", 1.5), ("edge_share", 0.5),
                                          ("breakout_bars", float("nan"))])
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(InputError, match=field):
        check_settings(replace(StrategySettings(), **{field: value}))


def test_rows_must_match():
    features = compute_features(walk(0, 300))
    with pytest.raises(InputError, match="one row per row"):
        propose(features, view(beliefs(0, 5)))
