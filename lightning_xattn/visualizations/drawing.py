"""What figures are drawn with: checked arrays, axes of tokens, hatched meshes, colour bars, titles."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from lightning_xattn.core.attention import Direction, TokenAxis
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.core.names import clean, shown
from lightning_xattn.core.wording import decimal, name_modality
from lightning_xattn.visualizations.output import COLOURS, WindowFigure, with_boxes

WIDTH, _DPI = 9.0, 100  # inches, and dots in each, of a figure that is seen in its full width
_LINE = 0.17  # inches that a line of 10 points takes
LONGEST_NAME, LONGEST_CONTEXT = 40, 400  # characters
HUES = ("#00857A", "#8E3A9E", "#A67C00", "#5A6B7B", "#B3245E")
"""Colours of modalities; none is that of an outcome, see ``LOOKS``."""
UNDEFINED: dict[str, Any] = {"facecolor": "0.93", "edgecolor": "0.7", "hatch": "///", "linewidth": 0}


NULL: dict[str, Any] = {"color": "0.25", "linestyle": ":", "linewidth": 1.6}
"""Style of the line that a number is compared with."""

_GROUPS = {"target": " per true class", "prediction": " per predicted class", None: ""}


@dataclass(frozen=True)
class Look:
    """How samples of one kind are drawn: fill, line and marker differ, not colour alone, so that print shows it."""

    colour: str
    is_filled: bool
    line: Literal["-", "--"]
    marker: str


LOOKS = {"correct": Look("#0072B2", True, "-", "o"), "incorrect": Look("#C04A00", False, "--", "s")}
"""By outcome."""


@dataclass(frozen=True, eq=False)
class MapAxis:
    """One axis of a map: its title, the ``(tokens + 1,)`` edges of its cells, the tokens' names if any."""

    title: str
    edges: NDArray[Any]
    names: Sequence[str] | None = None
    whole: bool = False  # whether the edges count tokens, so that only whole numbers make sense

    def __len__(self) -> int:
        return len(self.edges) - 1

    @property
    def height(self) -> float:
        """Inches for a panel with this axis upright."""
        return 1.2 if self.names is None else min(max(1.2, _LINE * len(self.names)), 4.0)

    def label(self, ax: Axes, which: Literal["x", "y"], inches: float) -> None:
        """Put the tokens' names or numbers on an axis of this length."""
        axis = ax.xaxis if which == "x" else ax.yaxis
        if self.names is None:
            axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=self.whole, min_n_ticks=1))
            return
        # Where the names do not fit side by side they are turned, and where not even so, some are left out.
        every = math.ceil(_LINE * len(self.names) / inches)
        turned = which == "x" and self.are_turned(inches)
        ticks = range(0, len(self.names), every)
        axis.set_ticks(ticks, self.names[::every], fontsize=9, rotation=90 if turned else 0)

    def room(self, which: Literal["x", "y"], inches: float) -> float:
        """Inches that the tokens' names or numbers take beside an axis of this length."""
        if self.names is None or (which == "x" and not self.are_turned(inches)):
            return 0.22 if which == "x" else 0.35
        return max(text_inches(name, 9) for name in self.names) + 0.08

    def are_turned(self, inches: float) -> bool:
        """Whether names below an axis of this length stand upright, as side by side they would overlap."""
        assert self.names is not None
        return (max(text_inches(name, 9) for name in self.names) + 0.08) * len(self.names) > inches


