"""What does each modality say on its own? A closed-form linear probe (Alain & Bengio 2016) on its encoder's output.

Linear discriminant analysis of standardised features with shrinkage, cross-fitted, with a temperature: no training, no
optimiser, no gradient. Everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_xattn.core import chunks
from lightning_xattn.core.ids import hashed
from lightning_xattn.functional.discriminant import discriminant, discriminant_of_few
from lightning_xattn.functional.linear_probe import LinearProbe
from lightning_xattn.functional.temperature import ScoredSamples, inverse_temperatures

FOLDS = 5
"""How many folds, each predicted by a fit without it; no fit has seen the sample that it predicts, or its group."""

LEAST_OF_A_CLASS = 10
"""A probe needs two classes with at least this number of samples each."""

JOINT = "joint"
"""The name of the probe on the features of all modalities."""

_FOLD_SALT = 1


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


class _Sums(NamedTuple):
    """Of the samples of each class in each fold their number and their features' sum; of each fold the products' sum.

    ``folds``, ``places`` and ``counts`` are ``(pairs of a fold and a class,)``, ``sums`` ``(pairs, width)`` and
    ``products`` ``(FOLDS, width, width)``.
    """

    folds: Tensor
    places: Tensor
    counts: Tensor
    sums: Tensor
    products: Tensor

    @classmethod
    def of(cls, features: Tensor, places: Tensor, folds: Tensor, n_classes: int) -> _Sums:
        pairs, index = (folds * n_classes + places).unique(return_inverse=True)
        sums = features.new_zeros(len(pairs), features.shape[1]).index_add(0, index, features)
        products = features.new_empty(FOLDS, features.shape[1], features.shape[1])
        for fold, out in enumerate(products):
            x = features[folds == fold]
            torch.mm(x.T, x, out=out)
        return cls(pairs // n_classes, pairs % n_classes, index.bincount().double(), sums, products)

    def select(self, columns: Tensor) -> _Sums:
        """The same of these features."""
        products = torch.stack([one[columns][:, columns] for one in self.products])
        return self._replace(sums=self.sums[:, columns], products=products)

    def fit(self, used: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
        """Fits of the folds that ``used``, ``(fits, FOLDS)`` of 0 and 1, says."""
        counts, sums = used[:, self.folds] * self.counts, used[:, self.folds, None] * self.sums
        return discriminant(
            counts.new_zeros(len(used), n_classes).index_add(1, self.places, counts),
            sums.new_zeros(len(used), n_classes, sums.shape[2]).index_add(1, self.places, sums),
            (used @ self.products.flatten(1)).unflatten(1, self.products.shape[1:]),
        )


class _CrossFit:
    """Fits without one or two folds, of some of the features.

    Where there are more samples than features, all fits come from the sums of each fold; else from the samples.
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
        self._features, self._folds, self._fitted = features, folds, fitted
        self.classes, place = target[fitted].unique(return_inverse=True)
        self._place = torch.full_like(target, -1)
        self._place[fitted] = place
        self._seen = [((folds == fold) & fitted).nonzero()[:, 0] for fold in range(FOLDS)]
        self._sums = self._sum()
        self._kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def _sum(self) -> _Sums | None:
        """None where samples are fewer than features."""
        rows = self._fitted.nonzero()[:, 0]
        if len(rows) < self._features.shape[1]:
            return None
        return _Sums.of(self._features[rows], self._place[rows], self._folds[rows], len(self.classes))

    def select(self, columns: Tensor) -> _CrossFit:
        """The fits of these features."""
        if torch.equal(columns, torch.arange(self._features.shape[1])):
            return self
        same = copy(self)
        same._features, same._kept = self._features[:, columns], {}
        same._sums = same._sum() if self._sums is None else self._sums.select(columns)
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
        # The scores of each sample, or the weights of all pairs of folds, are about so many.
        cells = FOLDS * len(self.classes) * max(len(self._features), (FOLDS + 1) // 2 * self._features.shape[1])
        score = self._score_at_once(places) if cells <= chunks.CELLS else self._score_on_demand(places)
        return LinearProbe(score, len(places), self.classes, n_classes)

    def _score_at_once(self, places: Tensor) -> Callable[[Tensor, Tensor | slice], Tensor]:
        pairs = [*combinations_with_replacement(range(FOLDS), 2)]
        weights, bias = self._fit(pairs)
        # Each sample by the fits without its fold and another one; without its own twice it is without that alone.
        scores = self._features.new_empty(len(self._features), *bias[:FOLDS].shape)
        for fold in range(FOLDS):
            fits, rows = [pairs.index((min(fold, one), max(fold, one))) for one in range(FOLDS)], self._folds == fold
            found = self._features[rows] @ weights[fits].flatten(0, 1).T
            scores[rows] = found.view(len(found), *bias[fits].shape) + bias[fits]
        others = self._folds[:, None] != torch.arange(FOLDS)
        block = ScoredSamples(scores, self._place.clamp_min(0), others & self._fitted[:, None])
        factors = inverse_temperatures(lambda: [block], scores.new_ones(FOLDS))
        table = factors[self._folds, None] * scores[torch.arange(len(scores)), self._folds]
        table = torch.cat([table, torch.full_like(table[:1], torch.nan)])  # where there is no place, it is the last
        return lambda rows, classes: table[places[rows]][:, classes]

    def _score_on_demand(self, places: Tensor) -> Callable[[Tensor, Tensor | slice], Tensor]:
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

        return score

    def fit(self) -> tuple[Tensor, Tensor]:
        """Weights and bias of a fit on all samples, with the temperature of fits that leave a fold out."""
        factor = self._find_factor([(fold,) for fold in range(FOLDS)])
        weights, bias = self._fit_without()
        return factor * weights, factor * bias

    def _find_factor(self, left_out: Sequence[tuple[int, ...]]) -> Tensor:
        """`inverse_temperature` of the samples of each first fold, by the fit without these folds."""

        def blocks(share: float = 1.0) -> Iterator[ScoredSamples]:
            for folds in left_out:
                weights, bias = self._fit_without(*folds)
                seen = self._seen[folds[0]]
                for rows in seen[: math.ceil(share * len(seen))].split(chunks.rows_at_once(len(self.classes))):
                    yield ScoredSamples((self._features[rows] @ weights.T + bias)[:, None], self._place[rows])

        cells = len(self.classes) * sum(len(self._seen[folds[0]]) for folds in left_out)
        # The factor of a part of the samples is near that of all, so that few steps go through all.
        some = list(blocks(min(1.0, chunks.KEPT_CELLS / max(1, cells))))
        factor = inverse_temperatures(lambda: some, self._features.new_ones(1))
        return factor if cells <= chunks.KEPT_CELLS else inverse_temperatures(blocks, factor)

    def _fit_without(self, *folds: int) -> tuple[Tensor, Tensor]:
        key = tuple(sorted(folds))
        if key not in self._kept:
            weights, bias = self._fit([key])
            # Of many classes only the last fit is kept.
            if (len(self._kept) + 1) * weights.numel() > chunks.KEPT_CELLS:
                self._kept.clear()
            self._kept[key] = weights[0], bias[0]
        return self._kept[key]

    def _fit(self, left_out: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """``(fits, classes, width)`` and ``(fits, classes)`` without these folds."""
        width, n_classes = self._features.shape[1], len(self.classes)
        used = torch.ones(len(left_out), FOLDS).double()
        for row, folds in zip(used, left_out, strict=True):
            row[list(folds)] = 0
        if self._sums is not None:
            parts = used.split(chunks.rows_at_once(width * (width + n_classes)))
            weights, bias = zip(*(self._sums.fit(part, n_classes) for part in parts), strict=True)
            return torch.cat(weights), torch.cat(bias)
        fitted = (rows.bool()[self._folds] & self._fitted for rows in used)
        fits = (discriminant_of_few(self._features[rows], self._place[rows], n_classes) for rows in fitted)
        weights, bias = zip(*fits, strict=True)
        return torch.stack(weights), torch.stack(bias)


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
