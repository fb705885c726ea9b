"""Recordings in, batches of graphs out: the `LightningDataModule` of the reference application."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch_geometric.data import Batch

from lightning_xattn.core.attention import TokenAxis
from lightning_xattn.core.errors import DataError, SettingError
from lightning_xattn.core.notices import info, warn
from lightning_xattn.explainer.checkpoint import TRAINING_GROUPS, TRAINING_IDS
from lightning_xattn.hms.build import as_it_is
from lightning_xattn.hms.cache import StoredFeatures, stored_features
from lightning_xattn.hms.features import spectrogram_spans
from lightning_xattn.hms.folds import patient_folds
from lightning_xattn.hms.graphs import EEG_EDGE_INDEX, SPEC_EDGE_INDEX, graph_batches
from lightning_xattn.hms.montage import CLASSES
from lightning_xattn.hms.recordings import EEGGeometry, OnBadRow, Recordings


class HMSBatch(TypedDict):
    """What the loaders yield, for B samples."""

    eeg_graphs: list[Batch]
    """One batch of B graphs for each of the 9 EEG windows: ``x (B * 19, 5)``, ``edge_attr (B * 72, 1)``."""
    spec_graphs: list[Batch]
    """One batch of B graphs for each of the 119 spectrogram windows: ``x (B * 4, 4)``, no ``edge_attr``."""
    targets: Tensor
    """``(B, 6)`` float32, the experts' votes as shares."""
    sample_ids: Tensor
    """``(B,)`` int64, the ``label_id`` of each sample."""
    patient_ids: Tensor
    """``(B,)`` int64; samples of one patient are not independent."""


class HMSDataset(Dataset[HMSBatch]):
    """Some rows of a folder; whole batches are read at once.

    Parameters
    ----------
    features
        The features of the folder.
    indices
        Which of its rows, in this order.
    """

    def __init__(self, features: StoredFeatures, indices: NDArray[np.int64]) -> None:
        self.features = features
        self.indices = indices
        rows = [features.recordings.rows[i] for i in indices]
        self._targets = torch.from_numpy(np.stack([row.soft_label for row in rows]))
        self._sample_ids = torch.tensor([row.label_id for row in rows])
        self._patient_ids = torch.tensor([row.patient_id for row in rows])

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def fingerprint(self) -> str:
        """What is another one when the recordings, their votes, or how they are cut have changed."""
        digest = hashlib.sha256(self.features.folder.name.encode())
        for values in (self._sample_ids, self._patient_ids, self._targets):
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, index: int) -> HMSBatch:
        """Return one sample, as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> HMSBatch:
        """Return a whole batch; this is what PyTorch's loader asks for."""
        arrays = self.features.take(self.indices[indices])
        return {
            "eeg_graphs": graph_batches(arrays["eeg_x"], EEG_EDGE_INDEX, arrays["eeg_edge_attr"]),
            "spec_graphs": graph_batches(arrays["spec_x"], SPEC_EDGE_INDEX),
            "targets": self._targets[indices],
            "sample_ids": self._sample_ids[indices],
            "patient_ids": self._patient_ids[indices],
        }


