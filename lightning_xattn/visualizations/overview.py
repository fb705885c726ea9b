"""The figure of epochs: curves with their intervals, small multiples on one page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_xattn.errors import SettingError
from lightning_xattn.visualizations.drawing import HUES, new_figure, wrap, write_note
from lightning_xattn.visualizations.epoch import LOOKS
from lightning_xattn.visualizations.output import save

_PANEL, _DPI = (2.5, 2.6), 180
"""Inches, and dots in each. TensorBoard shows a picture 324 pixels wide: beside another panel text of 10 points is
then 9 pixels high."""

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
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig = new_figure(columns * _PANEL[0], rows * _PANEL[1] + 0.5, _DPI)
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax, panel in zip(axes, panels, strict=False):
        _draw(ax, panel)
        ax.set_xlabel(unit)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    fig.suptitle(
        wrap(
            f"{unit.capitalize()} by {unit} ({context})" if context else f"{unit.capitalize()} by {unit}",
            fig.get_figwidth(),
        )
    )
    return save(fig, save_path)


def _draw(ax: Axes, panel: Panel) -> None:
    ends: list[float] = []
    for place, curve in enumerate(panel.curves):
        x, y = np.asarray(curve.moments, dtype=float), np.asarray(curve.values, dtype=float)
        look = LOOKS.get(curve.name)
        colour = look.colour if look else HUES[place % len(HUES)]
        line, marker = (look.line, look.marker) if look else (_DASHES[place % len(_DASHES)], "o^sD"[place % 4])
        face = "white" if look and not look.filled else colour
        ax.plot(x, y, line, marker=marker, markersize=5, color=colour, markerfacecolor=face, label=curve.name)
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
    name, reference = panel.reference
    if panel.curves and any(map(math.isfinite, reference)):
        ax.plot(panel.curves[0].moments, reference, ":", color="0.25", linewidth=1.6, label=name)
        ends += [value for value in reference if math.isfinite(value)]
    ax.set_title(wrap(panel.title, _PANEL[0] - 0.3), fontsize=11)
    ax.tick_params(labelsize=10)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.grid(color="0.9")
    ax.set_axisbelow(True)
    if not ends:
        write_note(ax, "cannot be told")
        ax.set(xticks=[], yticks=[])
        return
    bottom, top = max(min(ends), panel.range[0]), min(max(ends), panel.range[1])
    margin = 0.08 * max(top - bottom, 0.02)
    ax.set_ylim(bottom - margin, top + margin)
    if len(panel.curves[0].moments) == 1:
        ax.set_xlim(panel.curves[0].moments[0] - 1, panel.curves[0].moments[0] + 1)
    ax.legend(
        fontsize=10,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.26),
        ncols=2,
        handlelength=1.4,
        columnspacing=0.8,
        borderpad=0,
    )
