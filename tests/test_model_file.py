"""Model files: plain data in, plain data out, and nothing else at any price."""
import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go import model_file
from delta_go.model_file import (
    MAX_BYTES,
    PlainUnpickler,
    check_plain,
    digest,
    load_model,
    parse_plain,
    plain_bytes,
    read_bytes,
    save_model,
    scan_instructions,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5), max_leaves=20)
plain = st.dictionaries(st.text(max_size=8), values, max_size=6)


def copied(data):
    "The same values in new objects."
    if isinstance(data, dict):
        return {"".join(list(key)): copied(value) for key, value in data.items()}
    if isinstance(data, list):
        return [copied(value) for value in data]
    return data[:1] + data[1:] if isinstance(data, str | bytes) else data


@given(plain)
def test_what_goes_in_comes_out_and_equal_data_gives_equal_bytes(data):
    raw = plain_bytes(data, "x")
    assert parse_plain(raw, digest(raw), "x") == data == pickle.loads(raw)
    assert plain_bytes(copied(data), "x") == raw


def test_bytes_do_not_depend_on_the_process(tmp_path):
    code = "from delta_go.model_file import *; print(digest(plain_bytes({'b': [1.5, None, True], 'a': {'x': b'y' * 100_000, 'n': 2**70}}, 'x')))"
    seen = {subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout for seed in "123"}
    assert len(seen) == 1


@pytest.mark.parametrize("value", [(1, 2), {1, 2}, {1: 2}, np.float64(1), np.arange(3), np.bool_(True), object(), len, float, bytearray(b"x"), 1j, [[{"a": (1,)}]]])
def test_what_is_not_plain_is_not_written(tmp_path, value):
    with pytest.raises(InputError, match="expected"):
        save_model(tmp_path / "x.pkl", {"value": value})
    assert not list(tmp_path.iterdir())


def test_depth_is_bounded():
    deep: list = []
    for _ in range(40):
        deep = [deep]
    with pytest.raises(InputError, match="levels"):
        check_plain(deep, "x")
    raw = b"\x80\x04" + b"]" * 20_000 + b"a" * 19_999 + b"."
    with pytest.raises(InputError):
        parse_plain(raw, digest(raw), "x")


# Hostile files. The manifest's hash is taken to be theirs: whoever wrote the file may have written that too.

TARGETS = ["os system", "posix system", "nt system", "subprocess Popen", "subprocess check_output", "builtins eval", "builtins exec", "builtins open",
           "builtins getattr", "builtins __import__", "builtins compile", "__builtin__ eval", "importlib import_module", "runpy run_path", "pty spawn",
           "webbrowser open", "socket create_connection", "shutil rmtree", "numpy.f2py.diagnose run_command", "numpy load", "numpy.core.multiarray _reconstruct",
           "pandas read_pickle", "joblib load", "pickle loads", "marshal loads", "types FunctionType", "types CodeType", "ctypes CDLL", "operator attrgetter",
           "functools partial", "timeit timeit", "code interact", "pdb run", "cProfile run", "asyncio run", "xgboost.core Booster", "collections OrderedDict", "copyreg _reconstructor"]


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


FORMS = {
    "global": lambda module, name, word: b"c" + f"{module}\n{name}\n".encode() + text(word) + b"\x85R",
    "stack_global": lambda module, name, word: text(module) + text(name) + b"\x93" + text(word) + b"\x85R",
    "inst": lambda module, name, word: b"(" + text(word) + b"i" + f"{module}\n{name}\n".encode(),
    "obj": lambda module, name, word: b"(c" + f"{module}\n{name}\n".encode() + text(word) + b"o",
    "newobj": lambda module, name, word: b"c" + f"{module}\n{name}\n".encode() + text(word) + b"\x85\x81",
    "newobj_ex": lambda module, name, word: b"c" + f"{module}\n{name}\n".encode() + text(word) + b"\x85}\x92",
    "build": lambda module, name, word: b"c" + f"{module}\n{name}\n".encode() + text(word) + b"b",
    "in_a_dict": lambda module, name, word: b"}" + text("means") + b"c" + f"{module}\n{name}\n".encode() + text(word) + b"\x85Rs",
}


@pytest.mark.parametrize("form", FORMS)
def test_no_gadget_loads_or_runs(tmp_path, form):
    canary = tmp_path / "owned"
    for target in TARGETS:
        body = FORMS[form](*target.split(), f"touch {canary}")
        for raw in (b"\x80\x04" + body + b".", b"\x80\x04\x95" + struct.pack("<Q", len(body) + 1) + body + b".", body + b"."):
            with pytest.raises(InputError):
                parse_plain(raw, digest(raw), "hmm_model_BTCUSD.pkl")
            with pytest.raises((InputError, ValueError, EOFError, pickle.UnpicklingError)):
                PlainUnpickler(io.BytesIO(raw)).load()
    assert not canary.exists()


