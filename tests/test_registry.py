"""Sets of models: all of it or nothing, and never anything that was tampered with."""
import copy
import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xgboost

from delta_go.domain import InputError
from delta_go.learning import registry
from delta_go.model_file import digest, parse_plain, plain_bytes
from delta_go.learning.predictor import PREDICTOR_FEATURES, Predictor, predict_probability
from delta_go.learning.regimes import RegimeModel, model_to_dict
from delta_go.learning.registry import (
    MANIFEST_FILE,
    NEXT,
    PREDICTOR_FILE,
    Manifest,
    describe_candles,
    finish_commit,
    library_versions,
    load_models,
    manifest_bytes,
    open_models,
    parse_manifest,
    regime_file,
    require_resolution,
    save_models,
)
from delta_go.market.candles import Candles

SYMBOLS = ("BTCUSD", "ETHUSD")
EVIDENCE = {"versions": {"python": "3.11"}, "data": {"bars": 260}, "features": ["volatility"], "metrics": {"auc": float("nan")}, "seeds": [0]}


def walk(symbol: str, bars: int = 260, seed: int = 0) -> Candles:
    rng = np.random.default_rng([seed, *symbol.encode()])
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.004, bars)))
    opens = np.append(100.0, close[:-1])
    return Candles(symbol, 3600, np.arange(bars) * 3600, opens, np.maximum(opens, close) * 1.001, np.minimum(opens, close) * 0.999, close, rng.uniform(1, 9, bars))


def regime_model(symbol: str, kind: str = "hmm", nudge: float = 0.0) -> RegimeModel:
    means = np.array([[0.0, 1.5], [0.2, -1.5], [0.0, 0.0], [1.5 + nudge, 0.0], [-1.5, 0.0]])
    return RegimeModel(symbol, 3600, kind, np.array([-5.5, 0.0]), np.array([0.3, 1.0]), means, np.tile(np.eye(2), (5, 1, 1)), np.full((5, 5), 0.01) + np.eye(5) * 0.95,
                       np.full(5, 0.2), np.array([-0.5, 0.5, 1.0]), {"note": "made by hand", "restarts": 3})


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    rng = np.random.default_rng(1)
    seen = rng.normal(size=(400, len(PREDICTOR_FEATURES)))
    matrix = xgboost.DMatrix(seen, (seen[:, 8] + seen[:, 5] > 0).astype(float), nthread=1)
    booster = xgboost.train({"objective": "binary:logitraw", "max_depth": 3, "nthread": 1}, matrix, 5)
    return Predictor(PREDICTOR_FEATURES, bytes(booster.save_raw("json")), 0.9, -0.1, 0.6, None, 0.01, -0.008)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(20, len(PREDICTOR_FEATURES)))
    rows[rng.random(rows.shape) < 0.05] = np.nan
    return rows


def save(folder, predictor, rows, verdict="no edge: a test", nudge=0.0, symbols=SYMBOLS):
    draft = Manifest("1h", 200, verdict, {name: EVIDENCE for name in (*map(regime_file, symbols), PREDICTOR_FILE)})
    regimes = {symbol: regime_model(symbol, nudge=nudge) for symbol in symbols}
    return save_models(folder, regimes, predictor, draft, {symbol: walk(symbol) for symbol in symbols}, rows)


@pytest.fixture(scope="module")
def contents(tmp_path_factory, predictor, rows) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("models")
    save(folder, predictor, rows)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def forged(contents, name, raw):
    "The set with one file replaced and the manifest's hash made to fit."
    manifest = json.loads(contents[MANIFEST_FILE])
    manifest["files"][name]["sha256"] = digest(raw)
    return {**contents, name: raw, MANIFEST_FILE: json.dumps(manifest).encode()}


def fields_of(contents, name):
    return parse_plain(contents[name], digest(contents[name]), name)


def refuse(contents, match=""):
    with pytest.raises(InputError, match=match):
        open_models(contents.__getitem__)


# What a set is

