"""A report as one HTML file that needs nothing beside it: the card, what it means, then folded sections."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from lightning_xattn.core.names import clean
from lightning_xattn.core.wording import decimal, percent
from lightning_xattn.report.document import TEMPLATES, Block, Document, Picture

NUMBERS = ("support", "confidence", "alignment")
"""The numbers by which samples can be sorted, beside their order."""


@dataclass(frozen=True)
class SampleEntry:
    """A sample in the list."""

    place: int
    name: str
    """The sample's id, or its place."""
    predicted: str
    true: str
    """Empty where it is not known."""
    outcome: str
    """"correct", "incorrect", or empty."""
    numbers: Mapping[str, float]
    """The known ones of ``NUMBERS``; NaN where undefined."""
    supported_by: str = ""
    """The name of its cell of support; empty where it is not known."""
    blocks: Sequence[Block] = ()
    pictures: Sequence[Picture] = ()


def as_page(
    document: Document,
    samples: Sequence[SampleEntry],
    *,
    card: Picture | None = None,
    scale: tuple[float, float] | None = None,
) -> str:
    """The report as HTML.

    Parameters
    ----------
    document
        The report. Its first section is open, the others are folded; one of them has the samples.
    samples
        The samples to filter and to sort; the page lists the lowest support first, then the lowest confidence.
    card
        The picture beside the first section.
    scale
        The lifts of the darkest and the brightest colour of all maps; None without maps.
    """
    opening, *sections = document.sections
    whole = [one for name in NUMBERS for one in [f"{name} up", f"{name} down"] if _is_known(name, samples)]
    ends = {"up": "lowest first", "down": "highest first"}
    first = [name for name in NUMBERS[:2] if _is_known(name, samples)]
    orders = {"rank up": ", then ".join(first)} if first else {}
    orders["place up"] = "order of the data"
    orders |= {one: f"{one.split()[0]}, {ends[one.split()[1]]}" for one in whole}
    numbers = [name for name in NUMBERS if _is_known(name, samples)]
    has = {name: _list_options(getattr(one, name) for one in samples) for name in ("true", "outcome", "supported_by")}
    classes = 1 + bool(has["true"])
    fixed = [5.0] * bool(has["outcome"]) + [10.5] * bool(has["supported_by"]) + [6.0] * len(numbers)
    columns = ["minmax(7rem, 2fr)", *["minmax(5rem, 1fr)"] * classes, *(f"{width}rem" for width in fixed)]
    return _PAGE.get_template("page.html.jinja").render(
        title=document.title,
        opening=opening,
        sections=sections,
        card=card,
        samples=sorted(samples, key=_rank),
        scale=scale,
        numbers=numbers,
        has=has,
        orders=orders,
        columns=" ".join(columns),
        width=8 + 5 * classes + sum(fixed) + len(columns),
        nan=math.nan,
        seen=[],
    )


def describe_order(samples: Sequence[SampleEntry]) -> str:
    """How many samples a page lists, and in which order."""
    if not samples:
        return "none listed"
    known = [name for name in NUMBERS[:2] if _is_known(name, samples)]
    return f"{len(samples)}" + (f", lowest {' and '.join(known)} first" if known else "")


def _rank(one: SampleEntry) -> tuple[float, float, int]:
    """The most suspicious predictions come first: the least supported, then the least confident."""
    numbers = (one.numbers.get(name, math.nan) for name in ("support", "confidence"))
    support, confidence = (math.inf if math.isnan(number) else number for number in numbers)
    return support, confidence, one.place


def _is_known(name: str, samples: Iterable[SampleEntry]) -> bool:
    return any(math.isfinite(one.numbers.get(name, math.nan)) for one in samples)


def _list_options(values: Iterable[str]) -> dict[str, str]:
    """What a filter offers; empty where nothing is known."""
    known = {value: value for value in values if value}
    return {"": "all"} | known if known else {}


def _group_pictures(blocks: Iterable[Block]) -> Iterator[tuple[bool, list[Block]]]:
    """Runs of pictures, which stand beside each other, and of other blocks."""
    for is_picture, run in groupby(blocks, lambda one: isinstance(one, Picture)):
        yield is_picture, list(run)


def _write_number(value: Any) -> str:
    """A number for the script; empty where it is undefined."""
    return str(value) if math.isfinite(value) else ""


def _finalize(value: Any) -> Any:
    """A text without what a browser would obey; autoescape does the rest."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_PAGE = Environment(**TEMPLATES, autoescape=True, finalize=_finalize)
_PAGE.filters |= {
    "unbroken": lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%"),
    "base64": lambda content: Markup(base64.b64encode(content).decode()),
    "groupby_run": _group_pictures,
    "decimal": lambda value: decimal(value) if math.isfinite(value) else "",
    "percent": lambda value: percent(value, 0) if math.isfinite(value) else "",
    "number": _write_number,
}
