"""Unrolled trees answer and explain as XGBoost does."""
import json

import numpy as np
import pytest
import xgboost
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go.learning.trees import explain_margin, load_trees, predict_margin


def fit(seed, depth=3, rounds=30, inputs=6, rows=600, **extra):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    x[:, 0] = rng.integers(-8, 9, rows)
    y = (rng.random(rows) < 1 / (1 + np.exp(np.nan_to_num(x[:, 1]) * np.nan_to_num(x[:, 2])))).astype(np.float32)
    wishes = dict(objective="binary:logitraw", base_score=-0.3, max_depth=depth, eta=0.2, tree_method="hist", nthread=1, seed=seed)
    booster = xgboost.train({**wishes, **extra}, xgboost.DMatrix(x, y, nthread=1), rounds)
    return booster, bytes(booster.save_raw("json")), x


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 25), st.sampled_from([0.6, 1.0]))
@settings(max_examples=12)
def test_margins_equal_xgboost_to_the_last_bit(seed, depth, rounds, share):
    booster, raw, x = fit(seed, depth, rounds, subsample=share, colsample_bytree=share)
    theirs = booster.inplace_predict(x, predict_type="margin")
    assert np.array_equal(predict_margin(raw, x), theirs)
    assert all(predict_margin(raw, x[i:i + 1])[0] == theirs[i] for i in range(0, 600, 37))
    assert np.array_equal(predict_margin(raw, x.astype(float)), theirs)


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 25))
@settings(max_examples=12)
def test_contributions_equal_xgboost_and_sum_to_the_margin(seed, depth, rounds):
    booster, raw, x = fit(seed, depth, rounds)
    ours = explain_margin(raw, x[:200])
    theirs = booster.predict(xgboost.DMatrix(x[:200], nthread=1), pred_contribs=True)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert all(np.array_equal(explain_margin(raw, x[i:i + 1])[0], ours[i]) for i in range(0, 200, 23))
    np.testing.assert_allclose(ours.sum(axis=1), predict_margin(raw, x[:200]), atol=2e-5)


def test_values_that_sit_on_a_split_and_missing_rows():
    booster, raw, _ = fit(1)
    trees = load_trees(raw)
    inner = trees.child[:, 0] != np.arange(len(trees.value))
    rows = np.full((inner.sum(), trees.inputs), np.nan, np.float32)
    rows[np.arange(len(rows)), trees.column[inner]] = trees.value[inner]
    rows = np.concatenate([rows, np.nextafter(rows, np.float32(-np.inf)), np.full((1, trees.inputs), np.nan, np.float32)])
    assert np.array_equal(predict_margin(raw, rows), booster.inplace_predict(rows, predict_type="margin"))


def test_no_rows_give_no_answers():
    _, raw, x = fit(0)
    assert predict_margin(raw, x[:0]).shape == (0,) and explain_margin(raw, x[:0]).shape == (0, 7)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b"[]", b"null", b'{"learner": {"objective": {"name": "reg:squarederror"}}}'])
def test_what_is_no_model_is_refused(data):
    with pytest.raises(InputError, match="booster: expected"):
        load_trees(data)


def test_another_objective_and_another_width_are_refused():
    _, raw, x = fit(0)
    other = json.loads(raw)
    other["learner"]["objective"]["name"] = "binary:logistic"
    with pytest.raises(InputError, match="binary:logistic"):
        load_trees(json.dumps(other).encode())
    with pytest.raises(InputError, match="6 columns"):
        predict_margin(raw, x[:, :4])
