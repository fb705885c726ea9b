"""Features of recordings as a data set of PyG batches, one for each window."""

from __future__ import annotations

import copy
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torch_geometric.data import Batch, Data

from lightning_xattn.hms.cache import StoredFeatures
from lightning_xattn.hms.montage import EEG_EDGES, SPEC_EDGES


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
    """The rows at some ``indices`` of a folder's features, in this order; whole batches are read at once."""

    def __init__(self, features: StoredFeatures, indices: NDArray[np.int64]) -> None:
        self.features = features
        self.indices = indices
        rows = [features.recordings.rows[i] for i in indices]
        self._targets = torch.from_numpy(np.stack([row.soft_label for row in rows]))
        self._sample_ids = torch.tensor([row.label_id for row in rows])
        self._patient_ids = torch.tensor([row.patient_id for row in rows])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> HMSBatch:
        """Return one sample, as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> HMSBatch:
        """Return a whole batch; this is what PyTorch's loader asks for."""
        arrays = self.features.read(self.indices[indices])
        return {
            "eeg_graphs": graph_batches(arrays["eeg_x"], EEG_EDGE_INDEX, arrays["eeg_edge_attr"]),
            "spec_graphs": graph_batches(arrays["spec_x"], SPEC_EDGE_INDEX),
            "targets": self._targets[indices],
            "sample_ids": self._sample_ids[indices],
            "patient_ids": self._patient_ids[indices],
        }


EEG_EDGE_INDEX, SPEC_EDGE_INDEX = (torch.tensor(edges).T.contiguous() for edges in (EEG_EDGES, SPEC_EDGES))
"""``(source, target)`` of each edge as PyG takes them, ``(2, edges)`` int64."""


def graph_batches(
    x: NDArray[np.float32], edge_index: Tensor, edge_attr: NDArray[np.float32] | None = None
) -> list[Batch]:
    """Make one `Batch` for each window, holding that window's graph of every sample.

    Each equals what ``Batch.from_data_list`` makes of the same graphs, in a fraction of the time: PyG batches the
    topology once, and each window is a copy of that template with features of its own. All windows of a call therefore
    share one ``edge_index``, ``batch`` and ``ptr`` tensor, and their ``x`` and ``edge_attr`` are views of one tensor
    each: treat them as read-only.

    Takes ``x (batch, windows, nodes, features)``, ``edge_index (2, edges)`` of every graph, and ``edge_attr (batch,
    windows, edges, attributes)``, where edges have attributes.
    """
    arrays = {"x": x} if edge_attr is None else {"x": x, "edge_attr": edge_attr}
    first = {name: torch.from_numpy(values[0, 0]) for name, values in arrays.items()}
    template = Batch.from_data_list([Data(edge_index=edge_index, **first)] * x.shape[0])
    windows = [copy.copy(template) for _ in range(x.shape[1])]
    for name, values in arrays.items():
        # Copied by numpy: PyTorch would use all its threads, and waiting for them takes longer than the copy.
        by_window = np.ascontiguousarray(values.swapaxes(0, 1)).reshape(len(windows), -1, values.shape[-1])
        for window, features in zip(windows, torch.from_numpy(by_window), strict=True):
            window[name] = features
    return windows


def keep_batch(batch: Any) -> Any:
    """Return a loaded batch as it is: `HMSDataset` reads whole batches, so there is nothing to collate."""
    return batch
