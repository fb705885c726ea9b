"""The quick start's model and the reference model with their samples, made once in a run."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, seed_everything
from torch.utils.data import DataLoader

from benchmarks.models import make_trainer, quietly
from examples import quick_start
from lightning_xattn.hms import HMSDataModule, HMSLightningModule, simulate

FOLDER = Path(tempfile.gettempdir()) / "lightning_xattn_benchmarks"
"""Where simulated recordings and their features stay between runs."""

BATCH, RECORDINGS = 32, 480


@cache
def reference_batches() -> list[Any]:
    """`RECORDINGS` different simulated recordings in batches, loaded, so that loading is not measured."""
    folder = FOLDER / f"{RECORDINGS}_recordings"
    if not folder.exists():
        simulate(folder, RECORDINGS, eeg_seconds=10)
    with quietly():
        datamodule = HMSDataModule(folder, test_data=folder, batch_size=BATCH, cache_dir=FOLDER / "features")
        return list(datamodule.test_dataloader())


@cache
def reference_model() -> HMSLightningModule:
    """The reference model without a favourite class; an untrained one would predict a single class for all."""
    seed_everything(0, verbose=False)
    module, batch = HMSLightningModule(), reference_batches()[0]
    last = module.model.classifier[-1]
    module.eval()
    with torch.no_grad():
        last.bias -= module(batch["eeg_graphs"], batch["spec_graphs"]).mean(0)
    return module


def reference_loader() -> DataLoader[Any]:
    """The batches as they are."""
    return DataLoader(reference_batches(), batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


@cache
def quick_start_model() -> LightningModule:
    """The quick start's model after its eight epochs."""
    seed_everything(0, verbose=False)
    module = quick_start.Matching()
    with quietly():
        make_trainer(max_epochs=8).fit(module, *quick_start_loaders())
    return module


@cache
def quick_start_loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """2,000 samples to train on, and 500 others."""
    train, other = quick_start.simulate(2000, 0), quick_start.simulate(500, 1)
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(other, batch_size=64)
