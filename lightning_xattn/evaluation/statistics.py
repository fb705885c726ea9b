"""What is computed of each sample: the one table of statistics, and the columns that they fill.

A new statistic is a function in ``functional``, an entry in ``STATISTICS`` and its reference in the tests. Sums,
curves, the sample table, reports and the documentation take it from here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Literal

import torch
from torch import Tensor

from lightning_xattn.core.attention import Direction
from lightning_xattn.core.errors import SettingError
from lightning_xattn.functional import (
    LayerRows,
    Rows,
    cross_modal_mass,
    effective_keys,
    entropy,
    head_diversity,
    max_weight,
    query_selectivity,
    sink,
    sink_excess,
    sparsity,
)
from lightning_xattn.functional.outcomes import BINS, Side

Level = Literal["layer", "direction", "head"]


@dataclass(frozen=True)
class Column:
    """One number of every sample."""

    statistic: str
    """Its name in ``STATISTICS``."""
    direction: Direction | None = None
    """None: of the layer."""
    head: int | None = None
    """None: of all heads."""

    @classmethod
    def parse(cls, name: str) -> Column:
        """Read what ``str`` writes: ``alignment``, ``eeg_to_spec/entropy`` or ``eeg_to_spec/entropy/head_3``.

        Raises
        ------
        SettingError
            If the name is of another form.
        """
        form = re.fullmatch(r"(?:(?P<direction>[^/]+)/)?(?P<statistic>\w+)(?:/head_(?P<head>\d+))?", name)
        if form is None:
            raise SettingError(
                "A column is named '<statistic>', '<direction>/<statistic>' or '<direction>/<statistic>/head_<i>'; "
                f"got '{name}'."
            )
        direction = None if form["direction"] is None else Direction.parse(form["direction"])
        return cls(form["statistic"], direction, None if form["head"] is None else int(form["head"]))

    def __str__(self) -> str:
        of_direction = self.statistic if self.direction is None else f"{self.direction}/{self.statistic}"
        return of_direction if self.head is None else f"{of_direction}/head_{self.head}"


@dataclass(frozen=True)
class Statistic:
    """What a number is, and where it is shown."""

    function: Callable[..., Tensor | None] | None
    """For the layer alone: of its ``LayerRows``, ``(batch,)``, or None where they do not have it. Else of the ``Rows``
    of a direction, ``(batch, heads)`` or ``(batch,)``; the layer's is then the mean of its defined directions. None: it
    is not of the attention but of the labels."""
    levels: tuple[Level, ...]
    """Of what there is a column: the layer, each direction, each head. A direction's is the mean of its heads'."""
    scale: str
    """What its values mean, in a few words."""
    words: str
    """What it measures, for the documentation."""
    range: tuple[float, float] = (0.0, 1.0)
    """The smallest and the largest value that it can have."""
    curve: str | None = None
    """Its curves, ``<topic>/<name>``: of each ``{direction}``, and of ``{which}`` samples (all, each class) or which
    head. None: no curve."""
    error_side: Side | None = None
    """Which values of the layer's column are a sign of an error; None: it is not compared between outcomes."""
    reported: bool = False
    """Whether a report's table has it, see ``shown_columns``."""


def _alignment(layer: LayerRows) -> Tensor | None:
    return None if layer.comparison is None else layer.comparison.alignment


def _cross_modal_mass(rows: Rows) -> Tensor | None:
    return None if rows.cross_modal_mass is None else cross_modal_mass(rows)


