"""How sure is a mean or a proportion of samples, and of samples of which several belong to one group?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from scipy.special import stdtrit
from torch import Tensor

MINIMUM_GROUP = 5
"""With fewer samples than this nothing is claimed of them, nor with fewer groups where groups are known: no interval,
and no comparison with others."""


@dataclass(frozen=True)
class Estimate:
    """A mean, a proportion or a ratio of samples with its 95 % CI; NaN where undefined.

    Examples
    --------
    >>> Estimate(mean=0.5, low=0.4, high=0.6, count=40).groups is None
    True
    """

    mean: float
    low: float
    high: float
    count: int
    """Samples where it is defined."""
    groups: int | None = None
    """Groups of these samples; None where groups are not known."""


@lru_cache(maxsize=1024)
def student_quantile(independent: int) -> float:
    """``t(0.975, n - 1)`` of n independent samples or groups.

    Examples
    --------
    >>> round(student_quantile(5), 3)
    2.776
    """
    # An epoch asks for thousands, and scipy.stats takes 40 times as long.
    return float(stdtrit(independent - 1, 0.975))


def mean_interval(mean: float, std: float, count: int) -> tuple[float, float]:
    """95 % CI of a mean: ``mean -+ t(0.975, n - 1) std / sqrt(n)`` (Student 1908).

    It takes the samples as independent of each other, and is not cut off at the range of the number, see `within`.

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
    """95 % CI of a mean over samples of which those of one group (patient, recording) may be alike.

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


def grouped_proportion_interval(counts: Tensor, successes: Tensor) -> tuple[float, float]:
    """95 % CI of a proportion of samples of which those of one group (patient, recording) may be alike.

    Wilson's interval (1927) of ``p`` with the effective sample size ``m`` in the place of n, as for surveys (Franco et
    al. 2019), and ``q = t(0.975, G - 1)`` in that of 1.96, as in Korn and Graubard (1998)::

        (p + q^2 / 2m -+ q sqrt(p (1 - p) / m + q^2 / 4m^2)) / (1 + q^2 / m)

        m = n / max(1, d),   d = G / (G - 1) sum_g (S_g - n_g p)^2 / n^2  /  (p (1 - p) / (n - 1))

    The design effect d (Kish 1965) is the cluster-robust variance of `grouped_mean_interval` over the binomial
    variance; with one sample a group it is 1. It cannot be estimated where fewer than ``MINIMUM_GROUP`` groups have
    samples of the one kind or of the other, as at 0 and 100 %: ``m = G`` there. One wrong sample of 400 would else make
    400 independent ones of them, however alike those of a group are: of samples that correlate by 0.3 in 20 groups of
    20, of which 98 % are right, such intervals hold the truth in 84 % of the evaluations, these ones in 98 %
    (``python -m benchmarks.coverage``).

    Parameters
    ----------
    counts, successes
        ``(groups,)`` how many samples each group has, ``n_g``, and how many of them have it, ``S_g``.

    Returns
    -------
    low, high
        In [0, 1], with ``low < high``; NaN with fewer than ``MINIMUM_GROUP`` groups that have a sample.

    Examples
    --------
    >>> counts, successes = torch.full((6,), 10.0), torch.tensor([5.0, 9.0, 8.0, 9.0, 6.0, 8.0])
    >>> [round(end, 3) for end in grouped_proportion_interval(counts, successes)]  # of 45 of 60
    [0.554, 0.879]
    """
    counts, successes = counts[counts > 0].double(), successes[counts > 0].double()
    groups = len(counts)
    if groups < MINIMUM_GROUP:
        return math.nan, math.nan
    share = float(successes.sum() / counts.sum())
    with_both = min(int((successes > 0).sum()), int((successes < counts).sum()))
    if with_both < MINIMUM_GROUP:
        return _wilson(share, groups, groups)
    samples = float(counts.sum())
    by_group = groups / (groups - 1) * float((successes - counts * share).square().sum()) / samples**2
    effect = by_group * (samples - 1) / (share * (1 - share))
    return _wilson(share, samples / max(1.0, effect), groups)


def within(interval: tuple[float, float], limits: tuple[float, float]) -> tuple[float, float]:
    """The part of an interval that is possible: where the number has limits, its mean has them too.

    Cutting off what no mean can be loses no truth, so the interval stays one of 95 %.

    Parameters
    ----------
    interval
        Its ends; NaN stays.
    limits
        The smallest and the largest value that the number can have.

    Examples
    --------
    >>> within((0.924, 1.026), limits=(0.0, 1.0))
    (0.924, 1.0)
    """
    low, high = interval
    smallest, largest = limits
    # NaN is not below or above anything.
    return smallest if low < smallest else low, largest if high > largest else high


def _wilson(share: float, effective: float, independent: int) -> tuple[float, float]:
    q = student_quantile(independent)
    centre = share + q**2 / (2 * effective)
    half = q * math.sqrt(share * (1 - share) / effective + (q / (2 * effective)) ** 2)
    low, high = ((centre + sign * half) / (1 + q**2 / effective) for sign in (-1, 1))
    # Where all samples are alike one end is the limit itself, but for rounding.
    return 0.0 if share == 0 else low, 1.0 if share == 1 else high


def _around(mean: float, error: float, independent: int) -> tuple[float, float]:
    half = student_quantile(independent) * error
    return mean - half, mean + half
