"""Features of the HMS recordings: rows a second, relative to plain scipy calls, row after row in one process."""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import signal
from threadpoolctl import ThreadpoolController

from benchmarks.timing import median_seconds
from lightning_xattn.hms import simulate
from lightning_xattn.hms.cache import stored_features
from lightning_xattn.hms.features import EEG_BANDS, eeg_features, spectrogram_features
from lightning_xattn.hms.missing import fill_gaps
from lightning_xattn.hms.montage import EEG_EDGES, EEG_RATE
from lightning_xattn.hms.recordings import COMPETITION, Recordings

ROWS_A_SPECTROGRAM = 10
"""As in the competition: 106,800 rows of 11,138 spectrograms."""


def plain_eeg_features(microvolts: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute `eeg_features`, up to the filter's ends, with plain scipy."""
    finite, _ = fill_gaps(microvolts)
    band_pass = signal.butter(4, (0.5, 50.0), "bandpass", fs=EEG_RATE, output="sos")
    sections = np.concatenate([band_pass, signal.tf2sos(*signal.iirnotch(60.0, 30, fs=EEG_RATE))])
    filtered = signal.sosfiltfilt(sections, np.asarray(finite, dtype=np.float64), axis=0, padlen=800)

    def windows(samples: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.lib.stride_tricks.sliding_window_view(samples, 10 * EEG_RATE, axis=0)[:: 5 * EEG_RATE]

    frequencies, density = signal.welch(windows(filtered), fs=EEG_RATE, nperseg=2 * EEG_RATE, axis=-1)
    edges = np.asarray(list(EEG_BANDS.values()))
    members = (frequencies[:, None] >= edges[:, 0]) & (frequencies[:, None] < edges[:, 1])
    powers = np.log10(np.maximum(density @ members.astype(float) * 0.5, 1e-3))
    envelopes = windows(np.abs(signal.hilbert(filtered, axis=0)))
    centred = envelopes - envelopes.mean(axis=-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True))
    sources, targets = np.asarray(EEG_EDGES).T
    return powers, (unit @ unit.swapaxes(-1, -2) / unit.shape[-1])[:, sources, targets]


def simulate_competition(folder: Path, spectrograms: int) -> Path:
    """Simulate a folder with ten rows of each recording."""
    simulated = simulate(folder / "simulated", spectrograms)
    with (simulated / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    many = [
        {**row, "label_id": str(1000 * i + k), "eeg_sub_id": str(k)}
        for i, row in enumerate(rows)
        for k in range(ROWS_A_SPECTROGRAM)
    ]
    with (simulated / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, many[0])
        writer.writeheader()
        writer.writerows(many)
    return simulated


def compute_each_row(recordings: Recordings) -> None:
    """Compute row after row in one process, with all threads for products of matrices."""
    for row in recordings:
        plain_eeg_features(recordings.eeg(row, COMPETITION))
        spectrogram_features(recordings.spectrogram(row))


def limit_to_one_thread(call: Callable[[], object]) -> Callable[[], None]:
    """Wrap a call to take one thread for products of matrices, as the processes that compute features do."""
    threads = ThreadpoolController()  # made once: it takes longer than the call

    def limited() -> None:
        with threads.limit(limits=1, user_api="blas"):
            call()

    return limited


def features(spectrograms: int = 24) -> None:
    """Print rows a second with plain scipy, in this process and with 2 more, measured in turns."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recordings = Recordings.read(simulate_competition(folder, spectrograms))

        def build(workers: int) -> None:
            stored_features(recordings, COMPETITION, folder / "cache", workers)
            shutil.rmtree(folder / "cache")

        before, one, two = median_seconds(
            lambda: compute_each_row(recordings), lambda: build(0), lambda: build(2), repeats=3
        )
        eeg = recordings.eeg(recordings.rows[0], COMPETITION)
        plain, alone, ours = median_seconds(
            lambda: plain_eeg_features(eeg),
            limit_to_one_thread(lambda: plain_eeg_features(eeg)),
            limit_to_one_thread(lambda: eeg_features(eeg, COMPETITION)),
            repeats=40,
        )
    rows = len(recordings)
    print(
        f"features of {rows} rows of 50 s, {ROWS_A_SPECTROGRAM} of each spectrogram; row after row in plain scipy = 1"
    )
    print(f"  rows a second in this process     {before / one:6.2f}")
    print(f"  with 2 more, and their start      {before / two:6.2f}")
    print(f"  rows a second                     {rows / before:.0f} before, {rows / one:.0f} and {rows / two:.0f}")
    print(f"  EEG features of a row             {plain / ours:6.2f}     times as fast (aim: at least 2)")
    print(f"  the same, both with one thread    {alone / ours:6.2f}")


if __name__ == "__main__":
    features()
