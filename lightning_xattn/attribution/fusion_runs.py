"""The runs of modules in a step that may be the fusion, and of those around them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_xattn.attribution.inputs import FusionInputs, ModalitiesSetting, find_named_inputs, guess_inputs
from lightning_xattn.capture import Layer
from lightning_xattn.capture.calls import Call, Path, Precision, name_argument
from lightning_xattn.capture.wrappers import Hook, in_encoder_layers
from lightning_xattn.core.attention import AttentionPair

NAME_IT = "Name it: fusion='path.to.module', modalities={'<a>': 0, '<b>': 1} (positions or names of its arguments)."
"""The remedy where the fusion is not clear."""


@dataclass(eq=False)
class ModuleRun:
    """A run of a module in a step."""

    module: nn.Module
    path: str
    outer: ModuleRun | None
    """The run that it is part of."""
    call: Call
    precision: Precision
    may_fuse: bool
    """Whether its arguments may be those of a fusion, or it holds such a run."""
    output: Any = None
    runs_itself: bool = False
    """Whether the whole model runs in this run of the whole model: then this is a step, which Lightning runs as the
    ``forward`` of a model that it wraps, as under DDP."""

    def __str__(self) -> str:
        held = (f"{name_argument(self.module, where)} {tuple(one.shape)}" for where, one in self.call.tensors())
        return f"'{self.path}' ({', '.join(held)})"


class FusionRuns:
    """Records the runs of every module that may be the fusion, or from the first step on of the two that are needed.

    Parameters
    ----------
    model
        The model.
    named
        The fusion's full path; None: to be found.
    modalities
        Which of its arguments hold which modality; None: by names and numbers of tokens.
    """

    def __init__(self, model: nn.Module, named: str | None, modalities: ModalitiesSetting | None) -> None:
        self._model, self._named, self._modalities = model, named, modalities
        # The modules to look at by their paths, and what to copy of the fusion's call; None: everything.
        self._hooked: dict[str, nn.Module] | None = None
        self._copied: set[Path] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the step."""
        self._running: list[ModuleRun] = []
        self._ended: list[ModuleRun] = []

    def narrow(self, fusion: ModuleRun, paths: set[Path], around: nn.Module | None) -> None:
        """Look at nothing but the fusion, of whose call only these tensors are copied, and a module around it."""
        chosen = (fusion.module, around)
        self._hooked = {path: module for path, module in self._model.named_modules() if module in chosen}
        self._named, self._copied = fusion.path, paths

    def attach(self, hooks: ExitStack, errors: list[Exception]) -> None:
        """Record runs until ``hooks`` closes; ``errors`` gets what goes wrong."""
        if self._hooked is None:
            unhookable = in_encoder_layers(self._model)
            hooked = {path: one for path, one in self._model.named_modules() if one not in unhookable}
        else:
            hooked = self._hooked
        for path, module in hooked.items():
            if not isinstance(module, torch.jit.ScriptModule):
                enter, leave = Hook(partial(self._enter, path), errors), Hook(self._leave, errors)
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call, outer = Call(args, kwargs), self._running[-1] if self._running else None
        if self._named is None:
            floats = {id(one) for _, one in call.tensors() if one.is_floating_point() and one.dim() in (2, 3)}
            may_fuse = len(floats) > 1
        else:
            may_fuse = path == self._named
        for one in self._running:
            one.runs_itself |= not path and not one.path
        precision = Precision.of(call)
        if may_fuse:  # a module may change its arguments in place
            paths = {where for where, _ in call.tensors()} if self._copied is None else self._copied
            with suppress(KeyError, IndexError, TypeError, AttributeError):  # of a later step with other arguments
                call = call.copied(paths)
        self._running.append(ModuleRun(module, path, outer, call, precision, may_fuse))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while self._running and (run := self._running.pop()):
            if run.outer is not None:
                run.outer.may_fuse |= run.may_fuse
            if run.may_fuse and not run.runs_itself:
                run.output = output
                self._ended.append(run)
            if run.module is module:
                return

    def find_runs(self, module: nn.Module | None) -> list[ModuleRun]:
        """The runs of a module in this step, those of a module around the fusion only where the fusion ran in them."""
        return [run for run in self._ended if run.module is module]

    @property
    def runs_of_named(self) -> int:
        """How often the fusion that is named ran."""
        return sum(run.path == self._named for run in self._ended)

    def find_candidates(
        self, attention: Sequence[AttentionPair], layers: Sequence[Layer]
    ) -> list[tuple[ModuleRun, FusionInputs]] | None:
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
            runs = [run for run in self._ended if run.path == self._named]
            return [
                (run, find_named_inputs(run.module, run.path, self._modalities, run.call, real)) for run in runs[:1]
            ] or None
        if not attention:
            return None
        counts, samples = attention[0].forward.token_counts, len(attention[0].forward.weights)
        return [
            (run, fusion_inputs)
            for run in self._around_both(layers)
            if self._named in (None, run.path)
            for fusion_inputs in guess_inputs(run.module, run.path, run.call, counts, samples, real)
        ]

    def _around_both(self, layers: Sequence[Layer]) -> list[ModuleRun]:
        """The runs, once in a step, that hold all directions of the first layer, nearest first."""
        paths = [source.path for _, source in layers[0].sources]
        around = [
            run
            for run in self._ended
            if all(run.path in ("", path) or path.startswith(f"{run.path}.") for path in paths)
        ]
        once = [run for run in around if sum(other.module is run.module for other in around) == 1]
        return sorted(once, key=lambda run: -len(run.path.split(".")) if run.path else 0)

    def describe_several(self, candidates: Sequence[tuple[ModuleRun, FusionInputs]]) -> str:
        """The message that the nearest of several candidates is chosen, as none of them can be replayed."""
        several = "; ".join(dict.fromkeys(str(run) for run, _ in candidates))
        return (
            f"Several modules may be the fusion: {several}. The first is chosen, as processes that hold the model "
            f"together cannot try which of them can be replayed. {NAME_IT}"
        )

    def describe_unclear(self, attention: Sequence[AttentionPair], layers: Sequence[Layer]) -> str:
        """The message that no fusion is clear, with the candidates."""
        if self.runs_of_named > 1:
            return (
                f"The fusion '{self._named}' runs {self.runs_of_named} times in a step, so it is ambiguous what enters "
                "it. Name a module that runs once."
            )
        names = " and ".join(attention[0].forward.token_counts)
        found = "; ".join(map(str, self._around_both(layers)[:6]))
        return (
            f"Probes and contributions are not computed: no module was found where {names} enter the fusion, that is, "
            "one that runs both directions once in a step with arguments that surely hold the tokens of one modality "
            f"each. Candidates: {found or 'none'}. {NAME_IT}"
        )
