"""The commands as a person types them: what they print, their exit codes, and that mistakes leave nothing behind."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from delta_go.cli import main
from delta_go.domain import LEDGER_COLUMNS
from delta_go.evidence.metrics import SUMMARY_KEYS
from delta_go.learning.features import WINDOW
from delta_go.learning.reading import read_market
from delta_go.learning.registry import EVIDENCE, Manifest, regime_file, save_models
from delta_go.market.candles import resample
from delta_go.market.store import Funding, write_candles, write_funding
from delta_go.trading.ledger import read_ledger


@pytest.fixture(scope="module")
def folders(case, tmp_path_factory) -> tuple[Path, Path]:
    """A folder of candles and a folder of models."""
    data, models = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("models")
    for symbol, bars in case.candles.items():
        write_candles(data, bars)
        write_funding(data, Funding(symbol, *case.payments[symbol]))
    origin = {key: {} for key in EVIDENCE}
    names = [regime_file(symbol) for symbol in case.models.regimes] + ["trade_predictor.pkl"]
    btc = read_market(case.later("BTCUSD"), case.models.regimes["BTCUSD"])
    rows = btc.inputs[np.flatnonzero(btc.signals.side)[:3]]
    save_models(models, case.models.regimes, case.models.predictor, Manifest("1h", WINDOW, "no edge: example", {name: origin for name in names}),
                {symbol: bars[-WINDOW:] for symbol, bars in case.candles.items()}, rows)
    return data, models


def say(capsys, *words) -> tuple[int, str, str]:
    """Run a command; its exit code, what it printed, and what it complained of."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    return end.value.code or 0, printed.out, printed.err


def refused(capsys, *words) -> str:
    """The one line that a refused command prints."""
    code, _, complaint = say(capsys, *words)
    assert code == 2 and complaint.startswith("error: ") and complaint.count("\n") == 1, (code, complaint)
    return complaint


def test_backtest_writes_figures_and_ledger(capsys, folders, tmp_path):
    data, models = folders
    code, _, _ = say(capsys, "backtest", "--data", data, "--models", models, "--policy", "signals", "--json", tmp_path / "b.json", "--ledger", tmp_path / "l.csv", "--start", "2023-09-01")
    figures, trades = json.loads((tmp_path / "b.json").read_text()), read_ledger(tmp_path / "l.csv")
    assert code == 0 and figures["trades"] == len(trades) > 20
    assert set(SUMMARY_KEYS) <= set(figures)
    assert figures["verdict"] == "no edge: example"
    assert abs(figures["net_return"] - sum(trade.pnl for trade in trades) / 10_000) < 1e-6
    assert (tmp_path / "l.csv").read_text().splitlines()[0] == ",".join(LEDGER_COLUMNS)


def test_backtest_is_repeatable_and_parquet_equals_csv(capsys, folders, tmp_path):
    data, models = folders
    for name in ("a.csv", "b.csv", "c.parquet"):
        say(capsys, "backtest", "--data", data, "--models", models, "--policy", "signals", "--ledger", tmp_path / name, "--symbols", "BTCUSD,SOLUSD", "--start", "2023-09-01", "--end", "2023-11-01")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert read_ledger(tmp_path / "a.csv") == read_ledger(tmp_path / "c.parquet")
    assert {trade.symbol for trade in read_ledger(tmp_path / "a.csv")} == {"BTCUSD", "SOLUSD"}


