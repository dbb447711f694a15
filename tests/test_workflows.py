"""The harness around the notebooks: names are checked, failures are one line, models appear at the end or not at all."""
import ast
import json
import os
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delta_go.domain import DeltaGoError, InputError
from delta_go.evidence import workflows
from delta_go.evidence.report import outside_needs, write_summary
from delta_go.learning.features import regime_inputs
from delta_go.learning.predictor import PREDICTOR_FEATURES
from delta_go.learning.predictor_fit import Examples, fit_predictor
from delta_go.learning.reading import read_market
from delta_go.learning.regime_fit import fit_rule
from delta_go.learning.registry import load_models
from delta_go.market.load import load_market

ROOT = Path(__file__).resolve().parent.parent
COMMON = {"data", "out", "resolution", "symbols", "start", "end", "allow_gaps", "edge", "seed", "jobs"}


def write_notebook(folder: Path, name: str, *sources: str) -> Path:
    folder.mkdir(exist_ok=True)
    cells = [nbformat.v4.new_markdown_cell(f"# {name}", id="title")]
    cells += [nbformat.v4.new_code_cell(source, id=f"c{k}", metadata={"tags": ["parameters"]} if k == 0 else {}) for k, source in enumerate(sources)]
    made = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    nbformat.write(made, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture(scope="module")
def trained():
    "A rule and a predictor without examples, on six weeks of one symbol."
    market = load_market("", symbols=["BTCUSD"], end="2023-02-15")
    rule = fit_rule(market.candles["BTCUSD"], regime_inputs(market.candles["BTCUSD"]), {})
    readings = {"BTCUSD": read_market(market.candles["BTCUSD"], rule, market.payments("BTCUSD"))}
    nothing = Examples(np.empty((0, len(PREDICTOR_FEATURES)), np.float32), *np.empty((2, 0), np.int64), np.empty(0), np.empty(0, np.int16))
    predictor, quality = fit_predictor(nothing, meta=workflows.remember_inputs(readings, 3_600))
    return SimpleNamespace(market=market, regimes={"BTCUSD": rule}, readings=readings, predictor=predictor, quality=quality)


def leave_candidate(trained, out, threshold: float | None = 0.4) -> None:
    from dataclasses import replace
    predictor = replace(trained.predictor, threshold=threshold, abstain_reason=None if threshold else "too few signals")
    workflows.save_candidate(out, trained.market, trained.regimes, {"BTCUSD": {}}, predictor, trained.quality, trained.readings["BTCUSD"].inputs, 0)


# names

def test_parameters_are_checked_by_name(tmp_path):
    path = write_notebook(tmp_path, "line", "data = ''\nsteps = 3", "print(steps)")
    workflows.check_parameters(path, {"steps": 5})
    with pytest.raises(InputError, match="line: unknown parameter step, colour; expected of data, steps"):
        workflows.check_parameters(path, {"step": 5, "colour": "red"})


def test_a_notebook_without_parameters_is_refused(tmp_path):
    path = write_notebook(tmp_path, "bare", "")
    with pytest.raises(InputError, match="one cell tagged parameters"):
        workflows.check_parameters(path, {})


def test_an_unknown_workflow_names_the_known_ones(tmp_path, monkeypatch):
    write_notebook(tmp_path, "line", "a = 1")
    with pytest.raises(InputError, match="expected one of line, got 'lime'"):
        workflows.find_workflow("lime", tmp_path)
    monkeypatch.setattr(workflows, "project_folder", lambda: tmp_path / "site-packages")
    with pytest.raises(InputError, match="run from a checkout"):
        workflows.find_workflow("health")


def test_the_project_has_its_four_workflows():
    for name in workflows.WORKFLOWS:
        path = workflows.find_workflow(name)
        assert set(workflows.parameter_defaults(path)) >= COMMON and path.parent == ROOT / "nbs" / "workflows"
        assert not any(cell.get("outputs") for cell in nbformat.read(path, 4).cells)
    assert set(workflows.select_parameters({"seed": 1})) == set(workflows.WORKFLOWS)
    with pytest.raises(InputError, match="unknown parameter champion"):
        workflows.select_parameters({"champion": "elsewhere"})


# what is kept of a run

PLAIN = st.dictionaries(st.from_regex(r"[a-z]{1,8}_x", fullmatch=True), st.one_of(st.integers(), st.booleans(), st.text(max_size=20), st.none()), max_size=5)


@given(PLAIN)
def test_shown_parameters_can_be_read_back_but_for_folders(parameters):
    shown = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(workflows._shown_parameters(parameters)).body}  # type: ignore[attr-defined]
    assert shown.keys() == parameters.keys()
    assert all(shown[name] == value or (isinstance(value, str) and "/" in value and "/" not in shown[name]) for name, value in parameters.items())


