"""What does each modality say on its own? A closed-form linear probe (Alain & Bengio 2016) on its encoder's output.

Linear discriminant analysis of standardised features with shrinkage, cross-fitted, with a temperature: no training, no
optimiser, no gradient. Everything is computed in float64 from counts, sums and sums of products.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_xattn.core.ids import hashed

SHRINKAGE = 0.1
"""How far the correlations of features are drawn towards 0, in (0, 1]: chosen by ``python -m benchmarks.probe``."""

FOLDS = 5
"""How many folds, each predicted by a fit without it; no fit has seen the sample that it predicts, or its group."""

POOLED_WIDTH = 256
"""The mean, the maximum and the deviation of tokens keep so many numbers each; wider ones are projected."""

LEAST_OF_A_CLASS = 10
"""A probe needs two classes with at least this number of samples each."""

LEAST_FACTOR, PRECISION = 0.01, 1e-7
"""The smallest factor of `inverse_temperature`, and how precise it is."""

JOINT = "joint"
"""The name of the probe on the features of all modalities."""

_FOLD_SALT = 1

_CONSTANT = 1e-12
"""A feature whose variance within classes is this part of its variance varies by rounding only."""


def pooled_tokens(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pool the valid tokens of each sample to their mean, maximum and standard deviation.

    Parameters
    ----------
    tokens
        ``(batch, tokens, width)``, or ``(batch, width)`` of one vector, which stays as it is.
    mask
        ``(batch, tokens)`` bool, True where a token is real; None: all are.

    Returns
    -------
    Tensor
        ``(batch, 3, width)``, or ``(batch, 1, width)`` of vectors; float32 or wider; NaN for a sample without a valid
        token.

    Examples
    --------
    >>> tokens = torch.tensor([[[1.0], [3.0], [9.0]]])
    >>> pooled_tokens(tokens, mask=torch.tensor([[True, True, False]])).flatten().tolist()
    [2.0, 3.0, 1.0]
    """
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    if tokens.dim() == 2:
        return tokens[:, None]
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    hidden, count = ~mask[..., None], mask.sum(1, keepdim=True)
    mean = tokens.masked_fill(hidden, 0).sum(1) / count
    largest = torch.where(count > 0, tokens.masked_fill(hidden, -math.inf).amax(1), torch.nan)
    # Differences to the mean: large numbers that differ little keep their digits.
    deviation = ((tokens - mean[:, None]).masked_fill(hidden, 0).square().sum(1) / count).sqrt()
    return torch.stack([mean, largest, deviation], dim=1)


def project(features: Tensor) -> Tensor:
    """Project to `POOLED_WIDTH` dimensions where there are more, by a fixed Gaussian matrix.

    Parameters
    ----------
    features
        ``(..., width)``.

    Returns
    -------
    Tensor
        ``(..., min(width, POOLED_WIDTH))``; distances keep their expectation (Johnson & Lindenstrauss 1984).

    Examples
    --------
    >>> project(torch.rand(5, 3, 1000)).shape, project(torch.rand(5, 16)).shape
    (torch.Size([5, 3, 256]), torch.Size([5, 16]))
    """
    width = features.shape[-1]
    return features if width <= POOLED_WIDTH else features @ _projection(width).to(features)


_PROJECTIONS: dict[int, Tensor] = {}


def _projection(width: int) -> Tensor:
    # Always drawn on the CPU: the same on every device, in every process and in every run.
    if width not in _PROJECTIONS:
        generator = torch.Generator().manual_seed(width)
        _PROJECTIONS[width] = torch.randn(width, POOLED_WIDTH, generator=generator) / POOLED_WIDTH**0.5
    return _PROJECTIONS[width]


def assign_folds(groups: Tensor) -> Tensor:
    """Put groups into folds in turn, in an order that depends on their keys alone.

    Parameters
    ----------
    groups
        ``(samples,)`` int64 key of each sample's group; samples without groups have a key each.

    Returns
    -------
    Tensor
        ``(samples,)`` int64 in [0, `FOLDS`): folds differ by one group at most.

    Examples
    --------
    >>> folds = assign_folds(torch.arange(10).repeat_interleave(3))
    >>> folds.bincount().tolist(), bool((folds.view(10, 3) == folds[::3, None]).all())
    ([6, 6, 6, 6, 6], True)
    """
    keys, index = groups.unique(return_inverse=True)
    turn = torch.empty_like(keys)
    turn[hashed(keys, _FOLD_SALT).argsort(stable=True)] = torch.arange(len(keys), device=keys.device)
    return turn[index] % FOLDS


