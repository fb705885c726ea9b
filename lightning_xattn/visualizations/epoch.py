"""The figures of an epoch: mean maps per class, entropy of each head, alignment by outcome."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray

from lightning_xattn.attention import Direction, TokenAxis
from lightning_xattn.errors import SettingError
from lightning_xattn.functional.intervals import MINIMUM_GROUP
from lightning_xattn.messages import SINGLE_KEY, decimal
from lightning_xattn.visualizations.drawing import (
    WIDTH,
    arrow,
    as_array,
    count_classes,
    draw_colour_bar,
    draw_mesh,
    name_rows,
    new_figure,
    place_tokens,
    print_value,
    set_title,
    wrap,
    write_note,
)
from lightning_xattn.visualizations.lifts import draw_lift_bar, lift_scale
from lightning_xattn.visualizations.output import save

_GROUPS = {"target": " per true class", "prediction": " per predicted class", None: ""}
_HISTOGRAM_BARS = 40
# Alignments closer together than this are drawn close together instead of being zoomed apart.
_NARROWEST_ALIGNMENT_RANGE = 0.05


@dataclass(frozen=True, eq=False)
class OutcomeSummary:
    """The alignment of the samples of one outcome (predicted correctly, or incorrectly).

    Parameters
    ----------
    histogram
        ``(bins,)`` number of samples in each bin of alignment.
    mean
        Mean alignment, in [-1, 1]; NaN without a sample.
    class_means
        ``(classes,)`` mean alignment within each class; NaN without a sample.
    class_intervals
        ``(classes, 2)`` ends of their 95 % intervals; NaN where there is none.
    class_counts
        ``(classes,)`` number of samples behind them.
    groups
        How many groups (patients, recordings) the samples belong to, where this is known.

    Examples
    --------
    >>> OutcomeSummary([3, 1], mean=-0.25, class_means=[-0.25], class_intervals=[(-0.8, 0.3)], class_counts=[4]).mean
    -0.25
    """

    histogram: ArrayLike
    mean: float
    class_means: ArrayLike
    class_intervals: ArrayLike
    class_counts: ArrayLike
    groups: int | None = None


def plot_class_attention(
    maps: ArrayLike,
    counts: ArrayLike,
    class_names: Sequence[str],
    *,
    direction: str,
    query_axis: TokenAxis | None = None,
    key_axis: TokenAxis | None = None,
    group_by: str | None = "target",
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw the mean attention map of each class, all on one colour scale.

    The colour is the *lift over uniform*: mean weight times the number of keys. A weight depends on how many keys
    share the attention (0.008 is uniform for 119 keys); a lift of 3 is three times uniform for any model. The
    scale is linear, because weights add up, and covers all panels and 1 (uniform, a line in the colour bar).

    The axis with more tokens lies horizontally (the keys if equal), so that both directions are laid out alike;
    axis titles say which holds the queries. The first token is left, or at the top. A token with a span is drawn
    around the span's centre, from midpoint to midpoint between neighbouring centres, as windows may overlap.

    Parameters
    ----------
    maps
        ``(classes, queries, keys)`` mean attention weights in [0, 1]; NaN where undefined.
    counts
        ``(classes,)`` number of samples behind each map; a class with none is an empty panel.
    class_names
        A name for each class.
    direction
        ``<query>_to_<key>``, e.g. ``eeg_to_spec``.
    query_axis, key_axis
        What the tokens are; None: they are numbered.
    group_by
        What the classes are: ``"target"`` (true class), ``"prediction"`` (predicted class) or None (no classes).
    context
        Where the numbers come from, for the title, e.g. ``"val, epoch 3, layer fusion"``.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    ShapeError
        If the maps, the counts, the names and the axes do not fit each other.
    SettingError
        If there is no class, ``direction`` or ``group_by`` is not one, an axis' spans do not ascend, or the
        suffix of ``save_path`` is not one that matplotlib can write.

    Examples
    --------
    >>> maps = torch.randn(2, 9, 12).softmax(-1)  # of each class
    >>> figure = plot_class_attention(maps, [40, 30], ["cat", "dog"], direction="image_to_text", save_path="maps.png")
    >>> Path("maps.png").is_file()
    True
    """
    classes, sides = count_classes(class_names), Direction.parse(direction)
    weights = as_array("maps", maps, classes=classes, queries=None, keys=None)
    samples = as_array("counts", counts, classes=classes)
    _, queries, keys = weights.shape
    lift = np.where(samples[:, None, None] > 0, weights * keys, np.nan)
    across = place_tokens("key", sides.key, keys, key_axis)
    down = place_tokens("query", sides.query, queries, query_axis)
    if queries > keys:
        lift, across, down = lift.swapaxes(1, 2), down, across

    columns = 1 if classes == 1 else 2 if classes <= 4 else 3
    rows = math.ceil(classes / columns)
    panel_width, panel_height = 7.4 / columns, down.height
    fig = new_figure(WIDTH, 1.6 + rows * (panel_height + 0.4))
    axes = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    scale = lift_scale(lift)
    for index, name in enumerate(class_names):
        ax = axes[index]
        draw_mesh(ax, across.edges, down.edges, lift[index], scale)
        # A class name is no formula, whatever dollars are in it.
        ax.set_title(wrap(f"{name} (n={int(samples[index])})", panel_width), fontsize=10, parse_math=False)
        if np.isnan(lift[index]).all():
            write_note(ax, "undefined" if samples[index] else "no samples")
        across.label(ax, "x", panel_width)
        down.label(ax, "y", panel_height)
        # Only the outer panels show their axes, and above a gap in the last row is an outer one.
        ax.xaxis.set_visible(index + columns >= classes)
        ax.yaxis.set_visible(index % columns == 0)
        ax.tick_params(labelbottom=True)
    axes[0].invert_yaxis()
    for ax in axes[classes:]:
        ax.set_axis_off()

    fig.supxlabel(wrap(across.title, WIDTH), fontsize=10)
    fig.supylabel(wrap(down.title, fig.get_figheight()), fontsize=10)
    draw_lift_bar(fig, axes, scale, f"lift over uniform: mean weight / (1/{keys})")
    remark = f"These maps are of {SINGLE_KEY}." if keys == 1 else ""
    set_title(fig, f"Mean attention {arrow(sides)}{per_group(group_by)}", context, remark)
    return save(fig, save_path)


