"""The tokens of each modality as they enter the fusion, while the model runs; its outputs stay what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.fusion_runs import FusionRuns, ModuleRun
from lightning_xattn.attribution.inputs import (
    AbsentArgumentError,
    FusionInputs,
    ModalitiesSetting,
    ModalityPlace,
    check_fusion,
)
from lightning_xattn.attribution.outputs import ModelOutput, ReadOutput, find_model_output
from lightning_xattn.attribution.replay import AttentionPlace, RecordedCall, Replay, ReplayError
from lightning_xattn.capture import Layer
from lightning_xattn.capture.calls import Path, name_argument
from lightning_xattn.capture.labels import Labels
from lightning_xattn.capture.sources import Source
from lightning_xattn.capture.wrappers import find_module
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
            None if self.model_output is None else self.model_output[samples],
        )


class FusionRecorder:
    """Record what enters a model's fusion in each step, and what is needed to replay what lies behind it.

    Unless named, the fusion is the nearest module that runs both directions of the first recorded layer, once in a
    step, with arguments that hold one token sequence for each modality, and behind which the tokens alone decide the
    prediction. It is looked for in the first step.

    Parameters
    ----------
    model
        Any module; nothing is hooked yet.
    fusion
        The fusion's path; None: to be found.
    modalities
        Which of its arguments hold which modality; None: by names and numbers of tokens.
    processes
        Those that run the model.
    replays
        Whether the model may run again, to try which of several modules is the fusion. If not, the nearest is chosen.

    Attributes
    ----------
    fusion_inputs
        The fusion and its modalities; None until they are found.
    problem
        Why contributions are not computed, or nothing of the fusion; "" where they are.

    Raises
    ------
    SettingError
        If the settings do not name a fusion and its arguments.
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
        self._has_given_up = False
        self._fusion: nn.Module | None = None
        self._around: nn.Module | None = None
        self._read: ReadOutput | None = None
        self._recorded_call: RecordedCall | None = None
        self._replay: Replay | None = None
        self._sources: Mapping[Direction, Source] = {}
        self._hooks, self._is_hooked = ExitStack(), False
        self._runs = FusionRuns(model, self._named, modalities)
        self._noticed: set[str] = set()
        # What went wrong in this step's hooks.
        self._errors: list[Exception] = []
        # Places of the tensors that the fusion got in the first step.
        self._arguments: set[Path] = set()

    @property
    def is_named(self) -> bool:
        """Whether the settings name the fusion."""
        return self._named is not None

    @property
    def needs_attention(self) -> bool:
        """Whether the fusion's arguments are found with the help of the recorded attention."""
        return self._named is None or self._modalities is None

    @property
    def places(self) -> Mapping[str, ModalityPlace]:
        """Where each modality stands among the fusion's arguments."""
        return {} if self.fusion_inputs is None else self.fusion_inputs.places

    def __enter__(self) -> FusionRecorder:
        self.close()
        self.clear()
        self._attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attach(self) -> None:
        with ExitStack() as hooks:
            if not self._has_given_up:
                self._runs.attach(hooks, self._errors)
            self._hooks = hooks.pop_all()
            self._is_hooked = True

    def close(self) -> None:
        """Remove every hook. What was recorded of the step stays until ``clear``."""
        self._hooks.close()
        self._is_hooked = False

    def clear(self) -> None:
        """Forget the step."""
        self._runs.clear()
        self._errors.clear()

    def reset(self) -> None:
        """Forget the call that an evaluation's replays repeat; the next evaluation has its own."""
        self._recorded_call = self._replay = None

    def find_first_tokens(self) -> tuple[Tensor | None, list[str]]:
        """The tokens of a named fusion's first modality in this step, and new messages; None if it did not run."""
        if self._has_given_up:
            return None, []
        if self.fusion_inputs is not None:
            inputs, messages = self._collect(self.fusion_inputs)
            return (None if inputs is None else next(iter(inputs.tokens.values()))[0]), messages
        try:
            runs = self._runs.find_candidates((), ())
        except AbsentArgumentError as error:
            return None, self._left_out(f"'{self._named}' got {error}")
        if not runs:
            return None, []
        run, fusion_inputs = runs[0]
        return fusion_inputs.tokens(run.call, next(iter(fusion_inputs.places)))[0], []

    def collect_inputs(
        self, attention: Sequence[AttentionPair], layers: Sequence[Layer], labels: Labels
    ) -> tuple[FusionRecord | None, list[str]]:
        """What entered the fusion in this step, and new messages to the user.

        Parameters
        ----------
        attention, layers
            What was recorded in the step, and where; empty of a model without cross-attention.
        labels
            The predictions of the step. Of a first step their values are looked at.

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
        messages: list[str] = []
        if self.fusion_inputs is None and not self._has_given_up:
            messages += self._find_fusion(attention, layers, labels)
            if self._is_hooked:  # from now on only what is needed
                self._hooks.close()
                self._attach()
        if self.fusion_inputs is None:
            return None, messages
        inputs, others = self._collect(self.fusion_inputs)
        return inputs, [*messages, *others]

    def _collect(self, fusion_inputs: FusionInputs) -> tuple[FusionRecord | None, list[str]]:
        runs = self._runs.find_runs(self._fusion)
        if len(runs) != 1:
            return None, self._left_out(f"{fusion_inputs} {f'ran {len(runs)} times' if runs else 'did not run'}")
        try:
            return self._read_run(fusion_inputs, runs[0]), []
        except (KeyError, IndexError, TypeError, AttributeError):
            return None, self._left_out(f"{fusion_inputs} got other arguments")
        except ShapeError as error:
            return None, self._left_out(f"{fusion_inputs} got other arguments", f": {error}")

    def _left_out(self, what: str, why: str = "") -> list[str]:
        return self._once(f"The fusion {what} in a step, which is left out{why}.")

    def _once(self, message: str) -> list[str]:
        new = message not in self._noticed
        self._noticed.add(message)
        return [message] if new else []

    def _read_run(self, fusion_inputs: FusionInputs, run: ModuleRun) -> FusionRecord:
        """What entered the fusion in its run, and what the module around it returned."""
        call = run.call
        tokens = {name: fusion_inputs.tokens(call, name) for name in fusion_inputs.places}
        permuted = {
            name: [call[path].detach().movedim(axis, 0) for path, axis in place.kept.items()]
            for name, place in fusion_inputs.places.items()
        }
        # A mask that is given only where there is padding: which tokens are real is not known without it.
        sizes = {one.shape[:2].numel() for one, mask in tokens.values() if mask is None}
        new = {path: one for path, one in call.tensors() if path not in self._arguments and one.numel() in sizes}
        if new:
            which = " and ".join(f"'{name_argument(run.module, path)}'" for path in new)
            raise ShapeError(f"{which} may be a mask, and the first step had none. Give it in every step")
        samples = len(next(iter(tokens.values()))[0])
        for name, kept in permuted.items():
            if any(len(one) != samples for one in kept):
                shapes = ", ".join(str(tuple(one.shape)) for one in kept)
                raise ShapeError(f"what goes with {name} does not hold {samples} samples: {shapes}")
        return FusionRecord(tokens, permuted, self._read_output())

    def _read_output(self) -> ModelOutput | None:
        """The model's output in this step, whose call is recorded if it is an evaluation's first; None without it."""
        if self._read is None:
            return None
        for run in self._runs.find_runs(self._around):
            with torch.no_grad():
                found = self._read(run.output)
            if found is not None:
                if self._recorded_call is None:
                    self._recorded_call = RecordedCall(run.module, run.call, run.precision, found)
                return found
        return None

    def _find_fusion(
        self, attention: Sequence[AttentionPair], layers: Sequence[Layer], labels: Labels
    ) -> Iterator[str]:
        """Decide in a first step; gives messages to the user."""
        try:
            candidates = self._runs.find_candidates(attention, layers)
        except AbsentArgumentError as error:
            yield from self._left_out(f"'{self._named}' got {error}")
            return
        if candidates is None:
            if self.is_named:
                yield from self._once(
                    f"The fusion '{self._named}' was not seen in a step: it did not run, or is inside of an "
                    "nn.TransformerEncoderLayer."
                )
            return
        if not candidates or self._runs.runs_of_named > 1:
            self._has_given_up = True
            yield self._runs.describe_unclear(attention, layers)
            return
        tries = len(candidates) > 1 and self._replays and self.processes.hold_whole_model
        if len(candidates) > 1 and not self.processes.hold_whole_model:
            yield self._runs.describe_several(candidates)
        problems = []
        for run, fusion_inputs in candidates:
            try:
                recorded_call, self._read = self._find_output_around(run, fusion_inputs, labels)
                # A replay costs a forward. Where there is a choice, what can be replayed is chosen; where there is
                # none, the forward waits until something is replayed.
                if tries:
                    self._replay = Replay(run.module, fusion_inputs.axes, recorded_call, self._read)
            except ReplayError as error:
                problems.append(str(error))
                continue
            self._around, self._recorded_call = recorded_call.module, recorded_call
            break
        else:
            run, fusion_inputs = candidates[0]
            self.problem, self._read = problems[0], None
        self.fusion_inputs, self._fusion = fusion_inputs, run.module
        self._arguments = {path for path, _ in run.call.tensors()}
        self._sources = dict(layers[0].sources) if layers else {}
        self._runs.narrow(run, set(fusion_inputs.axes), self._around)

    def _find_output_around(
        self, run: ModuleRun, fusion_inputs: FusionInputs, labels: Labels
    ) -> tuple[RecordedCall, ReadOutput]:
        """The call of the nearest module around a fusion that gives the class scores, and how to read them.

        Raises
        ------
        ReplayError
            If there is none.
        """
        path, axis = next(iter(fusion_inputs.axes.items()))
        samples, around = run.call[path].shape[axis], run
        while True:
            read = find_model_output(around.output, samples, labels)
            with torch.no_grad():
                model_output = None if read is None else read(around.output)
            if read is not None and model_output is not None:
                return RecordedCall(around.module, around.call, around.precision, model_output), read
            if around.outer is None:
                raise ReplayError("no module around it returns the class scores, as a forward would that calls both")
            around = around.outer

    def make_replay(self) -> Replay:
        """What lies behind the fusion, as a function of the tokens; it repeats the call of an evaluation's first step.

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

    def find_attention(self, direction: Direction, queries: int | None, keys: int) -> AttentionPlace | None:
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
