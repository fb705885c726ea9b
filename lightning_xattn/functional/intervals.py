"""How sure is a mean over samples?"""

from __future__ import annotations

import math

from scipy.stats import t

MINIMUM_GROUP = 5
"""With fewer samples than this in a group nothing is claimed of it: no interval, and no comparison with another."""


def mean_interval(mean: float, std: float, count: int) -> tuple[float, float]:
    """95 % t interval of a mean: ``mean -+ t(0.975, n - 1) std / sqrt(n)`` (Student 1908).

    It takes the samples as independent of each other, and is not cut off at the range of the number.

    Parameters
    ----------
    mean, std
        Of the samples, ``std`` with n - 1.
    count
        How many there are, n.

    Returns
    -------
    low, high
        NaN with fewer than ``MINIMUM_GROUP`` samples, whose interval would reach past what the number can be.
    """
    if count < MINIMUM_GROUP:
        return math.nan, math.nan
    half = float(t.ppf(0.975, count - 1)) * std / math.sqrt(count)
    return mean - half, mean + half