def test_the_gate_trades_nothing_when_the_predictor_abstains(capsys, folders, case, tmp_path):
    assert case.models.predictor.threshold is None
    data, models = folders
    say(capsys, "backtest", "--data", data, "--models", models, "--json", tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["trades"] == 0


def broken_data(folders, case, tmp_path, change) -> Path:
    """The candle folder with BTCUSD replaced by a changed copy, past the store's own checks."""
    import pyarrow as pa
    from pyarrow import parquet
    folder = tmp_path / "broken"
    shutil.copytree(folders[0], folder)
    columns = {name: np.array(getattr(case.candles["BTCUSD"], name)) for name in ("time", "open", "high", "low", "close", "volume")}
    parquet.write_table(pa.table(change(columns)), folder / "BTCUSD_1h.parquet")
    return folder


def drop_row(columns): return {name: np.delete(values, 5_000) for name, values in columns.items()}
def plant_nan(columns): columns["close"][5_000] = np.nan; return columns  # noqa: E702
def swap_columns(columns): columns["high"], columns["low"] = columns["low"], columns["high"]; return columns  # noqa: E702
def wrong_step(columns): return {name: values[::2] for name, values in columns.items()}
def one_candle(columns): return {name: values[:1] for name, values in columns.items()}
def no_volume(columns): del columns["volume"]; return columns  # noqa: E702


@pytest.mark.parametrize("change", [drop_row, plant_nan, swap_columns, wrong_step, one_candle, no_volume], ids=lambda f: f.__name__)
@pytest.mark.parametrize("command", ["backtest", "run"])
def test_bad_candles_are_one_line(capsys, folders, case, tmp_path, change, command):
    folder = broken_data(folders, case, tmp_path, change)
    extra = ("--models", folders[1], "--ledger", tmp_path / "out.csv") if command == "backtest" else ("--out", tmp_path / "out")
    assert "BTCUSD" in refused(capsys, command, "--data", folder, "--symbols", "BTCUSD", *extra)
    assert not list(tmp_path.glob("out*/models/*")) and not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("change", [drop_row, plant_nan, swap_columns, wrong_step], ids=lambda f: f.__name__)
def test_data_check_refuses_bad_candles(capsys, folders, case, tmp_path, change):
    assert say(capsys, "data", "check", folders[0])[0] == 0
    assert say(capsys, "data", "check", broken_data(folders, case, tmp_path, change))[0] == 2


def test_gaps_are_worked_around_when_asked(capsys, folders, case, tmp_path):
    folder = broken_data(folders, case, tmp_path, drop_row)
    assert say(capsys, "backtest", "--data", folder, "--models", folders[1], "--allow-gaps", "--policy", "signals", "--json", tmp_path / "b.json")[0] == 0
    assert json.loads((tmp_path / "b.json").read_text())["trades"] > 0


def test_wrong_places_and_names_are_one_line(capsys, folders, tmp_path):
    data, models = folders
    (tmp_path / "empty").mkdir()
    assert "no candle" in refused(capsys, "data", "check", tmp_path / "empty")
    assert "no candle" in refused(capsys, "run", "--data", tmp_path / "empty", "--out", tmp_path / "out")
    assert "there is none" in refused(capsys, "data", "check", tmp_path / "nowhere")
    assert "DOGEUSD" in refused(capsys, "backtest", "--data", data, "--models", models, "--symbols", "DOGEUSD")
    assert "DOGEUSD" in refused(capsys, "run", "--data", data, "--symbols", "DOGEUSD", "--out", tmp_path / "out")
    assert "policy" in refused(capsys, "backtest", "--data", data, "--models", models, "--policy", "yolo")
    assert "2024-13-01" in refused(capsys, "backtest", "--data", data, "--models", models, "--start", "2024-13-01")
    assert "resolution" in refused(capsys, "run", "--resolution", "7m", "--out", tmp_path / "out")
    assert "manifest" in refused(capsys, "backtest", "--data", data, "--models", tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_models_for_another_step_are_refused(capsys, folders, case, tmp_path):
    coarse = tmp_path / "coarse"
    for bars in case.candles.values():
        write_candles(coarse, resample(bars, 7200))
    assert "1h" in refused(capsys, "backtest", "--data", coarse, "--models", folders[1])


@pytest.mark.parametrize("name", ["hmm_model_BTCUSD.pkl", "trade_predictor.pkl", "manifest.json"])
def test_tampered_models_are_refused(capsys, folders, tmp_path, name):
    models = tmp_path / "models"
    shutil.copytree(folders[1], models)
    raw = bytearray((models / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (models / name).write_bytes(bytes(raw))
    assert name.split(".")[0].split("_")[0] in refused(capsys, "backtest", "--data", folders[0], "--models", models, "--ledger", tmp_path / "l.csv")
    assert not (tmp_path / "l.csv").exists()


def test_simulate_writes_a_market_with_its_truth(capsys, tmp_path):
    assert say(capsys, "data", "simulate", tmp_path / "m", "--bars", "600", "--symbols", "ETHUSD")[0] == 0
    assert {path.name for path in (tmp_path / "m").iterdir()} >= {"ETHUSD_1h.parquet", "ETHUSD_funding.parquet", "ETHUSD_1h_regimes.parquet"}
    assert say(capsys, "data", "check", tmp_path / "m")[0] == 0
    assert "edge" in refused(capsys, "data", "simulate", tmp_path / "n", "--edge", "luck:5")
    assert not (tmp_path / "n").exists()


def test_csv_comes_in(capsys, case, tmp_path):
    bars, table = case.candles["SOLUSD"][:50], tmp_path / "sol.csv"
    np.savetxt(table, np.column_stack([bars.time, bars.open, bars.high, bars.low, bars.close, bars.volume]), delimiter=",", header="time,open,high,low,close,volume", comments="", fmt="%.10g")
    code, printed, _ = say(capsys, "data", "import", table, tmp_path / "store", "--symbol", "SOLUSD")
    assert code == 0 and "50 bars added" in printed
    assert "SOLUSD" in refused(capsys, "data", "import", table, tmp_path / "other", "--symbol", "SOLUSD", "--resolution", "15m")


def test_help_is_quick_and_needs_nothing_heavy():
    code = "import sys, delta_go.cli; print([m for m in ('numpy', 'pandas', 'numba', 'xgboost', 'sklearn', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
