"""What the callback and the explainer share: their settings, how a batch is read, and the sums of a data set.

A batch goes through here once: ``read`` makes a ``BatchResult`` of what the model did, ``add`` adds its numbers to the
sums of each layer and gives its rows of the sample table, and ``summary`` says what the sums of all batches are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.bottom_k import Columns
from lightning_xattn.attribution.contribution import (
    CONTRIBUTION_SAMPLES,
    PARTNERS,
    Contributions,
    compute_contributions,
)
from lightning_xattn.attribution.faithfulness import replace_keys
from lightning_xattn.attribution.inputs import ModalitiesSetting, check_fusion
from lightning_xattn.attribution.kept_samples import MAX_SAMPLES, Collected, FusionPart, merge_parts
from lightning_xattn.attribution.recorder import FusionRecord, FusionRecorder
from lightning_xattn.capture import AttentionSetting, check_attention, is_set_aside
from lightning_xattn.capture.labels import SEVERAL_LABELS, LabelFinder, Labels, LabelSetting, Step
from lightning_xattn.core.attention import mask_queries
from lightning_xattn.core.distributed import NUMBER, SINGLE_PROCESS, Processes
from lightning_xattn.core.errors import SettingError, check_whole_number
from lightning_xattn.core.group_keys import group_keys
from lightning_xattn.core.notices import named, warn
from lightning_xattn.evaluation.accumulators import LayerAccumulator, LayerSums, Layout, merge_sums
from lightning_xattn.evaluation.checks import Checks
from lightning_xattn.evaluation.classes import (
    GROUPINGS,
    check_class_names,
    classify,
    missing_labels,
    name_classes,
    own_class_names,
)
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.maps import MapsBySample, SampleMaps, merge_maps
from lightning_xattn.evaluation.results import BatchResult
from lightning_xattn.evaluation.statistics import CONFIDENCE, headline, sample_statistics, table_columns
from lightning_xattn.evaluation.step_recorder import Attentions, StepRecorder
from lightning_xattn.functional import Rows, prepare_rows, received_attention

DIFFERENT_CLASSES = (
    "Processes do not agree on how many classes there are: the first batch of one had no predictions or targets that "
    "fit. So the evaluation is not split by class. Name them: predictions=<key or callable>, "
    "targets=<key or callable>."
)

PLACES_OF_A_PROCESS = 2**40
"""So far apart are the places that processes number by themselves, where nothing says how samples are dealt out."""


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
    classes_by: str = "target"
    predictions: LabelSetting = None
    targets: LabelSetting = None
    sample_ids: LabelSetting = None
    groups: LabelSetting = None
    query_mask: LabelSetting = None
    fusion: str | None = None
    modalities: ModalitiesSetting | None = None
    contribution_samples: int = CONTRIBUTION_SAMPLES
    max_samples: int = MAX_SAMPLES
    table: str | Path | None = None
    """Kept as a string, so that it is the same however it is given."""

    def __post_init__(self) -> None:
        if self.attention is not None:
            check_attention(self.attention)
        if self.class_names is not None:
            object.__setattr__(self, "class_names", check_class_names(self.class_names))
        if self.classes_by not in GROUPINGS:
            raise SettingError(f"classes_by must be one of {', '.join(GROUPINGS)}; got {self.classes_by!r}.")
        if self.table is not None and not (isinstance(self.table, (str, PathLike)) and str(self.table).strip()):
            raise SettingError(
                f"table must be a folder's path, as in table='samples', or None for no table; got {self.table!r}."
            )
        if self.table is not None and find_spec("pyarrow") is None:
            raise SettingError('table writes Parquet files with pyarrow: pip install "lightning-xattn[table]".')
        check_fusion(self.fusion, self.modalities)
        if is_set_aside(self.attention) and (self.fusion is None or self.modalities is None):
            raise SettingError(
                "With attention={} no attention is recorded, and without a named fusion nothing would be: name it too, "
                "attention={}, fusion='path.to.module', modalities={'<a>': 0, '<b>': 1} (positions or names of the "
                f"fusion's arguments). Got fusion={self.fusion!r}, modalities={self.modalities!r}."
            )
        check_whole_number("contribution_samples", self.contribution_samples, 0)
        check_whole_number("max_samples", self.max_samples)
        if self.contribution_samples == 1:
            raise SettingError(
                "contribution_samples must be 0 (no contributions) or at least 2, as modalities are permuted between "
                "samples; got 1."
            )
        if self.max_samples < self.contribution_samples:
            fewer = self.max_samples if self.max_samples > 1 else 0
            raise SettingError(
                f"max_samples must be at least contribution_samples, {self.contribution_samples}, which are taken from "
                f"them; got {self.max_samples}. Take fewer: contribution_samples={fewer}."
            )
        object.__setattr__(self, "table", None if self.table is None else str(self.table))
        self.finder()  # it checks those of the labels

    def finder(self) -> LabelFinder:
        """Where the labels of an evaluation come from."""
        return LabelFinder(self.predictions, self.targets, self.sample_ids, self.groups, self.query_mask)

    def recorder(self, model: nn.Module, processes: Processes = SINGLE_PROCESS) -> StepRecorder:
        """What records a model's steps."""
        return StepRecorder(
            model, self.attention, self.fusion, self.modalities, processes, replays=self.contribution_samples > 0
        )

    def named(self) -> dict[str, Any]:
        """How batches are read: the settings by name, callables by theirs, so the same from run to run."""
        read = ("attention", "predictions", "targets", "sample_ids", "groups", "query_mask", "fusion", "modalities")
        whole: dict[str, Any] = {"class_names": self.class_names, "classes_by": self.classes_by}
        whole |= {"contribution_samples": self.contribution_samples, "max_samples": self.max_samples}
        return {name: named(getattr(self, name)) for name in read} | whole


