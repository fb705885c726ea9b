"""What is said of each sample of a batch, and of the batch as a whole, in the guide's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xattn.core.attention import Attention, TokenAxis, fitting_axes
from lightning_xattn.core.errors import DataError
from lightning_xattn.core.group_keys import group_keys
from lightning_xattn.core.names import id_text
from lightning_xattn.evaluation.classes import classify
from lightning_xattn.evaluation.fusion_samples import SampleModalities, find_samples, describe_modalities
from lightning_xattn.evaluation.results import (
    AttentionStatistics,
    BatchResult,
    DatasetResult,
    ExplainedBatch,
    PlacedPair,
    SampleResult,
)
from lightning_xattn.evaluation.statistics import ALIGNMENT, sample_statistics
from lightning_xattn.functional import Rows, TopPair, prepare_rows, sample_top_pairs
from lightning_xattn.functional.outcomes import CORRECT, UNKNOWN


def require_finite(batch: BatchResult) -> BatchResult:
    """The batch, if numbers can be made of it.

    Raises
    ------
    DataError
        If scores are not finite, or attention where there are no predictions; names the samples.
    """
    labels, ids = batch.labels, _ids_as_text(batch)
    rows = [prepare_rows(attention) for pair in batch.attention for attention in pair.directions]
    if labels.predicted is not None:
        what, broken = "class scores", labels.predicted < 0
    else:
        what, broken = "attention", torch.stack([r.broken.flatten(1).any(1) for r in rows]).any(0)
    if bool(broken.any()):
        found = broken.nonzero().flatten().tolist()
        names = [f"{i}" if ids is None else f"{i} (id {ids[i]})" for i in found]
        also = "" if labels.predicted is None else " (or class ids below 0)"
        raise DataError(
            f"The {what} of sample {', '.join(names[:8])}{', ...' if len(names) > 8 else ''} ({len(names)} of "
            f"{len(broken)}) are not finite{also}. Look for NaN or infinity in their input or, if all samples are "
            "concerned, in the model's weights." + _say_masked(rows, broken)
        )
    return batch


def _say_masked(rows: Sequence[Rows], broken: Tensor) -> str:
    masked = max((int((one.wholly_masked & broken).sum()) for one in rows), default=0)
    if not masked:
        return ""
    return (
        f" In {masked} of them one modality is wholly masked: a softmax that sees no key gives NaN. Have the model "
        "leave the attention of such samples out, or show it one token."
    )


@dataclass(frozen=True, eq=False)
class _NamedRows:
    """One direction of one layer, under its name in ``attention_dict``."""

    name: str
    attention: Attention
    rows: Rows


def explain(
    batch: BatchResult,
    class_names: tuple[str, ...],
    axes: Mapping[str, TokenAxis],
    top_k: int,
    among: DatasetResult | None,
) -> ExplainedBatch:
    """Everything that is said of a batch on the CPU.

    Parameters
    ----------
    batch
        The batch.
    class_names
        A name for each class; empty when there are no classes.
    axes
        What the tokens of each modality are; one whose length does not fit gives no places.
    top_k
        How many pairs to name for each sample and direction.
    among
        The data set that the samples are of; None: not known.
    """
    layers = [
        [
            _NamedRows(f"{pair.layer}/{one.direction}" if i else str(one.direction), one, prepare_rows(one))
            for one in pair.directions
        ]
        for i, pair in enumerate(batch.attention)
    ]
    flat = [direction for of_layer in layers for direction in of_layer]
    labels, scores = batch.labels, batch.scores
    samples = _explain_samples(batch, layers, class_names, axes, top_k)
    for sample, modalities in zip(samples, _modalities_of(batch, among), strict=True):
        sample["modalities"] = modalities
    agreement = torch.tensor([sample["modality_agreement"] for sample in samples], dtype=torch.float64)
    return {
        "logits": None if scores is None else scores.logits,
        "probabilities": None if scores is None else scores.probabilities,
        "predictions": labels.predicted,
        "targets": None if labels.target is None else labels.target.clamp_min(-1),
        "attention_dict": {one.name: one.attention.marked_weights for one in flat},
        "attention": batch.attention,
        "attention_stats": {one.name: AttentionStatistics.of_batch(one.rows) for one in flat},
        "modality_alignment": float(agreement.nanmean()),
        "per_sample_explanations": samples,
        "class_names": class_names,
        "axes": fitting_axes(axes, batch.attention[0].forward.token_counts),
        "dataset": among,
    }


def _explain_samples(
    batch: BatchResult,
    layers: list[list[_NamedRows]],
    class_names: tuple[str, ...],
    axes: Mapping[str, TokenAxis],
    top_k: int,
) -> list[SampleResult]:
    labels, samples, ids = batch.labels, len(batch), _ids_as_text(batch)
    # Each number is one column over the samples.
    entropies: dict[str, list[float]] = {}
    agreement = [torch.nan] * samples
    for i, directions in enumerate(layers):
        statistics = sample_statistics(*(one.rows for one in directions))
        if i == 0 and ALIGNMENT in statistics:
            agreement = statistics[ALIGNMENT].tolist()
        names = {one.attention.direction: one.name for one in directions}
        for column, values in statistics.items():
            if column.statistic == "entropy" and column.direction is not None and column.head is not None:
                entropies[f"{names[column.direction]}/head_{column.head}"] = values.tolist()
    flat = [one for directions in layers for one in directions]
    stats = {one.name: AttentionStatistics.of_samples(one.rows) for one in flat}
    pairs = {one.name: sample_top_pairs(one.rows, top_k) for one in flat}
    places = {one.name: _Places(one.attention, axes) for one in flat}
    _, outcomes, tied = classify(labels, "target", len(class_names), samples)
    predicted, target = _class_ids(labels.predicted, samples), _class_ids(labels.target, samples)
    probabilities = None if batch.scores is None else batch.scores.probabilities
    confidence = labels.confidence
    if confidence is None and probabilities is not None:
        confidence = probabilities.amax(1)
    return [
        {
            "sample_idx": i,
            "sample_id": None if ids is None else ids[i],
            "predicted_class": predicted[i],
            "predicted_name": _class_name(predicted[i], class_names),
            "confidence": None if confidence is None else float(confidence[i]),
            "probabilities": None if probabilities is None else probabilities[i].tolist(),
            "true_class": target[i],
            "true_name": _class_name(target[i], class_names),
            "correct": None if outcome == UNKNOWN else outcome == CORRECT,
            "tied": tie,
            "modality_agreement": agreement[i],
            "head_entropies": {name: values[i] for name, values in entropies.items()},
            "attention_stats": {name: of_samples[i] for name, of_samples in stats.items()},
            "top_attention_pairs": {name: [pair[:3] for pair in found[i]] for name, found in pairs.items()},
            "top_attention_places": {
                name: [places[name].of(pair) for pair in found[i]] for name, found in pairs.items()
            },
            "modalities": None,
        }
        for i, (outcome, tie) in enumerate(zip(outcomes.tolist(), tied.tolist(), strict=True))
    ]


def _modalities_of(batch: BatchResult, among: DatasetResult | None) -> list[SampleModalities | None]:
    """What the data set says of each sample, found by its id."""
    if among is None or among.fusion is None or batch.labels.sample_ids is None:
        return [None] * len(batch)
    found = find_samples(among.fusion, group_keys(batch.labels.sample_ids, "cpu"))
    return [None if i is None else describe_modalities(among.fusion, i, among.class_names) for i in found]


def _ids_as_text(batch: BatchResult) -> list[str | None] | None:
    ids = batch.labels.sample_ids
    return None if ids is None else [*map(id_text, ids)]


def _class_ids(ids: Tensor | None, samples: int) -> list[int | None]:
    return [None] * samples if ids is None else [i if i >= 0 else None for i in ids.tolist()]


def _class_name(class_id: int | None, class_names: tuple[str, ...]) -> str | None:
    return class_names[class_id] if class_id is not None and class_id < len(class_names) else None


class _Places:
    """Where the pairs of a direction lie, as far as its axes are known."""

    def __init__(self, attention: Attention, axes: Mapping[str, TokenAxis]) -> None:
        fitting = fitting_axes(axes, attention.token_counts)
        self._query, self._key = (fitting.get(name) for name in attention.token_counts)

    def of(self, pair: TopPair) -> PlacedPair:
        return {
            "query": pair.query,
            "key": pair.key,
            "weight": pair.weight,
            "lift": pair.lift,
            "query_place": None if self._query is None else self._query.place(pair.query),
            "key_place": None if self._key is None else self._key.place(pair.key),
        }
