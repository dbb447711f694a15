"""Days kept for the end: a walk that reaches into them opens them, the second time the gate refuses, and no line can be taken back."""
from __future__ import annotations

import pytest

from delta_go.domain import InputError
from delta_go.evidence.gate import Thresholds
from delta_go.evidence.report import describe_walk
from delta_go.evidence.trials import declare_holdout, read_trials
from delta_go.evidence.verdict import weigh
from delta_go.evidence.walk_forward import WalkSettings, past_of, trade_folds, walk_forward
from delta_go.learning.training import TrainSettings

QUICK = WalkSettings(first_train_days=250, test_days=60, train=TrainSettings(restarts=1))
EASY = Thresholds(trades=1, confidence=0.5, deflated_sharpe=0.0, overfitting=2.0, baseline_better=2.0, max_drawdown=1.0)
FAMILY = "delta_go"


@pytest.fixture(scope="module")
def walk(case):
    return walk_forward({"BTCUSD": case.candles["BTCUSD"]}, case.payments, QUICK)


@pytest.fixture
def book(tmp_path):
    return tmp_path / "trials.jsonl"


def look(case, walk, book, until=None):
    """Weigh a walk on the candles up to a moment."""
    candles = {"BTCUSD": case.candles["BTCUSD"]}
    return weigh(walk, candles if until is None else past_of(candles, case.payments, until)[0], book, "made up", limits=EASY)


def test_the_first_opening_passes_and_the_second_refuses(case, walk, book):
    bars = case.candles["BTCUSD"]
    assert look(case, walk, book).holdout is None and look(case, walk, book).evidence.openings == 0
    declare_holdout(book, FAMILY, int(bars.time[-500]), int(bars.time[-1]) + bars.step)
    for openings in (1, 2, 3):
        weighed = look(case, walk, book)
        assert weighed.holdout.openings == weighed.evidence.openings == openings
        refused = [reason for reason in weighed.verdict.reasons if reason.startswith("openings of the holdout")]
        assert bool(refused) == (openings > 1) and (openings == 1 or not weighed.verdict.trade)
        assert f"were opened {openings} times" in describe_walk(weighed.evidence, 2, weighed.holdout)
    assert len(read_trials(book)) == len(walk.backtests) + 1 + 3


def test_work_before_the_holdout_does_not_open_it(case, walk, book):
    first = trade_folds(case.candles, case.payments, walk.folds[:1], QUICK)
    edge = walk.folds[0].end
    declare_holdout(book, FAMILY, edge, edge + 90 * 86_400)
    for _ in range(2):
        weighed = look(case, first, book, edge)
        assert weighed.holdout.openings == 0 and weighed.evidence.openings == 0
    assert look(case, walk, book).evidence.openings == 1          # the examination
    assert look(case, first, book, edge).evidence.openings == 0   # earlier work is still untouched by it


def test_an_opening_cannot_be_taken_back(case, walk, book):
    bars = case.candles["BTCUSD"]
    declare_holdout(book, FAMILY, int(bars.time[-500]), int(bars.time[-1]) + bars.step)
    look(case, walk, book)
    lines = book.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        if '"kind":"opening"' in line or '"kind":"holdout"' in line:
            book.write_text("".join(lines[:number] + lines[number + 1:]))
            with pytest.raises(InputError, match="restore"):
                look(case, walk, book)
    book.write_text("".join(lines))
    assert look(case, walk, book).evidence.openings == 2
