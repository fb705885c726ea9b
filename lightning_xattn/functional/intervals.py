"""How sure is a mean over samples, and over samples of which several belong to one group?"""

from __future__ import annotations

import math

from scipy.stats import t
from torch import Tensor

MINIMUM_GROUP = 5
"""With fewer samples than this nothing is claimed of them, nor with fewer groups where groups are known: no interval,
and no comparison with others."""


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

    Examples
    --------
    >>> [round(end, 3) for end in mean_interval(mean=0.5, std=0.1, count=25)]  # t(0.975, 24) is 2.064
    [0.459, 0.541]
    """
    if count < MINIMUM_GROUP:
        return math.nan, math.nan
    return _around(mean, std / math.sqrt(count), count)


def grouped_mean_interval(counts: Tensor, sums: Tensor) -> tuple[float, float]:
    """95 % interval of a mean over samples of which those of one group (patient, recording) may be alike.

    ``mean -+ t(0.975, G - 1) s`` with the cluster-robust variance ``s^2 = G / (G - 1) sum_g (S_g - n_g mean)^2 / n^2``
    (Liang and Zeger 1986). With one sample a group it is `mean_interval`.

    Parameters
    ----------
    counts, sums
        ``(groups,)`` how many samples each group has, ``n_g``, and the sum of their numbers, ``S_g``.

    Returns
    -------
    low, high
        NaN with fewer than ``MINIMUM_GROUP`` groups that have a sample.

    Examples
    --------
    >>> counts, sums = torch.ones(5), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    >>> [round(end, 3) for end in grouped_mean_interval(counts, sums)]  # 3 -+ 2.776 * 1.581 / 5 ** 0.5
    [1.037, 4.963]
    """
    counts, sums = counts[counts > 0].double(), sums[counts > 0].double()
    groups = len(counts)
    if groups < MINIMUM_GROUP:
        return math.nan, math.nan
    mean = sums.sum() / counts.sum()
    variance = groups / (groups - 1) * (sums - counts * mean).square().sum() / counts.sum() ** 2
    return _around(float(mean), math.sqrt(variance), groups)


def _around(mean: float, error: float, independent: int) -> tuple[float, float]:
    half = float(t.ppf(0.975, independent - 1)) * error
    return mean - half, mean + half
