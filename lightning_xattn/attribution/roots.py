"""What gives the predictions in a first step: the outermost call, or the step itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.outputs import ModelOutput, ReadOutput, find_model_output
from lightning_xattn.attribution.root import PredictionPlace, ReplayError, Root
from lightning_xattn.capture.calls import Call, Path, Precision, Run, StepTrace, find_tensors, same_numbers
from lightning_xattn.capture.labels import Labels
from lightning_xattn.capture.tensors import are_same
from lightning_xattn.capture.wrappers import plain_path


@dataclass(frozen=True, eq=False)
class StepCall:
    """How the step was called, so that it can run again.

    Attributes
    ----------
    function, args
        The step and its arguments, the batch first.
    outputs
        What it returned.
    generators
        The states of torch's random generators when it began.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    outputs: Any = None
    generators: Sequence[Tensor] = ()


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of a first step.

    Attributes
    ----------
    live
        What they are.
    read
        What their tensor means.
    run, leaf
        The outermost call that gave them, and where in what it returned; None: the step made them.
    """

    live: ModelOutput
    read: ReadOutput
    run: Run | None = None
    leaf: Path = ()


def find_roots(
    model: nn.Module,
    trace: StepTrace,
    step: StepCall | None,
    labels: Labels,
    samples: int | None,
    generators: Sequence[Tensor],
) -> tuple[list[Root], ModelOutput, str]:
    """What gives the predictions, the outermost call first, then the step.

    Parameters
    ----------
    model
        The whole model.
    trace, step, labels
        Of a first step, whose values are looked at.
    samples
        How many samples it has; None: as many as predictions.
    generators
        The states of torch's random generators when it began.

    Returns
    -------
    roots, live, name
        The roots, the predictions of the step, and the name of what gave them.

    Raises
    ------
    ReplayError
        If there is none.
    """
    wanted = labels.raw
    if wanted is None:
        raise ReplayError("the predictions are not clear" if labels.doubts else "no predictions were found in the step")
    if samples is None:
        samples = len(wanted) if wanted.dim() else 1
    found = _find_call(trace, labels, wanted, samples) or _read_made(labels, wanted, samples)
    if found is None:
        raise ReplayError("no call gives the predictions, and the step does not return them")
    roots, run = [], found.run
    name = labels.prediction_name if run is None else plain_path(model, run.path) or "forward"
    precision = next((one.precision for one in trace.runs if one.precision), None) or Precision("cpu", None)
    if run is not None:
        outermost = list(run.outwards())[-1]
        inside = [one for one in trace.inside(outermost) if one.path == run.path]
        place = PredictionPlace("call", run.path, inside.index(run), found.leaf)
        if outermost.entered is not None:
            call, own = outermost.entered, outermost.precision or precision
            path, turn = outermost.path, [one for one in trace.runs if one.path == outermost.path].index(outermost)
            roots.append(Root(model, outermost.module, call, samples, own, generators, place, found.read, path, turn))
    if step is not None:
        in_step = _find_in_step(trace, step, found, wanted)
        if in_step is not None:
            call = Call(step.args, {})
            roots.append(Root(model, step.function, call, samples, precision, generators, in_step, found.read, None))
    if not roots:
        raise ReplayError("no call gives the predictions, and the step is not known")
    return roots, found.live, name


def _find_call(trace: StepTrace, labels: Labels, wanted: Tensor, samples: int) -> Predictions | None:
    """The outermost call whose output has the predictions: the very tensor, or the same numbers, or their scores."""
    outermost_first = sorted(trace.runs, key=lambda run: sum(1 for _ in run.outwards()))
    given = [(run, leaf, one.detach()) for run in outermost_first for leaf, one in run.tensors.items()]
    ways: list[Callable[[Tensor], bool]] = [lambda one: are_same(one, wanted), lambda one: same_numbers(one, wanted)]
    if labels.are_ids or labels.scores is not None:
        ways.append(lambda one: True)
    for fits in ways:
        for run, leaf, one in given:
            found = _read(one, samples, labels) if fits(one) else None
            if found is not None:
                return Predictions(*found, run, leaf)
    return None


def _read_made(labels: Labels, wanted: Tensor, samples: int) -> Predictions | None:
    """Predictions that the step made itself."""
    found = _read(wanted, samples, labels)
    return None if found is None else Predictions(*found)


def _read(tensor: Tensor, samples: int, labels: Labels) -> tuple[ModelOutput, ReadOutput] | None:
    read = find_model_output(tensor, samples, labels)
    with torch.no_grad():
        live = None if read is None else read(tensor)
    return None if read is None or live is None else (live, read)


def _find_in_step(trace: StepTrace, step: StepCall, found: Predictions, wanted: Tensor) -> PredictionPlace | None:
    """Where the predictions are when the whole step runs."""
    if found.run is not None:
        turn = [one for one in trace.runs if one.path == found.run.path].index(found.run)
        return PredictionPlace("call", found.run.path, turn, found.leaf)
    losses = [number for number, loss in enumerate(trace.losses) if same_numbers(loss.input, wanted)]
    returned = [where for where, one in find_tensors(step.outputs) if same_numbers(one.detach(), wanted)]
    if returned:
        return PredictionPlace("output", leaf=returned[0])
    return PredictionPlace("loss", turn=losses[0]) if losses else None
