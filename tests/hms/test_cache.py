"""Features of many recordings: the same bits from any number of processes, each file read once, none computed twice."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lightning_xattn.core.errors import DataError
from lightning_xattn.hms import cache
from lightning_xattn.hms import recordings as recordings_module
from lightning_xattn.hms.cache import StoredFeatures, default_cache_dir, stored_features
from lightning_xattn.hms.features import eeg_features, spectrogram_features
from lightning_xattn.hms.recordings import COMPETITION, IIIC, EEGGeometry, Recordings
from lightning_xattn.hms.table import RowError
from tests.hms.conftest import table_rows, write_eeg, write_spectrogram, write_table
from tests.messages import tells


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Seven rows of five EEGs and three spectrograms, not in the order of either."""
    rows = table_rows(7)
    for i, row in enumerate(rows):
        eeg = i * 7 % 5
        row |= {"eeg_id": 100 + eeg, "spectrogram_id": 200 + eeg % 3, "patient_id": 400 + eeg % 3}
        row |= {"eeg_label_offset_seconds": 2.0 * (i // 5), "spectrogram_label_offset_seconds": 2.0 * (i // 5)}
    write_table(tmp_path / "data", rows)
    for eeg in range(5):
        write_eeg(tmp_path / f"data/train_eegs/{100 + eeg}.parquet", 60, seed=eeg)
    for spectrogram in range(3):
        write_spectrogram(tmp_path / f"data/train_spectrograms/{200 + spectrogram}.parquet", 310, seed=spectrogram)
    return tmp_path / "data"


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The label_id of each row whose features are computed from here on, in this process."""
    ids: list[int] = []
    compute = cache._compute_task

    def noting(task, geometry):
        ids.extend(row.label_id for row in task[0])
        return compute(task, geometry)

    monkeypatch.setattr(cache, "_compute_task", noting)
    return ids


def content(features: StoredFeatures) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in features.files}


def assert_features(features: StoredFeatures, position: int) -> None:
    """A row's features are those of its recording."""
    row = features.recordings.rows[position]
    found = features.read([position])
    x, edge_attr, _ = eeg_features(features.recordings.eeg(row, features.geometry), features.geometry)
    np.testing.assert_array_equal(found["eeg_x"][0], x)
    np.testing.assert_array_equal(found["eeg_edge_attr"][0], edge_attr)
    np.testing.assert_array_equal(found["spec_x"][0], spectrogram_features(features.recordings.spectrogram(row))[0])


def test_features_are_those_of_each_row_and_nothing_else_changes(make_folder, tmp_path, capfd):
    """Neither the data, nor the random numbers that follow; nothing is printed where no terminal is."""
    root, state = make_folder(), torch.get_rng_state()
    before = sorted(path.stat().st_mtime_ns for path in root.rglob("*"))
    features = stored_features(Recordings.read(root), IIIC, tmp_path / "cache")
    assert before == sorted(path.stat().st_mtime_ns for path in root.rglob("*"))
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    assert len(features) == 5
    for position in (0, 4):
        assert_features(features, position)
    both = features.read(np.array([3, 1]))
    np.testing.assert_array_equal(both["spec_x"], features.read(range(5))["spec_x"][[3, 1]])
    assert both["spec_x"].shape == (2, 119, 4, 4)
    pickled = pickle.dumps(features)
    assert len(pickled) < 10_000, "no values"
    np.testing.assert_array_equal(pickle.loads(pickled).read([4])["spec_x"], features.read([4])["spec_x"])
    assert (features.count_filled() == 0).all()


def test_each_recording_is_read_once(shared, tmp_path, monkeypatch):
    opened: Counter[str] = Counter()
    real = pq.ParquetFile

    def counting(path, *args, **kwargs):
        opened[f"{path.parent.name}/{path.name}"] += 1
        return real(path, *args, **kwargs)

    monkeypatch.setattr(recordings_module.pq, "ParquetFile", counting)
    recordings_module._read_parquet.cache_clear()
    stored_features(Recordings.read(shared), COMPETITION, tmp_path / "cache", num_workers=0)
    assert set(opened.values()) == {1}
    assert len(opened) == 8


def test_each_setting_has_a_folder_and_each_state_of_a_recording_a_file(make_folder, tmp_path, computed, monkeypatch):
    root = make_folder()

    def files(geometry: EEGGeometry = IIIC) -> tuple[Path, ...]:
        computed.clear()
        return stored_features(Recordings.read(root), geometry, tmp_path / "cache").files

    first = files()
    assert computed == [300, 301, 302, 303, 304]
    assert files() == first
    assert computed == [], "nothing is computed twice"
    assert files(EEGGeometry(10, 4, 2))[0].parent != first[0].parent
    assert len(computed) == 5
    rows = table_rows(5)
    rows[0]["seizure_vote"] = 17
    write_table(root, rows)
    assert files() == first, "votes are no features"
    os.utime(root / "train_eegs/101.parquet", ns=(1, 1))
    touched = files()
    assert computed == [301]
    assert [one == other for one, other in zip(first, touched, strict=True)] == [True, False, True, True, True]
    rows[2]["spectrogram_id"] = 204
    write_table(root, rows[:4])
    assert files()[3] == first[3]
    assert computed == [302]
    monkeypatch.setattr(cache, "FEATURE_VERSION", 99)
    assert files()[0].parent != first[0].parent
    assert len(computed) == 4


def test_a_damaged_file_is_computed_again(make_folder, tmp_path, computed):
    recordings = Recordings.read(make_folder(rows=table_rows(4)))
    first = stored_features(recordings, IIIC, tmp_path / "cache")
    expected, (missing, short, empty, _) = content(first), first.files
    missing.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    empty.write_bytes(b"")
    computed.clear()
    assert content(stored_features(recordings, IIIC, tmp_path / "cache")) == expected
    assert computed == [300, 301, 302]


def test_an_interrupted_computation_continues(make_folder, tmp_path, monkeypatch, computed):
    recordings = Recordings.read(make_folder())
    compute = cache.eeg_features

    def interrupted(*args):
        if len(computed) == 3:
            raise KeyboardInterrupt
        return compute(*args)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "eeg_features", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stored_features(recordings, IIIC, tmp_path / "cache")
    assert computed == [300, 301, 302]
    features = stored_features(recordings, IIIC, tmp_path / "cache")
    assert computed == [300, 301, 302, 302, 303, 304]
    assert content(features) == content(stored_features(recordings, IIIC, tmp_path / "whole"))


def test_a_full_disk_leaves_no_part_of_a_file(make_folder, tmp_path, monkeypatch):
    recordings = Recordings.read(make_folder(rows=table_rows(3)))
    write = Path.write_bytes

    def full(path, data):
        if path.name.startswith(".301"):
            write(path, data[:99])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        stored_features(recordings, IIIC, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    assert [path.name.partition("-")[0] for path in folder.iterdir()] == ["300"]


def test_bad_recordings_are_left_out_in_the_order_of_the_table(shared, tmp_path):
    (shared / "train_spectrograms/202.parquet").unlink()
    (shared / "train_eegs/103.parquet").write_bytes(b"")
    recordings = Recordings.read(shared, "skip")
    bad = [i for i, row in enumerate(recordings) if row.spectrogram_id == 202 or row.eeg_id == 103]
    for _ in range(2):
        features = stored_features(recordings, COMPETITION, tmp_path / "cache")
        assert [bad_row.line for bad_row in features.recordings.skipped] == [i + 2 for i in bad]
        assert {bad_row.reason for bad_row in features.recordings.skipped} == {"missing file", "unreadable file"}
        assert len(features) == len(features.recordings) == 7 - len(bad)
        assert_features(features, len(features) - 1)
        assert features.count_filled().shape == (len(features), 2)
    with pytest.raises(RowError, match=r"parquet: (missing|unreadable) file"):
        stored_features(Recordings.read(shared), COMPETITION, tmp_path / "cache")


def test_a_folder_of_bad_recordings_alone_is_an_error(make_folder, tmp_path):
    root = make_folder(rows=table_rows(2))
    for path in root.glob("train_eegs/*"):
        path.unlink()
    with pytest.raises(DataError, match=tells("No recording", "can be used", "100.parquet: missing file")):
        stored_features(Recordings.read(root, "skip"), IIIC, tmp_path / "cache")


UNGUARDED = """
import sys
from lightning_xattn.hms.cache import stored_features
from lightning_xattn.hms.recordings import COMPETITION, Recordings
stored_features(Recordings.read(sys.argv[1]), COMPETITION, sys.argv[2], 2)
"""


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_what_it_needs(shared, tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    command = [sys.executable, "script.py", str(shared), str(tmp_path / "cache")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 1
    assert "A script that calls HMSDataModule needs if __name__ == '__main__':" in ran.stderr


KILLED = """
import os, signal, sys
from lightning_xattn.hms import cache
from lightning_xattn.hms.recordings import COMPETITION, Recordings
run = cache._run_tasks

def run_and_die(*args):
    results = run(*args)
    yield next(results)
    os.kill(os.getpid(), signal.SIGKILL)

cache._run_tasks = run_and_die
cache.stored_features(Recordings.read(sys.argv[1]), COMPETITION, sys.argv[2], 2)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_none_behind_and_others_go_on(shared, tmp_path):
    command = [sys.executable, "-c", KILLED, str(shared), str(tmp_path / "cache")]
    killed = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True)
    assert killed.wait(300) == -signal.SIGKILL
    for _ in range(300):
        try:
            os.killpg(killed.pid, 0)  # the workers are in its group
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.killpg(killed.pid, signal.SIGKILL)
        pytest.fail("a worker outlives the process that was killed")
    # Two others go on where it ended, and compute the same bits as one does.
    recordings = Recordings.read(shared)
    features = stored_features(recordings, COMPETITION, tmp_path / "cache", 2)
    assert content(features) == content(stored_features(recordings, COMPETITION, tmp_path / "whole", 0))
    assert len(list(features.files[0].parent.iterdir())) == len(features) == 7


def test_where_features_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "lightning_xattn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache/lightning_xattn"


def test_several_at_once_compute_the_same(make_folder, tmp_path):
    recordings = Recordings.read(make_folder())
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(
            lambda name: content(stored_features(recordings, IIIC, tmp_path / name)), ["cache", "other"]
        )
    assert one == other == content(stored_features(recordings, IIIC, tmp_path / "cache"))
