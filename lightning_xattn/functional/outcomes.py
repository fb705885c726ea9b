"""Does a score differ between correct and incorrect predictions? From histograms and sums, so nothing is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import norm
from torch import Tensor

BINS = 2**14
"""Bins of a score's histogram over its range: fine enough for an AUROC within 1e-4 of the raw scores'."""

MINIMUM_GROUP = 5
"""With fewer samples than this in either group nothing is claimed."""


@dataclass(frozen=True)
class Separation:
    """How well a score tells correct predictions from incorrect ones.

    Attributes
    ----------
    auroc
        P(score of a correct sample > score of an incorrect one) + half the ties, in [0, 1]; 0.5: not at all.
        NaN with fewer than ``MINIMUM_GROUP`` samples in either group.
    low, high
        95 % interval of the AUROC (DeLong et al. 1988), clipped to [0, 1]; NaN where ``auroc`` is.
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
    """AUROC of a score with its DeLong interval, from one histogram an outcome.

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

    # Placement of a score: the share of the other group that it beats, ties counting half.
    beats_incorrect = (incorrect.cumsum(0) - incorrect / 2) / n_incorrect
    beaten_by_correct = 1 - (correct.cumsum(0) - correct / 2) / n_correct
    auroc = (correct * beats_incorrect).sum() / n_correct
    variance = (correct * (beats_incorrect - auroc) ** 2).sum() / (n_correct - 1) / n_correct
    variance += (incorrect * (beaten_by_correct - auroc) ** 2).sum() / (n_incorrect - 1) / n_incorrect
    margin = float(norm.ppf(0.975)) * float(variance.sqrt())
    value = float(auroc)
    return Separation(value, max(0.0, value - margin), min(1.0, value + margin), *sizes)


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
