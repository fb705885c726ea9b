"""Which inputs reach the prediction by which modules: the modalities of a model, found once in its first step.

Labels of a run show the dataflow, and runs with other samples' inputs confirm it: at most 20 runs on 16 samples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.names import name_groups, plain_name
from lightning_xattn.attribution.outputs import ModelOutput, are_same_outputs
from lightning_xattn.attribution.ports import (
    MOST_MODALITIES,
    AbsentArgumentError,
    ModalitiesSetting,
    Modality,
    Port,
    as_tuple,
    find_mask,
    is_absent,
)
from lightning_xattn.attribution.root import Key, Patch, ReplayError, Root
from lightning_xattn.capture.calls import Call, Path, find_tensors, name_argument, samples_axis, take_samples
from lightning_xattn.capture.dataflow import Dataflow, LabelledCall
from lightning_xattn.capture.sources import Source
from lightning_xattn.capture.wrappers import find_module, plain_path
from lightning_xattn.core.errors import DiscoveryError, SettingError

SAMPLES = 16
"""How many samples of a first batch are run again to find the modalities."""

LOOKS_ACROSS = (
    "the model looks across samples: with other samples in the second half of a batch, the predictions of the first "
    "half change (contrastive logits, BatchNorm in train mode, attention over the batch). Contributions of such a "
    "model are not those of its samples"
)
"""Why nothing is replayed, as the end of a sentence."""


@dataclass(frozen=True, eq=False)
class Group:
    """Inputs that reach the prediction together, and the calls by which they do."""

    inputs: tuple[Path, ...]
    calls: tuple[LabelledCall, ...]
    """The outermost calls that only these inputs reach; empty of raw inputs."""


@dataclass(eq=False)
class Found:
    """What a first step shows of a root.

    Attributes
    ----------
    root
        What runs again.
    modalities
        Empty where fewer than two were found.
    further
        The inputs that reach the prediction besides, which each sample keeps.
    problem
        Why nothing can be replayed, as the end of a sentence; "" where it can.
    """

    root: Root
    modalities: tuple[Modality, ...] = ()
    further: tuple[Path, ...] = ()
    problem: str = ""


class Discovery:
    """Looks for the modalities of a root.

    Parameters
    ----------
    root
        What gives the predictions.
    live
        The predictions of the step.
    attending
        The paths of the modules that attend across modalities, which encode none.

    Raises
    ------
    ReplayError
        If the root cannot be run again.
    """

    def __init__(self, root: Root, live: ModelOutput, attending: Collection[str] = ()) -> None:
        self.root, self._attending = root, attending
        self._rows = torch.arange(min(SAMPLES, root.samples))
        self._live = live
        self._flow = Dataflow()
        self._leaves: dict[Path, int] = {}
        self.intact, self._predicted = self._run_intact()

    # ------------------------------------------------------------------ runs
    def _run_intact(self) -> tuple[ModelOutput, int]:
        """Run the root as it was, with labels on its inputs; then the labels that reach the predictions."""
        failure = ReplayError("")
        whole = torch.arange(self.root.samples)
        for rows, self.root.with_hooks in ((self._rows, False), (self._rows, True), (whole, False), (whole, True)):
            self._rows, self._flow, self._leaves = rows, Dataflow(), {}
            call = self.root.part(rows)
            for path, leaf in call.leaves():
                self._leaves[path] = self._flow.new_label()
                self._flow.add(leaf, self._leaves[path], own=True)
            try:
                with self.root.restoring():
                    predictions, self._outputs, self._arguments = self.root.run(call, flow=self._flow, capture=None)
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

    def _run(self, call: Call, patch: Patch | None = None, capture: Sequence[Key] = ()) -> tuple[ModelOutput, Any]:
        with self.root.restoring():
            predictions, outputs, _ = self.root.run(call, patch, capture)
            return self.root.read_output(predictions).cpu(), outputs

    def _are_same(self, one: ModelOutput, other: ModelOutput) -> bool:
        """Whether two runs gave the same, measured by the spread of the intact predictions."""
        spread = ModelOutput(
            torch.cat([self.intact.values, one.values]), torch.cat([self.intact.logits, one.logits])
        )
        again = ModelOutput(
            torch.cat([self.intact.values, other.values]), torch.cat([self.intact.logits, other.logits])
        )
        return are_same_outputs(spread, again, self._precision)

    # ----------------------------------------------------------- pure functions
    @property
    def reaching(self) -> dict[Path, int]:
        """The inputs that reach the predictions, with their labels."""
        return {path: label for path, label in self._leaves.items() if label & self._predicted}

    def label_name(self, path: Path) -> str:
        """An input as a user would name it."""
        return name_argument(self.root.function, path)

    def groups(self) -> list[Group]:
        """Inputs that reach the predictions by modules of their own, as the labels show."""
        reaching = self.reaching
        every = sum(reaching.values())
        candidates = [call for call in self._flow.calls if self._may_encode(call, every)]
        pure: list[LabelledCall] = []
        for call in candidates:
            if not any(outer in pure for outer in call.outwards()) and not self._fuses(call, candidates, every):
                pure.append(call)
        sets = {call.made & every for call in pure}
        merged = _merge(sets)
        if len(merged) < 2:  # what several of them share, such as a mask for both, joins none
            shared = 0
            for one in sets:
                for other in sets:
                    shared |= one & other if one != other else 0
            merged = _merge({one & ~shared for one in sets} - {0})
        found = []
        for labels in merged:
            calls = tuple(call for call in pure if call.made & labels)
            found.append(Group(tuple(path for path, label in reaching.items() if label & labels), calls))
        return found

    def _may_encode(self, call: LabelledCall, every: int) -> bool:
        """Whether only some of the inputs reach a call, and it the predictions, and no recorded attention is in it."""
        labels = call.made & every
        reaches = any(own & self._predicted for own in call.own.values())
        attends = any(path == call.path or path.startswith(f"{call.path}.") for path in self._attending)
        return bool(labels) and labels != every and reaches and not attends

    def _fuses(self, call: LabelledCall, candidates: Sequence[LabelledCall], every: int) -> bool:
        """Whether a call gets what calls outside of it have made of different inputs."""
        outside = [one for one in candidates if call not in one.outwards()]
        sets = [one.made & every for one in outside if any(own & call.got for own in one.own.values())]
        return any(not one & other for one in sets for other in sets)

    def raw_inputs(self, groups: Sequence[Group]) -> list[Path]:
        """The inputs that reach the predictions and belong to no group."""
        grouped = {path for group in groups for path in group.inputs}
        return [path for path in self.reaching if path not in grouped]

    # --------------------------------------------------------------- modalities
    def find(self) -> list[tuple[Group, tuple[Port, ...]]]:
        """The groups that are modalities, each with what holds it."""
        groups = self.groups()
        raw = self.raw_inputs(groups)
        groups, raw = self._join_masks(groups, raw)
        if len(groups) < 2:
            alone = [path for path in raw if self.root.axes.get(path) is not None and self._is_large(path)]
            groups += [Group((path,), ()) for path in alone]
        return [(group, self._choose_ports(group)) for group in groups] if len(groups) > 1 else []

    def _is_large(self, path: Path) -> bool:
        value = self.root.call[path]
        return not isinstance(value, Tensor) or value.numel() > self.root.samples

    def _join_masks(self, groups: list[Group], raw: list[Path]) -> tuple[list[Group], list[Path]]:
        """Let raw inputs with one value for each token of one group alone join that group, as its mask."""
        left = []
        for path in raw:
            value = self.root.call[path]
            shape = tuple(value.shape) if isinstance(value, Tensor) else None
            fitting = [i for i, group in enumerate(groups) if shape is not None and shape in self._token_shapes(group)]
            named = [i for i in fitting if _shares_word(self.label_name(path), self._words(groups[i]))]
            chosen = named if len(named) == 1 else fitting
            if len(chosen) == 1 and shape is not None and len(shape) > 1:
                group = groups[chosen[0]]
                groups[chosen[0]] = replace(group, inputs=(*group.inputs, path))
            else:
                left.append(path)
        return groups, left

    def _token_shapes(self, group: Group) -> set[tuple[int, ...]]:
        values = [self.root.call[path] for path in group.inputs]
        shapes = {tuple(one.shape[:2]) for one in values if isinstance(one, Tensor) and one.dim() > 1}
        made = [tensor for call in group.calls for _, tensor in find_tensors(call.output)]
        return shapes | {(self.root.samples, *one.shape[1:2]) for one in made if one.dim() == 3}

    def _words(self, group: Group) -> list[str]:
        return [self.label_name(path) for path in group.inputs] + [call.path for call in group.calls]

    def _choose_ports(self, group: Group) -> tuple[Port, ...]:
        """The heaviest outermost module whose patching equals exchanging its inputs, or more of them, or the inputs."""
        inputs = self._input_ports(group.inputs)
        if not group.calls:
            return inputs
        by_module: dict[str, list[LabelledCall]] = {}
        for call in group.calls:
            by_module.setdefault(call.path, []).append(call)
        heaviest = max(by_module.values(), key=lambda calls: _weight(calls[0].module))
        chosen: tuple[Port, ...] = ()
        around: list[Path] = []
        for calls in (heaviest, list(group.calls)):
            ports = tuple(port for call in calls if (port := self._output_port(call)) is not None)
            if not ports:
                continue
            chosen, around = ports, self.reached_around(ports, group.inputs)
            if not around and self._equals_exchange(ports, group.inputs):
                return ports
        # What goes around the modules is exchanged at the inputs, too.
        if chosen and around:
            both = (*chosen, *self._input_ports(around))
            if self._equals_exchange(both, group.inputs):
                return both
        return (*chosen, *inputs)

    def _output_port(self, call: LabelledCall) -> Port | None:
        """What a call returns that reaches the predictions; None of what has no axis of samples."""
        axes = {}
        for where, tensor in find_tensors(call.output):
            if call.own.get(where, 0) & self._predicted:
                axis = samples_axis(tensor, len(self._rows))
                if axis is None:
                    return None
                axes[where] = axis
        return Port("output", call.path, call.turn, axes) if axes else None

    def _input_ports(self, paths: Iterable[Path]) -> tuple[Port, ...]:
        axes = {path: axis for path in paths if (axis := self.root.axes.get(path)) is not None}
        tensors = {path: axis for path, axis in axes.items() if isinstance(self.root.call[path], Tensor)}
        return (Port("input", "", 0, tensors),) if tensors else ()

    def reached_around(self, ports: Sequence[Port], inputs: Sequence[Path]) -> list[Path]:
        """Those of the inputs that reach the predictions otherwise than by these ports."""
        exchanged = {path for port in ports if port.kind == "input" for path in port.axes}
        for skips in (True, False):  # some models fail where a module does not run
            flow, labels = Dataflow(), {}
            call = self.root.part(self._rows)
            for path, leaf in call.leaves():
                if path in inputs and path not in exchanged:
                    labels[path] = flow.new_label()
                    flow.add(leaf, labels[path])
            try:
                with self.root.restoring():
                    predictions, _, _ = self.root.run(call, self._patch_of(ports, skips=skips), flow=flow)
                    reached = flow.of(predictions)
            except ReplayError:
                continue
            return [path for path, label in labels.items() if label & reached]
        return [path for path in inputs if path not in exchanged]

    def _patch_of(self, ports: Sequence[Port], outputs: Mapping[Key, Any] | None = None, skips: bool = True) -> Patch:
        """The intact outputs of these ports, or others, in their places."""
        held = self._outputs if outputs is None else outputs
        tensors = {
            port.key: {where: tensor.clone() for where, tensor in find_tensors(held[port.key]) if where in port.axes}
            for port in ports
            if port.kind == "output"
        }
        given = {
            port.key: {path: self._arguments[port.key][path].clone() for path in port.axes}
            for port in ports
            if port.kind == "argument"
        }
        return Patch(tensors, self._outputs, given, skips)

    def _equals_exchange(self, ports: Sequence[Port], inputs: Sequence[Path]) -> bool:
        """Whether exchanging inputs does no more than what it does to these ports; True where that cannot be tried."""
        order = _in_one_circle(len(self._rows))
        values = {path: self.root.axes.get(path) for path in inputs}
        if len(self._rows) < 2 or None in values.values():
            return True
        others = {path: take_samples(self.root.call[path], axis, order) for path, axis in values.items() if axis is not None}
        try:
            captured = [port.key for port in ports if port.kind != "input"]
            exchanged, outputs = self._run(self.root.part(self._rows, others), capture=captured)
            own = {path: others[path] for port in ports if port.kind == "input" for path in port.axes}
            patched, _ = self._run(self.root.part(self._rows, own), self._patch_of(ports, outputs, skips=False))
        except ReplayError:
            return False
        return self._are_same(exchanged, patched)

    def looks_across(self) -> bool | None:
        """Whether the predictions of some samples change with the others; None where that cannot be tried."""
        count = len(self._rows)
        inputs = [path for path in self._leaves if self.root.axes.get(path) is not None]
        if count < 3 or not inputs or any(self.root.axes.get(path) is None for path in self.reaching):
            return None
        half = (count + 1) // 2
        rows = torch.cat([self._rows[:half], self._rows[:half].flip(0)[: count - half]])
        try:
            output, _ = self._run(self.root.part(rows))
        except ReplayError:
            return None
        kept = slice(0, half)
        before = ModelOutput(torch.cat([self.intact.values, self.intact.values[kept]]), torch.cat([self.intact.logits, self.intact.logits[kept]]))
        after = ModelOutput(torch.cat([self.intact.values, output.values[kept]]), torch.cat([self.intact.logits, output.logits[kept]]))
        return not are_same_outputs(before, after, self._precision)

    def further_inputs(self, modalities: Sequence[Modality]) -> tuple[Path, ...]:
        """The inputs that reach the predictions otherwise than by the modalities, and cannot be told apart from such."""
        ports = [port for modality in modalities for port in modality.ports]
        exchanged = {path for port in ports if port.kind == "input" for path in port.axes}
        inputs = [path for path in self._leaves if path not in exchanged]
        return tuple(self.reached_around(ports, inputs))

    def changed_in_place(self, port: Port) -> bool:
        """Whether the model changes what a port holds in place."""
        if port.kind == "argument":
            return True
        if port.kind == "input":
            labels = [self._leaves.get(path, 0) for path in port.axes]
        else:
            call = next(call for call in self._flow.calls if call.key == port.key)
            labels = [call.own.get(path, 0) for path in port.axes]
        return any(label & self._flow.changed for label in labels)

    @property
    def changes_inputs(self) -> bool:
        """Whether the model changes its inputs in place."""
        return any(label & self._flow.changed for label in self._leaves.values())

    # ------------------------------------------------------------------- names
    def sides(self, modalities: Sequence[Modality]) -> dict[str, list[tuple[str, str]]]:
        """By a module's path, from which modalities the queries and the keys of each attention in it come; "" unclear."""
        labels = {}
        for modality in modalities:
            labels[modality.name] = self._labels_of(modality)
        found: dict[str, list[tuple[str, str]]] = {}
        for call, queries, keys in self._flow.attention:
            both = tuple(_only(name for name, own in labels.items() if own & side) for side in (queries, keys))
            for outer in call.outwards() if call is not None else ():
                found.setdefault(outer.path, []).append((both[0], both[1]))
        return found

    def _labels_of(self, modality: Modality) -> int:
        found = 0
        for port in modality.ports:
            if port.kind == "input":
                found |= sum(self._leaves.get(path, 0) for path in port.axes)
            elif port.kind == "output":
                call = next(call for call in self._flow.calls if call.key == port.key)
                found |= sum(call.own.get(path, 0) for path in port.axes)
            else:
                call = next(call for call in self._flow.calls if call.key == port.key)
                for path in port.axes:
                    found |= self._flow.of(self._arguments[port.key][path])
        return found

    def bypassed(self, modalities: Sequence[Modality], further: Sequence[Path]) -> list[tuple[str, str]]:
        """Inputs of a modality that also reach the predictions past it, each with the modality."""
        found = []
        for modality in modalities:
            inputs = self._inputs_of(modality)
            found += [(self.label_name(path), modality.name) for path in further if self._leaves[path] & inputs]
        return found

    def _inputs_of(self, modality: Modality) -> int:
        """The labels of the inputs that reach a modality."""
        found = 0
        for port in modality.ports:
            for call in self._flow.calls:
                if port.kind == "output" and call.key == port.key:
                    found |= call.made
            if port.kind == "argument":
                for path in port.axes:
                    found |= self._flow.of(self._arguments[port.key][path])
        return found

    def candidates(self) -> str:
        """Modules and inputs that may hold modalities, as a user would name them."""
        root = self.root.path
        found = {}
        for call in self._flow.calls:
            depth = sum(1 for _ in call.outwards())
            if depth <= 2 and call.path not in ("", root) and any(own & self._predicted for own in call.own.values()):
                shape = next((tuple(one.shape) for _, one in find_tensors(call.output)), ())
                found.setdefault(plain_path(self.root.model, call.path), shape)
        inputs = {self.label_name(path): tuple(getattr(self.root.call[path], "shape", ())) for path in self.reaching}
        parts = [f"'{name}' {shape}" for name, shape in [*list(found.items())[:8], *list(inputs.items())[:6]]]
        return ", ".join(parts) or "none"

    # ------------------------------------------------------------------- named
    def named(self, fusion: str | None, setting: ModalitiesSetting, real: Mapping[str, Tensor]) -> list[Modality]:
        """The modalities as the settings name them.

        Raises
        ------
        DiscoveryError
            If a name is not there; the message has what is.
        AbsentArgumentError
            If an argument of the fusion is None in this call.
        """
        if fusion is not None:
            return self._named_arguments(fusion, setting, real)
        modalities = []
        for name, several in setting.items():
            ports = [port for one in as_tuple(several) for port in self._resolve(str(one))]
            ports.sort(key=lambda port: port.kind == "input")
            modalities.append(Modality(name, tuple(ports), " and ".join(map(str, as_tuple(several)))))
        return modalities

    def _resolve(self, name: str) -> list[Port]:
        """What a path of a module, an item of its output or a key names."""
        inputs = [path for path in self._leaves if name in (self.label_name(path), str(path[-1]))]
        source, path = None, None
        try:
            source = Source.parse(name)
            path = find_module(self.root.model, source.path)
        except SettingError:
            pass
        if path is None and source is not None and source.item and not inputs:
            path = find_module(self.root.model, ".".join([source.path, *map(str, source.item)]))
            source = replace(source, item=()) if path is not None else source
        calls = [call for call in self._flow.calls if path is not None and call.path == path]
        if source is not None and source.call is not None:
            calls = calls[source.call - 1 : source.call]
        ports = []
        for call in calls:
            port = self._output_port(call) or self._any_output(call)
            if source is not None and source.item and port is not None:
                axes = {w: a for w, a in port.axes.items() if tuple(map(str, w[: len(source.item)])) == tuple(map(str, source.item))}
                port = replace(port, axes=axes) if axes else None
            if port is not None:
                ports.append(port)
        if not ports and inputs:
            ports = list(self._input_ports(inputs))
        if not ports:
            what = "did not run in this step" if path is not None and not calls else "is no module and no input"
            raise DiscoveryError(
                f"modalities names '{name}', which {what} of what gives the predictions "
                f"({'the step' if self.root.path is None else repr(self.root.path or 'forward')}). There are "
                f"{self.candidates()}."
            )
        return ports

    def _any_output(self, call: LabelledCall) -> Port | None:
        """What a call returns, though it does not reach the predictions."""
        axes = {where: samples_axis(tensor, len(self._rows)) for where, tensor in find_tensors(call.output)}
        known = {where: axis for where, axis in axes.items() if axis is not None}
        return Port("output", call.path, call.turn, known) if known else None

    def _named_arguments(self, fusion: str, setting: ModalitiesSetting, real: Mapping[str, Tensor]) -> list[Modality]:
        path = find_module(self.root.model, fusion)
        calls = [call for call in self._flow.calls if call.path == path]
        if not calls:
            raise ReplayError(
                f"the fusion '{fusion}' was not seen in what gives the predictions: it did not run, or is not a part of it"
            )
        if len(calls) > 1:
            raise DiscoveryError(
                f"The fusion '{fusion}' runs {len(calls)} times in a step, so it is ambiguous what enters it. Name a "
                "module that runs once."
            )
        call = self._arguments[calls[0].key]
        return name_arguments(calls[0].module, fusion, calls[0].key, setting, call, len(self._rows), real)


