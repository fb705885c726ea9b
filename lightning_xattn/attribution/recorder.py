"""The modalities of each step as the model hands them on, and what is needed to replay the predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.first_step import FirstStep, Found, StepCall
from lightning_xattn.attribution.outputs import ModelOutput
from lightning_xattn.attribution.ports import Column, LeftOutError, ModalitiesSetting, Modality, Place, check_modalities
from lightning_xattn.attribution.replay import AttentionPlace, Replay
from lightning_xattn.attribution.root import Intact, ReplayError, Root
from lightning_xattn.attribution.state import torch_generators
from lightning_xattn.capture import Layer
from lightning_xattn.capture.attention_mode import get_module
from lightning_xattn.capture.calls import Call, Run, StepTrace, find_tensors, name_argument, output_at
from lightning_xattn.capture.labels import Labels
from lightning_xattn.capture.sources import Source
from lightning_xattn.capture.wrappers import find_module
from lightning_xattn.core.attention import AttentionPair, Direction
from lightning_xattn.core.distributed import SINGLE_PROCESS, Processes
from lightning_xattn.core.errors import DiscoveryError, ShapeError
from lightning_xattn.core.notices import info, warn

SPLIT_MODEL = (
    "the processes hold the model together, as under FSDP or DeepSpeed, so that none of them can run it again by itself"
)
"""Why nothing is replayed, as the end of a sentence."""


Readiness = tuple[str, tuple[object, ...]]


@dataclass(frozen=True, eq=False)
class FusionRecord:
    """The modalities of a batch.

    Attributes
    ----------
    tokens
        By modality ``(batch, tokens, width)`` or ``(batch, width)``, and a mask, True for real tokens.
    values
        What is permuted of each modality, and further inputs that each sample keeps, samples first.
    model_output
        What the model gave for these samples; None where that is not replayed.
    """

    tokens: Mapping[str, tuple[Tensor, Tensor | None]]
    values: Mapping[Column, Tensor]
    model_output: ModelOutput | None

    def __len__(self) -> int:
        return len(next(iter(self.tokens.values()))[0])

    def __getitem__(self, samples: slice) -> FusionRecord:
        """Some of the samples."""
        return FusionRecord(
            {
                name: (tokens[samples], None if mask is None else mask[samples])
                for name, (tokens, mask) in self.tokens.items()
            },
            {column: one[samples] for column, one in self.values.items()},
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
    found
        What the first step showed; its modalities are empty until then.
    readiness
        Of each process what ``find_readiness`` gives, in an evaluation in which that has been gathered.
    is_decided
        Whether it is known what the modalities are, or that they are not.

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
        self.processes = processes
        self._model, self._trace = model, trace
        self._fusion, self._setting, self._names_attention = fusion, modalities, names_attention
        self._may_run = replays and processes.hold_whole_model
        if fusion is not None:
            path = find_module(model, fusion)
            if path is None:
                known = ", ".join(f"'{path}'" for path, _ in model.named_children())
                raise DiscoveryError(
                    f"No module '{fusion}' for fusion=. Found: {known or 'none'}, and the modules inside them."
                )
            if not self._may_run:
                trace.follow({get_module(model, path): path}, False)
                trace.copied.add(get_module(model, path))
        self.found, self.is_decided, self._is_first = Found(), False, False
        self._columns: dict[Column, Place] = {}
        self._features: dict[Column, Place] = {}
        self._sources: Mapping[Direction, Source] = {}
        self._root: Root | None = None
        self._intact: Intact | None = None
        self._replay: Replay | None = None
        self.readiness: list[Readiness] | None = None
        self._step: StepCall | None = None
        # How many axes each tensor had in the first step.
        self._axes: dict[Column, int] = {}

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Empty until they are found."""
        return self.found.modalities

    @property
    def problem(self) -> str:
        """Why contributions are not computed, or nothing of the modalities; "" where they are."""
        return self.found.problem

    @property
    def is_named(self) -> bool:
        """Whether the settings name the modalities."""
        return self._setting is not None

    def begin(self, function: Callable[..., Any] | None, args: tuple[Any, ...]) -> None:
        """Note how a step is called that begins now."""
        needs_states = self._may_run and (not self.is_decided or self._root is None)
        generators = [one.get_state() for one in torch_generators()] if needs_states else []
        if not self.is_decided or self.found.copies_batch:  # which the step may change in place
            call = Call(args, {})
            args = call.copied(dict(call.tensors())).args
        self._step = StepCall(function, args, generators=generators)

    def clear(self) -> None:
        """Forget the step."""
        self._step = None

    def reset(self) -> None:
        """Forget the call that an evaluation's replays repeat; the next evaluation has its own."""
        self._root = self._intact = self._replay = self.readiness = None
        self.found = replace(self.found, intact=None)
        if self.found.root is not None:  # the batch of the first step, and what stands in for it
            self.found.root.call = Call((), {})

    # ---------------------------------------------------------------- each step
    def collect(
        self, attention: Sequence[AttentionPair], layers: Sequence[Layer], labels: Labels, outputs: Any
    ) -> FusionRecord | None:
        """The modalities of this step; None where they are not known, or are not all in this step.

        Parameters
        ----------
        attention, layers
            What was recorded in the step, and where.
        labels
            The predictions of the step. Of a first step their values are looked at.
        outputs
            What the step returned.

        Raises
        ------
        DiscoveryError
            If what is named is not there.
        """
        try:
            self.decide(attention, layers, labels, outputs)
            if self._step is not None:
                self._step = replace(self._step, outputs=outputs)
            if layers and not self._sources:
                names = self.found.renamed
                self._sources = {names.get(direction, direction): one for direction, one in layers[0].sources}
            real = _find_real_tokens(attention)
            is_first, self._is_first = self._is_first, False
            if not self.modalities:
                return None
            if is_first and self.found.root is not None:  # run once more, as it was not known then what to keep
                self._root, intact = self.found.root, self.found.intact
                self.found = replace(self.found, intact=None)
                self._intact = intact or self._root.run_intact(self._columns | self._features)
                return self._make_record(self._intact.values, self._intact.model_output, real, labels)
            return self._make_record(*self._read_step(labels), real, labels)
        except (LeftOutError, ReplayError, ShapeError) as error:
            self._notify(f"The modalities are left out of a step: {error}.")
            return None

    def decide(self, attention: Sequence[AttentionPair], layers: Sequence[Layer], labels: Labels, outputs: Any) -> None:
        """Find the modalities, if this is the first step; it takes and raises what ``collect`` does, and

        Raises
        ------
        LeftOutError
            If another step may show them.
        """
        if self.is_decided:
            return
        absent = [name for name, one in labels.present.items() if not bool(one.any())]
        if absent:
            raise LeftOutError(f"no sample of it has {' or '.join(absent)}, so that another one must show them")
        if self._step is not None:
            self._step = replace(self._step, outputs=outputs)
        samples = len(attention[0].forward) if attention else None
        self._decide(layers, labels, samples, _find_real_tokens(attention))
        self._is_first = True

    def _notify(self, message: str) -> None:
        (warn if self.is_named else info)(message, once=True)

    def _decide(self, layers: Sequence[Layer], labels: Labels, samples: int | None, real: Mapping[str, Tensor]) -> None:
        """Find the modalities in a first step."""
        settings = self._fusion, self._setting, self._names_attention
        first = FirstStep(self._model, self._trace, self._step, labels, layers, samples, real, *settings)
        self.is_decided = True
        try:
            if self._may_run:
                self.found = first.find()
            else:
                self.found = first.find_without_runs("" if self.processes.hold_whole_model else SPLIT_MODEL)
        except LeftOutError:
            self.is_decided = False
            raise
        if self.found.refusal:
            self._notify(f"Probes and contributions are not computed: {self.found.refusal}")
        self._columns, self._features = self.found.columns, self.found.features

    def _read_step(self, labels: Labels) -> tuple[dict[Column, Tensor], ModelOutput | None]:
        """What this step handed on, and the model's output."""
        root, run, call = self.found.root, None, Call((), {})
        if root is not None:
            run, call = self._find_root(root)
        values = {
            column: self._find_value(place, run, call).detach().movedim(place.axis, 0)
            for column, place in (self._columns | self._features).items()
        }
        if root is None:
            return values, None
        output = self._read_predictions(root, run, labels)
        if self._root is None and self._step is not None and output is not None:
            precision = root.precision if run is None or run.precision is None else run.precision
            self._root = replace(
                root, call=call, samples=len(output.values), precision=precision, generators=self._step.generators
            )
        return values, output

    def _find_root(self, root: Root) -> tuple[Run | None, Call]:
        """The call of this step that is as the first step's root."""
        if root.path is None:
            run, call = None, None if self._step is None else Call(self._step.args, {})
        else:
            run = self._trace.find(root.path, root.turn)
            if run is None or not run.has_ended:
                raise LeftOutError(f"{root} did not run")
            call = run.entered
        if call is None:
            raise LeftOutError("it was not called as the first one")
        new = {path for path, _ in call.leaves()} - set(root.axes)
        if new:
            names = " and ".join(f"'{name_argument(root.function, path)}'" for path in sorted(new, key=str))
            raise LeftOutError(f"{root} got {names}, which the first step had not")
        return run, call

    def _find_value(self, place: Place, root_run: Run | None, call: Call) -> Tensor:
        value, name = None, f"'{place.path}'"
        try:
            if place.kind == "input":
                name = f"'{name_argument(self.found.root.function, place.where)}'" if self.found.root else name
                value = call[place.where]
            else:
                run = self._trace.find(place.path, place.turn, root_run)
                if run is not None and run.has_ended:
                    is_output = place.kind == "output"
                    value = output_at(run, place.where) if is_output else run.entered and run.entered[place.where]
        except (KeyError, IndexError, TypeError, AttributeError):
            pass
        if not isinstance(value, Tensor) or value.dim() <= place.axis:
            raise LeftOutError(f"there was no tensor in {name}")
        return value

    def _read_predictions(self, root: Root, run: Run | None, labels: Labels) -> ModelOutput | None:
        place, found = root.place, None
        if place.kind == "call":
            found = output_at(self._trace.find(place.path, place.turn, run), place.leaf)
        elif place.kind == "output" and self._step is not None:
            found = dict(find_tensors(self._step.outputs)).get(place.leaf)
        elif place.kind == "callable":
            found = labels.raw
        elif place.turn < len(self._trace.losses):
            found = self._trace.losses[place.turn].input
        if found is None:
            raise LeftOutError("there were no predictions")
        with torch.no_grad():
            return root.read(found.detach())

    def _make_record(
        self,
        given: Mapping[Column, Tensor],
        output: ModelOutput | None,
        real: Mapping[str, Tensor],
        labels: Labels,
    ) -> FusionRecord:
        samples, values = len(next(iter(given.values()))) if output is None else len(output.values), dict(given)
        for (name, number), one in given.items():
            what = f"a tensor of {name or 'a further input'} is {tuple(one.shape)}"
            if self._axes.setdefault((name, number), one.dim()) != one.dim():
                raise ShapeError(f"{what}, with another number of axes than before")
            if len(one) != samples and name in labels.present and len(one) == int(labels.present[name].sum()):
                # An encoder that runs only on the samples that have its modality; nothing of the others is used.
                values[name, number] = one.new_zeros(samples, *one.shape[1:])
                values[name, number][labels.present[name]] = one
            elif len(one) != samples:
                hint = f". If some samples lack {name}, say which have it: present={{'{name}': ...}}" if name else ""
                raise ShapeError(f"{what}, and not of {samples} samples{hint}")
        tokens = {}
        for modality in self.modalities:
            own = {number: one for (name, number), one in values.items() if name == modality.name}
            kept = [one for number, one in own.items() if (number < 0) == bool(modality.features)]
            tokens[modality.name] = _find_tokens(modality, kept, real.get(modality.name))
        return FusionRecord(tokens, {column: values[column] for column in self._columns}, output)

    # ------------------------------------------------------------------ replays
    def identify_modalities(self) -> tuple[object, ...]:
        """What is exchanged and kept of each sample, to be compared between processes; empty where nothing is."""
        return tuple(self._columns.items())

    def make_replay(self) -> Replay:
        """The predictions as a function of the modalities; it repeats the call of an evaluation's first step.

        Raises
        ------
        ReplayError
            If it cannot be replayed.
        """
        if self.problem or self._root is None:
            raise ReplayError(self.problem or "no step gave predictions")
        if self._replay is None:
            self._replay, self._intact = Replay(self._root, self._columns, self._intact), None
        return self._replay

    def sharing_state(self) -> AbstractContextManager[None]:
        """Let all replays in the block share one copy of the model's state; nothing else runs the model meanwhile."""
        return nullcontext() if self._root is None else self._root.sharing_state()

    def find_readiness(self) -> Readiness:
        """Why this process cannot replay ("": it can), and what it permutes, which must be the same on all of them."""
        if not self.processes.hold_whole_model:
            return SPLIT_MODEL, ()
        try:
            self.make_replay()
        except ReplayError as error:
            return str(error), self.identify_modalities()
        return "", self.identify_modalities()

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
        for place in self._columns.values():
            if place.kind == "output" and f"{source.path}.".startswith(f"{place.path}."):
                raise ReplayError(f"'{source.path}' is in '{place.path}', which holds a modality")
        return AttentionPlace(get_module(self._model, source.path), source.call, queries, keys)


