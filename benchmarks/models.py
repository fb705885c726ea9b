"""Trainers that print nothing, and a small model of any length and number of classes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn


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
