"""What a step ran: the calls of modules with what they got and gave, and what its losses read."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_xattn.capture.calls import Call, Path, Precision, find_tensors

if TYPE_CHECKING:
    from lightning_xattn.capture.readers import Event

Note = TypeVar("Note")

LOSSES: dict[Any, tuple[str, str]] = {
    **dict.fromkeys((F.cross_entropy, F.nll_loss, F.multi_margin_loss), ("input", "target")),
    **dict.fromkeys((F.binary_cross_entropy, F.binary_cross_entropy_with_logits), ("input", "target")),
    **dict.fromkeys((F.kl_div, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss), ("input", "target")),
    **dict.fromkeys((F.soft_margin_loss, F.hinge_embedding_loss), ("input", "target")),
    **dict.fromkeys((F.gaussian_nll_loss, F.poisson_nll_loss), ("input", "target")),
    **dict.fromkeys((F.multilabel_soft_margin_loss, F.multilabel_margin_loss), ("input", "target")),
}
"""The functions that compare predictions with targets, and the names of the two arguments."""

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
        if self.is_complete:
            return True
        quiet = self.reads_losses and not any(run.module in self.has_losses_inside for run in running[:1])
        return self.reads_losses and not (running and quiet)

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
        names = LOSSES[function]
        given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
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
