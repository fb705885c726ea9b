"""Compute the features of a whole folder of recordings: in several processes, and in parts that are kept.

A task is a spectrogram with all rows that lie in it, so that each file is opened once. Some tasks are a part: when its
rows are on disk, a file says so, and a build that is interrupted goes on after the last such part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, Dataset

from lightning_xattn.core.files import complete_or_absent
from lightning_xattn.core.progress import track
from lightning_xattn.hms.features import eeg_features, feature_shapes, spectrogram_features
from lightning_xattn.hms.recordings import EEGGeometry, Recordings
from lightning_xattn.hms.table import BadRow, RowError

BAD_ROWS = "bad_rows.json"
_ROWS_IN_A_PART = 256

Features = dict[str, NDArray[Any]]


def build(
    folder: Path, stamps: Sequence[str], recordings: Recordings, geometry: EEGGeometry, num_workers: int | None = None
) -> None:
    """Fill ``folder`` with one ``.npy`` file for each of `feature_shapes`, and `BAD_ROWS`.

    Parameters
    ----------
    folder
        Is made where it does not exist. Parts that another build has left there are kept, if their rows' ``stamps``
        are the same.
    stamps
        For each row all that decides its features.
    recordings, geometry
        Of what.
    num_workers
        Processes that compute; 0: this one; None: one for each core that this process may use.

    Raises
    ------
    RowError
        If a recording cannot be used and ``recordings.on_bad_row`` is ``"raise"``.
    """
    shapes = feature_shapes(len(recordings), geometry)
    _begin(folder, shapes)
    tasks = _tasks(recordings)
    parts = [_Part(folder / f"part-{i:06d}.json", part, stamps, tasks) for i, part in enumerate(_parts(tasks))]
    left = [part for part in parts if part.bad_rows() is None]
    order = [task for part in left for task in part.tasks]
    for part in left:  # what another state of the files has left: its rows are about to be written over
        part.path.unlink(missing_ok=True)
    with ExitStack() as stack:
        files = {name: stack.enter_context(closing(_Rows(folder / f"{name}.npy"))) for name in shapes}
        results = stack.enter_context(closing(_compute(recordings, geometry, tasks, order, num_workers)))
        for part in track(left, f"Computing the features of {len(recordings)} recordings"):
            bad_rows = []
            for task in part.tasks:
                for position, result in zip(tasks[task], next(results), strict=True):
                    if isinstance(result, BadRow):
                        bad_rows.append(result)
                        if recordings.on_bad_row == "raise":
                            raise RowError(result)
                    else:
                        for name, values in result.items():
                            files[name].write(position, values)
            # The rows first, then the word that they are there, also if the power fails.
            for file in files.values():
                file.sync()
            part.finish(bad_rows)
    _finish(folder, parts)


def _begin(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Go on with the files that are there; if they are not what they should be, make all anew."""
    try:
        if {name: np.load(folder / f"{name}.npy", mmap_mode="r").shape for name in shapes} == shapes:
            return
    except (OSError, EOFError, ValueError):  # absent, or damaged in one of many ways
        pass
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.unlink(missing_ok=True)
    folder.mkdir()
    for name, shape in shapes.items():
        kind = np.int64 if name == "filled" else np.float32
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype=kind, shape=shape)


