"""What all HMS recordings share: classes, electrodes, regions and their neighbours; and the montages of an EEG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_xattn.core.errors import SettingError

CLASSES = ("Seizure", "LPD", "GPD", "LRDA", "GRDA", "Other")
"""The six patterns in the competition's order; the index is the class id."""

VOTE_COLUMNS = tuple(f"{name.lower()}_vote" for name in CLASSES)

# fmt: off
ELECTRODES = (
    "Fp1", "F3", "C3", "P3", "F7", "T3", "T5", "O1", "Fz", "Cz", "Pz",
    "Fp2", "F4", "C4", "P4", "F8", "T4", "T6", "O2",
)
"""The 19 electrodes of the 10-20 system in the order of the competition's files (which add EKG)."""

_NEIGHBOURS = (
    ("Fp1", "Fp2"), ("Fp1", "F7"), ("Fp1", "F3"), ("Fp1", "Fz"), ("Fp2", "F8"), ("Fp2", "F4"), ("Fp2", "Fz"),
    ("F7", "F3"), ("F3", "Fz"), ("Fz", "F4"), ("F4", "F8"),
    ("F7", "T3"), ("F3", "C3"), ("Fz", "Cz"), ("F4", "C4"), ("F8", "T4"),
    ("T3", "C3"), ("C3", "Cz"), ("Cz", "C4"), ("C4", "T4"),
    ("T3", "T5"), ("C3", "P3"), ("Cz", "Pz"), ("C4", "P4"), ("T4", "T6"),
    ("T5", "P3"), ("P3", "Pz"), ("Pz", "P4"), ("P4", "T6"),
    ("T5", "O1"), ("P3", "O1"), ("Pz", "O1"), ("Pz", "O2"), ("P4", "O2"), ("T6", "O2"), ("O1", "O2"),
)
# fmt: on

REGIONS = ("LL", "RL", "LP", "RP")
"""The spectrogram's four regions."""

REGION_NAMES = {"LL": "left lateral", "RL": "right lateral", "LP": "left parasagittal", "RP": "right parasagittal"}

REGION_ELECTRODES = {
    "LL": ("Fp1", "F7", "T3", "T5", "O1"),
    "RL": ("Fp2", "F8", "T4", "T6", "O2"),
    "LP": ("Fp1", "F3", "C3", "P3", "O1"),
    "RP": ("Fp2", "F4", "C4", "P4", "O2"),
}
"""The chain of electrodes, from front to back, along which each region's spectrogram is computed."""

MIDLINE = ("Fz", "Cz", "Pz")

_REGION_RING = (("LL", "LP"), ("LP", "RP"), ("RP", "RL"), ("RL", "LL"))


def _directed(pairs: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    index = {name: i for i, name in enumerate(names)}
    return tuple(sorted((index[a], index[b]) for pair in pairs for a, b in (pair, pair[::-1])))


EEG_EDGES = _directed(_NEIGHBOURS, ELECTRODES)
"""72 directed ``(source, target)`` edges between neighbouring electrodes, as indices into ``ELECTRODES``."""

SPEC_EDGES = _directed(_REGION_RING, REGIONS)
"""8 directed edges around the ring LL, LP, RP, RL, as indices into ``REGIONS``."""

EEG_RATE = 200
"""Samples a second of every EEG recording."""

SPEC_ROW_SECONDS = 2
"""What one row of a spectrogram file covers; its ``time`` column holds the middle: 1, 3, 5, … s."""

SPEC_SECONDS = 600
"""What one labelled spectrogram window covers."""

SPEC_FREQUENCIES = tuple((k + 3) * 50 / 256 for k in range(100))
"""The 100 frequencies in Hz, 0.59 to 19.92; `hms.columns` names their columns."""

Montage = Literal["referential", "bipolar"]
MONTAGES: tuple[Montage, ...] = ("bipolar", "referential")

_CHAINS = (*REGION_ELECTRODES.values(), MIDLINE)
_GAP = 0.6  # rows between two chains


@dataclass(frozen=True, eq=False)
class Derivations:
    """Traces in the order in which a montage shows them."""

    microvolts: NDArray[Any]
    """``(samples, traces)``, NaN in gaps."""
    names: Sequence[str]
    rows: NDArray[Any]
    """``(traces,)`` position of each, in rows downwards from 0; chains have a gap between them."""
    description: str
    """Name of the montage."""


def require_montage(montage: str) -> None:
    """Refuse an unknown montage."""
    if montage not in MONTAGES:
        raise SettingError(f"montage must be one of {', '.join(map(repr, MONTAGES))}; got {montage!r}.")


def derive(microvolts: NDArray[Any], electrodes: Sequence[str], montage: Montage) -> Derivations:
    """Derive a montage's traces from ``(samples, electrodes)`` against one reference.

    ``"referential"``: the electrodes as they are. ``"bipolar"``, the longitudinal montage ("double banana"): each
    electrode less the next one of its chain, so that the reference cancels. It needs the 19 electrodes of the 10-20
    system by their names (T3, not T7).

    Raises
    ------
    SettingError
        If the montage is neither of the two, or electrodes of it are missing.
    """
    require_montage(montage)
    if montage == "referential":
        return Derivations(microvolts, electrodes, np.arange(len(electrodes), dtype=float), "referential montage")
    missing = sorted(set(ELECTRODES) - set(electrodes))
    if missing:
        raise SettingError(
            f"montage='bipolar' takes the 19 electrodes of the 10-20 system; {', '.join(missing)} are not among "
            f"{', '.join(electrodes)}. montage='referential' draws any electrodes."
        )
    place = {name: i for i, name in enumerate(electrodes)}
    pairs = [(chain, pair) for chain, names in enumerate(_CHAINS) for pair in pairwise(names)]
    return Derivations(
        np.stack([microvolts[:, place[first]] - microvolts[:, place[second]] for _, (first, second) in pairs], axis=1),
        [f"{first}-{second}" for _, (first, second) in pairs],
        np.array([row + _GAP * chain for row, (chain, _) in enumerate(pairs)]),
        "longitudinal bipolar montage",
    )
