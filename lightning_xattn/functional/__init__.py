"""Every number's one definition, as pure functions of tensors (see their docstrings)."""

from lightning_xattn.functional.directions import *
from lightning_xattn.functional.discriminant import *
from lightning_xattn.functional.error_detection import *
from lightning_xattn.functional.faithfulness import *
from lightning_xattn.functional.heads import *
from lightning_xattn.functional.intervals import *
from lightning_xattn.functional.linear_probe import *
from lightning_xattn.functional.outcomes import *
from lightning_xattn.functional.pairs import *
from lightning_xattn.functional.pooling import *
from lightning_xattn.functional.probe import *
from lightning_xattn.functional.ranking import *
from lightning_xattn.functional.row_collector import Rows
from lightning_xattn.functional.rows import *
from lightning_xattn.functional.shapley import *
from lightning_xattn.functional.support import *
from lightning_xattn.functional.temperature import *

__all__ = [
    "ROW_STATISTICS",
    "AddedValue",
    "Comparison",
    "Estimate",
    "Game",
    "LayerRows",
    "LinearProbe",
    "Permutation",
    "Rows",
    "ScoredSamples",
    "Separation",
    "TopPair",
    "added_value",
    "additive_fit",
    "additive_projection",
    "alignment",
    "alignment_null",
    "assign_folds",
    "auroc_influence",
    "best_head_matching",
    "calibration_error",
    "class_adjusted_gap",
    "conflict",
    "contribution_shares",
    "count_groups",
    "cross_fitted_probe",
    "cross_fitted_probes",
    "cross_modal_mass",
    "discriminant",
    "discriminant_of_few",
    "effective_keys",
    "effective_share",
    "entropy",
    "error_probabilities",
    "estimate_by_influence",
    "fit_probes",
    "grouped_mean_interval",
    "grouped_proportion_interval",
    "has_single_keys",
    "head_alignment_matrix",
    "head_diversity",
    "head_top_pairs",
    "influence_interval",
    "inverse_temperature",
    "inverse_temperatures",
    "lift",
    "lift_map",
    "macro_auroc_by_class",
    "macro_auroc_influence",
    "max_weight",
    "mean",
    "mean_interval",
    "min_weight",
    "partner_shifts",
    "permuted_subsets",
    "play",
    "pooled_tokens",
    "prepare_layer",
    "prepare_rows",
    "project",
    "query_selectivity",
    "ranking_gain",
    "received_attention",
    "received_lift",
    "replacements",
    "require_heads",
    "right_cells",
    "risk_coverage",
    "row_statistics",
    "sample_top_pairs",
    "separation",
    "shannon_entropy",
    "sink",
    "sink_excess",
    "sparsity",
    "std",
    "student_quantile",
    "support",
    "support_cells",
    "supports",
    "top_pairs",
    "within",
]
