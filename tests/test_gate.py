"""The gate's statistics against their papers, and the verdict against every gap."""

from dataclasses import fields, replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError, Trade
from delta_go.evidence import gate, metrics
from delta_go.evidence.metrics import Moments
from delta_go.evidence.trials import TrialCount
from delta_go.market.candles import Candles

GOOD = gate.Evidence(412, 0.0012, 0.0004, 0.31, 0.11, 0.0002, 0.05, 0.98, 12, 0.1, 0.03, 0.06)


@pytest.mark.parametrize("skew, kurtosis, trials, expected", [(-3, 10, 100, 0.9004), (-3, 10, 46, 0.9505), (0, 3, 88, 0.9505)])
def test_deflated_sharpe_of_the_paper(skew, kurtosis, trials, expected):
    moments = Moments(1_250, 2.5 / 250**0.5, skew, kurtosis)
    assert round(gate.deflated_sharpe(moments, TrialCount(trials, 0.5 / 250)), 4) == expected


def test_probabilistic_sharpe_of_the_paper():
    assert round(gate.probabilistic_sharpe(Moments(24, 0.458, 0, 3)), 3) == 0.982
    assert round(gate.probabilistic_sharpe(Moments(24, 0.458, -2.448, 10.164)), 3) == 0.913


@pytest.mark.parametrize("periods, skew, kurtosis, years", [(250, 0, 3, 2.73), (52, 0, 3, 2.83), (12, 0, 3, 3.24), (12, -0.72, 5.78, 4.99)])
def test_minimum_track_record_of_the_paper(periods, skew, kurtosis, years):
    moments = Moments(0, 2 / periods**0.5, skew, kurtosis)
    assert round(gate.minimum_track_record(moments, 1 / periods**0.5) / periods, 2) == years


@given(st.floats(0.01, 0.5), st.floats(-1, 1), st.floats(3, 10))
def test_track_record_length_and_probability_are_inverse(sharpe, skew, kurtosis):
    length = gate.minimum_track_record(Moments(0, sharpe, skew, kurtosis))
    if length >= 2:
        assert np.isclose(gate.probabilistic_sharpe(Moments(length, sharpe, skew, kurtosis)), 0.95)


def test_undefined_statistics_are_none():
    assert gate.probabilistic_sharpe(Moments(1, 0.0, 0.0, 3.0)) is None
    assert gate.minimum_track_record(Moments(100, -0.1, 0.0, 3.0)) is None
    assert gate.deflated_sharpe(Moments(100, 0.1, 0.0, 3.0), TrialCount(0, 0.0)) is None


@pytest.mark.parametrize("trials", [2, 10, 100])
def test_expected_maximum_is_the_mean_of_maxima(trials):
    maxima = np.random.default_rng(0).normal(0, 0.07, (20_000, trials)).max(axis=1)
    assert abs(gate.expected_max_sharpe(TrialCount(trials, 0.07**2)) - maxima.mean()) < 0.012
    assert gate.expected_max_sharpe(TrialCount(1, 1.0)) == 0.0


@given(st.integers(1, 500), st.integers(1, 500), st.floats(1e-6, 0.1))
def test_more_trials_never_help(one, other, variance):
    moments = Moments(500, 0.1, 0.0, 3.0)
    few, many = sorted((one, other))
    assert gate.deflated_sharpe(moments, TrialCount(many, variance)) <= gate.deflated_sharpe(moments, TrialCount(few, variance)) + 1e-12


@pytest.mark.parametrize("trials", [1, 5, 20])
def test_the_best_of_noise_is_rarely_a_discovery(trials):
    rng, discoveries = np.random.default_rng(trials), 0
    for _ in range(400):
        returns = rng.standard_t(5, (400, trials))
        ratios = returns.mean(axis=0) / returns.std(axis=0, ddof=1)
        count = TrialCount(trials, float(ratios.var(ddof=1)) if trials > 1 else 0.0)
        discoveries += gate.deflated_sharpe(metrics.return_moments(returns[:, ratios.argmax()]), count) > 0.95
    assert discoveries / 400 <= 0.075


