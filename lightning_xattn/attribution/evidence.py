"""Evidence of how inputs reach the predictions: labels of a run, and runs with other samples' inputs.

At most 20 runs on 16 samples, once, in a model's first step, and about three of a large one; each leaves the model's
state as it was. What a run has shown is not asked again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.attribution.outputs import ModelOutput, are_same_outputs
from lightning_xattn.attribution.ports import Column, Key, Place
from lightning_xattn.attribution.root import Intact, ReplayError, Root
from lightning_xattn.capture.calls import Call, Path, find_tensors, name_argument, take_samples
from lightning_xattn.capture.dataflow import Dataflow, LabelledCall

SAMPLES = 16
"""How many samples of a first batch are run again to find the modalities."""

LARGE = 2**18
"""From how many numbers that modules give in a run on questions share runs, each with some of the samples."""


class Evidence:
    """What a labelled run of a root shows, and further runs.

    Parameters
    ----------
    root
        What gives the predictions.
    live
        The predictions of the step.

    Attributes
    ----------
    rows
        The samples of the runs.
    calls
        The calls of the labelled run, in the order in which they began.
    outputs, arguments
        What they gave and got.
    inputs
        The labels of the root's inputs.
    predicted
        The labels that reach the predictions.

    Raises
    ------
    ReplayError
        If the root cannot be run again.
    """

    def __init__(self, root: Root, live: ModelOutput) -> None:
        self.root = root
        self.rows = torch.arange(min(SAMPLES, root.samples))
        self._live = live
        self._flow = Dataflow()
        self.inputs: dict[Path, int] = {}
        self._shorter: dict[Key, Any] | None = None
        # By places that return what they did: the inputs that reach the predictions otherwise; None: it does not run.
        self._past: dict[frozenset[Place], Collection[Path] | None] = {}
        self._shared: dict[frozenset[Place], Collection[Path]] = {}
        self._equal: set[tuple[frozenset[Place], frozenset[Path]]] = set()
        self._is_apart = False
        self._model_output, self.predicted = self._run_intact()
        self.intact = self._model_output.cpu()
        self._past[frozenset()] = self.reaching

    @property
    def calls(self) -> list[LabelledCall]:
        """See the class."""
        return self._flow.calls

    @property
    def attention(self) -> list[tuple[LabelledCall | None, int, int]]:
        """Of each attention the innermost call around it, and the labels of its queries and keys."""
        return self._flow.attention

    def _run_intact(self) -> tuple[ModelOutput, int]:
        """Run the root as it was, with labels on its inputs; then the labels that reach the predictions."""
        failure = ReplayError("")
        whole = torch.arange(self.root.samples)
        # Without any axis of samples there is nothing to take fewer of, as of graphs.
        can_take = any(axis is not None for axis in self.root.axes.values())
        for rows in (self.rows, whole) if can_take and len(self.rows) < len(whole) else (whole,):
            for with_hooks in (False, True):
                self.root.with_hooks = with_hooks
                self.rows, self._flow = rows, Dataflow()
                call = self.root.part(rows)
                self.inputs = self._label(call, self._flow)
                try:
                    with self.root.restoring():
                        predictions, self.outputs, self.arguments = self.root.run(call, flow=self._flow, capture=None)
                        output = self.root.read_output(predictions.detach())
                        reached = self._flow.of(predictions)
                except ReplayError as error:
                    failure = error
                    continue
                if len(output.values) != len(rows):
                    failure = ReplayError("it gives another number of predictions for fewer samples")
                    if len(output.values) == len(whole):  # all samples ran, whatever the hooks do
                        break
                    continue
                precision = self.root.coarsest([one for _, one in call.tensors()])
                if are_same_outputs(self._live[rows].cpu(), output.cpu(), precision):
                    self._precision = precision
                    return output, reached
                failure = ReplayError("it gives other outputs when it is run again")
        raise failure

    def _label(self, call: Call, flow: Dataflow) -> dict[Path, int]:
        """Give each input a label of its own."""
        labels = {}
        for path, leaf in call.leaves():
            labels[path] = flow.new_label()
            flow.add(leaf, labels[path], own=True)
        return labels

    def _run(
        self, call: Call, patch: Mapping[Place, Tensor] | None = None, capture: Sequence[Key] | None = ()
    ) -> tuple[ModelOutput, dict[Key, Any]]:
        with self.root.restoring():
            predictions, outputs, _ = self.root.run(call, patch, capture=capture)
            return self.root.read_output(predictions).cpu(), outputs

    def read_intact(self, columns: Mapping[Column, Place]) -> Intact | None:
        """What the labelled run gave at these places; None where not all samples ran."""
        if len(self.rows) < self.root.samples:
            return None
        return self.root.read_intact(columns, self.outputs, self.arguments, self._model_output)

    def _are_same(self, one: ModelOutput, other: ModelOutput) -> bool:
        """Whether two runs gave the same, measured by the spread of the intact predictions."""
        first, second = (ModelOutput.joined([self.intact, output]) for output in (one, other))
        return are_same_outputs(first, second, self._precision)

    @property
    def reaching(self) -> dict[Path, int]:
        """The inputs that reach the predictions, with their labels."""
        return {path: label for path, label in self.inputs.items() if label & self.predicted}

    def reaches(self, call: LabelledCall) -> bool:
        """Whether what a call gave reaches the predictions."""
        return any(own & self.predicted for own in call.own.values())

    def name_input(self, path: Path) -> str:
        """An input as a user would name it."""
        return name_argument(self.root.function, path)

    def output_places(self, call: LabelledCall) -> tuple[Place, ...]:
        """What a call returns that reaches the predictions, or if nothing does, all; empty without axes of samples."""
        reaching = [where for where in call.tensors if call.own.get(where, 0) & self.predicted]
        axes = {where: self.find_axis(call, where, call.tensors[where]) for where in reaching or call.tensors}
        known = [Place("output", *call.key, where, axis) for where, axis in axes.items() if axis is not None]
        return tuple(known) if len(known) == len(axes) or not reaching else ()

    def find_axis(self, call: LabelledCall, where: Path, tensor: Tensor) -> int | None:
        """The axis of the samples; where several have their number, the one that is shorter with a sample less."""
        count = len(self.rows)
        fitting = [axis for axis, length in enumerate(tensor.shape) if length == count]
        if len(fitting) > 1 and count > 1:
            if self._shorter is None:
                try:
                    _, self._shorter = self._run(self.root.part(self.rows[:-1]), capture=None)
                except ReplayError:
                    self._shorter = {}
            other = dict(find_tensors(self._shorter.get(call.key))).get(where)
            if other is not None and other.dim() == tensor.dim():
                fitting = [axis for axis in fitting if other.shape[axis] == count - 1] or fitting
        return fitting[0] if fitting else None

    def input_places(self, paths: Sequence[Path]) -> tuple[Place, ...]:
        """The inputs that are tensors with an axis of samples."""
        axes = {path: self.root.axes.get(path) for path in paths if isinstance(self.root.call[path], Tensor)}
        return tuple(Place("input", "", 0, path, axis) for path, axis in axes.items() if axis is not None)

    def reached_around(self, places: Sequence[Place], inputs: Collection[Path]) -> list[Path]:
        """Those of the inputs that reach the predictions otherwise than by these places."""
        exchanged = {place.where for place in places if place.kind == "input"}
        reached = self._find_past(frozenset(place for place in places if place.kind != "input"), inputs)
        return [path for path in inputs if path not in exchanged and (reached is None or path in reached)]

    def try_together(self, groups: Mapping[tuple[Place, ...], Sequence[Path]]) -> None:
        """Ask for several modalities at once what else takes runs for each, by places that may hold them.

        Parameters
        ----------
        groups
            By the places of a modality, its inputs. What a shared run does not show is asked one by one.
        """
        places = [place for several in groups for place in several]
        if len(groups) < 2 or any(place.kind == "input" for place in places):
            return
        if self._is_large() and self._exchange_together(groups):
            return
        with suppress(ReplayError):
            self._shared[frozenset(places)] = self._run_past(places)

    def _find_past(self, places: frozenset[Place], inputs: Collection[Path]) -> Collection[Path] | None:
        """The inputs that reach the predictions where these places return what they did; None where that fails."""
        if places in self._past:
            return self._past[places]
        for several, reached in self._shared.items():
            # What hands none of the inputs on stops none.
            further = 0
            for place in several - places:
                further |= self._made_at(place)
            if places <= several and not any(self.inputs[path] & further for path in inputs):
                return reached
        self._past[places] = None
        for skips in (False, True):  # some models fail where what it returns is replaced
            with suppress(ReplayError):
                self._past[places] = self._run_past(places, skips)
                break
        return self._past[places]

    def _run_past(self, places: Collection[Place], skips: bool = False) -> list[Path]:
        flow, call = Dataflow(self._flow.opaque, keeps_tensors=False), self.root.part(self.rows)
        labels = self._label(call, flow)
        with self.root.restoring():
            patch, templates = self._patch_of(places, self.outputs), self.outputs if skips else None
            predictions, _, _ = self.root.run(call, patch, templates, flow=flow)
            reached = flow.of(predictions)
        return [path for path, label in labels.items() if label & reached]

    def _made_at(self, place: Place) -> int:
        """The labels of the inputs that a place hands on."""
        if place.kind == "argument":
            return self._flow.of(self.arguments[place.key][place.where])
        return next(call for call in self.calls if call.key == place.key).made

    def _is_large(self) -> bool:
        return sum(tensor.numel() for call in self.calls for tensor in call.tensors.values()) >= LARGE

    def _exchange_together(self, groups: Mapping[tuple[Place, ...], Sequence[Path]]) -> bool:
        """Answer ``equals_exchange``, ``reached_around`` and ``looks_across`` by two runs; whether all is as hoped.

        The first samples are as they were; a part of them gets the inputs of one group from others, another part
        those of another group, and the last ones all inputs.
        """
        count, axes = len(self.rows), self.root.axes
        needed = {*self.reaching, *(path for inputs in groups.values() for path in inputs)}
        if count < len(groups) + 2 or any(axes.get(path) is None for path in needed):
            return False
        kept, *parts, others = torch.arange(count).tensor_split(len(groups) + 2)
        order = _in_one_circle(count)

        def take(exchanged: Mapping[Path, Tensor]) -> Call:
            values = {}
            for path, axis in axes.items():
                if axis is not None:
                    rows = torch.arange(count)
                    for part in (others, exchanged.get(path, others)):
                        rows[part] = order[part]
                    values[path] = take_samples(self.root.call[path], axis, self.rows[rows])
            return self.root.call.replaced(values)

        moved = {path: part for part, inputs in zip(parts, groups.values(), strict=True) for path in inputs}
        places = [place for several in groups for place in several]
        flow = Dataflow(self._flow.opaque, keeps_tensors=False)
        try:
            exchanged, outputs = self._run(take(moved), capture=[place.key for place in places])
            if not self._are_same(self.intact[kept], exchanged[kept]):
                return False
            patch, given = self._patch_of(places, self.outputs), self._patch_of(places, outputs)
            for part, several in zip(parts, groups, strict=True):
                rows = torch.cat([part, others])
                for place in several:
                    if patch[place].shape != given[place].shape:
                        return False
                    own = rows.to(given[place].device)
                    patch[place].index_copy_(place.axis, own, given[place].index_select(place.axis, own))
            call = take({})
            labels = self._label(call, flow)
            with self.root.restoring():
                predictions, _, _ = self.root.run(call, patch, flow=flow)
                patched, reached = self.root.read_output(predictions).cpu(), flow.of(predictions)
        except ReplayError:
            return False
        if not self._are_same(exchanged, patched):
            return False
        self._shared[frozenset(places)] = [path for path, label in labels.items() if label & reached]
        self._equal |= {(frozenset(several), frozenset(inputs)) for several, inputs in groups.items()}
        self._is_apart = True
        return True

    def _patch_of(self, places: Collection[Place], outputs: Mapping[Key, Any]) -> dict[Place, Tensor]:
        """What calls gave or got, at those of these places that are no inputs."""
        try:
            given = {
                place: dict(find_tensors(outputs[place.key]))[place.where] for place in places if place.kind == "output"
            }
        except KeyError as error:
            raise ReplayError(f"{error} gives something else for other samples") from error
        got = {place: self.arguments[place.key][place.where] for place in places if place.kind == "argument"}
        return {place: tensor.clone() for place, tensor in (given | got).items()}

    def equals_exchange(self, places: Sequence[Place], inputs: Sequence[Path]) -> bool:
        """Whether exchanging inputs does no more than it does at these places; True where that cannot be tried."""
        if (frozenset(places), frozenset(inputs)) in self._equal:
            return True
        order = _in_one_circle(len(self.rows))
        axes = {path: axis for path in inputs if (axis := self.root.axes.get(path)) is not None}
        if len(self.rows) < 2 or len(axes) < len(inputs):
            return True
        others = {path: take_samples(self.root.call[path], axis, order) for path, axis in axes.items()}
        own = {place.where: others[place.where] for place in places if place.kind == "input"}
        captured = [place.key for place in places if place.kind != "input"]
        try:
            exchanged, outputs = self._run(self.root.part(self.rows, others), capture=captured)
            patched, _ = self._run(self.root.part(self.rows, own), self._patch_of(places, outputs))
        except ReplayError:
            return False
        return self._are_same(exchanged, patched)

    def looks_across(self) -> bool:
        """Whether the predictions of some samples change with the others; False where that cannot be tried."""
        count = len(self.rows)
        if (
            self._is_apart
            or count < 3
            or not self.reaching
            or any(self.root.axes.get(path) is None for path in self.reaching)
        ):
            return False
        half = (count + 1) // 2
        try:
            output, _ = self._run(self._with_other_half())
        except ReplayError:
            return False
        return not self._are_same(self.intact[:half], output[:half])

    def _with_other_half(self) -> Call:
        """The call with the first half of its samples, and in place of the second one some of the first."""
        half = (len(self.rows) + 1) // 2
        return self.root.part(torch.cat([self.rows[:half], self.rows[:half].flip(0)[: len(self.rows) - half]]))

    def find_mixing(self, paths: Collection[str]) -> list[str]:
        """Of these modules, those whose results for some samples change with the other samples alone."""
        half, found = (len(self.rows) + 1) // 2, dict[str, None]()
        try:
            with self.root.restoring():
                _, outputs, arguments = self.root.run(self._with_other_half(), capture=None)
        except ReplayError:
            return []

        def are_close(before: Tensor, now: Tensor, axis: int) -> bool:
            first, other = (one.narrow(axis, 0, half).float() for one in (before, now))
            return bool((first - other).abs().max() <= 1e-3 * before.float().std().clamp_min(1e-6))

        def keeps_own(before: Tensor, now: Tensor | None) -> bool:
            axes = [axis for axis, length in enumerate(before.shape) if length == len(self.rows)]
            return now is not None and any(are_close(before, now, axis) for axis in axes)

        for call in (one for one in self.calls if one.path in paths and one.key in arguments):
            given, got = dict(self.arguments[call.key].tensors()), dict(arguments[call.key].tensors())
            own = all(keeps_own(one, got.get(where)) for where, one in given.items() if one.is_floating_point())
            now = dict(find_tensors(outputs[call.key]))
            for where, tensor in call.tensors.items():
                axis = self.find_axis(call, where, tensor)
                if own and axis is not None and where in now and not are_close(tensor, now[where], axis):
                    found[call.path] = None
        return list(found)

    def changed_in_place(self, place: Place) -> bool:
        """Whether the model changes what a call gave in place; of arguments that is not known, and may be."""
        return place.kind == "argument" or bool(self.labels_of(place) & self._flow.changed)

    @property
    def changes_inputs(self) -> bool:
        """Whether the model changes its inputs in place."""
        return any(label & self._flow.changed for label in self.inputs.values())

    def labels_of(self, place: Place) -> int:
        """The labels of the very tensor at a place."""
        if place.kind == "input":
            return self.inputs.get(place.where, 0)
        if place.kind == "argument":
            return self._flow.of(self.arguments[place.key][place.where])
        return next(call for call in self.calls if call.key == place.key).own.get(place.where, 0)


def _in_one_circle(samples: int) -> Tensor:
    """An order in which no sample keeps its place, and that has no period that data may have."""
    shuffled = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    order = torch.empty_like(shuffled)
    order[shuffled] = shuffled.roll(1)
    return order
