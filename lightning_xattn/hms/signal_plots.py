"""The figure of attention over the signals: what was recorded, and which of its windows attend to which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from numpy.typing import NDArray

from lightning_xattn.core.attention import Direction, TokenAxis
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.core.wording import name_modality
from lightning_xattn.functional import Rows, lift_map, received_lift
from lightning_xattn.hms.montage import Montage, derive
from lightning_xattn.hms.recording_plots import (
    SPECTROGRAM_INCHES,
    STRETCH,
    Spectrograms,
    Traces,
    draw_spectrograms,
    draw_strip,
    draw_traces,
    find_page,
    page_height,
)
from lightning_xattn.visualizations.drawing import (
    UNDEFINED,
    WIDTH,
    MapAxis,
    arrow,
    new_figure,
    place_tokens,
    set_title,
    show_key,
    undefined_key,
    wrap,
    write_note,
)
from lightning_xattn.visualizations.lifts import (
    draw_lift_bar,
    draw_lift_map,
    lift_limits,
    lift_range,
    lift_scale,
    says_nothing,
)
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pairs import AttentionDict, check_sample, read_pair

_TIME = "s from the labelled moment"
_STRONGEST = 3  # pairs of each direction that are linked
_RECEIVED: dict[str, Any] = {"color": "#0072B2", "linewidth": 2}
_LINKS: tuple[dict[str, Any], ...] = (
    {"color": "#00614A", "linestyle": "-", "linewidth": 1.8},
    {"color": "#B5478A", "linestyle": "--", "linewidth": 1.8},
)


def plot_attention_over_signals(
    traces: Traces,
    spectrograms: Spectrograms,
    attention_dict: AttentionDict,
    sample_idx: int = 0,
    *,
    axes: Mapping[str, TokenAxis],
    montage: Montage = "referential",
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw one sample's recording and, on the same time axes, which of its windows attend to which.

    From top to bottom: the labelled 10 s of EEG; the whole EEG, where it is longer; the attention that each of its
    windows receives; the strongest pairs of both directions as lines from the EEG's seconds to the spectrogram's; the
    spectrograms, with the EEG's stretch marked; the attention that each of their windows receives; and the maps of both
    directions, EEG windows by spectrogram windows.

    Attention is the lift over uniform (weight times keys), averaged over heads, and over queries where it is received;
    uniform attention has 1. Each direction has its own scale. Windows overlap: a strip shows each at its full extent,
    a map shows a cell from midpoint to midpoint between the windows' centres.

    Parameters
    ----------
    traces, spectrograms
        The sample's signals. Their modalities are those of the attention.
    attention_dict
        Weights ``(batch, heads, queries, keys)`` by direction (or one direction alone), or an ``AttentionPair``, whose
        masks then count.
    sample_idx
        Which sample of the batch.
    axes
        The windows of both modalities, as spans in seconds from the labelled moment. A modality of a single token
        needs none: it is the whole signal.
    montage
        ``"referential"``: the traces as they are given. ``"bipolar"``: the longitudinal bipolar montage ("double
        banana"), derived from the 19 electrodes of the 10-20 system.
    context
        About the sample, for the title, e.g. ``"sample 3001, predicted LPD (0.82), true GPD"``.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    SettingError
        If there is no such sample or montage, an electrode of it is missing, the attention is between other modalities,
        a modality has no windows in time, or the suffix of ``save_path`` is not one that can be written.
    ShapeError
        If signals, attention and windows do not fit each other.

    Examples
    --------
    >>> eeg = Traces(torch.randn(2000, 2), rate=200, names=["C3", "C4"], start=-5)
    >>> spec = Spectrograms(torch.rand(30, 1, 3) + 1, row_seconds=2, regions=["LL"], frequencies=[1, 2, 4], start=-30)
    >>> seconds = {"eeg": [(-5, 0), (0, 5)], "spec": [(-30, -10), (-10, 10), (10, 30)]}
    >>> axes = {name: TokenAxis(f"{name} (s)", spans) for name, spans in seconds.items()}
    >>> logits = torch.randn(1, 8, 2, 3)
    >>> weights = {"eeg_to_spec": logits.softmax(-1), "spec_to_eeg": logits.mT.softmax(-1)}
    >>> figure = plot_attention_over_signals(eeg, spec, weights, axes=axes, save_path="signals.png")
    >>> Path("signals.png").is_file()
    True
    """
    pair = read_pair(attention_dict)
    check_sample(sample_idx, len(pair[0].attention))
    signals: dict[str, Traces | Spectrograms] = {traces.modality: traces, spectrograms.modality: spectrograms}
    if {pair[0].direction.query, pair[0].direction.key} != set(signals):
        raise SettingError(f"The signals are of {' and '.join(signals)}, the attention is {pair[0].direction}.")
    counts = {pair[0].direction.query: pair[0].attention.shape[2], pair[0].direction.key: pair[0].tokens}
    windows = {name: _windows(signal, counts[name], axes.get(name)) for name, signal in signals.items()}
    eeg, spec = windows[traces.modality], windows[spectrograms.modality]
    rows = {item.direction: item for item in pair}
    to_spec = Direction(traces.modality, spectrograms.modality)

    derivations = derive(traces.values, traces.names, montage)
    page, regions = find_page(traces.extent), len(spectrograms.regions)
    strip = [] if page == traces.extent else [1.1]
    spectrogram_heights = [SPECTROGRAM_INCHES] * regions
    heights = [page_height(derivations), *strip, 0.7, 0.7, *spectrogram_heights, 0.7, *[1.1] * len(pair)]
    fig = new_figure(WIDTH, sum(heights) + 0.32 * len(heights))
    panels = fig.subplots(len(heights), 1, height_ratios=heights)
    eeg_ax, whole, (eeg_strip, links) = panels[0], panels[1 : 1 + len(strip)], panels[1 + len(strip) :][:2]
    spec_axes, (spec_strip, *maps) = np.split(panels[3 + len(strip) :], [regions])

    draw_traces(eeg_ax, traces, derivations, page)
    for ax in whole:
        draw_strip(ax, traces, derivations, page)
    # Over the same seconds those below are enough.
    (whole[0] if strip else eeg_ax).tick_params(labelbottom=False)
    draw_spectrograms(fig, spec_axes, spectrograms, traces.extent)
    received = {to_spec: (spec_strip, spec), to_spec.opposite: (eeg_strip, eeg)}
    for direction, (ax, of_key) in received.items():
        _draw_received(ax, of_key, rows.get(direction), sample_idx)
        key = name_modality(direction.key)
        _head(ax, f"Attention that each {key} window receives ({arrow(direction)}), at its full extent")

    lifts = {item.direction: lift_map(item)[sample_idx].numpy() for item in pair}
    laid = {d: values if d == to_spec else values.T for d, values in lifts.items()}  # EEG down, spectrogram across
    notes = {item.direction: says_nothing(item, lifts[item.direction], sample_idx) for item in pair}
    for ax, (direction, values) in zip(maps, laid.items(), strict=True):
        scale = lift_scale(values)
        draw_lift_map(ax, values, spec.cells, eeg.cells, scale, notes[direction])
        draw_lift_bar(fig, np.array([ax]), scale, "lift (line: 1)", inches=1.3)
        ax.set_ylabel(f"{traces.modality} (s)")
        query, key = name_modality(direction.query), name_modality(direction.key)
        title = f"{arrow(direction)}: which {key} window each {query} window attends to"
        _head(ax, f"{title} ({lift_range(values)})")
    telling = {d: values for d, values in laid.items() if not notes[d]}
    _draw_links(links, telling, eeg, spec, traces.extent, spectrograms.extent)

    eeg_strip.set_xlim(*traces.extent)
    for ax in (*spec_axes, spec_strip, *maps):
        ax.set_xlim(*spectrograms.extent)
    for ax in (*spec_axes, *maps[:-1]):
        ax.tick_params(labelbottom=False)
    eeg_strip.set_xlabel(_TIME)
    spec_strip.set_xlabel(_TIME)
    maps[-1].set_xlabel(f"{_TIME} (windows overlap: a cell lies around its window's centre)")
    if any(np.isnan(values).any() for values in (traces.values, spectrograms.decibels, *lifts.values())):
        show_key(fig, undefined_key("no signal, or no attention"))
    set_title(fig, "Attention over the signals", context)
    return save(fig, save_path)


