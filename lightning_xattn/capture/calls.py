"""Calls of functions and modules: what they got and gave, and which ones a step ran."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_xattn.capture.tensors import has_address

if TYPE_CHECKING:
    from lightning_xattn.capture.events import Event

Note = TypeVar("Note")

Path = tuple[int | str, ...]
"""The keys that lead to a value through dicts, lists, tuples and dataclasses; of a call an argument's position or
keyword first."""

LOSSES = frozenset(
    (
        *(F.cross_entropy, F.nll_loss, F.multi_margin_loss, F.multilabel_soft_margin_loss, F.multilabel_margin_loss),
        *(F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.kl_div, F.mse_loss, F.l1_loss),
        *(F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss, F.hinge_embedding_loss),
        *(F.gaussian_nll_loss, F.poisson_nll_loss),
    )
)
"""The functions that compare predictions, their ``input``, with targets, their ``target``."""

SCORE_FUNCTIONS = frozenset(
    (
        *(torch.argmax, Tensor.argmax, torch.softmax, F.softmax, Tensor.softmax, torch.log_softmax, F.log_softmax),
        *(Tensor.log_softmax, torch.sigmoid, Tensor.sigmoid, F.logsigmoid, torch.topk, Tensor.topk),
        *(torch.max, Tensor.max),
    )
)
"""What steps and metrics do to class scores; only outside of modules that are no metrics."""

BUDGET = 64 * 2**20
"""Bytes of outputs of inner modules that a first step keeps until its end: predictions are small."""


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


def find_readable_tensors(value: Any) -> dict[Path, Tensor]:
    """The tensors in a value that have numbers in memory, by the keys that lead to them."""
    return {path: tensor for path, tensor in find_tensors(value) if has_address(tensor)}


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
    if any(isinstance(item, Tensor) for item in items):
        shapes = {tuple(item.shape) if isinstance(item, Tensor) else () for item in items}
        ragged = len(items) > 2 and len(shapes) > 1 and () not in shapes
        return ragged and len({(len(shape), shape[1:]) for shape in shapes}) == 1
    plain = (str, int, float, np.number)
    lists = all(isinstance(item, list) and all(isinstance(one, plain) for one in item) for item in items)
    return lists or all(isinstance(item, plain) for item in items)


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
        name = names[first] if first < len(names) else f"argument {first}"
    else:
        name = first
    return ".".join([name, *(str(key) for key in keys)])


def _parameter_names(called: Callable[..., Any]) -> Sequence[str]:
    # A functools.partial, a scripted module and the like may have no signature.
    try:
        return list(inspect.signature(called).parameters)
    except (TypeError, ValueError):
        return []


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


@dataclass(frozen=True, eq=False)
class Loss:
    """What one loss of a step read."""

    name: str
    input: Tensor
    target: Any
    inside: tuple[nn.Module, ...] = ()
    """The modules that ran meanwhile, outermost first."""


@dataclass(eq=False)
class Run:
    """One run of a module that the mode records."""

    module: nn.Module
    path: str
    outer: Run | None
    """The run that it is part of; None: it is the outermost."""
    call: Call
    turn: int
    """How many times the module had run in this step before."""
    made: Mapping[int, tuple[weakref.ref[Tensor], Event]]
    """What was made of weights, by the id of the tensor."""
    output: Any = None
    """What it returned, where that is kept."""
    has_ended: bool = False
    precision: Precision | None = None
    """The autocast in which it ran."""
    tensors: Mapping[Path, Tensor] = field(default_factory=dict)
    """Those in what it returned, where they are kept."""
    entered: Call | None = None
    """What it got, unchanged by what the module does in place; None where that is not kept."""
    given: Mapping[Path, Tensor] = field(default_factory=dict)
    """Of an outermost call the very tensors that it got."""
    events: list[Event] = field(default_factory=list)
    """The attention that is computed meanwhile, in this module or in others that it calls."""
    folded: dict[tuple[bool, int], int] = field(default_factory=dict)
    """The number of heads by the number of rows into which they were folded, and by whether heads come first."""

    def origin(self, tensor: Any) -> Event | None:
        """The attention whose weights a tensor was made of, by other operations than products."""
        return look_up(self.made, tensor)

    def outwards(self) -> Iterator[Run]:
        """The run and those that it is part of, innermost first."""
        run: Run | None = self
        while run is not None:
            yield run
            run = run.outer


class StepTrace:
    """The calls and losses of a step, all of a first one, and later on those of chosen modules.

    Nothing is copied but the arguments of outermost calls in a first step, which a model may change in place.

    Attributes
    ----------
    is_complete
        Whether all calls and losses of this step are noted.
    runs
        The calls in the order in which they began.
    losses
        In the order in which they were computed; empty where they are not read.
    read
        What the step or a metric takes for class scores.
    """

    def __init__(self) -> None:
        self.is_complete = True
        self.chosen: dict[nn.Module, str] = {}
        self.copied: set[nn.Module] = set()
        self.reads_losses = False
        self.has_losses_inside: set[nn.Module] = set()
        self.clear()

    def clear(self) -> None:
        """Forget the step."""
        self.runs: list[Run] = []
        self.losses: list[Loss] = []
        self.read: list[Tensor] = []
        self._budget = BUDGET

    def follow(self, modules: Mapping[nn.Module, str], reads_losses: bool) -> None:
        """Note the calls of these modules in later steps, and what losses read."""
        self.chosen |= modules
        if reads_losses:  # outside of the modules that compute none
            self.reads_losses = True
            self.has_losses_inside |= {module for loss in self.losses for module in loss.inside}
            self.chosen |= {run.module: run.path for run in self.outermost()}

    def looks_for_losses(self, running: Sequence[Run]) -> bool:
        """Whether a loss may be computed where these modules run."""
        may_be_inside = not running or running[0].module in self.has_losses_inside
        return self.is_complete or (self.reads_losses and may_be_inside)

    def begin(self, run: Run) -> None:
        """Note a call that begins."""
        if self.is_complete or run.module in self.chosen:
            self.runs.append(run)
            if run.outer is None or not self.is_complete:
                run.precision = Precision.of(run.call)
            if run.module in self.copied or (self.is_complete and run.outer is None):
                run.given = dict(run.call.tensors())
                run.entered = run.call.copied(run.given)

    def end(self, run: Run, output: Any) -> None:
        """Note what a call returned."""
        if not (self.is_complete or run.module in self.chosen):
            return
        tensors = {path: one for path, one in find_tensors(output) if one.layout == torch.strided and not one.is_nested}
        run.has_ended = True
        size = sum(one.element_size() * prod(one.shape) for one in tensors.values())
        is_kept = run.module in self.chosen or run.outer is None
        if is_kept or size <= min(self._budget, BUDGET // 16):
            self._budget -= 0 if is_kept else size
            is_copied = run.module in self.copied
            # Not what holds them, which the model may give other tensors.
            run.tensors = {path: one.clone() if is_copied else one for path, one in tensors.items()}
            run.output = output
        if is_kept and run.entered is None:
            run.entered = run.call

    def note_loss(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], inside: Sequence[Run]) -> None:
        """Note what a loss is about to read."""
        given = dict(zip(("input", "target"), args, strict=False), **kwargs)
        if isinstance(given.get("input"), Tensor):
            modules = tuple(run.module for run in inside)
            self.losses.append(Loss(function.__name__, given["input"].detach(), given.get("target"), modules))

    def note_scores(self, args: Sequence[Any], running: Sequence[Run]) -> None:
        """Note what the step, or a metric in it, takes for class scores."""
        is_metric = all(hasattr(run.module, "update") and hasattr(run.module, "compute") for run in running)
        if is_metric and args and isinstance(args[0], Tensor) and args[0].dim() in (1, 2):
            self.read.append(args[0].detach())

    def outermost(self) -> list[Run]:
        """The calls that are in no other one."""
        return [run for run in self.runs if run.outer is None]

    def inside(self, root: Run | None) -> list[Run]:
        """The calls in another one, and that one itself; None: all."""
        return [run for run in self.runs if root is None or any(one is root for one in run.outwards())]

    def find(self, path: str, turn: int = 0, root: Run | None = None) -> Run | None:
        """The call of a module with this number, from 0 on, among those in another call."""
        found = [run for run in self.inside(root) if run.path == path]
        return found[turn] if turn < len(found) else None


def look_up(book: Mapping[int, tuple[weakref.ref[Tensor], Note]], tensor: Any) -> Note | None:
    """What was noted of a tensor; None for one that has the id of an earlier tensor."""
    reference, note = book.get(id(tensor), (None, None))
    return note if reference is not None and reference() is tensor else None


def output_at(run: Run | None, path: Path) -> Tensor | None:
    """A tensor in what a call returned; None if it is not there."""
    return None if run is None else run.tensors.get(path)


def same_numbers(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their axes of length 1 and their precision. Looks at them."""
    if tensor is other:
        return True
    if tensor.numel() != other.numel() or tensor.device != other.device or not tensor.numel():
        return False
    squeezed = [one for one in tensor.shape if one != 1], [one for one in other.shape if one != 1]
    if squeezed[0] != squeezed[1] or tensor.is_floating_point() != other.is_floating_point():
        return False
    with torch.no_grad():
        one, two = tensor.reshape(-1).float(), other.reshape(-1).float()
        return bool(((one == two) | (one.isnan() & two.isnan())).all())
