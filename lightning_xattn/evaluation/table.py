"""The sample table: Parquet files that are complete or absent.

``<folder>/attention/`` has one row per sample and layer, with labels and statistics, streamed batch by batch.
``<folder>/samples/`` has one row per probed sample, with what is known only when an evaluation ends.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from lightning_xattn.core.distributed import NUMBER
from lightning_xattn.core.files import hidden_part, remove_dead_parts
from lightning_xattn.core.ids import id_text
from lightning_xattn.core.names import valid
from lightning_xattn.core.notices import warn
from lightning_xattn.functional.outcomes import CORRECT, UNKNOWN

Value = TypeVar("Value")

Columns = Mapping[str, Any]
"""By name: a tensor or a list with one value per sample, or one number or string for all samples, or None for a column
of ``TYPES`` that is not known."""

TYPES = {
    "layer": pa.string(),
    "sample_id": pa.string(),
    "group": pa.string(),
    "target": pa.int64(),
    "prediction": pa.int64(),
    "confidence": pa.float32(),
    "correct": pa.bool_(),
}
"""The types of columns that one run has and another lacks."""

ROWS_IN_MEMORY = 4096
"""This many rows wait on their device before they are written: bounded memory, and a GPU seldom waits."""


class SampleTable:
    """Rows of one process and one evaluation, streamed into one Parquet file per layer.

    The files appear under names of their own when ``close`` is called. Until then, and after a crash, there are only
    hidden parts, which readers ignore. The next table in the folder removes parts of processes that have ended.

    Parameters
    ----------
    folder
        The table's folder; made when it does not exist.
    name
        What the files' names begin with.
    constants
        Columns that are the same in every row: numbers or strings.
    """

    def __init__(self, folder: Path, name: str, constants: Mapping[str, int | str]) -> None:
        self._folder, self._name, self._constants = folder, name, dict(constants)
        self._waiting: list[Columns] = []
        self._writers: dict[str, tuple[pq.ParquetWriter, Path]] = {}

    def add(self, columns: Columns) -> None:
        """Add the rows of a batch in one layer.

        Parameters
        ----------
        columns
            Among them "layer". Floats are stored as float32, NaN as missing; negative whole numbers, such as the class
            of an unlabelled sample, and unknown outcomes ("correct") as missing; sample ids and groups as strings; a
            ``(batch, heads)`` tensor as lists.
        """
        if _count_rows(columns) == 0:  # such as a batch of repeats alone, whose types are not known
            return
        self._waiting.append(columns)
        if sum(map(_count_rows, self._waiting)) >= ROWS_IN_MEMORY:
            self._write_waiting()

    def close(self, samples: Iterable[Columns] = ()) -> dict[str, Path]:
        """Write the rows that wait, and let the files appear.

        Parameters
        ----------
        samples
            What is known of samples only now: columns as ``add`` takes them, for a file of their own.

        Returns
        -------
        dict of str to Path
            The files: "samples", and "attention/<layer>" or "attention"; a file without rows is not there.
        """
        self._write_waiting()
        for columns in samples:
            self._write("samples", self._arrow_table(columns))
        for writer, _ in self._writers.values():
            writer.close()
        paths = {what: path for what, (_, path) in self._writers.items()}
        for path in paths.values():  # only now, so that no file is there without the others
            hidden_part(path).replace(path)
        self._writers = {}
        return paths

    def discard(self) -> None:
        """Remove what is not complete, as after a crash."""
        self._waiting = []
        for writer, path in self._writers.values():
            with suppress(OSError):  # on a full disk closing fails too
                writer.close()
            for one in (hidden_part(path), path):  # the file itself, where the next one could not appear
                with suppress(OSError):
                    one.unlink(missing_ok=True)
        self._writers = {}

    def _write_waiting(self) -> None:
        by_layer: dict[Any, list[pa.Table]] = defaultdict(list)
        for columns in self._waiting:
            by_layer[columns["layer"]].append(self._arrow_table(columns))
        self._waiting = []
        for layer, tables in by_layer.items():
            self._write("attention" if layer is None else f"attention/{layer}", pa.concat_tables(tables))

    def _arrow_table(self, columns: Columns) -> pa.Table:
        rows = _count_rows(columns)
        return pa.table(
            {valid(name): _array(name, one, rows) for name, one in (self._constants | dict(columns)).items()}
        )

    def _write(self, what: str, table: pa.Table) -> None:
        if what not in self._writers:
            folder = self._folder / what.partition("/")[0]
            folder.mkdir(parents=True, exist_ok=True)
            remove_dead_parts(folder)
            path = folder / f"{self._name}-{uuid.uuid4().hex[:8]}.parquet"
            self._writers[what] = _open_part(path, table.schema), path
        self._writers[what][0].write_table(table)


class TrainingTable(SampleTable):
    """A table that never ends a training run: where it fails it warns, and leaves nothing behind."""

    _failed = False

    def add(self, columns: Columns) -> None:
        """As ``SampleTable.add``."""
        self._attempt(partial(super().add, columns))

    def close(self, samples: Iterable[Columns] = ()) -> dict[str, Path]:
        """As ``SampleTable.close``; no files where something failed."""
        return self._attempt(partial(super().close, samples)) or {}

    def _attempt(self, write: Callable[[], Value]) -> Value | None:
        try:
            return None if self._failed else write()
        except Exception as error:  # a full disk, a folder that is a file
            warn([f"The sample table in {self._folder} lacks this evaluation: {error!r}."])
            self.discard()
            self._failed = True
            return None


def read_rows(folder: Path, layer: str | None, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """A layer's rows in the order of the samples, each by column; what is undefined is None.

    Parameters
    ----------
    folder
        The table's folder, as of the explainer: of one process.
    layer
        Its name; None: of a model without cross-attention.
    columns
        Those that are wanted; None: all.
    """
    wanted = None if columns is None else [*columns, NUMBER, "layer"]
    rows, layer = [], None if layer is None else valid(layer)
    for path in sorted((folder / "attention").glob("*.parquet")):
        present = None if wanted is None else [name for name in wanted if name in pq.read_schema(path).names]
        rows += [row for row in pq.read_table(path, columns=present).to_pylist() if row["layer"] == layer]
    yield from sorted(rows, key=lambda row: row[NUMBER])


def read_columns(folder: Path) -> dict[str, list[Any]]:
    """All columns of an explained data set with one layer, those of the samples among them; missing is None."""
    rows: dict[str, list[Any]] = pq.read_table(folder / "attention").to_pydict()
    samples: dict[str, list[Any]] = pq.read_table(folder / "samples").to_pydict()
    place = {number: i for i, number in enumerate(samples[NUMBER])}
    places = [place.get(number) for number in rows[NUMBER]]
    of_rows: dict[str, list[Any]] = rows
    return {name: [None if i is None else one[i] for i in places] for name, one in samples.items()} | of_rows


def _open_part(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    part = hidden_part(path)
    try:
        return pq.ParquetWriter(part, schema)
    except BaseException:  # on a full disk an empty file is there already
        part.unlink(missing_ok=True)
        raise


def _count_rows(columns: Columns) -> int:
    return max(len(values) for values in columns.values() if isinstance(values, (Tensor, list)))


def _array(name: str, values: Any, rows: int) -> pa.Array:
    """A column; what is undefined is missing, so that every reader's mean leaves it out."""
    if values is None:
        return pa.nulls(rows, TYPES[name])
    if isinstance(values, (str, int)):
        return pa.array([valid(values) if isinstance(values, str) else values] * rows)
    if isinstance(values, Tensor):
        values = (values.float() if values.is_floating_point() else values).cpu().numpy()
    if name in ("sample_id", "group"):
        return pa.array([*map(id_text, values)], TYPES[name])
    if name == "correct":
        return pa.array(values == CORRECT, TYPES[name], mask=values == UNKNOWN)
    if values.ndim == 2:  # lists with a value of each head
        return pa.array([*values], from_pandas=True)
    return pa.array(values, mask=None if values.dtype.kind == "f" else values < 0, from_pandas=True)
