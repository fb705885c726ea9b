"""Features on disk: one file for each recording, which a pool of processes computes and nobody computes again."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lightning_xattn.core.errors import DataError
from lightning_xattn.core.files import complete_or_absent
from lightning_xattn.core.progress import track
from lightning_xattn.hms.features import FEATURE_VERSION, eeg_features, feature_type, spectrogram_features
from lightning_xattn.hms.recordings import EEGGeometry, Recordings
from lightning_xattn.hms.table import BadRow, RowError

_ROWS_PER_PROCESS = 500
"""A new process imports torch for some seconds, in which this one computes as many features."""


@dataclass(frozen=True)
class StoredFeatures:
    """Features of all usable rows of a folder."""

    recordings: Recordings
    """The usable rows; those whose recording could not be used are in its ``skipped``."""
    geometry: EEGGeometry
    files: tuple[Path, ...]
    """The file of each row's features."""

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int] | NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        """Read ``eeg_x (n, 9, 19, 5)``, ``eeg_edge_attr (n, 9, 72, 1)`` and ``spec_x (n, 119, 4, 4)`` of n rows."""
        kind = feature_type(self.geometry)
        records = np.concatenate([np.fromfile(self.files[i], kind) for i in indices])
        return {name: records[name] for name in ("eeg_x", "eeg_edge_attr", "spec_x")}

    def count_filled(self) -> NDArray[np.int64]:
        """Count the missing EEG samples and spectrogram bins that were filled in each row, ``(rows, 2)``."""
        return np.stack([np.fromfile(file, np.int64, 2) for file in self.files])


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/lightning_xattn``, or ``~/.cache/lightning_xattn`` where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_xattn"


def stored_features(
    recordings: Recordings,
    geometry: EEGGeometry,
    cache_dir: str | Path | None = None,
    num_workers: int | None = None,
) -> StoredFeatures:
    """Open the features of a folder of recordings, after computing those that are not there yet.

    The name of the folder of features is a hash of `FEATURE_VERSION`, the recordings' folder and the geometry. The name
    of a file is a hash of the row's offsets, and of the size and time of change of its two recordings. So features of
    another state are never read, a file that is mended costs its own rows alone, and a computation that was interrupted
    continues. Nothing is ever deleted; the cache may be emptied at any time.

    Parameters
    ----------
    recordings, geometry
        The rows, and how their EEG is cut; ``recordings.on_bad_row`` applies to recordings that cannot be used.
    cache_dir
        Folder for the features of any number of data sets; None: `default_cache_dir`.
    num_workers
        Processes that compute; 0: this one alone; None: one for each core and 500 rows. A script that starts processes
        needs ``if __name__ == "__main__":``. The number does not change a bit of the features.

    Raises
    ------
    RowError
        If a recording cannot be used and ``recordings.on_bad_row`` is ``"raise"``.
    DataError
        If no recording can be used, or a process that computes features ends.
    """
    parent = default_cache_dir() if cache_dir is None else Path(cache_dir)
    folder = parent / _digest(FEATURE_VERSION, str(recordings.root.resolve()), geometry)
    files = _name_files(recordings, folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = feature_type(geometry).itemsize
    complete = {file for file in folder.glob("*.features") if file.stat().st_size == size}
    missing = [position for position, file in enumerate(files) if file not in complete]
    bad_rows = _compute_files(recordings, geometry, files, missing, num_workers) if missing else []
    bad_lines = {bad_row.line for bad_row in bad_rows}
    if bad_rows and len(bad_rows) == len(recordings):
        raise DataError(f"No recording of {recordings.root} can be used. The first: {bad_rows[0]}")
    usable = tuple(file for row, file in zip(recordings, files, strict=True) if row.line not in bad_lines)
    return StoredFeatures(recordings.without(bad_rows), geometry, usable)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _name_files(recordings: Recordings, folder: Path) -> list[Path]:
    """Name each row's file after all that decides its features."""

    @cache
    def state(path: Path) -> tuple[int, int] | None:
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        return stat.st_size, stat.st_mtime_ns

    names = []
    for row in recordings:
        sources = [(path.name, state(path)) for path in (recordings.eeg_path(row), recordings.spectrogram_path(row))]
        names.append(f"{row.label_id}-{_digest(sources, row.eeg_offset, row.spectrogram_offset)[:16]}.features")
    return [folder / name for name in names]


def _compute_files(
    recordings: Recordings,
    geometry: EEGGeometry,
    files: Sequence[Path],
    missing: Sequence[int],
    num_workers: int | None,
) -> list[BadRow]:
    """Write the features of the ``missing`` rows, spectrogram by spectrogram, so that each recording is read once.

    Returns the rows that cannot be used, in the order of ``train.csv``.
    """
    by_spectrogram: dict[int, list[int]] = {}
    for position in sorted(missing, key=lambda position: recordings.rows[position].eeg_id):
        by_spectrogram.setdefault(recordings.rows[position].spectrogram_id, []).append(position)
    tasks = [
        (replace(recordings, rows=tuple(recordings.rows[i] for i in positions)), [files[i] for i in positions])
        for positions in by_spectrogram.values()
    ]
    workers = min(_count_cores(), len(missing) // _ROWS_PER_PROCESS) if num_workers is None else num_workers
    workers = min(workers, 61)  # more processes in a pool are an error on Windows
    bad_rows: list[BadRow] = []
    title = f"Computing the features of {len(missing)} recordings"
    with closing(_run_tasks(tasks, geometry, min(workers, len(tasks)))) as results:
        for found in track(results, title, len(tasks)):
            if found and recordings.on_bad_row == "raise":
                raise RowError(found[0])
            bad_rows += found
    return sorted(bad_rows, key=lambda bad_row: bad_row.line)


_Task = tuple[Recordings, list[Path]]


def _run_tasks(tasks: Sequence[_Task], geometry: EEGGeometry, workers: int) -> Generator[list[BadRow]]:
    """Yield each task's bad rows, in the order of the tasks."""
    compute = partial(_compute_task, geometry=geometry)
    if not workers:
        with threadpool_limits(1, user_api="blas"):
            yield from map(compute, tasks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield from pool.map(compute, tasks)
    except BrokenProcessPool as error:
        raise DataError(
            "A process that computes features ended. A script that calls HMSDataModule needs "
            "if __name__ == '__main__': around its work, or num_workers=0; else take fewer, as memory may be short."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # The products are small: threads would wait for each other.
    threadpool_limits(1, user_api="blas")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone: a parent that is killed ends no worker."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _compute_task(task: _Task, geometry: EEGGeometry) -> list[BadRow]:
    """Write the features of some rows, each to its file; return the rows that cannot be used."""
    recordings, files = task
    bad_rows = []
    for row, file in zip(recordings, files, strict=True):
        try:
            eeg, power = recordings.eeg(row, geometry), recordings.spectrogram(row)
        except RowError as error:
            bad_rows.append(error.bad_row)
            continue
        record: NDArray[Any] = np.zeros((), feature_type(geometry))
        record["eeg_x"], record["eeg_edge_attr"], filled_samples = eeg_features(eeg, geometry)
        record["spec_x"], filled_bins = spectrogram_features(power)
        record["filled"] = filled_samples, filled_bins
        with complete_or_absent(file) as part:
            part.write_bytes(record.tobytes())
    return bad_rows


def _count_cores() -> int:
    """Cores that this process may use, which on a shared machine are not all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
