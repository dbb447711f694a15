"""The rules of the house hold, and every one of them can fail."""
import shutil
import zlib
from pathlib import Path

import pytest
from execnb.nbio import dict2nb, nb2str

from delta_go import house

ROOT = house.project_root(Path(__file__))


@pytest.mark.parametrize("rule", house.RULES)
def test_rule_is_kept(rule):
    faults = house.RULES[rule](ROOT)
    assert not faults, "\n".join(faults)


def cell(source: str, kind: str = "code", **more) -> dict:
    return {"cell_type": kind, "id": f"{zlib.crc32(source.encode()):08x}", "metadata": {}, "source": source.splitlines(keepends=True),
            **({"execution_count": None, "outputs": []} if kind == "code" else {}), **more}


def write_notebook(path: Path, *cells: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(nb2str(dict2nb({"cells": list(cells), "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})))


def write_room(root: Path, number: int, module: str, code: str = "x = 1\n", folder: str | None = None) -> None:
    parent, _, name = module.rpartition(".")
    prose = cell(f"# {name}\n\n> A purpose.\n\nWhat comes in: nothing.", "markdown")
    end = cell("## What this chapter guarantees\n\n- Nothing.", "markdown")
    write_notebook(root / "nbs" / (parent if folder is None else folder) / f"{number:02}_{name}.ipynb", prose, cell(f"#| default_exp {module}"), end)
    source = root.joinpath("delta_go", *module.split(".")).with_suffix(".py")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(code)


@pytest.fixture
def small(tmp_path):
    "A house of three rooms that keeps every rule but the export's (its modules are written by hand)."
    for name in ("settings.ini", "setup.py", "pyproject.toml", "Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    write_room(tmp_path, 1, "domain")
    write_room(tmp_path, 10, "market.candles", "from ..domain import x\n")
    write_room(tmp_path, 20, "learning.features", "def late():\n    'Import late.'\n    from delta_go.market import candles\n    return candles\n")
    write_notebook(tmp_path / "nbs/workflows/health.ipynb", cell("seed = 0\nsymbols = ['BTCUSD']", metadata={"tags": ["parameters"]}), cell("print(seed)"))
    for package in ("delta_go", "delta_go/market", "delta_go/learning"):
        (tmp_path / package / "__init__.py").touch()
    return tmp_path


def test_the_small_house_keeps_its_rules(small):
    assert {rule: faults for rule, check in house.RULES.items() if check is not house.export_faults and (faults := check(small))} == {}


@pytest.mark.parametrize("number, module, folder, words", [
    (11, "learning.splits", None, "whose numbers are others"),
    (21, "learning.splits", "market", "must say the same"),
    (20, "learning.splits", None, "share a number"),
])
def test_a_room_in_the_wrong_place(small, number, module, folder, words):
    write_room(small, number, module, folder=folder)
    assert any(words in fault for fault in house.room_faults(small))


@pytest.mark.parametrize("code", [
    "from ..learning.features import late\n", "from ..learning import features\n", "import delta_go.learning.features\n",
    "def hidden():\n    from ..learning.features import late\n    return late\n",
])
def test_an_import_that_goes_up(small, code):
    (small / "delta_go/market/candles.py").write_text(code)
    assert house.floor_faults(small) == ["market.candles (10) imports learning.features (20): move what they share below both"]


def test_a_floor_between_two_full_decades(small):
    write_room(small, 52, "evidence.gate")
    write_room(small, 591, "calibration.nulls", "from ..evidence.gate import x\n")
    write_room(small, 60, "serving.service")
    assert [room.number for room in house.read_rooms(small)][-3:] == [52, 59.1, 60] and house.room_faults(small) == house.floor_faults(small) == house.chapter_faults(small) == []
    (small / "delta_go/evidence/gate.py").write_text("from ..calibration.nulls import x\n")
    assert house.floor_faults(small)[0].startswith("evidence.gate (52) imports calibration.nulls (59.1)")
    (small / "delta_go/calibration/nulls.py").write_text("from ..serving.service import x\n")
    assert house.floor_faults(small)[1].startswith("calibration.nulls (59.1) imports serving.service (60)")


def test_a_closed_door(small):
    write_room(small, 40, "trading.risk")
    write_room(small, 60, "serving.service", "from ..trading.risk import x\n")
    assert len(house.floor_faults(small)) == 1


def test_drift_orphans_and_forgotten_modules(tmp_path):
    fresh, committed = tmp_path / "fresh", tmp_path / "committed"
    for tree, files in ((fresh, {"a.py": "1", "b.py": "2"}), (committed, {"a.py": "1!", "c.py": "3"})):
        tree.mkdir()
        for name, text in files.items():
            (tree / name).write_text(text)
    assert [fault.split()[0] for fault in house.tree_faults(fresh, committed)] == ["b.py", "c.py", "a.py"]
    assert house.tree_faults(fresh, fresh) == []


def test_the_export_check_leaves_the_tree_alone_and_reports_a_broken_notebook(small):
    shutil.rmtree(small / "delta_go")
    before = {path: path.read_bytes() for path in small.rglob("*") if path.is_file()}
    assert any("domain.py is not in the package" in fault or "_modidx.py" in fault for fault in house.export_faults(small))
    assert {path: path.read_bytes() for path in small.rglob("*") if path.is_file()} == before
    (small / "nbs/02_bad.ipynb").write_text("{")
    assert house.export_faults(small)[0].startswith("the export fails")


def test_a_notebook_with_run_counts_or_editor_metadata(small):
    write_notebook(small / "nbs/workflows/health.ipynb", cell("seed = 0", execution_count=3, metadata={"tags": ["parameters"], "scrolled": True}))
    assert house.clean_faults(small) == ["nbs/workflows/health.ipynb: expected a clean notebook; run nbdev_clean"]


def test_a_chapter_without_its_frame(small):
    write_notebook(small / "nbs/02_config.ipynb", cell("# settings\n\nSome prose.", "markdown"), cell("#| default_exp config"))
    assert len(house.chapter_faults(small)) == 4


@pytest.mark.parametrize("cells, words", [
    ([cell("seed = 0")], "exactly one cell tagged parameters"),
    ([cell("seed = 0", metadata={"tags": ["parameters"]}), cell("x = 0", metadata={"tags": ["parameters"]})], "exactly one cell"),
    ([cell("seed = int('0')", metadata={"tags": ["parameters"]})], "plain literals"),
    ([cell("import os\nseed = 0", metadata={"tags": ["parameters"]})], "plain literals"),
    ([cell("seed = 0", metadata={"tags": ["parameters"]}), cell("def logic():\n    return 1")], "no functions"),
    ([cell("seed = 0", metadata={"tags": ["parameters"]}), cell("\n".join(f"x{i} = {i}" for i in range(16)))], "fifteen lines"),
    ([cell("seed = 0", metadata={"tags": ["parameters"]}), cell("seed", outputs=[{"output_type": "stream", "name": "stdout", "text": "0"}])], "no stored outputs"),
    ([cell("seed = 0", metadata={"tags": ["parameters"]}), cell("#| export\nx = 1")], "no exports"),
])
def test_a_workflow_that_does_more_than_call(small, cells, words):
    write_notebook(small / "nbs/workflows/health.ipynb", *cells)
    assert [words in fault for fault in house.workflow_faults(small)] == [True]


def test_a_heavy_import_in_an_inference_room(small):
    (small / "delta_go/learning/features.py").write_text("import scipy\n")
    assert house.weight_faults(small) == ["learning.features imports scipy: import it inside the function that fits or plots"]
    (small / "delta_go/learning/features.py").write_text("import nothing_of_the_kind\n")
    assert "No module named" in house.weight_faults(small)[0]


@pytest.mark.parametrize("code", [
    "import pickle\n", "from pickle import loads\n", "import marshal, os\n", "import joblib\njoblib.load('x')\n", "eval('1')\n", "exec('1')\n",
    "import yaml\nyaml.load('x')\n", "import numpy as np\nnp.load('x', allow_pickle=True)\n", "import numpy as np\nnp.load('x', allow_pickle=flag)\n",
    "import pandas as pd\npd.read_pickle('x')\n", "def f():\n    import dill\n",
])
def test_a_room_that_runs_what_it_reads(small, code):
    (small / "delta_go/market/candles.py").write_text(code)
    assert len(house.danger_faults(small)) == 1
    (small / "delta_go/market/candles.py").write_text("import json\nimport numpy as np\nnp.load('x', allow_pickle=False)\n")
    assert house.danger_faults(small) == []


def test_danger_in_a_workflow_notebook(small):
    write_notebook(small / "nbs/workflows/health.ipynb", cell("%matplotlib inline\nimport pickle"))
    assert len(house.danger_faults(small)) == 1


@pytest.mark.parametrize("old, new", [("numpy==2.4.6", "numpy==2.4.5"), ("numpy==2.4.6", "numpy>=2.4"), ("numpy==2.4.6", "numpie==1.0")])
def test_pins_that_disagree(small, old, new):
    (small / "settings.ini").write_text((small / "settings.ini").read_text().replace(old, new))
    assert len(house.pin_faults(small)) == 1


@pytest.mark.parametrize("line", ["see /wor" "k/main", "../sha" "red/DESIGN.md", "written in an earlier ses" "sion", "/tm" "p/x"])
def test_talk_of_other_things(small, line):
    (small / "README.md").write_text(f"# title\n{line}\n")
    assert len(house.word_faults(small)) == 1
    (small / "README.md").write_text("# title\na framework/work/ folder, the HTTP session, shared/ things\n")
    assert house.word_faults(small) == []


@pytest.mark.parametrize("code, words", [
    ("from os import *\n", "star import"), ("def f():\n    return 1\n", "no docstring"), ("def f(a, b: int):\n    'Do.'\n", "no type for a"),
    ("def _f():\n" + "    x = 1\n" * 50, "51 lines"), ("class A:\n    def f(self):\n        return 1\n", "no docstring"), ("x = 1\n" * 401, "split the room"),
])
def test_code_that_is_hard_to_read(small, code, words):
    (small / "delta_go/domain.py").write_text(code)
    assert [words in fault for fault in house.shape_faults(small)] == [True]
