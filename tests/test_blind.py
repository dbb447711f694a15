"""Blind and broken: whatever fails around the bot, it begins nothing new, what it holds stays protected, and a person is told once."""
from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.load import Running, free_port, running
from delta_go.live.emulator import running as emulated
from delta_go.live.faults import Rule, Script
from delta_go.live.orders import NO_STOP
from delta_go.live.status import ask_kill
from delta_go.market.accounts import Answers
from tests.blind import DEAF, EAGER, REFUSING, RUN, Ill, Mangler, Phone, Trial, inject, trial
from tests.waiting import wait_for
from tests.whole import environment, minute_data, minute_market, minute_models

PATIENCE = 100.0  # seconds for anything to come about on a busy machine; nothing here is a promise about time
SERVICE_KEY = "service-key-of-these-tests-0123456789"


@dataclass(frozen=True)
class Ground:
    """What all flights share."""
    data: Path
    models: Path
    home: Path
    detector: Running
    predictor: Running


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """Candles and models of a minute, and both services with a key."""
    home = tmp_path_factory.mktemp("blind")
    models, data = minute_models(home / "models"), minute_data(home / "data")
    told = {"SERVICE_AUTH": "api_key", "SERVICE_API_KEYS": f"bot:{SERVICE_KEY},spy:{PLANTED['DELTA_SERVICE_KEY']}"}
    with running("hmm-detector", models, environ=told) as detector, running("trade-predictor", models, environ=told) as predictor:
        yield Ground(data, models, home, detector, predictor)


# What holds in every trial --------------------------------------------------------------------------------------------------

def until(truth: Callable[[], object], what: str, bot: Trial) -> None:
    """Wait, and fail with everything that helps to understand it."""
    if not wait_for(lambda: bool(truth()), PATIENCE, 0.2):
        status = bot.status()
        pytest.fail(f"{what}: it did not come about; {status and (status.state, status.causes, status.streams, status.quota)}\nheld {bot.held()}, naked {bot.naked()}\n" + "\n".join(bot.messages()[-25:]))


def well(bot: Trial) -> None:
    """It trades: something new was entered, and is held with its stop."""
    until(lambda: bot.is_in("RUNNING"), "RUNNING", bot)
    before = len(bot.entries())
    until(lambda: len(bot.entries()) > before and bot.held() and not bot.naked() and bot.is_in("RUNNING"), "an entry", bot)
    bot.told_well = len(bot.messages())


def pairs(messages: list[str], pattern: str) -> tuple[int, int]:
    """How often it was told that something began, and that it ended."""
    return (sum(bool(re.match(f"no entries: .*({pattern})", words)) for words in messages), sum(bool(re.match(f"over after .*({pattern})", words)) for words in messages))


@dataclass
class Spell:
    """A time of trouble."""
    bot: Trial
    told: int         # messages before it
    entered: list[str]
    rows: int         # of the journal when the bot knew of it, all kinds that matter
    before: int       # the same when it began
    left: list[str]   # exits then
    since: float = 0.0   # exchange seconds
    until: float = 0.0

    def see(self, cause: str) -> bool:
        """Note how long the cause has been on, without a break; whether it still is."""
        status = self.bot.status()
        found = [item.since for item in status.causes if item.name == cause] if status else []
        if found and (not self.since or found[0] == self.since):
            self.since, self.until = found[0], status.at
            return True
        return False

    def enters(self) -> int:
        """Decisions to enter that became nothing, since."""
        rows = self.bot.rows("decision", "refused", "intent")[self.rows:]
        wanted = {row.key for row in rows if row.kind == "decision" and row.body["action"] == "enter"}
        return len(wanted & {row.key for row in rows if row.kind == "refused"})

    def silent(self, words: str) -> int:
        """Decisions without a word from the models, since."""
        return sum(words in row.body["words"] for row in self.bot.rows("decision", "refused", "intent")[self.rows:] if row.kind == "decision")

    def time_exits(self) -> int:
        """Positions that were left because their time was over, at the exchange, since it began."""
        rows = self.bot.rows("decision", "refused", "intent")[self.before:]
        wanted = {row.key for row in rows if row.kind == "decision" and row.body["reason"] == "maximum bars reached"}
        return len({row.key for row in rows if row.kind == "intent" and row.body["reason"] in wanted} and set(self.bot.exits()) - set(self.left))


