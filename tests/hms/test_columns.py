"""The competition's own names, written down by hand: nothing here is computed by the code under test."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_xattn.hms.columns import find_eeg, find_spectrogram
from lightning_xattn.hms.recordings import COMPETITION, IIIC, Recordings
from lightning_xattn.hms.simulator import simulate
from lightning_xattn.hms.table import Problem, RowError
from tests.hms.conftest import table_rows, write_eeg, write_table

# fmt: off
FREQUENCIES = [
    "0.59", "0.78", "0.98", "1.17", "1.37", "1.56", "1.76", "1.95", "2.15", "2.34", "2.54", "2.73", "2.93",
    "3.13", "3.32", "3.52", "3.71", "3.91", "4.1", "4.3", "4.49", "4.69", "4.88", "5.08", "5.27", "5.47",
    "5.66", "5.86", "6.05", "6.25", "6.45", "6.64", "6.84", "7.03", "7.23", "7.42", "7.62", "7.81", "8.01",
    "8.2", "8.4", "8.59", "8.79", "8.98", "9.18", "9.38", "9.57", "9.77", "9.96", "10.16", "10.35", "10.55",
    "10.74", "10.94", "11.13", "11.33", "11.52", "11.72", "11.91", "12.11", "12.3", "12.5", "12.7", "12.89",
    "13.09", "13.28", "13.48", "13.67", "13.87", "14.06", "14.26", "14.45", "14.65", "14.84", "15.04",
    "15.23", "15.43", "15.63", "15.82", "16.02", "16.21", "16.41", "16.6", "16.8", "16.99", "17.19", "17.38",
    "17.58", "17.77", "17.97", "18.16", "18.36", "18.55", "18.75", "18.95", "19.14", "19.34", "19.53",
    "19.73", "19.92",
]
# fmt: on
SPECTROGRAM = ["time"] + [f"{region}_{name}" for region in ("LL", "RL", "LP", "RP") for name in FREQUENCIES]
# fmt: off
EEG = [
    "Fp1", "F3", "C3", "P3", "F7", "T3", "T5", "O1", "Fz", "Cz", "Pz", "Fp2", "F4", "C4", "P4", "F8", "T4",
    "T6", "O2", "EKG",
]
# fmt: on


def rounded_by_python(name: str) -> str:
    """Two decimals always, and halves to even: 3.125 Hz as 3.12 and 4.1015625 Hz as 4.10."""
    exact = (FREQUENCIES.index(name) + 3) * 0.1953125
    return f"{exact:.2f}"


def write_competition(root: Path, columns: list[str] = SPECTROGRAM, rows: int = 320, **table) -> np.ndarray:
    """A row whose EEG has 12,400 samples; column c of the spectrogram holds 1000 c + row. Returns the EEG."""
    write_table(root, [{**row, **table} for row in table_rows(1)])
    eeg = write_eeg(root / "train_eegs/100.parquet", 62)
    values = {
        name: pa.array(1000 * np.float32(c) + np.arange(rows, dtype=np.float32)) for c, name in enumerate(columns)
    }
    values["time"] = pa.array(np.arange(1, 2 * rows, 2, dtype=np.int64))
    (root / "train_spectrograms").mkdir()
    pq.write_table(pa.table(values), root / "train_spectrograms/200.parquet")
    return eeg


def test_neither_spelling_nor_order_nor_other_columns_matter():
    assert find_spectrogram(SPECTROGRAM) == tuple(SPECTROGRAM)
    assert find_eeg(["note", *EEG[::-1]]) == tuple(EEG[:19])
    python = ["time"] + [f"{region}_{rounded_by_python(n)}" for region in ("LL", "RL", "LP", "RP") for n in FREQUENCIES]
    assert {"LL_3.12", "RP_4.10"} <= set(python)
    assert find_spectrogram(python) == tuple(python)
    shuffled = [*SPECTROGRAM[1:], "LL_25.0", "LL", "note_4.1", "LL_4.10", "RP_8", "__index_level_0__"]
    random.Random(0).shuffle(shuffled)
    assert find_spectrogram(["time", *shuffled]) == tuple(SPECTROGRAM)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([n for n in SPECTROGRAM if n != "RL_12.3"], r"missing column.*RL_12\.3 \(1 of 401 missing\)"),
        (["time", *(f"{n}0" if n[:2] != "LP" else f"x{n}" for n in SPECTROGRAM[1:])], r"LP_0\.59, .*100 of 401"),
        (["LL_3.15" if n == "LL_3.13" else n for n in SPECTROGRAM], r"LL_3\.13 \(1 of 401"),
        (SPECTROGRAM[1:], r"missing column.*time"),
        (["LL_4.10" if n == "LL_4.1" else n for n in SPECTROGRAM] + ["LL_4.100"], r"LL_4\.10 and LL_4\.100 are one"),
        ([*SPECTROGRAM, "time"], r"repeated column.*time occurs 2 times"),
        ([], r"401 of 401 missing"),
    ],
)
def test_a_region_needs_one_column_for_each_frequency(names, reason):
    with pytest.raises(Problem) as error:
        find_spectrogram(names)
    assert error.match(reason)


@pytest.mark.parametrize(("offset", "first"), [(0, 0), (7, 3), (7.5, 4)])
def test_a_file_of_the_competition(tmp_path, offset, first):
    eeg = write_competition(
        tmp_path, eeg_label_offset_seconds=12.0, spectrogram_label_offset_seconds=offset, seizure_vote=2.0
    )
    recordings = Recordings.read(tmp_path)
    (row,) = recordings
    assert recordings.infer_geometry() == COMPETITION
    np.testing.assert_array_equal(recordings.eeg(row, COMPETITION), eeg[2400:12400, :19])
    power = recordings.spectrogram(row)
    for region, frequency, name in ((0, 0, "LL_0.59"), (0, 13, "LL_3.13"), (1, 18, "RL_4.1"), (3, 99, "RP_19.92")):
        assert list(power[:, region, frequency] - 1000 * SPECTROGRAM.index(name)) == list(range(first, first + 300))


def test_an_error_names_what_is_missing_and_what_there_is(tmp_path):
    write_competition(tmp_path, [name for name in SPECTROGRAM if not name.startswith("RL_")])
    recordings = Recordings.read(tmp_path)
    with pytest.raises(RowError, match=r"200\.parquet: missing column: RL_0\.59, .*100 of 401.*the file has time, LL"):
        recordings.spectrogram(recordings.rows[0])


def test_the_shared_recordings_and_the_simulator_have_these_names(iiic_irr, tmp_path):
    for root, geometry in ((iiic_irr, IIIC), (simulate(tmp_path / "simulated", 1), COMPETITION)):
        recordings = Recordings.read(root)
        row = recordings.rows[0]
        assert pq.read_schema(recordings.spectrogram_path(row)).names == SPECTROGRAM
        assert pq.read_schema(recordings.eeg_path(row)).names == EEG
        assert np.isfinite(recordings.spectrogram(row)).all()
        assert recordings.eeg(row, geometry).shape == (round(geometry.seconds * 200), 19)
