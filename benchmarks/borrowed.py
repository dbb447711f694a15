"""The whole bot in borrowed time: exchange in a process of its own, the real loop and streams, and a clock that only moves while the bot has nothing to do."""
from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from unittest.mock import patch

import msgspec
import numpy as np

from delta_go.config import Settings, load_settings
from delta_go.live import launch
from delta_go.live.bot import Bot
from delta_go.live.pace import Setup
from delta_go.live.rehearse import child, says_where
from delta_go.live.stream import Senses
from delta_go.market.candles import step_of
from delta_go.trading.news import CandleClosed, Event, Gap

KEY, SECRET = "emulator-key", "emulator-secret-0001"
FIRST = 1_672_531_200    # open of the first bar, seconds UTC
HISTORY = 250            # bars before the first that is played
WAIT = 0.012             # seconds the bot is given to hear what a move of the clock has caused
HASTE = 5.0              # how much faster than ours a socket's own clock runs; the exchange gives a sign of life every five of our seconds


def prepared(home: Path, resolution: str, bars: int) -> tuple[Path, Path]:
    """Models and data, made by another process: what that takes of memory is not the bot's."""
    code = f"from pathlib import Path; from benchmarks import borrowed as b; home = Path({str(home)!r}); b.willing_models(home / 'models', {resolution!r}); b.borrowed_data(home / 'data', {resolution!r}, {bars})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    return home / "models", home / "data"


def borrowed_data(folder: Path, resolution: str, bars: int, first: int = 1_864) -> Path:
    """A simulated hourly market where signals are frequent, its bars told in another length, with funding every eight hours."""
    from delta_go.market.load import load_market
    from delta_go.market.store import Funding, append_candles, append_funding
    step = step_of(resolution)
    for symbol, candles in load_market("", "1h").candles.items():
        part = candles[first:first + bars]
        append_candles(folder, replace(part, step=step, time=FIRST + step * np.arange(len(part))), float("inf"))
        times = np.arange(FIRST, FIRST + step * len(part), 28_800)
        append_funding(folder, Funding(symbol, times, np.full(len(times), 0.0001)))
    return folder


def willing_models(folder: Path, resolution: str) -> Path:
    """The committed models, told that their bars have another length and that every signal is worth taking."""
    from delta_go.learning.registry import load_models, save_models
    from delta_go.market.load import load_market
    loaded, step = load_models("models"), step_of(resolution)
    regimes = {symbol: replace(model, step=step) for symbol, model in loaded.regimes.items()}
    predictor = replace(loaded.predictor, threshold=0.0, abstain_reason=None)
    windows = {symbol: replace(bars[:300], step=step, time=FIRST + step * np.arange(300)) for symbol, bars in load_market("", "1h").candles.items()}
    save_models(folder, regimes, predictor, replace(loaded.manifest, resolution=resolution, verdict="trade"), windows, np.full((2, len(predictor.features)), 0.5))
    return folder


def serve(told: str, clock: str) -> None:
    """The exchange's process: it reads the shared clock, and writes beside it up to when all it had to say was said."""
    from delta_go.live import emulator
    shared, last = np.memmap(clock, np.float64, "r+", shape=(2,)), [0.0]

    def read() -> float:
        shared[1], last[0] = last[0], float(shared[0])
        return last[0]

    with patch.object(emulator, "TICK", 0.003):
        emulator.serve(msgspec.msgpack.decode(bytes.fromhex(told), type=Setup), lambda url: print(url, flush=True), read)