def discriminant(counts: Tensor, sums: Tensor, products: Tensor, shrinkage: float = SHRINKAGE) -> tuple[Tensor, Tensor]:
    """Fit linear discriminant analysis of standardised features with shrinkage.

    With class means ``mu_c``, the pooled within-class covariance ``S`` (n minus the number of classes in its
    denominator), its deviations ``D = diag(S)^1/2`` and ``S' = D ((1 - shrinkage) D^-1 S D^-1 + shrinkage I) D``, the
    log probability of class c is, but for a constant, ``x' S'^-1 mu_c - 1/2 mu_c' S'^-1 mu_c + ln prior_c``. So the
    units in which features are measured do not matter. Features that are constant within classes are left out.

    Parameters
    ----------
    counts
        ``(classes,)`` samples of each class, float64.
    sums
        ``(classes, width)`` sums of their features.
    products
        ``(width, width)`` sum over all samples of the outer product of their features with themselves.
    shrinkage
        In (0, 1].

    Returns
    -------
    weights, bias
        ``(classes, width)`` and ``(classes,)``: ``softmax(x @ weights.T + bias)`` are the probabilities. The bias of a
        class without samples is minus infinity. NaN with fewer than two classes, no more samples than classes, or
        features that do not vary within classes.

    Examples
    --------
    >>> features = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)  # two of each class
    >>> counts, sums = torch.tensor([2.0, 2.0]).double(), torch.tensor([[-2.0], [2.0]]).double()
    >>> coefficients, constants = discriminant(counts, sums, products=(features @ features)[None, None])
    >>> coefficients.round(decimals=6).tolist()  # the means, -1 and 1, over the variance within classes, 0.5
    [[-2.0], [2.0]]
    """
    present = counts > 0
    freedom = counts.sum() - present.sum()
    means = torch.where(present[:, None], sums / counts.clamp_min(1)[:, None], 0)
    # Large matrices, of which there are dozens, are changed in place.
    within = torch.addmm(products, means.T, counts[:, None] * means, alpha=-1).div_(freedom)
    variances = within.diagonal().clone()
    kept = variances * freedom > _CONSTANT * products.diagonal()
    if present.sum() < 2 or freedom < 1 or not bool(kept.any()):
        return torch.full_like(means, torch.nan), torch.full_like(counts, torch.nan)
    if not bool(kept.all()):
        weights = torch.zeros_like(means)
        weights[:, kept], bias = discriminant(counts, sums[:, kept], products[kept][:, kept], shrinkage)
        return weights, bias
    deviations = variances.sqrt()
    shrunk = within.div_(deviations).mul_((1 - shrinkage) / deviations[:, None])
    shrunk.diagonal().add_(shrinkage)
    scaled = (means / deviations).T
    weights = torch.cholesky_solve(scaled, torch.linalg.cholesky(shrunk)).T / deviations
    bias = (counts / counts.sum()).log() - (weights * means).sum(1) / 2
    return weights, bias


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
    of_class = scores.gather(1, target[:, None])[:, 0]
    counts = of_class.isfinite()
    if not counts.any():
        return 1.0
    scores, of_class = scores[counts], of_class[counts]
    finite = scores.masked_fill(scores.isinf(), 0)  # times a probability of 0
    low, high, factor = LEAST_FACTOR, 1.0, 1.0
    for _ in range(50):  # the log loss is convex: Newton's method, or half the interval where that leaves it
        p = (factor * scores).softmax(1)
        expected = (p * finite).sum(1)
        slope = float((expected - of_class).mean())
        low, high = (low, factor) if slope > 0 else (factor, high)
        curvature = float(((p * finite.square()).sum(1) - expected.square()).mean())
        step = factor - slope / curvature if curvature > 0 else math.inf
        following = step if low < step < high else (low + high) / 2
        if high - low < PRECISION or abs(following - factor) < PRECISION:
            return following
        factor = following
    return factor


class _Sums(NamedTuple):
    """Of some samples: those of each class, the sums of their features, and the sum of the features' products."""

    counts: Tensor
    sums: Tensor
    products: Tensor


