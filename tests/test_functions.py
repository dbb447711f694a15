"""Both services in the form of functions: staged, their requirements installed alone into an empty environment, called by functions-framework."""
import json
import os
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from delta_go.ops.deploy import golden_questions, stage

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
TARGETS = {"hmm-detector": "detect_regime", "trade-predictor": "predict_trade"}


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """An environment with what a function's build installs, and nothing else."""
    place = tmp_path_factory.mktemp("functions") / "venv"
    venv.create(place, with_pip=True)
    subprocess.run([place / "bin/pip", "install", "--quiet", "--disable-pip-version-check", "-r", ROOT / "deploy/functions/hmm-detector/requirements.txt"], check=True, capture_output=True, timeout=600)
    assert "No broken requirements" in subprocess.run([place / "bin/pip", "check"], capture_output=True, text=True).stdout
    return place


def ask(port: int, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    try:
        with urlopen(Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"}), timeout=10) as reply:
            return reply.status, reply.read()
    except HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("cloud", [False, True], ids=["here", "careless in the cloud"])
def test_function(name, cloud, empty, tmp_path):
    """Recorded questions get recorded answers; where nothing guards it, it refuses to answer at all."""
    folder = stage(ROOT, tmp_path / "staged", name, "function")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environ = {"PATH": os.environ["PATH"], "PORT": str(port), **({"K_SERVICE": name} if cloud else {})}
    command = [empty / "bin/functions-framework", "--source", folder / "main.py", "--target", TARGETS[name], "--host", "127.0.0.1"]
    versions, questions = golden_questions(ROOT / "models")
    mine = [question for question in questions if question.service == name]
    with subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            begun = time.monotonic()
            while ask(port, "/health/live")[0] == 0:
                assert process.poll() is None and time.monotonic() - begun < 90
                time.sleep(0.05)
            for question in mine:
                status, body = ask(port, "/", question.body)
                if cloud:
                    assert status == 503 and json.loads(body)["code"] == "not_ready"
                else:
                    assert status == 200 and question.read(body, versions) == pytest.approx(question.answers, abs=1e-9), body
            assert mine and ask(port, "/", b'{"symbol":')[0] == (503 if cloud else 400)
        finally:
            process.terminate()
            process.wait(30)


def test_functions_run_on_this_python():
    """The runtime of old, python311."""
    assert sys.version_info[:2] == (3, 11)
