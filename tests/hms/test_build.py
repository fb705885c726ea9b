"""Features of many rows: in any number of processes, each file opened once, resumed after an interruption."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from lightning_xattn.hms import build as build_module
from lightning_xattn.hms import recordings as recordings_module
from lightning_xattn.hms.cache import stored_features
from lightning_xattn.hms.features import eeg_features, spectrogram_features
from lightning_xattn.hms.recordings import COMPETITION, IIIC, Recordings
from lightning_xattn.hms.table import RowError
from tests.hms.conftest import table_rows, write_eeg, write_spectrogram, write_table
from tests.messages import tells


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Eleven rows of five EEGs and three spectrograms, not in the order of either."""
    rows = table_rows(11)
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


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(build_module, "_ROWS_IN_A_PART", 4)


@pytest.mark.usefixtures("small_parts")
def test_any_number_of_processes_computes_the_same_bits(shared, tmp_path):
    recordings = Recordings.read(shared)
    alone, one, two, all_cores = (
        stored_features(recordings, COMPETITION, tmp_path / f"cache_{workers}", workers) for workers in (0, 1, 2, None)
    )
    assert content(alone.folder) == content(one.folder) == content(two.folder) == content(all_cores.folder)
    assert set(content(alone.folder)) == {"eeg_x.npy", "eeg_edge_attr.npy", "spec_x.npy", "filled.npy", "bad_rows.json"}
    taken = alone.take(np.arange(11))
    for i, row in enumerate(recordings):
        x, edge_attr, _ = eeg_features(recordings.eeg(row, COMPETITION), COMPETITION)
        np.testing.assert_allclose(taken["eeg_x"][i], x, atol=1e-5)
        np.testing.assert_allclose(taken["eeg_edge_attr"][i], edge_attr, atol=1e-5)
        spec_x, _ = spectrogram_features(recordings.spectrogram(row))
        np.testing.assert_allclose(taken["spec_x"][i], spec_x, atol=1e-5)


def test_each_file_is_opened_once(shared, tmp_path, monkeypatch):
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


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_build_goes_on_and_gives_the_same_bits(shared, tmp_path, monkeypatch, workers):
    recordings = Recordings.read(shared)
    whole = stored_features(recordings, COMPETITION, tmp_path / "whole", workers)
    compute, seen = build_module._compute, []

    def interrupted(recordings, geometry, tasks, order, num_workers):
        for task, results in zip(order, compute(recordings, geometry, tasks, order, num_workers), strict=True):
            if len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(task)
            yield results

    monkeypatch.setattr(build_module, "_compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stored_features(recordings, COMPETITION, tmp_path / "cache", workers)
    first = list(seen)
    monkeypatch.setattr(build_module, "_compute", lambda *args: seen.extend(args[3]) or compute(*args))
    resumed = stored_features(recordings, COMPETITION, tmp_path / "cache", workers)
    assert content(resumed.folder) == content(whole.folder)
    # The second spectrogram's two rows were done too, but no whole part.
    assert first == [0, 1]
    assert seen[2:] == [1, 2]
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path != resumed.folder] == [".lock"]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("changed", "left"), [(None, [1, 2]), (100, [0, 1, 2])], ids=["mended", "mended and changed"])
def test_a_mended_file_costs_its_own_part_alone(shared, tmp_path, monkeypatch, changed, left):
    path = shared / "train_eegs/104.parquet"
    good = path.read_bytes()
    path.write_bytes(b"no parquet")
    with pytest.raises(RowError, match="unreadable file"):
        stored_features(Recordings.read(shared), COMPETITION, tmp_path / "cache")
    path.write_bytes(good)
    if changed:
        write_eeg(shared / f"train_eegs/{changed}.parquet", 60, seed=99)  # its rows were done
    compute, orders = build_module._compute, []
    monkeypatch.setattr(build_module, "_compute", lambda *args: orders.append(args[3]) or compute(*args))
    recordings = Recordings.read(shared)
    features = stored_features(recordings, COMPETITION, tmp_path / "cache")
    assert orders == [left]
    whole = stored_features(recordings, COMPETITION, tmp_path / "whole")
    assert content(features.folder) == content(whole.folder)


