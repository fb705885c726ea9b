"""Every number that describes one sample's attention in one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xattn.functional.alignment import alignment, alignment_interaction
from lightning_xattn.functional.heads import head_diversity, query_selectivity, sink_strength
from lightning_xattn.functional.rows import ROW_STATISTICS, Rows, crossing

HEADLINE_ROWS = ("entropy", "max", "sparsity", "effective_keys")
"""The row statistics that are followed by sample; the others are for looking at single maps."""


def sample_statistics(forward: Rows, backward: Rows | None = None) -> dict[str, Tensor]:
    """All per-sample numbers of a layer, by name; each ``(batch,)``, NaN where undefined.

    Returns
    -------
    dict
        ``alignment``, ``interaction`` (head mean of the ``alignment_interaction``; undefined when the directions
        differ in heads), ``entropy`` (mean over the directions), ``invalid_rows`` (a count), and for each direction
        ``<direction>/entropy|max|sparsity|effective_keys|query_selectivity|head_diversity`` (means over rows, then
        heads), of a joint sequence ``<direction>/crossing`` too, and ``<direction>/entropy|sink|broken/head_<i>``
        (broken: a count of rows). ``alignment`` and ``interaction`` need both directions.
    """
    directions = (forward,) if backward is None else (forward, backward)
    statistics: dict[str, Tensor] = {}
    if backward is not None:
        statistics["alignment"] = alignment(forward, backward)
        if forward.weights.shape[1] == backward.weights.shape[1]:
            statistics["interaction"] = alignment_interaction(forward, backward).nanmean(1)
    for rows in directions:
        by_head = {name: ROW_STATISTICS[name](rows) for name in HEADLINE_ROWS}
        for name, values in by_head.items():
            statistics[f"{rows.direction}/{name}"] = values.nanmean(1)
        statistics[f"{rows.direction}/query_selectivity"] = query_selectivity(rows).nanmean(1)
        statistics[f"{rows.direction}/head_diversity"] = head_diversity(rows)
        if rows.crossing is not None:
            statistics[f"{rows.direction}/crossing"] = crossing(rows).nanmean(1)
        heads = {"entropy": by_head["entropy"], "sink": sink_strength(rows), "broken": rows.broken.sum(2)}
        for name, values in heads.items():
            for head, of_head in enumerate(values.unbind(1)):
                statistics[f"{rows.direction}/{name}/head_{head}"] = of_head
    entropies = [statistics[f"{rows.direction}/entropy"] for rows in directions]
    statistics["entropy"] = sum(entropies[1:], entropies[0]) / len(entropies)
    statistics["invalid_rows"] = torch.stack([(~rows.valid).sum((1, 2)) for rows in directions]).sum(0)
    return statistics
