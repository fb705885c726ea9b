"""The attention card: alignment and entropy of classes and outcomes, and each class's mean map, on one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from lightning_xattn.core.attention import TokenAxis
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.functional.intervals import MINIMUM_GROUP, Estimate
from lightning_xattn.visualizations.class_maps import draw_class_maps
from lightning_xattn.visualizations.drawing import LOOKS, NULL, Look, per_group, shorten, text_inches
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pages import LINE, MARGIN, PAGE_WIDTH, RIGHT, SMALL, TICK, Page
from lightning_xattn.visualizations.plots import ticks_between, write_ticks

_ROW = 0.18  # inches
_GAP = 0.2
_LONGEST = 22  # characters of a class's name
_INK: dict[str, Any] = {"color": "black", "linewidth": 0.8}
_CLASS = Look("black", True, "-", "o")


class Measure(NamedTuple):
    """A number of the attention, of each class and of each outcome.

    Examples
    --------
    >>> classes = [Estimate(0.5, 0.4, 0.6, count=40), Estimate(0.3, 0.2, 0.4, count=30)]
    >>> outcomes = [Estimate(0.5, 0.4, 0.6, count=50), Estimate(0.2, 0.1, 0.3, count=20)]  # correct, incorrect
    >>> Measure("alignment", classes, outcomes, null=0.1).title
    'alignment'
    """

    title: str
    classes: Sequence[Estimate]
    outcomes: Sequence[Estimate]
    """Of correct and of incorrect predictions."""
    null: float = math.nan
    """What it would be between different samples; NaN: not known."""


def plot_attention_card(
    measures: Sequence[Measure],
    maps: Mapping[str, ArrayLike],
    counts: ArrayLike,
    class_names: Sequence[str],
    *,
    map_names: Sequence[str] | None = None,
    axes: Mapping[str, TokenAxis] | None = None,
    tokens: Mapping[str, tuple[int, int]] | None = None,
    classes_by: str | None = "target",
    group_noun: str | None = None,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw up to three numbers of the attention by class and outcome, with 95 % CI, and below the mean maps.

    Parameters
    ----------
    measures
        At most three, side by side; empty: maps alone.
    maps, counts
        As ``draw_class_maps`` takes them; no maps: numbers alone.
    class_names
        A name for each class of the measures.
    map_names
        What each map is of; None: of the classes.
    axes, tokens
        As ``draw_class_maps`` takes them.
    classes_by
        What the classes are: ``"target"`` (true class), ``"prediction"`` (predicted class) or None (no classes).
    group_noun
        What the intervals are by, such as ``"patients"``; None: by sample.
    context
        Where the numbers come from, e.g. ``"val, epoch 3"``.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    ShapeError
        If a measure has not an estimate for each class and each outcome, or the maps do not fit, see
        ``draw_class_maps``.
    SettingError
        If there are neither measures nor maps, ``classes_by`` is none of these, or the suffix of ``save_path`` is not
        one.

    Examples
    --------
    >>> classes = [Estimate(0.5, 0.4, 0.6, count=40), Estimate(0.3, 0.2, 0.4, count=30)]
    >>> outcomes = [Estimate(0.5, 0.4, 0.6, count=50), Estimate(0.2, 0.1, 0.3, count=20)]
    >>> maps = {"image_to_text": torch.randn(2, 9, 12).softmax(-1)}
    >>> measures = [Measure("alignment", classes, outcomes)]
    >>> figure = plot_attention_card(measures, maps, [40, 30], ["cat", "dog"], save_path="attention.png")
    >>> Path("attention.png").is_file()
    True
    """
    if not measures and not maps:
        raise SettingError("At least one measure or map is needed; got none.")
    for one in measures:
        if (len(one.classes), len(one.outcomes)) != (len(class_names), len(LOOKS)):
            raise ShapeError(
                f"'{one.title}' must have {len(class_names)} classes and {len(LOOKS)} outcomes (correct, incorrect); "
                f"got {len(one.classes)} and {len(one.outcomes)}."
            )
    page = Page(f"Attention{per_group(classes_by)}{' and outcome' if measures else ''}", context)
    if measures:
        _draw_measures(page, measures, class_names, group_noun)
    if maps:
        page.skip(0.06)
        page.put_text(MARGIN, page.used, "Mean attention maps", weight="bold", va="top")
        page.skip(LINE + 0.03)
        draw_class_maps(page, maps, counts, map_names or class_names, axes=axes, tokens=tokens)
    return save(page.finish(), save_path)


