"""The table of labelled samples, ``train.csv``: what a row says, and what can be wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from lightning_xattn.errors import DataError
from lightning_xattn.hms.montage import VOTE_COLUMNS

_ID_COLUMNS = ("eeg_id", "spectrogram_id", "label_id", "patient_id")
_OFFSET_COLUMNS = ("eeg_label_offset_seconds", "spectrogram_label_offset_seconds")
_REQUIRED = _ID_COLUMNS + _OFFSET_COLUMNS + VOTE_COLUMNS


@dataclass(frozen=True)
class Recording:
    """One row of ``train.csv``.

    Parameters
    ----------
    line
        Line of ``train.csv``, where the header is line 1.
    eeg_id, spectrogram_id, label_id, patient_id
        Identifiers; ``label_id`` is unique in a folder.
    eeg_offset, spectrogram_offset
        Seconds from the start of the file to the start of the labelled window.
    votes
        The experts' votes for each of ``montage.CLASSES``.
    extra
        The row's other columns by name, e.g. ``expert_consensus``.
    """

    line: int
    eeg_id: int
    spectrogram_id: int
    label_id: int
    patient_id: int
    eeg_offset: float
    spectrogram_offset: float
    votes: tuple[float, ...]
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def soft_label(self) -> NDArray[np.float32]:
        """The votes as shares, ``(6,)``, sum 1."""
        return (np.asarray(self.votes) / sum(self.votes)).astype(np.float32)

    @property
    def consensus(self) -> int:
        """Index of the class with the most votes; of the first one, where it is tied."""
        return self.votes.index(max(self.votes))

    @property
    def tied(self) -> bool:
        """Whether the most votes went to more than one class."""
        return self.votes.count(max(self.votes)) > 1


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Parameters
    ----------
    line, label_id
        Where it stands in ``train.csv``; ``label_id`` as written there.
    file
        The file that is at fault.
    reason
        What is wrong in two or three words, the same for all rows with this fault.
    detail
        What was expected and what came.
    """

    line: int
    label_id: str
    file: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return (
            f"{self.file}: {self.reason}: {self.detail} (train.csv line {self.line}, label_id {self.label_id}"
            "). Mend or remove it, or pass on_bad_row='skip' to leave such rows out."
        )


class RowError(DataError):
    """A `DataError` about one row; its only argument is the `BadRow`."""

    @property
    def bad_row(self) -> BadRow:
        """The row, and what is wrong with it."""
        bad_row: BadRow = self.args[0]
        return bad_row


class Problem(Exception):  # noqa: N818 - always caught, and told as a BadRow
    """Reason and detail of a `BadRow`, raised where file and row are not known."""


def read_table(path: Path) -> tuple[list[Recording], list[BadRow]]:
    """Read ``train.csv``.

    Returns
    -------
    The usable rows and the others, each in the file's order.

    Raises
    ------
    DataError
        If the file or a needed column is missing or it is no table.
    """
    rows: dict[int, Recording] = {}
    bad_rows: list[BadRow] = []
    for line, cells, extra in _read_cells(path):
        try:
            row = _parse_row(line, cells, extra)
            if row.label_id in rows:
                raise Problem("repeated label_id", f"also on line {rows[row.label_id].line}, expected once")
            rows[row.label_id] = row
        except Problem as problem:
            bad_rows.append(BadRow(line, cells["label_id"], str(path), *problem.args))
    return list(rows.values()), bad_rows


def _read_cells(path: Path) -> Iterator[tuple[int, dict[str, str], dict[str, Any]]]:
    """Yield line, needed columns as written and other columns as typed by pyarrow."""
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: expected a folder with train.csv, train_eegs/ and train_spectrograms/."
        )
    try:
        # The needed columns come as text, so that a bad cell is one bad row and not a column of another type.
        options = pa_csv.ConvertOptions(column_types=dict.fromkeys(_REQUIRED, pa.string()))
        table = pa_csv.read_csv(path, convert_options=options)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a comma-separated table with a header: {error}") from error
    missing = [name for name in _REQUIRED if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path}: missing column(s) {', '.join(missing)}; it has {', '.join(table.column_names)}. "
            "Expected the columns of the competition's train.csv."
        )
    extra_names = [name for name in table.column_names if name not in _REQUIRED]
    columns = [table[name].to_pylist() for name in (*_REQUIRED, *extra_names)]
    for line, cells in enumerate(zip(*columns, strict=True), start=2):
        needed = dict(zip(_REQUIRED, cells[: len(_REQUIRED)], strict=True))
        yield line, needed, dict(zip(extra_names, cells[len(_REQUIRED) :], strict=True))


def _parse_row(line: int, cells: Mapping[str, str], extra: Mapping[str, Any]) -> Recording:
    eeg_id, spectrogram_id, label_id, patient_id = (int(_number(cells, name, int)) for name in _ID_COLUMNS)
    eeg_offset, spec_offset = (_number(cells, name, float) for name in _OFFSET_COLUMNS)
    votes = tuple(_number(cells, name, float) for name in VOTE_COLUMNS)
    if min(votes) < 0:
        raise Problem("negative votes", f"expected counts, got {dict(zip(VOTE_COLUMNS, votes, strict=True))}")
    if sum(votes) == 0:
        raise Problem("no votes", f"{', '.join(VOTE_COLUMNS)} are all 0, so there is no label")
    return Recording(line, eeg_id, spectrogram_id, label_id, patient_id, eeg_offset, spec_offset, votes, extra)


def _number(cells: Mapping[str, str], name: str, kind: type[int] | type[float]) -> float:
    try:
        value = kind(cells[name])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise Problem("not a number", f"{name} must be a finite {kind.__name__}, got {cells[name]!r}")
    return value
