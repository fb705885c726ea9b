"""What watching costs, as ratios measured side by side in one run: ``python -m benchmarks``."""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._pytree import tree_leaves

from benchmarks.capture import recording
from benchmarks.explain import explain_loader, peak_memory_of_explaining
from benchmarks.features import features
from benchmarks.figures import figures_and_report
from benchmarks.numpy_loop import numpy_loop
from benchmarks.timing import median_seconds, quartiles_of_ratios, times_in_turns
from benchmarks.validate import BATCH, balanced, one_batch, validate
from lightning_xattn import Attention, Direction
from lightning_xattn.evaluation.accumulators import LayerAccumulator
from lightning_xattn.evaluation.statistics import sample_statistics
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
    accumulator = LayerAccumulator.empty(first, tuple(sample_statistics(*first)), 6)

    def softmax() -> None:
        there.softmax(-1)
        back.softmax(-1)

    def numbers() -> None:
        sample_statistics(*(prepare_rows(attention) for attention in pair))

    def numbers_and_sums() -> None:
        rows = [prepare_rows(attention) for attention in pair]
        accumulator.add(rows, sample_statistics(*rows), classes, outcomes, tied)

    arrays = [attention.weights.numpy() for attention in pair]
    one, all_numbers, with_sums, vectors = median_seconds(
        softmax, numbers, numbers_and_sums, lambda: numpy_loop(*arrays), repeats=50
    )
    (loops,) = median_seconds(lambda: reference_loop(*(array[:1] for array in arrays)), repeats=3)
    size = sum(
        state.numel() * state.element_size() for state in tree_leaves(vars(accumulator)) if torch.is_tensor(state)
    )
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
        for weights in (x, y):
            reference.row_statistics(weights)
            reference.query_selectivity(weights)
            reference.head_diversity(weights)
            reference.sink_excess(weights)


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
    batch = one_batch(folder)
    module = balanced(HMSLightningModule(), batch)
    validate(module, [batch] * 4, contribution_samples=128)  # warms up
    print(f"validation epoch in batches of {BATCH}, reference model, figures off; without callback = 1")
    for batches, repeats, aim in ((15, 8, 1.30), (31, 6, 1.15), (125, 3, 1.05)):
        # Of fewer than 128 samples the attention is not tested, which a fit does every ten epochs.
        runs = [partial(validate, module, [batch] * batches, samples) for samples in (None, 0, 127, 128)]
        plain, alone, contributing, testing = times_in_turns(*runs, repeats=repeats)
        print(f"  {batches * BATCH} samples, without the callback {statistics.median(plain):6.2f} s")
        for name, times, of in (("no contribution", alone, 1.05), ("127 contributions", contributing, aim)):
            low, middle, high = quartiles_of_ratios(times, plain)
            print(f"    {name:19} {middle:6.3f}  (aim: at most {of:.2f}), quartiles {low:.3f} and {high:.3f}")
        more = statistics.median(testing) - statistics.median(contributing)
        print(f"    testing the attention takes {more:.1f} s more")


def peak_memory() -> None:
    """Peak memory over 2,000 and 20,000 samples; a process each, as the peak of one never falls."""
    print("peak memory of validating with the callback (aim: the same for both, but for what is kept to be read)")
    for batches in (63, 625):
        command = [sys.executable, "-m", "benchmarks.validate", str(batches)]
        peak = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        print(f"  {batches * BATCH:6d} samples                    {int(peak.stdout.split()[-1]):6d} MiB")


def main() -> None:
    """Run all of them; about half an hour."""
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
        figures_and_report(folder)
    peak_memory()
    peak_memory_of_explaining()


if __name__ == "__main__":
    main()
