"""The attention of one module that is recorded: what is computed while it runs, or what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attention import Direction, row_sum_tolerance
from lightning_xattn.capture.layout import Axes, Item, Tokens, arguments_of, axes_of, tensors_in
from lightning_xattn.capture.masks import (
    RecordedWeights,
    apart_from_padding,
    keys_with_weight,
    zeros_are_a_mask,
)
from lightning_xattn.capture.readers import Event
from lightning_xattn.capture.sources import Source
from lightning_xattn.capture.watch import Run, Watch
from lightning_xattn.errors import DiscoveryError, ShapeError

NAME_IT = (
    "Name the one that is meant, 'path#2' for the second that a module computes or 'path[item]' for an item of what it "
    "returns, or give a callable (attention={'<a>_to_<b>': lambda model: weights})."
)

Call = dict[Direction | None, RecordedWeights]
"""The attention of one run of a module, by direction; None where the run does not tell which direction it is."""


class Tap:
    """Takes the attention out of each run of a module.

    Where the module returns a mapping with the directions' names, or an item was named, that is read; where a number
    was named, the attention with that number of those that are computed while it runs. Else it is the one attention
    that is computed meanwhile, or else the one tensor that it returns whose rows sum to 1. What is not clear in a first
    run is an error; a later run without what was found before, or that is not clear, counts as none.

    Parameters
    ----------
    module, path
        The module.
    sources
        What is taken from it, by direction; empty, if that is not known yet.

    Attributes
    ----------
    calls
        What was taken in this step, run after run.
    count
        How many attentions were computed in the runs of this step.
    query_mask
        ``(batch, queries)`` bool, True for a real token, of an argument of the module; None: it has none.
    remarks
        What a user should be told, and has not been yet.
    """

    def __init__(self, module: nn.Module, path: str, sources: Sequence[tuple[Direction, Source]] = ()) -> None:
        self.module, self.path = module, path
        self.calls: list[Call] = []
        self.remarks: list[str] = []
        self.has_recorded = False
        self._sources = sources
        self._across = not any(source.joint for _, source in sources)
        # What has been looked at, an item or one of those that are computed, each in training and in eval mode, and what
        # was seen then: how its rows are split, and whether its zeros are a mask.
        self._looked_at: set[tuple[Item | str, bool]] = set()
        self._axes: dict[Item | str, Axes | None] = {}
        self._zeros_hide: dict[Item, bool] = {}
        # Where it was found: under the directions' names, at a place in what is returned, or at one among those that are
        # computed, by these functions.
        self._by_name = False
        self._place: Item | None = None
        self._chosen: tuple[int, list[str]] | None = None
        self._has_warned = False
        self.count = 0
        self.query_mask: Tensor | None = None

    def clear(self) -> None:
        """Forget what was taken; a new step begins."""
        self.calls, self.count, self.query_mask = [], 0, None

    def take(self, run: Run, output: Any, watch: Watch) -> None:
        """Take the attention out of a run that ends.

        Raises
        ------
        DiscoveryError, ShapeError
            If it is not clear in a first run what is meant, or what is read is no attention.
        """
        try:
            call = self.find(run, output, watch)
        except DiscoveryError as error:
            if not self.has_recorded:
                raise
            if not self._has_warned:
                self.remarks.append(f"In a later step: {error} Such steps are left out.")
            self._has_warned = True
            call = {}
        self.has_recorded = self.has_recorded or bool(call)
        self.calls.append(call)
        self.count += len(run.events)
        if call and self.query_mask is None:
            self.query_mask = _own_query_mask(run, next(iter(call.values())))

    def find(self, run: Run, output: Any, watch: Watch) -> Call:
        """The attention of a run, by direction.

        Raises
        ------
        DiscoveryError, ShapeError
            As ``take``.
        """
        tensors = dict(tensors_in(output))
        items = {direction: source.item for direction, source in self._sources if source.call is None}
        for direction in (direction for direction, item in items.items() if not item):
            under = [item for item in tensors if item and item[-1] == str(direction)]
            if len(under) > 1:
                raise DiscoveryError(self._not_clear(run, tensors, under))
            items[direction] = under[0] if under else ()
        numbered = {direction: source.call for direction, source in self._sources if source.call is not None}
        if self._by_name or any(items.values()) or numbered:
            self._by_name = True
            found = {d: self._returned(item, output, run, watch) for d, item in items.items() if item}
            found |= {d: self._numbered(number, run, tensors) for d, number in numbered.items()}
            return {direction: weights for direction, weights in found.items() if weights is not None}
        called = [item for item in tensors if item and isinstance(item[-1], str) and "_to_" in item[-1]]
        others = [item for item in called if not self.has_recorded and looks_like_attention(tensors[item])]
        if others:
            raise DiscoveryError(self._not_clear(run, tensors, others))
        weights = self._only(run, output, tensors, watch)
        return {} if weights is None else {None: weights}

    def _only(self, run: Run, output: Any, tensors: Mapping[Item, Tensor], watch: Watch) -> RecordedWeights | None:
        """The one attention that a run has; None if there is none, but was before."""
        kinds = [event.by for event in run.events]
        if self._place is None and self._chosen is not None and self._chosen[1] == kinds:
            return self._computed(run.events[self._chosen[0]], self._chosen[0], run)
        candidates = candidates_of(run, self._across)
        given = {item: event for item, tensor in tensors.items() for event in run.events if event.gave(tensor)}
        chosen = candidates if len(candidates) == 1 else list(dict.fromkeys(given.values()))
        if len(chosen) == 1 and (chosen[0] not in given.values() or chosen[0].by != "softmax"):
            number = run.events.index(chosen[0])
            weights = self._computed(chosen[0], number, run, tensors)
            self._chosen = number, kinds
            return weights
        if len(chosen) == 1:
            self._place = next(item for item, event in given.items() if event is chosen[0])
        if self._place is None:
            fitting = [item for item, tensor in tensors.items() if looks_like_attention(tensor)]
            if self.has_recorded and not candidates and not fitting:
                return None
            if candidates or len(fitting) != 1:
                raise DiscoveryError(self._not_clear(run, tensors, fitting))
            self._place = fitting[0]
        return self._returned(self._place, output, run, watch)

    def _numbered(self, number: int, run: Run, tensors: Mapping[Item, Tensor]) -> RecordedWeights | None:
        """The attention with this number in the step; None if it is none of this run's."""
        place = number - self.count - 1
        if 0 <= place < len(run.events):
            return self._computed(run.events[place], place, run)
        return None

    def _computed(
        self, event: Event, place: int, run: Run, beside: Mapping[Item, Tensor] | None = None
    ) -> RecordedWeights:
        """One of the attentions of a run; ``beside``: what is returned beside it, if nothing said that it is meant."""
        if event.problem is not None or event.recorded is None:
            raise DiscoveryError(
                f"The attention of '{self.path}', {event.shape} by {event.by}, cannot be read: {event.problem}. "
                f"{NAME_IT}"
            )
        what = f"{event.by}#{place}"
        first = self._is_first(what)
        recorded = self._hide_unused(event, first)
        if first:
            is_known = event.tokens is not None
            self._axes[what] = None if is_known else self._check_axes(event.shape, run, event.by != "softmax")
        recorded = replace(self._split(recorded, self._axes[what]), within=event.within)
        if first and beside is not None:
            self._look_beside(recorded, event, run, beside)
        if first and recorded.one_head:
            self.remarks.append(one_head(self.path))
        self._looked_at.add((what, self.module.training))
        return recorded

    def _split(self, recorded: RecordedWeights, axes: Axes | None) -> RecordedWeights:
        if axes is None:
            return recorded
        rows = len(recorded.weights)
        if axes.heads is not None and rows % axes.heads:
            raise DiscoveryError(
                f"The attention of '{self.path}' had {axes.heads} heads among its rows; now it has {rows} rows."
            )
        return axes.apply(recorded)

    def _hide_unused(self, event: Event, first: bool) -> RecordedWeights:
        """What was computed, without the rows that the module sets to 0 before it uses them."""
        recorded, used = event.recorded, event.used
        assert recorded is not None
        if used is None or self.module.training or event.gave_unchanged(used):
            return recorded
        sums = used.detach().float().sum(-1, keepdim=True)
        unused = (used.detach() == 0).all(-1, keepdim=True) & (recorded.weights != 0).any(-1, keepdim=True)
        if first:
            kept = torch.isclose(used.detach().float() / sums, recorded.weights.float(), rtol=1e-2, atol=1e-3)
            if bool((~kept & ~unused & ~recorded.weights.isnan()).any()):
                self.remarks.append(
                    f"'{self.path}' changes its weights between the softmax and their use: what the softmax gave is "
                    "recorded. If that is not what you mean, return what is used and name it: 'path[item]'."
                )
            elif bool(unused.any()):
                self.remarks.append(
                    f"'{self.path}' sets whole rows of its weights to 0 after the softmax: such queries are left out."
                )
        shown = ~unused.expand(recorded.weights.shape)
        return replace(recorded, visible=shown if recorded.visible is None else recorded.visible & shown)

    def _look_beside(self, recorded: RecordedWeights, event: Event, run: Run, tensors: Mapping[Item, Tensor]) -> None:
        """Refuse the one attention that is computed if the module returns another one. Looks at the values."""
        beside = [item for item, tensor in tensors.items() if looks_like_attention(tensor)]
        beside = [item for item in beside if not _tells(tensors[item], recorded.weights)]
        if event.by != "softmax":  # what stands beside may be class probabilities
            tokens = Tokens.of(run, event.shape)
            beside = [item for item in beside if tokens.are_asked_by(tensors[item].shape)]
        if beside:
            raise DiscoveryError(self._not_clear(run, tensors, beside))

    def _check_axes(self, shape: Sequence[int], run: Run, surely_keys: bool, one_head: bool = False) -> Axes:
        axes = axes_of(shape, run, surely_keys, one_head)
        if isinstance(axes, str):
            shown = (shape[0], *shape[2:]) if one_head else tuple(shape)
            raise ShapeError(
                f"The attention of '{self.path}', {shown}, is in doubt: {axes}. Expected (batch, heads, queries, keys). "
                f"{NAME_IT}"
            )
        return axes

    def _is_first(self, what: Item | str) -> bool:
        return (what, self.module.training) not in self._looked_at

    def _returned(self, item: Item, output: Any, run: Run, watch: Watch) -> RecordedWeights | None:
        """What stands at a place in what is returned; None if there is nothing, but was before."""
        name = self.path + "".join(f"[{key}]" for key in item)
        weights = output
        try:
            for key in item:
                # An item of a tensor would be a sample.
                weights = None if isinstance(weights, Tensor) else weights[key]
        except (KeyError, IndexError, TypeError):
            weights = None
        if not isinstance(weights, Tensor):
            if any(item == before for before, _ in self._looked_at):
                return None
            there = ", ".join(_describe(key, tensor, self.path) for key, tensor in tensors_in(output)) or "no tensor"
            raise DiscoveryError(f"No tensor '{name}': the module returned {there}. {NAME_IT}")
        event = next((event for event in run.events if event.gave(weights)), None) or watch.origin(weights)
        first = self._is_first(item)
        if first:
            check_weights(weights, f"Module '{name}' returns", self.module.training)
            self._axes[item] = self._check_axes(tuple(weights.shape), run, surely_keys=False)
        axes = self._axes[item]
        # Copied, as the caller may change in place what it gets.
        recorded = self._split(RecordedWeights(weights.detach().clone()), axes)
        masks = None if event is None else _masks_for(recorded, event, run)
        if first and masks is None:
            self._zeros_hide[item] = zeros_hide(recorded.weights, f"Module '{name}' returns", self.remarks.append)
        if first and recorded.one_head:
            self.remarks.append(one_head(name, average=masks is None and bool((weights != 0).all())))
        self._looked_at.add((item, self.module.training))
        return from_weights(recorded, masks, self._zeros_hide.get(item, False))

    def _not_clear(self, run: Run, tensors: Mapping[Item, Tensor], fitting: Sequence[Item]) -> str:
        computed = [
            f"'{self.path}#{i}' {describe_event(event, run)}"
            for i, event in enumerate(run.events, start=self.count + 1)
            if event in candidates_of(run, across=False)
        ]
        returned = [_describe(item, tensor, self.path) for item, tensor in tensors.items()]
        return (
            f"Module '{self.path}' does not show which attention is meant. It computes "
            + (", ".join(computed) if computed else "none that can be seen")
            + f", and returns {', '.join(returned) or 'no tensor'}"
            + ("; none of these is weights whose rows sum to 1" if returned and not fitting else "")
            + f". {NAME_IT}"
        )


