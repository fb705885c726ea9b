"""The figures of what modalities say and contribute: conflict against confidence, shares, and single samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from lightning_xattn.errors import SettingError
from lightning_xattn.functional.intervals import MINIMUM_GROUP
from lightning_xattn.messages import decimal, name_modality
from lightning_xattn.visualizations.comparison import OUTCOMES, Mean, require_groups, say_count
from lightning_xattn.visualizations.drawing import (
    HUES,
    WIDTH,
    as_array,
    name_rows,
    new_figure,
    set_title,
    wrap,
)
from lightning_xattn.visualizations.epoch import LOOKS, interval_by, per_group
from lightning_xattn.visualizations.output import save

_HATCHES = ("", "///", "...", "xxx")
"""Beside the colours of the modalities."""


def plot_conflict(
    conflict: ArrayLike,
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    claims: Mapping[str, str] | None = None,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw the conflict of each sample against the confidence of its prediction, errors marked.

    Parameters
    ----------
    conflict, confidence
        ``(samples,)`` in [0, 1]; a sample without one of them is not drawn.
    correct
        ``(samples,)`` bool; whether the prediction is correct.
    claims
        What is said of how each of the two tells errors, by "confidence" and "conflict", for the axes.
    context, save_path
        As in ``plot_class_comparison``.

    Raises
    ------
    ShapeError
        If they are not of the same samples.
    SettingError
        If the suffix of ``save_path`` is not one.

    Examples
    --------
    >>> conflict, confidence, correct = torch.rand(50), torch.rand(50), torch.rand(50) > 0.3
    >>> figure = plot_conflict(conflict, confidence, correct, save_path="conflict.png")
    >>> Path("conflict.png").is_file()
    True
    """
    y = as_array("conflict", conflict, samples=None)
    x = as_array("confidence", confidence, samples=len(y))
    right = as_array("correct", correct, samples=len(y)) > 0
    fig = new_figure(WIDTH, 6.2)
    ax = fig.subplots()
    known = np.isfinite(x) & np.isfinite(y)
    for name in OUTCOMES:
        look, chosen = LOOKS[name], known & (right == (name == "correct"))
        face = look.colour if look.filled else "none"
        style: dict[str, Any] = {"alpha": 0.35, "linewidths": 0} if look.filled else {"linewidths": 1.4}
        label = f"{name} (n={int(chosen.sum())})"
        ax.scatter(
            x[chosen], y[chosen], 40, marker=look.marker, facecolor=face, edgecolor=look.colour, label=label, **style
        )
    for axis, name in (("x", "confidence"), ("y", "conflict")):
        words = {"confidence": "confidence of the prediction", "conflict": "conflict of the readings"}[name]
        said = f"\n{claims[name]}" if claims and name in claims else ""
        ax.set(**{f"{axis}label": f"{words}{said}", f"{axis}lim": (-0.03, 1.03)})
    ax.grid(color="0.88")
    ax.set_axisbelow(True)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, frameon=False)
    set_title(fig, "Conflict against confidence, errors marked", context)
    return save(fig, save_path)


