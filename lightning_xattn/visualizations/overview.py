"""The figure of epochs: curves with their intervals, small multiples on one page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.markers import CARETRIGHT

from lightning_xattn.core.errors import SettingError
from lightning_xattn.visualizations.drawing import HUES, LOOKS, NULL
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pages import CUT, Page
from lightning_xattn.visualizations.plots import Plot

_DASHES = "-", "--", "-.", ":"
_HEIGHT = 1.35  # inches

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
    panels: Sequence[Panel], *, unit: str = "epoch", context: str = "", save_path: str | PathLike[str] | None = None
) -> Figure:
    """Draw numbers over the epochs, with their 95 % intervals as bands, a panel for each question.

    Parameters
    ----------
    panels
        At least one.
    unit
        What the curves are over.
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
    page = Page(f"{unit.capitalize()} by {unit}", context)
    page.write("Bands and bars: 95 % CI.")
    for start in range(0, len(panels), 2):
        beside = panels[start : start + 2]
        page.skip(0.06)
        plots = page.plots([(panel.title, _moments(panel), _range(panel)) for panel in beside], _HEIGHT, unit)
        page.keys(*(_draw(page, plot, panel) for plot, panel in zip(plots, beside, strict=True)))
    return save(page.finish(), save_path)


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
    margin = 0.08 * max(top - bottom, 0.02)
    return bottom - margin, top + margin


def _draw(page: Page, plot: Plot, panel: Panel) -> list[Key]:
    """Draw a panel; returns what its legend says."""
    name, reference = panel.reference
    if not any(math.isfinite(one) for curve in panel.curves for one in (*curve.values, *reference)):
        plot.note = "not computed"
        page.note(plot)
        return []
    page.frame(plot, is_whole=True)
    keys: list[Key] = []
    is_cut = False
    for place, curve in enumerate(panel.curves):
        style = _look_of(curve.name, place)
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


def _look_of(name: str, place: int) -> dict[str, Any]:
    """How a curve is drawn; outcomes have looks of their own."""
    look = LOOKS.get(name)
    colour = look.colour if look else HUES[place % len(HUES)]
    line, marker = (look.line, look.marker) if look else (_DASHES[place % len(_DASHES)], "o^sDv"[place % 5])
    face = "white" if look and not look.is_filled else colour
    style: dict[str, Any] = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4.5}
    return style | {"markerfacecolor": face}
