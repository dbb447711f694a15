"""The fill rules by hand to the cent, a second reading of them on wild markets, and what must hold on any market."""
from dataclasses import replace

import numpy as np
import pytest
from market_cases import HOUR, Reading, candles, plan, random_case

from delta_go.domain import InputError
from delta_go.market.candles import Candles
from delta_go.market.venue import PRODUCTS, Costs
from delta_go.trading.backtest import _run_fast, build_tape, decisions_of, ledger_of, missing_funding, run_backtest
from delta_go.trading.decide import ENTER, EXIT, REASONS
from delta_go.trading.plan import Plan
from delta_go.trading.risk import RiskLimits

# One long or short of BTCUSD at the close of bar 0, at 60,000, one percent at risk. 100 USD over 0.60 a contract: 166 contracts, 0.166 coins, 9,960 USD.
FLAT = (60_000.0, 60_100.0, 59_900.0, 60_000.0)
LONG = dict(side=+1, stop=59_400.0, target=61_200.0, max_bars=100, confidence=0.6)    # enters at 60,030
SHORT = dict(side=-1, stop=60_600.0, target=58_800.0, max_bars=100, confidence=0.6)   # enters at 59,970
LIMITS = RiskLimits(risk_per_trade=0.01)


def play(rows, at=None, start=0, hours=None, funding=None, limits=LIMITS, policy="gate", others=None, equity=10_000.0, products=PRODUCTS):
    "A backtest of BTCUSD with `rows` and signals `at` bars; `others` adds symbols as (rows, signals, hours)."
    markets = {"BTCUSD": (rows, {0: LONG} if at is None else at, hours)} | (others or {})
    bars = {s: candles(s, rows, start, hours=hours) for s, (rows, _, hours) in markets.items()}
    plans = {s: plan(len(rows), at=at) for s, (rows, at, _) in markets.items()}
    payments = {"BTCUSD": (np.array(sorted(funding)), np.array([funding[t] for t in sorted(funding)]))} if funding else None
    return run_backtest(build_tape(bars, plans, products, payments), limits, None, policy, equity)


def only(result):
    trades = ledger_of(result)
    assert len(trades) == 1
    return trades[0]


# Fees: 0.00059 x 0.166 x (60,030 + exit). The entry's part is 0.00059 x 9,964.98 = 5.8793382.
@pytest.mark.parametrize("name, bar, reason, price, gross, last_fee", [
    ("stop", (60_000, 60_100, 59_400, 59_500), "stop_loss", 59_370.0, -109.56, 5.8146978),              # 59,370.3 on the grid; 660 x 0.166; 9,855.42
    ("gap through the stop", (59_000, 59_100, 58_000, 58_500), "stop_loss", 58_970.5, -175.877, 5.77557077),   # 1,059.5 x 0.166; 9,789.103
    ("both levels", (60_000, 61_500, 59_000, 61_000), "stop_loss", 59_370.0, -109.56, 5.8146978),
    ("target", (60_000, 61_200, 59_900, 61_000), "take_profit", 61_200.0, 194.22, 5.993928),            # 1,170 x 0.166; 10,159.2
    ("gap beyond the target", (61_500, 61_600, 59_000, 61_000), "take_profit", 61_500.0, 244.02, 6.02331),     # 1,470 x 0.166; 10,209
])
def test_a_long_to_the_cent(name, bar, reason, price, gross, last_fee):
    trade = only(play([FLAT, FLAT, bar, FLAT]))
    assert (trade.size, trade.entry_time, trade.entry_price, trade.exit_time, trade.exit_price, trade.exit_reason) == (166, HOUR, 60_030.0, 2 * HOUR, price, reason)
    assert (trade.side, trade.stop_price, trade.target_price, trade.funding) == ("buy", 59_400.0, 61_200.0, 0.0)
    assert trade.fees == pytest.approx(5.8793382 + last_fee, abs=1e-6)
    assert trade.pnl == pytest.approx(gross - 5.8793382 - last_fee, abs=1e-6)
    assert trade.equity_after == pytest.approx(10_000 + trade.pnl, abs=1e-6)


