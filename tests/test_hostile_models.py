"""A thousand hostile model files: none is run, none stops a service, and whoever asks is told that the service is not ready, or goes on being answered by the good set."""
from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.load import Running, running
from delta_go.domain import InputError
from delta_go.learning.registry import MANIFEST_FILE, PREDICTOR_FILE, load_models
from delta_go.serving import detect_regime, predict_trade
from delta_go.serving.contract import Problem
from delta_go.serving.holder import Held, load_detector, load_predictor
from delta_go.serving.service import Asked
from tests.hostile_models import COUNT, DETECTOR, FILES, PREDICTOR, Hostile, gadgets, good, placements, restore, swap, thousand

BUILD = {"service_version": "0", "git_sha": "0"}
LOADS: dict[str, Callable[..., Held]] = {DETECTOR: load_detector, PREDICTOR: load_predictor}
PEAK = 400  # megabytes that a service may ever have had; its container has 512


@pytest.fixture(scope="module")
def canary(tmp_path_factory) -> Path:
    """A folder in which every gadget would leave something."""
    place = tmp_path_factory.mktemp("hostile") / "canary"
    place.mkdir()
    return place


@pytest.fixture(scope="module")
def all_of_them(canary) -> list[Hostile]:
    return thousand(canary)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good set, to be spoilt."""
    restore(tmp_path / "models")
    return tmp_path / "models"


def test_there_are_a_thousand(all_of_them):
    assert len(all_of_them) == COUNT and len({(each.service, each.family, each.what) for each in all_of_them}) == COUNT
    assert Counter(each.service for each in all_of_them).most_common()[-1][1] > COUNT / 3 and sum(each.must for each in all_of_them) > 0.65 * COUNT


ARMED = """
import contextlib, os, pickle, sys
from pathlib import Path
folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.pkl")):
    if os.fork() == 0:
        os.setsid()
        with contextlib.suppress(BaseException):
            pickle.loads(path.read_bytes())
        os._exit(0)
    os.wait()
