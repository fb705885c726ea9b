"""Run a trained model over a batch, whole or in parts, and record its steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import nn

from lightning_xattn.capture.labels import LabelFinder, Step
from lightning_xattn.core.errors import DataError, DiscoveryError, SettingError
from lightning_xattn.evaluation.batch import Attentions, StepRecorder
from lightning_xattn.explainer.batches import count_samples, join_samples, take_samples, to_device
from lightning_xattn.functional import require_heads

Predict = Callable[[Any, Any], Any]
"""``(model, batch) -> outputs``."""

RecordedStep = tuple[Step, Attentions]


class ModelRunner:
    """Runs a model and records its steps; the model is left as it was.

    Parameters
    ----------
    model
        Any module.
    recorder
        Records the model.
    predict
        How to run the model; None: ``predict_step(batch, 0)`` if there is one, else ``model(batch)``.
    max_batch_size
        Larger batches are split into parts of this size; None: no batch is split.
    num_heads
        The number of heads that each attention must have; None: any number.

    Raises
    ------
    SettingError
        If ``predict`` does not take a model and a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        recorder: StepRecorder,
        predict: Predict | None,
        max_batch_size: int | None,
        num_heads: int | None,
    ) -> None:
        _check_predict(predict)
        self.recorder = recorder
        self._model, self._predict = model, predict
        self._max_batch_size, self._num_heads = max_batch_size, num_heads

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the model, in eval mode and without gradients; then put every module back into its mode."""
        modes = {module: module.training for module in self._model.modules()}
        self._model.eval()
        try:
            with torch.no_grad(), self.recorder:
                yield
        finally:
            self.recorder.clear()
            self.recorder.reset()
            for module, training in modes.items():
                module.training = training

    def run(self, batch: Any, finder: LabelFinder) -> Iterator[RecordedStep | None]:
        """Yield the step of a batch, or of each of its parts; None where nothing ran, or no sample can be recorded.

        At each yield ``recorder.left_out`` has the samples of the step that are not recorded.

        Parameters
        ----------
        batch
            As the loader yields it.
        finder
            Decides where the labels are, in the first batch.

        Raises
        ------
        DataError
            If the batch has to be split and cannot be.
        DiscoveryError, ShapeError, SettingError
            If the attention is not there, or does not fit.
        """
        parts = self._split(batch)
        if len(parts) == 1:
            yield self._run(batch)
            return
        # One part may not show where the labels are, so the parts of the first batch run twice.
        if not finder.decided and not self._find_labels(batch, parts, finder):
            return
        for part in parts:
            recorded = self._run(part)
            if recorded is not None and recorded[0].samples != count_samples(part):
                raise DataError(
                    f"The batch was split into parts of {count_samples(part)} samples along its first axes, but the "
                    f"attention of one has {recorded[0].samples}: make smaller batches in the loader instead of "
                    "max_batch_size."
                )
            yield recorded

    def _split(self, batch: Any) -> list[Any]:
        if self._max_batch_size is None:
            return [batch]
        count, size = count_samples(batch), self._max_batch_size
        if count <= size:
            return [batch]
        return [take_samples(batch, range(start, min(start + size, count))) for start in range(0, count, size)]

    def _find_labels(self, batch: Any, parts: Sequence[Any], finder: LabelFinder) -> bool:
        """Let the finder decide from the parts together where the labels are; False if nothing ran for any part."""
        steps = [recorded[0] for recorded in map(self._run, parts) if recorded is not None]
        if len(steps) == len(parts):
            counts = [count_samples(part) for part in parts]
            outputs = join_samples([step.outputs for step in steps], counts)
            forward = join_samples([step.forward for step in steps], counts)
            finder.decide(Step(outputs, to_device(batch, self._model), forward, sum(counts), steps[0].device))
        elif steps:
            finder.decide(steps[0])
        return bool(steps or self.recorder.left_out)

    def _run(self, batch: Any) -> RecordedStep | None:
        self.recorder.clear()
        moved = to_device(batch, self._model)
        outputs = self._call_model(moved)
        recorded = self.recorder.collect_step(outputs, moved)
        if self.recorder.is_waiting:
            return self._run(batch)
        if recorded is None and (self.recorder.left_out or outputs is None):
            return None
        if recorded is None:
            raise DiscoveryError(
                "No attention ran for this batch, though it did for an earlier one. If the model has to be called in "
                "another way, set predict=lambda model, batch: ...."
            )
        for pair in recorded[1]:
            for attention in pair.directions:
                where = f"{attention.direction} of layer '{pair.layer}'"
                require_heads(self._num_heads, attention.weights.shape[1], where)
        return recorded

    def _call_model(self, batch: Any) -> Any:
        if self._predict is not None:
            return self._predict(self._model, batch)
        step: Any = getattr(self._model, "predict_step", None)
        # Lightning's own predict_step calls forward with the batch.
        if getattr(type(self._model), "predict_step", None) in (None, LightningModule.predict_step):
            try:
                inspect.signature(self._model.forward).bind(batch)
            except TypeError as error:
                raise DiscoveryError(
                    f"The forward of {type(self._model).__name__} cannot be called with a batch alone ({error}); the "
                    f"batch is a {type(batch).__name__}. Set how to call it: ExplainabilityCapture(model, "
                    "predict=lambda model, batch: model(batch[0], batch[1]))."
                ) from error
        return self._model(batch) if step is None else step(batch, 0)


def _check_predict(predict: Any) -> None:
    fits = predict is None or callable(predict)
    if predict is not None and fits:
        with suppress(ValueError):  # built-in functions may have no signature
            try:
                inspect.signature(predict).bind("model", "batch")
            except TypeError:
                fits = False
    if not fits:
        raise SettingError(f"predict must be a callable (model, batch) -> outputs, or None; got {predict!r}.")
