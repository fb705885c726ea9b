"""What warnings, reports and figures say in the same words, and how they write numbers."""

from __future__ import annotations

SINGLE_KEY = "a single key, so every weight is 1 whatever the model learned"
"""Why such attention says nothing; reads on from "attend to", "with", or by itself."""

SINGLE_KEY_REMEDY = "To see attention, fuse token sequences: pool after the fusion, not before it."

SINGLE_KEYS = (
    f"attend to {SINGLE_KEY}. Entropy, selectivity and alignment are undefined and left out. {SINGLE_KEY_REMEDY}"
)
"""What is wrong with directions of single keys, and the remedy; follows their names."""

BROKEN_ROWS = (
    "have rows that are not finite or do not sum to 1: they are left out, and where none is left every number is "
    "undefined. Pass weights after the softmax and before any dropout, as of a model in eval mode."
)
"""What is wrong with weights that are not attention, and the remedy; follows their names."""


def decimal(value: float, digits: int = 2, signed: bool = False) -> str:
    """Write a number with so many digits after the point, never as -0.00.

    ``signed``: with a plus before what is not negative.
    """
    return f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}"
