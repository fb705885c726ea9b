"""What a module was called with: the tensors among its arguments, their names, and other tensors in their places."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Path = tuple[int | str, ...]
"""The keys that lead to a tensor through dicts, lists and tuples; of a call an argument's position or keyword first."""


@dataclass(frozen=True, eq=False)
class Call:
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __getitem__(self, path: Path) -> Any:
        first, *keys = path
        value = self.args[first] if isinstance(first, int) else self.kwargs[first]
        for key in keys:
            value = value[key]
        return value

    def tensors(self) -> Iterator[tuple[Path, Tensor]]:
        """Every tensor among the arguments, and in their dicts, lists and tuples."""
        yield from find_tensors(self.args)
        yield from find_tensors(self.kwargs)

    def replaced(self, tensors: Mapping[Path, Tensor]) -> Call:
        """The same call with other tensors at some places; what holds them is copied."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for (first, *keys), tensor in tensors.items():
            holder: Any = args if isinstance(first, int) else kwargs
            holder[first] = _replace_tensor(holder[first], keys, tensor)
        return Call(tuple(args), kwargs)

    def copied(self, paths: Mapping[Path, Any] | set[Path]) -> Call:
        """The same call with copies of these tensors, which a module that changes them in place does not reach."""
        return self.replaced({path: self[path].clone() for path in paths})


def find_tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in a value and its dicts, lists and tuples, each with the keys that lead to it.

    Not by ``torch.utils._pytree``: it raises at a class that is registered without its keys, as the outputs of Hugging
    Face's models are, and passes by mappings that are not registered at all.
    """
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (Mapping, tuple, list)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from find_tensors(item, (*path, key))


def _replace_tensor(value: Any, keys: list[int | str], tensor: Tensor) -> Any:
    if not keys:
        return tensor
    key, *others = keys
    if isinstance(value, Mapping):
        return {**value, key: _replace_tensor(value[key], others, tensor)}
    items = list(value)
    items[key] = _replace_tensor(items[key], others, tensor)  # type: ignore[index]  # of a list or tuple it is a number
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def name_argument(module: nn.Module, path: Path) -> str:
    """The name of a tensor among a module's arguments: the parameter's, and the keys that lead to it from there."""
    first, *keys = path
    if isinstance(first, int):
        # A functools.partial, a scripted module and the like may have no signature.
        try:
            names = list(inspect.signature(module.forward).parameters)
        except (TypeError, ValueError):
            names = []
        name = names[first] if first < len(names) else str(first)
    else:
        name = first
    return ".".join([name, *(str(key) for key in keys)])


@dataclass(frozen=True)
class Precision:
    """The autocast in which a module ran."""

    device: str
    dtype: torch.dtype | None
    """None: it was off."""

    @classmethod
    def of(cls, call: Call) -> Precision:
        """The one that is in force, for a call that begins."""
        device = next((tensor.device.type for _, tensor in call.tensors()), "cpu")
        return cls(device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def entered(self) -> torch.autocast:
        """A context manager in which it is in force again."""
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype is not None)
