"""Who may trade real money: a promoted champion; and what becomes of a position whose models may not any more. A real bot in live mode, against an exchange on this machine."""
from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from delta_go.config import load_settings
from delta_go.learning.registry import MANIFEST_FILE, Manifest, manifest_bytes, parse_manifest
from delta_go.live.emulator import running
from delta_go.live.journal import entry_of, read_journal
from delta_go.live.launch import SENTENCE, in_hand, refusals, unfit
from delta_go.live.pace import Emulator
from delta_go.live.status import read_status
from tests.waiting import wait_for
from tests.whole import end, environment, minute_data, minute_market, minute_models, start, state_in

VERDICT, APPROVAL = "verdict is trade, this one's is", "was never approved; judge it with delta-go promote"
BARS, MINUTE = 250, 60.0   # bars that the exchange shows when it begins; its seconds from one close to the next, the first after one
LONG, ENDS = 2_222, 4      # of the market in `minute_data`: the bar at whose open the models buy ETHUSD; the close, counted from the start, whose signal ends that
PAIR, WISH, STOP = 4_930, 3, 14  # the same of BTCUSD; the close at which SOLUSD would be sold; and one after BTCUSD has met its stop


def approved(manifest: Manifest) -> Manifest:
    return replace(manifest, approval={"set": manifest.version, "card": "0" * 64, "rules": "1", "replaces": None, "data_end": 1})


