"""What a function was called with: its tensors and other leaves, their names, and others in their places."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

Path = tuple[int | str, ...]
"""The keys that lead to a value through dicts, lists, tuples and dataclasses; of a call an argument's position or
keyword first."""


@dataclass(frozen=True, eq=False)
class Call:
    """What a function was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __getitem__(self, path: Path) -> Any:
        first, *keys = path
        value = self.args[first] if isinstance(first, int) else self.kwargs[first]
        for key in keys:
            value = get_item(value, key)
        return value

    def tensors(self) -> Iterator[tuple[Path, Tensor]]:
        """Every tensor among the arguments, and in their dicts, lists, tuples and dataclasses."""
        yield from find_tensors(self.args)
        yield from find_tensors(self.kwargs)

    def leaves(self) -> Iterator[tuple[Path, Any]]:
        """Every tensor, array, list of plain values and other object among the arguments."""
        yield from find_leaves(self.args)
        yield from find_leaves(self.kwargs)

    def replaced(self, values: Mapping[Path, Any]) -> Call:
        """The same call with other values at some places; what holds them is copied."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for (first, *keys), value in values.items():
            holder: Any = args if isinstance(first, int) else kwargs
            holder[first] = replace_item(holder[first], keys, value)
        return Call(tuple(args), kwargs)

    def copied(self, paths: Mapping[Path, Any] | set[Path]) -> Call:
        """The same call with copies of these tensors, which a module that changes them in place does not reach."""
        copies: dict[int, Tensor] = {}
        for path in paths:
            one = self[path]
            if id(one) not in copies:
                copies[id(one)] = one.clone()
        return self.replaced({path: copies[id(self[path])] for path in paths})


def get_item(value: Any, key: int | str) -> Any:
    """What a container or a dataclass has under a key."""
    if isinstance(value, Mapping) or not isinstance(key, str):
        return value[key]
    return getattr(value, key)


def _items(value: Any) -> Iterator[tuple[int | str, Any]]:
    """What a container holds, by keys; nothing of anything else."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (tuple, list)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


def find_tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in a value and its dicts, lists, tuples and dataclasses, each with the keys that lead to it.

    Not by ``torch.utils._pytree``: it raises at a class that is registered without its keys, as the outputs of Hugging
    Face's models are, and passes by mappings that are not registered at all.
    """
    if isinstance(value, Tensor):
        yield path, value
    else:
        for key, item in _items(value):
            yield from find_tensors(item, (*path, key))


def find_leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every tensor, array, list of plain values and other object in a value; no numbers, strings and None.

    A list that holds no container and no tensor is one leaf, as are ragged lists of tensors of different lengths.
    """
    if value is None or isinstance(value, (str, bytes, bool, int, float)):
        return
    if isinstance(value, (list, tuple)) and value and _is_one_leaf(value):
        yield path, value
        return
    items = list(_items(value))
    if not items and not isinstance(value, (Mapping, list, tuple)):
        yield path, value
    for key, item in items:
        yield from find_leaves(item, (*path, key))


def _is_one_leaf(items: Any) -> bool:
    plain = all(isinstance(item, (str, int, float, np.number)) for item in items)
    lists = all(isinstance(item, list) and _is_plain(item) for item in items)
    tensors = all(isinstance(item, Tensor) for item in items)
    ragged = len(items) > 2 and tensors and len({tuple(item.shape) for item in items}) > 1
    ragged = ragged and len({item.dim() for item in items}) == 1 and len({item.shape[1:] for item in items}) == 1
    return plain or lists or ragged


def _is_plain(items: Any) -> bool:
    return all(isinstance(item, (str, int, float)) for item in items)


def samples_axis(leaf: Any, samples: int) -> int | None:
    """Which axis of a leaf is that of the samples: the first of that length; None if none is."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return next((axis for axis, length in enumerate(leaf.shape) if length == samples), None)
    return 0 if isinstance(leaf, (list, tuple)) and len(leaf) == samples else None


def take_samples(leaf: Any, axis: int, rows: Tensor) -> Any:
    """Some of a leaf's samples, in any order."""
    if isinstance(leaf, Tensor):
        return leaf.index_select(axis, rows.to(leaf.device))
    if isinstance(leaf, np.ndarray):
        return leaf.take(rows.cpu().numpy(), axis)
    return type(leaf)([leaf[int(row)] for row in rows])


def replace_item(value: Any, keys: list[int | str] | Path, new: Any) -> Any:
    """A copy of a container with another value under these keys."""
    if not keys:
        return new
    key, *others = keys
    item = replace_item(get_item(value, key), others, new)
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
        changed[key] = item
        return changed
    if dataclasses.is_dataclass(value):
        changed = copy.copy(value)
        object.__setattr__(changed, str(key), item)
        return changed
    items = list(value)
    items[key] = item  # type: ignore[index]  # of a list or tuple it is a number
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def copy_tensors(value: Any) -> Any:
    """The same with copies of all tensors, which what changes them in place does not reach."""
    for path, tensor in list(find_tensors(value)):
        value = replace_item(value, path, tensor.clone())
    return value


def name_argument(function: Any, path: Path) -> str:
    """The name of a value among a function's arguments: the parameter's, and the keys that lead to it from there.

    Parameters
    ----------
    function
        A module, whose ``forward`` is meant, or a function.
    """
    first, *keys = path
    if isinstance(first, int):
        names = _parameter_names(getattr(function, "forward", function))
        name = names[first] if first < len(names) else str(first)
    else:
        name = first
    return ".".join([name, *(str(key) for key in keys)])


def _parameter_names(called: Callable[..., Any]) -> Sequence[str]:
    bound = getattr(called, "__wrapped__", called)
    written = getattr(bound, "__func__", None)
    if isinstance(written, FunctionType):
        return _names_in(written)[1:]  # without self
    # A functools.partial, a scripted module and the like may have no signature.
    try:
        return list(inspect.signature(called).parameters)
    except (TypeError, ValueError):
        return []


@cache
def _names_in(function: FunctionType) -> Sequence[str]:
    return list(inspect.signature(function).parameters)


@dataclass(frozen=True)
class Precision:
    """The autocast in which a module ran, and the type of new tensors."""

    device: str
    dtype: torch.dtype | None
    """None: it was off."""
    default: torch.dtype = torch.float32

    @classmethod
    def of(cls, call: Call) -> Precision:
        """The one that is in force, for a call that begins."""
        device = next((tensor.device.type for _, tensor in call.tensors()), "cpu")
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(device, dtype, torch.get_default_dtype())

    @contextmanager
    def entered(self) -> Iterator[None]:
        """In the block it is in force again."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.default)
        try:
            with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype is not None):
                yield
        finally:
            torch.set_default_dtype(before)
