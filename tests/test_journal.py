"""The journal survives what kills its writer, and notices what changes its rows."""
from __future__ import annotations

import json
import multiprocessing
import random
import sqlite3
import time
from contextlib import closing, suppress
from dataclasses import replace
from decimal import Decimal
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError, StopTrading
from delta_go.live import journal as room
from delta_go.live.journal import (
    START,
    Entry,
    chain,
    check_chain,
    entry_of,
    export_journal,
    open_journal,
    order_name,
    read_journal,
    read_order_name,
    verify,
)

bodies = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=8) | st.floats(allow_nan=False, allow_infinity=False)
                         | st.booleans() | st.none() | st.lists(st.integers(), max_size=3), max_size=4)


def fill(number: int) -> Entry:
    return Entry("fill", f"f-{number}", {"size": number, "price": Decimal("60000.5")})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bot.sqlite"


@pytest.fixture
def memory_path():
    """A folder in memory where there is one: a killed process loses nothing that only power would lose, and slow disks stay out of it."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def write_until_killed(path: str, pipe: Connection, start: int) -> None:
    """A writer that acknowledges each row after its commit."""
    journal, rows = open_journal(Path(path), 1, "writer")
    number = start
    while True:
        journal.append([fill(number), Entry("outcome", f"{number}", {"note": "x" * (number % 700)})], number)
        pipe.send_bytes(number.to_bytes(4, "big"))
        number += 1


def kill_writers(folder: Path, kills: int, seed: int) -> tuple[int, int]:
    """Kill writers at random moments; acknowledged rows, and how many of them were lost."""
    context, chance, acknowledged, lost = multiprocessing.get_context("fork"), random.Random(seed), 0, 0
    path, number = folder / "0.sqlite", 0
    for kill in range(kills):
        if kill % 8 == 0:
            path, number = folder / f"{kill}.sqlite", 0
        out, into = context.Pipe(duplex=False)
        writer = context.Process(target=write_until_killed, args=(str(path), into, number), daemon=True)
        writer.start()
        into.close()
        if chance.random() < 0.8:
            out.poll(20)  # it has begun
        time.sleep(chance.random() * 0.008)
        writer.kill()
        writer.join()
        tail = b""
        with suppress(EOFError, OSError):
            while True:
                tail = out.recv_bytes()
        out.close()
        rows = read_journal(path) if path.exists() else []
        fills = [row for row in rows if row.kind == "fill"]
        if tail:
            last = int.from_bytes(tail, "big")
            acknowledged += last + 1 - number
            lost += sum(f"f-{n}" not in {row.key for row in fills} for n in range(number, last + 1))
        assert [row.key for row in fills] == [f"f-{n}" for n in range(len(fills))]
        assert sum(row.kind == "outcome" for row in rows) == len(fills)
        number = len(fills)
    return acknowledged, lost


def test_a_hundred_kills(memory_path):
    acknowledged, lost = kill_writers(memory_path, 100, 1)
    assert acknowledged > 300 and lost == 0


@pytest.mark.slow
def test_two_thousand_kills(tmp_path):
    acknowledged, lost = kill_writers(tmp_path, 2_000, 2)
    assert acknowledged > 10_000 and lost == 0


def hold(path: str, ready) -> None:
    open_journal(Path(path), 1, "holder")
    ready.set()
    time.sleep(60)


def test_a_second_process_is_refused_until_the_first_is_killed(path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(str(path), ready), daemon=True)
    holder.start()
    assert ready.wait(20)
    with pytest.raises(StopTrading, match="another process writes bot"):
        open_journal(path, 2, "second")
    assert [row.kind for row in read_journal(path)] == ["lease"]
    holder.kill()
    holder.join()
    journal, rows = open_journal(path, 3, "second")
    assert journal.epoch == 2 and [row.epoch for row in rows] == [1, 2]
    journal.close()


def test_an_overtaken_writer_cannot_write(path):
    journal, _ = open_journal(path, 1, "old")
    (path.parent / "bot.lock").rename(path.parent / "elsewhere")  # a lock that does not hold, as on a careless volume
    newer, _ = open_journal(path, 2, "new")
    with pytest.raises(StopTrading):
        journal.append([fill(1)], 3)
    with pytest.raises(StopTrading, match="could not be written"):
        journal.append([fill(2)], 4)
    newer.append([fill(1)], 5)
    assert [row.epoch for row in read_journal(path)] == [1, 2, 2]


def test_a_full_disk_keeps_what_was_acknowledged(path, monkeypatch):
    journal, _ = open_journal(path, 1, "writer")
    journal._database.execute("PRAGMA max_page_count = 12")
    number = 0
    with pytest.raises(StopTrading, match="the disk is full"):
        for number in range(10_000):
            journal.append([Entry("equity", f"{number}", {"note": "x" * 300})], number)
    assert journal.full and verify(path) == journal.sequence == number + 1
    with pytest.raises(StopTrading, match="only rows that close positions"):
        journal.append([fill(1)], 1)

    def free(_path):
        journal._database.execute("PRAGMA max_page_count = 1000")
        return True

    monkeypatch.setattr(room, "_free_reserve", free)
    journal.append([fill(1)], 1, last_resort=True)
    assert read_journal(path)[-1].key == "f-1"
    with pytest.raises(StopTrading):
        journal.append([fill(2)], 1)
    journal.close()
    journal, rows = open_journal(path, 2, "after making room")
    assert not journal.full and rows[-2].key == "f-1"


def test_the_reserve_is_given_back_once_and_kept_again(path):
    journal, _ = open_journal(path, 1, "writer")
    reserve = path.with_suffix(".reserve")
    assert reserve.stat().st_size == room.RESERVE
    assert room._free_reserve(path) and not reserve.exists() and not room._free_reserve(path)
    journal.close()
    open_journal(path, 2, "again")[0].close()
    assert reserve.stat().st_size == room.RESERVE


def test_a_broken_disk_latches(path):
    journal, _ = open_journal(path, 1, "writer")
    journal._database.close()
    for _ in range(2):
        with pytest.raises(StopTrading, match="could not be written"):
            journal.append([fill(1)], 1, last_resort=True)


def test_half_a_step_is_never_written(path):
    journal, _ = open_journal(path, 1, "writer")
    journal.append([fill(1)], 1)
    with pytest.raises(StopTrading):
        journal.append([fill(2), fill(1)], 2)
    journal.close()
    assert [row.key for row in open_journal(path, 3, "again")[1]] == ["1", "f-1", "2"]


@pytest.mark.parametrize("harm", [
    "UPDATE journal SET body = '{}' WHERE sequence = 3", "UPDATE journal SET time_us = 9 WHERE sequence = 3", "DELETE FROM journal WHERE sequence = 3",
    "DELETE FROM journal WHERE sequence = 6", "DELETE FROM journal", "UPDATE journal SET epoch = 5 WHERE sequence = 6",
    "UPDATE journal SET sequence = 60 WHERE sequence = 6", "UPDATE lease SET sequence = 5", "DELETE FROM lease",
    "UPDATE journal SET body = 'no json' WHERE sequence = 2", "UPDATE journal SET hash = hash || '0' WHERE sequence = 4", "DROP TABLE lease",
])
def test_a_harmed_file_is_refused(path, harm):
    journal, _ = open_journal(path, 1, "writer")
    journal.append([fill(number) for number in range(5)], 1)
    journal.close()
    with closing(sqlite3.connect(path)) as database:
        database.executescript(f"DROP TRIGGER no_update; DROP TRIGGER no_delete; {harm}")
    with pytest.raises(StopTrading):
        verify(path)
    with pytest.raises(StopTrading):
        open_journal(path, 2, "again")


def test_the_file_refuses_change_and_removal(path):
    open_journal(path, 1, "writer")[0].close()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for change in ("UPDATE journal SET body = '{}'", "DELETE FROM journal"):
            with pytest.raises(sqlite3.IntegrityError, match="only grows"):
                database.execute(change)


def test_a_file_that_was_only_just_made_is_empty(path):
    path.touch()
    assert verify(path) == 0
    assert [row.kind for row in open_journal(path, 1, "writer")[1]] == ["lease"]


def test_a_lease_without_its_first_row_is_a_beginning(path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(room.Journal, "append", die)
        with pytest.raises(Killed):
            open_journal(path, 1, "writer")
    assert verify(path) == 0
    assert [row.kind for row in open_journal(path, 2, "writer")[1]] == ["lease"]


def test_not_a_journal(tmp_path):
    path = tmp_path / "bot.sqlite"
    path.write_bytes(b"something else entirely" * 500)
    for use in (verify, lambda p: open_journal(p, 1, "writer")):
        with pytest.raises(StopTrading):
            use(path)
    with pytest.raises(InputError, match="no file"):
        verify(tmp_path / "missing.sqlite")


def test_secrets_and_odd_values_are_refused(path):
    journal, _ = open_journal(path, 1, "writer", secrets=("s3cret", ""))
    for entry in (Entry("fill", "s3cret", {}), Entry("fill", "1", {"note": "my s3cret"})):
        with pytest.raises(InputError, match="holds a secret"):
            journal.append([entry], 1)
    for value in (float("nan"), float("inf"), object(), b"bytes"):
        with pytest.raises(InputError):
            journal.append([Entry("fill", "1", {"value": value})], 1)
    journal.append([fill(1)], 1)
    assert verify(path) == 2


def test_export_is_the_journal(path, tmp_path):
    journal, _ = open_journal(path, 1, "writer")
    journal.append([fill(1), Entry("decision", "BTCUSD:5", {"action": "skip", "models": {"m": "1"}}), Entry("equity", "5", {"equity": 1e4})], 7)
    assert export_journal(path, tmp_path / "out.jsonl") == 4
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["hash"] for line in lines] == [row.hash for row in read_journal(path)]
    assert [line["body"] for line in lines[1:]] == [{"price": "60000.5", "size": 1}, {"action": "skip", "models": {"m": "1"}}, {"equity": 1e4}]
    assert [row.sequence for row in read_journal(path, after=2)] == [3, 4]


@settings(max_examples=60)
@given(st.lists(bodies, min_size=1, max_size=5), st.data())
def test_any_change_of_any_row_is_found(contents, data):
    rows, before = [], START
    for number, body in enumerate(contents, 1):
        rows.append(chain(before, number, 1, number, Entry("fill", str(number), body)))
        before = rows[-1].hash
    assert list(check_chain(rows)) == rows
    assert [json.loads(row.body) for row in rows] == [dict(entry_of(row).body) for row in rows]
    place = data.draw(st.integers(0, len(rows) - 1))
    name, value = data.draw(st.sampled_from([("time_us", -1), ("kind", "halt"), ("key", "?"), ("body", "[1]"), ("hash", START), ("sequence", 99), ("epoch", 2)]))
    harmed = [replace(rows[place], **{name: value})]
    with pytest.raises(StopTrading):
        list(check_chain(rows[:place] + harmed + rows[place + 1:]))


@given(st.integers(0, 2**40 - 1), st.integers(0, 2**24 - 1), st.sampled_from(["dg-", "d", "my_bot-2"]))
def test_names_read_back_and_fit(number, epoch, prefix):
    name = order_name(prefix, number, epoch)
    assert len(name) <= 32 and read_order_name(prefix, name) == (number, epoch)
    assert read_order_name("other-", name) is None


@given(st.integers(0, 2**40 - 1), st.integers(0, 15), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
def test_a_mistyped_name_is_not_ours(number, place, letter):
    name = order_name("dg-", number, 3)
    typed = name[:3 + place] + letter + name[4 + place:]
    assert typed == name or read_order_name("dg-", typed) is None


def test_names_that_nobody_could_mean():
    assert [read_order_name("dg-", name) for name in (None, "", "dg-", "dg-" + "!" * 16, "dg-" + "a" * 15, "dg-" + "é" * 16, "dg-" + "ß" * 16)] == [None] * 7
    for prefix in ("", "a" * 17, "my bot"):
        with pytest.raises(InputError, match="prefix"):
            order_name(prefix, 1, 1)