@contextlib.contextmanager
def spell(bot: Trial, cause: str, pattern: str, once: bool = True, over: Callable[[], None] | None = None) -> Iterator[Spell]:
    """From when the bot knows of its trouble to when it is over: no entry arrives, no stop is missing; one message begins it and one ends it.

    The trouble is made just before this begins, and the bot may be quicker: messages count from when it was last seen well.
    """
    told, before, left = bot.told_well, len(bot.rows("decision", "refused", "intent")), bot.exits()
    until(lambda: cause in bot.causes() and bot.is_in("DEGRADED"), f"DEGRADED because of {cause}", bot)
    assert re.search(pattern, bot.causes()[cause]), bot.causes()
    this = Spell(bot, told, bot.entries(), len(bot.rows("decision", "refused", "intent")), before, left)
    this.see(cause)
    yield this
    begun = [row.body["made_us"] / 1e6 for row in bot.rows("decision", "refused", "intent")[this.rows:] if row.kind == "intent" and not row.body["reduce_only"]]
    if over:
        assert not begun and bot.entries() == this.entered, "an entry was made in the dark"
        assert bot.is_in("DEGRADED") and cause in bot.causes()
        over()
    else:  # it ends by itself, and may have ended
        assert not [made for made in begun if this.since < made < this.until], "an entry was made in the dark"
    assert not bot.naked() or bot.longest_naked() <= 5
    until(lambda: bot.is_in("RUNNING"), "RUNNING again", bot)
    messages = bot.messages()[told:]
    if once:
        assert pairs(messages, pattern) == (1, 1), messages
    well(bot)
    assert bot.longest_naked() <= 5


# The trials -----------------------------------------------------------------------------------------------------------------

def storm(ground: Ground, home: Path) -> None:
    """Every answer of the exchange is 500, then 429, for a while."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        for status in (500, 429):
            inject(bot.exchange, Rule("status", on="* /v2/*", status=status, seconds=3.0))
            before = bot.held()
            with spell(bot, "exchange", "our orders were last read", over=lambda: inject(bot.exchange)):
                wait_for(lambda: False, 12.0)  # more than a bar, and it cannot be decided
                assert set(bot.held()) <= set(before) and not bot.naked()
        assert bot.end() == 0


def refused_login(ground: Ground, home: Path) -> None:
    """The private socket lets us in no more."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        REFUSING.add(id(bot.exchange.desk))
        inject(bot.exchange, Rule("down", seconds=6.0))
        with spell(bot, "stream", "private stream is not heard", over=lambda: REFUSING.discard(id(bot.exchange.desk))) as dark:
            until(lambda: "login refused" in bot.status().streams["private"], "the reason", bot)
            until(lambda: dark.enters() and dark.time_exits(), "a refused signal and a time exit", bot)
        assert bot.end() == 0


def silent_sockets(ground: Ground, home: Path) -> None:
    """Both sockets are open and say nothing."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        inject(bot.exchange, Rule("silent", on="*", seconds=1e6))
        DEAF.add(id(bot.exchange.desk))

        def over() -> None:
            DEAF.discard(id(bot.exchange.desk))
            inject(bot.exchange)
        with spell(bot, "stream", "stream is not heard", over=over) as dark:
            until(lambda: dark.enters() and dark.time_exits(), "a refused signal and a time exit", bot)
        assert bot.end() == 0


def stale_candles(ground: Ground, home: Path) -> None:
    """No candle comes any more, neither way."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        inject(bot.exchange, Rule("gap", on="candlestick_1m"), Rule("status", on="GET /v2/history/candles*", status=503))
        entered = bot.entries()
        with spell(bot, "candles", "no bar for", over=lambda: inject(bot.exchange)):
            assert bot.entries() == entered or set(bot.entries()) > set(entered)
            assert not bot.naked()
        ill = (Rule("gap", on="candlestick_1m"), Rule("status", on="GET /v2/history/candles*", status=503))
        inject(bot.exchange, *ill)
        until(lambda: "candles" in bot.causes(), "stale again", bot)
        kill(bot)


