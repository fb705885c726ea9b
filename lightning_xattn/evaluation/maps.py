"""The attention maps of single samples, of as many as a page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from lightning_xattn.attribution.bottom_k import BottomKSample, Columns, hashed, smallest
from lightning_xattn.attribution.kept_samples import CHOSEN, IDENTITY
from lightning_xattn.functional import Rows, lift_map

CELLS = 2**20
"""So many cells are kept, of all directions together (2 MiB): 489 samples of 9 and 119 tokens."""

_PREFIX = "map/"

MapsBySample = dict[tuple[int, int], dict[str, Tensor]]
"""By ``IDENTITY`` (process, number) and direction the lift over uniform, ``(queries, keys)``, averaged over the heads;
NaN where it is undefined."""


class SampleMaps:
    """Keeps a layer's maps of single samples, batch after batch.

    Hashes decide which ones are kept, so neither the order of the samples nor the number of processes matters. Samples
    with other numbers of tokens than the first ones have none.
    """

    def __init__(self) -> None:
        self._pool: BottomKSample | None = None
        self._shapes: dict[str, torch.Size] = {}

    def snapshot(self, device: torch.device | str | None = None) -> SampleMaps:
        """What there is so far, there or on another device; adding more leaves it as it is."""
        other = copy(self)
        other._pool = None if self._pool is None else self._pool.snapshot(device)
        return other

    def add(self, rows: Sequence[Rows], keys: Tensor, identity: Mapping[str, Tensor]) -> None:
        """Add a batch.

        Parameters
        ----------
        rows
            The directions of the layer.
        keys
            ``(batch,)`` int64, what tells a sample from all others in every run.
        identity
            The columns ``IDENTITY``, ``(batch,)`` each.
        """
        maps = {f"{_PREFIX}{one.direction}": lift_map(one).to(torch.float16) for one in rows}
        self.load({"hash": hashed(keys, CHOSEN), **{name: identity[name] for name in IDENTITY}, **maps})

    def load(self, columns: Columns) -> None:
        """Add what `part` gave."""
        shapes = _shapes_of(columns)
        if self._pool is None:
            self._shapes, self._pool = shapes, BottomKSample(_most(shapes))
        if shapes == self._shapes:
            self._pool.add(columns)

    def part(self) -> Columns | None:
        """What there is so far, on the CPU: "hash", ``IDENTITY`` and maps by direction; None without any sample."""
        rows = None if self._pool is None else self._pool.settled()
        return None if rows is None else {name: values.cpu() for name, values in rows.items()}


def merge_maps(parts: Sequence[Columns]) -> MapsBySample:
    """Those of several processes: the ones that one process would have kept."""
    alike = [part for part in parts if _shapes_of(part) == _shapes_of(parts[0])]
    if not alike:
        return {}
    rows = smallest(alike, _most(_shapes_of(alike[0])))
    maps = {name.removeprefix(_PREFIX): values for name, values in rows.items() if name.startswith(_PREFIX)}
    identities = zip(*(rows[name].tolist() for name in IDENTITY), strict=True)
    return {
        (process, number): {direction: values[i] for direction, values in maps.items()}
        for i, (process, number) in enumerate(identities)
    }


def _shapes_of(columns: Columns) -> dict[str, torch.Size]:
    return {name: values.shape[1:] for name, values in columns.items() if name.startswith(_PREFIX)}


def _most(shapes: Mapping[str, torch.Size]) -> int:
    """How many samples with maps of these shapes are kept, at most."""
    return max(CELLS // sum(map(math.prod, shapes.values())), 1)
