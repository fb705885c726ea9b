"""The running sums of one data set, batch after batch, and their summary at its end.

The callback and the explainer hand each batch to an `Evaluation`: ``read`` gives a `BatchResult`, ``add`` adds it to
the sums and gives its rows of the sample table, and ``summarise`` gives the `DatasetResult`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.attribution.contribution import PARTNERS, Contributions, compute_contributions
from lightning_xattn.attribution.faithfulness import replace_keys
from lightning_xattn.attribution.kept_samples import BottomKSample, KeptSamples
from lightning_xattn.attribution.recorder import ModalityRecorder
from lightning_xattn.capture.labels import SEVERAL_LABELS, Step
from lightning_xattn.core.attention import AttentionPair
from lightning_xattn.core.distributed import NUMBER, SINGLE_PROCESS, Processes
from lightning_xattn.core.ids import group_keys, id_text
from lightning_xattn.core.notices import warn
from lightning_xattn.evaluation.accumulators import LayerAccumulator
from lightning_xattn.evaluation.batch import Attentions, BatchResult, StepRecorder, classify, read_batch, with_fusion
from lightning_xattn.evaluation.checks import explain_refusal
from lightning_xattn.evaluation.classes import is_regression, missing_labels, name_classes, own_class_names
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.maps import CELLS, add_maps, maps_by_sample
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.evaluation.saved_probes import SavedProbes
from lightning_xattn.evaluation.settings import Settings
from lightning_xattn.evaluation.statistics import CONFIDENCE, SampleNumbers, headline, sample_statistics, table_columns
from lightning_xattn.functional import LayerRows, Rows, prepare_layer, received_attention

DIFFERENT_CLASSES = (
    "Processes found different numbers of classes: the first batch of one had no predictions or targets that fit. So "
    "nothing is compared by class. Name them: predictions=<key or callable>, targets=<key or callable>."
)

DIFFERENT_MODALITIES = (
    "Processes found different modalities, so the samples of some are in no probe. Name them: modalities={'<a>': "
    "'path.to.encoder', '<b>': 'path.to.encoder'}."
)

INDICES_PER_PROCESS = 2**40
"""Where no sampler says which samples a process has, its own ones are counted from its rank times this number."""


@dataclass(eq=False)
class Totals:
    """What one process has of an evaluation, or with ``+`` what several have.

    Attributes
    ----------
    kept : KeptSamples
        For probes and contributions.
    maps : BottomKSample
        Attention maps of single samples.
    classes : tuple of str or None
        The names of the classes; None before the first batch.
    layers : dict of str to LayerAccumulator
        By name.
    repeats : int
        Samples left out because another process had them.
    left_out_batches : int
        Batches left out because they could not be recorded.
    other_lengths : Counter of str
        By layer, samples left out because their joint sequence does not fit the spans.
    has_several_labels : bool
        Whether the targets turned out to be several labels at once, and no classes.
    replay_problem : str
        Why nothing is replayed, as the end of a sentence; "" where the model may run again.
    recording_problem : str
        Why this process records nothing; "" where it records, or where one of several does.
    """

    kept: KeptSamples
    maps: BottomKSample
    classes: tuple[str, ...] | None = None
    layers: dict[str, LayerAccumulator] = field(default_factory=dict)
    repeats: int = 0
    left_out_batches: int = 0
    other_lengths: Counter[str] = field(default_factory=Counter)
    has_several_labels: bool = False
    replay_problem: str = ""
    recording_problem: str = ""

    def __add__(self, other: Totals) -> Totals:
        names = dict.fromkeys([*self.layers, *other.layers])
        of_layers = {name: [one.layers[name] for one in (self, other) if name in one.layers] for name in names}
        return Totals(
            self.kept + other.kept,
            self.maps + other.maps,
            other.classes if self.classes is None else self.classes,
            {name: reduce(add, several) for name, several in of_layers.items()},
            self.repeats + other.repeats,
            self.left_out_batches + other.left_out_batches,
            self.other_lengths + other.other_lengths,
            self.has_several_labels or other.has_several_labels,
            self.replay_problem or other.replay_problem,
            self.recording_problem and other.recording_problem,
        )

    def without_labels(self) -> Totals:
        """The same without classes, predictions and outcomes."""
        layers = {name: sums.without_labels() for name, sums in self.layers.items()}
        return replace(self, kept=self.kept.without_labels(), layers=layers, classes=())


NO_ATTENTION = (
    "no attention (none detected; if there is some, set attention={'<a>_to_<b>': 'path.to.module', "
    "'<b>_to_<a>': 'path.to.module'})"
)
"""What is printed of a model without attention."""


class Evaluation:
    """One data set, batch after batch.

    Parameters
    ----------
    settings
        How batches are read.
    module
        Its ``class_names``, if it has any, are used where the settings have none.
    first
        The evaluation of another dataloader that has the same classes; None: they are decided here.
    expects_targets
        Whether missing labels are warned of; a prediction has none.
    keeps_maps
        Whether maps of single samples are kept, for a report's page.
    processes
        Those that run the model.

    Attributes
    ----------
    finder : LabelFinder
        Finds labels in a step.
    totals : Totals
        The sums so far; after ``summarise`` those of all processes.
    seen : int
        Samples of this process so far, with those that were left out.
    has_dropped : bool
        Whether samples of this evaluation had classes before their targets turned out to be several labels at once.
    lacking_query_mask : set of str
        Layers of which one direction alone is recorded, and no mask marks its queries that are padding.
    shown_classes : tuple of int or None
        Of many classes, those that have curves and figures; decided when the first evaluation is shown.
    """

    def __init__(
        self,
        settings: Settings,
        module: object,
        first: Evaluation | None = None,
        expects_targets: bool = True,
        keeps_maps: bool = False,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self._expects_targets, self._keeps_maps, self._processes = expects_targets, keeps_maps, processes
        self._settings, self._module, self._first = settings, module, first
        self.finder = settings.finder()
        self.classes: tuple[str, ...] | None = None
        self.shown_classes: tuple[int, ...] | None = None
        self._first_layer = ""
        self.lacking_query_mask: set[str] = set()
        self.reset()

    def reset(self) -> None:
        """Empty the sums; what the first batch decided stays."""
        samples, permuted = self._settings.max_samples, self._settings.permuted_samples
        self.totals = Totals(KeptSamples(BottomKSample(samples), BottomKSample(permuted)), BottomKSample(CELLS))
        self._accumulators: dict[str, LayerAccumulator] = {}
        self.has_dropped, self.seen = False, 0

    def read(self, step: Step, attention: Attentions, recorder: StepRecorder) -> BatchResult:
        """The `BatchResult` of a step; the first one decides what the classes are, and where the fusion is.

        Raises
        ------
        DiscoveryError, ShapeError, DataError
            As ``read_batch``, ``StepRecorder.collect_fusion`` and ``name_classes``.
        """
        was_decided = self.finder.decided
        batch = with_fusion(read_batch(step, attention, self.finder), recorder, step, self.finder)
        if not was_decided:
            recorder.follow(self.finder)
        self._first_layer = recorder.layers[0].name if recorder.layers else ""
        if self.classes is None and self._first is not None:
            self.classes = self._first.classes
        if self.classes is None:
            names, classes_by = self._settings.class_names or own_class_names(self._module), self._settings.classes_by
            self.classes = name_classes(batch.labels, names, classes_by, step)
            if self._first is not None:  # no batch of its dataloader ran before
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
            Whether nothing else of their batch was recorded, so that it is not added.
        places
            As ``add`` takes them.
        """
        own = {layer: count if places is None else min(count, len(places)) for layer, count in samples.items()}
        self.totals.other_lengths.update(own)
        self.seen += max(samples.values(), default=0) if is_all else 0

    def describe(self, batch: BatchResult, recorder: StepRecorder) -> str:
        """Describe in a line what was detected in a first batch, so that the user sees a wrong guess at once."""
        attention = [
            f"{one.direction} ({one.shape[2]} {one.direction.query} queries → {one.tokens} {one.direction.key} keys)"
            for pair in batch.attention[:1]
            for one in pair.directions
        ]
        attention += [f"{len(batch.attention) - 1} more layer(s)"] if len(batch.attention) > 1 else []
        places, n_classes = self.finder.places, batch.labels.n_classes
        predictions = places.get("predictions", "")
        if predictions and n_classes:
            predictions += f" ({n_classes} classes)"
        predictions = predictions or recorder.fusion.found.prediction_name or "none"
        if is_regression(batch.labels):
            predictions += " (regression; if it is a binary head, set targets=<key or callable>)"
        return "; ".join(
            [
                ", ".join(attention) or (NO_ATTENTION if recorder.detected_no_attention else "no attention"),
                f"modalities: {', '.join(map(str, recorder.fusion.modalities)) or 'none'}",
                f"predictions: {predictions}",
                *(f"{what}: {places.get(what, 'none')}" for what in ("targets",)),
                *(f"{what}: {places[what]}" for what in ("groups", "query_mask") if what in places),
            ]
        )

    def add(self, batch: BatchResult, places: range | None = None, needs_rows: bool = True) -> list[dict[str, Any]]:
        """Add a batch to the sums, and give its rows of the sample table: the columns of each layer.

        Parameters
        ----------
        batch
            From ``read``.
        places
            The indices of its samples in the data set, see ``unique_sample_indices``. Samples beyond them are left out,
            as another process has them. None: all samples are added, and their indices follow those before.
        needs_rows
            Whether there is a table; without one there are no rows.
        """
        seen, numbers = self.seen, torch.arange(self.seen, self.seen + len(batch), device=batch.device)
        first = self.seen + self._processes.rank * INDICES_PER_PROCESS
        places = range(first, first + len(batch)) if places is None else places
        self.seen += len(batch)
        self.totals.repeats += len(batch) - len(places)
        batch = batch[: len(places)]
        labels, n_classes = batch.labels, len(self.classes or ())
        classes, outcomes, tied = classify(labels, self._settings.classes_by, n_classes, len(batch), batch.device)
        about: dict[str, Any] = {
            "target": labels.target,
            "prediction": labels.predicted,
            "confidence": labels.confidence,
            "correct": outcomes,
            "tied": tied,
            "process": self._processes.rank,
            NUMBER: numbers[: len(batch)],
        }
        ids = {"sample_id": labels.sample_ids, "group": labels.group_ids}
        layers = [prepare_layer(*pair.directions) for pair in batch.attention]
        first_ran = bool(layers) and batch.attention[0].layer == self._first_layer
        statistics = [
            self._read_numbers(batch, pair, layer) for pair, layer in zip(batch.attention, layers, strict=True)
        ]
        if len(batch):
            self._add_names(batch.labels.sample_ids, seen)
            self._keep_samples(batch, about | {"class": classes}, places, layers[0].directions if first_ran else ())
        table = [about | {"layer": None} | ids] if needs_rows and not batch.attention else []
        for pair, layer, of_layer in zip(batch.attention, layers, statistics, strict=True):
            if pair.backward is None and pair.forward.query_mask is None and not pair.forward.is_block:
                self.lacking_query_mask.add(pair.layer)
            self._accumulators[pair.layer].add(layer, of_layer, classes, outcomes, tied, labels.groups)
            if needs_rows:
                undefined = of_layer[headline(of_layer)].isnan()
                table.append(about | table_columns(of_layer) | {"undefined": undefined, "layer": pair.layer} | ids)
        return table

    def _read_numbers(self, batch: BatchResult, pair: AttentionPair, layer: LayerRows) -> SampleNumbers:
        """The numbers of a layer, which its sums can take; before any of the batch is added.

        Raises
        ------
        ShapeError
            If they are others than those of the first batch, or groups are missing.
        """
        labels = batch.labels
        numbers = sample_statistics(layer).with_column(CONFIDENCE, _or_default(labels.confidence, torch.nan, batch))
        if pair.layer not in self._accumulators:
            empty = LayerAccumulator.empty(layer, numbers.columns, len(self.classes or ()), labels.group_noun)
            self._accumulators[pair.layer] = empty
        self._accumulators[pair.layer].check(numbers, labels.groups)
        return numbers

    def _add_names(self, ids: Tensor | Sequence[Any] | None, first: int) -> None:
        """Keep ids that are no numbers, of samples from the ``first`` on."""
        if ids is not None and not isinstance(ids, Tensor):
            texts = enumerate(map(id_text, ids), first)
            self.totals.kept.add_names({(self._processes.rank, n): text for n, text in texts if text is not None})

    def _keep_samples(
        self, batch: BatchResult, about: Mapping[str, Any], places: Sequence[int], first_layer: Sequence[Rows]
    ) -> None:
        needs_maps = self._keeps_maps and bool(first_layer)
        self.totals.kept.unrecorded += len(batch) if batch.inputs is None else 0
        if batch.inputs is None and not needs_maps:
            return
        labels = batch.labels
        if labels.sample_ids is None:
            keys = torch.tensor(places, dtype=torch.int64, device=batch.device)
        else:
            keys = group_keys(labels.sample_ids, batch.device)
        identity = {NUMBER: about[NUMBER], "process": torch.full_like(about["class"], self._processes.rank)}
        if needs_maps:
            add_maps(self.totals.maps, first_layer, keys, identity)
        if batch.inputs is None:
            return
        facts = identity | {
            "class": about["class"],
            "correct": about["correct"],
            "target": _or_default(labels.target, -1, batch),
            "prediction": _or_default(labels.predicted, -1, batch),
            "confidence": _or_default(labels.confidence, torch.nan, batch),
        }
        facts |= _number_ids(labels.sample_ids, batch)
        received = {str(rows.direction): received_attention(rows) for rows in first_layer}
        self.totals.kept.add(batch.inputs, keys, labels.groups, labels.group_noun, facts, received, labels.present)

    def drop_targets(self) -> None:
        """Drop classes, predictions and outcomes, as the targets are several labels at once."""
        warn([self.finder.drop_targets()])
        self.classes, self.has_dropped = (), True
        self._accumulators = {layer: sums.without_labels() for layer, sums in self._accumulators.items()}

    def own_totals(self) -> Totals:
        """The sums of this process, to be added to those of others. Waits for a GPU."""
        totals, several = self.totals, self.finder.has_several
        refused = totals.replay_problem or (SEVERAL_LABELS if several or self.finder.are_several else "")
        return replace(
            totals,
            # A single process replays where the tokens are.
            kept=totals.kept if self._processes is SINGLE_PROCESS else totals.kept.cpu(),
            maps=totals.maps.cpu(),
            classes=self.classes,
            layers={layer: sums.cpu() for layer, sums in self._accumulators.items()},
            has_several_labels=several,
            replay_problem=refused,
        )

    def summarise(
        self,
        recorder: StepRecorder,
        tests_attention: bool,
        parts: Sequence[Totals] | None = None,
        partners: int | None = PARTNERS,
        saved: SavedProbes | None = None,
        permuted: int | None = None,
    ) -> DatasetResult:
        """The summaries of each layer and of the fusion.

        Where there are several processes and samples are replayed, this has collectives that each must reach.

        Parameters
        ----------
        recorder
            Replays what lies behind the fusion.
        tests_attention
            Whether keys are replaced to test how well the attention ranks them.
        parts
            The totals of all processes, in the same order on each of them. None: of this one alone.
        partners
            With how many others each sample is permuted; None: with all.
        saved
            Probes of an earlier evaluation that read the samples; None: probes are fitted on them.
        permuted
            How many of the samples that are kept for it are permuted, at most; None: all.
        """
        parts = [self.own_totals()] if parts is None else parts
        several = any(part.has_several_labels for part in parts)
        disagree = len({sums.n_classes for part in parts for sums in part.layers.values()}) > 1
        if several:
            self.drop_targets()
        elif disagree:
            warn([DIFFERENT_CLASSES])
        if several or disagree:
            parts = [part.without_labels() for part in parts]
        names = {part.kept.modalities for part in parts if part.kept.modalities}
        if len(names) > 1:
            warn([DIFFERENT_MODALITIES])
            chosen, empty = max(names), KeptSamples(BottomKSample(1), BottomKSample(1))
            parts = [part if part.kept.modalities == chosen else replace(part, kept=empty) for part in parts]
        self.totals = totals = reduce(add, parts)
        sample = totals.kept.permuted
        sample.size = sample.size if permuted is None else min(sample.size, permuted)
        self.classes = totals.classes
        if not totals.recording_problem:
            problems = [part.recording_problem for part in parts if part.recording_problem]
            warn(map(explain_refusal, problems[:1]), once="process")
        return DatasetResult(
            {layer: LayerSummary(sums) for layer, sums in totals.layers.items()},
            self._summarise_fusion(recorder.fusion, tests_attention, partners, saved)
            if totals.kept.modalities
            else None,
            self.classes or (),
            self._settings.classes_by,
            maps=maps_by_sample(totals.maps),
            other_lengths=dict(+totals.other_lengths),
        )

    def _summarise_fusion(
        self, fusion: ModalityRecorder, tests_attention: bool, partners: int | None, saved: SavedProbes | None
    ) -> FusionSummary:
        kept = self.totals.kept
        problem = self.totals.replay_problem if self._settings.permuted_samples else "contribution_samples is 0"
        with fusion.sharing_state():
            found = problem or compute_contributions(kept, fusion, partners)
            # Where the intact samples' outputs do not come back, there is nothing to compare with.
            tests_attention &= isinstance(found, Contributions)
            replaced = replace_keys(kept, fusion) if tests_attention else {}
        sources = tuple(map(str, fusion.modalities))
        if saved is not None:
            saved.require_sources(sources)
        return FusionSummary(kept, sources, len(self.classes or ()), found, replaced, saved)


