"""The two services beside an app on the same server that parses the same payload and answers a constant; start-up and memory."""
from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.load import Running, drive, post, running
from delta_go.learning.predictor import PREDICTOR_FEATURES
from delta_go.learning.reading import read_market
from delta_go.learning.registry import load_models
from delta_go.market.simulate import simulate_market

CONSTANT = """
import sys
from flask import Flask, Response, request
from delta_go.serving import server
from delta_go.serving.access import read_settings
from delta_go.serving.contract import parse_regimes, parse_trades

app = Flask("constant")

class Service:
    def stop(self): pass

app.extensions["delta_go"] = Service()

@app.get("/health/live")
def live(): return "{}"

@app.post("/json")
def parsed():
    request.get_json()
    return Response(b'{"answer":1}', mimetype="application/json")

@app.post("/strict")
def strict():
    (parse_regimes if sys.argv[1] == "hmm-detector" else parse_trades)(request.get_data(cache=False))
    return Response(b'{"answer":1}', mimetype="application/json")

server.ModelServer(read_settings(), lambda settings: app).run()
"""


def payloads() -> dict[str, bytes]:
    """A window of 200 candles for the detector, a signal for the predictor."""
    bars = simulate_market(("BTCUSD",), bars=3_000, seed=5).candles["BTCUSD"]
    names = ("open", "high", "low", "close", "volume", "time")
    window = {"symbol": "BTCUSD", **{name: getattr(bars, name)[-200:].tolist() for name in names}, "resolution": "1h"}
    reading = read_market(bars, load_models("models").regimes["BTCUSD"])
    row = reading.inputs[reading.signals.side != 0][-1].tolist()
    return {"hmm-detector": json.dumps(window).encode(),
            "trade-predictor": json.dumps({name: value for name, value in zip(PREDICTOR_FEATURES, row) if value == value}).encode()}


def compare_rates(name: str, body: bytes, paths: dict[str, str], rounds: int = 3, seconds: float = 2.0, threads: str = "2") -> None:
    """Best of a few rounds in which the real service and the constant app take turns."""
    told = {"SERVICE_THREADS": threads}
    with running(name, environ=told) as real, running(name, code=CONSTANT, environ=told) as constant:
        asked = {**{label: (real, path) for label, path in paths.items()}, "constant, request.get_json()": (constant, "/json"), "constant, our strict parser": (constant, "/strict")}
        best: dict[str, tuple[float, float, float]] = {}
        for _ in range(rounds):
            for label, (service, path) in asked.items():
                crowd = drive(service.port, post(path, body), seconds=seconds)
                assert set(crowd.statuses) == {200} and not crowd.broken, (label, crowd.statuses, crowd.broken)
                best[label] = max(best.get(label, (0.0, 0.0, 0.0)), (crowd.rate, crowd.quantile(0.5), crowd.quantile(0.99)))
    table = Table("who", "requests/s", "of get_json", "of strict", "p50", "p99", "p99 / p50", title=f"{name}: {len(body):,} bytes, 16 connections, one worker, {threads} threads", title_justify="left")
    for label, (rate, half, most) in best.items():
        shares = [f"{rate / best[other][0]:.2f}" for other in ("constant, request.get_json()", "constant, our strict parser")]
        table.add_row(label, f"{rate:,.0f}", *shares, f"{half * 1e3:.1f} ms", f"{most * 1e3:.1f} ms", f"{most / half:.1f}")
    Console(width=118).print(table)


def first_answer(name: str, body: bytes, python: str) -> float:
    """Seconds from the start of the process to its first right answer."""
    began = time.perf_counter()
    with running(name, python=python, wait=False) as service:
        while True:
            try:
                if service.post(json.loads(body))[0] == 200:
                    return time.perf_counter() - began
            except (OSError, IndexError):
                time.sleep(0.005)


def memory_of(service: Running) -> tuple[float, float]:
    """Megabytes: resident memory of the worker, and the proportional share of all its processes."""
    def read(pid: int, name: str) -> float:
        return int(re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1]) / 1024
    worker = service.workers()[0]
    return read(worker, "Rss"), read(worker, "Pss") + read(service.process.pid, "Pss")


def start_up(python: str, rounds: int = 5) -> None:
    """First answers beside a bare import of Flask, NumPy and XGBoost in the same environment."""
    bodies, best, memory = payloads(), {}, {}
    for _ in range(rounds):
        for label, modules in (("import flask, numpy, xgboost", "flask, numpy, xgboost"), ("import flask, numpy", "flask, numpy")):
            began = time.perf_counter()
            if subprocess.run([python, "-c", f"import {modules}"], capture_output=True).returncode == 0:
                best[label] = min(best.get(label, 9e9), time.perf_counter() - began)
        for name, body in bodies.items():
            best[name] = min(best.get(name, 9e9), first_answer(name, body, python))
    for name, body in bodies.items():
        with running(name, python=python) as service:
            drive(service.port, post("/", body), seconds=1)
            memory[name] = "{:.0f} MB, {:.0f} MB shared out".format(*memory_of(service))
    table = Table("what", "best", "of the import", "resident", title=f"from the start of the process to the first right answer ({python})", title_justify="left")
    base = best.get("import flask, numpy, xgboost", float("nan"))
    for label, seconds in best.items():
        table.add_row(label, f"{seconds:.2f} s", f"{seconds / base:.2f}", memory.get(label, ""))
    Console(width=118).print(table)


def main() -> None:
    """Rates, start-up, memory; name another interpreter to measure an environment with the serving requirements only."""
    bodies = payloads()
    compare_rates("hmm-detector", bodies["hmm-detector"], {"regime": "/"})
    compare_rates("trade-predictor", bodies["trade-predictor"], {"probability (?explain=0)": "/?explain=0", "with contributions": "/"})
    start_up(sys.argv[1] if len(sys.argv) > 1 else sys.executable)


if __name__ == "__main__":
    main()