def plot_contribution_shares(
    shares: Mapping[str, tuple[Sequence[Mean], Sequence[Mean]]],
    class_names: Sequence[str],
    *,
    group_by: str | None = "target",
    group_noun: str | None = None,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw which share of the predictions each modality carries: bars with 95 % intervals, by class and by outcome.

    Parameters
    ----------
    shares
        For each modality a group per class, and the groups of correct and of incorrect predictions.
    class_names, group_by, group_noun, context, save_path
        As in ``plot_class_comparison``.

    Raises
    ------
    ShapeError
        If a modality does not have as many groups as there are classes, or two outcomes.
    SettingError
        If there is no modality or more than four, or ``group_by`` or the suffix of ``save_path`` is not one.

    Examples
    --------
    >>> classes = [Mean(40, 0.5, 0.4, 0.6), Mean(30, 0.3, 0.2, 0.4)]  # n, mean, and its interval
    >>> outcomes = [Mean(50, 0.5, 0.4, 0.6), Mean(20, 0.2, 0.1, 0.3)]  # correct, incorrect
    >>> figure = plot_contribution_shares({"eeg": (classes, outcomes)}, ["cat", "dog"], save_path="shares.png")
    >>> Path("shares.png").is_file()
    True
    """
    if not 0 < len(shares) <= len(HUES):
        raise SettingError(f"Shares of 1 to {len(HUES)} modalities can be drawn; got {len(shares)}.")
    require_groups(shares, class_names)
    names = [*class_names, *OUTCOMES]
    fig = new_figure(WIDTH, 1.8 + 0.5 * len(names))
    ax, thick = fig.subplots(), 0.8 / len(shares)
    for i, (name, (classes, outcomes)) in enumerate(shares.items()):
        groups = [*classes, *outcomes]
        rows = np.arange(len(names)) - 0.4 + (i + 0.5) * thick
        means = np.array([group.mean for group in groups])
        errors = np.abs([[one.low - one.mean for one in groups], [one.high - one.mean for one in groups]])
        ax.barh(
            rows,
            means,
            thick * 0.92,
            color=HUES[i],
            hatch=_HATCHES[i],
            edgecolor="white",
            label=name_modality(name),
        )
        ax.errorbar(means, rows, xerr=errors, fmt="none", color="black", capsize=3, linewidth=1.2)
        for row, group, mean in zip(rows, groups, means, strict=True):
            if np.isnan(mean) and group.n:
                ax.text(0.01, row, "undefined", va="center", fontsize=9)
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.axhline(len(class_names) - 0.5, color="0.4", linewidth=0.8)
    ax.grid(axis="x", color="0.88")
    ax.set_axisbelow(True)
    ends = [end for both in shares.values() for of in both for one in of for end in (one.low, one.high, one.mean)]
    finite = [end for end in ends if np.isfinite(end)]
    # An interval of few samples may reach far beyond any share; it is cut off, and drawn to the edge.
    ax.set_xlim(max(min([0.0, *finite]) - 0.03, -0.6), min(max([1.0, *finite]) + 0.03, 1.6))
    ax.set_xlabel("share of the mean contribution (below 0: speaks against the predictions)")
    groups = [*next(iter(shares.values()))[0], *next(iter(shares.values()))[1]]
    name_rows(ax, names, [f"n={say_count(one)}" for one in groups])
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, frameon=False)
    remarks = [f"n: samples, and of how many {group_noun}."] if group_noun else []
    if any(one.n and np.isfinite(one.mean) and np.isnan(one.low) for one in groups):
        remarks.append(f"No interval: fewer than {MINIMUM_GROUP} {group_noun or 'samples'}.")
    title = f"What each modality contributes{per_group(group_by)} and outcome, with its {interval_by(group_noun)}"
    set_title(fig, title, context, " ".join(remarks))
    return save(fig, save_path)


class SampleRow(NamedTuple):
    """What is drawn of a sample.

    Examples
    --------
    >>> SampleRow("sample 7", says={"eeg": ("LPD", 0.8)}, contributions={"eeg": 0.3}).says["eeg"]
    ('LPD', 0.8)
    """

    title: str
    says: Mapping[str, tuple[str, float]]
    """By modality, the class that it says and the probability of it."""
    contributions: Mapping[str, float]
    """By modality, signed; empty: not known."""


def plot_conflicting_samples(
    samples: Sequence[SampleRow],
    *,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw what each modality says of some samples, and what it contributes to the prediction.

    Parameters
    ----------
    samples
        A row for each.
    context, save_path
        As in ``plot_class_comparison``.

    Raises
    ------
    SettingError
        If there is no sample, or the suffix of ``save_path`` is not one.

    Examples
    --------
    >>> says = {"eeg": ("LPD", 0.8), "spec": ("GPD", 0.6)}
    >>> row = SampleRow("sample 7", says, contributions={"eeg": 0.3, "spec": -0.1})
    >>> figure = plot_conflicting_samples([row], save_path="samples.png")
    >>> Path("samples.png").is_file()
    True
    """
    if not samples:
        raise SettingError("At least one sample is needed; got none.")
    modalities = list(samples[0].says)
    thick = 0.8 / len(modalities)
    fig = new_figure(WIDTH, 1.7 + 0.62 * len(samples))
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for i, modality in enumerate(modalities):
        look = {"color": HUES[i], "hatch": _HATCHES[i], "edgecolor": "white"}
        rows = np.arange(len(samples)) - 0.4 + (i + 0.5) * thick
        probabilities = [one.says[modality][1] for one in samples]
        left.barh(rows, probabilities, thick * 0.92, label=name_modality(modality), **look)
        for row, (said, p) in zip(rows, (one.says[modality] for one in samples), strict=True):
            left.text(p + 0.02, row, f"{_short(said, 14)} {decimal(p)}", va="center", fontsize=9, parse_math=False)
        right.barh(rows, [one.contributions.get(modality, np.nan) for one in samples], thick * 0.92, **look)
    for row, one in enumerate(samples):
        if not one.contributions:
            right.text(0.01, row, "not exchanged", va="center", fontsize=9, color="0.35")
    left.set(xlim=(0, 1.45), xlabel="says: reading's class and probability")
    left.set_xticks([0, 0.5, 1])
    right.set_xlabel(wrap("carries: contribution to the prediction's probability", 3.0))
    right.axvline(0, color="0.3", linewidth=0.8)
    right.xaxis.set_major_locator(MaxNLocator(5))
    for ax in (left, right):
        ax.grid(axis="x", color="0.88")
        ax.set_axisbelow(True)
    titles = ["\n".join(_short(line, 26) for line in one.title.splitlines()) for one in samples]
    left.set_yticks(range(len(samples)), titles, fontsize=9, parse_math=False)
    left.set_ylim(len(samples) - 0.5, -0.5)
    left.set_ylabel("sample: what the model says (confidence)")
    handles, labels = left.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(modalities), fontsize=9, frameon=False)
    set_title(fig, "Samples of largest conflict: what each modality says, and what it carries", context)
    return save(fig, save_path)


def _short(name: str, letters: int) -> str:
    """A name of so many letters at most."""
    return name if len(name) <= letters else f"{name[: letters - 2].rstrip()} …"
