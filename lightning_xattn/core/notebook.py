"""How a result shows itself in a notebook: asked for here, said by the report, which stands above all results."""

from __future__ import annotations

from functools import singledispatch


@singledispatch
def as_html(result: object) -> str | None:
    """HTML of a result; None of what has none: a notebook then shows its repr."""
    return None


class ShownInNotebooks:
    """A result that a notebook shows as HTML."""

    def _repr_html_(self) -> str | None:
        return as_html(self)
