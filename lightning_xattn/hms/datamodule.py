"""Recordings in, batches of graphs out: the `LightningDataModule` of the reference application."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_xattn.core.attention import TokenAxis
from lightning_xattn.core.errors import DataError, SettingError
from lightning_xattn.core.notices import info, warn
from lightning_xattn.explainer.checkpoint import TRAINING_GROUPS, TRAINING_IDS
from lightning_xattn.hms.cache import StoredFeatures, stored_features
from lightning_xattn.hms.dataset import HMSBatch, HMSDataset, keep_batch
from lightning_xattn.hms.features import spectrogram_spans
from lightning_xattn.hms.montage import CLASSES
from lightning_xattn.hms.recordings import EEGGeometry, OnBadRow, Recordings
from lightning_xattn.hms.table import Recording


class HMSDataModule(LightningDataModule):
    """Train, validate and test on recordings in the layout of the HMS competition.

    Patients are divided into ``n_folds`` folds, see `assign_folds`: fold ``fold`` validates, the one after it tests,
    the others train. With ``test_data`` the same folds train, and validation and test take all of ``test_data``;
    ``source_test_dataloader`` then gives ``data``'s own test fold.

    Parameters
    ----------
    data
        Folder with ``train.csv``, ``train_eegs/`` and ``train_spectrograms/``.
    test_data
        Another such folder to validate and test on.
    batch_size
        Samples in a batch; the last one may have fewer.
    fold, n_folds
        The fold that validates, and the number of folds, at least 3.
    eeg_geometry
        How the EEG is cut, for both folders; None: inferred from the recordings' length. Give `IIIC` to take the middle
        10 s of competition recordings together with recordings of 10 s.
    cache_dir
        Where features are kept; None: `default_cache_dir`.
    on_bad_row
        ``"raise"``: a row that cannot be used is an error. ``"skip"``: it is left out, counted in
        ``recordings.skipped``, and one warning names their number and the reasons.
    labelled
        Whether rows need votes. False: votes are not read, targets are NaN, and the data can only be tested on.
    num_workers
        Processes that compute features and that load batches, at least 0. None: features in one process for each core
        and 500 rows, see `hms.cache`; batches in the main process, as loading one takes a few milliseconds.
    seed
        Decides the folds and the order of training samples.

    Raises
    ------
    SettingError
        If a setting has a value that is not allowed.

    Examples
    --------
    >>> folder = simulate("recordings", n_samples=12, eeg_seconds=10)
    >>> data = HMSDataModule(folder, n_folds=3, cache_dir="features", num_workers=0)
    >>> data.setup()
    >>> [len(part.dataset) for part in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    [4, 4, 4]
    """

    # No hyperparameters are saved: with paths and a geometry a checkpoint would not load with weights_only=True.

    def __init__(
        self,
        data: str | Path,
        *,
        test_data: str | Path | None = None,
        batch_size: int = 32,
        fold: int = 0,
        n_folds: int = 5,
        eeg_geometry: EEGGeometry | None = None,
        cache_dir: str | Path | None = None,
        on_bad_row: OnBadRow = "raise",
        labelled: bool = True,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise SettingError(f"batch_size must be at least 1; got {batch_size}.")
        if n_folds < 3:
            raise SettingError(f"n_folds must be at least 3 (train, validate, test); got {n_folds}.")
        if not 0 <= fold < n_folds:
            raise SettingError(f"fold must be 0 to {n_folds - 1} with n_folds={n_folds}; got {fold}.")
        if num_workers is not None and num_workers < 0:
            raise SettingError(f"num_workers must be at least 0, or None for one on each core; got {num_workers}.")
        if on_bad_row not in ("raise", "skip"):
            raise SettingError(f"on_bad_row must be 'raise' or 'skip'; got {on_bad_row!r}.")
        self.data = Path(data)
        self.test_data = None if test_data is None else Path(test_data)
        self.batch_size, self.fold, self.n_folds, self.seed = batch_size, fold, n_folds, seed
        self.cache_dir, self.num_workers = cache_dir, num_workers
        self.on_bad_row: OnBadRow = on_bad_row
        self.labelled = labelled
        self._eeg_geometry = eeg_geometry
        self._features: dict[Path, StoredFeatures] = {}

    @property
    def recordings(self) -> Recordings:
        """The usable rows of ``data``; its ``by_label_id`` finds a batch's ``sample_ids``."""
        return self._open(self.data).recordings

    @property
    def test_recordings(self) -> Recordings:
        """The usable rows of ``test_data``, or of ``data`` where no ``test_data`` was given."""
        return self._open(self.test_data or self.data).recordings

    @property
    def eeg_geometry(self) -> EEGGeometry:
        """How the EEG is cut, as given or inferred from the recordings' length.

        Raises
        ------
        DataError
            If the lengths fit no geometry, or those of ``data`` and ``test_data`` differ.
        """
        if self._eeg_geometry is None:
            folders = [self.data] if self.test_data is None else [self.data, self.test_data]
            geometries = [
                Recordings.read(folder, self.on_bad_row, self.labelled).infer_geometry() for folder in folders
            ]
            if geometries[0] != geometries[-1]:
                raise DataError(
                    f"{folders[0]} and {folders[-1]} have recordings of different lengths, so their EEG is cut "
                    f"differently: {geometries[0]} and {geometries[-1]}. Pass eeg_geometry=EEGGeometry(10, 2, 1) to "
                    "take the 10 s around the labelled moment of both."
                )
            self._eeg_geometry = geometries[0]
        return self._eeg_geometry

    @property
    def attention_axes(self) -> dict[str, TokenAxis]:
        """The windows of each modality in seconds from the labelled moment."""
        return {
            "eeg": TokenAxis("EEG window (s from the labelled moment)", spans=self.eeg_geometry.spans),
            "spec": TokenAxis("Spectrogram window (s from the labelled moment)", spans=spectrogram_spans()),
        }

    def prepare_data(self) -> None:
        """Compute the features where that has not been done; under DDP one process does, the others wait."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Open the features of both folders."""
        self._open(self.data)
        if self.test_data is not None:
            self._open(self.test_data)

    def state_dict(self) -> dict[str, Tensor]:
        """The ids and patients of the training samples, for the checkpoint; `training_data` reads them."""
        rows = [self.recordings.rows[i] for i in self._find_training_rows()]
        ids, patients = zip(*((row.label_id, row.patient_id) for row in rows), strict=True)
        return {TRAINING_IDS: torch.tensor(ids), TRAINING_GROUPS: torch.tensor(patients)}

    def train_dataloader(self) -> DataLoader[HMSBatch]:
        """Return ``data`` but for its two held-out folds, shuffled anew each epoch."""
        return self._make_loader(HMSDataset(self._open(self.data), self._find_training_rows()), shuffle=True)

    def val_dataloader(self) -> DataLoader[HMSBatch]:
        """Return all of ``test_data``, or the validation fold of ``data`` where no ``test_data`` was given."""
        return self._load_fold(self.fold) if self.test_data is None else self._load_folder(self.test_data)

    def test_dataloader(self) -> DataLoader[HMSBatch]:
        """Return all of ``test_data``, or the test fold of ``data`` where no ``test_data`` was given."""
        return self.source_test_dataloader() if self.test_data is None else self._load_folder(self.test_data)

    def source_test_dataloader(self) -> DataLoader[HMSBatch]:
        """Return the test fold of ``data``."""
        return self._load_fold((self.fold + 1) % self.n_folds)

    def _load_fold(self, fold: int) -> DataLoader[HMSBatch]:
        return self._make_loader(HMSDataset(self._open(self.data), np.flatnonzero(self._fold_of_row == fold)))

    def _load_folder(self, folder: Path) -> DataLoader[HMSBatch]:
        features = self._open(folder)
        return self._make_loader(HMSDataset(features, np.arange(len(features))))

    def _make_loader(self, dataset: HMSDataset, shuffle: bool = False) -> DataLoader[HMSBatch]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(self.seed) if shuffle else None,
            collate_fn=keep_batch,
            num_workers=self.num_workers or 0,
            persistent_workers=bool(self.num_workers),
        )

    def _find_training_rows(self) -> NDArray[np.int64]:
        if not self.labelled:
            raise SettingError("labelled=False: the data have no targets to train on. Test, or set labelled=True.")
        held_out = (self.fold, (self.fold + 1) % self.n_folds)
        return np.flatnonzero(~np.isin(self._fold_of_row, held_out))

    @cached_property
    def _fold_of_row(self) -> NDArray[np.int64]:
        return assign_folds(self.recordings.rows, self.n_folds, self.seed)

    def _open(self, folder: Path) -> StoredFeatures:
        if folder not in self._features:
            recordings = Recordings.read(folder, self.on_bad_row, self.labelled)
            self._features[folder] = stored_features(recordings, self.eeg_geometry, self.cache_dir, self.num_workers)
            _report_missing(self._features[folder])
        return self._features[folder]


