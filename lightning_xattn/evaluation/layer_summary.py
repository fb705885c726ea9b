"""What an epoch's sums say of one layer: means, intervals, and which scores differ by outcome."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_xattn.core.ids import UNKNOWN_GROUP
from lightning_xattn.core.wording import describe_size
from lightning_xattn.evaluation.accumulators import OUTCOMES, KeyedSums, LayerAccumulator
from lightning_xattn.evaluation.statistics import (
    ERROR_SIDES,
    INVALID_ROWS,
    SCORES,
    STATISTICS,
    WHOLLY_MASKED,
    Column,
    headline,
)
from lightning_xattn.functional import (
    Separation,
    alignment_null,
    class_adjusted_gap,
    grouped_mean_interval,
    grouped_proportion_interval,
    mean_interval,
    separation,
    within,
)
from lightning_xattn.functional.bins import bin_sizes
from lightning_xattn.functional.intervals import MINIMUM_GROUP
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT


@dataclass(frozen=True)
class Comparison(Separation):
    """A score of the correct predictions against that of the incorrect ones: how well it detects errors, its gaps."""

    gap: float = math.nan
    """Mean over correct minus mean over incorrect predictions."""
    class_adjusted_gap: float = math.nan
    """See `class_adjusted_gap`."""


class LayerSummary:
    """An epoch of one layer: count, mean and standard deviation of every number, by class and outcome.

    Count, mean and the rest of a number that the layer does not have raise a KeyError that lists those that it has.

    Parameters
    ----------
    sums
        Those of all batches and processes.

    Attributes
    ----------
    columns
        The numbers.
    n_classes
        Number of classes; 0 when there are none.
    heads
        Number of heads by direction, forward first.
    group_noun
        What groups are called, such as "patients"; None where they are not known: samples count as independent.
    tokens
        Number of queries and of keys that are tokens, by direction.
    moments
        ``(classes + 1, outcomes, columns, 3)`` of the numbers that are not of single heads: count, sum, sum of squares;
        the last class is "no class".
    maps
        By direction ``(classes, queries, keys)``: attention averaged over heads and samples, NaN for an absent
        class; one map of all samples when there are no classes, or more than ``MAP_CLASSES``. Of more than
        ``MAP_CELLS`` cells the means over bins of ``bin_sizes``. Empty when the token counts changed between batches.
    outcome_maps
        By direction ``(2, queries, keys)``: the same of the incorrect and of the correct predictions, as ``INCORRECT``
        and ``CORRECT`` say; NaN without any.
    alignment_null, alignment_of_maps
        Mean alignment between different samples, and of the same samples' maps with each other; NaN with fewer than
        two, or unless all have the same tokens. Of maps in bins both are of the bins: a mean over cells has less noise.
    ties
        Number of samples whose soft target has more than one top class; the first of them counts as the class.
    """

    def __init__(self, sums: LayerAccumulator) -> None:
        self._sums = sums = sums.cpu()
        # By class and outcome, of all numbers at once: an epoch asks for hundreds.
        self._totals: dict[tuple[int | None, int | None], np.ndarray] = {}
        self._comparisons: dict[Column, Comparison] = {}
        self._places = {column: place for place, column in enumerate(sums.columns)}
        self._grouped = {column: place for place, column in enumerate(sums.grouped_columns)}
        self._entropies = {column: place for place, column in enumerate(sums.entropy_columns)}
        self.columns, self.n_classes, self.heads = sums.columns, sums.n_classes, sums.heads
        self.group_noun, self.tokens, self.ties = sums.group_noun, sums.tokens, int(sums.ties)
        self.moments = _sum_by_class(sums.by_group, self.n_classes)
        self.maps, self.outcome_maps = {}, {}
        for direction, one in sums.maps.items():
            means = one[:, 0] / one[:, 1]
            self.maps[direction] = means[: max(len(means) - OUTCOMES - 1, 1)]
            self.outcome_maps[direction] = means[-OUTCOMES:][[INCORRECT, CORRECT]]
        aligned, samples, others = sums.null_terms
        x_sum, y_sum = sums.null_maps
        null = float(alignment_null(x_sum, y_sum, aligned, samples)) if others == 0 else math.nan
        self.alignment_null = null if self.maps else math.nan
        self.alignment_of_maps = float(aligned / samples) if self.alignment_null == self.alignment_null else math.nan

    def __repr__(self) -> str:
        size = describe_size(self.samples, self.groups(), self.group_noun)
        heads = ", ".join(f"{direction} of {count} heads" for direction, count in self.heads.items())
        return f"LayerSummary({size}, {self.n_classes} classes; {heads})"

    @property
    def is_binned(self) -> bool:
        """Whether the maps are in bins, so that ``alignment_null`` is no null of the alignment of all cells."""
        return any(bin_sizes(*tokens) != (1, 1) for tokens in self.tokens.values())

    def with_classes(self, kept: Sequence[int]) -> LayerSummary:
        """The same with these classes alone, in this order, and a last one that is all others."""
        return LayerSummary(self._sums.with_classes(kept))

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.size()

    def groups(self, column: Column = INVALID_ROWS, class_id: int | None = None, outcome: int | None = None) -> int:
        """How many groups have samples of a class and an outcome with this number; 0 where groups are not known."""
        if self.group_noun is None:
            return 0
        by_group = self._by_group(column, class_id, outcome)
        return int(((by_group.sums[:, 0] > 0) & (by_group.keys[:, 0] != UNKNOWN_GROUP)).sum())

    @property
    def ungrouped(self) -> int:
        """Number of samples whose group is not known, where other samples' groups are."""
        by_group = self._by_group(INVALID_ROWS)
        return int(by_group.sums[by_group.keys[:, 0] == UNKNOWN_GROUP, 0].sum())

    def size(self, class_id: int | None = None, outcome: int | None = None) -> int:
        """Number of samples of a class and an outcome, whether their numbers are defined or not."""
        return self.count(INVALID_ROWS, class_id, outcome)

    def class_sizes(self) -> list[int]:
        """Number of samples of each class."""
        counts = self.moments[: self.n_classes, :, self._places[INVALID_ROWS], 0]
        return [int(count) for count in counts.sum(1).tolist()]

    @property
    def unclassified(self) -> int:
        """Number of samples without a class, where there are classes."""
        return self.size(self.n_classes) if self.n_classes else 0

    @property
    def wholly_masked(self) -> int:
        """Number of samples of which one modality is wholly masked, so that they have no attention across."""
        return round(self.total(WHOLLY_MASKED))

    def count(self, column: Column, class_id: int | None = None, outcome: int | None = None) -> int:
        """How many samples have this number, of all or of one class and outcome."""
        return int(self._moments(column, class_id, outcome)[0])

    def total(self, column: Column) -> float:
        """Sum over all samples where it is defined."""
        return float(self._moments(column, None, None)[1])

    def mean(self, column: Column, class_id: int | None = None, outcome: int | None = None) -> float:
        """Mean over the samples where it is defined; NaN without any."""
        count, total, _ = self._moments(column, class_id, outcome)
        return float(total / count) if count else math.nan

    def std(self, column: Column, class_id: int | None = None, outcome: int | None = None) -> float:
        """Standard deviation with n - 1; NaN with fewer than two samples."""
        count, total, squares = self._moments(column, class_id, outcome)
        if count < 2:
            return math.nan
        return float(math.sqrt(max(squares - total**2 / count, 0.0) / (count - 1)))

    def interval(self, column: Column, class_id: int | None = None, outcome: int | None = None) -> tuple[float, float]:
        """95 % CI of the mean, by groups where they are known: `grouped_mean_interval`, else `mean_interval`.

        Within the range of the number. NaN with fewer than ``MINIMUM_GROUP`` groups, or samples. Of single heads there
        are no sums by group, so where groups are known their interval is NaN too.
        """
        samples = column, class_id, outcome
        if self.group_noun is None:
            found = mean_interval(self.mean(*samples), self.std(*samples), self.count(*samples))
        elif column.head is not None or self.groups(*samples) < MINIMUM_GROUP:
            return math.nan, math.nan
        else:
            found = grouped_mean_interval(*self._by_group(*samples).sums.unbind(1))
        return within(found, STATISTICS[column.statistic].range)

    def accuracy_interval(self, class_id: int | None = None) -> tuple[float, float]:
        """95 % CI of the share of correct predictions, of those that are known to be correct or not.

        By groups where they are known. NaN with fewer than ``MINIMUM_GROUP`` groups, or samples.
        """
        right, wrong = (self._by_group(INVALID_ROWS, class_id, outcome) for outcome in (CORRECT, INCORRECT))
        if self.group_noun is None:  # each sample is a group
            successes = torch.cat([torch.ones(int(right.sums[:, 0].sum())), torch.zeros(int(wrong.sums[:, 0].sum()))])
            return grouped_proportion_interval(torch.ones_like(successes), successes)
        # Of each group its samples, and those that are correct.
        both = KeyedSums(right.keys, right.sums[:, :1].expand(-1, 2)) + KeyedSums(
            wrong.keys, wrong.sums[:, :1] * torch.tensor([1.0, 0.0])
        )
        if ((both.sums[:, 0] > 0) & (both.keys[:, 0] != UNKNOWN_GROUP)).sum() < MINIMUM_GROUP:
            return math.nan, math.nan
        return grouped_proportion_interval(*both.sums.unbind(1))

    def gap(self, column: Column) -> float:
        """Mean over correct minus mean over incorrect predictions."""
        return self.mean(column, outcome=CORRECT) - self.mean(column, outcome=INCORRECT)

    def compare(self, score: Column) -> Comparison:
        """Does a score of ``SCORES`` detect errors? By groups where they are known, see `separation`."""
        if score not in self._comparisons:
            self._comparisons[score] = self._compare(score)
        return self._comparisons[score]

    def _compare(self, score: Column) -> Comparison:
        keys, counts = self._sums.scores_by_group.keys, self._sums.scores_by_group.sums
        counts = counts[:, None] * (keys[:, 1:2] == torch.tensor([CORRECT, INCORRECT]))
        chosen = (keys[:, 2] == list(SCORES).index(score)) & (counts.sum(1) > 0)
        groups = None if self.group_noun is None else keys[chosen, 0]
        by_class = self.moments[: self.n_classes, [CORRECT, INCORRECT], self._grouped[score]]
        return Comparison(
            **vars(separation(keys[chosen, 3], counts[chosen], groups, ERROR_SIDES[score.statistic])),
            gap=self.gap(score),
            class_adjusted_gap=class_adjusted_gap(by_class[..., 0], by_class[..., 1]),
        )

    def undefined_share(self) -> float:
        """Share of samples without an alignment, or without an entropy where only one direction is recorded."""
        return 1 - self.count(headline(self.columns)) / self.samples if self.samples else torch.nan

    def _moments(self, column: Column, class_id: int | None, outcome: int | None) -> np.ndarray:
        """Count, sum and sum of squares."""
        if column not in self._places:
            known = ", ".join(map(str, self.columns))
            raise KeyError(f"Expected a Column, as Column.parse('alignment') is, of {known}; got {column!r}.")
        if column.head is not None:
            return self._head_moments(column, class_id, outcome)
        samples = class_id, outcome
        if samples not in self._totals:
            classes, outcomes = (slice(None) if one is None else slice(one, one + 1) for one in samples)
            self._totals[samples] = self.moments.numpy()[classes, outcomes].sum((0, 1))
        found: np.ndarray = self._totals[samples][self._grouped[column]]
        return found

    def _head_moments(self, column: Column, class_id: int | None, outcome: int | None) -> np.ndarray:
        """As ``_moments``; of single heads there is the entropy by class, without squares, and all else in total."""
        if class_id is None and outcome is None:
            return self._sums.totals[self._places[column]].numpy()
        if outcome is not None or column not in self._entropies:
            raise KeyError(f"Of single heads there are sums of all samples, and of entropy by class; got {column}.")
        by_class = self._sums.head_entropies
        count, total = by_class.sums[by_class.keys[:, 0] == class_id, self._entropies[column]].sum(0).tolist()
        return np.array([count, total, math.nan])

    def _by_group(self, column: Column, class_id: int | None = None, outcome: int | None = None) -> KeyedSums:
        """By group ``(2,)``: how many of its samples of a class and an outcome have a number, and its sum."""
        keys, sums = self._sums.by_group.keys, self._sums.by_group.sums
        chosen = torch.ones(len(keys), dtype=torch.bool)
        for place, wanted in ((1, class_id), (2, outcome)):
            if wanted is not None:
                chosen &= keys[:, place] == wanted
        return KeyedSums.of(keys[chosen, :1], sums[chosen, self._grouped[column], :2])


def _sum_by_class(by_group: KeyedSums, n_classes: int) -> Tensor:
    """``(classes + 1, outcomes, columns, 3)`` the sums of all groups."""
    places = by_group.keys[:, 1] * OUTCOMES + by_group.keys[:, 2]
    sums = by_group.sums.new_zeros((n_classes + 1) * OUTCOMES, *by_group.sums.shape[1:])
    by_class: Tensor = sums.index_add(0, places, by_group.sums).unflatten(0, (-1, OUTCOMES))
    return by_class
