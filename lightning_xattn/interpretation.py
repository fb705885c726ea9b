"""The guide's patterns and checklists under the name that they had; see ``lightning_xattn.guide``."""

from lightning_xattn.guide.interpretation import (
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
