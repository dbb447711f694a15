"""The order protocol, case by case: what each answer means, and what nothing can talk it into."""
from __future__ import annotations

import ast
import random
from copy import deepcopy
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go.live import orders
from delta_go.live.journal import START, chain, order_name
from delta_go.live.orders import DEFINITE, FENCE, faults, recover, step
from delta_go.trading import intents
from delta_go.trading.intents import (
    DENIED,
    FINAL,
    OPEN,
    SECOND,
    Answered,
    Ask,
    Books,
    Cancel,
    Clear,
    Clock,
    Entry,
    Place,
    Question,
    Record,
    Refused,
    Report,
    Rules,
    Send,
    SendResult,
    State,
    Stop,
    Tick,
    blocked,
    is_flat,
    post,
)
from delta_go.trading.messages import Accepted, Answer, CouldNotAsk, Fill, NotSent, Order, OrderRequest, Position, Rejected, Unknown
from delta_go.trading.news import FillSeen, Gap, OrderSeen, PositionSeen

RULES = Rules({"BTCUSD": Decimal("0.001"), "ETHUSD": Decimal("0.01")}, {"BTCUSD": 20, "ETHUSD": 20}, Decimal(1_500), entries_a_minute=3)
ENTRY = Place(OrderRequest("any", "BTCUSD", "buy", 5, stop=Decimal(59_000), target=Decimal(62_000)), Decimal(60_000), "test")
EXIT = Place(OrderRequest("any", "BTCUSD", "sell", 5, reduce_only=True), Decimal(60_000), "test")


class Desk:
    """The protocol, an exchange that answers what it is told to, and a journal."""
    def __init__(self, now: int = 100):
        self.now, self.entries, self.effects = now, [Entry("lease", "1", {"holder": "test"})], []
        self.answers: dict[str, object] = {}
        self.state = recover(RULES, self.rows(), now * SECOND)
        self.hear(Tick())

    def rows(self):
        rows = []
        for entry in self.entries:
            rows.append(chain(rows[-1].hash if rows else START, len(rows) + 1, 1, 0, entry))
        return rows

    def hear(self, event, now: float | None = None):
        self.now = self.now if now is None else now
        waiting, self.effects = [event], []
        while waiting:
            before, kept = self.state, deepcopy(self.state.__dict__)
            self.state, effects = step(before, waiting.pop(0), int(self.now * SECOND))
            assert before.__dict__ == kept and faults(before, effects, self.state) == []
            self.effects += effects
            for effect in effects:
                if isinstance(effect, Record):
                    self.entries += effect.entries
                if isinstance(effect, Ask):
                    waiting.append(Answered(effect.question, self.answer(*effect.question.key)))
        assert recover(RULES, self.rows(), 0).books == self.state.books
        return self.effects

    def answer(self, kind, about):
        given = self.answers.get(kind, None if kind == "order" else Position(about, 0) if kind == "position" else [])
        return given if isinstance(given, CouldNotAsk) else Answer(given if kind != "position" or getattr(given, "symbol", about) == about else Position(about, 0))

    def wait(self, seconds: int, **answers):
        self.answers = answers
        for _ in range(seconds):
            self.hear(Tick(), self.now + 1)

    def place(self, wish=ENTRY) -> str:
        sent = [effect.request for effect in self.hear(wish) if isinstance(effect, Send)]
        assert len(sent) == 1, self.effects
        return sent[0].client_order_id

    def status(self, name: str) -> str:
        return self.state.books.intents[name].status


def order(name, number=881, state="closed", unfilled=0, side="buy", size=5, **more) -> Order:
    values = {"order_type": "market_order", "reduce_only": False, "limit": None, "average_fill_price": None, "stop_order_type": None, "stop_price": None, "bracket_order": True,
              "bracket_stop": None, "bracket_target": None, "cancellation_reason": None, "created_us": 0, "updated_us": 0, "symbol": "BTCUSD", **more}
    return Order(id=number, client_order_id=name, side=side, size=size, unfilled_size=unfilled, state=state, **values)


