"""Which modules run, and which attention they compute: wrapped forwards, and the mode that is on while one runs."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_xattn.capture.calls import LOSSES, SCORE_FUNCTIONS, Call, Run, StepTrace, look_up
from lightning_xattn.capture.events import Edit, Event, Read, RecordLevel
from lightning_xattn.capture.readers import find_reader
from lightning_xattn.capture.tensors import Address, has_address, only_modes, pop_modes, push_modes
from lightning_xattn.core import devices

ToEdit = Callable[[Event], Edit | None]
"""Gets an attention that is about to be computed; gives what is to be changed of it; None: nothing."""

_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "mm", "baddbmm", "einsum"})
_FOLDS = frozenset({"reshape", "view", "flatten", "contiguous"})

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


def runs_for_backward() -> bool:
    """Whether a module runs again, for gradient checkpointing, during a backward pass."""
    # There is no public way to ask.
    return torch._C._current_graph_task_id() != -1


class Shared:
    """A change to the whole process: recorders that overlap share it, and the last one that leaves takes it back."""

    def __init__(self, change: Callable[[], AbstractContextManager[None]]) -> None:
        self._change, self._users, self._changed = change, 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The change is in force inside of it."""
        if self._users == 0:
            self._changed.enter_context(self._change())
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._changed.close()


run_uncompiled = Shared(lambda: torch.compiler.set_stance("force_eager"))
"""Gives a context manager in which nothing that is compiled runs compiled."""


