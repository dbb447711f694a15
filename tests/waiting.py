"""Waiting in tests: no test asserts how fast a machine is, only that nobody waits for what does not come."""
from __future__ import annotations

import time
from collections.abc import Callable

SOON = 25.0     # seconds: more than any pause of a busy machine
FOREVER = 90.0  # seconds: what a peer that never answers keeps silent, so that waiting for it is seen


def wait_for(truth: Callable[[], object], seconds: float = SOON, every: float = 0.05) -> bool:
    """Whether something became true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if truth():
            return True
        time.sleep(every)
    return False
