"""The served /openapi.json against the service that serves it: schemathesis asks what the document allows and what it forbids."""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.load import START, running

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,negative_data_rejection"
REFUSED = "[checks.negative_data_rejection]\nexpected-statuses = [400, 404, 405, 413, 415, 422]\n"   # a body over the limit is refused for that first
OPERATIONS = {"hmm-detector": "detect_regime", "trade-predictor": "predict_trade"}
LIAR = """
import sys
from flask import Flask, Response
from delta_go.serving import predict_trade, server
from delta_go.serving.access import read_settings
from delta_go.serving.contract import encode
from delta_go.serving.describe import openapi

app = Flask("liar")

class Service:
    def stop(self): pass

app.extensions["delta_go"] = Service()
DOCUMENT = encode(openapi(predict_trade.describe(None)))

@app.get("/openapi.json")
def document(): return Response(DOCUMENT, mimetype="application/json")

@app.get("/health/live")
def live(): return {}

@app.post("/predict_trade")
def answer(): return {"probability": 2}

server.ModelServer(read_settings(), lambda settings: app).run()
"""


def examine(service: str, folder: Path, code: str = START, phases: str = "examples,coverage,fuzzing") -> subprocess.CompletedProcess[str]:
    """One deterministic run over every operation but the question's second address, which is the same view."""
    settings = folder / "schemathesis.toml"
    settings.write_text(REFUSED)
    with running(service, code=code) as process:
        return subprocess.run([
            sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings), "run", f"http://127.0.0.1:{process.port}/openapi.json", "--checks", CHECKS, "--phases", phases, "--max-examples", "12",
            "--generation-deterministic", "--no-shrink", "--continue-on-failure", "--exclude-operation-id", f"{OPERATIONS[service]}_at_root", "--no-color"],
            capture_output=True, text=True, cwd=folder, timeout=120)


@pytest.mark.parametrize("service", OPERATIONS)
def test_the_service_is_as_its_document_says(service: str, tmp_path: Path) -> None:
    run = examine(service, tmp_path)
    assert run.returncode == 0, run.stdout[-3_000:]
    generated = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    assert generated and generated[1] == generated[2] and int(generated[1]) > 150
    assert "Tested: 6" in run.stdout


def test_a_service_that_is_not_as_its_document_says_is_found_out(tmp_path: Path) -> None:
    run = examine("trade-predictor", tmp_path, LIAR, "examples,fuzzing")
    assert run.returncode == 1
    for fault in ("Response violates schema", "Schema-violating request accepted", "Undocumented Content-Type"):
        assert fault in run.stdout, run.stdout[-3_000:]