def test_a_short_to_the_cent():
    trade = only(play([FLAT, FLAT, (60_000, 60_700, 59_900, 60_500)], {0: SHORT}))
    assert (trade.side, trade.size, trade.entry_price, trade.exit_price) == ("sell", 166, 59_970.0, 60_630.5)  # 60,630.3 bought on the grid
    assert trade.pnl == pytest.approx(-660.5 * 0.166 - 0.00059 * 0.166 * (59_970 + 60_630.5), abs=1e-6) == pytest.approx(-121.454613, abs=1e-6)


def test_the_entry_bar_can_stop_out():
    trade = only(play([FLAT, (60_000, 60_100, 59_300, 59_900), FLAT]))
    assert trade.entry_time == trade.exit_time == HOUR and trade.exit_reason == "stop_loss"
    assert trade.pnl == pytest.approx(-109.56 - 5.8793382 - 5.8146978, abs=1e-6)


def test_an_entry_that_opens_beyond_its_bracket_leaves_at_that_open():
    trade = only(play([FLAT, (59_000, 59_100, 58_900, 59_000), FLAT]))
    assert (trade.entry_price, trade.exit_price, trade.exit_reason) == (59_029.5, 58_970.5, "stop_loss")       # 29.5 each way
    trade = only(play([FLAT, (61_300, 61_400, 61_250, 61_300), FLAT]))
    assert (trade.entry_price, trade.exit_price, trade.exit_reason) == (61_331.0, 61_300.0, "take_profit")     # 30.65, up to the grid


T = 8 * HOUR


@pytest.mark.parametrize("name, start, signal, rows, charged", [
    ("held before", 6, LONG, [FLAT] * 4, 0.001 * 0.166 * 60_000),                                     # in at 07:00
    ("entered at the moment", 7, LONG, [FLAT] * 4, 0.0),                                              # in at 08:00
    ("decided, not yet in", 8, LONG, [FLAT] * 4, 0.0),
    ("left at the moment, by time", 6, LONG | dict(max_bars=1), [FLAT] * 4, 0.001 * 0.166 * 60_000),  # out at the open of 08:00
    ("left in that bar, by the stop", 6, LONG, [FLAT, FLAT, (60_000, 60_100, 59_000, 59_500), FLAT], 0.001 * 0.166 * 60_000),
    ("left before", 5, LONG | dict(max_bars=1), [FLAT] * 5, 0.0),                                     # out at 07:00
    ("a short receives", 6, SHORT, [FLAT] * 4, -0.001 * 0.166 * 60_000),
    ("on the open of the bar", 6, LONG, [FLAT, FLAT, (60_500, 60_600, 59_900, 60_000), FLAT], 0.001 * 0.166 * 60_500),
])
def test_funding_at_the_snapshot(name, start, signal, rows, charged):
    free, paid = (only(play(rows, {0: signal}, start * HOUR, funding=funding)) for funding in ({0: 0.5}, {0: 0.5, T: 0.001}))
    assert free.funding == 0.0 and paid.funding == pytest.approx(charged, abs=1e-6)
    assert free.pnl - paid.pnl == pytest.approx(charged, abs=2e-6) and paid.fees == free.fees


def test_missing_funding_is_counted_and_costs_nothing():
    day = [FLAT] * 26   # in at 01:00; 08:00, 16:00 and the next midnight are due
    result = play(day, funding={T: 0.001})
    assert only(result).funding == pytest.approx(9.96) and missing_funding(result) == 2
    assert missing_funding(play(day)) == 3 and missing_funding(play(day, funding={T: 0.0, 2 * T: 0.0, 3 * T: 0.0})) == 0
    holed = [h for h in range(26) if h != 8]           # the bar of the moment is missing: no open to charge on
    result = play([FLAT] * 25, hours=holed, funding={T: 0.001, 2 * T: 0.001, 3 * T: 0.001})
    assert only(result).funding == pytest.approx(2 * 9.96) and missing_funding(result) == 1


