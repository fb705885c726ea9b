"""The explanation of each sample of a batch, and of the batch as a whole, in the guide's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_xattn.core.attention import Attention, TokenAxis, fitting_axes
from lightning_xattn.core.errors import DataError
from lightning_xattn.core.ids import group_keys, id_text
from lightning_xattn.evaluation.batch import BatchResult, classify
from lightning_xattn.evaluation.fusion_samples import SampleModalities, describe_modalities, find_samples
from lightning_xattn.evaluation.results import (
    AttentionStatistics,
    DatasetResult,
    ExplainedBatch,
    PlacedPair,
    SampleResult,
)
from lightning_xattn.functional import ROW_STATISTICS, TopPair, alignment, prepare_rows, sample_top_pairs
from lightning_xattn.functional.outcomes import CORRECT, UNKNOWN


def require_finite(batch: BatchResult) -> BatchResult:
    """The batch, if its scores are finite; without predictions, if its attention is.

    Raises
    ------
    DataError
        Otherwise; it names the samples.
    """
    labels, ids = batch.labels, _ids_as_text(batch)
    rows = [prepare_rows(attention) for pair in batch.attention for attention in pair.directions]
    if labels.predicted is not None:
        what, also, broken = "class scores", " (or class ids below 0)", labels.predicted < 0
    elif not rows:
        return batch
    else:
        what, also, broken = "attention", "", torch.stack([r.broken.flatten(1).any(1) for r in rows]).any(0)
    if not bool(broken.any()):
        return batch
    names = [f"{i} (id {ids[i]})" if ids else f"{i}" for i in broken.nonzero().flatten().tolist()]
    message = (
        f"The {what} of sample {', '.join(names[:8])}{', ...' if len(names) > 8 else ''} ({len(names)} of "
        f"{len(broken)}) are not finite{also}. Look for NaN or infinity in their input or, if all samples are "
        "concerned, in the model's weights."
    )
    if masked := max((int((one.wholly_masked & broken).sum()) for one in rows), default=0):
        message += (
            f" In {masked} of them one modality is wholly masked: a softmax over no key gives NaN. Have the model "
            "leave out the attention of such samples, or unmask one token."
        )
    raise DataError(message)


def explain_samples(
    batch: BatchResult,
    class_names: tuple[str, ...],
    axes: Mapping[str, TokenAxis],
    top_k: int,
    modalities: Sequence[SampleModalities | None],
) -> ExplainedBatch:
    """The explanation of a batch on the CPU.

    Parameters
    ----------
    batch
        The batch.
    class_names
        A name for each class; empty when there are no classes.
    axes
        What the tokens of each modality are; an axis whose length does not fit gives no places.
    top_k
        The number of pairs to name for each sample and direction.
    modalities
        The probes and contributions of each sample, where these are known.
    """
    # The directions of a second layer are named after the layer, too.
    attention = {
        f"{pair.layer}/{one.direction}" if i else str(one.direction): one
        for i, pair in enumerate(batch.attention)
        for one in pair.directions
    }
    rows = {name: prepare_rows(one) for name, one in attention.items()}
    first = [*rows.values()][: len(batch.attention[0].directions)]
    agreement = alignment(*first) if len(first) == 2 else torch.full((len(batch),), torch.nan)
    labels, scores = batch.labels, batch.scores
    _, outcomes, tied = classify(labels, "target", len(class_names), len(batch))
    predicted, target = (_class_ids(one, len(batch)) for one in (labels.predicted, labels.target))
    ids = _ids_as_text(batch) or [None] * len(batch)
    probabilities = None if scores is None else scores.probabilities
    confidence = labels.confidence
    if confidence is None and probabilities is not None:
        confidence = probabilities.amax(1)
    entropies = {
        f"{name}/head_{head}": values.tolist()
        for name, one in rows.items()
        for head, values in enumerate(ROW_STATISTICS["entropy"](one).unbind(1))
    }
    stats = {name: AttentionStatistics.of_samples(one) for name, one in rows.items()}
    pairs = {name: sample_top_pairs(one, top_k) for name, one in rows.items()}
    samples: list[SampleResult] = [
        {
            "sample_idx": i,
            "sample_id": ids[i],
            "predicted_class": predicted[i],
            "predicted_name": _name_class(predicted[i], class_names),
            "confidence": None if confidence is None else float(confidence[i]),
            "probabilities": None if probabilities is None else probabilities[i].tolist(),
            "true_class": target[i],
            "true_name": _name_class(target[i], class_names),
            "correct": None if outcome == UNKNOWN else outcome == CORRECT,
            "tied": bool(tied[i]),
            "modality_agreement": float(agreement[i]),
            "head_entropies": {name: values[i] for name, values in entropies.items()},
            "attention_stats": {name: by_sample[i] for name, by_sample in stats.items()},
            "top_attention_pairs": {name: [pair[:3] for pair in by_sample[i]] for name, by_sample in pairs.items()},
            "top_attention_places": {
                name: _place_pairs(by_sample[i], attention[name], axes) for name, by_sample in pairs.items()
            },
            "modalities": modalities[i],
        }
        for i, outcome in enumerate(outcomes.tolist())
    ]
    return {
        "logits": None if scores is None else scores.logits,
        "probabilities": probabilities,
        "predictions": labels.predicted,
        "targets": None if labels.target is None else labels.target.clamp_min(-1),
        "attention_dict": {name: one.marked_weights for name, one in attention.items()},
        "attention": batch.attention,
        "attention_stats": {name: AttentionStatistics.of_batch(one) for name, one in rows.items()},
        "modality_alignment": float(agreement.double().nanmean()),
        "per_sample_explanations": samples,
        "class_names": class_names,
        "axes": fitting_axes(axes, batch.attention[0].forward.token_counts),
    }


def find_modalities(batch: BatchResult, among: DatasetResult | None) -> list[SampleModalities | None]:
    """The probes and contributions of each sample in the data set, where its id is found."""
    if among is None or among.fusion is None or batch.labels.sample_ids is None:
        return [None] * len(batch)
    found = find_samples(among.fusion, group_keys(batch.labels.sample_ids, "cpu"))
    return [None if i is None else describe_modalities(among.fusion, i, among.class_names) for i in found]


def _place_pairs(pairs: Sequence[TopPair], attention: Attention, axes: Mapping[str, TokenAxis]) -> list[PlacedPair]:
    """Pairs with their places, as far as the axes are known."""
    fitting = fitting_axes(axes, attention.token_counts)
    query, key = (fitting.get(modality) for modality in attention.token_counts)
    return [
        {
            "query": pair.query,
            "key": pair.key,
            "weight": pair.weight,
            "lift": pair.lift,
            "query_place": None if query is None else query.place(pair.query),
            "key_place": None if key is None else key.place(pair.key),
        }
        for pair in pairs
    ]


def _ids_as_text(batch: BatchResult) -> list[str | None] | None:
    ids = batch.labels.sample_ids
    return None if ids is None else [*map(id_text, ids)]


def _class_ids(ids: Tensor | None, samples: int) -> list[int | None]:
    return [None] * samples if ids is None else [i if i >= 0 else None for i in ids.tolist()]


def _name_class(class_id: int | None, class_names: tuple[str, ...]) -> str | None:
    return class_names[class_id] if class_id is not None and class_id < len(class_names) else None
