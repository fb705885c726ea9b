"""What only a GPU shows: whether the callback makes it wait while batches run, and what recording adds in bfloat16."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import models
from benchmarks.table import Benchmark, Measured, plan
from benchmarks.timing import quartiles, quartiles_of_ratios, times_within
from lightning_xattn import AttentionExplainabilityCallback

SAMPLES, TOKENS, WIDTH, HEADS, BATCH = 2048, 512, 512, 8, 64

WARM = 4
"""In the first batches the callback finds what to record, and waits for the GPU."""


class CountWaits(Callback):
    """How often a later batch makes the GPU wait, as torch's debug mode says.

    Attributes
    ----------
    waits, batches
        How many waits, in how many batches.
    """

    def __init__(self) -> None:
        self.waits, self.batches = 0, 0
        self._catcher: Any = None
        self._caught: list[Any] = []

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if args[1] >= WARM:
            self._catcher = warnings.catch_warnings(record=True)
            self._caught = self._catcher.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._catcher is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._catcher.__exit__(None, None, None)
            self._catcher = None
            self.waits += sum("synchroniz" in str(one.message) for one in self._caught)
            self.batches += 1


def _count_waits(module: LightningModule, loader: Any, watch: AttentionExplainabilityCallback | None) -> float:
    """Waits per batch. The callback stands between two counters' hooks: after the start of one, before its end."""
    counter = CountWaits()
    _validate(module, loader, *(() if watch is None else (watch,)), counter)
    return counter.waits / max(1, counter.batches)


def _validate(module: LightningModule, loader: Any, *callbacks: Callback) -> None:
    with models.quietly():
        models.make_trainer(*callbacks, accelerator="gpu", devices=1, precision="bf16-true").validate(
            module, loader, verbose=False
        )
    torch.cuda.synchronize()


def _measure(seconds: float) -> list[Measured] | str:
    if not torch.cuda.is_available():
        return "no GPU"
    torch.manual_seed(0)
    tokens = (torch.randn(SAMPLES, TOKENS, n, dtype=torch.bfloat16) for n in (3, 2))
    loader = DataLoader(TensorDataset(*tokens, torch.arange(SAMPLES) % 6), BATCH, pin_memory=True)
    module = models.TwoStreams(WIDTH, HEADS, 6, need_weights=False)

    def make_callback() -> AttentionExplainabilityCallback:
        return AttentionExplainabilityCallback(figures_every_n_epochs=0, contribution_samples=0)

    plain, watched = times_within(
        seconds, lambda: _validate(module, loader), lambda: _validate(module, loader, make_callback())
    )
    waits = [_count_waits(module, loader, make_callback()) - _count_waits(module, loader, None) for _ in range(3)]
    return [Measured(quartiles(waits), len(waits)), Measured(quartiles_of_ratios(watched, plain), len(plain))]


_SHAPE = f"{BATCH} x {HEADS} x {TOKENS} x {TOKENS}, bfloat16, {SAMPLES:,} samples"

BENCHMARKS = (
    Benchmark(
        (
            plan("GPU", "waits of the GPU in a batch, beyond those without the callback", "nothing", _SHAPE, "waits"),
            plan("GPU", "validate: attention alone", "the same without the callback", _SHAPE),
        ),
        _measure,
        seconds=20,
    ),
)
