"""Promotion by rule, for real: honest sets pass, shuffled labels and forged evidence do not, and a kill at any moment leaves whole sets."""
from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from delta_go.domain import InputError
from delta_go.evidence.report import outside_needs, write_summary
from delta_go.evidence.verdict import weigh
from delta_go.evidence.walk_forward import WalkSettings, walk_forward
from delta_go.evidence.workflows import publish_models, remember_inputs, save_candidate
from delta_go.learning import shelf
from delta_go.learning.features import regime_inputs
from delta_go.learning.predictor import PREDICTOR_FEATURES
from delta_go.learning.predictor_fit import Examples, fit_predictor
from delta_go.learning.regime_fit import fit_rule
from delta_go.learning.registry import EVIDENCE, MANIFEST_FILE, PREDICTOR_FILE, Manifest, load_models, manifest_bytes, parse_manifest, regime_file, save_models
from delta_go.learning.shelf import alone, change_champion, mark_of, read_set, rollback, shelved
from delta_go.learning.training import TrainSettings, collect_examples, fit_all_regimes, read_all
from delta_go.market.load import LoadedMarket
from delta_go.market.simulate import Edge, simulate_market
from delta_go.model_file import digest
from delta_go.ops import promote as room
from delta_go.ops.verify import approval_faults
from delta_go.ops.promote import Card, Case, Rules, examine, open_case, promote, unapproved
from tests.whole import minute_models

ROOT = Path(__file__).parents[1]
SYMBOLS = ("BTCUSD", "ETHUSD", "SOLUSD")
HOURS = {"champion": 7_000, "candidate": 8_500, "all": 10_500}


@dataclass(frozen=True)
class World:
    """Three symbols with a planted edge, and what retrains have left."""
    home: Path
    market: LoadedMarket

    def until(self, bars: int) -> LoadedMarket:
        """The market as it was known."""
        return replace(self.market, candles={symbol: candles[:bars] for symbol, candles in self.market.candles.items()})

    @property
    def payments(self):
        """Funding by symbol."""
        return {symbol: self.market.payments(symbol) for symbol in self.market.candles}

    def train(self, name: str, bars: int, champion: Path | None = None, shuffled: bool = False, verdict: str = "trade", threshold: float | None = None) -> Path:
        """A run's folder: models, and the reports of a walk-forward that was made once for all."""
        market, settings = self.until(bars), TrainSettings(restarts=2)
        champions = load_models(champion).regimes if champion else None
        regimes, qualities = fit_all_regimes(market.candles, settings, 0, champions)
        readings = read_all(market.candles, regimes, self.payments, settings)
        examples = collect_examples(market.candles, readings, self.payments, settings)
        if shuffled:
            examples = replace(examples, net_return=np.random.default_rng(5).permutation(examples.net_return))
        predictor, quality = fit_predictor(examples, settings.predictor, 0, remember_inputs(readings, 3_600))
        if threshold is not None and predictor.threshold is None:
            predictor = replace(predictor, threshold=threshold, abstain_reason=None)
        metrics = {symbol: asdict(each) for symbol, each in qualities.items()}
        save_candidate(self.home / name, market, regimes, metrics, predictor, quality, examples.inputs, 0)
        publish_models(self.home / name, verdict)
        return self.home / name

    def walk(self, name: str, bars: int) -> None:
        """The walk-forward that goes with a training on so many bars."""
        market, reports = self.until(bars), self.home / name / "reports" / "walk_forward"
        walk = walk_forward(market.candles, self.payments, WalkSettings(180, 60, TrainSettings(restarts=1)))
        weighed = weigh(walk, market.candles, reports / "trials.jsonl", ",".join(market.fingerprints.values()))
        write_summary(self.home / name, "walk_forward", "A walk.", verdict="trade", trials=weighed.evidence.trials)

    def case(self, run: Path, champion: Path, **more) -> Case:
        """The case of a run against a champion."""
        return open_case(run, champion, self.market, **more)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """A market with an edge of 200 basis points, a champion, and an honest candidate with its walk."""
    market = simulate_market(SYMBOLS, HOURS["all"], seed=0, edge=Edge("drift", 200))
    made = World(tmp_path_factory.mktemp("promotion"), LoadedMarket(market.candles, market.funding, None, "simulated", "1h"))
    made.train("old", HOURS["champion"])
    made.train("new", HOURS["candidate"], made.home / "old" / "models")
    made.walk("new", HOURS["candidate"])
    return made


