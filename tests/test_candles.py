"The doors of market.candles: what is found, refused, repaired, and what a window may trust."
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go.market.candles import (
    COLUMNS,
    RESOLUTIONS,
    Candles,
    candles_from_columns,
    check_candles,
    closed,
    columns_of,
    contiguous,
    find_faults,
    from_frame,
    repair_candles,
    resample,
    resolution_of,
    show_time,
    step_of,
    to_frame,
)

STEP = 3600


def make_candles(rows=200, seed=0, step=STEP, start=1_600_000_000):
    "A plausible random walk without faults."
    rng = np.random.default_rng(seed)
    close = 30_000 * np.exp(np.cumsum(rng.normal(0, .004, rows)))
    opened = np.append(30_000.0, close[:-1])
    high = np.maximum(opened, close) * (1 + rng.random(rows) * .002)
    low = np.minimum(opened, close) * (1 - rng.random(rows) * .002)
    return Candles("BTCUSD", step, start // step * step + step * np.arange(rows), opened, high, low, close, rng.integers(0, 500, rows) * 1.0)


def kinds(candles, now=None):
    return {fault.kind: fault.rows for fault in find_faults(columns_of(candles), candles.step, now)}


def spoil(candles, **cells):
    "Copies of columns with single cells changed: high={3: nan}."
    columns = {name: getattr(candles, name).copy() for name in cells}
    for name, changes in cells.items():
        for row, value in changes.items():
            columns[name][row] = value
    return replace(candles, **columns)


GOOD = make_candles()


@pytest.mark.parametrize("bad, kind, rows", [
    (spoil(GOOD, high={7: np.nan}), "not_finite", (7,)),
    (spoil(GOOD, volume={0: np.inf}), "not_finite", (0,)),
    (spoil(GOOD, open={3: 0.0}, low={3: 0.0}), "not_positive", (3,)),
    (spoil(GOOD, volume={199: -1.0}), "negative_volume", (199,)),
    (spoil(GOOD, high={5: 1.0}, low={9: 1e9}), "high_below_low", (5, 9)),
    (spoil(GOOD, close={11: GOOD.high[11] * 1.01}), "outside_range", (11,)),
    (spoil(GOOD, time={20: GOOD.time[19]}), "duplicate", (20,)),
    (spoil(GOOD, time={20: GOOD.time[20] + 1}), "misaligned", (20,)),
    (GOOD[np.r_[0:50, 60:200]], "gap", (50,)),
    (GOOD[np.r_[0:50, 51, 50, 52:200]], "disorder", (51,)),
])
def test_each_fault_is_found_in_its_rows_and_refused(bad, kind, rows):
    assert kinds(bad)[kind] == rows
    with pytest.raises(InputError, match=r"^BTCUSD 1h: .*row.* Cure: "):
        check_candles(bad)


def test_good_candles_pass_untouched():
    assert kinds(GOOD) == {} and check_candles(GOOD) is GOOD
    assert check_candles(GOOD, now=GOOD.time[-1] + STEP) is GOOD


def test_unclosed_bars_need_a_clock():
    assert kinds(GOOD, now=GOOD.time[-1] + STEP - 1) == {"unclosed": (199,)}
    assert len(closed(GOOD, GOOD.time[-1] + STEP - 1)) == 199
    assert len(closed(GOOD, GOOD.time[-1] + STEP)) == 200
    assert len(closed(GOOD, 0)) == 0


@pytest.mark.parametrize("claimed, words", [(300, "3600 seconds apart, expected 300"), (86400, "3600 seconds apart, expected 86400")])
def test_wrong_step_is_one_sentence(claimed, words):
    wrong = replace(GOOD, step=claimed)
    assert set(kinds(wrong)) == {"wrong_step"}
    for door in (check_candles, repair_candles):
        with pytest.raises(InputError, match=words):
            door(wrong)


@pytest.mark.parametrize("scale, unit", [(10**3, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")])
def test_other_units_of_time_are_named(scale, unit):
    with pytest.raises(InputError, match=unit):
        check_candles(spoil(replace(GOOD, time=GOOD.time * scale), high={3: np.nan}))


@pytest.mark.parametrize("first, second", [("high", "low"), ("open", "volume"), ("low", "volume"), ("high", "volume"), ("close", "high")])
def test_swapped_columns_are_named(first, second):
    columns = columns_of(GOOD)
    columns[first], columns[second] = columns[second], columns[first]
    with pytest.raises(InputError, match=f"({first} and {second}|{second} and {first}|changed places|another order)"):
        candles_from_columns("BTCUSD", "1h", columns)
    with pytest.raises(InputError, match="no repair can mend"):
        repair_candles(Candles("BTCUSD", STEP, **columns))


def test_swapped_high_and_low_are_named_exactly():
    with pytest.raises(InputError, match="columns high and low"):
        candles_from_columns("BTCUSD", "1h", columns_of(GOOD) | {"high": GOOD.low, "low": GOOD.high})


@pytest.mark.parametrize("columns, words", [
    ({name: [] for name in COLUMNS}, "empty table"),
    ({}, "missing time, open, high, low, close, volume, found none"),
    ({name: [1.0] for name in COLUMNS if name != "close"}, "missing close"),
    (columns_of(GOOD) | {"close": ["x"] * 200}, "BTCUSD 1h: expected numbers in close, got 'x'"),
    (columns_of(GOOD) | {"time": GOOD.time + .5}, "whole seconds"),
    (columns_of(GOOD) | {"time": np.where(GOOD.time > 0, np.nan, 0)}, "whole seconds"),
    (columns_of(GOOD) | {"volume": [1.0]}, "different lengths"),
])
def test_columns_are_checked_at_the_door(columns, words):
    with pytest.raises(InputError, match=words):
        candles_from_columns("BTCUSD", "1h", columns)


def test_columns_of_integers_and_floats_get_their_types():
    made = candles_from_columns("X", "1h", {name: np.array([3600, 7200]) for name in COLUMNS})
    assert made.time.dtype == np.int64 and all(getattr(made, name).dtype == np.float64 for name in COLUMNS[1:])
    assert candles_from_columns("X", "1h", {"time": [3600.0], **{name: ["5"] for name in COLUMNS[1:]}}).close[0] == 5


def test_unknown_resolution_lists_the_known():
    with pytest.raises(InputError, match="1m, 3m, 5m, 15m"):
        step_of("7m")
    with pytest.raises(InputError, match=r"3600 \(1h\)"):
        resolution_of(61)
    assert {resolution_of(step): step for step in RESOLUTIONS.values()} == RESOLUTIONS


def test_show_time_survives_any_number():
    assert show_time(0) == "1970-01-01 00:00" and show_time(10**17) == str(10**17)


def test_frames_go_there_and_back():
    for frame in (to_frame(GOOD), to_frame(GOOD).reset_index(), to_frame(GOOD).tz_convert("Asia/Kolkata")):
        again = from_frame("BTCUSD", "1h", frame)
        assert all(np.array_equal(getattr(again, name), getattr(GOOD, name)) for name in COLUMNS)


@st.composite
def damaged(draw):
    "Good candles, then rows dropped, doubled, shuffled, and cells spoilt; remembers nothing of it."
    candles = make_candles(40, seed=draw(st.integers(0, 5)))
    keep = np.array(sorted(draw(st.sets(st.integers(0, 39), min_size=25))))
    rows = np.concatenate([keep, draw(st.lists(st.sampled_from(list(keep)), max_size=5))]).astype(int)
    candles = candles[np.array(draw(st.permutations(list(rows))))]
    bad = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -1.0, 1e12, 1e-3])
    cells = draw(st.lists(st.tuples(st.sampled_from(COLUMNS[1:]), st.integers(0, len(rows) - 1), bad), max_size=6))
    for name, row, value in cells:
        candles = spoil(candles, **{name: {row: value}})
    for row in draw(st.lists(st.integers(0, len(rows) - 1), max_size=2)):
        candles = spoil(candles, time={row: candles.time[row] + 7})
    return candles


@settings(max_examples=60)
@given(damaged(), st.booleans())
def test_repair_leaves_only_gaps_and_invents_nothing(candles, with_clock):
    now = int(candles.time.max()) if with_clock else None
    mended, done = repair_candles(candles, now)
    assert set(kinds(mended, now)) <= {"gap"}
    given_rows = set(zip(*(getattr(candles, name).tolist() for name in COLUMNS)))
    assert set(zip(*(getattr(mended, name).tolist() for name in COLUMNS))) <= given_rows
    assert bool(done) == bool(set(kinds(candles, now)) - {"gap"})
    assert repair_candles(mended, now)[1] == []


def test_repair_keeps_the_last_of_two_and_a_good_one_before_a_bad_one():
    twice = GOOD[np.array([0, 1, 1, 2, 2])]
    twice = spoil(twice, volume={2: 77.0}, high={4: np.nan})
    mended, done = repair_candles(twice)
    assert mended.volume.tolist() == [GOOD.volume[0], 77.0, GOOD.volume[2]]
    assert len(done) == 2


@settings(max_examples=60)
@given(st.sets(st.integers(0, 60), min_size=1), st.integers(1, 12))
def test_contiguous_is_a_function_of_each_window(slots, length):
    time = np.array(sorted(slots)) * STEP
    answer = contiguous(time, STEP, length)
    windows = [time[end - length:end] for end in range(length, len(time) + 1)]
    assert len(answer) == max(len(time) - length + 1, 0)
    assert answer.tolist() == [bool((np.diff(window) == STEP).all()) for window in windows]
    assert answer.tolist() == [bool(contiguous(window, STEP, length)[0]) for window in windows]


@settings(max_examples=30)
@given(st.sets(st.integers(0, 119), min_size=1), st.sampled_from([2, 3, 4, 12]))
def test_resampled_bars_are_complete_and_right(slots, factor):
    fine = make_candles(120, step=300, start=1_600_000_000 // 3600 * 3600)[np.array(sorted(slots))]
    coarse = resample(fine, 300 * factor)
    expected = [slot for slot in sorted(set(fine.time // (300 * factor))) if (fine.time // (300 * factor) == slot).sum() == factor]
    assert (coarse.time // (300 * factor)).tolist() == expected and coarse.step == 300 * factor
    for row, start in enumerate(coarse.time):
        part = fine[(fine.time >= start) & (fine.time < start + 300 * factor)]
        assert (coarse.open[row], coarse.close[row]) == (part.open[0], part.close[-1])
        assert (coarse.high[row], coarse.low[row]) == (part.high.max(), part.low.min())
        assert coarse.volume[row] == pytest.approx(part.volume.sum())
    assert kinds(coarse).keys() <= {"gap", "wrong_step"}


def test_inference_does_not_import_pandas():
    import subprocess
    import sys
    code = "import sys, delta_go.market.candles; print(sorted({'pandas', 'pyarrow', 'scipy', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
