"""What watching costs, as ratios measured side by side in one run: ``python -m benchmarks``."""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.capture import recording
from benchmarks.explain import explain_loader, peak_memory_of_explaining
from benchmarks.features import features
from benchmarks.numpy_loop import numpy_loop
from benchmarks.timing import median_seconds, quartiles_of_ratios, times_in_turns
from benchmarks.validate import BATCH, one_batch, validate
from lightning_xattn import Attention, Direction
from lightning_xattn.aggregation import LayerAccumulator, Layout
from lightning_xattn.columns import sample_statistics
from lightning_xattn.functional import prepare_rows
from lightning_xattn.hms import HMSDataModule, HMSLightningModule
from tests import reference

HEADS, EEG, SPEC = 8, 9, 119


def statistics_of_a_batch() -> None:
    """All per-sample numbers of both directions, against one softmax over the same tensors."""
    generator = torch.Generator().manual_seed(0)
    there = torch.randn(BATCH, HEADS, EEG, SPEC, generator=generator)
    back = torch.randn(BATCH, HEADS, SPEC, EEG, generator=generator)
    direction = Direction("eeg", "spec")
    pair = Attention(direction, there.softmax(-1)), Attention(direction.opposite, back.softmax(-1))
    classes, outcomes = torch.arange(BATCH) % 6, torch.arange(BATCH) % 2
    tied = torch.zeros(BATCH, dtype=torch.bool)
    first = [prepare_rows(attention) for attention in pair]
    accumulator = LayerAccumulator(Layout.of(first, sample_statistics(*first), 6))

    def softmax() -> None:
        there.softmax(-1)
        back.softmax(-1)

    def numbers() -> None:
        sample_statistics(*(prepare_rows(attention) for attention in pair))

    def numbers_and_sums() -> None:
        rows = [prepare_rows(attention) for attention in pair]
        accumulator.update(rows, sample_statistics(*rows), classes, outcomes, tied)

    arrays = [attention.weights.numpy() for attention in pair]
    one, all_numbers, with_sums, vectors = median_seconds(
        softmax, numbers, numbers_and_sums, lambda: numpy_loop(*arrays), repeats=50
    )
    (loops,) = median_seconds(lambda: reference_loop(*(array[:1] for array in arrays)), repeats=3)
    size = sum(state.numel() * state.element_size() for state in accumulator.sums().states.values())
    print(f"statistics of one batch ({BATCH} x {HEADS} x {EEG} x {SPEC}, both directions); one softmax = 1")
    print(f"  all per-sample numbers            {all_numbers / one:6.2f}     (aim: at most 6)")
    print(f"  the same, added to the sums       {with_sums / one:6.2f}")
    print(f"  a loop over samples in numpy      {vectors / all_numbers:6.1f}     times all per-sample numbers")
    print(f"  loops over samples, heads, rows   {BATCH * loops / all_numbers:6.0f}     times (aim: at least 40)")
    print(
        f"  the sums of an epoch              {size / 2**20:6.2f} MiB, 6 classes and {HEADS} heads, whatever its length"
    )
    print(f"  one softmax                       {1000 * one:6.2f} ms  on {torch.get_num_threads()} threads")


def reference_loop(there: NDArray[np.float32], back: NDArray[np.float32]) -> None:
    """The same numbers by the tests' slow reference."""
    for x, y in zip(there, back, strict=True):
        reference.alignment(x, y)
        reference.alignment_interaction(x, y)
        for weights in (x, y):
            reference.row_statistics(weights)
            reference.query_selectivity(weights)
            reference.head_diversity(weights)
            reference.sink_strength(weights)


def data_loader(folder: Path) -> None:
    """Batches of graphs from features that are cached already."""
    datamodule = HMSDataModule(folder, test_data=folder, batch_size=BATCH, cache_dir=folder / "features")
    loader = datamodule.val_dataloader()

    def epoch() -> None:
        for _ in loader:
            pass

    (seconds,) = median_seconds(epoch, repeats=50)
    print(f"data loader, warm cache, batches of {BATCH} x ({EEG} + {SPEC}) graphs")
    print(f"  one batch                         {1000 * seconds / len(loader):6.2f} ms  (aim: at most 10)")
    print(f"  batches per second                {len(loader) / seconds:6.0f}")


def validation_epoch(folder: Path) -> None:
    """A validation epoch with the callback, figures off, over one without."""
    module, batches = HMSLightningModule(), [one_batch(folder)] * 20
    validate(module, batches, watched=True)  # warms up
    plain, watched = times_in_turns(
        lambda: validate(module, batches, watched=False), lambda: validate(module, batches, watched=True), repeats=16
    )
    low, middle, high = quartiles_of_ratios(watched, plain)
    print(f"validation epoch of {len(batches)} batches of {BATCH}, reference model, figures off; without callback = 1")
    print(
        f"  with the callback                 {middle:6.3f}     (aim: at most 1.05), quartiles {low:.3f} and {high:.3f}"
    )
    print(f"  without                           {statistics.median(plain):6.2f} s")


def peak_memory() -> None:
    """Peak memory over 10 and over 100 validation batches; a process each, as the peak of one never falls."""
    print("peak memory of validating with the callback (aim: the same for both)")
    for batches in (10, 100):
        command = [sys.executable, "-m", "benchmarks.validate", str(batches)]
        peak = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        print(f"  {batches:3d} batches                       {int(peak.stdout.split()[-1]):6d} MiB")


def main() -> None:
    """Run all of them; about ten minutes."""
    # Lightning's advice to load with more workers, and torch's on a name that Lightning uses: neither is measured here.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "hms"
        one_batch(folder)  # simulates, and fills the cache
        statistics_of_a_batch()
        recording()
        # glibc gives what is freed back to the system, and gets it again page by page: no work of the recorder's.
        print("the same, while the allocator keeps what is freed")
        keeps = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
        subprocess.run([sys.executable, "-m", "benchmarks.capture"], env=os.environ | keeps, check=True)
        features()
        data_loader(folder)
        validation_epoch(folder)
        explain_loader(folder)
    peak_memory()
    peak_memory_of_explaining()


if __name__ == "__main__":
    main()
