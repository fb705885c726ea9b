"""The tensors among a module's arguments: which there are, and how to put others in their places."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Path = tuple[int | str, ...]
"""An argument's position or keyword, and the keys that lead from there to a tensor in a dict, list or tuple."""


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
        for i, value in enumerate(self.args):
            yield from _tensors((i,), value)
        for name, value in self.kwargs.items():
            yield from _tensors((name,), value)

    def replaced(self, tensors: Mapping[Path, Tensor]) -> Call:
        """The same call with other tensors at some places; what holds them is copied."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for (first, *keys), tensor in tensors.items():
            holder: Any = args if isinstance(first, int) else kwargs
            holder[first] = _put(holder[first], keys, tensor)
        return Call(tuple(args), kwargs)

    def copied(self, paths: Mapping[Path, Any] | set[Path]) -> Call:
        """The same call with copies of these tensors, which a module that changes them in place does not reach."""
        return self.replaced({path: self[path].clone() for path in paths})


def label_of(module: nn.Module, path: Path) -> str:
    """What a tensor among a module's arguments is called: the parameter's name, and the last key where there is one."""
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


def _tensors(path: Path, value: Any) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors((*path, key), item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _tensors((*path, i), item)


def _put(value: Any, keys: list[int | str], tensor: Tensor) -> Any:
    if not keys:
        return tensor
    key, *others = keys
    if isinstance(value, Mapping):
        return {**value, key: _put(value[key], others, tensor)}
    items = list(value)
    items[key] = _put(items[key], others, tensor)  # type: ignore[index]  # of a list or tuple it is a number
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