def _head(ax: Axes, title: str) -> None:
    ax.set_title(wrap(title, WIDTH - 1.5), loc="left", fontsize=10)


@dataclass(frozen=True, eq=False)
class _Windows:
    """The tokens of a signal: their spans in seconds, which may overlap, and their cells in a map."""

    spans: NDArray[Any]
    cells: MapAxis


def _windows(signal: Traces | Spectrograms, count: int, axis: TokenAxis | None) -> _Windows:
    """Where a signal's tokens lie; a single one without an axis is the whole signal."""
    if axis is None and count == 1:
        axis = TokenAxis(signal.modality, spans=[signal.extent])
    if axis is None or axis.spans is None:
        kind = "no axis" if axis is None else "names, no times"
        raise SettingError(
            f"The tokens of '{signal.modality}' must be windows in time: axes['{signal.modality}'] = TokenAxis(title, "
            f"spans=[(start, stop), ...]); it has {kind}. plot_cross_modal_attention draws any tokens."
        )
    cells = place_tokens("window", signal.modality, count, axis)
    spans = np.asarray(axis.spans, dtype=np.float64)
    (first, last), slack = signal.extent, 1e-6
    if spans.min() < first - slack or spans.max() > last + slack:
        raise ShapeError(
            f"The windows of '{signal.modality}' reach from {spans.min():g} to {spans.max():g} s, its signal from "
            f"{first:g} to {last:g} s: they belong to another recording or geometry."
        )
    # The outer cells end where their windows end, as no neighbour's begins there.
    edges = cells.edges.copy()
    edges[[0, -1]] = spans[0, 0], spans[-1, 1]
    return _Windows(spans, replace(cells, edges=edges))