@pytest.fixture
def champion(world, tmp_path) -> Path:
    """A fresh copy of the champion's folder."""
    shutil.copytree(world.home / "old" / "models", tmp_path / "site" / "models")
    return tmp_path / "site" / "models"


def status(card: Card) -> dict[str, str]:
    """Status by check."""
    return {line.check: line.status for line in card.lines}


def kept(folder: Path) -> list[str]:
    """What lies in force and on the shelf, by the hash of its manifest."""
    return [str(mark_of(place)) for place in (folder, *shelved(folder).values())]


# A set that trades

def test_an_honest_candidate_is_approved_and_can_be_taken_back(world, champion):
    before, run, told = read_set(champion), world.home / "new", []
    card = promote(world.case(run, champion), champion, told.append)
    assert (card.outcome, set(status(card).values()), [*told]) == ("approved", {"pass"}, [*card.lines]), card.words
    folder = champion.parent / "reports" / "promotion"
    page, raw = (folder / f"{card.candidate}.html").read_text(), (folder / f"{card.candidate}.json").read_bytes()
    assert outside_needs(page) == [] and all(line.found.split(":")[0][:30] in page for line in card.lines if "&" not in line.found and "'" not in line.found)
    assert json.loads(raw)["outcome"] == "approved" and str(world.home) not in raw.decode()
    loaded = load_models(champion).manifest
    assert loaded.approval == {"set": card.candidate, "card": digest(raw), "rules": Rules().version, "replaces": parse_manifest(before[MANIFEST_FILE]).version, "data_end": card.data_end}
    assert unapproved(read_set(champion)) == read_set(run / "models") and loaded.version == card.candidate
    assert read_set(champion / "previous" / "1") == before

    now = kept(champion)
    again = promote(world.case(run, champion), champion)
    assert again.outcome == "equal" and "already" in again.words and kept(champion) == now and (folder / f"{card.candidate}.json").read_bytes() == raw
    assert rollback(champion).version == loaded.approval["replaces"] and read_set(champion) == before
    assert rollback(champion).approval == loaded.approval


def test_what_the_champion_trades_is_not_dropped_by_a_promotion(world, champion, tmp_path):
    """Fewer symbols or another resolution would leave positions that no model looks after."""
    fewer = shutil.copytree(world.home / "new" / "models", tmp_path / "fewer")
    manifest = parse_manifest((fewer / MANIFEST_FILE).read_bytes())
    (fewer / MANIFEST_FILE).write_bytes(manifest_bytes(replace(manifest, files={name: entry for name, entry in manifest.files.items() if "SOLUSD" not in name})))
    before = kept(champion)
    with pytest.raises(InputError, match="expected models of BTCUSD, ETHUSD, SOLUSD as the champion has, got none of SOLUSD; .*empty folder"):
        world.case(fewer, champion)
    with pytest.raises(InputError, match="expected 1m candles as the champion reads, got 1h"):
        world.case(world.home / "new", minute_models(tmp_path / "minutes"))
    assert kept(champion) == before
    assert world.case(world.home / "new", fewer).candidate.manifest.symbols == SYMBOLS, "more symbols are welcome"


@pytest.fixture(scope="module")
def shuffled(world) -> Path:
    """A run on the same candles whose labels were dealt out at random, made to trade, with the honest run's reports beside it."""
    run = world.train("shuffled", HOURS["candidate"], world.home / "old" / "models", shuffled=True, threshold=0.47)
    shutil.copytree(world.home / "new" / "reports", run / "reports")
    return run


def test_shuffled_labels_are_refused(world, champion, shuffled):
    before = read_set(champion)
    card = promote(world.case(shuffled, champion), champion)
    found = status(card)
    assert card.outcome == "refused" and found["determinism"] == "fail" and found["calibration"] == "fail", card.words
    assert found["leaks"] == found["serve"] == found["regimes"] == "pass"
    assert read_set(champion) == before and not shelved(champion) and "trade_predictor.pkl" in str(card.lines[4].found)


def test_shuffled_labels_are_refused_even_if_they_abstain(world, champion):
    run = world.train("shy", HOURS["candidate"], world.home / "old" / "models", shuffled=True, verdict="no edge: shuffled")
    card = promote(world.case(run, champion), champion)
    assert card.outcome == "refused" and not card.trades and [line.check for line in card.lines if line.needed and line.status != "pass"] == ["determinism"]


QUICK = ("calibration", "gain", "champion", "deflated Sharpe", "drift")


