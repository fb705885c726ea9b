"""Which inputs of a run reach which modules and results: labels that every function of torch hands on.

Labels are bits of a whole number. They belong to a storage, so that a view and what is written into it share them. A
module whose result has no label, as of TorchScript or numpy, hands on those of what it got.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_xattn.capture.calls import Path, find_tensors
from lightning_xattn.capture.readers import find_reader

_SHAPES_ONLY = frozenset(
    (
        *(f"new_{name}" for name in ("zeros", "ones", "empty", "full")),
        *(f"{name}_like" for name in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")),
        *("size", "dim", "numel"),
    )
)
"""What these give does not depend on the numbers of what they get."""

_PRODUCTS = frozenset(("matmul", "__matmul__", "bmm", "baddbmm", "einsum"))
_IN_PLACE = re.compile(
    r"__(setitem|i(add|sub|mul|div|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift|matmul))__|\w*[^_]_"
)
"""The names of functions that change their first argument, such as ``add_``."""

_DEEPEST = 6
_NO_HOLDERS = (str, bytes, int, float, bool, type, nn.Module, FunctionType, ModuleType)


@dataclass(eq=False)
class LabelledCall:
    """A call of a module in a labelled run."""

    module: nn.Module
    path: str
    turn: int
    outer: LabelledCall | None
    got: int
    """Labels of what it got."""
    made: int = 0
    """Labels of what it gave."""
    own: dict[Path, int] = field(default_factory=dict)
    """A label of its own for each tensor that it gave."""
    tensors: dict[Path, Tensor] = field(default_factory=dict)
    """Copies of those that it gave."""

    @property
    def key(self) -> tuple[str, int]:
        """The module's path and the number of the call, from 0 on."""
        return self.path, self.turn

    def outwards(self) -> Iterator[LabelledCall]:
        """The call and those that it is part of, innermost first."""
        call: LabelledCall | None = self
        while call is not None:
            yield call
            call = call.outer


