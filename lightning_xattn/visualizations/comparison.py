"""The figure of groups of samples: the mean of each number per class and per outcome, with 95 % intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.functional.intervals import MINIMUM_GROUP, Estimate
from lightning_xattn.visualizations.drawing import LOOKS, NULL, Look, per_group
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pages import Page, RowNames, cut_key, mark_cut

_CLASS = Look("black", is_filled=True, line="-", marker="o")


def plot_class_comparison(
    quantities: Mapping[str, tuple[Sequence[Estimate], Sequence[Estimate]]],
    class_names: Sequence[str],
    *,
    nulls: Mapping[str, float] | None = None,
    limits: tuple[float, float] = (-math.inf, math.inf),
    classes_by: str | None = "target",
    group_noun: str | None = None,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw means with their 95 % intervals, one panel per number: the classes, and below the outcomes.

    Groups are compared within a panel. Numbers of one unit or range have one scale, others have their own.

    Parameters
    ----------
    quantities
        For each number, by a title with its unit or range (``"alignment (Pearson r)"``): an estimate per class, and
        those of correct and of incorrect predictions. One without samples has a mean of NaN and draws nothing.
    class_names
        A name for each class.
    nulls
        By title, the mean alignment between different samples.
    limits
        What panels show at most; an interval that goes on beyond it ends in an arrow.
    classes_by
        What the classes are: ``"target"`` (true class), ``"prediction"`` (predicted class) or None (no classes).
    group_noun
        What the intervals are by, such as ``"patients"``; None: by sample.
    context
        Where the numbers come from, for the title, e.g. ``"test"``.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    ShapeError
        If a number does not have as many estimates as there are classes, or two outcomes.
    SettingError
        If there is no number, or ``classes_by`` or the suffix of ``save_path`` is not one.

    Examples
    --------
    >>> classes = [Estimate(0.5, 0.4, 0.6, count=40), Estimate(0.3, 0.2, 0.4, count=30)]
    >>> outcomes = [Estimate(0.5, 0.4, 0.6, count=50), Estimate(0.2, 0.1, 0.3, count=20)]  # correct, incorrect
    >>> numbers = {"alignment (Pearson r)": (classes, outcomes)}
    >>> figure = plot_class_comparison(numbers, ["cat", "dog"], save_path="classes.png")
    >>> Path("classes.png").is_file()
    True
    """
    if not quantities:
        raise SettingError("At least one quantity is needed; got none.")
    for title, (classes, outcomes) in quantities.items():
        if (len(classes), len(outcomes)) != (len(class_names), len(LOOKS)):
            raise ShapeError(
                f"'{title}' must have {len(class_names)} classes and {len(LOOKS)} outcomes (correct, incorrect); "
                f"got {len(classes)} and {len(outcomes)}."
            )
    by, nulls = f" by {group_noun}" if group_noun else "", nulls or {}
    page = Page(f"Mean{per_group(classes_by)} and outcome, with its 95 % CI{by}", context)
    panels = {
        title: _draw_panel(page, title, class_names, [*classes, *outcomes])
        for title, (classes, outcomes) in quantities.items()
    }
    units: dict[str, list[Axes]] = defaultdict(list)
    for title, ax in panels.items():
        if title in nulls:
            ax.axvline(nulls[title], **NULL)
        units[title.partition("(")[2] or title].append(ax)
    for together in units.values():
        ends = np.clip([limit for ax in together for limit in ax.get_xlim()], *limits)
        for ax in together:
            ax.set_xlim(ends.min(), ends.max())
    handles: list[Artist] = [Line2D([], [], **NULL, label="null: alignment of different samples")] if nulls else []
    is_cut = has_few = False
    for title, (classes, outcomes) in quantities.items():
        low, high = np.array([(one.low, one.high) for one in (*classes, *outcomes)]).T
        is_cut |= mark_cut(panels[title], "x", range(len(low)), low, high)
        has_few |= any(one.count and math.isnan(one.low) for one in (*classes, *outcomes))
    page.legend([*handles, *([cut_key()] if is_cut else [])])
    remarks = [f"n: samples, and of how many {group_noun}."] if group_noun else []
    remarks += [f"No interval: fewer than {MINIMUM_GROUP} {group_noun or 'samples'}, no claim."] if has_few else []
    page.write(" ".join(remarks))
    return save(page.finish(), save_path)


def _draw_panel(page: Page, title: str, class_names: Sequence[str], groups: Sequence[Estimate]) -> Axes:
    sizes = [f"n={one.count}" + ("" if one.groups is None else f" of {one.groups}") for one in groups]
    rows = RowNames.of([*class_names, *LOOKS], sizes)
    page.skip(0.06)
    page.write(title)
    (ax,) = page.row(rows.height, left=rows.left)
    looks = [_CLASS] * len(class_names) + [*LOOKS.values()]
    for look in dict.fromkeys(looks):  # all rows of a look at once, as each call takes long
        shown = [row for row, of_row in enumerate(looks) if of_row is look]
        low, mean, high = np.array([(groups[row].low, groups[row].mean, groups[row].high) for row in shown]).T
        ax.errorbar(
            mean,
            np.array(shown),
            xerr=np.abs([low - mean, high - mean]),
            fmt=look.marker,
            color=look.colour,
            markerfacecolor=look.colour if look.is_filled else "white",
            markersize=4.5,
            capsize=2.5,
        )
    ax.axhline(len(class_names) - 0.5, color="0.4", linewidth=0.8)
    ax.grid(axis="x", color="0.9")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    rows.label(ax)
    return ax
