"""Results: of single samples, of a batch, and of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from lightning_xattn.core.attention import AttentionPair, TokenAxis
from lightning_xattn.evaluation.fusion_samples import SampleModalities
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.maps import MapsBySample
from lightning_xattn.functional import ROW_STATISTICS, Rows

REST = "rest"
"""The name of all classes together that are not shown one by one."""


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of attention rows, averaged over valid rows, then heads, then samples; NaN where undefined.

    Attributes
    ----------
    mean
        Mean weight of a row: ``1 / K`` by construction, whatever the model.
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
        """A statistic by its name, as a dict does."""
        try:
            value: float = vars(self)[name]
        except KeyError:
            raise KeyError(f"No statistic '{name}'; there are {', '.join(vars(self))}.") from None
        return value

    @classmethod
    def of_batch(cls, rows: Rows) -> AttentionStatistics:
        """The statistics of all samples, averaged over rows, then heads, then samples."""
        means = (ROW_STATISTICS[name](rows).nanmean(1).cpu().double().nanmean() for name in cls.__dataclass_fields__)
        return cls(*map(float, means))

    @classmethod
    def of_samples(cls, rows: Rows) -> list[AttentionStatistics]:
        """The statistics of each sample, averaged over rows, then heads."""
        columns = [ROW_STATISTICS[name](rows).nanmean(1).tolist() for name in cls.__dataclass_fields__]
        return [cls(*values) for values in zip(*columns, strict=True)]


class PlacedPair(TypedDict):
    """A query and a key of one sample, and their places."""

    query: int
    key: int
    weight: float
    """Attention averaged over the heads, in [0, 1]."""
    lift: float
    """``weight`` times the number of valid keys: 1 is uniform."""
    query_place: str | None
    """In words, e.g. ``"20 to 30"`` or ``"LL"``; None without an axis."""
    key_place: str | None


class SampleResult(TypedDict):
    """One sample; undefined numbers are NaN, unknown values None."""

    sample_idx: int
    """Its index in the batch, or in the loader when a whole loader was explained."""
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
    """The same pairs with their lifts and places."""
    modalities: SampleModalities | None
    """Its probes and contributions; None unless the sample's data set was given."""


class ExplainedSample(SampleResult):
    """One sample of a batch, with its attention, of which it is sample 0."""

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
    """Weights ``(B, heads, queries, keys)`` by direction; a second layer's as ``<layer>/<direction>``. NaN where a mask
    hides padding, or keys that a query may not see; the analyser and figures leave these out."""
    attention: tuple[AttentionPair, ...]
    """The same weights with their masks, by layer."""
    attention_stats: dict[str, AttentionStatistics]
    """Means over the batch, keys as in ``attention_dict``."""
    modality_alignment: float
    """Mean of the samples' ``modality_agreement``."""
    per_sample_explanations: list[SampleResult]
    class_names: tuple[str, ...]
    axes: dict[str, TokenAxis]
    """What the tokens of each modality are, where that is known."""


@dataclass(frozen=True)
class TrainingData:
    """The samples that a model was trained on.

    Attributes
    ----------
    ids
        Of the samples, as strings.
    groups
        Of their groups, such as patients; empty where these are not known.
    """

    ids: frozenset[str]
    groups: frozenset[str] = frozenset()

    def info(self, sample_id: str | None, group: str | None) -> str:
        """Whether a sample is "seen" in training, "related" by its group to one that is, or "new".

        Empty for a sample without an id, for which this is not known.
        """
        if sample_id is None:
            return ""
        return "seen" if sample_id in self.ids else "related" if group in self.groups else "new"


@dataclass(frozen=True, eq=False)
class DatasetResult:
    """A data set, from running sums.

    Attributes
    ----------
    summaries
        By layer name, in the order in which they ran: counts, means and standard deviations by class and outcome,
        AUROC, maps.
    fusion
        Probes and contributions; None where the fusion is not known.
    class_names
        A name for each class; empty when there are no classes.
    classes_by
        "target" or "prediction": what the classes of the summaries are.
    axes
        What the tokens of each modality are, where that is known.
    table
        The folder of the sample table; None when none was written.
    maps
        Of single samples, in the first layer; of some 500 of a large data set, of none where no page is made.
    trained_on
        The samples that the model was trained on; None where these are not known.
    fingerprint
        Of the explained model's weights; "" where the evaluation is no explainer's.
    other_lengths
        By layer name, samples that were left out because their joint sequence does not fit the spans.
    """

    summaries: dict[str, LayerSummary]
    fusion: FusionSummary | None
    class_names: tuple[str, ...]
    classes_by: str
    axes: dict[str, TokenAxis] = field(default_factory=dict)
    table: Path | None = None
    maps: MapsBySample = field(default_factory=dict)
    trained_on: TrainingData | None = None
    other_lengths: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""

    def __repr__(self) -> str:
        one = self.headline if self.summaries else self.fusion
        samples = 0 if one is None else one.samples
        layers = f"layers {', '.join(self.summaries)}" if self.summaries else "no cross-attention"
        fusion = "" if self.fusion is None else f"; modalities {', '.join(self.fusion.modalities)}"
        return f"DatasetResult({samples} samples, {len(self.class_names)} classes; {layers}{fusion})"

    def largest_classes(self, count: int) -> tuple[int, ...]:
        """The ids of the classes with the most samples, in ascending order."""
        sizes = [0] * len(self.class_names)
        if self.summaries:
            sizes = self.headline.class_sizes()
        elif self.fusion is not None:
            of_class = self.fusion.classes[(self.fusion.classes >= 0) & (self.fusion.classes < len(sizes))]
            sizes = of_class.bincount(minlength=len(sizes)).tolist()
        largest = sorted(range(len(sizes)), key=lambda class_id: -sizes[class_id])[:count]
        return tuple(sorted(largest))

    def merge_classes(self, kept: Sequence[int]) -> DatasetResult:
        """The same with these classes, and a last one, ``REST``, that is all others."""
        return replace(
            self,
            summaries={layer: summary.with_classes(kept) for layer, summary in self.summaries.items()},
            fusion=None if self.fusion is None else self.fusion.merge_classes(kept),
            class_names=(*(self.class_names[class_id] for class_id in kept), REST),
        )

    @property
    def headline(self) -> LayerSummary:
        """The first layer's summary."""
        return next(iter(self.summaries.values()))


Results = ExplainedBatch | DatasetResult | dict[str, Any]
"""What reports and figures are made of; may be a plain dict with the keys of ``ExplainedBatch``."""
