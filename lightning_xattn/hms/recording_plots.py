"""Draw a recording as readers of EEG expect it: stacked traces, and spectrograms of regions, over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from numpy.typing import ArrayLike, NDArray

from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.names import shown
from lightning_xattn.hms.montage import Derivations
from lightning_xattn.visualizations.drawing import UNDEFINED, as_array, draw_colour_bar, draw_mesh, wrap

STRETCH: dict[str, Any] = {"color": "#C04A00", "linewidth": 1.2}
"""Style of the marks of the EEG's stretch on the spectrograms' time axis."""

PAGE_SECONDS = 10
"""Seconds of EEG on a page that can be read."""
SPECTROGRAM_INCHES = 0.95
"""Height of a panel beside which its region's name fits."""

# Signals are grey, attention is in colour.
_POWER = colormaps["Greys"]
_BEYOND: dict[str, Any] = {"color": "#D55E00", "linewidth": 1.5}
_STEPS = [step * 10.0**power for power in range(-3, 7) for step in (1, 2, 5)]  # µV that a scale bar may stand for
_REACH = 3  # rows that a trace may reach beyond the outer ones
_SHOWN_POWER = (2, 98)  # percentiles: single artefacts do not set the scale


@dataclass(frozen=True, eq=False)
class Traces:
    """The EEG of one sample.

    Parameters
    ----------
    microvolts
        ``(samples, electrodes)``, filtered or not; what is not finite is a gap.
    rate
        Samples a second.
    names
        A name for each electrode.
    start
        Seconds from the labelled moment to the first sample, usually negative.
    modality
        Its name in the attention.

    Raises
    ------
    ShapeError, SettingError
        If the names do not fit the values, or the rate is not positive.

    Examples
    --------
    >>> Traces(torch.randn(2000, 2), rate=200, names=["C3", "C4"], start=-5).names
    ['C3', 'C4']
    """

    microvolts: ArrayLike
    rate: float
    names: Sequence[str]
    start: float
    modality: str = "eeg"

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise SettingError(f"rate must be > 0; got {self.rate}.")
        as_array("microvolts", self.microvolts, samples=None, electrodes=len(self.names))

    @property
    def values(self) -> NDArray[Any]:
        """``(samples, electrodes)``, NaN in gaps."""
        return _finite(np.asarray(self.microvolts, dtype=np.float64))

    @property
    def extent(self) -> tuple[float, float]:
        """Seconds from the labelled moment at which the signal starts and stops."""
        return self.start, self.start + len(self.values) / self.rate


@dataclass(frozen=True, eq=False)
class Spectrograms:
    """The spectrograms of one sample, one per region.

    Parameters
    ----------
    power
        ``(rows, regions, frequencies)``; what is not finite is a gap.
    row_seconds
        Seconds that a row covers.
    regions
        A name for each region.
    frequencies
        In Hz, ascending.
    start
        Seconds from the labelled moment to the start of the first row, usually negative.
    modality
        Its name in the attention.

    Raises
    ------
    ShapeError, SettingError
        If regions or frequencies do not fit the values, ``row_seconds`` is not positive, or frequencies do not ascend.

    Examples
    --------
    >>> Spectrograms(torch.rand(5, 1, 3), row_seconds=2, regions=["LL"], frequencies=[1, 2, 4], start=-5).regions
    ['LL']
    """

    power: ArrayLike
    row_seconds: float
    regions: Sequence[str]
    frequencies: Sequence[float]
    start: float
    modality: str = "spec"

    def __post_init__(self) -> None:
        if not self.row_seconds > 0:
            raise SettingError(f"row_seconds must be > 0; got {self.row_seconds}.")
        as_array("power", self.power, rows=None, regions=len(self.regions), frequencies=len(self.frequencies))
        if len(self.frequencies) < 2 or (np.diff(self.frequencies) <= 0).any():
            raise SettingError(f"At least two ascending frequencies are needed; got {list(self.frequencies)}.")

    @property
    def decibels(self) -> NDArray[Any]:
        """``(rows, regions, frequencies)``, 10 log10 of the power; NaN in gaps and where there is none."""
        power = _finite(np.asarray(self.power, dtype=np.float64))
        return 10 * np.log10(np.where(power > 0, power, np.nan))

    @property
    def extent(self) -> tuple[float, float]:
        """Seconds from the labelled moment at which the signal starts and stops."""
        return self.start, self.start + len(np.asarray(self.power)) * self.row_seconds


def find_page(extent: tuple[float, float]) -> tuple[float, float]:
    """Find the 10 s of a recording that are drawn large: those around the labelled moment, or the nearest ones."""
    start, stop = extent
    first = max(min(-PAGE_SECONDS / 2, stop - PAGE_SECONDS), start)
    return first, min(first + PAGE_SECONDS, stop)


def page_height(derivations: Derivations) -> float:
    """Inches for a panel with legible traces."""
    return max(1.2, 0.2 * float(derivations.rows[-1] + 1))