@pytest.fixture
def quick(monkeypatch):
    """Only the lines that a test is about."""
    def only(*checks: str) -> None:
        monkeypatch.setattr(room, "CHECKS", {name: room.CHECKS[name] for name in checks})
    return only


def test_missing_evidence_refuses(world, champion, quick, tmp_path):
    quick(*QUICK)
    shutil.copytree(world.home / "new" / "models", tmp_path / "bare" / "models")
    card = promote(world.case(tmp_path / "bare", champion), champion)
    assert card.outcome == "refused" and status(card) == dict.fromkeys(QUICK, "pass") | {"deflated Sharpe": "missing"}

    short = open_case(world.home / "new", champion, world.until(HOURS["candidate"]))
    card = promote(short, champion)
    assert card.outcome == "refused" and [status(card)[name] for name in ("calibration", "gain", "champion")] == ["missing"] * 3
    assert "no bar after" in card.lines[0].found and "earlier --end" in card.lines[0].found
    assert not shelved(champion)


@pytest.mark.parametrize("fault", ["tampered", "cut", "other candles", "another seed's run", "no edge", "fresh ledger"])
def test_luck_is_judged_by_the_ledger(world, champion, quick, tmp_path, fault):
    quick("deflated Sharpe")
    run = tmp_path / "run"
    shutil.copytree(world.home / "new", run)
    reports = run / "reports" / "walk_forward"
    lines = (reports / "trials.jsonl").read_text().splitlines(keepends=True)
    if fault == "tampered":
        (reports / "trials.jsonl").write_text("".join(lines).replace('"sharpe":0', '"sharpe":1', 1))
    if fault == "cut":
        (reports / "trials.jsonl").write_text("".join(lines[:-1]))
    if fault == "no edge":
        write_summary(run, "walk_forward", "A walk.", verdict="no edge: luck", trials=4)
    if fault == "other candles":
        for path in reports.glob("trials*"):
            path.unlink()
        weighed = weigh(walk_forward(*small_walk()), small_walk()[0], reports / "trials.jsonl", "elsewhere")
        assert weighed.evidence.trials == 4
    if fault == "another seed's run":
        told = room.read_trials(reports / "trials.jsonl")
        for path in reports.glob("trials*"):
            path.unlink()
        for trial in told:
            room.record_trial(reports / "trials.jsonl", replace(trial, seed=1))
    if fault == "fresh ledger":
        other = champion.parent / "reports" / "walk_forward" / "trials.jsonl"
        trial = next(trial for trial in room.read_trials(reports / "trials.jsonl") if trial.family == "delta_go")
        room.record_trial(other, trial)
        for number in range(60):
            room.record_trial(other, replace(trial, config={"number": number}, sharpe=0.3 * (-1) ** number))
    card = promote(world.case(run, champion), champion)
    assert card.outcome == "refused", card
    assert card.lines[0].status == ("fail" if fault in ("no edge", "fresh ledger") else "missing")
    if fault == "fresh ledger":
        assert card.lines[0].numbers["trials"] == 64


def small_walk():
    market = simulate_market(("BTCUSD",), 6_000, seed=1)
    return market.candles, {"BTCUSD": (market.funding["BTCUSD"].time, market.funding["BTCUSD"].rate)}, WalkSettings(180, 60, TrainSettings(restarts=1))


def test_every_candidate_that_looks_at_the_same_bars_is_counted(world, champion, shuffled, quick):
    quick("gain")
    first = promote(world.case(world.home / "new", champion), champion)
    rollback(champion)
    second = promote(world.case(shuffled, champion), champion)
    rollback(champion) if second.outcome == "approved" else None
    third = promote(world.case(world.home / "new", champion), champion)
    assert [card.lines[0].numbers["looks"] for card in (first, second, third)] == [1, 2, 2]
    ledger = champion.parent / "reports" / "promotion" / "looks.jsonl"
    ledger.write_text(ledger.read_text().split("\n")[0] + "\n")
    card = promote(world.case(shuffled, champion), champion)
    assert card.outcome == "refused" and "looks.jsonl" in card.lines[0].found


# A set that does not trade

@pytest.fixture(scope="module")
def calm(world) -> Path:
    """An honest run that abstains, without any report."""
    return world.train("calm", HOURS["candidate"], world.home / "old" / "models", verdict="no edge: nothing convinced")


