"""Every number's one definition, as pure functions of tensors (see their docstrings)."""

from lightning_xattn.functional.agreement import *
from lightning_xattn.functional.faithfulness import *
from lightning_xattn.functional.intervals import *
from lightning_xattn.functional.outcomes import *
from lightning_xattn.functional.pairs import *
from lightning_xattn.functional.probe import *
from lightning_xattn.functional.rows import *
from lightning_xattn.functional.shapley import *

__all__ = [
    "ROW_STATISTICS",
    "Estimate",
    "Game",
    "Permutation",
    "Rows",
    "Separation",
    "TopPair",
    "additive_fit",
    "additive_projection",
    "alignment",
    "alignment_null",
    "best_head_matching",
    "class_adjusted_gap",
    "conflict",
    "contribution_shares",
    "cross_fitted_probe",
    "cross_modal_mass",
    "discriminant",
    "effective_keys",
    "effective_share",
    "entropy",
    "grouped_mean_interval",
    "grouped_proportion_interval",
    "has_single_keys",
    "head_alignment_matrix",
    "head_diversity",
    "head_top_pairs",
    "lift",
    "lift_map",
    "max_weight",
    "mean",
    "mean_interval",
    "min_weight",
    "only_probe_right",
    "partner_shifts",
    "permuted_subsets",
    "play",
    "pooled_tokens",
    "prepare_rows",
    "project",
    "query_selectivity",
    "ranking_gain",
    "received_attention",
    "received_lift",
    "replacements",
    "require_heads",
    "row_statistics",
    "sample_top_pairs",
    "separation",
    "sink",
    "sparsity",
    "standardised_maps",
    "std",
    "support_difference",
    "top_pairs",
    "within",
]
