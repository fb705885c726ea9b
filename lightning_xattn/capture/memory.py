"""Whether two tensors are the same numbers in memory."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.capture.tensor_kinds import unreadable_kind


@dataclass(frozen=True, eq=False)
class Address:
    """Where the numbers of a tensor stand in memory. It does not keep them alive, and knows when they are gone.

    Other tensor objects with the same numbers, such as ``tensor.detach()``, have the same address.
    """

    storage: weakref.ref[torch.UntypedStorage]
    layout: tuple[Any, ...]
    version: int | None
    """How often the numbers had been changed in place; None of an inference tensor, which does not count."""

    @classmethod
    def of(cls, tensor: Tensor) -> Address:
        """The address of a tensor with strides."""
        version = None if tensor.is_inference() else tensor._version
        return cls(weakref.ref(tensor.untyped_storage()), _layout(tensor), version)

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is the address of the tensor, too."""
        return self.storage() is tensor.untyped_storage() and self.layout == _layout(tensor)

    def holds_unchanged(self, tensor: Tensor) -> bool:
        """Whether it is, and surely nothing has changed the numbers in place since."""
        return self.holds(tensor) and self.version is not None and self.version == Address.of(tensor).version


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()


def has_address(tensor: Tensor) -> bool:
    """Whether a tensor has numbers in memory of its own: nested, sparse and fake ones, and those in vmap, have not."""
    if unreadable_kind(tensor) is not None:
        return False
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # as on a device without storages
        return False
    return True


def are_same(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or views of the same numbers."""
    return tensor is other or (has_address(tensor) and has_address(other) and Address.of(tensor).holds(other))