def test_funding_moments_inside_a_longer_bar_are_counted():
    bars = candles("BTCUSD", [FLAT] * 4, step=86_400)
    tape = build_tape({"BTCUSD": bars}, {"BTCUSD": plan(4, at={0: LONG})}, PRODUCTS, {"BTCUSD": (np.arange(12) * T, np.full(12, 0.001))})
    result = run_backtest(tape, LIMITS)                # in at day 1, out in day 3: six moments, two of them at an open
    assert only(result).funding == pytest.approx(2 * 9.96) and missing_funding(result) == 4


# Twenty times leverage: in at 60,030, bankrupt at 57,028.5, liquidated at 57,178.575. The stop is 4,000 away: 100 / 4 = 25 contracts, 75.0375 USD of margin.
FAR = LONG | dict(stop=56_000.0, target=65_000.0)
WILD = replace(LIMITS, leverage=20.0)


@pytest.mark.parametrize("low, reason, price", [(57_178.5, "liquidation", 57_028.5), (57_179.0, "end", 59_970.0), (50_000.0, "liquidation", 57_028.5)])
def test_liquidation_loses_the_margin_and_no_more(low, reason, price):
    trade = only(play([FLAT, FLAT, (60_000, 60_100, low, 60_000)], {0: FAR}, limits=WILD))
    assert (trade.size, trade.exit_reason, trade.exit_price) == (25, reason, price)
    if reason == "liquidation":
        assert trade.pnl == pytest.approx(-75.0375 - 0.8854425 - 0.841170375, abs=1e-6)   # 0.00059 of 1,500.75 and of 1,425.7125


def test_a_short_is_liquidated_above():
    short = SHORT | dict(stop=64_000.0, target=55_000.0)                                  # in at 59,970, bankrupt at 62,968.5, liquidated at 62,818.575
    trade = only(play([FLAT, FLAT, (60_000, 62_819.0, 59_900, 60_000)], {0: short}, limits=WILD))
    assert (trade.exit_reason, trade.exit_price) == ("liquidation", 62_968.5) and trade.pnl + trade.fees == pytest.approx(-59_970 * 0.025 / 20, abs=1e-6)


def test_the_stop_comes_first_where_it_can():
    trade = only(play([FLAT, FLAT, (60_000, 60_100, 50_000, 60_000)], {0: LONG | dict(stop=58_000.0)}, limits=WILD))
    assert (trade.exit_reason, trade.exit_price) == ("stop_loss", 57_971.0)


def test_leverage_above_the_exchanges_is_refused():
    with pytest.raises(InputError, match="expected at most 200 for BTCUSD, got 250"):
        play([FLAT] * 4, limits=RiskLimits(leverage=250.0))


def test_size_zero_is_no_trade():
    result = play([FLAT] * 5, equity=59.0)
    assert ledger_of(result) == [] and (result.equity == 59.0).all() and (result.size == 0).all()
    assert REASONS[result.reason[0, 0]] == "no room under the exposure limits"
    far = play([FLAT] * 5, {0: LONG | dict(stop=40_000.0)}, limits=RiskLimits(risk_per_trade=0.001))      # 10 USD over 20 a contract
    assert ledger_of(far) == [] and REASONS[far.reason[0, 0]] == "size is zero"


def test_the_products_limit():
    small = {"BTCUSD": replace(PRODUCTS["BTCUSD"], max_size=10)}
    assert only(play([FLAT] * 4, products=small)).size == 10


def test_exit_by_time_fills_at_the_next_open():
    trade = only(play([FLAT] * 5 + [(60_400, 60_500, 60_300, 60_400)] * 2, {0: LONG | dict(max_bars=4)}))
    assert (trade.exit_reason, trade.exit_time, trade.exit_price) == ("time", 5 * HOUR, 60_369.5)           # bars 1 to 4; 60,400 less 30.2 is 60,369.8
    assert trade.pnl == pytest.approx(339.5 * 0.166 - 0.00059 * 0.166 * (60_030 + 60_369.5), abs=1e-6)


def test_a_decided_exit_comes_before_the_bracket_at_that_open():
    trade = only(play([FLAT, FLAT, (58_000, 58_100, 57_000, 57_500), FLAT], {0: LONG | dict(max_bars=1)}))
    assert (trade.exit_reason, trade.exit_price) == ("time", 57_971.0)


