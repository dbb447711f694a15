"""The services under hostile requests, and proof that the suite would notice what it looks for."""
from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from benchmarks.load import running
from delta_go.domain import REGIMES
from tests.hostile import Answer, Line, Report, bombard, judge, show
from tests.hostile_requests import FIELDS, GOOD, KEY, PATHS, Shot, make_shot, request, usual

SPOILED = """
import json, os, sys, time
from flask import Flask, Response, request
from delta_go.serving import server
from delta_go.serving.access import read_settings

app, hoard, asked = Flask("spoiled"), [], []

class Service:
    def stop(self): pass

app.extensions["delta_go"] = Service()
JSON, PROBLEM = "application/json", "application/problem+json"
STORY = b'Traceback (most recent call last):\\n  File "/usr/lib/python3/x.py", line 1, in <module>'

def problem(**changes):
    told = {"type": "https://x/problems/invalid-value", "title": "Unprocessable", "status": 422, "detail": "no", "code": "invalid_value", "request_id": "1", "errors": [{"pointer": "/rsi/9/9", "reason": "no"}]}
    return Response(json.dumps({**told, **changes}), changes.get("status", 422), mimetype=PROBLEM)

def trade(**changes):
    told = {"probability": 0.4, "confidence": 0.4, "threshold": 0.5, "should_trade": False, "reason": "no", "contributions": None, "missing": []}
    told |= dict.fromkeys(("model_version", "model_sha256", "data_end", "service_version", "request_id"), "x")
    return Response(json.dumps({**told, **changes}), mimetype=JSON)

def slow():
    time.sleep(1.1)
    return trade()

def grow():
    hoard.append(bytearray(os.urandom(1000)) * 70_000)
    return trade()

FAULTS = [
    lambda: Response(b"<h1>Internal Server Error</h1>", 500, mimetype="text/html"),
    lambda: trade(probability=float("nan")),
    lambda: trade(probability=1.5, confidence=1.5),
    lambda: trade(should_trade=True),
    lambda: Response(b"<h1>Bad Request</h1>", 400, mimetype="text/html"),
    lambda: problem(),
    lambda: problem(errors=[]),
    lambda: problem(request_id=None),
    lambda: problem(status=400, code="malformed_json", type="about:blank"),
    lambda: problem(detail=STORY.decode()),
    lambda: problem(detail=request.get_data(as_text=True)[:300] + request.headers.get("X-API-Key", "")),
    lambda: Response(b'{"probability":0.4', mimetype=JSON),
    lambda: Response(b"", 200, mimetype=JSON),
    lambda: Response(b'{"reason":"a","reason":"b"}', mimetype=JSON),
    lambda: trade(model_version=None),
    lambda: trade(reason="\\ud800".encode("utf-8", "surrogatepass").decode("latin-1")),
]

@app.before_request
def answer():
    if request.path == "/health/live":
        return Response(b"{}", mimetype=JSON)
    asked.append(1)
    if len(asked) == 280:
        return slow()
    if len(asked) == 290:
        return grow()
    if len(asked) == 300:
        os._exit(1)
    response = FAULTS[len(asked) % len(FAULTS)]()
    response.headers.update({"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"} if len(asked) % 5 else {})
    return response

server.ModelServer(read_settings(), lambda settings: app).run()
"""


