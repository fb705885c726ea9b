"""The vocabulary of the offline part: what an explained sample, batch and data set are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from lightning_xattn.aggregation import LayerSummary
from lightning_xattn.attention import AttentionPair, TokenAxis
from lightning_xattn.attention_analysis import AttentionStatistics


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


class SampleExplanation(TypedDict):
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


class SingleExplanation(SampleExplanation):
    """One sample of a batch, with what is needed to draw it: there it is sample 0."""

    attention_dict: dict[str, Tensor]
    """Weights ``(1, heads, queries, keys)``, keys as in ``BatchExplanation``."""
    attention: tuple[AttentionPair, ...]
    """The same weights with their masks, by layer."""
    class_names: tuple[str, ...]
    axes: dict[str, TokenAxis]


class BatchExplanation(TypedDict):
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
    per_sample_explanations: list[SampleExplanation]
    class_names: tuple[str, ...]
    axes: dict[str, TokenAxis]
    """What the tokens of each modality are, where it is known."""


@dataclass(frozen=True, eq=False)
class DatasetExplanation:
    """A whole loader, from running sums.

    Attributes
    ----------
    summaries
        By layer name, the first layer first: counts, means and standard deviations by class and outcome, AUROC, maps.
    class_names
        A name for each class; empty when there are no classes.
    group_by
        "target" or "prediction": what the classes of the summaries are.
    axes
        What the tokens of each modality are, where it is known.
    table
        The folder with one row per sample and layer; None when none was written.
    """

    summaries: dict[str, LayerSummary]
    class_names: tuple[str, ...]
    group_by: str
    axes: dict[str, TokenAxis]
    table: Path | None

    @property
    def headline(self) -> LayerSummary:
        """The first layer's summary."""
        return next(iter(self.summaries.values()))


Results = BatchExplanation | DatasetExplanation | dict[str, Any]
"""What reports and figures take; a plain dict with the keys of ``BatchExplanation`` will do."""
