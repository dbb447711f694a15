"""Labels by hand, and equal to the trades that the backtest makes of the same signals."""
import numpy as np
import pytest
from market_cases import HOUR, candles, random_case

from delta_go.domain import InputError
from delta_go.learning.outcomes import label_outcomes
from delta_go.market.venue import PRODUCTS, SIGNAL, STOP_LOSS, TAKE_PROFIT, TIME, Costs, funding_on_bars
from delta_go.trading.backtest import build_tape, run_backtest
from delta_go.trading.risk import RiskLimits

BTC = PRODUCTS["BTCUSD"]
FLAT = (60_000.0, 60_100.0, 59_900.0, 60_000.0)


def one(rows, side=+1, stop=59_400.0, target=61_200.0, max_bars=100, funding=None, hours=None):
    "The outcome of one signal at the close of bar 0, as (bar of exit, reason, net return), or None."
    bars = candles("BTCUSD", rows, hours=hours)
    sides = np.zeros(len(bars), np.int64)
    sides[0] = side
    due = np.full(len(bars), np.nan)
    for bar, rate in (funding or {}).items():
        due[bar] = rate
    found = label_outcomes(bars, sides, np.full(len(bars), stop), np.full(len(bars), target), np.full(len(bars), max_bars), due, BTC, Costs())
    return (int(found.exit_bar[0]), int(found.exit_reason[0]), float(found.net_return[0])) if len(found) else None


# A long enters at 60,030 (60,000 and 5 bp), a short at 59,970; a fill costs 0.059 %. Dollars per coin over the entry price.
@pytest.mark.parametrize("rows, signal, expected", [
    ([FLAT, FLAT, (60_000, 61_200, 59_900, 61_000)], {}, (2, TAKE_PROFIT, (1_170 - 0.00059 * 121_230) / 60_030)),
    ([FLAT, FLAT, (61_500, 61_600, 59_000, 61_000)], {}, (2, TAKE_PROFIT, (1_470 - 0.00059 * 121_530) / 60_030)),
    ([FLAT, FLAT, (60_000, 61_500, 59_000, 61_000)], {}, (2, STOP_LOSS, (-660 - 0.00059 * 119_400) / 60_030)),             # at 59,370
    ([FLAT, FLAT, (59_000, 59_100, 58_000, 58_500)], {}, (2, STOP_LOSS, (-1_059.5 - 0.00059 * 119_000.5) / 60_030)),       # at 58,970.5
    ([FLAT, (60_000, 60_100, 59_300, 59_900)], {}, (1, STOP_LOSS, (-660 - 0.00059 * 119_400) / 60_030)),                   # in the entry bar
    ([FLAT] * 6, dict(max_bars=3), (4, TIME, (-60 - 0.00059 * 120_000) / 60_030)),                                         # out at 59,970
    ([FLAT] * 3, dict(max_bars=1), (2, TIME, (-60 - 0.00059 * 120_000) / 60_030)),
    ([FLAT, FLAT, (58_000, 58_100, 57_000, 57_500)], dict(max_bars=1), (2, TIME, (57_971 - 60_030 - 0.00059 * 118_001) / 60_030)),  # the decided exit comes before the stop
    ([FLAT, FLAT, (60_000, 60_700, 59_900, 60_000)], dict(side=-1, stop=60_600, target=58_800), (2, STOP_LOSS, (-660.5 - 0.00059 * 120_600.5) / 59_970)),
    ([FLAT, FLAT, (60_000, 60_100, 58_700, 60_000)], dict(side=-1, stop=60_600, target=58_800), (2, TAKE_PROFIT, (1_170 - 0.00059 * 118_770) / 59_970)),
])
def test_one_signal_by_hand(rows, signal, expected):
    bar, reason, earned = one(rows, **signal)
    assert (bar, reason) == expected[:2] and earned == pytest.approx(expected[2], abs=1e-12)


def test_the_bracket_rests_on_the_grid():
    assert one([FLAT, FLAT, (60_000, 60_100, 59_400.0, 60_000)], stop=59_400.4)[1] == STOP_LOSS                # rests at 59,400
    assert one([FLAT, FLAT, (60_000, 60_100, 59_400.3, 60_000), FLAT], stop=59_400.4) is None                  # not at 59,400.5
    assert one([FLAT, FLAT, (60_000, 61_200.4, 59_900, 60_000), FLAT], target=61_200.3) is None                # rests at 61,200.5


