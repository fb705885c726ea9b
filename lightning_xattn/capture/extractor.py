"""The attention of one direction, extracted from its source in each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.capture.calls import Path, Run
from lightning_xattn.capture.joint import JointSequence, cut_direction
from lightning_xattn.capture.masks import RecordedWeights, intersect_masks
from lightning_xattn.capture.readers import Event
from lightning_xattn.capture.returned import (
    NAME_IT,
    check_weights,
    combine_masks,
    describe_one_head,
    find_whether_zeros_hide,
    hold_same_weights,
    looks_like_attention,
)
from lightning_xattn.capture.sources import Source
from lightning_xattn.capture.tensors import Address, is_plain
from lightning_xattn.capture.tokens import (
    Axes,
    Tokens,
    describe_event,
    find_axes,
    find_candidates,
    find_readable_tensors,
    named_arguments,
)
from lightning_xattn.core.attention import Direction
from lightning_xattn.core.errors import DiscoveryError, SettingError, ShapeError

FOLLOW_IT = "give spans that count from the end, such as (-144, None), or a callable that makes them of the batch"
"""What to do where a modality of a joint sequence has as many tokens as each batch has."""


class AttentionExtractor:
    """Extracts the attention of a direction from the runs of its module, or from what a callable returns.

    Where an item was named, or the module returns a mapping with the direction's name, that is read; where a number was
    named, the attention with that number among those that are computed in the step. Else it is the one attention that
    is computed in a run, or else the one tensor that the module returns whose rows sum to 1. A first run in which that
    is ambiguous is an error; a later one gives no attention.

    ``siblings`` are all directions that are extracted from the module; one that is ``alone`` has no opposite direction
    whose key mask would mask its queries.
    """

    def __init__(
        self, direction: Direction | None, source: Source, siblings: Sequence[Direction] = (), alone: bool = False
    ) -> None:
        self.direction, self.source, self.is_alone = direction, source, alone
        self._siblings = {str(sibling) for sibling in siblings}
        self.has_run = False
        # New messages to the user.
        self.remarks: list[str] = []
        # The self-attention whose masks say which queries are padding: its module's path, and its number in a step.
        self.padding: tuple[str, int] | None = None
        # How rows are split into samples and heads, by what was read.
        self.axes: dict[Path | str, Axes] = {}
        # What a first step has kept, before it was known that it is meant.
        self.kept: RecordedWeights | None = None
        # How many samples were left out of this step, as their joint sequence does not fit its spans.
        self.left_out = 0
        # Of this step: what the runs gave, and how many attentions they computed.
        self._found: list[RecordedWeights] = []
        self._count = self._runs = 0
        # What has been checked, in training and in eval mode, and whether its zeros were found to be a mask.
        self._checked: set[tuple[Path | str, bool]] = set()
        self._zeros_hide = False
        # Where it was found: under the direction's name or elsewhere in what is returned, or which of those that are
        # computed, by these functions.
        self._named: Path = ()
        self._place: Path | None = None
        self._chosen: tuple[int, list[str]] | None = None
        # The argument that is the mask of the queries; of a joint sequence its first length; of a callable where the
        # numbers are that it gave last.
        self._mask_name: str | None = None
        self._length: int | None = None
        self._has_given = False
        self._last: Address | None = None

    def clear(self) -> None:
        """Begin a new step."""
        self._found, self._count, self._runs, self.kept, self.left_out = [], 0, 0, None, 0

    def may_extract(self, number: int) -> bool:
        """Whether the attention with this number, from 1 on, of those of a run that has begun may be extracted."""
        return self.source.call is None or self.source.call == self._count + number

    def extract(self, run: Run, output: Any) -> None:
        """Take the attention out of a run that ends.

        Raises
        ------
        DiscoveryError, ShapeError
            If it is not clear in a first run what is meant, or what is read is no attention.
        """
        found = None
        try:
            found = self.find_weights(run, output)
        except (DiscoveryError, ShapeError) as error:
            if not self.has_run:
                raise
            self._note_left_out(error)
        self._count += len(run.events)
        self._runs += 1
        if found is not None:
            self.has_run = True
            self._found.append(replace(found, query_mask=self._find_query_mask(run, found)) if self.is_alone else found)

    def _note_left_out(self, why: object) -> None:
        self.remarks.append(f"In a later step: {why} Such steps are left out.")

    def find_weights(self, run: Run, output: Any) -> RecordedWeights | None:
        """The attention of a run; None if it has none. It raises what ``take`` does, also of a later run."""
        if self.source.call is not None:
            place = self.source.call - 1 - self._count
            return self._extract_computed(run, place) if 0 <= place < len(run.events) else None
        tensors = find_readable_tensors(output)
        if not self.source.item and not self._named:
            under = [item for item in tensors if item and item[-1] == str(self.direction)]
            called = [item for item in tensors if item and isinstance(item[-1], str) and "_to_" in item[-1]]
            others = [item for item in called if not self.has_run and looks_like_attention(tensors[item])]
            if others and not under and {str(item[-1]) for item in others} <= self._siblings:
                return None
            if len(under) > 1 or (others and not under):
                raise DiscoveryError(self._describe_ambiguity(run, tensors))
            self._named = under[0] if under else ()
        item = self.source.item or self._named
        return self._extract_returned(item, output, run) if item else self._find_only(run, output, tensors)

    def _find_only(self, run: Run, output: Any, tensors: Mapping[Path, Tensor]) -> RecordedWeights | None:
        """The one attention that a run has; None if there is none, but was before."""
        kinds = [event.by for event in run.events]
        if self._chosen is not None and self._chosen[1] == kinds:
            return self._extract_computed(run, self._chosen[0])
        candidates = find_candidates(run, across=self.source.joint is None)
        given = {item: event for item, tensor in tensors.items() for event in run.events if event.gave(tensor)}
        chosen = candidates if len(candidates) == 1 else list(dict.fromkeys(given.values()))
        if len(chosen) == 1:
            (one,) = chosen
            if one not in given.values() or one.by != "softmax":
                place = run.events.index(one)
                found = self._extract_computed(run, place, beside=tensors)
                self._chosen = place, kinds
                return found
            self._place = next(item for item, event in given.items() if event is one)
        if self._place is None:
            fitting = [item for item, tensor in tensors.items() if looks_like_attention(tensor)]
            if self.has_run and not candidates and not fitting:
                return None
            if candidates or len(fitting) != 1:
                raise DiscoveryError(self._describe_ambiguity(run, tensors))
            self._place = fitting[0]
        return self._extract_returned(self._place, output, run)

    def _extract_computed(self, run: Run, place: int, beside: Mapping[Path, Tensor] | None = None) -> RecordedWeights:
        """One of the attentions of a run; ``beside``: what the module returns, where no name chose this attention."""
        event, training = run.events[place], run.module.training
        what, recorded, used = name_event(event, place), event.recorded, event.used
        first = (what, training) not in self._checked
        as_given = event.result is not None and used is not None and event.result.holds_unchanged(used)
        if recorded is not None and used is not None and not training and not as_given:
            recorded = self._hide_unused_rows(recorded, used, run, first)
        recorded = self.unfold(recorded, event, run)
        if recorded is None:
            raise _unreadable(event, run)
        if first and beside is not None:
            tokens = Tokens.of(run, event.shape)
            for tensor in beside.values():
                # What stands beside a kernel, which surely is attention, may be class probabilities.
                may_be_meant = event.by == "softmax" or tokens.are_asked_by(tensor.shape)
                if may_be_meant and looks_like_attention(tensor) and not hold_same_weights(tensor, recorded.weights):
                    raise DiscoveryError(self._describe_ambiguity(run, beside))
        if first and recorded.one_head:
            self.remarks.append(describe_one_head(run.path))
        self._checked.add((what, training))
        return replace(recorded, within=event.within)

    def _extract_returned(self, item: Path, output: Any, run: Run) -> RecordedWeights | None:
        """What stands at a place in what is returned; None if there is nothing, but was before."""
        name = str(Source(run.path, item=item))
        weights = output
        try:
            for key in item:
                # An item of a tensor would be a sample.
                weights = None if isinstance(weights, Tensor) else weights[key]
        except (KeyError, IndexError, TypeError):
            weights = None
        if not isinstance(weights, Tensor):
            if any(item == before for before, _ in self._checked):
                return None
            there = describe_returned(run.path, find_readable_tensors(output))
            raise DiscoveryError(f"No tensor '{name}': the module returned {there}. {NAME_IT}")
        event = next((event for event in run.events if event.gave(weights)), None) or run.origin(weights)
        return self._check_given(item, weights, name, run.module.training, run, event)

    def _check_given(
        self, what: Path | str, weights: Any, name: str, training: bool, run: Run | None, event: Event | None
    ) -> RecordedWeights:
        """Weights that a module returned in a run, or a callable gave, with the masks of the event that made them."""
        who = f"The {name} gives" if run is None else f"Module '{name}' returns"
        first = (what, training) not in self._checked
        if first or not isinstance(weights, Tensor):
            check_weights(weights, who, training)
        shape = tuple(weights.shape)
        whole = event if event is not None and event.shape == shape else None
        axes = Axes() if run is None else self._axes_for(what, shape, run, whole)
        # Copied, as the caller may change in place what it gets.
        recorded = axes.apply(RecordedWeights(weights.detach().clone()))
        masks = None if run is None or event not in run.events else self._find_masks(recorded, event, run)
        self._checked.add((what, training))
        if first:
            average = masks is None and bool((weights != 0).all())
            self.remarks += [describe_one_head(name, average)] if recorded.one_head else []
            self._zeros_hide = masks is None and find_whether_zeros_hide(recorded.weights, who, self.remarks.append)
        return combine_masks(recorded, masks, self._zeros_hide)

    def call_reader(self, model: nn.Module) -> None:
        """Take what the callable gives in this step; the very numbers of an earlier step are none of this one.

        Raises
        ------
        ShapeError
            If it is no attention in a first step; a later one of which it is none is left out.
        """
        if self._runs or self.source.read is None:
            return
        self._runs, weights = 1, self.source.read(model)
        if weights is not None and self._last is not None and self._last.holds(weights):
            self.remarks.append(
                f"The {self.source} gave the same tensor as in an earlier step: such steps are left out. If the model "
                "fills it anew in each step, give a clone of it."
            )
        elif weights is not None:
            name = str(self.source)
            try:
                self._found.append(self._check_given(name, weights, name, model.training, None, None))
            except ShapeError as error:
                if not self.has_run:
                    raise
                self._note_left_out(error)
                return
            self._last, self.has_run = Address.of(weights), True

    def collect(self, batch: Any) -> RecordedWeights | None:
        """The attention of this step; None if this step has none, but an earlier one had. Spans may need the batch.

        Raises
        ------
        DiscoveryError, ShapeError
            If it is no attention across, or not as often as is named, or does not fit its spans.
        """
        source, found = self.source, self._found
        if self.kept is not None:
            return self.kept
        if source.call is not None and self._runs and not found and not self.has_run:
            raise DiscoveryError(
                f"No '{source}': '{source.path}' computes {self._count} attention(s) in a step. {NAME_IT}"
            )
        if not found:
            return None
        turns = 1 if self._named else source.turns
        if len(found) > turns:
            self.remarks.append(
                f"Module '{source.path}' ran more often in one step than it is named; its first run is shown."
            )
        if len(found) < turns:
            message = f"Module '{source.path}' is named for {turns} directions, but ran {len(found)} time(s)"
            if not self._has_given:
                raise DiscoveryError(
                    f"{message} and returned no mapping with their names. Name an item of what it returns for each, as "
                    f"in '{source.path}[1]', or the modules inside of it."
                )
            self.remarks.append(f"{message} in a step: such steps are left out.")
            return None
        chosen = found[source.turn if turns > 1 else 0]
        if source.joint is not None:
            return self._cut(chosen, batch)
        if chosen.within:
            message = f"'{source}' ({self.direction}) attends within one sequence: its query is its key."
            if self._has_given:
                self._note_left_out(message)
                return None
            raise DiscoveryError(
                f"{message} Name the module that attends across: attention={{'<a>_to_<b>': 'path', ...}}; or, if both "
                "modalities share the sequence, attention=JointSequence('path', spans={'<a>': (start, stop), '<b>': "
                "(start, stop)})."
            )
        self._has_given = True
        return chosen

    def _cut(self, whole: RecordedWeights, batch: Any) -> RecordedWeights | None:
        """The direction within a joint sequence; None of one that does not fit its spans, if an earlier one did."""
        joint, length = self.source.joint, whole.weights.shape[2]
        assert joint is not None
        try:
            cut = self._block(joint, whole, joint.slices(batch))
        except (DiscoveryError, SettingError, ShapeError) as error:
            if not self._has_given:
                raise
            self.left_out = len(whole.weights)
            self.remarks.append(f"{error} Such steps are left out and counted.")
            return None
        changed = joint.expected_length is None and length != (self._length or length) and not whole.cropped
        if changed and not joint.counts_from_the_end and not any(map(callable, joint.spans.values())):
            self.remarks.append(
                f"The sequence of '{self.source.path}' changes its length ({self._length}, {length}), and the last "
                f"modality is assumed to have more or fewer tokens. If another one has, {FOLLOW_IT}. The spans are "
                f"{dict(joint.spans)}."
            )
        if not self._has_given:
            self._length, self._has_given = length, True
        return cut

    def _block(self, joint: JointSequence, whole: RecordedWeights, places: Mapping[str, slice]) -> RecordedWeights:
        """The direction within a joint sequence that its spans fit."""
        name, length, expected = self.source.path, whole.weights.shape[2], joint.expected_length
        assert self.direction is not None
        if whole.cropped and joint.counts_from_the_end:
            raise DiscoveryError(
                f"torch has packed the sequence of '{name}' and cut padding off, so that its end is not known: use "
                "spans that count from the start, or nn.TransformerEncoder(..., enable_nested_tensor=False)."
            )
        within = whole.weights.shape[3] - whole.extra_keys == length
        # How much torch has cut off of a packed sequence is not known.
        fits = expected is None or length == expected or (whole.cropped and length < expected)
        if within and not fits:
            hint = f" If the tokens in no span belong to no modality, say so: JointSequence(..., length={length})."
            may_be_meant = joint.length is None and length > (expected or 0) and not self._has_given
            raise ShapeError(
                f"The sequence of '{name}' has {length} tokens, but the spans of the JointSequence are for {expected}: "
                f"{dict(joint.spans)}. If a modality changes its length, {FOLLOW_IT}." + hint * may_be_meant
            )
        return cut_direction(whole, places[self.direction.query], places[self.direction.key], name)

    def _axes_for(self, what: Path | str, shape: tuple[int, ...], run: Run, event: Event | None) -> Axes:
        """How the rows of an attention are split into samples and heads, as a first run has shown."""
        if what not in self.axes:
            axes = find_axes(shape, run, event)
            if isinstance(axes, str):
                raise (DiscoveryError if self.has_run else ShapeError)(
                    f"The attention of '{run.path}', {shape}, is in doubt: {axes}. Expected (batch, heads, queries, "
                    f"keys). {NAME_IT}"
                )
            self.axes[what] = axes
        heads = self.axes[what].heads
        if len(shape) == 3 and heads is not None and shape[0] % heads:
            raise DiscoveryError(f"The attention of '{run.path}' had {heads} heads among its rows; now it has {shape}.")
        return self.axes[what]

    def unfold(self, recorded: RecordedWeights | None, event: Event, run: Run) -> RecordedWeights | None:
        """What was recorded of an attention, if anything was, as ``(batch, heads, queries, keys)``.

        Raises
        ------
        DiscoveryError, ShapeError
            If it cannot be read, or its axes are in doubt.
        """
        if event.problem is not None:
            raise _unreadable(event, run)
        if event.tokens is not None:
            return recorded
        axes = self._axes_for(name_event(event, run.events.index(event)), event.shape, run, event)
        return None if recorded is None else axes.apply(recorded)

    def _find_masks(self, recorded: RecordedWeights, event: Event, run: Run) -> RecordedWeights | None:
        """What the softmax gave that weights, or their average over heads, were made of; None if that is not clear."""
        try:
            made_of = self.unfold(event.recorded, event, run)
        except (DiscoveryError, ShapeError):
            made_of = None
        if made_of is None:
            return None
        shape, heads = recorded.weights.shape, made_of.weights.shape[1]
        if shape[1] == 1 < heads and made_of.weights.shape == (shape[0], heads, *shape[2:]):
            visible = None if made_of.visible is None else made_of.visible.any(1, keepdim=True)
            return replace(made_of, weights=made_of.weights.mean(1, keepdim=True), visible=visible)
        return made_of if made_of.weights.shape == shape else None

    def _find_query_mask(self, run: Run, recorded: RecordedWeights) -> Tensor | None:
        """A mask among a module's arguments that can only be that of the queries, as there are not as many keys.

        Named ``...padding_mask`` it is True for padding, as in torch; of whole numbers it is 1 for a real token, as in
        Hugging Face's models. What other masks mean is not known.
        """
        batch, _, queries, keys = recorded.weights.shape
        for name, tensor in named_arguments(run) if queries != keys or self._mask_name else ():
            fits = tuple(tensor.shape) == (batch, queries) and is_plain(tensor)
            if fits and "mask" in name and self._mask_name in (None, name):
                by_torch = tensor.dtype == torch.bool and name.endswith("padding_mask")
                if by_torch or not (tensor.is_floating_point() or tensor.dtype == torch.bool):
                    self._mask_name = name
                    return ~tensor if by_torch else tensor.bool()
        return None

    def _hide_unused_rows(self, recorded: RecordedWeights, used: Tensor, run: Run, first: bool) -> RecordedWeights:
        """What was computed, without the rows that the module sets to 0 before it uses them."""
        used = used.detach().float()
        unused = (used == 0).all(-1, keepdim=True) & (recorded.weights != 0).any(-1, keepdim=True)
        if first:
            shares = used / used.sum(-1, keepdim=True)
            kept = torch.isclose(shares, recorded.weights.float(), rtol=1e-2, atol=1e-3)
            if bool((~kept & ~unused & ~recorded.weights.isnan()).any()):
                self.remarks.append(
                    f"'{run.path}' changes its weights between the softmax and their use: what the softmax gave is "
                    "recorded. If that is not what you mean, return what is used and name it: 'path[item]'."
                )
            elif bool(unused.any()):
                self.remarks.append(
                    f"'{run.path}' sets whole rows of its weights to 0 after the softmax: such queries are left out."
                )
        shown = ~unused.expand(recorded.weights.shape)
        return replace(recorded, visible=intersect_masks(shown, recorded.visible))

    def _describe_ambiguity(self, run: Run, tensors: Mapping[Path, Tensor]) -> str:
        candidates = find_candidates(run, across=False)
        computed = [
            f"'{run.path}#{i}' {describe_event(event, run)}"
            for i, event in enumerate(run.events, start=self._count + 1)
            if event in candidates
        ]
        none = tensors and not any(looks_like_attention(tensor) for tensor in tensors.values())
        return (
            f"It is ambiguous which attention of module '{run.path}' is meant. The module computes "
            f"{', '.join(computed) or 'none that can be recorded'}, and returns {describe_returned(run.path, tensors)}"
            f"{'; none of these is weights whose rows sum to 1' if none else ''}. {NAME_IT}"
        )


def name_event(event: Event, place: int) -> str:
    """What an attention is called from run to run: the function, and which of those of its run it is."""
    return f"{event.by}#{place}"


def _unreadable(event: Event, run: Run) -> DiscoveryError:
    by = f"The attention of '{run.path}', {event.shape} by {event.by}"
    return DiscoveryError(f"{by}, cannot be read: {event.problem}. {NAME_IT}")


def describe_returned(path: str, tensors: Mapping[Path, Tensor]) -> str:
    """What a module returned, as it can be named, with shapes."""
    names = {item: f"'{Source(path, item=item)}'" if item else "one tensor" for item in tensors}
    return ", ".join(f"{names[item]} {tuple(tensor.shape)}" for item, tensor in tensors.items()) or "no tensor"
