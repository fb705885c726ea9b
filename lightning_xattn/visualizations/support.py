"""The figure of support: how often the model is right, and how sure, where its modalities agree with it or do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator

from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.wording import percent
from lightning_xattn.functional.intervals import MINIMUM_GROUP, Estimate
from lightning_xattn.visualizations.drawing import Look
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pages import Page, RowNames

_LOOKS = {"accuracy": Look("black", True, "-", "o"), "mean confidence": Look("#7A4FA3", False, "--", "D")}


def plot_support(
    cells: Sequence[tuple[str, int, Estimate, Estimate, Estimate]],
    *,
    group_noun: str | None = None,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw a row for each cell of support: accuracy and mean confidence as dots, with their 95 % intervals.

    Parameters
    ----------
    cells
        Of each its name (who supports the prediction), its number of samples, and its share of all samples, accuracy
        and mean confidence, in [0, 1].
    group_noun
        What the intervals are by, such as ``"patients"``; None: by sample.
    context
        Where the numbers come from, for the title, e.g. ``"test"``.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    SettingError
        If there is no cell, or the suffix of ``save_path`` is not one.

    Examples
    --------
    >>> share, right, sure = (Estimate(mean, mean - 0.1, mean + 0.1, count=40) for mean in (0.4, 0.8, 0.7))
    >>> figure = plot_support([("both", 40, share, right, sure)], save_path="support.png")
    >>> Path("support.png").is_file()
    True
    """
    if not cells:
        raise SettingError("At least one cell is needed; got none.")
    by = f" by {group_noun}" if group_noun else ""
    page = Page(f"Who supports the prediction: accuracy and confidence, with 95 % CI{by}", context)
    sizes = [f"{percent(share.mean, 0)}, n={count}" if count else "none" for _, count, share, _, _ in cells]
    rows = RowNames.of([name for name, *_ in cells], sizes)
    (ax,) = page.row(rows.height, left=rows.left)
    for place, (_, _, _, *numbers) in enumerate(cells):
        for one, look, shift in zip(numbers, _LOOKS.values(), (-0.14, 0.14), strict=True):
            ax.errorbar(
                100 * np.array([one.mean]),
                np.array([place + shift]),
                xerr=100 * np.abs([[one.low - one.mean], [one.high - one.mean]]),
                fmt=look.marker,
                color=look.colour,
                markerfacecolor=_fill(look),
                markersize=4.5,
                capsize=2.5,
            )
    ax.grid(axis="x", color="0.9")
    ax.set_xlim(-2, 102)
    ax.xaxis.set_major_locator(MultipleLocator(25))
    rows.label(ax)
    page.write("Percent. In brackets: share of the predictions, and samples.")
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, markerfacecolor=_fill(look), linestyle="", label=name)
        for name, look in _LOOKS.items()
    ]
    page.legend(handles)
    if any(count and math.isnan(one.low) for _, count, _, *numbers in cells for one in numbers):
        page.write(f"No interval: fewer than {MINIMUM_GROUP} {group_noun or 'samples'}, no claim.")
    return save(page.finish(), save_path)


def _fill(look: Look) -> str:
    return look.colour if look.is_filled else "white"
