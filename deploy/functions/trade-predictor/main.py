"""The trade predictor as a Cloud Function of the second generation; entry point `predict_trade`."""
import os
from pathlib import Path

os.environ.setdefault("TRADE_PREDICTOR_MODEL", str(Path(__file__).parent / "models" / "trade_predictor.pkl"))
for library in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(library, "1")

from delta_go.serving.predict_trade import predict_trade  # noqa: E402, F401
