"""The state that a run of a model may change: kept before the run, put back after it."""

from __future__ import annotations

import array
import functools
import io
import logging
import multiprocessing.process
import operator
import queue
import random
import socket
import subprocess
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_xattn.capture.tensors import has_address

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
"""Where a module keeps the hooks of its forward; torch keeps those of all modules alike."""

_SERVICES = (
    *(threading.Thread, type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event),
    *(threading.Semaphore, queue.SimpleQueue, Executor, multiprocessing.process.BaseProcess),
    *(io.IOBase, socket.socket, subprocess.Popen),
)
"""What holds one of these, such as a logger's client, is used by other threads or by the outside world."""

_LEAVES = (
    *(bool, int, float, complex, str, bytes, type(None), type(Ellipsis), Enum, torch.dtype, torch.device, torch.Size),
    *(ModuleType, weakref.ProxyType, weakref.CallableProxyType, logging.Logger, *_SERVICES),
    *(DataLoader, Dataset, Sampler),
)
"""What a forward does not change, or what is not the model's."""

_OF_A_TRAINER = {"Trainer", "Callback", "LightningDataModule"}
"""Lightning's, by name, as it has two namespaces: what a Trainer keeps is not the model's."""

Restore = Callable[[], None]
"""Puts one thing back if it has changed."""


