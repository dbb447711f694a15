"""Features have finite memory: a batch and a window give the same bits, and both agree with a plain reading."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from delta_go.domain import InputError
from delta_go.learning.features import (
    CLIP,
    CLIPPED_STD,
    FEATURES,
    FILTER,
    REGIME_INPUTS,
    WINDOW,
    compute_features,
    fold,
    regime_inputs,
    rolling_ema,
    rolling_max,
    rolling_mean,
    rolling_min,
    rolling_moments,
    rolling_run,
    rolling_std,
    rolling_sum,
    root_mean_square,
    trend_statistic,
)
from delta_go.market.candles import Candles

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False, width=64)
SERIES = st.integers(1, 90).flatmap(lambda n: arrays(np.float64, n, elements=NUMBERS))


def market(bars, seed=0, step=3600, flat=(), silent=()):
    rng = np.random.default_rng(seed)
    path = 30_000 * np.exp(np.cumsum(rng.standard_t(4, (bars, 4)).ravel() * 0.002)).reshape(bars, 4)
    if flat:
        path[slice(*flat)] = path[flat[0], 0]
    wick = 1 + np.abs(rng.normal(0, 0.001, (2, bars))) * (~np.isin(np.arange(bars), np.arange(*flat)) if flat else 1)
    volume = rng.lognormal(3, 1, bars)
    if silent:
        volume[slice(*silent)] = 0
    return Candles("BTCUSD", step, step * np.arange(bars), path[:, 0].copy(), path.max(axis=1) * wick[0], path.min(axis=1) / wick[1], path[:, 3].copy(), volume)


def same_bits(a, b):
    return np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


@given(SERIES, st.integers(1, 90))
def test_rolling_agrees_with_each_window_alone(x, n):
    if n > len(x):
        with pytest.raises(InputError, match=f"at least {n} values, got {len(x)}"):
            rolling_sum(x, n)
        return
    windows = np.lib.stride_tricks.sliding_window_view(x, n)
    scale = np.abs(x).max() + 1
    assert np.allclose(rolling_sum(x, n), windows.sum(axis=1), atol=1e-12 * n * scale, rtol=0)
    assert np.allclose(rolling_mean(x, n), windows.mean(axis=1), atol=1e-12 * scale, rtol=0)
    assert np.array_equal(rolling_max(x, n), windows.max(axis=1)) and np.array_equal(rolling_min(x, n), windows.min(axis=1))
    mean, std = rolling_moments(x, n)
    assert np.allclose(mean, windows.mean(axis=1), atol=1e-12 * scale, rtol=0)
    assert np.allclose(std, windows.std(axis=1), atol=1e-7 * scale, rtol=0)


@given(SERIES, st.integers(1, 90), st.integers(0, 90))
def test_rolling_forgets_what_is_outside_the_window(x, n, start):
    if start + n > len(x):
        return
    for rolling in (rolling_sum, rolling_mean, rolling_max, rolling_min, rolling_std):
        assert same_bits(rolling(x[start:start + n], n)[0], rolling(x, n)[start])
    assert same_bits(rolling_ema(x[start:start + n], 12, n)[0], rolling_ema(x, 12, n)[start])


def test_fold_keeps_order_and_counts():
    letters = np.array(list("abcdefghijk"), dtype=object)
    for n in range(1, 12):
        assert fold(letters, n, lambda old, new, *_: old + new).tolist() == ["abcdefghijk"[i:i + n] for i in range(12 - n)]
        counted = fold(np.ones(11), n, lambda old, new, n_old, n_new: np.where((old == n_old) & (new == n_new), old + new, np.nan))
        assert (counted == n).all()


def test_a_flat_price_has_no_spread_and_a_high_one_no_cancellation():
    assert (rolling_std(np.full(80, 61_234.56789), 48) == 0).all()
    x = 1e9 + np.tile([0.0, 1e-3], 40)
    assert np.allclose(rolling_std(x, 20), 5e-4, rtol=1e-3)


@given(arrays(np.int64, st.integers(8, 60), elements=st.integers(-1, 1)))
def test_runs(sign):
    def plain(t):
        length = 1
        while length < 8 and sign[t - length] == sign[t]:
            length += 1
        return sign[t] * length
    assert rolling_run(sign).tolist() == [plain(t) for t in range(7, len(sign))]


@pytest.fixture(scope="module")
def bars():
    return market(900, flat=(300, 390), silent=(500, 540))


@pytest.fixture(scope="module")
def features(bars):
    return compute_features(bars)


def test_every_row_equals_its_own_window(bars, features):
    assert features.values.shape == (701, len(FEATURES)) and len(features) == 701
    for t in range(len(features)):
        alone = compute_features(bars[t:t + WINDOW])
        assert same_bits(alone.values[0], features.values[t]), t
        assert alone.close[0] == features.close[t] and alone.time[0] == features.time[t]


@settings(max_examples=40)
@given(st.integers(0, 300), st.integers(WINDOW, 500), st.integers(0, 7))
def test_slices_at_odd_offsets_give_the_same_bits(bars, features, start, length, shift):
    "Memory that starts anywhere: copies of the columns at every alignment, and strided ones."
    part = bars[start:start + length]
    moved = Candles(part.symbol, part.step, *(np.concatenate([column[:1].repeat(shift), column])[shift:] for column in
                                              (part.time, part.open, part.high, part.low, part.close, part.volume)))
    assert same_bits(compute_features(moved).values, features.values[start:start + length - WINDOW + 1])
    strided = Candles(part.symbol, part.step, *np.stack([part.time, part.open, part.high, part.low, part.close, part.volume], axis=1).T)
    assert same_bits(compute_features(strided).values, features.values[start:start + length - WINDOW + 1])
    assert same_bits(regime_inputs(strided), regime_inputs(bars)[start:start + length - WINDOW + FILTER])


def test_regime_inputs_see_73_candles_and_are_finite(bars):
    inputs = regime_inputs(bars)
    assert inputs.shape == (len(bars) - 72, len(REGIME_INPUTS)) and np.isfinite(inputs).all()
    changed = market(900, seed=1)
    mixed = Candles("BTCUSD", 3600, bars.time, *(np.concatenate([getattr(changed, name)[:400], getattr(bars, name)[400:]])
                                                 for name in ("open", "high", "low", "close", "volume")))
    assert same_bits(regime_inputs(mixed)[400:], inputs[400:])
    assert not same_bits(regime_inputs(mixed)[399 - 72 + 48], inputs[399 - 72 + 48])
    for t in range(0, 701, 11):
        assert same_bits(regime_inputs(bars[t:t + WINDOW]), inputs[t:t + FILTER])


def plain_features(c):
    "The last row, written the way a textbook would."
    close, high, low, move = c.close, c.high, c.low, np.diff(c.close)
    returns = np.diff(np.log(close))
    before = np.maximum(high[1:], close[:-1]) - np.minimum(low[1:], close[:-1])
    atr, volatility = before[-14:].mean(), np.sqrt((returns[-48:] ** 2).mean())
    local = np.array([np.sqrt((returns[t - 15:t + 1] ** 2).mean()) for t in range(len(returns) - 48, len(returns))])
    side, run = np.sign(c.close - c.open), 1
    while run < 8 and side[-1 - run] == side[-1]:
        run += 1

    def ema(span, length):
        weights = (1 - 2 / (span + 1)) ** np.arange(length)[::-1]
        return (weights * close[-length:]).sum() / weights.sum()
    top, bottom = high[-48:].max(), low[-48:].min()
    return {
        "rsi": 100 * move[-14:].clip(0).sum() / np.abs(move[-14:]).sum(),
        "bb_position": (close[-1] - close[-20:].mean()) / (4 * close[-20:].std()) + 0.5, "atr": atr, "atr_pct": atr / close[-1],
        "volume_ratio": c.volume[-1] / c.volume[-20:].mean(), "consecutive_candles": run * side[-1],
        "momentum_12": np.log(close[-1] / close[-13]) / volatility / 12**0.5, "momentum_48": np.log(close[-1] / close[-49]) / volatility / 48**0.5,
        "volatility": volatility, "volatility_ratio": np.sqrt((returns[-16:] ** 2).mean()) / volatility,
        "trend": (returns[-48:] / local).clip(-CLIP, CLIP).sum() / CLIPPED_STD / 48**0.5, "range_position": (close[-1] - bottom) / (top - bottom),
        "breakout_high": (close[-1] - high[-25:-1].max()) / atr, "breakout_low": (close[-1] - low[-25:-1].min()) / atr,
        "ema_gap": (ema(12, 64) - ema(48, 128)) / atr, "pullback": (close[-1] - ema(12, 64)) / atr,
        "returns": returns[-1], "hour": c.time[-1] % 86_400 // 3600}


@pytest.mark.parametrize("step", [300, 1800, 3600])
def test_features_mean_what_they_say(step):
    candles = market(400, seed=5, step=step)
    features = compute_features(candles)
    for row in (0, 57, 200):
        plain = plain_features(candles[row:row + WINDOW])
        assert set(plain) == set(FEATURES)
        for name in FEATURES:
            assert features.column(name)[row] == pytest.approx(plain[name], rel=1e-9, abs=1e-9), name


def test_nothing_is_infinite_and_nan_stands_for_a_missing_ratio(bars, features):
    assert not np.isinf(features.values).any()
    assert (features.column("volatility") >= 0).all() and np.isfinite(features.column("trend")).all()
    whole = ~np.isnan(features.column("rsi"))
    assert ((features.column("rsi")[whole] >= 0) & (features.column("rsi")[whole] <= 100)).all()
    flat = 389 - (WINDOW - 1)
    for name in ("rsi", "bb_position", "momentum_12", "volatility_ratio", "range_position", "breakout_high", "pullback"):
        assert np.isnan(features.column(name)[flat]), name
    assert features.column("trend")[flat] == 0 and features.column("atr")[flat] == 0
    assert np.isnan(features.column("volume_ratio")[539 - WINDOW + 1])


def test_scale_of_price_and_volume_does_not_matter(bars, features):
    scaled = Candles("SOLUSD", 3600, bars.time, *(getattr(bars, name) / 1024 for name in ("open", "high", "low", "close")), bars.volume * 3)
    other = compute_features(scaled)
    for name in FEATURES:
        factor = 1024 if name == "atr" else 1
        assert np.allclose(other.column(name) * factor, features.column(name), rtol=1e-9, atol=1e-9, equal_nan=True), name


def test_gaps_are_marked_and_short_input_is_refused():
    candles = market(700)
    time = candles.time + np.where(np.arange(700) >= 450, 3600, 0)
    holed = compute_features(Candles("BTCUSD", 3600, time, candles.open, candles.high, candles.low, candles.close, candles.volume))
    assert holed.usable[:450 - WINDOW + 1].all() and not holed.usable[450 - WINDOW + 1:450].any() and holed.usable[450:].all()
    for run in (compute_features, regime_inputs):
        with pytest.raises(InputError, match="expected at least 200 candles, got 199"):
            run(candles[:199])


def test_trend_is_standard_without_a_drift():
    returns = np.random.default_rng(0).normal(0, 0.01, 200_000)
    many = trend_statistic(returns[15:], root_mean_square(returns, 16))
    assert many.std() == pytest.approx(1, abs=0.03) and many.mean() == pytest.approx(0, abs=0.05)
