"""PyG batches of graphs that all have one topology, built from arrays."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import Batch, Data

from lightning_xattn.core.errors import DataError
from lightning_xattn.hms.montage import EEG_EDGES, SPEC_EDGES


def edge_index(edges: tuple[tuple[int, int], ...]) -> Tensor:
    """Return ``(source, target)`` pairs as PyG's ``(2, edges)`` int64."""
    return torch.tensor(edges, dtype=torch.long).T.contiguous()


EEG_EDGE_INDEX = edge_index(EEG_EDGES)
SPEC_EDGE_INDEX = edge_index(SPEC_EDGES)


def graph_batches(
    x: NDArray[np.float32], edge_index: Tensor, edge_attr: NDArray[np.float32] | None = None
) -> list[Batch]:
    """Make one `Batch` for each window, holding that window's graph of every sample.

    Each is what ``Batch.from_data_list`` makes of the same graphs, with everything that goes with it (``g[0]``,
    ``g[[0]]``, ``g.to_data_list()``, ``g.to(device)``, pickling), at a fraction of the time: PyG itself batches the
    topology once, and each window is a copy of that template with features of its own.

    All windows therefore share one ``edge_index``, ``batch`` and ``ptr`` tensor, and their ``x`` and ``edge_attr``
    are views of one tensor each: treat them as read-only, as any batch that several callers see. Nothing is shared
    from one call to the next.

    Parameters
    ----------
    x
        ``(batch, windows, nodes, features)`` node features.
    edge_index
        ``(2, edges)`` int64, the topology of every graph.
    edge_attr
        ``(batch, windows, edges, attributes)``; None: the graphs have none.

    Returns
    -------
    ``windows`` batches of ``batch`` graphs.

    Raises
    ------
    DataError
        If ``x`` or ``edge_attr`` does not have these four axes, or they do not fit each other.
    """
    edges = edge_index.shape[1]
    if x.ndim != 4 or not x.shape[0]:
        raise DataError(f"x must be (batch, windows, nodes, features), batch > 0; got shape {x.shape}.")
    if edge_attr is not None and (edge_attr.ndim != 4 or edge_attr.shape[:3] != (*x.shape[:2], edges)):
        raise DataError(
            f"edge_attr must be (batch={x.shape[0]}, windows={x.shape[1]}, edges={edges}, attributes) to go with x "
            f"of shape {x.shape}; got shape {edge_attr.shape}."
        )
    arrays = {"x": x} if edge_attr is None else {"x": x, "edge_attr": edge_attr}
    first = {name: torch.from_numpy(values[0, 0]) for name, values in arrays.items()}
    template = Batch.from_data_list([Data(edge_index=edge_index, **first)] * x.shape[0])
    windows = [copy.copy(template) for _ in range(x.shape[1])]
    for name, values in arrays.items():
        for window, of_window in zip(windows, _by_window(values), strict=True):
            window[name] = of_window
    return windows


def _by_window(values: NDArray[np.float32]) -> tuple[Tensor, ...]:
    """Turn ``(batch, windows, items, attributes)`` into a ``(batch * items, attributes)`` for each window."""
    # Copied by numpy: PyTorch would use all its threads, and waiting for them takes longer than the copy.
    by_window = np.ascontiguousarray(values.swapaxes(0, 1))
    return torch.from_numpy(by_window.reshape(len(by_window), -1, values.shape[-1])).unbind(0)
