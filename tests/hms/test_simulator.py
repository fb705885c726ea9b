"""The simulated folders: their layout, their truth, and what defines each class, measured from the files."""

import csv
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import signal

from lightning_xattn.core.errors import DataError, SettingError
from lightning_xattn.hms import simulator
from lightning_xattn.hms.montage import CLASSES, ELECTRODES, REGION_ELECTRODES, REGIONS, VOTE_COLUMNS
from lightning_xattn.hms.simulator import simulate

RATE = 200
LEFT, RIGHT = (np.array([e[-1] in digits for e in ELECTRODES]) for digits in ("1357", "2468"))
FREQUENCIES = np.linspace(0.5859375, 19.921875, 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 samples of 50 s, 8 a class, a sixth of them disagreeing: 8 is what the medians by class need."""
    return simulate(tmp_path_factory.mktemp("simulated") / "hms", 48, disagreeing=1 / 6, seed=7)


def table(folder):
    with (folder / "train.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@cache
def eeg(folder, row_id):
    """Microvolts ``(20, samples)``, gaps as zeros."""
    values = pq.read_table(folder / "train_eegs" / f"{row_id}.parquet")
    return np.nan_to_num(np.stack([column.to_numpy() for column in values.columns]))


@cache
def spectrogram(folder, row_id):
    """Power ``(300, 4, 100)``."""
    values = pq.read_table(folder / "train_spectrograms" / f"{row_id}.parquet")
    return np.stack([column.to_numpy() for column in values.columns[1:]], axis=-1).reshape(300, 4, 100)


def middle(folder, row):
    """Return the labelled 10 s, ``(19, 2000)``."""
    values = eeg(folder, row["eeg_id"])
    start = values.shape[1] // 2 - 5 * RATE
    return values[:19, start : start + 10 * RATE]


def by_eeg_class(folder, measure):
    """The median over each class's samples of a measure of the labelled 10 s."""
    measured = defaultdict(list)
    for row in table(folder):
        measured[row["eeg_class"]].append(measure(middle(folder, row)))
    return {name: float(np.median(values)) for name, values in measured.items()}


def band_power(values, low, high):
    frequencies, density = signal.welch(values, RATE, nperseg=2 * RATE)
    return density[..., (frequencies >= low) & (frequencies < high)].sum(-1)


@pytest.mark.parametrize("seconds", [10, 50])
def test_files_are_those_of_the_competition(seconds, tmp_path, iiic_irr):
    root = simulate(tmp_path / "new" / "folder", 1, eeg_seconds=seconds)
    (row,) = table(root)
    ours = pq.read_table(root / "train_eegs" / f"{row['eeg_id']}.parquet")
    real = pq.read_table(iiic_irr / "train_eegs" / "1001.parquet")
    assert [(f.name, f.type) for f in ours.schema] == [(f.name, f.type) for f in real.schema]
    assert ours.num_rows == seconds * RATE

    ours = pq.read_table(root / "train_spectrograms" / f"{row['spectrogram_id']}.parquet")
    real = pq.read_table(iiic_irr / "train_spectrograms" / "2001.parquet")
    assert [(f.name, f.type) for f in ours.schema] == [(f.name, f.type) for f in real.schema]
    assert ours["time"].equals(real["time"])

    columns = list(table(iiic_irr)[0])
    assert list(row) == [*columns, "eeg_class", "spectrogram_class", "agrees"]
    assert {path.name for path in root.iterdir()} == {"train.csv", "train_eegs", "train_spectrograms"}


def test_spectrograms_are_whole_and_few_eegs_have_gaps(folder):
    gaps = 0
    for row in table(folder):
        power = spectrogram(folder, row["spectrogram_id"])
        assert np.isfinite(power).all()
        assert power.min() > 0
        recording = pq.read_table(folder / "train_eegs" / f"{row['eeg_id']}.parquet")
        missing = np.isnan(np.stack([column.to_numpy() for column in recording.columns]))
        assert (missing == missing[0]).all(), "a gap is in every channel"
        assert missing[0].sum() <= RATE
        gaps += missing.any()
    assert 1 <= gaps <= 8


def test_classes_are_balanced_and_votes_follow_the_eeg(folder):
    rows = table(folder)
    assert set(Counter(row["patient_id"] for row in rows).values()) == {1, 2, 3}
    for column in ("eeg_id", "spectrogram_id", "label_id"):
        assert len({row[column] for row in rows}) == len(rows)
    assert Counter(row["eeg_class"] for row in rows) == dict.fromkeys(CLASSES, 8)
    votes = np.array([[int(row[column]) for column in VOTE_COLUMNS] for row in rows])
    shown = np.array([CLASSES.index(row["eeg_class"]) for row in rows])
    assert (votes >= 0).all()
    assert np.isin(votes.sum(axis=1), range(10, 21)).all()
    assert (votes.argmax(axis=1) == shown).mean() > 0.9
    assert [row["expert_consensus"] for row in rows] == [CLASSES[i] for i in votes.argmax(axis=1)]
    agreement = votes.max(axis=1) / votes.sum(axis=1)
    assert (agreement == 1).any()
    assert 0.02 < (agreement < 0.7).mean() < 0.4


def test_as_many_disagree_as_asked_and_with_any_of_the_five():
    for share, expected in ((0, 0), (0.2, 1), (0.5, 4), (1, 7)):
        samples = list(simulator._plan(7, share, seed=0))
        assert sum(sample.eeg_class != sample.spectrogram_class for sample in samples) == expected
    samples = list(simulator._plan(3000, 1.0, seed=0))
    pairs = Counter((sample.eeg_class, sample.spectrogram_class) for sample in samples)
    assert len(pairs) == 30
    assert all(60 <= count <= 140 for count in pairs.values())  # 100 expected


def test_a_seed_gives_the_same_files_however_many_follow(tmp_path):
    few, many, other = (
        simulate(tmp_path / name, n, eeg_seconds=10, disagreeing=0.5, seed=seed)
        for name, n, seed in (("few", 2, 3), ("many", 4, 3), ("other", 2, 4))
    )
    for column in ("eeg_id", "spectrogram_id", "label_id", "patient_id"):
        assert not {row[column] for row in table(many)} & {row[column] for row in table(other)}
    assert table(few) == table(many)[:2]
    names = sorted(path.relative_to(few) for path in few.rglob("*.parquet"))
    assert len(names) == 4
    others = sorted(path.relative_to(other) for path in other.rglob("*.parquet"))
    for name, of_other in zip(names, others, strict=True):
        assert (few / name).read_bytes() == (many / name).read_bytes()
        assert (few / name).read_bytes() != (other / of_other).read_bytes()


def test_bad_settings_are_refused(tmp_path):
    for settings, message in (
        ({"n_samples": 0}, "at least 1, got 0"),
        ({"eeg_seconds": 30}, "must be 10 or 50, got 30"),
        ({"disagreeing": 1.1}, r"\[0, 1\], got 1.1"),
        ({"disagreeing": float("nan")}, r"\[0, 1\], got nan"),
        ({"seed": -1}, "at least 0, got -1"),
    ):
        with pytest.raises(SettingError, match=message):
            simulate(tmp_path / "hms", **settings)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path):
    simulate(tmp_path, 1, eeg_seconds=10)
    before = (tmp_path / "train.csv").stat()
    with pytest.raises(DataError, match="not an empty folder"):
        simulate(tmp_path, 1, eeg_seconds=10)
    with pytest.raises(DataError, match=r"train\.csv exists"):
        simulate(tmp_path / "train.csv", 1)
    assert (tmp_path / "train.csv").stat() == before