def put(models: Path, manifest: Manifest) -> None:
    (models / MANIFEST_FILE).write_bytes(manifest_bytes(manifest))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Models that take every signal, with the verdict `trade` and no approval."""
    return minute_models(tmp_path_factory.mktemp("launch") / "models")


# What is needed ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("verdict, promoted, said", [("trade", True, []), ("trade", False, [APPROVAL]), ("no edge: none", True, [VERDICT]), ("no edge: none", False, [VERDICT, APPROVAL])])
def test_models_of_a_live_bot(verdict, promoted, said):
    manifest = Manifest("1h", 200, verdict, {})
    manifest = approved(manifest) if promoted else manifest
    found = unfit(load_settings(mode="live"), manifest)
    assert len(found) == len(said) and all(words in line for words, line in zip(said, found))
    assert unfit(load_settings(mode="paper"), manifest) == unfit(load_settings(mode="testnet"), manifest) == []


def test_settings_of_a_live_bot():
    assert [words.split(":")[0].split(" needs")[0] for words in refusals(load_settings(mode="live", clock_speed=2))] == ["DELTA_LIVE_ACKNOWLEDGED", "mode live", "DELTA_CLOCK_SPEED"]
    assert refusals(load_settings(mode="live", acknowledged=SENTENCE, api_key="k", api_secret="s")) == []


def run_bot(told: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "from delta_go.cli import main; main()", "bot"], env=told, capture_output=True, text=True, timeout=120)


def test_the_committed_models_are_refused_before_anything_is_asked(tmp_path):
    """Nobody listens at that address; all that is missing is said at once."""
    told = run_bot(environment("http://127.0.0.1:9", Path("models"), tmp_path, DELTA_MODE="live", DELTA_CLOCK_SPEED="1", DELTA_LIVE_ACKNOWLEDGED="yes"))
    assert told.returncode == 2 and all(words in told.stderr for words in ("DELTA_LIVE_ACKNOWLEDGED", VERDICT, APPROVAL)), told
    assert "Traceback" not in told.stderr and not (tmp_path / "live" / "journal.db").exists()


def test_an_approval_that_is_another_set_s_is_no_approval(trained, tmp_path):
    """Copied from the set before a change of its verdict: refused where the manifest is read."""
    models = shutil.copytree(trained, tmp_path / "models")
    manifest = parse_manifest((models / MANIFEST_FILE).read_bytes())
    put(models, replace(approved(replace(manifest, verdict="no edge: none")), verdict="trade"))
    told = run_bot(environment("http://127.0.0.1:9", models, tmp_path, DELTA_MODE="live", DELTA_LIVE_ACKNOWLEDGED=SENTENCE))
    assert told.returncode == 2 and "it was changed after it was judged" in told.stderr, told


# What is held ------------------------------------------------------------------------------------------------------------------

class Clock:
    """A clock that is moved forward while no bot looks at it."""
    ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@dataclass
class Flight:
    """An exchange, a folder of models, and one live bot after the other."""
    exchange: Emulator
    clock: Clock
    models: Path
    home: Path
    symbols: str
    lead: float   # seconds that a bot needs to start, generously

    @property
    def folder(self) -> Path:
        return self.home / "live"

    def board(self, close: float = 0.0) -> subprocess.Popen[bytes]:
        """A bot, in time for a close."""
        self.clock.ahead += max(0.0, close * MINUTE - self.lead - self.truth()["elapsed"])
        told = environment(self.exchange.url, self.models, self.home, DELTA_MODE="live", DELTA_LIVE_ACKNOWLEDGED=SENTENCE, DELTA_CLOCK_SPEED="1", DELTA_SYMBOLS=self.symbols)
        return start(told, self.home / "log")

    def truth(self) -> dict[str, Any]:
        return httpx.get(f"{self.exchange.url}/emulator/state", trust_env=False, timeout=10).json()

    def held(self) -> dict[str, int]:
        return {symbol: size for symbol, size in next(iter(self.truth()["accounts"].values()))["positions"].items() if size}

    def rows(self, kind: str) -> list[Any]:
        return [entry.body for row in read_journal(self.folder / "journal.db") if (entry := entry_of(row)).kind == kind]

    def log(self) -> str:
        return (self.home / "log").read_text()[-4000:]


@pytest.fixture
def flight(trained, tmp_path) -> Iterator[Callable[[int, str], Flight]]:
    """Makes a flight in which a promoted champion has entered and was stopped, whereupon the models were replaced by some without verdict and approval."""
    with ExitStack() as stack:
        def make(entry: int, symbols: str) -> Flight:
            data, models, clock, began = minute_data(tmp_path / "data", first=entry - 1 - BARS, bars=BARS + 40), shutil.copytree(trained, tmp_path / "models"), Clock(), time.monotonic()
            assert run_bot(environment("http://127.0.0.1:9", models, tmp_path / "none", DELTA_MODE="live")).returncode == 2
            lead = min(50.0, 5 + 4 * (time.monotonic() - began))
            (tmp_path / "bot").mkdir()
            here = Flight(stack.enter_context(running(minute_market(data, speed=1.0, environment="production"), clock)), clock, models, tmp_path / "bot", symbols, lead)
            champion = approved(parse_manifest((models / MANIFEST_FILE).read_bytes()))
            put(models, champion)
            bot = here.board(1)
            stack.callback(bot.kill)
            assert wait_for(lambda: here.held() and in_hand(here.folder / "journal.db"), lead + 30), here.log()
            assert end(bot) == 0 and len(here.held()) == 1, here.log()
            put(models, replace(champion, verdict="no edge: no longer", approval=None))
            return here
        yield make


def degraded(here: Flight) -> None:
    """It is well but for its models, and holds what was held, with its stop."""
    assert wait_for(lambda: state_in(here.folder) == "DEGRADED", 60), here.log()
    assert wait_for(lambda: (told := read_status(here.folder)) and [cause.name for cause in told.causes] == ["models"] and told.holdings and told.holdings[0].stop, 20), read_status(here.folder)
    assert all(words in read_status(here.folder).causes[0].words for words in (VERDICT, APPROVAL))


def test_a_position_is_seen_to_its_end(flight):
    """Its exit is decided as ever; then the bot ends with the refusal, and does not begin again."""
    here = flight(LONG, "ETHUSD")
    bot = here.board(ENDS)
    degraded(here)
    assert bot.wait(here.lead + 90) == 2 and here.held() == {}, here.log()
    orders, decided = here.rows("intent"), [body for body in here.rows("decision") if body["action"] != "skip"]
    assert [order["reduce_only"] for order in orders] == [False, True] and (decided[-1]["action"], decided[-1]["reason"]) == ("exit", "opposite signal")
    assert VERDICT in here.log() and state_in(here.folder) == "STOPPED" and not in_hand(here.folder / "journal.db")
    rows = len(read_journal(here.folder / "journal.db"))
    assert here.board().wait(60) == 2 and len(read_journal(here.folder / "journal.db")) == rows


def test_nothing_is_begun_beside_it(flight):
    """Another symbol signals and is not bought; told to stop, the bot leaves the bracket; what that has closed meanwhile is found at the next start."""
    here = flight(PAIR, "BTCUSD,SOLUSD")
    before, bot = here.held(), here.board(WISH)
    degraded(here)
    assert wait_for(lambda: here.rows("refused"), here.lead + 60), here.log()
    assert all((body["symbol"], VERDICT in body["reason"]) == ("SOLUSD", True) for body in here.rows("refused"))
    assert end(bot) == 0 and here.held() == before
    assert here.board(STOP).wait(60) == 2 and here.held() == {} and not in_hand(here.folder / "journal.db"), here.log()
    assert len(here.rows("intent")) == 1 and len(here.rows("fill")) == 2 and VERDICT in here.log()


@pytest.mark.slow
def test_the_kill_switch_works_for_such_a_position(flight):
    here = flight(LONG, "ETHUSD")
    bot = here.board()
    degraded(here)
    (here.folder / "KILL").write_text("a test")
    assert bot.wait(60) == 2 and here.held() == {} and VERDICT in here.log()
    assert here.rows("halt")[-1]["reason"].startswith("kill switch") and [order["reduce_only"] for order in here.rows("intent")] == [False, True]
