"""One function decides: every refusal and every order by hand, and the same answer as the backtest at every bar."""
import itertools
from dataclasses import replace

import numpy as np
import pytest
from market_cases import random_case

from delta_go.domain import InputError, Signal
from delta_go.market.venue import PRODUCTS
from delta_go.trading.backtest import build_tape, decisions_of, run_backtest
from delta_go.trading.decide import ABSTAIN, ACTIONS, PERMIT, REASONS, REFUSE, Account, Position, Proposal, decide
from delta_go.trading.risk import DAILY_LOSS, DRAWDOWN, OPEN, RiskLimits, watch


LIMITS = RiskLimits(risk_per_trade=0.01)


def propose(symbol, close, side=+1, confidence=0.6, permitted=PERMIT, regime=0, distance=0.01, present=True):
    signal = Signal(side, close, close * (1 - side * distance), close * (1 + side * 0.02), confidence, "pullback") if side else None
    return Proposal(PRODUCTS[symbol], 7_200, close, regime, signal, permitted, present)


def said(proposals, account=None, limits=None):
    return {d.symbol: (d.action, d.size, d.reason) for d in decide(proposals, account or Account(10_000.0), limits or LIMITS)}


BTC = propose("BTCUSD", 60_000.0)


@pytest.mark.parametrize("proposal, account, expected", [
    (BTC, Account(10_000.0), ("enter", 166, "signal taken")),
    (propose("BTCUSD", 60_000.0, side=-1), Account(10_000.0), ("enter", 166, "signal taken")),
    (propose("BTCUSD", 60_000.0, regime=3), Account(10_000.0), ("enter", 83, "signal taken")),       # half the risk in high volatility
    (propose("BTCUSD", 60_000.0, side=0), Account(10_000.0), ("skip", 0, "no signal")),
    (propose("BTCUSD", 60_000.0, permitted=ABSTAIN), Account(10_000.0), ("skip", 0, "predictor abstains")),
    (propose("BTCUSD", 60_000.0, permitted=REFUSE), Account(10_000.0), ("skip", 0, "probability below threshold")),
    (BTC, Account(10_000.0, DAILY_LOSS), ("skip", 0, "daily loss limit")),
    (BTC, Account(10_000.0, DRAWDOWN), ("skip", 0, "drawdown breaker")),
    (propose("BTCUSD", 60_000.0, distance=0.2), Account(1_000.0), ("skip", 0, "size is zero")),      # 10 USD over 12 a contract
    (BTC, Account(59.0), ("skip", 0, "no room under the exposure limits")),
    (BTC, Account(10_000.0, OPEN, {"BTCUSD": Position(+1, 10, 3, 48)}), ("hold", 0, "position open")),
    (propose("BTCUSD", 60_000.0, side=0), Account(10_000.0, OPEN, {"BTCUSD": Position(+1, 10, 47, 48)}), ("hold", 0, "position open")),
    (propose("BTCUSD", 60_000.0, side=0), Account(10_000.0, OPEN, {"BTCUSD": Position(+1, 10, 48, 48)}), ("exit", 0, "maximum bars reached")),
    (propose("BTCUSD", 60_000.0, side=-1), Account(10_000.0, OPEN, {"BTCUSD": Position(+1, 10, 3, 48)}), ("exit", 0, "opposite signal")),
    (BTC, Account(10_000.0, OPEN, {"BTCUSD": Position(-1, 10, 3, 48)}), ("exit", 0, "opposite signal")),
    (propose("BTCUSD", 60_000.0, side=-1), Account(10_000.0, DRAWDOWN, {"BTCUSD": Position(+1, 10, 3, 48)}), ("exit", 0, "opposite signal")),
    (propose("BTCUSD", 60_000.0, present=False), Account(10_000.0), ("skip", 0, "no bar to act on")),
    (propose("BTCUSD", 60_000.0, present=False), Account(10_000.0, OPEN, {"BTCUSD": Position(-1, 10, 48, 48)}), ("hold", 0, "position open")),
])
def test_one_symbol_by_hand(proposal, account, expected):
    assert said([proposal], account) == {"BTCUSD": expected}


def test_an_order_carries_its_bracket_on_the_grid():
    decision = decide([Proposal(PRODUCTS["BTCUSD"], 7_200, 60_000.0, 0, Signal(-1, 60_000.0, 60_600.1, 58_800.2, 0.6, ""))], Account(10_000.0), LIMITS)[0]
    assert (decision.time, decision.side, decision.stop, decision.target) == (7_200, -1, 60_600.5, 58_800.0)
    assert decision.size == 166  # 100 over 0.6005, by the stop that will rest on the exchange


def test_the_surest_first_ties_by_symbol_each_within_the_room_left():
    # one account's worth of room: 10,000 USD. Each asks for all of it with a stop half a percent away (20,000 by risk, capped at 10,000).
    def asking(btc, eth, sol):
        return [propose("SOLUSD", 150.0, confidence=sol, distance=0.005), propose("BTCUSD", 60_000.0, confidence=btc, distance=0.005), propose("ETHUSD", 3_000.0, confidence=eth, distance=0.005)]
    limits = replace(LIMITS, max_exposure=1.0)
    none = ("skip", 0, "no room under the exposure limits")
    assert said(asking(0.5, 0.6, 0.7), limits=limits) == {"SOLUSD": ("enter", 66, "signal taken"), "ETHUSD": ("enter", 3, "signal taken"), "BTCUSD": none}  # 9,900, then 90 of 100
    assert said(asking(0.6, 0.6, 0.6), limits=limits) == {"BTCUSD": ("enter", 166, "signal taken"), "ETHUSD": ("enter", 1, "signal taken"), "SOLUSD": none}  # 9,960, then 30 of 40
    assert said(asking(0.5, 0.7, 0.5), limits=limits)["ETHUSD"] == ("enter", 333, "signal taken")


