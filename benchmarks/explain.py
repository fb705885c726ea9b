"""Explain the reference model; as a script, print the peak memory: ``python -m benchmarks.explain BATCHES``."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import quartiles_of_ratios, times_in_turns
from benchmarks.validate import BATCH, one_batch
from lightning_xattn import ExplainabilityCapture
from lightning_xattn.hms import HMSLightningModule

SAMPLES = 2000


def predict(module: HMSLightningModule, batches: list[Any]) -> list[torch.Tensor]:
    """Plain prediction, as one would write it."""
    module.eval()
    with torch.no_grad():
        return [module.predict_step(batch, 0) for batch in batches]


def explain(module: HMSLightningModule, batches: list[Any], table: Path | None = None) -> None:
    ExplainabilityCapture(module).explain_loader(batches, table, progress=False)


def explain_loader(folder: Path) -> None:
    """Explaining 2,000 samples over predicting them, without a table and with one."""
    batch = one_batch(folder)
    module, batches = HMSLightningModule(), [batch] * -(-SAMPLES // BATCH)

    def with_table() -> None:
        with tempfile.TemporaryDirectory() as table:
            explain(module, batches, Path(table))

    predicting, explaining, tabulating = times_in_turns(
        lambda: predict(module, batches), lambda: explain(module, batches), with_table, repeats=6
    )
    print(f"explaining {len(batches) * BATCH} samples in batches of {BATCH}, reference model; predicting them = 1")
    for name, seconds in (("explain_loader", explaining), ("and a table", tabulating)):
        low, middle, high = quartiles_of_ratios(seconds, predicting)
        print(f"  {name:32}  {middle:6.3f}     (aim: at most 1.1), quartiles {low:.3f} and {high:.3f}")
    print(f"  predicting                        {statistics.median(predicting):6.2f} s")


def peak_memory_of_explaining() -> None:
    """Peak memory over 10 and over 100 batches; a process each, as the peak of one never falls."""
    print("peak memory of explaining, with a table (aim: the same for both)")
    for batches in (10, 100):
        command = [sys.executable, "-m", "benchmarks.explain", str(batches)]
        peak = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        print(f"  {batches:3d} batches                       {int(peak.stdout.split()[-1]):6d} MiB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        batch = one_batch(Path(temporary) / "hms")
        explain(HMSLightningModule(), [batch] * int(sys.argv[1]), Path(temporary) / "table")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