def candidates_of(run: Run, across: bool) -> list[Event]:
    """Those of the softmaxes and kernels in a run that may be attention to tokens.

    Parameters
    ----------
    run
        The run.
    across
        Whether attention from one sequence to another is meant: what surely attends within one is left out, unless
        there is no other.
    """
    tokens = {event.shape: Tokens.of(run, event.shape) for event in run.events}
    asked = [event for event in run.events if tokens[event.shape].are_asked_by(event.shape)]
    found = [event for event in run.events if event in asked or (event.over_keys and event.problem is None)]
    if not found:  # with queries of the module's own
        found = [
            event
            for event in run.events
            if event.shape[-1] in tokens[event.shape].counts and event.shape[-2] > 1 and event.problem is None
        ]
    crossing = [event for event in found if not event.within]
    return crossing if across and crossing else found


def describe_event(event: Event, run: Run) -> str:
    """The shape of an attention, and which tokens ask which, as far as numbers of tokens tell."""
    queries, keys = event.shape[-2], event.shape[-1] - event.extra_keys
    who = f"{queries} queries{_whose(queries, run)} ask {keys} keys{_whose(keys, run)}"
    return f"{event.shape}: {who}" + (f" (cannot be read: {event.problem})" if event.problem else "")


def _whose(count: int, run: Run) -> str:
    """The argument with so many tokens, if it is one."""
    found = {t.data_ptr(): name for name, t in reversed(arguments_of(run)) if t.dim() == 3 and t.shape[1] == count}
    return f" ({found.popitem()[1]})" if len(found) == 1 else ""