def test_fresh_regimes_replace_old_ones_without_an_edge(world, champion, calm):
    card = promote(world.case(calm, champion), champion)
    assert card.outcome == "approved" and not card.trades, card.words
    assert {line.check for line in card.lines if line.needed} == {"leaks", "regimes", "names", "serve", "determinism"}
    assert [line.found for line in card.lines if line.check == "gain"] == ["not looked at: the set does not trade"]
    assert not (champion.parent / "reports" / "promotion" / "looks.jsonl").exists(), "bars were used up for nothing"
    assert load_models(champion).predictor.threshold is None


def test_the_first_champion_needs_no_other(world, calm, tmp_path, quick):
    quick("names", "champion")
    card = promote(world.case(calm, tmp_path / "models"), tmp_path / "models")
    assert card.outcome == "approved" and card.champion is None and not shelved(tmp_path / "models") and "first champion" in card.words


def test_a_second_judgement_keeps_the_card_of_the_first(world, champion, calm, quick, monkeypatch):
    """Taken back, judged again and refused: whoever puts the set in force once more still finds the card of its approval."""
    quick("names")
    version = promote(world.case(calm, champion), champion).candidate
    rollback(champion)
    monkeypatch.setattr(room, "CHECKS", {"names": (lambda case: room.line("names", False, "no"), True)})
    assert promote(world.case(calm, champion), champion).outcome == "refused"
    manifest, cards = rollback(champion), champion.parent / "reports" / "promotion"
    assert manifest.version == version and not [*approval_faults(manifest, cards)]
    assert json.loads((cards / f"{version}.json").read_bytes())["outcome"] == "refused" and len([*cards.glob("*.json")]) == 2


def test_a_champion_that_nobody_judged_can_be(world, calm, tmp_path, quick):
    """A set that was put in force by hand is approved where it lies, once; nothing of it goes onto the shelf."""
    quick("names", "champion")
    shutil.copytree(calm / "models", tmp_path / "models")
    card = promote(world.case(calm, tmp_path / "models"), tmp_path / "models")
    assert card.outcome == "approved" and "as the first champion; it does not trade" in card.words and card.champion is None
    assert load_models(tmp_path / "models").manifest.approval["set"] == card.candidate and not shelved(tmp_path / "models")
    assert promote(world.case(calm, tmp_path / "models"), tmp_path / "models").outcome == "equal"


def test_a_seed_that_was_not_the_training_s_is_found_out(world, champion, quick, tmp_path):
    """The second training is a real one: told another seed, it gives other bytes."""
    quick("determinism")
    manifest = json.loads((world.home / "new" / "models" / MANIFEST_FILE).read_text())
    for seed, expected in ((0, "pass"), (1, "fail")):
        shutil.copytree(world.home / "new", tmp_path / str(seed))
        files = {name: {**entry, "seeds": [seed]} for name, entry in manifest["files"].items()}
        (tmp_path / str(seed) / "models" / MANIFEST_FILE).write_bytes(manifest_bytes(Manifest(**{**manifest, "files": files})))
        case = world.case(tmp_path / str(seed), champion)
        line = examine(case)[0]
        assert (line.check, line.status) == ("determinism", expected) and (PREDICTOR_FILE in line.numbers["differs"]) == (expected == "fail")


def test_other_candles_prove_nothing(world, champion, calm, quick):
    quick("determinism")
    candles = {symbol: replace(bars, close=np.where(np.arange(len(bars)) == 4_000, bars.open, bars.close)) for symbol, bars in world.market.candles.items()}
    card = promote(open_case(calm, champion, replace(world.market, candles=candles)), champion)
    assert card.outcome == "refused" and status(card) == {"determinism": "missing"} and "not the ones of the training" in card.lines[0].found


@pytest.mark.parametrize("change, words", [({"occupancy": [0.01, 0.3, 0.3, 0.2, 0.19]}, "bull holds 1.0%"), ({"mean_duration": [40, 3.0, 40, 40, 40]}, "bear lasts 3.0"),
                                           ({"name_stability": 0.5}, "refit kept"), ({"volatility_p_value": None}, "volatility ahead"), ({"occupancy": None}, ""), ({}, "")])
def test_regimes_that_are_none_are_refused(world, champion, calm, quick, change, words):
    quick("regimes", "names")
    case = world.case(calm, champion)
    files = dict(case.candidate.manifest.files)
    entry = files[regime_file("ETHUSD")]
    files[regime_file("ETHUSD")] = {**entry, "metrics": {**entry["metrics"], **change} if change else {}}
    lines = examine(replace(case, candidate=replace(case.candidate, manifest=replace(case.candidate.manifest, files=files))))
    assert lines[0].status == ("fail" if words else "missing") and words in lines[0].found
    assert lines[1].status == ("fail" if "name_stability" in change else "pass" if change else "missing")