def fill(number=1, order_id=881, size=5, side="buy", at=101, **more) -> Fill:
    return Fill(f"f-{number}", str(order_id), None, more.pop("symbol", "BTCUSD"), side, size, Decimal(60_000), Decimal("0.2"), at * SECOND, "taker", **more)


STOP_LEG = order(None, 882, "pending", 5, "sell", reduce_only=True, stop_order_type="stop_loss_order")


@pytest.fixture
def desk() -> Desk:
    return Desk()


def hold(desk: Desk) -> str:
    """Five contracts with their stop."""
    name = desk.place()
    desk.answers = {"fills": [fill()], "position": Position("BTCUSD", 5), "open": [STOP_LEG], "history": [order(name)], "order": order(name)}
    desk.hear(SendResult(name, Accepted(order(name))))
    assert desk.status(name) == "filled" and desk.state.books.held == {"BTCUSD": 5}
    return name


# ------------------------------------------------------------ outcomes

OUTCOMES = [
    (NotSent("the name could not be resolved"), "not_sent"), (NotSent("no room in the rate limit", 3.0), "not_sent"),
    (Rejected("insufficient_margin"), "rejected"), (Rejected("invalid_api_key"), "rejected"), (Rejected("no_position_for_reduce_only"), "rejected"),
    (Rejected("bad_schema", "size"), "rejected"), (Rejected("expired_signature"), "rejected"),
    (Rejected("duplicate_client_order_id"), "unknown"), (Rejected("rate_limit_exceeded"), "unknown"), (Rejected("internal_server_error"), "unknown"), (Rejected(""), "unknown"),
    (Unknown("no reply", 100), "unknown"), (Unknown("a reply with 429", 100), "unknown"), (Unknown("a reply with 504", 100), "unknown"), (Accepted(None), "unknown"),
]


@pytest.mark.parametrize("outcome, status", OUTCOMES)
def test_what_an_outcome_means(desk, outcome, status):
    name = desk.place()
    desk.hear(SendResult(name, outcome))
    assert desk.status(name) == status
    assert bool(blocked(desk.state, "BTCUSD", desk.now * SECOND)) == (status == "unknown" or outcome == Rejected("invalid_api_key"))


@pytest.mark.parametrize("outcome, status", OUTCOMES)
def test_proof_outweighs_every_outcome(desk, outcome, status):
    name = desk.place()
    desk.hear(OrderSeen(order(name, state="open", unfilled=5), None, False))
    desk.hear(SendResult(name, outcome))
    assert desk.status(name) == "open" and not desk.state.books.halted


def test_silence_counts_only_after_the_fence(desk):
    name = desk.place()
    desk.hear(SendResult(name, Unknown("no reply", 100)), 106)
    desk.wait(5)
    assert desk.now == 111 and desk.status(name) == "unknown"
    desk.wait(2)
    assert desk.status(name) == "never_arrived" and blocked(desk.state, "BTCUSD", desk.now * SECOND) == ""
    assert not any(isinstance(effect, Send) for effect in desk.effects)


@pytest.mark.parametrize("kind", ["order", "open", "history", "fills", "position"])
def test_one_unanswered_question_keeps_the_doubt(desk, kind):
    name = desk.place()
    desk.answers = {kind: CouldNotAsk("the name could not be resolved")}
    desk.hear(SendResult(name, Unknown("no reply", 100)), 106)
    desk.wait(200, **{kind: CouldNotAsk("the name could not be resolved")})
    assert desk.status(name) == "unknown" and blocked(desk.state, "BTCUSD", desk.now * SECOND)
    desk.wait(10)
    assert desk.status(name) == "never_arrived"


@pytest.mark.parametrize("answers", [
    {"order": lambda name: order(name)}, {"history": lambda name: [order(name)]}, {"open": lambda name: [order(name, state="open", unfilled=5)]},
])
def test_one_way_that_finds_it_is_enough(desk, answers):
    name = desk.place()
    desk.hear(SendResult(name, Unknown("no reply", 100)), 106)
    desk.wait(14, **{kind: make(name) for kind, make in answers.items()})
    assert desk.status(name) == "open"