def check_weights(weights: Any, who: str, training: bool) -> None:
    """Refuse what is no attention. Looks at the values.

    Raises
    ------
    ShapeError
        If the weights are not ``(batch, heads, queries, keys)`` or ``(batch, queries, keys)``, or a row that is not
        fully masked does not sum to 1.
    """
    shape = tuple(weights.shape) if isinstance(weights, Tensor) else None
    if shape is None or len(shape) not in (3, 4) or not weights.is_floating_point():
        found = f"a {type(weights).__name__}" if shape is None else f"{weights.dtype} of shape {shape}"
        raise ShapeError(
            f"{who} {found}; expected weights (batch, heads, queries, keys), or (batch, queries, keys) of one head."
        )
    if not looks_like_attention(weights):
        values, sums = weights.float().nan_to_num(), weights.float().sum(-1).nan_to_num()
        found = (
            f"values from {values.min():.3g} to {values.max():.3g}: scores before the softmax are no weights"
            if values.min() < 0
            else f"rows that sum to {sums.min():.3g} ... {sums.max():.3g}"
            + (": weights after dropout are not attention, put the model in eval mode" if training else "")
        )
        raise ShapeError(
            f"{who} shape {shape} with {found}. Expected weights after the softmax and before dropout, whose rows sum "
            f"to 1. {NAME_IT}"
        )


