"""Simulate recordings in the layout of the competition "HMS - Harmful Brain Activity Classification".

Every sample starts as the activity of five sources over the 600 s around the labelled moment: the four regions
(background, plus the class's pattern in bouts) and a posterior alpha rhythm. One fixed mixing leads from the sources to
the electrodes. The EEG is the middle of these 600 s; a region's spectrogram is that of the mean of its electrodes, all
600 s long. So the two modalities agree, unless a sample is made to disagree.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import fft, signal

from lightning_xattn.core.errors import DataError, SettingError
from lightning_xattn.core.progress import track
from lightning_xattn.hms.columns import SPECTROGRAM_COLUMNS, TIME
from lightning_xattn.hms.montage import (
    CLASSES,
    EEG_RATE,
    ELECTRODES,
    MIDLINE,
    REGION_ELECTRODES,
    REGIONS,
    SPEC_FREQUENCIES,
    SPEC_ROW_SECONDS,
    SPEC_SECONDS,
    VOTE_COLUMNS,
)
from lightning_xattn.hms.waveforms import Array, Patient, falling, noise, source_signals, train

NAN_SHARE = 0.05
"""The probability that an EEG has a gap: 0.2 to 1 s of NaN in every channel, as in the competition's files."""

_WORKERS = 2
"""Threads; nearly all of the time goes into calls that release the interpreter's lock."""

_ALPHA_AT = {"O1": 1.0, "O2": 1.0, "P3": 0.7, "Pz": 0.7, "P4": 0.7, "T5": 0.6, "T6": 0.6}


def _mixing() -> tuple[Array, Array]:
    """Weights from the sources (regions, alpha) to the electrodes ``(19, 5)`` and to the regions ``(4, 5)``."""
    members = np.array([[e in REGION_ELECTRODES[region] for region in REGIONS] for e in ELECTRODES])
    chains = members.T / members.sum(axis=0)[:, None]
    parasagittal = np.array([region.endswith("P") for region in REGIONS])
    members[[ELECTRODES.index(name) for name in MIDLINE]] = parasagittal
    alpha = np.array([[_ALPHA_AT.get(name, 0.15)] for name in ELECTRODES])
    to_electrodes = np.hstack([members / members.sum(axis=1, keepdims=True), alpha])
    return to_electrodes.astype(np.float32), (chains @ to_electrodes).astype(np.float32)


_TO_ELECTRODES, _TO_REGIONS = _mixing()

_CHAIN_POWER = 0.2
"""The competition's spectrograms are of differences between neighbours in a chain, in µV²/Hz. A difference keeps
about a fifth of the power: the median of the 20 real recordings in iiic_irr is 0.17, at all frequencies alike."""

_SPEC_RATE, _FFT_POINTS = 50, 256
"""256 points at 50 samples a second give the competition's frequencies, which end below 20 Hz."""
_FFT_BINS = np.rint(np.array(SPEC_FREQUENCIES) * _FFT_POINTS / _SPEC_RATE).astype(int)
_TAPERS = signal.windows.dpss(2 * SPEC_ROW_SECONDS * _SPEC_RATE, NW=2, Kmax=3).astype(np.float32)