def test_swapped_names_are_refused(world, champion, calm, quick):
    quick("names")
    case = world.case(calm, champion)
    order = [1, 0, 2, 3, 4]
    swapped = {symbol: replace(model, means=model.means[order], precision=model.precision[order], transition=model.transition[np.ix_(order, order)], stationary=model.stationary[order])
               for symbol, model in case.candidate.regimes.items()}
    assert status_of(examine(replace(case, candidate=replace(case.candidate, regimes=swapped)))) == {"names": "fail"}


def status_of(lines) -> dict[str, str]:
    return {line.check: line.status for line in lines}


def test_a_leak_is_refused(world, champion, calm, quick, monkeypatch):
    from delta_go.evidence import workflows
    quick("leaks")
    honest = workflows.read_market

    def leaking(candles, model, payments):
        seen = honest(candles, model, payments)
        seen.features.values[:, 0] -= candles.close.mean()
        return seen
    monkeypatch.setattr(workflows, "read_market", leaking)
    assert status_of(examine(world.case(calm, champion))) == {"leaks": "fail"}


def test_services_that_answer_otherwise_are_refused(world, champion, calm, quick, monkeypatch):
    quick("serve")
    real = room.golden_requests
    monkeypatch.setattr(room, "golden_requests", lambda contents: ((service, name, body, [number + 1e-6 for number in right]) for service, name, body, right in real(contents)))
    assert status_of(examine(world.case(calm, champion))) == {"serve": "fail"}


def test_a_candidate_that_moved_meanwhile_is_not_promoted(world, champion, calm, quick, tmp_path):
    quick("names")
    shutil.copytree(calm, tmp_path / "run")
    case = world.case(tmp_path / "run", champion)
    (tmp_path / "run" / "models" / PREDICTOR_FILE).write_bytes(b"swapped after the check")
    promote(case, champion)
    assert unapproved(read_set(champion)) == read_set(calm / "models")
    with pytest.raises(InputError, match="trade_predictor.pkl"):
        world.case(tmp_path / "run", champion)


def test_a_champion_that_moved_meanwhile_is_not_replaced(world, champion, calm, quick):
    quick("names")

    def meanwhile(line):
        with alone(champion):
            change_champion(champion, read_set(world.home / "new" / "models"))
    with pytest.raises(InputError, match="changed while the candidate was judged"):
        promote(world.case(calm, champion), champion, meanwhile)
    assert read_set(champion) == read_set(world.home / "new" / "models")


@pytest.mark.slow
def test_what_the_notebooks_train_is_trained_again_to_the_byte(tmp_path):
    """Real notebooks with a champion in place, then a real retraining."""
    from delta_go.evidence.workflows import run_all
    from delta_go.market.load import load_market
    for end in ("2024-03-01", "2024-04-01"):
        run_all(tmp_path / "site", {"symbols": "BTCUSD", "end": end, "jobs": 1}, lambda *_: None)
        shutil.copytree(tmp_path / "site", tmp_path / end)
    case = open_case(tmp_path / "2024-04-01", tmp_path / "2024-03-01" / "models", load_market("", symbols=["BTCUSD"]))
    card = promote(case, tmp_path / "2024-03-01" / "models")
    assert card.outcome == "approved" and status(card)["determinism"] == "pass", card.words


# The shelf

@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[dict[str, bytes]]:
    """Six small sets, told apart by their verdicts."""
    home, candles = tmp_path_factory.mktemp("sets"), simulate_market(("BTCUSD",), 400, seed=3).candles["BTCUSD"]
    nothing = Examples(np.empty((0, len(PREDICTOR_FEATURES)), np.float32), *np.empty((2, 0), np.int64), np.empty(0), np.empty(0, np.int16))
    rule, predictor = fit_rule(candles, regime_inputs(candles), {}), fit_predictor(nothing)[0]
    made = []
    for number in range(6):
        files = {name: dict.fromkeys(EVIDENCE, "example") for name in (regime_file("BTCUSD"), PREDICTOR_FILE)}
        save_models(home / str(number), {"BTCUSD": rule}, replace(predictor, meta={"number": number}), Manifest("1h", 200, str(number), files), {"BTCUSD": candles}, np.zeros((1, len(PREDICTOR_FEATURES))))
        made.append(read_set(home / str(number)))
    return made


