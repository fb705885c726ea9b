"""How much of a prediction does each modality carry? Exact Shapley values (Shapley 1953) at the fusion.

The modalities that enter a fusion are permuted between samples: pair (i, j) has the modalities of a subset from sample
i and the others from its partner j. A game's value ``v_i(S)`` is the mean over partners of what the model then predicts
for the class that it predicts for the intact sample i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lightning_xattn.core.errors import SettingError

MOSTLY = 2 / 3
"""A prediction is mostly one modality's if the lower end of its share is above this, of however many modalities: all
others together then have less than a third, and it has more than twice as much as they."""

Subset = frozenset[int]
"""Modalities by their numbers."""


@dataclass(frozen=True, eq=False)
class Permutation:
    """A model's outputs for pairs of samples whose modalities were permuted.

    Attributes
    ----------
    rows, columns
        ``(pairs,)`` int64: pair (i, j) has the modalities of ``subset`` from sample i and the others from j.
    values
        ``(pairs, classes)`` its output for each class: probabilities, or centred logits.

    Examples
    --------
    >>> Permutation(torch.tensor([0, 1]), torch.tensor([1, 0]), values=torch.rand(2, 6))
    Permutation(2 pairs, 6 classes)
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def __repr__(self) -> str:
        pairs, classes = self.values.shape
        return f"Permutation({pairs} pairs, {classes} classes)"


def permuted_subsets(modalities: int, has_further: bool = False) -> list[Subset]:
    """One subset of each pair of complements: pair (i, j) of the one is pair (j, i) of the other.

    Not where further inputs stay each sample's own: then every subset but that of all has pairs of its own.

    Examples
    --------
    >>> [sorted(subset) for subset in permuted_subsets(3)]
    [[0], [0, 1], [0, 2]]
    >>> [sorted(subset) for subset in permuted_subsets(2, has_further=True)]
    [[], [0], [1]]
    """
    if has_further:
        return [frozenset(own) for size in range(modalities) for own in combinations(range(modalities), size)]
    return [
        frozenset({0, *others}) for size in range(modalities - 1) for others in combinations(range(1, modalities), size)
    ]


def additive_fit(permute: Permutation, samples: int) -> tuple[Tensor, Tensor] | None:
    """Least-squares fit of ``a_i + b_j`` to the pairs (i, j) that were run.

    Parameters
    ----------
    permute
        The pairs; each once at most.
    samples
        How many samples there are, each a row and a column of at least one pair.

    Returns
    -------
    a, b
        ``(samples, classes)`` float64, of which only sums of one and the other have a meaning. None where the pairs do
        not connect all rows and columns, so that not even these are determined.

    Examples
    --------
    >>> rows, columns = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    >>> pairs = Permutation(rows, columns, torch.tensor([[0.0], [2.0], [1.0], [3.0]]))
    >>> a, b = additive_fit(pairs, samples=2)
    >>> (a + b.T).round(decimals=3).tolist()
    [[0.0, 2.0], [1.0, 3.0]]
    """
    rows, columns, values = permute.rows, permute.columns, permute.values.double()
    graph = coo_array((torch.ones(len(rows)), (rows, columns + samples)), shape=(2 * samples, 2 * samples))
    if connected_components(graph, directed=False, return_labels=False) > 1:
        return None
    run = _run(permute, samples)
    row_sums, column_sums = (
        torch.zeros(samples, values.shape[1], dtype=torch.float64).index_add(0, places, values)
        for places in (rows, columns)
    )
    # The normal equations without a; what one adds to all of b is taken from all of a, so its sum is set to 0.
    weighted = run.T / run.sum(1)
    normal = torch.diag(run.sum(0)) - weighted @ run + 1 / samples
    b = torch.linalg.solve(normal, column_sums - weighted @ row_sums)
    return (row_sums - run @ b) / run.sum(1, keepdim=True), b


