"""Pages for loggers: titles, panels, colour bars and legends one below the other, placed in inches.

TensorBoard shows a picture 324 pixels wide. A page is 4.5 inches wide, so that a point is a pixel there, and no text is
smaller than 9 points. The parts are placed by what their texts need: matplotlib's constrained layout, which draws each
text several times to find out, would take as long as everything else.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import BboxImage
from matplotlib.lines import Line2D
from matplotlib.markers import CARETDOWN, CARETLEFT, CARETRIGHT, CARETUP
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D, Bbox, TransformedBbox
from numpy.typing import ArrayLike, NDArray

from lightning_xattn.core.names import clean, shown
from lightning_xattn.visualizations.drawing import text_inches, wrap
from lightning_xattn.visualizations.output import COLOURS, WindowFigure

PAGE_WIDTH = 4.5
"""Inches."""
SMALL, LARGE = 9, 10.5
"""Points."""
LINE = 0.155
"""Inches that a line of small text takes."""
MARGIN = 0.1
"""Inches around a page."""
RIGHT = 0.17
"""Inches on the right of panels, where half of a last number has room."""
NUMBERS = 0.22
"""Inches that the numbers below a panel take."""
BESIDE = 0.5
"""Inches that the numbers beside a panel take."""

KEY = 0.175
"""Inches that a line of a legend takes."""
TICK = 0.035
"""Inches that a tick is long."""

Piece = tuple[tuple[float, float], tuple[float, float]]
"""A straight line: where it begins and where it ends."""

_DPI = 144  # twice the pixels that are shown: for fine screens, and for a click, which enlarges
CUT = "goes on beyond the panel"
"""What a legend says of an interval that does."""

HANDLE = 0.33
"""Inches of a legend's line or patch, with the gap before its text."""
BETWEEN = 0.15
"""Inches between a legend's columns."""
_NAME_LETTERS, _NAME_INCHES = 16, 1.45


