"""What statistics need of an attention's rows, collected in one pass over its chunks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.core import devices
from lightning_xattn.core.attention import Attention, Direction
from lightning_xattn.functional.bins import add_rows, bin_sizes, sum_bins
from lightning_xattn.functional.row_chunks import WEIGHT_FLOOR, Buffers, Chunk, read_chunks, split_queries

SPARSITY_THRESHOLD = 0.1
"""A weight below this counts as sparse."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What statistics need of the rows of an attention, computed in one pass; nothing of all heads' weights is kept.

    Attributes
    ----------
    attention
        What they are the rows of.
    valid
        ``(batch, heads, queries)`` bool: the query is a real token, the row is finite, sums to 1 and has a key.
    broken
        ``(batch, heads, queries)`` bool: the query is a real token and has a key, yet the row is not finite or does
        not sum to 1.
    keys
        Number of valid keys of each row, float, broadcastable to ``valid``.
    entropy
        ``(batch, heads, queries)``, Shannon entropy in nats; 0 for an invalid row.
    largest
        ``(batch, heads, queries)``, the largest weight; 0 for an invalid row.
    sparse
        ``(batch, heads, queries)``, how many weights are below ``SPARSITY_THRESHOLD``, also those of hidden keys.
    head_mean_entropy
        ``(batch, queries)``, entropy in nats of the row that is averaged over the heads; None with a single head.
    head_keys
        Number of keys that any head can see, float, broadcastable to ``head_mean_entropy``.
    received
        ``(batch, heads, keys)``, the weights that each key gets from the valid rows, summed.
    seen
        ``(batch, 1 or heads, keys)`` bool, whether a valid row can see the key; None: each key that is there.
    map_weights, map_heads
        ``(batch, queries, keys)`` over the keys that are tokens: the weights of all heads together, and how many heads
        they are from, 0 where no valid row sees the key; in bins of ``bin_sizes`` they are sums over the cells
        of each bin.
    cross_modal_mass
        ``(batch, heads, queries)``, see ``Attention``; NaN where the query is no real token.
    log_sums
        ``(batch, heads, queries)`` logarithm of the sum of the exponentials of a row's scores; None where only weights
        are known.
    bin_sizes
        How many queries and keys a cell of the maps is of.
    is_whole
        Whether all rows are valid and see all keys, as far as that is known without waiting for a GPU.

    Examples
    --------
    >>> prepare_rows(Attention(Direction("eeg", "spec"), torch.full((4, 8, 9, 119), 1 / 119)))
    Rows(eeg_to_spec: 4 samples, 8 heads, 9 queries, 119 keys)
    """

    attention: Attention
    valid: Tensor
    broken: Tensor
    keys: Tensor
    entropy: Tensor
    largest: Tensor
    sparse: Tensor
    head_mean_entropy: Tensor | None
    head_keys: Tensor
    received: Tensor
    seen: Tensor | None
    map_weights: Tensor
    map_heads: Tensor
    cross_modal_mass: Tensor | None
    log_sums: Tensor | None
    bin_sizes: tuple[int, int]
    is_whole: bool

    def __repr__(self) -> str:
        samples, heads, queries, keys = self.attention.shape
        return f"Rows({self.direction}: {samples} samples, {heads} heads, {queries} queries, {keys} keys)"

    @property
    def direction(self) -> Direction:
        """Who asks whom."""
        return self.attention.direction

    @cached_property
    def counts(self) -> Tensor | int:
        """How many rows of each head are valid, ``(batch, heads)``; a number where all are."""
        return self.valid.shape[2] if self.is_whole else self.valid.sum(-1)

    @cached_property
    def keys_seen(self) -> Tensor | int:
        """How many keys some valid query can see, broadcastable to ``(batch, heads)``; a number where it sees all."""
        if self.is_whole:
            return self.attention.shape[3]
        if self.seen is None:
            return self.keys.amax(-1)
        return self.seen.sum(-1).to(self.received.dtype)

    @cached_property
    def invalid(self) -> Tensor:
        """``(batch,)`` how many rows are not valid."""
        if self.is_whole:
            return self.received.new_zeros(len(self.valid))
        return (~self.valid).sum((1, 2))

    def mean(self, values: Tensor, where: Tensor | None = None) -> Tensor:
        """``(batch, heads)`` the mean of values of rows, where they are defined (None: all valid rows); else NaN."""
        if where is None and self.is_whole:
            return values.mean(-1)
        where = self.valid if where is None else where
        return torch.where(where, values, 0).sum(-1) / where.sum(-1)

    @property
    def tokens(self) -> int:
        """How many keys are tokens, from the first on; the rest are slots of ``add_bias_kv`` or ``add_zero_attn``."""
        return self.attention.tokens

    @cached_property
    def weights(self) -> Tensor:
        """``(batch, heads, queries, keys)``, 0 at hidden keys and in invalid rows. All at once: for short sequences."""
        return torch.cat([chunk.weights.clone() for chunk in read_chunks(self.attention)], 2)

    @cached_property
    def visible(self) -> Tensor | None:
        """Bool, broadcastable to ``weights``, True where no mask hides the key; None: everywhere."""
        return self.attention.visible_to()

    @property
    def token_visible(self) -> Tensor | None:
        """``visible`` over the keys that are tokens."""
        return None if self.visible is None else self.visible[..., : self.tokens]

    @cached_property
    def wholly_masked(self) -> Tensor:
        """``(batch,)`` bool: masks hide all tokens of one modality, or all queries are padding.

        Of a block of a joint sequence only padding counts.
        """
        return _wholly_masked(self.attention)


class RowCollector:
    """Collects the `Rows` of an attention from its chunks, in the order of the queries.

    Parameters
    ----------
    attention
        Whose rows.
    keeps_maps
        Whether the weights of all heads together are kept of each token, beside the map in bins.
    """

    def __init__(self, attention: Attention, keeps_maps: bool = False) -> None:
        self._attention, self._keeps_maps = attention, keeps_maps
        self._whole_map: Tensor | None = None
        self._heads = attention.shape[1]
        self._sizes = bin_sizes(attention.shape[2], attention.tokens)
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        self._buffers = Buffers()
        self._received: Tensor | None = None
        self._seen: Tensor | None = None
        self._maps: tuple[Tensor, Tensor] | None = None
        self._is_whole = True

    @property
    def is_binned(self) -> bool:
        """Whether the maps are kept in bins."""
        return self._sizes != (1, 1)

    @property
    def whole_map(self) -> Tensor:
        """``(batch, queries, keys)`` over the keys that are tokens: the weights of all heads together, if kept."""
        assert self._whole_map is not None
        return self._whole_map

    def add(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Add the next chunk.

        Returns
        -------
        weights, heads
            ``(batch, queries, keys)`` over the keys that are tokens: the weights of all heads together, and how many
            heads they are from; the latter may be the same for all keys.
        """
        weights, visible, valid = chunk.weights, chunk.visible, chunk.valid
        self._is_whole &= chunk.is_whole
        total = self._sum_heads(weights)
        # Without a mask each row has as many keys.
        self._has_fixed_keys = visible is None and chunk.keys.shape == (1, 1, 1)
        keys = chunk.keys if self._has_fixed_keys else chunk.keys.expand(-1, -1, valid.shape[2])
        found = {
            "valid": valid,
            "broken": chunk.broken,
            "keys": keys,
            "entropy": chunk.entropy,
            "largest": chunk.largest,
            "sparse": _count_sparse(chunk),
            "head_keys": self._count_head_keys(keys, visible, total),
            "cross_modal_mass": chunk.cross_modal_mass,
            "log_sums": chunk.log_sums,
        }
        if self._heads > 1:
            found["head_mean_entropy"] = self._head_mean_entropy(total, chunk.scratch)
        for name, values in found.items():
            if values is not None:
                self._parts[name].append(values)
        received = weights.sum(2)
        self._received = received if self._received is None else self._received.add_(received)
        if visible is not None:
            alike = visible.shape[2] == 1
            seen = visible[:, :, 0] & valid.any(2)[..., None] if alike else (visible & valid[..., None]).any(2)
            self._seen = seen if self._seen is None else self._seen | seen
        total = total[..., : self._attention.tokens]
        heads = self._count_heads(chunk, total)
        self._add_map(total, heads, chunk.queries.start)
        if self._keeps_maps:
            if self._whole_map is None:
                self._whole_map = total.new_empty(len(total), self._attention.shape[2], total.shape[2])
            self._whole_map[:, chunk.queries] = total
        return total, heads

    def _count_head_keys(self, keys: Tensor, visible: Tensor | None, total: Tensor) -> Tensor:
        """How many keys any head can see."""
        if visible is None or visible.shape[1] == 1:
            return keys.amax(1)
        return visible.any(1).to(total.dtype).sum(-1).expand(-1, total.shape[1])

    def _sum_heads(self, weights: Tensor) -> Tensor:
        is_kept = not self.is_binned
        if self._heads == 1:  # the next chunk may write over the weights
            return weights[:, 0].clone() if is_kept else weights[:, 0]
        if is_kept:
            return weights.sum(1)
        batch, _, *rest = weights.shape
        return torch.sum(weights, 1, out=self._buffers.take("total", (batch, *rest), weights))

    def _head_mean_entropy(self, total: Tensor, scratch: Tensor) -> Tensor:
        """That of ``total / heads``, of rows that are valid in all heads: ``ln(heads) - sum(t ln t) / heads``."""
        heads = self._heads
        logs = torch.clamp_min(total, WEIGHT_FLOOR, out=scratch.flatten()[: total.numel()].view_as(total)).log_()
        return math.log(heads) - logs.mul_(total).sum(-1) / heads

    def _count_heads(self, chunk: Chunk, total: Tensor) -> Tensor:
        """How many heads each cell is from: those whose row is not broken, where a valid row sees the key."""
        if chunk.is_whole:
            return total.new_full((1, 1, 1), self._heads)
        whole = (~chunk.broken).to(total.dtype).sum(1)[..., None]
        valid, visible = chunk.valid[..., None], chunk.visible
        if visible is None:
            return whole * valid.any(1)
        visible = visible[..., : total.shape[-1]]
        seen = (valid & visible).any(1) if visible.shape[1] > 1 else valid.any(1) & visible[:, 0]
        return whole * seen

    def _add_map(self, total: Tensor, heads: Tensor, first: int) -> None:
        if not self.is_binned:
            self._parts["map_weights"].append(total)
            self._parts["map_heads"].append(heads.expand(total.shape))
            return
        by_query, by_key = self._sizes
        if self._maps is None:
            batch, _, queries, _ = self._attention.shape
            bins = math.ceil(queries / by_query), math.ceil(total.shape[-1] / by_key)
            self._maps = total.new_zeros(batch, *bins), total.new_zeros(batch, *bins)
        if heads.shape[-1] == 1:
            heads = heads * sum_bins(total.new_ones(total.shape[-1]), by_key)
        else:
            heads = sum_bins(heads, by_key)
        heads = heads.expand(*total.shape[:2], -1)
        for sums, values in zip(self._maps, (sum_bins(total, by_key), heads), strict=True):
            add_rows(sums, values, first, by_query)

    def finish(self) -> Rows:
        """The rows of all chunks."""
        whole = {name: self._join(name, parts) for name, parts in self._parts.items()}
        if self._maps is not None:
            whole["map_weights"], whole["map_heads"] = self._maps
        assert self._received is not None
        found: dict[str, Any] = dict.fromkeys(("head_mean_entropy", "cross_modal_mass", "log_sums")) | whole
        return Rows(
            self._attention,
            received=self._received,
            seen=self._seen,
            bin_sizes=self._sizes,
            is_whole=self._is_whole,
            **found,
        )

    def _join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1 or (self._has_fixed_keys and name in ("keys", "head_keys")):
            return parts[0]
        return torch.cat(list(parts), 1 if name.startswith("map_") else -1)


def _count_sparse(chunk: Chunk) -> Tensor:
    """How many weights of each row are below ``SPARSITY_THRESHOLD``."""
    largest = chunk.largest
    if devices.reads_at_once(largest) and largest.numel() and float(largest.max()) < SPARSITY_THRESHOLD:
        return torch.full_like(largest, chunk.weights.shape[-1])  # as usual with many keys
    # A sum of booleans takes many times as long as one of floats.
    return torch.lt(chunk.weights, SPARSITY_THRESHOLD, out=chunk.scratch).sum(-1)


def _wholly_masked(attention: Attention) -> Tensor:
    masked = torch.zeros(len(attention), dtype=torch.bool, device=attention.device)
    # What an attention mask hides of a joint sequence may be the other modality as such, as a causal mask does.
    if attention.visible is None or attention.is_block:
        if attention.key_mask is not None:
            masked = masked | ~attention.key_mask[:, : attention.tokens].any(1)
    else:
        seen = masked
        for queries in split_queries(attention):
            visible = attention.visible_to(queries)
            assert visible is not None
            seen = seen | visible[..., : attention.tokens].flatten(1).any(1)
        masked = ~seen
    return masked if attention.query_mask is None else masked | ~attention.query_mask.any(1)