class ModelState:
    """All that a forward can change and that can be reached from some objects, as it is now.

    Found through modules, other objects (also with ``__slots__``) and their classes, dicts, lists, sets, tuples, bound
    methods, partials and what functions enclose: the values of tensors and numpy arrays, which tensors share memory,
    gradients, random generators, what containers hold, and attributes. The process's own random generators are always
    among it.

    Not kept: see ``docs/costs.md``, "What a replay leaves as it was".

    Parameters
    ----------
    roots
        Where to begin, such as a model and the batch that it gets.
    """

    def __init__(self, *roots: Any) -> None:
        self._restores: list[Restore] = []
        # Keeps what was seen alive, so that no id is used twice.
        self._seen: dict[int, Any] = {}
        # Each storage, with the tensors that look at it.
        self._storages: dict[int, tuple[torch.UntypedStorage, list[Tensor]]] = {}
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        # Objects that hold no service, by id.
        self._apart: set[int] = set()
        self._modules: list[nn.Module] = []
        of_process = (random.getstate.__self__, np.random.get_state.__self__)  # type: ignore[attr-defined]  # methods
        with torch._C.DisableTorchFunction():
            self._walk([*roots, *of_process, *torch_generators()])
            self._restores += [_restore_storage(storage, tensors) for storage, tensors in self._storages.values()]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every module that was found."""
        return tuple(self._modules)

    def set_gradients_aside(self) -> None:
        """Let all tensors have no gradient until ``restore``, so that a backward pass in a forward adds to none."""
        for tensor, gradient in self._gradients:
            if gradient is not None:
                tensor.grad = None

    def restore(self) -> None:
        """Put everything back.

        Raises
        ------
        RuntimeError
            If something could not be put back; everything else was.
        """
        problems = []
        with torch._C.DisableTorchFunction():
            for restore in self._restores:
                try:
                    restore()
                except Exception as error:  # an object of the user's may refuse anything
                    problems.append(repr(error))
        if problems:
            raise RuntimeError(f"{len(problems)} part(s) of the model's state could not be put back: {problems[0]}")

    def _walk(self, waiting: list[Any]) -> None:
        while waiting:
            one = waiting.pop()
            kind: Any = type(one)
            if not _is_leaf(kind) and id(one) not in self._seen:
                self._seen[id(one)] = one
                waiting += self._keep(one, kind)

    def _keep(self, one: Any, kind: type) -> Iterable[Any]:
        """Keep one object; gives what can be reached from it."""
        if issubclass(kind, Tensor):
            return self._keep_tensor(one)
        if issubclass(kind, np.ndarray):
            return self._keep_array(one)
        if (state := _generator_state(one, kind)) is not None:
            self._restores.append(state)
            return ()
        if issubclass(kind, type):
            return self._keep_class(one)
        if issubclass(kind, FunctionType):
            return self._keep_function(one)
        if issubclass(kind, MethodType):
            return one.__self__, one.__func__
        if issubclass(kind, BuiltinFunctionType):  # such as a list's append
            return (one.__self__,)
        if issubclass(kind, weakref.ref):
            return (weakref.ref.__call__(one),)
        if issubclass(kind, functools.partial):
            return one.func, *one.args, *one.keywords.values()
        if issubclass(kind, nn.Module):
            self._modules.append(one)
            # A ScriptModule has them elsewhere.
            elsewhere = [*one.parameters(recurse=False), *one.buffers(recurse=False)]
            return [*elsewhere, *self._keep_attributes(one, kind)]
        held = self._keep_container(one, kind)
        if held is None and _is_service(one, self._apart):
            return ()
        return [*(held or ()), *self._keep_attributes(one, kind)]

    def _keep_tensor(self, tensor: Tensor) -> Iterable[Any]:
        if is_traceable_wrapper_subclass(tensor):  # such as a DTensor
            names, _ = tensor.__tensor_flatten__()
            return [getattr(tensor, name) for name in names]
        if tensor.is_meta or tensor.is_nested or is_lazy(tensor):
            return ()
        if tensor.layout != torch.strided:
            self._restores.append(_restore_sparse(tensor))
            return ()
        if not has_address(tensor):
            return ()
        if tensor.is_leaf:
            self._gradients.append((tensor, tensor.grad))
        self._restores.append(_restore_tensor(tensor))
        storage = tensor.untyped_storage()
        self._storages.setdefault(storage._cdata, (storage, []))[1].append(tensor)
        return [vars(tensor)] if vars(tensor) else ()

    def _keep_array(self, values: np.ndarray) -> Iterable[Any]:
        if not isinstance(values, np.memmap) and not isinstance(values.base, np.memmap):  # those are files
            self._restores.append(_restore_array(values))
        attributes = _attributes_or_none(values)  # of a subclass, such as a masked array
        held = values.view(np.ndarray).ravel().tolist() if values.dtype.hasobject else []
        return [*held, attributes] if isinstance(attributes, dict) else held

    def _keep_container(self, one: Any, kind: type) -> Iterable[Any] | None:
        """What a container holds; None of anything else. A user's class may have other methods: they are passed by."""
        if issubclass(kind, dict):
            self._restores.append(_restore_mapping(one))
            return [*dict.keys(one), *dict.values(one)]
        if issubclass(kind, (list, deque)):
            base: Any = list if issubclass(kind, list) else deque
            self._restores.append(_restore_items(one, base, base.extend))
            return [*base.__iter__(one)]
        if issubclass(kind, set):
            self._restores.append(_restore_set(one))
            return [*set.__iter__(one)]
        if issubclass(kind, (tuple, frozenset)):
            fixed: Any = tuple if issubclass(kind, tuple) else frozenset
            return [*fixed.__iter__(one)]
        if issubclass(kind, (bytearray, array.array)):
            self._restores.append(_restore_bytes(one))
            return ()
        return None

    def _keep_attributes(self, one: Any, kind: type) -> Iterator[Any]:
        """The attributes of an object, and those of its classes."""
        for parent in kind.__mro__:
            if not _is_written_in_python(parent):
                continue
            yield parent
            for slot in vars(parent).values() if "__slots__" in vars(parent) else ():
                if isinstance(slot, MemberDescriptorType):
                    yield from self._keep_value(
                        functools.partial(slot.__get__, one, kind),
                        functools.partial(slot.__set__, one),
                        functools.partial(slot.__delete__, one),
                    )
        attributes = _attributes_or_none(one)
        if not isinstance(attributes, dict):
            return
        self._restores += [_restore_identity(one, kind, attributes), _restore_mapping(attributes)]
        for name, value in attributes.items():
            if name in HOOKS:
                # Which hooks there are is kept, not what they hold: they may be those of FSDP.
                self._restores.append(_restore_mapping(value))
            else:
                yield value

    def _keep_value(self, get: Callable[[], Any], put: Callable[[Any], None], remove: Restore) -> Iterator[Any]:
        """A value that is read and written by functions; ``get`` raises where there is none."""
        value = _value_of(get)

        def restore() -> None:
            now = _value_of(get)
            if now is not value:
                remove() if value is _NOTHING else put(value)

        self._restores.append(restore)
        if value is not _NOTHING:
            yield value

    def _keep_class(self, kind: type) -> Iterable[Any]:
        """The attributes of a class, but for what Python itself keeps there."""
        if not _is_written_in_python(kind) or issubclass(kind, Enum):
            return ()
        kept, whole = _attributes_of(kind), tuple(vars(kind).values())

        def restore() -> None:
            if _are_same(vars(kind).values(), whole):
                return
            now = _attributes_of(kind)
            for name in now.keys() - kept.keys():
                delattr(kind, name)
            for name, value in kept.items():
                if now.get(name, _NOTHING) is not value:
                    setattr(kind, name, value)

        self._restores.append(restore)
        return kept.values()

    def _keep_function(self, function: FunctionType) -> Iterator[Any]:
        """What a function encloses, its attributes, and values that it takes where a caller gives none."""
        if function.__module__ is None or function.__module__.partition(".")[0] == "torch":
            return
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        if vars(function):
            yield vars(function)
        for cell in function.__closure__ or ():
            yield from self._keep_value(
                functools.partial(getattr, cell, "cell_contents"),
                functools.partial(setattr, cell, "cell_contents"),
                functools.partial(delattr, cell, "cell_contents"),
            )


