"""Attention of any other module: what it computes in the open, or what it returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attention import Direction, row_sum_tolerance
from lightning_xattn.capture.computed import Computation, watch_computations
from lightning_xattn.capture.sites import Source
from lightning_xattn.capture.weights import RecordedWeights
from lightning_xattn.errors import DiscoveryError, ShapeError, XAttnWarning

Item = tuple[str | int, ...]

NAME_IT = (
    "Name the module that computes it, an item of what this one returns (attention={'<a>_to_<b>': 'path[item]'}), or "
    "give a callable (attention={'<a>_to_<b>': lambda model: weights})."
)


class ModuleWatch:
    """Finds the attention in each call of a module that is no ``nn.MultiheadAttention``.

    Where the module returns a mapping with the directions' names, or an item was named, that is read. Else it is the
    one attention that the module computes (see ``WatchComputations``), or else the one tensor that it returns whose
    rows sum to 1. Of a returned tensor the masks are known where it is what a softmax computed; where not, keys to
    which a sample gives no weight at all count as padding. What is not clear is an error.

    Parameters
    ----------
    module, path
        The module and its path, for messages.
    sites
        The directions that are read from it.
    """

    def __init__(self, module: nn.Module, path: str, sites: Sequence[tuple[Direction, Source]]) -> None:
        self._module, self._path, self._sites = module, path, sites
        self._computed: list[Computation] = []
        self._checked: set[Item] = set()
        self._place: Item | None = None

    def watch(self, record: Callable[[dict[Direction | None, RecordedWeights]], None], hooks: ExitStack) -> None:
        """Record every call: by direction, or under None where the call does not tell which direction it is.

        Parameters
        ----------
        record
            Called for each call of the module.
        hooks
            Takes the hooks; closing it removes them.
        """

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            record(self._find(output, [*args, *kwargs.values()]))

        def forget(*_: Any) -> None:
            self._computed = []

        hooks.callback(forget)
        hooks.callback(self._module.register_forward_pre_hook(forget).remove)
        hooks.callback(self._module.register_forward_hook(read, with_kwargs=True, prepend=True).remove)
        # Inside of an nn.MultiheadAttention nothing may be watched so; a module that holds some is read by its output.
        if not any(isinstance(module, nn.MultiheadAttention) for module in self._module.modules()):
            watch_computations([self._module], lambda computation: self._computed.append(computation), hooks)

    def _find(self, output: Any, inputs: list[Any]) -> dict[Direction | None, RecordedWeights]:
        computed, self._computed = self._computed, []
        tensors = dict(_tensors(output))
        by_direction: dict[Direction | None, RecordedWeights] = {}
        for direction, source in self._sites:
            item = source.item or next((item for item in tensors if item and item[-1] == str(direction)), ())
            if item:
                by_direction[direction] = self._returned(item, output, computed)
        if by_direction:
            return by_direction
        others = [item for item in tensors if item and isinstance(item[-1], str) and "_to_" in item[-1]]
        if others:
            raise DiscoveryError(self._not_clear(computed, tensors, others))
        returned = [c for c in computed if any(c.is_tensor(tensor) for tensor in tensors.values())]
        chosen = computed if len(computed) == 1 else returned
        if len(chosen) == 1:
            return {None: self._accept(chosen[0], inputs)}
        if self._place is None:
            fitting = [item for item, tensor in tensors.items() if _looks_like_attention(tensor)]
            if computed or len(fitting) != 1:
                raise DiscoveryError(self._not_clear(computed, tensors, fitting))
            self._place = fitting[0]
        return {None: self._returned(self._place, output, computed)}

    def _accept(self, computation: Computation, inputs: list[Any]) -> RecordedWeights:
        samples = computation.weights.weights.shape[0]
        tokens = [value for value in inputs if isinstance(value, Tensor) and value.dim() == 3]
        if computation.one_head and any(len(value) != samples for value in tokens):
            raise ShapeError(
                f"Module '{self._path}' calls scaled_dot_product_attention with {samples} x queries x width, which "
                f"does not tell samples from heads. {NAME_IT}"
            )
        return computation.weights

    def _returned(self, item: Item, output: Any, computed: list[Computation]) -> RecordedWeights:
        name = f"'{self._path}" + "".join(f"[{key}]" for key in item) + "'"
        weights = output
        try:
            for key in item:
                weights = weights[key]
        except (KeyError, IndexError, TypeError):
            weights = None
        if not isinstance(weights, Tensor):
            there = ", ".join(_describe(key, tensor) for key, tensor in _tensors(output)) or "no tensor"
            raise DiscoveryError(f"No tensor {name}: the module returned {there}.")
        same = next((computation for computation in computed if computation.is_tensor(weights)), None)
        if item not in self._checked:
            check_weights(weights, f"Module {name} returns", self._module.training)
            self._checked.add(item)
        return same.weights if same is not None else from_returned(weights)

    def _not_clear(self, computed: list[Computation], tensors: Mapping[Item, Tensor], fitting: Sequence[Item]) -> str:
        shapes = [str(tuple(computation.weights.weights.shape)) for computation in computed]
        returned = [_describe(item, tensor) for item, tensor in tensors.items()]
        inside = [
            f"{self._path}.{path}"
            for path, module in self._module.named_modules()
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


def check_weights(weights: Tensor, who: str, training: bool = False) -> None:
    """Refuse what is no attention, and say what is taken for one head. Looks at the values.

    Raises
    ------
    ShapeError
        If the weights are not ``(batch, heads, queries, keys)`` or ``(batch, queries, keys)``, or a row that is not
        fully masked does not sum to 1.
    """
    shape = tuple(weights.shape)
    if weights.dim() not in (3, 4) or not weights.is_floating_point():
        raise ShapeError(
            f"{who} {weights.dtype} of shape {shape}; expected weights (batch, heads, queries, keys), or (batch, "
            "queries, keys) of one head."
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
    if weights.dim() == 3:
        warnings.warn(
            f"{who} weights without an axis for heads, {shape}: taken as one head. If they are an average over heads, "
            "its entropy is larger than that of the heads; record the heads if you can.",
            XAttnWarning,
            stacklevel=2,
        )


def from_returned(weights: Tensor) -> RecordedWeights:
    """Weights of which no mask is known: keys to which a sample gives no weight at all count as padding.

    Not so in float16, where small weights are rounded to 0.
    """
    # Copied, as the caller may change in place what it gets.
    weights = (weights[:, None] if weights.dim() == 3 else weights).detach().clone()
    if weights.dtype == torch.float16:
        return RecordedWeights(weights)
    return RecordedWeights(weights, key_mask=(weights != 0).any(dim=1).any(dim=1))


def _tensors(output: Any, item: Item = ()) -> Iterator[tuple[Item, Tensor]]:
    """Every tensor of an output, with the keys that lead to it."""
    if isinstance(output, Tensor):
        yield item, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(value, (*item, key))
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from _tensors(value, (*item, i))


def _looks_like_attention(tensor: Tensor) -> bool:
    """Whether all rows sum to 1, but for those that are fully masked (0 or NaN), and none is negative."""
    if tensor.dim() not in (3, 4) or not tensor.is_floating_point() or not tensor.numel():
        return False
    sums = tensor.float().sum(-1)
    sound = ((sums - 1).abs() <= row_sum_tolerance(tensor.dtype)) | (sums == 0) | sums.isnan()
    return bool(sound.all() and (sums > 0).any() and not (tensor < 0).any())


def _describe(item: Item, tensor: Tensor) -> str:
    return "".join(f"[{key}]" for key in item) + f" {tuple(tensor.shape)}"
