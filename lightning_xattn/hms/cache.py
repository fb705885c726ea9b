"""Features on disk: computed once, read as memory-mapped arrays.

A folder of features is complete or absent: it is written under another name and renamed when it is whole.
Where several processes build the same one, the first to finish wins and the others take its.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm  # it ships without types

from lightning_xattn.hms.features import (
    EEG_BANDS,
    FEATURE_VERSION,
    SPEC_BANDS,
    SPEC_WINDOWS,
    eeg_features,
    spectrogram_features,
)
from lightning_xattn.hms.montage import EEG_EDGES, ELECTRODES, REGIONS
from lightning_xattn.hms.recordings import EEGGeometry, Recordings
from lightning_xattn.hms.table import BadRow, RowError

_BAD_ROWS = "bad_rows.json"


@dataclass(frozen=True)
class StoredFeatures:
    """Features of all usable rows of a folder, memory-mapped and read-only.

    Parameters
    ----------
    recordings
        The usable rows, in the order of the features; those whose recording could not be used are in ``skipped``.
    geometry
        How the EEG was cut.
    folder
        Where the arrays stand.
    """

    recordings: Recordings
    geometry: EEGGeometry
    folder: Path
    _arrays: dict[str, NDArray[Any]]
    _positions: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self._positions)

    def __reduce__(self) -> tuple[Callable[..., StoredFeatures], tuple[Any, ...]]:
        # A worker process maps the files itself; pickled, the arrays would be copied whole.
        return stored_features, (self.recordings, self.geometry, self.folder.parent)

    def take(self, indices: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        """Copy the features of some rows into memory.

        Parameters
        ----------
        indices
            ``(n,)`` positions in ``recordings``.

        Returns
        -------
        ``eeg_x (n, 9, 19, 5)``, ``eeg_edge_attr (n, 9, 72, 1)`` and ``spec_x (n, 119, 4, 4)``, see
        `features.eeg_features` and `features.spectrogram_features`.
        """
        at = self._positions[indices]
        return {name: array[at] for name, array in self._arrays.items() if name != "filled"}

    @property
    def filled(self) -> NDArray[np.int64]:
        """``(rows, 2)``: how many EEG samples and spectrogram bins were missing in a row and were filled."""
        return np.asarray(self._arrays["filled"][self._positions])


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/lightning_xattn``, or ``~/.cache/lightning_xattn`` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_xattn"


def stored_features(
    recordings: Recordings, geometry: EEGGeometry, cache_dir: str | Path | None = None
) -> StoredFeatures:
    """Open the features of a folder of recordings, and compute them first where that has not been done.

    Features are found again by all that decides them: the rows of ``train.csv`` (but for votes and extra columns),
    path, size and time of change of every file, the geometry, and `FEATURE_VERSION`. What is found damaged is
    computed again. Nothing is ever deleted but damaged features; the folder may be emptied at any time.

    Parameters
    ----------
    recordings
        The rows; ``recordings.on_bad_row`` says what happens to those whose recording cannot be used.
    geometry
        How the EEG is cut.
    cache_dir
        Folder for the features of any number of data sets; None: `default_cache_dir`.

    Raises
    ------
    RowError
        If a recording cannot be used and ``recordings.on_bad_row`` is ``"raise"``.
    """
    parent = default_cache_dir() if cache_dir is None else Path(cache_dir)
    folder = parent / _key(recordings, geometry)
    shapes = _shapes(len(recordings), geometry)
    try:
        arrays, bad_rows = _open(folder, shapes)
    except (OSError, EOFError, ValueError, TypeError):  # absent, or damaged in one of many ways
        _discard(folder)
        _build(folder, recordings, geometry, shapes)
        arrays, bad_rows = _open(folder, shapes)
    if bad_rows and recordings.on_bad_row == "raise":
        raise RowError(bad_rows[0])
    bad_lines = {bad_row.line for bad_row in bad_rows}
    positions = np.asarray([i for i, row in enumerate(recordings) if row.line not in bad_lines], dtype=np.int64)
    return StoredFeatures(recordings.without(bad_rows), geometry, folder, arrays, positions)


def _key(recordings: Recordings, geometry: EEGGeometry) -> str:
    digest = hashlib.sha256()
    for part in (FEATURE_VERSION, str(recordings.root.resolve()), astuple(geometry)):
        digest.update(repr(part).encode())
    for row in recordings:
        ids = (row.line, row.label_id, row.eeg_id, row.spectrogram_id, row.eeg_offset, row.spectrogram_offset)
        digest.update(repr(ids).encode())
    paths = {recordings.eeg_path(row): None for row in recordings}
    paths |= {recordings.spectrogram_path(row): None for row in recordings}
    for path in paths:
        try:
            stat = path.stat()
            digest.update(repr((stat.st_size, stat.st_mtime_ns)).encode())
        except FileNotFoundError:
            digest.update(b"missing")
    return digest.hexdigest()[:32]


def _shapes(rows: int, geometry: EEGGeometry) -> dict[str, tuple[int, ...]]:
    return {
        "eeg_x": (rows, geometry.n_windows, len(ELECTRODES), len(EEG_BANDS)),
        "eeg_edge_attr": (rows, geometry.n_windows, len(EEG_EDGES), 1),
        "spec_x": (rows, SPEC_WINDOWS, len(REGIONS), len(SPEC_BANDS)),
        "filled": (rows, 2),
    }


def _open(folder: Path, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, NDArray[Any]], list[BadRow]]:
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}
    if {name: array.shape for name, array in arrays.items()} != shapes:
        raise ValueError(f"{folder} holds arrays of other shapes than {shapes}.")
    bad_rows = [BadRow(**fields) for fields in json.loads((folder / _BAD_ROWS).read_text("utf-8"))]
    return {name: np.asarray(array) for name, array in arrays.items()}, bad_rows


def _build(folder: Path, recordings: Recordings, geometry: EEGGeometry, shapes: dict[str, tuple[int, ...]]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        arrays = {
            name: np.lib.format.open_memmap(
                building / f"{name}.npy", "w+", dtype=np.int64 if name == "filled" else np.float32, shape=shape
            )
            for name, shape in shapes.items()
        }
        bad_rows: list[BadRow] = []
        # disable=None: no progress bar where nobody looks at a terminal.
        progress = tqdm(recordings, f"Features of {recordings.root.name}", unit=" recordings", disable=None)
        for position, row in enumerate(progress):
            try:
                eeg, spectrogram = recordings.eeg(row, geometry), recordings.spectrogram(row)
            except RowError as error:
                if recordings.on_bad_row == "raise":
                    raise
                bad_rows.append(error.bad_row)
                continue
            arrays["eeg_x"][position], arrays["eeg_edge_attr"][position], filled = eeg_features(eeg, geometry)
            arrays["spec_x"][position], filled_bins = spectrogram_features(spectrogram)
            arrays["filled"][position] = filled, filled_bins
        for array in arrays.values():
            array.flush()
        (building / _BAD_ROWS).write_text(json.dumps([asdict(bad_row) for bad_row in bad_rows]), "utf-8")
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its features are as good
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Take damaged features away; renamed first, so that nobody sees them half deleted."""
    rubbish = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        folder.rename(rubbish)
    except FileNotFoundError:
        return
    shutil.rmtree(rubbish, ignore_errors=True)
