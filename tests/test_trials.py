"""The trial ledger: a chain that notices, and writers that survive."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go.evidence import trials
from delta_go.evidence.metrics import Moments


def trial(number, family="idea", **rest):
    return trials.make_trial(family, {"number": number} | rest, "data", (0, 86_400 * 365), Moments(365, number / 1_000, 0.1, 3.5), 1)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "trials.jsonl"
    trials.record_trials(path, [trial(number) for number in range(6)])
    return path


def test_a_ledger_that_never_was_is_empty(tmp_path):
    assert trials.read_trials(tmp_path / "trials.jsonl") == ()


def test_what_was_recorded_is_read_in_order(book):
    assert [row.config["number"] for row in trials.read_trials(book)] == list(range(6))
    assert trials.read_trials(book)[2] == trial(2)


def test_a_rerun_adds_nothing_and_a_changed_result_counts(book):
    before = book.read_bytes()
    assert trials.record_trials(book, [trial(number) for number in range(6)] * 2) == 0 and book.read_bytes() == before
    changed = trials.make_trial("idea", {"number": 0}, "data", (0, 86_400 * 365), Moments(365, 0.2, 0.1, 3.5), 1)
    assert trials.record_trial(book, changed) and trials.count_trials(trials.read_trials(book), "idea").trials == 7


def test_duplicates_within_one_write_are_one_trial(tmp_path):
    assert trials.record_trials(tmp_path / "t.jsonl", [trial(1), trial(1), trial(2)]) == 2


def test_families_are_counted_apart(book):
    trials.record_trial(book, trial(9, family="other"))
    count = trials.count_trials(trials.read_trials(book), "idea")
    assert count.trials == 6 and np.isclose(count.variance, np.var(np.arange(6) / 1_000, ddof=1))
    assert trials.count_trials(trials.read_trials(book), "other") == trials.TrialCount(1, 0.0)


@settings(max_examples=40)
@given(st.data())
def test_any_change_to_the_lines_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("book") / "trials.jsonl"
    trials.record_trials(path, [trial(number) for number in range(6)])
    lines = path.read_text().splitlines(keepends=True)
    kind, row = data.draw(st.sampled_from(["remove", "swap", "edit", "double", "cut"])), data.draw(st.integers(0, 5))
    if kind == "remove":
        lines.pop(row)
    elif kind == "swap":
        other = (row + data.draw(st.integers(1, 5))) % 6
        lines[row], lines[other] = lines[other], lines[row]
    elif kind == "edit":
        place = data.draw(st.integers(0, len(lines[row]) - 2))
        lines[row] = lines[row][:place] + ("8" if lines[row][place] == "7" else "7") + lines[row][place + 1 :]
    elif kind == "double":
        lines.insert(row, lines[row])
    else:
        lines = lines[:row]
    path.write_text("".join(lines))
    for act in (lambda: trials.read_trials(path), lambda: trials.record_trial(path, trial(99))):
        with pytest.raises(InputError, match="version control"):
            act()
    assert path.read_text() == "".join(lines)


def test_a_lost_ledger_or_head_is_noticed(book):
    kept = book.read_bytes()
    book.unlink()
    with pytest.raises(InputError, match="at least the 6 lines"):
        trials.read_trials(book)
    with pytest.raises(InputError, match="at least the 6 lines"):
        trials.record_trial(book, trial(7))
    book.write_bytes(kept)
    Path(f"{book}.head").unlink()
    with pytest.raises(InputError, match="expected beside the trial ledger"):
        trials.read_trials(book)


@pytest.mark.parametrize("junk", [b"", b"nonsense", b"6", b"six " + b"0" * 64, b"6 " + b"0" * 64, b"-1 " + b"0" * 64])
def test_a_damaged_head_is_noticed(book, junk):
    Path(f"{book}.head").write_bytes(junk)
    with pytest.raises(InputError, match="version control"):
        trials.read_trials(book)


@pytest.mark.parametrize("junk", [b"\xff\xfe\n", b"[]\n", b"null\n", b"\n", b'{"trial": 3}\n'])
def test_junk_lines_are_noticed(book, junk):
    with open(book, "ab") as file:
        file.write(junk)
    with pytest.raises(InputError, match="line 7"):
        trials.read_trials(book)


def test_a_crash_anywhere_in_an_append_loses_nothing(book):
    "The file is cut all along the last line, with the head as it was before that line."
    head = Path(f"{book}.head").read_bytes()
    whole = book.read_bytes()
    trials.record_trial(book, trial(6))
    after = book.read_bytes()
    for cut in [*range(len(whole), len(after), 9), len(after) - 1, len(after)]:
        book.write_bytes(after[:cut])
        Path(f"{book}.head").write_bytes(head)
        assert len(trials.read_trials(book)) == (7 if cut == len(after) else 6)
        assert trials.record_trial(book, trial(6)) == (cut < len(after)) and book.read_bytes() == after
        assert Path(f"{book}.head").read_text().startswith("7 ")


def write_many(path, start):
    for number in range(start, start + 25):
        trials.record_trial(path, trial(number))


def test_writers_do_not_lose_each_other(tmp_path):
    path, context = tmp_path / "trials.jsonl", multiprocessing.get_context("fork")
    workers = [context.Process(target=write_many, args=(path, 20 * worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        trials.read_trials(path)
    for worker in workers:
        worker.join()
    assert sorted(row.config["number"] for row in trials.read_trials(path)) == list(range(65)) and not any(w.exitcode for w in workers)
    assert sorted(os.listdir(tmp_path)) == ["trials.jsonl", "trials.jsonl.head"]


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=5) | st.integers(), st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
                       | st.lists(st.integers() | st.none(), max_size=3), max_size=4))
def test_any_plain_configuration_survives_the_book(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("book") / "trials.jsonl"
    row = trials.make_trial("idea", config, "data", (0, 1), Moments(2, 0.1, 0.0, 3.0))
    assert trials.record_trial(path, row) and not trials.record_trial(path, row)
    assert trials.trial_id(trials.read_trials(path)[0]) == trials.trial_id(row)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.arange(3), {1, 2}])
def test_what_is_not_plain_is_refused(tmp_path, bad):
    with pytest.raises(InputError, match="plain JSON"):
        trials.record_trial(tmp_path / "t.jsonl", trial(1, value=bad))
    assert trials.read_trials(tmp_path / "t.jsonl") == ()


def test_lines_are_strict_json(book):
    for line in book.read_text().splitlines():
        assert set(json.loads(line)) == {"previous", "id", "trial"}


# the holdout

DAYS = 86_400


def test_a_holdout_is_opened_by_whatever_reaches_into_it(book):
    assert trials.open_holdout(book, "idea", (0, 900 * DAYS), "ab") is None          # nothing declared, nothing written
    assert len(trials.read_trials(book)) == 6
    assert trials.declare_holdout(book, "idea", 300 * DAYS, 400 * DAYS) == trials.Holdout(300 * DAYS, 400 * DAYS, 0)
    counts = [trials.open_holdout(book, "idea", span, "ab").openings for span in
              ((0, 300 * DAYS), (400 * DAYS, 500 * DAYS), (0, 300 * DAYS + 1), (0, 300 * DAYS + 1), (399 * DAYS, 900 * DAYS), (0, 300 * DAYS))]
    assert counts == [0, 0, 1, 2, 3, 3]                                               # the very same opening twice is two
    assert trials.find_holdout(trials.read_trials(book), "other") is None and trials.count_trials(trials.read_trials(book), "idea").trials == 6


def test_declaring_again_makes_nothing_fresh(book):
    trials.declare_holdout(book, "idea", 300 * DAYS, 400 * DAYS)
    trials.open_holdout(book, "idea", (0, 350 * DAYS), "ab")
    assert trials.declare_holdout(book, "idea", 300 * DAYS, 400 * DAYS).openings == 1
    assert trials.declare_holdout(book, "idea", 349 * DAYS, 600 * DAYS).openings == 1
    assert trials.declare_holdout(book, "idea", 350 * DAYS, 600 * DAYS).openings == 0


def test_an_opening_that_was_removed_is_noticed(book):
    trials.declare_holdout(book, "idea", 300 * DAYS, 400 * DAYS)
    for _ in range(2):
        trials.open_holdout(book, "idea", (0, 400 * DAYS), "ab")
    lines = book.read_text().splitlines(keepends=True)
    for kept in (lines[:-1], lines[:-2] + lines[-1:], lines[:6] + lines[7:]):
        book.write_text("".join(kept))
        with pytest.raises(InputError, match="restore"):
            trials.open_holdout(book, "idea", (0, 400 * DAYS), "ab")


@pytest.mark.parametrize("span", [(5, 5), (6, 5), (-1, 5)])
def test_a_holdout_needs_a_range(book, span):
    with pytest.raises(InputError, match="start before its end"):
        trials.declare_holdout(book, "idea", *span)


def _open_ten(path):
    for _ in range(10):
        trials.open_holdout(path, "idea", (0, 10), "ab")


def test_openings_at_the_same_moment_all_count(tmp_path):
    path = tmp_path / "t.jsonl"
    trials.declare_holdout(path, "idea", 0, 5)
    writers = [multiprocessing.get_context("fork").Process(target=_open_ten, args=(path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert trials.find_holdout(trials.read_trials(path), "idea").openings == 30
