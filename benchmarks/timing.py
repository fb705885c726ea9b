"""Times of things that are compared, measured in turns so that a slow moment of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

LEAST_TURNS = 3
"""Quartiles of fewer say little."""

Quartiles = tuple[float, float, float]


def times_in_turns(*functions: Callable[[], object], repeats: int) -> list[list[float]]:
    """Seconds of each function in each turn; every function is the first in its turn."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        _take_turn(functions, times, turn)
    return [taken[1:] for taken in times]  # the first turn warms up


def times_within(
    seconds: float, *functions: Callable[[], object], least: int = LEAST_TURNS, most: int = 400
) -> list[list[float]]:
    """The same in at least ``least`` turns, and then as many as fit into some seconds."""
    times: list[list[float]] = [[] for _ in functions]
    _take_turn(functions, [[] for _ in functions], 0)  # warms up
    end = time.perf_counter() + seconds
    while len(times[0]) < least or (time.perf_counter() < end and len(times[0]) < most):
        _take_turn(functions, times, len(times[0]))
    return times


def _take_turn(functions: Sequence[Callable[[], object]], times: list[list[float]], turn: int) -> None:
    for i in range(len(functions)):
        which = (i + turn) % len(functions)
        start = time.perf_counter()
        functions[which]()
        times[which].append(time.perf_counter() - start)


def median_seconds(*functions: Callable[[], object], repeats: int) -> list[float]:
    """Median time of each function."""
    return [statistics.median(taken) for taken in times_in_turns(*functions, repeats=repeats)]


def quartiles(values: Sequence[float]) -> Quartiles:
    """Lower quartile, median and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def quartiles_of_ratios(times: Sequence[float], others: Sequence[float]) -> Quartiles:
    """Quartiles of the ratios, turn by turn."""
    return quartiles([a / b for a, b in zip(times, others, strict=True)])
