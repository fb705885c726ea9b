"""Running sums of every number by class and outcome.

Accumulators hold sums and counts only, so a short last batch weighs what it should, samples may come in any order,
and several processes give what one gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_xattn.core.attention import Direction
from lightning_xattn.core.errors import ShapeError
from lightning_xattn.evaluation.groups import GroupSums
from lightning_xattn.evaluation.statistics import CONFIDENCE, SCORES, Column
from lightning_xattn.functional import Rows, score_bins, standardised_maps
from lightning_xattn.functional.outcomes import BINS, UNKNOWN


@dataclass(frozen=True)
class Layout:
    """What an accumulator has a place for.

    Parameters
    ----------
    columns
        The numbers, see ``sample_statistics``.
    n_classes
        Number of classes; 0 when there are none.
    heads
        Number of heads by direction, forward first.
    tokens
        Number of queries and of keys that are tokens, by direction.
    groups
        What groups of samples are called, such as "patients"; None where groups are not known.
    """

    columns: tuple[Column, ...]
    n_classes: int
    heads: dict[Direction, int]
    tokens: dict[Direction, tuple[int, int]]
    groups: str | None = None

    @classmethod
    def of(
        cls, rows: Sequence[Rows], statistics: Mapping[Column, Tensor], n_classes: int, groups: str | None = None
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
    def numbers(self) -> tuple[tuple[Column, ...], int, dict[Direction, int], str | None]:
        """All but the token counts: accumulators that agree in this can be merged."""
        return self.columns, self.n_classes, self.heads, self.groups

    @property
    def grouped_columns(self) -> list[Column]:
        """The numbers that are added up by group too: not those of single heads."""
        return [column for column in self.columns if column.head is None]


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

    # Not a dataclass: torchmetrics would take the result of ``compute`` apart and squeeze its tensors.
    def __init__(self, layout: Layout, states: Mapping[str, Tensor], groups: GroupSums | None) -> None:
        self.layout, self.states, self.groups = layout, states, groups

    def cpu(self) -> LayerSums:
        """The same on the CPU."""
        states = {name: values.cpu() for name, values in self.states.items()}
        return LayerSums(self.layout, states, None if self.groups is None else self.groups.settled())

    def with_classes(self, kept: Sequence[int]) -> LayerSums:
        """The same with these classes alone, in this order, and a last one that is all others."""
        of_class = torch.full((self.layout.n_classes + 1,), len(kept))
        of_class[list(kept)] = torch.arange(len(kept))
        of_class[-1] = len(kept) + 1  # samples without a class

        def merged(values: Tensor) -> Tensor:
            return values.new_zeros(len(kept) + 2, *values.shape[1:]).index_add(0, of_class, values)

        states = dict(self.states)
        states["moments"] = merged(states["moments"].unflatten(0, (-1, 3))).flatten(0, 1)
        for name in (f"map_{direction}" for direction in self.layout.tokens):
            states[name] = merged(states[name])
        groups = None if self.groups is None else self.groups.with_classes(of_class)
        return LayerSums(replace(self.layout, n_classes=len(kept) + 1), states, groups)

    def without_labels(self) -> LayerSums:
        """The same without classes and confidences, and with all outcomes unknown."""
        states = dict(self.states)
        moments, histograms = states["moments"], states["histograms"].unflatten(0, (-1, 3, BINS))
        states["moments"] = moments.new_zeros(3, *moments.shape[1:])
        states["moments"][UNKNOWN] = moments.sum(0)
        states["moments"][UNKNOWN, _places(CONFIDENCE, self.layout.columns)] = 0
        of_unknown = torch.zeros_like(histograms)
        of_unknown[:, UNKNOWN] = histograms.sum(1)
        of_unknown[list(SCORES).index(CONFIDENCE)] = 0
        states["histograms"], states["ties"] = of_unknown.flatten(), torch.zeros_like(states["ties"])
        for name in (f"map_{direction}" for direction in self.layout.tokens):
            states[name] = states[name].sum(0, keepdim=True)
        for name in (f"outcome_map_{direction}" for direction in self.layout.tokens):
            states[name] = torch.zeros_like(states[name])
        dropped = _places(CONFIDENCE, self.layout.grouped_columns)
        groups = None if self.groups is None else self.groups.relabelled(0, UNKNOWN, dropped)
        return LayerSums(replace(self.layout, n_classes=0), states, groups)


def _places(column: Column, columns: Sequence[Column]) -> list[int]:
    """Where a number stands; nowhere in sums that do not have it."""
    return [place for place, one in enumerate(columns) if one == column]


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
        self._add("histograms", len(SCORES) * 3 * BINS)
        self._add("ragged", 1)
        self._add("ties", 1)
        for direction, (queries, keys) in layout.tokens.items():
            # class, query, key, (sum of weights, number of rows), and the same by outcome
            self._add(f"map_{direction}", places, queries, keys, 2)
            self._add(f"outcome_map_{direction}", 3, queries, keys, 2)
        queries, keys = next(iter(layout.tokens.values()))
        # sums of both directions' standardised maps
        self._add("null_maps", 2, queries, keys)
        # (sum of alignments, samples in the sums, samples whose maps cannot be compared with others')
        self._add("null_terms", 3)
        self._groups = None if layout.groups is None else GroupSums.empty(len(layout.grouped_columns))
        # Made once, so that no GPU waits for it in each batch.
        self._grouped = torch.tensor([layout.columns.index(column) for column in layout.grouped_columns], device=device)
        self.to(device)

    def _add(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=self._dtype_of_sums), dist_reduce_fx="sum")

    # Sums are replaced, never changed in place: validation runs in inference mode, and a tensor that was made there
    # cannot be changed in place outside of it.

    def update(
        self,
        rows: Sequence[Rows],
        statistics: Mapping[Column, Tensor],
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
            self._add_maps(rows, classes, outcomes)
        else:
            self.ragged = self.ragged + 1

    def _add_numbers(
        self, statistics: Mapping[Column, Tensor], classes: Tensor, outcomes: Tensor, groups: Tensor | None
    ) -> None:
        columns = self.layout.columns
        values = torch.stack([statistics[column].to(self._dtype_of_sums) for column in columns], dim=1)
        defined = values.isfinite()
        values = torch.where(defined, values, 0)
        terms = torch.stack([defined.to(values.dtype), values, values**2], dim=-1)
        self.moments = self.moments.index_add(0, classes * 3 + outcomes, terms)
        bins = torch.full((len(values), len(SCORES)), -1, device=values.device)
        for i, (score, (low, high)) in enumerate(SCORES.items()):
            if score in columns:
                place = columns.index(score)
                of_score = score_bins(values[:, place], low, high)
                bins[:, i] = torch.where(defined[:, place], of_score, -1)
                cells = (i * 3 + outcomes) * BINS + of_score
                self.histograms = self.histograms.index_add(0, cells, defined[:, place].to(values.dtype))
        if self._groups is not None:
            if groups is None:
                raise ShapeError(f"This batch has no {self.layout.groups}, though the first one had.")
            self._groups = self._groups.add(groups, classes, outcomes, bins, terms[:, self._grouped, :2])

    def _add_maps(self, rows: Sequence[Rows], classes: Tensor, outcomes: Tensor) -> None:
        for r in rows:
            weights = r.weights[..., : r.tokens].sum(1)
            seen = r.valid[..., None] if r.token_visible is None else r.valid[..., None] & r.token_visible
            counts = seen.sum(1).expand(weights.shape)
            cells = torch.stack([weights, counts], dim=-1).to(self._dtype_of_sums)
            for state, places in ((f"map_{r.direction}", classes), (f"outcome_map_{r.direction}", outcomes)):
                setattr(self, state, getattr(self, state).index_add(0, places, cells))
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

    @classmethod
    def of(cls, sums: LayerSums, device: torch.device | str) -> LayerAccumulator:
        """One that goes on from these sums."""
        accumulator = cls(sums.layout, device)
        for name, values in sums.states.items():
            setattr(accumulator, name, values.to(device))
        accumulator._groups = sums.groups
        return accumulator

    def compute(self) -> LayerSums:
        """The sums so far, on the CPU."""
        return self.sums().cpu()


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
                f"Different attention was recorded: {_say_layout(layout)} in one place, {_say_layout(part.layout)} in "
                "another. Every process must run the same model with the same settings."
            )
        same = {name: values for name, values in part.states.items() if values.shape == total[name].shape}
        total |= {name: total[name] + values for name, values in same.items()}
        if len(same) < len(part.states):
            total["ragged"] = total["ragged"] + 1
    grouped = [part.groups for part in parts if part.groups is not None]
    return LayerSums(layout, total, GroupSums.merged(grouped) if grouped else None)


def _say_layout(layout: Layout) -> str:
    heads = ", ".join(f"{heads} heads {direction}" for direction, heads in layout.heads.items())
    groups = f", in {layout.groups}" if layout.groups else ""
    return f"{layout.n_classes} classes and {heads}{groups}"
