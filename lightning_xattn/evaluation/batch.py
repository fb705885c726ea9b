"""One batch: what the model did with it, read from a recorded step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_xattn.attribution.recorder import FusionRecord
from lightning_xattn.capture.labels import LabelFinder, Labels, Step
from lightning_xattn.capture.labels.scores import Scores
from lightning_xattn.core.attention import AttentionPair, mask_queries
from lightning_xattn.evaluation.step_recorder import Attentions, StepRecorder


@dataclass(frozen=True, eq=False)
class BatchResult:
    """What a model did with a batch.

    Parameters
    ----------
    attention
        Of each layer.
    labels
        Predictions, scores, targets, ids and groups.
    inputs
        What entered the fusion; None where that is not known.
    """

    attention: tuple[AttentionPair, ...]
    labels: Labels
    inputs: FusionRecord | None = None

    def __repr__(self) -> str:
        layers = ", ".join(pair.layer for pair in self.attention)
        return f"BatchResult({len(self)} samples; {f'layers {layers}' if layers else 'no cross-attention'})"

    def __len__(self) -> int:
        return len(self._by_sample)

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self._by_sample.device

    @property
    def _by_sample(self) -> Tensor:
        """Any tensor with one row per sample."""
        if self.attention:
            return self.attention[0].forward.weights
        assert self.inputs is not None
        return next(iter(self.inputs.tokens.values()))[0]

    @property
    def scores(self) -> Scores | None:
        """The class scores, if the predictions are theirs. Waits for a GPU."""
        scores, predicted = self.labels.scores, self.labels.predicted
        if scores is None or predicted is None or not scores.agree_with(predicted, self.labels.confidence):
            return None
        return scores

    def __getitem__(self, samples: slice) -> BatchResult:
        """Give some of the samples."""
        inputs = None if self.inputs is None else self.inputs[samples]
        return BatchResult(tuple(pair[samples] for pair in self.attention), self.labels[samples], inputs)

    def cpu(self) -> BatchResult:
        """Give attention and labels on the CPU, without a graph."""
        return BatchResult(tuple(pair.cpu() for pair in self.attention), self.labels.cpu())


def read_batch(step: Step, attention: Attentions, finder: LabelFinder) -> BatchResult:
    """Give a batch with its labels, and without those of its queries that are padding.

    Raises
    ------
    DiscoveryError, ShapeError
        As ``LabelFinder.find``, or if a mask does not fit the attention.
    """
    labels = finder.find(step)
    attention = mask_queries(attention, labels.query_mask)
    return BatchResult(attention, labels)


def with_fusion(batch: BatchResult, recorder: StepRecorder) -> BatchResult:
    """Give a batch with what entered the fusion, and with confidences that a step of class ids alone lacks."""
    labels, inputs = batch.labels, recorder.collect_fusion(batch.labels)
    output = None if inputs is None else inputs.model_output
    if output is not None and output.values.shape[1] > 1 and labels.confidence is None and labels.predicted is not None:
        confidence, predicted = output.values.max(1)
        labels = replace(labels, confidence=torch.where(predicted == labels.predicted, confidence, torch.nan))
    return replace(batch, labels=labels, inputs=inputs)
