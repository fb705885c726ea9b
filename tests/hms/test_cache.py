import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lightning_xattn.hms import cache
from lightning_xattn.hms.cache import default_cache_dir, stored_features
from lightning_xattn.hms.features import eeg_features, spectrogram_features
from lightning_xattn.hms.recordings import IIIC, EEGGeometry, Recordings
from lightning_xattn.hms.table import RowError
from tests.hms.conftest import table_rows, write_table


def folders(cache_dir: Path) -> list[Path]:
    """Features, complete and unfinished; a lock is an empty file that stays."""
    return sorted(path for path in cache_dir.iterdir() if path.suffix != ".lock")


def test_they_are_the_features_of_each_row(make_folder, tmp_path):
    recordings = Recordings.read(make_folder())
    features = stored_features(recordings, IIIC, tmp_path / "cache")
    assert len(features) == 5
    taken = features.take(np.array([3, 1]))
    for i, row in enumerate((recordings.rows[3], recordings.rows[1])):
        x, edge_attr, _ = eeg_features(recordings.eeg(row, IIIC), IIIC)
        np.testing.assert_array_equal(taken["eeg_x"][i], x)
        np.testing.assert_array_equal(taken["eeg_edge_attr"][i], edge_attr)
        np.testing.assert_array_equal(taken["spec_x"][i], spectrogram_features(recordings.spectrogram(row))[0])
    assert taken["spec_x"].shape == (2, 119, 4, 4)
    assert (features.filled == 0).all()


def test_the_second_time_nothing_is_computed(make_folder, tmp_path, monkeypatch):
    recordings = Recordings.read(make_folder())
    first = stored_features(recordings, IIIC, tmp_path / "cache")
    monkeypatch.setattr(cache, "build", None)
    second = stored_features(recordings, IIIC, tmp_path / "cache")
    assert folders(tmp_path / "cache") == [first.folder] == [second.folder]


def test_the_data_folder_is_only_read(make_folder, tmp_path):
    root = make_folder()
    before = sorted(path.stat().st_mtime_ns for path in root.rglob("*"))
    stored_features(Recordings.read(root), IIIC, tmp_path / "cache")
    assert before == sorted(path.stat().st_mtime_ns for path in root.rglob("*"))


def test_what_decides_the_features_decides_the_folder(make_folder, tmp_path):
    root = make_folder()

    def folder(geometry: EEGGeometry = IIIC) -> Path:
        return stored_features(Recordings.read(root), geometry, tmp_path / "cache").folder

    first = folder()
    assert folder(EEGGeometry(10, 4, 2)) != first
    rows = table_rows(5)
    rows[0]["seizure_vote"] = 17
    write_table(root, rows)
    assert folder() == first  # votes are no features
    os.utime(root / "train_eegs/101.parquet", ns=(1, 1))
    touched = folder()
    assert touched != first
    write_table(root, rows[:4])
    assert folder() not in (first, touched)


@pytest.mark.parametrize("name", ["eeg_x.npy", "spec_x.npy", "filled.npy", "bad_rows.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "empty", "rubbish"])
def test_damaged_features_are_computed_again(make_folder, tmp_path, name, damage):
    recordings = Recordings.read(make_folder(rows=table_rows(2)))
    first = stored_features(recordings, IIIC, tmp_path / "cache")
    expected = first.take(np.arange(2))
    path = first.folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"short": content[:-1], "empty": b"", "rubbish": b"\x93rubbish" * 9}[damage])
    again = stored_features(recordings, IIIC, tmp_path / "cache").take(np.arange(2))
    for key, values in expected.items():
        np.testing.assert_array_equal(again[key], values)
    assert folders(tmp_path / "cache") == [first.folder]


def test_a_build_that_fails_is_not_taken_for_whole(make_folder, tmp_path):
    root = make_folder()
    path = root / "train_spectrograms/204.parquet"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(RowError, match=r"204\.parquet: missing file: .*line 6, label_id 304"):
        stored_features(Recordings.read(root), IIIC, tmp_path / "cache")
    (unfinished,) = folders(tmp_path / "cache")
    assert unfinished.name.startswith(".")
    path.write_bytes(content)
    features = stored_features(Recordings.read(root), IIIC, tmp_path / "cache")
    assert folders(tmp_path / "cache") == [features.folder]
    row = features.recordings.rows[4]
    np.testing.assert_array_equal(
        features.take(np.array([4]))["spec_x"][0], spectrogram_features(features.recordings.spectrogram(row))[0]
    )


def test_bad_recordings_are_skipped_and_counted_also_from_the_store(make_folder, tmp_path):
    root = make_folder()
    (root / "train_spectrograms/201.parquet").unlink()
    (root / "train_eegs/103.parquet").write_bytes(b"no parquet")
    for _ in range(2):
        features = stored_features(Recordings.read(root, "skip"), IIIC, tmp_path / "cache")
        assert [row.label_id for row in features.recordings] == [300, 302, 304]
        assert [bad.reason for bad in features.recordings.skipped] == ["missing file", "unreadable file"]
        row = features.recordings.rows[1]
        x, _, _ = eeg_features(features.recordings.eeg(row, IIIC), IIIC)
        np.testing.assert_array_equal(features.take(np.array([1]))["eeg_x"][0], x)
        assert features.filled.shape == (3, 2)
    with pytest.raises(RowError, match=r"201\.parquet: missing file"):
        stored_features(Recordings.read(root), IIIC, tmp_path / "cache")


def test_where_features_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "lightning_xattn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache/lightning_xattn"


def test_pickled_they_are_mapped_again_not_copied(make_folder, tmp_path):
    features = stored_features(Recordings.read(make_folder()), IIIC, tmp_path / "cache")
    pickled = pickle.dumps(features)
    assert len(pickled) < 10_000
    copy = pickle.loads(pickled)
    np.testing.assert_array_equal(copy.take(np.array([4]))["spec_x"], features.take(np.array([4]))["spec_x"])


def test_several_at_once(make_folder, tmp_path):
    recordings = Recordings.read(make_folder())
    start = threading.Barrier(4)

    def open_features() -> np.ndarray:
        start.wait(60)
        return stored_features(recordings, IIIC, tmp_path / "cache").take(np.arange(5))["spec_x"]

    with ThreadPoolExecutor(4) as pool:
        first, *others = [future.result() for future in [pool.submit(open_features) for _ in range(4)]]
    for other in others:
        np.testing.assert_array_equal(other, first)
    assert len(folders(tmp_path / "cache")) == 1


def test_it_is_quiet_where_no_terminal_is(make_folder, tmp_path, capfd):
    stored_features(Recordings.read(make_folder()), IIIC, tmp_path / "cache")
    assert capfd.readouterr() == ("", "")
