"Files that are whole or not there: kills, damage, overlaps, and what a folder says of itself."
import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go.market import store
from delta_go.market.candles import COLUMNS, Candles, columns_of, repair_candles
from delta_go.market.store import (
    Funding,
    Merge,
    any_bad,
    append_candles,
    append_funding,
    available,
    candle_path,
    check_funding,
    fingerprint,
    funding_path,
    health_cells,
    health_table,
    import_csv,
    merge_candles,
    read_candles,
    read_funding,
    write_candles,
    write_funding,
)

STEP = 3600
START = 1_700_000_000 // STEP * STEP


def make_candles(rows=300, symbol="BTCUSD", step=STEP, seed=0):
    "A walk of which a longer one begins like a shorter one."
    noise = np.random.default_rng(seed).normal(size=(rows, 2))
    close = (1000 * np.exp(np.cumsum(noise[:, 0] * .004))).round(2)
    opened = np.append(1000.0, close[:-1])
    return Candles(symbol, step, START + step * np.arange(rows), opened, np.maximum(opened, close) + 1,
                   np.minimum(opened, close) - 1, close, np.ceil(abs(noise[:, 1]) * 100))


def same(left, right):
    return (left.symbol, left.step) == (right.symbol, right.step) and all(np.array_equal(getattr(left, n), getattr(right, n)) for n in COLUMNS)


BARS = make_candles()


def test_written_candles_come_back_with_the_contract_types(tmp_path):
    path = write_candles(tmp_path / "new" / "folder", BARS)
    assert same(read_candles(path.parent, "BTCUSD", "1h"), BARS)
    schema = pq.read_schema(path)
    assert path.name == "BTCUSD_1h.parquet" and schema.names == list(COLUMNS)
    assert schema.field("time").type == pa.int64() and all(schema.field(n).type == pa.float64() for n in COLUMNS[1:])
    assert os.listdir(path.parent) == ["BTCUSD_1h.parquet"]


def test_ranges_are_half_open(tmp_path):
    write_candles(tmp_path, BARS)
    part = read_candles(tmp_path, "BTCUSD", "1h", int(BARS.time[3]), int(BARS.time[9]))
    assert part.time.tolist() == BARS.time[3:9].tolist()
    with pytest.raises(InputError, match="the file spans 2023-11-14 22:00 to"):
        read_candles(tmp_path, "BTCUSD", "1h", end=0)


def test_a_missing_series_is_answered_with_what_there_is(tmp_path):
    with pytest.raises(InputError, match="there is none"):
        read_candles(tmp_path / "nowhere", "BTCUSD", "1h")
    for ask in (lambda: read_candles(tmp_path, "BTCUSD", "1h"), lambda: health_table(tmp_path)):
        with pytest.raises(InputError, match="it holds no candle files"):
            ask()
    write_candles(tmp_path, BARS)
    write_candles(tmp_path, make_candles(symbol="ETHUSD", step=300))
    assert available(tmp_path) == [("BTCUSD", "1h"), ("ETHUSD", "5m")]
    with pytest.raises(InputError, match="no candles of XRPUSD at 1h; it holds BTCUSD 1h; ETHUSD 5m"):
        read_candles(tmp_path, "XRPUSD", "1h")
    with pytest.raises(InputError, match="expected one of 1m, 3m"):
        read_candles(tmp_path, "BTCUSD", "60m")
    with pytest.raises(InputError, match="expected letters and digits"):
        write_candles(tmp_path, make_candles(symbol="../escape"))


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:-20], lambda raw: raw[:len(raw) // 2], lambda raw: b"", lambda raw: b"not parquet at all",
    lambda raw: raw[:100] + bytes(200) + raw[300:],
])
def test_damaged_files_are_one_clear_line(tmp_path, damage):
    path = write_candles(tmp_path, BARS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError) as caught:
        read_candles(tmp_path, "BTCUSD", "1h")
    assert "\n" not in str(caught.value) and "BTCUSD" in str(caught.value)
    assert any_bad(health_table(tmp_path))
    with pytest.raises(InputError):
        append_candles(tmp_path, BARS, now=1e10)


