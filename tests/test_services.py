"""The services as real processes: the backtest's bits, signals under load, swapped models, slow callers, secrets, start-up."""
from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.load import Crowd, Running, drive, post, running, talk, wait_ready
from delta_go.learning.predictor import PREDICTOR_FEATURES, contributions, predict_probability
from delta_go.learning.reading import read_market
from delta_go.learning.registry import load_models
from delta_go.market.simulate import simulate_market
from delta_go.serving.server import LINGER
from tests.waiting import SOON, wait_for

MODELS = Path(__file__).parents[1] / "models"
VALUES = ("open", "high", "low", "close", "volume")


@pytest.fixture(scope="module")
def market():
    """Two years of hours; the models never saw them."""
    return simulate_market(bars=2_000, seed=23)


def window_of(bars, row: int, length: int = 200) -> dict:
    """The question about the window that starts at a row."""
    part = bars[row:row + length]
    return {"symbol": bars.symbol, **{name: getattr(part, name).tolist() for name in (*VALUES, "time")}, "resolution": "1h"}


def sample(bars) -> bytes:
    """One good question as a request."""
    return post("/", json.dumps(window_of(bars, 0)).encode())


# The same bits -------------------------------------------------------------------------------------------------------------

def test_service_and_backtest_give_the_same_bits(market):
    """Regime view, features, probability and reasons of windows through real servers equal the batch's, floats as repr."""
    models = load_models(MODELS)
    with running("hmm-detector") as detector, running("trade-predictor") as predictor:
        for symbol, bars in market.candles.items():
            funding = market.funding[symbol]
            reading = read_market(bars, models.regimes[symbol], (funding.time, funding.rate))
            rows = np.linspace(0, len(reading) - 1, 100).astype(int)
            status, answer = detector.post({"requests": [window_of(bars, row) for row in rows[:50]]})
            assert status == 200
            singles = [detector.post(window_of(bars, row))[1] for row in rows[50:]]
            for row, said in zip(rows, answer["answers"] + singles):
                assert [repr(p) for p in said["state_probabilities"].values()] == [repr(p) for p in reading.regimes.posterior[row].tolist()]
                known = [None if value != value else repr(value) for value in reading.features.values[row].tolist()]
                assert [None if value is None else repr(value) for value in said["features"].values()] == known
                assert said["as_of"] == bars.time[row + 199] + 3600
            proposed = np.flatnonzero(reading.signals.side != 0)[:60]
            expected = predict_probability(models.predictor, reading.inputs)
            for row in proposed:
                inputs = dict(zip(PREDICTOR_FEATURES, reading.inputs[row].tolist()))
                said = predictor.post({name: None if value != value else value for name, value in inputs.items()})[1]
                assert repr(said["probability"]) == repr(float(expected[row]))
                assert said["contributions"] == contributions(models.predictor, reading.inputs[row])
                assert said["missing"] == [name for name, value in inputs.items() if value != value]


def test_longer_window_is_answered_from_its_end(market):
    """300 candles and their last 200 are the same question."""
    bars = market.candles["ETHUSD"]
    with running("hmm-detector") as service:
        long, short = service.post(window_of(bars, 0, 300))[1], service.post(window_of(bars, 100))[1]
    assert long["state_probabilities"] == short["state_probabilities"] and long["features"] == short["features"]


# Signals, deaths, reloads ---------------------------------------------------------------------------------------------------

def under_load(service: Running, request: bytes, act, seconds: float = 3.0) -> Crowd:
    """What a crowd sees while something is done to the service."""
    seen: list[Crowd] = []
    crowd = threading.Thread(target=lambda: seen.append(drive(service.port, request, 8, seconds)))
    crowd.start()
    time.sleep(1.0)
    act()
    crowd.join()
    return seen[0]


@pytest.mark.parametrize("times", range(3))
def test_sigterm_finishes_what_has_begun(market, times):
    """No answer that was owed is missing, and the process ends with 0."""
    with running("hmm-detector") as service:
        crowd = under_load(service, sample(market.candles["BTCUSD"]), lambda: service.process.send_signal(signal.SIGTERM))
        assert service.process.wait(30) == 0
    assert crowd.broken == 0 and set(crowd.statuses) == {200} and len(crowd.seconds) > 5