def test_a_refused_signal_takes_no_room():
    refused = propose("SOLUSD", 150.0, confidence=0.9, permitted=REFUSE, distance=0.005)
    assert said([refused, propose("BTCUSD", 60_000.0, distance=0.005)], limits=replace(LIMITS, max_exposure=1.0))["BTCUSD"] == ("enter", 166, "signal taken")


def test_an_exit_frees_room_for_an_entry_at_the_same_close():
    held = {"SOLUSD": Position(-1, 60, 2, 48)}   # 9,000 USD
    asked = [BTC, propose("SOLUSD", 150.0, side=+1)]
    assert said(asked, Account(10_000.0, OPEN, held), replace(LIMITS, max_exposure=1.0)) == {"SOLUSD": ("exit", 0, "opposite signal"), "BTCUSD": ("enter", 166, "signal taken")}
    staying = [BTC, propose("SOLUSD", 150.0, side=-1)]
    assert said(staying, Account(10_000.0, OPEN, held), replace(LIMITS, max_exposure=1.0))["BTCUSD"] == ("enter", 16, "signal taken")  # 1,000 over 60


def test_what_is_held_without_a_bar_keeps_its_room():
    held = {"SOLUSD": Position(-1, 60, 48, 48)}
    silent = propose("SOLUSD", 150.0, side=0, present=False)
    assert said([BTC, silent], Account(10_000.0, OPEN, held), replace(LIMITS, max_exposure=1.0))["BTCUSD"] == ("enter", 16, "signal taken")
    with pytest.raises(InputError, match="SOLUSD held but not proposed"):
        decide([BTC], Account(10_000.0, OPEN, held), LIMITS)


def test_the_order_of_proposals_does_not_matter():
    asked = [propose("SOLUSD", 150.0, confidence=0.6), BTC, propose("ETHUSD", 3_000.0, confidence=0.8)]
    answers = [decide(list(order), Account(10_000.0), replace(LIMITS, max_exposure=1.5)) for order in itertools.permutations(asked)]
    assert all(answer == answers[0] for answer in answers) and [d.symbol for d in answers[0]] == ["BTCUSD", "ETHUSD", "SOLUSD"]


def states(result, limits):
    "What the account looked like at every close, put together from the ledger: positions after the bar's fills, and what blocks entries."
    tape, previous, start = result.tape, result.starting_equity, result.starting_equity
    guard = (tape.time[0] // 86_400, start, start, False)
    for t in range(len(tape)):
        *guard, blocked = watch(result.equity[t], previous, int(tape.time[t]) + tape.step, *guard, limits.daily_loss, limits.max_drawdown)
        previous = result.equity[t]
        held = {}
        for row in result.closed:
            if row["decided"] < t < row["exit_bar"]:
                s, entry = row["symbol"], row["entry_bar"]
                bars = int(tape.present[entry: t + 1, s].sum()) if entry <= t else 0
                held[tape.products[s].symbol] = Position(int(row["side"]), int(row["size"]), bars, int(tape.plan["max_bars"][row["decided"], s]))
        yield t, held, blocked


def proposals_at(tape, t):
    plan = {name: column[t] for name, column in tape.plan.items()}
    return [Proposal(product, int(tape.time[t]), float(tape.market["close"][t, s]), int(plan["regime"][s]),
                     Signal(int(plan["side"][s]), 0.0, plan["stop"][s], plan["target"][s], plan["confidence"][s], "") if plan["side"][s] else None,
                     int(plan["permitted"][s]), bool(tape.present[t, s] and not tape.last[t, s])) for s, product in enumerate(tape.products)]


@pytest.mark.parametrize("seed", range(12))
def test_the_bot_and_the_backtest_decide_alike_at_every_bar(seed):
    market, plans, products, funding, limits, costs = random_case(seed)
    limits = replace(limits, max_drawdown=0.5)
    result = run_backtest(build_tape(market, plans, products, funding), limits, costs)
    seen = set()
    for t, held, blocked in states(result, limits):
        answers = decide(proposals_at(result.tape, t), Account(float(result.equity[t]), blocked, held), limits)
        assert answers == decisions_of(result, t)
        seen |= {answer.reason for answer in answers}
    assert len(seen) >= 6


def test_every_word_can_be_said():
    seen_reasons, seen_actions = set(), set()
    for seed in range(30):
        market, plans, products, funding, limits, costs = random_case(seed, bars=100)
        result = run_backtest(build_tape(market, plans, products, funding), limits, costs)
        seen_reasons |= set(np.unique(result.reason))
        seen_actions |= set(np.unique(result.action))
    assert seen_actions == set(range(len(ACTIONS))) and {REASONS[i] for i in range(len(REASONS)) if i not in seen_reasons} <= {"size is zero"}
