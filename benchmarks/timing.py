"""Times of things that are compared, measured in turns so that a slow moment of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def times_in_turns(*functions: Callable[[], object], repeats: int) -> list[list[float]]:
    """Seconds of each function in each turn; every function is the first in its turn."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for i in range(len(functions)):
            which = (i + turn) % len(functions)
            start = time.perf_counter()
            functions[which]()
            times[which].append(time.perf_counter() - start)
    return [taken[1:] for taken in times]  # the first turn warms up


def median_seconds(*functions: Callable[[], object], repeats: int) -> list[float]:
    """Median time of each function."""
    return [statistics.median(taken) for taken in times_in_turns(*functions, repeats=repeats)]


def quartiles_of_ratios(times: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratios, turn by turn."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times, others, strict=True)], n=4)
    return low, middle, high
