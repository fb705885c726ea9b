"""The figures of one sample: its attention maps, and how far the two directions agree."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from lightning_xattn.core.attention import Attention, Direction, TokenAxis
from lightning_xattn.core.errors import ShapeError
from lightning_xattn.core.wording import decimal
from lightning_xattn.functional import (
    Rows,
    alignment,
    best_head_matching,
    head_alignment_matrix,
    lift_map,
    prepare_rows,
)
from lightning_xattn.visualizations.drawing import (
    UNDEFINED,
    WIDTH,
    arrow,
    new_figure,
    set_title,
    show_key,
    undefined_key,
    wrap,
)
from lightning_xattn.visualizations.lifts import (
    NO_LIFT,
    draw_lift_bar,
    draw_lift_map,
    label_panel,
    lie_along,
    lift_range,
    lift_scale,
    says_nothing,
)
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pairs import (
    AttentionDict,
    check_head,
    check_sample,
    place_pair,
    read_both,
    read_pair,
    warn_of_broken_rows,
)

LIFT = "lift over uniform: weight times keys"
_PANELS_WIDTH = 7.2  # inches for panels and their labels beside a colour bar

# The guide's thresholds of agreement, in colours that differ in lightness too, and in hatching.
_AGREEMENT: dict[str, dict[str, Any]] = {
    "high (> 0.5)": {"facecolor": "#0072B2"},
    "medium": {"facecolor": "#E9C46A", "hatch": "///"},
    "disagree (< 0)": {"facecolor": "#B23A00", "hatch": "xxx"},
}
_HIGH = 0.5


def plot_cross_modal_attention(
    attention_dict: AttentionDict,
    sample_idx: int = 0,
    *,
    axes: Mapping[str, TokenAxis] | None = None,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw one sample's attention in both directions, averaged over heads, each on its own colour scale.

    The colour is the lift over uniform, weight times number of keys, as the two directions have different numbers of
    keys. Each has its own scale, so that the stronger one does not blank the other. In both panels the modality with
    more tokens lies horizontally; the axis titles say which holds the queries.

    Parameters
    ----------
    attention_dict
        Weights ``(batch, heads, queries, keys)`` by direction (or one direction alone), or an ``AttentionPair``, whose
        masks then count.
    sample_idx
        Which sample of the batch.
    axes
        What the tokens of a modality are, by modality; the others are numbered.
    context
        What to know of the sample, for the title, e.g. ``"sample 3001, predicted LPD (0.82), true GPD"``; its place in
        the batch when empty.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    SettingError
        If there is no such sample or direction, or the suffix of ``save_path`` is not one that can be written.
    ShapeError
        If the directions or an axis do not fit.

    Examples
    --------
    >>> logits = torch.randn(4, 8, 9, 12)
    >>> weights = {"eeg_to_spec": logits.softmax(-1), "spec_to_eeg": logits.mT.softmax(-1)}
    >>> figure = plot_cross_modal_attention(weights, sample_idx=2, save_path="attention.png")
    >>> Path("attention.png").is_file()
    True
    """
    pair = read_pair(attention_dict)
    check_sample(sample_idx, len(pair[0].attention))
    maps = [_SampleMap(rows, sample_idx, axes) for rows in pair]
    height = max(2.4, *(item.down.height for item in maps))
    fig = new_figure(WIDTH, height + 1.8)
    panels = fig.subplots(1, len(maps), squeeze=False)[0]
    _draw_maps(fig, panels, maps, _PANELS_WIDTH / len(maps) - 0.1, height)
    if _has_gaps(maps):
        show_key(fig, undefined_key(NO_LIFT))
    remark = "Each direction has its own scale." if len(maps) > 1 else ""
    set_title(fig, "Cross-modal attention, mean over heads", context or f"sample {sample_idx}", remark)
    return save(fig, save_path)