_NOTHING = object()


def torch_generators() -> Iterator[torch.Generator]:
    """Those of torch's own random generators that are in use."""
    yield torch.default_generator
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():  # asking would begin to use it
            yield from device.default_generators
    if torch.backends.mps.is_available():
        yield torch.mps._get_default_mps_generator()


def _generator_state(one: Any, kind: type) -> Restore | None:
    """How to put a random generator back; None of anything else."""
    if issubclass(kind, torch.Generator):
        return functools.partial(one.set_state, one.get_state())
    if issubclass(kind, np.random.Generator):
        return functools.partial(setattr, one.bit_generator, "state", one.bit_generator.state)
    if issubclass(kind, np.random.BitGenerator):
        return functools.partial(setattr, one, "state", one.state)
    if issubclass(kind, np.random.RandomState):
        return functools.partial(one.set_state, one.get_state())
    if issubclass(kind, random.Random) and not issubclass(kind, random.SystemRandom):  # which has no state
        return functools.partial(one.setstate, one.getstate())
    return None


def _restore_tensor(tensor: Tensor) -> Restore:
    """Where a tensor's numbers are, whether it takes gradients, and its gradient; not the numbers."""
    alias = tensor.detach()
    takes, gradient = tensor.requires_grad, tensor.grad if tensor.is_leaf else None

    def restore() -> None:
        with torch.inference_mode(alias.is_inference()), torch.no_grad():
            moved = tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape
            if moved or tensor.stride() != alias.stride() or tensor.dtype != alias.dtype:
                tensor.data = alias
        if tensor.is_leaf:
            if tensor.requires_grad != takes:
                tensor.requires_grad_(takes)
            if tensor.grad is not gradient:
                tensor.grad = gradient

    return restore