class AttentionMode(TorchFunctionMode):
    """Records every attention that is computed while certain modules run; the results stay what they are bit for bit.

    The mode is on while one of ``modules`` (with their paths) runs, or one of the ``attending`` ones among them.
    ``trace`` notes all their calls, and what losses read; then the mode is on outside of modules, too. ``level``
    decides what is recorded of an attention that is about to be computed. ``leave`` is called when a run ends without
    an error, with what the module returned. ``edit`` changes an attention before it is computed; torch's fast paths
    are then off. A mode that ``follows`` notes which attention reaches which.

    Errors in here never reach the modules that run: they are added to ``errors``. Only what ``edit`` raises does.
    """

    def __init__(
        self,
        modules: Mapping[nn.Module, str],
        level: Callable[[Run, Event], RecordLevel],
        leave: Callable[[Run, Any], None],
        edit: ToEdit | None = None,
        follows: bool = False,
        errors: list[Exception] | None = None,
        trace: StepTrace | None = None,
        attending: Collection[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self._trace, self._attending = trace, modules if attending is None else attending
        self._modules, self._level, self._leave, self._edit = modules, level, leave, edit
        self.errors: list[Exception] = [] if errors is None else errors
        self._runs: list[Run] = []
        self._is_attached = False
        self._turns: Counter[nn.Module] = Counter()
        self._on = False
        self._made: dict[int, tuple[weakref.ref[Tensor], Event]] = {}
        # The masks of a step, each with its copy and what was made of it.
        self._masks: list[tuple[Address, Tensor, dict[str, Tensor]]] = []
        # The attention that reaches a tensor, by its id.
        self._follows, self._reached = follows, dict[int, tuple[weakref.ref[Tensor], frozenset[Event]]]()

    def attach(self, changes: ExitStack) -> None:
        """Record the modules until ``changes`` closes."""
        changes.callback(self._detach)
        changes.enter_context(keep_fast_paths())
        wrap_forwards(self._modules, self._run_forward, changes)
        self._is_attached = True
        self._switch()

    def _detach(self) -> None:
        self._is_attached = False
        self.clear()

    def clear(self) -> None:
        """Forget what ran, and count turns anew."""
        self._runs.clear()
        self._turns.clear()
        self._made.clear()
        self._masks.clear()
        self._reached.clear()
        self._switch()

    def _run_forward(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if runs_for_backward():
            return forward(*args, **kwargs)
        outer, call = self._runs[-1] if self._runs else None, Call(args, kwargs)
        run = Run(module, self._modules[module], outer, call, self._turns[module], self._made)
        self._turns[module] += 1
        self._runs.append(run)
        self._switch()
        if self._trace is not None:
            with self._aside():
                self._trace.begin(run)
        try:
            output = forward(*args, **kwargs)
        finally:
            if run in self._runs:
                del self._runs[self._runs.index(run) :]
            self._switch()
        with self._aside():
            self._end(run, output)
        return output

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Inside of it no mode sees what we do, and no error of ours reaches the model's run."""
        with only_modes():
            try:
                yield
            except Exception as error:  # whatever is wrong in ours, the model runs on
                self.errors.append(error)

    def _end(self, run: Run, output: Any) -> None:
        try:
            with torch.no_grad():
                if self._trace is not None:
                    self._trace.end(run, output)
                self._leave(run, output)
        finally:
            run.call = Call((), {})
            # A forward that is called around itself is one run.
            outer = next((outer for outer in reversed(self._runs) if outer.module is not run.module), None)
            if outer is not None:
                outer.events += run.events
            if not self._runs:
                self._made.clear()

    def _switch(self) -> None:
        on = any(run.module in self._attending for run in self._runs)
        if self._trace is not None and self._is_attached:
            on = on or self._trace.looks_for_losses(self._runs)
        if on and not self._on:
            push_modes([self])
        elif self._on and not on:
            # Not by ``__exit__``: where modes overlap this one need not be the innermost.
            push_modes([mode for mode in pop_modes() if mode is not self])
        self._on = on

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._trace is not None and function in LOSSES:
            with self._aside():
                self._trace.note_loss(function, args, kwargs, self._runs)
        if self._trace is not None and self._trace.is_complete and function in SCORE_FUNCTIONS:
            with self._aside():
                self._trace.note_scores(args, self._runs)
        if not self._runs:
            return function(*args, **kwargs)
        reader, before = find_reader(function), len(self._runs[-1].events)
        if reader is None:
            result = function(*args, **kwargs)
        else:
            try:
                result = reader(function, args, kwargs, self)
            except Exception as error:  # which the model's run must not see
                if self._edit is not None:
                    raise
                result = function(*args, **kwargs)  # raises what the model is to see if it was the function's
                self.errors.append(error)
        with self._aside():
            if reader is None:
                self._note_use(getattr(function, "__name__", ""), args, result)
            if self._follows:
                self._note_reached((*args, *kwargs.values()), self._runs[-1].events[before:], result)
        return result

    def _note_reached(self, args: Sequence[Any], events: Sequence[Event], result: Any) -> None:
        """Note what reaches the tensors of a result: what reached those it was made of, and what was computed."""
        made_of = [one for arg in args for one in (arg if isinstance(arg, (tuple, list)) else (arg,))]
        reached = frozenset(events).union(*(look_up(self._reached, one) or () for one in made_of))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if reached and isinstance(one, Tensor):
                self._reached[id(one)] = weakref.ref(one), reached

    def begin(self, event: Event, asks: Tensor) -> Edit | None:
        """See ``ReaderContext``."""
        event.reached_by = look_up(self._reached, asks) or frozenset()
        for run in self._runs[-1].outwards() if len(event.shape) == 3 else ():
            for (heads_first, rows), heads in run.folded.items():
                if rows == event.shape[0]:
                    event.folded.setdefault(heads_first, heads)
        if event.problem is None:
            with self._aside():
                event.level = self._level(self._runs[-1], event)
        return None if self._edit is None else self._edit(event)

    def keep(self, mask: Tensor, what: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """See ``ReaderContext``."""
        kept = next((one for one in self._masks if _are_unchanged(mask, *one[:2])), None)
        if kept is None:
            kept = Address.of(mask), mask.detach().clone(), dict[str, Tensor]()
            self._masks.append(kept)
        _, copied, made = kept
        if what not in made:
            made[what] = make(copied)
        return made[what]

    def record(self, event: Event, read: Read | None = None, given: Tensor | None = None) -> None:
        """See ``ReaderContext``."""
        self._runs[-1].events.append(event)
        if given is not None and has_address(given):
            event.result = Address.of(given)
            self._made[id(given)] = weakref.ref(given), event
        if read is not None and event.level is not RecordLevel.NOTHING:
            rounds = torch.is_autocast_enabled(event.device.type)
            precise = torch.autocast(event.device.type, enabled=False) if rounds else nullcontext()
            try:
                with torch.no_grad(), precise, torch._C.DisableTorchFunction():  # hidden from modes around this one
                    event.recorded = read()
            except Exception as error:  # such as a mask of a form that is not understood, or no memory
                why = (str(error).splitlines() or [""])[0]
                event.problem = f"reading it failed ({type(error).__name__}: {why})"

    def _note_use(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Note how heads are folded into the samples, and what is made of weights, and what these are used for."""
        first = args[0] if args else None
        if name in _FOLDS and isinstance(first, Tensor) and not first.is_nested:
            _note_fold(first, result, self._runs[-1])
        elif name in ("cat", "concat") and isinstance(first, (tuple, list)) and isinstance(result, Tensor):
            parts = {part.shape for part in first if isinstance(part, Tensor) and part.dim() == result.dim() == 3}
            rows = next(iter(parts))[0] * len(first) if len(parts) == 1 else 0
            if len(first) > 1 and rows == len(result):  # torch.cat(tokens.chunk(heads, dim=-1), dim=0)
                self._runs[-1].folded[True, rows] = len(first)
        if not self._made:
            return
        events = [(arg, event) for arg in args if (event := self._runs[-1].origin(arg)) is not None]
        if name in _PRODUCTS:
            for arg, event in events:
                # As keys of another product they are transposed.
                same = arg.numel() == prod(event.shape) and arg.shape[-2:] == event.shape[-2:] and arg.stride(-1) == 1
                if event.by == "softmax" and event.used is None and same:
                    event.used = arg.reshape(event.shape)
        elif events and isinstance(result, Tensor):
            self._made[id(result)] = weakref.ref(result), events[0][1]


def _are_unchanged(mask: Tensor, address: Address, copied: Tensor) -> bool:
    """Whether a tensor is at an address and still holds the numbers that were copied from there."""
    if address.version is not None or not address.holds(mask):
        return address.holds_unchanged(mask)
    # An inference tensor does not tell whether it has been changed in place.
    return devices.reads_at_once(mask) and copied.equal(mask)


def _note_fold(tensor: Tensor, result: Tensor, run: Run) -> None:
    """Note how many heads are folded into the samples, and which of the two are inside.

    Of four axes of which two were moved to the front, samples lie farther apart in memory than heads. A tensor that
    is the same for all of them, as a mask for all heads, is no evidence. Of three axes the samples are
    the second, as in ``(tokens, batch, width)``, and get more by being split.
    """
    if tensor.dim() == 4 and not tensor.is_contiguous():
        rows, (first, second) = tensor.shape[0] * tensor.shape[1], tensor.stride()[:2]
        if first and second:
            inside = first > second
            run.folded[not inside, rows] = tensor.shape[1 if inside else 0]
    elif tensor.dim() == result.dim() == 3 and tensor.shape[0] == result.shape[0] and tensor.shape[1]:
        heads, rest = divmod(result.shape[1], tensor.shape[1])
        if heads > 1 and not rest:
            run.folded[False, result.shape[1]] = heads


@contextmanager
def _keep_fast_paths() -> Iterator[None]:
    """Keep torch's fast paths of ``nn.MultiheadAttention`` and encoder layers on under an ``AttentionMode``.

    They are off under any mode, and their outputs differ in the last bits from those of the slow path. While this
    one is attached, torch's modules that ask whether there is a mode get to know of the others only.
    """
    original = torch.overrides.has_torch_function

    def has_torch_function(args: Iterable[Any]) -> bool:
        asks = sys._getframe(1).f_globals.get("__name__")
        if asks not in ("torch.nn.modules.activation", "torch.nn.modules.transformer"):
            return original(args)
        with only_modes(lambda mode: not isinstance(mode, AttentionMode) or mode._edit is not None):
            return original(args)

    torch.overrides.has_torch_function = has_torch_function
    try:
        yield
    finally:
        torch.overrides.has_torch_function = original


keep_fast_paths = Shared(_keep_fast_paths)
"""Gives a context manager in which ``AttentionMode`` leaves torch's fast paths on."""
