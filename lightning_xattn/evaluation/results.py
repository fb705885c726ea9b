"""The vocabulary of results: a batch as it was read, and what is said of samples, batches and data sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from lightning_xattn.attribution.recorder import FusionRecord
from lightning_xattn.capture.labels import Labels
from lightning_xattn.capture.labels.scores import Scores
from lightning_xattn.core.attention import AttentionPair, TokenAxis
from lightning_xattn.core.errors import DataError
from lightning_xattn.core.notebook import ShownInNotebooks
from lightning_xattn.evaluation.fusion_samples import SampleModalities
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.maps import MapsBySample
from lightning_xattn.functional import ROW_STATISTICS, Rows

REST = "rest"
"""What classes are called together that are not shown one by one."""


@dataclass(frozen=True, eq=False)
class BatchResult:
    """What a model did with a batch, for as many samples as its attention has."""

    attention: tuple[AttentionPair, ...]
    """Of each layer."""
    labels: Labels
    """Predictions, scores, targets, ids and groups."""
    inputs: FusionRecord | None = None
    """What entered the fusion; None where that is not known."""

    def __repr__(self) -> str:
        layers = ", ".join(pair.layer for pair in self.attention)
        return f"BatchResult({len(self)} samples; {f'layers {layers}' if layers else 'no cross-attention'})"

    def __len__(self) -> int:
        return len(self._by_sample)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._by_sample.device

    @property
    def _by_sample(self) -> Tensor:
        """A tensor with a row for each sample."""
        if self.attention:
            return self.attention[0].forward.weights
        assert self.inputs is not None
        return next(iter(self.inputs.tokens.values()))[0]

    @property
    def scores(self) -> Scores | None:
        """The class scores, if they are those of the predictions. Looks at the values."""
        scores, predicted = self.labels.scores, self.labels.predicted
        if scores is None or predicted is None or not scores.agree_with(predicted, self.labels.confidence):
            return None
        return scores

    def __getitem__(self, samples: slice) -> BatchResult:
        """Some of the samples."""
        inputs = None if self.inputs is None else self.inputs[samples]
        return BatchResult(tuple(pair[samples] for pair in self.attention), self.labels[samples], inputs)

    def cpu(self) -> BatchResult:
        """Attention and labels on the CPU, without a graph."""
        return BatchResult(tuple(pair.cpu() for pair in self.attention), self.labels.cpu())

    @classmethod
    def joined(cls, parts: Sequence[BatchResult]) -> BatchResult:
        """The parts of a batch as one.

        Raises
        ------
        DataError
            If the parts have other layers or other numbers of tokens.
        """
        if len(parts) == 1:
            return parts[0]
        shapes = {tuple(a.weights.shape[1:] for pair in part.attention for a in pair.directions) for part in parts}
        if len(shapes) > 1:
            raise DataError(
                f"The parts of the batch have attention of different shapes, {sorted(shapes)}: this model's tokens "
                "depend on the batch, so explain it without max_batch_size, in smaller batches."
            )
        layers = zip(*(part.attention for part in parts), strict=True)
        return cls(tuple(map(AttentionPair.joined, layers)), Labels.joined([part.labels for part in parts]))


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of attention rows, averaged over valid rows, then heads, then samples; NaN where undefined.

    Attributes
    ----------
    mean
        Mean weight of a row: ``1 / K`` by construction, so it says nothing about the model.
    std
        Population standard deviation of a row over its valid keys.
    max, min
        Largest and smallest weight of a row, in [0, 1].
    entropy
        Normalised Shannon entropy in [0, 1]: 0 = one key, 1 = diffuse.
    sparsity
        Percentage of valid keys below 0.1, in [0, 100].

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])  # one sample, one head, two queries, two keys
    >>> AttentionAnalyzer().analyze_attention_weights(weights)
    AttentionStatistics(mean=0.5, std=0.25, max=0.75, min=0.25, entropy=0.5, sparsity=25.0)
    """

    mean: float
    std: float
    max: float
    min: float
    entropy: float
    sparsity: float

    def __getitem__(self, name: str) -> float:
        """Read a statistic by its name, as from a dict."""
        try:
            value: float = vars(self)[name]
        except KeyError:
            raise KeyError(f"No statistic '{name}'; there are {', '.join(vars(self))}.") from None
        return value

    @classmethod
    def of_batch(cls, rows: Rows) -> AttentionStatistics:
        """Of all samples, averaged over rows, then heads, then samples."""
        means = (ROW_STATISTICS[name](rows).nanmean(1).cpu().double().nanmean() for name in cls.__dataclass_fields__)
        return cls(*map(float, means))

    @classmethod
    def of_samples(cls, rows: Rows) -> list[AttentionStatistics]:
        """Of each sample, averaged over rows, then heads."""
        columns = [ROW_STATISTICS[name](rows).nanmean(1).tolist() for name in cls.__dataclass_fields__]
        return [cls(*values) for values in zip(*columns, strict=True)]


