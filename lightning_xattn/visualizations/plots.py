"""Panels of curves without matplotlib's axes, which take 30 ms each to make and to draw, for which a fit waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETDOWN, CARETUP
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D, Bbox, Transform, TransformedBbox
from numpy.typing import NDArray


@dataclass(eq=False)
class Plot:
    """A panel: what is drawn in it has the places of its numbers.

    Parameters
    ----------
    figure
        Where it is drawn.
    title, label
        What stands above it, and what its numbers are over.
    area
        Its place, in inches from the page's upper left.
    page
        From these inches to the figure.
    xlim, ylim
        What it shows.
    """

    figure: Figure
    title: str
    label: str
    area: Bbox
    page: Transform
    xlim: tuple[float, float]
    ylim: tuple[float, float]
    lines: list[Line2D] = field(default_factory=list)
    """Curves and references, with their numbers."""
    bars: dict[str, Line2D] = field(default_factory=dict)
    """The interval of a single moment, by the name of its curve."""
    bands: dict[str, PathPatch] = field(default_factory=dict)
    """The intervals over several moments."""
    marks: list[Line2D] = field(default_factory=list)
    """Where intervals go on beyond the panel."""
    xticks: list[float] = field(default_factory=list)
    yticks: list[float] = field(default_factory=list)
    note: str = ""
    """What is written in the place of curves."""

    def __post_init__(self) -> None:
        (left, right), (bottom, top) = self.xlim, self.ylim
        scale = self.area.width / (right - left), -self.area.height / (top - bottom)
        to_page = Affine2D().translate(-left, -bottom).scale(*scale).translate(self.area.x0, self.area.y1)
        self.transform = to_page + self.page
        self._clip = TransformedBbox(self.area, self.page)

    def _add(self, artist: Any, is_clipped: bool = True) -> Any:
        artist.set_transform(self.transform)
        if is_clipped:
            artist.set_clip_box(self._clip)
        return self.figure.add_artist(artist)

    def line(self, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
        """Draw a curve."""
        self.lines.append(self._add(Line2D(np.asarray(x, float), np.asarray(y, float), **style)))

    def band(self, name: str, x: NDArray[Any], low: NDArray[Any], high: NDArray[Any], colour: str) -> None:
        """Fill what is between the ends of a curve's intervals."""
        known = np.flatnonzero(np.isfinite(low + high))
        runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1) if len(known) else []
        outlines = [
            np.concatenate([np.stack([x[run], low[run]], 1), np.stack([x[run], high[run]], 1)[::-1]]) for run in runs
        ]
        if outlines:
            # A path's last vertex, which only closes it, needs a place.
            paths = [Path([*outline, outline[0]], closed=True) for outline in outlines]
            shape = PathPatch(Path.make_compound_path(*paths), facecolor=colour, alpha=0.18, linewidth=0)
            self.bands[name] = self._add(shape)

    def bar(self, name: str, x: float, low: float, high: float, colour: str) -> None:
        """Draw an interval."""
        self.bars[name] = self._add(Line2D([x, x], [low, high], color=colour, marker="_", markersize=6))

    def mark_cut(self, x: NDArray[Any], low: NDArray[Any], high: NDArray[Any], colour: str) -> bool:
        """Point out of the panel where an interval goes on beyond its edge; returns whether one does."""
        bottom, top = self.ylim
        marks: list[tuple[float, Any, NDArray[Any]]] = [(bottom, CARETDOWN, low < bottom), (top, CARETUP, high > top)]
        for edge, marker, beyond in marks:
            if beyond.any():
                at = x[beyond], np.full(int(beyond.sum()), edge)
                self.marks.append(self._add(Line2D(*at, marker=marker, color=colour, linestyle=""), is_clipped=False))
        return any(beyond.any() for *_, beyond in marks)


def ticks_between(low: float, high: float, count: int = 4, is_whole: bool = False) -> list[float]:
    """At most ``count`` + 1 round numbers from one to the other."""
    steps = [1, 2, 3, 5, 10] if is_whole else [1, 2, 2.5, 5, 10]
    found = MaxNLocator(count, integer=is_whole, steps=steps).tick_values(low, high)
    margin = 1e-9 * (high - low)
    return [float(one) for one in found if low - margin <= one <= high + margin]


def write_ticks(ticks: Sequence[float]) -> list[str]:
    """Equally spaced numbers with as many digits as they need."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    largest = max(map(abs, ticks), default=0.0)
    digits = next((n for n in range(7) if abs(round(step, n) - step) < 1e-6 * step), 6)
    is_plain = largest < 1e5 and step >= 1e-4
    texts = [f"{one + 0.0:.{digits}f}" if is_plain else f"{one:.6g}" for one in ticks]
    return [text.replace("-", "\N{MINUS SIGN}") for text in texts]
