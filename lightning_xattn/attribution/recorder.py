"""The modalities of each step as the model hands them on, and what is needed to replay the predictions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.discovery import LOOKS_ACROSS, Found, describe_candidates, find_modalities
from lightning_xattn.attribution.evidence import Evidence
from lightning_xattn.attribution.named import find_named_modalities, name_arguments
from lightning_xattn.attribution.names import plain_name, reconcile_names
from lightning_xattn.attribution.outputs import ModelOutput
from lightning_xattn.attribution.ports import (
    AbsentArgumentError,
    ModalitiesSetting,
    Modality,
    Port,
    as_tuple,
    check_modalities,
)
from lightning_xattn.attribution.replay import AttentionPlace, Replay
from lightning_xattn.attribution.root import PredictionPlace, ReplayError, Root
from lightning_xattn.attribution.roots import StepCall, find_roots
from lightning_xattn.attribution.state import torch_generators
from lightning_xattn.capture import Layer
from lightning_xattn.capture.calls import Call, Path, Precision, find_tensors, name_argument
from lightning_xattn.capture.forwards import get_module
from lightning_xattn.capture.labels import Labels
from lightning_xattn.capture.sources import Source
from lightning_xattn.capture.trace import Run, StepTrace, output_at
from lightning_xattn.capture.wrappers import find_module
from lightning_xattn.core.attention import AttentionPair, Direction
from lightning_xattn.core.distributed import SINGLE_PROCESS, Processes
from lightning_xattn.core.errors import DiscoveryError, ShapeError
from lightning_xattn.core.notices import info, warn

SPLIT_MODEL = (
    "the processes hold the model together, as under FSDP or DeepSpeed, so that none of them can run it again by itself"
)
"""Why nothing is replayed, as the end of a sentence."""

NAME_THEM = (
    "Name what holds each: modalities={'<a>': 'path.to.encoder', '<b>': 'path.to.encoder'} (paths of modules, items of "
    "what they return such as 'encoder[0]', keys of the batch), or the arguments of a fusion: "
    "fusion='path.to.module', modalities={'<a>': 0, '<b>': 1}."
)
"""The remedy where modalities are not clear."""


NAME_PREDICTIONS = (
    "Return the predictions from the step as {'logits': ...}, or name them: predictions='path.to.module' (what it "
    "returns), predictions='key' or predictions=lambda outputs, batch: ...."
)
"""The remedy where predictions are not clear."""


@dataclass(frozen=True, eq=False)
class FusionRecord:
    """The modalities of a batch."""

    tokens: Mapping[str, tuple[Tensor, Tensor | None]]
    """By modality ``(batch, tokens, width)`` or ``(batch, width)``, and a mask, True for real tokens."""
    permuted: Mapping[str, Sequence[Tensor]]
    """By modality the tensors that are permuted, samples first, see ``Modality.columns``."""
    further: Sequence[Tensor]
    """Further inputs that each sample keeps, samples first."""
    model_output: ModelOutput | None
    """What the model gave for these samples; None where that is not replayed."""

    def __len__(self) -> int:
        return len(next(iter(self.tokens.values()))[0])

    def __getitem__(self, samples: slice) -> FusionRecord:
        """Some of the samples."""
        return FusionRecord(
            {
                name: (tokens[samples], None if mask is None else mask[samples])
                for name, (tokens, mask) in self.tokens.items()
            },
            {name: [one[samples] for one in kept] for name, kept in self.permuted.items()},
            [one[samples] for one in self.further],
            None if self.model_output is None else self.model_output[samples],
        )


class ModalityRecorder:
    """Finds the modalities in a model's first step, and records them in each.

    Parameters
    ----------
    model
        Any module.
    trace
        Notes the calls of each step.
    fusion, modalities
        What holds the modalities; None: to be found.
    processes
        Those that run the model.
    replays
        Whether the model may run again. If not, only what is named, or called as the attention's modalities, is found.
    names_attention
        Whether a setting names the directions of the attention, whose names are then right.

    Attributes
    ----------
    modalities
        Empty until they are found.
    problem
        Why contributions are not computed, or nothing of the modalities; "" where they are.
    renamed
        Directions whose names contradict where their queries come from, with those that fit.

    Raises
    ------
    SettingError
        If the settings name no modalities.
    DiscoveryError
        If there is no such fusion.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: StepTrace,
        fusion: str | None = None,
        modalities: ModalitiesSetting | None = None,
        processes: Processes = SINGLE_PROCESS,
        replays: bool = True,
        names_attention: bool = False,
    ) -> None:
        check_modalities(fusion, modalities)
        self._names_attention = names_attention
        self.processes = processes
        self._model, self._trace, self._setting, self._fusion = model, trace, modalities, fusion
        self._named = None if fusion is None else find_module(model, fusion)
        if fusion is not None and self._named is None:
            known = ", ".join(f"'{path}'" for path, _ in model.named_children())
            raise DiscoveryError(
                f"No module '{fusion}' for fusion=. Found: {known or 'none'}, and the modules inside them."
            )
        self._may_run = replays and processes.hold_whole_model
        if self._named is not None and not self._may_run:
            module = get_module(model, self._named)
            trace.follow({module: self._named}, False)
            trace.copied.add(module)
        self.modalities: tuple[Modality, ...] = ()
        self.problem = ""
        self.renamed: dict[Direction, Direction] = {}
        self.prediction_name = ""
        self._found: Found | None = None
        self._root: Root | None = None
        self._replay: Replay | None = None
        self._sources: Mapping[Direction, Source] = {}
        self._is_decided = self._copies_batch = False
        self._noticed: set[str] = set()
        self._leaf_paths: set[Path] = set()
        # How many axes each tensor had in the first step.
        self._axes: dict[tuple[str, int], int] = {}
        self.step: StepCall | None = None

    @property
    def is_named(self) -> bool:
        """Whether the settings name the modalities."""
        return self._setting is not None

    @property
    def has_further(self) -> bool:
        """Whether inputs that belong to no modality reach the predictions."""
        return self._found is not None and bool(self._found.further)

    @property
    def is_decided(self) -> bool:
        """Whether it is known what the modalities are, or that they are not."""
        return self._is_decided

    def begin(self, function: Callable[..., Any] | None, args: tuple[Any, ...]) -> None:
        """Note how a step is called that begins now."""
        needs_states = self._may_run and (not self._is_decided or self._root is None)
        generators = [one.get_state() for one in torch_generators()] if needs_states else []
        if not self._is_decided or self._copies_batch:  # which the step may change in place
            call = Call(args, {})
            args = call.copied({path for path, _ in call.tensors()}).args
        self.step = None if function is None else StepCall(function, args, generators=generators)
        self._generators = generators

    def clear(self) -> None:
        """Forget the step."""
        self.step = None

    def reset(self) -> None:
        """Forget the call that an evaluation's replays repeat; the next evaluation has its own."""
        self._root = self._replay = None
        if self._found is not None:  # the batch of the first step, and what stands in for it
            self._found.root.call = Call((), {})

    # ---------------------------------------------------------------- each step
    def collect(
        self, attention: Sequence[AttentionPair], layers: Sequence[Layer], labels: Labels, outputs: Any
    ) -> tuple[FusionRecord | None, list[str]]:
        """The modalities of this step, and new messages to the user.

        Parameters
        ----------
        attention, layers
            What was recorded in the step, and where.
        labels
            The predictions of the step. Of a first step their values are looked at.
        outputs
            What the step returned.

        Returns
        -------
        inputs, messages
            None where the modalities are not known, or are not all in this step.
        """
        messages: list[str] = []
        if self.step is not None:
            self.step = replace(self.step, outputs=outputs)
        real = {
            str(one.direction.key): one.key_mask
            for pair in attention[:1]
            for one in pair.directions
            if one.key_mask is not None
        }
        samples = len(attention[0].forward.weights) if attention else None
        if not self._is_decided:
            messages += self._decide(layers, labels, samples, real)
            if self._found is not None and self.modalities and self._may_run:
                record, others = self._of_first_step(self._found, real)
                return record, [*messages, *others]
        if not self.modalities:
            return None, messages
        record, others = self._of_step(labels, real)
        return record, [*messages, *others]

    def _once(self, message: str) -> list[str]:
        new = message not in self._noticed
        self._noticed.add(message)
        return [message] if new else []

    def _left_out(self, why: str) -> list[str]:
        return self._once(f"The modalities are left out of a step: {why}.")

    def _of_step(self, labels: Labels, real: Mapping[str, Tensor]) -> tuple[FusionRecord | None, list[str]]:
        """What this step handed on."""
        assert self._found is not None
        template = self._found.root
        is_whole = self._may_run
        run = None if template.path is None or not is_whole else self._find_root_run(template)
        if template.path is not None and run is None and is_whole:
            return None, self._left_out(f"{_name_root(template)} did not run")
        call = Call(self.step.args, {}) if template.path is None and self.step else (run.entered if run else None)
        call = call if is_whole else Call((), {})
        if call is None:
            return None, self._left_out("it was not called as the first one")
        new = {path for path, _ in call.leaves()} - self._leaf_paths
        if new:
            names = " and ".join(f"'{name_argument(template.function, path)}'" for path in sorted(new, key=str))
            return None, self._left_out(f"{_name_root(template)} got {names}, which the first step had not")
        try:
            values = {
                modality.name: [self._value(port, path, run, call) for port, path, _ in modality.columns]
                for modality in self.modalities
            }
            further = [call[path] for path in self._found.further]
            output = self._read_predictions(template, run)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            return None, self._left_out(f"{_name_root(template)} got or gave something else ({error})")
        if self._root is None and output is not None:
            precision = run.precision if run is not None and run.precision is not None else template.precision
            self._root = replace(
                template, call=call, samples=len(output.values), precision=precision, generators=self._generators
            )
        try:
            return self._make_record(values, further, output, real), []
        except ShapeError as error:
            return None, self._left_out(str(error))

    def _find_root_run(self, root: Root) -> Run | None:
        runs = [run for run in self._trace.runs if run.path == root.path]
        return runs[root.turn] if root.turn < len(runs) and runs[root.turn].has_ended else None

    def _value(self, port: Port, path: Path, run: Run | None, call: Call) -> Tensor:
        if port.kind == "input":
            value = call[path]
        else:
            own = self._trace.find(port.path, port.turn, run)
            if own is None or not own.has_ended:
                raise KeyError(f"'{port.path}' did not run")
            value = output_at(own, path) if port.kind == "output" else own.entered[path] if own.entered else None
        if not isinstance(value, Tensor):
            found = self._found
            name = port.path if port.kind != "input" or found is None else name_argument(found.root.function, path)
            raise KeyError(f"no tensor in '{name}'")
        return value

    def _read_predictions(self, root: Root, run: Run | None) -> ModelOutput | None:
        place = root.place
        if not self._may_run:
            return None
        if place.kind == "call":
            found = output_at(self._trace.find(place.path, place.turn, run), place.leaf)
        elif place.kind == "loss":
            losses = self._trace.losses
            found = losses[place.turn].input if place.turn < len(losses) else None
        else:
            outputs = None if self.step is None else self.step.outputs
            found = next((one for where, one in find_tensors(outputs) if where == place.leaf), None)
        if found is None:
            raise KeyError("no predictions")
        with torch.no_grad():
            return root.read(found.detach())

    def _make_record(
        self,
        values: Mapping[str, Sequence[Tensor]],
        further: Sequence[Any],
        output: ModelOutput | None,
        real: Mapping[str, Tensor],
    ) -> FusionRecord:
        assert self._found is not None
        permuted = {
            modality.name: [
                one.detach().movedim(axis, 0)
                for one, (_, _, axis) in zip(values[modality.name], modality.columns, strict=True)
            ]
            for modality in self.modalities
        }
        for name, several in permuted.items():
            for number, one in enumerate(several):
                if self._axes.setdefault((name, number), one.dim()) != one.dim():
                    raise ShapeError(
                        f"a tensor of {name} is {tuple(one.shape)}, with another number of axes than before"
                    )
        tokens = {}
        samples = len(next(iter(permuted.values()))[0]) if output is None else len(output.values)
        for modality in self.modalities:
            kept = permuted[modality.name]
            if any(len(one) != samples for one in kept):
                shapes = ", ".join(str(tuple(one.shape)) for one in kept)
                raise ShapeError(f"what holds {modality.name} does not have {samples} samples: {shapes}")
            tokens[modality.name] = self._find_tokens(modality, kept, real)
        own = [one for one in further if isinstance(one, Tensor)]
        axes = [self._found.root.axes.get(path) for path in self._found.further]
        moved = [one.detach().movedim(axis, 0) for one, axis in zip(own, axes, strict=False) if axis is not None]
        return FusionRecord(tokens, permuted, moved, output if self._may_run else None)

    def _find_tokens(
        self, modality: Modality, kept: Sequence[Tensor], real: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """What linear probes get of a modality: ``(batch, tokens, width)`` or ``(batch, width)``, and its mask."""
        floating = [one for one in kept if one.is_floating_point() and one.dim() > 1] or [
            one for one in kept if one.dim()
        ]
        first = floating[0]
        if modality.mask is not None:
            number = [path for _, path, _ in modality.columns].index(modality.mask.path)
            mask, expected = kept[number], first.shape[:2]
            if mask.numel() != expected.numel():
                raise ShapeError(
                    f"'{modality.mask.label}' is {tuple(mask.shape)} and no mask of the {tuple(expected)} tokens of "
                    f"{modality.name}"
                )
            return first, modality.mask.real(mask.reshape(expected))
        if first.dim() == 1:
            return first[:, None].float(), None
        if first.dim() > 3:  # maps of features (batch, channels, ...): places are tokens
            return first.flatten(2).transpose(1, 2), None
        if not first.is_floating_point():
            first = first.float()
        padding = real.get(modality.name)
        fits = padding is not None and first.dim() == 3 and tuple(padding.shape) == tuple(first.shape[:2])
        return first, padding if fits else None

    # --------------------------------------------------------------- first step
    def _decide(
        self, layers: Sequence[Layer], labels: Labels, samples: int | None, real: Mapping[str, Tensor]
    ) -> list[str]:
        """Find the modalities in a first step; gives messages to the user."""
        if not self._may_run:
            self.problem = "" if self.processes.hold_whole_model else SPLIT_MODEL
            return self._name_in_trace(layers, real)
        self._is_decided = True
        failure = ""
        candidates: list[tuple[Evidence, Found]] = []
        try:
            roots, live, self.prediction_name = find_roots(
                self._model, self._trace, self.step, labels, samples, self._generators
            )
        except ReplayError as error:
            self.problem = str(error)
            return self._refuse(self.problem, NAME_PREDICTIONS)
        attending = {source.path for layer in layers for _, source in layer.sources if source.joint is None}
        for root in roots:
            try:
                with root.keeping_state():
                    evidence = Evidence(root, live)
                    found = self._look(evidence, real, attending)
                    candidates.append((evidence, found))
                    if found.modalities:
                        self._take(evidence, found, layers)
                        if labels.predicted is None and live.values.shape[1] > 1:
                            self.problem = self.problem or "the predictions are neither classes nor a single value"
                        return []
            except AbsentArgumentError as error:
                self._is_decided = False
                return self._left_out(f"the fusion '{self._fusion}' got {error}")
            except DiscoveryError:
                if root is roots[-1]:
                    raise
            except ReplayError as error:
                failure = failure or str(error)
        described = describe_candidates(candidates[-1][0]) if candidates else "none"
        problem = next((found.problem for _, found in candidates if found.problem), "") or failure
        if not problem:
            problem = f"fewer than two inputs reach the predictions by modules of their own. There are {described}"
        self.problem = problem
        return self._refuse(problem)

    def _refuse(self, problem: str, remedy: str = NAME_THEM) -> list[str]:
        return self._once(f"Probes and contributions are not computed: {problem}. {remedy}")

    def _look(self, evidence: Evidence, real: Mapping[str, Tensor], attending: Collection[str]) -> Found:
        if self._setting is None:
            return find_modalities(evidence, attending)
        return Found(evidence.root, tuple(find_named_modalities(evidence, self._fusion, self._setting, real)))

    def _take(self, evidence: Evidence, found: Found, layers: Sequence[Layer]) -> None:
        """Settle on what was found."""
        sides = evidence.sides(found.modalities)
        modalities, self.renamed = reconcile_names(
            found.modalities, layers, sides, self._setting is not None, self._names_attention
        )
        found.modalities = modalities
        further = evidence.find_further_inputs(modalities)
        unkept = [path for path in further if not self._can_keep(evidence.root, path)]
        found.further = tuple(path for path in further if path not in unkept)
        if unkept:
            found.problem = (
                f"{', '.join(map(evidence.name_input, unkept))} also reaches the prediction and has no samples that "
                "could be kept, as of a graph"
            )
        if evidence.looks_across():
            found.problem = LOOKS_ACROSS
        self.problem = found.problem
        self.modalities, self._found, self._root = modalities, found, evidence.root
        self._leaf_paths = {path for path, _ in evidence.root.call.leaves()}
        self._sources = dict(layers[0].sources) if layers else {}
        self._sources = {self.renamed.get(direction, direction): source for direction, source in self._sources.items()}
        self._follow(evidence)
        self._say_what_was_found(evidence, found)

    def _say_what_was_found(self, evidence: Evidence, found: Found) -> None:
        old_names = {str(old): str(new) for old, new in self.renamed.items()}
        if old_names and any(new in old_names for new in old_names.values()):
            turned = " and ".join(f"{old} as {new}" for old, new in old_names.items())
            sources = ", ".join(self.describe())
            warn(
                [
                    f"{turned} is recorded: the names of the attention modules contradict where queries come from "
                    f"({sources}). If that is wrong, name the attention: attention={{'<a>_to_<b>': 'path', ...}}."
                ]
            )
        elif old_names:
            info([", ".join(f"{old} is recorded as {new}" for old, new in old_names.items()) + "."])
        bypassed = evidence.bypassed(found.modalities, found.further)
        for name, modality in bypassed:
            info(
                [
                    f"{name} also reaches the prediction past {modality}, and stays each sample's own there: these are "
                    f"contributions of the {modality} features."
                ]
            )
        others = [evidence.name_input(path) for path in found.further]
        others = [name for name in others if name not in dict(bypassed)]
        if others:
            info([f"Further inputs reach the prediction, and stay each sample's own: {', '.join(others)}."])

    def _can_keep(self, root: Root, path: Path) -> bool:
        return root.axes.get(path) is not None and isinstance(root.call[path], Tensor)

    def _follow(self, evidence: Evidence) -> None:
        """Trace from now on what is needed of each step."""
        root, trace = evidence.root, self._trace
        paths = {port.path for modality in self.modalities for port in modality.ports if port.kind != "input"}
        for port in (port for modality in self.modalities for port in modality.ports):
            if port.kind != "input" and evidence.changed_in_place(port):
                trace.copied.add(get_module(self._model, port.path))
        # A step may also change its batch after the call.
        takes_inputs = evidence.changes_inputs or bool(self._found and self._found.further)
        takes_inputs |= any(port.kind == "input" for modality in self.modalities for port in modality.ports)
        self._copies_batch = root.path is None and takes_inputs
        if root.path is not None:
            paths.add(root.path)
            if takes_inputs:
                trace.copied.add(get_module(self._model, root.path))
        if root.place.kind == "call":
            paths.add(root.place.path)
        trace.follow({get_module(self._model, path): path for path in paths}, root.place.kind == "loss")

    def _of_first_step(self, found: Found, real: Mapping[str, Tensor]) -> tuple[FusionRecord | None, list[str]]:
        """What the first step handed on, which is run once more, as it was not known then what to keep."""
        root = found.root
        ports = [port for modality in self.modalities for port in modality.ports]
        try:
            with root.restoring():
                predictions, outputs, arguments = root.run(
                    root.call.copied({path for path, _ in root.call.tensors()}),
                    capture=[port.key for port in ports if port.kind != "input"],
                )
                output = root.read_output(predictions.detach())

                def value(port: Port, path: Path) -> Tensor:
                    if port.kind == "input":
                        one: Tensor = root.call[path]
                    elif port.kind == "argument":
                        one = arguments[port.key][path]
                    else:
                        one = dict(find_tensors(outputs[port.key]))[path]
                    return one.detach().clone()

                values = {
                    modality.name: [value(port, path) for port, path, _ in modality.columns]
                    for modality in self.modalities
                }
            return self._make_record(values, [root.call[path] for path in found.further], output, real), []
        except (ReplayError, ShapeError, KeyError) as error:
            return None, self._left_out(str(error))

    def _name_in_trace(self, layers: Sequence[Layer], real: Mapping[str, Tensor]) -> list[str]:
        """Record what is named, where the model cannot run again: a fusion's arguments, or modules of these names."""
        try:
            modalities = self._arguments_in_trace(real) if self._fusion is not None else self._modules_in_trace(layers)
        except AbsentArgumentError as error:
            return self._left_out(f"the fusion '{self._fusion}' got {error}")
        self._is_decided = True
        if len(modalities) < 2:
            why = self.problem or "with contribution_samples=0 the model does not run again to find the modalities"
            return self._refuse(f"{why}, and what holds them is not named")
        self.modalities = tuple(modalities)
        precision, place = Precision("cpu", None), PredictionPlace("call")
        root = Root(self._model, self._model, Call((), {}), 0, precision, (), place, lambda _: None, "")
        self._found = Found(root, self.modalities)
        paths = {port.path for modality in modalities for port in modality.ports}
        self._trace.follow({get_module(self._model, path): path for path in paths}, False)
        return []

    def _arguments_in_trace(self, real: Mapping[str, Tensor]) -> list[Modality]:
        run = None if self._named is None else self._trace.find(self._named)
        if run is None or run.entered is None or self._setting is None:
            return []
        samples = next(len(one) for one in run.given.values())
        key = run.path, 0
        return name_arguments(run.module, str(self._fusion), key, self._setting, run.entered, samples, real)

    def _modules_in_trace(self, layers: Sequence[Layer]) -> list[Modality]:
        """The outermost modules that are named, or called as the modalities of the first layer."""
        found = []
        directions = [direction for layer in layers[:1] for direction, _ in layer.sources]
        names = dict.fromkeys(str(name) for one in directions for name in (one.query, one.key))
        wanted = self._setting or {name: name for name in names}
        for name, several in wanted.items():
            first = str(as_tuple(several)[0])
            path = find_module(self._model, first)
            runs = [run for run in self._trace.runs if path in (None, run.path) and run.tensors]
            runs = [run for run in runs if path is not None or plain_name(run.path) == first]
            if runs:
                leaf, tensor = next(iter(runs[0].tensors.items()))
                port = Port("output", runs[0].path, 0, {leaf: 0} if tensor.dim() else {})
                found.append(Modality(name, (port,), runs[0].path))
        return found

    # ------------------------------------------------------------------ replays
    def identify_modalities(self) -> tuple[object, ...]:
        """What is exchanged and kept of each sample, to be compared between processes; empty where nothing is."""
        columns = tuple(
            (one.name, port.kind, port.key, path) for one in self.modalities for port, path, _ in one.columns
        )
        return (columns, () if self._found is None else self._found.further) if columns else ()

    def make_replay(self) -> Replay:
        """The predictions as a function of the modalities; it repeats the call of an evaluation's first step.

        Raises
        ------
        ReplayError
            If it cannot be replayed.
        """
        if not self.processes.hold_whole_model:
            raise ReplayError(SPLIT_MODEL)
        if self.problem:
            raise ReplayError(self.problem)
        if self._root is None or self._found is None:
            raise ReplayError("no step gave predictions")
        if self._replay is None:
            self._replay = Replay(self._root, self.modalities, self._found.further)
        return self._replay

    def find_attention(self, direction: Direction, queries: int | None, keys: int) -> AttentionPlace | None:
        """Where a direction of the first layer is computed behind the modalities; None where that is not known.

        Raises
        ------
        ReplayError
            If it is computed where the modalities do not reach it.
        """
        source = self._sources.get(direction)
        if source is None or source.read is not None:
            return None
        for port in (port for modality in self.modalities for port in modality.ports if port.kind == "output"):
            if source.path == port.path or source.path.startswith(f"{port.path}."):
                raise ReplayError(f"'{source.path}' is in '{port.path}', which holds a modality")
        return AttentionPlace(get_module(self._model, source.path), source.call, queries, keys)

    def describe(self) -> list[str]:
        """Each modality and what holds it, as ``audio = audio_proj``."""
        return [f"{modality.name} = {modality.source}" for modality in self.modalities]


def _name_root(root: Root) -> str:
    return "the step" if root.path is None else f"'{root.path}'" if root.path else "forward"
