"""The roll-out against a cloud that fails at every call, in every way, and against processes that die between any two."""
from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import msgspec
import pytest
from fake_gcloud import KINDS, OLD_BOT, Cloud, Failed, install
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout import KINDS as KINDS_OF_CANDIDATES
from rollout import local_cloud

from delta_go.domain import DeltaGoError, InputError
from delta_go.ops import deploy as room
from delta_go.ops.deploy import Pace, begin, roll_out, stage
from delta_go.rollout import SERVICES, DeployFault, Rollout, Step, Target, advance, backward, call_of, flags_of, forward, mixed, read_splits

ROOT = Path(__file__).parents[1]
TARGET = Target("staging", "delta-go-staging", repository="us-central1-docker.pkg.dev/delta-go-staging/delta-go")
NEW = {name: f"{TARGET.repository}/{name}@sha256:{'22' * 32}" for name in (*SERVICES, "bot")}
QUICK = Pace(requests=2, hold=0, ratio=1e9, rounds=1, pause=0, call=2, build=2)
COMMANDS = json.loads((ROOT / "deploy/bot/commands.json").read_text())
OLD = {name: {f"{name}-1": 100} for name in SERVICES}
MODELS, _ = room.golden_questions(ROOT / "models")


@cache
def app(name: str):
    """A service without a socket."""
    from importlib import import_module

    from delta_go.serving.access import read_settings
    place = import_module(f"delta_go.serving.{SERVICES[name].strip('/')}")
    return place.create_app(read_settings({"HMM_MODEL_DIR": str(ROOT / "models"), "TRADE_PREDICTOR_MODEL": str(ROOT / "models")})).test_client()


@cache
def answer(name: str, body: bytes) -> bytes:
    """What a service with the committed models says."""
    return app(name).post("/", data=body, content_type="application/json").data


def ask(address: str, audience: str, question: room.Question) -> bytes:
    """Every address answers well."""
    return answer(question.service, question.body)


def in_process(cloud: Cloud, words, seconds: float) -> str:
    """The fake without a process."""
    try:
        return cloud.call(words)
    except (Failed, TimeoutError) as error:
        raise DeployFault(str(error)) from None


def first(bot: bool = False, build: bool = False, services: tuple[str, ...] = tuple(SERVICES)) -> Rollout:
    """A roll-out before its first step."""
    parts = [*services, *["bot"] * bot]
    images = {part: f"{TARGET.repository}/{part}:x" if build else NEW[part] for part in parts}
    return Rollout(TARGET, services, MODELS["model_version"], images, commands=COMMANDS if bot else {}, build=build)


@pytest.fixture(autouse=True)
def spared_disk(monkeypatch):
    """Thousands of states without waiting for the disk each time; the real processes wait."""
    def write(path: Path, raw: bytes) -> None:
        path.with_suffix(".new").write_bytes(raw)
        os.replace(path.with_suffix(".new"), path)
    monkeypatch.setattr(room, "write_bytes", write)
    monkeypatch.setattr(room, "golden_questions", cache(room.golden_questions))


def go(folder: Path, how: str = "begin", start: Rollout | None = None, asking=ask, root: Path = ROOT) -> Rollout | DeltaGoError | None:
    """Run once; its end, the error it ended with, or None if the process was killed."""
    try:
        return roll_out(TARGET, root, folder / "state", how, lambda passed: start or first(), lambda words, urgent: None, lambda line: None, QUICK,
                        partial(in_process, Cloud(folder / "cloud")), asking)
    except DeltaGoError as error:
        return error
    except SystemExit:
        return None


def side(cloud: Cloud, old: dict = OLD) -> str:
    """old or new; an error for a stray split, a left tag, an open door, a mixed pair or a bot that is not with the services."""
    state, sides = cloud.read(), set()
    for name in SERVICES:
        service = state["services"].get(name)
        assert service is None or "allUsers" not in service["policy"]
        assert service is None or set(service["tags"]) <= {"previous"}
        if (service and service["traffic"]) == old.get(name):
            sides.add("old")
        else:
            assert service is not None and list(service["traffic"].values()) == [100] and "-new" in next(iter(service["traffic"]))
            sides.add("new")
    assert state["bot"]["running"]
    assert len(sides) == 1, sides
    return sides.pop()


def script(folder: Path, told: dict[str, str]) -> None:
    """What is going to fail."""
    (folder / "cloud" / "script.json").write_text(json.dumps(told))


def fresh(folder: Path, old: dict = OLD) -> Cloud:
    """A cloud in its first state."""
    shutil.rmtree(folder, ignore_errors=True)
    return Cloud(folder / "cloud").create(old)


