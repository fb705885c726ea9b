"""Curves over epochs with their intervals: small multiples on one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETRIGHT
from matplotlib.transforms import Bbox

from lightning_xattn.core.errors import SettingError
from lightning_xattn.visualizations.drawing import HUES, LOOKS, NULL, Look, text_inches, wrap
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pages import (
    BESIDE,
    BETWEEN,
    CUT,
    HANDLE,
    KEY,
    LARGE,
    LINE,
    MARGIN,
    NUMBERS,
    PAGE_WIDTH,
    RIGHT,
    SMALL,
    TICK,
    Page,
    Piece,
    columns_of,
)
from lightning_xattn.visualizations.plots import Plot, ticks_between, write_ticks

_DASHES = "-", "--", "-.", ":"
_HEIGHT = 1.35  # inches
_INK: dict[str, Any] = {"color": "black", "linewidth": 0.8}

Key = tuple[str, dict[str, Any]]
"""What a legend says: a name, and how it looks."""

_CUT: Key = (CUT, {"color": "black", "marker": CARETRIGHT, "linestyle": ""})


class Curve(NamedTuple):
    """A number over time, with its 95 % interval where there is one.

    Examples
    --------
    >>> Curve("correct", moments=[0, 1], values=[0.1, 0.4]).values[-1]
    0.4
    """

    name: str
    """"correct" and "incorrect" look as they do everywhere."""
    moments: Sequence[int]
    """Epochs, or steps."""
    values: Sequence[float]
    """NaN where undefined."""
    low: Sequence[float] = ()
    """Empty: no interval."""
    high: Sequence[float] = ()


class Panel(NamedTuple):
    """What is to be compared.

    Examples
    --------
    >>> panel = Panel("alignment", [Curve("correct", [0, 1], [0.1, 0.4])], range=(-1, 1))
    >>> [curve.name for curve in panel.curves]
    ['correct']
    """

    title: str
    curves: Sequence[Curve]
    range: tuple[float, float]
    """What the numbers can be; the panel shows what they are, and no more than this."""
    reference: tuple[str, Sequence[float]] = ("", ())
    """What a curve has to differ from, with a name: a value for each epoch of the first curve."""


def plot_epochs(
    panels: Sequence[Panel],
    *,
    title: str = "",
    unit: str = "epoch",
    looks: Mapping[str, Look] | None = None,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw numbers over the epochs, with their 95 % intervals as bands, a panel for each question.

    Parameters
    ----------
    panels
        At least one.
    title
        What the numbers say.
    unit
        What the curves are over.
    looks
        How curves look, by their names; the others have looks of their own.
    context
        Where the numbers come from, for the title.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    SettingError
        If there is no panel, or the suffix of ``save_path`` is not one.

    Examples
    --------
    >>> panel = Panel("alignment", [Curve("correct", [0, 1], [0.1, 0.4])], range=(-1, 1))
    >>> figure = plot_epochs([panel], save_path="epochs.png")
    >>> Path("epochs.png").is_file()
    True
    """
    if not panels:
        raise SettingError("At least one panel is needed; got none.")
    page = Page(title or f"{unit.capitalize()} by {unit}", context)
    known = LOOKS | dict(looks or {})
    for start in range(0, len(panels), 2):
        beside = panels[start : start + 2]
        page.skip(0.06)
        plots = _add_plots(page, beside, unit)
        _write_keys(page, [_draw(page, plot, panel, known) for plot, panel in zip(plots, beside, strict=True)])
    page.write("Bands and bars: 95 % CI.")
    return save(page.finish(), save_path)


def _add_plots(page: Page, panels: Sequence[Panel], unit: str) -> list[Plot]:
    """Make room for panels side by side, and name them."""
    width = (PAGE_WIDTH - RIGHT - BESIDE * len(panels)) / len(panels)
    titles = [wrap(panel.title, (PAGE_WIDTH - 2 * MARGIN) / len(panels) - 0.05, LARGE) for panel in panels]
    top = page.used + 0.1 + LARGE / SMALL * LINE * max(len(title.splitlines()) for title in titles)
    page.used = top + _HEIGHT + NUMBERS + LINE
    plots = []
    for place, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        left = BESIDE + place * (width + BESIDE)
        area = Bbox.from_extents(left, top, left + width, top + _HEIGHT)
        plots.append(Plot(page.figure, panel.title, unit, area, page.inches, _moments(panel), _range(panel)))
        page.put_text(left + width / 2, top - 0.05, title, LARGE, ha="center", va="bottom")
        page.put_text(left + width / 2, area.y1 + NUMBERS - 0.01, unit, ha="center", va="top")
    page.figure.plots += plots
    return plots


def _moments(panel: Panel) -> tuple[float, float]:
    """From where to where a panel goes."""
    moments = [moment for curve in panel.curves for moment in curve.moments]
    first, last = min(moments, default=0), max(moments, default=1)
    return (first - 1, last + 1) if first == last else (first - 0.04 * (last - first), last + 0.04 * (last - first))


