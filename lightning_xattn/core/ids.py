"""Ids that come from data: as numbers to compare, and as text that identifies."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.core.errors import ShapeError
from lightning_xattn.core.names import plain_id, raw_text, valid

UNKNOWN_GROUP = -(2**63)
"""The key of samples whose group is not known. For intervals they are one group, as they may all be of one."""


LARGEST = 2**63 - 1
"""The largest int64, above every hash of `hashed`."""


def is_unknown(one: Any) -> bool:
    """Whether an id stands for no id: None, NaN, and what pandas writes for them."""
    if one is None or type(one).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(one, float) and math.isnan(one)


def id_text(one: Any) -> str | None:
    r"""An id as text that identifies it, and that every file takes.

    Parameters
    ----------
    one
        A string, a number, a tensor or an array of one, or any object that its text identifies.

    Returns
    -------
    str or None
        As ``str`` writes it, whole. Only a half of a surrogate pair, which UTF-8 does not have, is written ``\ud800``.
        None where there is no id, see ``is_unknown``.
    """
    one = plain_id(one)
    return None if is_unknown(one) else valid(raw_text(one))


def group_keys(ids: Tensor | Sequence[Any], device: torch.device | str) -> Tensor:
    """A number for each sample's group: the same for the same id, in every batch, process and run.

    Parameters
    ----------
    ids
        ``(batch,)`` or ``(batch, 1)`` numbers, or a sequence of numbers and strings; None and NaN: not known.
    device
        Where the numbers should be. A tensor that is there already is not copied, to avoid a device sync.

    Returns
    -------
    Tensor
        ``(batch,)`` int64: a whole number is its own key, any other id has a hash.

    Raises
    ------
    ShapeError
        If a tensor has more than one number a sample.
    """
    if not isinstance(ids, Tensor):
        return torch.tensor([_key(one) for one in ids], dtype=torch.int64, device=device)
    if ids.numel() != len(ids):
        raise ShapeError(f"Expected one group a sample; got a tensor of shape {tuple(ids.shape)}.")
    values = ids.detach().reshape(-1).to(device, non_blocking=True)
    if not values.is_floating_point():
        return values.long()
    # Bits differ from number to number and are read without a device sync; -0.0 is 0.0.
    bits = (values.double() + 0.0).view(torch.int64)
    return torch.where(values.isnan(), UNKNOWN_GROUP, bits)


def _key(one: Any) -> int:
    try:
        one = plain_id(one)
    except (RuntimeError, ValueError):  # torch's and numpy's, for more than one number
        raise ShapeError(f"Expected one group a sample; got {one!r}.") from None
    if is_unknown(one):
        return UNKNOWN_GROUP
    if isinstance(one, float):
        packed = struct.pack("<d", one + 0.0)
    elif isinstance(one, int) and abs(one) < 2**63:
        return int(one)
    else:
        packed = hashlib.blake2b(raw_text(one).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(packed, "little", signed=True)


def hashed(keys: Tensor, salt: int) -> Tensor:
    """Hashes of whole numbers, evenly spread over [0, 2^63 - 1) (splitmix64).

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
    return (x & LARGEST).clamp_max(LARGEST - 1)


def _signed(number: int) -> int:
    """The int64 with the same last 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, places: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (x >> places) & ((1 << (64 - places)) - 1)