SLOW_START = ("import signal, sys, time; from delta_go.serving import detect_regime, server; whole = detect_regime.create_app; "
              "detect_regime.create_app = lambda settings: (print('loading', flush=True), time.sleep(1), whole(settings))[2]; server.main()")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_signal_while_models_load(tmp_path, sent):
    """A stop is a stop and no crash; a reload is done when there is something to reload."""
    log = tmp_path / "log"
    with running("hmm-detector", code=SLOW_START, log=log, wait=False) as service:
        assert wait_for(lambda: "loading" in log.read_text())
        workers = service.workers()
        service.process.send_signal(sent)
        if sent == signal.SIGTERM:
            assert service.process.wait(8) == 0
        else:
            wait_ready(service)
            assert service.workers() == workers and service.get()[0] == 200
    assert "Exception" not in log.read_text()


def test_idle_service_stops_at_once():
    """Without connections there is nothing to wait for."""
    with running("trade-predictor") as service:
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(5) == 0


@pytest.fixture()
def folder(tmp_path):
    """A copy of the models that may be spoilt."""
    return shutil.copytree(MODELS, tmp_path / "models")


def republish(folder: Path) -> str:
    """Another valid set: the same models under another verdict, which gives the manifest another version."""
    from delta_go.learning.registry import MANIFEST_FILE, parse_manifest
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["verdict"] = "no edge: told again"
    raw = json.dumps(manifest, indent=1, sort_keys=True).encode()
    (folder / MANIFEST_FILE).write_bytes(raw)
    return parse_manifest(raw).version


def test_reload_under_load_drops_nothing(market, folder):
    """A new set takes over between two answers; nobody notices but the version."""
    with running("hmm-detector", models=folder) as service:
        before = json.loads(service.get()[1])["model_version"]
        after: list[str] = []

        def swap():
            after.append(republish(folder))
            for _ in range(5):
                service.process.send_signal(signal.SIGHUP)
                time.sleep(0.1)

        crowd = under_load(service, sample(market.candles["BTCUSD"]), swap)
        assert wait_for(lambda: json.loads(service.get()[1])["model_version"] == after[0]) and before != after[0]
        assert service.post(window_of(market.candles["BTCUSD"], 0))[1]["model_version"] == after[0]
    assert crowd.broken == 0 and set(crowd.statuses) == {200}


@pytest.mark.parametrize("name, file", [("hmm-detector", "hmm_model_BTCUSD.pkl"), ("trade-predictor", "trade_predictor.pkl")])
def test_swapped_model_is_refused(folder, file, name):
    """A file that is not the manifest's: the approved set goes on, the fault is told; a new process does not get ready."""
    with running(name, models=folder) as service:
        before = json.loads(service.get()[1])
        raw = bytearray((folder / file).read_bytes())
        raw[len(raw) // 2] ^= 1
        (folder / file).write_bytes(raw)
        service.process.send_signal(signal.SIGHUP)
        assert wait_for(lambda: json.loads(service.get()[1])["reload_refused"] is not None)
        told = json.loads(service.get()[1])
        assert told["model_version"] == before["model_version"] and file in told["reload_refused"]
        with running(name, models=folder) as fresh:
            status, body = fresh.get()
            assert (status, json.loads(body)["code"]) == (503, "not_ready") and str(folder) not in body.decode()
            assert fresh.post({})[0] == 503 and fresh.get("/health/startup")[0] == 503 and fresh.get("/health/live")[0] == 200


@pytest.mark.parametrize("spoil", ["nothing", "truncated", "link", "no manifest", "no data"])
def test_missing_or_broken_models_are_not_guessed(folder, spoil):
    """Not ready, 503, a clear code; and ready after the cure and a signal."""
    victim, kept = folder / "hmm_model_SOLUSD.pkl", folder.parent / "kept"
    shutil.copytree(folder, kept)
    if spoil == "nothing":
        shutil.rmtree(folder)
    elif spoil == "truncated":
        victim.write_bytes(victim.read_bytes()[:-100])
    elif spoil == "link":
        victim.unlink()
        victim.symlink_to(kept / victim.name)
    elif spoil == "no data":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["hmm_model_SOLUSD.pkl"].pop("data")
        (folder / "manifest.json").write_text(json.dumps(manifest))
    else:
        (folder / "manifest.json").unlink()
    with running("hmm-detector", models=folder) as service:
        assert json.loads(service.get()[1])["code"] == "not_ready"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)
        service.process.send_signal(signal.SIGHUP)
        assert wait_for(lambda: service.get()[0] == 200)


