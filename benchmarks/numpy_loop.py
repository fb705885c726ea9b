"""The statistics of a batch as one would write them in numpy, sample after sample: what the benchmark compares with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def entropy(weights: Array) -> Array:
    return -(weights * np.log(np.maximum(weights, 1e-12))).sum(-1)


def one_direction(weights: Array) -> list[Any]:
    """Row and head statistics of one sample, ``(heads, queries, keys)``."""
    heads, _, keys = weights.shape
    nats = entropy(weights)
    least = weights.min(1).max(-1)
    return [
        (nats / np.log(keys)).mean(-1),
        np.exp(nats).mean(-1),
        weights.max(-1).mean(-1),
        100 * (weights < 0.1).mean((-1, -2)),
        (entropy(weights.mean(1)) - nats.mean(-1)) / np.log(keys),
        ((entropy(weights.mean(0)) - nats.mean(0)) / min(np.log(heads), np.log(keys))).mean(),
        (least - 1 / keys) / (1 - 1 / keys),
    ]


def numpy_loop(there: Array, back: Array) -> list[Any]:
    """All per-sample numbers of a batch, ``(batch, heads, queries, keys)`` and its opposite."""
    numbers = []
    for x, y in zip(there, back.swapaxes(-1, -2), strict=True):
        numbers.append(
            [
                np.corrcoef(x.mean(0).ravel(), y.mean(0).ravel())[0, 1],
                *one_direction(x),
                *one_direction(y.swapaxes(-1, -2)),
            ]
        )
    return numbers
