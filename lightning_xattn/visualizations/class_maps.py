"""The mean attention map of each class in both directions, side by side on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike, NDArray

from lightning_xattn.core.attention import Direction, TokenAxis
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.core.names import shown
from lightning_xattn.core.wording import SINGLE_KEY
from lightning_xattn.visualizations.drawing import (
    UNDEFINED,
    MapAxis,
    arrow,
    as_array,
    count_classes,
    describe_cells,
    place_tokens,
    text_inches,
    undefined_key,
    wrap,
)
from lightning_xattn.visualizations.lifts import lift_scale
from lightning_xattn.visualizations.pages import LINE, MARGIN, NUMBERS, PAGE_WIDTH, RIGHT, SMALL, TICK, Page
from lightning_xattn.visualizations.plots import ticks_between, write_ticks

_LONGEST_NAME = 30  # characters of a class's name, which stands in one line
_GAP = 0.3  # inches between the directions
_ROOM = _GAP / 2 - 0.02  # inches on either side of a column that its numbers may take
_INK: dict[str, Any] = {"color": "black", "linewidth": 0.8}
_COLUMNS = 400  # of a map whose tokens are not equally wide


class _Column(NamedTuple):
    """One direction: a map of each class, and where it stands."""

    direction: Direction
    keys: int
    lifts: NDArray[Any]
    """``(classes, down, across)``."""
    scale: Normalize
    left: float
    """Inches from the page's left."""
    width: float