def _range(panel: Panel) -> tuple[float, float]:
    """What a panel has to show: all of its numbers that are possible ones; without any, whatever."""
    numbers = [one for curve in panel.curves for one in (*curve.values, *curve.low, *curve.high)]
    ends = [one for one in (*numbers, *panel.reference[1]) if math.isfinite(one)]
    if not ends:
        return 0.0, 1.0
    bottom, top = max(min(ends), panel.range[0]), min(max(ends), panel.range[1])
    # At least a tenth of what is possible, so that noise does not fill a panel.
    whole = panel.range[1] - panel.range[0]
    missing = max(0.1 * whole - (top - bottom), 0.0) / 2 if math.isfinite(whole) else 0.0
    margin = 0.08 * max(top - bottom, 1e-9)
    return bottom - missing - margin, top + missing + margin


def _draw(page: Page, plot: Plot, panel: Panel, looks: Mapping[str, Look]) -> list[Key]:
    """Draw a panel; returns what its legend says."""
    name, reference = panel.reference
    if not any(math.isfinite(one) for curve in panel.curves for one in (*curve.values, *reference)):
        plot.note = "not computed"
        _write_note(page, plot)
        return []
    _draw_frame(page, plot)
    keys: list[Key] = []
    is_cut = False
    for place, curve in enumerate(panel.curves):
        style = _look_of(looks.get(curve.name), place)
        plot.line(curve.moments, curve.values, label=curve.name, **style)
        keys.append((curve.name, style))
        if len(curve.low):
            x, y, low, high = (np.asarray(one, float) for one in (curve.moments, curve.values, curve.low, curve.high))
            if len(x) > 1:
                plot.band(curve.name, x, low, high, style["color"])
            else:
                # An asymmetric interval may not hold the mean at its very end.
                plot.bar(curve.name, x[0], np.fmin(low, y)[0], np.fmax(high, y)[0], style["color"])
            is_cut |= plot.mark_cut(x, low, high, style["color"])
    if any(map(math.isfinite, reference)):
        plot.line(panel.curves[0].moments, reference, label=name, **NULL)
        keys.append((name, NULL))
    return [*keys, _CUT] if is_cut else keys


def _look_of(look: Look | None, place: int) -> dict[str, Any]:
    """How a curve is drawn; one without a look by its place."""
    colour = look.colour if look else HUES[place % len(HUES)]
    line, marker = (look.line, look.marker) if look else (_DASHES[place % len(_DASHES)], "o^sDv"[place % 5])
    face = "white" if look and not look.is_filled else colour
    style: dict[str, Any] = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4.5}
    return style | {"markerfacecolor": face}


def _draw_frame(page: Page, plot: Plot) -> None:
    """Draw a plot's axes: two lines, ticks with their numbers, and a grid."""
    area, ((left, right), (bottom, top)) = plot.area, (plot.xlim, plot.ylim)
    plot.xticks, plot.yticks = ticks_between(left, right, is_whole=True), ticks_between(bottom, top)
    xs = [area.x0 + (one - left) / (right - left) * area.width for one in plot.xticks]
    ys = [area.y1 - (one - bottom) / (top - bottom) * area.height for one in plot.yticks]
    grid = [((x, area.y0), (x, area.y1)) for x in xs] + [((area.x0, y), (area.x1, y)) for y in ys]
    page.put_lines(grid, color="0.9", linewidth=0.8, zorder=0.5)
    ticks = [((x, area.y1), (x, area.y1 + TICK)) for x in xs] + [((area.x0 - TICK, y), (area.x0, y)) for y in ys]
    page.put_lines([*_edges(area), *ticks], **_INK)
    for x, text in zip(xs, write_ticks(plot.xticks), strict=True):
        page.put_text(x, area.y1 + TICK + 0.02, text, ha="center", va="top")
    for y, text in zip(ys, write_ticks(plot.yticks), strict=True):
        page.put_text(area.x0 - TICK - 0.03, y, text, ha="right", va="center_baseline")


def _write_note(page: Page, plot: Plot) -> None:
    """Write a plot's note in the place of its curves, in an empty frame."""
    page.put_lines(_edges(plot.area), **_INK)
    middle = (plot.area.x0 + plot.area.x1) / 2, (plot.area.y0 + plot.area.y1) / 2
    page.put_text(*middle, plot.note, ha="center", va="center", color="0.3")


def _edges(area: Bbox) -> list[Piece]:
    """The left one and the lower one."""
    return [((area.x0, area.y1), (area.x1, area.y1)), ((area.x0, area.y1), (area.x0, area.y0))]


def _write_keys(page: Page, columns: Sequence[Sequence[Key]]) -> None:
    """Say what curves mean, in a column of the page for each panel."""
    inches = (PAGE_WIDTH - 2 * MARGIN) / len(columns)
    lines = [0]
    for place, keys in enumerate(columns):
        x = MARGIN + place * inches
        count = columns_of([name for name, _ in keys], inches) if keys else 0
        for column in np.array_split(np.arange(len(keys)), count) if keys else ():
            for row, index in enumerate(column):
                name, look = keys[index]
                y = page.used + 0.04 + KEY * (row + 0.5)
                page.put(Line2D([x, x + 0.12, x + 0.24], [y, y, y], markevery=[1], **look))
                page.put_text(x + HANDLE, y, name, va="center_baseline")
            x += max(HANDLE + text_inches(keys[index][0], SMALL) for index in column) + BETWEEN
            lines.append(len(column))
    page.used += 0.04 + KEY * max(lines)
