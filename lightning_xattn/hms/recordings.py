"""Read recordings in the layout of the competition "HMS - Harmful Brain Activity Classification".

A folder holds ``train.csv`` (one row a labelled sample), ``train_eegs/<eeg_id>.parquet`` and
``train_spectrograms/<spectrogram_id>.parquet``. The table is checked at once, a recording when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lightning_xattn.core.errors import DataError, SettingError
from lightning_xattn.hms.columns import find_eeg, find_spectrogram
from lightning_xattn.hms.missing import require_eeg, require_spectrogram
from lightning_xattn.hms.montage import EEG_RATE, REGIONS, SPEC_FREQUENCIES, SPEC_ROW_SECONDS, SPEC_SECONDS
from lightning_xattn.hms.table import BadRow, Problem, Recording, RowError, read_table

OnBadRow = Literal["raise", "skip"]

_LABEL_SECONDS = 50.0  # the competition's offsets point to the start of 50 s around the labelled moment


@dataclass(frozen=True)
class EEGGeometry:
    """Which stretch of EEG around the labelled moment is used, and how it is cut into windows.

    Parameters
    ----------
    seconds
        Length of the stretch, at most 50 (what the competition labels).
    window_seconds, step_seconds
        Length of a window, and from one window's start to the next one's; whole steps fill the stretch.

    Raises
    ------
    SettingError
        If the three do not fit each other or do not fall on samples (1/200 s).

    Examples
    --------
    >>> geometry = EEGGeometry(seconds=50, window_seconds=10, step_seconds=5)
    >>> geometry.n_windows, geometry.spans[0]
    (9, (-25.0, -15.0))
    """

    seconds: float
    window_seconds: float
    step_seconds: float

    def __post_init__(self) -> None:
        values = self.seconds, self.window_seconds, self.step_seconds
        positive = min(values) > 0
        whole = [(self.seconds - self.window_seconds) / self.step_seconds] if positive else []
        whole += [value * EEG_RATE for value in values]
        fits = self.window_seconds <= self.seconds <= _LABEL_SECONDS
        if not (positive and fits and all(float(value).is_integer() for value in whole)):
            raise SettingError(
                "EEGGeometry needs window_seconds <= seconds <= 50, step_seconds > 0 and seconds = window_seconds + a "
                f"whole number of step_seconds, all multiples of 1/{EEG_RATE} s, e.g. EEGGeometry(50, 10, 5); "
                f"got {values}."
            )

    @property
    def n_windows(self) -> int:
        """Number of windows that fill the stretch."""
        return round((self.seconds - self.window_seconds) / self.step_seconds) + 1

    @property
    def spans(self) -> tuple[tuple[float, float], ...]:
        """``(start, stop)`` of each window in seconds from the labelled moment, the middle of the stretch."""
        starts = [i * self.step_seconds - self.seconds / 2 for i in range(self.n_windows)]
        return tuple((start, start + self.window_seconds) for start in starts)


COMPETITION = EEGGeometry(50, 10, 5)
"""Competition recordings, 50 s and longer: 9 windows of 10 s each 5 s."""

IIIC = EEGGeometry(10, 2, 1)
"""Recordings of 10 s such as ``iiic_irr``: 9 windows of 2 s each 1 s."""


@dataclass(frozen=True)
class Recordings:
    """The usable rows of a folder in the order of ``train.csv``, and access to their recordings.

    ``skipped`` holds the rows that were left out, with the reasons; ``on_bad_row`` as for `read`.

    Examples
    --------
    >>> recordings = Recordings.read(simulate("recordings", n_samples=6, eeg_seconds=10))
    >>> len(recordings.rows), recordings.infer_geometry()
    (6, EEGGeometry(seconds=10, window_seconds=2, step_seconds=1))
    """

    root: Path
    rows: tuple[Recording, ...]
    skipped: tuple[BadRow, ...] = ()
    on_bad_row: OnBadRow = "raise"

    def __repr__(self) -> str:
        patients = len({row.patient_id for row in self.rows})
        skipped = f", {len(self.skipped)} left out" if self.skipped else ""
        return f"Recordings('{self.root}': {len(self.rows)} rows of {patients} patients{skipped})"

    @classmethod
    def read(cls, root: str | Path, on_bad_row: OnBadRow = "raise", labelled: bool = True) -> Recordings:
        """Read and check ``train.csv``; recordings are checked when they are opened.

        Parameters
        ----------
        root
            A folder in the competition's layout.
        on_bad_row
            ``"raise"``: a row that cannot be used is an error. ``"skip"``: it is left out and kept in ``skipped``.
        labelled
            Whether rows need votes. False: votes are not read, and the table needs no columns of them.

        Raises
        ------
        DataError
            If the folder, the table or a needed column is missing, no row is usable, or (``"raise"``) not all.
        SettingError
            If ``on_bad_row`` is neither of the two.
        """
        if on_bad_row not in ("raise", "skip"):
            raise SettingError(f"on_bad_row must be 'raise' or 'skip'; got {on_bad_row!r}.")
        root = Path(root)
        path = root / "train.csv"
        rows, skipped = read_table(path, labelled)
        if on_bad_row == "raise" and skipped:
            raise RowError(skipped[0])
        if not rows:
            reason = f" All {len(skipped)} rows were left out, the first one: {skipped[0]}" if skipped else ""
            raise DataError(f"{path} has no usable row.{reason}")
        return cls(root, tuple(rows), tuple(skipped), on_bad_row)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Recording]:
        return iter(self.rows)

    @cached_property
    def by_label_id(self) -> Mapping[int, Recording]:
        """The rows by ``label_id``."""
        return {row.label_id: row for row in self.rows}

    def without(self, bad_rows: Sequence[BadRow]) -> Recordings:
        """Return the same folder with ``bad_rows`` moved to ``skipped``."""
        lines = {bad_row.line for bad_row in bad_rows}
        rows = tuple(row for row in self.rows if row.line not in lines)
        return replace(self, rows=rows, skipped=(*self.skipped, *bad_rows))

    def eeg_path(self, row: Recording) -> Path:
        """Return the path of the row's EEG."""
        return self.root / "train_eegs" / f"{row.eeg_id}.parquet"

    def spectrogram_path(self, row: Recording) -> Path:
        """Return the path of the row's spectrogram."""
        return self.root / "train_spectrograms" / f"{row.spectrogram_id}.parquet"

    def eeg(self, row: Recording, geometry: EEGGeometry) -> NDArray[np.float32]:
        """Read the EEG around the row's labelled moment: ``(samples, 19)`` microvolts, electrodes as in the montage.

        In a file of 50 s and more the offset points, as in the competition, to 50 s with the labelled moment in the
        middle, and the middle ``geometry.seconds`` are read. In a shorter file it points to these seconds themselves.

        Raises
        ------
        RowError
            If the file or a column is missing or not numeric, the window runs past the recording, or too much of it is
            missing, see `hms.missing`.
        """
        path = self.eeg_path(row)
        try:
            values = _read_parquet(path, *_stamp(path), find_eeg)
            seconds = len(values) / EEG_RATE
            margin = (_LABEL_SECONDS - geometry.seconds) / 2 if seconds >= _LABEL_SECONDS else 0.0
            start = round((row.eeg_offset + margin) * EEG_RATE)
            stop = start + round(geometry.seconds * EEG_RATE)
            if start < 0 or stop > len(values):
                raise Problem(
                    "offset past the recording",
                    f"eeg_label_offset_seconds {row.eeg_offset:g} needs {start / EEG_RATE:g} to "
                    f"{stop / EEG_RATE:g} s, the recording has {seconds:g} s",
                )
            require_eeg(values[start:stop])
            return values[start:stop]
        except Problem as problem:
            raise RowError(self._bad_row(row, path, problem)) from None

    def spectrogram(self, row: Recording) -> NDArray[np.float32]:
        """Read the 600 s of spectrogram that start at the row's offset: power ``(300, 4, 100)``, a row each 2 s.

        Regions and frequencies are those of ``montage.REGIONS`` and ``montage.SPEC_FREQUENCIES``. Raises as `eeg` does.
        """
        path = self.spectrogram_path(row)
        try:
            values = _read_parquet(path, *_stamp(path), find_spectrogram)
            time, power = values[:, 0], values[:, 1:]
            if not len(time):
                raise Problem("offset past the recording", "the recording has no rows")
            if (np.diff(time) != SPEC_ROW_SECONDS).any() or not np.isfinite(time).all():
                raise Problem("uneven time", f"the column 'time' must go in steps of {SPEC_ROW_SECONDS} s")
            # 'time' is the middle of a row; an odd offset takes the rows whose middle is inside.
            inside = (time >= row.spectrogram_offset) & (time < row.spectrogram_offset + SPEC_SECONDS)
            if inside.sum() != SPEC_SECONDS // SPEC_ROW_SECONDS:
                raise Problem(
                    "offset past the recording",
                    f"spectrogram_label_offset_seconds {row.spectrogram_offset:g} needs {row.spectrogram_offset:g} to "
                    f"{row.spectrogram_offset + SPEC_SECONDS:g} s, the recording has {time[0] - 1:g} to "
                    f"{time[-1] + 1:g} s",
                )
            power = power[inside].reshape(-1, len(REGIONS), len(SPEC_FREQUENCIES))
            require_spectrogram(power)
            return power
        except Problem as problem:
            raise RowError(self._bad_row(row, path, problem)) from None

    def infer_geometry(self) -> EEGGeometry:
        """Infer the EEG geometry from the length of the recordings; only the files' footers are read.

        It is `COMPETITION` if every recording has 50 s or more, `IIIC` if every one has 10 s.

        Raises
        ------
        DataError
            If lengths are mixed or fit neither, or no recording can be opened.
        """
        lengths: dict[Path, float] = {}
        for path in {self.eeg_path(row): None for row in self.rows}:
            try:
                lengths[path] = pq.read_metadata(path).num_rows / EEG_RATE
            except (OSError, pa.ArrowException):
                continue  # an error, or left out, with its row when the recording itself is read
            if not lengths[path]:
                del lengths[path]  # so is an empty one
        if not lengths:
            raise DataError(
                f"None of the EEG files that {self.root / 'train.csv'} names can be opened in train_eegs/ and has rows."
            )
        shortest, longest = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
        if lengths[shortest] >= COMPETITION.seconds:
            return COMPETITION
        if lengths[shortest] == lengths[longest] == IIIC.seconds:
            return IIIC
        raise DataError(
            f"Cannot infer the EEG geometry of {self.root}: expected recordings that all have "
            f"{COMPETITION.seconds:g} s or more, or all have {IIIC.seconds:g} s; got {lengths[shortest]:g} s "
            f"({shortest.name}) to {lengths[longest]:g} s ({longest.name}). "
            "Pass eeg_geometry=EEGGeometry(seconds, window_seconds, step_seconds)."
        )

    @staticmethod
    def _bad_row(row: Recording, path: Path, problem: Problem) -> BadRow:
        return BadRow(row.line, str(row.label_id), str(path), problem.reason, problem.detail)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        raise Problem("missing file", "the row names it, but it does not exist") from None
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=2)  # rows that follow each other share their EEG and their spectrogram
def _read_parquet(
    path: Path, size: int, modified: int, find: Callable[[Sequence[str]], tuple[str, ...]]
) -> NDArray[np.float32]:
    """Read the columns that ``find`` picks, as ``(rows, columns)``; ``size`` and ``modified`` change with the file."""
    try:
        with pq.ParquetFile(path) as file:
            columns = find(file.schema_arrow.names)
            # One thread: many files are read by one process on each core.
            table = file.read(list(columns), use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise Problem("unreadable file", f"not a readable parquet file: {error}") from None
    text = [name for name in columns if not _is_numeric(table.schema.field(name).type)]
    if text:
        raise Problem("column not numeric", f"expected numbers in {text[0]}, got {table.schema.field(text[0]).type}")
    values = np.stack([table[name].to_numpy() for name in columns], axis=1, dtype=np.float32, casting="same_kind")
    values.flags.writeable = False  # the cache returns it again
    return values


def _is_numeric(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))
