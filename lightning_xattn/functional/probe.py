"""What does each modality say on its own? A closed-form linear probe (Alain & Bengio 2016) on its encoder's output.

Linear discriminant analysis of standardised features with shrinkage, cross-fitted, with a temperature: no training, no
optimiser, no gradient. Everything is computed in float64 from counts, sums and sums of products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_xattn.core import chunks
from lightning_xattn.core.ids import hashed
from lightning_xattn.functional.linear_probe import LinearProbe

SHRINKAGE = 0.1
"""How far the correlations of features are drawn towards 0, in (0, 1]: chosen by ``python -m benchmarks.probe``."""

FOLDS = 5
"""How many folds, each predicted by a fit without it; no fit has seen the sample that it predicts, or its group."""

LEAST_OF_A_CLASS = 10
"""A probe needs two classes with at least this number of samples each."""

LEAST_FACTOR, PRECISION = 0.01, 1e-7
"""The smallest factor of `inverse_temperature`, and how precise it is."""

NEAR = 1e-4
"""Where a step of Newton's method changes less than this part, what it gives is as precise as `PRECISION`."""

JOINT = "joint"
"""The name of the probe on the features of all modalities."""

_FOLD_SALT = 1

_CONSTANT = 1e-12
"""A feature whose variance within classes is this part of its variance varies by rounding only."""


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
    rows = chunks.rows_at_once(scores.shape[1])
    blocks = [_prepare_block(*one) for one in zip(scores.split(rows), target.split(rows), strict=True)]
    return _find_factor(lambda: blocks)


_RULED_OUT = -1e100
"""In the place of minus infinity: its exponential is 0, and its square is a number."""

_Block = tuple[Tensor, Tensor]
"""Of some samples: ``(samples, classes)`` scores less the largest of each sample, and ``(samples,)`` of its class."""


def _prepare_block(scores: Tensor, target: Tensor) -> _Block:
    of_class = scores.gather(1, target[:, None])[:, 0]
    counts = of_class.isfinite()
    if not bool(counts.all()):
        scores, of_class = scores[counts], of_class[counts]
    largest = scores.amax(1)
    return (scores - largest[:, None]).clamp_min_(_RULED_OUT), of_class - largest


def _find_factor(blocks: Callable[[], Iterable[_Block]], first: float = 1.0) -> float:
    """`inverse_temperature` of samples in blocks, which are asked for in each step; the nearer the first, the fewer."""
    low, high, factor, highest = LEAST_FACTOR, 1.0, first, first
    for _ in range(50):  # the log loss is convex: Newton's method, or half the interval where that leaves it
        count, slope, curvature = 0, 0.0, 0.0
        for scores, of_class in blocks():
            # There may be many scores: each term is made in the place of the one before.
            terms = (factor * scores).exp_()
            whole = terms.sum(1)
            expected = terms.mul_(scores).sum(1) / whole
            squared = terms.mul_(scores).sum(1) / whole
            count += len(scores)
            slope += float((expected - of_class).sum())
            curvature += float((squared - expected.square()).sum())
        if not count:
            return 1.0
        low, high = (low, factor) if slope > 0 else (factor, high)
        following = factor - slope / curvature if curvature > 0 else math.inf
        if following >= high > highest:
            following = highest = high
        elif not low < following < high:
            following = (low + high) / 2
        elif abs(following - factor) < NEAR * factor:
            return following
        if high - low < PRECISION:
            return following
        factor = following
    return factor


class _Sums(NamedTuple):
    """Of some samples: which classes they have, how many of each, their features' sums, and the sum of the products."""

    classes: Tensor
    counts: Tensor
    sums: Tensor
    products: Tensor


