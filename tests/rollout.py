"""A small cloud on this machine: two real service processes a side, a weighted proxy before them that does what the fake gcloud was told, and users."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fake_gcloud import Cloud, install

from benchmarks.load import Running, running, wait_ready
from delta_go.domain import DeltaGoError
from delta_go.learning.registry import MANIFEST_FILE
from delta_go.ops.deploy import Pace, Question, golden_questions, roll_out
from delta_go.rollout import SERVICES, Rollout, Target

ROOT = Path(__file__).parents[1]
TARGET = Target("staging", "delta-go-staging")
KINDS = ("errors", "slow", "digest", "nan")     # of candidates that must not pass
PACE = Pace(requests=40, hold=0.0, pause=0.1, call=20.0)

# Every process answers after a base time as a network has; CANDIDATE spoils the answers. "late" is well until it gets users.
START = '''
import os, random, re, time
from importlib import import_module
from delta_go.serving import server
kind, base = os.environ.get("CANDIDATE", ""), 0.01

def spoilt(inner):
    def answer(environ, start):
        told, began = [], time.perf_counter()
        body = b"".join(inner(environ, lambda status, headers, exc=None: told.append((status, headers))))
        status, headers = told[0]
        if environ["REQUEST_METHOD"] == "POST":
            if (kind == "errors" and random.random() < 0.2) or (kind == "late" and "HTTP_X_USER" in environ):
                status, body = "500 Internal Server Error", b"{}"
            if kind == "nan":
                body = re.sub(rb'"confidence":[0-9.e-]+', b'"confidence":NaN', body)
            time.sleep((2 if kind == "slow" else 0) * (time.perf_counter() - began + base) + base)
        start(status, [(name, value) for name, value in headers if name.lower() != "content-length"] + [("Content-Length", str(len(body)))])
        return [body]
    return answer

for room in map(import_module, ("delta_go.serving.detect_regime", "delta_go.serving.predict_trade")):
    def create_app(settings, whole=room.create_app):
        app = whole(settings)
        app.wsgi_app = spoilt(app.wsgi_app)
        return app
    room.create_app = create_app
server.main()
'''


class Front(ThreadingHTTPServer):
    """An address: of a service, whose revision the cloud's split chooses for each request, or of one revision alone."""
    daemon_threads, request_queue_size = True, 64

    def __init__(self, cloud: Cloud, name: str, ports: dict[str, int], revision: str = ""):
        self.cloud, self.name, self.ports, self.revision, self.spare = cloud, name, ports, revision, threading.local()
        super().__init__(("127.0.0.1", 0), Passing)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def choose(self) -> str:
        """stable or candidate, by weight."""
        if self.revision:
            return self.revision
        shares = self.cloud.read()["services"][self.name]["traffic"]
        revision = random.choices(list(shares), list(shares.values()))[0]
        return "candidate" if "-new" in revision else "stable"

    def link(self, side: str) -> http.client.HTTPConnection:
        """This thread's connection to a side."""
        if not hasattr(self.spare, side):
            setattr(self.spare, side, http.client.HTTPConnection("127.0.0.1", self.ports[side], timeout=10))
        return getattr(self.spare, side)


class Passing(BaseHTTPRequestHandler):
    """One connection; each request goes where the split says at that moment."""
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: Front

    def do_POST(self) -> None:
        """Pass on, and say which side answered."""
        body, side = self.rfile.read(int(self.headers["Content-Length"])), self.server.choose()
        headers = {"Content-Type": "application/json"} | ({} if self.server.revision else {"X-User": "1"})
        link = self.server.link(side)
        try:
            link.request("POST", self.path, body, headers)
            reply = link.getresponse()
            raw, status = reply.read(), reply.status
        except (OSError, http.client.HTTPException):
            link.close()
            raw, status = b"{}", 502
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(raw))), ("X-Side", side)):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@dataclass
class Users:
    """Threads that ask both services all the time, as if nothing were going on."""
    fronts: dict[str, Front]
    questions: list[Question]
    seen: Counter[tuple[str, int]] = field(default_factory=Counter)  # (side, status)
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, name: str) -> None:
        """One user of one service."""
        mine, front = [question for question in self.questions if question.service == name], self.fronts[name]
        link = http.client.HTTPConnection("127.0.0.1", front.server_address[1], timeout=10)
        while not self.stop.wait(0.02):
            link.request("POST", SERVICES[name], random.choice(mine).body, {"Content-Type": "application/json"})
            reply = link.getresponse()
            reply.read()
            self.seen[reply.headers["X-Side"], reply.status] += 1

    @contextlib.contextmanager
    def busy(self) -> Iterator[Counter[tuple[str, int]]]:
        """While the block runs; what they saw."""
        self.stop.clear()
        self.seen = Counter()
        threads = [threading.Thread(target=self.ask, args=(name,)) for name in self.fronts]
        for thread in threads:
            thread.start()
        try:
            yield self.seen
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()


