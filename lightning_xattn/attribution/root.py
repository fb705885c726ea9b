"""Run what gives the predictions once more, with other tensors at some places; the model's state is restored."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.known_outputs import KnownOutputs
from lightning_xattn.attribution.outputs import ModelOutput, ReadOutput
from lightning_xattn.attribution.ports import Column, Key, Place
from lightning_xattn.attribution.state import HOOKS, ModelState, torch_generators
from lightning_xattn.capture.attention_mode import (
    AttentionMode,
    get_module,
    run_uncompiled,
    walk_modules,
    wrap_forwards,
)
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
from lightning_xattn.capture.events import RecordLevel
from lightning_xattn.capture.labels.places import to_labels


class ReplayError(Exception):
    """Why the predictions cannot be replayed, as the end of a sentence."""


@dataclass(frozen=True)
class PredictionPlace:
    """Where in a run the tensor with the predictions is.

    Attributes
    ----------
    kind
        "call": a module returns it; "output": the step returns it; "loss": a loss reads it; "callable": ``select``
        gives it.
    turn
        The number of the module's call within the root, or of the loss in the step, from 0 on.
    select
        Takes what the step returned, its batch and what ``forward`` returned.
    """

    kind: str
    path: str = ""
    turn: int = 0
    leaf: Path = ()
    select: Callable[[Any, Any, Any], Any] | None = None


class Intact(NamedTuple):
    """What a run of a call as it was gave.

    Attributes
    ----------
    values
        What is at the places that were asked for, samples first.
    outputs
        What the calls there returned.
    model_output
        What the predictions mean.
    """

    values: dict[Column, Tensor]
    outputs: dict[Key, Any]
    model_output: ModelOutput


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
    changes_state
        Whether a run was seen to change the model's state, so that it is put back between any two runs.
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
    changes_state: bool = False
    _state: ModelState | None = None
    _shares_state: bool = False
    _is_restoring: bool = False

    def __post_init__(self) -> None:
        self.axes = {path: samples_axis(leaf, self.samples) for path, leaf in self.call.leaves()}

    def __str__(self) -> str:
        return "the step" if self.path is None else f"'{self.path}'" if self.path else "forward"

    def part(self, rows: Tensor, others: Mapping[Path, Any] | None = None) -> Call:
        """The call with some of its samples, and other values in some places. What has no samples stays as it is."""
        values = {
            path: take_samples(self.call[path], axis, rows)
            for path, axis in self.axes.items()
            if axis is not None and path not in (others or {})
        }
        return self.call.replaced(values | dict(others or {}))

    @contextmanager
    def sharing_state(self) -> Iterator[None]:
        """Let all ``keeping_state`` in the block share one copy of the state, made by the first of them.

        Nothing else runs the model in the block, or changes it.
        """
        if self._shares_state:
            yield
            return
        self._shares_state = True
        try:
            yield
        finally:
            self._shares_state, self._state = False, None

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
            if not self._shares_state:
                self._state = None

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Put the model's state back at the end of the block, which runs under the conditions of the step.

        In another such block only torch's random generators begin again, as they do for each run.

        Raises
        ------
        ReplayError
            If it cannot be kept or put back.
        """
        if self._is_restoring:
            begin_generators(self.generators)
            yield
            return
        with self.keeping_state():
            assert self._state is not None
            state = restoring_state(self._state, self.with_hooks, self.generators, self.model)
            self._is_restoring = True
            try:
                with state, self.precision.entered():
                    yield
            except RuntimeError as error:
                raise ReplayError(str(error)) from error
            finally:
                self._is_restoring = False
                self.changes_state |= self._state.has_changed

    def of_copies(self, call: Call) -> Root:
        """The same of a copy of its call, inside of ``keeping_state``: with the same state, which it restores, too."""
        assert self._state is not None
        self._state.add(call.args, call.kwargs)
        return replace(self, call=call)

    def restoring_once(self) -> AbstractContextManager[None]:
        """Put the model's state back at the end of several runs; after each where a run is known to change it."""
        return nullcontext() if self.changes_state else self.restoring()

    def run(
        self,
        call: Call,
        patch: Mapping[Place, Tensor] | None = None,
        templates: Mapping[Key, Any] | None = None,
        capture: Collection[Key] | None = (),
        flow: Dataflow | None = None,
        known: KnownOutputs | None = None,
    ) -> tuple[Tensor, dict[Key, Any], dict[Key, Call]]:
        """Run once; inside of ``restoring``.

        Parameters
        ----------
        call
            With what, see ``part``.
        patch
            Other tensors at some places.
        templates
            By call what it returns besides the tensors at its places, and instead of running; None: all calls run.
        capture
            The calls whose outputs and arguments are kept; None: all.
        flow
            Notes which labels reach what.
        known
            The outputs of calls in earlier runs of the same samples, which need not run again.

        Returns
        -------
        predictions, outputs, arguments
            The tensor at ``place``, and copies of what was captured.

        Raises
        ------
        ReplayError
            If it fails, or gives no predictions.
        """
        held: dict[str, dict[Key, dict[Path, Tensor]]] = {"input": {}, "argument": {}, "output": {}}
        for spot, tensor in (patch or {}).items():
            held[spot.kind].setdefault(spot.key, {})[spot.where] = tensor
        for inputs in held["input"].values():
            call = call.replaced(inputs)
        counts: Counter[str] = Counter()
        outputs: dict[Key, Any] = {}
        arguments: dict[Key, Call] = {}
        found: list[Tensor] = []
        forward_output: Any = None
        place, losses = self.place, StepTrace()

        def around(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
            nonlocal forward_output
            path = paths[module]
            key = path, counts[path]
            counts[path] += 1
            own = Call(args, kwargs).replaced(held["argument"].get(key, {}))
            if capture is None or key in capture:
                arguments[key] = own.copied(dict(own.tensors()))
            given = held["output"].get(key, {})
            if given and templates is not None:
                output = templates.get(key)
            elif known is not None and not given and module in known.paths:
                output = known.run(key, forward, own)
            elif given or flow is None:
                output = forward(*own.args, **own.kwargs)
            else:
                output = flow.around(path, key[1], module, forward, own.args, own.kwargs)
            for where, tensor in given.items():
                output = replace_item(output, where, tensor)
            if capture is None or key in capture:
                outputs[key] = copy_tensors(output)
            if key == ("", 0):
                forward_output = output
            if place.kind == "call" and key == (place.path, place.turn):
                found.extend(tensor for where, tensor in find_tensors(output) if where == place.leaf)
            return output

        if flow is None and capture is not None:
            needed = {path for path, _ in (*held["argument"], *held["output"], *capture)}
            needed |= {place.path} if place.kind in ("call", "callable") else set()
            paths = {} if known is None else dict(known.paths)
            paths |= {get_module(self.model, path): path for path in needed}
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
                if place.select is not None:
                    selected = to_labels(place.select(output, call.args[0], forward_output))
                    found = [selected] if isinstance(selected, Tensor) else []
            except ReplayError:
                raise
            except Exception as error:  # whatever a user's module raises for other tensors or another number of them
                raise ReplayError(f"it fails when it is run again: {error!r}") from error
        if place.kind == "loss":
            found = [one.input for one in losses.losses[place.turn : place.turn + 1]]
        elif place.kind == "output":
            found = [tensor for where, tensor in find_tensors(output) if where == place.leaf]
        if not found:
            raise ReplayError("it gives no predictions when it is run again")
        return found[-1], outputs, arguments

    def run_intact(self, columns: Mapping[Column, Place]) -> Intact:
        """Run the call as it is.

        Raises
        ------
        ReplayError
            If that is not possible.
        """
        with self.restoring():
            call = self.call.copied(dict(self.call.tensors()))
            captured = [place.key for place in columns.values() if place.kind != "input"]
            predictions, outputs, arguments = self.run(call, capture=captured)
            return self.read_intact(columns, outputs, arguments, self.read_output(predictions.detach()))

    def read_intact(
        self,
        columns: Mapping[Column, Place],
        outputs: Mapping[Key, Any],
        arguments: Mapping[Key, Call],
        model_output: ModelOutput,
    ) -> Intact:
        """What a run of the whole call gave at these places, which captured their calls.

        Raises
        ------
        ReplayError
            If a place has no tensor.
        """
        values = {}
        for column, place in columns.items():
            if place.kind == "output":
                value = dict(find_tensors(outputs.get(place.key))).get(place.where)
            else:
                value = (self.call if place.kind == "input" else arguments[place.key])[place.where]
            if value is None:
                raise ReplayError(f"'{place.path}' gives something else when it is run again")
            values[column] = value.detach().movedim(place.axis, 0).clone()
        keys = {place.key for place in columns.values() if place.kind != "input"}
        return Intact(values, {key: outputs[key] for key in keys if key in outputs}, model_output)

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


@contextmanager
def restoring_state(
    state: ModelState, with_hooks: bool, generators: Sequence[Tensor], model: nn.Module
) -> Iterator[None]:
    """Put a model's state back however the block ends. In the block nothing is logged, compiled or differentiated.

    Parameters
    ----------
    state
        The model's, as it is now.
    with_hooks
        Whether what has been hooked on the model's modules, and on all modules, is called.
    generators
        The states in which torch's random generators begin.
    model
        The model, whose Trainer's loggers get nothing meanwhile.
    """
    kept = vars(torch.nn.modules.module)
    everywhere = [(kept[f"_global{name}"], dict(kept[f"_global{name}"])) for name in HOOKS if f"_global{name}" in kept]
    is_interrupted = False
    try:
        with ExitStack() as contexts:
            contexts.enter_context(torch.no_grad())
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import is slow
                contexts.enter_context(run_uncompiled())
            state.set_gradients_aside()
            begin_generators(generators)
            contexts.enter_context(_mute_loggers(model))
            for book, _ in () if with_hooks else everywhere:
                book.clear()
            for one in state.modules:
                changed = dict[str, Any]() if with_hooks else {name: OrderedDict() for name in HOOKS}
                if hasattr(one, "log_dict") and hasattr(one, "log"):
                    changed |= dict.fromkeys(("log", "log_dict"), lambda *args, **kwargs: None)
                contexts.callback(_put_attributes, one, {name: vars(one).get(name, _ABSENT) for name in changed})
                vars(one).update(changed)
            yield
    except Exception:  # an error of the restoring replaces it, as the state is then not whole
        raise
    except BaseException:  # an interrupt, which must not be lost behind what cannot be put back
        is_interrupted = True
        raise
    finally:
        for book, before in everywhere:
            book.clear()
            book.update(before)
        with suppress(*[RuntimeError] * is_interrupted):
            state.restore()


_ABSENT = object()


def _put_attributes(one: Any, before: Mapping[str, Any]) -> None:
    """Put back what an object had in its ``__dict__``: what is left to restore is what a run has changed."""
    for name, value in before.items():
        if value is _ABSENT:
            vars(one).pop(name, None)
        else:
            vars(one)[name] = value


def begin_generators(states: Sequence[Tensor]) -> None:
    """Let torch's random generators begin in these states."""
    for generator, begin in zip(torch_generators(), states, strict=False):
        generator.set_state(begin)


@contextmanager
def _mute_loggers(model: nn.Module) -> Iterator[None]:
    """In the block the Trainer's loggers, which a step may write to, do nothing."""
    trainer: Any = vars(model).get("_trainer")
    if not getattr(trainer, "loggers", None):
        yield
        return
    from pytorch_lightning.loggers.logger import DummyLogger  # here, as without a Trainer nobody has imported it

    before = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in before]
    try:
        yield
    finally:
        trainer.loggers = before
