"""Flights with one thing gone wrong in each, explained: every fault lands in its own cause, to the cent."""
from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError, Trade
from delta_go.learning.advice import LocalAdviser
from delta_go.learning.registry import load_models
from delta_go.live.account import synchronise
from delta_go.live.emulator import running
from delta_go.live.explain import CAUSES, explain_journal, pair_trades, show_explanation, write_explanation
from delta_go.live.flight import Flight, close_bar, note_payments, read_on
from delta_go.live.pace import Setup
from delta_go.live.rehearse import board
from delta_go.market.load import load_market
from delta_go.market.venue import PRODUCTS, Costs
from delta_go.trading.intents import Stop, Tick
from delta_go.trading.risk import RiskLimits

SPAN, LIMITS, MODELS = dict(start="2023-01-19", end="2023-01-21"), RiskLimits(), Path("models")


@pytest.fixture(scope="module")
def market():
    """The simulated market, whole."""
    return load_market()


@dataclass
class Faults:
    """What goes wrong in a flight; times are opens."""
    missed: tuple[int, ...] = ()
    most: dict[str, int] = field(default_factory=dict)      # contracts by symbol
    by_hand: dict[int, str] = field(default_factory=dict)   # close what is held in a symbol after this bar
    stranger: dict[int, tuple[str, str, int]] = field(default_factory=dict)  # symbol, side, size
    halt: dict[int, bool] = field(default_factory=dict)     # flatten or not
    models: object = None
    limits: RiskLimits = LIMITS
    setup: dict = field(default_factory=dict)
    until: int = 2**62
    silent: tuple[int, ...] = ()


class Sometimes(LocalAdviser):
    """Models that do not answer on some bars."""
    quiet = False

    def regime(self, candles):
        if self.quiet:
            raise InputError("the detector is down")
        return super().regime(candles)


def flown(market, folder, faults):
    """The journal of one flight, every signal taken."""
    symbols = sorted(market.candles)
    with running(Setup(**SPAN, leverage=LIMITS.leverage, **faults.setup)) as exchange, httpx.Client(base_url=exchange.url, trust_env=False) as client:
        hands, ahead = board(exchange.url, symbols, folder)
        hands.state.rules = replace(hands.state.rules, max_size={**hands.state.rules.max_size, **faults.most})
        adviser = Sometimes(faults.models or load_models(MODELS))

        def catch_up():
            for ahead[0] in (0, 6):
                hands.handle(Tick())

        def window(symbol, opened):
            bars = market.candles[symbol]
            return bars[:int(np.searchsorted(bars.time, opened, "right"))][-250:]

        def funding(symbol, opened):
            times, rates = market.payments(symbol)
            return times[times <= opened], rates[times <= opened]

        flight = Flight(hands, adviser, [PRODUCTS[s] for s in symbols], faults.limits, catch_up, window, funding, gated=False)
        told = {"done": False}
        while not told["done"]:
            told, ahead[0] = client.post("/emulator/ack", json={}).json(), 0
            synchronise(hands.account, 1)
            opened = told["open"]
            adviser.quiet = opened in faults.silent
            if opened in faults.halt:
                hands.handle(Stop("kill switch: a test", faults.halt[opened]))
            if opened not in faults.missed:
                close_bar(flight, opened, 3600, told["last"])
            for symbol, side, size in ([(faults.by_hand[opened], "", 0)] if opened in faults.by_hand else []) + ([faults.stranger[opened]] if opened in faults.stranger else []):
                held = hands.state.books.held.get(symbol, 0)
                body = {"product_symbol": symbol, "size": size or abs(held), "side": side or ("sell" if held > 0 else "buy"), "order_type": "market_order"}
                assert "success" in str(hands.account.send("POST", "/v2/orders", body=body))
            if opened >= faults.until:
                break
        catch_up()
        read_on(flight.log, hands.entries)
        note_payments(flight, opened)
        hands.journal.close()
    return folder / "journal.db"