"""


def test_gadgets_are_armed(tmp_path):
    """Three dozen of them really do it, where somebody unpickles them as usual."""
    for number, (title, _) in enumerate(gadgets(tmp_path / "0").items()):
        place = tmp_path / str(number) / "owned"
        place.mkdir(parents=True)
        (tmp_path / f"{number}.pkl").write_bytes(b"\x80\x04" + gadgets(place)[title] + b".")
    subprocess.run([sys.executable, "-c", ARMED, str(tmp_path)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, timeout=120)
    time.sleep(0.5)
    fired = [title for number, title in enumerate(gadgets(tmp_path / "0")) if any((tmp_path / str(number) / "owned").iterdir())]
    assert len(fired) >= 50, sorted(set(gadgets(tmp_path / "0")) - set(fired))


# The loader ------------------------------------------------------------------------------------------------------------------

def finite(data: object) -> bool:
    """Nothing but numbers that are some, at any depth."""
    values = data.values() if isinstance(data, dict) else data if isinstance(data, list) else []
    return all(map(finite, values)) and not (isinstance(data, float) and not math.isfinite(data))


def ask(service: str, held: Held) -> Iterator[dict]:
    """What a loaded set answers; a refusal of the kind that a caller gets is none."""
    now = time.time()
    bodies = [detect_regime.sample_window(symbol) for symbol in held.models] if service == DETECTOR else [predict_trade.SAMPLE, {}, {"side": -1, "rsi": 0.0, "hour": 23}, {"rsi": 100.0, "ema_gap": -1e6, "volume_ratio": 100.0}]
    answer = detect_regime.answer_regimes if service == DETECTOR else predict_trade.answer_trades
    for body in bodies:
        with contextlib.suppress(Problem):
            yield json.loads(answer(held, Asked(json.dumps(body).encode(), {}, now, "r"))[0])


def test_the_loader_refuses_or_gets_a_model(all_of_them, canary, folder):
    loaded: Counter[str] = Counter()
    for number, each in enumerate(all_of_them):
        restore(folder)
        each.put(folder)
        with contextlib.suppress(InputError):
            number % 9 or load_models(folder)   # the bot's way
        try:
            held = LOADS[each.service](folder, BUILD)
        except InputError as error:
            assert str(folder) in str(error) or re.match(r"(hmm_model_\w+\.pkl|trade_predictor\.pkl|manifest\.json)\b", str(error)), (each, error)
            continue
        assert not each.must, each
        loaded[each.family] += 1
        for answer in ask(each.service, held):
            assert finite(answer) and 0 <= answer["confidence"] <= 1, each
    assert list(canary.iterdir()) == []
    assert 20 < sum(loaded.values()) < 150, loaded   # a changed byte in a number, or in the meta data, makes another model


def test_what_is_swapped_while_it_loads(folder, canary):
    """A file is changed all the time, whole and in place, to a gadget and back: the set as it was comes, or a refusal."""
    gadget = next(iter(gadgets(canary).values()))
    hostile, over, version, seen = b"\x80\x04" + gadget + b".", threading.Event(), load_models(folder).manifest.version, Counter()

    def swapping() -> None:
        while not over.is_set():
            for name in FILES:
                swap(name, hostile)(folder)
                (folder / "other").write_bytes(good()[name])
                os.replace(folder / "other", folder / name)
                (folder / MANIFEST_FILE).write_bytes(good()[MANIFEST_FILE])
    thread = threading.Thread(target=swapping)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while (min(seen["loaded"], seen["refused"]) < 20 or sum(seen.values()) < 200) and time.monotonic() < deadline:
            try:
                assert load_models(folder).manifest.version == version
                seen["loaded"] += 1
            except InputError:
                seen["refused"] += 1
    finally:
        over.set()
        thread.join()
    assert seen["refused"] >= 20 and seen["loaded"] >= 1 and list(canary.iterdir()) == []


# Real services ---------------------------------------------------------------------------------------------------------------

def ready(service: Running) -> dict:
    """What it says of itself."""
    status, body = service.get()
    return {**json.loads(body), "http": status}


def wait_until(service: Running, true: Callable[[dict], bool], seconds: float = 20.0) -> dict:
    """What it says once something is true of it, or at the end of the time."""
    deadline = time.monotonic() + seconds
    while not true(told := ready(service)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return told


def hang_up(service: Running) -> None:
    service.process.send_signal(signal.SIGHUP)


def question(name: str) -> dict:
    return detect_regime.sample_window("BTCUSD") if name == DETECTOR else predict_trade.SAMPLE


def well(service: Running, name: str, version: str) -> None:
    """It answers, by the good set."""
    status, answer = service.post(question(name))
    assert status == 200 and answer["model_version"] == version and finite(answer)


def spoil_and_reload(service: Running, folder: Path, each: Hostile, version: str) -> str:
    """One hostile folder and back; what came of it."""
    restore(folder)
    each.put(folder)
    hang_up(service)
    told = wait_until(service, lambda told: told["reload_refused"] or told["model_version"] != version, 20.0 if each.must else 3.0)
    assert told["http"] == 200, (each, told)
    if each.must or told["reload_refused"]:
        assert told["model_version"] == version and re.fullmatch(r"[\w.]+ did not pass its checks", told["reload_refused"]), (each, told)
        well(service, each.service, version)
    elif told["model_version"] != version:
        status, answer = service.post(question(each.service))
        assert status == 200 and finite(answer) or answer["code"] == "internal" and "not finite" in answer["detail"], (each, answer)
    restore(folder)
    hang_up(service)
    assert wait_until(service, lambda told: not told["reload_refused"] and told["model_version"] == version)["reload_refused"] is None
    return "refused" if told["reload_refused"] else "loaded"


def spoilt_from_the_start(folder: Path, each: Hostile, version: str) -> None:
    """A service that finds it when it starts is not ready and says so; it is, when the folder is good again."""
    restore(folder)
    each.put(folder)
    with running(each.service, models=folder) as service:
        told = ready(service)
        if each.must:
            assert (told["http"], told["code"]) == (503, "not_ready") and str(folder) not in json.dumps(told), (each, told)
            assert [service.get(path)[0] for path in ("/health/startup", "/health/live", "/")] == [503, 200, 200]
            assert service.post(question(each.service))[0] == 503
        restore(folder)
        hang_up(service)
        wait_until(service, lambda told: told["http"] == 200 and told["model_version"] == version and not told["reload_refused"])
        well(service, each.service, version)


def peak(worker: int) -> float:
    """Megabytes that a process has had at most."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{worker}/status").read_text())[1]) / 1024


