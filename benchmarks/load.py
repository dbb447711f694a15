"""A model service as a real process on loopback, and a crowd of kept-alive connections that asks it."""
from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
START = "from delta_go.serving.server import main; main()"


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def post(path: str, body: bytes, headers: str = "") -> bytes:
    """One HTTP request as bytes."""
    return f"POST {path} HTTP/1.1\r\nHost: local\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


@dataclass
class Running:
    """A started service."""
    process: subprocess.Popen[bytes]
    port: int
    log: Path | None = None

    def get(self, path: str = "/health/ready") -> tuple[int, bytes]:
        """Status and body of one GET."""
        return talk(self.port, f"GET {path} HTTP/1.1\r\nHost: local\r\nConnection: close\r\n\r\n".encode())

    def post(self, body: object, path: str = "/", headers: str = "") -> tuple[int, dict]:
        """Status and answer of one POST of a plain value."""
        status, raw = talk(self.port, post(path, json.dumps(body).encode(), headers + "Connection: close\r\n"))
        return status, json.loads(raw)

    def workers(self) -> list[int]:
        """Process numbers of the workers."""
        return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]


def talk(port: int, request: bytes, seconds: float = 10) -> tuple[int, bytes]:
    """Status and body that come back on a connection of its own."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as sock:
        sock.sendall(request)
        raw = b"".join(iter(lambda: sock.recv(65_536), b""))
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


@contextlib.contextmanager
def running(name: str, models: Path = ROOT / "models", code: str = START, environ: Mapping[str, str] | None = None, log: Path | None = None,
            python: str = sys.executable, wait: bool = True) -> Iterator[Running]:
    """The service in a process of its own, ready, and stopped at the end."""
    port = free_port()
    told = {key: value for key, value in os.environ.items() if not key.startswith(("SERVICE_", "K_", "DELTA_"))}
    told |= {"PORT": str(port), "HMM_MODEL_DIR": str(models), "TRADE_PREDICTOR_MODEL": str(models), "LOG_LEVEL": "WARNING", **(environ or {})}
    with open(log or os.devnull, "wb") as output:
        process = subprocess.Popen([python, "-c", code, name], env=told, cwd=ROOT, stdout=output, stderr=output)
    service = Running(process, port, log)
    try:
        if wait:
            wait_ready(service)
        yield service
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(12)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_ready(service: Running, seconds: float = 30, path: str = "/health/live") -> None:
    """Return when the service answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, IndexError):
            if service.get(path)[0] < 600:
                return
        if service.process.poll() is not None:
            raise RuntimeError(f"the service ended with {service.process.returncode}")
        time.sleep(0.02)
    raise RuntimeError("the service does not answer")


@dataclass
class Crowd:
    """What the connections saw."""
    seconds: list[float] = field(default_factory=list)     # of every answer
    statuses: dict[int, int] = field(default_factory=dict)
    broken: int = 0        # requests sent whose answer never came
    span: float = 0.0      # seconds from first request to last answer

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.seconds) / self.span if self.span else 0.0

    def quantile(self, share: float) -> float:
        """Seconds that a share of the answers took at most."""
        ordered = sorted(self.seconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def drive(port: int, request: bytes, connections: int = 16, seconds: float = 3.0) -> Crowd:
    """Ask over kept-alive connections, each one request at a time, and drop none that is in flight at the end."""
    crowd, waiting, poller = Crowd(), {}, select.epoll()
    began = time.perf_counter()

    def send(sock: socket.socket) -> None:
        waiting[sock.fileno()] = (sock, time.perf_counter(), b"")
        sock.sendall(request)

    def connect() -> None:
        with contextlib.suppress(OSError):
            sock = socket.create_connection(("127.0.0.1", port), timeout=10)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            poller.register(sock, select.EPOLLIN)
            send(sock)

    def drop(sock: socket.socket) -> None:
        waiting.pop(sock.fileno(), None)
        poller.unregister(sock)
        sock.close()

    for _ in range(connections):
        connect()
    while waiting:
        events, now = poller.poll(1.0), time.perf_counter()
        for number, _ in events:
            sock, sent, got = waiting[number]
            try:
                piece = sock.recv(262_144)
            except OSError:
                piece = b""
            answer = got + piece
            if not piece:
                crowd.broken += 1
                drop(sock)
                continue
            head, blank, body = answer.partition(b"\r\n\r\n")
            size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]) if blank else 0
            if not blank or len(body) < size:
                waiting[number] = (sock, sent, answer)
                continue
            status = int(answer[9:12])
            crowd.seconds.append(time.perf_counter() - sent)
            crowd.statuses[status] = crowd.statuses.get(status, 0) + 1
            over, closing = now - began > seconds, b"connection: close" in head.lower()
            if over or closing:
                drop(sock)
                if closing and not over:
                    connect()
            else:
                send(sock)
        if not events and now - began > seconds + 15:
            crowd.broken += len(waiting)
            break
    crowd.span = time.perf_counter() - began
    poller.close()
    return crowd
