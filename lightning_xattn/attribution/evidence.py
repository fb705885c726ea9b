"""Evidence of how inputs reach the predictions: labels of a run, and runs with other samples' inputs.

At most 20 runs on 16 samples, once, in a model's first step; each leaves the model's state as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.attribution.outputs import ModelOutput, are_same_outputs
from lightning_xattn.attribution.ports import Key, Modality, Place
from lightning_xattn.attribution.root import ReplayError, Root
from lightning_xattn.capture.calls import Call, Path, find_tensors, name_argument, take_samples
from lightning_xattn.capture.dataflow import Dataflow, LabelledCall

SAMPLES = 16
"""How many samples of a first batch are run again to find the modalities."""


@dataclass(frozen=True)
class Reach:
    """Which inputs reach which modalities.

    Attributes
    ----------
    owned
        By modality, the inputs that belong to it.
    ways
        How inputs reach the predictions otherwise than by the features of their modality, as clauses.
    """

    owned: Mapping[str, Sequence[Path]]
    ways: Sequence[str]


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
        self.intact, self.predicted = self._run_intact()

    @property
    def calls(self) -> list[LabelledCall]:
        """See the class."""
        return self._flow.calls

    def _run_intact(self) -> tuple[ModelOutput, int]:
        """Run the root as it was, with labels on its inputs; then the labels that reach the predictions."""
        failure = ReplayError("")
        whole = torch.arange(self.root.samples)
        for rows, with_hooks in ((self.rows, False), (self.rows, True), (whole, False), (whole, True)):
            self.root.with_hooks = with_hooks
            self.rows, self._flow, self.inputs = rows, Dataflow(), {}
            call = self.root.part(rows)
            for path, leaf in call.leaves():
                self.inputs[path] = self._flow.new_label()
                self._flow.add(leaf, self.inputs[path], own=True)
            try:
                with self.root.restoring():
                    predictions, self.outputs, self.arguments = self.root.run(call, flow=self._flow, capture=None)
                    output = self.root.read_output(predictions).cpu()
                    reached = self._flow.of(predictions)
            except ReplayError as error:
                failure = error
                continue
            if len(output.values) != len(rows):
                failure = ReplayError("it gives another number of predictions for fewer samples")
                continue
            precision = self.root.coarsest([one for _, one in call.tensors()])
            if are_same_outputs(self._live[rows].cpu(), output, precision):
                self._precision = precision
                return output, reached
            failure = ReplayError("it gives other outputs when it is run again")
        raise failure

    def _run(
        self, call: Call, patch: Mapping[Place, Tensor] | None = None, capture: Sequence[Key] | None = ()
    ) -> tuple[ModelOutput, dict[Key, Any]]:
        with self.root.restoring():
            predictions, outputs, _ = self.root.run(call, patch, capture=capture)
            return self.root.read_output(predictions).cpu(), outputs

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
        for skips in (False, True):  # some models fail where what it returns is replaced
            flow, labels = Dataflow(self._flow.opaque), {}
            call = self.root.part(self.rows)
            for path, leaf in call.leaves():
                if path in inputs and path not in exchanged:
                    labels[path] = flow.new_label()
                    flow.add(leaf, labels[path])
            try:
                with self.root.restoring():
                    patch = self._patch_of(places, self.outputs)
                    templates = self.outputs if skips else None
                    predictions, _, _ = self.root.run(call, patch, templates, flow=flow)
                    reached = flow.of(predictions)
            except ReplayError:
                continue
            return [path for path, label in labels.items() if label & reached]
        return [path for path in inputs if path not in exchanged]

    def _patch_of(self, places: Sequence[Place], outputs: Mapping[Key, Any]) -> dict[Place, Tensor]:
        """What calls gave or got, at those of these places that are no inputs."""
        given = {
            place: dict(find_tensors(outputs[place.key]))[place.where] for place in places if place.kind == "output"
        }
        got = {place: self.arguments[place.key][place.where] for place in places if place.kind == "argument"}
        return {place: tensor.clone() for place, tensor in (given | got).items()}

    def equals_exchange(self, places: Sequence[Place], inputs: Sequence[Path]) -> bool:
        """Whether exchanging inputs does no more than it does at these places; True where that cannot be tried."""
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
        if count < 3 or not self.reaching or any(self.root.axes.get(path) is None for path in self.reaching):
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
        return place.kind == "argument" or bool(self._labels_of(place) & self._flow.changed)

    @property
    def changes_inputs(self) -> bool:
        """Whether the model changes its inputs in place."""
        return any(label & self._flow.changed for label in self.inputs.values())

    def sides(self, modalities: Sequence[Modality]) -> dict[str, list[tuple[str, str]]]:
        """By a module's path, the modalities that the queries and the keys of each attention in it come from, or ""."""

        def find(side: int) -> set[str]:
            return {one.name for one in modalities if any(self._labels_of(place) & side for place in one.places)}

        found: dict[str, list[tuple[str, str]]] = {}
        for call, queries, keys in self._flow.attention:
            of_queries, of_keys = find(queries), find(keys)
            # Behind a first attention one side holds what the other one does, and something of its own.
            if of_keys < of_queries:
                of_queries -= of_keys
            elif of_queries < of_keys:
                of_keys -= of_queries
            pair = tuple(names.pop() if len(names) == 1 else "" for names in (of_queries, of_keys))
            for path in [""] if call is None else [outer.path for outer in call.outwards()]:
                found.setdefault(path, []).append((pair[0], pair[1]))
        return found

    def find_reach(self, modalities: Sequence[Modality]) -> Reach:
        """Which inputs belong to which modality, and by which other ways they reach the predictions.

        An input belongs to the modality whose features alone it reaches; of several to the one whose inputs all reach
        the others, too. An input that several share otherwise, such as a mask for both, belongs to none.
        """
        made = {call.key: call.made for call in self.calls}
        inputs: dict[str, set[Path]] = {}
        for one in modalities:
            labels = 0
            for place in one.features or one.places:
                labels |= made[place.key] if place.kind == "output" else self._labels_of(place)
            inputs[one.name] = {path for path, label in self.inputs.items() if label & labels}
        owned: dict[str, list[Path]] = {name: [] for name in inputs}
        ways: list[str] = []
        for path in self.inputs:
            reached = [name for name, paths in inputs.items() if path in paths]
            for name in reached:
                others = [other for other in reached if other != name]
                if all(inputs[name] < inputs[other] for other in others):
                    owned[name].append(path)
                    ways += [f"{self.name_input(path)} also reaches {' and '.join(others)}"] if others else []
        mixed = set.intersection(*inputs.values())
        if len(mixed) > 1 and not any(owned.values()):  # one input that holds several modalities is no finding
            names = " and ".join(self.name_input(path) for path in self.inputs if path in mixed)
            ways.append(f"{names} each reach {' and '.join(inputs)}")
        permuted = [place for one in modalities for place in one.places]
        for path in self.reached_around(permuted, [path for paths in owned.values() for path in paths]):
            name = next(name for name, paths in owned.items() if path in paths)
            ways.append(f"{self.name_input(path)} also reaches the prediction past {name}")
        return Reach(owned, ways)

    def _labels_of(self, place: Place) -> int:
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
