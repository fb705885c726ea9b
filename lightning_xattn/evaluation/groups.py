"""Sums by group (patient, recording), for intervals that know that samples of one group are not independent.

Only what occurs has a place. Numbers take one for each group, class and outcome. Scores take one for each group,
outcome and bin: at most one a sample, and no more than there are bins, however many samples a group has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xattn.core.group_keys import UNKNOWN_GROUP
from lightning_xattn.functional import (
    Separation,
    grouped_mean_interval,
    grouped_proportion_interval,
    grouped_separation,
)
from lightning_xattn.functional.intervals import MINIMUM_GROUP

ROWS_IN_MEMORY = 4096
"""So many samples wait on their device before they are added up: bounded memory, and a GPU seldom waits."""

Batch = tuple[Tensor, Tensor, Tensor]
"""Of some samples ``(batch, 3)`` group, class and outcome, ``(batch, scores)`` bins, ``(batch, columns, 2)`` terms."""


@dataclass(frozen=True, eq=False)
class GroupSums:
    """Counts and sums of every number by group, class and outcome, and counts of every score by group and outcome.

    It never changes: adding gives another one, which shares what is old.

    Attributes
    ----------
    cells, sums
        ``(cells, 3)`` int64 group, class and outcome; ``(cells, columns, 2)`` float64 count and sum.
    score_cells, score_counts
        ``(score cells, 4)`` int64 group, outcome, score and bin; ``(score cells,)`` float64 samples.
    waiting
        Batches that are not in the sums yet.
    """

    cells: Tensor
    sums: Tensor
    score_cells: Tensor
    score_counts: Tensor
    waiting: tuple[Batch, ...] = ()

    @classmethod
    def empty(cls, columns: int) -> GroupSums:
        """No samples; of so many numbers."""
        return cls(
            torch.zeros(0, 3, dtype=torch.int64),
            torch.zeros(0, columns, 2, dtype=torch.float64),
            torch.zeros(0, 4, dtype=torch.int64),
            torch.zeros(0, dtype=torch.float64),
        )

    @classmethod
    def merged(cls, parts: Sequence[GroupSums]) -> GroupSums:
        """Add up several, as those of several processes."""
        whole = [part.settled() for part in parts]
        return cls(
            *_fold(torch.cat([part.cells for part in whole]), torch.cat([part.sums for part in whole])),
            *_fold(torch.cat([part.score_cells for part in whole]), torch.cat([part.score_counts for part in whole])),
        )

    def add(self, groups: Tensor, classes: Tensor, outcomes: Tensor, bins: Tensor, terms: Tensor) -> GroupSums:
        """Add a batch.

        Parameters
        ----------
        groups
            ``(batch,)`` int64, any numbers.
        classes, outcomes
            ``(batch,)`` int64.
        bins
            ``(batch, scores)`` int64 bin of each score; -1 where it is undefined.
        terms
            ``(batch, columns, 2)`` of each number 1 and its value, 0 and 0 where it is undefined.
        """
        batch = torch.stack([groups, classes, outcomes], dim=1), bins, terms
        more = GroupSums(self.cells, self.sums, self.score_cells, self.score_counts, (*self.waiting, batch))
        # The more there is, the more waits until all of it is gone through.
        enough = max(ROWS_IN_MEMORY, len(self.cells))
        return more.settled() if sum(len(keys) for keys, _, _ in more.waiting) >= enough else more

    def settled(self) -> GroupSums:
        """The same with nothing waiting, on the CPU."""
        if not self.waiting:
            return self
        keys, bins, terms = (torch.cat(parts).cpu() for parts in zip(*self.waiting, strict=True))
        sample, score = (bins >= 0).nonzero(as_tuple=True)
        score_cells = torch.stack([keys[sample, 0], keys[sample, 2], score, bins[sample, score]], dim=1)
        added = GroupSums(
            *_fold(keys, terms.double()),
            *_fold(score_cells, torch.ones(len(score_cells), dtype=torch.float64)),
        )
        return GroupSums.merged([GroupSums(self.cells, self.sums, self.score_cells, self.score_counts), added])

    def with_classes(self, of_class: Tensor) -> GroupSums:
        """The same with other classes, ``(classes,)`` for each class that there is."""
        whole = self.settled()
        cells = whole.cells.clone()
        cells[:, 1] = of_class[cells[:, 1]]
        return GroupSums(*_fold(cells, whole.sums), whole.score_cells, whole.score_counts)

    def relabelled(self, class_id: int, outcome: int, dropped: Sequence[int]) -> GroupSums:
        """The same with all samples in one class and of one outcome, without some of the numbers."""
        whole = self.settled()
        cells, score_cells = whole.cells.clone(), whole.score_cells.clone()
        cells[:, 1], cells[:, 2], score_cells[:, 1] = class_id, outcome, outcome
        cells, sums = _fold(cells, whole.sums)
        sums[:, list(dropped)] = 0
        return GroupSums(cells, sums, *_fold(score_cells, whole.score_counts))

    def count(self, column: int, class_id: int | None = None, outcome: int | None = None) -> int:
        """How many known groups have samples of a class and an outcome in which a number is defined."""
        groups, counts, _ = self._by_group(column, class_id, outcome)
        return int((counts[groups != UNKNOWN_GROUP] > 0).sum())

    def size(self, column: int, group: int) -> int:
        """How many samples of a group have a number."""
        return int(self.sums[self.cells[:, 0] == group, column, 0].sum())

    def interval(self, column: int, class_id: int | None = None, outcome: int | None = None) -> tuple[float, float]:
        """95 % CI of a number's mean over the samples of a class and an outcome, see `grouped_mean_interval`."""
        if self.count(column, class_id, outcome) < MINIMUM_GROUP:
            return math.nan, math.nan
        _, counts, sums = self._by_group(column, class_id, outcome)
        return grouped_mean_interval(counts, sums)

    def share_interval(self, column: int, outcome: int, other: int, class_id: int | None = None) -> tuple[float, float]:
        """95 % CI of the share of an outcome among two, of a class's samples, see `grouped_proportion_interval`.

        ``column`` is a number that all samples have.
        """
        parts = [self._by_group(column, class_id, which) for which in (outcome, other)]
        terms = [torch.stack([counts, counts * (i == 0)], dim=1) for i, (_, counts, _) in enumerate(parts)]
        groups, totals = _fold(torch.cat([of[0] for of in parts])[:, None], torch.cat(terms))
        known = groups[:, 0][totals[:, 0] > 0] != UNKNOWN_GROUP
        if known.sum() < MINIMUM_GROUP:
            return math.nan, math.nan
        return grouped_proportion_interval(totals[:, 0], totals[:, 1])

    def separation(self, score: int, correct: int, incorrect: int) -> Separation:
        """Does a score tell two outcomes apart? See `grouped_separation`."""
        cells, counts = self.score_cells, self.score_counts
        columns = [torch.where(cells[:, 1] == outcome, counts, 0) for outcome in (correct, incorrect)]
        of_score = (cells[:, 2] == score) & (columns[0] + columns[1] > 0)
        groups, by_outcome = cells[of_score, 0], torch.stack(columns, dim=1)[of_score]
        return grouped_separation(cells[of_score, 3], groups, by_outcome, unknown=UNKNOWN_GROUP)

    def _by_group(self, column: int, class_id: int | None, outcome: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Each group, its count and its sum."""
        chosen = torch.ones(len(self.cells), dtype=torch.bool)
        for place, wanted in ((1, class_id), (2, outcome)):
            if wanted is not None:
                chosen &= self.cells[:, place] == wanted
        groups, totals = _fold(self.cells[chosen, :1], self.sums[chosen, column])
        return groups[:, 0], totals[:, 0], totals[:, 1]


def _fold(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the values of equal keys: a group, and small numbers from 0 on."""
    if not len(keys):
        return keys, values
    # One number for each key: to compare numbers is many times as fast as to compare rows.
    _, code = keys[:, 0].unique(return_inverse=True)
    for column in keys[:, 1:].unbind(1):
        code = code * (column.max() + 1) + column
    codes, index = code.unique(return_inverse=True)
    unique = keys.new_empty(len(codes), keys.shape[1])
    unique[index] = keys
    return unique, values.new_zeros(len(codes), *values.shape[1:]).index_add(0, index, values)