def test_an_opposite_signal_closes_and_does_not_turn():
    result = play([FLAT] * 7, {0: LONG, 3: SHORT, 5: LONG})
    first, second = ledger_of(result)
    assert (first.exit_reason, first.exit_time, first.exit_price) == ("signal", 4 * HOUR, 59_970.0)
    assert (second.side, second.entry_time, second.exit_reason) == ("buy", 6 * HOUR, "end")
    assert [d.action for bar in range(7) for d in decisions_of(result, bar)] == ["enter", "hold", "hold", "exit", "skip", "enter", "skip"]


def test_a_second_signal_of_the_same_side_changes_nothing():
    result = play([FLAT, FLAT, FLAT, (60_000, 60_100, 59_400, 59_500)], {0: LONG, 1: LONG | dict(stop=58_000.0)})
    assert only(result).stop_price == 59_400.0 and only(result).exit_reason == "stop_loss"


def test_end_of_data():
    trade = only(play([FLAT, FLAT, (60_000, 60_400, 59_900, 60_300)]))
    assert (trade.exit_reason, trade.exit_time, trade.exit_price) == ("end", 2 * HOUR, 60_269.5)             # 60,300 less 30.15 is 60,269.85
    last = play([FLAT, FLAT, FLAT], {2: LONG})
    assert ledger_of(last) == [] and REASONS[last.reason[2, 0]] == "no bar to act on"
    late = only(play([FLAT, FLAT, FLAT], {1: LONG}))                                                         # in at the last open, out at the last close
    assert (late.entry_time, late.exit_time, late.exit_reason) == (2 * HOUR, 2 * HOUR, "end")


def test_an_order_waits_over_a_hole_and_keeps_its_room():
    eth = ([(3_000.0, 3_010.0, 2_990.0, 3_000.0)] * 5, {1: LONG | dict(stop=2_970.0, target=3_100.0)}, None)
    result = play([FLAT, FLAT, FLAT], {0: LONG}, hours=[0, 3, 4], others={"ETHUSD": eth}, limits=replace(LIMITS, max_exposure=1.0))
    trades = ledger_of(result)
    assert [(t.symbol, t.entry_time, t.size) for t in trades] == [("ETHUSD", 2 * HOUR, 1), ("BTCUSD", 3 * HOUR, 166)]   # 40 USD were left: one contract of 30
    assert result.equity[1] == result.equity[0] == 10_000.0                                                   # nothing is held yet
    assert [d.reason for d in decisions_of(result, 1)] == ["position open", "signal taken"]


def test_a_position_over_a_hole():
    eth = ([(3_000.0, 3_010.0, 2_990.0, 3_000.0)] * 7, {}, None)
    rows = [FLAT, (60_000, 60_300, 59_900, 60_200), (59_000, 59_100, 58_900, 59_000), FLAT]
    result = play(rows, hours=[0, 1, 4, 6], others={"ETHUSD": eth})
    trade = only(result)
    assert (trade.exit_reason, trade.exit_time, trade.exit_price) == ("stop_loss", 4 * HOUR, 58_970.5)        # the gap is met where the bars go on
    marked = 10_000 - 5.8793382 + 170 * 0.166                                                                 # at 60,200, the last price known
    assert result.equity[1:4] == pytest.approx([marked] * 3, abs=1e-6)


def test_time_counts_the_symbols_own_bars_and_a_decided_exit_waits():
    eth = ([(3_000.0, 3_010.0, 2_990.0, 3_000.0)] * 8, {}, None)
    result = play([FLAT] * 5, {0: LONG | dict(max_bars=2)}, hours=[0, 1, 4, 6, 7], others={"ETHUSD": eth})
    assert (only(result).exit_reason, only(result).exit_time) == ("time", 6 * HOUR)                           # bars 1 and 4; decided at 4's close, 5 is missing
    assert [decisions_of(result, t)[0].action for t in range(7)] == ["enter", "hold", "hold", "hold", "exit", "hold", "skip"]


