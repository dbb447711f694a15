"""One order, one rounding; files that read back equal and are never half written."""
import csv
import math
from dataclasses import astuple, replace

import pyarrow as arrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from delta_go.domain import EXIT_REASONS, LEDGER_COLUMNS, REGIMES, InputError, Trade
from delta_go.trading.ledger import read_ledger, settle, write_ledger


def trade(symbol="BTCUSD", entry=0, leave=3_600, pnl=1.0, **more):
    return replace(Trade(symbol, "buy", 10, entry, 60_000.0, leave, 60_100.0, "take_profit", 59_000.0, 60_100.0, 0.7, 0.0, pnl, 0.0, "bull", 0.7, 0.55, "pullback"), **more)


money = st.floats(-1e6, 1e6)
trades = st.lists(st.builds(
    Trade, st.sampled_from(["BTCUSD", "ETHUSD", "SOLUSD"]), st.sampled_from(["buy", "sell"]), st.integers(1, 200_000), st.integers(0, 10), st.floats(0.01, 1e6),
    st.integers(0, 10), st.floats(0.01, 1e6), st.sampled_from(EXIT_REASONS), st.floats(0.01, 1e6), st.floats(0.01, 1e6), money, money, money, st.just(0.0),
    st.sampled_from(REGIMES), st.floats(0, 1), st.one_of(st.floats(0, 1), st.just(math.nan)), st.sampled_from(["", "pullback", 'a "quoted", word', "nan", "Straße"])), max_size=12)


def same(ours, theirs):
    return [[x for x in astuple(t) if x == x] for t in ours] == [[x for x in astuple(t) if x == x] for t in theirs]


@settings(max_examples=60)
@given(trades, st.floats(0, 1e6))
def test_a_ledger_is_sorted_rounded_and_adds_up(rows, start):
    ledger = settle(rows, start)
    assert [(t.exit_time, t.entry_time, t.symbol) for t in ledger] == sorted((t.exit_time, t.entry_time, t.symbol) for t in rows)
    equity = start
    for row in ledger:
        equity += row.pnl
        assert row.equity_after == pytest.approx(equity, abs=1e-5)
        for name in ("entry_price", "exit_price", "stop_price", "target_price", "fees", "funding", "pnl", "equity_after"):
            value = getattr(row, name)
            assert value == round(value, 6) and math.copysign(1, value) == 1 or value != 0


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@settings(max_examples=40)
@given(rows=trades)
def test_files_read_back_equal(tmp_path_factory, ending, rows):
    path = tmp_path_factory.mktemp("ledger") / f"ledger{ending}"
    ledger = settle(rows, 10_000.0)
    assert same(read_ledger(write_ledger(ledger, path)), ledger)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_equity_is_what_a_spreadsheet_would_add_up():
    ledger = settle([trade(leave=7_200, pnl=5.0000004), trade("ETHUSD", leave=3_600, pnl=-3.25), trade("BTCUSD", leave=3_600, pnl=1.0)], 10_000.0)
    assert [(t.symbol, t.pnl, t.equity_after) for t in ledger] == [("BTCUSD", 1.0, 10_001.0), ("ETHUSD", -3.25, 9_997.75), ("BTCUSD", 5.0, 10_002.75)]


def test_the_file_has_the_columns_of_the_contract_in_order(tmp_path):
    path = write_ledger(settle([trade(probability=math.nan)], 10_000.0), tmp_path / "deep" / "down" / "ledger.csv")
    header, row = list(csv.reader(path.open()))
    assert header == ["symbol", "side", "size", "entry_time", "entry_price", "exit_time", "exit_price", "exit_reason", "stop_price", "target_price", "fees", "funding", "pnl",
                      "equity_after", "regime", "regime_confidence", "probability", "reason"] == list(LEDGER_COLUMNS)
    assert row[2] == "10" and row[16] == "" and b"\r" not in path.read_bytes()


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_an_empty_ledger_is_a_ledger(tmp_path, ending):
    path = write_ledger([], tmp_path / f"ledger{ending}")
    assert read_ledger(path) == []
    if ending == ".parquet":
        schema = parquet.read_schema(path)
        assert [str(schema.field(name).type) for name in ("symbol", "size", "pnl", "reason")] == ["string", "int64", "double", "string"]


def text_of(tmp_path):
    return write_ledger(settle([trade(), trade("ETHUSD")], 10_000.0), tmp_path / "good.csv").read_text()


@pytest.mark.parametrize("spoil, words", [
    (lambda text: "a,b\n1,2\n", "columns missing: symbol, side"),
    (lambda text: "a,b\n", "columns missing: symbol, side"),
    (lambda text: "", "columns missing: symbol"),
    (lambda text: text.replace("ETHUSD,buy,10,", "ETHUSD,buy,ten,"), "row 2: size: expected int, got 'ten'"),
    (lambda text: text.replace("BTCUSD,buy,10,", "BTCUSD,buy,,"), "row 1: size: expected int, got ''"),
    (lambda text: text.replace("60000.0", "sixty", 1), "row 1: entry_price: expected float, got 'sixty'"),
    (lambda text: text.rsplit(",", 2)[0] + "\n", "row 2: reason: expected str, got None"),
])
def test_what_is_no_ledger_is_named(tmp_path, spoil, words):
    path = tmp_path / "bad.csv"
    path.write_text(spoil(text_of(tmp_path)))
    with pytest.raises(InputError, match=words) as caught:
        read_ledger(path)
    assert "bad.csv" in str(caught.value)


def test_wrong_names_and_missing_files(tmp_path):
    with pytest.raises(InputError, match="ends in .csv or .parquet, got 'ledger.txt'"):
        write_ledger([], tmp_path / "ledger.txt")
    with pytest.raises(InputError, match="no file"):
        read_ledger(tmp_path / "nothing.csv")
    parquet.write_table(arrow.table({"symbol": ["BTCUSD"]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="columns missing: side"):
        read_ledger(tmp_path / "other.parquet")


def test_a_failing_write_leaves_the_old_ledger(tmp_path):
    path = write_ledger(settle([trade()], 10_000.0), tmp_path / "ledger.parquet")
    with pytest.raises(Exception):  # noqa: B017  (whatever pyarrow raises)
        write_ledger([trade(size="ten")], path)
    assert len(read_ledger(path)) == 1