def plot_attention_heatmap(
    attention_weights: Any,
    title: str = "Attention",
    *,
    sample_idx: int = 0,
    head: int | None = None,
    direction: str | None = None,
    query_axis: TokenAxis | None = None,
    key_axis: TokenAxis | None = None,
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw one attention map as lift over uniform, the longer axis horizontally.

    Parameters
    ----------
    attention_weights
        Tensor or array, ``(queries, keys)``, ``(heads, queries, keys)`` or ``(batch, heads, queries, keys)``, rows
        sum to 1.
    title
        Title of the figure.
    sample_idx
        Which sample, where there is a batch.
    head
        Which head; None: the mean over heads.
    direction
        ``<query>_to_<key>``, to name the axes.
    query_axis, key_axis
        What the tokens are; None: they are numbered.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    ShapeError
        If the weights do not have two to four axes, or a token axis does not fit.
    SettingError
        If there is no such sample or head, ``direction`` is not one, or the suffix of ``save_path`` cannot be written.

    Examples
    --------
    >>> weights = torch.randn(9, 12).softmax(-1)
    >>> figure = plot_attention_heatmap(weights, direction="eeg_to_spec", save_path="map.png")
    >>> Path("map.png").is_file()
    True
    """
    weights = torch.as_tensor(attention_weights).cpu()
    if weights.dim() not in (2, 3, 4):
        raise ShapeError(
            "attention_weights must be (queries, keys), (heads, queries, keys) or (batch, heads, queries, keys); "
            f"got shape {tuple(weights.shape)}."
        )
    weights = weights[(None,) * (4 - weights.dim())]
    check_sample(sample_idx, len(weights))
    heads = weights.shape[1]
    check_head(head, heads)
    sides = Direction("query", "key") if direction is None else Direction.parse(direction)
    rows = prepare_rows(Attention(sides, weights if head is None else weights[:, head : head + 1]))
    warn_of_broken_rows(rows)
    given = {sides.query: query_axis, sides.key: key_axis}
    item = _SampleMap(rows, sample_idx, {side: axis for side, axis in given.items() if axis is not None})
    which = f"head {head}" if head is not None else "mean over heads" if heads > 1 else ""
    item.title = ", ".join(filter(None, (which, item.range)))
    fig = new_figure(WIDTH, item.down.height + 2.0)
    _draw_maps(fig, np.array([fig.subplots()]), [item], _PANELS_WIDTH, item.down.height)
    if _has_gaps([item]):
        show_key(fig, undefined_key(NO_LIFT))
    set_title(fig, title, "")
    return save(fig, save_path)


def plot_modality_alignment(
    attention_dict: AttentionDict,
    sample_idx: int = 0,
    *,
    axes: Mapping[str, TokenAxis] | None = None,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw how far the two directions of one sample agree: a bar per head, and below the two averaged maps.

    A bar is the Pearson correlation of a head's forward map with the transposed backward map: over 0.5 high, below 0
    disagreement, medium between; what is undefined has a hatched place and no bar. Heads of the two directions share
    no parameters, so equal indices are a convention (see `functional.head_alignment_matrix`); where the directions have
    different numbers of heads, the bars are the best one-to-one pairs instead. The title has the headline alignment,
    that of the head-averaged maps, which have a scale each.

    Parameters
    ----------
    attention_dict
        Weights ``(batch, heads, queries, keys)`` of both directions, or an ``AttentionPair``, whose masks then count.
    sample_idx
        Which sample of the batch.
    axes
        What the tokens of a modality are, by modality; the others are numbered.
    context
        What to know of the sample, for the title, e.g. ``"sample 3001, predicted LPD (0.82), true GPD"``; its place in
        the batch when empty.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    SettingError
        If there is one direction only, no such sample, or the suffix of ``save_path`` is not one that can be written.
    ShapeError
        If the directions or an axis do not fit.

    Examples
    --------
    >>> logits = torch.randn(4, 8, 9, 12)
    >>> weights = {"eeg_to_spec": logits.softmax(-1), "spec_to_eeg": logits.mT.softmax(-1)}
    >>> figure = plot_modality_alignment(weights, sample_idx=0, save_path="alignment.png")
    >>> Path("alignment.png").is_file()
    True
    """
    forward, backward = read_both(attention_dict, "plot_modality_alignment")
    check_sample(sample_idx, len(forward.attention))
    values, names, matched = _bars(forward, backward, sample_idx)
    maps = [_SampleMap(rows, sample_idx, axes) for rows in (forward, backward)]
    height = max(2.0, *(item.down.height for item in maps))
    width = max(WIDTH, 2.6 + 0.4 * len(values))
    fig = new_figure(width, height + 4.6)
    grid = fig.add_gridspec(2, 2, height_ratios=[2.0, height])
    _draw_bars(fig.add_subplot(grid[0, :]), values, names, matched)
    panels = np.array([fig.add_subplot(grid[1, column]) for column in range(2)])
    _draw_maps(fig, panels, maps, (width - WIDTH + _PANELS_WIDTH) / 2 - 0.1, height)
    levels = [Patch(label=label, edgecolor="black", **look) for label, look in _AGREEMENT.items()]
    show_key(fig, *levels, *([undefined_key()] if _has_gaps(maps) or np.isnan(values).any() else []))
    headline = float(alignment(forward, backward)[sample_idx])
    said = "undefined" if np.isnan(headline) else f"Pearson r = {decimal(headline)} of the head-averaged maps"
    set_title(fig, f"Modality alignment: {said}", context or f"sample {sample_idx}")
    return save(fig, save_path)


class _SampleMap:
    """One sample's head-averaged map of one direction, laid along, with the texts of its panel."""

    def __init__(self, rows: Rows, sample: int, axes: Mapping[str, TokenAxis] | None) -> None:
        lifts = lift_map(rows)[sample].numpy()
        self.values, self.across, self.down = lie_along(lifts, *place_pair(rows, axes))
        self.note = says_nothing(rows, lifts, sample)
        self.range = lift_range(lifts)
        self.title = f"{arrow(rows.direction)} ({self.range})"


def _draw_maps(fig: Figure, panels: NDArray[Any], maps: list[_SampleMap], width: float, height: float) -> None:
    """Draw the directions side by side, each on its scale; ``width`` and ``height`` are a panel's, in inches."""
    for ax, item in zip(panels, maps, strict=True):
        scale = lift_scale(item.values)
        draw_lift_map(ax, item.values, item.across, item.down, scale, item.note and wrap(item.note, width))
        label_panel(ax, item.across, item.down, width, height)
        ax.set_title(wrap(item.title, width), fontsize=10)
        draw_lift_bar(fig, np.array([ax]), scale, wrap(f"{LIFT} (line: 1)", width), inches=width, is_below=True)


def _has_gaps(maps: list[_SampleMap]) -> bool:
    return any(np.isnan(item.values).any() for item in maps)


def _bars(forward: Rows, backward: Rows, sample: int) -> tuple[NDArray[Any], list[str], bool]:
    """Alignment of each head with the same, or the best matching, head; the names of the bars; whether matched."""
    matrix = head_alignment_matrix(forward, backward)[sample]
    heads, others = matrix.shape
    if heads == others:
        return matrix.diagonal().numpy(), [str(head) for head in range(heads)], False
    pairs = best_head_matching(matrix)
    return np.array([float(matrix[pair]) for pair in pairs]), [f"{i}, {j}" for i, j in pairs], True


def _draw_bars(ax: Axes, values: NDArray[Any], names: list[str], matched: bool) -> None:
    for place, value in enumerate(values):
        if np.isnan(value):
            ax.axvspan(place - 0.4, place + 0.4, **UNDEFINED)
            ax.text(place, 0, "undefined", rotation=90, fontsize=9, ha="center", va="center")
            continue
        level = "high (> 0.5)" if value > _HIGH else "disagree (< 0)" if value < 0 else "medium"
        bar = ax.bar(place, value, width=0.8, edgecolor="black", **_AGREEMENT[level])
        for text in ax.bar_label(bar, [decimal(value)], padding=3, fontsize=9):
            text.set_bbox({"facecolor": "white", "linewidth": 0, "pad": 0.5})
    ax.axhline(0, color="black", linewidth=0.8)
    ax.axhline(_HIGH, color="0.4", linewidth=0.8, linestyle="--")
    ax.set(xlim=(-0.6, len(values) - 0.4), ylim=(-1.2, 1.2), yticks=[-1, -0.5, 0, 0.5, 1], ylabel="Pearson r")
    ax.set_xticks(range(len(values)), names)
    ax.set_xlabel("head of one direction, head of the other" if matched else "head")
    title = (
        "The directions have different numbers of heads: the best one-to-one pairs"
        if matched
        else "Each head with the head of the same number in the other direction"
    )
    ax.set_title(title, fontsize=10)
