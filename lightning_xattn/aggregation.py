"""Running sums of every number by class and outcome, and what an epoch's sums say.

Accumulators hold sums and counts only, so a short last batch weighs what it should, samples may come in any order,
and several processes give what one gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_xattn.attention import Direction
from lightning_xattn.functional import (
    Rows,
    Separation,
    class_adjusted_gap,
    sample_statistics,
    score_bins,
    separation,
)
from lightning_xattn.functional.outcomes import BINS

INCORRECT, CORRECT, UNKNOWN = range(3)
"""Outcome of a sample; unknown without a prediction or a target."""

SCORE_RANGES = {"alignment": (-1.0, 1.0), "entropy": (0.0, 1.0)}
"""The scores that are compared between correct and incorrect predictions, with the ranges of their histograms."""


class LayerAccumulator(Metric):
    """Sums of one layer's numbers over an epoch, by class and outcome.

    Parameters
    ----------
    like
        The prepared rows of a first batch, forward direction first: they say which numbers and maps there are.
    n_classes
        Number of classes; 0 when there are none. Samples without a class have a place of their own.
    """

    full_state_update = False
    moments: Tensor
    histograms: Tensor
    ragged: Tensor
    ties: Tensor

    def __init__(self, like: Sequence[Rows], n_classes: int) -> None:
        super().__init__()
        self.n_classes = n_classes
        self.columns = tuple(sample_statistics(*like))
        self.shapes = {rows.direction: (rows.weights.shape[2], rows.tokens) for rows in like}
        self.heads = {rows.direction: rows.weights.shape[1] for rows in like}
        places = n_classes + 1
        # float64 keeps long sums exact; Apple's GPUs do not have it.
        self._dtype_of_sums = torch.float32 if like[0].weights.device.type == "mps" else torch.float64
        # (class, outcome), column, (count, sum, sum of squares)
        self._add("moments", places * 3, len(self.columns), 3)
        # (score, outcome), bin
        self._add("histograms", len(SCORE_RANGES) * 3 * BINS)
        self._add("ragged", 1)
        self._add("ties", 1)
        for direction, (queries, keys) in self.shapes.items():
            # class, query, key, (sum of weights, number of rows)
            self._add(f"map_{direction}", places, queries, keys, 2)
        self.to(like[0].weights.device)

    def _add(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=self._dtype_of_sums), dist_reduce_fx="sum")

    def update(self, rows: Sequence[Rows], classes: Tensor, outcomes: Tensor, tied: Tensor) -> None:
        """Add a batch.

        Parameters
        ----------
        rows
            As ``like`` at construction; other token counts are allowed, but end the mean maps of this epoch.
        classes
            ``(batch,)`` int64 class ids; ids outside [0, n_classes) count as without a class.
        outcomes
            ``(batch,)`` int64 of ``INCORRECT``, ``CORRECT``, ``UNKNOWN``.
        tied
            ``(batch,)`` bool: more than one class has the top share of a soft target.
        """
        # Sums are replaced, never changed in place: validation runs in inference mode, and a tensor that was made
        # there cannot be changed in place outside of it.
        statistics = sample_statistics(*rows)
        values = torch.stack([statistics[name].to(self._dtype_of_sums) for name in self.columns], dim=1)
        defined = values.isfinite()
        values = torch.where(defined, values, 0)
        terms = torch.stack([defined.to(values.dtype), values, values**2], dim=-1)
        classes = torch.where((classes >= 0) & (classes < self.n_classes), classes, self.n_classes)
        self.moments = self.moments.index_add(0, classes * 3 + outcomes, terms)

        for i, (name, (low, high)) in enumerate(SCORE_RANGES.items()):
            if name in self.columns:
                column = self.columns.index(name)
                place = (i * 3 + outcomes) * BINS + score_bins(values[:, column], low, high)
                self.histograms = self.histograms.index_add(0, place, defined[:, column].to(values.dtype))

        self.ties = self.ties + tied.sum()
        if any((r.weights.shape[2], r.tokens) != self.shapes[r.direction] for r in rows):
            self.ragged = self.ragged + 1
            return
        for r in rows:
            weights = r.weights[..., : r.tokens].sum(1)
            seen = r.valid[..., None] if r.token_visible is None else r.valid[..., None] & r.token_visible
            counts = seen.sum(1).expand(weights.shape)
            state = f"map_{r.direction}"
            terms = torch.stack([weights, counts], dim=-1).to(self._dtype_of_sums)
            setattr(self, state, getattr(self, state).index_add(0, classes, terms))

    def compute(self) -> LayerSummary:
        """What the sums say so far, on the CPU."""
        maps = {}
        if not self.ragged.any():
            for direction in self.shapes:
                sums, counts = getattr(self, f"map_{direction}").cpu().unbind(-1)
                maps[direction] = (sums / counts)[: self.n_classes or 1]
        return LayerSummary(
            columns=self.columns,
            heads=self.heads,
            moments=self.moments.cpu().unflatten(0, (-1, 3)),
            histograms=self.histograms.cpu().reshape(len(SCORE_RANGES), 3, BINS),
            ties=int(self.ties),
            maps=maps,
        )


class LayerSummary:
    """An epoch of one layer: count, mean and standard deviation of every number, by class and outcome.

    Parameters
    ----------
    columns
        Names of the numbers, see ``sample_statistics``.
    heads
        Number of heads by direction, forward first.
    moments
        ``(classes + 1, outcomes, columns, 3)``: count, sum, sum of squares; the last class is "no class".
    histograms
        ``(scores, outcomes, bins)`` in the order of ``SCORE_RANGES``.
    maps
        By direction ``(classes, queries, keys)``: attention averaged over heads and samples, NaN for an absent
        class; one map when there are no classes. Empty when the token counts changed between batches.
    ties
        Number of samples whose soft target has more than one top class; the first of them counts as the class.
    """

    # Not a dataclass: torchmetrics would take the result of ``compute`` apart and squeeze its tensors.
    def __init__(
        self,
        columns: tuple[str, ...],
        heads: dict[Direction, int],
        moments: Tensor,
        histograms: Tensor,
        maps: dict[Direction, Tensor],
        ties: int,
    ) -> None:
        self.columns = columns
        self.heads = heads
        self.moments = moments
        self.histograms = histograms
        self.maps = maps
        self.ties = ties

    @property
    def n_classes(self) -> int:
        """Number of classes; 0 when there are none."""
        return self.moments.shape[0] - 1

    @property
    def samples(self) -> int:
        """Number of samples."""
        # The count of invalid rows is defined for every sample.
        return self.count("invalid_rows")

    def count(self, column: str, class_id: int | None = None, outcome: int | None = None) -> int:
        """How many samples have this number, of all or of one class and outcome."""
        return int(self._moments(column, class_id, outcome)[0])

    def total(self, column: str) -> float:
        """Sum over all samples where it is defined."""
        return float(self._moments(column, None, None)[1])

    def mean(self, column: str, class_id: int | None = None, outcome: int | None = None) -> float:
        """Mean over the samples where it is defined; NaN without any."""
        count, total, _ = self._moments(column, class_id, outcome)
        return float(total / count)

    def std(self, column: str, class_id: int | None = None, outcome: int | None = None) -> float:
        """Standard deviation with n - 1; NaN with fewer than two samples."""
        count, total, squares = self._moments(column, class_id, outcome)
        if count < 2:
            return torch.nan
        return float(((squares - total**2 / count).clamp_min(0) / (count - 1)).sqrt())

    def gap(self, column: str) -> float:
        """Mean over correct minus mean over incorrect predictions."""
        return self.mean(column, outcome=CORRECT) - self.mean(column, outcome=INCORRECT)

    def class_adjusted_gap(self, column: str) -> float:
        """The gap within each class, averaged over the classes that have both outcomes."""
        by_class = self.moments[: self.n_classes, [CORRECT, INCORRECT], self.columns.index(column)]
        return class_adjusted_gap(by_class[..., 0], by_class[..., 1])

    def histogram(self, score: str, outcome: int) -> Tensor:
        """``(bins,)`` counts of a score of ``SCORE_RANGES`` over its range."""
        return self.histograms[list(SCORE_RANGES).index(score), outcome]

    def separation(self, score: str) -> Separation:
        """Does the score predict errors?"""
        return separation(self.histogram(score, CORRECT), self.histogram(score, INCORRECT))

    def undefined_share(self) -> float:
        """Share of samples without an alignment, or without an entropy where only one direction is recorded."""
        column = "alignment" if "alignment" in self.columns else "entropy"
        return 1 - self.count(column) / self.samples if self.samples else torch.nan

    def _moments(self, column: str, class_id: int | None, outcome: int | None) -> Tensor:
        selected = self.moments[:, :, self.columns.index(column)]
        selected = selected if class_id is None else selected[class_id : class_id + 1]
        selected = selected if outcome is None else selected[:, outcome : outcome + 1]
        return selected.sum((0, 1))
