"The in-process adviser says what the backtest computed."
from pathlib import Path

import numpy as np
import pytest

from delta_go.domain import InputError
from delta_go.learning.advice import LocalAdviser, check_row, versions_of
from delta_go.learning.predictor import PREDICTOR_FEATURES, predict_probability
from delta_go.learning.reading import read_market
from delta_go.learning.registry import load_models
from delta_go.market.simulate import simulate_market

MODELS = Path(__file__).parent.parent / "models"


@pytest.fixture(scope="module")
def models():
    return load_models(MODELS)


@pytest.fixture(scope="module")
def market():
    return simulate_market(bars=300, seed=8).candles


def test_every_bar_has_the_bits_of_the_long_reading(models, market):
    with LocalAdviser(models) as adviser:
        for symbol, candles in market.items():
            reading = read_market(candles, models.regimes[symbol])
            chances = predict_probability(models.predictor, reading.inputs)
            for bar in range(0, len(reading), 3):
                view, advice = adviser.regime(candles[:200 + bar]), adviser.probability(symbol, reading.inputs[bar])
                assert view.posterior.tobytes() == reading.regimes.posterior[bar].tobytes()
                assert view.regime.tolist() == [reading.regimes.regime[bar]] and view.confidence.tolist() == [reading.regimes.confidence[bar]]
                assert advice.probability == chances[bar] and advice.threshold == models.predictor.threshold
                assert advice.model_version == models.manifest.version


def test_versions_name_the_set_and_its_files(models):
    versions = versions_of(models.manifest)
    assert versions["model_version"] == models.manifest.version
    assert versions["trade_predictor.pkl"] == models.manifest.files["trade_predictor.pkl"]["sha256"]
    assert set(versions) == {"model_version", *models.manifest.files}
    adviser = LocalAdviser(models)
    adviser.versions()["model_version"] = "changed"
    assert adviser.versions() == versions


def test_questions_that_cannot_be_answered(models, market):
    adviser, candles = LocalAdviser(load_models(MODELS, ["ETHUSD"])), market["BTCUSD"]
    with pytest.raises(InputError, match="expected one of ETHUSD, got BTCUSD"):
        adviser.regime(candles)
    hole = candles[np.arange(len(candles)) != 250]
    with pytest.raises(InputError, match="without a gap"):
        LocalAdviser(models).regime(hole)


@pytest.mark.parametrize("row", [np.zeros(24), np.zeros((1, 25)), np.full(25, np.inf), np.where(np.arange(25) == 8, -np.inf, 0.0)])
def test_rows_of_another_shape_or_without_end(row):
    with pytest.raises(InputError, match=r"row: expected"):
        check_row(row)


def test_rows_may_be_all_missing_and_of_any_float():
    assert np.isnan(check_row(np.full(len(PREDICTOR_FEATURES), np.nan))).all()
    assert check_row(np.ones(25, np.float32)).dtype == np.float64