def verdicts(folder: Path) -> list[int]:
    """In force and on the shelf, every set checked in full."""
    return [int(load_models(place).manifest.verdict) for place in (folder, *shelved(folder).values())]


@pytest.mark.parametrize("seed", range(4))
def test_the_shelf_is_a_list_of_who_was_in_force_last(sets, tmp_path, seed):
    rng, expected = random.Random(seed), []
    for _ in range(12):
        if len(expected) > 1 and rng.random() < 0.4:
            to = rng.randrange(1, min(len(expected), 4))
            number = expected[to]
            rollback(tmp_path, to)
        else:
            number = rng.randrange(6)
            with alone(tmp_path):
                change_champion(tmp_path, sets[number])
        expected = [number, *(each for each in expected if each != number)][:4]
        assert verdicts(tmp_path) == expected
    assert sorted(path.name for path in (tmp_path / "previous").iterdir()) == [str(number) for number in range(1, len(expected))]


def test_a_broken_champion_is_replaced_and_not_kept(sets, tmp_path):
    for contents in sets[:3]:
        change_champion(tmp_path, contents)
    (tmp_path / PREDICTOR_FILE).write_bytes(b"\x80\x04cos\nsystem\n.")
    assert rollback(tmp_path).verdict == "1" and verdicts(tmp_path) == [1, 0]
    (tmp_path / "previous" / "1" / PREDICTOR_FILE).unlink()
    with pytest.raises(InputError, match="trade_predictor.pkl"):
        rollback(tmp_path)
    assert load_models(tmp_path).manifest.verdict == "1"


CHANGER = """
import random, sys
from pathlib import Path
from delta_go.learning.shelf import alone, change_champion, read_set, rollback, shelved
home, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
sets = [read_set(path) for path in sorted(home.glob("set*"))]
print("ready", flush=True)
while True:
    if len(shelved(home / "models")) > 1 and rng.random() < 0.5:
        rollback(home / "models", rng.choice(sorted(shelved(home / "models"))))
    else:
        with alone(home / "models"):
            change_champion(home / "models", rng.choice(sets))
"""


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_whole_sets(sets, tmp_path, kills):
    """A reader never waits and never repairs; the next change finds everything in order."""
    for number, contents in enumerate(sets):
        for name, raw in contents.items():
            (tmp_path / f"set{number}").mkdir(exist_ok=True)
            (tmp_path / f"set{number}" / name).write_bytes(raw)
    change_champion(tmp_path / "models", sets[0])
    for kill in range(kills):
        child = subprocess.Popen([sys.executable, "-c", CHANGER, str(tmp_path), str(kill)], stdout=subprocess.PIPE, cwd=ROOT)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(random.Random(kill).random() * 0.15)
        child.send_signal(signal.SIGKILL)
        child.wait()
        loaded = load_models(tmp_path / "models")
        assert loaded.manifest.verdict in "012345"
        for place in shelved(tmp_path / "models").values():
            load_models(place)
        shelf.tidy_shelf(tmp_path / "models")
        order = verdicts(tmp_path / "models")
        assert str(order[0]) == loaded.manifest.verdict and len(set(order)) == len(order)
        assert not [path.name for path in (tmp_path / "models" / "previous").glob(".*")]


@pytest.mark.parametrize("after", range(1, 40))
def test_a_stop_after_each_step_loses_nothing(sets, tmp_path, monkeypatch, after):
    """The change is stopped before its n-th rename or removal; whole sets remain, and nobody who was kept is lost."""
    for contents in sets[:4]:
        change_champion(tmp_path, contents)
    steps = [0]

    class Stop(BaseException):
        pass

    def counted(work):
        def act(*given, **named):
            steps[0] += 1
            if steps[0] == after:
                raise Stop
            return work(*given, **named)
        return act
    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        with contextlib.suppress(Stop):
            (lambda: rollback(tmp_path, 2))() if after % 2 else change_champion(tmp_path, sets[4])
    assert load_models(tmp_path).manifest.verdict in ("3", "1" if after % 2 else "4")
    for place in shelved(tmp_path).values():
        load_models(place)
    shelf.tidy_shelf(tmp_path)
    assert verdicts(tmp_path) in ([[3, 2, 1, 0], [1, 3, 2, 0]] if after % 2 else [[3, 2, 1, 0], [4, 3, 2, 1]])
