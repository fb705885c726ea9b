"""EEG montages: which traces a reader sees of what electrodes recorded against one reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_xattn.core.errors import SettingError

Montage = Literal["referential", "bipolar"]
MONTAGES: tuple[Montage, ...] = ("bipolar", "referential")

CHAINS = {
    "left lateral": ("Fp1", "F7", "T3", "T5", "O1"),
    "right lateral": ("Fp2", "F8", "T4", "T6", "O2"),
    "left parasagittal": ("Fp1", "F3", "C3", "P3", "O1"),
    "right parasagittal": ("Fp2", "F4", "C4", "P4", "O2"),
    "midline": ("Fz", "Cz", "Pz"),
}
"""The longitudinal bipolar montage ("double banana") of the 10-20 system: from front to back, left before right."""

_GAP = 0.6  # rows between two chains


@dataclass(frozen=True, eq=False)
class Derivations:
    """Traces as a montage has them.

    Parameters
    ----------
    microvolts
        ``(samples, traces)``, NaN in gaps.
    names
        A name for each trace.
    rows
        ``(traces,)`` where each stands, counted downwards from 0 in rows; chains have a gap between them.
    description
        What the montage is called.
    """

    microvolts: NDArray[Any]
    names: Sequence[str]
    rows: NDArray[Any]
    description: str


def require_montage(montage: str) -> None:
    """Refuse what is no montage."""
    if montage not in MONTAGES:
        raise SettingError(f"montage must be one of {', '.join(map(repr, MONTAGES))}; got {montage!r}.")


def derive(microvolts: NDArray[Any], electrodes: Sequence[str], montage: Montage) -> Derivations:
    """Put a montage together from ``(samples, electrodes)`` against one reference.

    ``"referential"``: the electrodes as they are. ``"bipolar"``: each electrode less the next one of its chain, in
    which the reference cancels; it takes the 19 electrodes of the 10-20 system by their names (T3, not T7).

    Raises
    ------
    SettingError
        If the montage is neither of the two, or electrodes of it are missing.
    """
    require_montage(montage)
    if montage == "referential":
        return Derivations(microvolts, electrodes, np.arange(len(electrodes), dtype=float), "referential montage")
    missing = sorted({name for chain in CHAINS.values() for name in chain} - set(electrodes))
    if missing:
        raise SettingError(
            f"montage='bipolar' takes the 19 electrodes of the 10-20 system; {', '.join(missing)} are not among "
            f"{', '.join(electrodes)}. montage='referential' draws any electrodes."
        )
    place = {name: i for i, name in enumerate(electrodes)}
    pairs = [pair for chain in CHAINS.values() for pair in pairwise(chain)]
    chains = [number for number, chain in enumerate(CHAINS.values()) for _ in chain[1:]]
    first, second = ([place[name] for name in side] for side in zip(*pairs, strict=True))
    return Derivations(
        microvolts[:, first] - microvolts[:, second],
        [f"{one}-{other}" for one, other in pairs],
        np.arange(len(pairs)) + _GAP * np.array(chains),
        "longitudinal bipolar montage",
    )
