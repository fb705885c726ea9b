"""The card: what each modality predicts, what the model uses, and who supports its predictions, on one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.patches import Rectangle

from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.wording import name_modality, percent
from lightning_xattn.functional.intervals import MINIMUM_GROUP, Estimate
from lightning_xattn.functional.probe import JOINT
from lightning_xattn.visualizations.drawing import HUES, Look, shorten, text_inches
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pages import CUT, KEY, LINE, MARGIN, PAGE_WIDTH, SMALL, TICK, Page

MODEL = "the model"
"""The name of the model's own accuracy beside those of the probes."""

_ROW = 0.2  # inches
_VALUE = 0.5  # inches that a value takes on the right
_LONGEST = 26  # characters of a row's name
_INK: dict[str, Any] = {"color": "black", "linewidth": 0.8}
_ACCURACY, _CONFIDENCE = Look("black", True, "-", "o"), Look("0.45", False, "-", "D")
_SHARE = "0.85"  # the colour of the bars of cells


class Cell(NamedTuple):
    """Predictions that the same modalities support.

    Examples
    --------
    >>> share, accuracy, confidence = (Estimate(mean, mean - 0.1, mean + 0.1, count=40) for mean in (0.4, 0.8, 0.7))
    >>> Cell("both", share, accuracy, confidence).name
    'both'
    """

    name: str
    """Who supports them."""
    share: Estimate
    """Of all predictions."""
    accuracy: Estimate
    confidence: Estimate


class _Row(NamedTuple):
    name: str
    marks: Sequence[tuple[Estimate, Look]]
    """The first one's value is written beside the row."""
    bar: float = 0.0