def read_batch(step: Step, attention: Attentions, finder: LabelFinder, checks: Checks) -> BatchResult:
    """Find the labels of a step, and which of its queries are padding.

    Raises
    ------
    DiscoveryError, ShapeError
        As ``LabelFinder.find``, or if a mask does not fit the attention.
    """
    labels = finder.find(step)
    attention = mask_queries(attention, labels.query_mask)
    warn(checks.of_padding(attention))
    return BatchResult(attention, labels)


@dataclass(frozen=True, eq=False)
class Part:
    """What one process has of an evaluation: see the attributes of ``Evaluation``."""

    classes: tuple[str, ...] | None
    sums: Mapping[str, LayerSums]
    """By layer, on the CPU."""
    fusion: FusionPart | None
    repeats: int
    left_out_batches: int
    other_lengths: Mapping[str, int]
    refused: str
    refusal: str
    has_several: bool
    """Whether targets turned out to be no classes."""
    maps: Columns | None
    """Of single samples, on the CPU; None without any."""


@dataclass(frozen=True, eq=False)
class EvaluationSummary:
    """What the sums of an evaluation say."""

    layers: dict[str, LayerSummary]
    """By name, in the order in which they ran."""
    fusion: FusionSummary | None
    """None where the fusion is not known."""
    maps: MapsBySample
    """Of single samples, where they are kept."""


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
    expects_targets
        Whether it is said where there are none, which are not to be had of a prediction.
    keeps_maps
        Whether maps of single samples are kept, for a page.
    processes
        Those that run the model.

    Attributes
    ----------
    finder : LabelFinder
        Where the labels come from.
    classes : tuple of str or None
        The names of the classes, decided in the first batch; none where what groups them is not known.
    repeats : int
        Samples that were left out because another process had them.
    left_out_batches : int
        Batches that were left out because they could not be recorded.
    other_lengths : Counter of str
        By layer, samples that were left out because their joint sequence does not fit its spans.
    seen : int
        Samples of this process so far, with those that were left out.
    refusal : str
        Why this process records nothing; "" if it records.
    refused : str
        Why nothing is replayed at the end of this evaluation, as the end of a sentence; "" where it may be.
    has_dropped : bool
        Whether samples of this evaluation had classes and predictions before their targets turned out to be none.
    shown_classes : tuple of int or None
        Of very many classes, those that are shown one by one; decided when an evaluation is shown first.
    collected : Collected
        What is kept of the fusion's inputs.
    maps : SampleMaps
        Of single samples.
    """

    def __init__(
        self,
        settings: Settings,
        module: object,
        checks: Checks,
        first: Evaluation | None = None,
        expects_targets: bool = True,
        keeps_maps: bool = False,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self._expects_targets, self._keeps_maps, self._processes = expects_targets, keeps_maps, processes
        self._settings, self._module, self._checks, self._first = settings, module, checks, first
        self.finder = settings.finder()
        self.classes: tuple[str, ...] | None = None
        self.shown_classes: tuple[int, ...] | None = None
        self._first_layer = ""
        self.reset()

    def reset(self) -> None:
        """Begin anew, with what was decided in the first batch."""
        self.repeats, self.left_out_batches, self.has_dropped = 0, 0, False
        self.refused = self.refusal = ""
        self.other_lengths = Counter[str]()
        self._accumulators: dict[str, LayerAccumulator] = {}
        self.collected = Collected(self._settings.max_samples, self._settings.contribution_samples)
        self.maps = SampleMaps()
        self.seen = 0

    def read(self, step: Step, attention: Attentions, recorder: StepRecorder) -> BatchResult:
        """Read a batch, see ``read_batch``; the first one decides what the classes are, and where the fusion is."""
        batch = read_batch(step, attention, self.finder, self._checks)
        inputs = recorder.collect_fusion(batch.labels)
        batch = replace(batch, inputs=inputs, labels=_confident(batch.labels, inputs))
        self._first_layer = recorder.layers[0].name if recorder.layers else ""
        if self.classes is None and self._first is not None:
            self.classes = self._first.classes
        if self.classes is None:  # where nothing ran for the first one, this is first
            names, classes_by = self._settings.class_names or own_class_names(self._module), self._settings.classes_by
            self.classes = name_classes(batch.labels, names, classes_by, step)
            if self._first is not None:
                self._first.classes = self.classes
            if self._expects_targets:
                warn(missing_labels(batch.labels, self.classes, classes_by, step))
        return batch

    def leave_out(self, samples: Mapping[str, int], is_all: bool, places: range | None = None) -> None:
        """Count samples that a layer has not recorded, as their joint sequence does not fit its spans.

        Parameters
        ----------
        samples
            How many, by layer.
        is_all
            Whether there is nothing else of their batch, so that it is not added.
        places
            As ``add`` takes them.
        """
        own = {layer: count if places is None else min(count, len(places)) for layer, count in samples.items()}
        self.other_lengths.update(own)
        self.seen += max(samples.values(), default=0) if is_all else 0

    def describe(self, batch: BatchResult, recorder: StepRecorder) -> str:
        """What was taken for what, in a few words, so that a name that means something else is seen at once."""
        parts = [
            f"{one.direction} ({one.weights.shape[2]} queries ask {one.tokens} keys)"
            for pair in batch.attention[:1]
            for one in pair.directions
        ]
        parts += [f"{len(batch.attention) - 1} more layer(s)"] if len(batch.attention) > 1 else []
        if batch.inputs:
            entering = [
                name if place.mask is None else f"{name} (its mask {place.mask})"
                for name, place in recorder.fusion.places.items()
            ]
            parts.append(f"what enters {recorder.fusion.fusion_inputs} as {' and '.join(entering)}")
        labels = ", ".join(f"{what} from {place}" for what, place in self.finder.places.items()) or "no labels"
        n_classes = batch.labels.n_classes
        return f"{', '.join(parts)}; {labels}" + (f", of {n_classes} classes" if n_classes else "")

    def add(self, batch: BatchResult, places: range | None = None) -> list[dict[str, Any]]:
        """Add a batch to the sums; gives its rows of the sample table as columns, for each layer.

        Parameters
        ----------
        batch
            From ``read``.
        places
            Where its samples stand in the data set, see ``unique_sample_indices``; others are left out, as another
            process has them. None: all samples, which follow on those before.
        """
        numbers = torch.arange(self.seen, self.seen + len(batch), device=batch.device)
        first = self.seen + self._processes.rank * PLACES_OF_A_PROCESS
        places = range(first, first + len(batch)) if places is None else places
        self.seen, self.repeats = self.seen + len(batch), self.repeats + len(batch) - len(places)
        batch = batch[: len(places)]
        labels, n_classes = batch.labels, len(self.classes or ())
        classes, outcomes, tied = classify(labels, self._settings.classes_by, n_classes, len(batch), batch.device)
        about: dict[str, Any] = {
            "target": labels.target,
            "prediction": labels.predicted,
            "confidence": labels.confidence,
            "correct": outcomes,
            "tied": tied,
            NUMBER: numbers[: len(batch)],
        }
        ids = {"sample_id": labels.sample_ids, "group": labels.group_ids}
        layers = [[prepare_rows(attention) for attention in pair.directions] for pair in batch.attention]
        first_ran = bool(layers) and batch.attention[0].layer == self._first_layer
        if len(batch):
            self._keep(batch, about | {"class": classes}, places, layers[0] if first_ran else ())
        table = [] if batch.attention else [about | {"layer": None} | ids]
        for pair, rows in zip(batch.attention, layers, strict=True):
            statistics = sample_statistics(*rows) | {CONFIDENCE: _filled(labels.confidence, torch.nan, batch)}
            if pair.layer not in self._accumulators:
                layout = Layout.of(rows, statistics, n_classes, labels.group_noun)
                self._accumulators[pair.layer] = LayerAccumulator(layout, batch.device)
            self._accumulators[pair.layer].update(rows, statistics, classes, outcomes, tied, labels.groups)
            undefined = statistics[headline(statistics)].isnan()
            layer = {"undefined": undefined, "layer": pair.layer}
            table.append(about | table_columns(statistics) | layer | ids)
        return table

    def _keep(
        self, batch: BatchResult, about: Mapping[str, Any], places: Sequence[int], first_layer: Sequence[Rows]
    ) -> None:
        """Keep of single samples what is wanted at the end."""
        needs_maps = self._keeps_maps and bool(first_layer)
        if batch.inputs is None and not needs_maps:
            return
        labels = batch.labels
        keys = group_keys(places if labels.sample_ids is None else labels.sample_ids, batch.device)
        identity = {NUMBER: about[NUMBER], "process": torch.full_like(about["class"], self._processes.rank)}
        if needs_maps:
            self.maps.add(first_layer, keys, identity)
        if batch.inputs is None:
            return
        facts = identity | {
            "class": about["class"],
            "correct": about["correct"],
            "target": _filled(labels.target, -1, batch),
            "prediction": _filled(labels.predicted, -1, batch),
            "confidence": _filled(labels.confidence, torch.nan, batch),
        }
        received = {str(rows.direction): received_attention(rows) for rows in first_layer}
        self.collected.add(batch.inputs, keys, labels.groups, labels.group_noun, facts, received)

    def sums(self) -> dict[str, LayerSums]:
        """By layer, what there is so far; ``add`` leaves these tensors as they are."""
        return {layer: accumulator.sums() for layer, accumulator in self._accumulators.items()}

    def load(
        self,
        samples: int,
        other_lengths: Mapping[str, int],
        sums: Mapping[str, LayerSums],
        collected: Collected,
        maps: SampleMaps,
        device: torch.device | str,
    ) -> None:
        """Go on from what there is of the same data set, whose first so many samples were seen, on this device."""
        self.seen, self.other_lengths = samples, Counter(other_lengths)
        self.collected, self.maps = collected.snapshot(device), maps.snapshot(device)
        self._accumulators = {layer: LayerAccumulator.of(of_layer, device) for layer, of_layer in sums.items()}
        if self.classes and any(of_layer.layout.n_classes == 0 for of_layer in sums.values()):
            self.drop_targets()  # as these sums had to

    def part(self) -> Part:
        """What this process has. A GPU waits for it."""
        sums = {layer: of_layer.cpu() for layer, of_layer in self.sums().items()}
        fusion = self.collected.part()
        if fusion is not None and self._processes is not SINGLE_PROCESS:
            fusion = fusion.cpu()  # to be sent
        several = self.finder.has_several
        counts = self.repeats, self.left_out_batches, dict(self.other_lengths)
        refused = self.refused or (SEVERAL_LABELS if several or self.finder.are_several else "")
        return Part(self.classes, sums, fusion, *counts, refused, self.refusal, several, self.maps.part())

    def drop_targets(self) -> None:
        """Have no classes, predictions and outcomes, as the targets are several labels at once."""
        warn([self.finder.drop_targets()])
        self.classes, self.has_dropped = (), True
        for layer, of_layer in self._accumulators.items():
            self._accumulators[layer] = LayerAccumulator.of(of_layer.sums().without_labels(), of_layer.device)

    def summary(
        self,
        recorder: StepRecorder,
        tests_attention: bool,
        parts: Sequence[Part] | None = None,
        partners: int | None = PARTNERS,
    ) -> EvaluationSummary:
        """What the sums say of each layer and of the fusion.

        Where there are several processes and something is replayed, collectives that each must reach.

        Parameters
        ----------
        recorder
            Has what is needed to replay what lies behind the fusion.
        tests_attention
            Whether keys are replaced to see what the attention ranks.
        parts
            Those of all processes, in one order on each of them. None: this one alone.
        partners
            With how many others each sample is permuted; None: with all.
        """
        parts = [self.part()] if parts is None else parts
        self.classes = next((part.classes for part in parts if part.classes is not None), None)
        self.repeats = sum(part.repeats for part in parts)
        self.left_out_batches = sum(part.left_out_batches for part in parts)
        self.other_lengths = sum((Counter(part.other_lengths) for part in parts), Counter())
        layers = dict.fromkeys(layer for part in parts for layer in part.sums)
        several = any(part.has_several for part in parts)
        counts = {sums.layout.n_classes for part in parts for sums in part.sums.values()}
        if several:
            self.drop_targets()
        elif len(counts) > 1:
            warn([DIFFERENT_CLASSES])
            self.classes = ()
        without = several or len(counts) > 1
        merged = {
            name: merge_sums(
                [
                    part.sums[name].without_labels() if without else part.sums[name]
                    for part in parts
                    if name in part.sums
                ]
            )
            for name in layers
        }
        if not all(part.refusal for part in parts):
            for one in parts:
                warn(self._checks.of_a_process(one.refusal))
        summaries = {layer: LayerSummary(sums) for layer, sums in merged.items()}
        collected = [part.fusion for part in parts if part.fusion is not None]
        fusion = None
        if collected:
            sizes = self._settings.max_samples, self._settings.contribution_samples
            part = merge_parts(collected, sizes)
            part = part.without_labels() if without else part
            refused = next((one.refused for one in parts if one.refused), "")
            fusion = self._summarise_fusion(recorder.fusion, part, tests_attention, partners, refused)
        maps = merge_maps([part.maps for part in parts if part.maps is not None])
        return EvaluationSummary(summaries, fusion, maps)

    def _summarise_fusion(
        self, recorder: FusionRecorder, part: FusionPart, tests_attention: bool, partners: int | None, refused: str
    ) -> FusionSummary:
        size = self._settings.contribution_samples
        refused = refused if size else "contribution_samples is 0"
        found = refused or compute_contributions(part, recorder, size, partners)
        # Where the intact samples do not come back there is nothing to compare with.
        tests_attention &= isinstance(found, Contributions)
        replaced = replace_keys(part, recorder, size) if tests_attention else {}
        return FusionSummary(part, len(self.classes or ()), found, replaced)


def _confident(labels: Labels, inputs: FusionRecord | None) -> Labels:
    """With the confidence that the fusion's replays know, of a step that gives class ids alone."""
    model_output = None if inputs is None else inputs.model_output
    if (
        labels.confidence is not None
        or labels.predicted is None
        or model_output is None
        or model_output.values.shape[1] < 2
    ):
        return labels
    sure, said = model_output.values.max(1)
    return replace(labels, confidence=torch.where(said == labels.predicted, sure, torch.nan))


def _filled(values: Tensor | None, otherwise: float, batch: BatchResult) -> Tensor:
    """Labels of a batch, or the same value for all of its samples."""
    return torch.full((len(batch),), otherwise, device=batch.device) if values is None else values


def summarise(
    evaluations: Mapping[int, Evaluation], recorder: StepRecorder, processes: Processes, tests_attention: bool
) -> Iterator[tuple[int, EvaluationSummary]]:
    """Merge the evaluations of all processes: dataloader and summary, in one order on each of them.

    A collective, and for each dataloader those of `Evaluation.summary`, which every process must reach.

    Parameters
    ----------
    evaluations
        By dataloader; makes those that another process has and this one has not.
    recorder
        Has what is needed to replay what lies behind the fusion.
    processes
        Those that run the model.
    tests_attention
        Whether keys are replaced to see what the attention ranks.
    """
    several = processes.gather({number: evaluation.part() for number, evaluation in evaluations.items()})
    for number in sorted({number for parts in several for number in parts}):
        of_number = [parts[number] for parts in several if number in parts]
        yield number, evaluations[number].summary(recorder, tests_attention, of_number)
