"When to ask again and when to stop, under a clock that only moves when told."
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from delta_go.domain import InputError, RetryError
from delta_go.patience import Asker, Breaker, NoAnswer, Patience, RetryBudget, ServiceDown, Timing, wait_before


class Clock:
    def __init__(self):
        self.now, self.waits = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.waits.append(seconds)
        self.now += seconds


class BreakerLife(RuleBasedStateMachine):
    "Beside the breaker runs a plain list of what happened; the rules are read off that list."

    def __init__(self):
        super().__init__()
        self.clock = Clock()
        self.under_way = []       # (ticket, era in which it was admitted)
        self.era = 0              # counts openings and probes: what came before says nothing about now
        self.failures = 0         # in a row
        self.opened_at = None     # None: closed
        self.probe = None         # the one question that may pass while it is not closed

    @initialize(limit=st.sampled_from([1, 2, 3, 5]))
    def begin(self, limit):
        self.limit, self.breaker = limit, Breaker(limit, 30.0, self.clock)

    @rule(seconds=st.sampled_from([0.0, 0.5, 29.75, 30.0, 31.0]))
    def time_passes(self, seconds):
        self.clock.now += seconds

    @rule()
    def ask(self):
        allowed = self.opened_at is None or (self.probe is None and self.clock.now - self.opened_at >= 30.0)
        if not allowed:
            with pytest.raises(ServiceDown) as caught:
                self.breaker.admit()
            assert 0 <= caught.value.wait <= 30
            return
        ticket = self.breaker.admit()
        if self.opened_at is not None:
            self.era += 1
            self.probe = self.era
        self.under_way.append((ticket, self.era))

    def settle(self, place):
        ticket, era = self.under_way.pop(place % len(self.under_way))
        return ticket, era == self.era

    @precondition(lambda self: self.under_way)
    @rule(place=st.integers(0, 9))
    def it_fails(self, place):
        ticket, counts = self.settle(place)
        self.breaker.failed(ticket, "no answer")
        if counts:
            self.failures += 1
            if self.failures >= self.limit:
                self.opened_at, self.probe = self.clock.now, None
                self.era += 1

    @precondition(lambda self: self.under_way)
    @rule(place=st.integers(0, 9))
    def it_answers(self, place):
        ticket, counts = self.settle(place)
        self.breaker.answered(ticket)
        if counts:
            self.failures, self.opened_at, self.probe = 0, None, None

    @precondition(lambda self: self.under_way)
    @rule(place=st.integers(0, 9))
    def it_is_given_up(self, place):
        ticket, counts = self.settle(place)
        self.breaker.dropped(ticket)
        if counts:
            self.probe = None

    @invariant()
    def states_agree(self):
        expected = "closed" if self.opened_at is None else "probing" if self.probe is not None else "open"
        assert self.breaker.state == expected


TestBreakerLife = BreakerLife.TestCase
TestBreakerLife.settings = settings(max_examples=120, stateful_step_count=30)


def open_breaker(clock):
    breaker = Breaker(5, 30.0, clock)
    for _ in range(5):
        breaker.failed(breaker.admit(), "it broke")
    return breaker


def test_an_open_breaker_says_what_happened_and_when_it_tries_again():
    clock = Clock()
    breaker = open_breaker(clock)
    clock.now = 12.0
    with pytest.raises(ServiceDown, match=r"failed 5 times in a row \(next try in 18 s\); the last time: it broke") as caught:
        breaker.admit()
    assert caught.value.wait == 18.0 and isinstance(caught.value, RetryError)


@pytest.mark.parametrize("outcome", ["answered", "dropped", "failed"])
def test_what_was_asked_before_it_opened_says_nothing_afterwards(outcome):
    clock = Clock()
    breaker = Breaker(5, 30.0, clock)
    early = breaker.admit()
    for _ in range(5):
        breaker.failed(breaker.admit(), "it broke")

    def late():
        breaker.failed(early, "late") if outcome == "failed" else getattr(breaker, outcome)(early)

    clock.now = 20.0
    late()
    assert breaker.state == "open"
    clock.now = 30.0
    probe = breaker.admit()
    late()
    assert breaker.state == "probing"
    with pytest.raises(ServiceDown):
        breaker.admit()
    breaker.answered(probe)
    for _ in range(9):
        late()
    assert breaker.state == "closed"


@pytest.mark.parametrize("wish, tries", [(7.9, 2), (8.1, 1)])
def test_a_try_that_could_not_connect_any_more_is_not_made(wish, tries):
    clock, made = Clock(), []

    def attempt(seconds):
        made.append(seconds)
        raise NoAnswer("busy", wish)

    with pytest.raises(NoAnswer):
        Asker(timing=Timing(clock, clock.sleep, lambda: 0.0)).ask(attempt)
    assert len(made) == tries and min(made) >= 2.0


def test_of_many_threads_one_probes():
    clock = Clock()
    breaker, gate = open_breaker(clock), threading.Barrier(16)
    clock.now = 30.0

    def ask(_):
        gate.wait()
        try:
            return breaker.admit()
        except ServiceDown:
            return None

    with ThreadPoolExecutor(16) as pool:
        assert sum(ticket is not None for ticket in pool.map(ask, range(16))) == 1


