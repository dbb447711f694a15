"""A retrain as the workflow runs it, step by step: candles from an exchange on this machine, real notebooks, the gate, the pull request."""
from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pytest
from test_workflow_files import JOBS, ROOT, TOOLS, Desk, laid_out

from delta_go.evidence.report import outside_needs
from delta_go.evidence.workflows import publish_models, save_candidate
from delta_go.learning.registry import load_models
from delta_go.learning.shelf import read_set, unapproved
from delta_go.learning.training import TrainSettings, collect_examples, fit_models, read_all
from delta_go.market.load import load_market
from delta_go.model_file import digest

REMEMBER, FETCH, TRAIN, GATE = [step["run"] for step in JOBS["retrain", "train"]["steps"] if step.get("run", "make install") != "make install"]
PROPOSE = JOBS["retrain", "propose"]["steps"][-1]["run"]
COMMIT = "git -c user.name=a -c user.email=a@b commit --quiet --message"
SMALL = {"DELTA_SYMBOLS": "BTCUSD", "DELTA_JOBS": "1", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def exchange() -> Iterator[str]:
    """Sixteen months of the simulated market that end now, behind the exchange's own interface; its address."""
    words = [TOOLS / "delta-go", "emulate", "--today", "--start", "2024-05-01", "--symbols", "BTCUSD", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.send_signal(signal.SIGTERM)


def first_champion(folder: Path, bars: int = 7_000) -> None:
    """Models of the first months, as an earlier retrain would have left them."""
    market = load_market(str(folder / "build/candles"), symbols=["BTCUSD"])
    market.candles["BTCUSD"] = market.candles["BTCUSD"][:bars]
    settings, payments = TrainSettings(restarts=1), {"BTCUSD": market.payments("BTCUSD")}
    models = fit_models(market.candles, payments, settings)
    examples = collect_examples(market.candles, read_all(market.candles, models.regimes, payments, settings), payments, settings)
    save_candidate(folder, market, models.regimes, {"BTCUSD": asdict(models.regime_quality["BTCUSD"])}, models.predictor, models.predictor_quality, examples.inputs, 0)
    publish_models(folder, "no edge: an example")


def step(desk: Desk, script: str, **more: str) -> str:
    """A step of the workflow; what it printed."""
    done = desk.run(script, **SMALL, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A clone with a champion, fetched candles, and the candidate of one retrain, not judged yet."""
    folder = laid_out(tmp_path_factory.mktemp("retrain") / "clone")
    (folder / ".venv/bin").symlink_to(TOOLS)
    shutil.copytree(ROOT / "reports/walk_forward", folder / "reports/walk_forward")
    desk = Desk(folder)
    with exchange() as address:
        step(desk, FETCH, DELTA_BASE_URL=address)
    first_champion(folder)
    origin = folder.parent / "origin.git"
    step(desk, f"git init --quiet --bare {origin} && git init --quiet --initial-branch main && git remote add origin {origin} && git add models reports && {COMMIT} first && git push --quiet origin main")
    step(desk.create("gh"), REMEMBER)
    step(desk, TRAIN)
    return folder


def files_in(folder: Path) -> dict[str, str]:
    """What a folder holds, by hash."""
    return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


def copied(folder: Path, to: Path) -> Desk:
    """A desk in a copy of the clone; the origin is shared."""
    return Desk(shutil.copytree(folder, to / "clone", symlinks=True))


def test_a_retrain_proposes_a_candidate_with_its_card(trained, tmp_path):
    desk = copied(trained, tmp_path).create("gh")
    candidate, before = read_set(trained / "build/retrain/models"), read_set(trained / "models")
    words = step(desk, GATE, GITHUB_STEP_SUMMARY=str(tmp_path / "summary.md"))
    version = load_models(trained / "build/retrain/models").manifest.version
    assert f"{version} is approved and replaces {load_models(trained / 'models').manifest.version}" in words and (tmp_path / "summary.md").read_text() == words
    assert "✓ determinism: training again gives the same 2 files" in words
    assert unapproved(read_set(desk.folder / "models")) == candidate and read_set(desk.folder / "models/previous/1") == before
    step(desk, PROPOSE)
    step(desk, f"git clone --quiet --branch retrain {trained.parent / 'origin.git'} proposed")
    proposed = desk.folder / "proposed"
    card, page = (proposed / f"reports/promotion/{version}.{kind}" for kind in ("json", "html"))
    assert load_models(proposed / "models").manifest.approval["card"] == digest(card.read_bytes()) and outside_needs(page.read_text()) == []
    assert json.loads(card.read_text())["data_end"] > json.loads(card.read_text())["untouched"], "the training left nothing for the gate"
    made = files_in(desk.folder / "build/retrain/reports")
    assert {name for name in made if name.endswith("report.html")} == {f"{name}/report.html" for name in ("train_regimes", "train_predictor", "walk_forward", "health")}
    assert made.items() <= files_in(proposed / "reports").items()
    assert not [name for name in files_in(proposed) if "candles" in name or ".parquet" in name]
    [create] = [words for words in desk.heard("gh") if words[:2] == ["pr", "create"]]
    assert f"Retrain: {version} is approved" in " ".join(create)


@pytest.mark.slow
def test_a_retrain_twice_gives_the_same_bytes(trained, tmp_path):
    """Models, notebooks, pages, figures and ledgers: the whole set of files."""
    again = copied(trained, tmp_path)
    end = load_models(trained / "build/retrain/models").manifest.files["trade_predictor.pkl"]["data"]["BTCUSD"]["end"]
    step(again, f"{TRAIN} END={datetime.fromtimestamp(end, UTC):%Y-%m-%d}")
    assert files_in(again.folder / "build/retrain") == files_in(trained / "build/retrain")