def test_bad_candles_are_not_written(tmp_path):
    write_candles(tmp_path, BARS)
    bad = replace(BARS, high=np.where(np.arange(300) == 7, np.nan, BARS.high))
    for write in (lambda: write_candles(tmp_path, bad), lambda: append_candles(tmp_path, bad, now=1e10),
                  lambda: write_candles(tmp_path, BARS, now=BARS.time[-1]), lambda: write_candles(tmp_path, BARS[:0])):
        with pytest.raises(InputError):
            write()
    assert same(read_candles(tmp_path, "BTCUSD", "1h"), BARS) and len(os.listdir(tmp_path)) == 1


def test_gaps_are_stored_and_refused_on_request(tmp_path):
    write_candles(tmp_path, BARS[np.r_[0:100, 110:300]])
    assert len(read_candles(tmp_path, "BTCUSD", "1h")) == 290
    with pytest.raises(InputError, match="10 bars missing before row 100"):
        read_candles(tmp_path, "BTCUSD", "1h", allow_gaps=False)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 59), st.integers(1, 20)), min_size=1, max_size=6))
def test_merging_pages_in_any_order_is_a_union(pages):
    bars = make_candles(80)
    have = bars[:0]
    for first, length in pages:
        page = bars[first:first + length]
        before = set(have.time.tolist())
        have, merge = merge_candles(have, page)
        assert merge == Merge(len(set(page.time.tolist()) - before), (), 0, len(have))
    rows = sorted({row for first, length in pages for row in range(first, first + length)})
    assert same(have, bars[np.array(rows)])


def test_the_new_bar_wins_and_is_reported(tmp_path):
    append_candles(tmp_path, BARS[:200], now=1e10)
    fixed = BARS[190:210]
    fixed = replace(fixed, volume=fixed.volume + np.where(np.arange(20) == 3, 5, 0))
    assert append_candles(tmp_path, fixed, now=1e10) == Merge(10, (int(BARS.time[193]),), 0, 210)
    assert read_candles(tmp_path, "BTCUSD", "1h").volume[193] == BARS.volume[193] + 5


def test_only_closed_bars_are_kept(tmp_path):
    assert append_candles(tmp_path, BARS, now=BARS.time[0]) == Merge(0, (), 300, 0)
    assert os.listdir(tmp_path) == []
    assert append_candles(tmp_path, BARS, now=BARS.time[-1] + STEP - .001) == Merge(299, (), 1, 299)
    assert append_candles(tmp_path, BARS[299:], now=BARS.time[-1] + STEP).rows == 300
    stamp = candle_path(tmp_path, "BTCUSD", "1h").stat().st_ino
    assert append_candles(tmp_path, BARS, now=1e10) == Merge(0, (), 0, 300)
    assert candle_path(tmp_path, "BTCUSD", "1h").stat().st_ino == stamp, "nothing new, nothing written"


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    write_candles(tmp_path, BARS[:100])
    monkeypatch.setattr(store.os, call, lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="No space left on device"):
        append_candles(tmp_path, BARS, now=1e10)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["BTCUSD_1h.parquet"] and len(read_candles(tmp_path, "BTCUSD", "1h")) == 100


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(InputError, match="expected a folder to write to"):
        write_candles(tmp_path / "data", BARS)