@given(st.integers(1, 20), st.integers(0, 20), st.lists(st.integers(0, 5), max_size=300))
def test_retries_stay_within_their_budget(price, in_hand, wishes):
    budget, taken = RetryBudget(price, in_hand), 0
    for asked, wanted in enumerate(wishes, 1):
        budget.deposit()
        taken += sum(budget.spend() for _ in range(wanted))
        assert taken <= in_hand + asked / price


def test_a_saved_budget_is_bounded_and_comes_back():
    budget = RetryBudget(10, 10)
    for _ in range(10_000):
        budget.deposit()
    assert sum(budget.spend() for _ in range(50)) == 10
    earned = 0
    for _ in range(1000):
        budget.deposit()
        earned += budget.spend()
    assert earned == 100


def test_threads_share_one_budget():
    budget = RetryBudget(10, 10)

    def ask(_):
        budget.deposit()
        return sum(budget.spend() for _ in range(3))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(2000))) <= 10 + 200


@given(st.integers(0, 50), st.floats(0, 1), st.none() | st.floats(0, 1e6))
def test_waits_are_full_jitter_on_top_of_what_was_asked(retry, chance, asked):
    wait, limit = wait_before(retry, chance, asked, Patience()), min(2.0, 0.2 * 2**retry)
    assert (asked or 0) <= wait <= (asked or 0) + limit
    assert wait_before(retry, 0.0, asked, Patience()) == (asked or 0)


OUTCOMES = st.sampled_from(["answer", "wrong", "silent", "busy", "bug"])


@settings(max_examples=100)
@given(st.lists(st.lists(st.tuples(OUTCOMES, st.floats(0, 6), st.floats(0, 15)), min_size=4, max_size=4), min_size=1, max_size=25), st.floats(0, 1))
def test_no_script_makes_a_question_long_or_loud(scripts, chance):
    "Whatever a service does, for many questions in a row: the limits hold and the outcome is the last try's."
    clock = Clock()
    asker, retries = Asker(timing=Timing(clock, clock.sleep, lambda: chance)), 0
    for asked, script in enumerate(scripts, 1):
        tries, began = [], clock.now

        def attempt(seconds, tries=tries, script=script):
            outcome, took, wish = script[len(tries)]
            tries.append(outcome)
            assert 0 < seconds <= 5
            clock.now += min(took, seconds)
            errors = {"wrong": InputError("no such symbol"), "silent": NoAnswer("silence"), "busy": NoAnswer("busy", wish), "bug": ZeroDivisionError()}
            if outcome in errors:
                raise errors[outcome]
            return "good"

        before = asker.breaker.state
        try:
            assert asker.ask(attempt) == "good" and tries[-1] == "answer"
        except ServiceDown:
            assert before == "open" and not tries
        except RetryError:
            assert tries[-1] in ("silent", "busy")
        except InputError:
            assert tries[-1] == "wrong"
        except ZeroDivisionError:
            assert tries[-1] == "bug"
        assert len(tries) <= 4 and clock.now - began <= 10.000001
        assert all(outcome in ("silent", "busy") for outcome in tries[:-1]), "nothing but silence is asked again"
        retries += max(0, len(tries) - 1)
        assert retries <= 10 + asked / 10
        clock.now += 5


def test_a_probe_is_not_repeated():
    clock = Clock()
    asker, tries = Asker(timing=Timing(clock, clock.sleep, lambda: 0.5)), []

    def attempt(seconds):
        tries.append(seconds)
        raise NoAnswer("gone")

    for _ in range(2):
        with pytest.raises(NoAnswer):
            asker.ask(attempt)
    assert len(tries) == 5 and asker.breaker.state == "open"
    clock.now += 30
    with pytest.raises(NoAnswer):
        asker.ask(attempt)
    assert len(tries) == 6
    with pytest.raises(ServiceDown):
        asker.ask(attempt)
    assert len(tries) == 6


def test_a_refusal_is_no_failure_and_ends_a_row():
    asker = Asker(Patience(retries=0))

    def raises(error):
        def attempt(seconds):
            raise error
        return attempt

    for _ in range(3):
        for _ in range(4):
            with pytest.raises(NoAnswer):
                asker.ask(raises(NoAnswer("silence")))
        with pytest.raises(InputError):
            asker.ask(raises(InputError("wrong")))
    assert asker.breaker.state == "closed"


def test_an_interrupted_probe_leaves_room_for_the_next():
    clock = Clock()
    asker = Asker(Patience(retries=0), Timing(clock, clock.sleep))

    def attempt(error):
        def ask(seconds):
            raise error
        return ask

    for _ in range(5):
        with pytest.raises(NoAnswer):
            asker.ask(attempt(NoAnswer("silence")))
    clock.now = 30.0
    with pytest.raises(KeyboardInterrupt):
        asker.ask(attempt(KeyboardInterrupt()))
    assert asker.breaker.state == "open"
    assert asker.ask(lambda seconds: "back") == "back" and asker.breaker.state == "closed"


def test_retries_of_a_service_that_fails_every_first_try_are_paid_by_questions():
    clock, first, refused = Clock(), set(), 0
    asker = Asker(Patience(failures=10**6), Timing(clock, clock.sleep))
    for question in range(200):
        def attempt(seconds, question=question):
            if question not in first:
                first.add(question)
                raise NoAnswer("not at once")
            return "then"

        try:
            assert asker.ask(attempt) == "then"
        except NoAnswer:
            refused += 1
    assert 28 <= 200 - refused <= 30 and len(clock.waits) == 200 - refused