@pytest.mark.parametrize("raw", [
    b"", b".", b"\x80\x04.", b"\x80\x04N.", b"\x80\x04]." , b"\x80\x03}.", b"\x80\x05}.", b"}.", b"\x80\x04}..", b"\x80\x04}.}.", b"\x80\x04}.\x00",
    b"\x80\x04Pname\n.", b"\x80\x04\x8c\x01xQ.", b"\x80\x04\x82\x01.", b"\x80\x04\x83\x01\x00.", b"\x80\x04\x84\x01\x00\x00\x00.", b"\x80\x04}\x940.",
    b"\x80\x04}2s.", b"\x80\x04]h\x00.", b"\x80\x04}(K\x01K\x02u.", b"\x80\x04}(]K\x01u.", b"\x80\x04}K\x01a.", b"\x80\x04a.", b"\x80\x04}e.", b"\x80\x04(.",
    b"\x80\x04]\x8c\x01xK\x01s.", b"\x80\x04\x8d" + b"\xff" * 8 + b".", b"\x80\x04B\xff\xff\xff\x7f.", b"\x80\x04X\xff\xff\xff\xff.", b"\x80\x04\x8a\xff\x01.",
    b"\x80\x04\x95" + b"\xff" * 8 + b"}.", b"\x80\x04\x96" + b"\xff" * 8 + b".", b"\x80\x04\x97.", b"\x80\x04\x8f.", b"\x80\x04)." , b"\x80\x04I1\n.",
    b"\x80\x04S'x'\n.", b"\x80\x04F1.5\n.", b"\x80\x04(dp0\n.", b"\x80\x04(lp0\n.", b"PK\x03\x04", b"\x1f\x8b\x08\x00", b"{}", b'{"kind": "hmm"}', b"\x00" * 1000,
])
def test_odd_bytes_are_refused(raw):
    with pytest.raises(InputError, match=r"^x\.pkl: "):
        parse_plain(raw, digest(raw), "x.pkl")


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_plain(raw):
    for candidate in (raw, b"\x80\x04" + raw, b"\x80\x04}" + raw + b"."):
        with contextlib.suppress(InputError):
            assert plain_bytes(parse_plain(candidate, digest(candidate), "x"), "x")


def test_a_dict_that_names_an_attribute_of_the_unpickler_is_only_a_dict():
    raw = plain_bytes({"__class__": "x", "__reduce__": ["os.system", "id"], "find_class": None}, "x")
    assert type(parse_plain(raw, digest(raw), "x")) is dict


def test_the_hash_comes_before_the_parser(monkeypatch):
    monkeypatch.setattr(model_file, "scan_instructions", lambda *_: pytest.fail("parsed before the hash was compared"))
    with pytest.raises(InputError, match=r"expected sha256 0{64}, found [0-9a-f]{64}; restore"):
        parse_plain(b"\x80\x04}.", "0" * 64, "x")


def test_the_scan_comes_before_the_unpickler(monkeypatch):
    monkeypatch.setattr(model_file, "PlainUnpickler", lambda *_: pytest.fail("unpickled before the scan"))
    raw = b"\x80\x04cos\nsystem\n."
    with pytest.raises(InputError, match="GLOBAL at byte 2"):
        parse_plain(raw, digest(raw), "x")


def test_only_regular_files_of_reasonable_size(tmp_path):
    good = tmp_path / "good.pkl"
    sha256 = save_model(good, {"a": 1})
    assert load_model(good, sha256) == {"a": 1}
    os.symlink(good, tmp_path / "link.pkl")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling.pkl")
    os.mkfifo(tmp_path / "pipe.pkl")
    (tmp_path / "folder.pkl").mkdir()
    with open(tmp_path / "big.pkl", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    for name in ("link", "dangling", "pipe", "folder", "big", "absent"):
        with pytest.raises(InputError, match=f"{name}.pkl"):
            read_bytes(tmp_path / f"{name}.pkl")
    with pytest.raises(InputError, match="holds big.pkl, dangling.pkl, folder.pkl, good.pkl"):
        read_bytes(tmp_path / "absent.pkl")
    with pytest.raises(InputError, match="holds nothing"):
        read_bytes(tmp_path / "no" / "such.pkl")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pkl"
    sha256 = save_model(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        save_model(path, {"a": 2})
    assert load_model(path, sha256) == {"a": 1}


def test_what_we_write_passes_the_scan_and_reads_as_json_would():
    data = {"floats": [0.1, -0.0, 1e300], "text": "µ" * 300, "deep": [[[[]]]], "big": 2**60}
    raw = plain_bytes(data, "x")
    scan_instructions(raw, "x")
    assert json.loads(json.dumps(data)) == parse_plain(raw, digest(raw), "x")