@pytest.fixture(scope="module")
def plain(market, tmp_path_factory):
    """A flight in which nothing goes wrong, explained."""
    return explain_journal(flown(market, tmp_path_factory.mktemp("plain"), Faults()), "", MODELS, policy="signals")


def explained(market, folder, **changes):
    """A flight with faults, explained; whatever the faults, the parts add up."""
    told = explain_journal(flown(market, folder, Faults(**changes)), "", MODELS, policy="signals")
    assert abs(sum(told.causes.values()) - (told.bot - told.backtest)) < 1e-6
    for row in told.rows:
        if row.bot or row.backtest:
            assert abs(sum(row.parts.values()) - ((row.bot.pnl if row.bot else 0) - (row.backtest.pnl if row.backtest else 0))) < 1e-6
    return told


def causes(told, at_least=1e-4):
    """The causes that matter."""
    return {cause: money for cause, money in told.causes.items() if abs(money) >= at_least}


def test_nothing_wrong_is_all_zeros(plain):
    """Exactly."""
    assert len(plain.rows) == 5 and plain.bot == plain.backtest != 0
    assert not any(plain.causes.values()) and not plain.differing and not plain.first and plain.compared == 2 * 24 * 3


@pytest.mark.slow
def test_a_journal_that_ends_in_mid_flight_is_all_zeros(market, tmp_path):
    """What is open is valued alike on both sides."""
    told = explained(market, tmp_path, until=1674097200)
    assert len(told.rows) == 3 and not causes(told, 1e-9) and not told.differing


def test_missed_bars(market, plain, tmp_path):
    """A trade the bot slept through, the bars around it too, is missed whole."""
    lost = next(row for row in plain.rows if row.decided == 1674180000)
    told = explained(market, tmp_path, missed=tuple(range(1674180000, 1674212400, 3600)))
    assert causes(told) == {"missed bar": pytest.approx(-lost.bot.pnl, abs=1e-6)} and set(told.differing) == {"missed bar"}
    assert told.first["BTCUSD"].bot is None and told.first["BTCUSD"].backtest["action"] == "enter"


@pytest.mark.slow
def test_models_that_do_not_answer(market, plain, tmp_path):
    """The bot was up, and blind: the bars count as missed."""
    told = explained(market, tmp_path, silent=tuple(range(1674180000, 1674212400, 3600)))
    assert set(causes(told)) == {"missed bar"} and "did not answer" in told.first["BTCUSD"].words


def test_refused_orders(market, plain, tmp_path):
    """Each has the reason that was written down."""
    told = explained(market, tmp_path, most={"BTCUSD": 1})
    refused = [row for row in told.rows if "refused order" in row.parts]
    assert len(refused) == 2 and all(row.symbol == "BTCUSD" and "the limit is 1" in row.words for row in refused)
    assert told.causes["refused order"] == pytest.approx(-sum(row.backtest.pnl for row in refused), abs=1e-9) and set(causes(told)) <= {"refused order", "size"}


@pytest.mark.parametrize("costs, wanted", [(Costs(slippage_bps=8), {"fill price at entry", "fill price at exit"}), (Costs(taker_fee=0.001), {"fees"})])
def test_other_costs(market, tmp_path, costs, wanted):
    """A first trade of the same size differs by this alone; later ones have another equity too."""
    told = explained(market, tmp_path, setup={"costs": costs})
    assert wanted <= set(causes(told)) <= wanted | {"size"}
    first = told.rows[0]
    assert first.bot.size == first.backtest.size and sum(first.parts.get(cause, 0.0) for cause in wanted) == pytest.approx(first.bot.pnl - first.backtest.pnl, abs=2e-5)
    if wanted == {"fees"}:
        assert told.causes["fees"] == pytest.approx(-sum(row.bot.fees / 2 for row in told.rows), abs=1e-4)


