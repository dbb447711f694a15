"""Ticks, fees, funding, brackets and liquidation by hand; the compiled rules in the same bits."""
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError, Product
from delta_go.market import compiled as fast
from delta_go.market import venue
from delta_go.market.venue import LIQUIDATION, NO_FILL, PRODUCTS, STOP_LOSS, TAKE_PROFIT, Costs, find_product

BTC, ETH, SOL = (PRODUCTS[symbol] for symbol in ("BTCUSD", "ETHUSD", "SOLUSD"))


@pytest.mark.parametrize("price, way, grid, expected", [
    (60_030.0, +1, 2.0, 60_030.0),          # 60,000 and 5 bp: already on the half-dollar grid
    (60_030.2, +1, 2.0, 60_030.5),
    (60_030.2, -1, 2.0, 60_030.0),
    (2_000.151, +1, 20.0, 2_000.20),
    (2_000.151, -1, 20.0, 2_000.15),
    (150.00004, +1, 10_000.0, 150.0001),
    (0.1 + 0.2, +1, 10_000.0, 0.3),         # 0.30000000000000004 is no reason to pay a tick more
])
def test_rounding_is_against_us_and_in_decimals(price, way, grid, expected):
    assert venue.round_to_tick(price, grid, way) == expected


@given(st.integers(1, 20_000_000), st.sampled_from([BTC, ETH, SOL]), st.sampled_from([0.0, 0.0005, 0.001]), st.sampled_from([1, -1]))
def test_a_slipped_price_is_on_the_grid_within_a_tick_and_never_better(hundredths, product, slippage, way):
    price, tick = hundredths / 100, Fraction(str(product.tick_size))
    filled = Fraction(str(venue.slip(price, way, slippage, venue.ticks_per_unit(product))))
    exact = Fraction(hundredths, 100) * (1 + way * Fraction(str(slippage)))
    assert filled % tick == 0 and 0 <= way * (filled - exact) < tick


@pytest.mark.parametrize("tick, density", [(0.5, 2.0), (0.05, 20.0), (0.0001, 10_000.0), (1.0, 1.0), (5.0, 0.2)])
def test_ticks_per_dollar(tick, density):
    assert venue.ticks_per_unit(Product("X", 1.0, tick, 1, 0.01, 0.005, 0.0005)) == density


def test_fee_with_gst_to_the_cent():
    rate = venue.fee_rate(BTC, Costs())                               # 0.05 % and 18 % of it: 0.059 %
    assert rate == pytest.approx(0.00059, abs=1e-15)
    assert venue.fee(60_000.0, 100, 0.001, rate) == pytest.approx(3.54)      # 6,000 USD: 3 and 0.54 of tax
    assert venue.fee(3_000.05, 7, 0.01, rate) == pytest.approx(0.123902065)  # 210.0035 USD
    assert venue.fee_rate(BTC, Costs(gst=0.0)) == 0.0005 and venue.fee_rate(SOL, Costs(gst=0.0, taker_fee=0.0002)) == 0.0002


@pytest.mark.parametrize("side, rate, cost", [(+1, 1e-4, 0.6), (-1, 1e-4, -0.6), (+1, -1e-4, -0.6), (-1, -1e-4, 0.6)])
def test_funding_is_signed_by_side(side, rate, cost):
    assert venue.funding_cost(side, 60_000.0, 100, 0.001, rate) == pytest.approx(cost)


def test_rates_are_laid_on_bars_that_open_at_the_moment():
    bars = np.array([0, 3600, 8 * 3600, 9 * 3600, 24 * 3600])
    moments, rates = np.array([-8, 0, 8, 16, 24, 32]) * 3600, np.array([9.0, 1.0, 2.0, 3.0, 4.0, 9.0])
    assert np.array_equal(venue.funding_on_bars(bars, moments, rates), [1.0, np.nan, 2.0, np.nan, 4.0], equal_nan=True)
    assert np.isnan(venue.funding_on_bars(bars, np.array([], np.int64), np.array([]))).all()
    assert len(venue.funding_on_bars(np.array([], np.int64), moments, rates)) == 0