def simulate(
    root: str | Path,
    n_samples: int = 240,
    *,
    eeg_seconds: int = 50,
    disagreeing: float = 0.2,
    seed: int = 0,
) -> Path:
    """Write a folder of simulated recordings: ``train.csv``, ``train_eegs/`` and ``train_spectrograms/``.

    The classes are balanced (each six successive samples hold each class once), and a patient has one to three
    samples of any class. In a disagreeing sample the spectrogram shows one of the five other classes; the votes, and so
    the label, follow the **EEG**. The truth is in three columns beside the competition's: ``eeg_class``,
    ``spectrogram_class`` and ``agrees`` (``true`` or ``false``). ``expert_consensus`` is the class with most votes:
    nearly always, not always, that of the EEG.

    The pattern comes in bouts of 15 to 100 s, of which one always covers the labelled 10 s in the middle.

    ===========  ==========================================================================================
    Seizure      rhythm falling from 6-8 to 3-4 Hz while it grows; starts on one side, spreads to the other
    LPD, GPD     periodic sharp discharges, 0.5-2 a second, on one side or on both
    LRDA, GRDA   rhythmic delta of 1-3 Hz, on one side or on both
    Other        background alone, with more alpha than the others have
    ===========  ==========================================================================================

    EEGs are float32 ``(eeg_seconds * 200, 20)`` in µV, 19 electrodes and EKG, a few with gaps (`NAN_SHARE`);
    spectrograms ``time`` (1, 3, 5, … s) and float32 ``(300, 400)`` in µV²/Hz, region by region. Values are rounded to
    ten significant bits, which halves the files.

    Parameters
    ----------
    root
        The folder to make, with its parents; it must not exist or be empty. It appears when it is complete.
    n_samples
        Number of samples, at least 1. The first n do not depend on how many follow.
    eeg_seconds
        Length of the EEGs: 50 (the competition) or 10 (the labelled centre alone).
    disagreeing
        Share of the samples whose modalities disagree, in [0, 1], rounded to whole samples and spread evenly.
    seed
        At least 0. The same seed writes the same values.

    Returns
    -------
    pathlib.Path
        ``root``, resolved.

    Raises
    ------
    SettingError
        If a setting has a value that is not allowed.
    DataError
        If ``root`` is a file or a folder that holds something.

    Examples
    --------
    >>> folder = simulate("recordings", n_samples=6, eeg_seconds=10)
    >>> sorted(path.name for path in folder.iterdir())
    ['train.csv', 'train_eegs', 'train_spectrograms']
    """
    if n_samples < 1:
        raise SettingError(f"n_samples must be at least 1, got {n_samples}")
    if eeg_seconds not in (10, 50):
        raise SettingError(f"eeg_seconds must be 10 or 50, got {eeg_seconds}")
    if not 0 <= disagreeing <= 1:
        raise SettingError(f"disagreeing must lie in [0, 1], got {disagreeing}")
    if seed < 0:
        raise SettingError(f"seed must be at least 0, got {seed}")
    root = Path(root).resolve()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(f"{root} exists and is not an empty folder: name a new one, or remove it first")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as unfinished:
        folder = Path(unfinished) / "complete"
        (folder / "train_eegs").mkdir(parents=True)
        (folder / "train_spectrograms").mkdir()
        write = partial(_write_sample, folder, eeg_seconds)
        with ThreadPoolExecutor(_WORKERS) as pool:
            written = pool.map(write, _plan(n_samples, disagreeing, seed))
            rows = list(track(written, f"Simulating {n_samples} recordings", n_samples))
        with (folder / "train.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        if root.exists():
            root.rmdir()
        folder.rename(root)
    return root


@dataclass(frozen=True)
class _Sample:
    index: int
    patient: Patient
    eeg_class: str
    spectrogram_class: str
    seed: int

    def rng(self, purpose: int) -> np.random.Generator:
        return _rng(self.seed, purpose, self.index)


_PATIENT, _ORDER, _OTHER_CLASS, _EEG, _SPECTROGRAM, _VOTES = range(6)
"""Purposes of random streams: one each, so that no choice shifts the numbers of another."""


def _rng(seed: int, purpose: int, index: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, index)))


def _plan(n_samples: int, disagreeing: float, seed: int) -> Iterator[_Sample]:
    """Yield each sample's patient and classes."""
    patients, samples_left = 0, 0
    for i in range(n_samples):
        if samples_left == 0:
            rng = _rng(seed, _PATIENT, patients)
            samples_left = int(rng.integers(1, 4))
            patient = Patient.draw(patients, rng)
            patients += 1
        samples_left -= 1
        block, place = divmod(i, len(CLASSES))
        shown = int(_rng(seed, _ORDER, block).permutation(len(CLASSES))[place])
        spectrogram = shown
        if np.floor((i + 1) * disagreeing + 0.5) > np.floor(i * disagreeing + 0.5):
            spectrogram = (shown + int(_rng(seed, _OTHER_CLASS, i).integers(1, len(CLASSES)))) % len(CLASSES)
        yield _Sample(i, patient, CLASSES[shown], CLASSES[spectrogram], seed)


def _write_sample(folder: Path, eeg_seconds: int, sample: _Sample) -> dict[str, object]:
    """Write a sample's two files and return its row of ``train.csv``."""
    rng = sample.rng(_EEG)
    sources = source_signals(sample.eeg_class, sample.patient, rng)
    eeg = _eeg(sources, eeg_seconds, rng)
    if sample.spectrogram_class != sample.eeg_class:
        sources = source_signals(sample.spectrogram_class, sample.patient, sample.rng(_SPECTROGRAM))
    votes = _votes(CLASSES.index(sample.eeg_class), sample.rng(_VOTES))

    # Another seed is other recordings of other patients: in no two folders may they have the same ids.
    first = 1_000_000 * sample.seed
    eeg_id, spectrogram_id = first + 100_001 + sample.index, first + 200_001 + sample.index
    columns = dict(zip((*ELECTRODES, "EKG"), eeg, strict=True))
    _write_parquet(folder / "train_eegs" / f"{eeg_id}.parquet", columns)
    _write_parquet(folder / "train_spectrograms" / f"{spectrogram_id}.parquet", _spectrogram(sources))
    return {
        "eeg_id": eeg_id,
        "eeg_sub_id": 0,
        "eeg_label_offset_seconds": 0.0,
        "spectrogram_id": spectrogram_id,
        "spectrogram_sub_id": 0,
        "spectrogram_label_offset_seconds": 0.0,
        "label_id": first + 300_001 + sample.index,
        "patient_id": first + 400_001 + sample.patient.index,
        "expert_consensus": CLASSES[int(votes.argmax())],
        **dict(zip(VOTE_COLUMNS, votes.tolist(), strict=True)),
        "eeg_class": sample.eeg_class,
        "spectrogram_class": sample.spectrogram_class,
        "agrees": str(sample.eeg_class == sample.spectrogram_class).lower(),
    }