class PlacedPair(TypedDict):
    """A query and a key of one sample, and where they lie."""

    query: int
    key: int
    weight: float
    """Attention averaged over the heads, in [0, 1]."""
    lift: float
    """``weight`` times the number of valid keys: 1 is uniform."""
    query_place: str | None
    """In words, e.g. ``"20 to 30"`` or ``"LL"``; None where no axis tells."""
    key_place: str | None


class SampleResult(TypedDict):
    """One sample; undefined numbers are NaN, what is not known is None."""

    sample_idx: int
    """Its place in the batch, or in the loader when a whole loader was explained."""
    sample_id: str | None
    predicted_class: int | None
    predicted_name: str | None
    confidence: float | None
    """Probability of the predicted class."""
    probabilities: list[float] | None
    true_class: int | None
    true_name: str | None
    correct: bool | None
    tied: bool
    """Whether the top class of a soft target is tied; the first of them is ``true_class``."""
    modality_agreement: float
    """``alignment`` of the first layer."""
    head_entropies: dict[str, float]
    """``{"eeg_to_spec/head_0": ...}``."""
    attention_stats: dict[str, AttentionStatistics]
    """By direction, as ``attention_dict``."""
    top_attention_pairs: dict[str, list[tuple[int, int, float]]]
    """By direction: (query, key, weight), largest weight first."""
    top_attention_places: dict[str, list[PlacedPair]]
    """The same pairs with their lift and places."""
    modalities: SampleModalities | None
    """What each modality says and contributes; None unless it is known from the data set that the sample is of."""


class ExplainedSample(SampleResult):
    """One sample of a batch, with what is needed to draw it: there it is sample 0."""

    attention_dict: dict[str, Tensor]
    """Weights ``(1, heads, queries, keys)``, keys as in ``ExplainedBatch``."""
    attention: tuple[AttentionPair, ...]
    """The same weights with their masks, by layer."""
    class_names: tuple[str, ...]
    axes: dict[str, TokenAxis]


class ExplainedBatch(TypedDict):
    """A batch of B samples."""

    logits: Tensor | None
    """``(B, classes)``; None when the model gives no class scores."""
    probabilities: Tensor | None
    predictions: Tensor | None
    """``(B,)`` class ids."""
    targets: Tensor | None
    """``(B,)`` class ids; -1 where there is none."""
    attention_dict: dict[str, Tensor]
    """Weights ``(B, heads, queries, keys)`` by direction; a second layer's as ``<layer>/<direction>``. NaN marks what a
    mask hides: padding, and keys that a query may not see. Analyser and figures leave it out."""
    attention: tuple[AttentionPair, ...]
    """The same weights with their masks, by layer."""
    attention_stats: dict[str, AttentionStatistics]
    """Means over the batch, keys as in ``attention_dict``."""
    modality_alignment: float
    """Mean of the samples' ``modality_agreement`` where it is defined."""
    per_sample_explanations: list[SampleResult]
    class_names: tuple[str, ...]
    axes: dict[str, TokenAxis]
    """What the tokens of each modality are, where it is known."""
    dataset: DatasetResult | None
    """The data set that the samples are of, where that was given."""


@dataclass(frozen=True)
class TrainingData:
    """The samples that a model was trained on.

    Attributes
    ----------
    ids
        Of the samples, as strings.
    groups
        Of the groups, such as patients, that they come from; empty where these are not known.
    """

    ids: frozenset[str]
    groups: frozenset[str] = frozenset()

    def info(self, sample_id: str | None, group: str | None) -> str:
        """What the model has seen of a sample: "seen" itself, others of its group ("related"), or "new".

        Empty of a sample without an id, of which it is not known.
        """
        if sample_id is None:
            return ""
        return "seen" if sample_id in self.ids else "related" if group in self.groups else "new"