STATISTICS = {
    "confidence": Statistic(
        None,
        ("layer",),
        "probability of the predicted class",
        "how sure is the model? The baseline that every other number has to beat",
        error_side="low",
    ),
    "alignment": Statistic(
        _alignment,
        ("layer",),
        "Pearson r",
        "do the two directions agree which token goes with which? Pearson correlation of the head-averaged maps, one "
        "transposed",
        range=(-1.0, 1.0),
        curve="alignment/{which}",
        error_side="low",
        reported=True,
    ),
    "entropy": Statistic(
        entropy,
        ("layer", "direction", "head"),
        "0: one key, 1: uniform",
        "how spread out is a query's attention? Shannon entropy over that of uniform attention, row by row",
        curve="entropy/{direction}/{which}",
        error_side="high",
        reported=True,
    ),
    "max": Statistic(
        max_weight,
        ("direction",),
        "1: one key",
        "a row's largest weight",
        curve="focus/{direction}/max",
    ),
    "sparsity": Statistic(
        sparsity,
        ("direction",),
        "%",
        "the percentage of keys below 0.1: with more than ten keys even uniform attention is sparse",
        range=(0.0, 100.0),
        curve="focus/{direction}/sparsity",
    ),
    "effective_keys": Statistic(
        effective_keys,
        ("direction",),
        "keys",
        "how many keys are really used",
        range=(1.0, torch.inf),
        curve="focus/{direction}/effective_keys",
    ),
    "query_selectivity": Statistic(
        query_selectivity,
        ("direction",),
        "0: the head is a fixed pooling",
        "does it matter which query asks?",
        curve="health/query_selectivity/{direction}",
    ),
    "head_diversity": Statistic(
        head_diversity,
        ("direction",),
        "0: all alike",
        "do the heads differ?",
        curve="health/head_diversity/{direction}",
    ),
    "cross_modal_mass": Statistic(
        _cross_modal_mass,
        ("direction", "head"),
        "1: all of it",
        "of a joint sequence: the share of attention that goes to the other modality",
        curve="focus/{direction}/cross_modal_mass",
    ),
    "sink": Statistic(
        sink,
        ("head",),
        "1: all of it",
        "the largest mean weight that one key receives, over the queries",
    ),
    "sink_excess": Statistic(
        sink_excess,
        ("head",),
        "0: uniform, 1: all of it",
        "how far the sink is above uniform attention; undefined with fewer than four queries",
    ),
    "broken": Statistic(
        lambda rows: rows.broken.sum(2),
        ("head",),
        "rows",
        "rows that are not finite or do not sum to 1, though their query is a token and has a key",
        range=(0.0, torch.inf),
    ),
    "invalid_rows": Statistic(
        lambda layer: sum(rows.invalid for rows in layer.directions),
        ("layer",),
        "rows",
        "rows left out because they are padding, fully masked, or not finite",
        range=(0.0, torch.inf),
    ),
    "wholly_masked": Statistic(
        lambda layer: reduce(torch.logical_or, [rows.wholly_masked for rows in layer.directions]),
        ("layer",),
        "1: it is",
        "whether one modality is wholly masked: no token of it is real, or seen",
    ),
}
"""Every number that describes one sample and its attention in one layer, by name."""

CONFIDENCE, ALIGNMENT, ENTROPY = Column("confidence"), Column("alignment"), Column("entropy")

INVALID_ROWS = Column("invalid_rows")
"""The one number that every sample has: its count is the number of samples."""

WHOLLY_MASKED = Column("wholly_masked")
"""Its total is the number of samples of which one modality is wholly masked."""

SCORES = {Column(name): statistic.range for name, statistic in STATISTICS.items() if statistic.error_side}
"""What is compared between correct and incorrect predictions, with the ranges of their bins."""

ERROR_SIDES: dict[str, Side] = {
    **{name: statistic.error_side for name, statistic in STATISTICS.items() if statistic.error_side},
    "support": "low",
}
"""Which values are a sign of an error, of every score that is compared: those of layers, and that of the probes."""


@dataclass(frozen=True, eq=False)
class SampleNumbers(Mapping[Column, Tensor]):
    """Numbers of samples, by column ``(batch,)``.

    Attributes
    ----------
    columns
        The numbers.
    matrix
        ``(batch, columns)``, NaN where undefined.
    """

    columns: tuple[Column, ...]
    matrix: Tensor

    def __getitem__(self, column: Column) -> Tensor:
        try:
            return self.matrix[:, self.columns.index(column)]
        except ValueError:
            raise KeyError(column) from None

    def __iter__(self) -> Iterator[Column]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def with_column(self, column: Column, values: Tensor) -> SampleNumbers:
        """The same with one more number ``(batch,)``."""
        return SampleNumbers((*self.columns, column), torch.cat([self.matrix, values[:, None]], 1))