def test_a_set_comes_back_as_it_was(tmp_path, predictor, rows):
    saved = save(tmp_path, predictor, rows)
    loaded = load_models(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hmm_model_BTCUSD.pkl", "hmm_model_ETHUSD.pkl", "manifest.json", "trade_predictor.pkl"]
    assert {symbol: model_to_dict(model) for symbol, model in loaded.regimes.items()} == {symbol: model_to_dict(regime_model(symbol)) for symbol in SYMBOLS}
    assert loaded.predictor == predictor and np.array_equal(predict_probability(loaded.predictor, rows), predict_probability(predictor, rows))
    assert loaded.manifest.symbols == SYMBOLS and loaded.manifest.version == saved.version
    for name, entry in loaded.manifest.files.items():
        assert entry["sha256"] == digest((tmp_path / name).read_bytes()) and entry["bytes"] == (tmp_path / name).stat().st_size
        assert entry["metrics"] == {"auc": None} and entry["kind"] == ("predictor" if name == PREDICTOR_FILE else "hmm")


def test_the_same_models_give_the_same_bytes(tmp_path, predictor, rows, contents):
    save(tmp_path, replace(predictor), rows.copy())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents


def test_some_symbols_can_be_asked_for(tmp_path, predictor, rows):
    save(tmp_path, predictor, rows)
    assert list(load_models(tmp_path, ["ETHUSD"]).regimes) == ["ETHUSD"]
    with pytest.raises(InputError, match="no regime model for SOLUSD; the manifest has BTCUSD, ETHUSD"):
        load_models(tmp_path, ["BTCUSD", "SOLUSD"])


def test_a_smaller_set_leaves_no_file_of_the_larger(tmp_path, predictor, rows):
    save(tmp_path, predictor, rows)
    (tmp_path / "README.md").touch()
    save(tmp_path, predictor, rows, symbols=("BTCUSD",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "hmm_model_BTCUSD.pkl", "manifest.json", "trade_predictor.pkl"]


def test_a_model_without_its_origin_is_not_saved(tmp_path, predictor, rows):
    draft = Manifest("1h", 200, "trade", {regime_file("BTCUSD"): EVIDENCE, PREDICTOR_FILE: {"seeds": [0]}})
    with pytest.raises(InputError, match="trade_predictor.pkl, versions, data, features, metrics missing"):
        save_models(tmp_path / "models", {"BTCUSD": regime_model("BTCUSD")}, predictor, draft, {"BTCUSD": walk("BTCUSD")}, rows)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("change", [{"slope": float("nan")}, {"booster": b"{}"}, {"features": PREDICTOR_FEATURES[::-1]}, {"meta": {"x": np.arange(3)}}, {"threshold": 7.0}])
def test_a_set_that_could_not_be_loaded_is_not_written(tmp_path, predictor, rows, change):
    save(tmp_path, predictor, rows)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError):
        save(tmp_path, replace(predictor, **change), rows, "trade")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_models_and_manifest_must_speak_of_the_same_candles(tmp_path, predictor, rows):
    draft = Manifest("5m", 200, "trade", {regime_file("BTCUSD"): EVIDENCE, PREDICTOR_FILE: EVIDENCE})
    with pytest.raises(InputError, match=r"hmm_model_BTCUSD.pkl: expected 5m candles .*, got 3600 s"):
        save_models(tmp_path, {"BTCUSD": regime_model("BTCUSD")}, predictor, draft, {"BTCUSD": walk("BTCUSD")}, rows)


def test_a_model_for_another_step():
    manifest = Manifest("1h", 200, "trade", {})
    require_resolution(manifest, "1h")
    with pytest.raises(InputError, match="models for another step: they were trained on 1h candles, got 5m"):
        require_resolution(manifest, "5m")


def test_missing_files_are_named_with_what_is_there(tmp_path, predictor, rows):
    with pytest.raises(InputError, match="manifest.json: expected it in .*, which holds nothing"):
        load_models(tmp_path / "nowhere")
    save(tmp_path, predictor, rows)
    (tmp_path / PREDICTOR_FILE).unlink()
    with pytest.raises(InputError, match="trade_predictor.pkl: expected it in .*, which holds hmm_model_BTCUSD.pkl, hmm_model_ETHUSD.pkl, manifest.json"):
        load_models(tmp_path)


def test_links_are_refused(tmp_path, predictor, rows):
    for name in (PREDICTOR_FILE, MANIFEST_FILE):
        folder = tmp_path / name.split(".")[0]
        save(folder, predictor, rows)
        os.rename(folder / name, tmp_path / name)
        os.symlink(tmp_path / name, folder / name)
        with pytest.raises(InputError, match="links are refused"):
            load_models(folder)


def test_data_is_described_by_its_values():
    longer = walk("BTCUSD", 300)
    candles = longer[:260]
    assert describe_candles(candles) == describe_candles(copy.deepcopy(candles)) != describe_candles(longer)
    assert describe_candles(candles)["end"] == 260 * 3600 and describe_candles(candles[:0])["bars"] == 0
    other = replace(candles, volume=candles.volume + np.eye(1, 260, 7)[0] * 1e-9)
    assert describe_candles(other)["sha256"] != describe_candles(candles)["sha256"] != describe_candles(replace(candles, symbol="ETHUSD"))["sha256"]
    assert library_versions("numpy") == {"python": f"{sys.version_info[0]}.{sys.version_info[1]}", "numpy": np.__version__}


# Tampering

def test_any_changed_byte_is_refused(contents):
    rng = random.Random(0)
    for _ in range(300):
        name = rng.choice([regime_file("BTCUSD"), regime_file("ETHUSD"), PREDICTOR_FILE])
        raw = bytearray(contents[name])
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        refuse({**contents, name: bytes(raw)}, f"^{name}: expected sha256 [0-9a-f]{{64}}, found [0-9a-f]{{64}}; ")


def test_cut_short_and_grown_files_are_refused_even_with_a_fitting_hash(contents):
    for name in (regime_file("ETHUSD"), PREDICTOR_FILE):
        raw = contents[name]
        for length in [*range(0, 60), *range(60, len(raw), len(raw) // 60)]:
            refuse(forged(contents, name, raw[:length]), f"^{name}: ")
        refuse(forged(contents, name, raw + b"."), f"^{name}: ")
        refuse(forged(contents, name, raw + raw), f"^{name}: ")


def test_random_changes_with_a_fitting_hash_load_plain_data_or_nothing(contents):
    rng, refused = random.Random(1), 0
    for _ in range(400):
        name = rng.choice([regime_file("BTCUSD"), PREDICTOR_FILE])
        raw = bytearray(contents[name])
        for _ in range(rng.choice([1, 1, 5])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        try:
            open_models(forged(contents, name, bytes(raw)).__getitem__)
        except InputError:
            refused += 1
    assert refused > 200


def places(data, path=()):
    "Every place in plain data that holds a number."
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield (*path, key)
        yield from places(value, (*path, key))


def with_value(data, path, value):
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


def test_no_parameter_may_be_nan_infinite_or_another_type(contents):
    tried = 0
    for name in (regime_file("BTCUSD"), PREDICTOR_FILE):
        data = fields_of(contents, name)
        model = {key: value for key, value in data.items() if key not in ("golden", "meta", "mean_win", "mean_loss")}
        for path in places(model):
            for value in (float("nan"), float("inf"), -float("inf"), "one", None, [], {}, b"x"):
                if (path, value) == (("threshold",), None):
                    continue
                refuse(forged(contents, name, plain_bytes(with_value(data, path, value), name)), f"^{name}: ")
                tried += 1
    assert tried > 400


@pytest.mark.parametrize("name", [regime_file("BTCUSD"), PREDICTOR_FILE])
def test_missing_unknown_and_swapped_fields(contents, name):
    data = fields_of(contents, name)
    for key in data:
        refuse(forged(contents, name, plain_bytes({k: v for k, v in data.items() if k != key}, name)), f"^{name}: ")
        for value in (None, [], {}, "", 0, b""):
            if key not in ("meta", "abstain_reason"):
                refuse(forged(contents, name, plain_bytes({**data, key: value}, name)), f"^{name}: ")
    refuse(forged(contents, name, plain_bytes({**data, "extra": 1}, name)), f"^{name}: ")
    refuse(forged(contents, name, plain_bytes({**data, "kind": "rule"}, name)), f"^{name}: ")


def test_a_file_under_another_name(contents):
    btc, eth = contents[regime_file("BTCUSD")], contents[regime_file("ETHUSD")]
    refuse(forged(forged(contents, regime_file("BTCUSD"), eth), regime_file("ETHUSD"), btc), "hmm_model_BTCUSD.pkl: .* another model's file")
    refuse(forged(contents, PREDICTOR_FILE, btc), f"^{PREDICTOR_FILE}: ")
    refuse(forged(contents, regime_file("BTCUSD"), contents[PREDICTOR_FILE]), "^hmm_model_BTCUSD.pkl: ")


def test_a_model_that_answers_otherwise_than_recorded(contents):
    for name, path, by in ((regime_file("BTCUSD"), ("means", 3, 0), 1e-3), (regime_file("BTCUSD"), ("centre", 0), 1e-6), (PREDICTOR_FILE, ("slope",), 1e-6),
                           (PREDICTOR_FILE, ("golden", "answers", 3), 1e-8), (regime_file("ETHUSD"), ("golden", "answers", 0), -1e-8)):
        data = fields_of(contents, name)
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        refuse(forged(contents, name, plain_bytes(with_value(data, path, inner[path[-1]] + by), name)), f"^{name}: expected its recorded answers")
        assert open_models(forged(contents, name, plain_bytes(data, name)).__getitem__)


def test_golden_answers_cannot_be_emptied(contents):
    for name in (regime_file("BTCUSD"), PREDICTOR_FILE):
        data = fields_of(contents, name)
        for golden in ({**data["golden"], "answers": []}, {"question": {"rows": []}, "answers": []}, {**data["golden"], "answers": data["golden"]["answers"][:-1]},
                       {**data["golden"], "answers": [float("nan")] * len(data["golden"]["answers"])}):
            refuse(forged(contents, name, plain_bytes({**data, "golden": golden}, name)), f"^{name}: ")


def test_hostile_trees_end_quickly(contents):
    data = fields_of(contents, PREDICTOR_FILE)
    booster = json.loads(data["booster"])
    tree = booster["learner"]["gradient_booster"]["model"]["trees"][0]
    start = time.process_time()
    for key, value in (("left_children", 0), ("right_children", 0), ("left_children", 10**9), ("left_children", -5), ("split_indices", 10**6), ("split_indices", -1),
                       ("split_conditions", "NaN"), ("default_left", []), ("left_children", None)):
        kept = list(tree[key])
        tree[key][0] = value
        if value == 0:
            tree["left_children"] = [0] * len(kept)
            tree["right_children"] = [0] * len(kept)
        refuse(forged(contents, PREDICTOR_FILE, plain_bytes({**data, "booster": json.dumps(booster).encode()}, "x")), f"^{PREDICTOR_FILE}: ")
        booster = json.loads(data["booster"])
        tree = booster["learner"]["gradient_booster"]["model"]["trees"][0]
    assert time.process_time() - start < 5


GOOD = {"schema": 1, "resolution": "1h", "window": 200, "verdict": "trade", "files": {PREDICTOR_FILE: {"sha256": "0" * 64, "kind": "predictor"}}}


@pytest.mark.parametrize("change", [
    {"schema": 2}, {"schema": "1"}, {"resolution": "1 hour"}, {"resolution": []}, {"resolution": None}, {"window": "200"}, {"window": -1}, {"window": 200.0}, {"window": True},
    {"verdict": None}, {"verdict": ["trade"]}, {"files": []}, {"files": None}, {"files": {"../x.pkl": GOOD["files"][PREDICTOR_FILE]}}, {"files": {"/etc/passwd": {"sha256": "0" * 64, "kind": ""}}},
    {"files": {PREDICTOR_FILE: {"sha256": "0" * 63, "kind": "predictor"}}}, {"files": {PREDICTOR_FILE: {"sha256": "0" * 64}}}, {"files": {PREDICTOR_FILE: "x"}},
    {"files": {PREDICTOR_FILE: {"sha256": None, "kind": "predictor"}}}, {"files": {"hmm_model_.pkl": GOOD["files"][PREDICTOR_FILE]}}, {"files": {PREDICTOR_FILE + "\n": GOOD["files"][PREDICTOR_FILE]}},
    {"extra": 1},
])
def test_a_manifest_is_read_strictly(change):
    assert parse_manifest(json.dumps(GOOD).encode()) == Manifest("1h", 200, "trade", GOOD["files"])
    with pytest.raises(InputError, match=r"^manifest\.json: expected a manifest of schema 1"):
        parse_manifest(json.dumps({**GOOD, **change}).encode())


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"{}", b"{", b"\xff\xfe", b'{"schema": NaN}', b"[" * 100_000, b'{"schema": 1, "schema": 1}', b"1" * 10_000, json.dumps(GOOD).encode()[:-1],
                                 json.dumps(GOOD).encode().replace(b"200", b"1e999")])
def test_a_manifest_that_is_none(raw):
    with pytest.raises(InputError, match=r"^manifest\.json: "):
        parse_manifest(raw)


def test_a_manifest_without_a_predictor(contents):
    manifest = parse_manifest(contents[MANIFEST_FILE])
    files = {name: entry for name, entry in manifest.files.items() if name != PREDICTOR_FILE}
    refuse({**contents, MANIFEST_FILE: manifest_bytes(replace(manifest, files=files))}, "expected trade_predictor.pkl")


# Replaced as a whole

class Killed(BaseException):
    "The process ends here."


def interrupted_at(step, monkeypatch, act):
    "Run `act`, ending it at its n-th effect on the disk; False when it had fewer."
    count = 0

    def ending(effect):
        def wrapped(*arguments, **named):
            nonlocal count
            count += 1
            if count == step:
                raise Killed
            return effect(*arguments, **named)
        return wrapped

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "fsync"):
            patch.setattr(os, name, ending(getattr(os, name)))
        for name in ("mkdir", "unlink", "rmdir"):
            patch.setattr(Path, name, ending(getattr(Path, name)))
        try:
            act()
        except Killed:
            return True
    return False


def test_killed_at_any_step_the_old_set_or_the_new_one_is_there(tmp_path, monkeypatch, predictor, rows):
    seen, step = [], 1
    while True:
        folder = tmp_path / str(step)
        save(folder, predictor, rows, "old", symbols=("BTCUSD",))
        if not interrupted_at(step, monkeypatch, lambda folder=folder: save(folder, predictor, rows, "new", nudge=0.1)):
            break
        seen.append(load_models(folder).manifest.verdict)
        assert seen[-1] in ("old", "new")
        interrupted_at(step % 7 + 1, monkeypatch, lambda folder=folder: finish_commit(folder))
        assert load_models(folder).manifest.verdict == seen[-1]
        save(folder, predictor, rows, "third", symbols=("ETHUSD",))
        assert load_models(folder).manifest.verdict == "third"
        assert sorted(path.name for path in folder.iterdir()) == ["hmm_model_ETHUSD.pkl", "manifest.json", "trade_predictor.pkl"]
        step += 1
    assert step > 15 and seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen)