def test_signals_of_gunicorn_make_no_second_worker_or_master(market):
    """SIGTTIN and SIGUSR2 change nothing."""
    with running("hmm-detector") as service:
        before = service.workers()
        for number in (signal.SIGTTIN, signal.SIGUSR2):
            service.process.send_signal(number)
        assert not wait_for(lambda: service.workers() != before, 2) and len(before) == 1
        assert service.post(window_of(market.candles["BTCUSD"], 0))[0] == 200


def test_killed_worker_is_replaced(market):
    """kill -9 of the worker: the master starts another, which loads the models again."""
    with running("hmm-detector") as service:
        worker = service.workers()[0]
        os.kill(worker, signal.SIGKILL)
        assert wait_for(lambda: service.workers() not in ([], [worker]))
        wait_ready(service)
        assert service.post(window_of(market.candles["BTCUSD"], 0))[0] == 200


# Crowds and dawdlers --------------------------------------------------------------------------------------------------------

def test_full_service_says_so(market):
    """More than the queue holds: some are answered, the others get a 503 with Retry-After; none hangs, none breaks."""
    with running("hmm-detector", environ={"SERVICE_THREADS": "1", "SERVICE_QUEUE": "2"}) as service:
        crowd = drive(service.port, sample(market.candles["BTCUSD"]), 60, 2.0)
        assert set(crowd.statuses) == {200, 503} and crowd.statuses[200] > 10
        assert crowd.broken == 0
        assert wait_for(lambda: service.post(window_of(market.candles["BTCUSD"], 0))[0] == 200)


def test_silent_and_slow_connections_do_not_stop_it(market):
    """Eight connections that say nothing and four that stop in the middle: others are answered all the while."""
    half = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"
    with running("hmm-detector", environ={"SERVICE_BODY_SECONDS": "0.5"}) as service:
        sockets = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(12)]
        for sock in sockets[:4]:
            sock.sendall(half)
        assert service.post(window_of(market.candles["BTCUSD"], 0))[0] == 200
        assert [sock.recv(12) for sock in sockets[:4]] == [b"HTTP/1.1 408"] * 4
        for sock in sockets:
            sock.close()


def test_dripping_request_meets_its_deadline():
    """One byte at a time does not buy more time."""
    with running("hmm-detector", environ={"SERVICE_BODY_SECONDS": "1"}) as service, socket.create_connection(("127.0.0.1", service.port), timeout=10) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n")
        assert wait_for(lambda: sock.send(b" ") and select.select([sock], [], [], 0)[0])
        assert sock.recv(12) == b"HTTP/1.1 408"


def test_chunked_body_is_read_and_limited(market):
    """Without a Content-Length the limit holds as well."""
    body = json.dumps(window_of(market.candles["BTCUSD"], 0)).encode()
    head = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    with running("hmm-detector") as service:
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:5_000], body[5_000:])) + b"0\r\n\r\n"
        assert talk(service.port, head + chunks)[0] == 200
        flood = b"".join(b"10000\r\n%s\r\n" % (b" " * 65_536) for _ in range(17)) + b"0\r\n\r\n"
        status, answer = talk(service.port, head + flood)
        assert status == 413 and json.loads(answer)["code"] == "too_large"