def test_tidying_twice_changes_nothing_more():
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in (("stdout", "a"), ("stderr", "noise"), ("stdout", "b"))]
    outputs += [nbformat.v4.new_output("execute_result", {"text/plain": "1"}, execution_count=3)]
    cells = [nbformat.v4.new_code_cell("data = 'candles'\nseed = 0  # of everything", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("# Parameters\ndata = '/home/me/x'", metadata={"tags": ["injected-parameters"], "papermill": {"duration": 1}}),
             nbformat.v4.new_code_cell("1", execution_count=3, outputs=outputs)]
    made = nbformat.v4.new_notebook(cells=cells, metadata={"papermill": {"start_time": "now"}})
    once = nbformat.writes(workflows.tidy_notebook(made, {"data": "/home/me/x"}))
    assert once == nbformat.writes(workflows.tidy_notebook(made, {"data": "/home/me/x"}))
    assert "/home/me" not in once and "noise" not in once and "now" not in once and "papermill" not in once
    assert [output.get("text") for output in made.cells[2].outputs] == ["ab", None]
    assert made.cells[1].source == "# Parameters\ndata = 'x'\nseed = 0"


def test_a_failure_names_cell_first_line_and_last_line():
    error = SimpleNamespace(source="# why\n\nratio = 1 / 0\nprint()", ename="ZeroDivisionError", evalue="first\n  division by zero\n")
    found = workflows.explain_failure("health", error, ["a = 1", error.source])
    assert str(found).startswith("health: cell 2 of 2 stopped at `ratio = 1 / 0`: ZeroDivisionError: division by zero;") and not isinstance(found, InputError)
    mistake = workflows.explain_failure("health", SimpleNamespace(source="x", ename="InputError", evalue="share: expected 0 to 1, got 2"), ["x"])
    assert isinstance(mistake, InputError) and str(mistake) == "share: expected 0 to 1, got 2 (in health, cell 1 of 1)"
    assert "\n" not in str(workflows.explain_failure("health", SimpleNamespace(source="", ename="KeyError", evalue=""), []))


# real kernels

def test_a_run_leaves_notebook_page_and_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    folder, out = tmp_path / "n", tmp_path / "out"
    write_notebook(folder, "line", "data = ''\nout = ''\nsteps = 3", "import os\nimport matplotlib.pyplot as plt\nplt.figure(figsize=(1, 1))\nplt.plot(range(steps));",
                   "print('drawn', steps, os.getcwd() == os.path.dirname(os.path.dirname(__import__('delta_go').__file__)))")
    told = []
    page = workflows.run_workflow("line", {"steps": 4}, out, lambda *step: told.append(step), folder).read_text()
    assert page.count("data:image/png") == 1 and "drawn 4 True" in page and outside_needs(page) == [] and str(tmp_path) not in page
    assert os.environ["MPLBACKEND"] == "agg" and told == [("line", cell, 5) for cell in range(1, 6)]
    assert str(tmp_path) not in (out / "reports" / "line" / "notebook.ipynb").read_text()


def test_a_failing_cell_keeps_what_was_done(tmp_path):
    folder, out = tmp_path / "n", tmp_path / "out"
    write_notebook(folder, "broken", "out = ''", "print('so ' + 'far')", "raise KeyError('rsi')", "print('ne' + 'ver')")
    (out / "reports" / "broken").mkdir(parents=True)
    (out / "reports" / "broken" / "summary.json").write_text("{}")
    with pytest.raises(DeltaGoError, match=r"broken: cell 4 of 5 stopped at `raise KeyError\('rsi'\)`: KeyError: 'rsi'"):
        workflows.run_workflow("broken", {}, out, folder=folder)
    page = (out / "reports" / "broken" / "report.html").read_text()
    assert "so far" in page and "KeyError" in page and "never" not in page and outside_needs(page) == []
    assert not (out / "reports" / "broken" / "summary.json").exists(), "the summary of an older run must not stand beside a broken one"


def test_braces_in_a_path_are_refused(tmp_path):
    write_notebook(tmp_path / "n", "line", "out = ''")
    with pytest.raises(InputError, match="without braces"):
        workflows.run_workflow("line", {}, tmp_path / "{seed}", folder=tmp_path / "n")
    assert not (tmp_path / "{seed}").exists()


def test_a_kernel_that_dies_is_one_line(tmp_path):
    write_notebook(tmp_path / "n", "dead", "out = ''", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(DeltaGoError, match="dead: the kernel died"):
        workflows.run_workflow("dead", {}, tmp_path / "out", folder=tmp_path / "n")
    assert (tmp_path / "out" / "reports" / "dead" / "report.html").exists()


# publishing

def test_without_an_edge_the_published_predictor_abstains(tmp_path, trained):
    leave_candidate(trained, tmp_path)
    loaded = load_models(workflows.publish_models(tmp_path, "no edge: luck"))
    assert loaded.predictor.threshold is None and loaded.predictor.abstain_reason == "no edge: luck" and loaded.manifest.verdict == "no edge: luck"
    leave_candidate(trained, tmp_path)
    assert load_models(workflows.publish_models(tmp_path, "trade")).predictor.threshold == 0.4
    leave_candidate(trained, tmp_path, None)
    assert load_models(workflows.publish_models(tmp_path, "no edge: luck")).predictor.abstain_reason == "too few signals"
    assert not (tmp_path / "candidate").exists()


def test_the_same_candidate_is_published_as_the_same_bytes(tmp_path, trained):
    for out in (tmp_path / "a", tmp_path / "b"):
        leave_candidate(trained, out)
        workflows.publish_models(out, "no edge: luck")
    files = [{path.name: path.read_bytes() for path in (out / "models").iterdir()} for out in (tmp_path / "a", tmp_path / "b")]
    assert files[0] == files[1] and len(files[0]) == 3


def test_regimes_go_from_one_workflow_to_the_next_by_their_hashes(tmp_path, trained):
    write_summary(tmp_path, "train_regimes", "One rule.", files=workflows.save_regimes(tmp_path, trained.regimes))
    assert list(workflows.load_regimes(tmp_path)) == ["BTCUSD"]
    path = tmp_path / "candidate" / "hmm_model_BTCUSD.pkl"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match="hmm_model_BTCUSD.pkl"):
        workflows.load_regimes(tmp_path)


def test_drift_compares_with_what_the_predictor_remembers(trained):
    drifts = workflows.measure_drift(trained.predictor, trained.readings, 3_600)["BTCUSD"]
    assert [each.feature for each in drifts] == list(workflows.WATCHED)
    assert workflows.measure_drift(trained.predictor, {"ETHUSD": trained.readings["BTCUSD"]}, 3_600) == {}


def test_the_audit_finds_nothing_here_and_a_planted_leak(tmp_path, trained, monkeypatch):
    leave_candidate(trained, tmp_path)
    models = workflows.newest_models(tmp_path)
    assert [row[2] for row in workflows.audit_lookahead(trained.market, models, 5).rows] == ["0"]

    def leaking(candles, model, payments):
        seen = read_market(candles, model, payments)
        seen.features.values[:, 0] -= candles.close.mean()
        return seen
    monkeypatch.setattr(workflows, "read_market", leaking)
    assert int(workflows.audit_lookahead(trained.market, models, 5).rows[0][2]) > 0


# all in order, without kernels

@pytest.fixture
def staged(tmp_path, trained, monkeypatch):
    "Four notebooks whose execution is played: what runs, what it leaves, and what breaks."
    folder = tmp_path / "n"
    for name in workflows.WORKFLOWS:
        write_notebook(folder, name, "data = ''\nout = ''\nresolution = '1h'\nseed = 0" + ("\nchampion = ''" if name == "train_regimes" else ""))
    ran: dict[str, dict] = {}
    broken: set[str] = set()

    def play(notebook, target, parameters, tell):
        ran[notebook.stem], out = parameters, parameters["out"]
        nbformat.write(nbformat.read(notebook, 4), target)
        tell(1, 1)
        if notebook.stem in broken:
            return DeltaGoError(f"{notebook.stem}: cell 2 of 2 stopped")
        if notebook.stem == "train_predictor":
            leave_candidate(trained, out)
        write_summary(out, notebook.stem, "Done.", **({"verdict": "no edge: played", "trade": False} if notebook.stem == "walk_forward" else {}))
        return None
    monkeypatch.setattr(workflows, "_execute", play)
    return SimpleNamespace(folder=folder, out=tmp_path / "out", ran=ran, broken=broken)


def test_all_workflows_run_in_order_and_then_models_appear(staged):
    told = []
    done = workflows.run_all(staged.out, {"seed": 3}, lambda *step: told.append(step), staged.folder)
    assert list(staged.ran) == list(workflows.WORKFLOWS) and [name for name, cells, _ in told if not cells] == list(workflows.WORKFLOWS)
    assert done["verdict"] == "no edge: played" and done["seed"] == "3" and staged.ran["health"]["seed"] == 3
    assert sorted(path.name for path in staged.out.iterdir()) == ["models", "reports"]
    assert load_models(staged.out / "models").manifest.verdict == "no edge: played"
    assert staged.ran["train_regimes"]["champion"] == ""
    workflows.run_all(staged.out, {}, lambda *_: None, staged.folder)
    assert staged.ran["train_regimes"]["champion"] == str(staged.out / "models")


@pytest.mark.parametrize("name", workflows.WORKFLOWS)
def test_a_failure_leaves_the_models_in_force_alone(staged, name):
    workflows.run_all(staged.out, {}, lambda *_: None, staged.folder)
    before = {path.name: path.read_bytes() for path in (staged.out / "models").iterdir()}
    staged.broken.add(name)
    with pytest.raises(DeltaGoError, match=f"{name}: cell 2 of 2"):
        workflows.run_all(staged.out, {"seed": 9}, lambda *_: None, staged.folder)
    assert {path.name: path.read_bytes() for path in (staged.out / "models").iterdir()} == before
    assert not (staged.out / "candidate").exists() and (staged.out / "reports" / name / "report.html").exists()
    assert f"failed: {name}" in (staged.out / "reports" / "index.html").read_text()
    assert json.loads((staged.out / "reports" / "summary.json").read_text())["trade"] is False


@pytest.mark.parametrize("wrong", [{"sede": 1}, {"resolution": "7m"}, {"data": "nowhere"}])
def test_a_mistake_is_found_before_anything_is_written(staged, wrong):
    with pytest.raises(InputError):
        workflows.run_all(staged.out, wrong, lambda *_: None, staged.folder)
    assert not staged.out.exists() and not staged.ran


def test_bars_on_the_terminal_follow_the_cells(capsys):
    with workflows.show_progress() as tell:
        tell("health", 0, 1)
        tell("health", 7, 9)
    assert "health" in capsys.readouterr().out


# the real thing

@pytest.mark.slow
def test_the_whole_workflow_twice_from_one_champion(tmp_path):
    "Real notebooks, a shortened market: same models, same reports, pages that stand alone and stay small."
    short = {"symbols": "BTCUSD", "end": "2024-04-15", "jobs": 1}
    import shutil
    workflows.run_all(tmp_path / "first", short, lambda *_: None)
    seen = []
    for name in ("a", "b"):
        out = tmp_path / name / "run"
        shutil.copytree(tmp_path / "first", out)
        assert workflows.run_all(out, short, lambda *_: None)["verdict"].startswith("no edge")
        pages = [path.read_text() for path in sorted((out / "reports").rglob("*.html"))]
        assert len(pages) == 5 and all(outside_needs(page) == [] and len(page) < 1_000_000 for page in pages)
        assert json.loads((out / "reports" / "walk_forward" / "backtest.json").read_text())["verdict"].startswith("no edge")
        seen.append({path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()})
    assert seen[0] == seen[1]