def test_an_exit_frees_room_for_an_entry_at_the_same_close():
    ask = LONG | dict(stop=2_985.0, target=3_100.0)
    eth = ([(3_000.0, 3_010.0, 2_990.0, 3_000.0)] * 8, {2: ask, 3: ask}, None)
    result = play([FLAT] * 8, {0: LONG | dict(max_bars=3)}, others={"ETHUSD": eth}, limits=replace(LIMITS, max_exposure=1.0))
    btc, ether = ledger_of(result)
    assert result.equity[2:4] == pytest.approx([9_989.1406618] * 2)                                  # 10,000 less the fee of 5.8793382 and 30 x 0.166
    assert REASONS[result.reason[2, 1]] == "no room under the exposure limits"                       # 9,960 of it are held, a contract is 30
    assert (btc.exit_time, ether.entry_time, ether.size) == (4 * HOUR, 4 * HOUR, 332)                # 9,989.14 over 30


def test_the_surest_first_and_ties_by_symbol():
    def sizes(btc, eth, sol):
        markets = {"ETHUSD": ([(3_000.0, 3_010.0, 2_990.0, 3_000.0)] * 4, {0: LONG | dict(stop=2_985.0, target=3_100.0, confidence=eth)}, None),
                   "SOLUSD": ([(150.0, 150.5, 149.5, 150.0)] * 4, {0: LONG | dict(stop=149.25, target=155.0, confidence=sol)}, None)}
        result = play([FLAT] * 4, {0: LONG | dict(stop=59_700.0, confidence=btc)}, others=markets, limits=replace(LIMITS, max_exposure=1.0))
        return result.size[0].tolist()
    assert sizes(0.5, 0.6, 0.7) == [0, 3, 66]      # 9,900 of Solana, then 90 of Ether
    assert sizes(0.6, 0.6, 0.6) == [166, 1, 0]     # 9,960 of Bitcoin, then 30 of Ether
    assert sizes(0.5, 0.7, 0.6) == [0, 333, 0]     # 9,990 of Ether


def test_the_daily_limit_over_midnight():
    # 1,666 contracts: 1.666 coins, ten times the account, in at 60,030 for a fee of 59.0058882.
    limits = RiskLimits(risk_per_trade=0.1, max_position=10.0, max_exposure=30.0, leverage=50.0, max_drawdown=0.9)
    down, deep, eth, sol = (59_700.0, 59_800.0, 59_600.0, 59_700.0), (59_700.0, 59_700.0, 59_405.0, 59_410.0), (3_000.0, 3_010.0, 2_990.0, 3_000.0), (150.0, 150.5, 149.5, 150.0)
    result = play([FLAT, FLAT, down, down, down, deep, deep], start=20 * HOUR, limits=limits, others={
        "ETHUSD": ([eth] * 7, {2: LONG | dict(stop=2_970.0, target=3_100.0), 3: LONG | dict(stop=2_970.0, target=3_100.0)}, None),
        "SOLUSD": ([sol] * 7, {5: LONG | dict(stop=148.5, target=155.0)}, None)})
    assert result.equity[2:4] == pytest.approx([10_000 - 59.0058882 - 330 * 1.666] * 2)       # 9,391.21, six percent down
    assert REASONS[result.reason[2, 1]] == "daily loss limit"                                 # the close at 23:00
    assert REASONS[result.reason[3, 1]] == "signal taken"                                     # the close at midnight is the new day's measure
    assert 0.93 < result.equity[5] / result.equity[3] < 0.95 and REASONS[result.reason[5, 2]] == "daily loss limit"


def test_the_drawdown_breaker_latches_and_leaves_the_bracket():
    limits = RiskLimits(risk_per_trade=0.15, max_position=20.0, max_exposure=20.0, leverage=50.0, daily_loss=1.0)
    low, high = (59_450.0, 59_500.0, 59_420.0, 59_450.0), (61_000.0, 61_300.0, 60_900.0, 61_100.0)
    rows = [FLAT, FLAT, low, FLAT, high, FLAT, FLAT, FLAT]
    for policy, second in (("gate", "drawdown breaker"), ("signals", "signal taken")):
        result = play(rows, {0: LONG, 5: LONG}, limits=limits, policy=policy)
        assert result.equity[2] < 9_000 and ledger_of(result)[0].exit_reason == "take_profit" and result.equity[4] > 12_000
        assert REASONS[result.reason[5, 0]] == second


