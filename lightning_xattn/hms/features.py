"""From microvolts and spectrogram power to node and edge features, vectorised over windows and channels.

`FEATURE_VERSION` changes with any number that comes out.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, signal

from lightning_xattn.core.errors import DataError
from lightning_xattn.hms.missing import FLAT, SPEC_BANDS, band_members, fill_gaps, require_eeg, require_spectrogram
from lightning_xattn.hms.montage import (
    EEG_EDGES,
    EEG_RATE,
    ELECTRODES,
    REGIONS,
    SPEC_FREQUENCIES,
    SPEC_ROW_SECONDS,
    SPEC_SECONDS,
)
from lightning_xattn.hms.recordings import EEGGeometry

FEATURE_VERSION = 3
"""Decides the folder of stored features, see `hms.cache`."""

EEG_BANDS = {"delta": (0.5, 4), "theta": (4, 8), "alpha": (8, 13), "beta": (13, 30), "gamma": (30, 50)}
"""EEG bands in Hz, lower end included, upper end not."""

SPEC_WINDOW_SECONDS = 10
SPEC_STEP_SECONDS = 5

POWER_FLOOR = 1e-3
"""µV² in a band that count as no power; its log10 is the least EEG feature."""

SPEC_POWER_RANGE = (float(np.exp(-4)), float(np.exp(8)))
"""Spectrogram power is clipped to this range before its logarithm: 0.018 to 2981."""

_PASS_BAND = (0.5, 50.0)
_MAINS = 60.0
_SEGMENT_SECONDS = 2.0  # Welch segments: 0.5 Hz resolution, the same for windows of 2 s and of 10 s

SPEC_WINDOWS = (SPEC_SECONDS - SPEC_WINDOW_SECONDS) // SPEC_STEP_SECONDS + 1

Array = NDArray[np.floating[Any]]


def feature_type(geometry: EEGGeometry) -> np.dtype[np.void]:
    """Layout of one recording's file: how many samples and bins were filled, then the float32 features."""
    return np.dtype(
        [
            ("filled", np.int64, 2),
            ("eeg_x", np.float32, (geometry.n_windows, len(ELECTRODES), len(EEG_BANDS))),
            ("eeg_edge_attr", np.float32, (geometry.n_windows, len(EEG_EDGES), 1)),
            ("spec_x", np.float32, (SPEC_WINDOWS, len(REGIONS), len(SPEC_BANDS))),
        ]
    )


def spectrogram_spans() -> tuple[tuple[float, float], ...]:
    """``(start, stop)`` of each spectrogram window in seconds from the labelled moment, the middle of the 600 s."""
    starts = [i * SPEC_STEP_SECONDS - SPEC_SECONDS / 2 for i in range(SPEC_WINDOWS)]
    return tuple((start, start + SPEC_WINDOW_SECONDS) for start in starts)


def filter_eeg(microvolts: Array) -> NDArray[np.complex64]:
    """Keep 0.5 to 50 Hz without 60 Hz, and return the envelope with it; nothing moves in time.

    The gain is that of a Butterworth band-pass and a notch that run forwards and backwards
    (``scipy.signal.sosfiltfilt``), applied to the spectrum: one pair of Fourier transforms gives the filtered signal
    and its Hilbert transform. The line through the first and the last sample is subtracted first: the gain at 0 Hz is 0
    anyway, and the rest continues smoothly into its odd reflection at both ends.

    ``microvolts (channels, samples)`` is finite. Returns the analytic signal of the same shape: its real part is the
    filtered signal, its absolute value the envelope.
    """
    samples = microvolts.shape[-1]
    padding = min(int(2 / _PASS_BAND[0] * EEG_RATE), samples - 1)
    line = microvolts[:, :1] + (microvolts[:, -1:] - microvolts[:, :1]) * np.linspace(0, 1, samples, dtype=np.float32)
    reflected = np.pad(microvolts - line, ((0, 0), (padding, padding)), "reflect", reflect_type="odd")
    points = fft.next_fast_len(reflected.shape[-1])
    # Without negative frequencies, and with the others twice, the inverse transform is the analytic signal.
    spectrum = fft.rfft(reflected, points) * (2 * _filter_gain(points))
    analytic: NDArray[np.complex64] = fft.ifft(spectrum, points, overwrite_x=True)
    return analytic[:, padding : padding + samples]


