"""Whether the axes of weights are what they seem to be, as far as the tokens show that a module got."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_xattn.capture.weights import RecordedWeights


def token_inputs(inputs: Iterable[Any], weights: Tensor) -> list[Tensor]:
    """Those of a module's inputs that may be tokens: floating, with three axes or more, and no mask of the weights."""
    tensors = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    queries, keys = weights.shape[-2:]
    masks = ((queries, keys), (1, keys))
    return [value for value in tensors if value.dim() > 2 and not value.is_nested and value.shape[-2:] not in masks]


def has_heads_among_samples(recorded: RecordedWeights, inputs: Iterable[Any]) -> bool:
    """Whether weights without an axis for heads seem to have the heads folded into the axis of the samples.

    That is so where the tokens which the module got are all of as many samples, and the weights of a multiple.
    """
    samples = {len(value) for value in token_inputs(inputs, recorded.weights)}
    samples = samples - {1} or samples  # what is of one sample among others goes for all of them
    rows = len(recorded.weights)
    return recorded.one_head and len(samples) == 1 and samples != {rows} and rows % min(samples) == 0


def has_heads_behind_queries(weights: Tensor, inputs: Iterable[Any]) -> bool:
    """Whether weights with four axes seem to be ``(batch, queries, heads, keys)``, from the numbers of tokens."""
    tokens = {value.shape[1] for value in token_inputs(inputs, weights) if value.dim() == 3}
    return weights.shape[1] in tokens and weights.shape[2] not in tokens


def has_tokens_of_two_kinds(weights: Tensor, inputs: Iterable[Any]) -> bool:
    """Whether a module got two kinds of tokens: other tensors or, where they are split into heads, other shapes."""
    tokens = token_inputs(inputs, weights)
    kinds = {value.data_ptr() if value.dim() == 3 else value.shape for value in tokens}
    return len(kinds) > 1
