"""Running sums of every number of a layer, by class and outcome, and by group (patient, recording).

An accumulator holds sums and counts only, so a short last batch weighs what it should, samples may come in any order,
and several processes give what one gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_xattn.core.attention import Direction
from lightning_xattn.core.errors import ShapeError
from lightning_xattn.evaluation.statistics import CONFIDENCE, SCORES, Column, score_bins
from lightning_xattn.functional import Rows, standardised_maps, sum_heads
from lightning_xattn.functional.outcomes import UNKNOWN

ROWS_IN_MEMORY = 4096
"""How many samples wait on their device before they are added to the sums by group, so that a GPU seldom waits."""


@dataclass(frozen=True, eq=False)
class KeyedSums:
    """Sums by key, on the CPU; only keys that occur have a place.

    Attributes
    ----------
    keys
        ``(n, parts)`` int64: a group, any number, and then small numbers from 0 on.
    sums
        ``(n, ...)`` float64.
    """

    keys: Tensor
    sums: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> KeyedSums:
        """The sums of the values that have equal keys."""
        if not len(keys):
            return cls(keys, values)
        # One number for each key: to compare numbers is many times as fast as to compare rows.
        _, code = keys[:, 0].unique(return_inverse=True)
        for part in keys[:, 1:].unbind(1):
            code = code * (part.max() + 1) + part
        codes, index = code.unique(return_inverse=True)
        unique = keys.new_empty(len(codes), keys.shape[1])
        unique[index] = keys
        return cls(unique, values.new_zeros(len(codes), *values.shape[1:]).index_add(0, index, values))

    def __add__(self, other: KeyedSums) -> KeyedSums:
        return KeyedSums.of(torch.cat([self.keys, other.keys]), torch.cat([self.sums, other.sums]))

    def with_part(self, place: int, values: Tensor | int) -> KeyedSums:
        """The sums by the same keys with another part, ``(n,)`` or one for all, in this place."""
        keys = self.keys.clone()
        keys[:, place] = values
        return KeyedSums.of(keys, self.sums)


@dataclass(frozen=True, eq=False)
class LayerAccumulator:
    """Sums of one layer's numbers; ``a + b`` has the samples of both, as of two processes.

    It never changes: adding a batch gives another one. So sums that were made in inference mode go on outside of it.

    Attributes
    ----------
    columns
        The numbers, see ``sample_statistics``.
    n_classes
        Number of classes; 0 when there are none.
    heads
        Number of heads by direction, forward first.
    group_noun
        What groups of samples are called, such as "patients"; None where groups are not known.
    moments
        ``(classes + 1, outcomes, columns, 3)`` count, sum and sum of squares; the last class is "no class".
    ties
        Number of samples whose soft target has more than one top class.
    maps, outcome_maps
        By direction ``(classes + 1, queries, keys, 2)`` and ``(outcomes, queries, keys, 2)``: sum of the weights and
        number of heads. Empty once token counts have changed between batches.
    null_maps, null_terms
        ``(2, queries, keys)`` sums of both directions' standardised maps; ``(3,)`` sum of their alignments, number of
        samples in these sums, and number of samples whose maps cannot be compared with others'.
    by_group
        By group (0 where groups are not known), class and outcome ``(columns, 2)`` count and sum of the numbers that
        are not of single heads.
    scores_by_group
        Counts by group, outcome, score and bin: no more places than samples, and than bins for each group.
    waiting
        Batches that are not in the sums by group yet: ``(batch, 3)`` group, class and outcome, ``(batch, scores)`` bins
        and ``(batch, columns, 2)`` counts and values.
    """

    columns: tuple[Column, ...]
    n_classes: int
    heads: dict[Direction, int]
    group_noun: str | None
    moments: Tensor
    ties: Tensor
    maps: dict[Direction, Tensor]
    outcome_maps: dict[Direction, Tensor]
    null_maps: Tensor
    null_terms: Tensor
    by_group: KeyedSums
    scores_by_group: KeyedSums
    waiting: tuple[tuple[Tensor, Tensor, Tensor], ...] = ()

    @classmethod
    def empty(
        cls, rows: Sequence[Rows], columns: Sequence[Column], n_classes: int, group_noun: str | None = None
    ) -> LayerAccumulator:
        """No samples yet, of directions like those of a first batch (forward first) and of these numbers."""
        device = rows[0].weights.device
        # float64 keeps long sums exact; Apple's GPUs do not have it.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        shapes = {r.direction: (r.weights.shape[2], r.tokens) for r in rows}
        grouped = sum(column.head is None for column in columns)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            columns=tuple(columns),
            n_classes=n_classes,
            heads={r.direction: r.weights.shape[1] for r in rows},
            group_noun=group_noun,
            moments=zeros(n_classes + 1, 3, len(columns), 3),
            ties=zeros(),
            maps={direction: zeros(n_classes + 1, *shape, 2) for direction, shape in shapes.items()},
            outcome_maps={direction: zeros(3, *shape, 2) for direction, shape in shapes.items()},
            null_maps=zeros(2, *shapes[rows[0].direction]),
            null_terms=zeros(3),
            by_group=KeyedSums(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, grouped, 2, dtype=torch.float64)),
            scores_by_group=KeyedSums(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)),
        )

    @property
    def grouped_columns(self) -> list[Column]:
        """The numbers of ``by_group``."""
        return [column for column in self.columns if column.head is None]

    def __add__(self, other: LayerAccumulator) -> LayerAccumulator:
        """The sums of the samples of both, which are on one device.

        Raises
        ------
        ShapeError
            If they differ in more than their token counts; those only end the maps.
        """
        if self._describe() != other._describe() or self.columns != other.columns:
            raise ShapeError(
                f"Different attention was recorded: {self._describe()} in one place, {other._describe()} in another. "
                "Every process must run the same model with the same settings."
            )
        shapes, others = ({key: one.shape for key, one in sums.maps.items()} for sums in (self, other))
        both, other = (self if shapes == others else self._without_maps()).settled(), other.settled()
        return replace(
            both,
            moments=both.moments + other.moments,
            ties=both.ties + other.ties,
            maps={key: sums + other.maps[key] for key, sums in both.maps.items()},
            outcome_maps={key: sums + other.outcome_maps[key] for key, sums in both.outcome_maps.items()},
            null_maps=both.null_maps + other.null_maps if both.maps else both.null_maps,
            null_terms=both.null_terms + other.null_terms,
            by_group=both.by_group + other.by_group,
            scores_by_group=both.scores_by_group + other.scores_by_group,
        )

    def add(
        self,
        rows: Sequence[Rows],
        statistics: Mapping[Column, Tensor],
        classes: Tensor,
        outcomes: Tensor,
        tied: Tensor,
        groups: Tensor | None = None,
    ) -> LayerAccumulator:
        """The sums with those of a batch.

        Parameters
        ----------
        rows
            The directions; other token counts than before are allowed, but end the mean maps and the alignment between
            different samples of this epoch.
        statistics
            Their ``sample_statistics``.
        classes
            ``(batch,)`` int64 class ids; ids outside [0, n_classes) count as without a class.
        outcomes
            ``(batch,)`` int64 of ``INCORRECT``, ``CORRECT``, ``UNKNOWN``.
        tied
            ``(batch,)`` bool: more than one class has the top share of a soft target.
        groups
            ``(batch,)`` int64 group of each sample, any numbers, where groups are known.

        Raises
        ------
        ShapeError
            If the batch has no groups, though groups are known.
        """
        if self.group_noun is not None and groups is None:
            raise ShapeError(f"This batch has no {self.group_noun}, though the first one had.")
        classes = torch.where((classes >= 0) & (classes < self.n_classes), classes, self.n_classes)
        values = torch.stack([statistics[column].to(self.moments.dtype) for column in self.columns], dim=1)
        defined = values.isfinite()
        terms = torch.stack([defined.to(values.dtype), values, values**2], dim=-1)
        terms = torch.where(defined[..., None], terms, 0)
        bins = torch.stack([self._bins(score, values) for score in SCORES], dim=1)
        added = replace(
            self,
            moments=self.moments.flatten(0, 1).index_add(0, classes * 3 + outcomes, terms).view_as(self.moments),
            ties=self.ties + tied.sum(),
        )
        if groups is None or self.group_noun is None:
            groups = torch.zeros_like(classes)
        # Columns are picked one by one, as a list of places would have to be copied to a GPU.
        of_groups = [terms[:, i, :2] for i, column in enumerate(self.columns) if column.head is None]
        waiting = torch.stack([groups, classes, outcomes], dim=1), bins, torch.stack(of_groups, dim=1)
        added = replace(added, waiting=(*self.waiting, waiting))
        # The more there is, the more waits until all of it is gone through.
        enough = max(ROWS_IN_MEMORY, len(self.by_group.keys))
        added = added.settled() if sum(len(keys) for keys, _, _ in added.waiting) >= enough else added
        shapes = {r.direction: (r.weights.shape[2], r.tokens) for r in rows}
        if shapes != {direction: tuple(sums.shape[1:3]) for direction, sums in self.maps.items()}:
            return added._without_maps()
        return added._add_maps(rows, classes, outcomes)

    def settled(self) -> LayerAccumulator:
        """The same with no batch waiting."""
        if not self.waiting:
            return self
        keys, bins, terms = (torch.cat(parts).cpu() for parts in zip(*self.waiting, strict=True))
        sample, score = (bins >= 0).nonzero(as_tuple=True)
        score_keys = torch.stack([keys[sample, 0], keys[sample, 2], score, bins[sample, score]], dim=1)
        return replace(
            self,
            by_group=self.by_group + KeyedSums.of(keys, terms.double()),
            scores_by_group=self.scores_by_group + KeyedSums.of(score_keys, torch.ones(len(sample)).double()),
            waiting=(),
        )

    def cpu(self) -> LayerAccumulator:
        """The same on the CPU, with no batch waiting."""
        return LayerAccumulator(**tree_map_only(Tensor, Tensor.cpu, vars(self.settled())))

    def with_classes(self, kept: Sequence[int]) -> LayerAccumulator:
        """The same with these classes alone, in this order, and a last one that is all others; on the CPU."""
        whole = self.cpu()
        new_class = torch.full((self.n_classes + 1,), len(kept))
        new_class[list(kept)] = torch.arange(len(kept))
        new_class[-1] = len(kept) + 1  # samples without a class

        def merged(sums: Tensor) -> Tensor:
            return sums.new_zeros(len(kept) + 2, *sums.shape[1:]).index_add(0, new_class, sums)

        return replace(
            whole,
            n_classes=len(kept) + 1,
            moments=merged(whole.moments),
            maps={direction: merged(sums) for direction, sums in whole.maps.items()},
            by_group=whole.by_group.with_part(1, new_class[whole.by_group.keys[:, 1]]),
        )

    def without_labels(self) -> LayerAccumulator:
        """The same without classes and confidences, and with all outcomes unknown."""
        whole = self.settled()

        moments = whole.moments.new_zeros(1, *whole.moments.shape[1:])
        moments[0, UNKNOWN] = whole.moments.sum((0, 1))
        moments[0, UNKNOWN, [column == CONFIDENCE for column in self.columns]] = 0
        by_group = whole.by_group.with_part(1, 0).with_part(2, UNKNOWN)
        by_group.sums[:, [column == CONFIDENCE for column in self.grouped_columns]] = 0
        return replace(
            whole,
            n_classes=0,
            moments=moments,
            ties=torch.zeros_like(whole.ties),
            maps={direction: sums.sum(0, keepdim=True) for direction, sums in whole.maps.items()},
            outcome_maps={direction: torch.zeros_like(sums) for direction, sums in whole.outcome_maps.items()},
            by_group=by_group,
            scores_by_group=whole.scores_by_group.with_part(1, UNKNOWN),
        )

    def _bins(self, score: Column, values: Tensor) -> Tensor:
        """``(batch,)`` the bin of each sample's score; -1 where it is undefined."""
        if score not in self.columns:
            return torch.full((len(values),), -1, device=values.device)
        scores = values[:, self.columns.index(score)]
        return torch.where(scores.isfinite(), score_bins(scores, *SCORES[score]), -1)

    def _add_maps(self, rows: Sequence[Rows], classes: Tensor, outcomes: Tensor) -> LayerAccumulator:
        maps, outcome_maps = dict[Direction, Tensor](), dict[Direction, Tensor]()
        for r in rows:
            cells = torch.stack(sum_heads(r), dim=-1).to(self.moments.dtype)
            maps[r.direction] = self.maps[r.direction].index_add(0, classes, cells)
            outcome_maps[r.direction] = self.outcome_maps[r.direction].index_add(0, outcomes, cells)
        added = replace(self, maps=maps, outcome_maps=outcome_maps)
        if len(rows) == 1:
            return added
        x, y, whole = standardised_maps(*rows)
        aligned = (x * y).sum((1, 2))
        defined = aligned.isfinite()
        counted = defined & whole
        sums = torch.stack([torch.where(counted[:, None, None], one, 0).sum(0) for one in (x, y)])
        terms = torch.stack([torch.where(counted, aligned, 0).sum(), counted.sum(), (defined & ~whole).sum()])
        return replace(added, null_maps=self.null_maps + sums, null_terms=self.null_terms + terms)

    def _without_maps(self) -> LayerAccumulator:
        return replace(self, maps={}, outcome_maps={})

    def _describe(self) -> str:
        heads = ", ".join(f"{heads} heads {direction}" for direction, heads in self.heads.items())
        groups = f", in {self.group_noun}" if self.group_noun else ""
        return f"{self.n_classes} classes and {heads}{groups}"
