"""A small simulated market and models fitted on its first half, shared by the tests that need both."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from delta_go.learning.predictor_fit import FitSettings
from delta_go.learning.training import TrainedModels, TrainSettings, fit_models
from delta_go.market.candles import Candles
from delta_go.market.simulate import simulate_market

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault
settings.load_profile("unhurried")


@dataclass(frozen=True)
class Case:
    """Candles and funding of three symbols, and models that saw the first half only."""
    candles: dict[str, Candles]
    payments: dict[str, tuple[np.ndarray, np.ndarray]]
    models: TrainedModels
    half: int

    def later(self, symbol: str) -> Candles:
        """The half that the models never saw."""
        return self.candles[symbol][self.half:]


@pytest.fixture(scope="session")
def case() -> Case:
    """Three symbols, 9,000 hours."""
    market, half = simulate_market(bars=9_000, seed=11), 5_000
    payments = {symbol: (funding.time, funding.rate) for symbol, funding in market.funding.items()}
    models = fit_models({symbol: bars[:half] for symbol, bars in market.candles.items()}, payments, TrainSettings(restarts=2, predictor=FitSettings(confidence=0.95)))
    return Case(market.candles, payments, models, half)
