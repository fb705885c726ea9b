"""All statistics of a batch, added to an epoch's sums, over a softmax or a hand-written attention of the same size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.table import Benchmark, Measured, plan
from benchmarks.timing import quartiles_of_ratios, times_within
from lightning_xattn import Attention, Direction
from lightning_xattn.core.scores import Scores
from lightning_xattn.evaluation.accumulators import LayerAccumulator
from lightning_xattn.evaluation.statistics import sample_statistics
from lightning_xattn.functional import prepare_layer

CLASSES, WIDTH = 6, 64
SMALL, MIDDLE, TINY = (32, 8, 9, 119), (8, 8, 512, 512), (64, 1, 12, 8)
"""Samples, heads, tokens of one modality, and of the other. A head is ``WIDTH`` wide."""


def make_sums(make_pair: Callable[[], Sequence[Attention]]) -> Callable[[], None]:
    """What the callback does with a batch's attention: all statistics, added to the sums of an epoch.

    The one place in the benchmarks that knows how the package computes them.
    """
    pair = make_pair()
    samples = len(pair[0])
    classes, outcomes = torch.arange(samples) % CLASSES, torch.arange(samples) % 2
    tied = torch.zeros(samples, dtype=torch.bool)
    first = prepare_layer(*pair)
    sums = LayerAccumulator.empty(first, sample_statistics(first).columns, CLASSES)

    def add() -> None:
        layer = prepare_layer(*make_pair())
        sums.add(layer, sample_statistics(layer), classes, outcomes, tied)

    return add


def attend(queries: Tensor, keys: Tensor) -> Tensor:
    """The weights of an attention."""
    return (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(-1)


def _make_pair(sources: Sequence[Tensor | Scores]) -> list[Attention]:
    direction = Direction("eeg", "spec")
    return [Attention(one, source) for one, source in zip((direction, direction.opposite), sources, strict=True)]


def _compare(seconds: float, shape: tuple[int, int, int, int], from_weights: bool) -> list[Measured]:
    """The quartiles of all statistics of both directions over what a softmax, or an attention, takes."""
    samples, heads, first, second = shape
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(samples, heads, n, WIDTH, generator=generator) for n in (first, second))
    scores = [a @ b.transpose(-1, -2) * WIDTH**-0.5 for a, b in ((one, other), (other, one))]
    weights = [each.softmax(-1) for each in scores]

    def softmax() -> None:
        for each in scores:
            each.softmax(-1)

    def attention() -> None:
        attend(one, other) @ other
        attend(other, one) @ one

    asked = [Scores(a * WIDTH**-0.5, b) for a, b in ((one, other), (other, one))]
    pair = partial(_make_pair, weights if from_weights else asked)
    plain, ours = times_within(seconds, softmax if from_weights else attention, make_sums(pair))
    milliseconds = f"{1000 * sorted(ours)[len(ours) // 2]:.1f} ms a batch"
    return [Measured(quartiles_of_ratios(ours, plain), len(plain), milliseconds)]


def _of(model: str, shape: tuple[int, int, int, int], from_weights: bool = True) -> Benchmark:
    size = " x ".join(map(str, shape))
    of = "" if from_weights else ", from queries and keys"
    over = "a softmax of both directions" if from_weights else "a hand-written attention of both directions"
    row = plan(model, f"statistics and sums of a batch of {size}{of}", over, f"both directions, {CLASSES} classes")
    return Benchmark((row,), partial(_compare, shape=shape, from_weights=from_weights), seconds=6)


BENCHMARKS = (_of("small", TINY), _of("small", SMALL), _of("middle", MIDDLE), _of("middle", MIDDLE, from_weights=False))