@dataclass(frozen=True, eq=False)
class Game:
    """Values of all subsets of modalities, for each sample.

    Attributes
    ----------
    modalities
        How many.
    values
        By subset ``(samples,)`` float64, at the class that the model predicts for the intact sample; NaN without a
        partner.
    variances
        By subset ``(samples,)`` float64, how far they may be from those with all partners, squared.

    Examples
    --------
    >>> v = {(): 0.2, (0,): 0.5, (1,): 0.4, (0, 1): 0.9}  # of one sample, by the modalities that are its own
    >>> values = {frozenset(own): torch.tensor([one]) for own, one in v.items()}
    >>> Game(2, values, variances={own: torch.zeros(1) for own in values}).phi
    tensor([[0.4000, 0.3000]])
    """

    modalities: int
    values: Mapping[Subset, Tensor]
    variances: Mapping[Subset, Tensor]

    def __repr__(self) -> str:
        return f"Game({self.modalities} modalities, {len(next(iter(self.values.values())))} samples)"

    @property
    def phi(self) -> Tensor:
        """``(samples, modalities)`` exact Shapley values; they sum to ``v(all) - v(none)``."""
        return self._sum_over_orders(lambda share, after, before: share * (self.values[after] - self.values[before]))

    @property
    def phi_error(self) -> Tensor:
        """``(samples, modalities)`` standard error of ``phi``, as not all partners were run."""
        return self._sum_over_orders(
            lambda share, after, before: share**2 * (self.variances[after] + self.variances[before])
        ).sqrt()

    def _sum_over_orders(self, term: Callable[[float, Subset, Subset], Tensor]) -> Tensor:
        """The terms of each modality, summed over the subsets that may come before it in an order of all."""
        sums = [
            torch.stack([term(share, before | {one}, before) for before, share in self._before(one)]).sum(0)
            for one in range(self.modalities)
        ]
        return torch.stack(sums, dim=1)

    def _before(self, one: int) -> Iterator[tuple[Subset, float]]:
        """The modalities that may come before this one, and the share of all orders in which they do."""
        others = [other for other in range(self.modalities) if other != one]
        for size in range(self.modalities):
            share = 1 / (self.modalities * math.comb(self.modalities - 1, size))
            yield from ((before, share) for before in map(frozenset, combinations(others, size)))

    def interaction(self, first: int = 0, second: int = 1) -> Tensor:
        """``(samples,)`` Shapley interaction index of two modalities (Grabisch & Roubens 1999).

        Of two modalities in all it is ``v(ab) - v(a) - v(b) + v(none)``.
        """
        others = [other for other in range(self.modalities) if other not in (first, second)]
        total = torch.zeros_like(self.values[frozenset()])
        for size in range(self.modalities - 1):
            share = 1 / ((self.modalities - 1) * math.comb(self.modalities - 2, size))
            for before in map(frozenset, combinations(others, size)):
                both, a, b = (self.values[before | more] for more in ({first, second}, {first}, {second}))
                total += share * (both - a - b + self.values[before])
        return total


def play(
    intact: Tensor, permutes: Mapping[Subset, Permutation], groups: Tensor, chosen: Tensor, modalities: int
) -> Game:
    """Values of every subset of modalities at each sample's class.

    A sample's partners are all samples of other groups. Where not all pairs were run, what their mean would be is
    estimated by `additive_fit`, which is exact for an additive model; where that is not determined, it is the mean of
    those that were run.

    Parameters
    ----------
    intact
        ``(samples, classes)`` the model's outputs for the intact samples.
    permutes
        Of each of `permuted_subsets`. The value of none is the mean over partners' intact outputs, unless it has pairs.
    groups
        ``(samples,)`` int64: samples of one group are no partners of each other.
    chosen
        ``(samples,)`` int64 the class at which values are taken: that of the intact prediction.
    modalities
        How many, at least 2.

    Examples
    --------
    >>> said = Permutation(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([[0.5, 0.5], [0.75, 0.25]]))
    >>> intact, groups, chosen = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.arange(2), torch.tensor([0, 0])
    >>> play(intact, {frozenset({0}): said}, groups, chosen, modalities=2).values[frozenset({0})].tolist()
    [0.5, 0.75]
    """
    samples, everything = len(intact), frozenset(range(modalities))
    # Classes are fitted apart from each other, so of many those at which no value is taken are left out.
    used, chosen = chosen.unique(return_inverse=True)
    intact = intact[:, used]
    permutes = {subset: replace(one, values=one.values[:, used]) for subset, one in permutes.items()}
    fits = {subset: additive_fit(permute, samples) for subset, permute in permutes.items()}
    partners = (groups[:, None] != groups).double()
    if any(fit is None for fit in fits.values()):
        # The means of those that were run: all sides by the same partners, whatever the subset.
        run = torch.stack([_run(permute, samples) for permute in permutes.values()]).amin(0)
        partners = partners * run * run.T
    weights = partners / partners.sum(1, keepdim=True)

    def at_class(values: Tensor) -> Tensor:
        return torch.where(partners.sum(1) > 0, values.gather(1, chosen[:, None])[:, 0], torch.nan)

    values = {everything: at_class(intact.double()), frozenset[int](): at_class(weights @ intact.double())}
    variances = dict.fromkeys((everything, frozenset[int]()), torch.zeros(samples, dtype=torch.float64))
    for subset, permute in permutes.items():
        fit, run = fits[subset], _run(permute, samples)
        is_mirrored = everything - subset not in permutes and bool(subset)
        mirrored, zeros = everything - subset, variances[everything]
        variances[subset] = zeros
        if is_mirrored:
            variances[mirrored] = zeros
        if fit is not None and not run.equal(partners):
            a, b = fit
            of_rows, of_columns = a + weights @ b, weights @ a + b
            variances[subset], of_mirrored = _left_over(permute, fit, partners, chosen)
            if is_mirrored:
                variances[mirrored] = of_mirrored
        else:
            whole = permute.values.new_zeros(samples, samples, permute.values.shape[1], dtype=torch.float64)
            whole[permute.rows, permute.columns] = permute.values.double()
            of_rows = torch.einsum("ij,ijc->ic", weights, whole)
            of_columns = torch.einsum("ij,jic->ic", weights, whole)
        values[subset] = at_class(of_rows)
        if is_mirrored:
            values[mirrored] = at_class(of_columns)
    return Game(modalities, values, variances)