@pytest.mark.parametrize("service", FIELDS)
def test_two_thousand_hostile_requests_are_answered_well(service: str) -> None:
    check(bombard(service, 2_000, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("service", FIELDS)
def test_a_hundred_thousand_hostile_requests_are_answered_well(service: str) -> None:
    check(bombard(service, 100_000))


def check(report: Report) -> None:
    """No violation, and enough of every answer that the run says something."""
    assert not report.violations, report.violations[:5]
    assert sum(report.answers.values()) >= report.count * 0.98
    seen = {code for _, code in report.answers}
    assert {"malformed_json", "malformed_body", "duplicate_key", "not_an_object", "unknown_field", "wrong_type", "invalid_value", "too_large", "unsupported_media_type", "unauthenticated", "not_found",
            "method_not_allowed"} <= seen
    assert report.answers[200, ""] > report.count // 20 and report.memory[1] > 20


def test_a_spoiled_service_is_found_out() -> None:
    report = bombard("trade-predictor", 320, code=SPOILED)
    found = {fault for _, _, fault in report.violations}
    for sign in ("status 500", "500 as text/html", "400 as text/html", "NaN in JSON", "no share", "not the threshold's", "pointer to nothing: invalid_value /rsi/9/9", "422 without a field", "problem without its fields",
                 "contradicts itself", "of files or of a stack", "tells a secret", "no strict JSON", "a key twice", "where it comes from", "headers that protect", "no answer", "the worker died", "status 200 for"):
        assert any(sign in fault for fault in found), (sign, sorted(found))
    console = Console(record=True, file=io.StringIO(), width=160)
    show(report, console)
    assert f"{len(report.violations)} violations" in console.export_text()


def test_a_slow_answer_is_asked_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.hostile.SLOW", -1.0)
    report = bombard("trade-predictor", 20)
    assert {fault for _, _, fault in report.violations} == {"slower than -1 s, again alone"}


def test_growth_is_noticed() -> None:
    report = bombard("trade-predictor", 360, code=SPOILED.replace("len(asked) == 300", "False"))
    assert any("memory grew" in fault for _, _, fault in report.violations)


def told(status: int, data: object, media: str = "application/json") -> Answer:
    """An answer made up."""
    return Answer(status, {"content-type": media, "x-content-type-options": "nosniff", "cache-control": "no-store"}, json.dumps(data).encode(), 0.0)


@pytest.mark.parametrize("shares", ([0.2] * 5, [0.2, 0.2, 0.2, 0.2, 0.2 + 1e-8], [1.2, -0.2, 0, 0, 0], [True, 0, 0, 0, 0], [None] * 5, [0.5, 0.5]))
def test_shares_of_regimes_are_judged(shares: list) -> None:
    """Only five shares that sum to one pass."""
    data = {"state_probabilities": dict(zip(REGIMES, shares)), "confidence": shares[0], "regime": REGIMES[0], "features": {}, "spacing_checked": True, "warnings": []}
    faults = {fault for fault in judge("hmm-detector", Shot("valid", b"", GOOD, b"{}"), told(200, data)) if fault.startswith("probabilities")}
    assert bool(faults) == (shares != [0.2] * 5)


def test_a_shot_is_made_from_its_number_alone() -> None:
    for service in FIELDS:
        assert [make_shot(service, 3, number) for number in range(300)] == [make_shot(service, 3, number) for number in range(300)]
        assert [make_shot(service, 3, number).raw for number in range(300)] != [make_shot(service, 4, number).raw for number in range(300)]


def test_a_refusal_that_leaves_a_body_behind_ends_the_connection() -> None:
    """A caller is told not to send another request behind a body that nobody has read; a short one is taken out, and the connection goes on."""
    long, short = (b'{"symbol":"' + b"x" * size for size in (400_000, 20))
    chunked = [*usual(b"")[:3], ("Transfer-Encoding", "chunked")]
    with running("trade-predictor", environ={"SERVICE_AUTH": "api_key", "SERVICE_API_KEYS": f"hostile:{KEY}"}) as service:
        line = Line(service.port)
        for raw, connection, status in ((request("POST", "/", usual(long, "text/plain"), long), "close", 415), (request("POST", "/", usual(short, "text/plain"), short), "keep-alive", 415),
                                        (request("POST", "/", chunked, b"zz\r\n"), "close", 400), (request("POST", PATHS["trade-predictor"], usual(b"{}"), b"{}"), "keep-alive", 200)):
            answers, fault = line.ask(Shot("", raw, GOOD))
            assert not fault and [answers[0].status, answers[0].headers["connection"]] == [status, connection]


def test_half_a_body_is_not_taken_for_a_whole_one() -> None:
    """The caller said 20 bytes and hung up after two that would do."""
    with running("trade-predictor") as service:
        answers, _ = Line(service.port).ask(Shot("", request("POST", "/", [("Content-Type", "application/json"), ("Content-Length", "20")], b"{}"), GOOD, last=True))
    assert answers[0].status == 408 and json.loads(answers[0].body)["code"] == "timeout"
