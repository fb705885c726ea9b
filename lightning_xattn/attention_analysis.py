"""Where the guide imports its analyser from; see ``lightning_xattn.guide``."""

from lightning_xattn.guide.attention_analysis import (
    AttentionAnalyzer,
    HeadAnalysis,
    compute_modality_alignment,
    extract_attention_statistics,
    head_wise_attention_analysis,
)
from lightning_xattn.results import AttentionStatistics

__all__ = [
    "AttentionAnalyzer",
    "AttentionStatistics",
    "HeadAnalysis",
    "compute_modality_alignment",
    "extract_attention_statistics",
    "head_wise_attention_analysis",
]
