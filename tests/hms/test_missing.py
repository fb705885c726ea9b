"""Recordings of which too much is missing are refused, or left out with a warning."""

import numpy as np
import pytest

from lightning_xattn.core.errors import DataError
from lightning_xattn.hms import HMSDataModule
from lightning_xattn.hms.columns import SPECTROGRAM_COLUMNS
from lightning_xattn.hms.features import eeg_features, spectrogram_features
from lightning_xattn.hms.montage import ELECTRODES
from lightning_xattn.hms.recordings import COMPETITION, IIIC, Recordings
from lightning_xattn.hms.table import RowError
from tests.hms.conftest import table_rows, write_eeg, write_parquet, write_spectrogram
from tests.messages import tells

GEOMETRIES = {10: IIIC, 50: COMPETITION}


def some_eeg(seconds=10, electrodes=range(19), filler=np.nan):
    """Noise of some electrodes."""
    eeg = np.full((seconds * 200, 19), filler)
    eeg[:, [*electrodes]] = np.random.default_rng(0).normal(0, 20, (seconds * 200, len(electrodes)))
    return eeg


def some_power():
    return np.random.default_rng(0).lognormal(0, 2, (300, 4, 100))


def with_gap(values, *place, filler=np.nan):
    values[place] = filler
    return values