def _draw_measures(page: Page, measures: Sequence[Measure], class_names: Sequence[str], noun: str | None) -> None:
    """Draw a panel for each measure: a row for each class, and below those of the outcomes."""
    names = [shorten(name, _LONGEST) for name in class_names] + list(LOOKS)
    left = max(text_inches(name, SMALL) for name in names) + MARGIN + 0.1
    width = (PAGE_WIDTH - RIGHT - left - _GAP * (len(measures) - 1)) / len(measures)
    titles = [_wrap_title(one.title, width + 0.8 * _GAP) for one in measures]
    page.skip(0.04)
    for place, title in enumerate(titles):
        x = left + place * (width + _GAP) + width / 2
        page.put_text(x, page.used, title, ha="center", va="top", linespacing=1.2)
    page.skip(LINE * max(len(title.splitlines()) for title in titles) + 0.06)
    top, bottom = page.used, page.used + _ROW * len(names)
    for row, name in enumerate(names):
        page.put_text(left - 0.06, top + _ROW * (row + 0.5), name, ha="right", va="center_baseline")
    for place, one in enumerate(measures):
        _draw_panel(page, one, left + place * (width + _GAP), width, top)
    page.used = bottom + TICK + LINE + 0.06
    remarks = [f"Lines: 95 % CI{f' by {noun}' if noun else ''}."]
    if any(math.isfinite(one.null) for one in measures):
        remarks.append("Dotted: alignment of different samples (null).")
    remarks.append("Alignment: Pearson r. Entropy: 0 one key, 1 uniform.")
    estimates = [one for measure in measures for one in (*measure.classes, *measure.outcomes)]
    if any(one.count and math.isnan(one.low) for one in estimates):
        remarks.append(f"No line: fewer than {MINIMUM_GROUP} {noun or 'samples'}, no claim.")
    page.write(" ".join(remarks))


def _wrap_title(title: str, inches: float) -> str:
    """A title in lines of this length; a longer word is cut."""
    words = []
    for word in title.split():
        short = word
        while text_inches(short, SMALL) > inches:
            short = f"{short.removesuffix('…')[:-1]}…"
        words.append(short)
    lines = [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if text_inches(longer, SMALL) <= inches:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def _draw_panel(page: Page, one: Measure, left: float, width: float, top: float) -> None:
    rows = [*one.classes, *one.outcomes]
    looks = [_CLASS] * len(one.classes) + [*LOOKS.values()]
    bottom, low, high = top + _ROW * len(rows), *_find_range(one)

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * width

    ticks = ticks_between(low, high, 2)
    page.put_lines([((at(tick), top), (at(tick), bottom)) for tick in ticks], color="0.9", linewidth=0.8)
    page.put_lines([((left, top), (left, bottom)), ((left, bottom), (left + width, bottom))], **_INK)
    if one.classes:
        y = top + _ROW * len(one.classes)
        page.put_lines([((left, y), (left + width, y))], color="0.6", linewidth=0.6)
    if math.isfinite(one.null):
        page.put_lines([((at(one.null), top), (at(one.null), bottom))], **NULL)
    for look in dict.fromkeys(looks):  # all rows of a look at once, as each artist takes long
        own = [(row, rows[row]) for row, of_row in enumerate(looks) if of_row is look]
        lines = [(row, found) for row, found in own if math.isfinite(found.low)]
        places = {row: top + _ROW * (row + 0.5) for row, _ in own}
        page.put_lines(
            [((at(found.low), places[row]), (at(found.high), places[row])) for row, found in lines],
            color=look.colour,
            linewidth=1.4,
        )
        face = look.colour if look.is_filled else "white"
        style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "markerfacecolor": face}
        x = np.array([at(found.mean) for _, found in own])
        page.put(Line2D(x, np.array([*places.values()]), linestyle="", markersize=4.5, **style))
    page.put_lines([((at(tick), bottom), (at(tick), bottom + TICK)) for tick in ticks], **_INK)
    free = left - _GAP / 2
    for tick, text in zip(ticks, write_ticks(ticks), strict=True):
        half = text_inches(text, SMALL) / 2
        if at(tick) - half > free and at(tick) + half < left + width + _GAP / 2:
            page.put_text(at(tick), bottom + TICK + 0.02, text, ha="center", va="top")
            free = at(tick) + half + 0.06


def _find_range(one: Measure) -> tuple[float, float]:
    """What a panel shows: all numbers and intervals, and at least 0.1 of its unit, so that no noise is enlarged."""
    ends = [end for found in (*one.classes, *one.outcomes) for end in (found.mean, found.low, found.high)]
    known = [end for end in (*ends, one.null) if math.isfinite(end)]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    missing = max(0.1 - (high - low), 0.0) / 2
    margin = 0.06 * max(high - low, 0.1)
    return low - missing - margin, high + missing + margin
