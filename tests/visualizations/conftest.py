"""What the tests of figures draw: axes, maps and outcomes."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_xattn.attention import TokenAxis
from lightning_xattn.functional import separation
from lightning_xattn.visualizations import OutcomeSummary, plot_outcome_alignment

EEG = TokenAxis("EEG window (s from the labelled moment)", spans=[(5 * i - 25, 5 * i - 15) for i in range(9)])
SPEC = TokenAxis("spectrogram window (s from the labelled moment)", spans=[(5 * i, 5 * i + 10) for i in range(119)])
REGIONS = TokenAxis("region", names=["LL", "RL", "LP", "RP"])
LONG_REGIONS = TokenAxis(
    "EEG region", names=["left lateral", "right lateral", "left parasagittal", "right parasagittal"]
)
EDGES = np.linspace(-1, 1, 2**14 + 1)


def make_maps(*shape: int) -> NDArray[np.float64]:
    logits = np.random.default_rng(0).normal(size=shape)
    weights = np.exp(2 * logits)
    return weights / weights.sum(-1, keepdims=True)


def summary(scores: list[NDArray[np.float64]]) -> OutcomeSummary:
    """What the accumulators would say of these scores, given by class."""
    together = np.concatenate(scores)
    return OutcomeSummary(
        histogram=np.histogram(together, EDGES)[0],
        mean=together.mean() if together.size else np.nan,
        class_means=[s.mean() if s.size else np.nan for s in scores],
        class_stds=[s.std(ddof=1) if s.size > 1 else np.nan for s in scores],
        class_counts=[s.size for s in scores],
    )


def make_outcome(mean: float, classes: int, seed: int) -> OutcomeSummary:
    rng = np.random.default_rng(seed)
    return summary([rng.normal(mean, 0.1, 20 + i) for i in range(classes)])


def make_alignment(correct: OutcomeSummary, incorrect: OutcomeSummary, names: list[str], context: str = "") -> Figure:
    told = separation(torch.as_tensor(correct.histogram), torch.as_tensor(incorrect.histogram))
    auroc = (told.auroc, told.low, told.high)
    return plot_outcome_alignment(correct, incorrect, EDGES, auroc, names, context=context)