@dataclass(frozen=True)
class EarlierTest:
    """What a test of the attention in an earlier epoch of a fit found, where an evaluation has none of its own.

    Attributes
    ----------
    epoch
        That it is of.
    faithfulness
        By direction its value and the ends of its 95 % CI; NaN where it is not told.
    unfaithful
        By direction, why it is not told; "" where it is.
    """

    epoch: int
    faithfulness: dict[str, tuple[float, float, float]]
    unfaithful: dict[str, str]

    @classmethod
    def find(cls, history: Sequence[Mapping[str, Any]]) -> EarlierTest | None:
        """The last one of a history; None where there is none."""
        record = next((one for one in reversed(history) if one.get("unfaithful")), None)
        if record is None:
            return None

        def read(name: str) -> float:
            # What is undefined in an epoch is not in its record.
            return float(record.get(name, math.nan))

        names = {direction: f"faithfulness/{direction}" for direction in record["unfaithful"]}
        found = {one: (read(name), read(f"{name}_low"), read(f"{name}_high")) for one, name in names.items()}
        return cls(record["epoch"], found, dict(record["unfaithful"]))


@dataclass(frozen=True, eq=False)
class DatasetResult(ShownInNotebooks):
    """A whole loader, from running sums.

    Attributes
    ----------
    summaries
        By layer name, the first layer first: counts, means and standard deviations by class and outcome, AUROC, maps.
    fusion
        What each modality says and contributes; None where the fusion is not known.
    class_names
        A name for each class; empty when there are no classes.
    classes_by
        "target" or "prediction": what the classes of the summaries are.
    axes
        What the tokens of each modality are, where it is known.
    table
        The folder with one row per sample and layer; None when none was written.
    maps
        Of single samples, in the first layer; of some 500 of a large data set, of none where a page is not made.
    trained_on
        What the model was trained on; None where that is not known.
    other_lengths
        By layer name, samples that were left out because their joint sequence has another length than its spans are
        for.
    earlier_test
        The last test of the attention in the fit that this is of, if this evaluation has none of its own; else None.
    """

    summaries: dict[str, LayerSummary]
    fusion: FusionSummary | None
    class_names: tuple[str, ...]
    classes_by: str
    axes: dict[str, TokenAxis]
    table: Path | None
    maps: MapsBySample = field(default_factory=dict)
    trained_on: TrainingData | None = None
    other_lengths: dict[str, int] = field(default_factory=dict)
    earlier_test: EarlierTest | None = None

    def __repr__(self) -> str:
        one = self.headline if self.summaries else self.fusion
        samples = 0 if one is None else one.samples
        layers = f"layers {', '.join(self.summaries)}" if self.summaries else "no cross-attention"
        fusion = "" if self.fusion is None else f"; modalities {', '.join(self.fusion.modalities)}"
        return f"DatasetResult({samples} samples, {len(self.class_names)} classes; {layers}{fusion})"

    def largest_classes(self, count: int) -> tuple[int, ...]:
        """The ids of the classes with the most samples, in their own order."""
        sizes = [0] * len(self.class_names)
        if self.summaries:
            sizes = [self.headline.size(class_id=class_id) for class_id in range(len(sizes))]
        elif self.fusion is not None:
            sizes = [int((self.fusion.classes == class_id).sum()) for class_id in range(len(sizes))]
        largest = sorted(range(len(sizes)), key=lambda class_id: -sizes[class_id])[:count]
        return tuple(sorted(largest))

    def with_classes(self, kept: Sequence[int]) -> DatasetResult:
        """The same by these classes alone, and a last one, ``REST``, that is all others."""
        return replace(
            self,
            summaries={layer: summary.with_classes(kept) for layer, summary in self.summaries.items()},
            fusion=None if self.fusion is None else self.fusion.with_classes(kept),
            class_names=(*(self.class_names[class_id] for class_id in kept), REST),
        )

    @property
    def headline(self) -> LayerSummary:
        """The first layer's summary."""
        return next(iter(self.summaries.values()))


Results = ExplainedBatch | DatasetResult | dict[str, Any]
"""What reports and figures take; a plain dict with the keys of ``ExplainedBatch`` will do."""
