"""The simulated market keeps its promises: fair without an edge, as large as stated with one, and always the same."""
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from delta_go.domain import BEAR, BULL, RANGING, REGIMES, SYMBOLS, InputError
from delta_go.market.candles import COLUMNS, check_candles
from delta_go.market.simulate import COINS, HOLD, Edge, MarketLaw, read_regimes, simulate_market, write_market
from delta_go.market.store import available, check_funding, health_table, read_candles, read_funding
from delta_go.market.venue import PRODUCTS

YEAR = 8760


@pytest.fixture(scope="module")
def market():
    return simulate_market()


@pytest.fixture(scope="module")
def nulls():
    return [simulate_market(bars=YEAR, seed=seed) for seed in range(50, 66)]


def as_bytes(candles):
    return b"".join(getattr(candles, name).tobytes() for name in COLUMNS)


def rates_due(candles, funding):
    "The rate paid at each bar's open, 0 where none is."
    due = np.zeros(len(candles))
    rows = np.isin(candles.time, funding.time)
    due[rows] = funding.rate[np.searchsorted(funding.time, candles.time[rows])]
    return due


def long_gains(market, symbol):
    "What a long earns over each bar after the first, funding paid, in its regime's volatility."
    candles = market.candles[symbol]
    paid = (rates_due(candles, market.funding[symbol]) * candles.open)[1:]
    level = np.array(market.law.levels)[market.regimes[symbol][1:]] * COINS[symbol].volatility
    return (np.diff(candles.close) - paid) / candles.close[:-1] / level


# ---- shape of the data

@settings(max_examples=25)
@given(bars=st.integers(1, 700), step=st.sampled_from((300, 900, 1800, 3600, 14_400)), seed=st.integers(0, 2**63), offset=st.integers(0, 50))
def test_any_market_has_good_bars_on_the_grid(bars, step, seed, offset):
    market = simulate_market(bars=bars, step=step, start=1_672_531_200 + offset * step, seed=seed)
    for symbol in SYMBOLS:
        candles, funding = market.candles[symbol], check_funding(market.funding[symbol])
        assert len(check_candles(candles)) == bars == len(market.regimes[symbol]) == len(market.spikes[symbol])
        assert set(market.regimes[symbol].tolist()) <= set(range(5)) and market.regimes[symbol].dtype == np.int8
        for prices in (candles.open, candles.high, candles.low, candles.close):
            assert np.array_equal(np.rint(prices * COINS[symbol].ticks) / COINS[symbol].ticks, prices)
        assert (candles.volume >= 1).all() and np.array_equal(np.rint(candles.volume), candles.volume)
        assert (funding.time % 28_800 == 0).all() and (np.diff(funding.time) == 28_800).all()
        assert funding.time[0] <= candles.time[0] and candles.time[-1] - funding.time[-1] < 28_800


def test_ticks_are_the_venues():
    assert {symbol: 1 / coin.ticks for symbol, coin in COINS.items()} == {symbol: product.tick_size for symbol, product in PRODUCTS.items()}


def test_same_arguments_same_bytes(market):
    again = simulate_market()
    for symbol in SYMBOLS:
        assert as_bytes(market.candles[symbol]) == as_bytes(again.candles[symbol])
        assert market.funding[symbol].rate.tobytes() == again.funding[symbol].rate.tobytes()
        assert market.regimes[symbol].tobytes() == again.regimes[symbol].tobytes()
        assert as_bytes(market.candles[symbol]) != as_bytes(simulate_market((symbol,), seed=1).candles[symbol])


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_a_symbol_does_not_depend_on_its_neighbours(market, symbol):
    assert as_bytes(simulate_market((symbol,)).candles[symbol]) == as_bytes(market.candles[symbol])


@pytest.mark.parametrize(("wrong", "words"), [
    ({"symbols": ("BTC",)}, "symbols: expected some of BTCUSD"),
    ({"symbols": ()}, "got none"),
    ({"symbols": ("BTCUSD", "BTCUSD")}, "each once"),
    ({"step": 86_400}, "use 14400"),
    ({"step": 7}, "step: expected one of"),
    ({"bars": 0}, "bars of 1 or more"),
    ({"start": 1_672_531_201}, "start on the grid"),
    ({"seed": -1}, "seed of 0 or more"),
])
def test_a_wrong_request_is_one_clear_line(wrong, words):
    with pytest.raises(InputError, match=words) as caught:
        simulate_market(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "size"), [("none", 10), ("momentum", 10), ("drift", 0), ("drift", -5), ("drift", float("nan")), ("feature", 1e9)])
def test_a_wrong_edge_is_refused(kind, size):
    with pytest.raises(InputError, match="expected"):
        Edge(kind, size)


