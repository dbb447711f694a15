"""A thousand model files that somebody hostile, or a bad disk, may leave where a service looks: each made from its number alone."""
from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from delta_go.domain import InputError
from delta_go.learning import predictor as predictor_room
from delta_go.learning.regimes import model_from_dict
from delta_go.learning.registry import MANIFEST_FILE, PREDICTOR_FILE, predictor_answers, regime_answers, regime_file
from delta_go.model_file import MAX_BYTES, digest, parse_plain, plain_bytes
from tests.test_model_file import FORMS, text

MODELS = Path(__file__).parents[1] / "models"
REGIMES = [regime_file(symbol) for symbol in ("BTCUSD", "ETHUSD", "SOLUSD")]
FILES = [*REGIMES, PREDICTOR_FILE]
COUNT = 1_000
DETECTOR, PREDICTOR = "hmm-detector", "trade-predictor"
NUMBERS = (math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Hostile:
    """One spoilt folder."""
    family: str
    what: str
    service: str                    # of the two, the one that reads the spoilt file
    put: Callable[[Path], object]   # spoils a good folder
    must: bool = True               # be refused; what is mutated at random may load


@cache
def good() -> dict[str, bytes]:
    """The committed files."""
    return {name: (MODELS / name).read_bytes() for name in (*FILES, MANIFEST_FILE)}


@cache
def plain(name: str) -> dict[str, Any]:
    """What a committed file holds; not to be changed."""
    return parse_plain(good()[name], digest(good()[name]), name)


def restore(folder: Path) -> None:
    """Make a folder good again, whatever lies there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, raw in good().items():
        (folder / name).write_bytes(raw)


def service_of(name: str) -> str:
    """Who reads a file."""
    return PREDICTOR if name == PREDICTOR_FILE else DETECTOR


def swap(name: str, raw: bytes, rehashed: bool = True) -> Callable[[Path], None]:
    """Put other bytes in a file's place; rehashed: whoever did it wrote the manifest as well."""
    def put(folder: Path) -> None:
        (folder / name).write_bytes(raw)
        if rehashed:
            manifest = json.loads(good()[MANIFEST_FILE])
            manifest["files"][name]["sha256"] = digest(raw)
            (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    return put


def told(raw: bytes) -> Callable[[Path], None]:
    """Put another manifest in place."""
    def put(folder: Path) -> None:
        (folder / MANIFEST_FILE).write_bytes(raw)
    return put


# Gadgets --------------------------------------------------------------------------------------------------------------------

def call(function: bytes, *given: Any) -> bytes:
    """Instructions that call what others have put on the stack; given: plain values, or instructions as a bytearray."""
    return function + b"(" + b"".join(bytes(each) if isinstance(each, bytearray) else pickle.dumps(each, 2)[2:-1] for each in given) + b"tR"


def name_of(dotted: str) -> bytes:
    """Instructions that look something up."""
    return text(dotted.partition(" ")[0]) + text(dotted.partition(" ")[2]) + b"\x93"


def gadgets(place: Path) -> dict[str, bytes]:
    """Known ways to do something from within a pickle, as instructions; each would make a file in a folder, when run."""
    file, script, nested = f"{place}/owned", f"{place}.script/__main__.py", f"{place}.script/nested.pkl"
    touch, code, words = f"touch {file}", f"open({file!r}, 'w').close()", ["touch", file]
    inner = b"\x80\x04" + call(name_of("os system"), touch) + b"."
    Path(script).parent.mkdir(exist_ok=True)
    Path(script).write_text(code)
    Path(nested).write_bytes(inner)
    simple: dict[str, tuple[Any, ...]] = {
        "os system": (touch,), "posix system": (touch,), "os popen": (touch,), "os mkdir": (file,), "os mknod": (file,), "os open": (file, os.O_CREAT), "os spawnv": (os.P_WAIT, "/usr/bin/touch", words),
        "os posix_spawn": ("/usr/bin/touch", words, {}), "os spawnlp": (os.P_WAIT, "touch", *words), "os symlink": ("/", file), "pty spawn": (words,), "subprocess Popen": (words,),
        "subprocess call": (words,), "subprocess check_output": (words,), "subprocess run": (words,), "subprocess getoutput": (touch,), "builtins eval": (code,), "builtins exec": (code,), "builtins open": (file, "w"),
        "io open": (file, "w"), "_io FileIO": (file, "w"), "codecs open": (file, "w"), "gzip open": (file, "wb"), "bz2 BZ2File": (file, "w"), "lzma LZMAFile": (file, "w"), "zipfile ZipFile": (file, "w"),
        "tarfile open": (file, "w"), "shutil copyfile": (script, file), "shutil copytree": (f"{place}.script", file), "urllib.request urlretrieve": (f"file://{script}", file), "logging FileHandler": (file,),
        "runpy run_path": (f"{place}.script",), "timeit main": (["-n", "1", "-r", "1", code],), "cProfile run": (code,), "profile run": (code,), "trace main": (), "pickle loads": (inner,), "_pickle loads": (inner,),
        "pandas read_pickle": (nested,), "joblib load": (nested,), "numpy load": (nested, None, True), "sqlite3 connect": (file,), "xgboost.compat import_cupy": (), "numpy.f2py main": (), "dbm.dumb open": (file, "n"),
    }
    unlikely = ("trace main", "xgboost.compat import_cupy", "numpy.f2py main")
    found = {name: call(name_of(name), *given) for name, given in simple.items() if name not in unlikely}
    module = bytearray(call(name_of("importlib import_module"), "os"))
    found |= {
        "getattr": call(call(name_of("builtins getattr"), module, "system"), touch),
        "operator attrgetter": call(call(call(name_of("operator attrgetter"), "system"), module), touch),
        "operator methodcaller": call(call(name_of("operator methodcaller"), "system", touch), module),
        "functools partial": call(call(name_of("functools partial"), bytearray(name_of("os system")), touch)),
        "map in a list": call(name_of("builtins list"), bytearray(call(name_of("builtins map"), bytearray(name_of("os system")), [touch]))),
        "pathlib": call(name_of("pathlib Path.touch"), bytearray(call(name_of("pathlib PosixPath"), file))),
        "code of its own": call(call(name_of("types FunctionType"), bytearray(call(name_of("builtins compile"), code, "x", "exec")), {})),
        "ctypes": call(call(name_of("builtins getattr"), bytearray(call(name_of("ctypes CDLL"), None)), "system"), touch.encode()),
    }
    return found | {f"{form} of os.system": make("os", "system", touch) for form, make in FORMS.items()}


def placements(name: str, gadget: bytes) -> Iterator[tuple[str, bytes]]:
    """Whole files with a gadget in them."""
    raw, mark = good()[name], "a mark that stands nowhere else"
    marked = plain_bytes({**plain(name), "meta": mark}, name)
    bare = bytes(marked[:2]) + marked[11:]    # without the frame, whose length would be another
    yield "alone", b"\x80\x04" + gadget + b"."
    yield "behind the end", raw + gadget + b"."
    yield "in the booster" if name == PREDICTOR_FILE else "in the symbol", bare.replace(text("booster" if name == PREDICTOR_FILE else "symbol"), gadget, 1)
    yield "in place of a value", bare.replace(text(mark), gadget)
    yield "before the data", b"\x80\x04" + gadget + b"0" + raw[11:]
    yield "of protocol 0", gadget + b"."


def with_gadgets(place: Path, rng: random.Random) -> Iterator[Hostile]:
    for number, (title, gadget) in enumerate(gadgets(place).items()):
        name = rng.choice(FILES)
        whole = dict(placements(name, gadget))
        for where in ("in place of a value", sorted(whole.keys() - {"in place of a value"})[number % 5]):
            yield Hostile("gadget", f"{title} {where} of {name}", service_of(name), swap(name, whole[where]))
        if number % 3 == 0:
            yield Hostile("gadget", f"{title} in {name}, whose manifest nobody changed", service_of(name), swap(name, whole["alone"], False))


# Damage ---------------------------------------------------------------------------------------------------------------------

def mutated(raw: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, lost, doubled or moved."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at, length = rng.randrange(len(data)), rng.choice((1, 1, 4, 64))
        match rng.randrange(5):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2:
                del data[at:at + length]
            case 3:
                data[at:at] = data[at:at + length]
            case _:
                data[at:at] = rng.randbytes(length)
    return bytes(data)


def damaged(rng: random.Random) -> Iterator[Hostile]:
    for name in FILES:
        raw = good()[name]
        for number in range(25):
            other = mutated(raw, rng)
            yield Hostile("mutated, hash as it was", f"{name} {number}", service_of(name), swap(name, other, False), other != raw)
        for number, length in enumerate((0, 1, 2, 10, 11, 12, len(raw) // 2, len(raw) - 2, len(raw) - 1, rng.randrange(len(raw)))):
            yield Hostile("truncated", f"{name} to {length}", service_of(name), swap(name, raw[:length], number % 4 > 0))
        for title, other in (("doubled", raw * 2), ("with a tail", raw + b"."), ("of zeros", bytes(len(raw))), ("of text", b"kind: hmm\n"), ("compressed", b"\x1f\x8b\x08\x00" + raw), ("of protocol 5", b"\x80\x05" + raw[2:])):
            yield Hostile("other bytes", f"{name} {title}", service_of(name), swap(name, other))


def remade(name: str, data: dict[str, Any]) -> Callable[[Path], None]:
    """Put other plain data in a file's place, with the manifest's hash made to fit."""
    return swap(name, plain_bytes(data, name))


def mutated_behind_the_hash(rng: random.Random, count: int) -> Iterator[Hostile]:
    for number in range(count):
        name = FILES[number % 4] if number % 3 else PREDICTOR_FILE
        yield Hostile("mutated, hash made to fit", f"{name} {number}", service_of(name), swap(name, mutated(good()[name], rng)), False)


# What a file means ----------------------------------------------------------------------------------------------------------

def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of plain data."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(data: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The same data with another value in one place."""
    data = copy.deepcopy(data)
    inner: Any = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


def answered(data: dict[str, Any]) -> dict[str, Any]:
    """A model's data with the answers it gives, where it gives any: whoever wrote it knows of golden answers."""
    read, ask = (predictor_room.from_dict, predictor_answers) if "booster" in data else (model_from_dict, regime_answers)
    question = data["golden"]["question"]
    try:
        with np.errstate(all="ignore"):
            return {**data, "golden": {"question": question, "answers": ask(read({key: value for key, value in data.items() if key != "golden"}), question)}}
    except InputError:
        return data


def parameters(rng: random.Random) -> Iterator[Hostile]:
    """Numbers that are none, in every field; rows that are no probabilities; covariances that are none."""
    fields = {"centre": (0,), "scale": (1,), "means": (3, 0), "precision": (2, 1, 1), "transition": (4, 4), "stationary": (2,), "cuts": (0,)}
    for name, path in fields.items():
        for value in (*NUMBERS, 1e308, "1", None, [], True):
            file = rng.choice(REGIMES)
            yield Hostile("parameters", f"{file} {name} {value}", DETECTOR, remade(file, changed(plain(file), (name, *path), value)), value not in (1e308, "1", True))
    for title, path, value in (("a row that sums to 2", ("transition", 1), [1.0, 0.25, 0.25, 0.25, 0.25]), ("a negative probability", ("transition", 0), [1.5, -0.5, 0.0, 0.0, 0.0]), ("a row of zeros", ("transition", 2), [0.0] * 5),
                               ("a short row", ("transition", 3), [0.5, 0.5]), ("no rows", ("transition",), []), ("shares that sum to 0.9", ("stationary",), [0.18] * 5), ("a covariance that is not positive", ("precision", 0, 0, 0), -1.0),
                               ("a flat covariance", ("precision", 0, 1, 1), 0.0), ("a covariance of one row", ("precision", 4), [[1.0, 0.0]]), ("a scale of zero", ("scale", 0), 0.0), ("a negative scale", ("scale", 1), -0.5),
                               ("six regimes", ("means",), [[0.0, 0.0]] * 6), ("means of three inputs", ("means",), [[0.0] * 3] * 5), ("a step of zero", ("step",), 0), ("another step", ("step",), 60), ("half a step", ("step",), 1800.5),
                               ("a window of a million", ("window",), 10**6), ("no window", ("window",), 0), ("another filter", ("filter_length",), 64), ("other inputs", ("inputs",), ["trend_48", "log_range_48"]),
                               ("another kind", ("kind",), "predictor"), ("a kind nobody knows", ("kind",), "tree"), ("another symbol", ("symbol",), "DOGEUSD"), ("a symbol that is a path", ("symbol",), "../BTCUSD"), ("a symbol that is a list", ("symbol",), ["BTCUSD"])):
        file = rng.choice(REGIMES)
        yield Hostile("parameters", f"{file} {title}", DETECTOR, remade(file, changed(plain(file), path, value)))
    for title, path, value in (("a chain that never changes", ("transition",), [[float(row == column) for column in range(5)] for row in range(5)]), ("a chain that goes round", ("transition",), [[float(column == (row + 1) % 5) for column in range(5)] for row in range(5)]),
                               ("a scale as small as it gets", ("scale",), [5e-324, 5e-324]), ("means beyond the world", ("means",), [[1e300, -1e300]] * 5)):
        yield Hostile("parameters", f"{REGIMES[0]} {title}", DETECTOR, remade(REGIMES[0], answered(changed(plain(REGIMES[0]), path, value))))
    for name, values in (("slope", (*NUMBERS, 1, "1", None)), ("intercept", (*NUMBERS, [])), ("threshold", (*NUMBERS, -0.1, 1.1, "0.5", True)), ("mean_win", ("0.1", None)), ("schema", (0, 2, "1", None)), ("kind", ("hmm", 1)),
                         ("features", ([], "rsi", None)), ("booster", (b"", "text", None, 7)), ("abstain_reason", (None, ""))):
        for value in values:
            yield Hostile("parameters", f"{PREDICTOR_FILE} {name} {value!r}", PREDICTOR, remade(PREDICTOR_FILE, {**plain(PREDICTOR_FILE), name: value}))
    for file in FILES:
        lost = rng.choice([*plain(file)])
        for title, other in (("without a field", {key: value for key, value in plain(file).items() if key != lost}), ("with a field more", {**plain(file), "extra": 1}), ("without golden answers", {key: value for key, value in plain(file).items() if key != "golden"}),
                             ("with empty golden answers", {**plain(file), "golden": {"question": plain(file)["golden"]["question"], "answers": []}}), ("with other golden answers", changed(plain(file), ("golden", "answers", 1), 0.123))):
            yield Hostile("fields", f"{file} {title}", service_of(file), remade(file, other))
    for file, other in ((REGIMES[0], REGIMES[1]), (REGIMES[2], PREDICTOR_FILE), (PREDICTOR_FILE, REGIMES[0])):
        yield Hostile("fields", f"{file} with the content of {other}", service_of(file), swap(file, good()[other]))


ODD = (None, True, -1, 0, 2**63, 10**300, 1e308, -1e-300, math.nan, math.inf, "", "x" * 9, "é", b"", b"\xff", [], {}, [[]], {"a": {}}, [None] * 3, [0.0] * 1000)


def odd_values(rng: random.Random, count: int) -> Iterator[Hostile]:
    """Any place of the data, with something there that nobody expects."""
    spots = {file: [*places(plain(file))] for file in FILES}
    for name, path, value in rng.sample([(file, path, value) for file in FILES for path in rng.sample(spots[file], 60) for value in ODD], count):
        yield Hostile("odd values", f"{name} {'/'.join(map(str, path))} {value!r:.9}", service_of(name), remade(name, changed(plain(name), path, value)), False)


# Trees ----------------------------------------------------------------------------------------------------------------------

def chain(depth: int) -> dict[str, list[Any]]:
    """A tree that goes down on one side only."""
    nodes = 2 * depth + 1
    left = [node + 1 if node % 2 == 0 and node < nodes - 1 else -1 for node in range(nodes)]
    right = [node + 2 if node % 2 == 0 and node < nodes - 1 else -1 for node in range(nodes)]
    return {"left_children": left, "right_children": right, "split_indices": [0] * nodes, "split_conditions": [0.001] * nodes, "default_left": [0] * nodes, "sum_hessian": [1.0 / (1 + node) for node in range(nodes)]}


def full(model: dict[str, Any]) -> list[dict[str, Any]]:
    """Its trees of seven splits and eight leaves."""
    return [tree for tree in model["trees"] if len(tree["left_children"]) == 15]


def tree_changes() -> Iterator[tuple[str, Callable[[dict[str, Any]], object], bool]]:
    """What may be done to the model inside a booster: a title, the deed, and whether it must be refused."""
    def first(**fields: Any) -> Callable[[dict[str, Any]], object]:
        return lambda model: model["trees"][0].update(fields)

    def at(key: str, node: int, value: Any, tree: int = 0) -> Callable[[dict[str, Any]], object]:
        return lambda model: full(model)[tree % len(full(model))][key].__setitem__(node, value)
    for node, value in ((0, 0), (1, 0), (3, 0), (1, 1), (2, 1)):
        yield f"a cycle from {node} to {value}", at("left_children", node, value), True
        yield f"a cycle on the right from {node} to {value}", at("right_children", node, value), True
    for key in ("left_children", "right_children"):
        for value in (15, 16, 10**6, 2**31, 2**63, -2, -10**9, 1.5, "1", None, True, [], [1]):
            yield f"{key} of 0 is {value}", at(key, 0, value), value not in ("1", True)
        for value in (1, 15, 10**9):
            yield f"{key} of a leaf is {value}", at(key, 9, value), True
            yield f"{key} of a leaf in a later tree is {value}", at(key, 12, value, 30), True
        yield f"{key} is shorter", lambda model, key=key: model["trees"][3][key].pop(), True
        yield f"{key} is empty", first(**{key: []}), True
        yield f"{key} are all 0", first(**{key: [0] * 15}), True
    for key in ("split_indices", "split_conditions", "default_left", "sum_hessian"):
        yield f"{key} is shorter", lambda model, key=key: model["trees"][39][key].pop(), True
        yield f"{key} is longer", lambda model, key=key: model["trees"][2][key].append(0), True
        yield f"{key} is moved to the next tree", lambda model, key=key: model["trees"][5][key].append(model["trees"][4][key].pop()), True
        yield f"{key} is gone", lambda model, key=key: model["trees"][1].pop(key), True
    for value in (25, 26, 49, 50, 10**6, -1, -26):
        for node, tree in ((0, 0), (6, 17), (10, 39)):
            yield f"split_indices of {node} in tree {tree} is {value}", at("split_indices", node, value, tree), True
    for node, tree in ((0, 0), (8, 21), (14, 39)):
        for value in (*NUMBERS, 1e39, None):
            yield f"split_conditions of {node} in tree {tree} is {value}", at("split_conditions", node, value, tree), True
        for value in (*NUMBERS, -1.0, 1e300):
            yield f"sum_hessian of {node} in tree {tree} is {value}", at("sum_hessian", node, value, tree), not (value == 1e300 and node == 0)
    yield "sum_hessian of a root is 0", at("sum_hessian", 0, 0.0, 7), True
    yield "leaves as large as they get", lambda model: [tree["split_conditions"].__setitem__(slice(7, 15), [3e38, -3e38] * 4) for tree in full(model)], True
    for depth in (9, 100, 900, 5_000, 40_000):
        yield f"a tree of {depth} levels", lambda model, depth=depth: model["trees"][0].update(chain(depth)), True
    yield "a forest", lambda model: model.update(trees=model["trees"] * 60), True
    yield "no trees", lambda model: model.update(trees=[]), False
    yield "trees that are none", lambda model: model.update(trees=[None, {}]), True
    yield "one tree without nodes", first(left_children=[], right_children=[], split_indices=[], split_conditions=[], default_left=[], sum_hessian=[]), True


def boosters() -> Iterator[tuple[str, bytes, bool]]:
    """Boosters that are none: a title, the bytes, and whether they must be refused."""
    raw = plain(PREDICTOR_FILE)["booster"]
    for title, change, must in tree_changes():
        data = json.loads(raw)
        change(data["learner"]["gradient_booster"]["model"])
        yield title, json.dumps(data).encode(), must
    for key, values in {"base_score": ("NaN", "[NaN]", "[1e999]", "[]", "", None, "[[1]]", "[" * 5_000), "num_feature": ("0", "-25", "24", "26", "1e9", "", None, "9" * 5_000)}.items():
        for value in values:
            data = json.loads(raw)
            data["learner"]["learner_model_param"][key] = value
            yield f"{key} {value!r:.20}", json.dumps(data).encode(), True
    for title, other in (("deeper than any parser", b"[" * 200_000), ("deep in a tree", raw.replace(b'"trees":[', b'"trees":[' + b"[" * 50_000, 1)), ("two million dicts", b'{"learner":[' + b"{}," * 1_000_000 + b"{}]}"),
                         ("binary", b"{L\x00\x00\x00\x00\x00\x00\x00\x07learner"), ("half", raw[:len(raw) // 2]), ("a pickle", b"\x80\x04}."), ("another objective", raw.replace(b"binary:logitraw", b"binary:logistic")), ("not text", raw.replace(b"learner", b"\xff\xfearner"))):
        yield title, other, True


def with_trees() -> Iterator[Hostile]:
    for title, booster, must in boosters():
        yield Hostile("trees", title, PREDICTOR, remade(PREDICTOR_FILE, answered({**plain(PREDICTOR_FILE), "booster": booster})), must)


# Manifests ------------------------------------------------------------------------------------------------------------------

def manifests() -> Iterator[tuple[str, bytes]]:
    """Manifests that must be refused."""
    raw = good()[MANIFEST_FILE]
    whole = json.loads(raw)

    def with_(**fields: Any) -> bytes:
        return json.dumps({**whole, **fields}).encode()
    for schema in (0, 2, 1.5, "1", None, [], {}):
        yield f"schema {schema!r}", with_(schema=schema)
    for title, other in (("empty", b""), ("null", b"null"), ("half", raw[:4_000]), ("twice", raw * 2), ("not text", b"\xff" + raw), ("with a byte order mark", b"\xef\xbb\xbf" + raw), ("of another coding", raw.decode().encode("utf-16")), ("NaN", raw.replace(b"0.4", b"NaN", 1)),
                         ("a key twice", b'{"schema":1,' + raw[1:]), ("deep", b'{"files":' + b"[" * 100_000), ("deep, and well-formed", with_(notes=[]).replace(b"[]}", b"[" * 900 + b"]" * 900 + b"}")), ("a lone surrogate", with_(verdict="trade").replace(b'"trade"', b'"\\ud800"')),
                         ("a number of many digits", with_(window=1).replace(b'"window": 1', b'"window": ' + b"1" * 5_000)), ("a million dicts", b'{"files":[' + b"{}," * 1_000_000 + b"{}]}"), ("a pickle", b"\x80\x04}."), ("a script", b"#!/bin/sh\ntouch owned\n")):
        yield title, other
    nested: Any = 0
    for _ in range(450):
        nested = {"a": nested}
    files = copy.deepcopy(whole["files"])
    files[REGIMES[0]]["metrics"] = nested
    files[PREDICTOR_FILE]["metrics"] = nested
    yield "metrics as deep as the parser goes", with_(files=files)
    for name in ("../models/hmm_model_BTCUSD.pkl", "/etc/passwd", "hmm_model_BTCUSD.pkl\n", "hmm_model_.pkl", "hmm_model_btcusd.pkl", "", "manifest.json", "x" * 5_000):
        yield f"a file called {name[:40]!r}", with_(files={**whole["files"], name: whole["files"][REGIMES[0]]})
    for title, entry in (("no entry", None), ("a list", []), ("no hash", {"kind": "hmm"}), ("half a hash", {"kind": "hmm", "sha256": "0" * 32}), ("no kind", {"sha256": "0" * 64}), ("kinds", {"sha256": "0" * 64, "kind": ["hmm"]})):
        yield f"entries that are {title}", with_(files=dict.fromkeys(FILES, entry))
    for title, fields in (("no files", {"files": {}}), ("files that are none", {"files": FILES}), ("another resolution", {"resolution": "5m"}), ("no resolution", {"resolution": "1 hour"}), ("another window", {"window": 100}), ("a window below zero", {"window": -200}),
                          ("a verdict that is a list", {"verdict": ["trade"]}), ("a field more", {"extra": 1}), ("an approval of another form", {"approval": {"by": "me"}}), ("an approval of another set", {"approval": {"set": "0" * 12, "card": "0" * 64, "rules": "1", "replaces": None, "data_end": 1}})):
        yield title, with_(**fields)
    entries = {name: {**entry, "sha256": "0" * 64} for name, entry in whole["files"].items()}
    yield "other hashes", with_(files=entries)
    yield "entries without data", with_(files={name: {key: value for key, value in entry.items() if key != "data"} for name, entry in whole["files"].items()})
    yield "data that never ends", with_(files={name: {**entry, "data": {"start": 0, "end": 1e999}} for name, entry in whole["files"].items()})


def with_manifests() -> Iterator[Hostile]:
    reads = {"another resolution": DETECTOR, "another window": DETECTOR}  # the predictor knows of neither
    for number, (title, raw) in enumerate(manifests()):
        yield Hostile("manifest", title, reads.get(title, (DETECTOR, PREDICTOR)[number % 2]), told(raw))


# Things that are no files ---------------------------------------------------------------------------------------------------

def links(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def to_a_copy(path: Path) -> None:
    """A link to the very file that should be there."""
    other = path.with_suffix(".real")
    path.rename(other)
    path.symlink_to(other)


def sparse(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(MAX_BYTES + 1)


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def listening(path: Path) -> None:
    """A socket; its path may be too long for its address, so it is bound from within its folder."""
    path.unlink()
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(before)


KINDS: dict[str, Callable[[Path], object]] = {
    "absent": lambda path: path.unlink(), "a link to the file itself": to_a_copy, "a link to nowhere": lambda path: links(path, Path("nowhere")), "a link to itself": lambda path: links(path, path),
    "a link to a device": lambda path: links(path, Path("/dev/zero")), "a pipe": lambda path: (path.unlink(), os.mkfifo(path)), "a folder": lambda path: (path.unlink(), path.mkdir()), "a folder with files": lambda path: (path.unlink(), shutil.copytree(MODELS, path)),
    "a socket": listening, "larger than allowed": sparse, "a terabyte": huge, "empty": lambda path: path.write_bytes(b""),
}


def of_other_kinds() -> Iterator[Hostile]:
    for number, name in enumerate((REGIMES[2], PREDICTOR_FILE, MANIFEST_FILE, MANIFEST_FILE)):
        service = (DETECTOR, PREDICTOR, DETECTOR, PREDICTOR)[number]
        for title, act in KINDS.items():
            yield Hostile("kinds", f"{name}: {title}", service, lambda folder, act=act, name=name: act(folder / name))
    for service in (DETECTOR, PREDICTOR):
        yield Hostile("kinds", "no folder", service, shutil.rmtree)
        yield Hostile("kinds", "an empty folder", service, lambda folder: [path.unlink() for path in folder.iterdir()])
        yield Hostile("kinds", "a half-committed set", service, half_committed)


def half_committed(folder: Path) -> None:
    """A set that came half way: its manifest is the next one's, its files are not."""
    (folder / ".next").mkdir()
    manifest = json.loads(good()[MANIFEST_FILE])
    for entry in manifest["files"].values():
        entry["sha256"] = digest(b"the next one")
    (folder / ".next" / MANIFEST_FILE).write_text(json.dumps(manifest))


def bombs() -> Iterator[Hostile]:
    """Files within the limit of size that grow when they are read."""
    room = MAX_BYTES - 100
    shapes = {"lists in a list": b"](" + b"]" * room + b"e.", "nothings in a list": b"}\x8c\x04meta](" + b"N" * room + b"es.", "marks": b"(" * room + b".", "lists in lists": b"]" * (room // 2) + b"a" * (room // 2 - 1) + b".",
              "dicts": b"](" + b"}" * room + b"e.", "one long text": b"}\x8c\x04metaX" + room.to_bytes(4, "little") + b"x" * (room - 20) + b"s.", "a text that says it is longer": b"}\x8c\x04metaX\xff\xff\xff\x7fx.", "frames": b"\x95" + b"\xff" * 8 + b"}."}
    for title, body in shapes.items():
        name = PREDICTOR_FILE if title[0] in "ln" else REGIMES[1]
        yield Hostile("bombs", f"{name}: {title}", service_of(name), swap(name, b"\x80\x04" + body))


def thousand(place: Path, seed: int = 1) -> list[Hostile]:
    """All of them; what gadgets would make appears in a folder."""
    rng = random.Random(seed)
    fixed = [*with_gadgets(place, rng), *damaged(rng), *parameters(rng), *with_trees(), *with_manifests(), *of_other_kinds(), *bombs()]
    rest = COUNT - len(fixed)
    return fixed + [*odd_values(rng, rest // 3), *mutated_behind_the_hash(rng, rest - rest // 3)]
