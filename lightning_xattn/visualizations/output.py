"""A figure's ways out: a window, a file, a picture."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backend_bases import NonGuiException, RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from PIL import Image

from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.files import complete_or_absent
from lightning_xattn.core.names import clean
from lightning_xattn.visualizations.letters import LettersCanvas, PassingCanvas
from lightning_xattn.visualizations.plots import Plot

COLOURS = colormaps["viridis"]


class WindowFigure(Figure):
    """A figure whose ``show`` needs no pyplot figure, and whose texts are shown as they are.

    Names from data are among them: what no font can draw is written out, and a ``$`` begins no formula.

    Attributes
    ----------
    plots : list of Plot
        Its panels of curves, which are no axes.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        LettersCanvas(self)
        self.plots: list[Plot] = []

    def draw(self, renderer: RendererBase) -> None:
        """Draw it, as matplotlib asks for any way out of a figure."""
        axes = [axis for ax in self.get_axes() for axis in (ax.xaxis, ax.yaxis)]
        # matplotlib's own numbers may be formulas; ticks that were given are names.
        numbered = [axis for axis in axes if not isinstance(axis.get_major_formatter(), FuncFormatter)]
        numbers = {tick.label1 for axis in numbered for tick in axis.get_major_ticks()}
        for text in self.findobj(Text):
            assert isinstance(text, Text)
            if text not in numbers:
                text.set(text=clean(text.get_text()), parse_math=False)
        super().draw(renderer)

    def show(self, warn: bool = True) -> None:
        """Open a window where matplotlib's backend has windows; do nothing where it has none, as without a screen.

        Like pyplot's figures it does not wait: call ``matplotlib.pyplot.pause`` to keep a script's window open.
        """
        # Imported here as it picks a backend. Its figure manager is taken without being registered: pyplot's own list
        # of figures, and its current figure, stay as they are.
        from matplotlib import pyplot

        make_manager: Any = pyplot.new_figure_manager  # matplotlib leaves it untyped
        canvas = self.canvas
        # ImportError: the backend that was asked for has no screen or is not installed.
        with suppress(NonGuiException, ImportError):
            make_manager(0, FigureClass=lambda: self).show()
        if type(self.canvas) is FigureCanvasAgg:  # no window
            self.set_canvas(canvas)


def save(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Write the figure where a path is given, complete or not at all, and return it.

    Parameters
    ----------
    figure
        What to write.
    path
        Its suffix sets the format, e.g. ``.png``, ``.pdf``, ``.svg``; parent folders are made. None: write nothing.

    Raises
    ------
    SettingError
        If the suffix is not one that matplotlib can write.
    """
    if path is None:
        return figure
    path = Path(path)
    kind, kinds = path.suffix[1:].lower(), sorted(figure.canvas.get_supported_filetypes())
    if kind not in kinds:
        raise SettingError(f"save_path must end in one of {', '.join(f'.{k}' for k in kinds)}; got '{path}'.")
    with complete_or_absent(path) as part, with_boxes():
        figure.savefig(part, format=kind)
    return figure


@contextmanager
def with_boxes() -> Iterator[None]:
    """Without matplotlib's warning for each letter of a name that its font lacks: it draws a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def svg_picture(figure: Figure) -> bytes:
    """Draw a figure as SVG.

    Examples
    --------
    >>> figure = plot_attention_heatmap(torch.randn(9, 12).softmax(-1))
    >>> b"<svg" in svg_picture(figure)
    True
    """
    content = io.BytesIO()
    with with_boxes():
        figure.savefig(content, format="svg")
    return content.getvalue()


def map_picture(values: NDArray[np.float32], limits: tuple[float, float]) -> bytes:
    """A map ``(rows, columns)`` as PNG, a pixel a cell; undefined is transparent.

    ``limits``: the values of the darkest and the brightest colour; those beyond have these colours.

    Examples
    --------
    >>> map_picture(torch.rand(9, 12).numpy(), (0.0, 1.0))[1:4]
    b'PNG'
    """
    known = np.isfinite(values)
    low, high = limits
    pixels = COLOURS((np.where(known, values, low) - low) / max(high - low, 1e-12), bytes=True)
    pixels[..., 3] = np.where(known, 255, 0)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="png", optimize=True)
    return content.getvalue()


def render(figure: Figure) -> NDArray[np.uint8]:
    """Draw a figure and return its picture, ``(height, width, 3)``, red, green and blue in [0, 255].

    Examples
    --------
    >>> figure = plot_attention_heatmap(torch.randn(9, 12).softmax(-1))
    >>> render(figure).shape[2]  # red, green, blue
    3
    """
    before = figure.canvas
    canvas: Any = PassingCanvas(figure)  # matplotlib leaves its methods untyped
    try:
        with with_boxes():
            canvas.draw()
        return np.array(np.asarray(canvas.buffer_rgba())[..., :3])
    finally:
        figure.set_canvas(before)