def _find_real_tokens(attention: Sequence[AttentionPair]) -> dict[str, Tensor]:
    """By modality, the tokens that the first layer takes as real, ``(batch, tokens)``."""
    found = {}
    for one in (one for pair in attention[:1] for one in pair.directions):
        if one.key_mask is not None:
            # Packed keys stand in another order than the modality's tokens: only whether there is any is known.
            mask = one.key_mask.any(1, keepdim=True).expand_as(one.key_mask) if one.is_packed else one.key_mask
            found[str(one.direction.key)] = mask
    return found


def _find_tokens(modality: Modality, kept: Sequence[Tensor], real: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What linear probes get of a modality: ``(batch, tokens, width)`` or ``(batch, width)``, and its mask."""
    first = next((one for one in kept if one.is_floating_point() and one.dim() > 1), kept[0])
    if modality.mask is not None:
        places = modality.features or modality.places
        mask = kept[[place.where for place in places].index(modality.mask.where)]
        if mask.numel() != first.shape[:2].numel():
            raise ShapeError(
                f"'{modality.mask.label}' is {tuple(mask.shape)} and no mask of the {tuple(first.shape[:2])} tokens of "
                f"{modality.name}"
            )
        return first, modality.mask.real(mask.reshape(first.shape[:2]))
    if first.dim() == 1:
        return first[:, None].float(), None
    if first.dim() > 3:  # maps of features (batch, channels, ...): places are tokens
        return first.flatten(2).transpose(1, 2), None
    fits = real is not None and first.dim() == 3 and tuple(real.shape) == tuple(first.shape[:2])
    return first if first.is_floating_point() else first.float(), real if fits else None
