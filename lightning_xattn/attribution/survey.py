"""What a first step shows of where the modalities enter the fusion."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_xattn.attribution.arguments import Call, label_of
from lightning_xattn.attribution.inputs import (
    FusionInputs,
    ModalitiesSetting,
    guessed_fusion_inputs,
    named_fusion_inputs,
)
from lightning_xattn.attribution.replay import Precision
from lightning_xattn.capture import Layer
from lightning_xattn.capture.wrappers import Hook, in_encoder_layers
from lightning_xattn.core.attention import AttentionPair

NAME_IT = "Name it: fusion='path.to.module', modalities={'<a>': 0, '<b>': 1} (positions or names of its arguments)."
"""The remedy where the fusion is not clear."""


@dataclass(eq=False)
class SeenRun:
    """A run of a module in a first step."""

    module: nn.Module
    path: str
    outer: SeenRun | None
    call: Call
    precision: Precision
    may_fuse: bool
    """Whether its arguments may be those of a fusion, or hold such a run."""
    output: Any = None
    runs_itself: bool = False
    """Of the whole model, whether it runs in it again: then this is a step, which Lightning runs as the ``forward`` of
    a model that it wraps, as under DDP."""

    def __str__(self) -> str:
        held = (f"{label_of(self.module, where)} {tuple(one.shape)}" for where, one in self.call.tensors())
        return f"'{self.path}' ({', '.join(held)})"


class FusionSurvey:
    """Looks at every module in a first step for those that may be the fusion, and what they are part of.

    Parameters
    ----------
    model
        The model.
    named
        The fusion's full path; None: to be found.
    modalities
        Which of its arguments are whose tokens; None: as names and numbers of tokens tell.
    """

    def __init__(self, model: nn.Module, named: str | None, modalities: ModalitiesSetting | None) -> None:
        self._model, self._named, self._modalities = model, named, modalities
        self.clear()

    def clear(self) -> None:
        """Forget the step."""
        self._running: list[SeenRun] = []
        self._seen: list[SeenRun] = []

    def attach(self, hooks: ExitStack, errors: list[Exception]) -> None:
        """Look at every run until ``hooks`` closes; ``errors`` gets what goes wrong."""
        unhookable = in_encoder_layers(self._model)
        for path, module in self._model.named_modules():
            if module not in unhookable and not isinstance(module, torch.jit.ScriptModule):
                enter, leave = Hook(partial(self._enter, path), errors), Hook(self._leave, errors)
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(args, kwargs)
        precision, outer = Precision.of(call), self._running[-1] if self._running else None
        if self._named is None:
            floats = {id(one) for _, one in call.tensors() if one.is_floating_point() and one.dim() in (2, 3)}
            may_fuse = len(floats) > 1
        else:
            may_fuse = path == self._named
        for one in self._running:
            one.runs_itself |= not path and not one.path
        if may_fuse:
            call = call.copied({where for where, _ in call.tensors()})
        self._running.append(SeenRun(module, path, outer, call, precision, may_fuse))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while self._running and (run := self._running.pop()):
            if run.outer is not None:
                run.outer.may_fuse |= run.may_fuse
            if run.may_fuse and not run.runs_itself:
                run.output = output
                self._seen.append(run)
            if run.module is module:
                return

    @property
    def runs_of_named(self) -> int:
        """How often the fusion that is named ran."""
        return sum(run.path == self._named for run in self._seen)

    def possible(
        self, attention: Sequence[AttentionPair], layers: Sequence[Layer]
    ) -> list[tuple[SeenRun, FusionInputs]] | None:
        """The runs that may be the fusion, nearest first; None if it did not run in this step.

        Raises
        ------
        AbsentArgumentError
            If an argument that is named is None in this step.
        DiscoveryError
            If an argument that is named is not there, or does not fit.
        """
        directions = attention[0].directions if attention else ()
        real = {str(one.direction.key): one.key_mask for one in directions if one.key_mask is not None}
        if self._named is not None and self._modalities is not None:
            runs = [run for run in self._seen if run.path == self._named]
            return [
                (run, named_fusion_inputs(run.module, run.path, self._modalities, run.call, real)) for run in runs[:1]
            ] or None
        if not attention:
            return None
        counts, samples = attention[0].forward.token_counts, len(attention[0].forward.weights)
        return [
            (run, fusion_inputs)
            for run in self._around_both(layers)
            if self._named in (None, run.path)
            for fusion_inputs in guessed_fusion_inputs(run.module, run.path, run.call, counts, samples, real)
        ]

    def _around_both(self, layers: Sequence[Layer]) -> list[SeenRun]:
        """The runs, once in a step, that hold all directions of the first layer, nearest first."""
        paths = [source.path for _, source in layers[0].sources]
        around = [
            run
            for run in self._seen
            if all(run.path in ("", path) or path.startswith(f"{run.path}.") for path in paths)
        ]
        once = [run for run in around if sum(other.module is run.module for other in around) == 1]
        return sorted(once, key=lambda run: -len(run.path.split(".")) if run.path else 0)

    def say_several(self, possible: Sequence[tuple[SeenRun, FusionInputs]]) -> str:
        """What could be meant, where processes hold the model together, so that one cannot try to replay it."""
        several = "; ".join(dict.fromkeys(str(run) for run, _ in possible))
        return (
            f"Several modules may be the fusion: {several}. The first is taken: while several processes hold the model "
            f"together it is not tried which can be replayed. {NAME_IT}"
        )

    def say_unclear(self, attention: Sequence[AttentionPair], layers: Sequence[Layer]) -> str:
        """Why nothing is taken, and what could be meant."""
        if self.runs_of_named > 1:
            return (
                f"The fusion '{self._named}' runs {self.runs_of_named} times in a step, so it is ambiguous what enters "
                "it. Name a module that runs once."
            )
        names = " and ".join(attention[0].forward.token_counts)
        found = "; ".join(map(str, self._around_both(layers)[:6]))
        return (
            f"Where {names} enter the fusion cannot be told, so there are no probes and no contributions. No module "
            "runs both directions once in a step with arguments that surely hold the tokens of one modality each. "
            f"Candidates: {found or 'none'}. {NAME_IT}"
        )
