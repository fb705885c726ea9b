"""What the simulated sources show: a patient's background and alpha, each class's pattern, noise and trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, signal

from lightning_xattn.hms.montage import EEG_RATE, REGIONS, SPEC_SECONDS

Array = NDArray[np.floating[Any]]

_N = SPEC_SECONDS * EEG_RATE
_MOMENT = SPEC_SECONDS / 2
_LEFT = np.array([region.startswith("L") for region in REGIONS])


@dataclass(frozen=True)
class Patient:
    """What a patient's recordings share."""

    index: int
    gain: float
    """Factor on every amplitude: skulls and electrodes differ."""
    slope: float
    """The background's power falls with frequency as ``f ** -slope``."""
    asymmetry: float
    """Log of the left background's amplitude over the right's."""
    alpha_hz: float

    @classmethod
    def draw(cls, index: int, rng: np.random.Generator) -> Patient:
        """Return some patient; the order of the draws is part of what a seed gives."""
        return cls(
            index,
            gain=float(np.exp(rng.normal(0, 0.4))),
            slope=float(rng.uniform(1.5, 2.1)),
            asymmetry=float(rng.normal(0, 0.2)),
            alpha_hz=float(rng.uniform(8.5, 11.5)),
        )


def source_signals(name: str, patient: Patient, rng: np.random.Generator) -> Array:
    """Return 600 s of the four regions' and the alpha rhythm's activity, ``(5, 120000)`` in µV."""
    shared, *own = noise(falling(_N, patient.slope), 1 + len(REGIONS), rng)
    background = 15 * (shared + np.stack(own))
    background *= np.exp(np.where(_LEFT, 1, -1) * patient.asymmetry / 2)[:, None]
    regions = background + _pattern(name, rng)
    frequencies = fft.rfftfreq(_N, 1 / EEG_RATE)
    alpha = noise(np.exp(-0.5 * ((frequencies - patient.alpha_hz) / 0.7) ** 2), 1, rng)
    alpha *= np.exp(rng.normal(0, 0.5)) * (12 if name == "Other" else 5)
    return (patient.gain * np.vstack([regions, alpha])).astype(np.float32)


def _pattern(name: str, rng: np.random.Generator) -> Array:
    """Return what the class adds to each region's background, ``(4, 120000)`` in µV."""
    pattern = np.zeros((len(REGIONS), _N), np.float32)
    if name == "Other":
        return pattern
    near = rng.uniform(0.6, 1.0, len(REGIONS))
    one_sided = near * np.where((rng.random() < 0.5) == _LEFT, 1, rng.uniform(0.05, 0.6))
    gains = near if name.startswith("G") else one_sided
    strength = np.exp(rng.normal(0.1, 0.4))
    hertz = rng.uniform(0.5, 2) if name.endswith("PD") else rng.uniform(1, 3)
    for start, stop in _bouts(rng):
        n = stop - start
        if name == "Seizure":
            bout = strength * _seizure(n, near, one_sided, rng)
        elif name.endswith("PD"):
            bout = strength * gains[:, None] * train(n, hertz, 0.12, _DISCHARGE, rng)
        else:
            bout = strength * gains[:, None] * _delta(n, hertz, rng)
        pattern[:, start:stop] = bout * signal.windows.tukey(n, 2 * EEG_RATE / n)
    return pattern


