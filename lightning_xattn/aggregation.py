"""Running sums of every number by class and outcome, and what an epoch's sums say.

Accumulators hold sums and counts only, so a short last batch weighs what it should, samples may come in any order,
and several processes give what one gives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_xattn.attention import Direction
from lightning_xattn.errors import ShapeError
from lightning_xattn.functional import (
    Rows,
    Separation,
    alignment_null,
    class_adjusted_gap,
    mean_interval,
    score_bins,
    separation,
    standardised_maps,
)
from lightning_xattn.functional.outcomes import BINS
from lightning_xattn.group_keys import UNKNOWN_GROUP
from lightning_xattn.groups import GroupSums

INCORRECT, CORRECT, UNKNOWN = range(3)
"""Outcome of a sample; unknown without a prediction or a target."""

SCORE_RANGES = {"alignment": (-1.0, 1.0), "entropy": (0.0, 1.0)}
"""The scores that are compared between correct and incorrect predictions, with the ranges of their histograms."""


@dataclass(frozen=True)
class Layout:
    """What an accumulator has a place for.

    Parameters
    ----------
    columns
        Names of the numbers, see ``sample_statistics``.
    n_classes
        Number of classes; 0 when there are none.
    heads
        Number of heads by direction, forward first.
    tokens
        Number of queries and of keys that are tokens, by direction.
    groups
        What groups of samples are called, such as "patients"; None where groups are not known.
    """

    columns: tuple[str, ...]
    n_classes: int
    heads: dict[Direction, int]
    tokens: dict[Direction, tuple[int, int]]
    groups: str | None = None

    @classmethod
    def of(
        cls, rows: Sequence[Rows], statistics: Mapping[str, Tensor], n_classes: int, groups: str | None = None
    ) -> Layout:
        """The layout for the prepared rows of a first batch, forward direction first, and its ``sample_statistics``."""
        return cls(
            columns=tuple(statistics),
            n_classes=n_classes,
            heads={r.direction: r.weights.shape[1] for r in rows},
            tokens={r.direction: (r.weights.shape[2], r.tokens) for r in rows},
            groups=groups,
        )

    @property
    def numbers(self) -> tuple[tuple[str, ...], int, dict[Direction, int], str | None]:
        """All but the token counts: accumulators that agree in this can be merged."""
        return self.columns, self.n_classes, self.heads, self.groups

    @property
    def grouped_columns(self) -> list[str]:
        """The numbers that are added up by group too: those of a layer, not those of its single heads."""
        return [name for name in self.columns if not re.search(r"/head_\d+$", name)]


@dataclass(frozen=True, eq=False)
class LayerSums:
    """What an accumulator has added up; adding more leaves it as it is.

    Attributes
    ----------
    layout
        What there is.
    states
        The sums by name.
    groups
        Sums by group; None where groups are not known.
    """

    layout: Layout
    states: Mapping[str, Tensor]
    groups: GroupSums | None

    def cpu(self) -> LayerSums:
        """The same on the CPU."""
        states = {name: values.cpu() for name, values in self.states.items()}
        return LayerSums(self.layout, states, None if self.groups is None else self.groups.settled())

    def without_labels(self) -> LayerSums:
        """The same without classes, and with all outcomes unknown."""
        states = dict(self.states)
        moments, histograms = states["moments"], states["histograms"].unflatten(0, (-1, 3, BINS))
        states["moments"] = moments.new_zeros(3, *moments.shape[1:])
        states["moments"][UNKNOWN] = moments.sum(0)
        of_unknown = torch.zeros_like(histograms)
        of_unknown[:, UNKNOWN] = histograms.sum(1)
        states["histograms"], states["ties"] = of_unknown.flatten(), torch.zeros_like(states["ties"])
        for name in (f"map_{direction}" for direction in self.layout.tokens):
            states[name] = states[name].sum(0, keepdim=True)
        groups = None if self.groups is None else self.groups.relabelled(0, UNKNOWN)
        return LayerSums(replace(self.layout, n_classes=0), states, groups)


class LayerAccumulator(Metric):
    """Sums of one layer's numbers over an epoch, by class and outcome.

    Parameters
    ----------
    layout
        What there is to add up.
    device
        Where the batches are.
    """

    full_state_update = False
    moments: Tensor
    histograms: Tensor
    null_maps: Tensor
    null_terms: Tensor
    ragged: Tensor
    ties: Tensor

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        # Processes are merged all at once, see ``merge_sums``, and not state by state when computing.
        super().__init__(sync_on_compute=False)
        self.layout = layout
        # float64 keeps long sums exact; Apple's GPUs do not have it.
        self._dtype_of_sums = torch.float32 if torch.device(device).type == "mps" else torch.float64
        places = layout.n_classes + 1  # samples without a class have one of their own
        # (class, outcome), column, (count, sum, sum of squares)
        self._add("moments", places * 3, len(layout.columns), 3)
        # (score, outcome), bin
        self._add("histograms", len(SCORE_RANGES) * 3 * BINS)
        self._add("ragged", 1)
        self._add("ties", 1)
        for direction, (queries, keys) in layout.tokens.items():
            # class, query, key, (sum of weights, number of rows)
            self._add(f"map_{direction}", places, queries, keys, 2)
        queries, keys = next(iter(layout.tokens.values()))
        # sums of both directions' standardised maps
        self._add("null_maps", 2, queries, keys)
        # (sum of alignments, samples in the sums, samples whose maps cannot be compared with others')
        self._add("null_terms", 3)
        self._groups = None if layout.groups is None else GroupSums.empty(len(layout.grouped_columns))
        # Made once, so that no GPU waits for it in each batch.
        self._grouped = torch.tensor([layout.columns.index(name) for name in layout.grouped_columns], device=device)
        self.to(device)

    def _add(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=self._dtype_of_sums), dist_reduce_fx="sum")

    # Sums are replaced, never changed in place: validation runs in inference mode, and a tensor that was made there
    # cannot be changed in place outside of it.

    def update(
        self,
        rows: Sequence[Rows],
        statistics: Mapping[str, Tensor],
        classes: Tensor,
        outcomes: Tensor,
        tied: Tensor,
        groups: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Parameters
        ----------
        rows
            The directions that the layout was made of; other token counts are allowed, but end the mean maps and the
            alignment between different samples of this epoch.
        statistics
            Their ``sample_statistics``.
        classes
            ``(batch,)`` int64 class ids; ids outside [0, n_classes) count as without a class.
        outcomes
            ``(batch,)`` int64 of ``INCORRECT``, ``CORRECT``, ``UNKNOWN``.
        tied
            ``(batch,)`` bool: more than one class has the top share of a soft target.
        groups
            ``(batch,)`` int64 group of each sample, where the layout has groups.
        """
        n_classes = self.layout.n_classes
        classes = torch.where((classes >= 0) & (classes < n_classes), classes, n_classes)
        self._add_numbers(statistics, classes, outcomes, groups)
        self.ties = self.ties + tied.sum()
        if all((r.weights.shape[2], r.tokens) == self.layout.tokens[r.direction] for r in rows):
            self._add_maps(rows, classes)
        else:
            self.ragged = self.ragged + 1

    def _add_numbers(
        self, statistics: Mapping[str, Tensor], classes: Tensor, outcomes: Tensor, groups: Tensor | None
    ) -> None:
        columns = self.layout.columns
        values = torch.stack([statistics[name].to(self._dtype_of_sums) for name in columns], dim=1)
        defined = values.isfinite()
        values = torch.where(defined, values, 0)
        terms = torch.stack([defined.to(values.dtype), values, values**2], dim=-1)
        self.moments = self.moments.index_add(0, classes * 3 + outcomes, terms)
        bins = torch.full((len(values), len(SCORE_RANGES)), -1, device=values.device)
        for i, (name, (low, high)) in enumerate(SCORE_RANGES.items()):
            if name in columns:
                column = columns.index(name)
                of_score = score_bins(values[:, column], low, high)
                bins[:, i] = torch.where(defined[:, column], of_score, -1)
                place = (i * 3 + outcomes) * BINS + of_score
                self.histograms = self.histograms.index_add(0, place, defined[:, column].to(values.dtype))
        if self._groups is not None:
            if groups is None:
                raise ShapeError(f"This batch has no {self.layout.groups}, though the first one had.")
            self._groups = self._groups.add(groups, classes, outcomes, bins, terms[:, self._grouped, :2])

    def _add_maps(self, rows: Sequence[Rows], classes: Tensor) -> None:
        for r in rows:
            weights = r.weights[..., : r.tokens].sum(1)
            seen = r.valid[..., None] if r.token_visible is None else r.valid[..., None] & r.token_visible
            counts = seen.sum(1).expand(weights.shape)
            state = f"map_{r.direction}"
            cells = torch.stack([weights, counts], dim=-1).to(self._dtype_of_sums)
            setattr(self, state, getattr(self, state).index_add(0, classes, cells))
        if len(rows) == 2:
            x, y, whole = standardised_maps(*rows)
            aligned = (x * y).sum((1, 2))
            defined = aligned.isfinite()
            counted = (defined & whole)[:, None, None]
            sums = torch.stack([torch.where(counted, maps, 0).sum(0) for maps in (x, y)])
            self.null_maps = self.null_maps + sums
            terms = [torch.where(defined & whole, aligned, 0), defined & whole, defined & ~whole]
            self.null_terms = self.null_terms + torch.stack([term.sum() for term in terms])

    def sums(self) -> LayerSums:
        """What there is so far, where the batches are."""
        return LayerSums(self.layout, {name: getattr(self, name) for name in self.metric_state}, self._groups)

    def load(self, sums: LayerSums) -> None:
        """Go on from other sums of the same layout."""
        for name, values in sums.states.items():
            setattr(self, name, values.to(self.device))
        self._groups = sums.groups

    def compute(self) -> LayerSummary:
        """Summarise the sums so far, on the CPU."""
        return LayerSummary(self.sums().cpu())