class _CrossFit:
    """Fits without one or two folds, of any of the features: all from the sums of each fold.

    Parameters
    ----------
    features
        ``(samples, width)`` float64, around 0.
    target, folds, n_classes
        As ``cross_fitted_probe`` takes them.
    fitted
        ``(samples,)`` bool, those with a class.
    """

    def __init__(self, features: Tensor, target: Tensor, folds: Tensor, n_classes: int, fitted: Tensor) -> None:
        self._features, self._target, self._folds, self._n_classes = features, target, folds, n_classes
        self._of_fold = [(folds == fold).nonzero()[:, 0] for fold in range(FOLDS)]
        self._fitted = fitted
        self._parts = []
        for rows in self._of_fold:
            chosen = rows[fitted[rows]]
            x, member = features[chosen], torch.nn.functional.one_hot(target[chosen], n_classes).double()
            self._parts.append(_Sums(member.sum(0), member.T @ x, x.T @ x))
        self._total = _Sums(*(sum(terms[1:], terms[0]) for terms in zip(*self._parts, strict=True)))

    def log_probabilities(self, columns: Tensor) -> Tensor:
        """``(samples, classes)`` by the probe of these features, as ``cross_fitted_probes`` gives them."""
        x, total, parts = self._select(columns)
        probe = x.new_full((len(x), self._n_classes), torch.nan)
        inner = {pair: _fit_without(total, [parts[fold] for fold in pair]) for pair in combinations(range(FOLDS), 2)}
        for fold, rows in enumerate(self._of_fold):
            weights, bias = _fit_without(total, [parts[fold]])
            scores, targets = [], []
            for other, held_out in enumerate(self._of_fold):
                if other != fold:
                    seen = held_out[self._fitted[held_out]]
                    of_pair, constants = inner[min(fold, other), max(fold, other)]
                    scores.append(x[seen] @ of_pair.T + constants)
                    targets.append(self._target[seen])
            factor = inverse_temperature(torch.cat(scores), torch.cat(targets))
            probe[rows] = (factor * (x[rows] @ weights.T + bias)).log_softmax(1)
        return probe

    def fit(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and bias of a fit on all samples, with the temperature of fits that leave a fold out."""
        x, total, parts = self._select(columns)
        scores, targets = [], []
        for fold, rows in enumerate(self._of_fold):
            seen = rows[self._fitted[rows]]
            weights, bias = _fit_without(total, [parts[fold]])
            scores.append(x[seen] @ weights.T + bias)
            targets.append(self._target[seen])
        factor = inverse_temperature(torch.cat(scores), torch.cat(targets))
        weights, bias = discriminant(*total)
        return factor * weights, factor * bias

    def _select(self, columns: Tensor) -> tuple[Tensor, _Sums, list[_Sums]]:
        """These features, their sums over all samples, and over each fold."""
        if len(columns) == self._features.shape[1]:
            return self._features, self._total, self._parts
        total, *parts = (
            _Sums(one.counts, one.sums[:, columns], one.products[columns][:, columns])
            for one in (self._total, *self._parts)
        )
        return self._features[:, columns], total, parts


def _fit_without(total: _Sums, parts: Sequence[_Sums]) -> tuple[Tensor, Tensor]:
    counts, sums, products = (one.clone() for one in total)
    for part in parts:
        counts -= part.counts
        sums -= part.sums
        products -= part.products
    return discriminant(counts, sums, products)


def cross_fitted_probes(
    features: Mapping[str, Tensor],
    target: Tensor,
    folds: Tensor,
    n_classes: int,
    joints: Sequence[Collection[str]] = (),
) -> dict[tuple[str, ...], Tensor]:
    """Log probability of each class from a modality's features, each sample by a fit that has not seen its fold.

    Parameters
    ----------
    features
        By modality ``(samples, width)``; samples of which one is not finite are neither fitted nor read.
    target
        ``(samples,)`` int64 class ids; those outside of [0, n_classes) are read, but not fitted.
    folds
        ``(samples,)`` int64 in [0, FOLDS), the same for all samples of a group, see `assign_folds`.
    n_classes
        How many classes there are.
    joints
        Modalities whose features are read together.

    Returns
    -------
    dict
        By modalities, of each alone and of ``joints``: ``(samples, classes)`` float64, natural logarithms, as a
        probability far from the data is too small for a number; minus infinity for a class that the fit does not know.
        NaN where a sample cannot be read, and for all samples where fewer than two classes have `LEAST_OF_A_CLASS`
        samples. Each fit has a temperature, found on folds inside its training part.

    Examples
    --------
    >>> target = torch.arange(100) % 2
    >>> eeg, spec = torch.randn(100, 3), target[:, None] + 0.1 * torch.randn(100, 3)
    >>> folds = assign_folds(torch.arange(100))
    >>> probes = cross_fitted_probes({"eeg": eeg, "spec": spec}, target, folds, n_classes=2)
    >>> bool((probes["spec",].argmax(1) == target).all())
    True
    """
    wanted = dict.fromkeys([*((name,) for name in features), *map(tuple, joints)])
    joined = torch.cat([one.double() for one in features.values()], dim=1)
    probes = {names: joined.new_full((len(joined), n_classes), torch.nan) for names in wanted}
    prepared = _prepare(features, target, folds, n_classes)
    if prepared is None:
        return probes
    finite, fit, columns, _ = prepared
    for names in wanted:
        probes[names][finite] = fit.log_probabilities(torch.cat([columns[name] for name in names]))
    return probes


def fit_probes(
    features: Mapping[str, Tensor],
    target: Tensor,
    folds: Tensor,
    n_classes: int,
    joints: Sequence[Collection[str]] = (),
) -> dict[tuple[str, ...], tuple[Tensor, Tensor]]:
    """Probes for samples of other evaluations, fitted on all samples of this one.

    Parameters
    ----------
    features, target, folds, n_classes, joints
        As `cross_fitted_probes` takes them; the folds are for the temperature alone.

    Returns
    -------
    dict
        By modalities, of each alone and of ``joints``: weights ``(classes, width)`` and bias ``(classes,)`` float64,
        so that ``(features @ weights.T + bias).log_softmax(1)`` are log probabilities. Empty where fewer than two
        classes have `LEAST_OF_A_CLASS` samples.

    Examples
    --------
    >>> target = torch.arange(100) % 2
    >>> features = {"eeg": target[:, None] + 0.1 * torch.randn(100, 3)}
    >>> weights, bias = fit_probes(features, target, assign_folds(torch.arange(100)), n_classes=2)["eeg",]
    >>> (torch.ones(1, 3).double() @ weights.T + bias).argmax(1).tolist()
    [1]
    """
    prepared = _prepare(features, target, folds, n_classes)
    if prepared is None:
        return {}
    _, fit, columns, mean = prepared
    found = {}
    for names in dict.fromkeys([*((name,) for name in features), *map(tuple, joints)]):
        chosen = torch.cat([columns[name] for name in names])
        weights, bias = fit.fit(chosen)
        found[names] = weights, bias - weights @ mean[chosen]
    return found


def _prepare(
    features: Mapping[str, Tensor], target: Tensor, folds: Tensor, n_classes: int
) -> tuple[Tensor, _CrossFit, dict[str, Tensor], Tensor] | None:
    """Which samples are finite, the fits of these, the columns of each modality, and the mean of the features."""
    joined = torch.cat([one.double() for one in features.values()], dim=1)
    split = torch.arange(joined.shape[1]).split([one.shape[1] for one in features.values()])
    finite = joined.isfinite().all(1)
    fitted = finite & (target >= 0) & (target < n_classes)
    if (target[fitted].bincount() >= LEAST_OF_A_CLASS).sum() < 2:
        return None
    # Around their mean, large features that differ little keep their digits.
    mean = joined[fitted].mean(0)
    fit = _CrossFit(joined[finite] - mean, target[finite], folds[finite], n_classes, fitted[finite])
    return finite, fit, dict(zip(features, split, strict=True)), mean


def cross_fitted_probe(features: Tensor, target: Tensor, folds: Tensor, n_classes: int) -> Tensor:
    """`cross_fitted_probes` of one modality: ``(samples, classes)`` float64 log probabilities.

    Examples
    --------
    >>> target = torch.arange(100) % 2
    >>> features = target[:, None] + 0.1 * torch.randn(100, 3)
    >>> probe = cross_fitted_probe(features, target, folds=torch.arange(100) // 20, n_classes=2)
    >>> bool((probe.argmax(1) == target).all())
    True
    """
    return cross_fitted_probes({"": features}, target, folds, n_classes)["",]