def _bouts(rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Yield where the pattern runs, as ``(start, stop)`` in samples: around the labelled moment, and elsewhere."""
    before, after = rng.uniform(8, 50, 2)
    yield int((_MOMENT - before) * EEG_RATE), int((_MOMENT + after) * EEG_RATE)
    for edge, outwards in ((before, -1), (after, 1)):
        start = edge + rng.uniform(20, 90)
        while (stop := start + rng.uniform(15, 80)) < _MOMENT:
            ends = sorted((_MOMENT + outwards * start, _MOMENT + outwards * stop))
            yield int(ends[0] * EEG_RATE), int(ends[1] * EEG_RATE)
            start = stop + rng.uniform(20, 90)


def _seizure(n: int, everywhere: Array, onset: Array, rng: np.random.Generator) -> Array:
    """Return one evolving bout ``(4, n)``: slowing, growing, and reaching ``everywhere`` from its ``onset``."""
    progress = np.linspace(0, 1, n)
    first, last = rng.uniform(6, 8), rng.uniform(3, 4)
    phase = _phase((first + progress * (last - first)) * _wander(n, 0.08, rng), rng)
    wave = np.sin(phase) + 0.4 * np.sin(2 * phase + 1) + 0.15 * np.sin(3 * phase + 2)
    spread = np.clip(2 * progress - rng.uniform(0, 0.8), 0, 1)
    gains = onset[:, None] + (everywhere - onset)[:, None] * spread
    return 34 * (0.6 + 0.6 * progress) * wave * gains


def _delta(n: int, hertz: float, rng: np.random.Generator) -> Array:
    """Return ``n`` samples of a rhythm that wanders a little in frequency and amplitude."""
    return 44 * _wander(n, 0.25, rng) * np.sin(_phase(hertz * _wander(n, 0.1, rng), rng))


def _wander(n: int, deviation: float, rng: np.random.Generator) -> Array:
    """Return ``n`` samples of a factor around 1 that changes within seconds."""
    knots = np.arange(0, n + 2 * EEG_RATE, 2 * EEG_RATE)
    return np.interp(np.arange(n), knots, np.exp(rng.normal(0, deviation, len(knots))))


def _phase(hertz: Array, rng: np.random.Generator) -> Array:
    return 2 * np.pi * (np.cumsum(hertz) / EEG_RATE + rng.random())


def train(n: int, hertz: float, jitter: float, shape: Array, rng: np.random.Generator) -> Array:
    """Return ``n`` samples of ``shape`` recurring ``hertz`` times a second, at intervals varying by ``jitter``."""
    count = int(n / EEG_RATE * hertz) + 4  # some more than fit on average, as intervals may turn out short
    intervals = np.clip(rng.normal(1, jitter, count), 0.5, 1.5) / hertz
    at = ((np.cumsum(intervals) - rng.random() * intervals[0]) * EEG_RATE).astype(int)
    at = at[at < n]
    impulses = np.zeros(n, np.float32)
    impulses[at] = rng.uniform(0.7, 1.3, len(at))
    recurring: Array = signal.oaconvolve(impulses, shape, mode="full")[:n]
    return recurring


def _discharge() -> Array:
    """Return one discharge in µV: sharp (about 150 ms at its base), then a slow wave of the other sign."""
    seconds = np.arange(-0.15, 0.6, 1 / EEG_RATE)
    x = (seconds / 0.033) ** 2
    sharp = (1 - x) * np.exp(-x / 2)
    slow = np.exp(-0.5 * ((seconds - 0.25) / 0.08) ** 2)
    return (120 * (sharp - 0.5 * slow)).astype(np.float32)


_DISCHARGE = _discharge()


def falling(n: int, slope: float) -> Array:
    """Return amplitudes of a spectrum ``f ** -(slope / 2)``, level below 0.5 Hz, for the ``rfft`` of ``n`` samples."""
    frequencies: Array = fft.rfftfreq(n, 1 / EEG_RATE)
    return (frequencies**2 + 0.25) ** (-slope / 4)


def noise(amplitudes: Array, rows: int, rng: np.random.Generator) -> Array:
    """Return noise ``(rows, n)`` of unit variance whose spectrum has these ``amplitudes`` ``(n // 2 + 1,)``."""
    n = 2 * (len(amplitudes) - 1)
    amplitudes = amplitudes * n / 2 / np.sqrt(np.sum(amplitudes**2))
    white = rng.standard_normal((rows, len(amplitudes), 2), dtype=np.float32).view(np.complex64)[..., 0]
    shaped: Array = fft.irfft(white * amplitudes.astype(np.float32), n)
    return shaped