def plot_head_entropy(
    entropy: Mapping[str, ArrayLike],
    counts: ArrayLike,
    class_names: Sequence[str],
    *,
    group_by: str | None = "target",
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw the normalised entropy of each head for each class, a panel per direction, on the scale 0 to 1.

    Parameters
    ----------
    entropy
        For each direction (``eeg_to_spec``) a ``(classes, heads)`` array in [0, 1], 0 = one key, 1 = diffuse;
        NaN where undefined.
    counts
        ``(classes,)`` number of samples of each class.
    class_names
        A name for each class.
    group_by
        What the classes are: ``"target"`` (true class), ``"prediction"`` (predicted class) or None (no classes).
    context
        Where the numbers come from, for the title, e.g. ``"val, epoch 3, layer fusion"``.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    ShapeError
        If the arrays and the names do not fit each other.
    SettingError
        If there is no class or no direction, or a direction, ``group_by`` or the suffix of ``save_path`` is not one.

    Examples
    --------
    >>> entropy = {"image_to_text": torch.rand(2, 8)}  # two classes, eight heads
    >>> figure = plot_head_entropy(entropy, [40, 30], ["cat", "dog"], save_path="entropy.png")
    >>> Path("entropy.png").is_file()
    True
    """
    if not entropy:
        raise SettingError("The entropy of at least one direction is needed; got none.")
    classes = count_classes(class_names)
    samples = as_array("counts", counts, classes=classes)
    panels = {
        Direction.parse(name): as_array(f"entropy['{name}']", values, classes=classes, heads=None)
        for name, values in entropy.items()
    }
    heads = max(values.shape[1] for values in panels.values())
    rows, columns = (1, len(panels)) if len(panels) * heads <= 16 else (len(panels), 1)
    fig = new_figure(max(WIDTH, 2.6 + 0.4 * heads), 1.2 + rows * (0.8 + 0.38 * classes))
    axes = fig.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    scale = Normalize(0.0, 1.0)
    for ax, (direction, values) in zip(axes, panels.items(), strict=True):
        draw_mesh(ax, np.arange(values.shape[1] + 1) - 0.5, np.arange(classes + 1) - 0.5, values, scale)
        for (row, column), value in np.ndenumerate(values):
            print_value(ax, column, row, value, scale)
        ax.set_title(arrow(direction), fontsize=10)
        ax.set_xticks(range(values.shape[1]))
        ax.set_xlabel("head")
    name_rows(axes[0], class_names, [f"n={int(n)}" for n in samples])

    draw_colour_bar(fig, axes, scale, "normalised entropy\n(0: one key, 1: diffuse)")
    undefined = any(np.isnan(values).any() for values in panels.values())
    remark = "Hatched: undefined (no samples in the class, or a single key to attend to)." if undefined else ""
    set_title(fig, f"Attention entropy of each head{per_group(group_by)}", context, remark)
    return save(fig, save_path)


def plot_outcome_alignment(
    correct: OutcomeSummary,
    incorrect: OutcomeSummary,
    edges: ArrayLike,
    auroc: tuple[float, float, float],
    class_names: Sequence[str],
    *,
    group_by: str | None = "target",
    group_noun: str | None = None,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw how the alignment of correctly predicted samples differs from that of the others.

    Above, the density of each outcome (area 1) over the occupied range, whole fine bins summed into about 40
    bars, and lines at the means. Below, on the same axis, the mean of each class with its 95 % interval.

    Parameters
    ----------
    correct, incorrect
        The two outcomes.
    edges
        ``(bins + 1,)`` ascending edges of the histograms' bins, usually from -1 to 1.
    auroc
        Probability that a correct sample is the better aligned one, and the ends of its 95 % interval. NaN where too
        few samples allow no claim, and the figure says so.
    class_names
        A name for each class.
    group_by
        What the classes are: ``"target"`` (true class), ``"prediction"`` (predicted class) or None (no classes).
    group_noun
        What the intervals are by, such as ``"patients"``; None: by sample.
    context
        Where the numbers come from, for the title, e.g. ``"val, epoch 3, layer fusion"``.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    ShapeError
        If the arrays and the names do not fit each other.
    SettingError
        If there is no class, or ``group_by`` or the suffix of ``save_path`` is not one.

    Examples
    --------
    >>> correct = OutcomeSummary([10, 30], 0.25, [0.25], [(0.1, 0.4)], [40])
    >>> incorrect = OutcomeSummary([15, 15], 0.0, [0.0], [(-0.2, 0.2)], [30])
    >>> auroc = 0.625, 0.5, 0.74
    >>> figure = plot_outcome_alignment(correct, incorrect, [-1, 0, 1], auroc, ["cat"], save_path="outcomes.png")
    >>> Path("outcomes.png").is_file()
    True
    """
    classes, bounds = count_classes(class_names), as_array("edges", edges, edges=None)
    outcomes = {"correct": correct, "incorrect": incorrect}
    histograms = np.stack(
        [as_array(f"{name} histogram", outcome.histogram, bins=len(bounds) - 1) for name, outcome in outcomes.items()]
    )
    bars, bar_edges = _readable_bars(histograms, bounds)

    fig = new_figure(WIDTH, 4.2 + 0.4 * classes)
    above, below = fig.subplots(2, 1, sharex=True, height_ratios=[2.6, 0.4 + 0.4 * classes])
    handles, class_counts, few = [], [], False
    for (name, outcome), counts in zip(outcomes.items(), bars, strict=True):
        look, total = LOOKS[name], int(counts.sum())
        face = look.colour if look.filled else "white"
        label = f"{name} (no samples)"
        if total:
            size = f"{total}" if outcome.groups is None else f"{total} of {outcome.groups} {group_noun or 'groups'}"
            label = f"{name} (n = {size}, mean {decimal(outcome.mean, 3)})"
            density = counts / (total * np.diff(bar_edges))
            alpha = 0.35 if look.filled else 1.0
            above.stairs(density, bar_edges, color=look.colour, fill=look.filled, alpha=alpha, linewidth=1.5)
            above.axvline(outcome.mean, color=look.colour, linestyle=look.line, linewidth=2)
        means = as_array(f"{name} class_means", outcome.class_means, classes=classes)
        ends = as_array(f"{name} class_intervals", outcome.class_intervals, classes=classes, ends=2)
        samples = as_array(f"{name} class_counts", outcome.class_counts, classes=classes)
        few |= bool((np.isnan(ends).any(axis=1) & (samples > 0)).any())
        errors = np.abs(np.transpose(ends) - means)
        rows = np.arange(classes) + look.offset
        below.errorbar(means, rows, xerr=errors, fmt=look.marker, color=look.colour, markerfacecolor=face, capsize=3)
        key = Line2D([], [], color=look.colour, linestyle=look.line, linewidth=2, label=label)
        key.set(marker=look.marker, markerfacecolor=face)
        handles.append(key)
        class_counts.append(samples)
    if not histograms.any():
        write_note(above, "no sample with a defined alignment")
    margin = 0.02 * (bar_edges[-1] - bar_edges[0])
    above.set_xlim(bar_edges[0] - margin, bar_edges[-1] + margin)
    above.set_ylabel("density")
    above.set_title(_claim(*auroc, group_noun), fontsize=10)
    below.set_xlabel("alignment of the two directions (Pearson r)")
    remark = f"; no interval: fewer than {MINIMUM_GROUP} {group_noun or ''}".rstrip() if few else ""
    title = f"Mean{per_group(group_by)}, with its {interval_by(group_noun)} (correct/incorrect samples{remark})"
    below.set_title(wrap(title, WIDTH - 1.5), fontsize=10)
    below.grid(axis="x", color="0.85")
    name_rows(below, class_names, [f"{int(right)}/{int(wrong)}" for right, wrong in zip(*class_counts, strict=True)])
    fig.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    set_title(fig, "Alignment of correct against incorrect predictions", context)
    return save(fig, save_path)


@dataclass(frozen=True)
class Look:
    """What tells an outcome apart, in print as well: fill, line and marker, not colour alone."""

    colour: str
    filled: bool
    line: Literal["-", "--"]
    marker: str
    offset: float


LOOKS = {
    "correct": Look("#0072B2", True, "-", "o", -0.15),
    "incorrect": Look("#C04A00", False, "--", "s", 0.15),
}


def per_group(group_by: str | None) -> str:
    """End a title with what the classes are."""
    if group_by not in _GROUPS:
        raise SettingError(f"'group_by' must be one of 'target', 'prediction', None; got '{group_by}'.")
    return _GROUPS[group_by]


def interval_by(group_noun: str | None) -> str:
    """Name the interval."""
    return "95 % interval" + (f" by {group_noun}" if group_noun else "")


def _claim(auroc: float, low: float, high: float, group_noun: str | None) -> str:
    """Say whether alignment tells correct from incorrect, or that there are too few samples to say."""
    if math.isnan(auroc):
        return f"No AUROC (fewer than {MINIMUM_GROUP} {group_noun or 'samples'} of an outcome: nothing claimed)"
    ends = f"{interval_by(group_noun)} {low:.3f} to {high:.3f}"
    return f"AUROC {auroc:.3f}, {ends} (0.5: alignment does not tell them apart)"


def _readable_bars(histograms: NDArray[Any], edges: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sum whole fine bins over the occupied range into about 40 bars: ``(outcomes, bars)`` and edges."""
    occupied = np.flatnonzero(histograms.any(axis=0))
    if not occupied.size:
        return np.zeros((len(histograms), 1)), edges[[0, -1]]
    first, last = occupied[0], occupied[-1] + 1
    spare = (_NARROWEST_ALIGNMENT_RANGE - (edges[last] - edges[first])) / 2
    if spare > 0:
        first = max(np.searchsorted(edges, edges[first] - spare, "right") - 1, 0)
        last = min(np.searchsorted(edges, edges[last] + spare), len(edges) - 1)
    # Bars of one width: a narrower last one would stand out by its density alone.
    width = math.ceil((last - first) / _HISTOGRAM_BARS)
    bars = math.ceil((last - first) / width)
    last = min(first + bars * width, len(edges) - 1)
    starts = np.arange(max(last - bars * width, 0), last, width)
    return np.add.reduceat(histograms[:, :last], starts, axis=1), edges[np.r_[starts, last]]
