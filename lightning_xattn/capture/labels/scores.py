"""Class scores, class ids and shares: what tensors of predictions hold, and the scores behind a prediction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_xattn.core.attention import row_sum_tolerance

UNLABELLED = (-1, -100)
"""Class ids that usually mean "no label"; -100 is what torch's losses ignore."""


class Classes(NamedTuple):
    """The classes of samples by a tensor of scores or labels.

    Attributes
    ----------
    ids
        ``(batch,)`` int64; -1 where the scores are NaN or infinite (but for classes that are ruled out, -inf).
    tied
        ``(batch,)`` bool, whether more than one class is on top; None of class ids.
    n_classes
        Number of classes, when the tensor shows it.
    """

    ids: Tensor | None = None
    tied: Tensor | None = None
    n_classes: int | None = None


def to_labels(value: Any) -> Any:
    """Arrays and lists of numbers as tensors, and class ids ``(batch, 1)`` as ``(batch,)``; anything else as it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iufb":
        value = torch.from_numpy(value)
    elif isinstance(value, (list, tuple)) and value and all(isinstance(one, (bool, int, float)) for one in value):
        value = torch.tensor(value)
    elif isinstance(value, (list, tuple)) and value and all(isinstance(one, Tensor) and not one.dim() for one in value):
        value = torch.stack(list(value))
    is_column = isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == 1
    return value[:, 0] if is_column and not value.is_floating_point() else value


def are_ids(value: Any, samples: int) -> bool:
    """Class ids ``(batch,)``."""
    whole = isinstance(value, Tensor) and not (value.is_floating_point() or value.dtype == torch.bool)
    return whole and tuple(value.shape) == (samples,)


def are_rows(value: Any, samples: int) -> bool:
    """One column a class, ``(batch, classes)``."""
    rows = isinstance(value, Tensor) and value.dim() == 2 and value.dtype != torch.bool
    return rows and len(value) == samples and value.shape[1] > 1


def are_predictions(value: Any, samples: int) -> bool:
    """Class scores or class ids."""
    return (are_rows(value, samples) and value.is_floating_point()) or are_ids(value, samples)


def are_single(value: Any, samples: int) -> bool:
    """One number a sample, ``(batch,)`` or ``(batch, 1)``: the score of a binary head, or a regression."""
    return isinstance(value, Tensor) and tuple(value.shape) in ((samples,), (samples, 1))


def are_single_scores(value: Any, samples: int) -> bool:
    """One floating number a sample."""
    return are_single(value, samples) and value.is_floating_point()


def are_binary_labels(value: Any, samples: int, guessed: bool) -> bool:
    """Labels of two classes, 0 and 1, of any type; ``UNLABELLED`` ones too. Looks at the values.

    Where -1 and 1 occur but no 0, -1 may be the other class: such labels are refused. Floating numbers that are
    merely guessed to be labels must show both classes, as those to regress may all be 0.
    """
    if not are_single(value, samples):
        return False
    negative, positive = value == 0, value == 1
    unlabelled = torch.stack([value == label for label in UNLABELLED]).any(0)
    certain = negative.any() | ~(value == -1).any()
    if guessed and value.is_floating_point():
        certain &= negative.any() & positive.any()
    return bool((negative | positive | unlabelled).all() & (negative | positive).any() & certain)


def are_shares(rows: Tensor) -> bool:
    """Soft or one-hot labels; several labels at once, or numbers to regress, are not. Looks at the values."""
    return bool((rows >= 0).all() and ((rows.float().sum(1) - 1).abs() < 1e-3).all())


def are_several(rows: Tensor) -> bool:
    """Several labels at once: shares between 0 and 1 of which rows do not sum to 1. Looks at the values."""
    return bool(((rows >= 0) & (rows <= 1)).all()) and not are_shares(rows)


def are_one_hot(rows: Tensor) -> bool:
    """Whether each row has a single 1 among 0s, as far as a first batch shows. Looks at the values."""
    return bool(((rows == 0) | (rows == 1)).all() and (rows.float().sum(1) == 1).all())


def are_probabilities(scores: Tensor) -> bool:
    """Whether class scores ``(batch, classes)`` are probabilities already, and not logits. Looks at the values."""
    finite = scores[scores.isfinite().all(1)].float()
    sums_to_one = ((finite.sum(1) - 1).abs() <= row_sum_tolerance(scores.dtype)).all()
    return len(finite) > 0 and bool((finite >= 0).all() and sums_to_one)


def are_surely_logits(scores: Tensor) -> bool:
    """Whether scores cannot be probabilities. Looks at the values."""
    return bool(((scores < 0) | (scores > 1)).any())


def classes_of(values: Tensor) -> Classes:
    """Read class ids ``(batch,)``, or scores or shares ``(batch, classes)``."""
    if values.dim() == 1:
        return Classes(values.long())
    top = values.amax(1, keepdim=True)
    # A class with a score of minus infinity is one that the model rules out.
    sound = (values < torch.inf).all(1) & (top[:, 0] > -torch.inf)
    return Classes(torch.where(sound, values.argmax(1), -1), (values == top).sum(1) > 1, values.shape[1])


def classes_of_scores(values: Tensor, threshold: float) -> Classes:
    """Class 1 above the threshold, class 0 up to it, of single scores ``(batch,)`` or ``(batch, 1)``."""
    values = values.reshape(-1)
    return Classes(torch.where(values.isfinite(), (values > threshold).long(), -1), n_classes=2)


def classes_of_labels(values: Tensor) -> Classes:
    """Class ids of binary labels of any type; -1 where they are neither 0 nor 1."""
    values = values.reshape(-1)
    return Classes(torch.where(values == 1, 1, torch.where(values == 0, 0, -1)), n_classes=2)


def confidence_of(scores: Tensor, probabilities: bool) -> Tensor:
    """Probability of the predicted class, of scores ``(batch, classes)``, or single ones of class 1.

    NaN where ``probabilities`` are none.
    """
    tolerance = row_sum_tolerance(scores.dtype)
    scores = scores.float()
    if scores.dim() == 2 and scores.shape[1] > 1:
        shares = scores if probabilities else scores.softmax(1)
    else:
        positive = (scores if probabilities else scores.sigmoid()).reshape(-1)
        shares = torch.stack([1 - positive, positive], dim=1)
    sound = (shares >= 0).all(1) & ((shares.sum(1) - 1).abs() <= tolerance)
    return torch.where(sound, shares.amax(1), torch.nan)


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