def kill(bot: Trial) -> None:
    """The switch works in any trouble that leaves the exchange within reach: flat and order-free, in the exchange's seconds."""
    ask_kill(bot.folder, "a test")
    began = bot.exchange.at
    until(lambda: not bot.held() and not [order for order in bot.truth()["orders"] if order["state"] in ("open", "pending")], "flat", bot)
    took = (bot.exchange.at - began) / bot.exchange.setup.speed
    assert took < 10, f"flat after {took:.1f} s"
    until(lambda: bot.is_in("HALTED"), "HALTED", bot)


def closed_exchange(ground: Ground, home: Path) -> None:
    """Maintenance, an auction, and a restart without warning."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        until(lambda: len(bot.held()) < 3, "room for a signal", bot)
        bot.exchange.market = Ill("maintenance", "disrupted_cancel_only")

        def open_again() -> None:
            bot.exchange.market = Ill("live", "operational")
        with spell(bot, "exchange", "is maintenance|is disrupted", over=open_again) as dark:
            until(dark.enters, "a refused signal", bot)
            bot.exchange.market = Ill("live", "disrupted_post_only")
            before = dark.enters()
            until(lambda: dark.enters() > before, "a refused signal in the auction", bot)
        assert bot.end() == 0


def restarted_exchange(ground: Ground, home: Path) -> None:
    """Gone without warning, then an auction."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        inject(bot.exchange, Rule("down", seconds=40.0, auction=210.0))
        with spell(bot, "exchange", "our orders|is disrupted", once=False) as dark:
            until(lambda: any("disrupted_post_only" in words for words in bot.causes().values()), "the auction is known", bot)
            held, dark.since = bot.held(), 0.0
            until(lambda: not dark.see("exchange"), "the end of the auction", bot)
            assert dark.enters() or len(held) == 3, "no signal, although something was flat"
        assert bot.end() == 0


def scarce_quota(ground: Ground, home: Path) -> None:
    """Our share of the rate limit is nearly used, until the next window."""
    small = "from delta_go.live.account import Budget\nBudget.__init__.__defaults__ = (1_200, .5, .1, 300.0)\n"
    with trial(minute_market(ground.data), home, ground.models, EAGER + small) as bot:
        well(bot)
        with spell(bot, "quota", "rate limit is used", once=False) as dark:
            until(lambda: not dark.see("quota"), "another window", bot)
        assert bot.end() == 0


def jumping_clock(ground: Ground, home: Path) -> None:
    """Our clock falls ten seconds behind the exchange's, runs ten ahead, and the wall clock is wrong all the time."""
    late = home / "late"
    wrong = f"""
import os, time
monotonic, wall = time.monotonic, time.time
time.monotonic = lambda: monotonic() - (10 / 6 if os.path.exists({str(late)!r}) else 0)
time.time = lambda: wall() + 3610
"""
    with trial(minute_market(ground.data), home, ground.models, wrong + EAGER) as bot:
        well(bot)
        for jump in (late.touch, late.unlink):
            told = len(bot.messages())
            jump()
            well(bot)
            begun, ended = pairs(bot.messages()[told:], ".*")
            assert begun == ended <= 2, bot.messages()[told:]
        entries = bot.entries()
        assert len(set(entries)) == len(entries) and set(entries) <= {row.key for row in bot.rows("intent")}
        assert bot.end() == 0


def leaping_exchange(ground: Ground, home: Path) -> None:
    """The exchange's clock leaps by ten seconds for half a minute; then it leaps and will not tell."""
    with trial(minute_market(ground.data), home, ground.models) as bot:
        well(bot)
        for by in (10.0, -10.0):
            inject(bot.exchange, Rule("skew", by=by, seconds=30.0))
            until(lambda: bot.exchange.elapsed > bot.exchange.setup.script.rules[0].start + 31, "the leap back", bot)
            well(bot)
            assert not bot.naked()
        inject(bot.exchange, Rule("skew", by=10.0, seconds=1e6), Rule("status", on="GET /v2/settings", status=503))
        with spell(bot, "clock", "did not tell its time|not known well enough", over=lambda: inject(bot.exchange)) as dark:
            wait_for(lambda: False, 12.0)  # more than a bar
            assert not dark.enters() or bot.entries() == dark.entered
        assert bot.end() == 0


