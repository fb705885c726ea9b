"""One row per sample, epoch and layer, as Parquet files that are complete or absent."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from lightning_xattn.core.distributed import NUMBER
from lightning_xattn.core.files import complete_or_absent, hidden_part, remove_dead_parts
from lightning_xattn.core.names import id_text, valid
from lightning_xattn.core.notices import warn
from lightning_xattn.functional.outcomes import CORRECT, UNKNOWN

Value = TypeVar("Value")

LateColumns = tuple[Tensor, Mapping[str, Tensor]]
"""What is known of samples only when an evaluation has ended: their numbers, and by name a value of each."""

TYPES = {
    "layer": pa.string(),
    "sample_id": pa.string(),
    "group": pa.string(),
    "target": pa.int64(),
    "prediction": pa.int64(),
    "confidence": pa.float32(),
    "correct": pa.bool_(),
}
"""The columns that a run may lack or fill otherwise than the next: their types must not depend on that."""

ROWS_IN_MEMORY = 4096
"""So many rows are kept on the device before they are written: bounded memory, and a GPU seldom waits."""


class SampleTable:
    """Rows of one process and one evaluation, streamed into a Parquet file of its own.

    The file appears in the folder, under a name that no other has, when ``close`` is called; until then, and after a
    crash, there is only a hidden part that readers pass over. The next table in the folder removes parts of processes
    that have ended. So a folder of such files is always a readable data set:
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
        self._constants = dict(constants)
        self._waiting: list[dict[str, Any]] = []
        self._writers: dict[tuple[str, ...], tuple[pq.ParquetWriter, Path]] = {}
        self._folder, self._name = folder, name

    def add(self, columns: Mapping[str, Tensor | list[Any] | int | str | None]) -> None:
        """Add the rows of a batch.

        Parameters
        ----------
        columns
            By name: a tensor or a list of one value a sample, or a single number or string for all, or None for a
            column of ``TYPES``. Floats are stored as float32, NaN as missing; negative targets and predictions and
            unknown outcomes (``correct``) as missing; sample ids and groups as strings; a ``(batch, heads)`` tensor as
            lists.
        """
        if _count_rows_of(columns) == 0:  # such as a batch of repeats alone, which shows no types
            return
        self._waiting.append(dict(columns))
        if sum(_count_rows_of(waiting) for waiting in self._waiting) >= ROWS_IN_MEMORY:
            self._write()

    def close(self, late: Mapping[int | None, LateColumns] | None = None) -> list[Path]:
        """Write what is waiting and let the file appear; a table without rows leaves no file.

        Parameters
        ----------
        late
            By dataloader, what is added to the rows.

        Returns
        -------
        list of Path
            The files: one for each set of columns.
        """
        self._write()
        for writer, path in self._writers.values():
            writer.close()
            if late:
                with complete_or_absent(hidden_part(path)) as more:
                    add_columns(hidden_part(path), more, late)
        # Only now, so that a file of some layers is not there without that of the others.
        paths = [path for _, path in self._writers.values()]
        for path in paths:
            hidden_part(path).replace(path)
        self._writers = {}
        return paths

    def discard(self) -> None:
        """Leave nothing behind, as after a crash."""
        self._waiting = []
        for writer, path in self._writers.values():
            with suppress(OSError):  # on a full disk closing fails too
                writer.close()
            hidden_part(path).unlink(missing_ok=True)
        self._writers = {}

    def _write(self) -> None:
        by_columns: dict[tuple[str, ...], list[pa.Table]] = defaultdict(list)
        for batch in self._waiting:
            columns = self._constants | batch
            rows = _count_rows_of(batch)
            table = pa.table({valid(name): _array(name, value, rows) for name, value in columns.items()})
            by_columns[tuple(columns)].append(table)
        self._waiting = []
        for names, tables in by_columns.items():
            whole = pa.concat_tables(tables)
            # Layers between other modalities have other columns, and so a file of their own.
            if names not in self._writers:
                self._folder.mkdir(parents=True, exist_ok=True)
                remove_dead_parts(self._folder)
                path = self._folder / f"{self._name}-{uuid.uuid4().hex[:8]}.parquet"
                self._writers[names] = _writer_of(hidden_part(path), whole.schema), path
            self._writers[names][0].write_table(whole)


