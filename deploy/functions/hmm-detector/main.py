"""The regime detector as a Cloud Function of the second generation; entry point `detect_regime`."""
import os
from pathlib import Path

os.environ.setdefault("HMM_MODEL_DIR", str(Path(__file__).parent / "models"))
for library in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(library, "1")

from delta_go.serving.detect_regime import detect_regime  # noqa: E402, F401