def services(ground: Ground, home: Path, mode: str, words: str) -> None:
    """Both services answer badly in one way, for a while."""
    first, second = Mangler(ground.detector.port), Mangler(ground.predictor.port)
    told = {"HMM_ENDPOINT": first.url, "TRADE_PREDICTOR_ENDPOINT": second.url, "DELTA_SERVICE_AUTH": "api_key", "DELTA_SERVICE_KEY": SERVICE_KEY}
    with contextlib.closing(first), contextlib.closing(second), trial(minute_market(ground.data), home, ground.models, **told) as bot:
        def turn(how: str) -> None:
            first.turn(how)
            second.turn(how)
        well(bot)
        turn(mode)
        with spell(bot, "services", words, over=lambda: turn("good")) as dark:
            until(lambda: dark.silent("hmm-detector") and dark.time_exits(), "silence and a time exit", bot)
        asked = first.asked
        turn(mode)
        until(lambda: first.asked > asked or "services" in bot.causes(), "a question", bot)
        kill(bot)


def strange_key(ground: Ground, home: Path) -> None:
    """The services want a key that this bot lacks; it is told, and started again."""
    told = {"HMM_ENDPOINT": f"http://127.0.0.1:{ground.detector.port}", "TRADE_PREDICTOR_ENDPOINT": f"http://127.0.0.1:{ground.predictor.port}"}
    with trial(minute_market(ground.data), home, ground.models, **told) as bot:
        until(lambda: "services" in bot.causes() and bot.is_in("DEGRADED"), "DEGRADED", bot)
        until(lambda: len(bot.rows("decision")) >= 9, "three bars", bot)
        assert bot.is_in("DEGRADED") and not bot.entries() and "401" in bot.causes()["services"]
        assert pairs(bot.messages(), "401") == (1, 0)
        assert bot.end() == 0
        bot.told |= {"DELTA_SERVICE_AUTH": "api_key", "DELTA_SERVICE_KEY": SERVICE_KEY}
        bot.start()
        well(bot)
        assert bot.end() == 0


def full_disk(ground: Ground, home: Path) -> None:
    """Nothing more fits on the disk; it is made free, and only a restart trusts it again."""
    home.mkdir(parents=True)
    disk, filler = home / "disk", home / "disk" / "filler"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        with trial(minute_market(ground.data), home / "bot", ground.models, DELTA_STATE_DIR=str(disk)) as bot:
            well(bot)
            with contextlib.suppress(OSError), filler.open("wb", 0) as file:
                while file.write(bytes(4096)):
                    pass
            told = bot.told_well
            until(lambda: "disk" in bot.causes() and bot.is_in("DEGRADED"), "DEGRADED because of the disk", bot)
            entered, left = bot.entries(), set(bot.exits())
            rows = len(bot.rows("refused"))
            until(lambda: len(bot.rows("refused")) > rows and set(bot.exits()) > left, "a refused signal and an exit", bot)
            filler.unlink()
            rows = len(bot.rows("refused"))
            until(lambda: len(bot.rows("refused")) > rows, "a refused signal although there is room", bot)
            assert bot.entries() == entered and bot.longest_naked() <= 5 and not bot.naked()
            assert pairs(bot.messages()[told:], "the disk is full") == (1, 0), bot.messages()[told:]
            assert bot.end() == 0
            bot.start()
            well(bot)
            assert bot.end() == 0
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


# Secrets --------------------------------------------------------------------------------------------------------------------

PLANTED = {"DELTA_API_KEY": "Planted+Key/of=the-exchange&5821", "DELTA_API_SECRET": "Planted+Secret/of=the-exchange&7734", "DELTA_SERVICE_KEY": "Planted+Service/key=of-both&0123456789ab",
           "DELTA_DASHBOARD_KEY": "Planted+Page/key=for-the-switch&0123456789"}
TOKEN = "PlantedTokenOfThePhone4711"
CRASH = """
import gc, os
from delta_go.live import bot as loop
keep_time = loop.keep_time
def stumble(bot):
    if os.path.exists({flag!r}):
        everything = [repr(thing)[:20_000] for thing in gc.get_objects() if str(getattr(type(thing), "__module__", "")).startswith("delta_go")]
        open({flag!r} + ".objects", "w").write("\\n".join(everything))
        raise RuntimeError("planted: " + repr(bot.flight.executor.account) + repr(bot) + "".join(everything)[-4_000:])
    keep_time(bot)
loop.keep_time = stumble
"""


