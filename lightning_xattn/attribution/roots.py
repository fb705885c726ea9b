"""What gives the predictions in a first step: the outermost call, or the step itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.outputs import ModelOutput, ReadOutput, find_model_output
from lightning_xattn.attribution.root import PredictionPlace, ReplayError, Root
from lightning_xattn.capture.calls import Call, Path, Precision, find_tensors
from lightning_xattn.capture.labels import Labels
from lightning_xattn.capture.tensors import are_same
from lightning_xattn.capture.trace import Run, StepTrace, same_numbers
from lightning_xattn.capture.wrappers import plain_path


@dataclass(frozen=True, eq=False)
class StepCall:
    """How the step was called, so that it can run again.

    Attributes
    ----------
    function, args
        The step, None where it cannot run again, and its arguments, the batch first.
    outputs
        What it returned.
    generators
        The states of torch's random generators when it began.
    """

    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    outputs: Any = None
    generators: Sequence[Tensor] = ()


Predictions = tuple[ModelOutput, ReadOutput, Run | None, Path]
"""What the predictions of a first step are, what their tensor means, the outermost call that gave it, and where in what
that returned; None: the step made it."""


def find_roots(
    model: nn.Module,
    trace: StepTrace,
    step: StepCall | None,
    labels: Labels,
    samples: int | None,
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

    Returns
    -------
    roots, live, name
        The roots, the predictions of the step, and the name of what gave them.

    Raises
    ------
    ReplayError
        If there is none.
    """
    wanted, generators = labels.raw, () if step is None else step.generators
    if wanted is None:
        raise ReplayError("the predictions are not clear" if labels.doubts else "no predictions were found in the step")
    if samples is None:
        samples = len(wanted) if wanted.dim() else 1
    found = _find_predictions(trace, labels, wanted, samples)
    if found is None:
        raise ReplayError("no call gives the predictions, and the step does not return them")
    roots, (live, read, run, leaf) = [], found
    name = labels.prediction_name if run is None else plain_path(model, run.path) or "forward"
    precision = next((one.precision for one in trace.runs if one.precision), None) or Precision("cpu", None)
    if run is not None:
        outermost = list(run.outwards())[-1]
        inside = [one for one in trace.inside(outermost) if one.path == run.path]
        place = PredictionPlace("call", run.path, inside.index(run), leaf)
        if outermost.entered is not None:
            call, own = outermost.entered, outermost.precision or precision
            path, turn = outermost.path, [one for one in trace.runs if one.path == outermost.path].index(outermost)
            roots.append(Root(model, outermost.module, call, samples, own, generators, place, read, path, turn))
    if step is not None and step.function is not None:
        in_step = _find_in_step(trace, step, run, leaf, wanted)
        if in_step is not None:
            call = Call(step.args, {})
            roots.append(Root(model, step.function, call, samples, precision, generators, in_step, read, None))
    if not roots:
        raise ReplayError("no call gives the predictions, and the step is not known")
    return roots, live, name


def _find_predictions(trace: StepTrace, labels: Labels, wanted: Tensor, samples: int) -> Predictions | None:
    """The outermost call whose output has the very tensor, or the same numbers, or their scores; else the step."""
    outermost_first = sorted(trace.runs, key=lambda run: sum(1 for _ in run.outwards()))
    given = [(run, leaf, one.detach()) for run in outermost_first for leaf, one in run.tensors.items()]
    ways: list[Callable[[Tensor], bool]] = [lambda one: are_same(one, wanted), lambda one: same_numbers(one, wanted)]
    if labels.are_ids or labels.scores is not None:
        ways.append(lambda one: True)
    candidates = (one for fits in ways for one in given if fits(one[2]))
    for run, leaf, tensor in chain(candidates, [(None, (), wanted)]):
        read = find_model_output(tensor, samples, labels)
        with torch.no_grad():
            live = None if read is None else read(tensor)
        if read is not None and live is not None:
            return live, read, run, leaf
    return None


def _find_in_step(
    trace: StepTrace, step: StepCall, run: Run | None, leaf: Path, wanted: Tensor
) -> PredictionPlace | None:
    """Where the predictions are when the whole step runs."""
    if run is not None:
        turn = [one for one in trace.runs if one.path == run.path].index(run)
        return PredictionPlace("call", run.path, turn, leaf)
    for where, one in find_tensors(step.outputs):
        if same_numbers(one.detach(), wanted):
            return PredictionPlace("output", leaf=where)
    for number, loss in enumerate(trace.losses):
        if same_numbers(loss.input, wanted):
            return PredictionPlace("loss", turn=number)
    return None
