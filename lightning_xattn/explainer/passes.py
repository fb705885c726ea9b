"""One run of a model over a batch: its attention, and what is known of its samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.attention import Attention, AttentionPair, mask_queries
from lightning_xattn.errors import DataError
from lightning_xattn.functional import prepare_rows
from lightning_xattn.labels import LabelFinder, Labels
from lightning_xattn.labels.places import LabelSetting, Step
from lightning_xattn.labels.tensors import are_probabilities, are_rows, are_single_scores, are_surely_logits

CLOSE = 1e-3
"""Probabilities that agree within this are the same: half precision keeps no more."""


@dataclass(frozen=True, eq=False)
class Pass:
    """What one run gave.

    Attributes
    ----------
    step
        What the run returned, for finding more in it.
    pairs
        The attention of each layer.
    labels
        Predicted and true classes.
    sample_ids
        As strings; None when there are none.
    """

    step: Step
    pairs: tuple[AttentionPair, ...]
    labels: Labels
    sample_ids: list[str] | None

    @classmethod
    def of(cls, step: Step, pairs: tuple[AttentionPair, ...], finder: LabelFinder) -> Pass:
        """Look for labels and ids, and refuse what no number can be made of.

        Raises
        ------
        DataError
            If scores are not finite, or attention where there are no predictions; names the samples.
        DiscoveryError, ShapeError
            As ``LabelFinder``.
        """
        labels, ids, mask = finder.find(step), finder.find_sample_ids(step), finder.find_query_mask(step)
        pairs = mask_queries(pairs, mask)
        named = None if ids is None else [str(_plain(one)) for one in ids]
        run = cls(step, pairs, labels, named)
        run._require_finite()
        return run

    def _require_finite(self) -> None:
        if self.labels.predicted is not None:
            what, broken = "class scores", self.labels.predicted < 0
        else:
            rows = [prepare_rows(attention) for pair in self.pairs for attention in pair.directions]
            what, broken = "attention", torch.stack([r.broken.flatten(1).any(1) for r in rows]).any(0)
        if bool(broken.any()):
            found = broken.nonzero().flatten().tolist()
            names = [f"{i}" if self.sample_ids is None else f"{i} (id {self.sample_ids[i]})" for i in found]
            also = "" if self.labels.predicted is None else " (or class ids below 0)"
            raise DataError(
                f"The {what} of sample {', '.join(names[:8])}{', ...' if len(names) > 8 else ''} ({len(names)} of "
                f"{len(broken)}) are not finite{also}. Look for NaN or infinity in their input, or in the model's "
                "weights if it is all samples, and mend it."
            )


@dataclass(frozen=True, eq=False)
class Explained:
    """What is known of a batch's samples, on the CPU.

    Attributes
    ----------
    pairs, labels, sample_ids
        As in ``Pass``.
    logits, probabilities
        ``(batch, classes)`` float; None when the model gives no class scores.
    """

    pairs: tuple[AttentionPair, ...]
    labels: Labels
    sample_ids: list[str] | None
    logits: Tensor | None
    probabilities: Tensor | None

    @classmethod
    def of(cls, run: Pass, predictions: LabelSetting) -> Explained:
        """What a pass gave; ``predictions`` is where the user said that they are."""
        logits, probabilities = class_scores(run.labels, _candidates(run.step, predictions))
        labels = run.labels if probabilities is None else replace(run.labels, n_classes=probabilities.shape[1])
        return cls(
            tuple(AttentionPair(pair.layer, *(a.cpu() for a in pair.directions)) for pair in run.pairs),
            replace(
                labels,
                predicted=_to_cpu(labels.predicted),
                confidence=_to_cpu(labels.confidence),
                target=_to_cpu(labels.target),
                tied=_to_cpu(labels.tied),
                groups=_to_cpu(labels.groups),
            ),
            run.sample_ids,
            _to_cpu(logits),
            _to_cpu(probabilities),
        )

    @classmethod
    def join(cls, parts: Sequence[Explained]) -> Explained:
        """The parts of a batch as one.

        Raises
        ------
        DataError
            If the parts have other layers or other numbers of tokens.
        """
        if len(parts) == 1:
            return parts[0]
        shapes = {tuple(a.weights.shape[1:] for pair in part.pairs for a in pair.directions) for part in parts}
        if len(shapes) > 1:
            raise DataError(
                f"The parts of the batch have attention of different shapes, {sorted(shapes)}: this model's tokens "
                "depend on the batch, so explain it without max_batch_size, in smaller batches."
            )
        labels = [part.labels for part in parts]
        ids = [part.sample_ids for part in parts]
        return cls(
            tuple(_join_pairs(pairs) for pairs in zip(*(part.pairs for part in parts), strict=True)),
            replace(
                labels[0],
                predicted=_cat([one.predicted for one in labels]),
                confidence=_cat([one.confidence for one in labels]),
                target=_cat([one.target for one in labels]),
                tied=_cat([one.tied for one in labels]),
                groups=_cat([one.groups for one in labels]),
            ),
            None if ids[0] is None else [one for of_part in ids for one in of_part or ()],
            _cat([part.logits for part in parts]),
            _cat([part.probabilities for part in parts]),
        )


def class_scores(labels: Labels, candidates: Iterator[Any]) -> tuple[Tensor | None, Tensor | None]:
    """Logits and probabilities: the first candidate that has the labels' predictions and confidence.

    Of a model that gives probabilities only, the logits are their logarithms.

    Parameters
    ----------
    labels
        What was predicted, and how confidently.
    candidates
        Anything; only class scores and single scores (see ``capture.scores``) are considered.
    """
    if labels.predicted is None or "confidence" in labels.doubts:
        return None, None
    samples = len(labels.predicted)
    for candidate in candidates:
        if labels.confidence is None and not _is_clear(candidate, samples):
            continue
        for scores in _as_columns(candidate, samples):
            scores = scores.to(labels.predicted.device)
            if are_probabilities(scores) and _tells(scores, labels):
                return scores.log(), scores
            if _tells(scores.softmax(1), labels):
                return scores, scores.softmax(1)
    return None, None


def _is_clear(candidate: Any, samples: int) -> bool:
    """Whether scores show by themselves whether they are logits or probabilities."""
    if are_single_scores(candidate, samples):
        return are_surely_logits(candidate)
    scores = are_rows(candidate, samples) and candidate.is_floating_point()
    return scores and (are_probabilities(candidate) or are_surely_logits(candidate))


def _as_columns(candidate: Any, samples: int) -> Iterator[Tensor]:
    """Scores with a column for each class; the single score of a binary head is a probability, or a logit beside 0."""
    if are_rows(candidate, samples) and candidate.is_floating_point():
        yield candidate.detach().float()
    elif are_single_scores(candidate, samples):
        score = candidate.detach().float().reshape(-1)
        yield torch.stack([1 - score, score], dim=1)
        yield torch.stack([torch.zeros_like(score), score], dim=1)


def _tells(probabilities: Tensor, labels: Labels) -> bool:
    predicted, confidence = labels.predicted, labels.confidence
    if labels.n_classes not in (None, probabilities.shape[1]):
        return False
    if predicted is None or not probabilities.argmax(1).equal(predicted):
        return False
    if confidence is None:
        return True
    known = ~confidence.isnan()
    return bool(((probabilities.amax(1) - confidence).abs() < CLOSE)[known].all())


def _candidates(step: Step, predictions: LabelSetting) -> Iterator[Any]:
    """Where scores may be: forward first, as many a ``predict_step`` returns probabilities or classes."""
    for source in (step.forward, step.outputs):
        if isinstance(source, Mapping):
            yield from source.values()
        elif isinstance(source, (list, tuple)):
            yield from source
        else:
            yield source
    if callable(predictions):
        yield predictions(step.outputs, step.batch)
    elif predictions is not None and isinstance(step.batch, Mapping):
        yield step.batch.get(predictions)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _to_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu()


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def _join_pairs(pairs: Sequence[AttentionPair]) -> AttentionPair:
    directions = zip(*(pair.directions for pair in pairs), strict=True)
    return AttentionPair(pairs[0].layer, *(_join_attentions(attentions) for attentions in directions))


def _join_attentions(attentions: Sequence[Attention]) -> Attention:
    # An attention mask may be one for all samples of its part.
    visible = [
        None if a.visible is None else a.visible.expand(len(a.weights), *a.visible.shape[1:]) for a in attentions
    ]
    return replace(
        attentions[0],
        weights=torch.cat([a.weights for a in attentions]),
        key_mask=_cat([a.key_mask for a in attentions]),
        visible=_cat(visible),
        query_mask=_cat([a.query_mask for a in attentions]),
        crossing=_cat([a.crossing for a in attentions]),
    )
