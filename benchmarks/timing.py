"""Fair timing on noisy machines: rivals take turns, the best of several rounds counts."""
from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table


def best_seconds(rivals: dict[str, Callable[[], object]], rounds: int = 7, warm_up: bool = True) -> dict[str, float]:
    """Best wall time of each rival; one warm-up each unless they are long, then they take turns."""
    for work in rivals.values() if warm_up else ():
        work()
    best = dict.fromkeys(rivals, float("inf"))
    for _ in range(rounds):
        for name, work in rivals.items():
            began = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def print_ratios(title: str, seconds: dict[str, float], ours: str, unit: str = "", amount: float = 0.0, target: str = "") -> None:
    """A table of times and of how many times slower each rival is than ours."""
    table = Table("who", "best time", *([unit] if unit else []), f"time / {ours}", title=title, caption=target, title_justify="left")
    for name, spent in sorted(seconds.items(), key=lambda item: item[1]):
        rate = [f"{amount / spent:,.0f}"] if unit else []
        table.add_row(name, f"{spent * 1e3:,.3f} ms", *rate, f"{spent / seconds[ours]:,.2f}")
    Console().print(table)
