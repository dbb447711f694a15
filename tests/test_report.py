"""Figures and pages: bad news is said, nothing is fetched, the same input gives the same bytes."""
import io
import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

from delta_go.domain import REGIMES, InputError, Trade  # noqa: E402
from delta_go.evidence import plots, report  # noqa: E402
from delta_go.market.candles import Candles  # noqa: E402

HOUR = 3_600


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def walk(bars: int = 300, price: float = 40_000.0) -> Candles:
    rng = np.random.default_rng(bars)
    close = price * np.exp(np.cumsum(rng.normal(0, 0.006, bars)))
    opened = np.r_[price, close[:-1]]
    return Candles("BTCUSD", HOUR, 1_700_002_800 + np.arange(bars) * HOUR, opened, np.maximum(opened, close) * 1.002, np.minimum(opened, close) / 1.002, close, np.ones(bars))


def trade(bars: Candles, entry: int, leave: int, side: str, pnl: float, symbol: str = "BTCUSD") -> Trade:
    return Trade(symbol, side, 10, int(bars.time[entry]), bars.open[entry], int(bars.time[leave]), bars.open[leave], "time",  # type: ignore[arg-type]
                 bars.open[entry] * 0.98, bars.open[entry] * 1.03, 1.0, 0.0, pnl, 0.0, "bull", 0.8, 0.5, "test")


def title(axes) -> str:
    return axes.get_title(loc="left").replace("\n", " ")


# figures

def test_every_figure_draws_on_the_axes_it_is_given():
    bars, regime = walk(), np.repeat([0, 1, 2, 3, 4], 60)
    belief = np.full((300, 5), 0.1) + 0.5 * np.eye(5)[regime]
    row = SimpleNamespace(threshold=0.4, trades=50, mean=0.001, lower=-0.001, upper=0.003)
    card = {"by_regime": {name: {"net_return": 0.01, "trades": 3} for name in REGIMES}}
    drift = SimpleNamespace(feature="rsi", status="drifted", psi=0.4)
    draws = [
        lambda axes: plots.price_with_regimes(bars, regime, axes), lambda axes: plots.regime_posteriors(bars.time, belief, axes),
        lambda axes: plots.transition_matrix(np.full((5, 5), 0.01) + np.eye(5) * 0.95, axes), lambda axes: plots.durations(regime, axes=axes),
        lambda axes: plots.forward_volatility_by_regime(np.linspace(0.001, 0.01, 300), regime, axes), lambda axes: plots.trades_on_price(bars, [], axes),
        lambda axes: plots.calibration(np.linspace(0.2, 0.6, 90), np.arange(90) % 3 == 0, axes=axes), lambda axes: plots.value_by_threshold([row], None, axes),
        lambda axes: plots.contributions(["a", "b"], np.ones((5, 2)), np.ones((5, 3)), axes=axes), lambda axes: plots.return_by({"gate": card}, axes=axes),
        lambda axes: plots.cost_breakdown({"gross": 5.0, "fees": 2.0, "slippage": 1.0, "funding": 0.5, "net": 1.5}, "gate", axes),
        lambda axes: plots.drift_bars([drift], axes=axes)]
    for draw in draws:
        axes = plots.canvas(4, 2)
        assert draw(axes) is axes and title(axes)
    pair = plots.canvas(6, 4, rows=2)
    assert plots.equity_and_drawdown(bars.time, {"gate": np.full(300, 1e4)}, axes=pair)[1] is pair[1]
    assert len(plt.get_fignums()) == len(draws) + 1