def test_what_is_no_http_is_refused_in_the_same_form():
    """Bytes that never reach the app."""
    with running("trade-predictor") as service:
        for raw, status in ((b"nonsense\r\n\r\n", 400), (b"GET /" + b"a" * 5_000 + b" HTTP/1.1\r\n\r\n", 414), (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 80 + b"\r\n", 431)):
            answered, body = talk(service.port, raw)
            assert answered == status and json.loads(body)["status"] == status


def test_callers_who_do_not_hang_up_delay_nobody():
    """An answer was the last one, and the caller keeps the connection open: that is the poller's affair, not the service's."""
    with running("trade-predictor") as service:
        sockets = [socket.create_connection(("127.0.0.1", service.port), timeout=SOON) for _ in range(30)]
        for sock in sockets:
            sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        began = time.monotonic()
        assert [sock.recv(12) for sock in sockets] == [b"HTTP/1.1 200"] * 30 and service.get()[0] == 200
        assert time.monotonic() - began < 5 * LINGER, "waited out by two threads, one after the other, they would take 15"
        worker = service.workers()[0]
        open_files = len(os.listdir(f"/proc/{worker}/fd"))
        assert wait_for(lambda: len(os.listdir(f"/proc/{worker}/fd")) <= open_files - 30)
        for sock in sockets:
            sock.close()


def test_callers_who_never_read_hold_no_thread():
    """Many requests in one packet and nobody who takes the answers: each connection is left after its time."""
    with running("trade-predictor", environ={"SERVICE_BODY_SECONDS": "0.5"}) as service:
        sockets = []
        for _ in range(2):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            sock.connect(("127.0.0.1", service.port))
            sock.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                sock.sendall(b"GET /openapi.json HTTP/1.1\r\n\r\n" * 1_500)
            sockets.append(sock)
        time.sleep(2)
        assert wait_for(lambda: service.get()[0] == 200)
        for sock in sockets:
            sock.close()


def test_silent_connections_do_not_delay_the_stop():
    """Nobody has asked, so nothing is owed."""
    with running("trade-predictor", environ={"SERVICE_BODY_SECONDS": "30"}) as service:
        sockets = [socket.create_connection(("127.0.0.1", service.port), timeout=10) for _ in range(3)]
        time.sleep(0.3)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(6) == 0
        for sock in sockets:
            sock.close()


def test_what_never_reaches_the_app_is_counted(market):
    """An overload and broken requests show in the metrics as well."""
    with running("hmm-detector", environ={"SERVICE_THREADS": "1", "SERVICE_QUEUE": "1"}) as service:
        crowd = drive(service.port, sample(market.candles["BTCUSD"]), 30, 1.0)
        assert wait_for(lambda: service.get()[0] == 200)
        assert talk(service.port, b"nonsense\r\n\r\n")[0] == 400
        numbers = dict(line.rsplit(" ", 1) for line in service.get("/metrics")[1].decode().splitlines() if not line.startswith("#"))
    assert float(numbers['delta_go_refused_total{code="busy"}']) >= crowd.statuses[503] > 0
    assert numbers['delta_go_refused_total{code="malformed_http"}'] == "1.0"


# Secrets, processes, start-up -----------------------------------------------------------------------------------------------

def test_planted_secrets_appear_nowhere(tmp_path, market):
    """Keys and tokens in settings, headers, bodies and addresses: not in a log, a metric or an answer."""
    key, guess, token = "k" * 20 + "PlantedKey0123456789", "PlantedGuess" * 4, "eyJhbGciOiJSUzI1NiJ9.PlantedToken.signature"
    log = tmp_path / "log"
    told = {"SERVICE_AUTH": "api_key", "SERVICE_API_KEYS": f"bot:{key}", "LOG_LEVEL": "DEBUG"}
    with running("hmm-detector", environ=told, log=log) as service:
        good = window_of(market.candles["BTCUSD"], 0)
        answers = [service.post(good, headers=f"X-API-Key: {key}\r\n"), service.post(good, headers=f"X-API-Key: {guess}\r\n"),
                   service.post(good, headers=f"Authorization: Bearer {token}\r\n"), service.post({"symbol": guess, key: 1}, headers=f"X-API-Key: {key}\r\n"),
                   service.post(good, path=f"/{guess}?key={guess}", headers=f"X-API-Key: {key}\r\nX-Request-Id: {guess}{guess}\r\n")]
        metrics = talk(service.port, f"GET /metrics HTTP/1.1\r\nHost: here\r\nX-API-Key: {key}\r\nConnection: close\r\n\r\n".encode())
        assert [status for status, _ in answers] == [200, 401, 401, 422, 404] and metrics[0] == 200
        assert service.get("/metrics")[0] == 401 and service.get()[0] == 200
    seen = log.read_text() + json.dumps(answers) + metrics[1].decode()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) >= 6 and not [planted for planted in (key, guess, "PlantedToken") if planted in seen]


