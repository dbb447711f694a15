"""A rehearsal as a stranger types it: four processes, the backtest's ledger; and dates that hold nothing."""
from __future__ import annotations

import subprocess
import sys

COMMAND = [sys.executable, "-c", "from delta_go.cli import main; main()"]


def test_rehearsal_writes_the_backtests_ledger(tmp_path):
    """Byte for byte, from files on the disk."""
    data, span = tmp_path / "market", ["--models", "models", "--policy", "signals", "--start", "2023-03-01", "--end", "2023-03-06"]
    for words in (["data", "simulate", str(data), "--bars", "1600", "--seed", "7"], ["rehearse", "--data", str(data), *span, "--ledger", str(tmp_path / "flown.csv")],
                  ["backtest", "--data", str(data), *span, "--ledger", str(tmp_path / "columns.csv")]):
        subprocess.run([*COMMAND, *words], check=True, capture_output=True, text=True)
    flown = (tmp_path / "flown.csv").read_bytes()
    assert flown == (tmp_path / "columns.csv").read_bytes() and flown.count(b"\n") > 2


def test_dates_without_candles_are_a_mistake_in_the_input():
    """Exit code 2 and the cure, though it is the exchange's process that finds out."""
    ended = subprocess.run([*COMMAND, "rehearse", "--start", "2029-01-01"], capture_output=True, text=True)
    assert ended.returncode == 2 and "no bar closes in the range" in ended.stderr
