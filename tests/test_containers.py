"""Every image is built from its committed Dockerfile and run with a read-only root, as nobody, without capabilities."""
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from containers import BASE, ROOT, Running, build, engine_fault, podman, prepare_base, running

from delta_go.ops.deploy import golden_questions

pytestmark = pytest.mark.slow
KEY = "a-key-for-this-test-0123456789abcdef"
SERVICES = ("hmm-detector", "trade-predictor")
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module", autouse=True)
def engine() -> None:
    """Skip only where there can be none."""
    if fault := engine_fault():
        pytest.skip(fault)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def megabytes(image: str) -> float:
    return int(podman("image", "inspect", "--format", "{{.Size}}", image)) / 1e6


def check_confinement(box: Running) -> None:
    """Nobody, no capability, no new privileges, nothing writable, and the first process is ours."""
    status = box.status()
    assert status["Uid"].split() == status["Gid"].split() == ["10001"] * 4
    assert {status[f"Cap{kind}"].strip() for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"].strip() == "1"
    for place in ("/x", "/app/x", "/app/models/manifest.json", "/opt/delta-go/x", "/etc/x"):
        assert "Read-only file system" in box.inside(f"echo x > {place}")
    assert "delta-go" in Path(f"/proc/{box.pid}/cmdline").read_text().replace("\0", " ")


@pytest.mark.parametrize("name", SERVICES)
def test_service_image(name):
    """Every recorded question gets its recorded answer, at the port that was asked for; SIGTERM ends it."""
    image, port = build(name), free_port()
    versions, questions = golden_questions(ROOT / "models")
    with running(image, port, {"PORT": str(port), "SERVICE_AUTH": "api_key", "SERVICE_API_KEYS": f"tester:{KEY}"}) as box:
        started = box.wait("/health/startup")
        mine = [question for question in questions if question.service == name]
        for question in mine:
            status, body = box.ask("/", question.body, KEY)
            assert status == 200 and json.loads(body)["git_sha"] == SHA, body
            assert question.read(body, versions) == pytest.approx(question.answers, abs=1e-9)
        assert box.ask("/", mine[0].body)[0] == 401 and box.ask("/metrics")[0] == 401
        assert {box.ask("/", mine[0].body, KEY)[0] for _ in range(200)} == {200}
        check_confinement(box)
        memory = box.memory()
        took, code = box.end()
    assert mine and code == 0 and took < 8, "Cloud Run gives ten seconds"
    assert memory < 256, "half of what the manifests give"
    ours = megabytes(image) - megabytes(BASE)
    print(f"\n{name}: base {prepare_base()}; {ours:.0f} MB on the base; started in {started:.2f} s; {memory:.0f} MB after 200 requests; SIGTERM to exit {took:.2f} s")


@pytest.mark.parametrize("environ, words", [({}, "SERVICE_AUTH"), ({"SERVICE_AUTH": "api_key"}, "SERVICE_API_KEYS"), ({"SERVICE_AUTH": "iam"}, "SERVICE_AUTH")])
def test_service_image_does_not_listen_to_everybody(environ, words):
    """Started carelessly, it says what is missing and ends."""
    said, code = box_that_ends(build("hmm-detector"), environ)
    assert code == 2 and words in said


def box_that_ends(image: str, environ: dict[str, str]) -> tuple[str, int]:
    """What a container says that ends by itself, and its exit code."""
    name = f"delta-go-try-{os.getpid()}-ends"
    try:
        podman("run", "-d", "--name", name, "--net=host", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024", "--read-only", *(f"--env={key}={value}" for key, value in environ.items()), image)
        code = int(podman("wait", name, seconds=60))
        return podman("logs", name, merged=True), code
    finally:
        podman("rm", "-f", name)


@pytest.mark.parametrize("name, models", [("hmm-detector", {"hmm_model_BTCUSD.pkl", "hmm_model_ETHUSD.pkl", "hmm_model_SOLUSD.pkl"}), ("trade-predictor", {"trade_predictor.pkl"})])
def test_image_holds_no_workbench(name, models):
    """No training library, test, notebook or installer in what runs, and the models that it needs alone."""
    listed = podman("run", "--rm", "--net=host", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024", build(name), "sh", "-c", "ls -A /app/models; echo -; ls -A /app; ls /opt/delta-go/lib/python3.11/site-packages")
    held, _, rest = listed.partition("-\n")
    assert set(held.split()) == models | {"manifest.json"}
    assert not {"pandas", "scipy", "sklearn", "numba", "xgboost", "pytest", "pip", "setuptools", "tests", "nbs", ".git", ".env"} & set(rest.split())


@pytest.mark.parametrize("mode", ["testnet", "paper"])
def test_bot_image(tmp_path, mode):
    """Against an emulated exchange of this machine, or on paper with its prices: ready, its numbers told, no secret said, drained; its folder outlives it."""
    image, port, exchange, folder = build("bot"), free_port(), free_port(), tmp_path / "state"
    folder.mkdir()
    os.chown(folder, 10001, 10001)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o011)
    command = [str(Path(sys.executable).parent / "delta-go"), "emulate", "--today", "--port", str(exchange)]
    environ = {"PORT": str(port), "DELTA_MODE": mode, "DELTA_BASE_URL": f"http://127.0.0.1:{exchange}", "DELTA_API_KEY": "emulator-key", "DELTA_API_SECRET": "emulator-secret-0001"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as emulator:
        try:
            wait_for_listener(exchange)
            with running(image, port, environ, "--tmpfs=/tmp:rw,noexec,nosuid,size=16m", f"--volume={folder}:/var/lib/delta-go") as box:
                started = box.wait("/health/ready", 120)
                status, body = box.ask("/metrics")
                assert status == 200 and b"delta_go_bot_ready 1.0" in body
                check_confinement(box)
                memory = box.memory()
                took, code = box.end()
                assert "emulator-secret" not in box.logs()
        finally:
            emulator.terminate()
    assert code == 0 and took < 45, "the unit gives that much"
    assert json.loads((folder / mode / "status.json").read_text())["state"] == "STOPPED" and (folder / mode / "journal.db").stat().st_size
    print(f"\nbot on {mode}: {megabytes(image) - megabytes(BASE):.0f} MB on the base; ready in {started:.2f} s; {memory:.0f} MB; SIGTERM to exit {took:.2f} s")


def wait_for_listener(port: int) -> None:
    """Until somebody listens, a minute at most."""
    for _ in range(600):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError("the emulated exchange did not come up")
