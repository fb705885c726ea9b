"""One recorded pass through a model whose names tell nothing: which attention goes across, and what pairs up."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attention import Direction
from lightning_xattn.capture.axes import Tokens, token_inputs
from lightning_xattn.capture.computed import Computation, watch_computations
from lightning_xattn.capture.discovery import common_parent, describe_attention, layers_by_name, with_unique_names
from lightning_xattn.capture.memory import are_same
from lightning_xattn.capture.multihead import is_original, watch_multihead_attention
from lightning_xattn.capture.returned import NAME_IT, ModuleWatch, Seen, tensors_in
from lightning_xattn.capture.sites import LayerSites, Source
from lightning_xattn.capture.weights import RecordedWeights
from lightning_xattn.capture.wrappers import plain_path, runs_for_backward
from lightning_xattn.errors import DiscoveryError, ShapeError

NAME_THEM = "Name them: attention={'<a>_to_<b>': 'path.to.module', '<b>_to_<a>': ...}."


@dataclass(frozen=True, eq=False)
class Run:
    """One attention that was computed in the pass.

    Attributes
    ----------
    path
        The module that computed it: the innermost one that got tokens.
    turn
        How many times this module had attended before.
    weights
        What it computed; of what does not go across, the shape alone.
    given
        The tokens that ask and those that are looked at, where that is known.
    mixed
        Whether the module got tokens of two kinds.
    doubt
        Why it is not clear whether this is the module's attention.
    """

    path: str
    turn: int
    weights: RecordedWeights
    given: tuple[Tensor, Tensor] | None
    mixed: bool
    doubt: str | None = None

    @property
    def tokens(self) -> tuple[int, int]:
        """Number of queries and of keys that are tokens."""
        return self.weights.weights.shape[2], self.weights.weights.shape[3] - self.weights.extra_keys

    @property
    def may_cross(self) -> bool:
        """Whether it is not surely self-attention: keys may also be more than queries as some are kept, or pooled."""
        return self.mixed or self.tokens[0] != self.tokens[1]

    @property
    def sides(self) -> tuple[int, int] | None:
        """What tells the tokens that ask from those that are looked at: their number, or else where they stand."""
        if self.tokens[0] != self.tokens[1]:
            return self.tokens
        return None if self.given is None else (self.given[0].data_ptr(), self.given[1].data_ptr())

    def __str__(self) -> str:
        return f"{self.path} (run {self.turn + 1}): {self.tokens[0]} queries, {self.tokens[1]} keys"


@dataclass(frozen=True, eq=False)
class _Running:
    """A module that runs: what it got, and what it has computed."""

    watch: ModuleWatch
    name: str
    inputs: list[Tensor]
    seen: Seen = field(default_factory=Seen)


class Probe:
    """Watches all attention of a model during a pass, and tells which directions and layers it makes.

    Parameters
    ----------
    root
        The model.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._runs: list[Run] = []
        self._turns: dict[str, int] = defaultdict(int)
        self._unread: list[str] = []

    @property
    def has_run(self) -> bool:
        """Whether any attention was computed."""
        return bool(self._turns)

    def watch(self, hooks: ExitStack) -> None:
        """Watch every attention below the root; closing ``hooks`` ends it."""
        self._watch(self._root, "", hooks)

    def clear(self) -> None:
        """Forget what ran."""
        self._runs.clear()
        self._turns.clear()
        self._unread.clear()

    def _watch(self, module: nn.Module, path: str, hooks: ExitStack) -> None:
        if is_original(module, nn.MultiheadAttention):
            assert isinstance(module, nn.MultiheadAttention)
            watch_multihead_attention(module, self._note_multihead(path), hooks)
        elif is_original(module, nn.TransformerEncoderLayer) or isinstance(module, torch.jit.ScriptModule):
            return  # the one attends within one sequence, and hooks would turn its fast path off; the other takes none
        elif any(isinstance(inner, nn.MultiheadAttention) for inner in module.modules()):
            for name, child in module.named_children():
                if isinstance(module, nn.TransformerEncoderLayer) and name == "self_attn":
                    continue
                self._watch(child, f"{path}.{name}".lstrip("."), hooks)
        else:
            self._watch_computations(module, path, hooks)

    def _note_multihead(self, path: str) -> Callable[[Any, RecordedWeights], None]:
        def note(tokens: tuple[Tensor, Tensor], weights: RecordedWeights) -> None:
            query, key = tokens
            # Kept, so that no other tensor can take their place in memory during the pass.
            given = query.detach(), key.detach()
            self._add(Run(path, self._turn(path), weights, given, mixed=not weights.within))

        return note

    def _watch_computations(self, module: nn.Module, path: str, hooks: ExitStack) -> None:
        running: list[_Running] = []  # innermost last

        def enter(watch: ModuleWatch, name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                running.append(_Running(watch, name, [tensor for _, tensor in tensors_in((args, kwargs))]))

            return hook

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            left = running.pop()
            if left.seen.computed:
                self._add_all(left, output)
            elif any(Tokens.among(left.inputs, shape).are_asked_by(shape) for shape in left.seen.passed):
                self._unread.append(f"{left.name} {', '.join(map(str, left.seen.passed))}")

        def owner(shape: Sequence[int]) -> Seen:
            # A module that is a softmax and no more gets scores; what holds it got the tokens.
            return next((one for one in reversed(running) if token_inputs(one.inputs, shape)), running[-1]).seen

        def note(computation: Computation) -> None:
            owner(computation.weights.weights.shape).computed.append(computation)

        def pass_over(shape: tuple[int, ...]) -> None:
            owner(shape).passed.append(shape)

        watched = {
            f"{path}.{inner}".strip("."): child
            for inner, child in module.named_modules()
            if not isinstance(child, torch.jit.ScriptModule)
        }
        for name, child in watched.items():
            hooks.callback(
                child.register_forward_pre_hook(enter(ModuleWatch(child, name), name), with_kwargs=True).remove
            )
            hooks.callback(child.register_forward_hook(leave, always_call=True).remove)
        # Any of them may be the first to run: a step need not call the forward of what holds them.
        watch_computations(watched.values(), note, pass_over, hooks)

    def _add_all(self, left: _Running, output: Any) -> None:
        """Add what a module computed: its one attention, or all that it may be."""
        turn, doubt = self._turn(left.name), None
        found = [computation.weights for computation in left.seen.computed]
        try:
            found = list(left.watch.find(output, left.inputs, left.seen).values())
        except (DiscoveryError, ShapeError) as error:
            doubt = str(error).removesuffix(f". {NAME_IT}")
        for weights in found:
            mixed = Tokens.among(left.inputs, weights.weights.shape).kinds > 1
            self._add(Run(left.name, turn, weights, None, mixed, doubt))

    def _turn(self, path: str) -> int:
        """The number of a run that begins, or ends."""
        if not runs_for_backward():
            self._turns[path] += 1
        return self._turns[path] - 1

    def _add(self, run: Run) -> None:
        if runs_for_backward():
            return
        self._runs.append(run if run.may_cross else replace(run, weights=_shape_of(run.weights)))

    def conclude(self) -> tuple[tuple[LayerSites, ...], dict[str, list[RecordedWeights]], str]:
        """The layers that the pass has shown, what their modules computed, run after run, and what was left out.

        Raises
        ------
        DiscoveryError
            If nothing attends across, or it is not clear what pairs up or what the axes are; the message lists all that
            ran, with shapes.
        """
        layers = layers_by_name(self._root, dict.fromkeys(run.path for run in self._runs if run.may_cross))
        layers = layers or self._pair([run for run in self._runs if run.mixed])
        taken: dict[str, list[Run]] = {source.path: [] for layer in layers for _, source in layer.sites}
        left_out = []
        for run in self._runs:
            if run.path in taken:
                taken[run.path].append(run)
            elif run.may_cross:
                left_out.append(str(run))
        for runs in taken.values():
            doubt = next((run.doubt for run in runs if run.doubt is not None), None)
            if doubt is not None:
                raise DiscoveryError(self.say(doubt))
        calls = {path: [run.weights for run in runs] for path, runs in taken.items()}
        return tuple(layers), calls, "; ".join(left_out)

    def _pair(self, across: list[Run]) -> list[LayerSites]:
        """Pair runs of opposite directions, in the order in which they ran."""
        if not across:
            raise DiscoveryError(self.say("No cross-attention ran"))
        groups: dict[frozenset[int], list[Run]] = defaultdict(list)
        for run in across:
            if run.sides is not None:
                groups[frozenset(run.sides)].append(run)
        if not groups:
            raise DiscoveryError(self.say(f"Whether {across[0]} goes across cannot be seen"))
        equal = [group for group in groups.values() if group[0].tokens[0] == group[0].tokens[1]]
        if len(equal) > 1:
            raise DiscoveryError(self.say("Which tokens are of one modality cannot be seen"))
        letters = _name_sides(run for group in groups.values() for run in group)
        layers: list[LayerSites] = []
        for group in groups.values():
            there = [run for run in group if run.sides == group[0].sides]
            back = [run for run in group if run.sides != group[0].sides]
            if group in equal and not back:
                # Other tensors are not yet other modalities: queries and keys may be made of the same tokens.
                raise DiscoveryError(self.say(f"Whether {group[0]} goes across cannot be seen"))
            numbers = [re.findall(r"\d+", run.path) for run in there]
            told_apart = len(there) == len({tuple(number) for number in numbers})
            mispaired = any(
                _is_mirrored(run, other) and not _is_mirrored(run, opposite)
                for run, opposite in zip(there, back, strict=False)
                for other in back
            )
            if mispaired or not told_apart or (back and numbers != [re.findall(r"\d+", run.path) for run in back]):
                raise DiscoveryError(self.say("It is not clear which of these belong together"))
            queries, keys = there[0].tokens
            forward = Direction("a", "b") if queries == keys else Direction(letters[queries], letters[keys])
            for run, opposite in zip_longest(there, back):
                path = common_parent(run.path, (opposite or run).path)
                backward = None if opposite is None else (forward.opposite, self._source(opposite))
                layers.append(LayerSites(plain_path(self._root, path), (forward, self._source(run)), backward))
        return with_unique_names(layers)

    def _source(self, run: Run) -> Source:
        return Source(run.path, turn=run.turn, turns=self._turns[run.path])

    def say(self, what: str) -> str:
        """A message with all that ran, with shapes, and how to name the right ones."""
        ran = "; ".join(str(run) for run in self._runs)
        return (
            f"{what}. "
            + (f"Softmaxes that cannot be read: {'; '.join(self._unread)}. " if self._unread else "")
            + (f"What ran: {ran}. " if ran else f"No attention was seen at all. {describe_attention(self._root)} ")
            + f"{NAME_THEM} For modalities that share one sequence: attention=JointSequence('path.to.module', "
            "spans={'<a>': (start, stop), '<b>': (start, stop)})."
        )


def _is_mirrored(run: Run, other: Run) -> bool:
    """Whether the tokens that ask in one run are the very ones that are looked at in the other."""
    if run.given is None or other.given is None:
        return False
    return are_same(run.given[0], other.given[1]) and are_same(run.given[1], other.given[0])


def _name_sides(across: Iterable[Run]) -> dict[int, str]:
    """A letter for each number of tokens, in the order in which they ask."""
    counts = dict.fromkeys(count for run in across for count in run.tokens if run.sides == run.tokens)
    return {count: chr(ord("a") + i) for i, count in enumerate(counts)}


def _shape_of(weights: RecordedWeights) -> RecordedWeights:
    return RecordedWeights(weights.weights.new_empty(()).expand(weights.weights.shape), extra_keys=weights.extra_keys)
