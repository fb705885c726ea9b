"""Simulated HMS recordings, and the reference model trained on those whose modalities agree."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from pytorch_lightning import seed_everything
from torch import Tensor

from benchmarks.real_data import make_trainer
from lightning_xattn.hms import HMSDataModule, HMSLightningModule, simulate

FOLDER = Path(tempfile.gettempdir()) / "lightning_xattn_simulated"
"""Where recordings and features stay between runs."""

SAMPLES = 480
"""Recordings of 50 s to train on, and as many of other patients for each test."""

TESTS = {"natural": 0.0, "shift": 0.5}
"""By test, the share of recordings whose spectrogram shows another class than their EEG; in training there is none."""


def fetch(name: str) -> Path:
    """The folder of "train", or of one of ``TESTS``; simulated unless an earlier run has."""
    folder = FOLDER / name
    seed = ["train", *TESTS].index(name)
    if not folder.exists():
        simulate(folder, SAMPLES, disagreeing=TESTS.get(name, 0.0), seed=seed)
    return folder


def load(name: str) -> HMSDataModule:
    """Recordings to train on, or all recordings of a test as ``test_dataloader()``."""
    folder = fetch(name)
    return HMSDataModule(folder, test_data=None if name == "train" else folder, cache_dir=FOLDER / "features")


def train(seed: int, epochs: int = 10) -> HMSLightningModule:
    """A trained model."""
    seed_everything(seed, verbose=False)
    model = HMSLightningModule()
    make_trainer(max_epochs=epochs).fit(model, datamodule=load("train"))
    return model


class Encoded(NamedTuple):
    """What a model makes of a test.

    Attributes
    ----------
    tokens
        By modality ``(samples, tokens, 256)``, what its encoder gives.
    predicted, target, group
        ``(samples,)`` int64; the class is the one with most votes.
    """

    tokens: dict[str, Tensor]
    predicted: Tensor
    target: Tensor
    group: Tensor


def encode(model: HMSLightningModule, test: str) -> Encoded:
    """All recordings of a test."""
    kept: dict[str, list[Tensor]] = {"eeg": [], "spec": []}
    hooks = []
    for name, outputs in kept.items():
        encoder = model.get_submodule(f"model.{name}_encoder")
        hooks.append(encoder.register_forward_hook(lambda module, inputs, output, to=outputs: to.append(output)))
    columns = []
    model.eval()
    with torch.no_grad():
        for batch in load(test).test_dataloader():
            predicted = model(batch["eeg_graphs"], batch["spec_graphs"]).argmax(1)
            columns.append((predicted, batch["targets"].argmax(1), batch["patient_ids"]))
    for hook in hooks:
        hook.remove()
    tokens = {name: torch.cat(outputs) for name, outputs in kept.items()}
    return Encoded(tokens, *(torch.cat(several) for several in zip(*columns, strict=True)))