def draw_class_maps(
    page: Page,
    maps: Mapping[str, ArrayLike],
    counts: ArrayLike,
    class_names: Sequence[str],
    *,
    axes: Mapping[str, TokenAxis] | None = None,
    tokens: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Draw the mean attention of each class on a page: a row for each class, a column for each direction.

    The colour is the *lift over uniform*, mean weight times the number of keys, as in ``plot_class_attention``. All
    classes of a direction have one scale; each direction has its own, so that the stronger one does not blank the
    other. Both directions are laid out alike, the modality with more tokens horizontally: where they agree, a row's two
    maps look the same.

    Parameters
    ----------
    page
        Where to draw.
    maps
        By direction (one, or both), ``(classes, queries, keys)`` mean attention weights in [0, 1]; NaN where undefined.
    counts
        ``(classes,)`` number of samples behind each map.
    class_names
        A name for each class.
    axes
        What the tokens of a modality are, by modality; the others are numbered.
    tokens
        By direction, how many queries and keys the maps are of, where a cell is the mean of several; None: as many as
        the maps have.

    Raises
    ------
    ShapeError
        If the maps, the counts, the names, the axes and the numbers of tokens do not fit each other.
    SettingError
        If there is no class, the directions are not one or two of the same modalities, or an axis' spans do not ascend.
    """
    classes = count_classes(class_names)
    samples = as_array("counts", counts, classes=classes)
    weights = {
        Direction.parse(name): as_array(f"maps['{name}']", one, classes=classes, queries=None, keys=None)
        for name, one in maps.items()
    }
    first = _check_directions(weights)
    sizes = {one: (tokens or {}).get(str(one), of_one.shape[1:]) for one, of_one in weights.items()}
    along = _place(first, weights[first].shape[1:], sizes[first], axes or {})
    across, down = along[::-1] if len(along[0]) <= len(along[1]) else along

    height = _height_of(down, classes)
    asks = wrap(down.title, classes * (height + LINE), SMALL)
    left = MARGIN + LINE * len(asks.splitlines()) + down.room("y", height) + TICK
    width = (PAGE_WIDTH - RIGHT - left - _GAP * (len(weights) - 1)) / len(weights)
    columns = []
    for place, (direction, one) in enumerate(weights.items()):
        lifts = np.where(samples[:, None, None] > 0, one * sizes[direction][1], np.nan)
        lifts = lifts if along[direction.query != first.query] is down else lifts.swapaxes(1, 2)
        at = left + place * (width + _GAP)
        columns.append(_Column(direction, sizes[direction][1], lifts, lift_scale(lifts), at, width))
    _head(page, columns, sizes)
    since = page.used
    for i, name in enumerate(class_names):
        title = f"{shown(name, _LONGEST_NAME)} (n={int(samples[i])})"
        _draw_class(page, columns, i, title, "undefined" if samples[i] else "no samples", (across, down), height)
    last = page.used
    for column in columns:
        _label_across(page, across, column.left, column.width)
    page.skip(TICK + across.room("x", width))
    page.put_text(MARGIN, (since + last) / 2, asks, rotation=90, va="center")
    middle = (left + PAGE_WIDTH - RIGHT) / 2
    title = wrap(across.title, PAGE_WIDTH - RIGHT - left, SMALL)
    page.put_text(middle, page.used, title, ha="center", va="top")
    page.skip(LINE * len(title.splitlines()) + 0.12)
    _draw_bars(page, columns)
    remarks = [describe_cells(sizes[first], (len(along[0]), len(along[1])))]
    remarks += [f"{arrow(one.direction)}: {SINGLE_KEY}." for one in columns if one.keys == 1]
    page.write(" ".join(filter(None, remarks)))
    if any(np.isnan(one.lifts).any() for one in columns):
        page.legend([undefined_key()])


def _check_directions(weights: Mapping[Direction, NDArray[Any]]) -> Direction:
    """The first direction, of which the other one is the way back."""
    if not weights:
        raise SettingError("The maps of at least one direction are needed; got none.")
    first, *others = weights
    if others not in ([], [first.opposite]):
        raise SettingError(f"The directions must be one, or there and back; got {', '.join(map(str, weights))}.")
    for other in others:
        shapes = weights[first].shape[1:], weights[other].shape[1:]
        if shapes[0] != shapes[1][::-1]:
            raise ShapeError(
                f"'{first}' has {shapes[0]} queries and keys, '{other}' must have them reversed; got {shapes[1]}."
            )
    return first


def _place(
    direction: Direction, cells: tuple[int, ...], tokens: tuple[int, ...], axes: Mapping[str, TokenAxis]
) -> tuple[MapAxis, MapAxis]:
    """The axes of the modality that asks in the first direction, and of the other one."""
    names = direction.query, direction.key
    query, key = (
        place_tokens("", name, count, axes.get(name), of) for name, count, of in zip(names, cells, tokens, strict=True)
    )
    return query, key


def _height_of(down: MapAxis, classes: int) -> float:
    """Inches of a class's maps."""
    if down.names is not None:
        return min(max(0.5, LINE * len(down.names)), 1.2)
    return 0.55 if classes <= 6 else 0.42


def _head(page: Page, columns: Sequence[_Column], tokens: Mapping[Direction, tuple[int, ...]]) -> None:
    """Name the directions."""
    heads = []
    for column in columns:
        queries, keys = tokens[column.direction]
        asked = f"{queries} queries, {keys} keys"
        heads.append("\n".join(wrap(text, column.width, SMALL) for text in (arrow(column.direction), asked)))
    page.skip(0.05)
    for column, text in zip(columns, heads, strict=True):
        page.put_text(column.left + column.width / 2, page.used, text, ha="center", va="top", linespacing=1.25)
    page.skip(0.06 + LINE * max(len(text.splitlines()) for text in heads))


def _draw_class(
    page: Page,
    columns: Sequence[_Column],
    place: int,
    title: str,
    note: str,
    axes: tuple[MapAxis, MapAxis],
    height: float,
) -> None:
    """Draw a row: the class's maps below its name, or a note where there is none."""
    across, down = axes
    lines = wrap(title, PAGE_WIDTH - MARGIN - columns[0].left, SMALL)
    page.put_text(columns[0].left, page.used + 0.02, lines, va="top")
    top = page.used + 0.05 + LINE * len(lines.splitlines())
    for column in columns:
        values, area = column.lifts[place], Bbox.from_bounds(column.left, top, column.width, height)
        if np.isnan(values).any():
            page.put(Rectangle((area.x0, area.y0), area.width, area.height, zorder=-1, **UNDEFINED))
        if np.isnan(values).all():
            page.put_text((area.x0 + area.x1) / 2, (area.y0 + area.y1) / 2, note, ha="center", va="center")
            continue
        even = values[np.ix_(_evenly(down), _evenly(across))]
        page.put_image(area, even, column.scale).set_gid(f"{column.direction}/{place}")
    _label_down(page, down, columns[0].left, top, height)
    page.used = top + height + 0.05


def _evenly(axis: MapAxis) -> NDArray[np.int64]:
    """The cell that each of many equally wide places of an axis is in; of equally wide cells each one."""
    edges, cells = axis.edges, len(axis)
    if np.allclose(np.diff(edges), (edges[-1] - edges[0]) / cells):
        return np.arange(cells)
    places = edges[0] + (np.arange(_COLUMNS) + 0.5) / _COLUMNS * (edges[-1] - edges[0])
    cell: NDArray[np.int64] = np.searchsorted(edges, places, "right") - 1
    return cell.clip(0, cells - 1)


def _ticks(axis: MapAxis, inches: float, per_tick: float) -> list[tuple[float, str]]:
    """What stands beside an axis of this length: the share of the length at which it stands, and the text."""
    start, length = axis.edges[0], axis.edges[-1] - axis.edges[0]
    if axis.names is not None:
        every = int(np.ceil(per_tick * len(axis.names) / inches))
        return [((i - start) / length, axis.names[i]) for i in range(0, len(axis.names), every)]
    ticks = ticks_between(axis.edges[0], axis.edges[-1], max(int(inches / (2.4 * per_tick)), 1), axis.whole)
    return [((one - start) / length, text) for one, text in zip(ticks, write_ticks(ticks), strict=True)]


def _label_down(page: Page, down: MapAxis, left: float, top: float, height: float) -> None:
    """Label the axis beside a row of maps."""
    ticks = _ticks(down, height, LINE)
    page.put_lines([((left - TICK, top + share * height), (left, top + share * height)) for share, _ in ticks], **_INK)
    for share, text in ticks:
        page.put_text(left - TICK - 0.03, top + share * height, text, ha="right", va="center_baseline")


def _label_across(page: Page, across: MapAxis, left: float, width: float) -> None:
    """Label the axis below a column of maps."""
    top = page.used - 0.05
    ticks = _ticks(across, width, LINE)
    page.put_lines([((left + share * width, top), (left + share * width, top + TICK)) for share, _ in ticks], **_INK)
    turned = across.names is not None and across.are_turned(width)
    for share, text in ticks:
        if turned or _has_room(share * width, width, text):
            style: dict[str, Any] = {"ha": "center", "va": "top", "rotation": 90 if turned else 0}
            page.put_text(left + share * width, top + TICK + 0.02, text, **style)


def _has_room(place: float, width: float, text: str) -> bool:
    """Whether a number at so many inches of a column reaches no further than a neighbour's may."""
    half = text_inches(text, SMALL) / 2
    return place - half >= -_ROOM and place + half <= width + _ROOM


def _draw_bars(page: Page, columns: Sequence[_Column]) -> None:
    """Draw each direction's colour bar below its maps, with a line at 1."""
    for column in columns:
        low, high = column.scale.vmin or 0.0, column.scale.vmax or 1.0
        bar = Bbox.from_bounds(column.left, page.used, column.width, 0.09)
        page.put_image(bar, np.linspace(low, high, 256)[None], column.scale).set_gid(f"{column.direction}/scale")

        def at(value: float, column: _Column = column, low: float = low, high: float = high) -> float:
            return column.left + (value - low) / (high - low) * column.width

        for colour, thickness in (("black", 3.0), ("white", 1.0)):
            page.put_lines([((at(1), bar.y0), (at(1), bar.y1))], color=colour, linewidth=thickness)
        ticks = ticks_between(low, high, 3)
        page.put_lines([((at(one), bar.y1), (at(one), bar.y1 + TICK)) for one in ticks], **_INK)
        for one, text in zip(ticks, write_ticks(ticks), strict=True):
            if _has_room(at(one) - column.left, column.width, text):
                page.put_text(at(one), bar.y1 + TICK + 0.02, text, ha="center", va="top")
    page.skip(0.09 + NUMBERS)
    scales = " Each direction has its own scale." if len(columns) > 1 else ""
    page.write(f"Colour: lift over uniform, the mean weight times the number of keys (line: 1, uniform).{scales}")
