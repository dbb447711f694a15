"""What the loop concludes from single answers; whole flights are tried in test_blind, test_kills and test_kill_switch."""
from __future__ import annotations

from types import SimpleNamespace

import pytest

from delta_go.domain import InputError, RetryError
from delta_go.live import bot as room
from delta_go.live.bot import hear, look_up_statuses
from delta_go.trading.news import StatusSeen


@pytest.fixture
def listening():
    """As much of a bot as its ears need."""
    hands = SimpleNamespace(account=SimpleNamespace(client=SimpleNamespace(base_url="http://127.0.0.1:9")))
    return SimpleNamespace(symbols=["BTCUSD", "SOLUSD"], trading={}, flight=SimpleNamespace(executor=hands), turn_of=lambda what, seconds: True)


def listings(**statuses):
    return {symbol: SimpleNamespace(trading_status=status) for symbol, status in statuses.items()}


def test_a_status_that_is_over_is_forgotten(listening, monkeypatch):
    answers = [listings(BTCUSD="disrupted_cancel_only", SOLUSD="operational"), InputError("SOLUSD: expected a linear perpetual that trades, got none"),
               listings(BTCUSD="operational", SOLUSD="operational")]

    def answer(*_):
        given = answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    monkeypatch.setattr(room, "fetch_listings", answer)
    seen = []
    for _ in range(3):
        look_up_statuses(listening)
        seen.append(dict(listening.trading))
    assert [sorted(statuses) for statuses in seen] == [["BTCUSD"], ["SOLUSD"], []]


def test_maintenance_is_the_streams_to_end(listening, monkeypatch):
    hear(listening, StatusSeen(None, "maintenance"))
    monkeypatch.setattr(room, "fetch_listings", lambda *_: listings(BTCUSD="operational", SOLUSD="operational"))
    look_up_statuses(listening)
    assert listening.trading == {"": "maintenance"}
    hear(listening, StatusSeen(None, "live"))
    assert listening.trading == {}


def test_silence_changes_no_status_and_strangers_products_are_nothing_to_us(listening, monkeypatch):
    hear(listening, StatusSeen("BTCUSD", "disrupted_post_only"))
    hear(listening, StatusSeen("C-BTC-90000-310125", "disrupted_cancel_only"))

    def nobody(*_):
        raise RetryError("no answer")

    monkeypatch.setattr(room, "fetch_listings", nobody)
    look_up_statuses(listening)
    assert listening.trading == {"BTCUSD": "disrupted_post_only"}
