"""Tensors by memory and kind: whether two hold the same numbers, and whether values can be read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PLAIN_FUNCTIONS = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)  # type: ignore[attr-defined]  # mypy takes the bound method for a function


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's numbers are its values, and can be read."""
    return unreadable_kind(tensor) is None and not has_own_functions(tensor)


def has_own_functions(tensor: Tensor) -> bool:
    """Whether the tensor's class gives torch's functions another meaning."""
    function = type(tensor).__torch_function__
    return getattr(function, "__func__", function) not in _PLAIN_FUNCTIONS


def unreadable_kind(tensor: Tensor) -> str | None:
    """What kind a tensor is of that holds no numbers of its own; None: it holds some."""
    with torch._C.DisableTorchFunctionSubclass():  # a class may allow few functions, and what is asked here is one, too
        return _unreadable_kind(tensor)


def _unreadable_kind(tensor: Tensor) -> str | None:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "a tensor inside of torch.vmap or another transform of torch.func"
    if tensor.is_nested:
        return f"a nested tensor ({tensor.layout})"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}"
    if tensor.is_quantized or tensor.is_meta:
        return f"a tensor of {tensor.dtype} on device {tensor.device}"
    kind = type(tensor)
    # What processes share is read as its dispatch gives it.
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not kind.__module__.startswith("torch.distributed"):
        return f"a {kind.__name__}"
    return None


def describe_kind(tensor: Tensor) -> str:
    """What kind a tensor is of, for a message."""
    return unreadable_kind(tensor) or f"a {type(tensor).__name__}"


def to_plain_tensor(tensor: Tensor) -> Tensor:
    """The numbers of what a function has given, detached and without the class around them.

    Raises
    ------
    TypeError
        If it holds none.
    """
    kind = unreadable_kind(tensor)
    if kind is not None:
        raise TypeError(f"it gives {kind}")
    return tensor.detach().as_subclass(Tensor)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor; of a nested one that which holds all of its parts."""
    if not tensor.is_nested:
        return tuple(tensor.shape)
    parts = [tuple(part.shape) for part in tensor.unbind()]
    return len(parts), *(max(sizes) for sizes in zip(*parts, strict=True))


def pop_modes() -> list[Any]:
    """The modes that are on, innermost last; they are off afterwards."""
    return [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())][::-1]


def push_modes(modes: Iterable[Any]) -> None:
    """Turn modes on, innermost last."""
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


@contextmanager
def only_modes(keep: Callable[[Any], bool] = lambda mode: False) -> Iterator[None]:
    """Inside of it these modes alone are on; none by default."""
    modes = pop_modes()
    push_modes(filter(keep, modes))
    try:
        yield
    finally:
        pop_modes()
        push_modes(modes)


@contextmanager
def run_as_called() -> Iterator[None]:
    """Inside of it the functions of subclasses are in force, and no mode is on."""
    with only_modes(), torch._C._EnableTorchFunction():
        yield


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