class TrainingTable(SampleTable):
    """A table that no training run ends of: where it fails it warns, and leaves nothing behind."""

    _failed = False

    def add(self, columns: Mapping[str, Tensor | list[Any] | int | str | None]) -> None:
        """As of ``SampleTable``."""
        self._attempt(partial(super().add, columns))

    def close(self, late: Mapping[int | None, LateColumns] | None = None) -> list[Path]:
        """As of ``SampleTable``; no files where it failed."""
        return self._attempt(partial(super().close, late)) or []

    def _attempt(self, write: Callable[[], Value]) -> Value | None:
        try:
            return None if self._failed else write()
        except Exception as error:  # a full disk, a folder that is a file
            warn([f"The sample table in {self._folder} lacks this evaluation: {error!r}."])
            self.discard()
            self._failed = True
            return None


def add_columns(source: Path, target: Path, late: Mapping[int | None, LateColumns]) -> None:
    """Copy a file of rows with further columns, or others in the place of those of these names.

    Parameters
    ----------
    source, target
        The file, and where the copy goes.
    late
        By dataloader, or of None where the file has no such column.
    """
    places = {key: {number: i for i, number in enumerate(numbers.tolist())} for key, (numbers, _) in late.items()}
    values = {key: {valid(name): _late(one) for name, one in columns.items()} for key, (_, columns) in late.items()}
    types = {
        valid(name): pa.float32() if one.is_floating_point() else pa.int64()
        for _, columns in late.values()
        for name, one in columns.items()
    }
    with ExitStack() as files:
        rows, writer = files.enter_context(pq.ParquetFile(source)), None
        for group in range(rows.num_row_groups):
            table = rows.read_row_group(group)
            keys = table["dataloader"].to_pylist() if "dataloader" in table.column_names else [None] * len(table)
            at = [
                (key, places.get(key, {}).get(number))
                for key, number in zip(keys, table[NUMBER].to_pylist(), strict=True)
            ]
            table = table.drop_columns([name for name in types if name in table.column_names])
            for name, kind in types.items():
                column = [None if place is None else values[key][name][place] for key, place in at]
                table = table.append_column(name, pa.array(column, kind))
            writer = writer or files.enter_context(pq.ParquetWriter(target, table.schema))
            writer.write_table(table)


def _late(values: Tensor) -> list[Any]:
    """Undefined numbers, and class ids below 0, as missing."""
    return [None if value != value or (isinstance(value, int) and value < 0) else value for value in values.tolist()]


def read_rows(folder: Path, layer: str | None, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a layer by column, in the order of the samples; what is undefined is None.

    Parameters
    ----------
    folder
        The table's.
    layer
        Which one; None: of a model without cross-attention.
    columns
        Those that are wanted; None: all.
    """
    wanted = None if columns is None else [*columns, NUMBER, "layer"]
    rows, layer = [], None if layer is None else valid(layer)
    for path in sorted(folder.glob("*.parquet")):
        there = None if wanted is None else [name for name in wanted if name in pq.read_schema(path).names]
        rows += [row for row in pq.read_table(path, columns=there).to_pylist() if row["layer"] == layer]
    yield from sorted(rows, key=lambda row: row[NUMBER])


def count_rows(path: Path) -> int | None:
    """How many rows a file has; None if it is absent or damaged."""
    try:
        rows: int = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowInvalid):
        return None
    return rows


def _writer_of(part: Path, schema: pa.Schema) -> pq.ParquetWriter:
    try:
        return pq.ParquetWriter(part, schema)
    except BaseException:  # on a full disk an empty file is there already
        part.unlink(missing_ok=True)
        raise


def _count_rows_of(batch: Mapping[str, Any]) -> int:
    return max(len(value) for value in batch.values() if isinstance(value, (Tensor, list)))


def _array(name: str, value: Any, rows: int) -> pa.Array:
    """A column; what is undefined (NaN) or not known is missing, so that a mean passes it over in every reader."""
    if value is None:
        return pa.nulls(rows, TYPES[name])
    if isinstance(value, Tensor):
        value = (value.float() if value.is_floating_point() else value).cpu().numpy()
    if name in ("sample_id", "group"):
        return pa.array([*map(id_text, value)], TYPES[name])
    if name == "correct":
        return pa.array(value == CORRECT, TYPES[name], mask=value == UNKNOWN)
    if name in ("target", "prediction"):
        return pa.array(value, TYPES[name], mask=value < 0)
    if isinstance(value, np.ndarray):
        return pa.array(list(value) if value.ndim == 2 else value, from_pandas=True)
    return pa.array([valid(value) if isinstance(value, str) else value] * rows)
