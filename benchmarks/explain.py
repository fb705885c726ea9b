"""Explaining a data set over predicting it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import models, prepared
from benchmarks.table import Benchmark, Measured, plan
from benchmarks.timing import quartiles_of_ratios, times_within
from lightning_xattn import ExplainabilityCapture


def _measure(seconds: float) -> list[Measured]:
    """``explain_loader`` without contributions and with a table, over plain prediction."""
    module, batches = prepared.reference_model().eval(), prepared.reference_batches()

    def predict() -> list[torch.Tensor]:
        with torch.no_grad():
            return [module.predict_step(batch, 0) for batch in batches]

    def explain(**settings: Any) -> None:
        with models.quietly(), tempfile.TemporaryDirectory() as table:
            explainer = ExplainabilityCapture(module, **settings)
            explainer.explain_loader(batches, Path(table), progress=False)

    plain, *ours = times_within(seconds, predict, lambda: explain(contribution_samples=0), explain)
    return [Measured(quartiles_of_ratios(one, plain), len(plain)) for one in ours]


_SAMPLES = f"the reference model's {prepared.RECORDINGS} recordings in batches of {prepared.BATCH}"

BENCHMARKS = (
    Benchmark(
        (
            plan("middle", "explain_loader: attention and probes, a table", "predicting the samples", _SAMPLES),
            plan("middle", "explain_loader: defaults, a table", "predicting the samples", _SAMPLES),
        ),
        _measure,
        seconds=20,
    ),
)
