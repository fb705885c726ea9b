"""A sample of fixed size, chosen by the smallest hashes: the same whatever the order, the batches and the processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

NOT_KEPT = 2**63 - 1
"""The hash of rows that must not be kept."""

Columns = dict[str, Tensor]
"""Columns by name, each with one row per sample; one of them is "hash"."""


def hashed(keys: Tensor, salt: int) -> Tensor:
    """Give hashes of whole numbers, evenly spread over [0, 2^63 - 1) (splitmix64).

    Parameters
    ----------
    keys
        Any shape, int64.
    salt
        Another salt gives unrelated hashes.
    """
    x = keys + _signed((salt + 1) * 0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    x = x ^ _shifted(x, 31)
    return (x & NOT_KEPT).clamp_max(NOT_KEPT - 1)


def _signed(number: int) -> int:
    """The int64 with the same last 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, places: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> places) & ((1 << (64 - places)) - 1)


class BottomKSample:
    """The rows with the smallest hashes.

    Rows stay on their device. Where all rows have the same shapes, ``add`` never waits for a GPU; else it waits once
    per ``size`` rows.

    Parameters
    ----------
    size
        How many rows are kept at most. May become smaller later.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._blocks: dict[tuple[tuple[str, torch.Size], ...], list[Columns]] = {}

    def __len__(self) -> int:
        return sum(len(rows["hash"]) for several in self._blocks.values() for rows in several)

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Add rows; the shape of a row may differ from that of earlier ones."""
        shapes = tuple((name, values.shape[1:]) for name, values in rows.items())
        self._blocks.setdefault(shapes, []).append(dict(rows))
        if len(self) >= 2 * self.size:
            self._drop_largest_hashes()

    def __add__(self, other: BottomKSample) -> BottomKSample:
        """Give the sample of the rows of both, as of two processes."""
        both = BottomKSample(min(self.size, other.size))
        for rows in (*self.blocks(), *other.blocks()):
            both.add(rows)
        return both

    def blocks(self) -> list[Columns]:
        """Give the kept rows in the order of their hashes, one block for each set of shapes. Waits for a GPU."""
        self._drop_largest_hashes()
        kept = []
        for (rows,) in self._blocks.values():
            wanted = rows["hash"] != NOT_KEPT
            kept.append({name: values[wanted] for name, values in rows.items()})
        return kept

    def map(self, change: Callable[[Columns], Columns]) -> BottomKSample:
        """Give a sample with other columns of the same rows."""
        changed = BottomKSample(self.size)
        for rows in self.blocks():
            changed.add(change(rows))
        return changed

    def cpu(self) -> BottomKSample:
        """Give the same on the CPU."""
        return self.map(lambda rows: {name: values.cpu() for name, values in rows.items()})

    def _drop_largest_hashes(self) -> None:
        joined = {
            shapes: {name: torch.cat([rows[name] for rows in several]) for name in several[0]}
            for shapes, several in self._blocks.items()
        }
        if not joined:
            return
        lengths = [len(rows["hash"]) for rows in joined.values()]
        ranks = torch.cat([rows["hash"] for rows in joined.values()]).argsort(stable=True).argsort().split(lengths)
        for (shapes, rows), of_block in zip(joined.items(), ranks, strict=True):
            # Only where there are several shapes, how many rows of one are kept depends on the hashes.
            count = self.size if len(joined) == 1 else int((of_block < self.size).sum())
            order = rows["hash"].argsort(stable=True)[:count]
            self._blocks[shapes] = [{name: values[order] for name, values in rows.items()}]
