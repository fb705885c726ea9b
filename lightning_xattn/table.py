"""One row per sample, epoch and layer, as Parquet files that are complete or absent."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

TYPES_OF_MISSING = {
    "sample_id": pa.int64(),
    "target": pa.int64(),
    "prediction": pa.int64(),
    "confidence": pa.float32(),
    "correct": pa.bool_(),
}
"""The columns that a run may not have."""

ROWS_IN_MEMORY = 4096
"""So many rows are kept on the device before they are written: bounded memory, and a GPU seldom waits."""


class SampleTable:
    """Rows of one process and one evaluation, streamed into a Parquet file of its own.

    The file appears in the folder, under a name that no other has, when ``close`` is called; until then, and after a
    crash, there is only a hidden part that readers pass over. So a folder of such files is always a readable data set:
    ``pandas.read_parquet(folder)``, ``polars.read_parquet(f"{folder}/*.parquet")``, DuckDB's
    ``read_parquet('folder/*.parquet')``.

    Parameters
    ----------
    folder
        Is made when it does not exist.
    name
        What the file's name begins with.
    constants
        Columns that are the same in every row: numbers or strings.
    """

    def __init__(self, folder: Path, name: str, constants: Mapping[str, int | str]) -> None:
        self._path = folder / f"{name}-{uuid.uuid4().hex[:8]}.parquet"
        self._part = folder / f".{self._path.name}.part"
        self._constants = dict(constants)
        self._waiting: list[dict[str, Any]] = []
        self._writer: Any = None

    def add(self, columns: Mapping[str, Tensor | list[Any] | int | str | None]) -> None:
        """Add the rows of a batch.

        Parameters
        ----------
        columns
            By name: a tensor or a list of one value a sample, or a single number or string for all, or None for a
            column of ``TYPES_OF_MISSING``. Floats are stored as float32, NaN as missing.
        """
        self._waiting.append(dict(columns))
        if sum(_length(waiting) for waiting in self._waiting) >= ROWS_IN_MEMORY:
            self._write()

    def close(self) -> None:
        """Write what is waiting and let the file appear; a table without rows leaves no file."""
        self._write()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._part.replace(self._path)

    def discard(self) -> None:
        """Leave nothing behind, as after a crash."""
        self._waiting = []
        if self._writer is not None:
            with suppress(OSError):  # on a full disk closing fails too
                self._writer.close()
            self._writer = None
            self._part.unlink(missing_ok=True)

    def _write(self) -> None:
        for batch in self._waiting:
            rows = _length(batch)
            table = pa.table({name: _array(name, value, rows) for name, value in (self._constants | batch).items()})
            if self._writer is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._writer = pq.ParquetWriter(self._part, table.schema)
            self._writer.write_table(table)
        self._waiting = []


def _length(batch: Mapping[str, Any]) -> int:
    return max(len(value) for value in batch.values() if isinstance(value, (Tensor, list)))


def _array(name: str, value: Any, rows: int) -> pa.Array:
    """A column; what is undefined (NaN) is missing, so that a mean over it passes it over in every reader."""
    if isinstance(value, Tensor):
        value = value.float() if value.is_floating_point() else value
        return pa.array(value.cpu().numpy(), from_pandas=True)
    if value is None:
        # A column may be missing in one run and there in the next: its type must not depend on that.
        return pa.nulls(rows, TYPES_OF_MISSING[name])
    return pa.array(value if isinstance(value, list) else [value] * rows)