def overfitting_by_hand(returns, blocks):
    "The definition, one halving at a time."
    parts, worse = np.array_split(np.arange(len(returns)), blocks), []
    for chosen in combinations(range(blocks), blocks // 2):
        past = np.concatenate([parts[part] for part in chosen])
        rest = np.setdiff1d(np.arange(len(returns)), past)
        ratio = [returns[rows].mean(axis=0) / returns[rows].std(axis=0) for rows in (past, rest)]
        rank = 1 + (ratio[1] < ratio[1][ratio[0].argmax()]).sum()
        share = rank / (returns.shape[1] + 1)
        worse.append(1.0 if share < 0.5 - 1e-12 else 0.5 if share < 0.5 + 1e-12 else 0.0)
    return np.mean(worse)


@settings(max_examples=20)
@given(st.integers(2, 7), st.sampled_from([4, 6, 8]), st.integers(3, 12), st.integers(0, 1_000))
def test_overfitting_is_its_definition(count, blocks, per_block, seed):
    returns = np.random.default_rng(seed).normal(size=(blocks * per_block, count))
    assert np.isclose(gate.overfitting_probability(returns, blocks), overfitting_by_hand(returns, blocks))


@pytest.mark.parametrize("count", [2, 3, 10])
def test_overfitting_is_centred_on_noise(count):
    values = [gate.overfitting_probability(np.random.default_rng(seed).normal(size=(300, count)), 10) for seed in range(150)]
    assert abs(np.mean(values) - 0.5) < 0.07


def test_overfitting_is_low_for_a_real_choice_and_half_for_copies():
    returns = np.random.default_rng(0).normal(0, 0.01, (600, 8))
    returns[:, 3] += 0.003
    assert gate.overfitting_probability(returns) < 0.05
    assert gate.overfitting_probability(np.repeat(returns[:, :1], 4, axis=1)) == 0.5
    assert gate.overfitting_probability(np.zeros((100, 3))) == 0.5


@pytest.mark.parametrize("shape, blocks", [((365, 1), 16), ((20, 5), 16), ((365, 5), 7), ((365,), 16)])
def test_overfitting_refuses_what_is_no_choice(shape, blocks):
    with pytest.raises(InputError, match="at least 2 configurations"):
        gate.overfitting_probability(np.zeros(shape), blocks)


def test_p_values_are_uniform_where_there_is_nothing():
    p = np.array([metrics.bootstrap_p(metrics.mean_draws(np.random.default_rng(seed).standard_t(5, 400), 400, seed)) for seed in range(400)])
    levels = np.linspace(0.05, 0.95, 19)
    assert np.abs([np.mean(p <= level) - level for level in levels]).max() < 1.63 / 400**0.5 + 0.01


def test_good_evidence_trades_and_says_why():
    verdict = gate.judge(GOOD)
    assert verdict.trade and verdict.line == "trade" and len(verdict.reasons) == 8


@pytest.mark.parametrize("change, words", [
    ({"trades": 99}, "number of trades 99 (at least 100 needed)"),
    ({"mean_trade_lower": -0.0003}, "net return a trade +12.0 bp, 60 % lower bound -3.0 bp"),
    ({"mean_trade_lower": 0.0}, "net return a trade"),
    ({"net_return_lower": -0.02}, "total net return 31.0 %, 60 % lower bound -2.0 %"),
    ({"deflated_sharpe": 0.59}, "deflated Sharpe ratio after 12 trials 0.59"),
    ({"trials": 0}, "deflated Sharpe ratio after 0 trials was not measured"),
    ({"overfitting": 0.5}, "probability of overfitting 0.50 (below 0.50 needed)"),
    ({"excess_lower": -0.0001}, "buy and hold at the same exposure"),
    ({"baseline_better": 0.92}, "taking every signal is better 0.92"),
    ({"max_drawdown": 0.11}, "drawdown 11.0 % (at most 10.0 % needed)"),
])
def test_each_failure_refuses_alone_and_is_named(change, words):
    verdict = gate.judge(replace(GOOD, **change))
    assert not verdict.trade and len(verdict.reasons) == 1 and words in verdict.line and verdict.line.startswith("no edge: ")


@settings(max_examples=200)
@given(st.builds(gate.Evidence, trades=st.integers(0, 1_000), trials=st.integers(0, 50),
                 **{field.name: st.none() | st.floats() for field in fields(gate.Evidence) if field.name not in ("trades", "trials")}),
       st.floats(0.5, 0.999))
def test_no_trade_without_complete_evidence_and_positive_bounds(evidence, confidence):
    verdict = gate.judge(evidence, gate.Thresholds(trades=1, confidence=confidence, deflated_sharpe=0, overfitting=1, baseline_better=1, max_drawdown=1))
    assert verdict.line == "trade" if verdict.trade else verdict.line.startswith("no edge: ")
    if verdict.trade:
        bounds = (evidence.mean_trade_lower, evidence.net_return_lower, evidence.excess_lower)
        assert all(value is not None and value > 0 for value in bounds)
        needed = [field.name for field in fields(gate.Evidence) if field.name != "net_exposure"]
        assert all(getattr(evidence, name) is not None and np.isfinite(getattr(evidence, name)) for name in needed)


def test_nothing_traded_is_one_reason():
    assert gate.judge(gate.Evidence(0)).reasons == ("no trade was made, the predictor abstains",)


# From an account to a verdict

HOUR, VALUES = 3_600, {"BTCUSD": 0.001}


def market(drift, seed, days=730):
    rng = np.random.default_rng(seed)
    close = 40_000 * np.exp(np.cumsum(rng.normal(drift, 0.006, 24 * days)))
    open_ = np.concatenate([[40_000.0], close[:-1]])
    return Candles("BTCUSD", HOUR, np.arange(len(close)) * HOUR, open_, np.maximum(open_, close), np.minimum(open_, close), close, np.ones(len(close)))


def account(candles, side_of, hold=9, every=24, cost=0.00059):
    rows = []
    for entry in range(0, len(candles) - hold - 1, every):
        leave, paid, got = entry + hold, candles.open[entry], candles.open[entry + hold]
        side, size = side_of(got - paid), int(1_500 / paid / 0.001)
        fees = cost * size * 0.001 * (paid + got)
        rows.append(Trade("BTCUSD", "buy" if side > 0 else "sell", size, int(candles.time[entry]), paid, int(candles.time[leave]), got, "time", 0.0, 0.0, fees,
                          0.0, side * size * 0.001 * (got - paid) - fees, 0.0, "bull", 0.8, 0.5, ""))
    ledger, books = metrics.ledger_columns(rows), {"BTCUSD": candles}
    blank = metrics.TrackRecord(candles.time, HOUR, np.full(len(candles), 10_000.0), ledger, books, VALUES)
    return metrics.TrackRecord(candles.time, HOUR, metrics.marked_equity(blank, ledger), ledger, books, VALUES)


def flip(seed, skill=0.0):
    rng = np.random.default_rng(seed)
    return lambda move: np.sign(move) if rng.random() < skill else (1 if rng.random() < 0.5 else -1)


def verdict_of(record, baseline, limits=gate.Thresholds()):
    returns = np.column_stack([metrics.record_returns(one)[1] for one in (record, baseline)])
    count = TrialCount(2, float(np.var([metrics.return_moments(column).sharpe for column in returns.T], ddof=1)))
    return gate.judge(gate.gather_evidence(record, count, returns, baseline, limits), limits)


def test_skill_is_let_through_and_coins_are_not():
    candles = market(0.0, 5)
    coins = account(candles, flip(1))
    assert verdict_of(account(candles, flip(2, skill=0.3)), coins).trade
    strict = gate.Thresholds(confidence=0.95, deflated_sharpe=0.95, baseline_better=0.25)
    assert not any(verdict_of(account(candles, flip(10 + seed), cost=0.0), coins, strict).trade for seed in range(20))
    assert not any(verdict_of(account(candles, flip(10 + seed)), coins).trade for seed in range(20))  # the limits in force count on costs


def test_being_long_in_a_rising_market_is_not_skill():
    candles = market(0.0002, 6)
    long_only, coins = account(candles, lambda move: 1, hold=71, every=72), account(candles, flip(1), every=72)
    evidence = gate.gather_evidence(long_only, TrialCount(1, 0.0), None, coins)
    assert evidence.mean_trade_lower > 0 and evidence.net_return_lower > 0 and evidence.deflated_sharpe > 0.95
    assert evidence.excess_lower < 0 and not gate.judge(evidence).trade
    assert any("same exposure" in reason for reason in gate.judge(evidence).reasons)


def test_what_was_not_given_is_not_measured():
    evidence = gate.gather_evidence(account(market(0.0, 5, 60), flip(1)), TrialCount(0, 0.0))
    assert evidence.deflated_sharpe is None and evidence.overfitting is None and evidence.baseline_better is None


def test_comparisons_need_the_same_days():
    with pytest.raises(InputError, match="same 10 days"):
        gate.probability_better(np.zeros(10), np.zeros(9))


def test_a_strategy_is_not_worse_than_itself():
    returns = np.random.default_rng(0).normal(0.001, 0.01, 300)
    assert gate.probability_better(returns, returns) == 0.0
    assert gate.probability_better(returns, returns + 0.001) > 0.99
    assert gate.probability_better(np.zeros(300), np.zeros(300)) is None