# ---- regimes

def test_spells_last_and_all_regimes_are_visited(nulls):
    for market in nulls[:6]:
        for regimes in market.regimes.values():
            changes = np.flatnonzero(np.diff(regimes))
            assert np.diff(changes).min() >= market.law.shortest_spell
    shares = np.mean([np.bincount(regimes, minlength=5) / YEAR for market in nulls for regimes in market.regimes.values()], axis=0)
    assert (shares > .1).all() and (shares < .3).all()


def test_the_default_market_visits_every_regime(market):
    for regimes in market.regimes.values():
        shares = np.bincount(regimes, minlength=5) / len(regimes)
        assert (shares > .08).all() and (shares < .35).all()


def test_regimes_differ_as_their_names_say(market):
    for symbol in SYMBOLS:
        returns, regimes = np.diff(np.log(market.candles[symbol].close)), market.regimes[symbol][1:]
        volatility = np.array([returns[regimes == index].std() for index in range(5)])
        assert [REGIMES[index] for index in np.argsort(volatility)] == ["low_volatility", "ranging", "bull", "bear", "high_volatility"]
        lean = [np.sign(returns[regimes == index]).mean() for index in (BULL, BEAR, RANGING)]
        assert lean[0] > .25 and lean[1] < -.25 and abs(lean[2]) < .08


def test_regimes_can_be_told_apart_by_two_numbers_of_the_past(nulls):
    "Log volatility and the share of rising bars, 48 bars each; the nearest of five normal clouds."
    hits = []
    for market in nulls[:4]:
        for symbol in SYMBOLS:
            returns = np.diff(np.log(market.candles[symbol].close))
            seen = np.stack([np.convolve(column, np.ones(48) / 48, "valid") for column in (returns**2, np.sign(returns))])
            seen[0], truth = np.log(seen[0]) / 2, market.regimes[symbol][48:]
            scores = np.full((5, len(truth)), -np.inf)
            for index in set(truth.tolist()):
                cloud = seen[:, truth == index]
                away = seen - cloud.mean(1, keepdims=True)
                scores[index] = -np.einsum("ir,ij,jr->r", away, np.linalg.inv(np.cov(cloud)), away) / 2 - np.linalg.slogdet(np.cov(cloud))[1] / 2
            hits.append(np.mean(scores.argmax(0) == truth))
    assert np.mean(hits) > .8 and min(hits) > .7


# ---- fair without an edge

def test_no_question_predicts_the_next_gain(nulls):
    scores = []
    for market in nulls:
        for symbol in SYMBOLS:
            gains, candles, regimes = long_gains(market, symbol), market.candles[symbol], market.regimes[symbol]
            past = np.r_[0, np.sign(np.diff(candles.close))[:-1]]
            loud = np.r_[0, np.abs(np.diff(candles.close))[:-1]] / candles.close[:-1]
            asked = [regimes[1:] == index for index in range(5)]
            asked += [past > 0, past < 0, loud > np.median(loud), market.spikes[symbol][:-1], rates_due(candles, market.funding[symbol])[1:] > 1e-4]
            scores += [gains[yes].sum() / np.sqrt((gains[yes] ** 2).sum()) for yes in asked]
    scores = np.array(scores)
    assert abs(scores.mean()) < .25 and .85 < scores.std() < 1.15 and np.mean(np.abs(scores) > 3) < .015


def test_the_open_is_fair_once_funding_is_paid():
    law = MarketLaw(gap=.001, shock_rate=0.0, funding_spread=4e-4)
    market = simulate_market(seed=3, law=law)
    for symbol in SYMBOLS:
        candles, due = market.candles[symbol], rates_due(market.candles[symbol], market.funding[symbol])
        moves = candles.open[1:] / candles.close[:-1] - 1
        paying = due[1:] != 0
        assert abs(moves[paying].mean() - due[1:][paying].mean()) < 3e-6
        assert np.corrcoef(moves[paying], due[1:][paying])[0, 1] > .95
        assert abs(moves[~paying].mean()) < 3e-6


@njit
def stop_results(opens, highs, lows, closes, due, risk, side):
    "A stop `risk` away and a way out after 24 bars: gains of trades entered at every 24th open, in units of the risk."
    results = []
    for entry in range(24, len(opens) - 24, 24):
        stop, paid, gone = round(closes[entry - 1] - side * risk[entry - 1], 4), 0.0, opens[entry + 24]
        for t in range(entry, entry + 25):
            paid += due[t] * opens[t] * (t > entry)
            if t < entry + 24 and side * ((lows[t] if side > 0 else highs[t]) - stop) <= 0:
                gone = opens[t] if side * (opens[t] - stop) <= 0 else stop
                break
        results.append(side * (gone - opens[entry] - paid) / risk[entry - 1])
    return np.array(results)