def assign_folds(rows: Sequence[Recording], n_folds: int, seed: int) -> NDArray[np.int64]:
    r"""Assign each row to a fold: whole patients, stratified by consensus class.

    Patients with the most rows come first (in a seeded random order among equals). Each goes to the fold with the
    smallest :math:`\sum_c f_c p_c / t_c^2`, where :math:`f`, :math:`p` and :math:`t` count the rows of each class in
    the fold so far, of the patient and in total: the greedy step towards equal shares of every class, measured by the
    sum of squared shares. A tie goes to the fold with fewer rows, so that no fold stays empty.

    Returns
    -------
    ``(rows,)`` fold of each row, 0 to ``n_folds - 1``; the same for the same ``seed``.

    Raises
    ------
    DataError
        If there are fewer patients than folds.
    """
    patients, patient_of_row = np.unique([row.patient_id for row in rows], return_inverse=True)
    if len(patients) < n_folds:
        raise DataError(
            f"{n_folds} folds need at least {n_folds} patients, since a patient is never in two folds; "
            f"got {len(patients)} patient(s) in {len(rows)} rows. Take fewer folds or more data."
        )
    counts = np.zeros((len(patients), len(CLASSES)))
    for patient, row in zip(patient_of_row, rows, strict=True):
        counts[patient, row.consensus] += 1
    weights = 1 / np.maximum(counts.sum(axis=0), 1) ** 2

    shuffled = np.random.default_rng(seed).permutation(len(patients))
    order = shuffled[np.argsort(-counts[shuffled].sum(axis=1), kind="stable")]
    filled = np.zeros((n_folds, len(CLASSES)))
    fold_of_patient = np.zeros(len(patients), dtype=np.int64)
    for patient in order:
        crowding = filled @ (weights * counts[patient])
        fold = np.lexsort((filled.sum(axis=1), crowding))[0]
        fold_of_patient[patient] = fold
        filled[fold] += counts[patient]
    return fold_of_patient[patient_of_row]


def _report_missing(features: StoredFeatures) -> None:
    """Print which rows were left out, and how many values were filled."""
    recordings, filled = features.recordings, features.count_filled()
    if recordings.skipped:
        reasons = Counter(bad_row.reason for bad_row in recordings.skipped)
        warn(
            [
                f"Left out {len(recordings.skipped)} of {len(recordings.skipped) + len(recordings)} rows of "
                f"{recordings.root}: {', '.join(f'{count} x {reason}' for reason, count in reasons.items())}. "
                f"The first: {recordings.skipped[0]} All are in the data module's recordings.skipped."
            ]
        )
    parts = [
        f"{values.sum()} missing {what} values in {(values > 0).sum()} of {len(filled)} samples"
        for what, values in zip(("EEG", "spectrogram"), filled.T, strict=True)
        if values.any()
    ]
    if parts:
        info([f"{recordings.root}: filled {' and '.join(parts)}."])
