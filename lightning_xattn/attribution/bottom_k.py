"""At most so many samples of an evaluation, the same ones whatever the order and the processes in which they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

NOT_KEPT = 2**63 - 1
"""The hash of samples that are not to be kept."""

Columns = dict[str, Tensor]
"""Columns by name, each with a row a sample; "hash" is one of them."""


def hashed(keys: Tensor, salt: int) -> Tensor:
    """Mix whole numbers into others, evenly spread over [0, 2^63 - 1) and unrelated for another salt (splitmix64).

    Parameters
    ----------
    keys
        Any shape, int64.
    salt
        Which of many hashes.
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
    """The samples with the smallest hashes.

    Columns wait where they are until there are enough, so that no GPU has to say which are kept.

    Parameters
    ----------
    size
        How many are kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._parts: list[Columns] = []

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Add samples; those whose hash is ``NOT_KEPT`` are let go."""
        self._parts.append(dict(rows))
        if sum(len(part["hash"]) for part in self._parts) >= 2 * self._size:
            self._parts = [smallest(self._parts, self._size)]

    def __len__(self) -> int:
        return sum(len(part["hash"]) for part in self._parts)

    def hashes(self) -> Tensor:
        """``(samples,)`` of those that are there."""
        return torch.cat([part["hash"] for part in self._parts])

    def keep_to(self, last: Tensor) -> None:
        """Let go of samples with a larger hash than this. A GPU waits for it."""
        rows = smallest(self._parts, self._size)
        kept = rows["hash"] <= last
        self._parts = [{name: values[kept] for name, values in rows.items()}]

    def snapshot(self, device: torch.device | str | None = None) -> BottomKSample:
        """What there is so far, there or on another device; adding more leaves it as it is."""
        other = BottomKSample(self._size)
        other._parts = [{name: values.to(device) for name, values in part.items()} for part in self._parts]
        return other

    def settled(self) -> Columns | None:
        """The samples in the order of their hashes; None before any came. A GPU waits for it."""
        if not self._parts:
            return None
        rows = smallest(self._parts, self._size)
        kept = rows["hash"] != NOT_KEPT
        return {name: values[kept] for name, values in rows.items()}


def smallest(parts: Sequence[Mapping[str, Tensor]], size: int) -> Columns:
    """The rows with the smallest hashes, in their order."""
    hashes = torch.cat([part["hash"] for part in parts])
    order = hashes.argsort(stable=True)[:size]
    return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
