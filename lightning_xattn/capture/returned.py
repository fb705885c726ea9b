"""Attention of any other module: what it computes in the open, or what it returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attention import Direction, row_sum_tolerance
from lightning_xattn.capture.axes import Tokens, token_inputs
from lightning_xattn.capture.computed import Computation, watch_computations
from lightning_xattn.capture.memory import has_address
from lightning_xattn.capture.sites import Source
from lightning_xattn.capture.weights import RecordedWeights
from lightning_xattn.errors import DiscoveryError, ShapeError, XAttnWarning

Item = tuple[str | int, ...]

NAME_IT = (
    "Name the module that computes it, an item of what this one returns (attention={'<a>_to_<b>': 'path[item]'}), or "
    "give a callable (attention={'<a>_to_<b>': lambda model: weights})."
)

Call = dict[Direction | None, RecordedWeights]
"""The attention of one call of a module, by direction; None where the call does not tell which direction it is."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What was computed while a module ran: attention, and the shapes of what was passed over."""

    computed: list[Computation] = field(default_factory=list)
    passed: list[tuple[int, ...]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget it."""
        self.computed.clear()
        self.passed.clear()


class ModuleWatch:
    """Finds the attention in each call of a module that is no ``nn.MultiheadAttention``.

    Where the module returns a mapping with the directions' names, or an item was named, that is read. Else it is the
    one attention that the module computes (see ``WatchComputations``), or else the one tensor that it returns whose
    rows sum to 1. Of a returned tensor the masks are known where it is what a softmax computed; where not, keys to
    which a sample gives no weight at all count as padding. What is not clear in a first call is an error; a later call
    without what was found before, or that is not clear, counts as none.

    Parameters
    ----------
    module, path
        The module and its path, for messages.
    sites
        The directions that are read from it; none, if that is not known yet.
    around
        The module that holds it, whose tokens tell of its axes if it gets none.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        sites: Sequence[tuple[Direction, Source]] = (),
        around: nn.Module | None = None,
    ) -> None:
        self.module = module
        self._path, self._sites, self._around = path, sites, around
        # What has been looked at: an item, or whether a kernel computes it; each in training and in eval mode.
        self._looked_at: set[tuple[Item | bool, bool]] = set()
        # Where it was found: under the directions' names, or at a place in what is returned.
        self._by_name = False
        self._place: Item | None = None
        # Whether any call gave attention, and whether a user has been told of a later one that was not clear.
        self._has_recorded = self._told = False

    def watch(self, record: Callable[[Call], None], hooks: ExitStack) -> None:
        """Record every call.

        Parameters
        ----------
        record
            Called for each call of the module.
        hooks
            Takes the hooks; closing it removes them.
        """
        seen, around = Seen(), list[Tensor]()

        def forget(*_: Any) -> None:
            seen.clear()

        def enter_around(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            around[:] = [tensor for _, tensor in tensors_in((args, kwargs))]

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = [tensor for _, tensor in tensors_in((args, kwargs))]
            shape = seen.computed[0].weights.weights.shape if seen.computed else (0, 0, 0, 0)
            # A module that is a softmax and no more gets scores; what holds it got the tokens.
            call = self._find_or_pass(output, inputs if token_inputs(inputs, shape) else around, seen)
            around.clear()
            seen.clear()
            record(call)

        hooks.callback(forget)
        hooks.callback(around.clear)
        if self._around is not None:
            hooks.callback(self._around.register_forward_pre_hook(enter_around, with_kwargs=True).remove)
        hooks.callback(self.module.register_forward_pre_hook(forget).remove)
        hooks.callback(self.module.register_forward_hook(read, with_kwargs=True, prepend=True).remove)
        # Inside of an nn.MultiheadAttention nothing may be watched so; a module that holds some is read by its output.
        if not any(isinstance(module, nn.MultiheadAttention) for module in self.module.modules()):
            watch_computations([self.module], seen.computed.append, seen.passed.append, hooks)

    def _find_or_pass(self, output: Any, inputs: list[Tensor], seen: Seen) -> Call:
        try:
            call = self.find(output, inputs, seen)
        except DiscoveryError as error:
            if not self._has_recorded:
                raise
            if not self._told:
                warnings.warn(f"In a later step: {error} Such steps are left out.", XAttnWarning, stacklevel=4)
            self._told = True
            return {}
        self._has_recorded = self._has_recorded or bool(call)
        return call

    def find(self, output: Any, inputs: list[Tensor], seen: Seen) -> Call:
        """The attention of a call: by direction, or under None where the call does not tell which direction it is.

        Parameters
        ----------
        output, inputs
            What the module returned and got.
        seen
            What was computed meanwhile.

        Raises
        ------
        DiscoveryError, ShapeError
            If it is not clear what is meant, or what is read is no attention.
        """
        tensors = dict(tensors_in(output))

        def returned(items: Mapping[Direction | None, Item]) -> Call:
            found = {name: self._returned(item, output, inputs, seen) for name, item in items.items()}
            return {name: weights for name, weights in found.items() if weights is not None}

        named = {direction: source.item for direction, source in self._sites}
        for direction in (direction for direction, item in named.items() if not item):
            under = [item for item in tensors if item and item[-1] == str(direction)]
            if len(under) > 1:
                raise DiscoveryError(self._not_clear(seen, tensors, under))
            named[direction] = under[0] if under else ()
        if self._by_name or any(named.values()):
            self._by_name = True
            return returned({direction: item for direction, item in named.items() if item})
        called = [item for item in tensors if item and isinstance(item[-1], str) and "_to_" in item[-1]]
        others = [item for item in called if not self._has_recorded and _looks_like_attention(tensors[item])]
        if others:
            raise DiscoveryError(self._not_clear(seen, tensors, others))
        given = {item: one for item, tensor in tensors.items() for one in seen.computed if one.gave(tensor)}
        chosen = seen.computed if len(seen.computed) == 1 else list(dict.fromkeys(given.values()))
        if len(chosen) == 1 and chosen[0] not in given.values():
            self._look_beside(chosen[0], tensors, inputs, seen)
            return {None: chosen[0].weights}
        if len(chosen) == 1:
            self._place = next(item for item, one in given.items() if one is chosen[0])
        if self._place is None:
            fitting = [item for item, tensor in tensors.items() if _looks_like_attention(tensor)]
            if self._has_recorded and not seen.computed and not fitting:
                return {}
            if seen.computed or len(fitting) != 1 or _unread(seen, inputs, but=tensors[fitting[0]].shape):
                raise DiscoveryError(self._not_clear(seen, tensors, fitting))
            self._place = fitting[0]
        return returned({None: self._place})

    def _look_beside(self, one: Computation, tensors: Mapping[Item, Tensor], inputs: list[Tensor], seen: Seen) -> None:
        """Refuse the one attention that a module computes if another may be meant. Looks at a first call."""
        by_kernel = one.result is None
        if not self._is_new(by_kernel):
            return
        weights = one.weights.weights
        self._check_axes(one.weights, inputs, by_kernel)
        attention = [item for item, tensor in tensors.items() if _looks_like_attention(tensor)]
        beside = [item for item in attention if not _tells(tensors[item], weights)]
        if by_kernel:  # surely attention; what stands beside may be class probabilities
            tokens = Tokens.among(inputs, weights.shape)
            beside = [item for item in beside if tokens.are_asked_by(tensors[item].shape)]
        if beside or _unread(seen, inputs):
            raise DiscoveryError(self._not_clear(seen, tensors, beside))
        self._looked_at.add((by_kernel, self.module.training))

    def _check_axes(self, recorded: RecordedWeights, inputs: list[Tensor], by_kernel: bool) -> None:
        doubt = Tokens.among(inputs, recorded.weights.shape).doubt(recorded, by_kernel)
        if doubt is not None:
            weights = recorded.weights[:, 0] if recorded.one_head else recorded.weights
            raise ShapeError(
                f"The attention of '{self._path}', {tuple(weights.shape)}, is in doubt: {doubt}. Expected (batch, "
                f"heads, queries, keys). {NAME_IT}"
            )

    def _is_new(self, what: Item | bool) -> bool:
        return (what, self.module.training) not in self._looked_at

    def _returned(self, item: Item, output: Any, inputs: list[Tensor], seen: Seen) -> RecordedWeights | None:
        """What stands at a place in what is returned; None if there is nothing, but was before."""
        name = f"'{self._path}" + "".join(f"[{key}]" for key in item) + "'"
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
            there = ", ".join(_describe(key, tensor) for key, tensor in tensors_in(output)) or "no tensor"
            raise DiscoveryError(f"No tensor {name}: the module returned {there}. {NAME_IT}")
        same = next((one for one in seen.computed if one.gave(weights)), None)
        if self._is_new(item):
            check_weights(weights, f"Module {name} returns", self.module.training)
            self._check_axes(from_returned(weights, same), inputs, by_kernel=False)
            self._looked_at.add((item, self.module.training))
        return from_returned(weights, same)

    def _not_clear(self, seen: Seen, tensors: Mapping[Item, Tensor], fitting: Sequence[Item]) -> str:
        shapes = [str(tuple(one.weights.weights.shape)) for one in seen.computed]
        shapes += [f"{shape} (unread)" for shape in seen.passed]
        returned = [_describe(item, tensor) for item, tensor in tensors.items()]
        inside = [
            f"{self._path}.{path}".rstrip(".")
            for path, module in self.module.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        ]
        return (
            f"Module '{self._path}' does not show which attention is meant. It computes "
            + (f"attention of shapes {', '.join(shapes)}" if shapes else "none that can be seen")
            + (f", holds {', '.join(inside)}" if inside else "")
            + f", and returns {', '.join(returned) or 'no tensor'}"
            + ("; none of these is weights whose rows sum to 1" if returned and not fitting else "")
            + f". {NAME_IT}"
        )


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
    if not _looks_like_attention(weights):
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


def from_returned(weights: Tensor, computed: Computation | None = None) -> RecordedWeights:
    """Weights that a module returned.

    Of those that a softmax computed the masks are known. Of others, and of those that were changed in place after the
    softmax, keys to which a sample gives no weight at all count as padding; not so in float16, where small weights are
    rounded to 0.

    Parameters
    ----------
    weights
        ``(batch, heads, queries, keys)``, or ``(batch, queries, keys)`` of one head.
    computed
        The softmax that gave this tensor, if it was one.
    """
    one_head = weights.dim() == 3
    # Copied, as the caller may change in place what it gets.
    weights = (weights[:, None] if one_head else weights).detach().clone()
    seen = torch.ones_like(weights[:, 0, 0], dtype=torch.bool)
    if weights.dtype != torch.float16:
        seen = (weights != 0).any(dim=1).any(dim=1)
    if computed is None:
        return RecordedWeights(weights, key_mask=seen, one_head=one_head)
    before = computed.weights
    assert before.key_mask is not None  # as of every softmax
    # A tensor, as a GPU would have to wait for a bool.
    kept = ((weights == before.weights) | before.weights.isnan()).all()
    return RecordedWeights(weights, before.key_mask & (seen | kept), before.visible)


def tensors_in(output: Any, item: Item = ()) -> Iterator[tuple[Item, Tensor]]:
    """Every tensor of an output that has a place in memory, with the keys that lead to it."""
    if isinstance(output, Tensor):
        if has_address(output):
            yield item, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from tensors_in(value, (*item, key))
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from tensors_in(value, (*item, i))


def _looks_like_attention(tensor: Tensor) -> bool:
    """Whether all rows sum to 1, but for those that are fully masked (0 or NaN), and none is negative."""
    if tensor.dim() not in (3, 4) or not tensor.is_floating_point() or not tensor.numel():
        return False
    sums = tensor.float().sum(-1)
    sound = ((sums - 1).abs() <= row_sum_tolerance(tensor.dtype)) | (sums == 0) | sums.isnan()
    return bool(sound.all() and (sums > 0).any() and not (tensor < 0).any())


def _unread(seen: Seen, inputs: list[Tensor], but: Sequence[int] = ()) -> bool:
    """Whether attention was passed over, other than one with the queries and keys of this shape."""
    return any(Tokens.among(inputs, one).are_asked_by(one) for one in seen.passed if one[-2:] != tuple(but[-2:]))


def _tells(tensor: Tensor, weights: Tensor) -> bool:
    """Whether a tensor tells the same as weights, in another form, precision, or averaged over the heads."""
    precision = max(1e-4, *(torch.finfo(kind.dtype).eps for kind in (tensor, weights)))
    return any(
        tensor.numel() == same.numel()
        and torch.allclose(tensor.flatten().float(), same.flatten().float(), 2 * precision, 1e-5, equal_nan=True)
        for same in (weights, weights.mean(1))
    )


def _describe(item: Item, tensor: Tensor) -> str:
    return "".join(f"[{key}]" for key in item) + f" {tuple(tensor.shape)}"
