"""A folder as a bot leaves it: status, windows of the simulated market, and a journal of what it did in them."""
from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np

from delta_go.domain import REGIMES
from delta_go.live.journal import open_journal
from delta_go.live.status import Account, Cause, Holding, ServiceView, Status, Told, write_status, write_windows
from delta_go.market.candles import Candles
from delta_go.market.load import load_market
from delta_go.market.venue import PRODUCTS
from delta_go.trading.intents import SECOND, Entry

HOUR = 3600
MODELS = {"model_version": "7162a12afa04", **{f"hmm_model_{name}.pkl": "e8cde34e7da90b30ce5efa7723038e54af26968f8c05d908a06fc35c870f3b3f" for name in ("BTCUSD", "ETHUSD", "SOLUSD")}}
SHIFT = {"BTCUSD": 0, "ETHUSD": 60, "SOLUSD": 130}
OPENING = {0: ("enter", 1), 70: ("enter", -1), 150: ("enter", 1)}  # bars of each symbol's window at which a trade begins, and its side
CLOSING = {40: "opposite signal", 110: "maximum bars reached"}


def windows(now: float, bars: int = 200) -> dict[str, Candles]:
    """The last bars of the simulated market, moved to the present."""
    found = {}
    for symbol, candles in load_market(end="2023-03-01").candles.items():
        part = candles[-bars:]
        found[symbol] = Candles(symbol, HOUR, np.arange(bars) * HOUR + (int(now) // HOUR - bars) * HOUR, *(getattr(part, name).copy() for name in ("open", "high", "low", "close", "volume")))
    return found


def regime_at(symbol: str, bar: int) -> int:
    """A regime that stays for a while."""
    return (0, 0, 2, 3, 1, 4, 2)[(bar + SHIFT[symbol]) // 29 % 7]


def decision(symbol: str, candles: Candles, bar: int, action: str, side: int, size: int, reason: str, words: str) -> Entry:
    """A decision's row."""
    close, regime = float(candles.close[bar]), regime_at(symbol, bar)
    posterior = [0.01] * 5
    posterior[regime] = 0.96
    return Entry("decision", f"{symbol}:{candles.time[bar]}", {
        "symbol": symbol, "time": int(candles.time[bar]), "action": action, "side": side, "size": size, "stop": round(close * (1 - 0.02 * side), 2), "target": round(close * (1 + 0.04 * side), 2),
        "reason": reason, "present": True, "max_bars": 48, "regime": REGIMES[regime], "confidence": 0.96, "probability": 0.57 if side else None, "words": words, "posterior": posterior,
        "window": "0" * 64, "models": MODELS})


def story(candles: dict[str, Candles], hostile: str) -> list[tuple[int, Entry]]:
    """What happened, bar by bar: time in seconds and the entry."""
    told: list[tuple[int, Entry]] = []
    equity, number, held = 10_000.0, 0, {}
    for bar in range(20, 200):
        at = int(candles["BTCUSD"].time[bar]) + HOUR
        for symbol, bars in candles.items():
            local, close, size = bar - 20 - SHIFT[symbol] // 13, float(bars.close[bar]), int(4_000 / bars.close[bar] / PRODUCTS[symbol].contract_value)
            if local in OPENING and (symbol != "SOLUSD" or local < 150):
                side = OPENING[local][1] if symbol != "ETHUSD" else -OPENING[local][1]
                row = decision(symbol, bars, bar, "enter", side, size, "signal taken", "lower edge of the range" if side > 0 else "breakout downwards")
                number += 1
                told += [(at, row), (at, Entry("intent", f"dg-{number}", {"symbol": symbol, "reduce_only": False, "reason": row.key, "size": size, "side": "buy" if side > 0 else "sell"})),
                         (at + 2, filled(f"dg-{number}", symbol, side, size, close, at + 2, number))]
                held[symbol] = (side, close, size)
            elif local in CLOSING and symbol in held:
                side, entry, size = held.pop(symbol)
                row = decision(symbol, bars, bar, "exit", 0, 0, CLOSING[local], "")
                number += 1
                told += [(at, row), (at, Entry("intent", f"dg-{number}", {"symbol": symbol, "reduce_only": True, "reason": row.key, "size": size, "side": "sell" if side > 0 else "buy"})),
                         (at + 2, filled(f"dg-{number}", symbol, -side, size, close, at + 2, number))]
                equity += side * (close - entry) * size * PRODUCTS[symbol].contract_value - 4
            else:
                told.append((at, decision(symbol, bars, bar, "hold" if symbol in held else "skip", 0, 0, "position open" if symbol in held else "no signal", "")))
        open_gain = sum(side * (float(candles[name].close[bar]) - entry) * size * PRODUCTS[name].contract_value for name, (side, entry, size) in held.items())
        told.append((at, Entry("equity", str(at), {"time": at, "equity": round(equity + open_gain, 2),
                                                   "breakers": {"day": at // 86400, "day_start": 1e4, "peak": 1e4, "previous": 1e4, "latched": False, "blocked": 0}})))
    bars = candles["SOLUSD"]
    last = decision("SOLUSD", bars, 199, "enter", 1, 120, "signal taken", hostile)
    told = [item for item in told if item[1].key != last.key]
    return [*told, (at, last), (at, Entry("refused", last.key, {"symbol": "SOLUSD", "time": int(bars.time[199]), "reason": "quota: 9,750 of 10,000 used; entries wait"}))]


def filled(owner: str, symbol: str, side: int, size: int, price: float, at: int, number: int) -> Entry:
    """A fill's row."""
    return Entry("fill", f"{number:032}", {"symbol": symbol, "owner": owner, "side": "buy" if side > 0 else "sell", "size": size, "price": f"{price:.4f}", "commission": "1.2", "kind": "normal",
                                           "order_id": str(number), "role": "taker", "time_us": at * SECOND})


def holding(candles: dict[str, Candles], symbol: str, side: int, stop: bool, size: int) -> Holding:
    """What the last trade of a symbol has become."""
    bar = 20 + SHIFT[symbol] // 13 + 150
    entry, mark = float(candles[symbol].close[bar]), float(candles[symbol].close[-1])
    level, target = round(entry * (1 - 0.025 * side), 1), round(entry * (1 + 0.04 * side), 1)
    gain = side * (mark - entry) * size * PRODUCTS[symbol].contract_value
    return Holding(symbol, "buy" if side > 0 else "sell", size, entry, int(candles[symbol].time[bar]) + HOUR, mark, round(gain, 2), level if stop else None, target if stop else None, level, target)


def make_folder(folder: Path, now: float | None = None, hostile: str = "lower edge of the range", stop: bool = True) -> Status:
    """Write it all; the status that was written."""
    now = time.time() if now is None else now
    folder.mkdir(parents=True, exist_ok=True)
    candles = windows(now)
    write_windows(folder, candles)
    journal, _ = open_journal(folder / "journal.db", int(candles["BTCUSD"].time[20]) * SECOND, "tests")
    rows = story(candles, hostile)
    journal.append([entry for _, entry in rows], rows[-1][0] * SECOND)
    equity = [entry.body["equity"] for _, entry in rows if entry.kind == "equity"]
    journal.close()
    held = [holding(candles, "BTCUSD", 1, True, 85), holding(candles, "ETHUSD", -1, stop, 240)]
    status = Status(
        "paper", "RUNNING", int(now), now, now - 93_600, 4321, 3, "0.1.0", MODELS, "no edge", list(candles), "1h", int(now) // HOUR * HOUR, int(now) // HOUR * HOUR + HOUR,
        account=Account(equity[-1], equity[-1] + 180, max(equity), "", 0.05, 0.10), holdings=held, services=[ServiceView("hmm-detector", "http://127.0.0.1:8081", "closed", ""),
        ServiceView("trade-predictor", "http://127.0.0.1:8082", "closed", "")], streams={"public": "live", "private": "live"}, quota=0.12,
        prices={name: float(bars.close[-1]) for name, bars in candles.items()},
        told=[Told(int(now) - 7_000, "The bot is running: paper, three symbols."), Told(int(now) - 1_200, "ETHUSD: sold 240 contracts.")])
    write_status(folder, status)
    return status


def change(folder: Path, status: Status, **fields: object) -> Status:
    """The same status with other words, written now."""
    changed = msgspec.structs.replace(status, **{"written": time.time(), **fields})
    write_status(folder, changed)
    return changed


DEGRADED = {"state": "DEGRADED", "causes": [Cause("services", "hmm-detector: answered 503: not ready", int(time.time()) - 300)],
            "services": [ServiceView("hmm-detector", "http://127.0.0.1:8081", "open", "answered 503: not ready"), ServiceView("trade-predictor", "http://127.0.0.1:8082", "closed", "")]}