class Page:
    """A page, filled from the top.

    Parameters
    ----------
    title
        What is shown.
    context
        Where the numbers come from.

    Attributes
    ----------
    figure : Figure
        What is drawn on; complete after `finish`.
    used : float
        Inches from the top that are filled.
    inches : Transform
        From inches from the upper left to the figure.
    """

    def __init__(self, title: str, context: str) -> None:
        self.figure = WindowFigure(figsize=(PAGE_WIDTH, 1), dpi=_DPI)
        self.used = MARGIN
        self._upright = Affine2D()  # complete where the page's height is known
        self.inches = self._upright + self.figure.dpi_scale_trans
        self._fonts = {size: FontProperties(size=size) for size in (SMALL, LARGE)}  # as texts make one each
        self._places: list[Callable[[float], object]] = []
        self._put(self.figure.suptitle("", x=0, y=0, ha="left", va="top"), title, LARGE)
        self.write(context)
        self.skip(0.04)

    def write(self, text: str) -> None:
        """Write a paragraph across the page."""
        if text:
            self._put(self.figure.text(0, 0, "", va="top", color="0.3"), text, SMALL)

    def _put(self, artist: Any, text: str, size: float) -> None:
        text, top = wrap(text, PAGE_WIDTH - 2 * MARGIN, size), self.used
        artist.set(text=text, fontsize=size, parse_math=False)
        self._places.append(lambda height: artist.set_position((MARGIN / PAGE_WIDTH, 1 - top / height)))
        self.used += LINE * size / SMALL * len(text.splitlines()) + 0.03

    def put_text(self, x: float, y: float, text: str, size: float = SMALL, **style: Any) -> Text:
        """Write at a place, in inches from the upper left."""
        one = Text(x, y, clean(text), fontproperties=self._fonts[size], parse_math=False, **style)
        self.put(one)
        return one

    def put_lines(self, pieces: Sequence[Piece], **style: Any) -> None:
        """Draw straight lines, whose ends are in inches from the upper left."""
        if pieces:
            points = np.array([point for piece in pieces for point in (*piece, (np.nan, np.nan))])
            self.put(Line2D(*points.T, **style))

    def put_image(self, place: Bbox, values: NDArray[Any], scale: Normalize) -> BboxImage:
        """Colour a map's cells, all equally large; what is undefined stays as it is."""
        where = TransformedBbox(place, self.inches)
        image = BboxImage(where, cmap=COLOURS, norm=scale, interpolation="nearest", origin="upper")
        image.set_interpolation_stage("rgba")  # colour the cells, which are fewer than pixels
        image.set_data(values)
        self.put(image)
        return image

    def put(self, artist: Any) -> None:
        """Add what has its place in inches from the upper left, unless it has a transform of its own."""
        if not artist.is_transform_set():
            artist.set_transform(self.inches)
        self.figure.add_artist(artist)

    def name_axes(self, across: str, down: str, since: float) -> None:
        """Title both axes of the panels that were added since ``since`` inches were filled."""
        beside = self.figure.supylabel(down, fontsize=SMALL, x=MARGIN / PAGE_WIDTH, ha="left", va="center")
        middle = (since + self.used) / 2
        self._places.append(lambda height: beside.set_y(1 - middle / height))
        self._put(self.figure.supxlabel("", x=0, y=0, ha="left", va="top"), across, SMALL)

    def skip(self, inches: float) -> None:
        """Leave room."""
        self.used += inches

    def row(
        self,
        height: float,
        *,
        widths: Sequence[float] = (1,),
        left: float = BESIDE,
        gap: float = 0.15,
        above: float = 0.0,
        below: float = NUMBERS,
    ) -> list[Axes]:
        """Add panels side by side, this high, of these relative widths.

        ``left``, ``above`` and ``below`` are inches for what stands around them, ``gap`` those between two of them.
        """
        scale = (PAGE_WIDTH - RIGHT - left - gap * (len(widths) - 1)) / sum(widths)
        axes, x, top = [], left, self.used + above
        for width in widths:
            axes.append(self._panel(x, top, scale * width, height))
            x += scale * width + gap
        self.used = top + height + below
        return axes

    def _panel(self, x: float, top: float, width: float, height: float) -> Axes:
        ax = self.figure.add_axes((0, 0, 1, 1))
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=SMALL, length=2.5, pad=2)
        ax.set_axisbelow(True)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(4))  # of all that is drawn ticks take the longest
        self._places.append(
            lambda page: ax.set_position((x / PAGE_WIDTH, 1 - (top + height) / page, width / PAGE_WIDTH, height / page))
        )
        return ax

    def legend(self, *columns: Sequence[Artist]) -> None:
        """Say what lines, fills and hatches mean, in a legend for each of these columns of the page."""
        inches = (PAGE_WIDTH - 2 * MARGIN) / len(columns)
        top = self.used + 0.04
        heights = [
            self._legend(handles, MARGIN + i * inches, top, inches) for i, handles in enumerate(columns) if handles
        ]
        self.used = top + max(heights, default=0)

    def _legend(self, handles: Sequence[Artist], left: float, top: float, inches: float) -> float:
        labels = [str(handle.get_label()) for handle in handles]
        columns = columns_of(labels, inches)
        legend = self.figure.legend(
            handles=handles,
            labels=labels,
            loc="upper left",
            ncols=columns,
            fontsize=SMALL,
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            handlelength=1.9,
            handletextpad=0.6,
            columnspacing=1.2,
            labelspacing=0.35,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        self._places.append(
            lambda page: legend.set_bbox_to_anchor((left / PAGE_WIDTH, 1 - top / page), self.figure.transFigure)
        )
        return KEY * math.ceil(len(labels) / columns)

    def colour_bar(self, scale: Normalize, label: str, left: float, mark: float | None = None) -> None:
        """Put a scale's colour bar across the page, its meaning below, and a line at one of its values."""
        self.skip(0.08)
        (ax,) = self.row(0.09, left=left, below=NUMBERS + LINE)
        ax.set_label("<colorbar>")
        bar = self.figure.colorbar(
            ScalarMappable(scale, COLOURS), cax=ax, orientation="horizontal", ticks=MaxNLocator(5)
        )
        bar.set_label(label, fontsize=SMALL, labelpad=1)
        ax.tick_params(labelsize=SMALL, length=2.5, pad=2)
        if mark is not None:
            for colour, thickness in (("black", 3), ("white", 1)):
                ax.axvline(mark, color=colour, linewidth=thickness)

    def finish(self) -> Figure:
        """Set the page's height, and place everything."""
        height = self.used + MARGIN
        self.figure.set_figheight(height)
        self._upright.scale(1, -1).translate(0, height)
        for place in self._places:
            place(height)
        return self.figure


def columns_of(labels: Sequence[str], inches: float) -> int:
    """How many columns a legend can have."""
    wide = [HANDLE + text_inches(label, SMALL) for label in labels]
    for columns in range(len(labels), 1, -1):
        # As a legend fills its columns.
        if sum(column.max() + BETWEEN for column in np.array_split(wide, columns)) <= inches:
            return columns
    return 1


@dataclass(frozen=True)
class RowNames:
    """What stands beside the rows of a panel: names and counts."""

    labels: Sequence[str]

    @staticmethod
    def of(names: Iterable[str], counts: Iterable[str]) -> RowNames:
        """A name has two lines at most; its count follows it, or stands below where it does not fit."""
        labels = []
        for name, count in zip(names, counts, strict=True):
            lines = textwrap.wrap(shown(name), _NAME_LETTERS, max_lines=2, placeholder=" …") or [""]
            together = f"{lines[-1]} ({count})"
            fits = text_inches(together, SMALL) <= _NAME_INCHES
            labels.append("\n".join([*lines[:-1], together] if fits else [*lines, f"({count})"]))
        return RowNames(labels)

    @property
    def left(self) -> float:
        """Inches that they take."""
        return max(text_inches(label, SMALL) for label in self.labels) + 0.15

    @property
    def height(self) -> float:
        """Inches of all rows, which are equally high."""
        return len(self.labels) * (LINE * max(len(label.splitlines()) for label in self.labels) + 0.08)

    def label(self, ax: Axes) -> None:
        """Name the rows of a panel, the first at the top."""
        ax.set_yticks(range(len(self.labels)), self.labels, parse_math=False)
        ax.set_ylim(len(self.labels) - 0.5, -0.5)


def mark_cut(
    ax: Axes, axis: Literal["x", "y"], places: ArrayLike, low: ArrayLike, high: ArrayLike, colour: str = "black"
) -> bool:
    """Point out of the panel where an interval goes on beyond its edge; returns whether one does.

    ``axis`` is the intervals' own, and ``places`` is where they stand on the other one.
    """
    along = np.asarray(places, dtype=np.float64)
    start, stop = sorted(ax.get_xlim() if axis == "x" else ax.get_ylim())
    down, up = (CARETLEFT, CARETRIGHT) if axis == "x" else (CARETDOWN, CARETUP)
    is_cut = False
    for edge, marker, beyond in ((start, down, np.less(low, start)), (stop, up, np.greater(high, stop))):
        if beyond.any():
            at = [np.full(int(beyond.sum()), edge), along[beyond]]
            ax.plot(*(at if axis == "x" else at[::-1]), marker=marker, color=colour, linestyle="", clip_on=False)
            is_cut = True
    return is_cut


def cut_key() -> Artist:
    """What a legend says of `mark_cut`."""
    marker: Any = CARETRIGHT  # matplotlib's types take its value alone
    return Line2D([], [], color="black", marker=marker, linestyle="", label=CUT)
