"""Linear discriminant analysis of standardised features with shrinkage, from sums, or from a few samples."""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKAGE = 0.1
"""How far the correlations of features are drawn towards 0, in (0, 1]: chosen by ``python -m benchmarks.probe``."""

_CONSTANT = 1e-12
"""A feature whose variance within classes is this part of its variance varies by rounding only."""


def discriminant(counts: Tensor, sums: Tensor, products: Tensor, shrinkage: float = SHRINKAGE) -> tuple[Tensor, Tensor]:
    """Fit linear discriminant analysis of standardised features with shrinkage, one fit or several.

    With class means ``mu_c``, the pooled within-class covariance ``S`` (n minus the number of classes in its
    denominator), its deviations ``D = diag(S)^1/2`` and ``S' = D ((1 - shrinkage) D^-1 S D^-1 + shrinkage I) D``, the
    log probability of class c is, but for a constant, ``x' S'^-1 mu_c - 1/2 mu_c' S'^-1 mu_c + ln prior_c``. So the
    units in which features are measured do not matter. Features that are constant within classes are left out.

    Parameters
    ----------
    counts
        ``(..., classes)`` samples of each class, float64.
    sums
        ``(..., classes, width)`` sums of their features.
    products
        ``(..., width, width)`` sum over all samples of the outer product of their features with themselves.
    shrinkage
        In (0, 1].

    Returns
    -------
    weights, bias
        ``(..., classes, width)`` and ``(..., classes)``: ``softmax(x @ weights.T + bias)`` are the probabilities. The
        bias of a class without samples is minus infinity. NaN with fewer than two classes, no more samples than
        classes, or features that do not vary within classes.

    Examples
    --------
    >>> features = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)  # two of each class
    >>> counts, sums = torch.tensor([2.0, 2.0]).double(), torch.tensor([[-2.0], [2.0]]).double()
    >>> coefficients, constants = discriminant(counts, sums, products=(features @ features)[None, None])
    >>> coefficients.round(decimals=6).tolist()  # the means, -1 and 1, over the variance within classes, 0.5
    [[-2.0], [2.0]]
    """
    means = sums / counts.clamp_min(1)[..., None]
    # Large matrices, of which there are dozens, are changed in place.
    within = (means.mT @ (-counts[..., None] * means)).add_(products)
    scale = _scale(counts, within.diagonal(dim1=-2, dim2=-1), products.diagonal(dim1=-2, dim2=-1))
    share = (1 - shrinkage) / _freedom(counts)
    shrunk = within.mul_(scale[..., None, :]).mul_((share[..., None] * scale)[..., None])
    shrunk.diagonal(dim1=-2, dim2=-1).add_(shrinkage)
    scaled = (means * scale[..., None, :]).mT
    weights = _solve(shrunk, scaled).mT * scale[..., None, :]
    return _finish(weights, means, counts, scale)


def discriminant_of_few(
    features: Tensor, target: Tensor, n_classes: int, shrinkage: float = SHRINKAGE
) -> tuple[Tensor, Tensor]:
    """`discriminant` of samples that are fewer than their features: it solves for samples, and not for features.

    With Z the features of all samples within classes, standardised, and a the factor of Z'Z, it is
    ``(a Z'Z + b I)^-1 = (I - a Z' (a ZZ' + b I)^-1 Z) / b`` (Woodbury 1950).

    Parameters
    ----------
    features
        ``(samples, width)`` float64.
    target
        ``(samples,)`` int64 in [0, n_classes).
    n_classes
        How many classes there are.
    shrinkage
        In (0, 1].

    Returns
    -------
    weights, bias
        As `discriminant` gives them.

    Examples
    --------
    >>> features, target = torch.tensor([[-1.5], [-0.5], [0.5], [1.5]]).double(), torch.tensor([0, 0, 1, 1])
    >>> discriminant_of_few(features, target, n_classes=2)[0].round(decimals=6).tolist()
    [[-2.0], [2.0]]
    """
    counts = target.bincount(minlength=n_classes).double()
    means = features.new_zeros(n_classes, features.shape[1]).index_add(0, target, features)
    means /= counts.clamp_min(1)[:, None]
    z = features - means[target]
    within = z.square().sum(0)
    scale = _scale(counts, within, within + counts @ means.square())
    share = (1 - shrinkage) / _freedom(counts)
    z, scaled = z.mul_(scale), means * scale
    gram = (z @ z.T).mul_(share)
    gram.diagonal().add_(shrinkage)
    solved = _solve(gram, z @ scaled.T)
    weights = (scaled - share * solved.T @ z) * (scale / shrinkage)
    return _finish(weights, means, counts, scale)


def _solve(symmetric: Tensor, of: Tensor) -> Tensor:
    # Two triangular solves take a third of the time of `torch.cholesky_solve`.
    lower = torch.linalg.cholesky(symmetric)
    half = torch.linalg.solve_triangular(lower, of, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return solved


def _freedom(counts: Tensor) -> Tensor:
    return (counts.sum(-1) - (counts > 0).sum(-1)).clamp_min(1)


def _scale(counts: Tensor, within: Tensor, total: Tensor) -> Tensor:
    """``(..., width)`` one over the deviation of each feature within classes; 0 of those that are left out.

    ``within`` and ``total`` are ``(..., width)`` sums of squares, around the means of classes and around 0.
    """
    present = (counts > 0).sum(-1)
    is_fit = (present > 1) & (counts.sum(-1) > present)
    kept = is_fit[..., None] & (within > _CONSTANT * total)
    return torch.where(kept, (_freedom(counts)[..., None] / within).sqrt(), 0)


def _finish(weights: Tensor, means: Tensor, counts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    bias = (counts / counts.sum(-1, keepdim=True)).log() - (weights * means).sum(-1) / 2
    undefined = ~scale.any(-1)
    if undefined.any():
        weights[undefined], bias[undefined] = torch.nan, torch.nan
    return weights, bias