def looks_like_attention(tensor: Tensor) -> bool:
    """Whether all rows sum to 1, but for those that are fully masked (0 or NaN), and none is negative."""
    if tensor.dim() not in (3, 4) or not tensor.is_floating_point() or not tensor.numel():
        return False
    sums = tensor.float().sum(-1)
    sound = ((sums - 1).abs() <= row_sum_tolerance(tensor.dtype)) | (sums == 0) | sums.isnan()
    return bool(sound.all() and (sums > 0).any() and not (tensor < 0).any())


def zeros_hide(weights: Tensor, who: str, tell: Callable[[str], None]) -> bool:
    """Whether weights of exactly 0 are hidden keys, of which the masks are not known. Looks at the values."""
    if weights.dtype == torch.float16 or zeros_are_a_mask(weights):
        return weights.dtype != torch.float16
    if weights.shape[1] == 1:  # of several heads it shows that they leave out different keys
        tell(
            f"{who} one head, or an average, with weights of exactly 0 that differ from sample to sample and from query "
            "to query. They are taken as weights, as of a sparse attention. If a mask hides these keys, name the module "
            "whose softmax gives the weights."
        )
    return False


def from_weights(recorded: RecordedWeights, masks: RecordedWeights | None, zeros_are_hidden: bool) -> RecordedWeights:
    """Weights that a module returned, with masks.

    Parameters
    ----------
    recorded
        The weights.
    masks
        What the softmax gave that they were made of, with its masks; None if that was not seen. Then keys to which a
        sample gives no weight at all are hidden (not so in float16, which rounds small weights to 0).
    zeros_are_hidden
        Whether all weights of exactly 0 are hidden, as ``zeros_hide`` says.
    """
    weights = recorded.weights
    keys = keys_with_weight(weights)
    if masks is None:
        visible = (weights != 0).any(1, keepdim=True) if zeros_are_hidden else keys
        return apart_from_padding(replace(recorded, visible=visible))
    # A tensor, as a GPU would have to wait for a bool.
    kept = ((weights == masks.weights) | masks.weights.isnan()).all()
    key_mask = keys[:, 0, 0] | kept
    return replace(
        recorded, key_mask=key_mask if masks.key_mask is None else masks.key_mask & key_mask, visible=masks.visible
    )