def test_the_predictor_is_asked_by_the_gate_only():
    refused = {0: LONG | dict(permitted=0)}
    assert ledger_of(play([FLAT] * 4, refused)) == [] and len(ledger_of(play([FLAT] * 4, refused, policy="signals"))) == 1


def test_rows_tell_their_own_symbols_story():
    eth = candles("ETHUSD", [(3_000.0, 3_010.0, 2_990.0, 3_000.0)] * 4)
    plans = {"BTCUSD": plan(4, ("first", "second"), at={0: LONG | dict(regime=1, probability=0.61, reason=1)}),
             "ETHUSD": plan(4, ("third", "fourth"), at={0: LONG | dict(stop=2_970.0, target=3_100.0, regime=3, reason=1)})}
    rows = ledger_of(run_backtest(build_tape({"BTCUSD": candles("BTCUSD", [FLAT] * 4), "ETHUSD": eth}, plans, PRODUCTS)))
    assert [(r.symbol, r.regime, r.regime_confidence, r.reason) for r in rows] == [("BTCUSD", "bear", 0.6, "second"), ("ETHUSD", "high_volatility", 0.6, "fourth")]
    assert rows[0].probability == 0.61 and rows[1].probability != rows[1].probability


def test_a_range_is_given_in_closes_and_earlier_bars_are_window():
    bars, proposals = {"BTCUSD": candles("BTCUSD", [FLAT] * 10)}, {"BTCUSD": plan(8, at={0: LONG, 3: LONG})}   # the plan starts at bar 2
    assert build_tape(bars, proposals, PRODUCTS).time.tolist() == [h * HOUR for h in range(2, 10)]
    tape = build_tape(bars, proposals, PRODUCTS, start=5 * HOUR, end=9 * HOUR)                                  # closes at 5, 6, 7, 8
    assert tape.time.tolist() == [4 * HOUR, 5 * HOUR, 6 * HOUR, 7 * HOUR] and np.flatnonzero(tape.plan["side"]).tolist() == [1]
    trade = only(run_backtest(tape))
    assert (trade.entry_time, trade.exit_time, trade.exit_reason) == (6 * HOUR, 7 * HOUR, "end")


def one_symbol(**more):
    return ({"BTCUSD": candles("BTCUSD", [FLAT] * 4)}, {"BTCUSD": plan(4, at={0: LONG | more})}, PRODUCTS)


@pytest.mark.parametrize("wrong, words", [
    (lambda: build_tape(*one_symbol(stop=60_000.0)), "BTCUSD 1970-01-01 00:00: expected a signal with its close between stop and target"),
    (lambda: build_tape(*one_symbol(target=59_000.0)), "got close 60000, stop 59400, target 59000"),
    (lambda: build_tape(*one_symbol(stop=np.nan)), "stop nan"), (lambda: build_tape(*one_symbol(max_bars=0)), "0 bars"),
    (lambda: build_tape({"BTCUSD": candles("BTCUSD", [FLAT] * 3)}, {"BTCUSD": plan(4)}, PRODUCTS), "3 candles at most, got .4. rows"),
    (lambda: build_tape({}, {"BTCUSD": plan(4)}, PRODUCTS), "expected candles and a product for every plan, got none for BTCUSD"),
    (lambda: build_tape(*one_symbol(), start=10**9), "no bar closes in the range"), (lambda: build_tape(*one_symbol(), end=0), "no bar closes in the range"),
    (lambda: build_tape({"BTCUSD": candles("BTCUSD", [FLAT]), "ETHUSD": candles("ETHUSD", [FLAT], step=300)}, {"BTCUSD": plan(1), "ETHUSD": plan(1)}, PRODUCTS), "expected one step"),
    (lambda: run_backtest(build_tape(*one_symbol()), policy="live"), "policy: expected one of gate, signals, got 'live'"),
])
def test_mistakes_are_one_clear_line(wrong, words):
    with pytest.raises(InputError, match=words) as caught:
        wrong()
    assert "\n" not in str(caught.value)