def _restore_storage(storage: torch.UntypedStorage, tensors: Sequence[Tensor]) -> Restore:
    """The numbers in memory that these tensors look at; the tensors learn that they were changed."""
    spans = [_span_of(tensor) for tensor in tensors]
    # Whole words of 8 bytes, which are compared faster.
    low, high, size = min(start for start, _ in spans) // 8 * 8, max(stop for _, stop in spans), storage.nbytes()
    high = min(-(-high // 8) * 8, size)
    kept = _bytes_of(storage, low, high).clone()

    def restore() -> None:
        if storage.nbytes() != size:
            storage.resize_(size)
        now = _bytes_of(storage, low, high)
        if not now.equal(kept):
            now.copy_(kept)
            for tensor in tensors:
                if not tensor.is_inference():  # else a gradient could be computed from them that is wrong
                    increment_version(tensor)

    return restore


def _span_of(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one behind its last."""
    if not tensor.numel():
        return 0, 0
    first = tensor.storage_offset()
    last = first + sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(first * tensor.element_size()), int((last + 1) * tensor.element_size())


def _bytes_of(storage: torch.UntypedStorage, low: int, high: int) -> Tensor:
    with torch.inference_mode(False):
        part = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[low:high]
    return part if len(part) % 8 else part.view(torch.int64)


def _restore_sparse(tensor: Tensor) -> Restore:
    kept = tensor.detach().clone()

    def restore() -> None:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(kept)

    return restore


def _restore_array(values: np.ndarray) -> Restore:
    """The values of an array, and its shape."""
    plain = values.view(np.ndarray)
    kept, shape = plain.copy(), values.shape

    def restore() -> None:
        if values.shape != shape:
            values.shape = shape
        now = values.view(np.ndarray)
        if now.dtype.hasobject or now.tobytes() != kept.tobytes():
            now.flags.writeable = True  # else it could not have changed
            np.copyto(now, kept)

    return restore


def _restore_identity(one: Any, kind: type, attributes: dict[str, Any]) -> Restore:
    """The class of an object, and the dict of its attributes, if others were put in their places."""

    def restore() -> None:
        if type(one) is not kind:
            object.__setattr__(one, "__class__", kind)
        if _attributes_or_none(one) is not attributes:
            object.__setattr__(one, "__dict__", attributes)

    return restore


def _restore_mapping(mapping: Any) -> Restore:
    # The methods of dict leave an OrderedDict's order as it is.
    kind: Any = OrderedDict if isinstance(mapping, OrderedDict) else dict
    keys, values = tuple(kind.keys(mapping)), tuple(kind.values(mapping))

    def restore() -> None:
        if not (_are_same(kind.keys(mapping), keys) and _are_same(kind.values(mapping), values)):
            kind.clear(mapping)
            kind.update(mapping, zip(keys, values, strict=True))

    return restore


def _restore_items(items: Any, kind: Any, extend: Callable[[Any, Iterable[Any]], None]) -> Restore:
    kept = tuple(kind.__iter__(items))

    def restore() -> None:
        if not _are_same(kind.__iter__(items), kept):
            kind.clear(items)
            extend(items, kept)

    return restore


def _restore_set(items: set[Any]) -> Restore:
    kept = frozenset(set.__iter__(items))

    def restore() -> None:
        if frozenset(set.__iter__(items)) != kept:
            set.clear(items)
            set.update(items, kept)

    return restore


def _restore_bytes(values: Any) -> Restore:
    kept = values[:]

    def restore() -> None:
        if values != kept:
            values[:] = kept

    return restore


def _are_same(there: Iterable[Any], kept: tuple[Any, ...]) -> bool:
    there = tuple(there)
    return len(there) == len(kept) and all(map(operator.is_, there, kept))


def _value_of(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except (AttributeError, ValueError):  # an empty slot or cell
        return _NOTHING


def _attributes_or_none(one: Any) -> Any:
    """What an object's ``__dict__`` is, past what its class may do when it is asked."""
    try:
        return object.__getattribute__(one, "__dict__")
    except AttributeError:
        return None


def _attributes_of(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not (name[:2] == name[-2:] == "__")}


def _is_written_in_python(kind: type) -> bool:
    """Whether attributes can be set on a class, as on none that is written in C."""
    return bool(kind.__flags__ & (1 << 9)) and not kind.__flags__ & (1 << 8)  # a heap type that is not immutable


def _is_leaf(kind: Any) -> bool:
    """Whether nothing of an object of this class is kept. By class, as isinstance may run code of a proxy's."""
    return issubclass(kind, _LEAVES) or any(
        parent.__name__ in _OF_A_TRAINER and parent.__module__.startswith(("pytorch_lightning.", "lightning.pytorch."))
        for parent in kind.__mro__
    )


def _is_service(one: Any, apart: set[int]) -> bool:
    """Whether an object holds a lock, a thread or a file, directly or through other objects that are no modules.

    ``apart`` has the ids of objects that are known to hold none, and gets more.
    """
    waiting, seen = [one], set[int]()
    while waiting:
        held = waiting.pop()
        kind: Any = type(held)
        if issubclass(kind, _SERVICES):
            return True
        known = id(held) in seen or id(held) in apart
        if known or _is_leaf(kind) or issubclass(kind, (type, nn.Module, Tensor, np.ndarray, FunctionType)):
            continue
        seen.add(id(held))
        container = next((base for base in (list, tuple, set, frozenset, deque) if issubclass(kind, base)), None)
        if issubclass(kind, dict):
            waiting += dict.values(held)
        elif container is not None:
            waiting += container.__iter__(held)
        elif isinstance(attributes := _attributes_or_none(held), dict):
            waiting += attributes.values()
    apart |= seen
    return False
