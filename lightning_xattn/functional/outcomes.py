"""Does a score differ between correct and incorrect predictions, and how sure is a group's mean?

From histograms and sums, so nothing is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from lightning_xattn.functional.intervals import MINIMUM_GROUP

BINS = 2**14
"""Bins of a score's histogram over its range. Scores that share a bin count as tied: the AUROC is within 1e-4 of the
raw scores' when they spread over hundreds of bins, and nearer to 0.5 than it when they crowd in a few, as the entropies
of an untrained model may, all next to 1."""


@dataclass(frozen=True)
class Separation:
    """How well a score tells correct predictions from incorrect ones.

    Attributes
    ----------
    auroc
        P(score of a correct sample > score of an incorrect one) + half the ties, in [0, 1]; 0.5: not at all.
        NaN with fewer than ``MINIMUM_GROUP`` samples in either group.
    low, high
        95 % interval of the AUROC (Hanley & McNeil 1982, solved as Newcombe 2006), in [0, 1]; NaN where ``auroc`` is.
    correct, incorrect
        Samples with a defined score in each group.
    """

    auroc: float
    low: float
    high: float
    correct: int
    incorrect: int

    @property
    def cliffs_delta(self) -> float:
        """``2 auroc - 1`` in [-1, 1]."""
        return 2 * self.auroc - 1


def score_bins(scores: Tensor, low: float, high: float) -> Tensor:
    """Bin of each score in ``BINS`` equal bins over [low, high]; an undefined score has bin 0, so mask it out.

    Parameters
    ----------
    scores
        Any shape, float.

    Returns
    -------
    Tensor
        int64, same shape, in [0, BINS).
    """
    position = (scores.nan_to_num(nan=low) - low) * (BINS / (high - low))
    return position.long().clamp(0, BINS - 1)


def separation(correct: Tensor, incorrect: Tensor) -> Separation:
    """AUROC of a score with its 95 % interval, from one histogram an outcome.

    Parameters
    ----------
    correct, incorrect
        ``(bins,)`` counts over the same bins, ascending scores.
    """
    correct, incorrect = correct.double(), incorrect.double()
    n_correct, n_incorrect = correct.sum(), incorrect.sum()
    sizes = int(n_correct), int(n_incorrect)
    if min(sizes) < MINIMUM_GROUP:
        return Separation(torch.nan, torch.nan, torch.nan, *sizes)

    # The share of the incorrect samples that a score beats, ties counting half.
    beats = (incorrect.cumsum(0) - incorrect / 2) / n_incorrect
    auroc = float((correct * beats).sum() / n_correct)
    return Separation(auroc, *_interval(auroc, *sizes), *sizes)


def _interval(auroc: float, positives: int, negatives: int) -> tuple[float, float]:
    """The AUROCs that 1.96 of their own standard errors (Hanley & McNeil 1982) do not separate from the one seen.

    Solving for the true value (Newcombe 2006, method 5) instead of putting the seen one into the formula keeps the
    interval from shrinking to nothing where the groups are small and do not overlap.
    """
    z = norm.ppf(0.975)
    larger = (positives + negatives) / 2 - 1

    def excess(true: float) -> float:
        variance = true * (1 - true) * (1 + larger * ((1 - true) / (2 - true) + true / (1 + true)))
        return float((auroc - true) ** 2 - z**2 * variance / (positives * negatives))

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
    """
    within = (sums / counts) @ sums.new_tensor([1.0, -1.0])
    return float(within.nanmean())
