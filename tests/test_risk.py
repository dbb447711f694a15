"""Sizes, rooms and breakers: by hand, and against the sentences that describe them."""
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go.market.venue import PRODUCTS
from delta_go.trading.risk import DAILY_LOSS, DAY, DRAWDOWN, OPEN, RiskLimits, check_leverage, limits_from, room_left, size_position, watch

HOUR = 3600


@pytest.mark.parametrize("equity, risk, close, stop, value, most, room, size", [
    (10_000.0, 0.01, 60_000.0, 59_400.0, 0.001, 125_000, 10_000.0, 166),    # 100 USD over 0.60 USD a contract
    (10_000.0, 0.01, 60_000.0, 60_600.0, 0.001, 125_000, 10_000.0, 166),    # the stop of a short, the same distance
    (10_000.0, 0.01, 60_000.0, 59_200.0, 0.001, 125_000, 10_000.0, 125),    # 100 over 0.80: exact, not one less
    (10_000.0, 0.01, 60_000.0, 59_940.0, 0.001, 125_000, 10_000.0, 166),    # 1,666 by risk, 10,000 over 60 by room
    (10_000.0, 0.01, 60_000.0, 59_400.0, 0.001, 40, 10_000.0, 40),          # the product's limit
    (10_000.0, 0.01, 60_000.0, 59_400.0, 0.001, 125_000, 59.99, 0),         # no room for one contract
    (10_000.0, 0.01, 60_000.0, 59_400.0, 0.001, 125_000, 60.0, 1),
    (59.0, 0.01, 60_000.0, 59_400.0, 0.001, 125_000, 177.0, 0),             # 0.59 USD of risk, a contract risks 0.60
    (60.0, 0.01, 60_000.0, 59_400.0, 0.001, 125_000, 180.0, 1),
    (10_000.0, 0.0, 60_000.0, 59_400.0, 0.001, 125_000, 10_000.0, 0),
    (10_000.0, 0.01, 60_000.0, 60_000.0, 0.001, 125_000, 10_000.0, 0),      # no distance, no size
    (-5.0, 0.01, 60_000.0, 59_400.0, 0.001, 125_000, 10_000.0, 0),
    (10_000.0, 0.01, 60_000.0, float("nan"), 0.001, 125_000, 10_000.0, 0),
])
def test_contracts_by_hand(equity, risk, close, stop, value, most, room, size):
    assert size_position(equity, risk, close, stop, value, most, room) == size


@given(st.floats(1, 1e6), st.floats(1e-4, 0.1), st.integers(10_000, 200_000), st.integers(1, 9_000), st.sampled_from([0.001, 0.01, 1.0]), st.integers(1, 200_000), st.floats(0, 1e6))
def test_the_largest_size_that_breaks_no_limit(equity, risk, close, distance, value, most, room):
    size = size_position(equity, risk, float(close), float(close - distance), value, most, room)
    def fits(n):
        coins = n * Fraction(str(value))
        return n <= most and coins * distance <= Fraction(equity) * Fraction(risk) * (1 + Fraction(1, 10**12)) and coins * close <= Fraction(room) * (1 + Fraction(1, 10**12))
    assert size >= 0 and fits(size)
    assert not fits(Fraction(size + 1) * (1 + Fraction(1, 10**9)))


@pytest.mark.parametrize("equity, exposure, limits, room", [
    (10_000.0, 0.0, (1.0, 2.0, 3.0), 10_000.0),        # one position may be the account
    (10_000.0, 12_500.0, (1.0, 2.0, 3.0), 7_500.0),    # all together twice the account
    (10_000.0, 25_000.0, (1.0, 2.0, 3.0), 0.0),        # never below zero
    (10_000.0, 4_000.0, (5.0, 5.0, 1.0), 6_000.0),     # the leverage told to the exchange
    (-100.0, 0.0, (1.0, 2.0, 3.0), 0.0),
])
def test_room_by_hand(equity, exposure, limits, room):
    assert room_left(equity, exposure, *limits) == room


