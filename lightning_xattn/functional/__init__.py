"""Every number's one definition, as pure functions of tensors (see their docstrings)."""

from lightning_xattn.functional.alignment import (
    alignment,
    alignment_interaction,
    alignment_null,
    best_head_matching,
    head_alignment,
    head_alignment_matrix,
    round_trip_lift,
    standardised_maps,
)
from lightning_xattn.functional.heads import head_diversity, query_selectivity, require_heads, sink_strength
from lightning_xattn.functional.intervals import grouped_mean_interval, mean_interval
from lightning_xattn.functional.lift import lift, lift_map, received_lift
from lightning_xattn.functional.outcomes import (
    Separation,
    class_adjusted_gap,
    grouped_separation,
    score_bins,
    separation,
)
from lightning_xattn.functional.pairs import TopPair, head_top_pairs, sample_top_pairs, top_pairs
from lightning_xattn.functional.rows import (
    ROW_STATISTICS,
    Rows,
    crossing,
    has_single_keys,
    prepare_rows,
    row_statistics,
)
from lightning_xattn.functional.samples import sample_statistics

__all__ = [
    "ROW_STATISTICS",
    "Rows",
    "Separation",
    "TopPair",
    "alignment",
    "alignment_interaction",
    "alignment_null",
    "best_head_matching",
    "class_adjusted_gap",
    "crossing",
    "grouped_mean_interval",
    "grouped_separation",
    "has_single_keys",
    "head_alignment",
    "head_alignment_matrix",
    "head_diversity",
    "head_top_pairs",
    "lift",
    "lift_map",
    "mean_interval",
    "prepare_rows",
    "query_selectivity",
    "received_lift",
    "require_heads",
    "round_trip_lift",
    "row_statistics",
    "sample_statistics",
    "sample_top_pairs",
    "score_bins",
    "separation",
    "sink_strength",
    "standardised_maps",
    "top_pairs",
]