EXACT = ("symbol", "side", "size", "entry_time", "exit_time", "exit_reason", "regime", "reason")


@pytest.mark.parametrize("policy", ["gate", "signals"])
@pytest.mark.parametrize("seed", range(20))
def test_a_second_reading_of_the_rules_writes_the_same_ledger(seed, policy):
    market, plans, products, funding, limits, costs = random_case(seed)
    result = run_backtest(build_tape(market, plans, products, funding), limits, costs, policy)
    reading = Reading(market, plans, products, funding, limits, costs, policy).run()
    ledger = ledger_of(result)
    assert [tuple(getattr(t, name) for name in EXACT) for t in ledger] == [tuple(row[name] for name in EXACT) for row in reading.rows]
    for trade, row in zip(ledger, reading.rows, strict=True):
        for name in row.keys() - set(EXACT):
            assert getattr(trade, name) == pytest.approx(float(row[name]), abs=2e-6), (name, trade)
    assert result.equity == pytest.approx([float(mark) for _, mark in reading.marks], abs=1e-5)


def test_the_wild_markets_are_wild_enough():
    ledgers = [ledger_of(run_backtest(build_tape(*case[:4]), *case[4:], policy=policy)) for policy in ("gate", "signals") for case in map(random_case, range(20))]
    reasons = [trade.exit_reason for ledger in ledgers for trade in ledger]
    assert all(reasons.count(reason) > 10 for reason in ("stop_loss", "take_profit", "time", "signal", "liquidation", "end"))


@pytest.mark.parametrize("seed", range(100, 108))
def test_compiled_and_interpreted_agree_in_every_bit(seed):
    market, plans, products, funding, limits, costs = random_case(seed)
    tape = build_tape(market, plans, products, funding)
    for policy in ("gate", "signals"):
        machine, python = (run_backtest(tape, limits, costs, policy, interpreted=slow) for slow in (False, True))
        for name in ("equity", "closed", "action", "reason", "size"):
            assert getattr(machine, name).tobytes() == getattr(python, name).tobytes(), name


def test_the_loop_is_compiled_once_for_all_inputs():
    play([FLAT] * 4)
    result = random_case(1)
    run_backtest(build_tape(*result[:4]), replace(result[4], leverage=2), policy="signals", starting_equity=5_000)
    assert len(_run_fast.signatures) == 1


def marked_by_the_ledger(result):
    "Equity at every close from the ledger's rows, the closes and the funding rows alone."
    tape, equity = result.tape, np.full(len(result.tape), result.starting_equity)
    rows = {t: k for k, t in enumerate(tape.time.tolist())}
    for trade in ledger_of(result):
        s = [p.symbol for p in tape.products].index(trade.symbol)
        coins, way, first, last = trade.size * tape.products[s].contract_value, 1 if trade.side == "buy" else -1, rows[trade.entry_time], rows[trade.exit_time]
        held = np.arange(first, last)
        charged = np.where(tape.present[:, s], np.nan_to_num(tape.market["funding"][:, s]) * np.nan_to_num(tape.market["open"][:, s]), 0.0)
        paid = way * coins * np.cumsum(np.where(np.arange(len(tape)) > first, charged, 0.0))[held]
        last_fee = trade.fees * trade.exit_price / (trade.entry_price + trade.exit_price)
        equity[held] += way * coins * (tape.market["close"][held, s] - trade.entry_price) - (trade.fees - last_fee) - paid
        equity[last:] += trade.pnl
    return equity


@pytest.mark.parametrize("seed", range(200, 220))
def test_equity_is_cash_and_marked_positions_at_every_bar(seed):
    market, plans, products, funding, limits, costs = random_case(seed, bars=400)
    result = run_backtest(build_tape(market, plans, products, funding), limits, costs, "signals")
    ledger = ledger_of(result)
    assert result.equity == pytest.approx(marked_by_the_ledger(result), abs=1e-4)
    assert sum(trade.pnl for trade in ledger) == pytest.approx(result.equity[-1] - 10_000, abs=1e-4) and ledger[-1].equity_after == pytest.approx(result.equity[-1], abs=1e-4)


