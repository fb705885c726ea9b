"""Peak memory and time of a validation in a process of its own, with the callback and without.

``python -m benchmarks.memory CASE SETTINGS`` prints MiB and seconds of one: a case of `CASES`, a name of `SETTINGS`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import models
from benchmarks.table import Benchmark, Measured, Row, plan
from benchmarks.timing import LEAST_TURNS, quartiles
from lightning_xattn import AttentionExplainabilityCallback

SECONDS, GIGABYTES = 90, 12
"""A process that takes more than this is ended, and its rows say so."""

SETTINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "without_figures": {"figures_every_n_epochs": 0},
    "alone": {"figures_every_n_epochs": 0, "contribution_samples": 0},
    "defaults": {},
}


def _long() -> tuple[models.TwoStreams, TensorDataset, int]:
    data = torch.randn(8, 4096, 3), torch.randn(8, 2048, 2), torch.arange(8) % 3
    return models.TwoStreams(8, 4, 3, need_weights=False), TensorDataset(*data), 4


def _very_long() -> tuple[models.TwoStreams, TensorDataset, int]:
    data = torch.randn(2, 16384, 3), torch.randn(2, 16384, 2), torch.arange(2)
    return models.TwoStreams(8, 1, 3, need_weights=False), TensorDataset(*data), 1


def _many_classes() -> tuple[models.TwoStreams, TensorDataset, int]:
    """Some classes have many samples and most have few, so that there are probes."""
    classes, samples = 10_000, 20_000
    target = (classes ** torch.rand(samples) - 1).long().clamp(0, classes - 1)
    audio = torch.randn(classes, 3)[target][:, None] + torch.randn(samples, 8, 3)
    data = audio, torch.randn(samples, 6, 2), target
    return models.TwoStreams(16, 2, classes, need_weights=True), TensorDataset(*data), 64


CASES: dict[str, Callable[[], tuple[models.TwoStreams, TensorDataset, int]]] = {
    "long": _long,
    "very_long": _very_long,
    "many_classes": _many_classes,
}
"""Make a model, its samples and the batch size."""


class Cost(NamedTuple):
    """Of a process: its peak memory in MiB, and the seconds of its validation."""

    peak: float
    seconds: float


def read_peak() -> float:
    """Read the peak memory of this process in MiB.

    Not ``ru_maxrss``, which begins with that of the process that started it.
    """
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def run(case: str, settings: str) -> Cost | str:
    """The cost of one validation, or why it has none."""
    command = [sys.executable, "-m", "benchmarks.memory", case, settings]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"takes more than {SECONDS} s"
    if done.returncode:
        return f"takes more than {GIGABYTES} GB, or fails: {done.stderr.strip().splitlines()[-1][:100]}"
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def _measure(seconds: float, case: str, watched: tuple[str, ...], tells_more: bool) -> list[Measured] | str:
    """Peak memory and time of each of some settings over those without the callback."""
    turns: list[list[Cost]] = []
    end = time.perf_counter() + seconds
    while len(turns) < LEAST_TURNS or time.perf_counter() < end:
        turn: list[Cost] = []
        for one in ("plain", *watched):
            cost = run(case, one)
            if isinstance(cost, str):
                return cost
            turn.append(cost)
        turns.append(turn)
    found = []
    for i in range(1, len(watched) + 1):
        plain, ours = ([turn[place] for turn in turns] for place in (0, i))
        peaks = f"{_median([one.peak for one in ours]):,.0f} over {_median([one.peak for one in plain]):,.0f} MiB"
        if tells_more:
            peak = quartiles([a.peak - b.peak for a, b in zip(ours, plain, strict=True)])
        else:
            peak = quartiles([a.peak / b.peak for a, b in zip(ours, plain, strict=True)])
        slower = quartiles([a.seconds / b.seconds for a, b in zip(ours, plain, strict=True)])
        times = f"{_median([one.seconds for one in ours]):.1f} over {_median([one.seconds for one in plain]):.1f} s"
        found += [Measured(peak, len(turns), peaks), Measured(slower, len(turns), times)]
    return found


def _median(values: list[float]) -> float:
    return quartiles(values)[1]


def _plan(model: str, what: str, conditions: str, unit: str = "") -> tuple[Row, Row]:
    over = "the same without the callback"
    peak = plan(model, f"validate {what}: peak memory{' added' if unit else ''}", over, conditions, unit)
    return peak, plan(model, f"validate {what}: time", over, conditions)


BENCHMARKS = (
    Benchmark(
        _plan("long", "4,096 x 2,048 tokens", "8 samples in batches of 4, 4 heads, figures off"),
        partial(_measure, case="long", watched=("without_figures",), tells_more=False),
        seconds=30,
    ),
    Benchmark(
        _plan("long", "16,384 x 16,384 tokens", "2 samples in batches of 1, 1 head, figures off", "MiB"),
        partial(_measure, case="very_long", watched=("without_figures",), tells_more=True),
        seconds=30,
    ),
    Benchmark(
        (
            *_plan("many classes", "10,000 classes, attention and probes", "20,000 samples in batches of 64"),
            *_plan("many classes", "10,000 classes, defaults", "20,000 samples in batches of 64"),
        ),
        partial(_measure, case="many_classes", watched=("alone", "defaults"), tells_more=False),
        seconds=30,
    ),
)


def main(case: str, settings: str) -> None:
    """Print the cost of one validation."""
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES * 2**30, resource.RLIM_INFINITY))
    torch.manual_seed(0)
    module, samples, batch = CASES[case]()
    chosen = SETTINGS[settings]
    callbacks = () if chosen is None else (AttentionExplainabilityCallback(**chosen),)
    with models.quietly(), tempfile.TemporaryDirectory() as folder:
        trainer = models.make_trainer(*callbacks, default_root_dir=folder)
        start = time.perf_counter()
        trainer.validate(module, DataLoader(samples, batch), verbose=False)
        seconds = time.perf_counter() - start
    for callback in callbacks:  # which goes on where it cannot record, as it should in a run
        if not callback.history:
            raise RuntimeError("nothing was recorded")
    print(json.dumps([read_peak(), seconds]))


if __name__ == "__main__":
    main(*sys.argv[1:])