def test_a_trace_in_fills_or_position_keeps_the_doubt(desk):
    for answers in ({"fills": [fill(order_id=999)]}, {"position": Position("BTCUSD", 5)}):
        desk = Desk()
        name = desk.place()
        desk.hear(SendResult(name, Unknown("no reply", 100)), 106)
        desk.wait(40, **answers)
        assert desk.status(name) == "unknown"


def test_an_order_that_was_taken_for_dead_halts(desk):
    name = desk.place()
    desk.hear(SendResult(name, Rejected("insufficient_margin")))
    desk.hear(OrderSeen(order(name, state="open", unfilled=5), None, False))
    assert desk.status(name) == "open" and "taken as rejected" in desk.state.books.halted and desk.state.books.flatten


# ------------------------------------------------------------ orders and fills

def test_partly_filled_and_cancelled_keeps_its_fills(desk):
    name = desk.place()
    desk.hear(SendResult(name, Accepted(order(name, state="open", unfilled=3))))
    desk.hear(OrderSeen(order(name, state="cancelled", unfilled=3), None, False))
    assert desk.status(name) == "open"  # its fills are not written down yet
    desk.answers = {"fills": [fill(size=2)], "position": Position("BTCUSD", 2), "open": [STOP_LEG]}
    desk.wait(3, **desk.answers)
    assert desk.status(name) == "cancelled" and desk.state.books.intents[name].filled == 2 == desk.state.books.held["BTCUSD"]


def test_a_fill_is_counted_once(desk):
    hold(desk)
    for _ in range(3):
        desk.hear(FillSeen(fill()))
        desk.hear(Gap("private", "test"))
    assert desk.state.books.held == {"BTCUSD": 5}
    assert sum(entry.kind == "fill" for entry in desk.entries) == 1


def test_fills_of_a_symbol_are_written_in_order(desk):
    name = desk.place()
    late = [fill(2, 882, 5, "sell", at=103), fill(1, 881)]
    desk.hear(OrderSeen(replace(STOP_LEG, state="closed", unfilled_size=0), None, False))
    desk.answers = {"fills": late}
    desk.hear(FillSeen(late[0]))
    assert len(desk.state.loose) == 2
    assert desk.state.books.held == {}  # the leg is known, but its fill came after one that is not
    desk.wait(3, fills=late, history=[order(name)])
    assert [entry.key for entry in desk.entries if entry.kind == "fill"] == ["f-1", "f-2"] and desk.state.books.held == {"BTCUSD": 0}


def test_an_overfilled_order_halts(desk):
    name = desk.place()
    desk.answers = {"fills": [fill(size=6)]}
    desk.hear(SendResult(name, Accepted(order(name))))
    assert "filled 6 of 5" in desk.state.books.halted and desk.state.books.held == {"BTCUSD": 6}


def test_two_orders_of_one_name_halt(desk):
    name = hold(desk)
    desk.hear(OrderSeen(order(name, 890), None, False))
    assert "two orders" in desk.state.books.halted


def test_our_name_without_a_row_is_another_bot(desk):
    desk.hear(OrderSeen(order(order_name("dg-", 77, 3), state="open", unfilled=5), None, False))
    assert "another bot" in desk.state.books.halted


def test_strangers_are_reported_and_left_alone(desk):
    stranger = order("by-hand", 700, "open", 4, size=4, bracket_order=False)
    desk.wait(30, open=[stranger])
    assert [effect for effect in desk.effects if isinstance(effect, Cancel)] == [] and "rests" in blocked(desk.state, "BTCUSD", desk.now * SECOND)
    desk.wait(30, history=[replace(stranger, state="closed", unfilled_size=0)], fills=[fill(9, 700, 4)], position=Position("BTCUSD", 4))
    assert desk.state.books.foreign == {"BTCUSD": 4} and desk.state.books.held == {} and not desk.state.books.halted
    assert blocked(desk.state, "BTCUSD", desk.now * SECOND) == "somebody else trades here"


