"""The table of labelled samples, ``train.csv``: its rows, and what can be wrong with one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from lightning_xattn.core.errors import DataError
from lightning_xattn.hms.montage import VOTE_COLUMNS

_REQUIRED: dict[str, type[int] | type[float]] = {
    **dict.fromkeys(("eeg_id", "spectrogram_id", "label_id", "patient_id"), int),
    **dict.fromkeys(("eeg_label_offset_seconds", "spectrogram_label_offset_seconds", *VOTE_COLUMNS), float),
}
"""The columns that are needed and what they hold, in the order of `Recording`."""


@dataclass(frozen=True)
class Recording:
    """One row of ``train.csv``."""

    line: int
    """Where the header is line 1."""
    eeg_id: int
    spectrogram_id: int
    label_id: int
    """Unique in a folder."""
    patient_id: int
    eeg_offset: float
    """Seconds from the start of the file to the start of the labelled window."""
    spectrogram_offset: float
    votes: tuple[float, ...]
    """The experts' votes for each of ``montage.CLASSES``; empty where they were not read."""
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The row's other columns by name, e.g. ``expert_consensus``."""

    @property
    def soft_label(self) -> NDArray[np.float32]:
        """The votes as shares, ``(6,)``, sum 1; NaN without votes."""
        if not self.votes:
            return np.full(len(VOTE_COLUMNS), np.nan, np.float32)
        return (np.asarray(self.votes) / sum(self.votes)).astype(np.float32)

    @property
    def consensus(self) -> int:
        """Index of the class with the most votes; of the first one, where it is tied."""
        return self.votes.index(max(self.votes))


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    line: int
    label_id: str
    """As written in ``train.csv``."""
    file: str
    """The file that is at fault."""
    reason: str
    """The fault in two or three words, the same for all rows with this fault."""
    detail: str
    """What was expected and what came."""

    def __str__(self) -> str:
        return (
            f"{self.file}: {self.reason}: {self.detail} (train.csv line {self.line}, label_id {self.label_id}"
            "). Fix or remove it, or pass on_bad_row='skip' to leave such rows out."
        )


class RowError(DataError):
    """A `DataError` about one row; its only argument is the `BadRow`."""

    @property
    def bad_row(self) -> BadRow:
        """The row, and what is wrong with it."""
        bad_row: BadRow = self.args[0]
        return bad_row


class Problem(DataError):  # noqa: N818 - becomes a BadRow where the row is known
    """Reason and detail of a `BadRow`, raised where file and row are not known."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}.")
        self.reason, self.detail = reason, detail


def read_table(path: Path, labelled: bool = True) -> tuple[list[Recording], list[BadRow]]:
    """Read ``train.csv``: the usable rows and the others, each in the file's order; ``labelled``: with their votes.

    Raises
    ------
    DataError
        If the file or a needed column is missing, or it is no table.
    """
    required = {name: kind for name, kind in _REQUIRED.items() if labelled or name not in VOTE_COLUMNS}
    table = _read_text(path, list(required))
    columns = [[_parse(cell, kind) for cell in table[name].to_pylist()] for name, kind in required.items()]
    extra_columns = [i for i, name in enumerate(table.column_names) if name not in _REQUIRED]
    extras = table.select(extra_columns).to_pylist() if extra_columns else [{}] * len(table)
    rows: dict[int, Recording] = {}
    bad_rows: list[BadRow] = []
    for i, (cells, extra) in enumerate(zip(zip(*columns, strict=True), extras, strict=True)):
        try:
            if None in cells:
                name = list(required)[cells.index(None)]
                expected, got = _REQUIRED[name].__name__, table[name][i].as_py()
                raise Problem("not a number", f"{name} must be a finite {expected}, got {got!r}")
            row = _as_recording(i + 2, cells, extra)
            if row.label_id in rows:
                raise Problem("repeated label_id", f"also on line {rows[row.label_id].line}, expected once")
            rows[row.label_id] = row
        except Problem as problem:
            label_id = table["label_id"][i].as_py()
            bad_rows.append(BadRow(i + 2, label_id, str(path), problem.reason, problem.detail))
    return list(rows.values()), bad_rows


def _read_text(path: Path, required: Sequence[str]) -> pa.Table:
    """Read the table with the needed columns as text, so that a bad cell costs its row and not its whole column."""
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: expected a folder with train.csv, train_eegs/ and train_spectrograms/."
        )
    try:
        options = pa_csv.ConvertOptions(column_types=dict.fromkeys(required, pa.string()))
        table = pa_csv.read_csv(path, convert_options=options)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a comma-separated table with a header: {error}") from error
    repeated = [name for name in required if table.column_names.count(name) > 1]
    if repeated:
        raise DataError(f"{path}: the column {repeated[0]} occurs more than once, expected once.")
    missing = [name for name in required if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path}: missing column(s) {', '.join(missing)}; it has {', '.join(table.column_names)}. "
            "Expected the columns of the competition's train.csv."
        )
    return table


def _parse(cell: str, kind: type[int] | type[float]) -> float | None:
    """Return the number in a cell of text, None where it is no finite one."""
    try:
        exact = Decimal(cell)
    except InvalidOperation:
        return None
    if "_" in cell or not exact.is_finite():  # Python reads 1_0 as 10
        return None
    if kind is float:
        return float(exact) if math.isfinite(float(exact)) else None
    # An id that went through a column of floats has a decimal point; one beyond 2**53 would be another one then.
    limit = 2**63 if exact.as_tuple().exponent == 0 else 2**53
    return int(exact) if abs(exact) < limit and exact == exact.to_integral_value() else None


def _as_recording(line: int, cells: Sequence[Any], extra: Mapping[str, Any]) -> Recording:
    eeg_id, spectrogram_id, label_id, patient_id, eeg_offset, spectrogram_offset, *votes = cells
    if votes and min(votes) < 0:
        raise Problem("negative votes", f"expected counts, got {dict(zip(VOTE_COLUMNS, votes, strict=True))}")
    if votes and sum(votes) == 0:
        raise Problem("no votes", f"{', '.join(VOTE_COLUMNS)} are all 0, so there is no label")
    return Recording(
        line, eeg_id, spectrogram_id, label_id, patient_id, eeg_offset, spectrogram_offset, tuple(votes), extra
    )
