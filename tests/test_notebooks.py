"""Every chapter runs from top to bottom; cells flagged `slow` run with `make ci`."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb")
                  if not path.name.startswith("_") and ".ipynb_checkpoints" not in path.parts
                  and not any((folder / ".notest").exists() for folder in path.parents))
SLOW = [path for path in CHAPTERS if "#| slow" in path.read_text(encoding="utf-8")]


@pytest.fixture(scope="module", autouse=True)
def quiet_figures():
    "Figures are drawn to memory here; papermill runs must not inherit this."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "agg")
        patch.setenv("IN_TEST", "1")
        yield
    import matplotlib.pyplot as plt
    plt.close("all")


def run_chapter(path: Path, **flags) -> bool:
    import nbdev.test  # its test_nb must not be a name of this module, or pytest collects it

    before = os.getcwd()
    passed, _ = nbdev.test.test_nb(path, basepath=ROOT, **flags)
    assert os.getcwd() == before
    return passed


def test_there_are_chapters():
    assert any(path.name == "01_domain.ipynb" for path in CHAPTERS) and not any("workflows" in path.parts for path in CHAPTERS)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter(path):
    assert run_chapter(path, skip_flags=["slow"])


@pytest.mark.slow
@pytest.mark.parametrize("path", SLOW, ids=lambda path: path.stem)
def test_chapter_with_its_slow_cells(path):
    assert run_chapter(path)