@dataclass
class World:
    """The clock, and what is noted of a bot that lives by it."""
    clock: np.ndarray                # seconds since a moment, and how far the exchange has told of them
    resolution: str
    url: str
    bot: Bot | None = None
    note: Callable[[CandleClosed, float], None] = lambda event, at: None  # told of each bar's close, when it comes
    watch: Callable[[], bool] = lambda: False          # looks whenever time passes; True lets the bot drain
    losses: list[str] = field(default_factory=list)    # why a stream was lost

    def move(self) -> None:
        """Let time pass: fast between two closes, slowly while something is awaited."""
        bot, step = self.bot, step_of(self.resolution)
        if bot is not None and self.watch():
            bot.asked = bot.asked or "enough"
        if bot is None or bot.draining:
            return self.pass_by(0.25)
        closed = bot.next_open + step
        if bot.flight.log.last_close >= closed - step and closed - bot.now > step - 4:
            hop = 1.0                                   # fills of the last close come in
        elif closed - bot.now <= 0:
            hop = 0.25 if bot.now - closed < 4 else 2.0  # closed, and not yet decided
        elif bot.streams or bot.clock or bot.state == "BOOT":
            hop = min(2.0, closed - bot.now + 0.05)     # as slowly as a line comes back
        else:
            left = closed - bot.now
            hop = min(step / 3, 800.0, left - 0.5) if left > 0.6 else left + 0.05
        self.pass_by(hop)

    def pass_by(self, seconds: float) -> None:
        """Move the clock and wait until the exchange has told everything up to there."""
        self.clock[0] += seconds
        end = time.monotonic() + 5
        while self.clock[1] < self.clock[0] and time.monotonic() < end:
            time.sleep(0.0005)


class Borrowed(Queue):
    """The bot's queue: a wait for news is when time passes."""
    def __init__(self, world: World):
        super().__init__()
        self.world = world

    def put(self, item, block=True, timeout=None):
        """One event of a stream."""
        if isinstance(item, CandleClosed):
            self.world.note(item, time.perf_counter())
        if isinstance(item, Gap) and item.symbol is None:
            self.world.losses.append(item.reason)
        super().put(item, block, timeout)

    def get(self, block=True, timeout=None):
        """The next one."""
        if block and self.empty():
            self.world.move()
        return super().get(block, WAIT if timeout else timeout)


@contextlib.contextmanager
def borrowed_exchange(setup: Setup, folder: Path) -> Iterator[World]:
    """An exchange that waits for the bot."""
    clock = folder / "clock"
    np.array([1_000.0, 0.0]).tofile(clock)
    words = ["-c", "import sys; from benchmarks.borrowed import serve; serve(*sys.argv[1:])", msgspec.msgpack.encode(setup).hex(), str(clock)]
    with child(words, {"PYTHONPATH": str(Path(__file__).parents[1])}, says_where) as url:
        yield World(np.memmap(clock, np.float64, "r+", shape=(2,)), setup.resolution, url)


def borrowed_setup(data: Path, resolution: str, **more) -> Setup:
    """Three symbols from files, by the shared clock."""
    return Setup(**{"data": str(data), "resolution": resolution, "speed": 1.0, "environment": "testnet", "leverage": 3.0, "quota": 10**9, **more})


def settings_for(world: World, models: Path, state: Path, **more) -> Settings:
    """What the bot is told."""
    return load_settings(None, **{"mode": "testnet", "base_url": world.url, "api_key": KEY, "api_secret": SECRET, "models": models, "state_dir": state, "risk_per_trade_pct": 0.2,
                                  "daily_loss_limit_pct": 100.0, "max_drawdown_pct": 100.0, **more})


@contextlib.contextmanager
def borrowed_bot(world: World, settings: Settings) -> Iterator[tuple[Bot, Queue[Event]]]:
    """The real bot with everything it has, but its clock is the shared one; sockets keep a clock of their own for their life signs."""
    def senses(monotonic, now, chance, sleep):
        return Senses(lambda: HASTE * time.monotonic(), now, chance, sleep)

    borrowed = SimpleNamespace(monotonic=lambda: float(world.clock[0]), time=lambda: FIRST + float(world.clock[0]), sleep=time.sleep)
    with patch.multiple(launch, timer=borrowed, Queue=lambda: Borrowed(world), Senses=senses), launch.aboard(settings) as (bot, events):
        world.bot = bot
        try:
            yield bot, events
        finally:
            world.bot = None


if __name__ == "__main__":
    serve(*sys.argv[1:])
