"The emulated exchange's fills against the backtest's, digit by digit, and its rules by hand."
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from market_cases import HOUR, random_case

from delta_go.domain import EXIT_REASONS
from delta_go.live import matching
from delta_go.live.matching import cancel, edit, edit_bracket, is_covered, place, place_bracket, play, watch_cover
from delta_go.market.accounts import Answers, Refusal, Ticket, available_to, equity_of, open_account, open_exchange
from delta_go.market.load import load_market
from delta_go.market.venue import PRODUCTS, Costs
from delta_go.trading.backtest import build_tape, decisions_of, run_backtest
from delta_go.trading.plan import Plan
from delta_go.trading.risk import RiskLimits


def follow(result, limits, costs):
    "Send a backtest's decisions to an emulated exchange, bar by bar; the account and its equity at every close."
    tape = result.tape
    symbols = [product.symbol for product in tape.products]
    exchange = open_exchange(symbols, costs, check_margin=False)
    account = open_account(exchange, 1, result.starting_equity)
    account.leverage.update(dict.fromkeys(symbols, limits.leverage))
    equity = []
    for bar, opened in enumerate(tape.time.tolist()):
        for s, symbol in enumerate(symbols):
            if tape.present[bar, s]:
                row = {name: float(tape.market[name][bar, s]) for name in ("open", "high", "low", "close", "funding")}
                play(exchange, symbol, opened * 1_000_000, row["open"], row["high"], row["low"], row["close"], row["funding"], bool(tape.last[bar, s]))
        equity.append(equity_of(exchange, account))
        close = (opened + tape.step) * 1_000_000
        for decision in decisions_of(result, bar):
            if decision.action == "enter":
                place(exchange, account, Ticket(decision.symbol, decision.side, decision.size, stop=decision.stop, target=decision.target), close)
            elif decision.action == "exit":
                held = account.positions[decision.symbol]
                place(exchange, account, Ticket(decision.symbol, -held.side, held.size, reduce_only=True), close)
    return exchange, account, equity


def trips_of(result):
    "The backtest's trades in the shape of trips."
    tape = result.tape
    words = {"time": "order", "signal": "order"}
    return [(tape.products[row["symbol"]].symbol, row["side"], row["size"], tape.time[row["entry_bar"]], row["entry"], tape.time[row["exit_bar"]], row["exit"],
             words.get(EXIT_REASONS[row["code"] - 1], EXIT_REASONS[row["code"] - 1]), row["stop"], row["target"], row["fees"], row["funding"], row["pnl"])
            for row in result.closed]


