"""Drift: plain summaries, known distances, honest statuses."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go.evidence import drift


def noise(rows, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(shift, 1, (rows, 1))


def status(sample, recent, **rest):
    return drift.feature_drift(drift.summarise_sample(sample, ["x"], **rest), recent, ["x"])[0]


@settings(max_examples=25)
@given(st.integers(1, 3_000), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1, 3, 24, 10_000]), st.integers(0, 99))
def test_summaries_are_plain_finite_and_whole(rows, missing, values, seed):
    rng = np.random.default_rng(seed)
    column = rng.integers(0, values, rows).astype(float)
    column[rng.random(rows) < missing] = np.nan
    summary = drift.summarise_sample(column[:, None], ["x"], stretch=100)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    known = summary["features"]["x"]
    assert np.isclose(sum(known["shares"]), float(np.isfinite(column).any())) and len(known["shares"]) == len(known["edges"]) + 1
    assert known["edges"] == sorted(set(known["edges"])) and len(known["edges"]) <= 51
    assert np.isclose(known["missing"], np.isnan(column).mean())


@pytest.mark.parametrize("shift, gap, index", [(0.25, 0.0995, 0.0625), (0.5, 0.1974, 0.25), (1.0, 0.3829, 1.0)])
def test_distances_of_shifted_normals(shift, gap, index):
    found = status(noise(100_000), noise(100_000, shift, 1))
    assert abs(found.ks - gap) < 0.01 and abs(found.psi / index - 1) < 0.15


def test_the_same_sample_is_at_no_distance():
    found = status(noise(5_000), noise(5_000))
    assert found.psi == 0 and found.ks == 0 and found.status == "stable"


def test_independent_rows_get_the_customary_limits():
    sample = noise(20_000)
    found = [status(sample, noise(3_000, shift, 2)).status for shift in (0.0, 0.4, 1.0)]
    assert found == ["stable", "watch", "drifted"]


@pytest.mark.parametrize("before, after", [(0.0, 1.0), (0.0, -1.0), (5.0, 5.0000001)])
def test_a_constant_that_changes_has_drifted(before, after):
    assert status(np.full((2_000, 1), before), np.full((720, 1), after)).status == "drifted"
    assert status(np.full((2_000, 1), before), np.full((720, 1), before)).status == "stable"


def test_few_values_are_compared_by_weight():
    sample = np.random.default_rng(0).integers(0, 2, (10_000, 1)).astype(float)
    assert status(sample, np.tile([[0.0], [1.0]], (360, 1))).status == "stable"
    assert status(sample, np.repeat([[0.0], [1.0]], [100, 620], axis=0)).status == "drifted"


def test_missing_and_too_few_are_told_apart():
    sample, recent = noise(5_000), noise(720, 0.0, 3)
    recent[::5] = np.nan
    assert status(sample, recent).status == "missing"
    sample[::5] = np.nan
    assert status(sample, recent).status == "stable"
    assert status(sample, recent[:100]).status == "too few rows"
    assert status(sample, np.full((720, 1), np.nan)).status == "missing"
    assert status(sample, np.empty((0, 1))).status == "missing"
    assert status(np.full((5_000, 1), np.nan), recent).words == "x: too few rows"


def test_waves_are_judged_by_their_own_stretches():
    rng, waves = np.random.default_rng(5), np.zeros((30_000, 1))
    for row in range(1, len(waves)):
        waves[row] = 0.995 * waves[row - 1] + rng.normal(0, 0.1)
    sample, months = waves[:15_000], waves[15_000:].reshape(-1, 750, 1)
    found = [status(sample, month) for month in months]
    assert np.mean([one.psi > 0.25 for one in found]) > 0.5 and np.mean([one.status == "drifted" for one in found]) < 0.2
    assert status(sample, months[0] + 4).status == "drifted"


@pytest.mark.parametrize("names, width", [(["y"], 1), (["x", "y"], 2), (["x"], 2)])
def test_features_of_another_model_are_refused(names, width):
    summary = drift.summarise_sample(noise(1_000), ["x"])
    with pytest.raises(InputError, match="same model"):
        drift.feature_drift(summary, np.zeros((720, width)), names)


@pytest.mark.parametrize("shape", [(0, 1), (5, 2), (5,)])
def test_a_sample_without_rows_or_names_is_refused(shape):
    with pytest.raises(InputError, match="expected rows of 1 features"):
        drift.summarise_sample(np.zeros(shape), ["x"])


def test_order_of_names_is_the_callers():
    both = np.column_stack([noise(3_000), noise(3_000, 0, 1) + 50])
    summary = drift.summarise_sample(both, ["x", "y"])
    found = drift.feature_drift(summary, both[:, ::-1], ["y", "x"])
    assert [one.feature for one in found] == ["y", "x"] and drift.worst_status(found) == "stable"


def test_the_worst_status_wins():
    rows = [drift.Drift("x", name, None, None, 0.0, 0) for name in drift.STATUSES]
    assert drift.worst_status(rows) == "missing" and drift.worst_status(rows[:2]) == "watch" and drift.worst_status([]) == "stable"