def test_a_position_closed_by_hand_is_ours_no_more(desk):
    hold(desk)
    hand = order(None, 700, side="sell", bracket_order=False)
    desk.wait(20, history=[hand], fills=[fill(), fill(9, 700, side="sell", at=110)], position=Position("BTCUSD", 0))
    assert desk.state.books.held == {"BTCUSD": 0} and desk.state.books.foreign == {}


def test_a_liquidation_is_ours(desk):
    hold(desk)
    desk.wait(20, fills=[fill(), fill(9, "b7c1-uuid", side="sell", at=110, kind="liquidation")], position=Position("BTCUSD", 0))
    assert desk.state.books.held == {"BTCUSD": 0}


def test_a_position_where_we_have_never_traded_is_told_and_left_alone(desk):
    desk.wait(90, position=Position("BTCUSD", 3))
    assert not desk.state.books.halted and not desk.state.books.intents
    assert "not explained" in blocked(desk.state, "BTCUSD", desk.now * SECOND)


def test_a_position_that_nothing_explains_halts_after_a_minute(desk):
    desk.hear(SendResult(desk.place(), NotSent("no connection")))
    desk.wait(30, position=Position("BTCUSD", 3))
    assert not desk.state.books.halted and "not explained" in blocked(desk.state, "BTCUSD", desk.now * SECOND)
    desk.wait(60, position=Position("BTCUSD", 3))
    assert "BTCUSD" in desk.state.books.halted and not desk.state.books.flatten


def test_an_open_order_that_is_listed_nowhere_is_asked_for(desk):
    name = desk.place()
    desk.hear(SendResult(name, Accepted(order(name, state="open", unfilled=5))))
    desk.wait(120)
    assert desk.status(name) == "open"  # forgotten by the exchange for a while is not gone
    desk.wait(6, history=[order(name, state="cancelled", unfilled=5)])
    assert desk.status(name) == "cancelled"


# ------------------------------------------------------------ stops

@pytest.mark.parametrize("shown, within", [("with its fills", 10), ("before its fills", 13), ("not at all", 13)])
def test_a_position_without_its_stop_is_closed(desk, shown, within):
    """Five seconds until the next listing, and five; where listings do not show the entry, they may be older than the stop, and are given three more."""
    name = hold(desk)
    desk.wait(20, position=Position("BTCUSD", 5), open=[STOP_LEG])
    assert all(not intent.request.reduce_only for intent in desk.state.books.intents.values())
    entry = {"with its fills": [order(name)], "before its fills": [order(name, state="open", unfilled=2)], "not at all": []}[shown]
    sent = []
    for second in range(within):
        assert not sent or shown == "with its fills" or second > 10
        desk.wait(1, position=Position("BTCUSD", 5), history=entry)
        sent += [effect.request for effect in desk.effects if isinstance(effect, Send)]
    assert (sent[0].side, sent[0].size, sent[0].reduce_only) == ("sell", 5, True)


@pytest.mark.parametrize("leg", [replace(STOP_LEG, side="buy"), replace(STOP_LEG, unfilled_size=4), replace(STOP_LEG, stop_order_type="take_profit_order"),
                                 replace(STOP_LEG, symbol="ETHUSD")])
def test_a_leg_that_does_not_protect_is_no_stop(desk, leg):
    hold(desk)
    desk.wait(20, position=Position("BTCUSD", 5), open=[leg])
    assert any(intent.request.reduce_only for intent in desk.state.books.intents.values())


def test_a_stop_that_could_not_be_looked_for_is_not_absent(desk):
    hold(desk)
    desk.wait(60, position=Position("BTCUSD", 5), open=CouldNotAsk("no answer"))
    assert len(desk.state.books.intents) == 1


def test_legs_without_a_position_are_cancelled(desk):
    cancelled = []
    for _ in range(30):
        desk.wait(1, open=[STOP_LEG])
        cancelled += [(desk.now, effect.order_id) for effect in desk.effects if isinstance(effect, Cancel)]
    assert cancelled and cancelled[0][1] == 882 and cancelled[0][0] - 100 <= 30


