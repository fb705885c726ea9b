"""Maps of long sequences in bins, so that what is kept of a map does not grow with the sequences."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAP_CELLS = 4096
"""A map of more cells is kept in bins."""

MAP_BINS = 64
"""So many bins at most along each axis."""


def bin_sizes(queries: int, keys: int) -> tuple[int, int]:
    """How many queries and keys a cell of a map is of: one each, or more of a map of more than ``MAP_CELLS`` cells.

    The last bin of an axis may have fewer.

    Examples
    --------
    >>> from lightning_xattn.functional.bins import bin_sizes
    >>> bin_sizes(9, 119), bin_sizes(9, 2048), bin_sizes(4096, 2048)
    ((1, 1), (1, 32), (64, 32))
    """
    if queries * keys <= MAP_CELLS:
        return 1, 1
    return max(1, math.ceil(queries / MAP_BINS)), max(1, math.ceil(keys / MAP_BINS))


def sum_bins(values: Tensor, size: int) -> Tensor:
    """``(..., bins)`` sums of ``(..., tokens)`` over each ``size`` tokens.

    Examples
    --------
    >>> from lightning_xattn.functional.bins import sum_bins
    >>> sum_bins(torch.ones(1, 5), 3)
    tensor([[3., 2.]])
    """
    if size == 1:
        return values
    missing = -values.shape[-1] % size
    by_bin: Tensor = (F.pad(values, (0, missing)) if missing else values).unflatten(-1, (-1, size))
    return by_bin.sum(-1)


def add_rows(sums: Tensor, values: Tensor, first: int, size: int) -> None:
    """Add rows ``(batch, rows, ...)``, of which the first is that of a query, to the bins that they belong to.

    Parameters
    ----------
    sums
        ``(batch, bins, ...)``, changed in place.
    values
        The rows.
    first
        The place of the first query.
    size
        How many queries each bin has.
    """
    places = torch.arange(first, first + values.shape[1], device=values.device) // size
    sums.index_add_(1, places, values)
