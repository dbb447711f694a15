"""The whole bot for tests: models that trade every minute, and the bot as a real process against an exchange on this machine."""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from delta_go.learning.registry import load_models, save_models
from delta_go.live.pace import Setup
from delta_go.live.status import read_status
from delta_go.market.load import load_market
from delta_go.market.store import append_candles

KEY, SECRET = "emulator-key", "emulator-secret-0001"
SPEED = 6.0  # seconds of the exchange in one of ours


FIRST = 1_672_531_200  # open of the first bar, seconds UTC


def minute_data(folder: Path, first: int = 1_864, bars: int = 2_000) -> Path:
    """A simulated hourly market where signals are frequent, its bars told as minutes."""
    for candles in load_market("", "1h", end="2024-01-01").candles.values():
        part = candles[first:first + bars]
        append_candles(folder, replace(part, step=60, time=FIRST + 60 * np.arange(len(part))), float("inf"))
    return folder


def minute_models(folder: Path) -> Path:
    """The committed models, told that their bars last a minute and that every signal is worth taking."""
    loaded = load_models("models")
    regimes = {symbol: replace(model, step=60) for symbol, model in loaded.regimes.items()}
    predictor = replace(loaded.predictor, threshold=0.0, abstain_reason=None)
    windows = {symbol: replace(bars[:300], step=60, time=FIRST + 60 * np.arange(300)) for symbol, bars in load_market("", "1h", end="2023-02-01").candles.items()}
    rows = np.full((2, len(predictor.features)), 0.5)
    save_models(folder, regimes, predictor, replace(loaded.manifest, resolution="1m", verdict="trade"), windows, rows)
    return folder


def minute_market(data: Path, **changes) -> Setup:
    """An exchange that plays the minutes faster than the clock."""
    return Setup(**{"data": str(data), "resolution": "1m", "speed": SPEED, "environment": "testnet", "leverage": 3.0, **changes})


def environment(url: str, models: Path, home: Path, **more: str) -> dict[str, str]:
    """What the bot is told."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("DELTA_", "HMM_", "TRADE_"))}
    return {**clean, "DELTA_MODE": "testnet", "DELTA_BASE_URL": url, "DELTA_API_KEY": KEY, "DELTA_API_SECRET": SECRET, "DELTA_MODELS_DIR": str(models),
            "DELTA_STATE_DIR": str(home), "DELTA_CLOCK_SPEED": str(SPEED), "RISK_PER_TRADE_PCT": "0.2", "DAILY_LOSS_LIMIT_PCT": "90", "MAX_DRAWDOWN_PCT": "90", "PYTHONDONTWRITEBYTECODE": "1", **more}


def start(told: dict[str, str], log: Path, *words: str) -> subprocess.Popen[bytes]:
    """A bot as a process of its own."""
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, "-c", "from delta_go.cli import main; main()", "bot", *words], env=told, stdout=file, stderr=subprocess.STDOUT)


def state_in(folder: Path) -> str:
    """What the bot says it is in."""
    with contextlib.suppress(Exception):
        status = read_status(folder)
        return status.state if status else ""
    return ""


def end(process: subprocess.Popen[bytes], seconds: float = 30.0) -> int:
    """Ask it to drain, and wait."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
