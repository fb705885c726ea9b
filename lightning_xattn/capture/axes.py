"""What the tokens that a module got tell of the attention it computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from lightning_xattn.capture.weights import RecordedWeights


@dataclass(frozen=True)
class Tokens:
    """The tokens among a module's inputs.

    Attributes
    ----------
    batch
        Number of samples; None where the inputs do not agree.
    counts
        Number of tokens of each different sequence.
    elsewhere
        What else may be a number of tokens: of images' pixels, and of sequences with a class token or a null key.
    widths
        Of the sequences.
    sequence_first
        How many samples there are if all sequences are ``(tokens, batch, width)``; None: they are not.
    kinds
        Number of different sequences and of images' shapes.
    """

    batch: int | None
    counts: tuple[int, ...]
    elsewhere: frozenset[int]
    widths: frozenset[int]
    sequence_first: int | None
    kinds: int

    @classmethod
    def among(cls, inputs: Iterable[Any], shape: Sequence[int]) -> Tokens:
        """The tokens among the inputs of a module whose attention has this shape, ``(..., queries, keys)``."""
        tokens = token_inputs(inputs, shape)
        sequences = list({value.data_ptr(): value for value in tokens if value.dim() == 3}.values())
        maps = [value.shape for value in tokens if value.dim() > 3]
        batches = {len(value) for value in tokens}
        batches = batches - {1} or batches  # what is of one sample among others goes for all of them
        second = {value.shape[1] for value in sequences} if sequences and not maps else set()
        sequence_first = second.pop() if len(second) == 1 else None
        batch, axis = (batches.pop(), 1) if len(batches) == 1 else (sequence_first, 0)
        counts = tuple(value.shape[axis] for value in sequences)
        return cls(
            batch,
            counts,
            frozenset(n for one in maps for n in (prod(one[2:]), prod(one[1:-1]))) | {n + 1 for n in counts},
            frozenset(value.shape[2] for value in sequences),
            sequence_first,
            len({value.data_ptr() for value in sequences if len(value) in (batch, shape[0])}) + len(set(maps)),
        )

    def are_asked_by(self, shape: Sequence[int]) -> bool:
        """Whether the last two axes are numbers of tokens, as those of attention are."""
        return {*shape[-2:]} <= {*self.counts, *self.elsewhere}

    def doubt(self, recorded: RecordedWeights, by_kernel: bool) -> str | None:
        """Why the axes of weights seem not to be ``(batch, heads, queries, keys)``, as a clause; None: nothing says so.

        Parameters
        ----------
        recorded
            The attention.
        by_kernel
            Whether a fused kernel computed it, whose keys are surely keys.
        """
        rows, heads, queries, keys = recorded.weights.shape
        if self.batch not in (None, rows) and self.sequence_first != rows:
            assert self.batch is not None
            if heads == self.batch and not recorded.one_head:
                return "it seems to be (heads, batch, queries, keys)"
            if rows % self.batch == 0:
                return f"its first axis seems to hold more than the {self.batch} samples: heads, windows or frames"
        if rows == self.batch and queries != 1 and queries not in self.counts:
            others = [*self.counts]
            if keys in others:
                others.remove(keys)
            if heads in others:
                return "it seems to be (batch, queries, heads, keys)"
        if not by_kernel and heads * keys in self.widths and keys not in {*self.counts, *self.elsewhere}:
            return "its last axis seems to be the width of a head, so that it is no attention to tokens"
        return None


def token_inputs(inputs: Iterable[Any], shape: Sequence[int]) -> list[Tensor]:
    """Those of a module's inputs that may be tokens: floating, with three axes or more, and no scores or masks.

    Parameters
    ----------
    inputs
        What the module got.
    shape
        Of its attention, ``(..., queries, keys)``.
    """
    tensors = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    scores = {tuple(shape), (shape[0], *shape[2:]) if shape[1] == 1 else None}
    tensors = [value for value in tensors if value.dim() > 2 and not value.is_nested and value.shape not in scores]
    masks = (tuple(shape[-2:]), (1, shape[-1]))
    # Sequences as long and wide as there are queries and keys look like masks, too.
    return [one for one in tensors if one.shape[-2:] not in masks] or [one for one in tensors if one.dim() == 3]
