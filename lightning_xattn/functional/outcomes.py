"""Does a score detect errors, and how sure is a group's mean?

From histograms and sums, so nothing is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import brentq
from scipy.special import ndtri
from torch import Tensor

from lightning_xattn.core.ids import UNKNOWN_GROUP
from lightning_xattn.functional.intervals import MINIMUM_GROUP, student_quantile

Side = Literal["low", "high"]
"""Which values of a score are a sign of an error."""

INCORRECT, CORRECT, UNKNOWN = range(3)
"""Outcome of a sample; unknown without a prediction or a target."""

BINS = 2**14
"""Bins of a score's histogram over its range. Scores that share a bin count as tied: the AUROC is within 1e-4 of the
raw scores' when they spread over hundreds of bins, and nearer to 0.5 than it when they crowd in a few, as the entropies
of an untrained model may, all next to 1."""

ROUNDING = 1e-9
"""A design effect that is smaller than this is 0 but for rounding."""


@dataclass(frozen=True)
class Separation:
    """How well a score detects errors.

    Attributes
    ----------
    auroc
        P(score of an incorrect sample is nearer to ``error_side`` than that of a correct one) + half the ties, in
        [0, 1]; 0.5: chance, below: the score points the other way. NaN with fewer than ``MINIMUM_GROUP`` samples of
        either outcome, or groups where they are known.
    low, high
        95 % CI of the AUROC (Hanley & McNeil 1982, solved as Newcombe 2006), in [0, 1]; NaN where ``auroc`` is.
    correct, incorrect
        Samples with a defined score of each outcome.
    correct_groups, incorrect_groups
        How many groups (patients, recordings) these belong to; None where groups are not known.
    error_side
        Which values are a sign of an error.

    Examples
    --------
    >>> found = separation(bins=torch.tensor([0, 1]), counts=torch.tensor([[2.0, 8.0], [8.0, 2.0]]))
    >>> found.correct, found.incorrect, found.low < found.auroc < found.high
    (10, 10, True)
    """

    auroc: float
    low: float
    high: float
    correct: int
    incorrect: int
    correct_groups: int | None = None
    incorrect_groups: int | None = None
    error_side: Side = "low"


def separation(bins: Tensor, counts: Tensor, groups: Tensor | None = None, error_side: Side = "low") -> Separation:
    """How well a score detects errors, where samples of one group (patient, recording) may be alike.

    Where groups are known, their variance (Obuchowski 1997) over that by samples (DeLong 1988) is the design effect: by
    so much the variance of the interval is multiplied, and 1.96 becomes Student's quantile for the number of groups.
    With one sample a group the design effect is 1. Where a variance is not above 0 but for rounding, as that of
    outcomes whose scores do not overlap, a group counts as one sample.

    Parameters
    ----------
    bins
        ``(n,)`` int64 in [0, BINS): bins of the score, ascending.
    counts
        ``(n, 2)`` numbers of correct and incorrect samples (of the group) with a score in the bin.
    groups
        ``(n,)`` int64, any numbers; None: samples are independent. Samples of ``UNKNOWN_GROUP`` widen the interval as
        one group does, but no claim may rest on them: they are not among the groups that are counted.
    error_side
        Which values are a sign of an error: "low" ones, as of confidence, or "high" ones, as of entropy.

    Examples
    --------
    >>> found = separation(bins=torch.tensor([0, 1]), counts=torch.tensor([[2.0, 8.0], [8.0, 2.0]]))
    >>> round(found.auroc, 3)  # of 100 pairs 64 are in order, and 32 are ties
    0.8
    >>> bins, groups = torch.tensor([1] * 10 + [0] * 10), torch.arange(20)
    >>> counts = torch.tensor([[1.0, 0.0]] * 10 + [[0.0, 1.0]] * 10)  # all correct predictions have the higher score
    >>> separation(bins, counts, groups).auroc
    1.0
    >>> separation(bins, counts, groups, error_side="high").auroc
    0.0
    """
    counts = counts.double()
    bins = bins if error_side == "low" else BINS - 1 - bins
    histograms = counts.new_zeros(BINS, 2).index_add(0, bins, counts)
    sizes = int(counts[:, 0].sum()), int(counts[:, 1].sum())
    known: tuple[int | None, int | None] = None, None
    fewest = min(sizes)
    if groups is not None:
        ids, index = groups.unique(return_inverse=True)
        by_group = counts.new_zeros(len(ids), 2).index_add(0, index, counts)
        of_correct, of_incorrect = (by_group[ids != UNKNOWN_GROUP] > 0).sum(0).tolist()
        known, fewest = (of_correct, of_incorrect), min(of_correct, of_incorrect)
    if fewest < MINIMUM_GROUP:
        return Separation(torch.nan, torch.nan, torch.nan, *sizes, *known, error_side)
    correct, incorrect = histograms.unbind(1)
    # The share of the other outcome that a sample in each bin is right about: its placement (DeLong 1988).
    placements = torch.stack([_beaten(incorrect), 1 - _beaten(correct)], dim=1)
    auroc = float(correct @ placements[:, 0] / sizes[0])
    half_width = float(ndtri(0.975))
    if groups is not None:
        deviations = placements - auroc
        by_sample = (histograms * deviations**2).sum(0) / (histograms.sum(0) - 1) / histograms.sum(0)
        sums = counts.new_zeros(len(ids), 2).index_add(0, index, counts * deviations[bins]) / counts.sum(0)
        each = (by_group > 0).sum(0).double()
        both = len(by_group[by_group.sum(1) > 0])
        variance = (each / (each - 1) * sums.square().sum(0)).sum() + 2 * both / (both - 1) * sums.prod(1).sum()
        # A variance that is 0 comes out as a tiny number of either sign, and an interval of no width claims all.
        is_defined = float(variance) > ROUNDING * float(by_sample.sum()) > 0
        effect = float(variance / by_sample.sum()) if is_defined else sum(sizes) / both
        half_width = student_quantile(both) * math.sqrt(effect)
    return Separation(auroc, *_interval(auroc, *sizes, half_width), *sizes, *known, error_side)


def _beaten(histogram: Tensor) -> Tensor:
    """The share of a histogram's samples that a score in each bin is above, ties counting half."""
    return (histogram.cumsum(0) - histogram / 2) / histogram.sum()


