"""Letters that are drawn once: later epochs' figures say the same words, and matplotlib draws each letter anew."""

from __future__ import annotations

import math
from functools import lru_cache
from threading import get_ident
from typing import Any

import numpy as np
from matplotlib.backend_bases import GraphicsContextBase
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.font_manager import FontProperties
from numpy.typing import NDArray

_MARGIN = 3
"""Pixels around a text, as italic and accented letters reach beyond their box."""


class LettersCanvas(FigureCanvasAgg):
    """A canvas that draws each text of a kind once and keeps its picture, some 1,000 in all."""

    def get_renderer(self) -> RendererAgg:
        """The renderer, as matplotlib asks for it."""
        make: Any = LettersRenderer  # matplotlib leaves its methods untyped
        size: Any = (*self.get_width_height(physical=True), self.figure.dpi)
        if self._lastKey != size:
            self.renderer, self._lastKey = make(*size), size
        renderer: RendererAgg = self.renderer
        return renderer


class PassingCanvas(LettersCanvas):
    """A canvas of figures that are drawn once, one after the other: those of one size share their pixels.

    Figures are in reference cycles, so that what each of them holds stays until Python looks for such.
    """

    def get_renderer(self) -> RendererAgg:
        """The renderer of this size, and of this thread, as others may draw meanwhile."""
        return _shared_renderer(*self.get_width_height(physical=True), self.figure.dpi, get_ident())


class LettersRenderer(RendererAgg):
    """Draws texts from their pictures, at whole pixels."""

    def draw_text(
        self,
        gc: GraphicsContextBase,
        x: float,
        y: float,
        s: str,
        prop: FontProperties,
        angle: float,
        ismath: Any = False,
        mtext: Any = None,
    ) -> None:
        """Draw a text whose baseline begins at ``x``, ``y``, in pixels from the upper left."""
        colour = tuple(gc.get_rgb())
        if ismath or angle not in (0, 90) or colour[3:] not in ((), (1,)) or gc.get_alpha() != 1 or not s.strip():
            draw: Any = super().draw_text
            draw(gc, x, y, s, prop, angle, ismath, mtext)
            return
        # A copy, as a FontProperties can change, and its hash with it.
        picture, left, top = _picture_of(s, prop.copy(), angle, colour, bool(gc.get_antialiased()), self.dpi)
        bottom = self.height - (round(y) + top + len(picture))
        self.draw_image(gc, round(x) + left, bottom, picture[::-1])

    def get_text_width_height_descent(self, s: str, prop: FontProperties, ismath: Any) -> tuple[float, float, float]:
        """How large a text is, in pixels."""
        if ismath:
            measure: Any = super().get_text_width_height_descent
            found: tuple[float, float, float] = measure(s, prop, ismath)
            return found
        return _size_of(s, prop.copy(), self.dpi)


@lru_cache(2)  # an epoch has two figures
def _shared_renderer(width: int, height: int, dpi: float, thread: int) -> RendererAgg:
    make: Any = LettersRenderer
    renderer: RendererAgg = make(width, height, dpi)
    return renderer


def _renderer(width: int, height: int, dpi: float) -> Any:
    make: Any = RendererAgg
    return make(width, height, dpi)


@lru_cache(2048)
def _size_of(text: str, font: FontProperties, dpi: float) -> tuple[float, float, float]:
    size: tuple[float, float, float] = _renderer(1, 1, dpi).get_text_width_height_descent(text, font, False)
    return size


@lru_cache(1024)
def _picture_of(
    text: str, font: FontProperties, angle: float, colour: tuple[float, ...], is_smooth: bool, dpi: float
) -> tuple[NDArray[np.uint8], int, int]:
    """A text's picture ``(height, width, 4)``, and the place of its upper left corner seen from where it begins."""
    width, height, _ = map(math.ceil, _size_of(text, font, dpi))
    along, across = width + 2 * _MARGIN, 2 * (height + _MARGIN)
    # What begins in the middle of a side has room above and below it.
    x, y = (height + _MARGIN, width + _MARGIN) if angle else (_MARGIN, height + _MARGIN)
    renderer = _renderer(*((across, along) if angle else (along, across)), dpi)
    gc = renderer.new_gc()
    gc.set_foreground(colour)
    gc.set_antialiased(is_smooth)
    renderer.draw_text(gc, x, y, text, font, angle)
    pixels = np.asarray(renderer.buffer_rgba())
    rows, columns = (np.flatnonzero(pixels[..., 3].any(axis)) for axis in (1, 0))
    if not len(rows):
        return np.zeros((1, 1, 4), np.uint8), 0, 0
    top, left = int(rows[0]), int(columns[0])
    return pixels[top : rows[-1] + 1, left : columns[-1] + 1].copy(), left - x, top - y