def test_a_stopped_position_earns_nothing():
    means = {1: [], -1: []}
    for market in (simulate_market(bars=YEAR, seed=seed) for seed in range(1000, 1040)):
        for side in means:
            results = []
            for symbol, candles in market.candles.items():
                ticks, spread = COINS[symbol].ticks, np.convolve(candles.high - candles.low, np.ones(24) / 24)[:len(candles)]
                due, risk = rates_due(candles, market.funding[symbol]), np.ceil(spread * ticks) / ticks
                results.append(stop_results(candles.open, candles.high, candles.low, candles.close, due, risk, side))
            means[side].append(np.concatenate(results).mean())
    for side in means:
        assert abs(np.mean(means[side])) < 3 * np.std(means[side]) / np.sqrt(len(means[side]))


# ---- planted edges

def right_side(market, symbol, kind):
    "The side to hold over each bar, known at the close before; plain loops, written apart from the package."
    candles, regimes, side, left, sides = market.candles[symbol], market.regimes[symbol], 0, 0, [0]
    paid = dict(zip(market.funding[symbol].time.tolist(), market.funding[symbol].rate.tolist()))
    for t in range(len(candles) - 1):
        if kind == "drift":
            sides.append({BULL: 1, BEAR: -1}.get(int(regimes[t + 1]), 0))
            continue
        if kind == "funding":
            rate = paid[int(candles.time[t + 1]) // 28_800 * 28_800]
            sides.append(-1 if rate > 5e-5 else 1 if rate < 5e-5 else 0)
            continue
        turn = 0
        if kind == "feature" and market.spikes[symbol][t]:
            turn = np.sign(candles.close[t] - candles.open[t])
        if kind == "reversion" and regimes[t] == RANGING and t >= 47:
            recent = candles.close[t - 47:t + 1]
            place = (recent[-1] - recent.min()) / (recent.max() - recent.min())
            turn = 1 if place <= .1 else -1 if place >= .9 else 0
        left -= 1
        if turn:
            side, left = turn, HOLD
        sides.append(side if left > 0 else 0)
    return np.array(sides)


@pytest.mark.parametrize("kind", ["drift", "reversion", "feature", "funding"])
@pytest.mark.parametrize("size", [15, 80])
def test_a_planted_edge_has_the_stated_size(kind, size):
    earned = held = 0.0
    for seed in (70, 71):
        planted, null = simulate_market(bars=YEAR, seed=seed, edge=Edge(kind, size)), simulate_market(bars=YEAR, seed=seed)
        for symbol in SYMBOLS:
            side = right_side(planted, symbol, kind)
            extra = np.diff(np.log(planted.candles[symbol].close)) - np.diff(np.log(null.candles[symbol].close))
            earned, held = earned + (side[1:] * extra).sum(), held + np.abs(side).sum()
    assert held > 3000
    assert earned / held * HOLD * 1e4 == pytest.approx(size, rel=.08)


def test_an_edge_changes_prices_and_nothing_else():
    planted, null = simulate_market(bars=2000, edge=Edge("drift", 50)), simulate_market(bars=2000)
    for symbol in SYMBOLS:
        assert np.array_equal(planted.regimes[symbol], null.regimes[symbol])
        assert np.array_equal(planted.candles[symbol].volume, null.candles[symbol].volume)
        assert np.array_equal(planted.funding[symbol].rate, null.funding[symbol].rate)
        assert not np.array_equal(planted.candles[symbol].close, null.candles[symbol].close)


# ---- files and speed

def test_a_written_market_reads_back(tmp_path, market):
    write_market(market, tmp_path / "data")
    assert available(tmp_path / "data") == [(symbol, "1h") for symbol in SYMBOLS]
    assert not any(row.problems or row.missing for row in health_table(tmp_path / "data"))
    for symbol in SYMBOLS:
        assert as_bytes(read_candles(tmp_path / "data", symbol, "1h")) == as_bytes(market.candles[symbol])
        assert np.array_equal(read_funding(tmp_path / "data", symbol).rate, market.funding[symbol].rate)
        time, regimes = read_regimes(tmp_path / "data", symbol, "1h")
        assert np.array_equal(time, market.candles[symbol].time) and np.array_equal(regimes, market.regimes[symbol])
    assert json.loads((tmp_path / "data" / "simulated.json").read_text())["edge"] is None
    with pytest.raises(InputError, match="no true regimes of BTCUSD at 5m"):
        read_regimes(tmp_path / "data", "BTCUSD", "5m")
