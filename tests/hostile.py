"""Fire hostile requests at a real service over kept-alive connections and judge every answer: `python -m tests.hostile hmm-detector --count 100000`."""
from __future__ import annotations

import argparse
import json
import math
import os
import re
import select
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.load import ROOT, START, Running, running
from delta_go.domain import REGIMES
from delta_go.learning.features import FEATURES
from delta_go.learning.predictor import PREDICTOR_FEATURES
from tests.hostile_requests import CANARY, FIELDS, KEY, Shot, make_shot

SLOW = 1.0          # seconds that an answer may take
PATIENCE = 15.0     # seconds after which an answer is given up
GROWTH = 50.0       # megabytes that the worker may grow by
LINES = 4           # connections
WARM = 200          # requests before memory is measured
LEAKS = re.compile(rb"Traceback|File \\?\"|site-packages|\.py\b|/(?:usr|home|work|tmp|root|opt|var|proc)/|" + re.escape(str(ROOT)).encode())
PROBLEM = {"type": str, "title": str, "status": int, "detail": str, "code": str, "request_id": str}


# One connection -------------------------------------------------------------------------------------------------------------

@dataclass
class Answer:
    """What came back for one request."""
    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def media(self) -> str:
        """The type of the body."""
        return self.headers.get("content-type", "").partition(";")[0]


class Silence(Exception):
    """The connection ended, or nothing came, before the answer was whole."""


