"""What an epoch's sums say of one layer: means, intervals, and what tells correct from incorrect predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xattn.core.attention import Direction
from lightning_xattn.core.group_keys import UNKNOWN_GROUP
from lightning_xattn.core.notebook import ShownInNotebooks
from lightning_xattn.core.wording import describe_size
from lightning_xattn.evaluation.accumulators import LayerSums
from lightning_xattn.evaluation.statistics import INVALID_ROWS, SCORES, STATISTICS, WHOLLY_MASKED, Column, headline
from lightning_xattn.functional import (
    alignment_null,
    class_adjusted_gap,
    mean_interval,
    proportion_interval,
    separation,
    within,
)
from lightning_xattn.functional.outcomes import BINS, CORRECT, INCORRECT


@dataclass(frozen=True)
class Comparison:
    """A score of the correct predictions against that of the incorrect ones: its `Separation`, and its gaps."""

    auroc: float
    low: float
    high: float
    correct: int
    incorrect: int
    correct_groups: int | None
    incorrect_groups: int | None
    cliffs_delta: float
    gap: float
    """Mean over correct minus mean over incorrect predictions."""
    class_adjusted_gap: float
    """See `class_adjusted_gap`."""


class LayerSummary(ShownInNotebooks):
    """An epoch of one layer: count, mean and standard deviation of every number, by class and outcome.

    Count, mean and the rest of a number that the layer does not have raise a KeyError that lists those that it has.

    Parameters
    ----------
    sums
        The sums of a ``LayerAccumulator``, or several merged.

    Attributes
    ----------
    layout
        The numbers, classes, heads, tokens, and what groups are called.
    moments
        ``(classes + 1, outcomes, columns, 3)``: count, sum, sum of squares; the last class is "no class".
    histograms
        ``(scores, outcomes, bins)`` in the order of ``SCORES``.
    maps
        By direction ``(classes, queries, keys)``: attention averaged over heads and samples, NaN for an absent
        class; one map when there are no classes. Empty when the token counts changed between batches.
    outcome_maps
        By direction ``(2, queries, keys)``: the same of the incorrect and of the correct predictions, as ``INCORRECT``
        and ``CORRECT`` say; NaN without any.
    alignment_null
        Mean alignment between different samples; NaN with fewer than two, or unless all have the same tokens.
    ties
        Number of samples whose soft target has more than one top class; the first of them counts as the class.
    """

    def __init__(self, sums: LayerSums) -> None:
        self._sums, self.layout, states = sums, sums.layout, sums.states
        self._places = {column: place for place, column in enumerate(self.layout.columns)}
        self._grouped_places = {column: place for place, column in enumerate(self.layout.grouped_columns)}
        self._groups = None if sums.groups is None else sums.groups.settled()
        self.moments = states["moments"].unflatten(0, (-1, 3))
        self.histograms = states["histograms"].reshape(len(SCORES), 3, BINS)
        self.ties = int(states["ties"])
        self.maps: dict[Direction, Tensor] = {}
        self.outcome_maps: dict[Direction, Tensor] = {}
        self.alignment_null = torch.nan
        if not states["ragged"].any():
            for direction in self.layout.tokens:
                totals, counts = states[f"map_{direction}"].unbind(-1)
                self.maps[direction] = (totals / counts)[: self.layout.n_classes or 1]
                totals, counts = states[f"outcome_map_{direction}"].unbind(-1)
                self.outcome_maps[direction] = (totals / counts)[[INCORRECT, CORRECT]]
            aligned, samples, others = states["null_terms"]
            if others == 0:
                x_sum, y_sum = states["null_maps"]
                self.alignment_null = float(alignment_null(x_sum, y_sum, aligned, samples))

    def __repr__(self) -> str:
        size = describe_size(self.samples, self.groups(), self.group_noun)
        heads = ", ".join(f"{direction} of {count} heads" for direction, count in self.heads.items())
        return f"LayerSummary({size}, {self.n_classes} classes; {heads})"

    def with_classes(self, kept: Sequence[int]) -> LayerSummary:
        """The same with these classes alone, in this order, and a last one that is all others."""
        return LayerSummary(self._sums.with_classes(kept))

    @property
    def columns(self) -> tuple[Column, ...]:
        """The numbers."""
        return self.layout.columns

    @property
    def heads(self) -> dict[Direction, int]:
        """Number of heads by direction, forward first."""
        return self.layout.heads

    @property
    def n_classes(self) -> int:
        """Number of classes; 0 when there are none."""
        return self.layout.n_classes

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.size()

    @property
    def group_noun(self) -> str | None:
        """What groups are called, such as "patients"; None where they are not known: samples count as independent."""
        return self.layout.groups

    def groups(self, column: Column = INVALID_ROWS, class_id: int | None = None, outcome: int | None = None) -> int:
        """How many groups have samples of a class and an outcome with this number; 0 where groups are not known."""
        if self._groups is None:
            return 0
        return self._groups.count(self._grouped_places[column], class_id, outcome)

    @property
    def ungrouped(self) -> int:
        """Number of samples whose group is not known, where other samples' groups are."""
        return 0 if self._groups is None else self._groups.size(self._grouped_places[INVALID_ROWS], UNKNOWN_GROUP)

    def size(self, class_id: int | None = None, outcome: int | None = None) -> int:
        """Number of samples of a class and an outcome, whether their numbers are defined or not."""
        return self.count(INVALID_ROWS, class_id, outcome)

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
        return float(total / count)

    def std(self, column: Column, class_id: int | None = None, outcome: int | None = None) -> float:
        """Standard deviation with n - 1; NaN with fewer than two samples."""
        count, total, squares = self._moments(column, class_id, outcome)
        if count < 2:
            return torch.nan
        return float(((squares - total**2 / count).clamp_min(0) / (count - 1)).sqrt())

    def interval(self, column: Column, class_id: int | None = None, outcome: int | None = None) -> tuple[float, float]:
        """95 % CI of the mean, by groups where they are known: `grouped_mean_interval`, else `mean_interval`.

        Within the range of the number. NaN with fewer than ``MINIMUM_GROUP`` groups, or samples. Of single heads there
        are no sums by group, so where groups are known their interval is NaN too.
        """
        samples = column, class_id, outcome
        if self._groups is None:
            found = mean_interval(self.mean(*samples), self.std(*samples), self.count(*samples))
        elif column.head is not None:
            return math.nan, math.nan
        else:
            found = self._groups.interval(self._grouped_places[column], class_id, outcome)
        return within(found, STATISTICS[column.statistic].range)

    def accuracy_interval(self, class_id: int | None = None) -> tuple[float, float]:
        """95 % CI of the share of correct predictions, of those that are known to be correct or not.

        By groups where they are known: `grouped_proportion_interval`, else `proportion_interval`. NaN with fewer than
        ``MINIMUM_GROUP`` groups, or samples.
        """
        if self._groups is not None:
            place = self._grouped_places[INVALID_ROWS]
            return self._groups.share_interval(place, CORRECT, INCORRECT, class_id)
        correct, incorrect = (self.size(class_id, outcome) for outcome in (CORRECT, INCORRECT))
        return proportion_interval(correct, correct + incorrect)

    def gap(self, column: Column) -> float:
        """Mean over correct minus mean over incorrect predictions."""
        return self.mean(column, outcome=CORRECT) - self.mean(column, outcome=INCORRECT)

    def histogram(self, score: Column, outcome: int) -> Tensor:
        """``(bins,)`` counts of a score of ``SCORES`` over its range."""
        return self.histograms[list(SCORES).index(score), outcome]

    def compare(self, score: Column) -> Comparison:
        """Does a score of ``SCORES`` predict errors? By groups where they are known: `grouped_separation`."""
        if self._groups is not None:
            found = self._groups.separation(list(SCORES).index(score), CORRECT, INCORRECT)
        else:
            found = separation(self.histogram(score, CORRECT), self.histogram(score, INCORRECT))
        by_class = self.moments[: self.n_classes, [CORRECT, INCORRECT], self._places[score]]
        within = class_adjusted_gap(by_class[..., 0], by_class[..., 1])
        return Comparison(
            **vars(found), cliffs_delta=found.cliffs_delta, gap=self.gap(score), class_adjusted_gap=within
        )

    def undefined_share(self) -> float:
        """Share of samples without an alignment, or without an entropy where only one direction is recorded."""
        return 1 - self.count(headline(self.columns)) / self.samples if self.samples else torch.nan

    def _moments(self, column: Column, class_id: int | None, outcome: int | None) -> Tensor:
        if column not in self._places:
            known = ", ".join(map(str, self.columns))
            raise KeyError(f"Expected a Column, as Column.parse('alignment') is, of {known}; got {column!r}.")
        selected: Tensor = self.moments[:, :, self._places[column]]
        selected = selected if class_id is None else selected[class_id : class_id + 1]
        selected = selected if outcome is None else selected[:, outcome : outcome + 1]
        return selected.sum((0, 1))