VARIANTS = {"services": (OLD, first()), "with the bot": (OLD, first(bot=True)), "first time": ({}, msgspec.structs.replace(first(), first=True)),
            "one by one of an odd split": ({name: {f"{name}-1": 67, f"{name}-2": 33} for name in SERVICES}, first(services=("hmm-detector",)))}


def length(folder: Path, old: dict, start: Rollout) -> int:
    """Calls of a roll-out that goes well."""
    cloud = fresh(folder, old)
    end = go(folder, start=start)
    assert isinstance(end, Rollout) and end.outcome == "done"
    return len(cloud.calls())


def test_good_candidate_gets_everything(tmp_path):
    """Both services and the bot end on the new version, in the promised order, and no call opens a door."""
    cloud = fresh(tmp_path)
    assert go(tmp_path, start=first(bot=True)).outcome == "done" and side(cloud) == "new"
    calls = cloud.calls()
    assert cloud.read()["bot"]["image"] == NEW["bot"]
    shares = [word.partition("new1=")[2] for words in calls for word in words if word.startswith("--to-revisions=hmm-detector-1")]
    assert shares == ["10", "50"]
    assert all("--no-allow-unauthenticated" in words and "--no-traffic" in words for words in calls if words[:2] == ["run", "deploy"])
    assert not any("allUsers" in word or word == "--allow-unauthenticated" for words in calls for word in words)
    assert cloud.read()["services"]["hmm-detector"]["tags"] == {"previous": "hmm-detector-1"}
    bot = [words[-1] for words in calls if words[:2] == ["compute", "ssh"]]
    assert [("stop" in word, "start" in word) for word in bot[2:4]] == [(True, False), (False, True)]


EVERY = [pytest.param(variant, kind, marks=[] if (variant, kind) in {("with the bot", "fail before"), ("with the bot", "fail after"), ("services", "kill after")} else pytest.mark.slow)
         for variant in ("services", "with the bot", "first time") for kind in KINDS]


@pytest.mark.parametrize("variant, kind", EVERY)
def test_failure_at_every_call(tmp_path, variant, kind):
    """Whatever fails, and wherever: old at 100 % or new at 100 %; a process that died is finished by --resume and by --abort."""
    old, start = VARIANTS[variant]
    for k in range(1, length(tmp_path, old, start) + 1):
        for how in ("resume", "abort") if kind.startswith("kill") else ("",):
            cloud = fresh(tmp_path, old)
            script(tmp_path, {str(k): kind})
            end = go(tmp_path, start=start)
            if how:
                assert end is None
                script(tmp_path, {})
                end = go(tmp_path, how)
                assert isinstance(end, Rollout), (k, end)
                assert side(cloud, old) == ("new" if how == "resume" else "old"), k
            else:
                reached = side(cloud, old)
                assert (reached == "new") == (isinstance(end, Rollout) and end.outcome == "done"), (k, reached, end)


