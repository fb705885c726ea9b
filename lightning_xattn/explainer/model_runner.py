"""Run a trained model over a batch, on its device, and record its step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.core.hooks import DataHooks
from torch import nn
from torch.utils._pytree import tree_map

from lightning_xattn.capture.labels import LabelFinder, Step
from lightning_xattn.core.errors import DiscoveryError, SettingError
from lightning_xattn.evaluation.batch import Attentions, StepRecorder
from lightning_xattn.functional import require_heads

Predict = Callable[[Any, Any], Any]
"""``(model, batch) -> outputs``."""


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
    num_heads
        The number of heads that each attention must have; None: any number.

    Raises
    ------
    SettingError
        If ``predict`` cannot be called with a model and a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        recorder: StepRecorder,
        predict: Predict | None,
        num_heads: int | None,
    ) -> None:
        if predict is not None:
            try:
                with suppress(ValueError):  # built-in functions may have no signature
                    inspect.signature(predict).bind("model", "batch")
            except TypeError as error:  # it is not callable, or takes other arguments
                raise SettingError(
                    f"predict must be a callable (model, batch) -> outputs, or None; got {predict!r} ({error})."
                ) from error
        self.recorder = recorder
        self._model, self._predict, self._num_heads = model, predict, num_heads

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

    def run(self, batch: Any, finder: LabelFinder, needs_attention: bool = False) -> tuple[Step, Attentions] | None:
        """The recorded step of a batch; None where nothing ran, or no sample can be recorded.

        Afterwards ``recorder.left_out`` has the samples of the step that are not recorded.

        Parameters
        ----------
        batch
            As the loader yields it.
        finder
            Finds the labels of the step.
        needs_attention
            Whether attention that cannot be recorded is an error, also where none is named.

        Raises
        ------
        DiscoveryError, ShapeError, SettingError
            If the attention is not there, or does not fit.
        """
        self.recorder.clear()
        moved = to_device(batch, self._model)
        self.recorder.close()
        self.recorder.begin(self._call_model, (moved,), finder)
        outputs = self._call_model(moved)
        self.recorder.close()
        recorded = self.recorder.collect_step(outputs, moved, needs_attention)
        if self.recorder.is_waiting:
            return self.run(batch, finder, needs_attention)
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
                require_heads(self._num_heads, attention.shape[1], where)
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


def to_device(batch: Any, model: nn.Module) -> Any:
    """A batch on the model's device, moved by the hooks that a Trainer would call; the given batch does not change.

    Parameters
    ----------
    batch
        Tensors and objects with a method ``to``, in dicts, lists and tuples.
    model
        A ``LightningModule`` (its ``on_before_batch_transfer``, ``transfer_batch_to_device`` and
        ``on_after_batch_transfer`` are called) or another module.
    """
    first = next(iter(model.parameters()), next(iter(model.buffers()), None))
    device = torch.device("cpu") if first is None else first.device
    if device.type != "cpu":
        # Graphs are moved in place: a list of batches would pile up on the GPU.
        batch = tree_map(lambda part: copy.copy(part) if hasattr(part, "num_nodes") else part, batch)
    hooks: Any = model if hasattr(model, "transfer_batch_to_device") else DataHooks()
    batch = hooks.on_before_batch_transfer(batch, 0)
    batch = hooks.transfer_batch_to_device(batch, device, 0)
    return hooks.on_after_batch_transfer(batch, 0)
