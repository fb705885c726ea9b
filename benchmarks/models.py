"""The models that are measured: the quick start's, the reference model, and one of any length and number of classes."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples import quick_start
from lightning_xattn.hms import HMSDataModule, HMSLightningModule, simulate

FOLDER = Path(tempfile.gettempdir()) / "lightning_xattn_benchmarks"
"""Where simulated recordings and their features stay between runs."""

BATCH, RECORDINGS = 32, 480


@contextmanager
def quietly() -> Iterator[None]:
    """Without advice and warnings of what is measured."""
    for name in ("pytorch_lightning", "lightning_xattn"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    """A Trainer that prints and writes nothing of its own, on the CPU unless the settings say otherwise."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(callbacks=list(callbacks), **(quiet | settings))


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


class TwoStreams(LightningModule):
    """Audio and text, three and two numbers a token, that attend to each other."""

    def __init__(self, width: int, heads: int, classes: int, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.audio_proj, self.text_proj = nn.Linear(3, width), nn.Linear(2, width)
        self.audio_to_text_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.text_to_audio_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, audio: Tensor, text: Tensor) -> Tensor:
        audio, text = self.audio_proj(audio), self.text_proj(text)
        there, _ = self.audio_to_text_attn(audio, text, text, need_weights=self.need_weights)
        back, _ = self.text_to_audio_attn(text, audio, audio, need_weights=self.need_weights)
        scores: Tensor = self.head(torch.cat([there.mean(1), back.mean(1)], 1))
        return scores

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        audio, text, target = batch
        self.log("val_loss", nn.functional.cross_entropy(self(audio, text), target))
