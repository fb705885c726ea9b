"""The reference network in a ``LightningModule``: loss, metrics, optimiser, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_xattn.core.errors import DataError, SettingError, ShapeError
from lightning_xattn.hms.model import HMSNetwork
from lightning_xattn.hms.montage import CLASSES


class HMSLightningModule(pl.LightningModule):
    """Six patterns of harmful brain activity from EEG graphs and spectrogram graphs.

    A batch is ``{'eeg_graphs': [PyG Batch per window], 'spec_graphs': [PyG Batch per window],
    'targets': (B, 6) soft labels}``. Logs ``train_loss``, ``val_loss``, ``val_acc``, ``val_f1`` (macro) and
    the same for ``test``; accuracy and F1 are against the arg max of the soft label.

    Parameters
    ----------
    num_heads
        Heads of each direction of the cross-attention; divides 256.
    lr
        Highest learning rate of the schedule.
    weight_decay
        Of AdamW.
    dropout
        In the fusion and the classifier, in [0, 1).

    Attributes
    ----------
    class_names : tuple of str
        Names of the classes, in the order of the logits.

    Raises
    ------
    SettingError
        If a setting is not allowed.

    Examples
    --------
    >>> folder = simulate("recordings", n_samples=6, eeg_seconds=10)
    >>> data = HMSDataModule(folder, test_data=folder, cache_dir="features", num_workers=0)
    >>> module = HMSLightningModule(num_heads=4)
    >>> module.predict_step(next(iter(data.test_dataloader())), 0).shape
    torch.Size([6, 6])
    """

    def __init__(
        self,
        num_heads: int = 8,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not (lr > 0 and weight_decay >= 0):
            raise SettingError(f"lr must be > 0 and weight_decay >= 0; got lr={lr} and weight_decay={weight_decay}.")
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        self.model = HMSNetwork(num_heads, dropout)
        self.class_names = CLASSES
        scores = MetricCollection(
            {
                "acc": MulticlassAccuracy(len(CLASSES), average="micro"),
                "f1": MulticlassF1Score(len(CLASSES), average="macro"),
            }
        )
        self.val_scores = scores.clone(prefix="val_")
        self.test_scores = scores.clone(prefix="test_")

    def forward(self, eeg_graphs: list[Any], spec_graphs: list[Any]) -> Tensor:
        """Return logits ``(B, 6)``, see ``HMSNetwork.forward``."""
        logits: Tensor = self.model(eeg_graphs, spec_graphs)
        return logits

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Soft-label cross entropy of a batch; logs ``train_loss``."""
        logits, targets = self._predict(batch)
        loss = F.cross_entropy(logits, targets)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(targets))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch; logs ``val_loss``, ``val_acc``, ``val_f1``."""
        return self._evaluate(batch, "val", self.val_scores)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch; logs ``test_loss``, ``test_acc``, ``test_f1``."""
        return self._evaluate(batch, "test", self.test_scores)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Class probabilities ``(B, 6)``; the batch needs no targets."""
        _require_keys(batch, "eeg_graphs", "spec_graphs")
        return torch.softmax(self(batch["eeg_graphs"], batch["spec_graphs"]), dim=-1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with ``learning_rate_factor`` over the steps of the fit; constant where the fit has no end."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, int(total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _predict(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        _require_keys(batch, "eeg_graphs", "spec_graphs", "targets")
        logits, targets = self(batch["eeg_graphs"], batch["spec_graphs"]), batch["targets"]
        if targets.shape != logits.shape:
            raise ShapeError(
                f"The targets must be soft labels of shape {tuple(logits.shape)}, a row per sample and a column "
                f"per class; got shape {tuple(targets.shape)}."
            )
        return logits, targets

    def _evaluate(self, batch: Mapping[str, Any], stage: str, scores: MetricCollection) -> Tensor:
        logits, targets = self._predict(batch)
        loss = F.cross_entropy(logits, targets)
        scores.update(logits, targets.argmax(dim=-1))
        self.log(f"{stage}_loss", loss, prog_bar=True, batch_size=len(targets), sync_dist=True)
        self.log_dict(scores, prog_bar=True, batch_size=len(targets))
        return loss


def learning_rate_factor(step: int, total: int) -> float:
    """Share of the highest learning rate at a step: linear over the first tenth, then half a cosine to 1 %.

    It keeps its last value after ``total`` steps, so that a fit can be resumed for longer.
    """
    warmup = max(1, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def _require_keys(batch: Mapping[str, Any], *keys: str) -> None:
    missing = [key for key in keys if key not in batch]
    if missing:
        raise DataError(f"The batch lacks {missing}; it holds {sorted(map(str, batch))}.")