@pytest.mark.slow
def test_other_funding(market, tmp_path):
    """The exchange charges three times what the rates say."""
    from delta_go.market.store import write_candles, write_funding
    for symbol, bars in market.candles.items():
        write_candles(tmp_path / "data", bars)
        write_funding(tmp_path / "data", replace(market.funding[symbol], rate=market.funding[symbol].rate * 3))
    told = explained(market, tmp_path, setup={"data": str(tmp_path / "data")})
    assert {"funding"} <= set(causes(told)) <= {"funding", "size"}
    assert told.causes["funding"] == pytest.approx(-sum(row.bot.funding * 2 / 3 for row in told.rows), abs=1e-4)


def test_a_hand_that_closes(market, tmp_path):
    """Whoever sells our position from a phone is named, with what it cost."""
    told = explained(market, tmp_path, by_hand={1674097200: "BTCUSD"})
    row = next(row for row in told.rows if row.symbol == "BTCUSD" and row.decided == 1674090000)
    assert row.parts["manual action"] == pytest.approx(row.bot.pnl - row.backtest.pnl, abs=1e-4) and "somebody else" in row.words


@pytest.mark.slow
def test_a_stranger_on_the_account(market, tmp_path):
    """Somebody trades for himself; his profit is no trade of ours, and is in the sum."""
    told = explained(market, tmp_path, stranger={1674140400: ("BTCUSD", "buy", 10), 1674151200: ("BTCUSD", "sell", 10)})
    strays = [row for row in told.rows if row.bot is None and row.backtest is None]
    assert len(strays) == 1 and strays[0].parts.keys() == {"manual action"} and "2 fills" in strays[0].words
    assert told.causes["manual action"] == pytest.approx(strays[0].parts["manual action"])