def try_on_a_service(name: str, chosen: list[Hostile], starts: list[Hostile], folder: Path, canary: Path) -> Counter[str]:
    """Every one of the chosen to a running service, some to starting ones; none is run, and the worker is the same to the end."""
    version, seen = load_models(folder).manifest.version, Counter()
    log = folder.parent / "log"
    with running(name, models=folder, log=log) as service:
        workers = service.workers()
        for each in chosen:
            seen[spoil_and_reload(service, folder, each, version)] += 1
        assert service.workers() == workers and service.process.poll() is None and list(canary.iterdir()) == []
        assert peak(workers[0]) < PEAK
    assert "Traceback" not in log.read_text() and "unforeseen" not in log.read_text()
    for each in starts:
        spoilt_from_the_start(folder, each, version)
    assert list(canary.iterdir()) == []
    return seen


def families(all_of_them: list[Hostile], name: str) -> dict[str, list[Hostile]]:
    found: dict[str, list[Hostile]] = {}
    for each in all_of_them:
        if each.service == name:
            found.setdefault(each.family, []).append(each)
    return found


@pytest.mark.parametrize("name", [DETECTOR, PREDICTOR])
def test_a_running_service_goes_on_and_a_starting_one_says_it_is_not_ready(all_of_them, folder, canary, name):
    groups = families(all_of_them, name)
    chosen = [each for group in groups.values() for each in (group[0], group[len(group) // 2])]
    starts = [next(each for each in groups[family] if each.must) for family in ("gadget", "kinds", "bombs")]
    seen = try_on_a_service(name, chosen, starts, folder, canary)
    assert seen["refused"] > len(chosen) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [DETECTOR, PREDICTOR])
def test_all_thousand_against_real_services(all_of_them, folder, canary, name):
    chosen = [each for each in all_of_them if each.service == name]
    seen = try_on_a_service(name, chosen, [each for each in chosen if each.must][::8], folder, canary)
    assert sum(seen.values()) == len(chosen) and seen["refused"] > 0.8 * len(chosen), seen


@pytest.mark.parametrize("name", [DETECTOR, PREDICTOR])
def test_a_service_whose_files_change_while_it_reloads(folder, canary, name):
    """Asked to reload again and again while a hostile file comes and goes: every answer is the good set's."""
    version, file = load_models(folder).manifest.version, PREDICTOR_FILE if name == PREDICTOR else FILES[0]
    hostile = dict(placements(file, gadgets(canary)["posix system"]))["in place of a value"]
    with running(name, models=folder) as service:
        workers, refused = service.workers(), 0
        for turn in range(60):
            swap(file, hostile, turn % 2 == 0)(folder)
            hang_up(service)
            time.sleep(0.003 * (turn % 5))
            (folder / file).write_bytes(good()[file])
            (folder / MANIFEST_FILE).write_bytes(good()[MANIFEST_FILE])
            told = ready(service)
            assert told["http"] == 200 and told["model_version"] == version
            refused += told["reload_refused"] is not None
        assert refused > 0
        hang_up(service)
        assert wait_until(service, lambda told: not told["reload_refused"])["model_version"] == version
        well(service, name, version)
        assert service.workers() == workers and list(canary.iterdir()) == []
