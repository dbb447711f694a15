"""Folds never leak a label, and uniqueness is what its definition says."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delta_go.domain import InputError
from delta_go.learning.splits import (
    average_uniqueness, calendar_edges, check_spans, label_edges, uniqueness_weights, walk_forward)


@st.composite
def spans(draw, least=8, most=60):
    size = draw(st.integers(least, most))
    start = np.array(draw(st.lists(st.integers(0, 500), min_size=size, max_size=size)))
    held = np.array(draw(st.lists(st.integers(1, 80), min_size=size, max_size=size)))
    return start, start + held


@given(spans(), st.integers(1, 6), st.integers(0, 60), st.none() | st.integers(1, 300))
@settings(max_examples=150)
def test_no_training_label_reaches_the_test(pair, count, embargo, memory):
    start, end = pair
    for fold in walk_forward(start, end, label_edges(start, count), embargo, memory):
        assert (end[fold.train] + embargo <= fold.test_start).all()
        assert (start[fold.test] >= fold.test_start).all() and (start[fold.test] < fold.test_end).all()
        overlap = (start[fold.train][:, None] < end[fold.test]) & (start[fold.test] < end[fold.train][:, None])
        assert not overlap.any()
        if memory is not None:
            assert (start[fold.train] >= fold.test_start - memory).all()


@given(spans(), st.integers(0, 60))
@settings(max_examples=80)
def test_every_clean_label_is_trained_on_and_every_late_one_tested(pair, embargo):
    start, end = pair
    edges = label_edges(start, 4)
    folds = walk_forward(start, end, edges, embargo)
    tested = np.concatenate([fold.test for fold in folds])
    assert sorted(tested) == list(np.flatnonzero(start >= edges[0]))
    for fold in folds:
        assert len(fold.train) == (end + embargo <= fold.test_start).sum()


@given(spans(), st.randoms())
@settings(max_examples=50)
def test_order_of_labels_does_not_matter(pair, random):
    start, end = pair
    order = np.array(random.sample(range(len(start)), len(start)))
    shuffled = walk_forward(start[order], end[order], label_edges(start[order], 3), 5)
    for fold, other in zip(walk_forward(start, end, label_edges(start, 3), 5), shuffled):
        assert sorted(order[other.train]) == list(fold.train) and sorted(order[other.test]) == list(fold.test)
    np.testing.assert_allclose(average_uniqueness(start[order], end[order]), average_uniqueness(start, end)[order])


@given(spans())
@settings(max_examples=80)
def test_uniqueness_is_its_definition(pair):
    start, end = pair
    clock = np.arange(600)
    alive = (clock >= start[:, None]) & (clock < end[:, None])
    plain = [(1 / alive.sum(0)[row]).mean() for row in alive]
    np.testing.assert_allclose(average_uniqueness(start, end), plain, rtol=1e-12)


@given(spans(), st.integers(1, 10**9), st.integers(1, 3600))
@settings(max_examples=50)
def test_uniqueness_forgets_the_calendar(pair, shift, scale):
    start, end = pair
    np.testing.assert_allclose(
        average_uniqueness(start * scale + shift, end * scale + shift), average_uniqueness(start, end), rtol=1e-9)


@given(spans())
@settings(max_examples=50)
def test_groups_are_strangers(pair):
    start, end = pair
    twice = average_uniqueness(np.tile(start, 2), np.tile(end, 2), np.repeat(["BTCUSD", "ETHUSD"], len(start)))
    np.testing.assert_allclose(twice, np.tile(average_uniqueness(start, end), 2))
    assert np.isclose(uniqueness_weights(start, end).mean(), 1)


def test_folds_by_labels_are_balanced():
    start = np.sort(np.random.default_rng(0).integers(0, 10**6, 1000))
    edges = label_edges(start, 5, head=.25)
    counts = [((start >= a) & (start < b)).sum() for a, b in zip(edges[:-1], edges[1:])]
    assert len(counts) == 5 and max(counts) - min(counts) <= 3


@given(st.integers(0, 10**9), st.integers(100, 10**8), st.integers(1, 12))
@settings(max_examples=50)
def test_calendar_edges_end_where_the_data_ends(first, length, folds):
    edges = calendar_edges(first, first + length, folds)
    assert len(edges) == folds + 1 and edges[0] > first and edges[-1] == first + length
    assert np.ptp(np.diff(edges)) <= 1


def test_labels_that_start_together_make_fewer_folds():
    edges = label_edges(np.full(40, 7), 4)
    assert list(edges) == [7, 8]


@pytest.mark.parametrize("call, words", [
    (lambda: check_spans(np.array([5, 6]), np.array([6, 6])), "label 1:"),
    (lambda: check_spans(np.array([5]), np.array([6, 7])), "one length"),
    (lambda: label_edges(np.array([]), 3), "0 labels"),
    (lambda: calendar_edges(10, 10, 3), "time that passes"),
    (lambda: walk_forward(np.array([1]), np.array([2]), np.array([3, 3])), "ascending"),
    (lambda: walk_forward(np.array([1]), np.array([2]), np.array([1, 3]), -1), "embargo -1"),
])
def test_bad_spans_and_edges_are_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_empty_labels_weigh_nothing():
    assert len(uniqueness_weights(np.array([], int), np.array([], int))) == 0