def guard(curve, daily_loss=0.05, max_drawdown=0.10, start=10_000.0, first=0):
    "What blocks entries at each (time of close, equity)."
    state, previous, seen = (first // DAY, start, start, False), start, []
    for closed, equity in curve:
        *state, blocked = watch(equity, previous, closed, *state, daily_loss, max_drawdown)
        previous = equity
        seen.append(blocked)
    return seen


def test_the_daily_limit_lets_go_after_midnight_utc():
    curve = [(22 * HOUR, 9_600.0), (23 * HOUR, 9_500.0), (24 * HOUR, 9_450.0), (25 * HOUR, 9_400.0), (30 * HOUR, 8_977.6), (31 * HOUR, 8_977.5), (47 * HOUR, 8_977.6)]
    # 9,500 is five percent below 10,000; from midnight on the measure is 9,450, and five percent below that 8,977.5
    assert guard(curve, max_drawdown=0.5) == [OPEN, DAILY_LOSS, OPEN, OPEN, OPEN, DAILY_LOSS, OPEN]


def test_a_close_after_a_hole_over_midnight_is_measured_from_the_last_close_before():
    assert guard([(22 * HOUR, 9_800.0), (27 * HOUR, 9_311.0), (28 * HOUR, 9_310.0)], max_drawdown=0.5) == [OPEN, OPEN, DAILY_LOSS]  # 95 % of 9,800


def test_the_drawdown_breaker_is_measured_on_marked_equity_and_latched():
    curve = [(HOUR, 12_000.0), (2 * HOUR, 10_800.5), (3 * HOUR, 10_800.0), (4 * HOUR, 12_500.0), (50 * HOUR, 20_000.0)]
    assert guard(curve, daily_loss=1.0) == [OPEN, OPEN, DRAWDOWN, DRAWDOWN, DRAWDOWN]


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(5_000, 15_000)), min_size=1, max_size=40), st.integers(0, 30), st.sampled_from([0.02, 0.1]), st.sampled_from([0.05, 0.3]))
def test_the_guard_says_what_the_rules_say(steps, first, daily_loss, max_drawdown):
    curve, closed = [], first * HOUR
    for hours, equity in steps:
        closed += hours * HOUR
        curve.append((closed, equity))
    expected = []
    for at, (closed, equity) in enumerate(curve):
        lows = [mark <= max([10_000.0] + [m for _, m in curve[: k + 1]]) * (1 - max_drawdown) for k, (_, mark) in enumerate(curve[: at + 1])]
        before = [10_000.0] + [mark for when, mark in curve[: at + 1] if when <= closed // DAY * DAY]
        expected.append(DRAWDOWN if any(lows) else DAILY_LOSS if equity <= before[-1] * (1 - daily_loss) else OPEN)
    assert guard(curve, daily_loss, max_drawdown, first=first * HOUR) == expected


@pytest.mark.parametrize("wrong, words", [
    (dict(risk_per_trade=0.0), "risk_per_trade: expected a fraction above 0"), (dict(risk_per_trade=5), "at most 1, got 5"),
    (dict(daily_loss=float("nan")), "daily_loss"), (dict(max_drawdown=-0.1), "max_drawdown"), (dict(max_exposure=0.0), "max_exposure"),
    (dict(leverage=0.5), "leverage: expected 1 or more"), (dict(max_position=float("nan")), "max_position"),
    (dict(regime_risk=(1.0, 1.0)), "regime_risk: expected five fractions"), (dict(regime_risk=(1.0, 1.0, 1.0, 1.0, 2.0)), "regime_risk"),
])
def test_unbelievable_limits_are_refused(wrong, words):
    with pytest.raises(InputError, match=words):
        RiskLimits(**wrong)


def test_leverage_that_the_exchange_does_not_grant_is_refused():
    check_leverage(RiskLimits(leverage=100), PRODUCTS.values())
    with pytest.raises(InputError, match="leverage: expected at most 100 for SOLUSD, got 101"):
        check_leverage(RiskLimits(leverage=101), PRODUCTS.values())
    with pytest.raises(InputError, match="at most 200 for BTCUSD"):
        check_leverage(RiskLimits(leverage=201), [PRODUCTS["BTCUSD"]])


def test_percent_of_a_persons_settings_become_fractions():
    settings = SimpleNamespace(risk_per_trade_pct=2.0, max_position_pct=50.0, max_exposure_pct=150.0, leverage=5.0, daily_loss_limit_pct=4.0, max_drawdown_pct=20.0)
    assert limits_from(settings) == RiskLimits(0.02, 0.5, 1.5, 5.0, 0.04, 0.2)
