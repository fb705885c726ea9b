"""Validate the reference model; as a script, print the peak memory: ``python -m benchmarks.validate BATCHES``."""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.hms import HMSDataModule, HMSLightningModule, simulate

BATCH = 32


def one_batch(folder: Path) -> Any:
    """A batch of 32 simulated recordings."""
    if not folder.exists():
        simulate(folder, BATCH, eeg_seconds=10)
    datamodule = HMSDataModule(folder, test_data=folder, batch_size=BATCH, cache_dir=folder / "features")
    return next(iter(datamodule.val_dataloader()))


def balanced(module: HMSLightningModule, batch: Any) -> HMSLightningModule:
    """The model without a favourite class; an untrained one would predict a single class for all."""
    last = module.model.classifier[-1]
    module.eval()
    with torch.no_grad():
        last.bias -= module(batch["eeg_graphs"], batch["spec_graphs"]).mean(0)
    return module


def validate(module: HMSLightningModule, batches: list[Any], contribution_samples: int | None) -> None:
    """Run a validation epoch with the callback, figures off; without it if ``contribution_samples`` is None."""
    settings = {"figures_every_n_epochs": 0, "contribution_samples": contribution_samples}
    callbacks = [] if contribution_samples is None else [AttentionExplainabilityCallback(**settings)]
    trainer = Trainer(
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=callbacks,
    )
    # The batches exist already, so that the model and the callback are measured, not the loading.
    trainer.validate(module, DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch), verbose=False)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        batch = one_batch(Path(temporary) / "hms")
    validate(balanced(HMSLightningModule(), batch), [batch] * int(sys.argv[1]), contribution_samples=128)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
