"""The context manager that owns every hook on a model and holds the current batch's attention."""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attention import Attention, AttentionPair, Direction
from lightning_xattn.capture.discovery import describe_attention, locate_attention
from lightning_xattn.capture.joint import cut_direction
from lightning_xattn.capture.memory import Address
from lightning_xattn.capture.multihead import (
    is_original,
    is_original_encoder_layer,
    watch_encoder_layer,
    watch_multihead_attention,
)
from lightning_xattn.capture.probe import Probe
from lightning_xattn.capture.returned import Call, ModuleWatch, check_weights, from_returned
from lightning_xattn.capture.sites import AttentionSetting, LayerSites, Source
from lightning_xattn.capture.weights import RecordedWeights
from lightning_xattn.capture.wrappers import (
    compiled_modules,
    require_one_replica,
    run_uncompiled,
    runs_for_backward,
    scripted_modules,
)
from lightning_xattn.errors import DiscoveryError, ShapeError, XAttnWarning


class AttentionRecorder:
    """Record the cross-attention of a model while it runs; the model's outputs stay bit for bit the same.

    What is compiled by ``torch.compile`` runs as it is written while it is recorded, since hooks are not seen by code
    that has been compiled before: then the outputs are those of the model without compilation. A warning says so.

    Parameters
    ----------
    model
        Any module; nothing is hooked yet.
    attention
        Where the attention is: module paths by direction, seen from ``model``, a ``JointSequence``, or callables (see
        the README). None: found by name (see ``locate_attention``) or, where no name tells, in the first pass.

    Raises
    ------
    DiscoveryError, SettingError
        As ``locate_attention``.

    Examples
    --------
    >>> with AttentionRecorder(model) as recorder:
    ...     model(batch)
    >>> recorder.attention[0].forward.weights.shape  # (batch, heads, queries, keys)
    """

    def __init__(self, model: nn.Module, attention: AttentionSetting | None = None) -> None:
        self._model = model
        if isinstance(model, torch.jit.ScriptModule):
            raise DiscoveryError(
                f"{type(model).__name__} is TorchScript, and hooks cannot see into it. Record the module that was "
                "scripted, before torch.jit.script or torch.jit.trace."
            )
        self.layers: tuple[LayerSites, ...] = locate_attention(model, attention)
        """The layers that are recorded; empty until a first pass has shown them, where no name tells."""
        self.output: Any = None
        """What the model's own ``forward`` returned first since the last ``clear``; None if it did not run."""
        self._hooks, self._hooked = ExitStack(), False
        self._probe = Probe(model)
        self._watches: dict[str, ModuleWatch] = {}
        self._calls: dict[str, list[Call]] = defaultdict(list)
        # What has run in the recorder's life, and what its user has been told of.
        self._ran: set[str] = set()
        # What callables gave in this step, where the numbers are that each gave last, and whether their values have
        # been looked at, in training and in eval mode.
        self._given: dict[Source, RecordedWeights | None] = {}
        self._last: dict[Source, Address] = {}
        self._looked_at: set[tuple[Source, bool]] = set()
        self._told: set[str] = set()

    def __enter__(self) -> AttentionRecorder:
        self.close()
        self.clear()
        self._hook()
        return self

    def _hook(self) -> None:
        # Hooks set before a failure half way leave with this stack; only a complete set is kept.
        require_one_replica(self._model)
        with ExitStack() as hooks:
            self._run_uncompiled(hooks)
            if self.layers:
                for path in dict.fromkeys(source.path for _, source in self._sites() if source.read is None):
                    self._watch(path, hooks)
            else:
                self._probe.watch(hooks)
            hooks.callback(self._model.register_forward_hook(self._keep_output).remove)
            self._hooks = hooks.pop_all()
            self._hooked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook. What was recorded stays until ``clear``; closing twice is harmless."""
        self._hooks.close()
        self._hooked = False

    def clear(self) -> None:
        """Forget what was recorded."""
        self._calls.clear()
        self._probe.clear()
        self._given.clear()
        self.output = None

    @property
    def attention(self) -> tuple[AttentionPair, ...]:
        """What was recorded since the last ``clear``, one pair a layer.

        A layer that did not run, or of which one direction did not, is left out, if it has run before. Of a module
        that ran more often than it should, as with test-time augmentation, it is the first run, and a warning says so.

        Raises
        ------
        DiscoveryError
            If nothing has run yet, or what ran does not show which attention is meant.
        ShapeError
            If the two directions of a layer do not fit each other, or what was read is no attention.
        """
        if not self.layers and self._probe.has_run:
            self._take_from_probe()
        pairs = []
        for layer in self.layers:
            calls = {direction: self._call(direction, source) for direction, source in layer.sites}
            recorded = [call for call in calls.values() if call is not None]
            if len(recorded) == len(calls):
                pairs.append(_pair(layer, recorded))
            elif recorded:
                self._tell_half(layer, next(direction for direction, call in calls.items() if call is None))
        if not pairs and not self._ran:
            raise DiscoveryError(self._nothing_ran())
        return tuple(pairs)

    def _sites(self) -> Iterator[tuple[Direction, Source]]:
        for layer in self.layers:
            yield from layer.sites

    def _watch(self, path: str, hooks: ExitStack) -> None:
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            raise DiscoveryError(
                f"Module '{path}' is no longer in the model. {describe_attention(self._model)} Make a new "
                "AttentionRecorder or callback after changing the model."
            ) from None
        if is_original(module, nn.TransformerEncoderLayer):
            assert isinstance(module, nn.TransformerEncoderLayer)
            if not is_original_encoder_layer(module):
                raise DiscoveryError(
                    f"'{path}' is an nn.TransformerEncoderLayer with a self-attention of its own, which torch runs in "
                    "some steps and not in others (its fast path). Give a callable that returns the weights: "
                    "attention={'<a>_to_<b>': lambda model: weights}."
                )
            watch_encoder_layer(module, lambda weights: self._record(path, {None: weights}), hooks)
        elif is_original(module, nn.MultiheadAttention):
            assert isinstance(module, nn.MultiheadAttention)
            watch_multihead_attention(module, lambda _, weights: self._record(path, {None: weights}), hooks)
        else:
            if path not in self._watches or self._watches[path].module is not module:
                sites = [(direction, source) for direction, source in self._sites() if source.path == path]
                self._watches[path] = ModuleWatch(module, path, sites, self._around(path))
            self._watches[path].watch(partial(self._record, path), hooks)

    def _around(self, path: str) -> nn.Module | None:
        holder = self._model.get_submodule(path.rpartition(".")[0])
        # A hook on an encoder layer would turn its fast path off.
        return None if not path or isinstance(holder, nn.TransformerEncoderLayer) else holder

    def _run_uncompiled(self, hooks: ExitStack) -> None:
        # Without it nothing is compiled. Of functions it cannot be told whether they are, and it takes long to import.
        if "torch._dynamo" in sys.modules:
            hooks.enter_context(run_uncompiled())
        compiled = compiled_modules(self._model)
        if compiled:
            self._tell(
                f"{', '.join(compiled)} is compiled, where attention cannot be seen: it runs without compilation while "
                "it is recorded, so its outputs may differ in the last bits and take longer. Record fewer epochs or "
                "batches (every_n_epochs, every_n_batches) if that is too slow."
            )

    def _record(self, path: str, call: Call) -> None:
        if not runs_for_backward():
            self._calls[path].append(call)
            self._ran.add(path)

    def _keep_output(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.output is None:
            self.output = output

    def _take_from_probe(self) -> None:
        self.layers, runs, left_out = self._probe.conclude()
        self._probe.clear()
        for path, weights in runs.items():
            self._calls[path] = [{None: of_run} for of_run in weights]
            self._ran.add(path)
        if self._hooked:  # from now on only what goes across
            self._hooks.close()
            self._hook()
        found: dict[str, Any] = defaultdict(list)
        for direction, source in self._sites():
            found[str(direction)].append(str(source))
        found = {direction: paths if len(paths) > 1 else paths[0] for direction, paths in found.items()}
        self._tell(
            f"Found in the first pass: {found}, from their names or from which tokens ask which. If that is not "
            "what you mean, or these are not the names of your modalities, name them: attention={'<a>_to_<b>': "
            "'path.to.module', ...}."
            + (f" Left out, as no name tells their direction: {left_out}." if left_out else "")
        )

    def _call(self, direction: Direction, source: Source) -> RecordedWeights | None:
        """What a direction's source computed since the last ``clear``; None if it did not run."""
        call = self._read(source) if source.read is not None else self._pick(direction, source)
        if call is None:
            return None
        if call.one_head:
            self._tell(
                f"'{source}' has no axis for heads: it is taken as one head, and its first axis as samples. An average "
                "over heads has a larger entropy than the heads; record the heads if you can."
            )
        if source.block is not None:
            return self._cut(call, source, source.block)
        if call.within:
            raise DiscoveryError(
                f"'{source}' ({direction}) attends within one sequence: its query is its key. Name the module that "
                "attends across: attention={'<a>_to_<b>': 'path', ...}; or, if both modalities share the sequence, "
                "attention=JointSequence('path', spans={'<a>': (start, stop), '<b>': (start, stop)})."
            )
        return call

    def _cut(self, call: RecordedWeights, source: Source, block: tuple[slice, slice]) -> RecordedWeights | None:
        """A direction of a joint sequence; None of one that is too short, if an earlier one was not."""
        try:
            cut = cut_direction(call, *block, name=source.path)
        except ShapeError as error:
            if f"{source.path} cut" not in self._ran:
                raise
            self._tell(f"{error} Such steps are left out.", about=f"{source.path} cut")
            return None
        self._ran.add(f"{source.path} cut")
        return cut

    def _read(self, source: Source) -> RecordedWeights | None:
        """What a callable gives in this step; the very numbers of an earlier step are none of this one."""
        assert source.read is not None
        if source not in self._given:
            weights = source.read(self._model)
            training = self._model.training
            if weights is not None and (source, training) not in self._looked_at:
                check_weights(weights, f"The {source} gives", training)
                self._looked_at.add((source, training))
            if weights is not None and source in self._last and self._last[source].holds(weights):
                self._tell(
                    f"The {source} gave the same tensor as in an earlier step: such steps are left out. If the model "
                    "fills it anew in each step, give a clone of it."
                )
                weights = None
            if weights is not None:
                self._last[source] = Address.of(weights)
                self._ran.add(str(source))
            self._given[source] = None if weights is None else from_returned(weights)
        return self._given[source]

    def _pick(self, direction: Direction, source: Source) -> RecordedWeights | None:
        calls = self._calls.get(source.path, [])
        named = [call[direction] for call in calls if direction in call]
        turns = 1 if named else source.turns
        found = named or [call[None] for call in calls if None in call]
        if not found:
            return None
        if len(found) > turns:
            self._tell(f"Module '{source.path}' ran more often in one step than it is named; its first run is shown.")
        if len(found) < turns:
            message = f"Module '{source.path}' is named for {turns} directions, but ran {len(found)} time(s)"
            if f"{source.path} in turns" not in self._ran:
                raise DiscoveryError(
                    f"{message} and returned no mapping with their names. Name an item of what it returns for each, as "
                    f"in '{source.path}[1]', or the modules inside of it."
                )
            self._tell(f"{message} in a step: such steps are left out.")
            return None
        if turns > 1:
            self._ran.add(f"{source.path} in turns")
        return found[0] if named else found[source.turn]

    def _tell_half(self, layer: LayerSites, missing: Direction) -> None:
        source = dict(layer.sites)[missing]
        message = f"'{source}' ({missing} of layer '{layer.layer}') did not run, but its opposite direction did."
        if (source.path or str(source)) not in self._ran:
            raise DiscoveryError(f"{message} Name the modules to record: attention={{'<a>_to_<b>': 'path', ...}}.")
        self._tell(f"{message} The layer is left out of such steps.")

    def _nothing_ran(self) -> str:
        if not self.layers:
            return self._probe.say("No cross-attention ran")
        script = list(scripted_modules(self._model))
        return (
            f"None of {', '.join(dict.fromkeys(str(source) for _, source in self._sites()))} ran, so there is no "
            "attention to show. If the model computes it elsewhere, name that module: attention={'<a>_to_<b>': 'path', "
            "...}. If they run inside of a function that torch.compile made, call that function uncompiled"
            + (f"; TorchScript hides what is in {', '.join(script)}." if script else ".")
        )

    def _tell(self, message: str, about: str | None = None) -> None:
        """Say something once, or one thing about something."""
        if (about or message) not in self._told:
            self._told.add(about or message)
            warnings.warn(message, XAttnWarning, stacklevel=4)


def _pair(layer: LayerSites, recorded: list[RecordedWeights]) -> AttentionPair:
    """A token that is padding as a key of one direction is padding as a query of the other."""
    # Without an opposite direction nothing says which queries are padding.
    opposites = recorded[::-1] if len(recorded) == 2 else [None]
    attentions = [
        Attention(
            direction,
            call.weights,
            key_mask=call.key_mask,
            visible=call.visible,
            query_mask=_fitting_mask(call, opposite),
            extra_keys=call.extra_keys,
            crossing=call.crossing,
        )
        for (direction, _), call, opposite in zip(layer.sites, recorded, opposites, strict=True)
    ]
    return AttentionPair(layer.layer, *attentions)


def _fitting_mask(call: RecordedWeights, opposite: RecordedWeights | None) -> Tensor | None:
    mask = None if opposite is None else opposite.token_mask
    # Directions that do not fit each other at all are refused as a pair, with both shapes.
    return mask if mask is not None and mask.shape[1] == call.weights.shape[2] else None
