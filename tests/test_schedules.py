"""Ten thousand schedules of faults, and the proof that they would find something."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from delta_go.live.journal import read_journal
from tests import schedules
from tests.schedules import CHOICES, COMBINATIONS, DISTINCT, NEVER_ASKED, PLANTS, FileJournal, caught, digest, play, play_all, play_naive, switches_of


def test_ten_thousand_schedules():
    total = play_all(0, 10_000)
    assert total["seeds"] == 10_000 and total["faults"] == {}
    counts = total["counts"]
    assert counts["orders filled"] > 20_000 and counts["orders never_arrived"] > 5_000 and counts["starts"] > 15_000


def test_the_kill_switch_at_any_step():
    """Flat and order-free within ten seconds in which the exchange could be reached, latched through every death."""
    total = play_all(0, 2_500, switch=True)
    assert total["seeds"] == 2_500 and total["faults"] == {}


@pytest.mark.slow
def test_the_kill_switch_in_ten_thousand_schedules():
    assert play_all(2_500, 10_000, switch=True)["faults"] == {}


@pytest.mark.slow
def test_a_hundred_thousand_more():
    assert play_all(10_000, 100_000)["faults"] == {}


@pytest.mark.parametrize("plant", sorted(PLANTS))
def test_a_planted_fault_is_found(plant):
    assert caught(plant, range(1_000)) is not None


def test_trying_again_is_wrong_more_often_than_not():
    assert sum(bool(play_naive(seed)) for seed in range(400)) > 200


def test_a_seed_is_a_schedule_byte_for_byte():
    for seed in (3, 19, 63):
        first = digest(seed)
        assert first == digest(seed) and first[1] > 50
    assert digest(3) != digest(4)


def test_seeds_walk_through_every_combination():
    assert len({switches_of(seed) for seed in range(COMBINATIONS)}) == COMBINATIONS == 36_864
    felt = [name for name in CHOICES if name not in NEVER_ASKED]
    assert len({tuple(getattr(switches_of(seed), name) for name in felt) for seed in range(DISTINCT)}) == DISTINCT == 9_216 < 10_000
    early = [switches_of(seed) for seed in range(64)]
    for name in felt:
        assert {getattr(switches, name) for switches in early} == set(CHOICES[name])


def test_what_is_never_asked_changes_nothing(monkeypatch):
    seeds = (3, 19)
    before = [digest(seed) for seed in seeds]
    monkeypatch.setattr(schedules, "switches_of", lambda seed: replace(known := switches_of(seed), **{name: not getattr(known, name) for name in NEVER_ASKED}))
    assert [digest(seed) for seed in seeds] == before


def test_the_journal_in_memory_is_the_one_on_disk():
    memory = Path("/dev/shm")  # as good as a disk for this, and never slow
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        for seed in range(200):
            in_memory, path = play(seed)[2], Path(folder) / f"{seed}.sqlite"
            on_disk = play(seed, journal=FileJournal(path))[2]
            assert in_memory.faults == on_disk.faults == []
            assert [row.hash for row in in_memory.journal.rows] == [row.hash for row in on_disk.journal.rows] == [row.hash for row in read_journal(path)]
            on_disk.journal.close()
            path.with_suffix(".reserve").unlink()


def test_the_command_says_what_it_found(capsys):
    assert schedules.main(["--seeds", "8"]) == 0
    assert "8 schedules" in capsys.readouterr().out
    assert schedules.main(["--plant", "no fence", "--seeds", "100"]) == 0
    assert "no fence: seed" in capsys.readouterr().out
    assert schedules.main(["--first", "3", "--seeds", "1", "--log"]) == 0
    assert digest(3)[0] in capsys.readouterr().out