@pytest.mark.parametrize(
    ("eeg", "got"),
    [
        (with_gap(some_eeg(), ...), "got 0:"),
        (with_gap(some_eeg(50), ...), "got 0:"),
        (with_gap(some_eeg(), ..., filler=np.inf), "got 0:"),
        (with_gap(some_eeg(), ..., filler=7.0), "got 0:"),
        (some_eeg(electrodes=[8]), r"got 1 \(Fz\)"),
        (some_eeg(electrodes=[8], filler=0), r"got 1 \(Fz\)"),
        (some_eeg(electrodes=range(9)), "at least 10 of 19 .*got 9"),
        (with_gap(some_eeg(), slice(1001), slice(10)), "got 9"),  # the other ten lack one sample to half
        (with_gap(some_eeg(50), slice(4000, 6000)), "in the 10 s around the labelled moment, got 0"),
        (with_gap(some_eeg(50), slice(4000, 6000), slice(10), filler=3.0), "around the labelled moment, got 9"),
    ],
)
def test_too_little_eeg_is_refused(eeg, got):
    with pytest.raises(DataError, match=f"no EEG: .*{got}"):
        eeg_features(eeg, GEOMETRIES[len(eeg) // 200])


@pytest.mark.parametrize(
    "eeg",
    [
        some_eeg(electrodes=range(10)),
        with_gap(some_eeg(), slice(1000), slice(10)),
        with_gap(some_eeg(50), slice(4000)),  # 20 s before the labelled 10 s
        with_gap(some_eeg(50), slice(4000, 5000)),
    ],
)
def test_of_enough_eeg_gaps_are_filled(eeg):
    x, edges, filled = eeg_features(eeg, GEOMETRIES[len(eeg) // 200])
    assert filled == np.isnan(eeg).sum()
    assert np.isfinite(x).all()
    assert np.isfinite(edges).all()


@pytest.mark.parametrize(
    ("power", "got"),
    [
        (with_gap(some_power(), ...), "600 s that are used, got 0.0 % in delta of the left lateral region"),
        (with_gap(some_power(), ..., filler=np.inf), "got 0.0 %"),
        (with_gap(some_power(), ..., filler=5.0), "every region is constant"),
        (with_gap(some_power(), slice(None), 3), "got 0.0 % in delta of the right parasagittal region"),
        (with_gap(some_power(), slice(None), 1, slice(62, 100)), "got 0.0 % in beta of the right lateral region"),
        (with_gap(some_power(), slice(151)), "got 49.7 % in delta"),
        (with_gap(some_power(), slice(147, 153)), "12 s around the labelled moment, got 0.0 %"),
        (with_gap(some_power(), slice(147, 151), 2), "moment, got 33.3 % in delta of the left parasagittal region"),
    ],
)
def test_too_little_of_a_spectrogram_is_refused(power, got):
    with pytest.raises(DataError, match=f"no spectrogram: .*{got}"):
        spectrogram_features(power)


@pytest.mark.parametrize(
    "power",
    [
        with_gap(some_power(), slice(145)),
        with_gap(some_power(), [*range(147), 155, 156, 157]),  # half of it
        with_gap(some_power(), slice(153, 300)),
        with_gap(some_power(), slice(None), slice(None), slice(0, 100, 2)),
        with_gap(some_power(), slice(None), slice(3), filler=0.0),  # no power, which is not missing
    ],
)
def test_of_enough_of_a_spectrogram_gaps_are_filled(power):
    x, filled = spectrogram_features(power)
    assert filled == np.isnan(power).sum()
    assert np.isfinite(x).all()


def without_eeg(root):
    write_parquet(root / "train_eegs/100.parquet", [*ELECTRODES, "EKG"], np.full((2000, 20), np.nan, np.float32))


def with_one_electrode(root):
    whole = write_eeg(root / "train_eegs/100.parquet", 10)
    write_parquet(root / "train_eegs/100.parquet", [*ELECTRODES, "EKG"], np.where(np.arange(20) < 1, whole, np.nan))


def with_eeg_of_no_length(root):
    write_eeg(root / "train_eegs/100.parquet", 0)


def with_eeg_of_no_columns(root):
    write_parquet(root / "train_eegs/100.parquet", [], np.empty((2000, 0)))


def without_spectrogram(root):
    values = np.hstack([np.arange(1, 600, 2)[:, None], np.full((300, 400), np.nan)])
    write_parquet(root / "train_spectrograms/200.parquet", ["time", *SPECTROGRAM_COLUMNS], values)


def with_a_spectrogram_of_no_length(root):
    write_spectrogram(root / "train_spectrograms/200.parquet", 0)


def with_a_spectrogram_of_no_columns(root):
    write_parquet(root / "train_spectrograms/200.parquet", [], np.empty((300, 0)))


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (without_eeg, "100.parquet", "no EEG"),
        (with_one_electrode, "100.parquet", "no EEG"),
        (with_eeg_of_no_length, "100.parquet", "offset past the recording"),
        (with_eeg_of_no_columns, "100.parquet", "missing column"),
        (without_spectrogram, "200.parquet", "no spectrogram"),
        (with_a_spectrogram_of_no_length, "200.parquet", "offset past the recording"),
        (with_a_spectrogram_of_no_columns, "200.parquet", "missing column"),
    ],
)
def test_a_recording_that_is_not_there_is_named_or_left_out(damage, file, reason, make_folder, tmp_path):
    root = make_folder(rows=table_rows(3))
    damage(root)
    data = HMSDataModule(root, test_data=root, cache_dir=tmp_path / "cache", num_workers=0)
    with pytest.raises(RowError, match=tells(file, reason, "label_id 300", "on_bad_row='skip'")):
        data.setup()
    data = HMSDataModule(root, test_data=root, cache_dir=tmp_path / "cache", num_workers=0, on_bad_row="skip")
    with pytest.warns(UserWarning, match=tells("Left out 1 of 3 rows", f"1 x {reason}")):
        data.setup()
    assert [row.label_id for row in data.test_recordings] == [301, 302]
    assert (data.test_recordings.skipped[0].label_id, data.test_recordings.skipped[0].reason) == ("300", reason)


def test_nothing_of_the_real_recordings_is_refused(iiic_irr):
    recordings = Recordings.read(iiic_irr)
    for row in recordings:
        assert eeg_features(recordings.eeg(row, IIIC), IIIC)[2] == 0
        assert spectrogram_features(recordings.spectrogram(row))[1] == 0
