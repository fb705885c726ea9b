"""Why numbers of attention are undefined."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_xattn.core.wording import SINGLE_KEY
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import AttentionStatistics, ExplainedBatch, SampleResult
from lightning_xattn.evaluation.statistics import ALIGNMENT, Column

NO_ROW = "no valid row (all are padding, fully masked or not finite)"
ONE_DIRECTION = "only one direction of attention is recorded"
NO_VARIATION = "a map that does not vary over the cells which both directions share, as uniform attention"
NO_NULL = "it needs two samples with an alignment, and all of the same tokens"


def first_layer(statistics: Mapping[str, AttentionStatistics]) -> dict[str, AttentionStatistics]:
    """The statistics of the first layer; those of further ones are called ``<layer>/<direction>``."""
    layer = next(iter(statistics)).rpartition("/")[:2]
    return {name: of_one for name, of_one in statistics.items() if name.rpartition("/")[:2] == layer}


def undefined_directions(statistics: Mapping[str, AttentionStatistics]) -> dict[str, str]:
    """By direction, why its entropy is undefined."""
    # Each valid row has a mean, and each with two keys has an entropy.
    return {
        name: NO_ROW if math.isnan(of_one.mean) else SINGLE_KEY
        for name, of_one in statistics.items()
        if math.isnan(of_one.entropy)
    }


def undefined_in_sample(sample: SampleResult) -> dict[str, str]:
    """Why the statistics of a direction, or ``modality_agreement``, are undefined in a sample."""
    found = undefined_directions(sample["attention_stats"])
    if math.isnan(sample["modality_agreement"]):
        layer = first_layer(sample["attention_stats"])
        reasons = [*undefined_directions(layer).values(), NO_VARIATION]
        found["modality_agreement"] = ONE_DIRECTION if len(layer) < 2 else reasons[0]
    return found


def undefined_in_batch(results: ExplainedBatch | dict[str, Any]) -> dict[str, str]:
    """Why the statistics of a direction, or ``modality_alignment``, are undefined in a batch."""
    found = undefined_directions(results["attention_stats"])
    if math.isnan(results["modality_alignment"]):
        reasons = {undefined_in_sample(one).get("modality_agreement", "") for one in results["per_sample_explanations"]}
        found["modality_alignment"] = "; ".join(sorted(reasons)) or "no samples"
    return found


def undefined_in_layer(summary: LayerSummary) -> dict[str, str]:
    """Why a layer's directions are undefined in some samples, or its alignment, or its ``alignment_null``."""
    found = {}
    for direction in summary.heads:
        rows, entropies = (summary.count(Column(name, direction)) for name in ("max", "entropy"))
        reasons = ((rows - entropies, SINGLE_KEY), (summary.samples - rows, NO_ROW))
        parts = [f"{count} of {summary.samples} samples with {reason}" for count, reason in reasons if count]
        if parts:
            found[str(direction)] = "; ".join(parts)
    if ALIGNMENT not in summary.columns:
        found["alignment"] = ONE_DIRECTION
    elif math.isnan(summary.alignment_null):
        found["alignment_null"] = NO_NULL
    return found