def name_arguments(
    module: nn.Module,
    fusion: str,
    key: Key,
    setting: ModalitiesSetting,
    call: Call,
    samples: int,
    real: Mapping[str, Tensor],
) -> list[Modality]:
    """The modalities among a fusion's arguments.

    Raises
    ------
    AbsentArgumentError
        If an argument is None.
    DiscoveryError
        If an argument is not there, is no float tensor, or holds no axis of samples.
    """
    tensors = dict(call.tensors())
    labels = {where: name_argument(module, where) for where in tensors}

    def find(name: int | str) -> Path:
        found = [
            where
            for where, label in labels.items()
            if (where[0] == name and len(where) == 1 if isinstance(name, int) else name in (label, where[-1]))
        ]
        if not found and is_absent(call, name):
            raise AbsentArgumentError(f"no {name!r}")
        if len(found) != 1:
            known = ", ".join(f"{where[0]!r} ({label}): {_shape(tensors[where])}" for where, label in labels.items())
            raise DiscoveryError(
                f"modalities names argument {name!r} of the fusion '{fusion}', which has "
                f"{'no such tensor' if not found else f'{len(found)} of them'} in this call; it has {known or 'none'}."
            )
        return found[0]

    modalities = []
    named = {name: [find(place) for place in as_tuple(several)] for name, several in setting.items()}
    firsts = [tensors[paths[0]] for paths in named.values()]
    axis = next((one for one in (0, 1) if all(t.dim() > one and t.shape[one] == samples for t in firsts)), None)
    if axis is None or not all(one.is_floating_point() for one in firsts):
        got = ", ".join(f"{name} {_shape(tensors[paths[0]])}" for name, paths in named.items())
        raise DiscoveryError(
            f"Expected a floating tensor of each modality in '{fusion}', with the {samples} samples on its first axis, "
            f"or on its second of all; got {got}."
        )
    for name, (first, *others) in named.items():
        same = [one for one, tensor in tensors.items() if one != first and tensor is tensors[first]]
        axes = dict.fromkeys([first, *same], axis)
        for other in others:
            own = samples_axis(tensors[other], samples)
            if own is None:
                raise DiscoveryError(f"'{labels[other]}' of '{fusion}' has no axis of {samples} samples: {_shape(tensors[other])}.")
            axes[other] = own
        tokens = tensors[first].transpose(0, axis)
        mask = find_mask({one: labels[one] for one in others}, tensors, tokens.shape[:2], real.get(name))
        modalities.append(Modality(name, (Port("argument", key[0], key[1], axes),), f"{labels[first]} of {fusion}", mask))
    return modalities