# A long with its stop at 59,400 and its target at 61,200, five basis points of slippage; then its mirror image.
LONG = [
    ("quiet", (60_000.0, 61_199.5, 59_400.5), (NO_FILL, 0.0)),
    ("stop", (60_000.0, 60_100.0, 59_400.0), (STOP_LOSS, 59_370.0)),           # 59,400 less 29.7 is 59,370.3
    ("target", (60_000.0, 61_200.0, 59_900.0), (TAKE_PROFIT, 61_200.0)),
    ("both", (60_000.0, 61_500.0, 59_000.0), (STOP_LOSS, 59_370.0)),
    ("gap through the stop", (59_000.0, 61_500.0, 58_000.0), (STOP_LOSS, 58_970.5)),  # 59,000 less 29.5
    ("open on the stop", (59_400.0, 61_500.0, 59_400.0), (STOP_LOSS, 59_370.0)),
    ("gap beyond the target", (61_500.0, 61_600.0, 59_000.0), (TAKE_PROFIT, 61_500.0)),
    ("open on the target", (61_200.0, 61_300.0, 59_000.0), (TAKE_PROFIT, 61_200.0)),
]
SHORT = [  # stop 60,600, target 58,800
    ("quiet", (60_000.0, 60_599.5, 58_800.5), (NO_FILL, 0.0)),
    ("stop", (60_000.0, 60_600.0, 59_900.0), (STOP_LOSS, 60_630.5)),           # 60,600 and 30.3 is 60,630.3
    ("target", (60_000.0, 60_100.0, 58_800.0), (TAKE_PROFIT, 58_800.0)),
    ("both", (60_000.0, 61_000.0, 58_000.0), (STOP_LOSS, 60_630.5)),
    ("gap through the stop", (61_000.0, 62_000.0, 58_000.0), (STOP_LOSS, 61_030.5)),  # 61,000 and 30.5
    ("gap beyond the target", (58_500.0, 61_000.0, 58_400.0), (TAKE_PROFIT, 58_500.0)),
]


@pytest.mark.parametrize("name, bar, expected", LONG)
def test_what_a_bar_does_to_a_long(name, bar, expected):
    assert venue.bracket_fill(+1, 59_400.0, 61_200.0, *bar, 0.0005, 2.0) == expected


@pytest.mark.parametrize("name, bar, expected", SHORT)
def test_what_a_bar_does_to_a_short(name, bar, expected):
    assert venue.bracket_fill(-1, 60_600.0, 58_800.0, *bar, 0.0005, 2.0) == expected


def test_liquidation_by_the_exchange_sheet():
    assert venue.bankruptcy_price(+1, 60_000.0, 50.0) == 58_800.0 and venue.liquidation_price(+1, 60_000.0, 50.0, 0.0025) == 58_950.0
    assert venue.bankruptcy_price(-1, 60_000.0, 50.0) == 61_200.0 and venue.liquidation_price(-1, 60_000.0, 50.0, 0.0025) == 61_050.0
    margin, entry = 6.32987333, 94_948.1   # a captured position: one contract of 0.001, 15 times, 0.5 %
    leverage = entry * 0.001 / margin
    assert venue.bankruptcy_price(+1, entry, leverage) == pytest.approx(88_618.22667, abs=1e-5)
    assert venue.liquidation_price(+1, entry, leverage, 0.005) == pytest.approx(89_092.96717, abs=1e-5)


@pytest.mark.parametrize("stop, bar, expected", [
    (58_000.0, (60_000.0, 60_100.0, 58_950.0), (LIQUIDATION, 58_800.0)),       # touched on the extreme
    (58_000.0, (60_000.0, 60_100.0, 58_950.5), (NO_FILL, 0.0)),
    (58_000.0, (58_100.0, 58_200.0, 57_000.0), (LIQUIDATION, 58_800.0)),       # a gap below both: the margin is lost, no more
    (58_000.0, (60_000.0, 62_500.0, 58_900.0), (LIQUIDATION, 58_800.0)),       # with the target in the same bar
    (58_000.0, (62_500.0, 62_600.0, 58_900.0), (TAKE_PROFIT, 62_500.0)),       # the open was beyond the target before that
    (58_950.0, (60_000.0, 60_100.0, 58_000.0), (STOP_LOSS, 58_950.0)),         # the stop comes first, also on the same price
    (59_500.0, (58_000.0, 58_100.0, 57_000.0), (STOP_LOSS, 58_000.0)),         # and by a gap
])
def test_liquidation_is_looked_at_first_only_where_the_stop_lies_beyond(stop, bar, expected):
    assert venue.bar_fill(+1, stop, 62_000.0, 58_950.0, 58_800.0, *bar, 0.0, 2.0) == expected


def test_brackets_move_to_the_grid_away_from_the_entry():
    assert venue.bracket_prices(+1, 59_400.3, 61_200.1, 2.0) == (59_400.0, 61_200.5)
    assert venue.bracket_prices(-1, 60_600.1, 58_800.3, 2.0) == (60_600.5, 58_800.0)
    assert venue.bracket_prices(+1, 59_400.0, 61_200.5, 2.0) == (59_400.0, 61_200.5)


