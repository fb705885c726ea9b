"""What the callback and the explainer both do with a batch: add it to the sums of its layers, and give its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning_xattn.aggregation import LayerAccumulator, Layout
from lightning_xattn.attention import AttentionPair
from lightning_xattn.functional import prepare_rows, sample_statistics
from lightning_xattn.grouping import group_samples, sample_columns
from lightning_xattn.labels import Labels


def add_batch(
    accumulators: dict[str, LayerAccumulator],
    pairs: Sequence[AttentionPair],
    labels: Labels,
    group_by: str,
    n_classes: int,
) -> Iterator[dict[str, Any]]:
    """Add a batch to the accumulators of its layers, layer after layer.

    Parameters
    ----------
    accumulators
        By layer; that of a layer which has none yet is made.
    pairs
        The attention of each layer.
    labels
        Of the same samples.
    group_by
        One of ``GROUPINGS``.
    n_classes
        Number of classes; 0 when there are none.

    Yields
    ------
    dict
        The layer's columns of the sample table, ``layer`` among them.
    """
    like = pairs[0].forward.weights
    classes, outcomes, tied = group_samples(labels, group_by, n_classes, like)
    for pair in pairs:
        rows = [prepare_rows(attention) for attention in pair.directions]
        statistics = sample_statistics(*rows)
        if pair.layer not in accumulators:
            accumulators[pair.layer] = LayerAccumulator(
                Layout.of(rows, statistics, n_classes, labels.group_noun), like.device
            )
        accumulators[pair.layer].update(rows, statistics, classes, outcomes, tied, labels.groups)
        yield sample_columns(labels, outcomes, tied, statistics) | {"layer": pair.layer}