def place_tokens(role: str, modality: str, cells: int, axis: TokenAxis | None, tokens: int | None = None) -> MapAxis:
    """Place the cells of a map's axis.

    Parameters
    ----------
    role
        ``"query"`` or ``"key"``, a nameless modality too; "" leaves it out of the title.
    modality, axis
        Whose tokens they are, and what these are; None: they are numbered.
    cells, tokens
        How many cells there are, and of how many tokens, where a cell is the mean of several; None: of one each.
    """
    counted = count_tokens(f"{role} tokens", cells, tokens)
    first = first_tokens(counted, cells)
    numbered, start = first - 0.5, f"{role}: " if role else ""
    if axis is None:
        name = f"{role} token" if modality == role else f"{start}{shown(name_modality(modality), LONGEST_NAME)} token"
        return MapAxis(name, numbered, whole=True)
    if len(axis) != counted:
        what = "maps have" if tokens is None else "maps are of"
        raise ShapeError(f"The {role} axis '{axis.title}' has {len(axis)} tokens, the {what} {counted}.")
    title = f"{start}{axis.title}"
    if axis.spans is None:
        names = None if axis.names is None else [shown(name, LONGEST_NAME) for name in axis.names]
        return MapAxis(title, numbered, names)
    spans = np.asarray(axis.spans, dtype=np.float64)
    if counted == 1:
        return MapAxis(title, spans[0])
    centres = spans.mean(axis=1)
    half = np.diff(centres) / 2
    if not (half > 0).all():
        raise SettingError(f"The spans of the {role} axis '{axis.title}' must ascend; their centres: {centres}.")
    return MapAxis(title, np.r_[centres[0] - half[0], centres[:-1] + half, centres[-1] + half[-1]][first])


def count_tokens(name: str, cells: int, tokens: int | None) -> int:
    """How many tokens an axis of so many cells is of."""
    if tokens is not None and tokens < cells:
        raise ShapeError(f"{cells} cells need at least as many {name}; got {tokens}.")
    return cells if tokens is None else tokens


def first_tokens(tokens: int, cells: int) -> NDArray[np.int64]:
    """The first token of each cell, and the number of tokens: cells of one size but for a smaller last one, if any."""
    size = math.ceil(tokens / max(cells, 1))
    if math.ceil(tokens / max(size, 1)) == cells:
        return np.minimum(np.arange(cells + 1) * size, tokens)
    return np.arange(cells + 1) * tokens // max(cells, 1)


def describe_cells(tokens: tuple[int, int], cells: tuple[int, int]) -> str:
    """What a cell of a map is the mean of, queries first; "" if it is a single token's."""
    sizes = [
        int(np.diff(first_tokens(of_one, count)).max(initial=1)) for of_one, count in zip(tokens, cells, strict=True)
    ]
    if sizes == [1, 1]:
        return ""
    return f"Each cell is the mean of up to {sizes[0]} x {sizes[1]} tokens (queries x keys)."


def count_classes(class_names: Sequence[str]) -> int:
    """Return how many classes are named, at least one."""
    if not class_names:
        raise SettingError("The name of at least one class is needed; got none.")
    return len(class_names)


def per_group(classes_by: str | None) -> str:
    """The end of a title that names what the classes are."""
    if classes_by not in _GROUPS:
        raise SettingError(f"'classes_by' must be one of 'target', 'prediction', None; got '{classes_by}'.")
    return _GROUPS[classes_by]