@lru_cache(maxsize=2)
def _filter_gain(points: int) -> NDArray[np.float32]:
    """Gain at each frequency of an ``rfft`` of ``points``, for both ways together."""
    band_pass = signal.butter(4, _PASS_BAND, "bandpass", fs=EEG_RATE, output="sos")
    notch = signal.tf2sos(*signal.iirnotch(_MAINS, 30, fs=EEG_RATE))
    sections = np.concatenate([band_pass, notch])
    _, response = signal.sosfreqz(sections, fft.rfftfreq(points, 1 / EEG_RATE), fs=EEG_RATE)
    return np.asarray(np.abs(response) ** 2, dtype=np.float32)


def _samples(geometry: EEGGeometry) -> tuple[int, int, int]:
    """The stretch, a window, and a step in samples."""
    stretch, window, step = (
        round(seconds * EEG_RATE) for seconds in (geometry.seconds, geometry.window_seconds, geometry.step_seconds)
    )
    return stretch, window, step


def band_powers(filtered: Array, geometry: EEGGeometry) -> NDArray[np.float32]:
    """Log power of each of `EEG_BANDS` in each window, by Welch's method (Hann segments of 2 s that overlap by half).

    Windows overlap too, so a segment that they share is transformed once. Takes ``(channels, samples)`` microvolts;
    returns ``(windows, channels, 5)`` log10 of the µV² in the band, at least log10 of `POWER_FLOOR`.
    """
    _, window, step = _samples(geometry)
    length = min(round(_SEGMENT_SECONDS * EEG_RATE), window)
    hop = length - length // 2
    grid = math.gcd(hop, step)  # each segment of each window starts on it
    frequencies, _, density = signal.spectrogram(
        filtered, EEG_RATE, window="hann", nperseg=length, noverlap=length - grid, detrend="constant"
    )
    power = band_members(frequencies, EEG_BANDS).T @ density * (EEG_RATE / length)
    segments = np.arange(geometry.n_windows)[:, None] * step + np.arange(0, window - length + 1, hop)
    by_window = power[..., segments // grid].mean(axis=-1)
    return np.asarray(np.log10(np.maximum(np.moveaxis(by_window, -1, 0), POWER_FLOOR)), dtype=np.float32)


def envelope_correlations(envelopes: Array, geometry: EEGGeometry) -> NDArray[np.float32]:
    """Pearson correlation of neighbouring electrodes' amplitudes over each window, the weight of an edge.

    Takes envelopes ``(19, samples)`` in microvolts; returns ``(windows, 72)`` for ``montage.EEG_EDGES``, -1 to 1, and 0
    where an electrode is flat.
    """
    _, window, step = _samples(geometry)
    windows = np.lib.stride_tricks.sliding_window_view(envelopes, window, axis=-1)[:, ::step].swapaxes(0, 1)
    centred = windows - windows.mean(axis=-1, keepdims=True)
    # All 19 x 19 pairs by matrix product are faster than the 72 picked out first.
    covariance = centred @ centred.swapaxes(-1, -2) / window
    deviation = np.sqrt(np.diagonal(covariance, axis1=-2, axis2=-1))
    # An envelope that varies less is rounding.
    scale = np.where(deviation > FLAT, 1 / np.maximum(deviation, FLAT), 0.0)
    sources, targets = np.asarray(EEG_EDGES).T
    correlations = covariance[:, sources, targets] * (scale[:, sources] * scale[:, targets])
    return np.asarray(np.clip(correlations, -1.0, 1.0), dtype=np.float32)


def eeg_features(microvolts: Array, geometry: EEGGeometry) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """Node features, edge features and number of filled samples of one labelled stretch of EEG.

    Takes ``(samples, 19)`` microvolts as `Recordings.eeg` returns them, NaN allowed. Returns ``x (windows, 19, 5)``,
    see `band_powers`, ``edge_attr (windows, 72, 1)``, see `envelope_correlations`, and the number, see `fill_gaps`.

    Raises
    ------
    DataError
        If the array is not ``(samples of the geometry, 19)``, or too much of it is missing, see `require_eeg`.
    """
    expected = (_samples(geometry)[0], len(ELECTRODES))
    if microvolts.shape != expected:
        raise DataError(f"EEG of {geometry} must be (samples, electrodes) {expected}; got shape {microvolts.shape}.")
    require_eeg(microvolts)
    finite, filled = fill_gaps(microvolts)
    # Single precision is what the recordings have; it keeps rounding far below POWER_FLOOR, in half of the time.
    analytic = filter_eeg(np.ascontiguousarray(finite.T, dtype=np.float32))
    edge_attr = envelope_correlations(np.abs(analytic), geometry)[..., None]
    return band_powers(analytic.real, geometry), edge_attr, filled


def spectrogram_features(power: Array) -> tuple[NDArray[np.float32], int]:
    """Node features and number of filled bins of one labelled stretch of spectrogram.

    Power is clipped to `SPEC_POWER_RANGE`, its logarithm standardised over all of the recording's bins (so that loud
    and quiet recordings look alike), averaged over each of `SPEC_BANDS`, and over windows of 10 s each 5 s. A row of
    the file covers 2 s, so a window's ends fall within rows: a row counts by the share of it that lies in the window.

    Takes ``(300, 4, 100)`` as `Recordings.spectrogram` returns it, NaN allowed. Returns ``x (119, 4, 4)``: windows,
    regions, bands; and the number, see `fill_gaps`. A frequency that a region lacks throughout is left out of its
    band's average.

    Raises
    ------
    DataError
        If the array is not ``(300, 4, 100)``, or too much of it is missing, see `require_spectrogram`.
    """
    expected = (SPEC_SECONDS // SPEC_ROW_SECONDS, len(REGIONS), len(SPEC_FREQUENCIES))
    if power.shape != expected:
        raise DataError(f"A spectrogram must be (rows, regions, frequencies) {expected}; got shape {power.shape}.")
    require_spectrogram(power)
    logarithm = np.log(np.clip(np.where(np.isfinite(power), power, np.nan), *SPEC_POWER_RANGE), dtype=np.float64)
    known = np.isfinite(logarithm)
    mean, deviation = logarithm[known].mean(), logarithm[known].std()
    standard = (logarithm - mean) / (deviation if deviation > 0 else 1.0)
    flat, filled = fill_gaps(standard.reshape(len(standard), -1))
    members = known.any(axis=0)[..., None] * band_members(np.asarray(SPEC_FREQUENCIES), SPEC_BANDS)
    bands = np.einsum("trf,rfb->trb", flat.reshape(expected), members / members.sum(axis=1, keepdims=True))
    return np.tensordot(_window_weights(), bands, axes=1).astype(np.float32), filled


@lru_cache(maxsize=1)
def _window_weights() -> NDArray[np.float64]:
    """``(119, 300)`` share of each window that each row covers; rows sum to 1."""
    starts = np.arange(SPEC_WINDOWS)[:, None] * SPEC_STEP_SECONDS
    row_starts = np.arange(0, SPEC_SECONDS, SPEC_ROW_SECONDS)[None, :]
    overlap = np.minimum(starts + SPEC_WINDOW_SECONDS, row_starts + SPEC_ROW_SECONDS) - np.maximum(starts, row_starts)
    return np.asarray(np.maximum(overlap, 0) / SPEC_WINDOW_SECONDS)
