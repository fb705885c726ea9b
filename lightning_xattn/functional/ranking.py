"""How well do scores rank samples? AUROCs with the influence of each sample, from which intervals by group follow."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_xattn.core.chunks import rows_at_once
from lightning_xattn.core.ids import UNKNOWN_GROUP
from lightning_xattn.functional.intervals import (
    MINIMUM_GROUP,
    Estimate,
    grouped_proportion_interval,
    student_quantile,
    within,
)


def auroc_influence(scores: Tensor, positive: Tensor) -> tuple[float, Tensor]:
    """AUROC of a score, and the influence of each sample on it (DeLong et al. 1988).

    Parameters
    ----------
    scores
        ``(samples,)``, finite or infinite.
    positive
        ``(samples,)`` bool.

    Returns
    -------
    auroc
        P(score of a positive > score of a negative sample) + half the ties; NaN where one kind is absent.
    influence
        ``(samples,)`` float64 ``(V - AUROC) / n``, with V the share of the other kind that a sample is on the right
        side of, ties counting half, and n the number of its kind. The sum of squares is the variance of the AUROC, but
        for n in the place of n - 1.

    Examples
    --------
    >>> auroc, influence = auroc_influence(torch.tensor([0.9, 0.4, 0.5, 0.1]), torch.tensor([True, True, False, False]))
    >>> auroc, influence.tolist()
    (0.75, [0.125, -0.125, -0.125, 0.125])
    """
    scores = scores.double()
    above, below = scores[positive].sort().values, scores[~positive].sort().values
    influence = torch.zeros_like(scores)
    if not (len(above) and len(below)):
        return math.nan, torch.full_like(scores, torch.nan)
    beaten = _share_below(below, scores[positive])
    beats = 1 - _share_below(above, scores[~positive])
    auroc = float(beaten.mean())
    influence[positive] = (beaten - auroc) / len(above)
    influence[~positive] = (beats - auroc) / len(below)
    return auroc, influence


def _share_below(ascending: Tensor, scores: Tensor) -> Tensor:
    """The share of some numbers that each score is above, ties counting half."""
    below = torch.searchsorted(ascending, scores) + torch.searchsorted(ascending, scores, right=True)
    return below.double() / (2 * len(ascending))


def influence_interval(value: float, influence: Tensor, groups: Tensor | None = None) -> tuple[float, float]:
    """95 % CI of a number of which the influence of each sample is known.

    ``value -+ t(0.975, G - 1) s`` with ``s^2 = G / (G - 1) sum_g (sum of the influences of group g)^2``.

    Parameters
    ----------
    value
        The number.
    influence
        ``(samples,)``; its sum is 0.
    groups
        ``(samples,)`` int64 keys; None: each sample is its own group. Samples of `UNKNOWN_GROUP` widen the interval as
        one group does, and do not count as one.

    Returns
    -------
    low, high
        NaN with fewer than `MINIMUM_GROUP` groups, and where no sample has an influence, so that nothing varies.

    Examples
    --------
    >>> low, high = influence_interval(0.75, torch.tensor([0.125, -0.125, -0.125, 0.125, 0.0]))
    >>> round(low, 3), round(high, 3)  # t(0.975, 4) is 2.776
    (-0.026, 1.526)
    """
    sums, known = influence.double(), len(influence)
    if groups is not None:
        ids, index = groups.unique(return_inverse=True)
        sums = torch.zeros(len(ids), dtype=torch.float64).index_add(0, index, sums)
        known = count_groups(groups)
    count = len(sums)
    if known < MINIMUM_GROUP or not bool((sums != 0).any()):
        return math.nan, math.nan
    half = student_quantile(count) * math.sqrt(count / (count - 1) * float(sums.square().sum()))
    return value - half, value + half


def estimate_by_influence(
    value: float, influence: Tensor, groups: Tensor | None, limits: tuple[float, float]
) -> Estimate:
    """The number with `influence_interval`, within what it can be.

    A proportion of 0 or 1 without any variation, such as the AUROC of a probe that is never wrong, has Wilson's
    interval with the number of groups, as of a proportion in which groups count as one sample each.

    Examples
    --------
    >>> auroc, influence = auroc_influence(torch.arange(20), torch.arange(20) % 3 > 0)
    >>> estimate_by_influence(auroc, influence, groups=None, limits=(0.0, 1.0)).count
    20
    """
    low, high = within(influence_interval(value, influence, groups), limits)
    known = None if groups is None else count_groups(groups)
    if limits == (0.0, 1.0) and value in limits and not bool(influence.any()):
        each = torch.ones(len(influence) if known is None else known)
        low, high = grouped_proportion_interval(each, each * value)
    return Estimate(value, low, high, len(influence), known)


def count_groups(groups: Tensor) -> int:
    """The number of groups whose key is known, of ``(samples,)`` keys.

    Examples
    --------
    >>> count_groups(torch.tensor([3, 3, 8]))
    2
    """
    return int((groups.unique() != UNKNOWN_GROUP).sum())


def macro_auroc_influence(probabilities: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """The mean AUROC of the classes, each of its samples against all others, and the influence of each sample.

    Unlike the accuracy it does not depend on how frequent the classes are.

    Parameters
    ----------
    probabilities
        ``(samples, classes)``, or their logarithms, without NaN.
    target
        ``(samples,)`` int64 class ids.

    Returns
    -------
    auroc
        Of the classes with `MINIMUM_GROUP` samples and as many of other classes, but for those of which a sample has
        the log probability minus infinity, as its fit has not seen the class; NaN without one.
    influence
        ``(samples,)`` float64, as `auroc_influence` gives it.

    Examples
    --------
    >>> probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).repeat(5, 1)
    >>> macro_auroc_influence(probabilities, target=torch.tensor([0, 1]).repeat(5))[0]
    1.0
    """
    of_target = probabilities.gather(1, target[:, None])[:, 0]
    return macro_auroc_by_class(lambda classes: probabilities[:, classes], of_target, target, probabilities.shape[1])


def macro_auroc_by_class(
    columns: Callable[[Tensor], Tensor], of_target: Tensor, target: Tensor, n_classes: int
) -> tuple[float, Tensor]:
    """`macro_auroc_influence` of probabilities that are computed a few classes at a time.

    Parameters
    ----------
    columns
        Gets ``(classes,)`` int64 class ids, and gives the probabilities ``(samples, classes)``, or their logarithms.
    of_target
        ``(samples,)`` those of each sample's own class.
    target
        ``(samples,)`` int64 class ids.
    n_classes
        How many classes there are.

    Returns
    -------
    auroc, influence
        As `macro_auroc_influence` gives them.

    Examples
    --------
    >>> table, target = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).repeat(5, 1), torch.tensor([0, 1]).repeat(5)
    >>> macro_auroc_by_class(lambda classes: table[:, classes], table.amax(1), target, n_classes=2)[0]
    1.0
    """
    counts = target.bincount(minlength=n_classes)
    chosen = (counts >= MINIMUM_GROUP) & (len(target) - counts >= MINIMUM_GROUP)
    # Samples whose class their fit has not seen, as it is all in one fold, would come last whatever the probe knows.
    chosen[target[of_target == -math.inf]] = False
    total, influence = 0.0, torch.zeros(len(target), dtype=torch.float64)
    for classes in chosen.nonzero()[:, 0].split(rows_at_once(len(target))):
        for c, scores in zip(classes.tolist(), columns(classes).T.contiguous(), strict=True):
            auroc, one = auroc_influence(scores, target == c)
            total += auroc
            influence += one
    count = int(chosen.sum())
    return (total / count if count else math.nan), influence / count


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 10) -> float:
    """How far confidences are from accuracies: the mean over samples of their difference in bins of equal size.

    Parameters
    ----------
    confidence
        ``(samples,)`` probability of the predicted class.
    right
        ``(samples,)`` 1 where the prediction is right, else 0.
    bins
        How many bins, by the order of the confidences.

    Returns
    -------
    float
        In [0, 1], 0 is best; NaN with fewer samples than bins.

    Examples
    --------
    >>> calibration_error(torch.tensor([0.5, 0.5, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 0.0]), bins=2)
    0.25
    """
    if len(confidence) < bins:
        return math.nan
    order = confidence.argsort(stable=True)
    differences = (confidence - right)[order].double().tensor_split(bins)
    return float(sum(one.sum().abs() for one in differences)) / len(confidence)
