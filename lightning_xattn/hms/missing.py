"""Missing data: recordings that lack too much are refused, gaps of all others are filled and counted.

A recording must fulfil this rule in all that is used of it (10 s or 50 s of EEG, 600 s of spectrogram) and in the 10 s
around the labelled moment, which the experts voted on:

- EEG: at least half of the electrodes have a signal: at least half of their samples are numbers, and not all one value.
  A long gap is filled by a line, which has no power in any band, like no signal.
- Spectrogram: at least half of the bins of each band in each region are numbers, since a filled band would look like
  one of average power. Not all regions are constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_xattn.hms.montage import EEG_RATE, ELECTRODES, REGION_NAMES, REGIONS, SPEC_FREQUENCIES, SPEC_ROW_SECONDS
from lightning_xattn.hms.table import Problem

SPEC_BANDS = {"delta": (0.5, 4.0), "theta": (4.0, 8.0), "alpha": (8.0, 13.0), "beta": (13.0, 20.0)}
"""Spectrogram bands in Hz, lower end included, upper end not; its data go from 0.59 to 19.92 Hz."""

FLAT = 1e-3
"""µV: a signal that varies less is rounding."""

_LEAST_SHARE = 0.5
_LABELLED_SECONDS = 10.0

Array = NDArray[np.floating[Any]]


def require_eeg(microvolts: Array) -> None:
    """Raise a `Problem` if too few electrodes of ``(samples, 19)`` have a signal; the labelled moment is the middle."""
    middle = _middle(len(microvolts), _LABELLED_SECONDS * EEG_RATE)
    for values, where in ((microvolts, "that are used"), (microvolts[middle], "around the labelled moment")):
        known = np.isfinite(values)
        highest = np.where(known, values, -np.inf).max(axis=0, initial=-np.inf)
        lowest = np.where(known, values, np.inf).min(axis=0, initial=np.inf)
        there = (known.sum(axis=0) >= max(1, _LEAST_SHARE * len(values))) & (highest - lowest > FLAT)
        if there.sum() < _LEAST_SHARE * len(ELECTRODES):
            names = ", ".join(name for name, one in zip(ELECTRODES, there, strict=True) if one)
            raise Problem(
                "no EEG",
                f"expected a signal of at least {int(np.ceil(_LEAST_SHARE * len(ELECTRODES)))} of {len(ELECTRODES)} "
                f"electrodes in the {len(values) / EEG_RATE:g} s {where}, got {there.sum()}"
                f"{f' ({names})' if names else ''}: one has a signal if at least half of its samples are numbers and "
                "they are not all one value",
            )


def require_spectrogram(power: Array) -> None:
    """Raise a `Problem` if ``(rows, 4, 100)`` lacks a band of a region, or is constant."""
    middle = _middle(len(power), _LABELLED_SECONDS / SPEC_ROW_SECONDS)
    for values, where in ((power, "that are used"), (power[middle], "around the labelled moment")):
        members = band_members(np.asarray(SPEC_FREQUENCIES), SPEC_BANDS)
        share = (np.isfinite(values).sum(axis=0) @ members) / (len(values) * members.sum(axis=0))
        region, band = np.unravel_index(share.argmin(), share.shape)
        if share[region, band] < _LEAST_SHARE:
            raise Problem(
                "no spectrogram",
                f"expected numbers in at least half of the bins of each band and region in the "
                f"{len(values) * SPEC_ROW_SECONDS} s {where}, got {100 * share[region, band]:.1f} % in "
                f"{list(SPEC_BANDS)[band]} of the {REGION_NAMES[REGIONS[region]]} region",
            )
    known = np.where(np.isfinite(power), power, np.nan)
    if (np.nanmax(known, axis=(0, 2)) == np.nanmin(known, axis=(0, 2))).all():
        raise Problem("no spectrogram", "every region is constant, which no recording of a brain is")


def fill_gaps(values: Array) -> tuple[NDArray[np.float64], int]:
    """Fill what is not finite of ``(time, channels)`` by straight lines between neighbours in time.

    A gap at an end takes the nearest value; a channel without any finite value becomes 0. Returns the filled values,
    and the number of those that were filled.
    """
    filled = np.array(values, dtype=np.float64)
    missing = ~np.isfinite(filled)
    time = np.arange(len(filled))
    for channel in np.flatnonzero(missing.any(axis=0)):
        gap = missing[:, channel]
        known = time[~gap]
        filled[gap, channel] = np.interp(time[gap], known, filled[known, channel]) if known.size else 0.0
    return filled, int(missing.sum())


def band_members(frequencies: Array, bands: Mapping[str, tuple[float, float]]) -> NDArray[np.float32]:
    """Return ``(frequencies, bands)``, 1 where the frequency is in the band."""
    edges = np.asarray(list(bands.values()))
    inside = (frequencies[:, None] >= edges[:, 0]) & (frequencies[:, None] < edges[:, 1])
    return inside.astype(np.float32)


def _middle(length: int, wanted: float) -> slice:
    """Select the middle ``wanted`` of ``length`` rows; all of them where there are fewer."""
    margin = max(0, int((length - wanted) / 2))
    return slice(margin, length - margin)