# ------------------------------------------------------------ door, halt, clock, stream

def test_the_door(desk):
    def why(**change):
        wish = replace(ENTRY, order=replace(ENTRY.order, **change))
        return next((effect.reason for effect in desk.hear(wish) if isinstance(effect, Refused)), "sent")
    assert "21 contracts" in why(size=21)
    assert "losing side" in why(stop=None) and "losing side" in why(stop=Decimal(60_001)) and "losing side" in why(target=Decimal(59_999))
    assert "away from" in why(order_type="limit_order", limit=Decimal(61_300), stop=Decimal(61_000))
    assert "not traded here" in why(symbol="SOLUSD")
    assert "closes part of what is held" in why(reduce_only=True, stop=None, target=None)
    assert why() == "sent" and "is sending" in why()


def test_doubt_counts_as_filled(desk):
    name = desk.place(replace(ENTRY, order=replace(ENTRY.order, size=20)))
    desk.hear(SendResult(name, Unknown("no reply", 100)))
    other = replace(ENTRY, order=replace(ENTRY.order, symbol="ETHUSD", size=11, stop=Decimal(2_900), target=Decimal(3_300)), mark=Decimal(3_000))
    assert "1530 USD in all" in next(effect.reason for effect in desk.hear(other) if isinstance(effect, Refused))
    desk.place(replace(other, order=replace(other.order, size=10)))


def test_three_entries_a_minute(desk):
    for _ in range(3):
        desk.hear(SendResult(desk.place(), NotSent("no route")))
    assert "in the last minute" in next(effect.reason for effect in desk.hear(ENTRY) if isinstance(effect, Refused))
    desk.wait(61)
    desk.place()