def as_array(name: str, values: ArrayLike, **axes: int | None) -> NDArray[Any]:
    """Return the values as an array with axes of these lengths (None: any)."""
    array = np.asarray(values, dtype=np.float64)
    fits = array.ndim == len(axes)
    if not fits or any(want not in (None, got) for want, got in zip(axes.values(), array.shape, strict=True)):
        expected = ", ".join(axis if want is None else f"{axis}={want}" for axis, want in axes.items())
        raise ShapeError(f"'{name}' must have shape ({expected}); got {array.shape}.")
    return array


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, whose parts make room for each other."""
    return WindowFigure(figsize=(width, height), dpi=_DPI, layout="constrained")


def draw_mesh(
    ax: Axes,
    x: NDArray[Any],
    y: NDArray[Any],
    values: NDArray[Any],
    scale: Normalize,
    colours: Colormap = COLOURS,
) -> None:
    """Draw the cells; where a value is NaN the hatched background shows."""
    ax.patch.set(**UNDEFINED)
    # Thousands of cells as vectors make a large file, with seams between them in many viewers. What pcolormesh adds to
    # this is the search for limits, which takes longer than to draw the cells.
    corners = np.stack(np.meshgrid(x, y), axis=-1)
    ax.add_collection(QuadMesh(corners, array=values, cmap=colours, norm=scale, rasterized=True), autolim=False)
    ax.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    ax.spines[:].set_visible(False)


def print_value(ax: Axes, x: float, y: float, value: float, scale: Normalize) -> None:
    """Print a value in its cell, white on dark colours and black on light ones; a dash if undefined."""
    # Relative luminance; from 0.18 on black has the higher contrast (WCAG 2), and either is then above 4.5.
    luminance = np.dot(np.power(COLOURS(scale(value))[:3], 2.2), (0.2126, 0.7152, 0.0722))
    colour = "black" if luminance > 0.18 else "white"
    text = ax.text(x, y, decimal(value), color=colour, fontsize=9, ha="center", va="center")
    if np.isnan(value):
        text.set(text="\u2013", color="black", bbox={"facecolor": UNDEFINED["facecolor"], "linewidth": 0, "pad": 2})
    text.set_in_layout(False)  # it needs no room outside its cell, and asking each one is slow


def write_note(ax: Axes, text: str, size: float = 10) -> None:
    """Write over an empty panel."""
    box = {"facecolor": "white", "edgecolor": "0.7"}
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", bbox=box, fontsize=size)


def undefined_key(reasons: str = "") -> Patch:
    """What a legend says of hatching."""
    return Patch(**UNDEFINED, label=f"undefined: {reasons}" if reasons else "undefined")


def draw_colour_bar(
    fig: Figure,
    axes: NDArray[Any],
    scale: Normalize,
    label: str,
    *,
    inches: float = 0,
    colours: Colormap = COLOURS,
    extend: Literal["neither", "both"] = "neither",
    is_below: bool = False,
) -> Axes:
    """Put the scale's colour bar beside or below these axes, equally thick whatever their length in inches (0: all).

    ``extend``: whether it says, by its pointed ends, that values lie beyond the scale.
    """
    length = inches or fig.get_figheight()
    place: dict[str, Any] = {"location": "bottom" if is_below else "right", "aspect": 6 * length, "pad": 0.02}
    bar = fig.colorbar(ScalarMappable(scale, colours), ax=axes.tolist(), extend=extend, **place)
    bar.set_label(label)
    return bar.ax


def show_key(fig: Figure, *keys: Patch) -> None:
    """Say below the figure what fills and hatches mean."""
    fig.legend(handles=keys, loc="outside lower left", ncols=len(keys), frameon=False)


def set_title(fig: Figure, title: str, context: str, remark: str = "") -> None:
    """Put the title and its context over the figure, and a remark on a line below."""
    context = shown(context, LONGEST_CONTEXT)
    text = wrap(f"{title} ({context})" if context else title, 0.8 * fig.get_figwidth())
    fig.suptitle(f"{text}\n{remark}".strip(), fontsize=12)


def arrow(direction: Direction) -> str:
    """Write a direction for a reader, the one who asks first."""
    return " → ".join(shown(name_modality(one), LONGEST_NAME) for one in (direction.query, direction.key))


def shorten(name: str, letters: int) -> str:
    """A name of at most so many letters, with an ellipsis at its end where it is longer."""
    return name if len(name) <= letters else f"{name[: letters - 1].rstrip()}…"


def wrap(text: str, inches: float, size: float = 10) -> str:
    """Break a text into lines of this length."""
    text = clean(text)
    if not text:
        return text
    letters = 0.95 * len(text) * inches / text_inches(text, size)  # lines differ a little in their letters' widths
    return textwrap.fill(text, max(int(letters), 8))


@lru_cache(4096)
def text_inches(text: str, size: float) -> float:
    """How wide a text of this size is; the widest of its lines."""
    font = FontProperties(size=size)
    with with_boxes():
        lines = clean(text).splitlines()
        widths = [text_to_path.get_text_width_height_descent(line, font, False)[0] for line in lines]
    return float(max(widths, default=0)) / 72
