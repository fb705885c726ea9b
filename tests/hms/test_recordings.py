from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_xattn.core.errors import DataError, SettingError
from lightning_xattn.hms.datamodule import assign_folds
from lightning_xattn.hms.recordings import COMPETITION, IIIC, EEGGeometry, Recordings
from lightning_xattn.hms.table import Recording, RowError
from tests.hms.conftest import table_rows, write_eeg, write_spectrogram, write_table
from tests.messages import tells


def test_geometries_give_windows_around_the_labelled_moment():
    assert COMPETITION.n_windows == IIIC.n_windows == 9
    assert COMPETITION.spans[0] == (-25, -15)
    assert COMPETITION.spans[4] == (-5, 5)
    assert IIIC.spans[-1] == (3, 5)
    for values in ((10, 3, 2), (10, 12, 1), (10, 2, 0), (60, 10, 5), (10, 2.001, 1), (10, 0, 1)):
        with pytest.raises(SettingError, match="multiples of 1/200 s"):
            EEGGeometry(*values)


def test_the_real_recordings(iiic_irr: Path):
    recordings = Recordings.read(iiic_irr)
    assert len(recordings) == 20
    assert recordings.infer_geometry() == IIIC
    assert sum(row.votes.count(max(row.votes)) > 1 for row in recordings) == 12, "tied"
    for row in recordings:
        eeg, spectrogram = recordings.eeg(row, IIIC), recordings.spectrogram(row)
        assert eeg.shape == (2000, 19)
        assert spectrogram.shape == (300, 4, 100)
        assert eeg.dtype == spectrogram.dtype == np.float32
        assert np.isfinite(eeg).all()
        assert (spectrogram > 0).all()
    assert recordings.by_label_id[3013].extra["expert_consensus"] == "LRDA"
    # GPD 6, LRDA 6 of 12 votes
    np.testing.assert_array_equal(recordings.by_label_id[3011].soft_label, np.float32([0, 0, 0.5, 0.5, 0, 0]))


def test_offsets_cut_the_labelled_window(tmp_path):
    write_table(
        tmp_path,
        [{**row, "eeg_label_offset_seconds": 6.5, "spectrogram_label_offset_seconds": 14} for row in table_rows(1)],
    )
    eeg = write_eeg(tmp_path / "train_eegs/100.parquet", 70)
    power = write_spectrogram(tmp_path / "train_spectrograms/200.parquet", 320)
    recordings = Recordings.read(tmp_path)
    (row,) = recordings
    assert row.extra["agrees"] is True, "other columns keep their type"
    assert recordings.infer_geometry() == COMPETITION
    np.testing.assert_array_equal(recordings.eeg(row, COMPETITION), eeg[1300:11300, :19])
    # 10 s of a competition recording: the middle of its 50 s.
    np.testing.assert_array_equal(recordings.eeg(row, IIIC), eeg[5300:7300, :19])
    np.testing.assert_array_equal(recordings.spectrogram(row), power[7:307].reshape(300, 4, 100))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpd_vote": 0, "seizure_vote": 0, "lpd_vote": 0}, "no votes"),
        ({"lrda_vote": "many"}, "not a number: lrda_vote must be a finite float, got 'many'"),
        ({"lrda_vote": -1}, "negative votes"),
        ({"eeg_label_offset_seconds": "inf"}, "not a number: eeg_label_offset_seconds"),
        ({"patient_id": "x7"}, "not a number: patient_id must be a finite int"),
        ({"label_id": 300}, "repeated label_id: also on line 2"),
    ],
)
def test_a_bad_row_of_the_table(tmp_path, change, reason):
    rows = table_rows(4)
    rows[2] |= change
    write_table(tmp_path, rows)
    with pytest.raises(RowError) as error:
        Recordings.read(tmp_path)
    message = str(error.value)
    assert reason in message
    assert str(tmp_path / "train.csv") in message
    assert f"train.csv line 4, label_id {rows[2]['label_id']}" in message
    assert "on_bad_row='skip'" in message

    recordings = Recordings.read(tmp_path, on_bad_row="skip")
    assert [row.line for row in recordings] == [2, 3, 5]
    assert [bad_row.line for bad_row in recordings.skipped] == [4]
    assert reason.startswith(recordings.skipped[0].reason)


def test_votes_and_ids_that_went_through_floats(tmp_path):
    rows = table_rows(3)
    rows[1] |= {"seizure_vote": "2.5", "lpd_vote": "0.0", "gpd_vote": 7.0, "patient_id": "401.0", "eeg_id": 101.0}
    write_table(tmp_path, rows)
    row = Recordings.read(tmp_path).rows[1]
    assert row.votes == (2.5, 0, 7, 0, 0, 0)
    assert (row.patient_id, row.eeg_id) == (401, 101)
    assert isinstance(row.eeg_id, int)
    write_table(tmp_path, [{**row, "patient_id": bad} for row, bad in zip(rows, ("7", "7.5", "1e300"), strict=True)])
    with pytest.raises(RowError, match=r"patient_id must be a finite int, got '7\.5'"):
        Recordings.read(tmp_path)
    assert len(Recordings.read(tmp_path, "skip")) == 1