def draw_traces(ax: Axes, traces: Traces, derivations: Derivations, seconds: tuple[float, float]) -> None:
    """Draw these seconds of the traces one below the other, negative up, each without its offset; gaps are hatched.

    Bars at the top mark when a trace leaves the panel.
    """
    time, values = _between(traces, derivations, seconds)
    spacing, rows = _spacing(values), derivations.rows
    for row, trace in zip(rows, values.T, strict=True):
        # Rows count downwards, so a negative value goes up, as EEG is read.
        ax.plot(time, row + trace / spacing, color="black", linewidth=0.7)
        gaps = [(time[first], (last - first) / traces.rate) for first, last in runs(np.isnan(trace))]
        ax.broken_barh(gaps, (row - 0.4, 0.8), **UNDEFINED)
    ax.set_yticks(rows, [*map(shown, derivations.names)], fontsize=9, parse_math=False)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MultipleLocator(1))
    ax.grid(axis="x", color="0.88")
    ax.set_axisbelow(True)
    drawn: NDArray[Any] = rows + values / spacing
    # The outer traces have no neighbour to reach over, and get room; but a huge artefact must not flatten the others.
    top, bottom = np.nanmin(drawn, initial=-0.6), np.nanmax(drawn, initial=rows[-1] + 0.6)
    ax.set_ylim(min(bottom, rows[-1] + _REACH) + 0.2, max(top, -_REACH) - 0.2)
    ax.set_xlim(*seconds)
    low, high = sorted(ax.get_ylim())
    beyond = runs(np.any((drawn < low) | (drawn > high), axis=1))
    ax.broken_barh([(time[first], (last - first) / traces.rate) for first, last in beyond], (low, 0.3), **_BEYOND)
    start, stop = seconds
    where = f"{stop - start:g} s around the labelled moment" if start == -stop else f"{start:g} to {stop:g} s"
    remark = "; bars at the top: a trace leaves the panel" if beyond else ""
    ax.set_title(f"EEG, {where}, {derivations.description}, negative up{remark}", loc="left", fontsize=10)
    # Beside the panel, where other panels have their colour bars.
    size = max(step for step in _STEPS if step <= spacing)
    beside, middle, half = ax.get_yaxis_transform(), rows[-1] / 2, size / spacing / 2
    (bar,) = ax.plot([1.03, 1.03], [middle - half, middle + half], transform=beside, color="black", marker="_")
    bar.set(linewidth=2, clip_on=False, in_layout=False)
    ax.text(1.045, middle, f"{size:g} µV", transform=beside, va="center", in_layout=False)


def draw_strip(ax: Axes, traces: Traces, derivations: Derivations, page: tuple[float, float]) -> None:
    """Draw the whole recording small, with the seconds that are drawn large shaded."""
    time, values = _between(traces, derivations, traces.extent)
    spacing = _spacing(values)
    ax.axvspan(*page, facecolor="#F5D9A8", linewidth=0)
    for row, trace in zip(derivations.rows, values.T, strict=True):
        ax.plot(time, row + trace / spacing, color="0.15", linewidth=0.25)
    ax.set(xlim=traces.extent, ylim=(derivations.rows[-1] + 1.5, -1.5), yticks=[])
    first, last = traces.extent
    ax.set_title(f"The whole {last - first:g} s (shaded: the {page[1] - page[0]:g} s above)", loc="left", fontsize=10)


def _between(
    traces: Traces, derivations: Derivations, seconds: tuple[float, float]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Time and values of some seconds, each trace less its median."""
    first, last = (round((second - traces.start) * traces.rate) for second in seconds)
    values = derivations.microvolts[first:last]
    known = [trace[np.isfinite(trace)] for trace in values.T]
    offsets = [np.median(trace) if trace.size else 0.0 for trace in known]
    return traces.start + np.arange(first, first + len(values)) / traces.rate, values - offsets


def draw_spectrograms(
    fig: Figure, panels: NDArray[Any], spectrograms: Spectrograms, stretch: tuple[float, float]
) -> None:
    """Draw one panel per region on one scale of log power, with the stretch that the EEG covers between two lines."""
    decibels = spectrograms.decibels
    seen = decibels[np.isfinite(decibels)]
    low, high = np.percentile(seen, _SHOWN_POWER) if seen.size else (0.0, 1.0)
    scale = Normalize(low, max(high, low + 1.0))
    time = spectrograms.start + np.arange(len(decibels) + 1) * spectrograms.row_seconds
    middles = np.asarray(spectrograms.frequencies, dtype=np.float64)
    between = (middles[1:] + middles[:-1]) / 2
    edges = np.r_[2 * middles[0] - between[0], between, 2 * middles[-1] - between[-1]]
    for index, (ax, region) in enumerate(zip(panels, spectrograms.regions, strict=True)):
        draw_mesh(ax, time, edges, decibels[:, index].T, scale, _POWER)
        for second in stretch:
            ax.axvline(second, **STRETCH)
        ax.set_ylabel(wrap(region, SPECTROGRAM_INCHES, 9), fontsize=9, parse_math=False)
        ax.locator_params(axis="y", nbins=3)
    panels[0].set_title("Spectrograms, frequency in Hz (between the lines: the EEG above)", loc="left", fontsize=10)
    draw_colour_bar(fig, panels, scale, "power (dB)", inches=len(panels), colours=_POWER, extend="both")


def runs(where: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First index, and the one after the last, of each run of True."""
    ends = np.flatnonzero(np.diff(np.r_[False, where, False]))
    return [(int(first), int(last)) for first, last in ends.reshape(-1, 2)]


def _spacing(values: NDArray[Any]) -> float:
    """Microvolts from one trace to the next: the usual swing fits, a large one reaches over its neighbours."""
    swings = np.abs(values[np.isfinite(values)])
    usual = 1.5 * float(np.percentile(swings, 95)) if swings.size else 0.0
    return max(usual, _STEPS[0])


def _finite(values: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.isfinite(values), values, np.nan)
