"""The model's output for each sample, read from the tensor with the predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_xattn.capture.labels import Labels
from lightning_xattn.capture.labels.finder import CLOSE, Scores, are_clear, are_probabilities, scores_by_class
from lightning_xattn.capture.labels.places import are_rows, are_single_scores

LEAST_PROBABILITY = 1e-12
"""Its logarithm stands for those of smaller probabilities, unless these already are rounded in larger ones."""

RULED_OUT = -100.0
"""Centred logit of a class that cannot be predicted."""


ROUNDED = {False: (1e-3, 1e-5), True: (3e-2, torch.finfo(torch.bfloat16).eps)}
"""By whether a model computes in half precision: by how much of their standard deviation between samples logits may
differ in a replay, and by how much of the largest logit they always may, as other numbers of rows round otherwise."""


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """A model's output for some samples.

    Attributes
    ----------
    values
        ``(samples, classes)`` probabilities, or ``(samples, 1)`` the output where it is no classes; float32.
    logits
        ``(samples, classes)`` centred logits, on which an additive model has no interaction; else as ``values``.
    """

    values: Tensor
    logits: Tensor

    def __getitem__(self, samples: slice | Tensor) -> ModelOutput:
        return ModelOutput(self.values[samples], self.logits[samples])

    def cpu(self) -> ModelOutput:
        """The same on the CPU."""
        return ModelOutput(self.values.cpu(), self.logits.cpu())

    @classmethod
    def joined(cls, parts: Sequence[ModelOutput]) -> ModelOutput:
        """Several as one."""
        return cls(torch.cat([part.values for part in parts]), torch.cat([part.logits for part in parts]))


ReadOutput = Callable[[Tensor], ModelOutput | None]
"""Reads the model's output from the tensor with the predictions; None where it is none."""


def find_model_output(tensor: Tensor, samples: int, labels: Labels) -> ReadOutput | None:
    """How to read the model's output from a tensor; None where it is none. Looks at the values.

    Gradients pass through it.

    Parameters
    ----------
    tensor
        What was found in a first batch.
    samples
        How many samples the batch has.
    labels
        The class scores or predictions that it must agree with. Without any, a single number a sample is the value of
        a regression, and rows are values of something else.
    """
    for scores in scores_by_class(tensor, samples):
        if _agree(scores, labels, tensor, samples):
            return partial(_read_scores, scores.are_probabilities, scores.values.shape[1])
    are_values = are_single_scores(tensor, samples) or are_rows(tensor, samples)
    if are_values and labels.predicted is None and labels.scores is None:
        return partial(_read_values, tensor.shape[1:].numel())
    return None


def _agree(scores: Scores, labels: Labels, tensor: Tensor, samples: int) -> bool:
    if scores.are_probabilities and not are_probabilities(scores.values):
        return False
    if labels.scores is not None:
        known = labels.scores.probabilities.to(scores.values.device)
        same = known.shape == scores.values.shape
        return same and torch.allclose(scores.probabilities, known, rtol=0, atol=CLOSE, equal_nan=True)
    fits = labels.predicted is not None and labels.n_classes in (None, scores.values.shape[1])
    clear = labels.confidence is not None or are_clear(tensor, samples)
    return fits and clear and labels.predicted is not None and scores.agree_with(labels.predicted, labels.confidence)


def _read_scores(are_probabilities: bool, n_classes: int, tensor: Tensor) -> ModelOutput | None:
    for scores in scores_by_class(tensor, len(tensor) if tensor.dim() else 0):
        if scores.are_probabilities == are_probabilities and scores.values.shape[1] == n_classes:
            values = scores.values.clamp_min(_least(tensor)) if are_probabilities else scores.values
            return ModelOutput(scores.probabilities, centred(Scores(values, are_probabilities).logits))
    return None


def _read_values(width: int, tensor: Tensor) -> ModelOutput | None:
    if tensor.dim() not in (1, 2) or tensor.numel() != len(tensor) * width:
        return None
    values = tensor.float().reshape(-1, width)
    return ModelOutput(values, values)


def _least(probabilities: Tensor) -> float:
    """The least probability whose bits are enough for a logarithm; smaller ones count as this."""
    limits = torch.finfo(probabilities.dtype)
    # Of a single probability the other class's is what is missing to 1.
    is_single = probabilities.dim() < 2 or probabilities.shape[1] < 2
    return max(LEAST_PROBABILITY, 8 * limits.eps if is_single else 8 * limits.smallest_normal)


def centred(logits: Tensor) -> Tensor:
    """Logits ``(..., classes)`` less their mean over classes, on which probabilities do not depend; a value as it is.

    On probabilities half of an interaction is the curvature of the softmax. A class that is ruled out, by minus
    infinity, has no part in the mean and gets `RULED_OUT`.

    Examples
    --------
    >>> from lightning_xattn.attribution.outputs import centred
    >>> centred(torch.tensor([1.0, 2.0, 6.0]))
    tensor([-2., -1.,  3.])
    """
    if logits.shape[-1] == 1:
        return logits
    out = logits == -torch.inf
    left = logits.masked_fill(out, 0)
    mean = left.sum(-1, keepdim=True) / (~out).sum(-1, keepdim=True)
    return (logits - mean).masked_fill(out, RULED_OUT)


def are_same_outputs(intact: ModelOutput, again: ModelOutput, precision: torch.dtype) -> bool:
    """Whether a replay gave the same logits, within what rounding does to the differences between samples.

    Logits, as a model that is sure of itself gives the same probabilities whatever reaches it.

    Parameters
    ----------
    intact, again
        Of the same samples, in the step and in the replay.
    precision
        In which the model computes, see `Replay.precision`.
    """
    logits = intact.logits.double()
    finite = logits[logits.isfinite().all(1)]
    if not len(finite):
        return True  # nothing is kept of such samples
    part, rounding = ROUNDED[precision.itemsize < 4]
    largest = float(torch.where(finite == RULED_OUT, 0, finite).abs().max())
    spread = float(finite.std(0).max()) if len(finite) > 1 else largest
    return torch.allclose(
        again.logits.double(), logits, rtol=0, atol=max(part * spread, rounding * largest), equal_nan=True
    )
