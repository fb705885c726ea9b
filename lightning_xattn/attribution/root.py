"""Run what gives the predictions once more, with other tensors at some places; the model's state is restored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.outputs import ModelOutput, ReadOutput
from lightning_xattn.attribution.restoring import restoring_state
from lightning_xattn.attribution.state import ModelState
from lightning_xattn.capture.attention_mode import AttentionMode, get_module, walk_modules, wrap_forwards
from lightning_xattn.capture.calls import (
    Call,
    Path,
    Precision,
    StepTrace,
    copy_tensors,
    find_tensors,
    replace_item,
    samples_axis,
    take_samples,
)
from lightning_xattn.capture.dataflow import Dataflow
from lightning_xattn.capture.readers import RecordLevel

Key = tuple[str, int]
"""A module's path and the number of its call within the root, from 0 on."""


class ReplayError(Exception):
    """Why the predictions cannot be replayed, as the end of a sentence."""


@dataclass(frozen=True)
class PredictionPlace:
    """Where in a run the tensor with the predictions is."""

    kind: str
    """"call": a module returns it; "output": the step returns it; "loss": a loss reads it."""
    path: str = ""
    turn: int = 0
    """The number of the module's call within the root, or of the loss in the step, from 0 on."""
    leaf: Path = ()


@dataclass(frozen=True, eq=False)
class Patch:
    """What a run does differently.

    Attributes
    ----------
    outputs
        By call the tensors that it returns instead of its own.
    templates
        By call what it returns besides.
    arguments
        By call the tensors that it gets instead.
    skips
        Whether calls whose output is replaced do not run at all.
    """

    outputs: Mapping[Key, Mapping[Path, Tensor]] = field(default_factory=dict)
    templates: Mapping[Key, Any] = field(default_factory=dict)
    arguments: Mapping[Key, Mapping[Path, Tensor]] = field(default_factory=dict)
    skips: bool = True