def merge_sums(parts: Sequence[LayerSums]) -> LayerSums:
    """Add up the sums of several accumulators, as those of several processes; all on the CPU.

    Raises
    ------
    ShapeError
        If they differ in more than their token counts; those only end the maps.
    """
    layout, total = parts[0].layout, dict(parts[0].states)
    for part in parts[1:]:
        if part.layout.numbers != layout.numbers:
            raise ShapeError(
                f"Different attention was recorded: {_describe(layout)} in one place, {_describe(part.layout)} in "
                "another. Every process must run the same model with the same settings."
            )
        same = {name: values for name, values in part.states.items() if values.shape == total[name].shape}
        total |= {name: total[name] + values for name, values in same.items()}
        if len(same) < len(part.states):
            total["ragged"] = total["ragged"] + 1
    grouped = [part.groups for part in parts if part.groups is not None]
    return LayerSums(layout, total, GroupSums.merged(grouped) if grouped else None)


def _describe(layout: Layout) -> str:
    heads = ", ".join(f"{heads} heads {direction}" for direction, heads in layout.heads.items())
    groups = f", in {layout.groups}" if layout.groups else ""
    return f"{layout.n_classes} classes and {heads}{groups}"


class LayerSummary:
    """An epoch of one layer: count, mean and standard deviation of every number, by class and outcome.

    Parameters
    ----------
    sums
        The sums of a ``LayerAccumulator``, or several merged.

    Attributes
    ----------
    layout
        Names of the numbers, classes, heads, tokens, and what groups are called.
    moments
        ``(classes + 1, outcomes, columns, 3)``: count, sum, sum of squares; the last class is "no class".
    histograms
        ``(scores, outcomes, bins)`` in the order of ``SCORE_RANGES``.
    maps
        By direction ``(classes, queries, keys)``: attention averaged over heads and samples, NaN for an absent
        class; one map when there are no classes. Empty when the token counts changed between batches.
    alignment_null
        Mean alignment between different samples; NaN with fewer than two, or unless all have the same tokens.
    ties
        Number of samples whose soft target has more than one top class; the first of them counts as the class.
    """

    # Not a dataclass: torchmetrics would take the result of ``compute`` apart and squeeze its tensors.
    def __init__(self, sums: LayerSums) -> None:
        self.layout, states = sums.layout, sums.states
        self._groups = None if sums.groups is None else sums.groups.settled()
        self.moments = states["moments"].unflatten(0, (-1, 3))
        self.histograms = states["histograms"].reshape(len(SCORE_RANGES), 3, BINS)
        self.ties = int(states["ties"])
        self.maps: dict[Direction, Tensor] = {}
        self.alignment_null = torch.nan
        if not states["ragged"].any():
            for direction in self.layout.tokens:
                totals, counts = states[f"map_{direction}"].unbind(-1)
                self.maps[direction] = (totals / counts)[: self.layout.n_classes or 1]
            aligned, samples, others = states["null_terms"]
            if others == 0:
                x_sum, y_sum = states["null_maps"]
                self.alignment_null = float(alignment_null(x_sum, y_sum, aligned, samples))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the numbers."""
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

    def groups(self, column: str = "invalid_rows", class_id: int | None = None, outcome: int | None = None) -> int:
        """How many groups have samples of a class and an outcome with this number; 0 where groups are not known."""
        if self._groups is None:
            return 0
        return self._groups.count(self.layout.grouped_columns.index(column), class_id, outcome)

    @property
    def ungrouped(self) -> int:
        """Number of samples whose group is not known, where other samples' groups are."""
        everyone = self.layout.grouped_columns.index("invalid_rows")
        return 0 if self._groups is None else self._groups.size(everyone, UNKNOWN_GROUP)

    def size(self, class_id: int | None = None, outcome: int | None = None) -> int:
        """Number of samples of a class and an outcome, whether their numbers are defined or not."""
        # The count of invalid rows is defined for every sample.
        return self.count("invalid_rows", class_id, outcome)

    @property
    def unclassified(self) -> int:
        """Number of samples without a class, where there are classes."""
        return self.size(self.n_classes) if self.n_classes else 0

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

    def interval(self, column: str, class_id: int | None = None, outcome: int | None = None) -> tuple[float, float]:
        """95 % interval of the mean, by groups where they are known: `grouped_mean_interval`, else `mean_interval`.

        NaN with fewer than ``MINIMUM_GROUP`` groups, or samples. Of single heads there are no sums by group, so where
        groups are known their interval is NaN too.
        """
        if self._groups is None:
            group = column, class_id, outcome
            return mean_interval(self.mean(*group), self.std(*group), self.count(*group))
        if column not in self.layout.grouped_columns:
            return math.nan, math.nan
        return self._groups.interval(self.layout.grouped_columns.index(column), class_id, outcome)

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
        """Does the score predict errors? By groups where they are known: `grouped_separation`, else `separation`."""
        if self._groups is not None:
            return self._groups.separation(list(SCORE_RANGES).index(score), CORRECT, INCORRECT)
        return separation(self.histogram(score, CORRECT), self.histogram(score, INCORRECT))

    def undefined_share(self) -> float:
        """Share of samples without an alignment, or without an entropy where only one direction is recorded."""
        column = "alignment" if "alignment" in self.columns else "entropy"
        return 1 - self.count(column) / self.samples if self.samples else torch.nan

    def _moments(self, column: str, class_id: int | None, outcome: int | None) -> Tensor:
        selected: Tensor = self.moments[:, :, self.columns.index(column)]
        selected = selected if class_id is None else selected[class_id : class_id + 1]
        selected = selected if outcome is None else selected[:, outcome : outcome + 1]
        return selected.sum((0, 1))
