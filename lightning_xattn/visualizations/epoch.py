"""The figures of an epoch's attention: mean maps per class, and the entropy of each head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from lightning_xattn.core.attention import Direction, TokenAxis
from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.names import shown
from lightning_xattn.core.wording import SINGLE_KEY
from lightning_xattn.visualizations.drawing import (
    LONGEST_NAME,
    arrow,
    as_array,
    count_classes,
    describe_cells,
    draw_mesh,
    per_group,
    place_tokens,
    print_value,
    text_inches,
    undefined_key,
    wrap,
    write_note,
)
from lightning_xattn.visualizations.lifts import lift_scale
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pages import LINE, MARGIN, NUMBERS, PAGE_WIDTH, RIGHT, SMALL, Page, RowNames

_GAP = 0.28
"""Inches between maps side by side, as numbers of thousands of tokens may stand at their ends."""


def plot_class_attention(
    maps: ArrayLike,
    counts: ArrayLike,
    class_names: Sequence[str],
    *,
    direction: str,
    query_axis: TokenAxis | None = None,
    key_axis: TokenAxis | None = None,
    tokens: tuple[int, int] | None = None,
    classes_by: str | None = "target",
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
    tokens
        How many queries and keys the maps are of, where a cell is the mean of several; None: as many as the maps have.
    classes_by
        What the classes are: ``"target"`` (true class), ``"prediction"`` (predicted class) or None (no classes).
    context
        Where the numbers come from, for the title, e.g. ``"val, epoch 3, layer fusion"``.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    ShapeError
        If the maps, the counts, the names, the axes and the numbers of tokens do not fit each other.
    SettingError
        If there is no class, ``direction`` or ``classes_by`` is not one, an axis' spans do not ascend, or the
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
    _, *cells = weights.shape
    queries, keys = tokens or cells
    lift = np.where(samples[:, None, None] > 0, weights * keys, np.nan)
    across = place_tokens("key", sides.key, cells[1], key_axis, keys)
    down = place_tokens("query", sides.query, cells[0], query_axis, queries)
    if len(down) > len(across):
        lift, across, down = lift.swapaxes(1, 2), down, across

    columns = 1 if classes == 1 else 2
    rows = math.ceil(classes / columns)
    width, height = 4.0 / columns, min(max(down.height, 0.95), 3.0)
    asks = wrap(down.title, rows * height, SMALL)
    left = MARGIN + LINE * len(asks.splitlines()) + down.room("y", height)
    page = Page(f"Mean attention {arrow(sides)}{per_group(classes_by)}", context)
    page.write(describe_cells((queries, keys), (cells[0], cells[1])))
    if keys == 1:
        page.write(f"These maps are of {SINGLE_KEY}.")
    # A class name is no formula, whatever dollars are in it.
    names = [shown(name, LONGEST_NAME) for name in class_names]
    titles = [wrap(f"{name} (n={int(n)})", width, SMALL) for name, n in zip(names, samples, strict=True)]
    scale, axes, since = lift_scale(lift), [], page.used
    for start in range(0, classes, columns):
        lines = max(len(title.splitlines()) for title in titles[start : start + columns])
        axes += page.row(height, widths=(1,) * columns, left=left, gap=_GAP, above=0.07 + LINE * lines, below=0)
    for index, (ax, title) in enumerate(zip(axes, titles, strict=False)):
        draw_mesh(ax, across.edges, down.edges, lift[index], scale)
        ax.invert_yaxis()
        ax.set_title(title, fontsize=SMALL, pad=3, parse_math=False)
        if np.isnan(lift[index]).all():
            write_note(ax, "undefined" if samples[index] else "no samples", SMALL)
        # Only the outer panels show their axes, and above a gap in the last row is an outer one.
        if index + columns >= classes:
            across.label(ax, "x", width)
        if index % columns == 0:
            down.label(ax, "y", height)
        ax.xaxis.set_visible(index + columns >= classes)
        ax.yaxis.set_visible(index % columns == 0)
    for ax in axes[classes:]:
        ax.set_axis_off()
    page.skip(across.room("x", width))
    page.name_axes(across.title, asks, since)
    page.colour_bar(scale, f"lift over uniform: mean weight / (1/{keys}) (line: 1)", left, mark=1.0)
    if np.isnan(lift).any():
        page.legend([undefined_key()])
    return save(page.finish(), save_path)


def plot_head_entropy(
    entropy: Mapping[str, ArrayLike],
    counts: ArrayLike,
    class_names: Sequence[str],
    *,
    classes_by: str | None = "target",
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
    classes_by
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
        If there is no class or no direction, or a direction, ``classes_by`` or the suffix of ``save_path`` is not one.

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
    rows = RowNames.of(class_names, [f"n={int(n)}" for n in samples])
    page = Page(f"Attention entropy of each head{per_group(classes_by)}", context)
    scale = Normalize(0.0, 1.0)
    for direction, values in panels.items():
        (ax,) = page.row(rows.height, left=rows.left, above=0.24, below=NUMBERS + LINE)
        heads = values.shape[1]
        draw_mesh(ax, np.arange(heads + 1) - 0.5, np.arange(classes + 1) - 0.5, values, scale)
        # Where a cell is too narrow for its number, its colour has to do.
        if (PAGE_WIDTH - RIGHT - rows.left) / heads > text_inches("0.00", SMALL):
            for (row, column), value in np.ndenumerate(values):
                print_value(ax, column, row, value, scale)
        ax.set_title(arrow(direction), fontsize=SMALL, pad=3)
        ax.set_xticks(range(0, heads, math.ceil(heads / 16)))
        ax.set_xlabel("head", fontsize=SMALL, labelpad=1)
        rows.label(ax)
    page.colour_bar(scale, "normalised entropy (0: one key, 1: diffuse)", rows.left)
    if any(np.isnan(values).any() for values in panels.values()):
        page.legend([undefined_key("no samples, or a single key to attend to")])
    return save(page.finish(), save_path)
