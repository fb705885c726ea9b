"""Maps of attention as lift over uniform: colour scale, bar, panel, and when a map holds no information."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_xattn.core.wording import SINGLE_KEY
from lightning_xattn.functional import Rows, has_single_keys
from lightning_xattn.functional.directions import NO_VARIANCE
from lightning_xattn.visualizations.drawing import MapAxis, draw_colour_bar, draw_mesh, wrap, write_note

# The scale of lifts reaches at least this far from 1: a nearly uniform map should look flat, not noisy.
_MARGIN = 0.1
NO_LIFT = "padding, masked, or not attention"
"""Why a cell may be undefined."""


def lift_limits(lifts: NDArray[Any]) -> tuple[float, float]:
    """From where to where lifts go, with some room around 1, which is uniform."""
    return float(np.nanmin(lifts, initial=1 - _MARGIN)), float(np.nanmax(lifts, initial=1 + _MARGIN))


def lift_scale(lifts: NDArray[Any]) -> Normalize:
    """The scale of maps of one direction; linear, as weights add up."""
    return Normalize(*lift_limits(lifts))


def draw_lift_bar(
    fig: Figure, axes: NDArray[Any], scale: Normalize, label: str, inches: float = 0, is_below: bool = False
) -> None:
    """Put the scale's colour bar beside or below these axes, with a line at 1; ``label`` is to say so."""
    bar = draw_colour_bar(fig, axes, scale, label, inches=inches, is_below=is_below)
    for colour, width in (("black", 3), ("white", 1)):
        (bar.axvline if is_below else bar.axhline)(1.0, color=colour, linewidth=width)


def draw_lift_map(ax: Axes, lifts: NDArray[Any], across: MapAxis, down: MapAxis, scale: Normalize, note: str) -> None:
    """Draw one ``(down, across)`` map, the first token left and at the top, and what to know of it."""
    draw_mesh(ax, across.edges, down.edges, lifts, scale)
    ax.invert_yaxis()
    if note:
        write_note(ax, note)


def lift_range(lifts: NDArray[Any]) -> str:
    """The range of a map's values in words, as colours do not show how small it may be."""
    if np.isnan(lifts).all():
        return "undefined"
    return f"lift {np.nanmin(lifts):.2f} to {np.nanmax(lifts):.2f}"


def says_nothing(rows: Rows, lifts: NDArray[Any], sample: int) -> str:
    """Why a sample's map holds no information about the model; empty if it may."""
    if not rows.valid[sample].any():
        return "undefined: no valid row"
    if has_single_keys(rows, sample):
        return SINGLE_KEY
    defined = lifts[~np.isnan(lifts)]
    if defined.std() <= NO_VARIANCE * np.sqrt((defined**2).mean()):
        return "uniform: every key gets the same weight"
    return ""


def lie_along(lifts: NDArray[Any], queries: MapAxis, keys: MapAxis) -> tuple[NDArray[Any], MapAxis, MapAxis]:
    """Turn a ``(queries, keys)`` map so that its longer axis lies horizontally: values, across, down."""
    if len(queries) > len(keys):
        return lifts.T, queries, keys
    return lifts, keys, queries


def label_panel(ax: Axes, across: MapAxis, down: MapAxis, width: float, height: float) -> None:
    """Label a panel that stands by itself, of this size in inches."""
    across.label(ax, "x", width)
    down.label(ax, "y", height)
    ax.set_xlabel(wrap(across.title, width))
    ax.set_ylabel(wrap(down.title, height))
