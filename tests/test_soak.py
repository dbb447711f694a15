"""A day of the whole bot: real loop, real streams, real requests, in borrowed time; nothing is thrown, nothing is kept."""
from __future__ import annotations

import pytest

from benchmarks.borrowed import borrowed_exchange, borrowed_setup, prepared, settings_for
from benchmarks.bot import fly_through, trouble
from delta_go.live.faults import Script
from delta_go.live.journal import entry_of, read_journal
from delta_go.market.candles import step_of
from delta_go.trading.risk import DAY


def flown(home, resolution, closes, script=Script(), stops=()):
    """What was noted of the flight, what was written down, and the words of its decisions."""
    models, data = prepared(home, resolution, closes + 300)
    with borrowed_exchange(borrowed_setup(data, resolution, script=script), home) as world:
        log = fly_through(world, settings_for(world, models, home / "state"), [*stops, closes])
    return log, [entry_of(row) for row in read_journal(home / "state" / "testnet" / "journal.db")]


def assert_steady(log, entries, closes, kilobytes):
    """Every close decided once, no exception, as many files at the end as at the beginning, and little kept of each close."""
    assert log.failed == [] and len(log.bodies) >= closes
    decided = [int(entry.key) for entry in entries if entry.kind == "equity"]
    assert len(set(decided)) == len(decided) >= closes - log.boots
    begin, end = log.bodies[len(log.bodies) // 3], log.bodies[-1]
    assert end.files <= begin.files + log.boots and end.threads <= begin.threads + 1
    assert end.resident - begin.resident < 12 + closes * kilobytes / 1e3


def test_a_day_of_quarters_leaves_nothing_behind(tmp_path):
    """No faults: each bar follows the one before."""
    closes = DAY // step_of("15m")
    log, entries = flown(tmp_path, "15m", closes)
    assert_steady(log, entries, closes, 60)
    decided = sorted(int(entry.key) for entry in entries if entry.kind == "equity")
    assert {later - before for before, later in zip(decided, decided[1:])} == {900} and log.boots == 1
    assert not [words for words in log.told if words.startswith(("no entries", "the bar"))]


@pytest.mark.slow
def test_two_days_with_faults_and_restarts(tmp_path):
    """Lost replies, refusals, cut lines, an exchange that restarts three times, and a bot that does twice."""
    closes = 2 * DAY // step_of("15m") - 10
    log, entries = flown(tmp_path, "15m", closes, trouble(3, 2 * DAY), (50, 120))
    assert_steady(log, entries, closes, 60)