def test_writers_take_turns(tmp_path):
    pages = [BARS[first:first + 30] for first in range(0, 300, 30)]
    threads = [threading.Thread(target=append_candles, args=(tmp_path, page, 1e10)) for page in pages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(read_candles(tmp_path, "BTCUSD", "1h"), BARS)


KILLER = """
import os, random, signal, sys, time
import numpy as np
import pyarrow.parquet
from delta_go.market.candles import Candles
from delta_go.market.store import append_candles, available, read_candles

folder, rounds, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ROWS = 1000

def append_forever(pipe):
    first = len(read_candles(folder, "BTCUSD", "1m")) if available(folder) else 0
    while True:
        stamps = np.arange(first, first + ROWS) * 60
        price = 100.0 + stamps % 7
        first = append_candles(folder, Candles("BTCUSD", 60, stamps, price, price, price, price, price), now=1e10).rows
        os.write(pipe, b"%d\\n" % first)

def look(acknowledged):
    candles = read_candles(folder, "BTCUSD", "1m", allow_gaps=False)
    assert len(candles) >= acknowledged, "an acknowledged row is lost"
    assert np.array_equal(candles.close, 100.0 + candles.time % 7)
    assert [name for name in os.listdir(folder) if not name.startswith(".")] == ["BTCUSD_1m.parquet"]

def forked(work, *arguments):
    child = os.fork()
    if child: return child
    try:
        work(*arguments)
        os._exit(0)
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(1)

chance, acknowledged = random.Random(seed), 0
for _ in range(rounds):
    reader, writer = os.pipe()
    child = forked(append_forever, writer)
    os.close(writer)
    said = os.read(reader, 65536)
    time.sleep(chance.random() * .06)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 65536): said += more
    os.close(reader)
    acknowledged = int(said.split()[-1])
    assert os.waitpid(forked(look, acknowledged), 0)[1] == 0
print(acknowledged)
"""


def kill_while_appending(folder, rounds, seed=1):
    "A process that appends is killed at a random moment, the file is looked at, and another goes on; rows in the end."
    run = subprocess.run([sys.executable, "-c", KILLER, str(folder), str(rounds), str(seed)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_a_kill_in_the_middle_loses_nothing(tmp_path):
    assert kill_while_appending(tmp_path, rounds=15) >= 15 * 1000
    (tmp_path / ".BTCUSD_1m.parquet.x.tmp").write_bytes(b"half")
    append_candles(tmp_path, make_candles(10), now=1e10)
    assert not [path for path in os.listdir(tmp_path) if path.startswith(".")], "leftovers are swept"


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(tmp_path):
    kill_while_appending(tmp_path, rounds=100, seed=2)


RATES = Funding("BTCUSD", 1_700_006_400 + 28_800 * np.arange(20), np.linspace(-1, 1, 20) * 3e-4)


def test_funding_goes_there_and_back(tmp_path):
    assert len(read_funding(tmp_path, "BTCUSD")) == 0
    write_funding(tmp_path, RATES)
    again = read_funding(tmp_path, "BTCUSD")
    assert np.array_equal(again.time, RATES.time) and np.array_equal(again.rate, RATES.rate)
    assert pq.read_schema(funding_path(tmp_path, "BTCUSD")).names == ["time", "rate"]
    assert read_funding(tmp_path, "BTCUSD", int(RATES.time[2]), int(RATES.time[5])).time.tolist() == RATES.time[2:5].tolist()
    assert append_funding(tmp_path, Funding("BTCUSD", RATES.time[15:] + 28_800, RATES.rate[15:])) == 1
    assert len(read_funding(tmp_path, "BTCUSD")) == 21
    assert append_funding(tmp_path, Funding("ETHUSD", RATES.time[:0], RATES.rate[:0])) == 0


@pytest.mark.parametrize("bad, words", [
    (replace(RATES, rate=RATES.rate * 100), "percent must be divided by 100"),
    (replace(RATES, rate=np.where(np.arange(20) == 4, np.nan, RATES.rate)), "row 4 is not"),
    (replace(RATES, time=RATES.time[::-1]), "row 1 does not"),
    (replace(RATES, rate=RATES.rate[:5]), "different lengths"),
])
def test_unusable_funding_is_refused(tmp_path, bad, words):
    for refuse in (check_funding, lambda funding: write_funding(tmp_path, funding)):
        with pytest.raises(InputError, match=words):
            refuse(bad)
    assert os.listdir(tmp_path) == []


def test_funding_files_with_other_columns_are_refused(tmp_path):
    pq.write_table(pa.table({"time": [1], "funding": [0.0]}), funding_path(tmp_path, "BTCUSD"))
    with pytest.raises(InputError, match="missing rate, found time, funding"):
        read_funding(tmp_path, "BTCUSD")


def test_csv_in_many_forms(tmp_path):
    sheet = tmp_path / "x.csv"
    rows = [f"{t},{o},{h},{low},{c},{v}" for t, o, h, low, c, v in zip(*columns_of(BARS).values())]
    sheet.write_text("\n".join(["time,open,high,low,close,volume", *rows]))
    assert same(import_csv(sheet, "BTCUSD", "1h"), BARS)
    dated = [f"{np.datetime64(int(t), 's')}Z,{o},{h},{low},{c},{v},note" for t, o, h, low, c, v in zip(*columns_of(BARS).values())]
    sheet.write_text("\n".join([" Time ,OPEN,High,low,close,Volume,remark", *dated]))
    assert same(import_csv(sheet, "BTCUSD", "1h"), BARS)
    sheet.write_text("\n".join(["time,open,high,low,close,volume", *reversed(rows), rows[3]]))
    mended, done = repair_candles(import_csv(sheet, "BTCUSD", "1h"))
    assert same(mended, BARS) and len(done) == 2


@pytest.mark.parametrize("text, words", [
    ("", "cannot be read as CSV"),
    ("time,open,high,low,close,volume\n", "empty table"),
    ("time;open;high;low;close;volume\n1;2;3;4;5;6\n", "missing time"),
    ("time,open,high,low,close,volume\n3600,1,2,3\n", "cannot be read as CSV"),
    ("time,open,high,low,close,volume\n3600,1,2,0.5,x,1\n", "expected numbers in close, got 'x'"),
])
def test_csv_mistakes_are_named(tmp_path, text, words):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        import_csv(tmp_path / "x.csv", "BTCUSD", "1h")
    with pytest.raises(InputError, match="there is none"):
        import_csv(tmp_path / "y.csv", "BTCUSD", "1h")


def test_health_sees_every_file(tmp_path):
    quiet = replace(BARS, volume=np.where(np.arange(300) < 4, 0, BARS.volume))
    write_candles(tmp_path, quiet[np.r_[0:100, 110:300]])
    write_candles(tmp_path, make_candles(symbol="ETHUSD"))
    write_funding(tmp_path, Funding("ETHUSD", RATES.time[[0, 1, 5]], RATES.rate[[0, 1, 5]]))
    (tmp_path / "notes.parquet").write_bytes(b"ignored")
    rows = health_table(tmp_path)
    assert [(row.file, row.rows, row.missing, row.zero_volume, row.problems) for row in rows] == [
        ("BTCUSD_1h.parquet", 290, 10, 4, ()), ("ETHUSD_1h.parquet", 300, 0, 0, ()), ("ETHUSD_funding.parquet", 3, 3, 0, ())]
    assert not any_bad(rows) and any_bad(rows, strict=True)
    assert any_bad(health_table(tmp_path, now=float(BARS.time[-1])))
    bad = columns_of(make_candles(symbol="SOLUSD")) | {"low": BARS.high + 1}
    pq.write_table(pa.table(bad), candle_path(tmp_path, "SOLUSD", "1h"))
    pq.write_table(pa.table({"time": [1, 1], "rate": [0.0, 0.0]}), funding_path(tmp_path, "SOLUSD"))
    rows = {row.file: row for row in health_table(tmp_path)}
    assert rows["SOLUSD_1h.parquet"].problems and rows["SOLUSD_funding.parquet"].problems and len(rows) == 5
    assert health_cells(rows["BTCUSD_1h.parquet"])[-1] == "gaps" and health_cells(rows["ETHUSD_1h.parquet"])[-1] == "good"


def test_the_fingerprint_is_of_numbers_not_of_files(tmp_path):
    path = write_candles(tmp_path, BARS)
    pq.write_table(pq.read_table(path), path, compression="gzip")
    assert fingerprint(read_candles(tmp_path, "BTCUSD", "1h")) == fingerprint(BARS)
    assert len({fingerprint(c) for c in (BARS, BARS[1:], replace(BARS, symbol="ETHUSD"), replace(BARS, step=60), replace(BARS, close=BARS.close + 1e-9))}) == 5


def test_reading_and_writing_do_not_import_pandas(tmp_path):
    write_candles(tmp_path, BARS)
    code = ("import sys; from delta_go.market.store import read_candles, write_candles; "
            f"write_candles({str(tmp_path)!r}, read_candles({str(tmp_path)!r}, 'BTCUSD', '1h')); print('pandas' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_the_types_do_not_import_pyarrow():
    code = "import sys, delta_go.market.store; print(sorted({'pandas', 'pyarrow', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
