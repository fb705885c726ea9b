"""Which temperature makes a classifier's scores probabilities? That with the smallest log loss (Guo et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_xattn.core import chunks

LEAST_FACTOR, PRECISION = 0.01, 1e-7
"""The smallest factor of `inverse_temperature`, and how precise it is."""

NEAR = 1e-4
"""Where a step of Newton's method changes less than this part, what it gives is as precise as `PRECISION`."""

_RULED_OUT = -1e100
"""In the place of minus infinity: its exponential is 0, and its square is a number."""


def inverse_temperature(scores: Tensor, target: Tensor) -> float:
    """The factor of scores at which their softmax has the smallest log loss (temperature scaling, Guo et al. 2017).

    Parameters
    ----------
    scores
        ``(samples, classes)`` float64 of samples that no fit of them has seen; minus infinity rules a class out.
    target
        ``(samples,)`` int64 class ids. Samples whose class is ruled out, or with NaN, do not count.

    Returns
    -------
    float
        In [0.01, 1]; 1 without a sample. Scores are not sharpened: samples that are all right would do so without end.

    Examples
    --------
    >>> scores = torch.tensor([[2.0, 0.0]] * 4).double()  # right for three of four: 0.55 * 2 is ln 3
    >>> round(inverse_temperature(scores, target=torch.tensor([0, 0, 0, 1])), 2)
    0.55
    """
    rows = chunks.rows_at_once(scores.shape[1])
    blocks = [ScoredSamples(one[:, None], own) for one, own in zip(scores.split(rows), target.split(rows), strict=True)]
    return float(inverse_temperatures(lambda: blocks, torch.ones(1).double()))


class ScoredSamples:
    """Scores of some samples by several fits, each with its own factor.

    Parameters
    ----------
    scores
        ``(samples, fits, classes)``.
    target
        ``(samples,)``.
    counts
        ``(samples, fits)`` bool, which of them count; None: all.

    Examples
    --------
    >>> block = ScoredSamples(torch.tensor([[[2.0, 0.0]]]).double(), target=torch.tensor([0]))
    >>> block.derive(torch.zeros(1).double())[0].tolist()  # both classes are as likely
    [-1.0]
    """

    def __init__(self, scores: Tensor, target: Tensor, counts: Tensor | None = None) -> None:
        of_class = scores.gather(2, target[:, None, None].expand(-1, scores.shape[1], 1))[..., 0]
        known = of_class.isfinite() if counts is None else counts & of_class.isfinite()
        # Scores that are all 0 change no slope.
        self._scores = torch.where(known[..., None], scores - scores.amax(2, keepdim=True), 0).clamp_min_(_RULED_OUT)
        self._of_class = torch.where(known, of_class - scores.amax(2), 0)

    def derive(self, factors: Tensor) -> Tensor:
        """``(2, fits)`` the first and second derivative of the sum of log losses by the factors, ``(fits,)``."""
        # There may be many scores: each term is made in the place of the one before.
        terms = (factors[:, None] * self._scores).exp_()
        whole = terms.sum(2)
        expected = terms.mul_(self._scores).sum(2) / whole
        squared = terms.mul_(self._scores).sum(2) / whole
        return torch.stack([(expected - self._of_class).sum(0), (squared - expected.square()).sum(0)])


def inverse_temperatures(blocks: Callable[[], Iterable[ScoredSamples]], first: Tensor) -> Tensor:
    """`inverse_temperature` of several fits, of samples in blocks.

    Parameters
    ----------
    blocks
        Gives the blocks, in each step anew.
    first
        ``(fits,)`` float64 factors to start from: the nearer, the fewer steps.

    Returns
    -------
    Tensor
        ``(fits,)`` float64.

    Examples
    --------
    >>> scores = torch.tensor([[[2.0, 0.0], [4.0, 0.0]]] * 4).double()  # of two fits
    >>> block = ScoredSamples(scores, target=torch.tensor([0, 0, 0, 1]))
    >>> [round(one, 2) for one in inverse_temperatures(lambda: [block], torch.ones(2).double()).tolist()]
    [0.55, 0.27]
    """
    low, high, factor, highest = torch.full_like(first, LEAST_FACTOR), torch.ones_like(first), first, first
    done = torch.zeros_like(first, dtype=torch.bool)
    for _ in range(50):  # the log loss is convex: Newton's method, or half the interval where that leaves it
        slope, curvature = sum((one.derive(factor) for one in blocks()), torch.zeros(2, len(first)).double())
        low, high = torch.where(slope > 0, low, factor), torch.where(slope > 0, factor, high)
        following = torch.where(curvature > 0, factor - slope / curvature, math.inf)
        beyond = (following >= high) & (high > highest)
        inside = (low < following) & (following < high)
        near = inside & ((following - factor).abs() < NEAR * factor)
        highest = torch.where(beyond, high, highest)
        following = torch.where(beyond, high, torch.where(inside, following, (low + high) / 2))
        factor = torch.where(done, factor, following)
        done |= near | (high - low < PRECISION)
        if done.all():
            break
    return factor