@pytest.mark.parametrize("wrong, words", [
    (lambda: Costs(slippage_bps=10.5), "slippage_bps: expected 0 to 10, got 10.5"), (lambda: Costs(slippage_bps=-1), "slippage_bps"),
    (lambda: Costs(slippage_bps=float("nan")), "slippage_bps"), (lambda: Costs(gst=18), "gst: expected a fraction"),
    (lambda: find_product("XBTUSD"), "symbol: expected one of BTCUSD, ETHUSD, SOLUSD, got 'XBTUSD'"),
])
def test_mistakes_are_one_clear_line(wrong, words):
    with pytest.raises(InputError, match=words) as caught:
        wrong()
    assert "\n" not in str(caught.value)


prices = st.floats(50_000.0, 70_000.0)


@settings(max_examples=300)
@given(st.sampled_from([1, -1]), prices, prices, prices, prices, prices, prices, st.sampled_from([2.0, 20.0, 10_000.0]), st.sampled_from([0.0, 0.0005, 0.001]))
def test_compiled_rules_give_the_same_bits(side, stop, target, open_, other, liquidation, bankruptcy, grid, slippage):
    bar = (open_, max(open_, other), min(open_, other))
    assert fast.bar_fill(side, stop, target, liquidation, bankruptcy, *bar, slippage, grid) == venue.bar_fill(side, stop, target, liquidation, bankruptcy, *bar, slippage, grid)
    assert fast.bracket_prices(side, stop, target, grid) == venue.bracket_prices(side, stop, target, grid)
    assert fast.fee(open_, 7, 0.001, 0.00059) == venue.fee(open_, 7, 0.001, 0.00059)
    assert fast.funding_cost(side, open_, 7, 0.001, 1e-4) == venue.funding_cost(side, open_, 7, 0.001, 1e-4)
    assert fast.liquidation_price(side, open_, 7.0, 0.0025) == venue.liquidation_price(side, open_, 7.0, 0.0025)


def double(x): return 2 * x
def triple(x): return 3 * x
def twice(x): return rule(rule(x))  # noqa: F821  (given by `compiled`)


def test_one_function_around_two_rules_is_two_machine_codes():
    two, three = fast.compiled(twice, rule=fast.compiled(double)), fast.compiled(twice, rule=fast.compiled(triple))
    assert (two(1.5), three(1.5)) == (6.0, 13.5)
    assert fast.compiled(twice, rule=two)(1.0) == 16.0 and fast.compiled(twice, rule=three)(1.0) == 81.0


def test_compiling_leaves_the_original_alone():
    before = venue.slip.__globals__["round_to_tick"]
    fast.compiled(venue.slip, round_to_tick=fast.round_to_tick)
    assert venue.slip.__globals__["round_to_tick"] is before and venue.slip.__qualname__ == "slip"


def test_a_digest_follows_every_source_file(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "inner" / "b.py").write_text("y = 1\n")
    first = fast.package_digest(tmp_path)
    (tmp_path / "_modidx.py").write_text("d = {}\n")
    assert fast.package_digest(tmp_path) == first
    (tmp_path / "inner" / "b.py").write_text("y = 2\n")
    assert fast.package_digest(tmp_path) != first


def cached_run(home) -> list[str]:
    code = ("import os, pathlib; from delta_go.market import compiled as c; assert c.slip(60_000.0, 1, 0.0005, 2.0) == 60_030.0; "
            "print(c.CACHE); print(sum(c.slip.stats.cache_hits.values())); print(os.environ['NUMBA_CACHE_DIR'])")
    return subprocess.run([sys.executable, "-c", code], env=os.environ | {"XDG_CACHE_HOME": str(home)}, capture_output=True, text=True, check=True).stdout.split()


def test_machine_code_is_kept_between_processes(tmp_path):
    folder, hits, numba_folder = cached_run(tmp_path)
    assert hits == "0" and folder == numba_folder and folder.startswith(str(tmp_path / "delta_go"))
    assert list((tmp_path / "delta_go").rglob("*.nbi"))
    assert cached_run(tmp_path)[1] == "1"


def test_a_home_that_cannot_be_written_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", os.environ["NUMBA_CACHE_DIR"])
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere/deep/cache")
    monkeypatch.setattr(fast.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(fast.os, "access", lambda path, mode: False)
    assert fast.use_cache(tmp_path).is_relative_to(tmp_path)
    monkeypatch.undo()
    fast.numba.config.reload_config()
    assert str(fast.CACHE) == fast.numba.config.CACHE_DIR
