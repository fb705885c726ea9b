"""How much of a large table is computed at once, and how much of it is kept."""

from __future__ import annotations

CELLS = 2**20
"""So many numbers of samples x classes are computed at once: 8 MB in float64."""

KEPT_CELLS = 2**23
"""So many are kept where they are needed again: 64 MB; where there are more, they are computed again."""


def rows_at_once(columns: int) -> int:
    """How many rows of a table with so many columns are computed at once, at least one."""
    return max(1, CELLS // max(1, columns))
