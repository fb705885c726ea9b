"""The attention maps of single samples: of as many as a report's page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, float16

from lightning_xattn.attribution.kept_samples import CHOSEN, IDENTITY, BottomKSample
from lightning_xattn.core.ids import hashed
from lightning_xattn.functional import Rows, lift_map
from lightning_xattn.functional.bins import add_rows

CELLS = 2**20
"""At most this many cells are kept, of all directions together (2 MiB): 489 samples of 9 and 119 tokens."""

_PREFIX = "map/"

MapsBySample = dict[tuple[int, int], dict[str, Tensor]]
"""By ``IDENTITY`` (process, number) and direction: the lift over uniform attention, ``(queries, keys)``, averaged over
the heads; NaN where it is undefined. Long sequences are in the bins of ``Rows``."""


def add_maps(sample: BottomKSample, rows: Sequence[Rows], keys: Tensor, identity: Mapping[str, Tensor]) -> None:
    """Add the maps of a batch to a sample, whose size shrinks to what ``CELLS`` leave for the largest maps so far.

    Parameters
    ----------
    sample
        Of ``CELLS`` rows when it is new.
    rows
        The directions of the first layer.
    keys
        ``(batch,)`` int64 key of each sample, as of ``KeptSamples.add``.
    identity
        The columns ``IDENTITY``, ``(batch,)`` each.
    """
    maps = {f"{_PREFIX}{one.direction}": kept_lift_map(one).to(float16) for one in rows}
    cells = sum(of_direction[0].numel() for of_direction in maps.values())
    sample.size = min(sample.size, max(CELLS // cells, 1))
    sample.add({"hash": hashed(keys, CHOSEN), **{name: identity[name] for name in IDENTITY}, **maps})


def kept_lift_map(rows: Rows) -> Tensor:
    """``lift_map``, ``(batch, queries, keys)``; of long sequences in the bins of ``rows``.

    There it is the mean weight of a bin's cells times the mean number of keys of its queries.
    """
    if rows.bin_sizes == (1, 1):
        return lift_map(rows)
    by_query, _ = rows.bin_sizes
    batch, bins, _ = rows.map_weights.shape
    keys = rows.keys.mean(1).expand(batch, rows.valid.shape[2]).contiguous()
    sums, counts = keys.new_zeros(batch, bins), keys.new_zeros(batch, bins)
    for into, values in ((sums, keys), (counts, torch.ones_like(keys))):
        add_rows(into, values, 0, by_query)
    return rows.map_weights / rows.map_heads * (sums / counts)[..., None]


def maps_by_sample(sample: BottomKSample) -> MapsBySample:
    """The maps that a sample holds."""
    found: MapsBySample = {}
    for rows in sample.blocks():
        identities = zip(*(rows[name].tolist() for name in IDENTITY), strict=True)
        for i, (process, number) in enumerate(identities):
            found[process, number] = {
                name.removeprefix(_PREFIX): values[i] for name, values in rows.items() if name.startswith(_PREFIX)
            }
    return found