def disguises(secret: str) -> set[bytes]:
    """What a secret may look like: as it is, in an address, in JSON, as hexadecimal digits, in base64 at any place."""
    plain = secret.encode()
    shapes = {plain, plain[::-1], urllib.parse.quote(secret, safe="").encode(), urllib.parse.quote_plus(secret).encode(), urllib.parse.quote(secret).encode(), json.dumps(secret)[1:-1].encode(),
              plain.hex().encode(), plain.hex().upper().encode(), secret.lower().encode(), secret.encode("utf-16-le"), secret.replace("/", "\\/").encode(), secret.replace("&", "&amp;").encode()}
    for lead in range(3):
        for alphabet in (None, b"-_"):
            code = base64.b64encode(b"x" * lead + plain, alphabet)
            shapes.add(code[(0, 2, 3)[lead]:-4])
    return shapes


def traces(text: bytes, where: str) -> list[str]:
    """Which secrets show in a text."""
    return [f"{name} in {where}: {text[max(0, at - 80):at + 40]!r}" for name, secret in [*PLANTED.items(), ("DELTA_NOTIFY", TOKEN)] for shape in disguises(secret) if (at := text.find(shape)) >= 0]


def fetch(url: str, body: bytes | None = None, **headers: str) -> bytes:
    """All that a server says, refusals too."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10) as reply:
            return str(reply.headers).encode() + reply.read()
    except urllib.error.HTTPError as error:
        return str(error.headers).encode() + error.read()


def secrets(ground: Ground, home: Path) -> None:
    """Errors that echo keys, refused logins, a phone that fails, visitors with wrong keys, a crash that shows every object: no secret is in anything that anybody can read."""
    home.mkdir()
    letters, flag, port = list[bytes](), home / "stumble", free_port()
    phone = Phone(letters)
    first, second = Mangler(ground.detector.port), Mangler(ground.predictor.port)
    told = {**PLANTED, "DELTA_NOTIFY": f"json://visitor:{TOKEN}@127.0.0.1:{phone.port}/{TOKEN}?+X-Token={TOKEN}", "DELTA_STATUS_PORT": str(port), "DELTA_SERVICE_AUTH": "api_key",
            "HMM_ENDPOINT": first.url, "TRADE_PREDICTOR_ENDPOINT": second.url, "LOG_LEVEL": "DEBUG"}
    setup = minute_market(ground.data, keys=((PLANTED["DELTA_API_KEY"], PLANTED["DELTA_API_SECRET"]),))
    with contextlib.closing(phone), contextlib.closing(first), contextlib.closing(second), trial(setup, home / "bot", ground.models, CRASH.format(flag=str(flag)) + EAGER, **told) as bot:
        def seen() -> list[str]:
            page = f"http://127.0.0.1:{port}"
            wrong = json.dumps({"key": "no key of this page at all 0123456789", "who": "x", "why": "y"}).encode()
            answers = [fetch(page + path) for path in ("/", "/status.json", "/chart.json?symbol=BTCUSD", "/decisions.json", "/trades.json", "/metrics", "/health/ready", "/none", "/kill")]
            answers += [fetch(page + "/kill", wrong, **{"Content-Type": "application/json"}), fetch(page + "/status.json", **{"X-API-Key": "wrong"})]
            assert all(answers) and b"RUNNING" in b"".join(answers) + b"RUNNING"
            title = b"".join(Path(f"/proc/{bot.process.pid}/{name}").read_bytes() for name in ("cmdline", "comm"))
            return [found for number, answer in enumerate(answers) for found in traces(answer, f"page {number}")] + traces(title, "title")
        well(bot)
        found = seen()
        for mode in ("echo", "garbage"):
            first.turn(mode)
            second.turn(mode)
            until(lambda: "services" in bot.causes(), "silent services", bot)
            found += seen()
        first.turn("good")
        second.turn("good")
        REFUSING.add(id(bot.exchange.desk))
        inject(bot.exchange, Rule("down", seconds=6.0))
        until(lambda: "login refused" in bot.status().streams["private"], "a refused login", bot)
        rows = len(bot.rows("decision"))
        until(lambda: len(bot.rows("decision")) > rows, "a bar", bot)
        found += seen()
        flag.touch()
        assert bot.process.wait(60) == 1
        assert b"planted: " in bot.log.read_bytes() and b"Settings(starting_equity" in flag.with_suffix(".objects").read_bytes()
        files = [path for path in home.rglob("*") if path.is_file() and path != flag]
        assert len(files) > 5 and letters
        found += [trace for path in files for trace in traces(path.read_bytes(), path.name)] + [trace for path in home.rglob("*") for trace in traces(str(path).encode(), "a name")]
        found += [trace for letter in letters for trace in traces(letter, "a letter")]
    assert not found, "\n".join(found)


def old_answers(ground: Ground, home: Path) -> None:
    """Listings lack whatever is younger than five seconds: a position with its stop is left alone."""
    with trial(minute_market(ground.data, script=Script(answers=Answers(read_lag=4.8))), home, ground.models) as bot:
        for _ in range(2):
            well(bot)
        newest = max(row.body["made_us"] for row in bot.rows("intent") if not row.body["reduce_only"])
        until(lambda: bot.status().at > newest / 1e6 + 10, "ten seconds with it", bot)
        assert not [row for row in bot.rows("intent") if row.body["reason"] == NO_STOP] and not bot.naked()


# All of them ----------------------------------------------------------------------------------------------------------------

TRIALS: dict[str, Callable[[Ground, Path], None]] = {
    "old answers": old_answers, "500s and 429s": storm, "login refused": refused_login, "silent sockets": silent_sockets, "stale candles": stale_candles, "maintenance": closed_exchange, "restart": restarted_exchange,
    "quota": scarce_quota, "our clock": jumping_clock, "their clock": leaping_exchange, "no key for the services": strange_key, "disk full": full_disk, "secrets": secrets,
    "services down": lambda ground, home: services(ground, home, "down", "no answer"), "services garbage": lambda ground, home: services(ground, home, "garbage", "expected"),
    "services slow": lambda ground, home: services(ground, home, "slow", "no answer"), "services of other models": lambda ground, home: services(ground, home, "others", "deploy both services")}


LONG = ("stale candles", "quota", "services garbage", "services slow")  # too long for every day


@pytest.fixture(scope="module")
def flights(ground: Ground, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[None]]]:
    """Every trial that was asked for, all in the air at once: they wait most of the time."""
    names = [item.callspec.params["name"] for item in request.session.items if getattr(item, "function", None) is test_blind]
    with ThreadPoolExecutor(int(os.environ.get("BLIND_AT_ONCE", "12"))) as pool:
        yield {name: pool.submit(TRIALS[name], ground, ground.home / name.replace(" ", "_")) for name in names}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in TRIALS])
def test_blind(name: str, flights: dict[str, Future[None]]) -> None:
    """No entry, exits and stops still managed, one clear message; and well again afterwards."""
    flights[name].result()


@pytest.mark.parametrize("wrong, cure", [({"DELTA_API_KEY": "a-key-of-the-other-place"}, "testnet keys do not work on production and the reverse, check DELTA_MODE and DELTA_API_KEY"),
                                         ({"DELTA_API_SECRET": "another-secret"}, "check DELTA_API_SECRET"), ({"DELTA_API_SECRET": ""}, "make a key on the exchange's page")])
def test_a_key_of_another_environment_ends_the_start(ground: Ground, tmp_path: Path, wrong: dict[str, str], cure: str) -> None:
    """One line with the cure, exit code 2, nothing begun."""
    with emulated(minute_market(ground.data)) as exchange:
        done = subprocess.run([sys.executable, "-c", RUN, "bot"], env=environment(exchange.url, ground.models, tmp_path / "state", **wrong), capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stdout.count("\n") <= 1  # the log's line
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and cure in done.stderr
        assert not any(account.orders for account in exchange.desk.exchange.accounts.values())
        assert not list((tmp_path / "state").rglob("journal.db"))


def test_a_secret_in_any_dress_is_found() -> None:
    """The search would notice."""
    for secret in PLANTED.values():
        for dress in (secret, urllib.parse.quote(secret, safe=""), base64.b64encode(f"user:{secret}".encode()).decode(), secret.encode().hex(), json.dumps({"a": secret})):
            assert traces(f"some {dress} text".encode(), "a text"), dress
