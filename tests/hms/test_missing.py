"""Recordings of which too much is missing are refused, or left out with a warning."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_xattn.core.errors import DataError
from lightning_xattn.hms import HMSDataModule
from lightning_xattn.hms.features import eeg_features, spectrogram_features
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


EEG, SPECTROGRAM = "train_eegs/100.parquet", "train_spectrograms/200.parquet"


def rewritten(edit):
    """A file whose table is edited."""
    return lambda path: pq.write_table(edit(pq.read_table(path)), path)


def of_missing_values(*, but=0):
    """All columns but the first ones without a number."""

    def edit(table):
        missing = pa.nulls(len(table), pa.float32())
        return pa.table({name: table[name] if i < but else missing for i, name in enumerate(table.column_names)})

    return rewritten(edit)


def with_later_rows(table):
    """A step in the spectrogram's time."""
    time = table["time"].to_numpy()
    return table.set_column(0, "time", pa.array(time + 2 * (np.arange(len(time)) >= 100)))


def without_a_region(table):
    columns = {name: table[name] for name in table.column_names}
    return pa.table({n: pa.nulls(300, pa.float32()) if n.startswith("LP_") else c for n, c in columns.items()})


DAMAGES = {
    "missing file": (EEG, Path.unlink, "missing file"),
    "cut off": (EEG, lambda path: path.write_bytes(path.read_bytes()[:1000]), "unreadable file"),
    "no electrode T3": (EEG, rewritten(lambda table: table.drop_columns(["T3"])), "missing column: T3"),
    "text": (
        EEG,
        rewritten(lambda table: table.set_column(0, "Fp1", pa.array(["a"] * len(table)))),
        "column not numeric: expected numbers in Fp1",
    ),
    "short": (EEG, lambda path: write_eeg(path, 9), "needs 0 to 10 s, the recording has 9 s"),
    "no length": (EEG, lambda path: write_eeg(path, 0), "offset past the recording"),
    "no columns": (EEG, lambda path: write_parquet(path, [], np.empty((2000, 0))), "missing column"),
    "no values": (EEG, of_missing_values(), "no EEG"),
    "one electrode": (EEG, of_missing_values(but=1), "no EEG"),
    "short spectrogram": (
        SPECTROGRAM,
        lambda path: write_spectrogram(path, 299),
        "needs 0 to 600 s, the recording has 0 to 598 s",
    ),
    "uneven spectrogram": (SPECTROGRAM, rewritten(with_later_rows), "uneven time"),
    "no power": (SPECTROGRAM, of_missing_values(but=1), "no spectrogram"),
    "a region": (SPECTROGRAM, rewritten(without_a_region), "no spectrogram: .* of the left parasagittal region"),
}


@pytest.mark.parametrize(("file", "damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_recording_that_cannot_be_used_is_named_or_left_out(file, damage, reason, make_folder, tmp_path):
    root = make_folder(rows=table_rows(2))
    damage(root / file)
    settings = {"test_data": root, "cache_dir": tmp_path / "cache", "num_workers": 0, "eeg_geometry": IIIC}
    data = HMSDataModule(root, **settings)
    with pytest.raises(RowError, match=tells(root / file, "label_id 300", "line 2", "on_bad_row='skip'")) as error:
        data.setup()
    assert error.match(reason)
    data = HMSDataModule(root, **settings, on_bad_row="skip")
    kind = reason.partition(":")[0]
    with pytest.warns(UserWarning, match="Left out 1 of 2 rows"):
        data.setup()
    assert [row.label_id for row in data.test_recordings] == [301]
    (skipped,) = data.test_recordings.skipped
    assert skipped.label_id == "300"
    assert skipped.reason in (kind, "offset past the recording")


def test_nothing_of_the_real_recordings_is_refused(iiic_irr):
    recordings = Recordings.read(iiic_irr)
    for row in recordings:
        assert eeg_features(recordings.eeg(row, IIIC), IIIC)[2] == 0
        assert spectrogram_features(recordings.spectrogram(row))[1] == 0
