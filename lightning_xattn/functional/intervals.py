"""How sure is a mean over samples?"""

from __future__ import annotations

import math

from scipy.stats import t


def mean_interval(count: int, mean: float, std: float) -> tuple[float, float]:
    """95 % interval of a mean (Student's t): ``mean`` minus and plus ``t * std / sqrt(count)``.

    Parameters
    ----------
    count
        Number of samples behind the mean.
    mean, std
        Their mean and standard deviation (with n - 1).

    Returns
    -------
    low, high
        NaN for fewer than two samples.
    """
    if count < 2:
        return math.nan, math.nan
    half = float(t.ppf(0.975, count - 1)) * std / math.sqrt(count)
    return mean - half, mean + half