def test_every_entry_of_a_minute_is_counted():
    books = Books()
    for number in range(150):
        order = ENTRY.order
        books = post(books, Entry("intent", f"dg-{number}", {"number": number, "symbol": order.symbol, "side": order.side, "size": order.size, "reduce_only": False, "stop": None, "target": None,
                                                             "limit": None, "order_type": order.order_type, "mark": "60000", "reason": "", "made_us": number * SECOND // 2}))
    assert books.entries_us == tuple(number * SECOND // 2 for number in range(30, 150))


def test_a_gap_stops_entries_until_everything_is_asked_again(desk):
    before = desk.state
    desk.state, effects = step(before, Gap("private", "the numbers jump"), 101 * SECOND)
    assert "last gap" in blocked(desk.state, "BTCUSD", 101 * SECOND) and len([e for e in effects if isinstance(e, Ask)]) == 5
    unmoved, _ = step(before, Gap("public", "the numbers jump"), 101 * SECOND)
    assert blocked(unmoved, "BTCUSD", 101 * SECOND) == ""


def test_old_knowledge_stops_entries(desk):
    desk.wait(25, open=CouldNotAsk("no answer"))
    assert "last known" in blocked(desk.state, "BTCUSD", desk.now * SECOND)
    desk.wait(10)
    assert blocked(desk.state, "BTCUSD", desk.now * SECOND) == ""


def test_without_the_time_nothing_is_sent_or_concluded(desk):
    name = desk.place()
    desk.hear(SendResult(name, Unknown("no reply", 100)), 106)
    desk.hear(Clock(False))
    desk.wait(60)
    assert desk.status(name) == "unknown" and any(isinstance(effect, Refused) for effect in desk.hear(EXIT))
    desk.hear(Clock(True))
    desk.wait(int(FENCE / SECOND) - 1)
    assert desk.status(name) == "unknown"
    desk.wait(3)
    assert desk.status(name) == "never_arrived"


def test_the_switch_closes_everything_and_stays(desk):
    hold(desk)
    desk.answers = {"position": Position("BTCUSD", 5), "open": [STOP_LEG]}
    sent = [effect.request for effect in desk.hear(Stop("the switch", flatten=True)) if isinstance(effect, Send)]
    assert [(request.side, request.size, request.reduce_only) for request in sent] == [("sell", 5, True)]
    done = order(sent[0].client_order_id, 900, side="sell", reduce_only=True, bracket_order=False)
    desk.answers = {"fills": [fill(), fill(2, 900, side="sell", at=110)]}
    desk.hear(SendResult(sent[0].client_order_id, Accepted(done)), 101)
    desk.wait(5, **desk.answers)
    assert is_flat(desk.state) and "the switch" in blocked(desk.state, "BTCUSD", desk.now * SECOND)
    again = recover(RULES, desk.rows(), 500 * SECOND)
    assert again.books.halted == "the switch" and again.books.flatten
    desk.hear(Clear("a person"))
    desk.wait(2)
    assert blocked(desk.state, "BTCUSD", desk.now * SECOND) == "" and recover(RULES, desk.rows(), 0).books.halted == ""


def test_the_switch_cancels_resting_entries(desk):
    name = desk.place(replace(ENTRY, order=replace(ENTRY.order, order_type="limit_order", limit=Decimal(59_900))))
    resting = order(name, state="open", unfilled=5)
    desk.hear(SendResult(name, Accepted(resting)))
    desk.answers = {"open": [resting]}
    desk.hear(Stop("the switch", flatten=True))
    desk.wait(3, open=[resting])
    assert not is_flat(desk.state)
    desk.wait(6, history=[order(name, state="cancelled", unfilled=5)])
    assert is_flat(desk.state)


def test_a_plain_halt_leaves_the_position_and_its_stop(desk):
    hold(desk)
    desk.hear(Stop("the chain is broken"))
    desk.wait(20, position=Position("BTCUSD", 5), open=[STOP_LEG])
    assert len(desk.state.books.intents) == 1 and not any(isinstance(effect, Cancel) for effect in desk.effects)
    desk.place(EXIT)  # a person, or a strategy, may still leave


def test_an_account_that_is_refused_halts(desk):
    desk.hear(SendResult(desk.place(), Rejected("invalid_api_key")))
    assert "invalid_api_key" in desk.state.books.halted and any(isinstance(effect, Report) for effect in desk.effects)


# ------------------------------------------------------------ recovery, purity, promises

def test_recovery_twice_is_recovery_once(desk):
    hold(desk)
    desk.hear(SendResult(desk.place(EXIT), Unknown("no reply", 101)))
    rows = desk.rows()
    once = recover(RULES, rows, 300 * SECOND)
    assert once == recover(RULES, rows, 300 * SECOND) and once.books == desk.state.books
    again = Desk.__new__(Desk)
    again.now, again.entries, again.state, again.answers = 300, list(desk.entries), once, {"position": Position("BTCUSD", 5), "open": [STOP_LEG]}
    again.hear(Tick())
    assert again.entries == desk.entries  # it asks, and writes nothing


def test_every_status_has_one_place():
    assert set(DENIED) < set(FINAL) and "unknown" not in FINAL and {"internal_server_error", "unavailable", "rate_limit_exceeded"}.isdisjoint(DEFINITE)


def test_the_core_has_no_clock_no_chance_and_no_wire():
    for room in (orders, intents):
        tree = ast.parse(Path(room.__file__).read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert imported.isdisjoint({"time", "datetime", "random", "uuid", "os", "socket", "httpx", "sqlite3", "threading"})


def test_a_bad_wish_says_so():
    with pytest.raises(InputError, match="whole number of contracts"):
        Place(OrderRequest("any", "BTCUSD", "buy", 0), Decimal(1))


def test_broken_promises_are_seen(desk):
    bare = OrderRequest("dg-by-hand", "BTCUSD", "buy", 5)
    assert len(faults(desk.state, [Send(bare)], desk.state)) == 3
    halted = replace(desk.state, books=post(desk.state.books, Entry("halt", "1", {"reason": "x", "flatten": False})))
    assert any("although halted" in words for words in faults(halted, [Send(bare)], halted))
    assert intents.broken_books(Books(fills=frozenset({"f"})), Books(), RULES) == ["a fill was forgotten"]


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.lists(st.sampled_from(["outcome", "place", "exit", "tick", "fail", "empty", "gap", "clock", "seen", "fill", "leg", "position"]), max_size=40))
def test_no_sequence_denies_without_evidence(seed, moves):
    """Whatever happens in whatever order: doubt becomes denial only after the fence, no promise breaks, and a final status stays."""
    chance, desk = random.Random(seed), Desk()
    names: list[str] = []
    for move in moves:
        before = desk.state.books.intents
        if move in ("place", "exit"):
            names += [effect.request.client_order_id for effect in desk.hear(ENTRY if move == "place" else EXIT) if isinstance(effect, Send)]
        elif move == "outcome" and names:
            outcomes = NotSent("x"), Rejected("insufficient_margin"), Rejected("odd"), Unknown("x", int(desk.now)), Accepted(None)
            desk.hear(SendResult(names[-1], chance.choice(outcomes)))
        elif move == "fail":
            desk.answers = {kind: CouldNotAsk("x") for kind in ("order", "open", "history", "fills", "position") if chance.random() < 0.5}
        elif move == "empty":
            desk.answers = {}
        elif move == "seen" and names:
            desk.hear(OrderSeen(order(names[-1], 1_000 + len(names), chance.choice(["open", "closed", "cancelled"]), unfilled=5), None, False))
        elif move == "position":
            desk.hear(PositionSeen(Position("BTCUSD", chance.randint(-5, 5))))
        elif move == "clock":
            desk.hear(Clock(chance.random() < 0.5))
        elif move in ("gap", "fill", "leg"):
            desk.hear({"gap": Gap("private", "x"), "fill": FillSeen(fill()), "leg": OrderSeen(STOP_LEG, None, False)}[move])
        else:
            desk.hear(Tick(), desk.now + chance.choice((0.1, 1, 5, 20)))
        for name, intent in before.items():
            after = desk.state.books.intents[name]
            if intent.status in FINAL and after.status != intent.status:
                assert after.status not in DENIED and desk.state.books.halted
            if after.status == "never_arrived" and intent.status != "never_arrived":
                assert desk.now * SECOND >= intent.made_us - SECOND + FENCE and not isinstance(desk.answers.get("order"), CouldNotAsk)


def test_questions_have_one_answer(desk):
    late = Question(OPEN, 1, 0)
    state, effects = step(desk.state, Answered(late, Answer([STOP_LEG])), desk.now * SECOND)
    assert state.listed == () and effects == []


def test_a_limit_below_what_is_held_stops_no_exit():
    """Equity falls, and the limit with it: what is held may be left, by decision and by switch."""
    name = order_name("dg-", 1, 1)
    told = [Entry("lease", "1", {"holder": "x"}),
            Entry("intent", name, {"number": 1, "symbol": "BTCUSD", "side": "buy", "size": 100, "reduce_only": False, "stop": "49000", "target": None, "limit": None,
                                   "order_type": "market_order", "mark": "50000", "reason": "BTCUSD:1", "made_us": 0}),
            Entry("outcome", f"{name}:open", {"client_order_id": name, "status": "open", "order_id": "7", "detail": ""}),
            Entry("fill", "f1", {"owner": name, "order_id": "7", "symbol": "BTCUSD", "side": "buy", "size": 100, "price": "50000", "commission": "1", "time_us": 0, "role": "taker", "kind": "normal"}),
            Entry("outcome", f"{name}:filled", {"client_order_id": name, "status": "filled", "order_id": "7", "detail": ""})]
    books = Books()
    for entry in told:
        books = post(books, entry)
    rules = Rules({"BTCUSD": Decimal("0.001")}, {"BTCUSD": 50}, Decimal(1_000))
    for event in (Stop("the switch", flatten=True), Place(OrderRequest("wish", "BTCUSD", "sell", 100, reduce_only=True), Decimal(49_500), "BTCUSD:2")):
        before = State(rules, books, 0)
        after, effects = step(before, event, 10 * SECOND)
        assert faults(before, effects, after) == [] and any(isinstance(effect, Send) and effect.request.reduce_only for effect in effects)
