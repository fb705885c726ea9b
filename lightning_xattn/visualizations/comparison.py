"""The figure of groups of samples: the mean of each number per class and per outcome, with 95 % intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.functional.intervals import MINIMUM_GROUP
from lightning_xattn.visualizations.epoch import LOOKS, NULL, Look, interval_by, per_group
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pages import Page, RowNames

_CLASS = Look("black", filled=True, line="-", marker="o", offset=0)
OUTCOMES = ("correct", "incorrect")


class Mean(NamedTuple):
    """Some samples and one of their numbers: how many have it, its mean, and the mean's 95 % interval (NaN: none).

    Examples
    --------
    >>> Mean(n=40, mean=0.5, low=0.4, high=0.6).high
    0.6
    """

    n: int
    mean: float
    low: float
    high: float
    groups: int | None = None
    """How many groups of samples (patients, recordings) they belong to, where this is known."""


def plot_class_comparison(
    quantities: Mapping[str, tuple[Sequence[Mean], Sequence[Mean]]],
    class_names: Sequence[str],
    *,
    nulls: Mapping[str, float] | None = None,
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
        For each number, by a title with its unit or range (``"alignment (Pearson r)"``): a group per class, and the
        groups of correct and of incorrect predictions. A group without samples has a mean of NaN and draws nothing.
    class_names
        A name for each class.
    nulls
        By title, the mean alignment between different samples, what habit alone gives.
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
        If a number does not have as many groups as there are classes, or two outcomes.
    SettingError
        If there is no number, or ``classes_by`` or the suffix of ``save_path`` is not one.

    Examples
    --------
    >>> classes = [Mean(40, 0.5, 0.4, 0.6), Mean(30, 0.3, 0.2, 0.4)]  # n, mean, and its interval
    >>> outcomes = [Mean(50, 0.5, 0.4, 0.6), Mean(20, 0.2, 0.1, 0.3)]  # correct, incorrect
    >>> numbers = {"alignment (Pearson r)": (classes, outcomes)}
    >>> figure = plot_class_comparison(numbers, ["cat", "dog"], save_path="classes.png")
    >>> Path("classes.png").is_file()
    True
    """
    if not quantities:
        raise SettingError("At least one quantity is needed; got none.")
    require_groups(quantities, class_names)
    names = [*class_names, *OUTCOMES]
    page = Page(f"Mean{per_group(classes_by)} and outcome, with its {interval_by(group_noun)}", context)
    panels = []
    for title, (classes, outcomes) in quantities.items():
        groups = [*classes, *outcomes]
        rows = RowNames.of(names, [f"n={say_count(group)}" for group in groups])
        page.skip(0.06)
        page.write(title)
        (ax,) = page.row(rows.height, left=rows.left)
        looks = [_CLASS] * len(classes) + [LOOKS[name] for name in OUTCOMES]
        for look in dict.fromkeys(looks):
            at = [row for row, one in enumerate(looks) if one is look]
            means, low, high = np.array([[groups[row].mean, groups[row].low, groups[row].high] for row in at]).T
            ax.errorbar(
                means,
                at,
                xerr=np.abs([low - means, high - means]),
                fmt=look.marker,
                color=look.colour,
                markerfacecolor=look.colour if look.filled else "white",
                markersize=4.5,
                capsize=2.5,
            )
        if nulls and title in nulls:
            ax.axvline(nulls[title], **NULL)
        ax.axhline(len(class_names) - 0.5, color="0.4", linewidth=0.8)
        ax.grid(axis="x", color="0.9")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        rows.label(ax)
        panels.append(ax)
    units: dict[str, list[Axes]] = defaultdict(list)
    for ax, name in zip(panels, quantities, strict=True):
        units[name.partition("(")[2] or name].append(ax)
    for alike in units.values():
        limits = [limit for ax in alike for limit in ax.get_xlim()]
        for ax in alike:
            ax.set_xlim(min(limits), max(limits))
    if nulls:
        page.legend([Line2D([], [], **NULL, label="null: alignment of different samples")])
    few = any(group.n and np.isnan(group.low) for parts in quantities.values() for of in parts for group in of)
    remarks = [f"n: samples, and of how many {group_noun}."] if group_noun else []
    if few:
        remarks.append(f"No interval: fewer than {MINIMUM_GROUP} {group_noun or 'samples'}, nothing is claimed.")
    page.write(" ".join(remarks))
    return save(page.finish(), save_path)


def require_groups(quantities: Mapping[str, tuple[Sequence[Mean], Sequence[Mean]]], class_names: Sequence[str]) -> None:
    """Refuse numbers that do not have a group per class and per outcome."""
    for title, (classes, outcomes) in quantities.items():
        if (len(classes), len(outcomes)) != (len(class_names), len(OUTCOMES)):
            raise ShapeError(
                f"'{title}' must have {len(class_names)} classes and {len(OUTCOMES)} outcomes (correct, incorrect); "
                f"got {len(classes)} and {len(outcomes)}."
            )


def say_count(group: Mean) -> str:
    """How many samples a group has, and of how many groups where this is known."""
    return str(group.n) + ("" if group.groups is None else f" of {group.groups}")