def sample_statistics(layer: LayerRows) -> SampleNumbers:
    """All numbers of the attention of a layer's samples."""
    of_layer: dict[str, Tensor] = {}
    # By place: of all directions' statistics, those of heads and those of a direction as such.
    of_heads: list[tuple[str, int, Tensor]] = []
    of_direction: dict[tuple[str, int], Tensor] = {}
    for name, statistic in STATISTICS.items():
        if statistic.function is None:
            continue
        if statistic.levels == ("layer",):
            values = statistic.function(layer)
            if values is not None:
                of_layer[name] = values
            continue
        for place, rows in enumerate(layer.directions):
            values = statistic.function(rows)
            if values is not None and values.dim() == 2:
                of_heads.append((name, place, values))
            elif values is not None:
                of_direction[name, place] = values
    of_direction |= _mean_over_heads(of_heads)
    for name, statistic in STATISTICS.items():
        if "layer" in statistic.levels and statistic.levels != ("layer",):
            means = [of_direction[name, place] for place in range(len(layer.directions))]
            of_layer[name] = means[0] if len(means) == 1 else torch.stack(means).nanmean(0)
    every = [(name, place) for name in STATISTICS for place in range(len(layer.directions))]
    places = [one for one in every if one in of_direction and "direction" in STATISTICS[one[0]].levels]
    heads = [(name, place, values) for name, place, values in of_heads if "head" in STATISTICS[name].levels]
    columns = _name_columns(
        tuple(of_layer),
        tuple(places),
        tuple((name, place, values.shape[1]) for name, place, values in heads),
        tuple(rows.direction for rows in layer.directions),
    )
    singles = [*of_layer.values(), *(of_direction[place] for place in places)]
    dtype = layer.directions[0].entropy.dtype
    blocks = [torch.stack([one if one.dtype == dtype else one.to(dtype) for one in singles], 1)]
    blocks += [values for _, _, values in heads]  # torch.cat finds a type for all
    return SampleNumbers(columns, torch.cat(blocks, 1))


def _mean_over_heads(of_heads: Sequence[tuple[str, int, Tensor]]) -> dict[tuple[str, int], Tensor]:
    """The means over a direction's heads of the numbers that have a direction's column, or a layer's."""
    found: dict[tuple[str, int], Tensor] = {}
    by_count: dict[int, list[tuple[str, int, Tensor]]] = defaultdict(list)
    for name, place, values in of_heads:
        if STATISTICS[name].levels != ("head",):
            by_count[values.shape[1]].append((name, place, values))
    for several in by_count.values():
        means = torch.stack([values for *_, values in several]).nanmean(2).unbind()
        found |= {(name, place): mean for (name, place, _), mean in zip(several, means, strict=True)}
    return found


@lru_cache(maxsize=256)
def _name_columns(
    of_layer: tuple[str, ...],
    of_direction: tuple[tuple[str, int], ...],
    of_heads: tuple[tuple[str, int, int], ...],
    directions: tuple[Direction, ...],
) -> tuple[Column, ...]:
    return (
        *map(Column, of_layer),
        *(Column(name, directions[place]) for name, place in of_direction),
        *(Column(name, directions[place], head) for name, place, heads in of_heads for head in range(heads)),
    )


def headline(columns: Iterable[Column]) -> Column:
    """The number that a layer is judged by: its alignment, or its entropy where one direction is recorded."""
    return ALIGNMENT if ALIGNMENT in columns else ENTROPY


def shown_columns(statistic: str, columns: Iterable[Column]) -> list[Column]:
    """A statistic's columns in a report or a figure of classes: each direction's, or the layer's if there are none."""
    whole = [column for column in columns if column.statistic == statistic and column.head is None]
    return [column for column in whole if column.direction is not None] or whole


def table_columns(statistics: Mapping[Column, Tensor]) -> dict[str, Tensor]:
    """The same under names that need no quotes in SQL, such as ``eeg_to_spec_entropy``.

    Those of heads are one column of lists, ``eeg_to_spec_entropy_heads``, as layers may have different numbers of them.
    """
    columns: dict[str, Tensor] = {}
    heads: dict[str, list[Tensor]] = defaultdict(list)
    for column, values in statistics.items():
        name = column.statistic if column.direction is None else f"{column.direction}_{column.statistic}"
        if column.head is None:
            columns[name] = values
        else:
            heads[f"{name}_heads"].append(values)
    return columns | {name: torch.stack(of_heads, dim=1) for name, of_heads in heads.items()}


def score_bins(scores: Tensor, low: float, high: float) -> Tensor:
    """Bin of each score in ``BINS`` equal bins over [low, high]; an undefined score has bin 0, so mask it out.

    Parameters
    ----------
    scores
        Any shape, float.

    Returns
    -------
    Tensor
        int64, same shape, in [0, BINS).

    Examples
    --------
    >>> from lightning_xattn.evaluation.statistics import score_bins
    >>> score_bins(torch.tensor([-1.0, 0.0, 1.0]), low=-1.0, high=1.0).tolist()  # of 2 ** 14
    [0, 8192, 16383]
    """
    position = (scores.nan_to_num(nan=low) - low) * (BINS / (high - low))
    return position.long().clamp(0, BINS - 1)
