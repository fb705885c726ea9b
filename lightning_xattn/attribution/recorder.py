"""The tokens of each modality as they enter the fusion, while the model runs; its outputs stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.arguments import Call, Path, label_of
from lightning_xattn.attribution.inputs import (
    AbsentArgumentError,
    FusionInputs,
    ModalitiesSetting,
    ModalityPlace,
    check_fusion,
)
from lightning_xattn.attribution.outputs import find_output
from lightning_xattn.attribution.replay import (
    AttentionPlace,
    ModelOutput,
    Precision,
    ReadOutput,
    RecordedCall,
    Replay,
    ReplayError,
)
from lightning_xattn.attribution.survey import FusionSurvey, SeenRun
from lightning_xattn.capture import Layer
from lightning_xattn.capture.labels import Labels
from lightning_xattn.capture.sources import Source
from lightning_xattn.capture.wrappers import Hook, find_module
from lightning_xattn.core.attention import AttentionPair, Direction
from lightning_xattn.core.distributed import SINGLE_PROCESS, Processes
from lightning_xattn.core.errors import DiscoveryError, ShapeError

SPLIT_MODEL = (
    "the processes hold the model together, as under FSDP or DeepSpeed, so that none of them can run it again by itself"
)
"""Why nothing is replayed, as the end of a sentence."""


@dataclass(frozen=True, eq=False)
class FusionRecord:
    """The modalities of a batch as they enter the fusion."""

    tokens: Mapping[str, tuple[Tensor, Tensor | None]]
    """By modality ``(batch, tokens, width)`` or ``(batch, width)``, and a mask, True for real ones."""
    permuted: Mapping[str, Sequence[Tensor]]
    """By modality, what is permuted with it, see ``ModalityPlace.kept``; samples come first."""
    model_output: ModelOutput | None
    """What the module around it said of these samples; None where that is not replayed."""

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
            None if self.model_output is None else self.model_output[samples],
        )


class FusionRecorder:
    """Keep what enters a model's fusion in each step, and what is needed to replay what lies behind it.

    Unless named, the fusion is the nearest module that runs both directions of the first layer that is recorded, once
    in a step, with arguments that hold one token sequence for each modality, and behind which the tokens alone decide
    the prediction. It is looked for in the first step.

    Parameters
    ----------
    model
        Any module; nothing is hooked yet.
    fusion
        The fusion's path; None: to be found.
    modalities
        Which of its arguments are whose tokens; None: as names and numbers of tokens tell.
    processes
        Those that run the model.
    replays
        Whether the model may run again, to try which of several modules is the fusion. If not, the nearest is taken.

    Attributes
    ----------
    fusion_inputs
        The fusion and its modalities; None until they are found.
    problem
        Why contributions cannot be told, or nothing of the fusion; "" where they can.

    Raises
    ------
    SettingError
        If the settings say nothing.
    DiscoveryError
        If there is no such module.
    """

    def __init__(
        self,
        model: nn.Module,
        fusion: str | None = None,
        modalities: ModalitiesSetting | None = None,
        processes: Processes = SINGLE_PROCESS,
        replays: bool = True,
    ) -> None:
        check_fusion(fusion, modalities)
        self.processes, self._replays = processes, replays
        self._model, self._modalities = model, modalities
        self._named = None if fusion is None else find_module(model, fusion)
        if fusion is not None and self._named is None:
            known = ", ".join(f"'{path}'" for path, _ in model.named_children())
            raise DiscoveryError(
                f"No module '{fusion}' for fusion=. Found: {known or 'none'}, and the modules inside them."
            )
        self.fusion_inputs: FusionInputs | None = None
        self.problem = ""
        self._given_up = False
        self._fusion: nn.Module | None = None
        self._around: nn.Module | None = None
        self._read: ReadOutput | None = None
        self._recorded_call: RecordedCall | None = None
        self._replay: Replay | None = None
        self._sources: Mapping[Direction, Source] = {}
        self._hooks, self._hooked = ExitStack(), False
        self._survey = FusionSurvey(model, self._named, modalities)
        self._calls: list[Call] = []
        self._model_output: ModelOutput | None = None
        self._told: set[str] = set()
        # What went wrong in this step's hooks.
        self._errors: list[Exception] = []
        # Of the first step.
        self._arguments: set[Path] = set()

    @property
    def is_named(self) -> bool:
        """Whether the settings name the fusion."""
        return self._named is not None

    @property
    def needs_attention(self) -> bool:
        """Whether it takes attention to tell which arguments are whose tokens."""
        return self._named is None or self._modalities is None

    def __enter__(self) -> FusionRecorder:
        self.close()
        self.clear()
        self._attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook. What was kept of the step stays until ``clear``."""
        self._hooks.close()
        self._hooked = False

    def clear(self) -> None:
        """Forget the step."""
        self._survey.clear()
        self._errors.clear()
        self._calls, self._model_output = [], None

    def reset(self) -> None:
        """Let go of an evaluation's first step, which carries the replays at its end; the next one has its own."""
        self._recorded_call = self._replay = None

    def first_tokens(self) -> tuple[Tensor | None, list[str]]:
        """Of a fusion that is named, the first modality's tokens in this step.

        Returns
        -------
        tokens, messages
            None if there is nothing of it in this step, and why.
        """
        if self._given_up:
            return None, []
        if self.fusion_inputs is not None:
            inputs, messages = self._taken(self.fusion_inputs)
            return (None if inputs is None else next(iter(inputs.tokens.values()))[0]), messages
        try:
            runs = self._survey.possible((), ())
        except AbsentArgumentError as error:
            return None, self._once(f"The fusion '{self._named}' got {error} in a step, which is left out.")
        if not runs:
            return None, []
        run, fusion_inputs = runs[0]
        return fusion_inputs.tokens(run.call, next(iter(fusion_inputs.places)))[0], []

    def take(
        self, attention: Sequence[AttentionPair], layers: Sequence[Layer], labels: Labels
    ) -> tuple[FusionRecord | None, list[str]]:
        """What entered the fusion in this step, and what users should be told.

        Parameters
        ----------
        attention, layers
            What was recorded in the step, and where; empty of a model without cross-attention.
        labels
            The predictions of the step; of a first step they are looked at.

        Returns
        -------
        inputs, messages
            None where the fusion is not known, or did not run once in this step.

        Raises
        ------
        Exception
            Whatever went wrong while the model ran, which has not ended its run.
        """
        if self._errors:
            raise self._errors[0]
        if self._given_up:
            return None, []
        if self.fusion_inputs is None:
            messages = list(self._find(attention, layers, labels))
            if self._hooked:  # from now on only what is needed
                self._hooks.close()
                self._attach()
            if self.fusion_inputs is None:
                return None, messages
        else:
            messages = []
        inputs, more = self._taken(self.fusion_inputs)
        return inputs, [*messages, *more]

    def _taken(self, fusion_inputs: FusionInputs) -> tuple[FusionRecord | None, list[str]]:
        if len(self._calls) != 1:
            how = "did not run" if not self._calls else f"ran {len(self._calls)} times"
            return None, self._once(f"The fusion {fusion_inputs} {how} in a step, which is left out.")
        try:
            return self._inputs(fusion_inputs, self._calls[0]), []
        except (KeyError, IndexError, TypeError, AttributeError):
            return None, self._once(f"The fusion {fusion_inputs} got other arguments in a step, which is left out.")
        except ShapeError as error:
            return None, self._once(
                f"The fusion {fusion_inputs} got other arguments in a step, which is left out: {error}."
            )

    @property
    def places(self) -> Mapping[str, ModalityPlace]:
        """Where each modality stands among the fusion's arguments."""
        return {} if self.fusion_inputs is None else self.fusion_inputs.places

    def replay(self) -> Replay:
        """What lies behind the fusion, carried by the evaluation's first step.

        Raises
        ------
        ReplayError
            If it cannot be replayed.
        """
        if not self.processes.hold_whole_model:
            raise ReplayError(SPLIT_MODEL)
        if self._recorded_call is None or self.fusion_inputs is None or self._fusion is None or self._read is None:
            raise ReplayError(self.problem or "the fusion did not run")
        if self._replay is None:
            self._replay = Replay(self._fusion, self.fusion_inputs.axes, self._recorded_call, self._read)
        return self._replay

    def attention_of(self, direction: Direction, queries: int | None, keys: int) -> AttentionPlace | None:
        """Where a direction of the first layer is computed inside of the fusion; None where that is not known.

        Raises
        ------
        ReplayError
            If it is computed elsewhere, so that what enters the fusion does not reach it.
        """
        source = self._sources.get(direction)
        if source is None or self.fusion_inputs is None or source.read is not None:
            return None
        inside = self.fusion_inputs.path
        if inside and source.path != inside and not source.path.startswith(f"{inside}."):
            raise ReplayError(f"'{source.path}' is not in the fusion {self.fusion_inputs}")
        module = self._model.get_submodule(source.path)
        return AttentionPlace(module, source.call, queries, keys)

    def _attach(self) -> None:
        with ExitStack() as hooks:
            if self.fusion_inputs is not None:
                self._hook(hooks)
            elif not self._given_up:
                self._survey.attach(hooks, self._errors)
            self._hooks = hooks.pop_all()
            self._hooked = True

    def _inputs(self, fusion_inputs: FusionInputs, call: Call) -> FusionRecord:
        tokens = {name: fusion_inputs.tokens(call, name) for name in fusion_inputs.places}
        permuted = {
            name: [call[path].detach().movedim(axis, 0) for path, axis in place.kept.items()]
            for name, place in fusion_inputs.places.items()
        }
        assert self._fusion is not None
        # A mask that is given only where there is padding: which tokens are real is not known without it.
        sizes = {one.shape[:2].numel() for one, mask in tokens.values() if mask is None}
        new = {path: one for path, one in call.tensors() if path not in self._arguments and one.numel() in sizes}
        if new:
            which = " and ".join(f"'{label_of(self._fusion, path)}'" for path in new)
            raise ShapeError(f"{which} may be a mask, and the first step had none. Give it in every step")
        samples = len(next(iter(tokens.values()))[0])
        for name, kept in permuted.items():
            if any(len(one) != samples for one in kept):
                shapes = ", ".join(str(tuple(one.shape)) for one in kept)
                raise ShapeError(f"what goes with {name} does not hold {samples} samples: {shapes}")
        return FusionRecord(tokens, permuted, self._model_output)

    def _hook(self, hooks: ExitStack) -> None:
        """In later steps: what enters the fusion, what the module around it gives, and one call to carry replays."""
        assert self.fusion_inputs is not None
        assert self._fusion is not None
        axes, around = self.fusion_inputs.axes, self._around

        running: list[Call] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if running and module is self._model:  # in a step, see SeenRun.runs_itself
                self._calls = [one for one in self._calls if one is not running[-1]]
            try:
                call = Call(args, kwargs).copied(axes)  # a module may change its arguments in place
            except (KeyError, IndexError, TypeError, AttributeError):
                call = Call(args, kwargs)
            running.append(call)
            self._calls.append(call)

        def left(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            running.pop()

        calls: list[tuple[Call, Precision]] = []

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(args, kwargs)
            calls.append((call, Precision.of(call)))

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            called = calls.pop()
            if self._model_output is None and self._read is not None:
                with torch.no_grad():
                    self._model_output = self._read(output)
                if self._recorded_call is None and self._model_output is not None:
                    self._recorded_call = RecordedCall(module, *called, self._model_output)

        def before(module: nn.Module, function: Callable[..., None]) -> None:
            hook = Hook(function, self._errors)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

        def after(module: nn.Module, function: Callable[..., None], always_call: bool = False) -> None:
            hook = Hook(function, self._errors)
            hooks.callback(module.register_forward_hook(hook, always_call=always_call).remove)

        before(self._fusion, enter)
        after(self._fusion, left, always_call=True)
        if around is not None:
            before(around, begin)
            after(around, leave)

    def _find(self, attention: Sequence[AttentionPair], layers: Sequence[Layer], labels: Labels) -> Iterator[str]:
        """Decide in a first step; says what users should know."""
        try:
            possible = self._survey.possible(attention, layers)
        except AbsentArgumentError as error:
            yield from self._once(f"The fusion '{self._named}' got {error} in a step, which is left out.")
            return
        if possible is None:
            if self.is_named:
                yield from self._once(
                    f"The fusion '{self._named}' was not seen in a step: it did not run, or is inside of an "
                    "nn.TransformerEncoderLayer."
                )
            return
        if not possible or self._survey.runs_of_named > 1:
            self._given_up = True
            yield self._survey.say_unclear(attention, layers)
            return
        tries = len(possible) > 1 and self._replays and self.processes.hold_whole_model
        if len(possible) > 1 and self._replays and not tries:
            yield self._survey.say_several(possible)
        problems = []
        for run, fusion_inputs in possible:
            try:
                self._recorded_call, self._read = self._behind(run, fusion_inputs, labels)
                # A replay costs a forward. Where there is a choice, what can be replayed is chosen; where there is
                # none, the forward waits until something is replayed.
                self._replay = (
                    Replay(run.module, fusion_inputs.axes, self._recorded_call, self._read) if tries else None
                )
            except ReplayError as error:
                problems.append(str(error))
                continue
            self._around, self._model_output = self._recorded_call.module, self._recorded_call.model_output
            break
        else:
            run, fusion_inputs = possible[0]
            self.problem, self._recorded_call = problems[0], None
        self.fusion_inputs, self._fusion, self._calls = fusion_inputs, run.module, [run.call]
        self._arguments = {path for path, _ in run.call.tensors()}
        self._sources = dict(layers[0].sources) if layers else {}

    def _behind(self, run: SeenRun, fusion_inputs: FusionInputs, labels: Labels) -> tuple[RecordedCall, ReadOutput]:
        """The nearest module around a fusion that gives the class scores, to carry replays, and how to read them.

        Raises
        ------
        ReplayError
            If there is none.
        """
        samples = run.call[next(iter(fusion_inputs.axes))].shape[next(iter(fusion_inputs.axes.values()))]
        around: SeenRun | None = run
        while around is not None:
            read = find_output(around.output, samples, labels)
            with torch.no_grad():
                model_output = None if read is None else read(around.output)
            if read is not None and model_output is not None:
                return RecordedCall(around.module, around.call, around.precision, model_output), read
            around = around.outer
        raise ReplayError("no module around it returns the class scores, as a forward would that calls both")

    def _once(self, message: str) -> list[str]:
        new = message not in self._told
        self._told.add(message)
        return [message] if new else []