@pytest.mark.usefixtures("small_parts")
def test_files_that_change_and_change_back_are_computed_again(shared, tmp_path, monkeypatch):
    broken, changing = shared / "train_eegs/104.parquet", shared / "train_eegs/100.parquet"
    good, first, stamp = broken.read_bytes(), changing.read_bytes(), changing.stat().st_mtime_ns
    broken.unlink()
    with pytest.raises(RowError):  # the part of EEG 100 is done
        stored_features(Recordings.read(shared), COMPETITION, tmp_path / "cache")
    write_eeg(changing, 60, seed=99)
    compute = build_module._compute

    def interrupted(*args):
        yield next(compute(*args))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "_compute", interrupted)
        patch.setattr(build_module._Part, "finish", lambda part, bad_rows: None)  # killed before it could say so
        with pytest.raises(KeyboardInterrupt):
            stored_features(Recordings.read(shared), COMPETITION, tmp_path / "cache")
    broken.write_bytes(good)
    changing.write_bytes(first)
    os.utime(changing, ns=(stamp, stamp))
    recordings = Recordings.read(shared)
    features = stored_features(recordings, COMPETITION, tmp_path / "cache")
    assert content(features.folder) == content(stored_features(recordings, COMPETITION, tmp_path / "whole").folder)


DAMAGE = {
    "no array": lambda folder: (folder / "eeg_x.npy").unlink(),
    "short array": lambda folder: (folder / "eeg_x.npy").write_bytes((folder / "eeg_x.npy").read_bytes()[:-9]),
    "torn marker": lambda folder: (folder / "part-000000.json").write_text('["abc", [{'),
    "empty marker": lambda folder: (folder / "part-000000.json").write_bytes(b""),
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_in_an_unfinished_folder_is_computed_again(shared, tmp_path, damage):
    path = shared / "train_eegs/104.parquet"
    good = path.read_bytes()
    path.unlink()
    with pytest.raises(RowError):
        stored_features(Recordings.read(shared), COMPETITION, tmp_path / "cache")
    (unfinished,) = (found for found in (tmp_path / "cache").iterdir() if found.suffix != ".lock")
    assert (unfinished / "part-000000.json").exists()
    DAMAGE[damage](unfinished)
    path.write_bytes(good)
    recordings = Recordings.read(shared)
    features = stored_features(recordings, COMPETITION, tmp_path / "cache")
    assert content(features.folder) == content(stored_features(recordings, COMPETITION, tmp_path / "whole").folder)


KILLED = """
import os, signal, sys
from pathlib import Path
from lightning_xattn.hms import build
from lightning_xattn.hms.cache import stored_features
from lightning_xattn.hms.recordings import COMPETITION, Recordings

build._ROWS_IN_A_PART = 4
finish = build._Part.finish

def finish_and_die(part, bad_rows):
    finish(part, bad_rows)
    os.kill(os.getpid(), signal.SIGKILL)

build._Part.finish = finish_and_die
stored_features(Recordings.read(sys.argv[1]), COMPETITION, sys.argv[2], 2)
"""


@pytest.mark.slow
def test_a_killed_build_leaves_no_process_and_goes_on(shared, tmp_path):
    command = [sys.executable, "-c", KILLED, str(shared), str(tmp_path / "cache")]
    killed = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True)
    assert killed.wait(120) == -signal.SIGKILL
    for _ in range(300):
        try:
            os.killpg(killed.pid, 0)  # the workers are in its group
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.killpg(killed.pid, signal.SIGKILL)
        pytest.fail("a worker outlives the process that was killed")
    recordings = Recordings.read(shared)
    features = stored_features(recordings, COMPETITION, tmp_path / "cache", 2)
    assert content(features.folder) == content(stored_features(recordings, COMPETITION, tmp_path / "whole", 2).folder)


def test_pickled_features_are_mapped_and_never_computed(shared, tmp_path, monkeypatch):
    (shared / "train_eegs/103.parquet").unlink()
    features = stored_features(Recordings.read(shared, "skip"), COMPETITION, tmp_path / "cache")
    assert len(features) < 11
    monkeypatch.setattr("lightning_xattn.hms.cache.build", None)
    again = pickle.loads(pickle.dumps(features))
    everything = np.arange(len(features))
    for name, values in features.take(everything).items():
        np.testing.assert_array_equal(again.take(everything)[name], values)
    np.testing.assert_array_equal(again.filled, features.filled)