def test_nothing_is_left_of_an_unfinished_folder(tmp_path, monkeypatch):
    def disk_full(folder, eeg_seconds, sample):
        raise OSError("disk full")

    monkeypatch.setattr(simulator, "_write_sample", disk_full)
    with pytest.raises(OSError, match="disk full"):
        simulate(tmp_path / "hms", 3)
    assert not list(tmp_path.iterdir())


def test_each_class_has_its_rhythm(folder):
    def peak(values):
        """Where the power times f² is greatest: what stands out of a 1/f background."""
        frequencies, density = signal.welch(values, RATE, nperseg=4 * RATE)
        inside = (frequencies >= 0.75) & (frequencies <= 15)
        return frequencies[inside][np.argmax((density * frequencies**2).sum(axis=0)[inside])]

    peaks = by_eeg_class(folder, peak)
    assert 1 <= peaks["LRDA"] <= 3
    assert 1 <= peaks["GRDA"] <= 3
    assert 3 < peaks["Seizure"] <= 8
    assert 8 <= peaks["Other"] <= 12


def test_lateralised_patterns_are_on_one_side(folder):
    def asymmetry(values):
        power = band_power(values, 1, 13)
        return abs(np.log10(power[LEFT].mean() / power[RIGHT].mean()))

    measured = by_eeg_class(folder, asymmetry)
    assert min(measured["LPD"], measured["LRDA"]) > 2 * max(measured["GPD"], measured["GRDA"], measured["Other"])


