"""What the tests of figures draw, and how they look at it."""

from __future__ import annotations

import re
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from lightning_xattn.core.attention import TokenAxis
from lightning_xattn.hms.recording_plots import Spectrograms, Traces
from lightning_xattn.visualizations import render

EEG = TokenAxis("EEG window (s from the labelled moment)", spans=[(5 * i - 25, 5 * i - 15) for i in range(9)])
SPEC = TokenAxis("spectrogram window (s from the labelled moment)", spans=[(5 * i, 5 * i + 10) for i in range(119)])
REGIONS = TokenAxis("region", names=["LL", "RL", "LP", "RP"])
LONG_REGIONS = TokenAxis(
    "EEG region", names=["left lateral", "right lateral", "left parasagittal", "right parasagittal"]
)


def panels(figure: Figure) -> list[Axes]:
    """The axes that hold something, without the colour bar."""
    return [ax for ax in figure.axes if ax.axison and ax.get_label() != "<colorbar>"]


def colour_bar(figure: Figure) -> Axes:
    (found,) = (ax for ax in figure.axes if ax.get_label() == "<colorbar>")
    return found


def places(shown: list[Axes]) -> list[tuple[int, int]]:
    """Row and column of each panel, from the top and from the left."""
    corners = [(-round(ax.get_position().y1, 3), round(ax.get_position().x0, 3)) for ax in shown]
    rows, columns = (sorted({corner[i] for corner in corners}) for i in range(2))
    return [(rows.index(top), columns.index(left)) for top, left in corners]


def mesh(ax: Axes) -> QuadMesh:
    (found,) = (c for c in ax.collections if isinstance(c, QuadMesh))
    return found


def drawn(ax: Axes) -> NDArray[np.float64]:
    return np.ma.filled(mesh(ax).get_array(), np.nan)


def drawn_groups(ax: Axes) -> list[tuple[float, float, float]]:
    """Mean and ends of the interval of each row, from the top; NaN where there is none."""
    result = {}
    for points, _, (bars,) in ax.containers:
        for row, mean, segment in zip(points.get_ydata(), points.get_xdata(), bars.get_segments(), strict=True):
            result[row] = (mean, *(segment[:, 0] if len(segment) else (np.nan, np.nan)))
    return [result[row] for row in range(len(result))]


def row_names(ax: Axes) -> list[str]:
    """What stands beside the rows of a panel, from the top, each in one line."""
    return [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]


def assert_written(path: Path, figure: Figure) -> None:
    """The file is this figure, of which no picture was made yet: every pixel of it, or its page and its title."""
    # The layout moves a little whenever a figure is drawn again, so one that was saved is not compared with itself.
    if path.suffix == ".png":
        with Image.open(path) as picture:
            np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), render(figure))
    elif path.suffix == ".pdf":
        content = path.read_bytes()
        assert content.startswith(b"%PDF-")
        assert content.rstrip().endswith(b"%%EOF")
        (page,) = re.findall(rb"/MediaBox \[ 0 0 (\S+) (\S+) \]", content)
        np.testing.assert_allclose([float(side) for side in page], 72 * figure.get_size_inches())
    else:
        assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")
        # Letters are drawn as shapes, with a comment that says which.
        assert f"<!-- {figure.get_suptitle().splitlines()[0]} -->" in path.read_text(encoding="utf-8")


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def smallest_text(figure: Figure, shown_width: int) -> float:
    """In pixels, where the figure is shown so many pixels wide."""
    seen = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert seen
    points = min(text.get_fontsize() for text in seen)
    return points * figure.dpi / 72 * shown_width / (figure.get_figwidth() * figure.dpi)


def make_maps(*shape: int) -> NDArray[np.float64]:
    logits = np.random.default_rng(0).normal(size=shape)
    weights = np.exp(2 * logits)
    return weights / weights.sum(-1, keepdims=True)


def make_pair(batch=2, heads=3, queries=5, keys=7, heads_back=None):
    """Both directions of a guide's ``attention_dict``, related but not alike."""
    generator = torch.Generator().manual_seed(0)
    there = torch.randn(batch, heads, queries, keys, generator=generator)
    back = torch.randn(batch, heads_back or heads, keys, queries, generator=generator) + there.mean(1)[:, None].mT
    return {"eeg_to_spec": (2 * there).softmax(-1), "spec_to_eeg": (2 * back).softmax(-1)}


def make_traces(seconds=50, electrodes=19):
    rng = np.random.default_rng(0)
    return Traces(
        rng.normal(0, 20, (200 * seconds, electrodes)), 200, [f"E{i}" for i in range(electrodes)], -seconds / 2
    )


def make_spectrograms(rows=300, frequencies=100):
    power = np.random.default_rng(1).lognormal(size=(rows, 4, frequencies))
    return Spectrograms(power, 2, REGIONS.names, np.linspace(0.6, 19.9, frequencies), -rows)
