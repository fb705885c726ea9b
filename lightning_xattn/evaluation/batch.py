"""One batch: what the model does with it, recorded while it runs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.inputs import ModalitiesSetting
from lightning_xattn.attribution.recorder import FusionRecord, FusionRecorder
from lightning_xattn.capture import AttentionRecorder, AttentionSetting, Layer, is_set_aside
from lightning_xattn.capture.labels import LabelFinder, Labels, Step
from lightning_xattn.capture.labels.scores import Scores
from lightning_xattn.capture.wrappers import Hook
from lightning_xattn.core.attention import AttentionPair, mask_queries
from lightning_xattn.core.distributed import SINGLE_PROCESS, Processes
from lightning_xattn.core.errors import DiscoveryError, ShapeError
from lightning_xattn.core.notices import info, warn
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT, UNKNOWN

Attentions = tuple[AttentionPair, ...]

_MULTILABEL_LOSSES = (nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss)


def find_multilabel_loss(model: nn.Module) -> str:
    """The path of a loss or metric in a model that is one for several labels at once; "" without."""
    losses = (
        path
        for path, module in model.named_modules()
        if isinstance(module, _MULTILABEL_LOSSES) or type(module).__name__.startswith(("Multilabel", "MultiLabel"))
    )
    return next(losses, "")


class StepRecorder:
    """Record a model's attention and what enters its fusion while it runs; its outputs stay what they are.

    Parameters
    ----------
    model
        Any module; nothing is hooked yet.
    attention
        As ``AttentionRecorder`` takes it.
    fusion, modalities
        As ``FusionRecorder`` takes them.
    processes
        Those that run the model.
    replays
        Whether the model may run again.

    Attributes
    ----------
    fusion : FusionRecorder
        Of what enters the fusion, for replays.

    Raises
    ------
    DiscoveryError, SettingError
        If a setting names what is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: AttentionSetting | None = None,
        fusion: str | None = None,
        modalities: ModalitiesSetting | None = None,
        processes: Processes = SINGLE_PROCESS,
        replays: bool = True,
    ) -> None:
        self.fusion = FusionRecorder(model, fusion, modalities, processes, replays)
        self._attention = AttentionRecorder(model, attention)
        self._model = model
        self._multilabel_loss = find_multilabel_loss(model)
        # A model whose fusion is named may have no cross-attention at all.
        self._may_lack_attention = attention is None and not self.fusion.needs_attention
        self._lacks_attention = is_set_aside(attention)
        self._pairs: Attentions = ()
        # What the model's own forward returned first in this step.
        self._output: Any = None
        self._hooks = ExitStack()

    def __enter__(self) -> StepRecorder:
        self.close()
        self.clear()
        with ExitStack() as hooks:  # which leave again if one cannot be set
            hooks.callback(self._model.register_forward_hook(Hook(self._keep_output, [])).remove)
            if not self._lacks_attention:
                hooks.callback(self._attention.close)
                self._attention.__enter__()
            hooks.callback(self.fusion.close)
            self.fusion.__enter__()
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook. What was recorded stays until ``clear``."""
        self._hooks.close()

    def clear(self) -> None:
        """Forget what was recorded."""
        self._attention.clear()
        self.fusion.clear()
        self._pairs, self._output = (), None

    def reset(self) -> None:
        """Forget the call that an evaluation's replays repeat."""
        self.fusion.reset()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that are recorded."""
        return self._attention.layers

    @property
    def is_waiting(self) -> bool:
        """See ``AttentionRecorder``."""
        return self._attention.is_waiting

    @property
    def left_out(self) -> dict[str, int]:
        """See ``AttentionRecorder``."""
        return self._attention.left_out

    def collect_step(self, outputs: Any, batch: Any) -> tuple[Step, Attentions] | None:
        """What the step returned and its attention; None if it has neither attention nor a fusion, or ran nothing.

        Raises
        ------
        DiscoveryError, ShapeError
            As ``AttentionRecorder.attention``; a model whose fusion is named needs no attention.
        """
        self._pairs = self._collect_attention(batch)
        if self._pairs:
            first, tokens = self._pairs[0].forward.weights, tuple(self._pairs[0].forward.weights.shape[2:])
        elif not self._lacks_attention:
            return None
        else:
            found, messages = self.fusion.find_first_tokens()
            warn(messages)
            if found is None:
                return None
            first, tokens = found, ()
        step = Step(outputs, batch, self._output, len(first), first.device, tokens, self._multilabel_loss)
        return step, self._pairs

    def collect_fusion(self, labels: Labels) -> FusionRecord | None:
        """What entered the fusion in this step; of a first step the labels help to find it.

        Raises
        ------
        DiscoveryError
            If a named argument is not there, or there is neither attention nor a fusion that is clear.
        """
        inputs, messages = self.fusion.collect_inputs(self._pairs, self.layers, labels)
        if inputs is None and not self._pairs:
            raise DiscoveryError(" ".join(messages))
        notify = warn if self.fusion.is_named else info
        notify(messages)
        return inputs

    def _keep_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._output is None:
            self._output = output

    def _collect_attention(self, batch: Any) -> Attentions:
        if self._lacks_attention:
            return ()
        self._attention.batch = batch
        try:
            return self._attention.attention
        except (DiscoveryError, ShapeError) as error:
            if self._attention.ran_nothing:
                return ()
            if not self._may_lack_attention:
                raise
            if self._attention.saw_attention:
                warn([f"The attention is left out, and the rest is recorded. {error}"])
            self._lacks_attention = True
            return ()


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
        """Some of the samples."""
        inputs = None if self.inputs is None else self.inputs[samples]
        return BatchResult(tuple(pair[samples] for pair in self.attention), self.labels[samples], inputs)

    def cpu(self) -> BatchResult:
        """Attention and labels on the CPU, without a graph."""
        return BatchResult(tuple(pair.cpu() for pair in self.attention), self.labels.cpu())


def read_batch(step: Step, attention: Attentions, finder: LabelFinder) -> BatchResult:
    """A batch with its labels, and without those of its queries that are padding.

    Raises
    ------
    DiscoveryError, ShapeError
        As ``LabelFinder.find``, or if a mask does not fit the attention.
    """
    labels = finder.find(step)
    attention = mask_queries(attention, labels.query_mask)
    return BatchResult(attention, labels)


def with_fusion(batch: BatchResult, recorder: StepRecorder) -> BatchResult:
    """A batch with what entered the fusion, and with confidences that a step of class ids alone lacks."""
    labels, inputs = batch.labels, recorder.collect_fusion(batch.labels)
    output = None if inputs is None else inputs.model_output
    if output is not None and output.values.shape[1] > 1 and labels.confidence is None and labels.predicted is not None:
        confidence, predicted = output.values.max(1)
        labels = replace(labels, confidence=torch.where(predicted == labels.predicted, confidence, torch.nan))
    return replace(batch, labels=labels, inputs=inputs)


def classify(
    labels: Labels, classes_by: str, n_classes: int, samples: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's class id (-1: none), outcome, and whether its target is tied.

    A sample whose target or prediction is not one of the classes has no outcome.
    """
    classes = labels.target if classes_by == "target" else labels.predicted
    if classes is None:
        classes = torch.full((samples,), -1, device=device)
    outcomes = torch.full((samples,), UNKNOWN, device=device)
    if labels.predicted is not None and labels.target is not None:
        # Ids below 0 are no labels, or scores that were not finite.
        known = (labels.predicted >= 0) & (labels.target >= 0)
        if n_classes:
            known = known & (labels.predicted < n_classes) & (labels.target < n_classes)
        outcomes = torch.where(known, torch.where(labels.predicted == labels.target, CORRECT, INCORRECT), UNKNOWN)
    tied = torch.zeros(samples, dtype=torch.bool, device=device) if labels.tied is None else labels.tied
    return classes, outcomes, tied