def test_service_refuses_to_listen_publicly_without_credentials():
    """Exit code 2 and the cure."""
    direct = subprocess.run([sys.executable, "-c", "from delta_go.cli import main; main(['serve', 'hmm-detector', '--host', '0.0.0.0'])"], capture_output=True, text=True)
    assert direct.returncode == 2 and "SERVICE_AUTH" in direct.stderr


def test_serving_process_imports_nothing_heavy():
    """Cold start is a feature: what trains and draws stays out, and so does the command line."""
    heavy = "pandas sklearn hmmlearn matplotlib scipy numba pyarrow xgboost joblib pydantic pydantic_settings typer rich papermill httpx"
    code = ("import sys; from delta_go.serving import server, detect_regime, predict_trade; "
            "detect_regime.create_app(); predict_trade.create_app(); print(*sorted({name.split('.')[0] for name in sys.modules}))")
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=MODELS.parent).stdout.split()
    assert "flask" in loaded and not set(heavy.split()) & set(loaded)
    floors = "import sys; from delta_go.serving import server, detect_regime, predict_trade; print(*[m for m in sys.modules if m.startswith('delta_go.')])"
    rooms = subprocess.run([sys.executable, "-c", floors], capture_output=True, text=True, check=True).stdout.split()
    assert not [room for room in rooms if room.split(".")[1] in ("trading", "evidence", "live", "cli", "config")]


@pytest.mark.parametrize("module, name", [("detect_regime", "hmm-detector"), ("predict_trade", "trade-predictor")])
def test_function_form_gives_the_same_answers(market, module, name, monkeypatch):
    """As a Cloud Functions target, called with the request of another Flask app."""
    from importlib import import_module

    from flask import Flask, request
    monkeypatch.setenv("HMM_MODEL_DIR", str(MODELS))
    monkeypatch.setenv("TRADE_PREDICTOR_MODEL", str(MODELS / "trade_predictor.pkl"))
    target = getattr(import_module(f"delta_go.serving.{module}"), module)
    host = Flask("functions")
    host.add_url_rule("/", "run", lambda: target(request), methods=["GET", "POST"])
    question = window_of(market.candles["BTCUSD"], 0) if module == "detect_regime" else {"regime": "bull", "rsi": 55.0}
    theirs = host.test_client().post("/", json=question)
    with running(name) as service:
        status, ours = service.post(question)
    drop = {"request_id", "git_sha"}
    assert theirs.status_code == status == 200
    assert {k: v for k, v in theirs.json.items() if k not in drop} == {k: v for k, v in ours.items() if k not in drop}
    assert host.test_client().post("/", data="{").json["code"] == "unsupported_media_type"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hmm-detector", "trade-predictor"])
def test_memory_is_flat_under_load(market, name):
    """Ten minutes of load: the worker's resident memory does not grow."""
    from benchmarks.services import memory_of, payloads
    request = post("/", payloads()[name])
    with running(name) as service:
        drive(service.port, request, seconds=20)
        first = memory_of(service)[0]
        crowd = drive(service.port, request, seconds=float(os.environ.get("LOAD_SECONDS", "600")))
        last = memory_of(service)[0]
    assert set(crowd.statuses) == {200} and crowd.broken == 0
    assert last - first < 5, f"{first:.1f} MB grew to {last:.1f} MB over {len(crowd.seconds):,} answers"
