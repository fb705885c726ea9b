"""A batch's attention and labels put into the words of ``explanation.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.aggregation import CORRECT, UNKNOWN
from lightning_xattn.attention import Attention, AttentionPair, TokenAxis
from lightning_xattn.attention_analysis import batch_statistics, sample_attention_statistics
from lightning_xattn.explainer.passes import Explained
from lightning_xattn.explanation import BatchExplanation, PlacedPair, SampleExplanation
from lightning_xattn.functional import (
    Rows,
    TopPair,
    has_single_keys,
    prepare_rows,
    sample_statistics,
    sample_top_pairs,
)
from lightning_xattn.grouping import group_samples


@dataclass(frozen=True, eq=False)
class _Site:
    """One direction of one layer, under its name in ``attention_dict``."""

    name: str
    layer: str
    attention: Attention
    rows: Rows


def describe_batch(
    explained: Explained, class_names: tuple[str, ...], axes: Mapping[str, TokenAxis], top_k: int
) -> BatchExplanation:
    """Everything that is said of a batch.

    Parameters
    ----------
    explained
        The batch.
    class_names
        A name for each class; empty when there are no classes.
    axes
        What the tokens of each modality are; one whose length does not fit gives no places.
    top_k
        How many pairs to name for each sample and direction.
    """
    sites = [_sites(pair, first=i == 0) for i, pair in enumerate(explained.pairs)]
    flat = [site for of_layer in sites for site in of_layer]
    labels = explained.labels
    samples = _describe_samples(explained, sites, class_names, axes, top_k)
    agreement = torch.tensor([sample["modality_agreement"] for sample in samples], dtype=torch.float64)
    return {
        "logits": explained.logits,
        "probabilities": explained.probabilities,
        "predictions": labels.predicted,
        "targets": None if labels.target is None else labels.target.clamp_min(-1),
        "attention_dict": {site.name: site.attention.marked_weights for site in flat},
        "attention": explained.pairs,
        "attention_stats": {site.name: batch_statistics(site.rows) for site in flat},
        "modality_alignment": float(agreement.nanmean()),
        "per_sample_explanations": samples,
        "class_names": class_names,
        "axes": fitting_axes(axes, explained.pairs),
    }


def fitting_axes(axes: Mapping[str, TokenAxis], pairs: Sequence[AttentionPair]) -> dict[str, TokenAxis]:
    """The axes with as many tokens as the first layer's attention; a model may pool or group what the data have."""
    attention = pairs[0].forward
    modalities = attention.direction.query, attention.direction.key
    fitting = zip(modalities, _fitting(attention, axes), strict=True)
    return {modality: axis for modality, axis in fitting if axis is not None}


def single_keys(explained: Explained) -> dict[str, list[str]]:
    """By layer, the directions that attend to a single key in every sample."""
    return {
        pair.layer: [str(a.direction) for a in pair.directions if has_single_keys(prepare_rows(a))]
        for pair in explained.pairs
    }


def _sites(pair: AttentionPair, first: bool) -> list[_Site]:
    return [
        _Site(
            str(attention.direction) if first else f"{pair.layer}/{attention.direction}",
            pair.layer,
            attention,
            prepare_rows(attention),
        )
        for attention in pair.directions
    ]


def _describe_samples(
    explained: Explained,
    layers: Sequence[Sequence[_Site]],
    class_names: tuple[str, ...],
    axes: Mapping[str, TokenAxis],
    top_k: int,
) -> list[SampleExplanation]:
    labels, first = explained.labels, layers[0][0]
    samples = len(first.attention.weights)
    # Each number is one column over the samples.
    entropies: dict[str, list[float]] = {}
    agreement = [torch.nan] * samples
    for i, sites in enumerate(layers):
        statistics = sample_statistics(*(site.rows for site in sites))
        if i == 0 and "alignment" in statistics:
            agreement = statistics["alignment"].tolist()
        prefix = "" if i == 0 else f"{sites[0].layer}/"
        by_head = {name: values for name, values in statistics.items() if "/entropy/head_" in name}
        entropies |= {f"{prefix}{name.replace('/entropy/', '/')}": v.tolist() for name, v in by_head.items()}
    flat = [site for sites in layers for site in sites]
    stats = {site.name: sample_attention_statistics(site.rows) for site in flat}
    pairs = {site.name: sample_top_pairs(site.rows, top_k) for site in flat}
    fitting = {site.name: _fitting(site.attention, axes) for site in flat}
    _, outcomes, tied = group_samples(labels, "target", len(class_names), first.attention.weights)
    predicted, target = _ids(labels.predicted, samples), _ids(labels.target, samples)
    confidence = _confidence(explained, samples)
    probabilities: list[Any] = [None] * samples if explained.probabilities is None else explained.probabilities.tolist()
    return [
        {
            "sample_idx": i,
            "sample_id": None if explained.sample_ids is None else explained.sample_ids[i],
            "predicted_class": predicted[i],
            "predicted_name": _name(predicted[i], class_names),
            "confidence": confidence[i],
            "probabilities": probabilities[i],
            "true_class": target[i],
            "true_name": _name(target[i], class_names),
            "correct": None if outcome == UNKNOWN else outcome == CORRECT,
            "tied": tie,
            "modality_agreement": agreement[i],
            "head_entropies": {name: values[i] for name, values in entropies.items()},
            "attention_stats": {name: of_samples[i] for name, of_samples in stats.items()},
            "top_attention_pairs": {name: [pair[:3] for pair in found[i]] for name, found in pairs.items()},
            "top_attention_places": {
                name: [_place(pair, *fitting[name]) for pair in found[i]] for name, found in pairs.items()
            },
        }
        for i, (outcome, tie) in enumerate(zip(outcomes.tolist(), tied.tolist(), strict=True))
    ]


def _ids(ids: Tensor | None, samples: int) -> list[int | None]:
    return [None] * samples if ids is None else [i if i >= 0 else None for i in ids.tolist()]


def _name(class_id: int | None, class_names: tuple[str, ...]) -> str | None:
    return class_names[class_id] if class_id is not None and class_id < len(class_names) else None


def _confidence(explained: Explained, samples: int) -> list[float | None]:
    confidence = explained.labels.confidence
    if confidence is None and explained.probabilities is not None:
        confidence = explained.probabilities.amax(1)
    return [None] * samples if confidence is None else confidence.tolist()


def _fitting(attention: Attention, axes: Mapping[str, TokenAxis]) -> tuple[TokenAxis | None, TokenAxis | None]:
    """The axes of queries and keys, each None where it is not known or has another number of tokens."""
    direction, queries = attention.direction, attention.weights.shape[2]
    counts = {direction.query: queries, direction.key: attention.tokens}
    query, key = (axes[name] if name in axes and len(axes[name]) == count else None for name, count in counts.items())
    return query, key


def _place(pair: TopPair, query_axis: TokenAxis | None, key_axis: TokenAxis | None) -> PlacedPair:
    return {
        "query": pair.query,
        "key": pair.key,
        "weight": pair.weight,
        "lift": pair.lift,
        "query_place": None if query_axis is None else query_axis.place(pair.query),
        "key_place": None if key_axis is None else key_axis.place(pair.key),
    }
