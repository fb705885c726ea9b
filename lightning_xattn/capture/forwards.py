"""Calls of modules are seen by wrapping ``forward`` on each instance, so that ``module.forward(x)`` is seen, too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

from torch import nn

Around = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Gets a module, its forward and the arguments of a call; runs the forward and gives what it returns."""


class WrappedForward:
    """Stands in a module's ``__dict__`` for its forward, until it is removed.

    An object and not a closure: in a copy or a pickle of the module there is the copy's own forward in its place.

    Parameters
    ----------
    module
        The module; nothing is wrapped yet.
    around
        Runs its forward.
    """

    def __init__(self, module: nn.Module, around: Around) -> None:
        # What is compiled in place is called past its ``forward``.
        self._name = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
        self._module, self._around = module, around
        self._own, self._forward = vars(module).get(self._name), getattr(module, self._name)
        self._is_on = False
        # What inspect.signature follows.
        self.__wrapped__ = self._forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward."""
        if not self._is_on:  # somebody has kept it
            return self._forward(*args, **kwargs)
        other = _find_caller(self._module) if self._own is None else None
        if other is not None:
            return type(other).forward(other, *args, **kwargs)
        return self._around(self._module, self._forward, args, kwargs)

    def __reduce__(self) -> Any:
        # With Python's own functions, so that a file can be read without this package.
        return getattr, (self._module if self._own is None else SimpleNamespace(forward=self._own), "forward")

    def put(self) -> None:
        """Wrap the module's forward."""
        self._is_on = True
        vars(self._module)[self._name] = self

    def remove(self) -> None:
        """Take the wrapper off, also where others have wrapped it since."""
        self._is_on = False
        held = vars(self._module)
        if held.get(self._name) is not self:
            outer = held.get(self._name)
            while isinstance(outer, WrappedForward):
                if outer._own is self:
                    outer._own, outer._forward = self._own, self._forward
                outer = outer._own
        elif self._own is None:
            del held[self._name]
        else:
            held[self._name] = self._own


_CALLS = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)


def _find_caller(module: nn.Module) -> nn.Module | None:
    """A shallow copy that runs what it has from the module's ``__dict__``; None if the module itself does."""
    frame = sys._getframe(2)
    caller = frame.f_locals.get("self") if frame.f_code in _CALLS else module
    return caller if caller is not module and isinstance(caller, nn.Module) else None


def wrap_forwards(modules: Mapping[nn.Module, str], around: Around, changes: ExitStack) -> None:
    """Wrap the forward of each module until ``changes`` closes."""
    wrappers: list[WrappedForward] = []

    def remove() -> None:
        for wrapper in wrappers:
            wrapper.remove()

    changes.callback(remove)
    for module in modules:
        wrapper = WrappedForward(module, around)
        wrapper.put()
        wrappers.append(wrapper)


def walk_modules(root: nn.Module, into_compiled: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Each module in a model once, with its path, also those that plain lists, tuples and dicts hold.

    Nothing in a TorchScript module, whose calls Python does not see.

    Parameters
    ----------
    root
        The model.
    into_compiled
        Whether also what is in modules that ``torch.compile`` has compiled.
    """
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, Any]] = [("", root)]
    while waiting:
        path, one = waiting.pop()
        if isinstance(one, nn.Module):
            if one in seen:
                continue
            seen.add(one)
            yield path, one
            is_compiled = "_orig_mod" in one._modules or one._compiled_call_impl is not None
            if _is_script(one) or (is_compiled and not into_compiled):
                continue
            held = {name: child for name, child in one._modules.items() if child is not None}
            plain = {name: value for name, value in vars(one).items() if type(value) in (list, tuple, dict)}
            inside = {**held, **{name: value for name, value in plain.items() if not name.startswith("_")}}
        else:
            items = one.items() if isinstance(one, dict) else enumerate(one)
            inside = {str(key): item for key, item in items if isinstance(item, nn.Module)}
        waiting += [(f"{path}.{name}".lstrip("."), child) for name, child in reversed(inside.items())]


def _is_script(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.jit")


def get_module(root: nn.Module, path: str) -> nn.Module:
    """The module at a path that ``walk_modules`` gives.

    Raises
    ------
    AttributeError
        If there is none.
    """
    found: Any = root
    for part in path.split(".") if path else ():
        found = step_into(found, part)
    if not isinstance(found, nn.Module):
        raise AttributeError(path)
    return found


def step_into(holder: Any, part: str) -> Any:
    """What a module, list, tuple or dict has under one component of a path.

    Raises
    ------
    AttributeError
        If it has nothing there.
    """
    try:
        if isinstance(holder, (list, tuple)):
            return holder[int(part)]
        if isinstance(holder, dict):
            return next(item for key, item in holder.items() if str(key) == part)
    except (IndexError, ValueError, StopIteration):
        raise AttributeError(part) from None
    return getattr(holder, part)
