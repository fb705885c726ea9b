"""The scores of an attention, kept as the queries and keys whose products they are.

The weights of long sequences fill gigabytes, one for each query and key, while the queries and keys themselves are
small. So the weights are computed again when they are needed, of some queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

HIDDEN = -1e30
"""The score of a key that a mask hides: finite, so that no product with it is NaN."""

Tokens = slice | Tensor
"""Which tokens: the same of each sample, or places ``(batch, tokens)``."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What the scores of an attention are computed from: ``query @ key.mT`` and biases.

    Parameters
    ----------
    query, key
        ``(batch, heads, queries, width)`` and ``(batch, heads, keys, width)``, float32 or wider, the queries scaled.
    biases
        Each broadcastable to ``(batch, heads, queries, keys)``, added to the scores.
    query_places, key_places
        ``(1 or batch, queries)`` and ``(1 or batch, keys)``: under a causal mask the places in the sequence; a query
        sees no key that is after it. None: there is no causal mask.
    whole
        Where ``key`` has only the keys of one modality of a joint sequence: the scores of all of its keys.
    whole_masks
        Bool, each broadcastable to ``whole``, True where a mask shows the key.

    Examples
    --------
    >>> from lightning_xattn.core.scores import Scores
    >>> scores = Scores(torch.zeros(4, 8, 9, 16), torch.zeros(4, 8, 119, 16))
    >>> scores
    Scores(4 samples, 8 heads, 9 queries, 119 keys)
    >>> scores.rows(slice(0, 2)).shape
    torch.Size([4, 8, 2, 119])
    """

    query: Tensor
    key: Tensor
    biases: tuple[Tensor, ...] = ()
    query_places: Tensor | None = None
    key_places: Tensor | None = None
    whole: Scores | None = None
    whole_masks: tuple[Tensor, ...] = ()

    def __repr__(self) -> str:
        samples, heads, queries, keys = self.shape
        return f"Scores({samples} samples, {heads} heads, {queries} queries, {keys} keys)"

    @property
    def shape(self) -> torch.Size:
        """``(batch, heads, queries, keys)``."""
        return torch.Size((*self.query.shape[:-1], self.key.shape[-2]))

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.query.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the scores."""
        return self.query.dtype

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Scores:
        """The same with each tensor changed."""
        return Scores(
            change(self.query),
            change(self.key),
            tuple(map(change, self.biases)),
            None if self.query_places is None else change(self.query_places),
            None if self.key_places is None else change(self.key_places),
            None if self.whole is None else self.whole.map_tensors(change),
            tuple(map(change, self.whole_masks)),
        )

    def unfolded(self, unfold: Callable[[Tensor], Tensor]) -> Scores:
        """The same with heads and samples apart, where they were one axis."""
        return replace(self, query=unfold(self.query), key=unfold(self.key), biases=tuple(map(unfold, self.biases)))

    def take(self, queries: Tokens, keys: Tokens) -> Scores:
        """The scores of some queries and keys of a self-attention, which knows the scores of all keys.

        Parameters
        ----------
        queries, keys
            Which tokens.
        """
        places = None
        if self.query_places is not None and self.key_places is not None:
            places = pick(self.query_places, queries, 1), pick(self.key_places, keys, 1)
        query = pick(self.query, queries, 2)
        biases = tuple(pick(bias, queries, 2) for bias in self.biases)
        whole = replace(self, query=query, biases=biases, query_places=None if places is None else places[0])
        return replace(
            whole,
            key=pick(self.key, keys, 2),
            biases=tuple(pick(bias, keys, 3) for bias in biases),
            key_places=None if places is None else places[1],
            whole=whole,
        )

    def rows(self, queries: slice, out: Tensor | None = None) -> Tensor:
        """``(batch, heads, queries, keys)`` the scores of some queries, whatever masks hide; in ``out`` if given."""
        scores = torch.matmul(self.query[:, :, queries], self.key.mT, out=out)
        for bias in self.biases:
            scores += pick(bias, queries, 2)
        return scores

    def visible(self, queries: slice, keys: slice = slice(None)) -> Tensor | None:
        """``(1 or batch, 1, queries, keys)`` bool, True where a causal mask shows the key; None without one."""
        if self.query_places is None or self.key_places is None:
            return None
        return self.key_places[:, None, None, keys] <= self.query_places[:, None, queries, None]

    def weights(self, visible: Tensor | None = None) -> Tensor:
        """``(batch, heads, queries, keys)`` all weights at once, 0 where ``visible`` or a causal mask hides the key."""
        weights, masks = self.rows(slice(None)), [visible, self.visible(slice(None))]
        for mask in masks:
            if mask is not None:
                weights.masked_fill_(~mask, HIDDEN)
        weights = weights.softmax(-1)
        for mask in masks:
            if mask is not None:  # of a row without any key they would be uniform
                weights.masked_fill_(~mask, 0)
        return weights


def pick(tensor: Tensor, tokens: Tokens, axis: int) -> Tensor:
    """Some tokens of a tensor; as it is if it has one for all."""
    if tensor.shape[axis] == 1:
        return tensor
    if isinstance(tokens, slice):
        return tensor[(slice(None),) * axis + (tokens,)]
    shape = [1] * tensor.dim()
    shape[0], shape[axis] = tokens.shape
    return torch.take_along_dim(tensor, tokens.view(shape), axis)