def test_periodic_discharges_recur(folder):
    sections = signal.butter(4, (4, 30), "bandpass", fs=RATE, output="sos")

    def periodicity(values):
        """The greatest autocorrelation of the sharp activity's envelope at 0.5 to 2 s."""
        envelope = np.abs(signal.hilbert(signal.sosfiltfilt(sections, values, axis=1), axis=1)).mean(axis=0)
        envelope -= envelope.mean()
        correlation = signal.correlate(envelope, envelope)[len(envelope) - 1 :]
        return correlation[RATE // 2 : 2 * RATE].max() / correlation[0]

    measured = by_eeg_class(folder, periodicity)
    others = max(value for name, value in measured.items() if not name.endswith("PD"))
    assert min(measured["LPD"], measured["GPD"]) > others + 0.1


def test_the_pattern_comes_in_bouts_and_covers_the_labelled_moment(folder):
    for row in table(folder):
        if row["spectrogram_class"] == "GRDA":
            delta = spectrogram(folder, row["spectrogram_id"])[:, :, FREQUENCIES < 4].sum(axis=(1, 2))
            delta = np.convolve(delta, np.ones(5) / 5, mode="valid")  # 10 s; entry i is centred on row i + 2
            assert delta[147:149].min() > 2 * np.quantile(delta, 0.05)


def test_the_spectrogram_is_of_this_eeg_unless_it_disagrees(folder):
    """Compare what the file says of the middle 50 s with what the regions' electrodes say."""
    likeness = defaultdict(list)
    for row in table(folder):
        recording = eeg(folder, row["eeg_id"])
        regions = np.stack(
            [recording[[ELECTRODES.index(e) for e in REGION_ELECTRODES[r]]].mean(axis=0) for r in REGIONS]
        )
        # Entry i is centred on second 2i + 2 of the EEG, and that is second 2i + 277 of the spectrogram: row i + 138.
        _, _, power = signal.spectrogram(regions, RATE, nperseg=4 * RATE, noverlap=2 * RATE, nfft=1024)
        ours = np.log(power[:, 3:103]).transpose(2, 0, 1)
        theirs = np.log(spectrogram(folder, row["spectrogram_id"]))[138 : 138 + len(ours)]
        # In bands of 1 Hz, and without what every recording has: less power at higher frequencies.
        ours, theirs = (values.reshape(len(ours), 4, 20, 5).mean(axis=-1) for values in (ours, theirs))
        ours, theirs = (values - values.mean(axis=(0, 1)) for values in (ours, theirs))
        likeness[row["agrees"]].append(np.corrcoef(ours.ravel(), theirs.ravel())[0, 1])
    assert min(likeness["true"]) > 0.5
    assert max(likeness["false"]) < 0.4


def test_a_disagreeing_spectrogram_shows_the_class_of_its_column(folder):
    """Judged by the nearest of the classes' mean spectrograms among the agreeing samples."""

    def describe(row):
        power = np.log(spectrogram(folder, row["spectrogram_id"])).reshape(300, 4, 10, 10).mean(axis=-1)
        left, right = power[:, [0, 2]].mean(axis=1), power[:, [1, 3]].mean(axis=1)
        loudness = np.quantile((left + right) / 2 - power.mean(), 0.9, axis=0)
        return np.concatenate([loudness, abs(left - right).mean(axis=0)])

    agreeing, disagreeing = ([row for row in table(folder) if row["agrees"] == value] for value in ("true", "false"))
    seen = np.stack([describe(row) for row in agreeing])
    names = np.array([row["eeg_class"] for row in agreeing])
    centres = np.stack([(seen[names == name] / seen.std(axis=0)).mean(axis=0) for name in CLASSES])
    looks = [CLASSES[np.argmin(((describe(row) / seen.std(axis=0) - centres) ** 2).sum(axis=1))] for row in disagreeing]
    assert sum(a == row["spectrogram_class"] for a, row in zip(looks, disagreeing, strict=True)) >= 6
    assert sum(a == row["eeg_class"] for a, row in zip(looks, disagreeing, strict=True)) <= 1