class HMSDataModule(LightningDataModule):
    """Train, validate and test on recordings in the layout of the HMS competition.

    Patients are divided into ``n_folds`` folds, see `patient_folds`: fold ``fold`` validates, the one after it tests,
    the others train. With ``test_data`` the same folds train, and validation and test take all of ``test_data``;
    ``source_val_dataloader`` and ``source_test_dataloader`` then give ``data``'s own held-out folds.

    Parameters
    ----------
    data
        Folder with ``train.csv``, ``train_eegs/`` and ``train_spectrograms/``; it is only read.
    test_data
        Another such folder to validate and test on.
    batch_size
        Samples in a batch; the last one may have fewer.
    fold, n_folds
        Which fold validates, and of how many (at least 3).
    eeg_geometry
        How the EEG is cut, for both folders; None: told from the recordings' length. Give `IIIC` to take the middle
        10 s of competition recordings together with recordings of 10 s.
    cache_dir
        Where features are kept; None: `default_cache_dir`.
    on_bad_row
        ``"raise"``: a row that cannot be used is an error. ``"skip"``: it is left out, counted in
        ``recordings.skipped``, and one warning says how many and why.
    num_workers
        Processes that compute features, where that has not been done, and that load batches, at least 0. None: features
        in one process for each core, and batches in the main process, as loading one takes a few milliseconds.
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

    # The settings are not saved as hyperparameters: paths and geometry would keep a checkpoint from loading with
    # weights_only=True, and say nothing about the model.

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
        self.batch_size = batch_size
        self.fold = fold
        self.n_folds = n_folds
        self.cache_dir = cache_dir
        self.on_bad_row: OnBadRow = on_bad_row
        self.num_workers = num_workers
        self.seed = seed
        self._eeg_geometry = eeg_geometry
        self._features: dict[Path, StoredFeatures] = {}
        self._folds: NDArray[np.int64] | None = None

    def __repr__(self) -> str:
        tested = "" if self.test_data is None else f", test_data='{self.test_data}'"
        return f"HMSDataModule('{self.data}'{tested}, batch_size={self.batch_size}, fold={self.fold} of {self.n_folds})"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The six classes; the index is the column of ``targets``."""
        return CLASSES

    @property
    def recordings(self) -> Recordings:
        """The usable rows of ``data``; its ``by_label_id`` finds a batch's ``sample_ids``."""
        return self._load(self.data).recordings

    @property
    def test_recordings(self) -> Recordings:
        """The usable rows of ``test_data``, or of ``data`` where no ``test_data`` was given."""
        return self._load(self.test_data or self.data).recordings

    @property
    def eeg_geometry(self) -> EEGGeometry:
        """How the EEG is cut, as given or told from the recordings' length.

        Raises
        ------
        DataError
            If it has to be told and cannot be, or ``data`` and ``test_data`` differ.
        """
        if self._eeg_geometry is None:
            folders = [self.data] if self.test_data is None else [self.data, self.test_data]
            geometries = [Recordings.read(folder, self.on_bad_row).infer_geometry() for folder in folders]
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
        """What the tokens of each modality are: windows, in seconds from the labelled moment."""
        return {
            "eeg": TokenAxis("EEG window (s from the labelled moment)", spans=self.eeg_geometry.spans),
            "spec": TokenAxis("Spectrogram window (s from the labelled moment)", spans=spectrogram_spans()),
        }

    def prepare_data(self) -> None:
        """Compute the features where that has not been done; under DDP one process does, the others wait."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Open the features of both folders and divide the patients."""
        self._load(self.data)
        if self.test_data is not None:
            self._load(self.test_data)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint says of the training samples: their ids and patients, see `training_data`."""
        rows = [self.recordings.rows[i] for i in self._training_indices()]
        ids, patients = zip(*((row.label_id, row.patient_id) for row in rows), strict=True)
        return {TRAINING_IDS: torch.tensor(ids), TRAINING_GROUPS: torch.tensor(patients)}

    def train_dataloader(self) -> DataLoader[HMSBatch]:
        """Return ``data`` but for its two held-out folds, shuffled anew each epoch."""
        return self._loader(HMSDataset(self._load(self.data), self._training_indices()), shuffle=True)

    def val_dataloader(self) -> DataLoader[HMSBatch]:
        """Return all of ``test_data``, or the validation fold of ``data`` where no ``test_data`` was given."""
        return self.source_val_dataloader() if self.test_data is None else self._whole(self.test_data)

    def test_dataloader(self) -> DataLoader[HMSBatch]:
        """Return all of ``test_data``, or the test fold of ``data`` where no ``test_data`` was given."""
        return self.source_test_dataloader() if self.test_data is None else self._whole(self.test_data)

    def source_val_dataloader(self) -> DataLoader[HMSBatch]:
        """Return the validation fold of ``data``."""
        return self._held_out(self.fold)

    def source_test_dataloader(self) -> DataLoader[HMSBatch]:
        """Return the test fold of ``data``."""
        return self._held_out((self.fold + 1) % self.n_folds)

    def _held_out(self, fold: int) -> DataLoader[HMSBatch]:
        dataset = HMSDataset(self._load(self.data), np.flatnonzero(self._fold_of_row() == fold))
        return self._loader(dataset, shuffle=False)

    def _whole(self, folder: Path) -> DataLoader[HMSBatch]:
        features = self._load(folder)
        return self._loader(HMSDataset(features, np.arange(len(features))), shuffle=False)

    def _loader(self, dataset: HMSDataset, shuffle: bool) -> DataLoader[HMSBatch]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(self.seed) if shuffle else None,
            collate_fn=as_it_is,
            num_workers=self.num_workers or 0,
            persistent_workers=bool(self.num_workers),
        )

    def _training_indices(self) -> NDArray[np.int64]:
        held_out = (self.fold, (self.fold + 1) % self.n_folds)
        return np.flatnonzero(~np.isin(self._fold_of_row(), held_out))

    def _fold_of_row(self) -> NDArray[np.int64]:
        if self._folds is None:
            self._folds = patient_folds(self.recordings.rows, self.n_folds, self.seed)
        return self._folds

    def _load(self, folder: Path) -> StoredFeatures:
        if folder not in self._features:
            recordings = Recordings.read(folder, self.on_bad_row)
            features = stored_features(recordings, self.eeg_geometry, self.cache_dir, self.num_workers)
            _info(features)
            self._features[folder] = features
        return self._features[folder]


def _info(features: StoredFeatures) -> None:
    """Say once what was left out and what was filled."""
    recordings, filled = features.recordings, features.filled
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