def test_a_first_save_that_was_killed_leaves_nothing_that_loads_or_everything(tmp_path, monkeypatch, predictor, rows):
    for step in range(1, 40):
        folder = tmp_path / str(step)
        if not interrupted_at(step, monkeypatch, lambda folder=folder: save(folder, predictor, rows, "new")):
            break
        try:
            assert load_models(folder).manifest.verdict == "new"
        except InputError as error:
            assert "expected it in" in str(error)
    assert step < 39


def test_a_mixed_set_is_refused(tmp_path, predictor, rows):
    save(tmp_path / "old", predictor, rows)
    save(tmp_path / "new", predictor, rows, nudge=0.1)
    (tmp_path / "old" / regime_file("BTCUSD")).write_bytes((tmp_path / "new" / regime_file("BTCUSD")).read_bytes())
    with pytest.raises(InputError, match="hmm_model_BTCUSD.pkl: expected sha256"):
        load_models(tmp_path / "old")


@pytest.mark.parametrize("kills", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_really_killed_while_saving(tmp_path, predictor, rows, kills):
    start = time.monotonic()
    save(tmp_path, predictor, rows, "0")
    once, rng, verdicts = time.monotonic() - start, random.Random(5), set()
    for kill in range(kills):
        child = os.fork()
        if child == 0:
            try:
                for turn in range(1, 10_000):
                    save(tmp_path, predictor, rows, f"{kill}.{turn}", nudge=turn / 1000, symbols=SYMBOLS[:1 + turn % 2])
            finally:
                os._exit(1)
        if kill % 2:  # every other time a whole set has been replaced before, however busy the machine is
            before, deadline = (tmp_path / MANIFEST_FILE).read_bytes(), time.monotonic() + 60
            while (tmp_path / MANIFEST_FILE).read_bytes() == before and time.monotonic() < deadline:
                time.sleep(once / 4)
        time.sleep(rng.uniform(0.2, 2.5) * once)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        verdicts.add(load_models(tmp_path).manifest.verdict)
    assert len(verdicts) > kills // 4
    save(tmp_path, predictor, rows, "end")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hmm_model_BTCUSD.pkl", "hmm_model_ETHUSD.pkl", "manifest.json", "trade_predictor.pkl"]


def test_a_set_that_was_committed_but_not_moved_is_the_one_that_counts(tmp_path, monkeypatch, predictor, rows):
    save(tmp_path, predictor, rows, "old")
    with monkeypatch.context() as patch:
        patch.setattr(registry, "finish_commit", lambda folder: None)
        save(tmp_path, predictor, rows, "new")
    assert (tmp_path / NEXT).is_dir() and load_models(tmp_path).manifest.verdict == "new"


# Approval

APPROVED = {"set": "0" * 12, "card": "0" * 64, "rules": "1", "replaces": None, "data_end": 1}


def approve(manifest: Manifest) -> Manifest:
    return replace(manifest, approval={**APPROVED, "set": manifest.version})


def test_an_approval_stands_in_the_manifest_and_leaves_the_version_alone(contents):
    manifest = parse_manifest(contents[MANIFEST_FILE])
    assert manifest.approval is None and b"approval" not in contents[MANIFEST_FILE] and manifest_bytes(manifest) == contents[MANIFEST_FILE]
    approved = approve(manifest)
    assert approved.version == manifest.version and parse_manifest(manifest_bytes(approved)) == approved
    assert open_models({**contents, MANIFEST_FILE: manifest_bytes(approved)}.__getitem__).manifest.approval == approved.approval


@pytest.mark.parametrize("wrong", ["yes", {}, [*APPROVED], [1], 1, {"card": "0" * 64}, {**APPROVED, "by": "me"}, {**APPROVED, "card": "0" * 63}, {**APPROVED, "card": None}, {**APPROVED, "set": None}, {**APPROVED, "replaces": "old"},
                                   {**APPROVED, "rules": ""}, {**APPROVED, "data_end": "1"}, {**APPROVED, "data_end": True}])
def test_an_approval_of_another_form_is_refused(contents, wrong):
    manifest = json.loads(contents[MANIFEST_FILE]) | {"approval": wrong}
    with pytest.raises(InputError, match="manifest.json"):
        parse_manifest(json.dumps(manifest).encode())


def test_an_approval_holds_for_its_set_alone(contents):
    """Nobody gets a set approved by a line of another's, or changes what was approved."""
    manifest = parse_manifest(contents[MANIFEST_FILE])
    approved, entry = approve(manifest), manifest.files[PREDICTOR_FILE]
    others = [replace(approved, verdict="trade"), replace(approved, files={**manifest.files, PREDICTOR_FILE: {**entry, "sha256": "1" * 64}}),
              replace(approved, files={**manifest.files, PREDICTOR_FILE: {**entry, "metrics": {"auc": 0.99}}}), replace(manifest, approval=APPROVED)]
    for other in others:
        with pytest.raises(InputError, match=f"its approval is of {other.approval['set']}, this set is {other.version}: it was changed"):
            parse_manifest(manifest_bytes(other))
        assert parse_manifest(manifest_bytes(replace(other, approval=None)))


def test_a_manifest_is_as_deep_as_data_may_be(contents):
    deep: dict = {}
    for _ in range(200):
        deep = {"a": deep}
    manifest = json.loads(contents[MANIFEST_FILE])
    for field in (deep, "\ud800"):
        manifest["files"][PREDICTOR_FILE]["metrics"] = field
        with pytest.raises(InputError, match=r"^manifest\.json"):
            parse_manifest(json.dumps(manifest).encode())
