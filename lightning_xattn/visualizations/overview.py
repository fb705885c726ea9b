"""The figure of epochs: curves with their intervals, small multiples on one page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_xattn.core.errors import SettingError
from lightning_xattn.visualizations.drawing import HUES, LOOKS, NULL, wrap, write_note
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pages import BESIDE, LARGE, LINE, NUMBERS, SMALL, Page, cut_key, mark_cut

_DASHES = "-", "--", "-.", ":"


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
        titles = [wrap(panel.title, 4.1 / len(beside), LARGE) for panel in beside]
        above = 0.1 + LARGE / SMALL * LINE * max(len(title.splitlines()) for title in titles)
        axes = page.row(1.35, widths=(1,) * len(beside), gap=BESIDE, above=above, below=NUMBERS + LINE)
        page.legend(*(_draw(ax, panel) for ax, panel in zip(axes, beside, strict=True)))
        for ax, title in zip(axes, titles, strict=True):
            ax.set_title(title, fontsize=LARGE, pad=3)
            ax.set_xlabel(unit, fontsize=SMALL, labelpad=1)
    return save(page.finish(), save_path)


def _draw(ax: Axes, panel: Panel) -> list[Artist]:
    """Draw a panel; returns what its legend says."""
    ends: list[float] = []
    intervals = []
    handles: list[Artist] = []
    for place, curve in enumerate(panel.curves):
        x, y = np.asarray(curve.moments, dtype=float), np.asarray(curve.values, dtype=float)
        look = LOOKS.get(curve.name)
        colour = look.colour if look else HUES[place % len(HUES)]
        line, marker = (look.line, look.marker) if look else (_DASHES[place % len(_DASHES)], "o^sDv"[place % 5])
        face = "white" if look and not look.is_filled else colour
        style: dict[str, Any] = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4.5}
        handles += ax.plot(x, y, label=curve.name, markerfacecolor=face, **style)
        ends += y[np.isfinite(y)].tolist()
        if len(curve.low):
            low, high = np.asarray(curve.low, dtype=float), np.asarray(curve.high, dtype=float)
            if len(x) > 1:
                ax.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            else:
                # An asymmetric interval may not hold the mean at its very end.
                errors = np.clip([y - low, high - y], 0, None)
                ax.errorbar(x, y, yerr=errors, fmt="none", color=colour, capsize=3)
            ends += [end for end in (*low, *high) if math.isfinite(end)]
            intervals.append((x, low, high, colour))
    name, reference = panel.reference
    if panel.curves and any(map(math.isfinite, reference)):
        handles += ax.plot(panel.curves[0].moments, reference, **NULL, label=name)
        ends += [value for value in reference if math.isfinite(value)]
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.grid(color="0.9")
    if not ends:
        write_note(ax, "not computed", SMALL)
        ax.set(xticks=[], yticks=[])
        return []
    bottom, top = max(min(ends), panel.range[0]), min(max(ends), panel.range[1])
    margin = 0.08 * max(top - bottom, 0.02)
    ax.set_ylim(bottom - margin, top + margin)
    if len(panel.curves[0].moments) == 1:
        ax.set_xlim(panel.curves[0].moments[0] - 1, panel.curves[0].moments[0] + 1)
    is_cut = [mark_cut(ax, "y", *interval) for interval in intervals]
    return [*handles, cut_key()] if any(is_cut) else handles
