"""What the tokens that a module got tell of its attention: what its axes are, and whether it goes across."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lightning_xattn.capture.weights import RecordedWeights


def token_inputs(inputs: Iterable[Any], shape: Sequence[int]) -> list[Tensor]:
    """Those of a module's inputs that may be tokens: floating, with three axes or more, and no mask of the attention.

    Parameters
    ----------
    inputs
        What the module got.
    shape
        Of the attention; its last two axes are queries and keys.
    """
    masks = (tuple(shape[-2:]), (1, shape[-1]))
    tensors = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    return [value for value in tensors if value.dim() > 2 and not value.is_nested and value.shape[-2:] not in masks]


def token_counts(inputs: Iterable[Any], shape: Sequence[int]) -> list[int]:
    """The number of tokens of each different input ``(batch, tokens, width)``."""
    sequences = {value.data_ptr(): value for value in token_inputs(inputs, shape) if value.dim() == 3}
    return [value.shape[1] for value in sequences.values()]


def is_over_tokens(shape: Sequence[int], inputs: Iterable[Any]) -> bool:
    """Whether the last two axes are numbers of tokens, as those of attention are."""
    return {*shape[-2:]} <= {*token_counts(inputs, shape)}


def axes_in_doubt(recorded: RecordedWeights, inputs: Sequence[Any]) -> str | None:
    """What the axes of weights seem to be instead of ``(batch, heads, queries, keys)``, as a clause; None: nothing."""
    shape = tuple(recorded.weights.shape)
    tokens = token_inputs(inputs, shape)
    samples = {len(value) for value in tokens}
    samples = samples - {1} or samples  # what is of one sample among others goes for all of them
    sequence_first = all(value.shape[1] == shape[0] for value in tokens)
    if len(samples) == 1 and samples != {shape[0]} and not sequence_first:
        (batch,) = samples
        if recorded.one_head and shape[0] % batch == 0:
            return "heads seem to be folded into the samples"
        if not recorded.one_head and shape[1] == batch:
            return "it seems to be (heads, batch, queries, keys)"
    counts = token_counts([value for value in tokens if len(value) == shape[0]], shape)
    if shape[2] not in counts:
        if shape[3] in counts:
            counts.remove(shape[3])
        if shape[1] in counts:
            return "it seems to be (batch, queries, heads, keys)"
    return None


def has_tokens_of_two_kinds(inputs: Iterable[Any], shape: Sequence[int]) -> bool:
    """Whether a module got two kinds of tokens: other tensors or, where they are split into heads, other shapes."""
    tokens = token_inputs(inputs, shape)
    return len({value.data_ptr() if value.dim() == 3 else value.shape for value in tokens}) > 1