@pytest.mark.usefixtures("small_parts")
def test_bad_rows_of_several_parts_are_told_in_the_order_of_the_table(shared, tmp_path):
    (shared / "train_spectrograms/202.parquet").unlink()
    (shared / "train_eegs/103.parquet").write_bytes(b"")
    recordings = Recordings.read(shared, "skip")
    features = stored_features(recordings, COMPETITION, tmp_path / "cache", num_workers=2)
    bad = [i for i, row in enumerate(recordings) if row.spectrogram_id == 202 or row.eeg_id == 103]
    assert [bad_row.line for bad_row in features.recordings.skipped] == [i + 2 for i in bad]
    assert len(features) == 11 - len(bad)
    x, _, _ = eeg_features(features.recordings.eeg(features.recordings.rows[-1], COMPETITION), COMPETITION)
    np.testing.assert_allclose(features.take(np.array([len(features) - 1]))["eeg_x"][0], x, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_random_numbers_that_follow_do_not_depend_on_it(make_folder, tmp_path, workers):
    recordings = Recordings.read(make_folder())
    state = torch.get_rng_state()
    stored_features(recordings, IIIC, tmp_path / "cache", workers)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_full_disk_is_an_error_and_what_is_done_stays(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "_ROWS_IN_A_PART", 4)
    recordings = Recordings.read(shared)
    write, written = build_module._Rows.write, []

    def full(self, position, values):
        written.append(position)
        if len(written) > 4 * 9:
            raise OSError(28, "No space left on device")
        write(self, position, values)

    monkeypatch.setattr(build_module._Rows, "write", full)
    with pytest.raises(OSError, match="No space left"):
        stored_features(recordings, COMPETITION, tmp_path / "cache", 0)
    monkeypatch.setattr(build_module._Rows, "write", write)
    resumed = stored_features(recordings, COMPETITION, tmp_path / "cache", 0)
    assert content(resumed.folder) == content(stored_features(recordings, COMPETITION, tmp_path / "whole").folder)


def test_rows_with_a_region_that_is_missing_are_left_out(make_folder, tmp_path):
    root = make_folder(rows=table_rows(2))
    path = root / "train_spectrograms/200.parquet"
    table = pq.read_table(path)
    for i, name in enumerate(table.column_names):
        if name.startswith("LP_"):
            missing = np.full(len(table), np.nan, np.float32)
            table = table.set_column(i, name, [missing])
    pq.write_table(table, path)
    with pytest.raises(RowError, match=tells("200.parquet", "no spectrogram", "left parasagittal", "label_id 300")):
        stored_features(Recordings.read(root), IIIC, tmp_path / "cache", 0)
    features = stored_features(Recordings.read(root, "skip"), IIIC, tmp_path / "cache", 0)
    assert [row.label_id for row in features.recordings] == [301]
    assert [bad.reason for bad in features.recordings.skipped] == ["no spectrogram"]
    assert (features.filled == 0).all()


def test_an_hour_of_eeg(tmp_path):
    write_table(
        tmp_path,
        [
            {**row, "eeg_id": 100, "spectrogram_id": 200, "eeg_label_offset_seconds": 3550.0 * i}
            | {"spectrogram_label_offset_seconds": 3000.0 * i}
            for i, row in enumerate(table_rows(2))
        ],
    )
    eeg = write_eeg(tmp_path / "train_eegs/100.parquet", 3600)
    power = write_spectrogram(tmp_path / "train_spectrograms/200.parquet", 1800)
    recordings = Recordings.read(tmp_path)
    features = stored_features(recordings, recordings.infer_geometry(), tmp_path / "cache", 0)
    np.testing.assert_array_equal(recordings.eeg(recordings.rows[1], COMPETITION), eeg[-10000:, :19])
    np.testing.assert_array_equal(recordings.spectrogram(recordings.rows[1]).reshape(300, 400), power[-300:])
    assert np.ptp(features.take(np.arange(2))["eeg_x"], axis=0).max() > 0