def _number_ids(ids: Tensor | Sequence[Any] | None, batch: BatchResult) -> dict[str, Tensor]:
    """Ids of samples as columns: whole numbers ("id_kind" 1), the bits of others (2), and 0 where they are none (0)."""
    kind, numbers = 0, torch.zeros(len(batch), dtype=torch.int64, device=batch.device)
    if isinstance(ids, Tensor):
        kind, values = (2 if ids.is_floating_point() else 1), ids.detach().reshape(-1).to(batch.device)
        numbers = values.double().view(torch.int64) if kind == 2 else values.long()
    return {"id": numbers, "id_kind": torch.full_like(numbers, kind)}


def _or_default(values: Tensor | None, default: float, batch: BatchResult) -> Tensor:
    return torch.full((len(batch),), default, device=batch.device) if values is None else values


def summarise_all(
    evaluations: Mapping[int, Evaluation],
    recorder: StepRecorder,
    processes: Processes,
    tests_attention: bool,
    permuted: int | None = None,
) -> Iterator[tuple[int, DatasetResult]]:
    """Each dataloader with its result over all processes, in the same order on each of them.

    A collective for all sums, and for each dataloader those of `Evaluation.summarise`, which every process must reach:
    one for its contributions, and one where the attention is tested.

    Parameters
    ----------
    evaluations
        By dataloader; makes those that only another process has.
    recorder
        Replays what lies behind the fusion.
    processes
        Those that run the model.
    tests_attention
        Whether keys are replaced to test how well the attention ranks them.
    permuted
        As `Evaluation.summarise` takes it.
    """
    own, fusion = {number: evaluation.own_totals() for number, evaluation in evaluations.items()}, recorder.fusion
    with fusion.sharing_state():
        # A single process asks when there is something to replay: `share_work`.
        may_replay = processes is not SINGLE_PROCESS and not any(totals.replay_problem for totals in own.values())
        gathered = processes.gather((own, fusion.find_readiness() if may_replay else None))
        ready = [readiness for _, readiness in gathered if readiness is not None]
        fusion.readiness = ready if len(ready) == len(gathered) else None
        several = [parts for parts, _ in gathered]
        for number in sorted({number for parts in several for number in parts}):
            of_number = [parts[number] for parts in several if number in parts]
            yield number, evaluations[number].summarise(recorder, tests_attention, of_number, permuted=permuted)
