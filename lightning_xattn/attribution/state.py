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
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from types import BuiltinFunctionType, CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
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
    *(type(threading.Lock()), type(threading.RLock()), queue.SimpleQueue),
    *(multiprocessing.process.BaseProcess, io.IOBase, socket.socket),
)
"""What holds one of these, such as a thread or a logger's client, is used by others or by the outside world."""

_LEAVES = (
    *(bool, int, float, complex, str, bytes, type(None), type(Ellipsis), Enum, torch.dtype, torch.device, torch.Size),
    *(ModuleType, weakref.ProxyType, weakref.CallableProxyType, logging.Logger, *_SERVICES),
    *(DataLoader, Dataset, Sampler),
)
"""What a forward does not change, or what is not the model's."""

_OF_A_TRAINER = {"Trainer", "Callback", "LightningDataModule"}
"""Lightning's, by name, as it has two namespaces: what a Trainer keeps is not the model's."""

_GENERATORS: tuple[tuple[type, str, str], ...] = (
    (torch.Generator, "get_state", "set_state"),
    (np.random.BitGenerator, "__getstate__", "__setstate__"),
    (np.random.RandomState, "get_state", "set_state"),
    (random.SystemRandom, "", ""),  # it has no state
    (random.Random, "getstate", "setstate"),
)
"""Random generators, and the methods that read and write their states."""

_CONTAINERS: tuple[type, ...] = (dict, list, deque, set, tuple, frozenset)