def _interval(auroc: float, positives: int, negatives: int, half_width: float) -> tuple[float, float]:
    """The AUROCs within this number of their own standard errors (Hanley & McNeil 1982) of the one seen.

    Solving for the true value (Newcombe 2006, method 5) instead of putting the seen one into the formula keeps the
    interval from shrinking to nothing where the outcomes are few and do not overlap.
    """
    larger = (positives + negatives) / 2 - 1

    def excess(true: float) -> float:
        variance = true * (1 - true) * (1 + larger * ((1 - true) / (2 - true) + true / (1 + true)))
        return float((auroc - true) ** 2 - half_width**2 * variance / (positives * negatives))

    # 0 and 1 solve the equation trivially where they are what was seen: stay just inside of them.
    low = brentq(excess, 0.0, min(auroc, 1 - 1e-9)) if auroc > 0 else 0.0
    high = brentq(excess, max(auroc, 1e-9), 1.0) if auroc < 1 else 1.0
    return low, high


def class_adjusted_gap(counts: Tensor, sums: Tensor) -> float:
    """Mean over classes of (mean of the correct - mean of the incorrect samples within the class).

    Classes differ in accuracy and in attention, and that alone makes an overall gap: this one is free of it.

    Parameters
    ----------
    counts, sums
        ``(classes, 2)``, outcomes (correct, incorrect), of the defined scores.

    Returns
    -------
    float
        NaN when no class has both outcomes.

    Examples
    --------
    >>> class_adjusted_gap(counts=torch.tensor([[4.0, 4.0]]), sums=torch.tensor([[3.0, 2.0]]))
    0.25
    """
    within = (sums / counts) @ sums.new_tensor([1.0, -1.0])
    return float(within.nanmean())