class _Part:
    """Some tasks, and the file that says that their rows are on disk."""

    def __init__(self, path: Path, tasks: list[int], stamps: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
        self.path, self.tasks = path, tasks
        digest = hashlib.sha256()
        for position in (position for task in tasks for position in rows[task]):
            digest.update(f"{position} {stamps[position]}\n".encode())
        self._key = digest.hexdigest()

    def bad_rows(self) -> list[BadRow] | None:
        """Those of its rows that cannot be used; None if it is not done, or was done with other files."""
        try:
            key, bad_rows = json.loads(self.path.read_text("utf-8"))
            return [BadRow(**fields) for fields in bad_rows] if key == self._key else None
        except (OSError, ValueError, TypeError):  # absent, or damaged in one of many ways
            return None

    def finish(self, bad_rows: Sequence[BadRow]) -> None:
        """Say that the part is done."""
        with complete_or_absent(self.path) as path:
            path.write_text(json.dumps([self._key, [asdict(bad_row) for bad_row in bad_rows]]), "utf-8")


def _finish(folder: Path, parts: Sequence[_Part]) -> None:
    """Put the bad rows of all parts into one file, in the order of ``train.csv``."""
    bad_rows = [bad_row for part in parts for bad_row in part.bad_rows() or ()]
    bad_rows.sort(key=lambda bad_row: bad_row.line)
    with complete_or_absent(folder / BAD_ROWS) as path:
        path.write_text(json.dumps([asdict(bad_row) for bad_row in bad_rows]), "utf-8")
    for marker in folder.glob("part-*.json"):
        marker.unlink()


class _Rows:
    """A ``.npy`` file whose rows are written in any order; not through a memory map, which a full disk would crash."""

    def __init__(self, path: Path) -> None:
        mapped = np.load(path, mmap_mode="r")
        self._start, self._size, self._dtype = mapped.offset, mapped[0].nbytes, mapped.dtype
        self._file = path.open("r+b")

    def write(self, position: int, values: NDArray[Any]) -> None:
        self._file.seek(self._start + position * self._size)
        self._file.write(np.asarray(values, self._dtype).tobytes())

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _tasks(recordings: Recordings) -> list[list[int]]:
    """Positions of the rows of each spectrogram, those of one EEG next to each other."""
    tasks: dict[int, list[int]] = {}
    for position, row in enumerate(recordings):
        tasks.setdefault(row.spectrogram_id, []).append(position)
    return [sorted(task, key=lambda position: recordings.rows[position].eeg_id) for task in tasks.values()]


def _parts(tasks: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Tasks that make up about `_ROWS_IN_A_PART` rows."""
    part: list[int] = []
    rows = 0
    for i, task in enumerate(tasks):
        part.append(i)
        rows += len(task)
        if rows >= _ROWS_IN_A_PART or i == len(tasks) - 1:
            yield part
            part, rows = [], 0


class _Tasks(Dataset[list[Features | BadRow]]):
    """What is computed for each row of each task: its features, or why there are none."""

    def __init__(self, recordings: Recordings, geometry: EEGGeometry, tasks: Sequence[Sequence[int]]) -> None:
        self._recordings, self._geometry, self._tasks = recordings, geometry, tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, task: int) -> list[Features | BadRow]:
        return [self._row(position) for position in self._tasks[task]]

    def _row(self, position: int) -> Features | BadRow:
        row = self._recordings.rows[position]
        try:
            eeg, power = self._recordings.eeg(row, self._geometry), self._recordings.spectrogram(row)
        except RowError as error:
            return error.bad_row
        eeg_x, eeg_edge_attr, filled = eeg_features(eeg, self._geometry)
        spec_x, filled_bins = spectrogram_features(power)
        counts = np.array([filled, filled_bins], dtype=np.int64)
        return {"eeg_x": eeg_x, "eeg_edge_attr": eeg_edge_attr, "spec_x": spec_x, "filled": counts}


def _compute(
    recordings: Recordings,
    geometry: EEGGeometry,
    tasks: Sequence[Sequence[int]],
    order: Sequence[int],
    num_workers: int | None,
) -> Generator[list[Features | BadRow]]:
    """Yield what `_Tasks` gives, in this order, from so many processes."""
    workers = min(_cores() if num_workers is None else num_workers, len(order))
    loader = DataLoader(
        _Tasks(recordings, geometry, tasks),
        batch_size=None,
        sampler=order,
        num_workers=workers,
        collate_fn=as_it_is,
        worker_init_fn=_begin_worker,
        # Its own, so that the state of the global one is the same whether features were computed or not.
        generator=torch.Generator(),
    )
    # The products are small: threads would wait for each other, and their number must not change a bit.
    with threadpool_limits(1, user_api="blas"):
        yield from loader


def _cores() -> int:
    """Cores that this process may use, which on a shared machine are not all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin_worker(worker: int) -> None:
    threadpool_limits(1, user_api="blas")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: killed, it can tell nobody, and the lock would stay with us."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def as_it_is(result: Any) -> Any:
    """Collate nothing: what is loaded is whole."""
    return result