@pytest.mark.parametrize("flatten", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_kill_switch(market, tmp_path, flatten):
    """What was not entered, and what was closed early, is the halt's."""
    told = explained(market, tmp_path, halt={1674097200: flatten})
    assert {"halt"} <= set(causes(told)) <= {"halt", "size"}
    assert any(row.bot and row.backtest and "halt" in row.parts for row in told.rows) == flatten


@pytest.mark.slow
def test_other_models(market, tmp_path):
    """Decided by another regime model, which the journal names."""
    loaded = load_models(MODELS)
    named = {**loaded.manifest.files, "hmm_model_BTCUSD.pkl": {**loaded.manifest.files["hmm_model_BTCUSD.pkl"], "sha256": "0" * 64}}
    other = replace(loaded, regimes={**loaded.regimes, "BTCUSD": replace(loaded.regimes["SOLUSD"], symbol="BTCUSD")}, manifest=replace(loaded.manifest, files=named))
    told = explained(market, tmp_path, models=other)
    assert {"model version"} <= set(causes(told)) <= {"model version", "size"}
    assert told.first["BTCUSD"].cause == "model version" and "000000000000" in told.first["BTCUSD"].words


@pytest.mark.slow
def test_another_size(market, tmp_path):
    """Half the risk is half the contracts, and nothing else."""
    told = explained(market, tmp_path, limits=replace(LIMITS, risk_per_trade=0.005))
    assert set(causes(told)) == {"size"} and set(told.differing) == {"size"}


def test_range_shows_its_own_trades(market, plain, tmp_path):
    """The trades whose entry was decided in it, and no others."""
    journal = flown(market, tmp_path, Faults())
    told = explain_journal(journal, "", MODELS, "2023-01-20", policy="signals")
    assert [row.decided for row in told.rows] == [row.decided for row in plain.rows if row.decided >= 1674169200] and told.compared < plain.compared
    for words, wrong in (("none between the dates", dict(start="2029-01-01", policy="signals")), ("explain it with signals", {}), ("policy", dict(policy="all"))):
        with pytest.raises(InputError, match=words):
            explain_journal(journal, "", MODELS, **wrong)
    from delta_go.market.store import write_candles
    for bars in market.candles.values():
        write_candles(tmp_path / "short", bars[:450])
    with pytest.raises(InputError, match="all until 2023-01-20 22:00"):
        explain_journal(journal, str(tmp_path / "short"), MODELS, policy="signals")


def test_journals_that_do_not_fit(tmp_path):
    """None, an empty one, and one of other symbols."""
    from delta_go.live.journal import open_journal
    from delta_go.trading.intents import Entry
    with pytest.raises(InputError, match="no file"):
        explain_journal(tmp_path / "journal.db", "", MODELS)
    journal, _ = open_journal(tmp_path / "journal.db", 0, "a test")
    with pytest.raises(InputError, match="expected decisions, got none"):
        explain_journal(tmp_path / "journal.db", "", MODELS)
    journal.append([Entry("decision", "DOGEUSD:0", {"symbol": "DOGEUSD", "time": 0, "present": True}), Entry("equity", "3600", {"time": 3600, "equity": 1.0, "breakers": {}})], 1)
    journal.close()
    with pytest.raises(InputError, match="got none for DOGEUSD"):
        explain_journal(tmp_path / "journal.db", "", MODELS)


def test_written_and_shown(plain, tmp_path):
    """JSON reads back; the tables hold the sum."""
    from rich.console import Console
    again = json.loads(write_explanation(plain, tmp_path / "deep" / "why.json").read_text())
    assert again["difference"] == 0.0 and set(again["causes"]) == set(CAUSES) and len(again["rows"]) == 5
    console = Console(width=120)
    with console.capture() as shown:
        console.print(show_explanation(plain))
    assert "difference" in shown.get() and "0 of 144 decisions differ" in shown.get()


amounts = st.floats(-500, 500).map(lambda value: round(value, 6))
trades = st.builds(lambda size, entry, leaving, hours, fees, funding, noise, reason: Trade(
    "BTCUSD", "buy", size, 3600, entry, 3600 * (2 + hours), leaving, reason, 1.0, 1e6, fees, funding, round((leaving - entry) * size * 0.001 - fees - funding + noise, 6), 0.0, "bull", 0.5, 0.5, ""),
    st.integers(1, 500), st.floats(1e4, 9e4), st.floats(1e4, 9e4), st.integers(0, 5), st.floats(0, 50).map(lambda v: round(v, 6)), amounts, amounts, st.sampled_from(["time", "stop_loss", "signal"]))


@settings(max_examples=150)
@given(st.none() | trades, st.none() | trades, st.integers(1, 500), st.booleans(), st.booleans())
def test_parts_add_up_whatever_happened(ours, theirs, wanted, refused, missed):
    """To a millionth of a dollar, also where a ledger contradicts its own prices."""
    from delta_go.live.explain import Case, Course, explain
    from delta_go.trading.backtest import Tape
    bars, key = np.arange(9) * 3600, ("BTCUSD", 0)
    tape = Tape((PRODUCTS["BTCUSD"],), 3600, bars, np.full((9, 1), True), {name: np.full((9, 1), 5e4) for name in ("open", "high", "low", "close")} | {"funding": np.full((9, 1), 1e-4)},
                {}, np.full(9, False), np.full((9, 1), False), ((),))
    row = {"action": "enter", "side": 1, "size": wanted, "stop": 1.0, "target": 1e6, "reason": "signal taken", "posterior": [1.0], "window": "w", "models": {}, "words": ""}
    bot = Course({} if missed and ours is None else {key: row}, {key: ours} if ours else {}, {key: "no margin"} if refused else {})
    told = explain(Case(bot, Course({key: {**row, "size": 10}}, {key: theirs} if theirs else {}), tape, Costs(), {}, lambda symbol, opened: "w"))
    assert sum(told.causes.values()) == pytest.approx(told.bot - told.backtest, abs=1e-6)
    assert told.bot == (ours.pnl if ours else 0.0) and told.backtest == (theirs.pnl if theirs else 0.0)
    assert len(told.rows) == len(pair_trades(bot.trades, {key: theirs} if theirs else {}))
