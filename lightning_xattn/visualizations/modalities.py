"""The figures of what modalities say and contribute: conflict against confidence, shares, and single samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.wording import decimal, name_modality
from lightning_xattn.functional.intervals import MINIMUM_GROUP
from lightning_xattn.visualizations.comparison import OUTCOMES, Mean, require_groups, say_count
from lightning_xattn.visualizations.drawing import HUES, as_array, wrap
from lightning_xattn.visualizations.epoch import LOOKS, interval_by, per_group
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pages import BESIDE, LINE, MARGIN, NUMBERS, SMALL, Page, RowNames, cut_key, mark_cut

_HATCHES = ("", "///", "...", "xxx")
"""Beside the colours of the modalities."""
_INTERVAL: dict[str, Any] = {"fmt": "none", "color": "black", "capsize": 2.5, "linewidth": 1}


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
        A sentence on how well each score detects errors, by "confidence" and "conflict".
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
    page = Page("Conflict against confidence, errors marked", context)
    words = {"confidence": "confidence of the prediction", "conflict": "conflict of the probes"}
    for name in words:
        page.write((claims or {}).get(name, ""))
    (ax,) = page.row(3.1, left=BESIDE + LINE, above=0.08, below=NUMBERS + LINE)
    known = np.isfinite(x) & np.isfinite(y)
    handles: list[Artist] = []
    for name in OUTCOMES:
        look, chosen = LOOKS[name], known & (right == (name == "correct"))
        face = look.colour if look.filled else "none"
        style: dict[str, Any] = {"alpha": 0.35, "linewidths": 0} if look.filled else {"linewidths": 1.1}
        label = f"{name} (n={int(chosen.sum())})"
        handles.append(
            ax.scatter(
                *(x[chosen], y[chosen], 20),
                **{"marker": look.marker, "facecolor": face, "edgecolor": look.colour, "label": label, **style},
            )
        )
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    ax.set_xlabel(words["confidence"], fontsize=SMALL, labelpad=1)
    ax.set_ylabel(words["conflict"], fontsize=SMALL)
    ax.grid(color="0.9")
    page.legend(handles)
    return save(page.finish(), save_path)


def plot_contribution_shares(
    shares: Mapping[str, tuple[Sequence[Mean], Sequence[Mean]]],
    class_names: Sequence[str],
    *,
    classes_by: str | None = "target",
    group_noun: str | None = None,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw each modality's share of the contributions, with 95 % intervals, by class and by outcome.

    Parameters
    ----------
    shares
        For each modality a group per class, and the groups of correct and of incorrect predictions.
    class_names, classes_by, group_noun, context, save_path
        As in ``plot_class_comparison``.

    Raises
    ------
    ShapeError
        If a modality does not have as many groups as there are classes, or two outcomes.
    SettingError
        If there is no modality or more than four, or ``classes_by`` or the suffix of ``save_path`` is not one.

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
    groups = [*next(iter(shares.values()))[0], *next(iter(shares.values()))[1]]
    rows = RowNames.of(names, [f"n={say_count(one)}" for one in groups])
    title = f"What each modality contributes{per_group(classes_by)} and outcome, with its {interval_by(group_noun)}"
    page, thick = Page(title, context), 0.8 / len(shares)
    height = max(rows.row_height, 0.11 * len(shares) + 0.08) * len(names)
    (ax,) = page.row(height, left=rows.left, above=0.05, below=NUMBERS + 2 * LINE)
    ends = [end for both in shares.values() for of in both for one in of for end in (one.low, one.high, one.mean)]
    finite = [end for end in ends if np.isfinite(end)]
    # An interval of few samples may reach far beyond any share.
    ax.set_xlim(max(min([0.0, *finite]) - 0.03, -0.6), min(max([1.0, *finite]) + 0.03, 1.6))
    handles: list[Artist] = []
    is_cut = False
    for i, (name, (classes, outcomes)) in enumerate(shares.items()):
        of_modality = [*classes, *outcomes]
        places = np.arange(len(names)) - 0.4 + (i + 0.5) * thick
        means, low, high = (np.array([getattr(one, part) for one in of_modality]) for part in ("mean", "low", "high"))
        look: dict[str, Any] = {"facecolor": HUES[i], "hatch": _HATCHES[i], "edgecolor": "white"}
        ax.barh(places, means, thick * 0.92, **look)
        ax.errorbar(means, places, xerr=np.abs([low - means, high - means]), **_INTERVAL)
        is_cut |= mark_cut(ax, "x", places, low, high)
        for place, mean, group in zip(places, means, of_modality, strict=True):
            if np.isnan(mean) and group.n:
                ax.text(0.01, place, "undefined", va="center", fontsize=SMALL)
        handles.append(Patch(**look, label=name_modality(name)))
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.axhline(len(class_names) - 0.5, color="0.4", linewidth=0.8)
    ax.grid(axis="x", color="0.9")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    ax.set_xlabel(wrap("share of the mean contribution (below 0: opposes the predictions)", 3.0, SMALL))
    ax.xaxis.label.set_fontsize(SMALL)
    rows.label(ax)
    handles.append(Line2D([], [], color="black", linewidth=1, label=interval_by(group_noun)))
    page.legend([*handles, *([cut_key()] if is_cut else [])])
    remarks = [f"n: samples, and of how many {group_noun}."] if group_noun else []
    if any(one.n and np.isfinite(one.mean) and np.isnan(one.low) for one in groups):
        remarks.append(f"No interval: fewer than {MINIMUM_GROUP} {group_noun or 'samples'}.")
    page.write(" ".join(remarks))
    return save(page.finish(), save_path)


class SampleRow(NamedTuple):
    """What is drawn of a sample.

    Examples
    --------
    >>> SampleRow("sample 7", probes={"eeg": ("LPD", 0.8)}, contributions={"eeg": 0.3}).probes["eeg"]
    ('LPD', 0.8)
    """

    title: str
    """Of one or two lines."""
    probes: Mapping[str, tuple[str, float]]
    """By modality, the class that its probe predicts, and its probability."""
    contributions: Mapping[str, float]
    """By modality, signed; empty: not known."""


def plot_conflicting_samples(
    samples: Sequence[SampleRow],
    *,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw what each probe predicts for some samples, and what each modality contributes to the prediction.

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
    >>> probes = {"eeg": ("LPD", 0.8), "spec": ("GPD", 0.6)}
    >>> row = SampleRow("sample 7", probes, contributions={"eeg": 0.3, "spec": -0.1})
    >>> figure = plot_conflicting_samples([row], save_path="samples.png")
    >>> Path("samples.png").is_file()
    True
    """
    if not samples:
        raise SettingError("At least one sample is needed; got none.")
    modalities = list(samples[0].probes)
    page = Page("Samples of largest conflict: what each probe predicts, and what each modality contributes", context)
    page.write("Over the bars: sample, the model's prediction (confidence), and the true class.")
    # Of each sample a line of text, and below it a bar for each modality.
    lines = 1.6 + len(modalities)
    left, right = page.row(
        LINE * lines * len(samples), widths=(3, 2), left=1.5 * MARGIN, above=0.05, below=NUMBERS + 2 * LINE
    )
    tops = lines * np.arange(len(samples))
    handles = []
    for i, modality in enumerate(modalities):
        look: dict[str, Any] = {"facecolor": HUES[i], "hatch": _HATCHES[i], "edgecolor": "white"}
        places = tops + 1.5 + i
        left.barh(places, [one.probes[modality][1] for one in samples], 0.9, **look)
        right.barh(places, [one.contributions.get(modality, np.nan) for one in samples], 0.9, **look)
        for place, one in zip(places, samples, strict=True):
            predicted, p = one.probes[modality]
            text = f"{_short(predicted, 11)} {decimal(p)}"
            left.text(p + 0.02, place, text, va="center", fontsize=SMALL, parse_math=False)
        handles.append(Patch(**look, label=name_modality(modality)))
    for top, one in zip(tops, samples, strict=True):
        # Over both panels, as the one on the right has nothing to say there.
        title = ", ".join(_short(line, 25) for line in one.title.splitlines())
        left.text(0, top + 0.5, title, va="center", fontsize=SMALL, parse_math=False)
        if not one.contributions:
            right.text(0.01, top + 1 + len(modalities) / 2, "not permuted", va="center", fontsize=SMALL, color="0.35")
    right.patch.set_visible(False)
    left.set(xlim=(0, 1.75), xticks=[0, 0.5, 1])
    left.set_xlabel("probe: predicted class\nand its probability", fontsize=SMALL, labelpad=1)
    right.set_xlabel("contribution to\nthe probability", fontsize=SMALL, labelpad=1)
    right.axvline(0, color="0.3", linewidth=0.8)
    right.xaxis.set_major_locator(MaxNLocator(3))
    for ax in (left, right):
        ax.set_ylim(lines * len(samples), 0)
        ax.grid(axis="x", color="0.9")
        ax.yaxis.set_visible(False)
        ax.spines.left.set_visible(False)
    page.legend(handles)
    return save(page.finish(), save_path)


def _short(name: str, letters: int) -> str:
    """A name cut to this number of letters."""
    return name if len(name) <= letters else f"{name[: letters - 2].rstrip()} …"