@pytest.mark.parametrize("cell", ["0x1F", "1_0", str(2**63), ""])
def test_what_is_no_plain_number_is_a_bad_row_whatever_stands_beside_it(tmp_path, cell):
    for other, usable in (("7", [3]), ("401.0", [3]), ("x", [])):
        rows = [{**row, "patient_id": value} for row, value in zip(table_rows(2), (cell, other), strict=True)]
        write_table(tmp_path, [*rows, {**table_rows(3)[2], "patient_id": 9}])
        recordings = Recordings.read(tmp_path, "skip")
        assert [row.line for row in recordings] == [*usable, 4]
        assert f"patient_id must be a finite int, got {cell!r}" in str(recordings.skipped[0])


def test_repeated_columns_of_the_table(tmp_path):
    write_table(tmp_path, table_rows(2))
    header, *lines = (tmp_path / "train.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join([f"{header},note,note", *(f"{line},a,b" for line in lines)]))
    assert len(Recordings.read(tmp_path)) == 2
    (tmp_path / "train.csv").write_text("\n".join([f"{header},eeg_id", *(f"{line},1" for line in lines)]))
    with pytest.raises(DataError, match=tells("eeg_id", "more than once")):
        Recordings.read(tmp_path)


def test_a_file_that_changes_is_read_again(make_folder):
    root = make_folder()
    recordings = Recordings.read(root)
    recordings.eeg(recordings.rows[0], IIIC)
    damage = write_eeg(root / "train_eegs/100.parquet", 11, seed=7)
    np.testing.assert_array_equal(recordings.eeg(recordings.rows[0], IIIC), damage[:2000, :19])


def test_what_is_no_folder_of_recordings_is_said(tmp_path):
    with pytest.raises(DataError, match=r"train\.csv does not exist: expected a folder with"):
        Recordings.read(tmp_path)
    with pytest.raises(SettingError, match="'raise' or 'skip'; got 'ignore'"):
        Recordings.read(tmp_path, on_bad_row="ignore")
    write_table(tmp_path, [{**row, "patient_id": "?"} for row in table_rows(2)])
    with pytest.raises(DataError, match="All 2 rows were left out"):
        Recordings.read(tmp_path, on_bad_row="skip")
    write_table(tmp_path, [{name: value for name, value in table_rows(1)[0].items() if name != "patient_id"}])
    with pytest.raises(DataError, match=r"train\.csv: missing column\(s\) patient_id; it has eeg_id"):
        Recordings.read(tmp_path)


@pytest.mark.parametrize("lengths", [(10, 50), (30, 30), (10, 11)])
def test_lengths_that_tell_no_geometry(make_folder, lengths):
    root = make_folder(rows=table_rows(2))
    for eeg_id, seconds in zip((100, 101), lengths, strict=True):
        write_eeg(root / f"train_eegs/{eeg_id}.parquet", seconds)
    with pytest.raises(DataError, match=f"got {lengths[0]} s .*Pass eeg_geometry="):
        Recordings.read(root).infer_geometry()


def row_of(patient: int, label: int, consensus: int) -> Recording:
    votes = tuple(float(c == consensus) for c in range(6))
    return Recording(label + 2, label, label, label, patient, 0.0, 0.0, votes)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=3, max_size=120),
    n_folds=st.integers(2, 7),
    seed=st.integers(0, 99),
)
def test_no_patient_is_in_two_folds_and_no_fold_is_empty(rows, n_folds, seed):
    recordings = [row_of(patient, i, consensus) for i, (patient, consensus) in enumerate(rows)]
    patients = {row.patient_id for row in recordings}
    if len(patients) < n_folds:
        with pytest.raises(DataError, match=f"at least {n_folds} patients"):
            assign_folds(recordings, n_folds, seed)
        return
    folds = assign_folds(recordings, n_folds, seed)
    assert set(folds) == set(range(n_folds))
    assert len({(row.patient_id, fold) for row, fold in zip(recordings, folds, strict=True)}) == len(patients)
    np.testing.assert_array_equal(folds, assign_folds(recordings, n_folds, seed))


def test_folds_are_stratified():
    rng = np.random.default_rng(0)
    recordings = [
        row_of(patient, patient * 10 + i, consensus)
        for patient, consensus in enumerate(rng.choice(6, 300, p=[0.4, 0.25, 0.15, 0.1, 0.06, 0.04]))
        for i in range(rng.integers(1, 6))
    ]
    folds = assign_folds(recordings, 5, seed=1)
    counts = np.zeros((5, 6))
    for row, fold in zip(recordings, folds, strict=True):
        counts[fold, row.consensus] += 1
    shares = counts / counts.sum(axis=0)
    assert np.abs(shares - 0.2).max() < 0.05
    assert (folds != assign_folds(recordings, 5, seed=2)).any()
