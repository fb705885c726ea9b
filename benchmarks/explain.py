"""Explain the reference model; as a script, print the peak memory: ``python -m benchmarks.explain BATCHES``."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

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
    explain(module, batches[:4])  # warms up
    ratios: dict[str, list[float]] = {"explain_loader": [], "and a table": []}
    seconds = []
    for turn in range(6):
        with tempfile.TemporaryDirectory() as table:
            runs = {
                "predict": lambda: predict(module, batches),
                "explain_loader": lambda: explain(module, batches),
                "and a table": lambda table=table: explain(module, batches, Path(table)),
            }
            taken = {}
            for name in list(runs)[turn % 3 :] + list(runs)[: turn % 3]:  # none always goes first
                start = time.perf_counter()
                runs[name]()
                taken[name] = time.perf_counter() - start
        for name, of_name in ratios.items():
            of_name.append(taken[name] / taken["predict"])
        seconds.append(taken["predict"])
    print(f"explaining {len(batches) * BATCH} samples in batches of {BATCH}, reference model; predicting them = 1")
    for name, of_name in ratios.items():
        low, middle, high = statistics.quantiles(of_name, n=4)
        print(f"  {name:32}  {middle:6.3f}     (aim: at most 1.1), quartiles {low:.3f} and {high:.3f}")
    print(f"  predicting                        {statistics.median(seconds):6.2f} s")


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