def assert_same(result, limits, costs):
    exchange, account, equity = follow(result, limits, costs)
    got = [(t.symbol, t.side, t.size, t.opened // 1_000_000, t.entry, t.closed // 1_000_000, t.exit, t.why, t.stop, t.target, t.fees, t.funding, t.pnl) for t in account.trips]
    assert got == trips_of(result)
    assert equity == result.equity.tolist()
    assert not account.positions and not account.live
    return got


@pytest.mark.parametrize("seed", range(40))
def test_fills_of_a_wild_market_equal_the_backtests_to_the_last_digit(seed):
    market, plans, products, funding, limits, costs = random_case(seed)
    tape = build_tape(market, plans, products, funding)
    for policy in ("gate", "signals"):
        assert_same(run_backtest(tape, limits, costs, policy), limits, costs)


def test_hundreds_of_trades_on_the_simulated_market_equal_the_backtests():
    loaded = load_market(end="2023-07-01")
    rng, plans = np.random.default_rng(7), {}
    for symbol, bars in loaded.candles.items():
        n, close = len(bars), bars.close
        side = np.where(rng.random(n) < 0.15, rng.choice([-1, 1], n), 0)
        stop, target = close * (1 - side * rng.choice([0.004, 0.01], n)), close * (1 + side * rng.choice([0.006, 0.02], n))
        plans[symbol] = Plan(side, stop, target, rng.integers(2, 30, n), rng.integers(0, 5, n), rng.random(n), np.full(n, np.nan), np.ones(n, int), np.zeros(n, int))
    limits = RiskLimits(leverage=3.0)
    tape = build_tape(loaded.candles, plans, PRODUCTS, {symbol: loaded.payments(symbol) for symbol in plans})
    got = assert_same(run_backtest(tape, limits, Costs(), "signals"), limits, Costs())
    assert len(got) > 500 and {row[7] for row in got} >= {"stop_loss", "take_profit", "order"} and sum(row[11] != 0 for row in got) > 100


# by hand

def desk(last=60_000.0, leverage=3.0, **options):
    exchange = open_exchange(["BTCUSD", "ETHUSD"], options.pop("costs", None), **options)
    account = open_account(exchange, 1)
    account.leverage["BTCUSD"], exchange.last["BTCUSD"] = leverage, last
    return exchange, account


def flat(exchange, price, now=1, **more):
    play(exchange, "BTCUSD", now, price, price, price, price, **more)


def refused(code, call, *given, **named):
    with pytest.raises(Refusal) as caught:
        call(*given, **named)
    assert caught.value.code == code
    return caught.value


@pytest.mark.parametrize("side, bankruptcy, liquidation", [(+1, 58_800.0, 58_950.0), (-1, 61_200.0, 61_050.0)])
def test_the_sheets_example_of_margin_and_liquidation(side, bankruptcy, liquidation):
    exchange, account = desk(leverage=50.0, costs=Costs(slippage_bps=0))
    place(exchange, account, Ticket("BTCUSD", side, 100), 0)
    flat(exchange, 60_000.0)
    held = account.positions["BTCUSD"]
    assert (held.bankruptcy, held.liquidation) == pytest.approx((bankruptcy, liquidation)) and held.fees == pytest.approx(3.54)
    assert account.balance - available_to(exchange, account) == pytest.approx(120)


def test_a_liquidation_takes_every_order_of_the_product_with_it():
    exchange, account = desk(leverage=50.0, costs=Costs(slippage_bps=0))
    place(exchange, account, Ticket("BTCUSD", +1, 100), 0)
    flat(exchange, 60_000.0)
    place(exchange, account, Ticket("BTCUSD", +1, 5, limit=50_000.0), 2)
    place(exchange, account, Ticket("BTCUSD", -1, 100, reduce_only=True, stop_kind="stop_loss_order", stop_price=58_000.0), 2)
    play(exchange, "BTCUSD", 3, 59_500.0, 59_500.0, 58_940.0, 59_000.0)
    assert (account.trips[0].why, account.trips[0].exit, account.fills[-1].kind) == ("liquidation", 58_800.0, "liquidation")
    assert not account.live and {order.reason for order in account.orders.values() if order.state == "cancelled"} == {"cancelled_by_liquidation"}


def test_insufficient_margin_says_how_much_is_missing():
    exchange, account = desk()
    error = refused("insufficient_margin", place, exchange, account, Ticket("BTCUSD", +1, 600), 0)
    assert error.context["asset_symbol"] == "USD" and float(error.context["required_additional_balance"]) == pytest.approx(36_000 / 3 + 2 * 0.00059 * 36_000 - 10_000)
    place(exchange, account, Ticket("BTCUSD", +1, 400), 0)
    refused("insufficient_margin", place, exchange, account, Ticket("BTCUSD", +1, 200), 0)


@pytest.mark.parametrize("rule, second, third", [("accepted", None, None), ("rejected", "duplicate_client_order_id", "duplicate_client_order_id"),
                                                 ("while_open", "duplicate_client_order_id", None)])
def test_the_same_client_id_again(rule, second, third):
    exchange, account = desk(answers=Answers(duplicate_id=rule))
    ticket = Ticket("BTCUSD", +1, 1, limit=50_000.0, client_order_id="a")
    order = place(exchange, account, ticket, 0)
    for code in (second, third):
        if code:
            refused(code, place, exchange, account, ticket, 0)
        else:
            place(exchange, account, ticket, 0)
        if order.live:
            cancel(exchange, account, order, 1)


@pytest.mark.parametrize("ticket, code", [
    (Ticket("BTCUSD", -1, 1, reduce_only=True), "no_position_for_reduce_only"),
    (Ticket("BTCUSD", +1, 1, limit=60_000.0, post_only=True), "immediate_execution_post_only"),
    (Ticket("BTCUSD", -1, 1, stop_kind="stop_loss_order", stop_price=60_000.0), "immediate_execution_stop_order"),
    (Ticket("BTCUSD", +1, 1, stop_kind="stop_loss_order", stop_price=59_000.0), "immediate_execution_stop_order"),
    (Ticket("BTCUSD", -1, 1, stop_kind="take_profit_order", stop_price=59_000.0), "immediate_execution_stop_order"),
    (Ticket("BTCUSD", +1, 1, stop=60_100.0), "immediate_execution_stop_order"),
    (Ticket("BTCUSD", -1, 1, target=60_100.0), "immediate_execution_stop_order"),
    (Ticket("BTCUSD", +1, 125_001), "order_max_size_exceeded"),
    (Ticket("ETHUSD", +1, 1), "unsupported"),
    (Ticket("DOGEUSD", +1, 1), "invalid_contract"),
])
def test_a_refusal_changes_nothing(ticket, code):
    exchange, account = desk()
    refused(code, place, exchange, account, ticket, 0)
    assert not account.orders and not exchange.events


def test_trading_status_blocks_orders_but_not_cancels():
    exchange, account = desk()
    order = place(exchange, account, Ticket("BTCUSD", +1, 1, limit=50_000.0), 0)
    exchange.status["BTCUSD"] = "disrupted_cancel_only"
    refused("trading_blocked", place, exchange, account, Ticket("BTCUSD", +1, 1), 0)
    refused("trading_blocked", edit, exchange, account, order, 0, size=2)
    assert cancel(exchange, account, order, 1).state == "cancelled"
    exchange.status["BTCUSD"] = "disrupted_post_only"
    refused("trading_blocked", place, exchange, account, Ticket("BTCUSD", +1, 1), 0)
    place(exchange, account, Ticket("BTCUSD", +1, 1, limit=50_000.0, post_only=True), 0)


def test_limits_cross_as_takers_and_rest_as_makers():
    exchange, account = desk()
    place(exchange, account, Ticket("BTCUSD", +1, 2, limit=60_010.0), 0)
    place(exchange, account, Ticket("BTCUSD", +1, 3, limit=59_000.0), 0)
    flat(exchange, 60_000.0)
    assert [(f.price, f.role, f.size) for f in account.fills] == [(60_010.0, "taker", 2)]  # slipped to 60,030, but never beyond its limit
    play(exchange, "BTCUSD", 2, 59_500.0, 59_500.0, 58_990.0, 59_200.0)
    assert (account.fills[-1].price, account.fills[-1].role) == (59_000.0, "maker")
    assert account.fills[-1].commission == pytest.approx(0.0002 * 1.18 * 59_000 * 0.003)
    assert account.positions["BTCUSD"].entry == pytest.approx((60_010 * 2 + 59_000 * 3) / 5)


def test_an_ioc_order_is_gone_after_its_first_price():
    exchange, account = desk()
    order = place(exchange, account, Ticket("BTCUSD", +1, 2, limit=59_000.0, ioc=True), 0)
    flat(exchange, 60_000.0)
    assert (order.state, order.unfilled, order.reason) == ("cancelled", 2, "order_size_exceed_available")
    instant, account = desk(instant=True)
    refused("order_size_exceed_available", place, instant, account, Ticket("BTCUSD", +1, 2, limit=59_000.0, ioc=True), 0)


def test_turning_a_position_around_is_two_fills():
    exchange, account = desk()
    place(exchange, account, Ticket("BTCUSD", +1, 4), 0)
    flat(exchange, 60_000.0)
    order = place(exchange, account, Ticket("BTCUSD", -1, 10), 2)
    flat(exchange, 61_000.0, 3)
    assert [(f.size, f.after) for f in account.fills] == [(4, 4), (4, 0), (6, -6)] and order.state == "closed"
    assert len(account.trips) == 1 and account.positions["BTCUSD"].side == -1


def test_a_partial_close_keeps_the_trip_open_and_the_legs_follow():
    exchange, account = desk()
    place(exchange, account, Ticket("BTCUSD", +1, 10, stop=59_000.0, target=62_000.0), 0)
    flat(exchange, 60_000.0)
    place(exchange, account, Ticket("BTCUSD", -1, 4, reduce_only=True), 2)
    flat(exchange, 60_500.0, 3)
    assert not account.trips and {order.unfilled for order in account.live.values()} == {6}
    play(exchange, "BTCUSD", 4, 60_500.0, 62_100.0, 60_400.0, 62_000.0)
    trip = account.trips[0]
    assert (trip.size, trip.why, trip.exit) == (10, "take_profit", 62_000.0) and not account.live
    assert account.balance == pytest.approx(10_000 + trip.pnl)


@pytest.mark.parametrize("kept, left", [(True, {"stop_loss_order", "take_profit_order"}), (False, set())])
@pytest.mark.parametrize("rule", ["full", "proportional", "on_completion"])
def test_a_bracket_when_the_rest_of_a_half_filled_entry_is_cancelled(rule, kept, left):
    exchange, account = desk(answers=Answers(bracket_on_partial=rule, bracket_after_cancel=kept))
    order = place(exchange, account, Ticket("BTCUSD", +1, 10, stop=59_000.0, target=62_000.0), 0, first=4)
    flat(exchange, 60_000.0)
    assert is_covered(account, "BTCUSD") == (rule != "on_completion")
    cancel(exchange, account, order, 2)
    assert {o.ticket.stop_kind for o in account.live.values()} == left
    assert account.positions["BTCUSD"].size == 4


def test_the_rest_of_a_partial_fill_meets_the_next_price_or_is_cancelled():
    for rest_cancelled, state in ((False, "closed"), (True, "cancelled")):
        exchange, account = desk()
        order = place(exchange, account, Ticket("BTCUSD", +1, 10, stop=59_000.0), 0, 4, rest_cancelled)
        flat(exchange, 60_000.0)
        flat(exchange, 60_100.0, 2)
        assert (order.state, account.positions["BTCUSD"].size) == (state, 4 if rest_cancelled else 10)
        assert is_covered(account, "BTCUSD")


def test_brackets_on_positions_and_their_edits():
    exchange, account = desk()
    refused("no_open_position", place_bracket, exchange, account, "BTCUSD", 59_000.0, None, 0)
    entry = place(exchange, account, Ticket("BTCUSD", +1, 10, stop=59_000.0), 0)
    edit_bracket(exchange, account, entry, 58_000.0, 62_000.0, 0)
    flat(exchange, 60_000.0)
    assert {o.ticket.stop_kind: o.ticket.stop_price for o in account.live.values()} == {"stop_loss_order": 58_000.0, "take_profit_order": 62_000.0}
    edit_bracket(exchange, account, entry, 58_500.0, None, 2)
    assert {o.ticket.stop_price for o in account.live.values()} == {58_500.0, 62_000.0}
    refused("bracket_order_position_exists", place_bracket, exchange, account, "BTCUSD", 59_000.0, None, 3)
    refused("bracket_order_position_exists", place, exchange, account, Ticket("BTCUSD", +1, 1, stop=59_000.0), 3)
    refused("immediate_execution_stop_order", edit, exchange, account, next(iter(account.live.values())), 3, stop_price=60_500.0)


def bracket_of(account):
    return {order.ticket.stop_kind: order.ticket.stop_price for order in account.live.values() if order.parent is not None}


@pytest.mark.parametrize("stop, target", [(60_500.0, None), (None, 59_500.0), (58_000.0, 59_500.0), (60_500.0, 63_000.0)])
@pytest.mark.parametrize("armed", [False, True])
def test_a_bracket_that_would_fire_at_once_is_refused_whole(armed, stop, target):
    exchange, account = desk()
    entry = place(exchange, account, Ticket("BTCUSD", +1, 10, stop=59_000.0, target=62_000.0), 0)
    if armed:
        flat(exchange, 60_000.0)
    before, told = (entry.ticket, bracket_of(account)), len(exchange.events)
    refused("immediate_execution_stop_order", edit_bracket, exchange, account, entry, stop, target, 2)
    assert (entry.ticket, bracket_of(account)) == before and len(exchange.events) == told


def test_the_bracket_of_an_entry_that_waits_for_its_trigger_can_be_moved():
    exchange, account = desk()
    entry = place(exchange, account, Ticket("BTCUSD", +1, 10, stop_kind="stop_loss_order", stop_price=61_000.0, stop=59_000.0), 0)
    edit_bracket(exchange, account, entry, 58_000.0, None, 1)
    play(exchange, "BTCUSD", 2, 60_900.0, 61_100.0, 60_900.0, 61_100.0)
    assert account.positions["BTCUSD"].size == 10 and bracket_of(account) == {"stop_loss_order": 58_000.0}


def test_funding_is_charged_to_what_was_held_before_it():
    exchange, account = desk()
    place(exchange, account, Ticket("BTCUSD", +1, 100), 0)
    flat(exchange, 60_000.0, rate_due=0.001)
    assert account.positions["BTCUSD"].funding == 0
    flat(exchange, 61_000.0, 2, rate_due=0.001)
    place(exchange, account, Ticket("BTCUSD", -1, 100, reduce_only=True), 3)
    flat(exchange, 62_000.0, 4, rate_due=-0.002)
    assert account.trips[0].funding == pytest.approx(0.001 * 6_100 - 0.002 * 6_200)
    assert [kind for _, kind, *_ in account.moves] == ["commission", "funding", "funding", "cashflow", "commission"]
    assert account.moves[-1][4] == account.balance


def test_reduce_only_right_after_a_fill_and_without_a_position():
    exchange, account = desk(answers=Answers(registration_lag=2.0, flat_reduce_only="cancelled"))
    place(exchange, account, Ticket("BTCUSD", +1, 10), 0)
    flat(exchange, 60_000.0, 1_000_000)
    close = Ticket("BTCUSD", -1, 10, reduce_only=True)
    refused("no_position_for_reduce_only", place, exchange, account, close, 2_000_000)
    place(exchange, account, close, 3_100_000)
    order = place(exchange, account, close, 3_100_000)
    flat(exchange, 60_000.0, 4_000_000)
    assert (order.state, order.reason) == ("cancelled", "no_position_for_reduce_only") and not account.positions


def test_the_clock_of_uncovered_positions_counts_reachable_time_only():
    exchange, account = desk(instant=True)
    place(exchange, account, Ticket("BTCUSD", +1, 10), 0)
    flat(exchange, 60_000.0, 0)
    for now, reachable in ((0, True), (1_000_000, True), (3_000_000, True), (60_000_000, False), (61_000_000, True)):
        watch_cover(exchange, now, reachable)
    assert account.cover["BTCUSD"].total == 4_000_000
    place(exchange, account, Ticket("BTCUSD", -1, 10, reduce_only=True, stop_kind="stop_loss_order", stop_price=59_000.0), 62_000_000)
    watch_cover(exchange, 62_000_000)
    watch_cover(exchange, 90_000_000)
    assert account.cover["BTCUSD"].total == 5_000_000 and account.cover["BTCUSD"].longest == 5_000_000


PRICES = st.sampled_from([59_000.0, 59_500.0, 60_000.0, 60_500.0, 61_000.0])


@st.composite
def steps(draw):
    kind = draw(st.sampled_from(["order", "order", "cancel", "bar"]))
    if kind == "bar":
        path = [draw(PRICES) for _ in range(4)]
        return kind, (path[0], max(path), min(path), path[-1], draw(st.sampled_from([math.nan, 0.001])))
    if kind == "cancel":
        return kind, draw(st.integers(0, 9))
    side, stop_kind = draw(st.sampled_from([-1, 1])), draw(st.sampled_from([None, None, None, "stop_loss_order", "take_profit_order"]))
    return kind, Ticket("BTCUSD", side, draw(st.integers(1, 9)), draw(st.none() | PRICES), None, draw(st.booleans()), False, draw(st.booleans()), stop_kind,
                        draw(PRICES) if stop_kind else None, None if stop_kind else draw(st.none() | PRICES), None, None if stop_kind else draw(st.none() | PRICES))


@settings(max_examples=150)
@given(st.lists(steps(), max_size=30), st.sampled_from(["full", "proportional", "on_completion"]), st.integers(1, 9) | st.none())
def test_books_balance_whatever_is_sent(script, rule, first):
    exchange, account = desk(answers=Answers(bracket_on_partial=rule), leverage=20.0)
    for now, (kind, thing) in enumerate(script):
        try:
            if kind == "order":
                place(exchange, account, replace(thing, post_only=False), now, first)
            elif kind == "cancel" and account.live:
                cancel(exchange, account, list(account.live.values())[thing % len(account.live)], now)
            elif kind == "bar":
                play(exchange, "BTCUSD", now, *thing[:4], rate_due=thing[4])
        except Refusal:
            pass
        held = account.positions.get("BTCUSD")
        assert sum(f.size * f.order.ticket.side for f in account.fills) == (held.side * held.size if held else 0) == (account.fills[-1].after if account.fills else 0)
        assert account.balance == pytest.approx(10_000 + sum(amount for *_, amount, _ in account.moves))
        assert all(order.live for order in account.live.values()) and all((number in account.live) == order.live for number, order in account.orders.items())
        assert all(0 <= order.unfilled <= order.ticket.size and (order.unfilled == 0) == (order.state == "closed") for order in account.orders.values())
        assert held or not matching.legs_of(account, "BTCUSD")
        assert len({f.id for f in account.fills}) == len(account.fills)


def test_a_symbol_that_ends_leaves_nothing_behind():
    exchange, account = desk()
    place(exchange, account, Ticket("BTCUSD", -1, 10, stop=61_000.0, target=59_000.0), 0)
    play(exchange, "BTCUSD", HOUR, 60_000.0, 60_100.0, 59_900.0, 60_000.0, ending=True)
    assert (account.trips[0].why, account.trips[0].exit, account.fills[-1].kind) == ("end", 60_030.0, "settlement") and not account.live
