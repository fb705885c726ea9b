import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_xattn.hms import HMSDataModule, simulate
from lightning_xattn.hms.columns import SPECTROGRAM_COLUMNS
from lightning_xattn.hms.montage import EEG_RATE, ELECTRODES, VOTE_COLUMNS


def write_parquet(path: Path, names: Sequence[str], values: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({name: values[:, i] for i, name in enumerate(names)}), path)


def write_eeg(path: Path, seconds: float, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 20, (round(seconds * EEG_RATE), 20)).astype(np.float32)
    write_parquet(path, [*ELECTRODES, "EKG"], values)
    return values


def write_spectrogram(path: Path, rows: int, seed: int = 0) -> np.ndarray:
    power = np.random.default_rng(seed).lognormal(0, 2, (rows, 400)).astype(np.float32)
    time = np.arange(1, 2 * rows, 2, dtype=np.float32)[:, None]
    write_parquet(path, ["time", *SPECTROGRAM_COLUMNS], np.hstack([time, power]))
    return power


def table_rows(n: int, patients: int | None = None) -> list[dict[str, Any]]:
    """Rows as train.csv holds them: ids 100+i, 200+i, 300+i, all votes for class i % 6."""
    return [
        {
            "eeg_id": 100 + i,
            "eeg_label_offset_seconds": 0.0,
            "spectrogram_id": 200 + i,
            "spectrogram_label_offset_seconds": 0.0,
            "label_id": 300 + i,
            "patient_id": 400 + i % (patients or n),
            "agrees": i % 2 == 0,
            **{name: 3 if c == i % 6 else 0 for c, name in enumerate(VOTE_COLUMNS)},
        }
        for i in range(n)
    ]


def write_table(root: Path, rows: list[dict[str, Any]]) -> None:
    root.mkdir(exist_ok=True)
    with (root / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_folder(root: Path, rows: list[dict[str, Any]], seconds: float = 10) -> Path:
    """A folder in the competition's layout, filled with noise."""
    write_table(root, rows)
    for row in rows:
        write_eeg(root / f"train_eegs/{row['eeg_id']}.parquet", seconds, row["eeg_id"])
        write_spectrogram(root / f"train_spectrograms/{row['spectrogram_id']}.parquet", 300)
    return root


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of noise; `rows` edits what the table says."""

    def make(name: str = "data", rows: list[dict[str, Any]] | None = None, seconds: float = 10) -> Path:
        return write_folder(tmp_path / name, table_rows(5) if rows is None else rows, seconds)

    return make


@pytest.fixture(scope="session")
def simulated(tmp_path_factory) -> HMSDataModule:
    """Twelve simulated recordings, which are validated and tested on."""
    folder = tmp_path_factory.mktemp("simulated") / "hms"
    simulate(folder, 12, eeg_seconds=10)
    return HMSDataModule(folder, test_data=folder, batch_size=5, cache_dir=folder.parent / "features")
