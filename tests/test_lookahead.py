"""Planted leaks are caught, clean pipelines are not flagged."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go.evidence.lookahead import as_known, find_lookahead, forming_bar, random_cuts
from delta_go.market.candles import Candles, closed

HOUR, WINDOW = 3_600, 24


def market(bars=700, seed=0, holes=()):
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, bars)))
    open_ = np.concatenate([[100.0], close[:-1]])
    spread = 1 + np.abs(rng.normal(0, 0.004, bars))
    keep = np.setdiff1d(np.arange(bars), holes)
    high, low = np.maximum(open_, close) * spread, np.minimum(open_, close) / spread
    return Candles("BTCUSD", HOUR, np.arange(bars) * HOUR, open_, high, low, close, rng.gamma(2, 10, bars))[keep]


def rolling(values, length=WINDOW):
    return np.lib.stride_tricks.sliding_window_view(np.concatenate([np.full(length - 1, np.nan), values]), length)


def likelihood(candles):
    return np.exp(-0.5 * (np.log(candles.close / candles.open)[:, None] / np.array([0.006, 0.014])) ** 2)


STAY = np.array([[0.95, 0.05], [0.05, 0.95]])


def filter_wild(candles, memory=16):
    padded, state = np.concatenate([np.full((memory - 1, 2), np.nan), likelihood(candles)]), np.full((len(candles), 2), 0.5)
    for lag in range(memory):
        state = (state @ STAY if lag else state) * padded[lag : lag + len(candles)]
        state /= state.sum(axis=1, keepdims=True)
    return state


def clean(candles, now):
    candles = closed(candles, now)
    score = (candles.close - rolling(candles.close).mean(axis=1)) / rolling(candles.close).std(axis=1)
    wild = filter_wild(candles)
    words = np.where(score > 1, "buy", np.where(score < -1, "sell", "hold"))
    return {"time": candles.time, "score": score, "posterior": wild, "decision": words}


def drops_its_warm_up(candles, now):
    rows = clean(candles, now)
    return {name: values[WINDOW - 1 :] for name, values in rows.items()}


def centred_window(candles, now):
    close = closed(candles, now).close
    return clean(candles, now) | {"score": np.convolve(close, np.ones(5) / 5, mode="same")}


def scaler_on_all_data(candles, now):
    close = closed(candles, now).close
    return clean(candles, now) | {"score": (close - close.mean()) / close.std()}


def smoothed_posterior(candles, now):
    candles = closed(candles, now)
    weights, backward = likelihood(candles), np.ones((len(candles), 2))
    for row in range(len(candles) - 2, -1, -1):
        backward[row] = STAY @ (weights[row + 1] * backward[row + 1])
        backward[row] /= backward[row].sum()
    both = filter_wild(candles) * backward
    return clean(candles, now) | {"posterior": both / both.sum(axis=1, keepdims=True)}


def label_among_the_features(candles, now):
    close = closed(candles, now).close
    return clean(candles, now) | {"score": np.concatenate([close[6:] / close[:-6], np.full(6, np.nan)])}


def left_labelled_resample(candles, now):
    candles = closed(candles, now)
    bucket = candles.time // (4 * HOUR)
    return clean(candles, now) | {"score": candles.close[np.searchsorted(bucket, bucket, side="right") - 1]}


def forming_bar_kept(candles, now):
    return clean(candles, now + candles.step)


def rows_without_a_label_dropped(candles, now):
    rows = clean(candles, now)
    return {name: values[:-6] for name, values in rows.items()}


def next_open_then_dropped(candles, now):
    kept = len(closed(candles, now))
    return clean(candles, now) | {"score": np.append(candles.open[1:], np.nan)[:kept]}


def text_that_peeks(candles, now):
    close = closed(candles, now).close
    return clean(candles, now) | {"decision": np.where(np.append(close[1:], close[-1]) > close, "buy", "sell")}


def selection_on_all_data(candles, now):
    "The better of two windows, chosen with hindsight."
    close = closed(candles, now).close
    move = np.append(0.0, np.diff(close))
    best = max((12, 24), key=lambda length: float(np.nansum(np.sign(rolling(close, length).mean(axis=1) - close)[:-1] * move[1:])))
    return clean(candles, now) | {"score": close * 0 + best + move.sum()}


LEAKS = [centred_window, scaler_on_all_data, smoothed_posterior, label_among_the_features, left_labelled_resample, forming_bar_kept,
         rows_without_a_label_dropped, next_open_then_dropped, text_that_peeks, selection_on_all_data]


@pytest.mark.parametrize("history", [None, 60])
@pytest.mark.parametrize("pipeline", LEAKS, ids=lambda pipeline: pipeline.__name__)
def test_planted_leaks_are_caught(pipeline, history):
    candles = market()
    assert find_lookahead(pipeline, candles, random_cuts(candles, 25), history)


@pytest.mark.parametrize("pipeline", [clean, drops_its_warm_up], ids=lambda pipeline: pipeline.__name__)
@pytest.mark.parametrize("holes", [(), (300, 301, 450)])
def test_clean_pipelines_raise_no_flag(pipeline, holes):
    candles = market(holes=holes)
    cuts = [*random_cuts(candles, 200, 60), 298, 299, 300, len(candles) - 1]
    assert find_lookahead(pipeline, candles, cuts) == []
    assert find_lookahead(pipeline, candles, cuts, history=60) == []
    assert find_lookahead(pipeline, candles, cuts, history=60, rows=5) == []


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(0, 1_000), st.sampled_from([None, 60]))
def test_any_peek_ahead_is_caught_where_it_starts(ahead, seed, history):
    candles = market(400, seed)

    def peek(known, now):
        close = closed(known, now).close
        return {"time": closed(known, now).time, "value": np.append(close, np.zeros(ahead))[ahead : ahead + len(close)]}

    leaks = find_lookahead(peek, candles, random_cuts(candles[:350], 5, 100, seed), history)
    assert len(leaks) == 5
    for leak in leaks:
        assert leak.column == "value" and leak.kind == "changed"
        assert leak.bar == (leak.cut if history else leak.cut - (ahead - 1) * HOUR)
        assert leak.rows == (1 if history else ahead)


def test_a_difference_in_the_last_bit_is_a_leak():
    candles = market(300)

    def nudge(known, now):
        close = closed(known, now).close
        return {"time": closed(known, now).time, "value": np.nextafter(close, np.inf) if len(close) < 300 else close}

    assert len(find_lookahead(nudge, candles, [250])) == 1


def test_the_kinds_of_leaks():
    candles = market(300)
    kinds = {pipeline.__name__: {leak.kind for leak in find_lookahead(pipeline, candles, [250, 260, 270])}
             for pipeline in (forming_bar_kept, rows_without_a_label_dropped, scaler_on_all_data)}
    assert kinds == {"forming_bar_kept": {"unclosed"}, "rows_without_a_label_dropped": {"missing"}, "scaler_on_all_data": {"changed"}}
    leak = find_lookahead(scaler_on_all_data, candles, [250])[0]
    assert leak.rows == 251 and leak.words.startswith("score: changed at bar 0, seen from bar 900000")


def test_an_extra_row_in_the_past_is_a_leak():
    def sparse(known, now):
        bars = closed(known, now)
        rows = np.flatnonzero(bars.close > np.median(bars.close))
        return {"time": bars.time[rows]}

    candles = market(300, 4)
    assert {leak.kind for leak in find_lookahead(sparse, candles, range(150, 250))} >= {"extra"}


@settings(max_examples=40)
@given(st.integers(0, 298), st.integers(1, 50), st.floats(0.01, 0.99))
def test_what_was_known_is_what_an_exchange_serves(cut, history, share):
    candles = market(300)
    known, now = as_known(candles, cut, history, share)
    assert np.array_equal(closed(known, now).close, candles.close[max(0, cut + 1 - history) : cut + 1])
    last = known[-1:]
    assert last.time[0] <= now < last.time[0] + HOUR and last.open[0] == candles.open[cut + 1]
    assert last.low <= min(last.open, last.close) and last.high >= max(last.open, last.close)
    assert last.high <= candles.high[cut + 1] and last.low >= candles.low[cut + 1] and last.volume < candles.volume[cut + 1]


def test_there_is_no_forming_bar_at_the_close_in_a_hole_or_at_the_end():
    candles = market(300, holes=(200,))
    for cut, share in ((100, 0.0), (199, 0.5), (len(candles) - 1, 0.5)):
        known, now = as_known(candles, cut, share=share)
        assert len(known) == cut + 1 and now == candles.time[cut] + HOUR
    assert forming_bar(candles[5:6], 1.0).close == candles.close[5]


def test_random_cuts_are_seeded_and_inside():
    candles = market(300)
    cuts = random_cuts(candles, 50, 100, 3)
    assert np.array_equal(cuts, random_cuts(candles, 50, 100, 3)) and len(set(cuts)) == 50
    assert cuts.min() >= 100 and cuts.max() <= 298 and len(random_cuts(candles, 500, 100)) == 199


@pytest.mark.parametrize("pipeline, cuts, words", [
    (lambda candles, now: {"score": candles.close}, [250], "`time` array"),
    (lambda candles, now: {"time": candles.time, "score": candles.close[1:]}, [250], "one value a bar, but score has"),
    (lambda candles, now: {"time": candles.time} | ({"odd": candles.time} if len(candles) % 2 else {}), [250], "odd came and went"),
    (clean, [300], "rows from 0 to 299"),
    (clean, [-1], "rows from 0 to 299"),
    (clean, [], "use random_cuts"),
])
def test_wrong_input_is_told(pipeline, cuts, words):
    with pytest.raises(InputError, match=words):
        find_lookahead(pipeline, market(300), cuts, shares=(0.0,))
