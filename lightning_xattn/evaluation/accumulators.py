"""Running sums of every number of a layer, by class and outcome, and by group (patient, recording).

An accumulator holds sums and counts only, so a short last batch weighs what it should, samples may come in any order,
and several processes give what one gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_xattn.core.attention import Direction
from lightning_xattn.core.errors import ShapeError
from lightning_xattn.evaluation.statistics import CONFIDENCE, ENTROPY, SCORES, Column, SampleNumbers, score_bins
from lightning_xattn.functional import LayerRows
from lightning_xattn.functional.outcomes import UNKNOWN

MAP_CLASSES = 64
"""With more classes than this no maps of single classes are kept, only that of all samples."""

OUTCOMES = 3
"""How many outcomes there are: incorrect, correct and unknown."""

ROWS_IN_MEMORY = 4096
"""How many samples wait on their device before they are added to the sums, so that a GPU seldom waits."""

MOST_IN_MEMORY = 4 * ROWS_IN_MEMORY
"""The most that wait where there are many sums, as all of these are gone through."""


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


@dataclass(eq=False)
class LayerAccumulator:
    """Sums of one layer's numbers; ``a + b`` has the samples of both, as of two processes.

    Attributes
    ----------
    columns
        The numbers, see ``sample_statistics``.
    n_classes
        Number of classes; 0 when there are none.
    heads
        Number of heads by direction, forward first.
    tokens
        Number of queries and of keys that are tokens, by direction.
    group_noun
        What groups of samples are called, such as "patients"; None where groups are not known.
    maps
        By direction ``(classes + 1 + outcomes, 2, queries, keys)``: of each class (the last is "no class"; a single one
        with more than ``MAP_CLASSES`` classes) and then of each outcome the sum of the weights, and the number of
        heads, in the bins of ``Rows``. Empty once token counts have changed between batches.
    null_maps, null_terms
        ``(2, queries, keys)`` sums of both directions' standardised maps; ``(3,)`` sum of their alignments, number of
        samples in these sums, and number of samples whose maps cannot be compared with others'.
    ties
        Number of samples whose soft target has more than one top class.
    totals
        ``(columns, 3)`` count, sum and sum of squares.
    by_group
        By group (0 where groups are not known), class and outcome ``(columns, 3)``, the same of the numbers that are
        not of single heads.
    head_entropies
        By class ``(columns, 2)`` count and sum of the entropies of heads.
    scores_by_group
        Counts by group, outcome, score and bin: no more places than samples, and than bins for each group.
    waiting
        Batches that are in the maps alone: ``(batch, 3)`` group, class and outcome, and ``(batch, columns)`` numbers.
    """

    columns: tuple[Column, ...]
    n_classes: int
    heads: dict[Direction, int]
    tokens: dict[Direction, tuple[int, int]]
    group_noun: str | None
    maps: dict[Direction, Tensor]
    null_maps: Tensor
    null_terms: Tensor
    ties: Tensor
    totals: Tensor
    by_group: KeyedSums
    head_entropies: KeyedSums
    scores_by_group: KeyedSums
    waiting: tuple[tuple[Tensor, Tensor], ...] = ()

    @classmethod
    def empty(
        cls, layer: LayerRows, columns: Sequence[Column], n_classes: int, group_noun: str | None = None
    ) -> LayerAccumulator:
        """No samples yet, of directions like those of a first batch and of these numbers."""
        first = layer.directions[0].map_weights
        # float64 keeps long sums exact; Apple's GPUs do not have it.
        dtype = torch.float32 if first.device.type == "mps" else torch.float64
        classes = n_classes if n_classes <= MAP_CLASSES else 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=first.device)

        def keyed(parts: int, *shape: int) -> KeyedSums:
            return KeyedSums(torch.zeros(0, parts, dtype=torch.int64), torch.zeros(0, *shape, dtype=torch.float64))

        return cls(
            columns=tuple(columns),
            n_classes=n_classes,
            heads={rows.direction: rows.valid.shape[1] for rows in layer.directions},
            tokens={rows.direction: (rows.valid.shape[2], rows.tokens) for rows in layer.directions},
            group_noun=group_noun,
            maps={
                rows.direction: zeros(classes + 1 + OUTCOMES, 2, *rows.map_weights.shape[1:])
                for rows in layer.directions
            },
            null_maps=zeros(2, *first.shape[1:]),
            null_terms=zeros(3),
            ties=zeros(),
            totals=torch.zeros(len(columns), 3, dtype=torch.float64),
            by_group=keyed(3, sum(map(is_grouped, columns)), 3),
            head_entropies=keyed(1, sum(map(_is_head_entropy, columns)), 2),
            scores_by_group=keyed(4),
        )

    @property
    def grouped_columns(self) -> list[Column]:
        """The numbers of ``by_group``."""
        return [column for column in self.columns if is_grouped(column)]

    @property
    def entropy_columns(self) -> list[Column]:
        """The numbers of ``head_entropies``."""
        return [column for column in self.columns if _is_head_entropy(column)]

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
        both, other = self.settled(), other.settled()
        has_maps = bool(both.maps and other.maps) and both.tokens == other.tokens
        return replace(
            both,
            maps={key: sums + other.maps[key] for key, sums in both.maps.items()} if has_maps else {},
            null_maps=both.null_maps + other.null_maps if has_maps else both.null_maps,
            null_terms=both.null_terms + other.null_terms,
            ties=both.ties + other.ties,
            totals=both.totals + other.totals,
            by_group=both.by_group + other.by_group,
            head_entropies=both.head_entropies + other.head_entropies,
            scores_by_group=both.scores_by_group + other.scores_by_group,
        )

    def check(self, numbers: SampleNumbers, groups: Tensor | None) -> None:
        """Refuse a batch that has no groups, though groups are known, or other numbers, with a ShapeError."""
        if self.group_noun is not None and groups is None:
            raise ShapeError(f"This batch has no {self.group_noun}, though the first one had.")
        if numbers.columns != self.columns:
            raise ShapeError("This batch has other numbers than the first one, as of another number of heads.")

    # What was made in inference mode cannot be changed in place outside of it.
    @torch.inference_mode()
    def add(
        self,
        layer: LayerRows,
        numbers: SampleNumbers,
        classes: Tensor,
        outcomes: Tensor,
        tied: Tensor,
        groups: Tensor | None = None,
    ) -> LayerAccumulator:
        """Add a batch, and give the accumulator back.

        Parameters
        ----------
        layer
            The directions; other token counts than before are allowed, but end the mean maps and the alignment between
            different samples of this epoch.
        numbers
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
            As ``check``; then nothing of the batch is added.
        """
        self.check(numbers, groups)
        classes = torch.where((classes >= 0) & (classes < self.n_classes), classes, self.n_classes)
        if groups is None or self.group_noun is None:
            groups = torch.zeros_like(classes)
        keys = torch.stack([groups, classes, outcomes], 1)
        tokens = {rows.direction: (rows.valid.shape[2], rows.tokens) for rows in layer.directions}
        has_maps = bool(self.maps) and tokens == self.tokens
        of_batch = self._sum_maps(layer, classes, outcomes) if has_maps else {}
        null = self._sum_null(layer) if has_maps else None
        ties = tied.sum()

        self.maps = self.maps if has_maps else {}
        for direction, sums in of_batch.items():
            self.maps[direction] += sums
        if null is not None:
            self.null_maps += null[0]
            self.null_terms += null[1]
        self.ties += ties
        self.waiting = (*self.waiting, (keys, numbers.matrix))
        # The more there is, the more waits until all of it is gone through.
        enough = min(max(ROWS_IN_MEMORY, len(self.by_group.keys)), MOST_IN_MEMORY)
        if sum(len(one) for one, _ in self.waiting) >= enough:
            settled = self.settled()
            for name in ("totals", "by_group", "head_entropies", "scores_by_group", "waiting"):
                setattr(self, name, getattr(settled, name))
        return self

    def _sum_maps(self, layer: LayerRows, classes: Tensor, outcomes: Tensor) -> dict[Direction, Tensor]:
        """What a batch adds to the maps."""
        count = len(next(iter(self.maps.values()))) - OUTCOMES
        if count == 1:  # all samples, whatever their class
            classes = torch.zeros_like(classes)
        # A product with ones and zeros, as sums by index take many times as long.
        places = torch.arange(count + OUTCOMES, device=classes.device)[:, None]
        # In the precision of the sums, as a GPU may round the factors of a product in single precision.
        member = ((classes == places) | (outcomes + count == places)).to(self.null_maps.dtype)
        found = {}
        for rows in layer.directions:
            cells = torch.stack([rows.map_weights, rows.map_heads], 1).to(member.dtype)
            found[rows.direction] = (member @ cells.flatten(1)).view(-1, *cells.shape[1:])
        return found

    def _sum_null(self, layer: LayerRows) -> tuple[Tensor, Tensor] | None:
        """What a batch adds to ``null_maps`` and ``null_terms``."""
        compared = layer.comparison
        if compared is None:
            return None
        aligned, is_whole = compared.map_alignment, compared.is_whole
        defined = aligned == aligned
        counted = defined & is_whole
        maps = torch.stack([one.where(counted[:, None, None], 0).sum(0) for one in (compared.x, compared.y)])
        terms = torch.stack(
            [aligned.where(counted, 0), counted.to(aligned.dtype), (defined & ~is_whole).to(aligned.dtype)]
        )
        return maps, terms.sum(1)

    def settled(self) -> LayerAccumulator:
        """The same with no batch waiting. Waits for a GPU."""
        if not self.waiting:
            return self
        keys, values = (torch.cat(parts).cpu() for parts in zip(*self.waiting, strict=True))
        values = values.double()
        defined = values.isfinite()
        values = values.where(defined, 0)
        terms = torch.stack([defined.double(), values, values**2], -1)
        grouped = torch.tensor([is_grouped(column) for column in self.columns])
        entropies = torch.tensor([_is_head_entropy(column) for column in self.columns])
        sample, score, bins = self._find_bins(values, defined)
        score_keys = torch.stack([keys[sample, 0], keys[sample, 2], score, bins], dim=1)
        return replace(
            self,
            totals=self.totals + terms.sum(0),
            by_group=self.by_group + KeyedSums.of(keys, terms[:, grouped]),
            head_entropies=self.head_entropies + KeyedSums.of(keys[:, 1:2], terms[:, entropies, :2]),
            scores_by_group=self.scores_by_group + KeyedSums.of(score_keys, torch.ones(len(sample)).double()),
            waiting=(),
        )

    def _find_bins(self, values: Tensor, defined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each defined score its sample, which score it is, and its bin."""
        samples, scores, bins = [], [], []
        for number, (score, limits) in enumerate(SCORES.items()):
            if score in self.columns:
                place = self.columns.index(score)
                sample = defined[:, place].nonzero()[:, 0]
                samples.append(sample)
                scores.append(torch.full_like(sample, number))
                bins.append(score_bins(values[sample, place], *limits))
        if not samples:
            none = torch.zeros(0, dtype=torch.int64)
            return none, none, none
        return torch.cat(samples), torch.cat(scores), torch.cat(bins)

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
            if len(sums) == 1 + OUTCOMES:  # no maps of single classes
                return sums
            places = torch.cat([new_class, len(kept) + 2 + torch.arange(OUTCOMES)])
            return sums.new_zeros(len(kept) + 2 + OUTCOMES, *sums.shape[1:]).index_add(0, places, sums)

        return replace(
            whole,
            n_classes=len(kept) + 1,
            maps={direction: merged(sums) for direction, sums in whole.maps.items()},
            by_group=whole.by_group.with_part(1, new_class[whole.by_group.keys[:, 1]]),
            head_entropies=whole.head_entropies.with_part(0, new_class[whole.head_entropies.keys[:, 0]]),
        )

    def without_labels(self) -> LayerAccumulator:
        """The same without classes and confidences, and with all outcomes unknown."""
        whole = self.settled()
        totals = whole.totals.clone()
        totals[[column == CONFIDENCE for column in self.columns]] = 0
        by_group = whole.by_group.with_part(1, 0).with_part(2, UNKNOWN)
        by_group.sums[:, [column == CONFIDENCE for column in self.grouped_columns]] = 0
        maps = {}
        for direction, sums in whole.maps.items():
            every, of_outcomes = sums[:-OUTCOMES].sum(0, keepdim=True), torch.zeros_like(sums[-OUTCOMES:])
            of_outcomes[UNKNOWN] = every[0]
            maps[direction] = torch.cat([every, of_outcomes])
        return replace(
            whole,
            n_classes=0,
            maps=maps,
            ties=torch.zeros_like(whole.ties),
            totals=totals,
            by_group=by_group,
            head_entropies=whole.head_entropies.with_part(0, 0),
            scores_by_group=whole.scores_by_group.with_part(1, UNKNOWN),
        )

    def _describe(self) -> str:
        heads = ", ".join(f"{heads} heads {direction}" for direction, heads in self.heads.items())
        groups = f", in {self.group_noun}" if self.group_noun else ""
        return f"{self.n_classes} classes and {heads}{groups}"


def is_grouped(column: Column) -> bool:
    """Whether a number has sums by group, class and outcome: not so that of a single head."""
    return column.head is None


def _is_head_entropy(column: Column) -> bool:
    return column.head is not None and column.statistic == ENTROPY.statistic