def find_modalities(discovery: Discovery) -> Found:
    """The modalities that a root shows by itself."""
    found = discovery.find()
    root = discovery.root
    if len(found) > MOST_MODALITIES:
        names = ", ".join(_describe(discovery, group, ports) for group, ports in found)
        return Found(root, problem=f"{len(found)} modalities were found, at most {MOST_MODALITIES} can be exchanged: {names}")
    usable = [(group, ports) for group, ports in found if ports]
    if len(usable) < 2:
        return Found(root)
    names = name_groups([_words(discovery, group, ports) for group, ports in usable])
    modalities = tuple(
        Modality(name, ports, _describe(discovery, group, ports)) for name, (group, ports) in zip(names, usable, strict=True)
    )
    return Found(root, modalities)


def _words(discovery: Discovery, group: Group, ports: Sequence[Port]) -> tuple[list[str], list[str]]:
    modules = [plain_path(discovery.root.model, port.path) for port in ports if port.kind == "output"]
    return list(dict.fromkeys(modules)), [discovery.label_name(path) for path in group.inputs]


def _describe(discovery: Discovery, group: Group, ports: Sequence[Port]) -> str:
    modules, inputs = _words(discovery, group, ports)
    is_input = any(port.kind == "input" for port in ports) or not ports
    return " and ".join([*modules, *(inputs if is_input else [])])


def _in_one_circle(samples: int) -> Tensor:
    """An order in which no sample keeps its place, and that has no period that data may have."""
    shuffled = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    order = torch.empty_like(shuffled)
    order[shuffled] = shuffled.roll(1)
    return order


def _merge(sets: set[int]) -> list[int]:
    """Sets of labels that overlap as one."""
    merged: list[int] = []
    for one in sorted(sets):
        apart = [other for other in merged if not other & one]
        joined = one
        for other in merged:
            joined |= other if other & one else 0
        merged = [*apart, joined]
    return sorted(merged, key=lambda labels: labels & -labels)


def _weight(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _only(names: Iterator[str]) -> str:
    found = list(names)
    return found[0] if len(found) == 1 else ""


def _shares_word(label: str, others: Sequence[str]) -> bool:
    own = plain_name(label)
    return bool(own) and own in {plain_name(other) for other in others}


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
