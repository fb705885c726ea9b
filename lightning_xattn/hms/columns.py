"""Find the columns of the competition's files by their names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import product

import numpy as np

from lightning_xattn.hms.montage import ELECTRODES, REGIONS, SPEC_FREQUENCIES
from lightning_xattn.hms.table import Problem

TIME = "time"
"""The first column of a spectrogram file: the middle of each row in seconds."""

_SAME_HERTZ = 0.01
"""Names are rounded to two decimals, by one rule or another: 3.125 Hz is 3.13 in the competition, elsewhere 3.12."""

_SPECTROGRAM_COLUMN = re.compile(rf"({'|'.join(REGIONS)})_(\d+(?:\.\d+)?)")


def _competition_spelling(frequency: float) -> str:
    """Two decimals, halves rounded up, no zeros at the end: 3.125 is 3.13 and 4.1015625 is 4.1."""
    return f"{math.floor(frequency * 100 + 0.5) / 100:g}"


SPECTROGRAM_COLUMNS = tuple(
    f"{region}_{_competition_spelling(frequency)}" for region in REGIONS for frequency in SPEC_FREQUENCIES
)
"""The competition's 400 names, ``LL_0.59`` to ``RP_19.92``: region by region, frequencies ascending."""


def find_eeg(names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of the 19 electrodes in the order of ``montage.ELECTRODES``; each must occur once."""
    return _require_columns(ELECTRODES, names)


def find_spectrogram(names: Sequence[str]) -> tuple[str, ...]:
    """Return ``time`` and the 400 columns ``<region>_<frequency>``, region by region, frequencies ascending.

    The frequency is read as a number, so its spelling does not matter. Other columns do not matter either. Raises a
    `Problem` if a region does not have one column for each of ``montage.SPEC_FREQUENCIES``.
    """
    by_place: dict[tuple[str, int], list[str]] = {}
    for name in names:
        if match := _SPECTROGRAM_COLUMN.fullmatch(name):
            distances = np.abs(np.subtract(SPEC_FREQUENCIES, float(match[2])))
            if distances.min() <= _SAME_HERTZ:
                by_place.setdefault((match[1], int(distances.argmin())), []).append(name)
    found = [TIME]
    for expected, place in zip(SPECTROGRAM_COLUMNS, product(REGIONS, range(len(SPEC_FREQUENCIES))), strict=True):
        candidates = by_place.get(place, [expected])
        # Beside the competition's own spelling another one is an extra column.
        if len(candidates) > 1 and expected not in candidates:
            raise Problem("repeated column", f"{' and '.join(candidates)} are one frequency, expected one column")
        found.append(expected if expected in candidates else candidates[0])
    return _require_columns(found, names)


def _require_columns(wanted: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    counts = Counter(names)
    missing = [name for name in wanted if not counts[name]]
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        there = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        raise Problem("missing column", f"{shown} ({len(missing)} of {len(wanted)} missing); the file has {there}")
    repeated = [name for name in wanted if counts[name] > 1]
    if repeated:
        raise Problem("repeated column", f"{repeated[0]} occurs {counts[repeated[0]]} times, expected once")
    return tuple(wanted)