@dataclass(eq=False)
class Root:
    """The outermost call that gives the predictions, or the whole step: a function of its arguments.

    Attributes
    ----------
    model
        The whole model, whose modules' paths are used.
    function, call
        What runs again, and with what.
    samples
        How many samples the call has.
    precision, generators
        The autocast of the step, and the states of torch's random generators when it began.
    place, read
        Where the predictions are, and what their tensor means.
    path, turn
        The path of the module that is called, and the number of the call in the step, from 0 on; None: the step is.
    """

    model: nn.Module
    function: Callable[..., Any]
    call: Call
    samples: int
    precision: Precision
    generators: Sequence[Tensor]
    place: PredictionPlace
    read: ReadOutput
    path: str | None
    turn: int = 0
    with_hooks: bool = False
    _state: ModelState | None = None

    def __post_init__(self) -> None:
        self.axes = {path: samples_axis(leaf, self.samples) for path, leaf in self.call.leaves()}

    def samples_axis(self, path: Path) -> int:
        """The axis of the samples of an input that has one."""
        axis = self.axes[path]
        assert axis is not None
        return axis

    def part(self, rows: Tensor, others: Mapping[Path, Any] | None = None) -> Call:
        """The call with some of its samples, and other values in some places. What has no samples stays as it is."""
        values = {
            path: take_samples(self.call[path], axis, rows)
            for path, axis in self.axes.items()
            if axis is not None and path not in (others or {})
        }
        return self.call.replaced(values | dict(others or {}))

    @contextmanager
    def keeping_state(self) -> Iterator[None]:
        """Keep the model's state once, for all runs in the block to restore: nothing else runs the model meanwhile.

        Raises
        ------
        ReplayError
            If the state cannot be kept.
        """
        if self._state is not None:
            yield
            return
        try:
            self._state = ModelState(self.model, self.function, self.call.args, self.call.kwargs)
        except Exception as error:  # no memory for a copy, or an object of the user's that cannot be read
            raise ReplayError(f"the model's state cannot be kept, to be restored afterwards: {error!r}") from error
        try:
            yield
        finally:
            self._state = None

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Put the model's state back at the end of the block, which runs under the conditions of the step.

        Raises
        ------
        ReplayError
            If it cannot be kept or put back.
        """
        with self.keeping_state():
            assert self._state is not None
            try:
                state = restoring_state(self._state, self.with_hooks, self.generators, self.model)
                with state, self.precision.entered():
                    yield
            except RuntimeError as error:
                raise ReplayError(str(error)) from error

    def run(
        self,
        call: Call,
        patch: Patch | None = None,
        capture: Collection[Key] | None = (),
        flow: Dataflow | None = None,
    ) -> tuple[Tensor, dict[Key, Any], dict[Key, Call]]:
        """Run once; inside of ``restoring``.

        Parameters
        ----------
        call
            With what, see ``part``.
        patch
            What is different.
        capture
            The calls whose outputs and arguments are kept; None: all.
        flow
            Notes which labels reach what.

        Returns
        -------
        predictions, outputs, arguments
            The tensor at ``place``, and copies of what was captured.

        Raises
        ------
        ReplayError
            If it fails, or gives no predictions.
        """
        patch = patch or Patch()
        counts: Counter[str] = Counter()
        outputs: dict[Key, Any] = {}
        arguments: dict[Key, Call] = {}
        found: list[Tensor] = []
        place, losses = self.place, StepTrace()

        def around(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
            path = paths[module]
            key = path, counts[path]
            counts[path] += 1
            own = Call(args, kwargs)
            if key in patch.arguments:
                own = own.replaced(patch.arguments[key])
            if capture is None or key in capture:
                arguments[key] = own.copied({where for where, _ in own.tensors()})
            if key in patch.outputs:
                given = patch.templates.get(key) if patch.skips else forward(*own.args, **own.kwargs)
                for where, tensor in patch.outputs[key].items():
                    given = replace_item(given, where, tensor)
                output = given
            elif flow is None:
                output = forward(*own.args, **own.kwargs)
            else:
                output = flow.around(path, key[1], module, forward, own.args, own.kwargs)
            if capture is None or key in capture:
                outputs[key] = copy_tensors(output)
            if place.kind == "call" and key == (place.path, place.turn):
                found.extend(tensor for where, tensor in find_tensors(output) if where == place.leaf)
            return output

        if flow is None and capture is not None:
            needed = {path for path, _ in (*patch.outputs, *patch.arguments, *capture)}
            needed |= {place.path} if place.kind == "call" else set()
            paths = {get_module(self.model, path): path for path in needed}
        else:
            paths = {module: path for path, module in walk_modules(self.model)}
        with ExitStack() as changes:
            wrap_forwards(paths, around, changes)
            if place.kind == "loss":
                mode = AttentionMode({}, lambda *_: RecordLevel.NOTHING, lambda *_: None, trace=losses)
                mode.attach(changes)
            if flow is not None:
                changes.enter_context(flow)
            try:
                output = self.function(*call.args, **call.kwargs)
            except ReplayError:
                raise
            except Exception as error:  # whatever a user's module raises for other tensors or another number of them
                raise ReplayError(f"it fails when it is run again: {error!r}") from error
        if place.kind == "loss":
            found = [losses.losses[place.turn].input] if place.turn < len(losses.losses) else []
        elif place.kind == "output":
            found = [tensor for where, tensor in find_tensors(output) if where == place.leaf]
        if not found:
            raise ReplayError("it gives no predictions when it is run again")
        return found[-1], outputs, arguments

    def read_output(self, predictions: Tensor) -> ModelOutput:
        """What the predictions mean.

        Raises
        ------
        ReplayError
            If they are none.
        """
        output = self.read(predictions)
        if output is None:
            raise ReplayError("it gives no class scores when it is run again")
        return output

    def coarsest(self, tensors: Collection[Tensor]) -> torch.dtype:
        """The coarsest precision among these and autocast's."""
        kinds = [self.precision.dtype or torch.float32, *(one.dtype for one in tensors)]
        return max((kind for kind in kinds if kind.is_floating_point), key=lambda kind: torch.finfo(kind).eps)