def test_nothing_to_show_is_said_and_not_an_error():
    bars, none = walk(), np.empty(0)
    zero = {"by_regime": {name: {"net_return": None, "trades": 0} for name in REGIMES}}
    assert "No forecast" in title(plots.calibration(none, none))
    assert "abstains" in title(plots.value_by_threshold([], None))
    assert "no trades" in title(plots.return_by({"gate": zero})) and "no trades" in title(plots.trades_on_price(bars, []))
    assert "nothing traded" in title(plots.cost_breakdown(dict.fromkeys(("gross", "fees", "slippage", "funding", "net"), 0.0)))
    assert "learned nothing" in title(plots.contributions(["a"], np.empty((0, 1)), np.empty((0, 2))))
    assert "0 inputs" in title(plots.drift_bars([]))
    plots.durations(np.zeros(5, int))
    plots.price_with_regimes(bars, np.zeros(1, int))


def test_titles_carry_the_news():
    bars = walk()
    trades = [trade(bars, 10, 20, "buy", 50.0), trade(bars, 30, 40, "sell", -80.0), trade(bars, 50, 60, "buy", 5.0, "ETHUSD")]
    assert title(plots.trades_on_price(bars, trades)) == "BTCUSD: 2 trades, 1 earned, together -30 USD"
    assert title(plots.trades_on_price(bars[25:], trades)).startswith("BTCUSD: 1 trades")
    falling = np.linspace(10_000, 8_000, 300)
    upper, _ = plots.equity_and_drawdown(bars.time, {"gate": falling, "buy and hold": falling[::-1]})
    assert title(upper).startswith("gate: -20.0%, worst fall 20.0%; buy and hold")
    said, happened = np.repeat([0.9, 0.1], 50), np.repeat([0, 1], 50)
    assert "worse than" in title(plots.calibration(said, happened)) and "better than" in title(plots.calibration(said, 1 - happened))


@given(st.lists(st.floats(1.0, 1e6), min_size=1, max_size=40), st.floats(0.01, 0.9))
def test_the_breaker_bar_is_the_first_close_that_low(equity, limit):
    peak, expected = 100.0, None
    for bar, value in enumerate(equity):
        peak = max(peak, value)
        if value <= peak * (1 - limit) and expected is None:
            expected = bar
    assert plots.breaker_bar(np.array(equity), 100.0, limit) == expected


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_spells_put_together_are_the_path(path):
    first, length, value = plots._spells(np.array(path))
    assert np.repeat(value, length).tolist() == path and (np.diff(value) != 0).all() and first.tolist() == np.r_[0, np.cumsum(length)[:-1]].tolist()


def test_the_same_data_give_the_same_picture():
    def picture():
        buffer = io.BytesIO()
        plots.price_with_regimes(walk(), np.arange(300) // 60).figure.savefig(buffer, format="png")
        return buffer.getvalue()
    assert picture() == picture()


def test_long_curves_keep_their_last_bar():
    for rows in (1, 2, 999, 1_000, 1_001, 17_520):
        kept = plots._thin(rows)
        assert len(kept) <= 1_001 and kept[0] == 0 and kept[-1] == rows - 1


# tables and numbers

@given(st.one_of(st.none(), st.floats()))
def test_what_is_unknown_is_a_dash(value):
    unknown = value is None or not np.isfinite(value)
    assert (report.percent(value) == "–") == (report.number(value) == "–") == unknown


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4))
def test_text_from_data_stays_text(rows):
    table = report.make_table("a caption", [{"name": one, "value": two} for one, two in rows])
    page = report.make_page(rows[0][0], table._repr_html_() + report.Conclusion(rows[0][1])._repr_html_())
    assert report.outside_needs(page) == [] and page.count("<td>") == 2 * len(rows)


@pytest.mark.parametrize("html", [
    '<script>x</script>', '<img src="https://a.b/c.png">', "<img src='x.png'>", '<link rel="stylesheet" href="a.css">', '<p onload=go()>', '<iframe></iframe>',
    '<style>@import "a.css";</style>', "<style>b{background:url('//a.b')}</style>", '<p style="background:url(http://a.b)">', '<meta http-equiv="refresh" content="0">'])
def test_whatever_a_browser_would_fetch_is_found(html):
    assert report.outside_needs(html)