_NOTHING = object()


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

    Attributes
    ----------
    has_changed
        Whether ``restore`` ever found something changed, besides random generators and gradients.
    """

    def __init__(self, *roots: Any) -> None:
        self.has_changed = False
        # Each gives True if something had changed.
        self._restores: list[Callable[[], object]] = []
        # By id a class, and whether its objects are leaves: a class of the user's may have no hash.
        self._leaves: dict[int, tuple[type, bool]] = {}
        # Keeps what was seen alive, so that no id is used twice.
        self._seen: dict[int, Any] = {}
        # Each storage, with the tensors that look at it.
        self._storages: dict[int, tuple[torch.UntypedStorage, list[Tensor]]] = {}
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        # Objects that hold no service, by id.
        self._apart: set[int] = set()
        self._modules: list[nn.Module] = []
        of_process = (random.getstate.__self__, np.random.get_state.__self__)  # type: ignore[attr-defined]  # methods
        self.add(*roots, *of_process, *torch_generators())

    def add(self, *roots: Any) -> None:
        """Keep what can be reached from further objects, as it is now."""
        waiting: list[Any] = list(roots)
        self._storages.clear()
        with torch._C.DisableTorchFunction():
            while waiting:
                one = waiting.pop()
                kind = type(one)
                if id(kind) not in self._leaves:
                    self._leaves[id(kind)] = kind, _is_leaf(kind)
                if not self._leaves[id(kind)][1] and id(one) not in self._seen:
                    self._seen[id(one)] = one
                    waiting += self._keep(one, kind)
            for storage, tensors in self._storages.values():
                self._keep_numbers(storage, tensors)

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
                    self.has_changed |= restore() is True
                except Exception as error:  # an object of the user's may refuse anything
                    problems.append(repr(error))
        if problems:
            raise RuntimeError(f"{len(problems)} part(s) of the model's state could not be put back: {problems[0]}")

    def _keep(self, one: Any, kind: Any) -> Iterable[Any]:
        """Keep one object; gives what can be reached from it."""
        if kind is FunctionType:  # half of all are
            return self._keep_function(one)
        if issubclass(kind, Tensor):
            return self._keep_tensor(one)
        if issubclass(kind, np.ndarray):
            return self._keep_array(one)
        for generator, read, write in _GENERATORS:
            if issubclass(kind, generator):
                if read:
                    self._restores.append(functools.partial(getattr(one, write), getattr(one, read)()))
                return ()
        if issubclass(kind, type):
            return self._keep_class(one)
        if issubclass(kind, (MethodType, BuiltinFunctionType)):  # such as a list's append
            return one.__self__, getattr(one, "__func__", None)
        if issubclass(kind, weakref.ref):
            return (weakref.ref.__call__(one),)
        if issubclass(kind, functools.partial):
            return one.func, *one.args, *one.keywords.values()
        if issubclass(kind, np.random.Generator):
            return (one.bit_generator,)
        if issubclass(kind, nn.Module):
            self._modules.append(one)
            # A ScriptModule has them elsewhere.
            elsewhere = [*one.parameters(recurse=False), *one.buffers(recurse=False)]
            return [*elsewhere, *self._keep_attributes(one, kind)]
        if issubclass(kind, (bytearray, array.array)):
            self._keep_bytes(one)
        if not issubclass(kind, _CONTAINERS) and _is_service(one, self._apart):
            return ()
        return [*self._keep_items(one, kind), *self._keep_attributes(one, kind)]

    def _keep_value(self, read: Callable[[], Iterable[Any]], write: Callable[[Any], None]) -> tuple[Any, ...]:
        """Keep which objects ``read`` gives, for ``write`` to put back where it gives others; gives these objects."""
        kept = tuple(read())

        def restore() -> bool:
            now = tuple(read())
            has_changed = len(now) != len(kept) or not all(map(operator.is_, now, kept))
            if has_changed:
                write(kept)
            return has_changed

        self._restores.append(restore)
        return kept

    def _keep_bytes(self, one: Any) -> None:
        """The numbers of a ``bytearray`` or an ``array``."""
        kept = one[:]

        def restore() -> bool:
            has_changed: bool = one != kept
            one[:] = kept
            return has_changed

        self._restores.append(restore)

    def _keep_items(self, one: Any, kind: Any) -> tuple[Any, ...]:
        """What a container holds. A user's class may have other methods: they are passed by."""
        if issubclass(kind, dict):
            return self._keep_dict(one)
        base: Any = next((base for base in _CONTAINERS if issubclass(kind, base)), None)
        if base is None:
            return ()
        if base in (tuple, frozenset):
            return tuple(base.__iter__(one))

        def write(kept: tuple[Any, ...]) -> None:
            base.clear(one)
            (base.update if base is set else base.extend)(one, kept)

        return self._keep_value(functools.partial(base.__iter__, one), write)

    def _keep_dict(self, mapping: Any) -> tuple[Any, ...]:
        # The methods of dict leave an OrderedDict's order as it is.
        kind: Any = OrderedDict if isinstance(mapping, OrderedDict) else dict

        def write(kept: tuple[Any, ...]) -> None:
            count = len(kept) // 2
            kind.clear(mapping)
            kind.update(mapping, zip(kept[:count], kept[count:], strict=True))

        return self._keep_value(lambda: [*kind.keys(mapping), *kind.values(mapping)], write)

    def _keep_slot(self, one: Any, slot: Any) -> tuple[Any, ...]:
        """What is in an object's slot, or in a cell, past what its class may do when it is asked."""

        def read() -> tuple[Any, ...]:
            try:
                return (slot.__get__(one),)
            except (AttributeError, ValueError):  # it is empty
                return ()

        def write(kept: tuple[Any, ...]) -> None:
            if kept:
                slot.__set__(one, *kept)
            else:
                slot.__delete__(one)

        return self._keep_value(read, write)

    def _keep_attributes(self, one: Any, kind: type) -> Iterator[Any]:
        """The attributes of an object, and those of its classes."""
        for parent in kind.__mro__:
            if not _is_written_in_python(parent):
                continue
            yield parent
            for slot in vars(parent).values() if "__slots__" in vars(parent) else ():
                if isinstance(slot, MemberDescriptorType):
                    yield from self._keep_slot(one, slot)
        attributes = _attributes_or_none(one)
        if not isinstance(attributes, dict):
            return

        def write(kept: tuple[Any, ...]) -> None:
            if type(one) is not kind:
                object.__setattr__(one, "__class__", kind)
            if _attributes_or_none(one) is not attributes:
                object.__setattr__(one, "__dict__", attributes)

        self._keep_value(lambda: (type(one), _attributes_or_none(one)), write)
        self._keep_dict(attributes)
        for name, value in attributes.items():
            if name in HOOKS:
                # Which hooks there are is kept, not what they hold: they may be those of FSDP.
                self._keep_dict(value)
            else:
                yield value

    def _keep_class(self, kind: type) -> tuple[Any, ...]:
        """The attributes of a class, but for what Python itself keeps there."""
        if not _is_written_in_python(kind) or issubclass(kind, Enum):
            return ()

        def read() -> list[Any]:
            own = {name: value for name, value in vars(kind).items() if not name[:2] == name[-2:] == "__"}
            return [*own, *own.values()]

        def write(kept: tuple[Any, ...]) -> None:
            now, count = read(), len(kept) // 2
            for name in now[: len(now) // 2]:
                if name not in kept[:count]:
                    delattr(kind, name)
            for name, value in zip(kept[:count], kept[count:], strict=True):
                if vars(kind).get(name, _NOTHING) is not value:
                    setattr(kind, name, value)

        return self._keep_value(read, write)

    def _keep_function(self, function: FunctionType) -> Iterator[Any]:
        """What a function encloses, its attributes, and values that it takes where a caller gives none."""
        if function.__module__ is None or function.__module__.partition(".")[0] == "torch":
            return
        yield from (function.__defaults__, function.__kwdefaults__, vars(function) or None)
        for cell in function.__closure__ or ():
            yield from self._keep_slot(cell, CellType.__dict__["cell_contents"])

    def _keep_array(self, values: np.ndarray) -> Iterable[Any]:
        """The values of an array, its shape, and the attributes of a subclass, such as a masked array."""
        kept, shape = values.view(np.ndarray).copy(), values.shape

        def restore() -> bool:
            has_changed = values.shape != shape
            if has_changed:
                values.shape = shape
            now = values.view(np.ndarray)
            if now.dtype.hasobject or now.tobytes() != kept.tobytes():
                now.flags.writeable = True  # else it could not have changed
                np.copyto(now, kept)
                has_changed = True
            return has_changed

        if not isinstance(values, np.memmap) and not isinstance(values.base, np.memmap):  # those are files
            self._restores.append(restore)
        return [*(kept.ravel().tolist() if kept.dtype.hasobject else ()), _attributes_or_none(values)]

    def _keep_tensor(self, tensor: Tensor) -> Iterable[Any]:
        """Where a tensor's numbers are, whether it takes gradients, and its gradient; not the numbers."""
        if is_traceable_wrapper_subclass(tensor):  # such as a DTensor
            names, _ = tensor.__tensor_flatten__()
            return [getattr(tensor, name) for name in names]
        is_dense = tensor.layout == torch.strided
        if tensor.is_meta or tensor.is_nested or is_lazy(tensor) or (is_dense and not has_address(tensor)):
            return ()
        alias = tensor.detach() if is_dense else tensor.detach().clone()
        takes, gradient = tensor.requires_grad, tensor.grad if tensor.is_leaf else None

        layout = _layout(alias) if is_dense else ()

        def restore() -> bool:
            has_changed = not is_dense or _layout(tensor) != layout
            if has_changed:
                with torch.inference_mode(alias.is_inference()), torch.no_grad():
                    if is_dense:
                        tensor.data = alias
                    else:
                        tensor.copy_(alias)
            if tensor.is_leaf:
                if tensor.requires_grad != takes:
                    tensor.requires_grad_(takes)
                    has_changed = True
                if tensor.grad is not gradient:
                    tensor.grad = gradient
            return has_changed

        self._restores.append(restore)
        if tensor.is_leaf:
            self._gradients.append((tensor, gradient))
        if is_dense:
            storage = tensor.untyped_storage()
            self._storages.setdefault(storage._cdata, (storage, []))[1].append(tensor)
        return (vars(tensor) or None,)

    def _keep_numbers(self, storage: torch.UntypedStorage, tensors: list[Tensor]) -> None:
        """The numbers in memory that these tensors look at; the tensors learn that they were changed."""
        spans = [_span_of(tensor) for tensor in tensors]
        # Whole words of 8 bytes, which are compared faster.
        low, size = min(start for start, _ in spans) // 8 * 8, storage.nbytes()
        high = min(-(-max(stop for _, stop in spans) // 8) * 8, size)
        kept = _bytes_of(storage, low, high).clone()

        def restore() -> bool:
            if storage.nbytes() != size:
                storage.resize_(size)
            now = _bytes_of(storage, low, high)
            has_changed = not now.equal(kept)
            if has_changed:
                now.copy_(kept)
                for tensor in tensors:
                    if not tensor.is_inference():  # else a gradient could be computed from them that is wrong
                        increment_version(tensor)
            return has_changed

        self._restores.append(restore)


def torch_generators() -> Iterator[torch.Generator]:
    """Those of torch's own random generators that are in use."""
    yield torch.default_generator
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():  # asking would begin to use it
            yield from device.default_generators
    if torch.backends.mps.is_available():
        yield torch.mps._get_default_mps_generator()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


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


def _attributes_or_none(one: Any) -> Any:
    """What an object's ``__dict__`` is, past what its class may do when it is asked."""
    try:
        return object.__getattribute__(one, "__dict__")
    except AttributeError:
        return None


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
        container: Any = next((base for base in _CONTAINERS if issubclass(kind, base)), None)
        if container is not None:
            waiting += container.values(held) if container is dict else container.__iter__(held)
        elif isinstance(attributes := _attributes_or_none(held), dict):
            waiting += attributes.values()
    apart |= seen
    return False