@pytest.mark.parametrize("side, rate, bar, paid", [
    (+1, 1e-3, 1, 0.0),      # entered at the moment: not held before it
    (+1, 1e-3, 2, 60.0), (+1, 1e-3, 4, 60.0),  # bar 4 is the one whose open the time exit fills at
    (+1, 1e-3, 5, 0.0), (-1, 1e-3, 2, -60.0), (+1, -1e-3, 3, -60.0),
])
def test_funding_between_entry_and_exit(side, rate, bar, paid):
    levels = dict(stop=59_400, target=61_200) if side > 0 else dict(stop=60_600, target=58_800)
    plain, charged = (one([FLAT] * 7, side=side, max_bars=3, funding=funding, **levels) for funding in (None, {bar: rate}))
    entry = 60_030 if side > 0 else 59_970
    assert plain[:2] == charged[:2] == (4, TIME) and plain[2] - charged[2] == pytest.approx(paid / entry, abs=1e-12)


def test_without_a_known_end_there_is_no_label():
    assert one([FLAT]) is None and one([FLAT] * 9) is None and one([FLAT] * 4, max_bars=3) is None
    assert one([FLAT] * 5, max_bars=3) is not None


def test_across_a_hole_there_is_no_label():
    stopped = [FLAT, FLAT, FLAT, (60_000, 60_100, 59_000, 59_500)]
    assert one(stopped)[0] == 3
    assert one(stopped, hours=[0, 2, 3, 4]) is None and one(stopped, hours=[0, 1, 2, 4]) is None
    assert one(stopped + [FLAT], hours=[0, 1, 2, 3, 5])[0] == 3    # the hole comes after the end


def test_labels_say_earned_after_costs():
    bars = candles("BTCUSD", [FLAT, FLAT, (60_000, 60_200, 59_900, 60_000), FLAT, (60_000, 61_300, 59_900, 60_000)])
    found = label_outcomes(bars, np.array([1, 0, 0, 1, 0]), np.full(5, 59_000.0), np.array([60_100.0, 0, 0, 61_200.0, 0]), np.full(5, 10), np.full(5, np.nan), BTC, Costs())
    assert found.label.tolist() == [0, 1]            # 70 USD of price do not pay two fees of 35.5
    assert found.time.tolist() == [0, 3 * HOUR] and found.exit_time.tolist() == [HOUR, 4 * HOUR]


@pytest.mark.parametrize("signals, rates", [(6, 5), (5, 4)])
def test_columns_that_do_not_fit_are_refused(signals, rates):
    with pytest.raises(InputError, match="expected at most 5 signals and 5 funding rates"):
        label_outcomes(candles("BTCUSD", [FLAT] * 5), np.ones(signals, int), np.ones(signals), np.ones(signals), np.ones(signals, int), np.ones(rates), BTC, Costs())


@pytest.mark.parametrize("seed", range(12))
def test_a_label_is_the_trade_that_the_backtest_makes(seed):
    market, plans, products, funding, _, costs = random_case(seed, bars=300)
    limits = RiskLimits(risk_per_trade=0.002, max_position=1.0, max_exposure=20.0, leverage=1.0)   # no liquidation before these stops
    compared = 0
    for symbol in market:
        bars, plan = market[symbol], plans[symbol]
        result = run_backtest(build_tape({symbol: bars}, {symbol: plan}, products, {symbol: funding[symbol]}), limits, costs, "signals", 1e6)
        found = label_outcomes(bars, plan.side, plan.stop, plan.target, plan.max_bars, funding_on_bars(bars.time, *funding[symbol]), products[symbol], costs)
        outcomes = {int(bar): k for k, bar in enumerate(found.bar)}
        for row in result.closed:
            if row["decided"] in outcomes and row["code"] != SIGNAL:
                k = outcomes[row["decided"]]
                notional = row["entry"] * row["size"] * products[symbol].contract_value
                assert (found.exit_bar[k], found.exit_reason[k]) == (row["exit_bar"], row["code"])
                assert found.net_return[k] == pytest.approx(row["pnl"] / notional, abs=1e-9)
                compared += 1
    assert compared > 20
