"""The Lightning callback: hooks and wiring only."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_xattn.aggregation import CORRECT, INCORRECT, UNKNOWN, LayerAccumulator, LayerSummary
from lightning_xattn.attention import AttentionPair, Direction
from lightning_xattn.capture import AttentionRecorder, LabelFinder, Labels
from lightning_xattn.capture.discovery import AttentionPaths
from lightning_xattn.capture.labels import LabelSetting, describe
from lightning_xattn.epoch import check_class_names, epoch_curves, epoch_figures
from lightning_xattn.errors import DiscoveryError, SettingError, ShapeError, XAttnWarning
from lightning_xattn.functional import prepare_rows
from lightning_xattn.sinks import log_images


class AttentionExplainabilityCallback(Callback):
    """Log how a model's two modalities attend to each other while it is validated and tested.

    Every epoch it logs head entropy and modality alignment, per class and for correct against incorrect predictions,
    as scalars with ``LightningModule.log`` (so ``ModelCheckpoint`` and ``EarlyStopping`` can monitor them) and as
    figures in the Trainer's loggers. The model's outputs stay bit for bit the same. The sanity check before training
    is used to check the settings against a real batch; nothing of it is kept or logged.

    If the LightningModule or its data module has an attribute ``attention_axes``, a mapping from modality to
    ``TokenAxis``, the figures label the tokens with it.

    Parameters
    ----------
    attention
        Module paths by direction, seen from the LightningModule, e.g.
        ``{"eeg_to_spec": "model.fusion.eeg_to_spec_attn", "spec_to_eeg": "model.fusion.spec_to_eeg_attn"}``.
        None: ``nn.MultiheadAttention`` modules named ``<a>_to_<b>...`` are found.
    class_names
        A name for each class. None: the LightningModule's attribute ``class_names``, or ``class_0``, ``class_1``, ...
    group_by
        "target" groups samples by their true class, "prediction" by the predicted one.
    predictions, targets
        Where a step's predictions (class scores or ids) and targets (class ids or soft labels) are. None: found in
        the step's outputs, the module's own ``forward``, the batch. A string: a key of the outputs or of the batch.
        A callable: ``(outputs, batch) -> tensor``.
    every_n_epochs
        During ``fit``, record every so many epochs. ``trainer.validate`` and ``trainer.test`` always record.
    figures_every_n_epochs
        Draw figures every so many epochs, of those that are recorded; 0: never.

    Raises
    ------
    SettingError
        If a setting has a value that is not allowed.

    Examples
    --------
    >>> trainer = Trainer(callbacks=[AttentionExplainabilityCallback()])
    """

    def __init__(
        self,
        attention: AttentionPaths | None = None,
        class_names: Sequence[str] | None = None,
        group_by: str = "target",
        predictions: LabelSetting = None,
        targets: LabelSetting = None,
        every_n_epochs: int = 1,
        figures_every_n_epochs: int = 1,
    ) -> None:
        super().__init__()
        for name in attention or ():
            Direction.parse(name)
        if group_by not in ("target", "prediction"):
            raise SettingError(f"group_by must be 'target' or 'prediction'; got {group_by!r}.")
        for name, setting in (("predictions", predictions), ("targets", targets)):
            if not (setting is None or isinstance(setting, str) or callable(setting)):
                raise SettingError(f"{name} must be None, a key or a callable; got {setting!r}.")
        for name, number, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("figures_every_n_epochs", figures_every_n_epochs, 0),
        ):
            if not isinstance(number, int) or number < least:
                raise SettingError(f"{name} must be a whole number >= {least}; got {number!r}.")
        self.attention = attention
        self.class_names = None if class_names is None else check_class_names(class_names)
        self.group_by = group_by
        self.every_n_epochs = every_n_epochs
        self.figures_every_n_epochs = figures_every_n_epochs
        self.summaries: dict[str, LayerSummary] = {}
        """The last epoch of each scope: ``val``, ``test``, and ``val/dataloader_1`` and so on where there are more."""
        self._labels = LabelFinder(predictions, targets)
        self._recorder: AttentionRecorder | None = None
        self._accumulators: dict[tuple[int, str], LayerAccumulator] = {}
        # The names of the classes, once a first batch has passed the checks.
        self._classes: tuple[str, ...] | None = None
        self._warned: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the attention before anything runs, so that a wrong path fails at once."""
        self._classes = None
        if stage != "predict":
            AttentionRecorder(pl_module, self.attention)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to record, if this epoch is one to record."""
        self._start(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to record."""
        self._start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch to the running sums."""
        self._add_batch(pl_module, outputs, batch, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch to the running sums."""
        self._add_batch(pl_module, outputs, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's curves and figures."""
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's curves and figures."""
        self._finish(trainer, pl_module, "test")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take every hook off the model: after a crash Lightning does not call ``teardown``."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take every hook off the model."""
        self._stop()

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        if not _is_fitting(trainer) or trainer.current_epoch % self.every_n_epochs == 0:
            self._recorder = AttentionRecorder(pl_module, self.attention).__enter__()

    def _stop(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = None
        self._accumulators = {}

    def _add_batch(self, pl_module: LightningModule, outputs: Any, batch: Any, dataloader_idx: int) -> None:
        if self._recorder is None:
            return
        pairs, forward_output = self._recorder.attention, self._recorder.output
        self._recorder.clear()
        if not pairs:
            self._require_checked()
            return
        batch_size, device = pairs[0].forward.weights.shape[0], pairs[0].forward.weights.device
        labels = self._labels.find(outputs, batch, forward_output, batch_size)
        if self._classes is None:
            self._classes = self._check_first_batch(pl_module, labels, outputs, batch)

        classes, outcomes, tied = _classes_and_outcomes(labels, self.group_by, batch_size, device)
        for pair in pairs:
            self._warn_of_single_key(pair)
            rows = [prepare_rows(attention) for attention in pair.directions]
            key = (dataloader_idx, pair.layer)
            if key not in self._accumulators:
                self._accumulators[key] = LayerAccumulator(rows, len(self._classes))
            self._accumulators[key].update(rows, classes, outcomes, tied)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._recorder is None:
            return
        if not trainer.sanity_checking:
            for (dataloader_idx, layer), accumulator in self._accumulators.items():
                scope = stage
                # A first dataloader and a first layer go without saying; others add their name.
                scope += f"/dataloader_{dataloader_idx}" if dataloader_idx else ""
                scope += "" if layer == next(iter(self._accumulators))[1] else f"/{layer}"
                self.summaries[scope] = accumulator.compute()
                self._log(trainer, pl_module, self.summaries[scope], scope)
        self._stop()

    def _log(self, trainer: Trainer, pl_module: LightningModule, summary: LayerSummary, scope: str) -> None:
        names, epoch = self._classes or (), trainer.current_epoch
        pl_module.log_dict(epoch_curves(summary, scope, names), on_step=False, on_epoch=True, batch_size=1)
        due = not _is_fitting(trainer) or epoch % (self.figures_every_n_epochs or 1) == 0
        if self.figures_every_n_epochs and due and trainer.is_global_zero:
            from lightning_xattn.visualizations import render  # matplotlib, only where figures are wanted

            axes = getattr(pl_module, "attention_axes", None)
            axes = axes or getattr(getattr(trainer, "datamodule", None), "attention_axes", None) or {}
            context = f"{scope}, epoch {epoch}"
            figures = epoch_figures(summary, scope, names, group_by=self.group_by, axes=axes, context=context)
            # The step at which Lightning logs the scalars of this same hook.
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            log_images(trainer.loggers, ((tag, render(figure)) for tag, figure in figures), step)

    def _check_first_batch(
        self, pl_module: LightningModule, labels: Labels, outputs: Any, batch: Any
    ) -> tuple[str, ...]:
        """The names of the classes, when predictions, targets and names fit each other."""
        there = f"The step returned {describe(outputs)}; the batch is {describe(batch)}."
        for what, found in (("predictions", labels.predicted), ("targets", labels.target)):
            if found is None:
                self._warn_once(
                    f"No {what} found, so correct and incorrect predictions are not compared"
                    + (", and no classes are" if what.startswith(self.group_by) else "")
                    + f". {there} Name them: AttentionExplainabilityCallback({what}=<key or callable>)."
                )
        if (labels.target if self.group_by == "target" else labels.predicted) is None:
            return ()

        names = self.class_names or getattr(pl_module, "class_names", None)
        if names is None:
            if labels.n_classes is None:
                raise DiscoveryError(
                    "Only class ids were found, which do not tell how many classes there are. "
                    "Name them: AttentionExplainabilityCallback(class_names=[...])."
                )
            names = [f"class_{i}" for i in range(labels.n_classes)]
        elif labels.n_classes not in (None, len(names)):
            raise ShapeError(
                f"There are {len(names)} class_names ({', '.join(names)}) but {labels.n_classes} columns of class "
                f"scores. {there}"
            )
        for what, ids in (("targets", labels.target), ("predictions", labels.predicted)):
            if ids is not None and not ((ids >= 0) & (ids < len(names))).all():
                raise ShapeError(
                    f"Expected {what} in 0 ... {len(names) - 1} for {len(names)} classes; got "
                    f"{sorted(set(ids.tolist()))}. {there}"
                )
        return check_class_names(names)

    def _require_checked(self) -> None:
        assert self._recorder is not None
        if self._classes is None:
            sites = [path for layer in self._recorder.layers for _, path in layer.sites]
            raise DiscoveryError(
                f"None of {', '.join(sites)} ran in the first step, so there is no attention to show. If the model "
                "computes it elsewhere, name that module: AttentionExplainabilityCallback(attention={...})."
            )

    def _warn_of_single_key(self, pair: AttentionPair) -> None:
        single = [str(attention.direction) for attention in pair.directions if attention.weights.shape[-1] == 1]
        if single:
            self._warn_once(
                f"Layer '{pair.layer}': {' and '.join(single)} attend to a single key, where softmax gives exactly 1 "
                "whatever the model learned. Entropy, selectivity and alignment are undefined and left out. To see "
                "attention, fuse token sequences: pool after the fusion, not before it."
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, XAttnWarning, stacklevel=2)


def _is_fitting(trainer: Trainer) -> bool:
    return bool(trainer.state.fn == "fit")


def _classes_and_outcomes(
    labels: Labels, group_by: str, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Class id (-1: none), outcome and tie of each sample."""
    classes = labels.target if group_by == "target" else labels.predicted
    if classes is None:
        classes = torch.full((batch_size,), -1, device=device)
    outcomes = torch.full((batch_size,), UNKNOWN, device=device)
    if labels.predicted is not None and labels.target is not None:
        outcomes = torch.where(labels.predicted == labels.target, CORRECT, INCORRECT)
    tied = torch.zeros(batch_size, dtype=torch.bool, device=device) if labels.tied is None else labels.tied
    return classes, outcomes, tied