def _draw_received(ax: Axes, windows: _Windows, rows: Rows | None, sample: int) -> None:
    """Draw how much attention each window receives, at its full extent; a line at 1, what uniform attention gives."""
    ax.set_ylabel("lift")
    ax.axhline(1.0, color="0.4", linestyle="--", linewidth=1)
    if rows is None:
        ax.set_ylim(lift_limits(np.empty(0)))
        write_note(ax, "this direction was not recorded")
        return
    received = received_lift(rows)[sample].numpy()
    lost = np.isnan(received)
    for start, stop in windows.spans[lost]:
        ax.axvspan(start, stop, **UNDEFINED)
    segments = [((start, lift), (stop, lift)) for (start, stop), lift in zip(windows.spans, received, strict=True)]
    ax.add_collection(LineCollection([s for s, gone in zip(segments, lost, strict=True) if not gone], **_RECEIVED))
    low, high = lift_limits(received)
    room = 0.08 * (high - low)
    ax.set_ylim(low - room, high + room)
    note = says_nothing(rows, lift_map(rows)[sample].numpy(), sample)
    if note:
        write_note(ax, note)


def _draw_links(
    ax: Axes,
    laid: Mapping[Direction, NDArray[Any]],
    eeg: _Windows,
    spec: _Windows,
    above: tuple[float, float],
    below: tuple[float, float],
) -> None:
    """Link the strongest pairs of each direction: above lie the EEG's seconds, below those of the spectrograms."""
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    left, right = ((second - below[0]) / (below[1] - below[0]) for second in above)
    ax.add_patch(Polygon([(0, 1), (1, 1), (right, 0), (left, 0)], facecolor="0.92", linewidth=0))
    for start, stop in ((0, left), (1, right)):
        ax.plot([start, stop], [1, 0], **STRETCH)
    handles = [Line2D([], [], label="the EEG's stretch", **STRETCH)]
    for (direction, lifts), look in zip(laid.items(), _LINKS, strict=False):
        order = np.argsort(np.where(np.isnan(lifts), -np.inf, lifts), axis=None)[::-1][:_STRONGEST]
        for flat in order[~np.isnan(lifts.ravel()[order])]:
            down, across = np.unravel_index(flat, lifts.shape)
            ends = (eeg.spans[down].mean(), above), (spec.spans[across].mean(), below)
            top, bottom = ((middle - first) / (last - first) for middle, (first, last) in ends)
            ax.plot([top, bottom], [1, 0], **look)
        handles.append(Line2D([], [], label=f"{_STRONGEST} strongest {arrow(direction)}", **look))
    columns = 3 if sum(len(str(handle.get_label())) for handle in handles) < 75 else 1
    legend = ax.legend(handles=handles, ncols=columns, loc="lower left", bbox_to_anchor=(0, 0.97), fontsize=9)
    legend.set(frame_on=False)
