"""The guide's patterns and checklists for one sample; the report states them too."""

from lightning_xattn.report.criteria import (
    AGREEING,
    DIFFUSE,
    DISAGREEING,
    FOCUSED,
    IF_CORRECT,
    IF_INCORRECT,
    PATTERNS,
    Criterion,
    interpret_sample,
)

__all__ = [
    "AGREEING",
    "DIFFUSE",
    "DISAGREEING",
    "FOCUSED",
    "IF_CORRECT",
    "IF_INCORRECT",
    "PATTERNS",
    "Criterion",
    "interpret_sample",
]