def _write_parquet(path: Path, columns: dict[str, NDArray[Any]]) -> None:
    table = pa.table({name: _round(values) for name, values in columns.items()})
    streams = [name for name, values in columns.items() if values.dtype == np.float32]
    pq.write_table(
        table, path, compression="zstd", use_dictionary=False, use_byte_stream_split=streams, write_statistics=False
    )


def _round(values: NDArray[Any]) -> NDArray[Any]:
    """Round float32 values to ten significant bits (0.1 %), as noise in the others does not compress."""
    if values.dtype != np.float32:
        return values
    dropped = 14
    bits = np.ascontiguousarray(values).view(np.int32) + (1 << dropped - 1)
    return (bits & -(1 << dropped)).view(np.float32)


def _votes(shown: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw the votes ``(6,)`` of 10 to 20 experts, who agree about most samples and are divided about some."""
    divided = rng.random() < 0.15
    agreement = rng.uniform(0.45, 0.65) if divided else rng.uniform(0.75, 1.0)
    # Half a pseudo-count a class: those who disagree tend to vote for one or two other classes, not for all.
    shares = rng.dirichlet(np.full(len(CLASSES), 0.5)) * (1 - agreement)
    shares[shown] += agreement
    return rng.multinomial(rng.integers(10, 21), shares)


def _eeg(sources: Array, seconds: int, rng: np.random.Generator) -> Array:
    """Mix the sources' middle ``seconds`` into EEG and EKG, ``(20, seconds * 200)`` in µV."""
    n = seconds * EEG_RATE
    start = (sources.shape[1] - n) // 2
    eeg = _TO_ELECTRODES @ sources[:, start : start + n]
    eeg += noise(falling(n, 1.2), len(ELECTRODES), rng) * 4
    hum = np.sin(2 * np.pi * (60 * np.arange(n) / EEG_RATE + rng.random()))
    eeg += rng.uniform(0.2, 1.5, (len(ELECTRODES), 1)) * hum
    beat = 60 * signal.windows.gaussian(17, 2) - 10 * signal.windows.gaussian(17, 8)
    ekg = rng.uniform(1, 6) * train(n, rng.uniform(0.9, 1.6), 0.03, beat, rng) + 3 * rng.standard_normal(n)
    recording = np.vstack([eeg, ekg]).astype(np.float32)
    if rng.random() < NAN_SHARE:
        gap = int(rng.uniform(0.2, 1) * EEG_RATE)
        start = int(rng.integers(n - gap))
        recording[:, start : start + gap] = np.nan
    return recording


def _spectrogram(sources: Array) -> dict[str, NDArray[Any]]:
    """Return the columns of a spectrogram file: one row each 2 s, from the 4 s around its ``time``."""
    step = SPEC_ROW_SECONDS * _SPEC_RATE
    regions = signal.resample_poly(_TO_REGIONS @ sources, 1, EEG_RATE // _SPEC_RATE, axis=1)
    regions = np.pad(regions, ((0, 0), (step // 2, step // 2)), mode="reflect")
    spans = np.lib.stride_tricks.sliding_window_view(regions, 2 * step, axis=1)[:, ::step]
    power = np.zeros((len(REGIONS), spans.shape[1], len(SPEC_FREQUENCIES)), np.float32)
    for taper in _TAPERS:
        spectrum = fft.rfft(spans * taper, _FFT_POINTS)[..., _FFT_BINS]
        power += spectrum.real**2 + spectrum.imag**2
    # Twice the mean over the (unit energy) tapers: the density of both signs of frequency.
    power *= 2 / len(_TAPERS) / _SPEC_RATE * _CHAIN_POWER
    time = np.arange(SPEC_ROW_SECONDS // 2, SPEC_SECONDS, SPEC_ROW_SECONDS)
    columns = power.swapaxes(1, 2).reshape(-1, len(time))
    return {TIME: time, **dict(zip(SPECTROGRAM_COLUMNS, columns, strict=True))}
