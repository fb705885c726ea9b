"""The attention of one direction, extracted from its source in each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.capture.calls import Path, Run, find_readable_tensors, name_argument
from lightning_xattn.capture.events import Event, RecordLevel
from lightning_xattn.capture.joint import JointSequence, Places, cut_direction
from lightning_xattn.capture.masks import Axes, RecordedWeights, find_weighted_keys, intersect_masks, separate_padding
from lightning_xattn.capture.sources import SET_IT_ASIDE, Source
from lightning_xattn.capture.tensors import Address, describe_kind, is_plain
from lightning_xattn.capture.tokens import Tokens, describe_event, find_axes, find_candidates
from lightning_xattn.core.attention import Direction, row_sum_tolerance
from lightning_xattn.core.errors import DiscoveryError, SettingError, ShapeError
from lightning_xattn.core.notices import info

NAME_IT = (
    "Name the attention that you mean: 'path#2' is the second that a module computes, 'path[item]' an item of what it "
    "returns. Or give a callable: attention={'<a>_to_<b>': lambda model: weights}. " + SET_IT_ASIDE
)

FOLLOW_IT = "give spans that count from the end, such as (-144, None), or a callable that makes them of the batch"
"""What to do where a modality of a joint sequence has as many tokens as each batch has."""


class AttentionExtractor:
    """Extracts the attention of a direction from the runs of its module, or from what a callable returns.

    Where an item was named, or the module returns a mapping with the direction's name, that is read; where a number was
    named, the attention with that number among those that are computed in the step. Else it is the one attention that
    is computed in a run, or else the one tensor that the module returns whose rows sum to 1. A first run in which that
    is ambiguous is an error; a later one gives no attention.

    Of one ``alone`` no opposite direction has a key mask that would mask its queries.
    """

    def __init__(self, direction: Direction | None, source: Source, alone: bool = False) -> None:
        self.direction, self.source, self.is_alone = direction, source, alone
        self.has_run = False
        # New messages to the user.
        self.remarks: list[str] = []
        # Extracts the self-attention whose masks say which queries are padding.
        self.supplier: AttentionExtractor | None = None
        # How rows are split into samples and heads, by what was read.
        self.axes: dict[Path | str, Axes] = {}
        # What a first step has kept, before it was known that it is meant.
        self.kept: RecordedWeights | None = None
        # How many samples were left out of this step, as their joint sequence does not fit its spans.
        self.left_out = 0
        # Of this step: what the runs gave, and how many attentions they computed.
        self._found: list[RecordedWeights] = []
        self._query_masks: list[Tensor | None] = []
        self._count = self._runs = 0
        # What has been checked, in training and in eval mode.
        self._checked: set[tuple[Path | str, bool]] = set()
        # Where it was found: in what is returned, or which of those that are computed, by these functions.
        self._named: Path = ()
        self._place: Path | None = None
        self._chosen: tuple[int, list[str]] | None = None
        # Whether a step had this attention; of a callable where the numbers are that it gave last.
        self._has_given = False
        self._last: Address | None = None
        # The length that a joint sequence had first, and the argument that is the mask of the queries.
        self._length, self._mask_name = 0, ""

    def clear(self) -> None:
        """Begin a new step."""
        self._found, self._count, self._runs, self.kept, self.left_out = [], 0, 0, None, 0
        self._query_masks.clear()

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
        before = len(self._found)
        self._take(lambda: self._keep_block(self.find_weights(run, output)))
        if self.is_alone and len(self._found) > before:
            self._query_masks.append(self._find_query_mask(run, self._found[-1]))
        self._count += len(run.events)

    def _keep_block(self, found: RecordedWeights | None) -> RecordedWeights | None:
        """Of a joint sequence only the cells between the modalities, as soon as it is known where these are."""
        joint = self.source.joint
        if found is None or joint is None or any(map(callable, joint.spans.values())):
            return found
        try:
            return self._block(joint, found, joint.slices(None))
        except (DiscoveryError, SettingError, ShapeError):  # raised again when the step is over
            return found

    def call_reader(self, model: nn.Module) -> None:
        """Take what the callable gives in this step; the very numbers of an earlier step are none of this one.

        Raises
        ------
        ShapeError
            If it is no attention in a first step; a later one of which it is none is left out.
        """
        if self._runs or self.source.read is None:
            return
        weights, name = self.source.read(model), str(self.source)
        if weights is not None and self._last is not None and self._last.holds(weights):
            self.remarks.append(
                f"The {name} gave the same tensor as in an earlier step: such steps are left out. If the model "
                "fills it anew in each step, give a clone of it."
            )
        elif weights is not None:
            self._take(lambda: self._check_given(name, weights, name, model.training, None, None))
            self._last = Address.of(weights) if isinstance(weights, Tensor) else None

    def _take(self, find: Callable[[], RecordedWeights | None]) -> None:
        self._runs += 1
        try:
            found = find()
        except (DiscoveryError, ShapeError) as error:
            if not self.has_run:
                raise
            self._note_left_out(error)
            return
        if found is not None:
            self.has_run = True
            self._found.append(found)

    def _note_left_out(self, why: object) -> None:
        self.remarks.append(f"In a later step: {why} Such steps are left out.")

    @property
    def first(self) -> RecordedWeights | None:
        """What the first run of this step gave; None: there was none."""
        return next(iter(self._found), self.kept)

    @property
    def query_mask(self) -> Tensor | None:
        """A mask of the queries among the arguments of the module, ``(batch, queries)``; None without one."""
        turn = self.source.turn if self.source.turns > 1 and not self._named else 0
        return self._query_masks[turn] if turn < len(self._query_masks) else None

    def find_weights(self, run: Run, output: Any) -> RecordedWeights | None:
        """The attention of a run; None if it has none. It raises what ``extract`` does, also of a later run."""
        if self.source.call is not None:
            place = self.source.call - 1 - self._count
            return self._extract_computed(run, place) if 0 <= place < len(run.events) else None
        tensors = find_readable_tensors(output)
        if not self.source.item and not self._named:
            under = [item for item in tensors if item and item[-1] == str(self.direction)]
            others = [item for item in tensors if item and "_to_" in str(item[-1]) and not self.has_run]
            if len(under) > 1 or (not under and any(_looks_like_attention(tensors[item]) for item in others)):
                raise self._ambiguity(run, tensors)
            self._named = under[0] if under else ()
        item = self.source.item or self._named
        return self._extract_returned(item, output, run) if item else self._find_only(run, output, tensors)

    def _find_only(self, run: Run, output: Any, tensors: Mapping[Path, Tensor]) -> RecordedWeights | None:
        """The one attention that a run has; None if there is none, but was before."""
        kinds = [event.by for event in run.events]
        if self._chosen is not None and self._chosen[1] == kinds:
            return self._extract_computed(run, self._chosen[0])
        candidates = find_candidates(run, across=self.source.joint is None)
        given = {event: item for item, tensor in tensors.items() for event in run.events if event.gave(tensor)}
        chosen = candidates if len(candidates) == 1 else list(given)
        if len(chosen) == 1:
            (one,) = chosen
            if one not in given or one.by != "softmax":
                place = run.events.index(one)
                found = self._extract_computed(run, place, beside=tensors)
                self._chosen = place, kinds
                return found
            self._place = given[one]
        if self._place is None:
            fitting = [item for item, tensor in tensors.items() if _looks_like_attention(tensor)]
            if self.has_run and not candidates and not fitting:
                return None
            if candidates or len(fitting) != 1:
                raise self._ambiguity(run, tensors)
            self._place = fitting[0]
        return self._extract_returned(self._place, output, run)

    def _extract_computed(self, run: Run, place: int, beside: Mapping[Path, Tensor] | None = None) -> RecordedWeights:
        """One of the attentions of a run; ``beside``: what the module returns, where no name chose this attention."""
        event, training = run.events[place], run.module.training
        what, recorded, used = name_event(event, place), event.recorded, event.used
        first = (what, training) not in self._checked
        as_given = event.result is not None and used is not None and event.result.holds_unchanged(used)
        is_whole = event.level is RecordLevel.WEIGHTS and not training and not as_given
        if recorded is not None and used is not None and is_whole:
            recorded = self._hide_unused_rows(recorded, used, run, first)
        recorded = self.unfold(recorded, event, run)
        if recorded is None:
            raise _unreadable(event, run)
        if first and beside is not None:
            tokens = Tokens.of(run, event.shape)
            for tensor in beside.values():
                # What stands beside a kernel, which surely is attention, may be class probabilities.
                may_be_meant = event.by == "softmax" or tokens.are_asked_by(tensor.shape)
                if may_be_meant and _looks_like_attention(tensor) and not _hold_same_weights(tensor, recorded.weights):
                    raise self._ambiguity(run, beside)
        if first and recorded.one_head:
            self.remarks.append(_describe_one_head(run.path))
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
            there = _describe_returned(run.path, find_readable_tensors(output))
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
            _check_weights(weights, who, training)
        shape = tuple(weights.shape)
        whole = event if event is not None and event.shape == shape else None
        axes = Axes() if run is None else self._axes_for(what, shape, run, whole)
        # Copied, as the caller may change in place what it gets.
        recorded = axes.apply(RecordedWeights(weights.detach().clone()))
        masks = None if run is None or event not in run.events else self._find_masks(recorded, event, run)
        self._checked.add((what, training))
        if first:
            average = masks is None and bool((weights != 0).all())
            self.remarks += [_describe_one_head(name, average)] if recorded.one_head else []
            given = recorded.weights
            shown = find_weighted_keys(given) & (given != 0).any(-1, keepdim=True)
            if masks is None and given.dtype != torch.float16 and bool(((given == 0) & shown).any()):
                self.remarks.append(
                    f"{who} weights of exactly 0 at keys that other queries look at. They count as weights, as of a "
                    "sparse attention. If a mask hides these keys, name the module whose softmax gives the weights."
                )
        return _combine_masks(recorded, masks)

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
        elif len(found) < turns:
            self._refuse(
                f"Module '{source.path}' is named for {turns} directions, but ran {len(found)} time(s) in a step.",
                f"It returned no mapping with their names. Name an item of what it returns for each, as in "
                f"'{source.path}[1]', or the modules inside of it.",
            )
            return None
        chosen = found[source.turn if turns > 1 else 0]
        if source.joint is not None:
            return self._cut(chosen, batch)
        if chosen.within:
            self._refuse(
                f"'{source}' ({self.direction}) attends within one sequence: its query is its key.",
                "Name the module that attends across: attention={'<a>_to_<b>': 'path', ...}; or, if both modalities "
                "share the sequence, attention=JointSequence('path', spans={'<a>': (start, stop), '<b>': (start, "
                "stop)}).",
            )
            return None
        self._has_given = True
        return chosen

    def _refuse(self, what: str, remedy: str) -> None:
        """Raise, or leave this step out if an earlier one had the attention."""
        if not self._has_given:
            raise DiscoveryError(f"{what} {remedy}")
        self._note_left_out(what)

    def _cut(self, whole: RecordedWeights, batch: Any) -> RecordedWeights | None:
        """The direction within a joint sequence; None of one that does not fit its spans, if an earlier one did."""
        joint = self.source.joint
        assert joint is not None
        try:
            cut = whole if whole.length is not None else self._block(joint, whole, joint.slices(batch))
        except (DiscoveryError, SettingError, ShapeError) as error:
            if not self._has_given:
                raise
            self.left_out = whole.shape[0]
            self.remarks.append(f"{error} Such steps are left out and counted.")
            return None
        length, self._has_given = whole.length or whole.shape[2], True
        self._length = self._length or length
        if joint.last_takes_the_rest and not whole.cropped and length != self._length:
            self.remarks.append(
                f"The sequence of '{self.source.path}' changes its length ({self._length}, {length}), and the last "
                f"modality is assumed to have more or fewer tokens. If another one has, {FOLLOW_IT}. The spans are "
                f"{dict(joint.spans)}."
            )
        return cut

    def _block(self, joint: JointSequence, whole: RecordedWeights, places: Mapping[str, Places]) -> RecordedWeights:
        """The direction within a joint sequence that its spans fit."""
        name, length, expected = self.source.path, whole.shape[2], joint.expected_length
        assert self.direction is not None
        if whole.cropped and joint.counts_from_the_end:
            raise DiscoveryError(
                f"torch has packed the sequence of '{name}' and cut padding off, so that its end is not known: use "
                "spans that count from the start, or nn.TransformerEncoder(..., enable_nested_tensor=False)."
            )
        within = whole.shape[3] - whole.extra_keys == length
        # How much torch has cut off of a packed sequence is not known.
        fits = expected is None or length == expected or (whole.cropped and length < expected)
        if within and not fits and expected is not None:
            raise ShapeError(
                f"The sequence of '{name}' has {length} tokens, but the spans of the JointSequence are for {expected}: "
                f"{dict(joint.spans)}. If a modality changes its length, {FOLLOW_IT}."
                + f" If the tokens in no span belong to no modality, say so: JointSequence(..., length={length})."
                * (length > expected and not self._has_given)
            )
        cut = cut_direction(whole, places[self.direction.query], places[self.direction.key], name)
        return replace(cut, length=length, cropped=whole.cropped)

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
        shape, heads = recorded.shape, made_of.shape[1]
        if shape[1] == 1 < heads and made_of.shape == (shape[0], heads, *shape[2:]):
            visible = None if made_of.visible is None else made_of.visible.any(1, keepdim=True)
            return replace(made_of, source=made_of.weights.mean(1, keepdim=True), visible=visible)
        return made_of if made_of.shape == shape else None

    def _find_query_mask(self, run: Run, recorded: RecordedWeights) -> Tensor | None:
        """A mask among a module's arguments that can only be that of the queries, as there are not as many keys.

        Named ``...padding_mask`` it is True for padding, as in torch; an ``attention_mask`` of whole numbers is 1 for a
        real token, as in Hugging Face's models. What other masks mean is not known.
        """
        batch, _, queries, keys = recorded.shape
        for path, tensor in run.call.tensors() if queries != keys or self._mask_name else ():
            name = name_argument(run.module, path)
            fits = tuple(tensor.shape) == (batch, queries) and is_plain(tensor)
            if fits and not tensor.is_floating_point() and self._mask_name in ("", name):
                by_torch = name.endswith("padding_mask")
                if by_torch or (tensor.dtype != torch.bool and name in ("mask", "attention_mask", "query_mask")):
                    self._mask_name = name
                    info(f"The argument '{name}' of '{run.path}' marks its queries that are padding.", once=True)
                    return ~tensor.bool() if by_torch else tensor.bool()
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

    def _ambiguity(self, run: Run, tensors: Mapping[Path, Tensor]) -> DiscoveryError:
        candidates = find_candidates(run, across=False)
        computed = [
            f"'{run.path}#{i}' {describe_event(event, run)}"
            for i, event in enumerate(run.events, start=self._count + 1)
            if event in candidates
        ]
        none = tensors and not any(_looks_like_attention(tensor) for tensor in tensors.values())
        return DiscoveryError(
            f"It is ambiguous which attention of module '{run.path}' is meant. The module computes "
            f"{', '.join(computed) or 'none that can be recorded'}, and returns {_describe_returned(run.path, tensors)}"
            f"{'; none of these is weights whose rows sum to 1' if none else ''}. {NAME_IT}"
        )


def _check_weights(weights: Any, who: str, training: bool) -> None:
    """Refuse what is no attention. Looks at the values.

    Raises
    ------
    ShapeError
        If the weights are not ``(batch, heads, queries, keys)`` or ``(batch, queries, keys)``, a row that is not fully
        masked does not sum to 1, or their numbers need not be their values.
    """
    if not isinstance(weights, Tensor):
        found = f"a {type(weights).__name__}"
    elif not is_plain(weights):
        found = f"{describe_kind(weights)}, whose values may be others: give weights.as_subclass(torch.Tensor)"
    elif weights.dim() not in (3, 4) or not weights.is_floating_point():
        found = f"{weights.dtype} of shape {tuple(weights.shape)}"
    elif _looks_like_attention(weights):
        return
    elif (weights < 0).any():
        values = weights.float().nan_to_num()
        found = f"shape {tuple(weights.shape)} with values from {values.min():.3g} to {values.max():.3g}: scores?"
    else:
        sums = weights.float().sum(-1).nan_to_num()
        found = f"shape {tuple(weights.shape)} with rows that sum to {sums.min():.3g} ... {sums.max():.3g}"
        found += ": the model is in training mode, so that there may be dropout, use eval mode" * training
    raise ShapeError(
        f"{who} {found}. Expected weights after the softmax (scores before the softmax are no weights) and before "
        "dropout, (batch, heads, queries, keys), or (batch, queries, keys) of one head, whose rows sum to 1. " + NAME_IT
    )


def _looks_like_attention(tensor: Tensor) -> bool:
    """Whether all rows of a plain tensor sum to 1, but for fully masked ones (0 or NaN), and none is negative."""
    if not is_plain(tensor) or tensor.dim() not in (3, 4) or not tensor.is_floating_point() or not tensor.numel():
        return False
    sums = tensor.float().sum(-1)
    sound = ((sums - 1).abs() <= row_sum_tolerance(tensor.dtype)) | (sums == 0) | sums.isnan()
    return bool(sound.all() and (sums > 0).any() and not (tensor < 0).any())


def _combine_masks(recorded: RecordedWeights, masks: RecordedWeights | None) -> RecordedWeights:
    """Returned weights with ``masks``, those of the softmax that made them; None if it was not recorded.

    Without it those keys are hidden to which a sample gives no weight at all (not so in float16, which rounds small
    weights to 0).
    """
    weights = recorded.weights
    keys = find_weighted_keys(weights)
    if masks is None:
        return separate_padding(replace(recorded, visible=keys))
    # Kept as a tensor to avoid a device sync.
    kept = ((weights == masks.weights) | masks.weights.isnan()).all()
    key_mask = intersect_masks(keys[:, 0, 0] | kept, masks.key_mask)
    # Rows that were set to 0 after the softmax.
    shown = (weights != 0).any(-1, keepdim=True) | (masks.weights == 0).all(-1, keepdim=True)
    return replace(recorded, key_mask=key_mask, visible=intersect_masks(shown.expand_as(weights), masks.visible))


def _hold_same_weights(tensor: Tensor, weights: Tensor) -> bool:
    """Whether a tensor holds these weights, in another form, precision, or averaged over the heads."""
    precision = max(1e-4, *(torch.finfo(kind.dtype).eps for kind in (tensor, weights)))
    return any(
        tensor.numel() == same.numel()
        and torch.allclose(tensor.flatten().float(), same.flatten().float(), 2 * precision, 1e-5, equal_nan=True)
        for same in (weights, weights.mean(1))
    )


def _describe_one_head(name: str, average: bool = False) -> str:
    """The message about attention without an axis for heads."""
    remedy = " An average over heads has a larger entropy than the heads; record the heads if you can."
    return f"'{name}' has no axis for heads: it counts as one head, and its first axis as samples.{remedy * average}"


def name_event(event: Event, place: int) -> str:
    """What an attention is called from run to run: the function, and which of those of its run it is."""
    return f"{event.by}#{place}"


def _unreadable(event: Event, run: Run) -> DiscoveryError:
    by = f"The attention of '{run.path}', {event.shape} by {event.by}"
    return DiscoveryError(f"{by}, cannot be read: {event.problem}. {NAME_IT}")


def _describe_returned(path: str, tensors: Mapping[Path, Tensor]) -> str:
    """What a module returned, as it can be named, with shapes."""
    names = {item: f"'{Source(path, item=item)}'" if item else "one tensor" for item in tensors}
    return ", ".join(f"{names[item]} {tuple(tensor.shape)}" for item, tensor in tensors.items()) or "no tensor"