@pytest.mark.parametrize("seed", range(300, 330))
def test_no_limit_is_ever_exceeded(seed):
    market, plans, products, funding, limits, costs = random_case(seed, bars=400)
    result = run_backtest(build_tape(market, plans, products, funding), limits, costs, "signals")
    tape, value = result.tape, np.array([p.contract_value for p in result.tape.products])
    held = np.zeros((len(tape), len(value)), np.int64)              # contracts held or ordered after each close
    for row in result.closed:
        held[row["decided"]: row["exit_bar"], row["symbol"]] = row["size"]
    held[result.action == EXIT] = 0                                 # an exit that was just decided makes room
    exposure = (held * value * np.nan_to_num(tape.market["close"])).sum(axis=1)
    orders = 0
    for t, s in zip(*np.nonzero(result.action == ENTER)):
        close, equity, size = tape.market["close"][t, s], result.equity[t] * (1 + 1e-12), result.size[t, s]
        assert 0 < size <= tape.products[s].max_size and size * value[s] * close <= limits.max_position * equity
        assert exposure[t] <= min(limits.max_exposure, limits.leverage) * equity
        risk = limits.risk_per_trade * limits.regime_risk[tape.plan["regime"][t, s]]
        assert size * value[s] * abs(close - tape.plan["stop"][t, s]) <= risk * equity    # the grid only moves the stop away
        orders += 1
    assert orders == len(result.closed) > 0


def test_one_position_a_symbol():
    for seed in range(10):
        case = random_case(seed)
        result = run_backtest(build_tape(*case[:4]), *case[4:], policy="signals")
        for s in range(len(result.tape.products)):
            mine = result.closed[result.closed["symbol"] == s]
            assert (mine["decided"][1:] >= mine["exit_bar"][:-1]).all()


def coin_toss_market(bars, steps, tick, seed):
    "A walk of equal steps up and down, sampled often enough that every level is met exactly; no gaps."
    path = 60_000.0 + tick * np.cumsum(np.random.default_rng(seed).choice([-1, 1], bars * steps))
    inside = path.reshape(bars, steps)
    close = inside[:, -1]
    open_ = np.r_[60_000.0, close[:-1]]
    return Candles("BTCUSD", HOUR, np.arange(bars) * HOUR, open_, np.maximum(inside.max(axis=1), open_), np.minimum(inside.min(axis=1), open_), close, np.ones(bars))


def test_on_a_random_walk_the_mean_result_is_the_cost():
    bars = coin_toss_market(40_000, 20, 10.0, seed=7)            # a bar spans 200 dollars at most, a bracket at least 600: never both in one bar
    rng, n = np.random.default_rng(8), len(bars)
    side = np.where(rng.random(n) < 0.2, rng.choice([-1, 1], n), 0)
    none = np.zeros(n, np.int64)
    signals = Plan(side, bars.close - side * 10 * rng.integers(30, 60, n), bars.close + side * 10 * rng.integers(30, 90, n), rng.integers(5, 60, n), none, np.full(n, 0.5),
                   np.full(n, np.nan), none + 1, none, ("toss",))
    result = run_backtest(build_tape({"BTCUSD": bars}, {"BTCUSD": signals}, PRODUCTS), RiskLimits(risk_per_trade=0.001), Costs(), "signals", 1e9)
    rows = result.closed
    notional = rows["size"] * 0.001 * rows["entry"]
    returns = rows["pnl"] / notional
    slipped = np.where(rows["code"] == 2, 1, 2) * 0.0005         # a target does not slip
    cost = (slipped + 2 * 0.00059).mean()
    error = returns.std(ddof=1) / np.sqrt(len(rows))
    assert len(rows) > 2_000 and set(rows["code"]) >= {1, 2, 3, 4}
    assert abs(returns.mean() + cost) < 3 * error and returns.mean() < -3 * error
