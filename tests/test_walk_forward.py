"""Walk-forward: the same result however it is spread, folds that know only their past, and repeatable training."""
from __future__ import annotations

import numpy as np
import pytest

from delta_go.domain import InputError
from delta_go.evidence.walk_forward import WalkSettings, fold_edges, past_of, spread, walk_forward
from delta_go.learning.predictor import to_dict
from delta_go.learning.regimes import model_to_dict
from delta_go.learning.training import TrainSettings, fit_models

QUICK = WalkSettings(first_train_days=250, test_days=60, train=TrainSettings(restarts=1))


@pytest.fixture(scope="module")
def walk(case):
    return walk_forward({"BTCUSD": case.candles["BTCUSD"]}, case.payments, QUICK)


def same(one, other):
    """Two walks, bit for bit."""
    assert one.backtests.keys() == other.backtests.keys()
    for variant, result in one.backtests.items():
        assert result.equity.tobytes() == other.backtests[variant].equity.tobytes()
        assert result.closed.tobytes() == other.backtests[variant].closed.tobytes()
    assert one.scored.probability.tobytes() == other.scored.probability.tobytes()
    assert [to_dict(fold.models.predictor) for fold in one.folds] == [to_dict(fold.models.predictor) for fold in other.folds]


def test_processes_change_nothing(case, walk):
    same(walk, walk_forward({"BTCUSD": case.candles["BTCUSD"]}, case.payments, QUICK, jobs=2))


def test_a_dask_cluster_changes_nothing(case, walk):
    from distributed import Client, LocalCluster
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):
        same(walk, walk_forward({"BTCUSD": case.candles["BTCUSD"]}, case.payments, QUICK, jobs=2, backend="dask"))


def test_dask_starts_its_own_cluster():
    assert spread(divmod, [(7, 2), (9, 4)], jobs=1, backend="dask") == [(3, 1), (2, 1)]


def test_test_periods_follow_each_other_and_cover_the_rest(case, walk):
    edges = fold_edges({"BTCUSD": case.candles["BTCUSD"]}, QUICK)
    assert [(fold.start, fold.end) for fold in walk.folds] == list(zip(edges[:-1], edges[1:]))
    times = np.concatenate([fold.readings["BTCUSD"].features.time for fold in walk.folds])
    assert (np.diff(times) == 3600).all() and times[-1] == case.candles["BTCUSD"].time[-1]


def test_the_past_ends_where_the_fold_begins(case):
    moment = int(case.candles["BTCUSD"].time[3_000])
    candles, payments = past_of(case.candles, case.payments, moment)
    assert all(bars.time[-1] + bars.step == moment for bars in candles.values())
    assert all(time[-1] <= moment for time, _ in payments.values())


def test_scored_signals_ended_when_they_say(walk):
    assert (walk.scored.end > walk.scored.time).all() and np.isfinite(walk.scored.net_return).all()
    assert len(walk.scored.time) > 20


def test_training_twice_gives_the_same_models(case):
    def train(jobs):
        return fit_models({"ETHUSD": case.candles["ETHUSD"][:5_000]}, case.payments, TrainSettings(restarts=2), seed=3, jobs=jobs)
    one, other = train(1), train(2)
    assert model_to_dict(one.regimes["ETHUSD"]) == model_to_dict(other.regimes["ETHUSD"]) and to_dict(one.predictor) == to_dict(other.predictor)


def test_too_little_history_is_refused(case):
    with pytest.raises(InputError, match="expected at least 3,000 candles"):
        fit_models({"BTCUSD": case.candles["BTCUSD"][:500]}, case.payments)
    with pytest.raises(InputError, match="days"):
        fold_edges({"BTCUSD": case.candles["BTCUSD"][:500]}, QUICK)