class Line:
    """A connection that is kept as long as the server keeps it."""
    def __init__(self, port: int):
        self.port, self.sock, self.came = port, None, b""

    def close(self) -> None:
        """End it."""
        if self.sock:
            self.sock.close()
        self.sock, self.came = None, b""

    def ask(self, shot: Shot) -> tuple[list[Answer], str]:
        """The answers to one shot, and the fault if they are not all there."""
        if self.sock is None:
            self.sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began, answers, fault = time.perf_counter(), [], ""
        try:
            self.send(shot, began)
            while shot.last or len(answers) < shot.answers:
                answers.append(self.read(shot.head, began))
                if answers[-1].headers.get("connection", "").lower() == "close":
                    self.close()
                    break
        except Silence as silence:
            fault = str(silence)
            self.close()
        if shot.last:
            self.close()
            fault = "" if answers or shot.silent else fault
        elif len(answers) < shot.answers and answers and self.sock is None and answers[-1].status >= 400:
            fault = ""     # a refusal that ends the connection ends what was sent behind it
        return answers, fault

    def send(self, shot: Shot, began: float) -> None:
        """Send all of it, and take what comes meanwhile; a server that answers before it has read everything may stop reading."""
        left = memoryview(shot.raw)
        self.sock.setblocking(False)
        while left:
            readable, writable, _ = select.select([self.sock], [self.sock], [], PATIENCE)
            try:
                if readable:
                    piece = self.sock.recv(262_144)
                    if not piece:
                        return
                    self.came += piece
                if writable:
                    left = left[self.sock.send(left[:262_144]):]
            except OSError:
                return
            if time.perf_counter() - began > PATIENCE:
                return
        if shot.last:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                return

    def more(self, began: float) -> None:
        """Wait for bytes."""
        if not select.select([self.sock], [], [], max(began + PATIENCE - time.perf_counter(), 0))[0]:
            raise Silence(f"no answer in {PATIENCE:g} s")
        try:
            piece = self.sock.recv(262_144)
        except OSError as error:
            raise Silence(f"{type(error).__name__} before the answer") from None
        if not piece:
            raise Silence("closed before the answer")
        self.came += piece

    def read(self, bare: bool, began: float) -> Answer:
        """One answer, framed by its length."""
        while b"\r\n\r\n" not in self.came:
            self.more(began)
        head, _, self.came = self.came.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        if not (found := re.fullmatch(r"HTTP/1\.\d (\d{3}) [\w '-]+", first)):
            raise Silence(f"no HTTP: {first[:60]!r}")
        status, headers = int(found[1]), {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if status == 100:
            return self.read(bare, began)
        if not headers.get("content-length", "").isdecimal():
            raise Silence(f"status {status} without a length")
        size = 0 if bare else int(headers["content-length"])
        while len(self.came) < size:
            self.more(began)
        body, self.came = self.came[:size], self.came[size:]
        return Answer(status, headers, body, time.perf_counter() - began)


# The judge ------------------------------------------------------------------------------------------------------------------

def strict(body: bytes) -> Any:
    """The JSON in there; `ValueError` for NaN, for keys given twice, for anything that is not UTF-8."""
    def refuse(text: str) -> None:
        raise ValueError(f"{text} in JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key twice in JSON")
        return dict(pairs)
    return json.loads(body.decode("utf-8", "strict"), parse_constant=refuse, object_pairs_hook=once)


def is_share(value: Any) -> bool:
    """A probability?"""
    return type(value) in (int, float) and 0 <= value <= 1


def judge_regime(answer: dict[str, Any]) -> Iterator[str]:
    """Faults of one answer of the detector."""
    shares = answer.get("state_probabilities")
    if not isinstance(shares, dict) or [*shares] != list(REGIMES) or not all(map(is_share, shares.values())):
        yield "probabilities are not five shares"
        return
    if abs(sum(shares.values()) - 1) > 1e-9:
        yield "probabilities do not sum to 1"
    if answer.get("confidence") != max(shares.values()) or shares.get(answer.get("regime", "")) != answer.get("confidence"):
        yield "the regime is not the likeliest"
    features = answer.get("features")
    if not isinstance(features, dict) or [*features] != list(FEATURES) or not all(value is None or type(value) in (int, float) and math.isfinite(value) for value in features.values()):
        yield "features are not finite numbers or null"
    if type(answer.get("spacing_checked")) is not bool or answer["spacing_checked"] == bool(answer.get("warnings")):
        yield "spacing is not told"


def judge_trade(answer: dict[str, Any]) -> Iterator[str]:
    """Faults of one answer of the predictor."""
    if not is_share(answer.get("probability")) or answer.get("confidence") != answer.get("probability"):
        yield "the probability is no share"
        return
    threshold, given = answer.get("threshold"), answer.get("contributions")
    if threshold is not None and not is_share(threshold) or answer.get("should_trade") is not (threshold is not None and answer["probability"] >= threshold):
        yield "the decision is not the threshold's"
    if not answer.get("reason"):
        yield "no reason"
    if given is not None and not all(type(value) in (int, float) and math.isfinite(value) for value in given.values()):
        yield "a contribution is not finite"
    if not set(answer.get("missing", [""])) <= set(PREDICTOR_FEATURES):
        yield "missing inputs are not told"


def judge_answer(service: str, shot: Shot, data: Any) -> Iterator[str]:
    """Faults of a 200 to a question."""
    try:
        asked = json.loads(shot.body) if shot.body is not None else None
    except (ValueError, RecursionError):
        yield "an answer to what is no JSON"
        return
    answers = data.get("answers") if isinstance(data, dict) and "answers" in data else [data]
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        yield "the answer is no object"
        return
    if isinstance(asked, dict) and len(answers) != len(asked.get("requests", [None])):
        yield "not as many answers as questions"
    for answer in answers:
        yield from (judge_regime if service == "hmm-detector" else judge_trade)(answer)
        if not all(answer.get(name) for name in ("model_version", "model_sha256", "data_end", "service_version", "request_id")):
            yield "does not say where it comes from"


def leads(pointer: str, code: str, shot: Shot, service: str) -> bool:
    """Does a pointer lead to something in the request, or to a field that is expected there?"""
    if pointer == "":
        return code in ("unknown_field", "not_an_object", "wrong_type")
    if pointer == "/explain":
        return b"explain" in shot.raw.partition(b" HTTP/")[0]
    known, tokens = (*FIELDS[service], "requests"), pointer[1:].split("/")
    try:
        places: list[Any] = [json.loads(shot.body, object_pairs_hook=tuple)]   # objects as pairs: a key given twice leads to both
    except (ValueError, RecursionError):    # refused for what came before the fault of the text
        plain = re.sub(rb"\\u00([0-7][0-9a-fA-F])", lambda match: bytes.fromhex(match[1].decode()), shot.body)
        return any(token in known or token.encode() in plain for token in tokens)
    for token in tokens[:-1]:
        places = [part for place in places for part in parts(place, token)]
    return any(parts(place, tokens[-1]) or isinstance(place, tuple) and tokens[-1] in known for place in places)


def parts(place: Any, token: str) -> list[Any]:
    """What one step of a pointer leads to."""
    if isinstance(place, tuple):
        return [value for name, value in place if name == token]
    return place[int(token):int(token) + 1] if isinstance(place, list) and token.isdecimal() else []


def judge_problem(service: str, shot: Shot, answer: Answer, data: Any) -> Iterator[str]:
    """Faults of a refusal."""
    if answer.media != "application/problem+json":
        yield f"{answer.status} as {answer.media or 'nothing'}"
        return
    if not isinstance(data, dict) or not all(type(data.get(name)) is kind for name, kind in PROBLEM.items()):
        yield "a problem without its fields"
        return
    if data["status"] != answer.status or not re.fullmatch(r"[a-z_]{3,30}", data["code"]) or not data["type"].endswith("/" + data["code"].replace("_", "-")) or not data["detail"] or not data["title"]:
        yield "a problem that contradicts itself"
    if "x-request-id" in answer.headers and data["request_id"] != answer.headers["x-request-id"] or "x-request-id" in answer.headers and not data["request_id"]:
        yield "a problem without its request id"
    if answer.status != 422:
        return
    errors = data.get("errors") or [{"pointer": None}]
    if len(errors) > 10 or not all(isinstance(error.get("pointer"), str) and isinstance(error.get("reason"), str) and error["reason"] for error in errors):
        yield "422 without a field"
    elif shot.body is not None and (lost := next((error["pointer"] for error in errors if not leads(error["pointer"], data["code"], shot, service)), None)) is not None:
        yield f"422 with a pointer to nothing: {data['code']} {lost[:60]}"


def judge(service: str, shot: Shot, answer: Answer) -> Iterator[str]:
    """Every fault of one answer."""
    if answer.status >= 500:
        yield f"status {answer.status}"
    elif answer.status not in shot.may:
        yield f"status {answer.status} for {shot.kind}"
    if answer.headers.get("x-content-type-options") != "nosniff" or answer.headers.get("cache-control") != "no-store":
        yield "headers that protect are missing"
    told = answer.body + repr(answer.headers).encode()
    if KEY.encode() in told or CANARY.encode() in told:
        yield "tells a secret"
    if answer.media != "text/html" and LEAKS.search(answer.body):
        yield "tells of files or of a stack"
    if shot.head:
        return
    question = answer.status == 200 and (shot.body is not None or shot.kind == "two at once") and "elsewhere" not in shot.kind
    if answer.media not in ("application/json", "application/problem+json"):
        if question or answer.status >= 400:
            yield f"{answer.status} as {answer.media or 'nothing'}"
        return
    try:
        data = strict(answer.body)
    except (ValueError, RecursionError) as error:
        yield f"no strict JSON: {type(error).__name__} {str(error)[:40]}"
        return
    if answer.status >= 400:
        yield from judge_problem(service, shot, answer, data)
    elif question:
        yield from judge_answer(service, shot, data)


# A run ----------------------------------------------------------------------------------------------------------------------

@dataclass
class Report:
    """What a run saw."""
    service: str
    seed: int
    first: int
    count: int
    answers: Counter[tuple[int, str]] = field(default_factory=Counter)   # by status and code
    kinds: Counter[str] = field(default_factory=Counter)
    violations: list[tuple[int, str, str]] = field(default_factory=list)  # number, kind, fault
    slowest: tuple[float, int, str] = (0.0, -1, "")
    memory: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0


def code_of(answer: Answer) -> str:
    """The code of a refusal, for counting."""
    found = re.search(rb'"code":"(\w{1,40})"', answer.body) if answer.status >= 400 else None
    return found[1].decode() if found else ""


def resident(service: Running) -> float:
    """Megabytes of the worker, or of those there are."""
    pages = sum(int(Path(f"/proc/{worker}/statm").read_text().split()[1]) for worker in service.workers())
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def look(report: Report, number: int, shot: Shot, answers: list[Answer], fault: str, late: list[int]) -> None:
    """Enter one shot into the report."""
    report.kinds[shot.kind.split(":")[0].split(" + ")[0].removesuffix(" in a batch")] += 1
    faults = {f"no answer: {fault}"} if fault else set()
    for answer in answers:
        report.answers[answer.status, code_of(answer)] += 1
        report.slowest = max(report.slowest, (answer.seconds, number, shot.kind))
        faults.update(judge(report.service, shot, answer))
        if answer.seconds > SLOW:
            late.append(number)
    report.violations += [(number, shot.kind, fault) for fault in sorted(faults)]


def fire(service: Running, report: Report, numbers: range, lines: int = LINES) -> list[int]:
    """Send the shots of these numbers, each line its share; the numbers whose answers were late."""
    lock, late = threading.Lock(), []

    def work(place: int) -> None:
        line = Line(service.port)
        for number in numbers[place::lines]:
            shot = make_shot(report.service, report.seed, number)
            try:
                answers, fault = line.ask(shot)
            except OSError as error:
                line.close()
                answers, fault = [], f"no connection ({type(error).__name__})"
            with lock:
                look(report, number, shot, answers, fault, late)
            if len(report.violations) > 2_000:
                break
        line.close()
    with ThreadPoolExecutor(lines) as crew:
        for done in [crew.submit(work, place) for place in range(lines)]:
            done.result()
    return late


def alone(service: Running, report: Report, late: list[int]) -> None:
    """Ask again, one at a time, what was answered late: the machine may have been busy."""
    for number in late:
        shot, took = make_shot(report.service, report.seed, number), []
        for _ in range(2):
            line = Line(service.port)
            answers, fault = line.ask(shot)
            line.close()
            took.append(max((answer.seconds for answer in answers), default=PATIENCE if fault else 0.0))
        if min(took) > SLOW:
            report.violations.append((number, shot.kind, f"slower than {SLOW:g} s, again alone"))


def bombard(service: str, count: int, seed: int = 0, first: int = 0, code: str = START) -> Report:
    """Start the service, fire, and look at worker, memory and log at the end."""
    report, began = Report(service, seed, first, count), time.perf_counter()
    told = {"SERVICE_AUTH": "api_key", "SERVICE_API_KEYS": f"hostile:{KEY}"}
    make_shot(service, seed, first)     # the market is made before the clock runs
    with tempfile.TemporaryDirectory() as folder, running(service, code=code, environ=told, log=Path(folder) / "log") as process:
        worker = process.workers()
        late = fire(process, report, range(first, first + min(WARM, count)))
        before = resident(process)
        late += fire(process, report, range(first + WARM, first + count))
        alone(process, report, late)
        if process.workers() != worker:
            report.violations.append((-1, "", "the worker died"))
        report.memory = before, resident(process)
        if report.memory[1] - before > GROWTH:
            report.violations.append((-1, "", f"memory grew by {report.memory[1] - before:.0f} MB"))
        log = (Path(folder) / "log").read_bytes()
        report.violations += [(-1, "", f"the log has {what}") for what, sign in (("the key", KEY), ("a secret", CANARY), ("a failure", "Traceback"), ("an unforeseen failure", "unforeseen")) if sign.encode() in log]
    report.seconds = time.perf_counter() - began
    return report


def show(report: Report, console: Console) -> None:
    """The report for people."""
    table = Table("status", "code", "answers", title=f"{report.service}: {report.count:,} hostile requests, seed {report.seed}", title_justify="left")
    for (status, code), count in sorted(report.answers.items()):
        table.add_row(str(status), code, f"{count:,}")
    console.print(table)
    console.print(", ".join(f"{kind} {count:,}" for kind, count in report.kinds.most_common(60)), style="dim")
    console.print(f"slowest answer {report.slowest[0] * 1e3:.0f} ms (number {report.slowest[1]}, {report.slowest[2]}); worker {report.memory[0]:.0f} MB, then {report.memory[1]:.0f} MB; {report.seconds:.0f} s")
    for fault, count in Counter(fault for _, _, fault in report.violations).most_common(30):
        number, kind, _ = next(entry for entry in report.violations if entry[2] == fault)
        console.print(f"[red]violation[/red] {count:,} x {fault} (first: number {number}, {kind})", highlight=False)
    console.print(f"[bold]{len(report.violations)} violations[/bold]")


def replay(service: str, seed: int, number: int, console: Console) -> None:
    """One shot and its answers, in full."""
    shot = make_shot(service, seed, number)
    console.print(f"{shot.kind}; may {sorted(shot.may)}; {len(shot.raw):,} bytes:\n{shot.raw[:1_500]!r} ... {shot.raw[-200:]!r}", markup=False)
    with running(service, environ={"SERVICE_AUTH": "api_key", "SERVICE_API_KEYS": f"hostile:{KEY}"}) as process:
        answers, fault = Line(process.port).ask(shot)
        for answer in answers:
            console.print(f"{answer.status} {answer.headers} {answer.seconds * 1e3:.1f} ms\n{answer.body[:1_500]!r}\n{[*judge(service, shot, answer)]}", markup=False)
    console.print(fault)


def main() -> None:
    """Run from the command line; the exit code is 1 after a violation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("service", choices=list(FIELDS))
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--replay", type=int, help="send this number alone and show all of it")
    asked, console = parser.parse_args(), Console(width=160)
    if asked.replay is not None:
        replay(asked.service, asked.seed, asked.replay, console)
        return
    report = bombard(asked.service, asked.count, asked.seed, asked.first)
    show(report, console)
    sys.exit(bool(report.violations))


if __name__ == "__main__":
    main()