@dataclass(frozen=True)
class Result:
    """How one rehearsal went."""
    end: str                            # outcome, or the words of the error
    seconds: float
    split: dict[str, dict[str, int]]    # at the end, by service
    tags: set[str]
    seen: Counter[tuple[str, int]]

    @property
    def failed_champion(self) -> int:
        """Requests that the champion was given and did not answer well."""
        return sum(count for (side, status), count in self.seen.items() if side == "stable" and status != 200)


@dataclass
class LocalCloud:
    """Processes, fronts and users; `rehearse` may be called many times."""
    cloud: Cloud
    fronts: dict[str, Front]
    addresses: dict[str, str]
    users: Users

    def rehearse(self) -> Result:
        """One roll-out from the start."""
        shutil.rmtree(self.cloud.folder / "state", ignore_errors=True)
        (self.cloud.folder / "calls.jsonl").unlink(missing_ok=True)
        self.cloud.create({name: {f"{name}-1": 100} for name in SERVICES}, self.addresses, {name: self.addresses[f"{name}/candidate"] for name in SERVICES})
        first = Rollout(TARGET, tuple(SERVICES), "rehearsed", {name: f"{name}@sha256:{'22' * 32}" for name in SERVICES})
        with self.users.busy() as seen:
            began = time.monotonic()
            try:
                end = roll_out(TARGET, ROOT, self.cloud.folder / "state", "begin", lambda passed: first, lambda words, urgent: None, lambda line: None, PACE).outcome
            except DeltaGoError as error:
                end = str(error)
            seconds = time.monotonic() - began
            time.sleep(0.1)
        services = self.cloud.read()["services"]
        return Result(end, seconds, {name: services[name]["traffic"] for name in SERVICES}, {tag for service in services.values() for tag in service["tags"]}, seen.copy())


@contextlib.contextmanager
def local_cloud(folder: Path, kind: str) -> Iterator[LocalCloud]:
    """Two services a side, the candidates of a kind; the fake gcloud first on PATH meanwhile."""
    models, cloud = ROOT / "models", Cloud(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "digest":
        models = shutil.copytree(models, folder / "models")
        told = json.loads((models / MANIFEST_FILE).read_text())
        (models / MANIFEST_FILE).write_text(json.dumps(told | {"verdict": "no edge: another set"}, indent=1, sort_keys=True))
    with contextlib.ExitStack() as stack:
        ports: dict[str, dict[str, int]] = {}
        started: list[Running] = []
        for name in SERVICES:
            for side in ("stable", "candidate"):
                spoil = {"CANDIDATE": kind} if side == "candidate" else {}
                service = stack.enter_context(running(name, models if side == "candidate" else ROOT / "models", START, spoil, wait=False))
                ports.setdefault(name, {})[side] = service.port
                started.append(service)
        for service in started:
            wait_ready(service, path="/health/ready")
        fronts = {name: Front(cloud, name, ports[name]) for name in SERVICES}
        alone = {f"{name}/{side}": Front(cloud, name, ports[name], side) for name in SERVICES for side in ("stable", "candidate")}
        for front in (*fronts.values(), *alone.values()):
            stack.callback(front.server_close)
            stack.callback(front.shutdown)
        before = os.environ["PATH"]
        stack.callback(os.environ.__setitem__, "PATH", before)
        os.environ["PATH"] = f"{install(folder)}:{before}"
        addresses = {name: front.address for name, front in {**fronts, **alone}.items()}
        yield LocalCloud(cloud, fronts, addresses, Users(fronts, golden_questions(ROOT / "models")[1]))


if __name__ == "__main__":  # python tests/rollout.py FOLDER RUNS KIND...
    for word in sys.argv[3:]:
        with local_cloud(Path(sys.argv[1]) / word, word) as local:
            results = [local.rehearse() for _ in range(int(sys.argv[2]))]
        back = sum(result.split == {name: {f"{name}-1": 100} for name in SERVICES} and not result.tags and "rolled back" in result.end for result in results)
        print(f"{word}: {back} of {len(results)} rolled back, slowest {max(result.seconds for result in results):.1f} s, "
              f"failed champion requests {sum(result.failed_champion for result in results)} of {sum(result.seen.total() for result in results)}, "
              f"ends {Counter(result.end.partition('as before: ')[2][:110] or result.end for result in results).most_common(4)}", flush=True)