def _left_over(
    permute: Permutation, fit: tuple[Tensor, Tensor], partners: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared standard errors of a fit's values for each row and each column, at the sample's class.

    What the fit leaves over of a sample's pairs, spread over their number ``R``, and once more over ``R`` as what it
    gives for each partner has such an error too. The more of all partners the pairs cover, the smaller the error.
    """
    samples, pairs = len(chosen), len(permute.rows)
    rest = permute.values.double() - fit[0][permute.rows] - fit[1][permute.columns]
    squares, counts = torch.zeros(2, samples, dtype=torch.float64), torch.zeros(2, samples, dtype=torch.float64)
    for side, places in enumerate((permute.rows, permute.columns)):
        of_class = rest.gather(1, chosen[places][:, None])[:, 0].square()
        squares[side].index_add_(0, places, of_class)
        counts[side].index_add_(0, places, torch.ones_like(of_class))
    spread = squares.sum(0) / counts.sum(0) * pairs / max(pairs - 2 * samples + 1, 1)
    first, second = spread / counts * (1 + 1 / counts) * (1 - counts / partners.sum(1)).clamp_min(0)
    return first, second


def _run(permute: Permutation, samples: int) -> Tensor:
    """``(samples, samples)`` 1 where a pair was run."""
    run = torch.zeros(samples, samples, dtype=torch.float64)
    run[permute.rows, permute.columns] = 1
    return run


def additive_projection(samples: int, permutes: Mapping[Subset, Permutation]) -> Tensor:
    """What an additive model of the modalities would say (EMAP, Hessel & Lee 2020), of two modalities.

    The least-squares fit ``a_i + b_j`` to the pairs that were run, at the intact sample (i, i): with all pairs the
    published mean of rows plus mean of columns less the mean of all. The intact output itself is not among the pairs:
    beside few of them it would answer for the fit, and an XOR would seem to add up.

    Parameters
    ----------
    samples
        How many there are.
    permutes
        Of centred logits.

    Returns
    -------
    Tensor
        ``(samples, classes)``; NaN where the fit is not determined, and of more than two modalities.

    Examples
    --------
    >>> rows, columns = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    >>> pairs = Permutation(rows, columns, torch.tensor([[0.0], [2.0], [1.0], [3.0]]))
    >>> additive_projection(2, {frozenset({0}): pairs}).round(decimals=3).tolist()
    [[0.0], [3.0]]
    """
    permute, *others = permutes.values()
    fit = None if others else additive_fit(permute, samples)
    if fit is None:
        return torch.full((samples, permute.values.shape[1]), torch.nan, dtype=torch.float64)
    return fit[0] + fit[1]


def contribution_shares(phi: Tensor) -> Tensor:
    """Share of the mean contribution of a group of samples that each modality has.

    Shares of the mean, not the mean of shares of absolute values: noise biases the latter, and they hide conflict.

    Parameters
    ----------
    phi
        ``(samples, modalities)``; samples with NaN are left out.

    Returns
    -------
    Tensor
        ``(modalities,)``, sum to 1; a modality that opposes the predictions has a negative share. NaN where the
        means do not sum to more than 0.

    Examples
    --------
    >>> contribution_shares(torch.tensor([[0.5, 0.1], [0.1, 0.1]]))
    tensor([0.7500, 0.2500])
    """
    means = phi[phi.isfinite().all(1)].mean(0)
    return torch.where(means.sum() > 0, means / means.sum(), torch.nan)


def partner_shifts(samples: int, partners: int, seed: int = 0) -> Sequence[int]:
    """By how many places to go on to a sample's partners, around a circle of samples.

    They are symmetric, so that each of two samples is the other's partner, and connect all rows and columns of the
    pairs, so that `additive_fit` is determined. All of them where there are no more samples.

    Parameters
    ----------
    samples
        How many, at least 2.
    partners
        How many of each, even and at least 4.
    seed
        Of the choice.

    Raises
    ------
    SettingError
        If ``partners`` is odd or below 4, with which no fit is determined.

    Examples
    --------
    >>> shifts = partner_shifts(samples=100, partners=4)
    >>> len(shifts), sorted(100 - shift for shift in shifts) == sorted(shifts)
    (4, True)
    """
    if samples - 1 <= partners:
        return range(1, samples)
    if partners < 4 or partners % 2:  # no such choice is symmetric and connects all
        raise SettingError(f"partners must be an even number from 4 on; got {partners}.")
    generator = torch.Generator().manual_seed(seed)
    half = (samples - 1) // 2
    while True:
        found = (torch.randperm(half, generator=generator)[: partners // 2] + 1).tolist()
        shifts = [*found, *(samples - shift for shift in found)]
        if math.gcd(samples, *(shift - shifts[0] for shift in shifts)) == 1:
            return shifts