def _masks_for(recorded: RecordedWeights, event: Event, run: Run) -> RecordedWeights | None:
    """What the softmax gave that weights, or their average over the heads, were made of; None if its axes are others."""
    axes = axes_of(event.shape, run, True)
    if isinstance(axes, str) or event.recorded is None:
        return None
    made_of = event.recorded if event.tokens is not None else axes.apply(event.recorded)
    shape, heads = recorded.weights.shape, made_of.weights.shape[1]
    if shape[1] == 1 < heads and made_of.weights.shape == (shape[0], heads, *shape[2:]):
        visible = made_of.visible
        visible = visible if visible is None else visible.any(1, keepdim=True)
        return replace(made_of, weights=made_of.weights.mean(1, keepdim=True), visible=visible)
    return made_of if made_of.weights.shape == shape else None


def _tells(tensor: Tensor, weights: Tensor) -> bool:
    """Whether a tensor tells the same as weights, in another form, precision, or averaged over the heads."""
    precision = max(1e-4, *(torch.finfo(kind.dtype).eps for kind in (tensor, weights)))
    return any(
        tensor.numel() == same.numel()
        and torch.allclose(tensor.flatten().float(), same.flatten().float(), 2 * precision, 1e-5, equal_nan=True)
        for same in (weights, weights.mean(1))
    )


def one_head(name: str, average: bool = False) -> str:
    """What a user should know of attention without an axis for heads."""
    return f"'{name}' has no axis for heads: it is taken as one head, and its first axis as samples." + (
        " An average over heads has a larger entropy than the heads; record the heads if you can." if average else ""
    )


def _describe(item: Item, tensor: Tensor, path: str = "") -> str:
    name = path + "".join(f"[{key}]" for key in item)
    return (f"'{name}'" if item else "one tensor") + f" {tuple(tensor.shape)}"


def _own_query_mask(run: Run, recorded: RecordedWeights) -> Tensor | None:
    """A mask among a module's arguments that can only be that of the queries, as there are not as many keys.

    Named ``...padding_mask`` it is True for padding, as in torch; of whole numbers it is 1 for a real token, as in
    Hugging Face's models. What other masks mean cannot be told.
    """
    batch, _, queries, keys = recorded.weights.shape
    for name, tensor in arguments_of(run) if queries != keys else ():
        if tuple(tensor.shape) == (batch, queries) and "mask" in name:
            if tensor.dtype == torch.bool and name.endswith("padding_mask"):
                return ~tensor
            if not tensor.is_floating_point() and tensor.dtype != torch.bool:
                return tensor.bool()
    return None