def plot_card(
    modalities: Sequence[str],
    probes: Mapping[str, Estimate] | str,
    shares: Mapping[str, Estimate] | str,
    cells: Sequence[Cell] | str,
    *,
    largest_class: float = math.nan,
    sentence: str = "",
    group_noun: str | None = None,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw probe accuracy, contribution, and support for the prediction: a row for each number, with its 95 % CI.

    Parameters
    ----------
    modalities
        Their names, in the order of their colours.
    probes
        Accuracy in [0, 1] of the linear probe on each modality, on all of them ("joint"), and of the model itself
        ("the model"), those that are known; or why there are none.
    shares
        Each modality's share of the contributions, 1 being all of them; or why there are none.
    cells
        Cells of support; or why there are none.
    largest_class
        The share of the largest class, which a guess gets right; NaN where there are no classes.
    sentence
        What the numbers say.
    group_noun
        What the intervals are by, such as ``"patients"``; None: by sample.
    context
        Where the numbers come from, e.g. ``"val, epoch 3"``.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    SettingError
        If there is no modality, or the suffix of ``save_path`` is not one.

    Examples
    --------
    >>> share, accuracy, confidence = (Estimate(mean, mean - 0.1, mean + 0.1, count=40) for mean in (0.4, 0.8, 0.7))
    >>> probes = {"image": accuracy, "text": share, "joint": accuracy, "the model": accuracy}
    >>> figure = plot_card(
    ...     ["image", "text"],
    ...     probes,
    ...     "not computed: needs 128 samples, this run had 97",
    ...     [Cell("both", share, accuracy, confidence)],
    ...     largest_class=0.25,
    ...     save_path="card.png",
    ... )
    >>> Path("card.png").is_file()
    True
    """
    if not modalities:
        raise SettingError("At least one modality is needed; got none.")
    sections = [
        ("Probe accuracy", probes if isinstance(probes, str) else _list_probes(modalities, probes)),
        ("Contribution", shares if isinstance(shares, str) else _list_shares(modalities, shares)),
        ("Support for the prediction", cells if isinstance(cells, str) else _list_cells(cells)),
    ]
    page = Page(sentence or "Probe accuracy, contribution, support", context)
    names = [row.name for _, rows in sections if not isinstance(rows, str) for row in rows]
    left = max([text_inches(name, SMALL) for name in names], default=0) + MARGIN + 0.08
    has_few = is_cut = False
    for title, rows in sections:
        page.skip(0.06)
        page.put_text(MARGIN, page.used, title, weight="bold", va="top")
        if not isinstance(rows, str):
            heading = "share" if title == "Contribution" else "accuracy"
            page.put_text(PAGE_WIDTH - MARGIN, page.used, heading, ha="right", va="top", color="0.3")
        page.skip(LINE + 0.05)
        if isinstance(rows, str):
            page.write(rows)
            continue
        is_probe, is_cell = title == "Probe accuracy", title.startswith("Support")
        is_cut |= _draw_rows(page, rows, left, largest_class if is_probe else math.nan, is_cell)
        has_few |= any(one.count and math.isnan(one.low) for row in rows for one, _ in row.marks)
    by = f" by {group_noun}" if group_noun else ""
    remarks = [f"Lines: 95 % CI{by}."] if names else []
    remarks += [f"No line: fewer than {MINIMUM_GROUP} {group_noun or 'samples'}, no claim."] if has_few else []
    remarks += [f"Arrow: {CUT}."] if is_cut else []
    page.skip(0.04)
    page.write(" ".join(remarks))
    return save(page.finish(), save_path)


def look_of_modality(place: int) -> Look:
    """How a modality is drawn, by its place among all."""
    return Look(HUES[place % len(HUES)], True, "-", "os^Dv"[place % 5])


def _list_probes(modalities: Sequence[str], probes: Mapping[str, Estimate]) -> list[_Row]:
    looks = {name: look_of_modality(place) for place, name in enumerate(modalities)}
    looks |= {JOINT: Look("0.45", True, "--", "P"), MODEL: _ACCURACY}
    names = {JOINT: "joint probe", MODEL: MODEL}
    return [
        _Row(names.get(name, shorten(name_modality(name), _LONGEST)), [(probes[name], look)])
        for name, look in looks.items()
        if name in probes
    ]


def _list_shares(modalities: Sequence[str], shares: Mapping[str, Estimate]) -> list[_Row]:
    return [
        _Row(shorten(name_modality(name), _LONGEST), [(shares[name], look_of_modality(place))])
        for place, name in enumerate(modalities)
        if name in shares
    ]


def _list_cells(cells: Sequence[Cell]) -> list[_Row]:
    return [
        _Row(
            f"{shorten(one.name, _LONGEST)} ({percent(one.share.mean, 0)})",
            [(one.accuracy, _ACCURACY), (one.confidence, _CONFIDENCE)],
            one.share.mean,
        )
        for one in cells
    ]


def _draw_rows(page: Page, rows: Sequence[_Row], left: float, mark: float, is_cell: bool) -> bool:
    """Draw a section's rows on a scale from 0 to 100 %; whether an interval goes on beyond it."""
    right, top = PAGE_WIDTH - MARGIN - _VALUE, page.used
    bottom = top + _ROW * len(rows)

    def at(share: float) -> float:
        return left + min(max(share, 0.0), 1.0) * (right - left)

    page.put_lines([((at(one), top), (at(one), bottom)) for one in (0.25, 0.5, 0.75, 1.0)], color="0.9", linewidth=0.8)
    page.put_lines([((left, top), (left, bottom)), ((left, bottom), (right, bottom))], **_INK)
    if math.isfinite(mark):
        page.put_lines([((at(mark), top), (at(mark), bottom))], color="0.25", linestyle=":", linewidth=1.6)
    is_cut = False
    for place, row in enumerate(rows):
        middle = top + _ROW * (place + 0.5)
        page.put_text(left - 0.06, middle, row.name, ha="right", va="center_baseline")
        if row.bar > 0:
            area = (left, middle - 0.07), at(row.bar) - left, 0.14
            page.put(Rectangle(*area, facecolor=_SHARE, linewidth=0, zorder=0.6))
        shifts = (-0.035, 0.035) if len(row.marks) > 1 else (0.0,)
        for (one, look), shift in zip(row.marks, shifts, strict=True):
            if math.isfinite(one.mean):
                is_cut |= _draw_mark(page, one, look, at, middle + shift)
        first = row.marks[0][0].mean
        text = percent(first, 0) if math.isfinite(first) else "\N{EN DASH}"
        page.put_text(PAGE_WIDTH - MARGIN, middle, text, ha="right", va="center_baseline")
    for share in (0.0, 0.5, 1.0):
        page.put_lines([((at(share), bottom), (at(share), bottom + TICK))], **_INK)
        page.put_text(at(share), bottom + TICK + 0.02, percent(share, 0), ha="center", va="top")
    page.used = bottom + TICK + LINE + 0.05
    if math.isfinite(mark):
        keys = [(f"largest class ({percent(mark, 0)})", {"color": "0.25", "linestyle": ":", "linewidth": 1.6})]
        _write_keys(page, keys, left)
        page.skip(0.04)
    if is_cell:
        bar = {"color": _SHARE, "linewidth": 7, "solid_capstyle": "butt"}
        keys = [("accuracy", _style(_ACCURACY)), ("mean confidence", _style(_CONFIDENCE)), ("share", bar)]
        _write_keys(page, keys, MARGIN)
    return is_cut


def _draw_mark(page: Page, one: Estimate, look: Look, at: Any, y: float) -> bool:
    """Draw a number and its interval; whether one of them lies beyond the scale."""
    if math.isfinite(one.low):
        page.put_lines([((at(one.low), y), (at(one.high), y))], color=look.colour, linewidth=1.4)
    page.put(Line2D([at(one.mean)], [y], **_style(look)))
    ends = one.mean, *(end for end in (one.low, one.high) if math.isfinite(end))
    beyond: list[tuple[bool, float, Any]] = [
        (min(ends) < -1e-9, 0.0, CARETLEFT),
        (max(ends) > 1 + 1e-9, 1.0, CARETRIGHT),
    ]
    for is_beyond, edge, marker in beyond:
        if is_beyond:
            page.put(Line2D([at(edge)], [y], color=look.colour, marker=marker, linestyle=""))
    return any(is_beyond for is_beyond, *_ in beyond)


def _style(look: Look) -> dict[str, Any]:
    face = look.colour if look.is_filled else "white"
    return {"color": look.colour, "marker": look.marker, "markersize": 5, "markerfacecolor": face, "linestyle": ""}


def _write_keys(page: Page, keys: Sequence[tuple[str, dict[str, Any]]], left: float) -> None:
    """Name what is drawn, side by side."""
    x, y = left, page.used + KEY / 2
    for name, style in keys:
        page.put(Line2D([x, x + 0.1, x + 0.2], [y, y, y], markevery=[1], **style))
        page.put_text(x + 0.27, y, name, va="center_baseline")
        x += 0.27 + text_inches(name, SMALL) + 0.15
    page.used += KEY