@pytest.mark.parametrize("kind", ["fail after", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fail before", "hang after"))])
def test_outage_from_every_call_on(tmp_path, kind):
    """A cloud that never comes back leaves a state that says so; when it does, one --abort ends at the old version."""
    start = first(bot=True)
    for k in range(1, length(tmp_path, OLD, start) + 1):
        cloud = fresh(tmp_path)
        script(tmp_path, {f"{k}+": kind})
        end = go(tmp_path, start=start)
        assert isinstance(end, DeployFault)
        if "NOT CLEAN" in str(end):
            script(tmp_path, {})
            assert isinstance(go(tmp_path, start=start), InputError)   # nothing new begins over it
            end = go(tmp_path, "abort")
            assert isinstance(end, Rollout), (k, end)
        assert side(cloud) == "old", k


@pytest.mark.slow
def test_second_failure_on_the_way_back(tmp_path):
    """One more failing call on the way back is tried again."""
    start, worst = first(bot=True), 0
    for k in range(10, length(tmp_path, OLD, start) + 1, 3):
        for later in range(1, 8):
            cloud = fresh(tmp_path)
            script(tmp_path, {str(k): "fail after", str(k + later): KINDS[later % 6]})
            go(tmp_path, start=start)
            side(cloud)
            worst = max(worst, len(cloud.calls()))
    assert worst < 80


@pytest.mark.slow
def test_killed_on_the_way_back(tmp_path):
    """A process that dies while it goes back is finished by another one."""
    start = first(bot=True)
    for k in range(12, length(tmp_path, OLD, start), 4):
        for later in range(1, 6):
            for how in ("resume", "abort"):
                cloud = fresh(tmp_path)
                script(tmp_path, {str(k): "fail before", str(k + later): "kill after"})
                if go(tmp_path, start=start) is None:
                    script(tmp_path, {})
                    go(tmp_path, how)
                assert side(cloud) in (("old", "new") if how == "resume" else ("old",))


def test_lost_state_is_taken_back_from_the_cloud(tmp_path):
    """The machine is gone with its disk: --abort elsewhere ends at the old version all the same."""
    for k in range(1, length(tmp_path, OLD, first()) + 1):
        cloud = fresh(tmp_path)
        script(tmp_path, {str(k): "kill after"})
        assert go(tmp_path) is None
        shutil.rmtree(tmp_path / "state")
        script(tmp_path, {})
        left = any("candidate" in service["tags"] for service in cloud.read()["services"].values())
        if left:
            assert "an earlier roll-out was left" in str(go(tmp_path))
            shutil.rmtree(tmp_path / "state")
        tidied = [name for name, service in cloud.read()["services"].items() if "-new" in next(iter(service["traffic"])) and "candidate" not in service["tags"]]
        end, now = go(tmp_path, "abort"), cloud.read()["services"]
        assert isinstance(end, Rollout if left and not tidied else InputError), (k, end)
        assert len({"-new" in revision for service in now.values() for revision in service["traffic"]}) == 1, "never a mixed pair"
        assert all(len(service["traffic"]) == 1 for service in now.values())
        if left and tidied:
            assert "it alone" in str(end) and "--remove-tags candidate" in str(end)
        else:
            assert not any("candidate" in service["tags"] for service in now.values())


@pytest.mark.parametrize("how", ["begin", "abort"])
def test_services_of_another_place_are_left_alone(tmp_path, how):
    """A roll-out to staging that is told production's project, as a variable left over from yesterday does, changes nothing."""
    cloud = fresh(tmp_path)
    state = cloud.read()
    for service in state["services"].values():
        service["labels"] = {"environment": "production"}
    state["services"]["hmm-detector"] |= {"tags": {"candidate": "hmm-detector-2"}, "revisions": {"hmm-detector-1": "", "hmm-detector-2": ""}} if how == "abort" else {}
    cloud.write(state)
    assert "hmm-detector is of production" in str(go(tmp_path, how)) and cloud.read()["services"] == state["services"]
    assert {tuple(words[:3]) for words in cloud.calls()} == {("run", "services", "list")}


@pytest.mark.parametrize("k", [6, 9, 12, 16])
def test_two_roll_outs_that_meet(tmp_path, k):
    """Another machine deploys other images from a call on: what was asked and passed is never another image than the one that gets the traffic."""
    cloud, calls, others = fresh(tmp_path), [0], f"{TARGET.repository}/hmm-detector@sha256:{'33' * 32}"

    def gcloud(words, seconds: float) -> str:
        calls[0] += 1
        if calls[0] == k:
            in_process(cloud, ["run", "deploy", "hmm-detector", f"--image={others}", "--no-traffic", "--tag=candidate", "--no-allow-unauthenticated"], seconds)
        return in_process(cloud, words, seconds)

    with pytest.raises(DeployFault, match="somebody else|an earlier roll-out|got"):
        roll_out(TARGET, ROOT, tmp_path / "state", "begin", lambda passed: first(), lambda words, urgent: None, lambda line: None, QUICK, gcloud, ask)
    assert side(cloud) == "old"


@pytest.mark.parametrize("what", ["disk", "terminal", "impatience"])
def test_what_is_around_a_roll_out_fails_from_any_moment_on(tmp_path, monkeypatch, what):
    """A full disk, a terminal that is gone, an interruption while a fault is told: old or new at 100 %, and somebody is told."""
    write, told = room.write_bytes, list[str]()
    for k in range(0, 36, 3):
        cloud, left = fresh(tmp_path), iter([*[False] * k, *[True] * 999])
        script(tmp_path, {str(k + 1): "fail after"} if what == "impatience" else {})

        def save(path: Path, raw: bytes, left=left) -> None:
            if what == "disk" and next(left):
                raise OSError(28, "No space left on device")
            write(path, raw)

        def say(line: str, left=left) -> None:
            if what == "terminal" and next(left):
                raise OSError(5, "Input/output error")
            if what == "impatience" and line.startswith("  "):
                raise KeyboardInterrupt

        monkeypatch.setattr(room, "write_bytes", save)
        try:
            roll_out(TARGET, ROOT, tmp_path / "state", "begin", lambda passed: first(bot=True), lambda words, urgent: told.append(words), say, QUICK, partial(in_process, cloud), ask)
            assert side(cloud) == "new"
        except DeployFault:
            assert side(cloud) == "old", k
        assert told.pop() and not told


def test_a_terminal_that_hangs_up_ends_at_the_old_version(tmp_path):
    """The real command, hung up on at a call that takes long: SIGHUP turns it around like any interruption."""
    cloud = fresh(tmp_path)
    script(tmp_path, {"15": "hang after"})
    words = "from delta_go.cli import main; main(['deploy', '--project', 'delta-go-staging', '--project-number', '1', '--states', 'STATES', *[f'--image={n}=us-central1-docker.pkg.dev/p/d/{n}@sha256:' + '2' * 64 for n in ('hmm-detector', 'trade-predictor')]])"
    start = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom test_deploy import *\nroom.ask_over_http = lambda gcloud, caller: ask\nroom.Pace.__init__.__defaults__ = (2, 0.0, 1e9, 0.35, 1, 0.0, 300.0, 300.0)\n"
    environ = {**os.environ, "PATH": f"{install(folder := tmp_path / 'cloud')}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "DELTA_NOTIFY": ""}
    with subprocess.Popen([sys.executable, "-c", start + words.replace("STATES", str(tmp_path / "state"))], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while len(Cloud(folder).calls()) < 15 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        out, complaint = process.communicate(timeout=60)
    assert process.returncode == 1 and "rolled back" in complaint and side(cloud) == "old", complaint


def test_odd_split_comes_back_exactly(tmp_path):
    """Two revisions at 67 and 33 with a tag of somebody's are restored as they were, in a roll-out of one service."""
    old, start = VARIANTS["one by one of an odd split"]
    for k in (4, 6, 9, 12):
        cloud = fresh(tmp_path, old)
        state = cloud.read()
        state["services"]["hmm-detector"]["tags"] = {"pinned": "hmm-detector-2"}
        cloud.write(state)
        script(tmp_path, {str(k): "fail after"})
        assert isinstance(go(tmp_path, start=start), DeployFault)
        assert cloud.read()["services"]["hmm-detector"] | {"revisions": 0, "image": 0} == state["services"]["hmm-detector"] | {"revisions": 0, "image": 0}


def test_absent_service_is_no_first_one(tmp_path):
    """A list that lacks a service does not make one, and so never ends in removing one."""
    cloud = fresh(tmp_path, {"hmm-detector": {"hmm-detector-1": 100}})
    assert "trade-predictor: expected it in delta-go-staging" in str(go(tmp_path))
    assert not any({"deploy", "delete"} & set(words) for words in cloud.calls())


def test_open_service_is_left_alone(tmp_path):
    """A door that is open already: nothing is deployed, the exit says which."""
    cloud = fresh(tmp_path)
    state = cloud.read()
    state["services"]["trade-predictor"]["policy"].append("allUsers")
    cloud.write(state)
    assert "trade-predictor: allUsers may call it" in str(go(tmp_path))
    assert not any("deploy" in words for words in cloud.calls())


def test_sick_bot_takes_everything_back(tmp_path):
    """The new bot does not get well: services and bot are back on the old version."""
    cloud = fresh(tmp_path)
    state = cloud.read()
    state["bot"]["sick"] = [NEW["bot"]]
    cloud.write(state)
    assert "bot health" not in str(error := go(tmp_path, start=first(bot=True))) and "503" in str(error)
    assert side(cloud) == "old" and cloud.read()["bot"]["image"] == OLD_BOT


def test_abort_after_it_went_back_is_no_error(tmp_path):
    """A workflow aborts whatever failed: where nothing is left to take back, nothing is called."""
    cloud = fresh(tmp_path)
    script(tmp_path, {"8": "fail before"})
    assert isinstance(go(tmp_path), DeployFault)
    calls = len(cloud.calls())
    assert go(tmp_path, "abort").outcome == "back" and len(cloud.calls()) == calls and side(cloud) == "old"


@pytest.mark.parametrize("sick", [False, True])
def test_first_bot_of_a_machine(tmp_path, sick):
    """A machine without an image gets its first one with --first, and has none again if that one is not well."""
    cloud = fresh(tmp_path, {})
    state = cloud.read()
    state["bot"] = {"image": "", "running": False, "sick": [NEW["bot"]] if sick else []}
    cloud.write(state)
    end = go(tmp_path, start=msgspec.structs.replace(first(bot=True), first=True))
    assert isinstance(end, DeployFault) if sick else end.outcome == "done"
    assert cloud.read()["bot"]["running"] is not sick and (cloud.read()["services"] == {}) is sick


def test_errors_in_the_log_take_it_back(tmp_path):
    """Real requests that failed count, even if all of ours went well."""
    cloud = fresh(tmp_path)
    state = cloud.read()
    state["errors"] = [{"httpRequest": {"status": 503}}]
    cloud.write(state)
    assert "5xx" in str(go(tmp_path)) and side(cloud) == "old"


@pytest.mark.parametrize("stage_of", ["golden", "shadow", "watch"])
@pytest.mark.parametrize("bad", [b"{}", b"not json", b'{"symbol": NaN}', "error", "interrupt"])
def test_bad_answer_at_every_check(tmp_path, stage_of, bad):
    """A bad answer, an error or a person's Ctrl-C at each check leads back."""
    count = {"golden": 3, "shadow": 15, "watch": 24}[stage_of]
    seen: list[str] = []

    def sour(address: str, audience: str, question: room.Question) -> bytes:
        seen.append(address)
        if len(seen) >= count and "candidate" in address:
            if bad in ("error", "interrupt"):
                raise DeployFault("no answer") if bad == "error" else KeyboardInterrupt
            return bad
        return ask(address, audience, question)

    cloud = fresh(tmp_path)
    assert isinstance(go(tmp_path, asking=sour), DeployFault) and side(cloud) == "old"


def test_built_images_are_deployed_by_digest(tmp_path):
    """What was built is resolved before it is deployed."""
    cloud = fresh(tmp_path)
    root = tmp_path / "root"
    for name in SERVICES:
        (root / "deploy" / name).mkdir(parents=True)
        (root / "deploy" / name / "Dockerfile").write_text("FROM x\nCOPY models/manifest.json models/\n")
    shutil.copytree(ROOT / "models", root / "models")
    end = go(tmp_path, start=first(build=True), root=root)
    assert end.outcome == "done" and (root / "build/stage/hmm-detector/models/manifest.json").exists()
    assert all("@sha256:abab" in word for words in cloud.calls() if words[:2] == ["run", "deploy"] for word in words if word.startswith("--image="))


# One process after another, for real ------------------------------------------------------------------------------------------

DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_deploy import *
from pathlib import Path
folder = Path(sys.argv[2])
try:
    end = roll_out(TARGET, ROOT, folder / "state", sys.argv[3], lambda passed: first(bot=True), lambda words, urgent: print(words), print, QUICK, ask=ask)
except DeltaGoError as error:
    sys.exit(str(error))
"""


def in_a_process(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    """The roll-out as a process that finds the fake first on its PATH."""
    environ = {**os.environ, "PATH": f"{install(folder / 'cloud')}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", DRIVER, str(ROOT / "tests"), str(folder), how], env=environ, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind, k", [("hang before", 9), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("fail after", 22), ("bad json", 13)))])
def test_real_command_that_fails(tmp_path, kind, k):
    """A real process, a real command: exit code not zero, the old version."""
    cloud = fresh(tmp_path)
    script(tmp_path, {str(k): kind})
    done = in_a_process(tmp_path, "begin")
    assert done.returncode == 1 and "rolled back" in done.stderr and side(cloud) == "old", done.stderr


@pytest.mark.parametrize("k, how", [(20, "abort"), pytest.param(15, "resume", marks=pytest.mark.slow)])
def test_real_process_that_is_killed(tmp_path, k, how):
    """SIGKILL at a call; another process finishes."""
    cloud = fresh(tmp_path)
    script(tmp_path, {str(k): "kill after"})
    assert in_a_process(tmp_path, "begin").returncode == -signal.SIGKILL
    script(tmp_path, {})
    assert in_a_process(tmp_path, how).returncode == 0
    assert side(cloud) == ("new" if how == "resume" else "old")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_real_process_at_every_call(tmp_path, kind):
    """The whole enumeration again, with real commands and real kills."""
    for k in range(1, length(tmp_path, OLD, first(bot=True)) + 1):
        cloud = fresh(tmp_path)
        script(tmp_path, {str(k): kind})
        done = in_a_process(tmp_path, "begin")
        if kind.startswith("kill"):
            assert done.returncode == -signal.SIGKILL
            script(tmp_path, {})
            assert in_a_process(tmp_path, "resume" if k % 2 else "abort").returncode == 0
            assert side(cloud) == ("new" if k % 2 else "old")
        else:
            assert (done.returncode == 0) == (side(cloud) == "new"), (k, done.stderr)


def test_hanging_command_is_ended(tmp_path):
    """The command and its children are gone when its time is over."""
    place = tmp_path / "gcloud"
    place.write_text("#!/bin/sh\nsleep 300 &\necho $! > \"$(dirname \"$0\")/child\"\nwait\n")
    place.chmod(0o755)
    before, began = os.environ["PATH"], time.monotonic()
    os.environ["PATH"] = f"{tmp_path}:{before}"
    try:
        with pytest.raises(DeployFault, match="no end within"):
            room.run_gcloud(["run", "services", "list"], 1.0)
    finally:
        os.environ["PATH"] = before
    time.sleep(0.2)
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    assert time.monotonic() - began < 30 and (not child.exists() or child.read_text().split()[2] == "Z")


# Two real services a side ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, runs", [("good", 1), ("errors", 1), ("nan", 1), *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in ("slow", "digest", "late")),
                                        *(pytest.param(kind, 50, marks=pytest.mark.slow) for kind in KINDS_OF_CANDIDATES)])
def test_rehearsal(tmp_path, kind, runs):
    """A bad candidate is rolled back each time, a good one gets everything; the champion fails nobody."""
    with local_cloud(tmp_path / "cloud", kind) as local:
        for _ in range(runs):
            result = local.rehearse()
            assert result.failed_champion == 0 and result.seen.total() > 10
            if kind == "good":
                assert result.end == "done" and all("-new" in revision for split in result.split.values() for revision in split), result.end
            else:
                assert "rolled back" in result.end and result.split == OLD and not result.tags and result.seconds < 60, result
            assert kind == "late" or not any(status != 200 for _, status in result.seen)


# The pure parts ----------------------------------------------------------------------------------------------------------------

@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 100))
def test_mixed_adds_up(weights, percent):
    """Always 100, the new one exactly what it should have."""
    shares = {f"r{place}": weight for place, weight in enumerate(weights)}
    shares["r0"] += 100 - sum(weights)
    if min(shares.values()) > 0:
        split = mixed(shares, "new", percent)
        assert sum(split.values()) == 100 and split.get("new", 0) == percent and min(split.values()) > 0


@settings(max_examples=200)
@given(st.lists(st.booleans(), min_size=60, max_size=60), st.booleans())
def test_every_path_ends(outcomes, bot):
    """Whatever goes well or badly, a roll-out ends, and once back it never goes forward."""
    state, seen_back, steps = first(bot=bot), False, 0
    outcomes = outcomes * 20
    while state.outcome == "under way":
        assert state.back or not seen_back
        seen_back = bool(state.back)
        state, steps = advance(state, "" if outcomes[steps] else "fault"), steps + 1
        assert msgspec.json.decode(msgspec.json.encode(state), type=Rollout) == state
        assert steps < 600
    assert (state.outcome == "done") <= (not state.back)


def test_way_back_restores_once_deployed():
    """From the first deployment on, the way back holds a restore of each service, and the confirmation."""
    start = first(bot=True)
    for place, step in enumerate(forward(start)):
        back = [str(step) for step in backward(msgspec.structs.replace(start, back="x", reached=place))]
        deployed = any(step.kind == "deploy" for step in forward(start)[:place + 1])
        assert (back[:4] == ["see", "restore hmm-detector", "restore trade-predictor", "confirm"]) == deployed, step


@pytest.mark.parametrize("text", ["", "null", "{}", "[]x", '[{"metadata": {"name": "hmm-detector"}}]', '[{"metadata": {"name": "hmm-detector"}, "status": {"url": "x", "traffic": []}}]', "[1]"])
def test_odd_list_is_a_fault(text):
    """Nothing is concluded from an answer that is none."""
    with pytest.raises(DeployFault):
        read_splits(text)


@pytest.mark.parametrize("image", ["bot@sha256:12", "x; reboot", "$(id)@sha256:" + "0" * 64, "a b@sha256:" + "0" * 64, "-x@sha256:" + "0" * 64])
def test_only_an_image_reaches_the_machine(image):
    """Nothing else is put into the words for the bot's shell."""
    state = msgspec.structs.replace(first(bot=True), images={**NEW, "bot": image})
    for kind in ("bot pull", "bot start"):
        with pytest.raises(DeployFault, match="digest"):
            call_of(state, Step(kind))


# Manifests, trees, gates ---------------------------------------------------------------------------------------------------------

MANIFEST = """apiVersion: serving.knative.dev/v1
kind: Service
metadata:
  name: {name}
  annotations: {{run.googleapis.com/ingress: internal}}
spec:
  template:
    metadata:
      annotations: {{autoscaling.knative.dev/minScale: "1", autoscaling.knative.dev/maxScale: "3", run.googleapis.com/cpu-throttling: "false", run.googleapis.com/startup-cpu-boost: "true"}}
    spec:
      serviceAccountName: {name}@PROJECT_ID.iam.gserviceaccount.com
      containerConcurrency: 8
      timeoutSeconds: 10
      containers:
        - image: placeholder
          ports: [{{containerPort: 8080}}]
          resources: {{limits: {{cpu: "1", memory: 512Mi}}}}
          startupProbe: {{httpGet: {{path: /health/startup, port: 8080}}, periodSeconds: 2, failureThreshold: 30}}
          livenessProbe: {{httpGet: {{path: /health/live, port: 8080}}, periodSeconds: 30}}
          env:
            - {{name: SERVICE_AUTH, value: iam}}
            - {{name: SERVICE_API_KEYS, valueFrom: {{secretKeyRef: {{name: keys, key: "{key}"}}}}}}
"""


def tree(folder: Path, key: str = "3") -> Path:
    """A project with models and manifests."""
    (folder / "deploy/bot").mkdir(parents=True)
    shutil.copytree(ROOT / "models", folder / "models")
    shutil.copy(ROOT / "deploy/bot/commands.json", folder / "deploy/bot")
    for env in ("staging", "production"):
        for name in SERVICES:
            (folder / f"deploy/{name}.{env}.yaml").write_text(MANIFEST.format(name=name, key=key))
    return folder


def test_manifest_becomes_flags(tmp_path):
    """Everything the manifest says stands in the one call."""
    flags = begin(TARGET, tree(tmp_path), list(SERVICES), False, {name: NEW[name] for name in SERVICES}, "", False, None).flags["hmm-detector"]
    assert set(flags) == {
        "--cpu=1", "--memory=512Mi", "--concurrency=8", "--timeout=10", "--port=8080", "--min-instances=1", "--max-instances=3", "--no-cpu-throttling", "--cpu-boost", "--ingress=internal",
        "--service-account=hmm-detector@delta-go-staging.iam.gserviceaccount.com", "--set-env-vars=^|^SERVICE_AUTH=iam", "--set-secrets=SERVICE_API_KEYS=keys:3",
        "--startup-probe=failureThreshold=30,httpGet.path=/health/startup,httpGet.port=8080,periodSeconds=2", "--liveness-probe=httpGet.path=/health/live,httpGet.port=8080,periodSeconds=30"}


def test_secret_without_number_is_refused(tmp_path):
    """latest would change without a roll-out."""
    with pytest.raises(InputError, match="by its number"):
        begin(TARGET, tree(tmp_path, "latest"), list(SERVICES), False, {name: NEW[name] for name in SERVICES}, "", False, None)


@pytest.mark.parametrize("spoil", ["volumes", "securityContext", "annotation"])
def test_unknown_setting_is_refused(spoil):
    """Nothing in a manifest is silently left out."""
    import yaml
    manifest = yaml.safe_load(MANIFEST.format(name="hmm-detector", key="3"))
    template = manifest["spec"]["template"]
    {"volumes": template["spec"], "securityContext": template["spec"]["containers"][0], "annotation": template["metadata"]["annotations"]}[spoil][spoil] = {}
    with pytest.raises(InputError, match=spoil):
        flags_of(manifest)


def test_production_takes_what_staging_passed(tmp_path):
    """No staging, a failed one, or one of other models: refused; else the very images."""
    root, production = tree(tmp_path / "root"), Target("production", "delta-go-live")
    start = partial(begin, production, root, list(SERVICES), False, {}, "", False)
    good = msgspec.structs.replace(first(), outcome="done")
    for passed in (None, msgspec.structs.replace(good, outcome="back"), msgspec.structs.replace(good, models="0" * 12), msgspec.structs.replace(good, images={})):
        with pytest.raises(InputError, match="staging"):
            start(passed)
    ready = start(good)
    assert ready.images == {name: NEW[name] for name in SERVICES} and not ready.build and "@delta-go-live.iam" in " ".join(ready.flags["hmm-detector"])


def test_models_that_may_trade_need_their_card(tmp_path):
    """What staging passed does not go to production on a verdict that somebody wrote into the manifest."""
    shutil.copytree(ROOT / "models", tmp_path / "models")
    raw = json.loads((tmp_path / "models/manifest.json").read_text()) | {"verdict": "trade"}
    (tmp_path / "models/manifest.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="expected a set with the verdict trade to be promoted"):
        begin(Target("production", "delta-go-production"), tmp_path, list(SERVICES), False, {}, "", False, first())


def test_missing_source_is_named(tmp_path):
    """The build tree of a Dockerfile that copies what is not there."""
    (tmp_path / "deploy/bot").mkdir(parents=True)
    (tmp_path / "deploy/bot/Dockerfile").write_text("FROM x\nCOPY models/absent.pkl models/\n")
    with pytest.raises(InputError, match="models/absent.pkl"):
        stage(tmp_path, tmp_path / "out", "bot")


@pytest.mark.parametrize("name", [*SERVICES, "bot"])
def test_staged_tree_has_what_is_copied(tmp_path, name):
    """The committed Dockerfiles: every source, no caches."""
    folder = stage(ROOT, tmp_path / "out", name)
    assert (folder / "models/manifest.json").exists() and (folder / "delta_go/model_file.py").exists() and (folder / f"deploy/{name}/Dockerfile").exists()
    assert not list(folder.rglob("__pycache__")) and not (folder / "tests").exists()


@pytest.mark.skipif(not shutil.which("gcloud"), reason="the Google Cloud CLI is not installed")
def test_flags_are_gcloud_s_own(tmp_path):
    """Every call of a roll-out passes the real parser."""
    root = tree(tmp_path / "root")
    start = begin(TARGET, root, list(SERVICES), True, NEW, "", False, None)
    cloud = fresh(tmp_path / "run")
    assert go(tmp_path / "run", start=msgspec.structs.replace(start, build=False)).outcome == "done"
    seen = {tuple(words[:4] if words[0] != "compute" else words[:3]): words for words in cloud.calls()}
    extra = [call_of(msgspec.structs.replace(start, images={**NEW, "hmm-detector": f"{TARGET.repository}/hmm-detector:x"}), Step(kind, "hmm-detector")) for kind in ("build", "digest")]
    extra += [["auth", "print-identity-token", "--audiences=https://x.example", "--impersonate-service-account=a@b.iam.gserviceaccount.com", "--include-email"],
              ["run", "services", "update-traffic", "hmm-detector", "--to-revisions=a=100", "--clear-tags", "--project=p", "--region=us-central1", "--format=json", "--quiet"],
              ["run", "services", "delete", "hmm-detector", "--project=p", "--region=us-central1", "--format=json", "--quiet"]]
    extra += [["run", "services", "update-traffic", "hmm-detector", "--to-tagz=candidate=10"]]
    told = [["--command=words" if word.startswith("--command=") else word for word in words]  # those of a shell, see below
            for words in [*{tuple(words[:3]): words for words in seen.values()}.values(), *extra]]
    (tmp_path / "commands.json").write_text(json.dumps([{"command_string": f"gcloud {shlex.join(words)}"} for words in told]))
    done = subprocess.run(["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={tmp_path / 'commands.json'}"], capture_output=True, text=True, timeout=120)
    read = json.loads(done.stdout)
    assert len(read) == len(told) and "to-tagz" in read[-1]["error_message"]
    for words, verdict in zip(told[:-1], read):
        assert verdict["success"], (words, verdict["error_message"])


@pytest.mark.parametrize("name", COMMANDS)
def test_words_for_the_machine_are_shell(name):
    """The bot's machine can read its commands, with an image put in."""
    assert subprocess.run(["sh", "-n", "-c", COMMANDS[name].replace("{image}", NEW["bot"])], capture_output=True).returncode == 0
    assert COMMANDS[name].count("{") == ("{image}" in COMMANDS[name])


@pytest.mark.parametrize("env", ["staging", "production"])
@pytest.mark.parametrize("name", SERVICES)
def test_committed_manifests_have_flags(env, name):
    """Every setting of the manifests in deploy/ reaches the call; the number of the project is asked for."""
    target = Target(env, "delta-go-live", number="123456")
    flags = room.read_flags(ROOT, target, name)
    assert f"--service-account={name}@delta-go-live.iam.gserviceaccount.com" in flags and "PROJECT" not in " ".join(flags).replace("GOOGLE_CLOUD_PROJECT", "")
    assert room.audience_of(msgspec.structs.replace(first(), flags={name: flags}), name) == f"https://{name}-123456.us-central1.run.app"
    with pytest.raises(InputError, match="project number"):
        room.read_flags(ROOT, Target(env, "delta-go-live"), name)


@pytest.mark.parametrize("name", SERVICES)
def test_function_form_answers(tmp_path, name):
    """The staged function, alone in a fresh interpreter, answers a recorded question through Flask as the framework calls it."""
    folder = stage(ROOT, tmp_path / "out", name, "function")
    question = next(question for question in room.golden_questions(ROOT / "models")[1] if question.service == name)
    (tmp_path / "question").write_bytes(question.body)
    code = f"""
import sys, pathlib, flask
sys.path[:0] = [{str(folder)!r}]
import main, delta_go
assert delta_go.__file__.startswith({str(folder)!r})
app = flask.Flask("functions")
app.add_url_rule("/", view_func=lambda: main.{SERVICES[name][1:]}(flask.request), methods=["POST"])
print(app.test_client().post("/", data=pathlib.Path({str(tmp_path / 'question')!r}).read_bytes(), content_type="application/json").text)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    assert question.read(done.stdout.strip().splitlines()[-1].encode(), MODELS) == pytest.approx(question.answers, abs=1e-9)
