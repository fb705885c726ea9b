"""Features on disk: computed once, read as memory-mapped arrays.

A folder of features is complete or absent. `hms.build` makes it, and goes on with one that was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from lightning_xattn.core.notices import info
from lightning_xattn.hms.build import BAD_ROWS, build
from lightning_xattn.hms.features import FEATURE_VERSION, feature_shapes
from lightning_xattn.hms.recordings import EEGGeometry, Recordings
from lightning_xattn.hms.table import BadRow, RowError


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
        return _map_again, (self.recordings, self.geometry, self.folder, list(self._arrays), self._positions)

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
    recordings: Recordings,
    geometry: EEGGeometry,
    cache_dir: str | Path | None = None,
    num_workers: int | None = None,
) -> StoredFeatures:
    """Open the features of a folder of recordings, and compute them first where that has not been done.

    Features are found again by all that decides them: the rows of ``train.csv`` (but for votes and extra columns),
    path, size and time of change of every file, the geometry, and `FEATURE_VERSION`. What is found damaged is
    computed again. A process that was interrupted leaves what it has computed, and the next one goes on from there,
    also when a bad file has been mended meanwhile. Where several want the same features, one computes them and the
    others wait.

    Nothing is ever deleted but damaged features, and unfinished ones of a folder that has changed; the cache may be
    emptied at any time.

    Parameters
    ----------
    recordings
        The rows; ``recordings.on_bad_row`` says what happens to those whose recording cannot be used.
    geometry
        How the EEG is cut.
    cache_dir
        Folder for the features of any number of data sets; None: `default_cache_dir`.
    num_workers
        Processes that compute, at least 0; 0: this one alone; None: one for each core. It does not change a bit of
        what is computed.

    Raises
    ------
    RowError
        If a recording cannot be used and ``recordings.on_bad_row`` is ``"raise"``.
    """
    parent = default_cache_dir() if cache_dir is None else Path(cache_dir)
    stamps = _stamps(recordings)
    about = FEATURE_VERSION, str(recordings.root.resolve()), astuple(geometry)
    folder, shapes = parent / _digest(*about, *stamps), feature_shapes(len(recordings), geometry)
    stored = _open(folder, shapes)
    if stored is None:
        # One for each data set, not for each state of it: what is done stays when a file is mended.
        unfinished = parent / f".{_digest(*about)}"
        parent.mkdir(parents=True, exist_ok=True)
        # The lock's file stays: to remove it would take it from under those who wait for it.
        with _locked(unfinished.with_suffix(".lock"), recordings.root):
            stored = _open(folder, shapes)  # another process may have made it meanwhile
            if stored is None:
                _discard(folder)
                build(unfinished, stamps, recordings, geometry, num_workers)
                unfinished.rename(folder)
                stored = _open(folder, shapes)
                assert stored is not None
    arrays, bad_rows = stored
    if bad_rows and recordings.on_bad_row == "raise":
        raise RowError(bad_rows[0])
    bad_lines = {bad_row.line for bad_row in bad_rows}
    positions = np.asarray([i for i, row in enumerate(recordings) if row.line not in bad_lines], dtype=np.int64)
    return StoredFeatures(recordings.without(bad_rows), geometry, folder, arrays, positions)


@contextmanager
def _locked(path: Path, root: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        info([f"Another process computes the features of {root}; waiting for it."])
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _digest(*parts: Any) -> str:
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:32]


def _map_again(
    recordings: Recordings, geometry: EEGGeometry, folder: Path, names: list[str], positions: NDArray[np.int64]
) -> StoredFeatures:
    arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names}
    return StoredFeatures(recordings, geometry, folder, arrays, positions)


def _stamps(recordings: Recordings) -> list[str]:
    """For each row all that decides its features: where they are cut, and size and time of change of its files."""
    files: dict[Path, str] = {}

    def stamp(path: Path) -> str:
        if path not in files:
            try:
                stat = path.stat()
                files[path] = f"{stat.st_size} {stat.st_mtime_ns}"
            except FileNotFoundError:
                files[path] = "missing"
        return files[path]

    return [
        f"{row.line} {row.label_id} {row.eeg_id} {row.spectrogram_id} {row.eeg_offset} {row.spectrogram_offset} "
        f"{stamp(recordings.eeg_path(row))} {stamp(recordings.spectrogram_path(row))}"
        for row in recordings
    ]


def _open(folder: Path, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, NDArray[Any]], list[BadRow]] | None:
    """The features of a folder and its bad rows; None if it is absent, or damaged in one of many ways."""
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}
        bad_rows = [BadRow(**fields) for fields in json.loads((folder / BAD_ROWS).read_text("utf-8"))]
    except (OSError, EOFError, ValueError, TypeError):
        return None
    if {name: array.shape for name, array in arrays.items()} != shapes:
        return None
    return {name: np.asarray(array) for name, array in arrays.items()}, bad_rows


def _discard(folder: Path) -> None:
    """Take damaged features away; renamed first, so that nobody sees them half deleted."""
    rubbish = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        folder.rename(rubbish)
    except FileNotFoundError:
        return
    shutil.rmtree(rubbish, ignore_errors=True)