def test_data_links_and_written_code_are_no_needs():
    assert report.outside_needs('<img src="data:image/png;base64,AA=="><a href="https://a.b">x</a><pre>src="a.js" &lt;script&gt; url(x)</pre>') == []


# pages

def notebook():
    import nbformat
    buffer = io.BytesIO()
    plt.figure(figsize=(1, 1)).savefig(buffer, format="png")
    import base64
    picture = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(buffer.getvalue()).decode()})
    failure = nbformat.v4.new_output("error", ename="ZeroDivisionError", evalue="division by zero", traceback=["\x1b[31mZeroDivisionError\x1b[0m: division by zero"])
    cells = [nbformat.v4.new_markdown_cell("# A title\n\n## A figure", id="a"), nbformat.v4.new_code_cell("seed = 1", id="b", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("seed = 2", id="c", metadata={"tags": ["injected-parameters"]}),
             nbformat.v4.new_code_cell("draw()", id="d", outputs=[picture], metadata={"tags": ["index"]}), nbformat.v4.new_code_cell("1 / 0", id="e", outputs=[failure])]
    return nbformat.v4.new_notebook(cells=cells)


def test_a_notebook_becomes_a_page_that_stands_alone():
    made = notebook()
    page = report.notebook_html(made, "A title")
    assert report.outside_needs(page) == [] and page == report.notebook_html(made, "A title")
    assert 'alt="Figure: A figure"' in page and "ZeroDivisionError" in page and "\x1b" not in page
    assert page.count("<details>") == 2 and page.count("seed") == 1 and len(page) < 15_000
    assert not made.cells[3].outputs[0].get("metadata"), "the notebook itself is left alone"


def test_summaries_are_whole_or_not_there(tmp_path, monkeypatch):
    table = report.make_table("t", [{"a": "1"}])
    path = report.write_summary(tmp_path, "health", "Well.", [table], score=float("nan"), sizes=np.array([1, 2]))
    assert report.read_summary(tmp_path, "health") == {
        "workflow": "health", "headline": "Well.", "score": None, "sizes": [1, 2], "tables": [{"caption": "t", "columns": ["a"], "rows": [["1"]]}]}
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write_summary(tmp_path, "health", "Worse.")
    assert path.read_bytes() == before
    with pytest.raises(InputError, match="run this workflow first"):
        report.read_summary(tmp_path, "walk_forward")


def test_the_index_begins_with_the_verdict(tmp_path):
    import nbformat
    for name in ("train_regimes", "walk_forward"):
        report.write_summary(tmp_path, name, f"About {name} & more.", [report.make_table(f"table of {name}", [{"a": "1"}])], **({"trade": False} if name == "walk_forward" else {}))
    nbformat.write(notebook(), tmp_path / "reports" / "walk_forward" / "notebook.ipynb")
    summaries = {name: report.read_summary(tmp_path, name) for name in ("train_regimes", "walk_forward")}
    index = report.write_index(tmp_path, "no edge: <nothing>", {"seed": "0"}, summaries)
    page = index.read_text()
    order = ["no edge: &lt;nothing&gt;", "data:image/png", "walk_forward/report.html", "table of walk_forward", "table of train_regimes"]
    assert [page.index(each) for each in order] == sorted(page.index(each) for each in order)
    assert report.outside_needs(page) == [] and len(page) < 1_000_000
    known = json.loads((tmp_path / "reports" / "summary.json").read_text())
    assert known["verdict"] == "no edge: <nothing>" and known["trade"] is False and known["headlines"]["walk_forward"].startswith("About")


def test_a_stopped_run_says_so(tmp_path):
    page = report.write_index(tmp_path, "failed: walk_forward: cell 3", {}, {}).read_text()
    assert "stopped before its end" in page and "failed: walk_forward: cell 3" in page and 'verdict trade"' not in page
    assert 'verdict trade"' in report.write_index(tmp_path, "trade", {}, {}).read_text()