class _CrossFit:
    """Fits without one or two folds, of some of the features: all from the sums of each fold.

    Classes that no sample has take no place: a few thousand samples show only a part of 10,000 classes.

    Parameters
    ----------
    features
        ``(samples, width)`` float64, around 0.
    target, folds
        As ``cross_fitted_probe`` takes them.
    fitted
        ``(samples,)`` bool, those with a class.
    """

    def __init__(self, features: Tensor, target: Tensor, folds: Tensor, fitted: Tensor) -> None:
        self._features, self._folds = features, folds
        self.classes, place = target[fitted].unique(return_inverse=True)
        self._place = torch.full_like(target, -1)
        self._place[fitted] = place
        self._seen = [((folds == fold) & fitted).nonzero()[:, 0] for fold in range(FOLDS)]
        self._parts = [self._sum(rows) for rows in self._seen]
        self._total = self._sum(fitted.nonzero()[:, 0])
        self._kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def _sum(self, rows: Tensor) -> _Sums:
        x = self._features[rows]
        classes, index = self._place[rows].unique(return_inverse=True)
        sums = x.new_zeros(len(classes), x.shape[1]).index_add(0, index, x)
        return _Sums(classes, index.bincount(minlength=len(classes)).double(), sums, x.T @ x)

    def select(self, columns: Tensor) -> _CrossFit:
        """The fits of these features."""
        if torch.equal(columns, torch.arange(self._features.shape[1])):
            return self
        same = copy(self)
        same._features, same._kept = self._features[:, columns], {}
        same._total, *same._parts = (
            _Sums(one.classes, one.counts, one.sums[:, columns], one.products[columns][:, columns])
            for one in (self._total, *self._parts)
        )
        return same

    def probe(self, places: Tensor, n_classes: int) -> LinearProbe:
        """Each sample by the fit without its fold.

        Parameters
        ----------
        places
            ``(all samples,)`` int64 the place of each sample among those of this fit; -1 where it has none.
        n_classes
            How many classes there are.
        """
        factors = [
            self._find_factor([(other, fold) for other in range(FOLDS) if other != fold]) for fold in range(FOLDS)
        ]
        self._kept = {}

        def score(rows: Tensor, classes: Tensor | slice) -> Tensor:
            own = places[rows]
            folds = torch.where(own < 0, -1, self._folds[own])
            found = self._features.new_full((len(rows), len(self.classes[classes])), torch.nan)
            for fold in folds[own >= 0].unique().tolist():
                weights, bias = self._fit_without(fold)
                scores = self._features[own[folds == fold]] @ weights[classes].T + bias[classes]
                found[folds == fold] = factors[fold] * scores
            return found

        return LinearProbe(score, len(places), self.classes, n_classes)

    def fit(self) -> tuple[Tensor, Tensor]:
        """Weights and bias of a fit on all samples, with the temperature of fits that leave a fold out."""
        factor = self._find_factor([(fold,) for fold in range(FOLDS)])
        weights, bias = self._fit_without()
        return factor * weights, factor * bias

    def _find_factor(self, left_out: Sequence[tuple[int, ...]]) -> float:
        """`inverse_temperature` of the samples of each first fold, by the fit without these folds."""

        def blocks(share: float = 1.0) -> Iterator[_Block]:
            for folds in left_out:
                weights, bias = self._fit_without(*folds)
                seen = self._seen[folds[0]]
                for rows in seen[: math.ceil(share * len(seen))].split(chunks.rows_at_once(len(self.classes))):
                    yield _prepare_block(self._features[rows] @ weights.T + bias, self._place[rows])

        cells = len(self.classes) * sum(len(self._seen[folds[0]]) for folds in left_out)
        # The factor of a part of the samples is near that of all, so that few steps go through all.
        some = list(blocks(min(1.0, chunks.KEPT_CELLS / max(1, cells))))
        factor = _find_factor(lambda: some)
        return factor if cells <= chunks.KEPT_CELLS else _find_factor(blocks, factor)

    def _fit_without(self, *folds: int) -> tuple[Tensor, Tensor]:
        key = tuple(sorted(folds))
        if key not in self._kept:
            _, counts, sums, products = (one.clone() for one in self._total)
            for fold in folds:
                part = self._parts[fold]
                counts[part.classes] -= part.counts
                sums[part.classes] -= part.sums
                products -= part.products
            found = discriminant(counts, sums, products)
            # Of many classes only the last fit is kept.
            if (len(self._kept) + 1) * found[0].numel() > chunks.KEPT_CELLS:
                self._kept.clear()
            self._kept[key] = found
        return self._kept[key]


def cross_fitted_probes(
    features: Mapping[str, Tensor],
    target: Tensor,
    folds: Tensor,
    n_classes: int,
    joints: Sequence[Collection[str]] = (),
) -> dict[tuple[str, ...], LinearProbe]:
    """Probes of each modality's features, which predict each sample by a fit that has not seen its fold.

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
        By modalities, of each alone and of ``joints``: see `LinearProbe`. Log probabilities are NaN where a sample
        cannot be read, and for all samples where fewer than two classes have `LEAST_OF_A_CLASS` samples. Each fit has a
        temperature, found on folds inside its training part.

    Examples
    --------
    >>> target = torch.arange(100) % 2
    >>> eeg, spec = torch.randn(100, 3), target[:, None] + 0.1 * torch.randn(100, 3)
    >>> folds = assign_folds(torch.arange(100))
    >>> probes = cross_fitted_probes({"eeg": eeg, "spec": spec}, target, folds, n_classes=2)
    >>> bool((probes["spec",].log_probabilities().argmax(1) == target).all())
    True
    """
    wanted = dict.fromkeys([*((name,) for name in features), *map(tuple, joints)])
    prepared = _prepare(features, target, folds, n_classes)
    if prepared is None:
        first = torch.arange(min(1, n_classes))
        return dict.fromkeys(wanted, LinearProbe(_score_nothing, len(target), first, n_classes))
    finite, fit, columns, _ = prepared
    places = torch.where(finite, finite.cumsum(0) - 1, -1)
    return {
        names: fit.select(torch.cat([columns[name] for name in names])).probe(places, n_classes) for names in wanted
    }


def _score_nothing(rows: Tensor, classes: Tensor | slice) -> Tensor:
    return torch.full((len(rows), 1), torch.nan, dtype=torch.float64)


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
        own = fit.select(chosen)
        weights, bias = own.fit()
        all_weights = weights.new_zeros(n_classes, len(chosen)).index_copy(0, own.classes, weights)
        all_biases = bias.new_full((n_classes,), -math.inf).index_copy(0, own.classes, bias - weights @ mean[chosen])
        found[names] = all_weights, all_biases
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
    fit = _CrossFit(joined[finite] - mean, target[finite], folds[finite], fitted[finite])
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
    return cross_fitted_probes({"": features}, target, folds, n_classes)["",].log_probabilities()
