"""The class scores behind a step's predictions, which may stand elsewhere in it: logits or probabilities by class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.capture.labels.places import Place, Step, list_places
from lightning_xattn.capture.labels.tensors import (
    Classes,
    are_probabilities,
    are_rows,
    are_single_scores,
    are_surely_logits,
)

CLOSE = 1e-3
"""Probabilities that agree within this are the same: half precision keeps no more."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores with a column for each class: logits or probabilities."""

    values: Tensor
    """``(batch, classes)``, float32."""
    are_probabilities: bool

    @property
    def logits(self) -> Tensor:
        """The logits; where only probabilities are known, their logarithms."""
        return self.values.log() if self.are_probabilities else self.values

    @property
    def probabilities(self) -> Tensor:
        """The probabilities."""
        return self.values if self.are_probabilities else self.values.softmax(1)

    def agree_with(self, predicted: Tensor, confidence: Tensor | None) -> bool:
        """Whether these classes were predicted, with this confidence where it is known. Looks at the values."""
        top, classes = self.probabilities.to(predicted.device).max(1)
        agrees = (classes == predicted) | (predicted < 0)
        if confidence is not None:
            agrees &= ((top - confidence).abs() < CLOSE) | confidence.isnan()
        return bool(agrees.all())


ReadScores = Callable[[Step, Tensor | None], Scores | None]
"""Gives the scores of a step with these predictions; None where it has none like those of the first step."""


def find_scores(step: Step, predictions: Tensor, predicted: Classes, confidence: Tensor | None) -> ReadScores | None:
    """How to read the scores behind predictions, as a first step shows where they are. Looks at the values.

    What ``forward`` returned comes first, as many a step makes probabilities or class ids of it.

    Parameters
    ----------
    step
        The step.
    predictions
        Its predictions: scores or class ids.
    predicted, confidence
        Their classes; the scores must agree with them, and be clear by themselves where there is no confidence.
    """
    for place in (*list_places(step, "forward"), *list_places(step, "outputs"), None):
        found = predictions if place is None else place.read(step)
        if confidence is None and not are_clear(found, step.samples):
            continue
        for scores in scores_by_class(found, step.samples):
            classes = scores.values.shape[1]
            fits = predicted.n_classes in (None, classes) and (
                not scores.are_probabilities or are_probabilities(scores.values)
            )
            if fits and predicted.ids is not None and scores.agree_with(predicted.ids, confidence):
                return partial(_read, place, classes, scores.are_probabilities)
    return None


def _read(
    place: Place | None, n_classes: int, are_probabilities: bool, step: Step, predictions: Tensor | None
) -> Scores | None:
    try:
        found = predictions if place is None else place.read(step)
    except (KeyError, IndexError, TypeError):
        return None
    for scores in scores_by_class(found, step.samples):
        if scores.are_probabilities == are_probabilities and scores.values.shape[1] == n_classes:
            return Scores(scores.values.detach().to(step.device, non_blocking=True), are_probabilities)
    return None


def are_clear(found: Any, samples: int) -> bool:
    """Whether scores show by themselves whether they are logits or probabilities."""
    if are_single_scores(found, samples):
        return are_surely_logits(found)
    scores = are_rows(found, samples) and found.is_floating_point()
    return scores and (are_probabilities(found) or are_surely_logits(found))


def scores_by_class(found: Any, samples: int) -> Iterator[Scores]:
    """Both ways to read scores; a binary head's single score is a probability, or a logit beside 0.

    Gradients pass.
    """
    if are_rows(found, samples) and found.is_floating_point():
        values = found.float()
        yield Scores(values, True)
        yield Scores(values, False)
    elif are_single_scores(found, samples):
        score = found.float().reshape(-1)
        yield Scores(torch.stack([1 - score, score], dim=1), True)
        yield Scores(torch.stack([torch.zeros_like(score), score], dim=1), False)