class Dataflow(TorchFunctionMode):
    """Hands labels on while it is active.

    Attributes
    ----------
    calls : list of LabelledCall
        In the order in which they began.
    attention : list of (LabelledCall or None, int, int)
        The innermost call around each attention, and the labels of its queries and keys.
    changed : set of int
        The labels of calls and inputs whose tensors were changed in place.
    opaque : set of (str, int)
        The calls whose results had no labels, so that they handed on those of what they got.

    Parameters
    ----------
    opaque
        The only calls that may be so; None: any.
    keeps_tensors
        Whether calls keep copies of what they gave.
    """

    def __init__(self, opaque: Collection[tuple[str, int]] | None = None, keeps_tensors: bool = True) -> None:
        super().__init__()
        self._keeps_tensors = keeps_tensors
        self.opaque: set[tuple[str, int]] = set()
        self._may_be_opaque = opaque
        self.calls: list[LabelledCall] = []
        self.attention: list[tuple[LabelledCall | None, int, int]] = []
        self.changed = 0
        self._running: list[LabelledCall] = []
        # Labels by storage or object, which is kept alive so that no id is used twice.
        self._labels: dict[int, tuple[Any, int]] = {}
        self._own: dict[int, int] = {}
        self._count = 0
        self._product = (0, 0)

    def new_label(self) -> int:
        """A bit that nothing has."""
        self._count += 1
        return 1 << (self._count - 1)

    def add(self, value: Any, labels: int, own: bool = False) -> None:
        """Give labels to all that a value holds. ``own``: they name the very tensors, which may be changed in place."""
        for one in _walk(value):
            key, alive = _key(one)
            _, before = self._labels.get(key, (None, 0))
            self._labels[key] = alive, before | labels
            if own:
                self._own[key] = self._own.get(key, 0) | labels

    def of(self, value: Any) -> int:
        """The labels of all that a value holds."""
        found = 0
        for one in _walk(value):
            key, _ = _key(one)
            found |= self._labels.get(key, (None, 0))[1]
        return found

    def around(
        self, path: str, turn: int, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run a module's forward and note its labels."""
        outer = self._running[-1] if self._running else None
        with torch._C.DisableTorchFunction():  # else this mode sees each look at a tensor's storage
            got = self.of((args, kwargs))
        call = LabelledCall(module, path, turn, outer, got)
        self.calls.append(call)
        self._running.append(call)
        try:
            output = forward(*args, **kwargs)
        finally:
            self._running.pop()
        with torch._C.DisableTorchFunction():
            self._note_output(call, output)
        return output

    def _note_output(self, call: LabelledCall, output: Any) -> None:
        call.made = self.of(output)
        if not call.made and call.got and (self._may_be_opaque is None or call.key in self._may_be_opaque):
            self.opaque.add(call.key)
            self.add(output, call.got)
            call.made = call.got
        for where, tensor in find_tensors(output):
            call.own[where] = self.new_label()
            self.add(tensor, call.own[where], own=True)
            if self._keeps_tensors:
                call.tensors[where] = tensor.detach().clone()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in _SHAPES_ONLY:
            return result
        self._note_attention(function, name, args, kwargs)
        changed = _find_changed(name, args, kwargs, result)
        if changed is None and not isinstance(result, (Tensor, tuple, list)):
            return result
        labels = self._of_arguments((*args, *kwargs.values()))
        if changed is not None:
            for one in _walk(changed):
                self.changed |= self._own.get(_key(one)[0], 0)
            if labels:
                self.add(changed, labels)
        elif labels:
            # What is another look at the numbers of an argument depends on no other one, as of expand_as.
            own = {_key(one)[0] for one in _walk((args, kwargs)) if isinstance(one, Tensor)}
            for one in result if isinstance(result, (tuple, list)) else (result,):
                is_view = isinstance(one, Tensor) and _key(one)[0] in own
                if isinstance(one, (Tensor, tuple, list)) and not is_view:
                    self.add(one, labels)
        return result

    def _of_arguments(self, args: Sequence[Any]) -> int:
        """As ``of``, but not of objects such as generators and shapes, which are many."""
        return self.of([arg for arg in args if isinstance(arg, (Tensor, list, tuple, dict, np.ndarray))])

    def _note_attention(self, function: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if name in _PRODUCTS and len(args) > 1:
            self._product = self.of(args[-2]), self.of(args[-1])
        if find_reader(function) is None:
            return
        given = [*args, *(kwargs[one] for one in ("query", "key") if one in kwargs)]
        both = self._product if "softmax" in name else tuple(map(self.of, given[:2]))
        if len(both) == 2:
            self.attention.append((self._running[-1] if self._running else None, both[0], both[1]))


def _find_changed(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Any:
    """What a function changes in place; None: nothing."""
    if kwargs.get("out") is not None:
        return kwargs["out"]
    first = args[0] if args else None
    if _IN_PLACE.fullmatch(name):
        return first
    # F.silu(x, inplace=True)
    is_asked = kwargs.get("inplace") is True or any(one is True for one in args[1:])
    tensors = isinstance(result, Tensor) and isinstance(first, Tensor)
    return first if is_asked and tensors and _key(result)[0] == _key(first)[0] else None


def _key(one: Any) -> tuple[int, Any]:
    """What labels belong to, and what keeps it alive."""
    if isinstance(one, Tensor):
        try:
            storage = one.untyped_storage()
            return storage._cdata, storage
        except (NotImplementedError, RuntimeError):  # nested and sparse tensors, and those on no device
            return id(one), one
    return id(one), one


def _walk(value: Any, depth: int = 0) -> Iterator[Any]:
    """Tensors, arrays and lists of plain values in a value, also in objects such as graphs."""
    if isinstance(value, (Tensor, np.ndarray)):
        yield value
    elif depth > _DEEPEST or value is None or isinstance(value, _NO_HOLDERS):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _walk(item, depth + 1)
    elif isinstance(value, (tuple, list, set)):
        if isinstance(value, list):
            yield value
        for item in value:
            yield from _walk(item, depth + 1)
    elif isinstance(getattr(value, "__dict__", None), dict):
        for item in vars(value).values():
            yield from _walk(item, depth + 1)
