"""What the callback and the explainer share: their settings, how a batch is read, and the sums of a data set.

A batch goes through here once: ``read`` makes a ``BatchResult`` of what the model did, ``add`` adds its numbers to the
sums of each layer and gives its rows of the sample table, and ``summary`` says what the sums of all batches are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lightning_xattn.aggregation import LayerAccumulator, LayerSums, Layout, merge_sums
from lightning_xattn.attention import AttentionPair, mask_queries
from lightning_xattn.capture import AttentionRecorder, AttentionSetting, check_attention
from lightning_xattn.checks import Checks
from lightning_xattn.classes import (
    GROUPINGS,
    check_class_names,
    classify,
    missing_labels,
    name_classes,
    own_class_names,
)
from lightning_xattn.columns import headline, sample_statistics, table_columns
from lightning_xattn.distributed import gather
from lightning_xattn.errors import SettingError
from lightning_xattn.functional import prepare_rows
from lightning_xattn.labels import LabelFinder, LabelSetting, Step
from lightning_xattn.messages import named, warn
from lightning_xattn.results import BatchResult
from lightning_xattn.summary import LayerSummary

Attentions = tuple[AttentionPair, ...]


@dataclass(frozen=True)
class Settings:
    """What both faces are told; `AttentionExplainabilityCallback` says what each setting means.

    Raises
    ------
    SettingError
        If one has a value that is not allowed.
    """

    attention: AttentionSetting | None = None
    class_names: Sequence[str] | None = None
    group_by: str = "target"
    predictions: LabelSetting = None
    targets: LabelSetting = None
    sample_ids: LabelSetting = None
    groups: LabelSetting = None
    query_mask: LabelSetting = None
    table: str | Path | None = None
    """Kept as a string, so that it is the same however it is given."""

    def __post_init__(self) -> None:
        if self.attention is not None:
            check_attention(self.attention)
        if self.class_names is not None:
            object.__setattr__(self, "class_names", check_class_names(self.class_names))
        if self.group_by not in GROUPINGS:
            raise SettingError(f"group_by must be one of {', '.join(GROUPINGS)}; got {self.group_by!r}.")
        if self.table is not None and find_spec("pyarrow") is None:
            raise SettingError('table writes Parquet files with pyarrow: pip install "lightning-xattn[table]".')
        object.__setattr__(self, "table", None if self.table is None else str(self.table))
        self.finder()  # it checks those of the labels

    def finder(self) -> LabelFinder:
        """Where the labels of an evaluation come from."""
        return LabelFinder(self.predictions, self.targets, self.sample_ids, self.groups, self.query_mask)

    def named(self) -> dict[str, Any]:
        """How batches are read: the settings by name, callables by theirs, so the same from run to run."""
        read = ("attention", "predictions", "targets", "sample_ids", "groups", "query_mask")
        whole = {"class_names": self.class_names, "group_by": self.group_by}
        return {name: named(getattr(self, name)) for name in read} | whole


def take_step(recorder: AttentionRecorder, outputs: Any, batch: Any) -> tuple[Step, Attentions] | None:
    """What a step gave and the attention in it; None if there is none."""
    recorder.batch = batch
    attention, forward = recorder.attention, recorder.output
    if not attention:
        return None
    weights = attention[0].forward.weights
    return Step(outputs, batch, forward, len(weights), weights.device, tuple(weights.shape[2:])), attention


def read_batch(
    step: Step, attention: Attentions, finder: LabelFinder, checks: Checks, with_ids: bool = True
) -> BatchResult:
    """Find the labels of a step, with or without the samples' ids, and which of its queries are padding.

    Raises
    ------
    DiscoveryError, ShapeError
        As ``LabelFinder.find``, or if a mask does not fit the attention.
    """
    labels = finder.find(step, with_ids)
    attention = mask_queries(attention, labels.query_mask)
    warn(checks.of_padding(attention))
    return BatchResult(attention, labels)


@dataclass(frozen=True, eq=False)
class Part:
    """What one process has of an evaluation: see the attributes of ``Evaluation``."""

    classes: tuple[str, ...] | None
    sums: Mapping[str, LayerSums]
    """By layer, on the CPU."""
    repeats: int
    has_several: bool
    """Whether targets turned out to be no classes."""


class Evaluation:
    """One data set, batch after batch.

    Parameters
    ----------
    settings
        How batches are read.
    module
        Its ``class_names``, if it has any, are taken where the settings have none.
    checks
        Say each thing once.
    first
        The evaluation, of another dataloader, whose classes this one has too; None: they are decided here.

    Attributes
    ----------
    finder : LabelFinder
        Where the labels come from.
    classes : tuple of str or None
        The names of the classes, decided in the first batch; none where what groups them is not known.
    repeats : int
        Samples that were left out because another process had them.
    """

    def __init__(self, settings: Settings, module: object, checks: Checks, first: Evaluation | None = None) -> None:
        self._settings, self._module, self._checks, self._first = settings, module, checks, first
        self.finder = settings.finder()
        self.classes: tuple[str, ...] | None = None
        self.reset()

    def reset(self) -> None:
        """Begin anew, with what was decided in the first batch."""
        self.repeats = 0
        self._accumulators: dict[str, LayerAccumulator] = {}

    def read(self, step: Step, attention: Attentions, with_ids: bool = True) -> BatchResult:
        """Read a batch, see ``read_batch``; the first one decides what the classes are."""
        batch = read_batch(step, attention, self.finder, self._checks, with_ids)
        if self.classes is None and self._first is not None:
            self.classes = self._first.classes
        if self.classes is None:
            names, group_by = self._settings.class_names or own_class_names(self._module), self._settings.group_by
            self.classes = name_classes(batch.labels, names, group_by, step)
            warn(missing_labels(batch.labels, self.classes, group_by, step))
        return batch

    def describe(self, batch: BatchResult) -> str:
        """What was taken for what, in a few words, so that a name that means something else is seen at once."""
        first, *others = batch.attention
        parts = [
            f"{one.direction} ({one.weights.shape[2]} queries ask {one.tokens} keys)" for one in first.directions
        ] + ([f"{len(others)} more layer(s)"] if others else [])
        labels = ", ".join(f"{what} from {place}" for what, place in self.finder.places.items()) or "no labels"
        n_classes = batch.labels.n_classes
        return f"{', '.join(parts)}; {labels}" + (f", of {n_classes} classes" if n_classes else "")

    def add(self, batch: BatchResult, repeats: int = 0) -> list[dict[str, Any]]:
        """Add a batch to the sums; gives its rows of the sample table as columns, for each layer.

        Parameters
        ----------
        batch
            From ``read``.
        repeats
            So many of its last samples are left out, as another process has them.
        """
        self.repeats += repeats
        batch = batch[: len(batch) - repeats]
        labels, n_classes = batch.labels, len(self.classes or ())
        weights = batch.attention[0].forward.weights
        classes, outcomes, tied = classify(labels, self._settings.group_by, n_classes, weights)
        about = {
            "target": labels.target,
            "prediction": labels.predicted,
            "confidence": labels.confidence,
            "correct": outcomes,
            "tied": tied,
        }
        table = []
        for pair in batch.attention:
            rows = [prepare_rows(attention) for attention in pair.directions]
            statistics = sample_statistics(*rows)
            if pair.layer not in self._accumulators:
                layout = Layout.of(rows, statistics, n_classes, labels.group_noun)
                self._accumulators[pair.layer] = LayerAccumulator(layout, weights.device)
            self._accumulators[pair.layer].update(rows, statistics, classes, outcomes, tied, labels.groups)
            undefined = statistics[headline(statistics)].isnan()
            where = {"layer": pair.layer, "sample_id": labels.sample_ids, "group": labels.group_ids}
            table.append(about | {"undefined": undefined} | table_columns(statistics) | where)
        return table

    def sums(self) -> dict[str, LayerSums]:
        """By layer, what there is so far; ``add`` leaves these tensors as they are."""
        return {layer: accumulator.sums() for layer, accumulator in self._accumulators.items()}

    def load(self, sums: Mapping[str, LayerSums], device: torch.device | str) -> None:
        """Go on from the sums of the same data set so far, with batches on this device."""
        self._accumulators = {layer: LayerAccumulator.of(of_layer, device) for layer, of_layer in sums.items()}
        if self.classes and any(of_layer.layout.n_classes == 0 for of_layer in sums.values()):
            self.drop_targets()  # as these sums had to

    def part(self) -> Part:
        """What this process has. A GPU waits for it."""
        sums = {layer: of_layer.cpu() for layer, of_layer in self.sums().items()}
        return Part(self.classes, sums, self.repeats, self.finder.has_several)

    def drop_targets(self) -> None:
        """Have no classes and outcomes, as the targets are several labels at once, which are no classes."""
        warn([self.finder.drop_targets()])
        self.classes = ()
        for layer, of_layer in self._accumulators.items():
            self._accumulators[layer] = LayerAccumulator.of(of_layer.sums().without_labels(), of_layer.device)

    def summary(self, parts: Sequence[Part] | None = None) -> dict[str, LayerSummary]:
        """What the sums say of each layer, in the order in which they ran.

        Parameters
        ----------
        parts
            Those of all processes, in one order on each of them. None: this one alone.
        """
        parts = [self.part()] if parts is None else parts
        self.classes = next((part.classes for part in parts if part.classes is not None), None)
        self.repeats = sum(part.repeats for part in parts)
        layers = dict.fromkeys(layer for part in parts for layer in part.sums)
        merged = {name: merge_sums([part.sums[name] for part in parts if name in part.sums]) for name in layers}
        if any(part.has_several for part in parts):
            self.drop_targets()
            merged = {layer: sums.without_labels() for layer, sums in merged.items()}
        return {layer: LayerSummary(sums) for layer, sums in merged.items()}


def summarise(evaluations: Mapping[int, Evaluation]) -> Iterator[tuple[int, str, LayerSummary]]:
    """Merge the evaluations of all processes: dataloader, layer and summary, in one order on each of them.

    One collective, which every process must reach.

    Parameters
    ----------
    evaluations
        By dataloader; makes those that another process has and this one has not.
    """
    processes = gather({number: evaluation.part() for number, evaluation in evaluations.items()})
    for number in sorted({number for parts in processes for number in parts}):
        merged = evaluations[number].summary([parts[number] for parts in processes if number in parts])
        for layer, summary in merged.items():
            yield number, layer, summary
