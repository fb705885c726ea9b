"""The rows of an attention, some queries at a time, so that no sequence is too long.

A chunk of about 4 MB stays in a processor's cache. Small attention is a single chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lightning_xattn.core import devices
from lightning_xattn.core.attention import Attention, row_sum_tolerance
from lightning_xattn.core.scores import HIDDEN, Scores

CHUNK = 2**20
"""A chunk has about so many weights: 4 MB in single precision."""

WEIGHT_FLOOR = 1e-12
"""Weights are floored here before a logarithm, so that a weight of 0 has one."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some queries' rows, made ready for statistics: hidden keys and invalid rows have weight 0.

    The next chunk may take its place in memory.

    Attributes
    ----------
    queries
        Which queries.
    weights
        ``(batch, heads, queries, keys)``, float32 or wider.
    visible
        Bool, broadcastable to ``weights``, True where no mask hides the key; None: everywhere.
    valid, broken, keys, entropy, largest, cross_modal_mass
        As those of ``Rows``.
    log_sums
        ``(batch, heads, queries)`` logarithm of the sum of the exponentials of a row's scores; None where only weights
        are known.
    is_whole
        Whether all rows are valid and see all keys, as far as that is known without waiting for a GPU.
    scratch
        As many numbers as there are weights, which mean nothing and may be written over.
    """

    queries: slice
    weights: Tensor
    visible: Tensor | None
    valid: Tensor
    broken: Tensor
    keys: Tensor
    entropy: Tensor
    largest: Tensor
    is_whole: bool
    scratch: Tensor
    cross_modal_mass: Tensor | None = None
    log_sums: Tensor | None = None


class Buffers:
    """Memory that one chunk after the other uses, as new memory takes longer than the arithmetic in it."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory of this shape, whatever is in it."""
        size = prod(shape)
        kept = self._kept.get(name)
        if kept is None or len(kept) < size:
            kept = self._kept[name] = like.new_empty(size)
        return kept[:size].view(shape)


def count_queries(weights: int) -> int:
    """The number of queries in a chunk, if each query has ``weights`` weights."""
    return max(1, CHUNK // max(1, weights))


def split_queries(attention: Attention) -> Iterator[slice]:
    """All queries of an attention, as many at a time as a chunk has."""
    batch, heads, queries, keys = attention.shape
    size = count_queries(batch * heads * keys)
    for start in range(0, max(queries, 1), size):
        yield slice(start, min(start + size, queries))


def read_chunks(attention: Attention) -> Iterator[Chunk]:
    """All rows of an attention, from the first query to the last."""
    read, buffers = _read_scores if isinstance(attention.source, Scores) else _read_weights, Buffers()
    for queries in split_queries(attention):
        yield read(attention, queries, buffers)


def _read_weights(attention: Attention, queries: slice, buffers: Buffers) -> Chunk:
    assert isinstance(attention.source, Tensor)
    dtype = attention.source.dtype
    weights = attention.source[:, :, queries].detach().to(torch.promote_types(dtype, torch.float32))
    visible = attention.visible_to(queries)
    if visible is not None:
        weights = weights.masked_fill(~visible, 0)
    keys = _count_keys(weights, visible)
    total = weights.sum(-1)
    # A comparison with NaN is False and an infinite sum is far from 1, so this is the check for finiteness too.
    valid, broken, mass = _judge(attention, queries, (total - 1).abs() <= row_sum_tolerance(dtype), keys)
    has_all = _surely_all(valid)
    if not has_all:
        weights = weights.masked_fill(~valid[..., None], 0)
    if dtype.itemsize < 4:  # half precision keeps a sum only up to its rounding
        weights = weights / torch.where(valid, total, 1)[..., None]
    logs = torch.clamp_min(weights, WEIGHT_FLOOR, out=buffers.take("logs", weights.shape, weights)).log_()
    entropy = logs.mul_(weights).sum(-1).neg_()
    is_whole = has_all and visible is None
    return Chunk(queries, weights, visible, valid, broken, keys, entropy, weights.amax(-1), is_whole, logs, mass)


def _read_scores(attention: Attention, queries: slice, buffers: Buffers) -> Chunk:
    source = attention.source
    assert isinstance(source, Scores)
    shape = *source.shape[:2], queries.stop - queries.start, source.shape[3]
    scores = source.rows(queries, buffers.take("scores", shape, source.query))
    visible = attention.visible_to(queries)
    if visible is not None:
        scores.masked_fill_(~visible, HIDDEN)
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores.sub_(top), out=buffers.take("weights", shape, scores))
    total = weights.sum(-1)
    mean_score = scores.mul_(weights).sum(-1) / total
    if not _surely_all(mean_score == mean_score):  # a score of -inf is no fault: its weight is 0
        finite = source.rows(queries, scores).sub_(top).clamp_min_(HIDDEN)
        if visible is not None:
            finite.masked_fill_(~visible, 0)
        mean_score = finite.mul_(weights).sum(-1) / total
    log_total = total.log()
    log_sums = log_total + top[..., 0]
    # A row with NaN or an infinite score; what hides keys is finite.
    keys, sound, mass = _count_keys(weights, visible), mean_score == mean_score, None
    if source.whole is not None:
        of_all = _log_sums_of_all(source, queries, buffers)
        # A query that sees no key at all has no share.
        mass = (log_sums - of_all).exp().clamp_max(1).masked_fill(of_all < HIDDEN / 2, torch.nan)
        # Below this a share is made of numbers with no precision left: the query attends to nothing here.
        crosses = mass > source.whole.shape[3] * torch.finfo(mass.dtype).smallest_normal
        keys, mass = keys.where(crosses | ~sound, 0), mass.masked_fill(~sound, torch.nan)
    valid, broken, mass = _judge(attention, queries, sound, keys, mass)
    weights.mul_(total.reciprocal()[..., None])
    entropy, largest, has_all = log_total - mean_score, total.reciprocal(), _surely_all(valid)
    if not has_all:
        weights.masked_fill_(~valid[..., None], 0)
        entropy, largest = entropy.where(valid, 0), largest.where(valid, 0)
    is_whole = has_all and visible is None
    return Chunk(queries, weights, visible, valid, broken, keys, entropy, largest, is_whole, scores, mass, log_sums)


def _log_sums_of_all(source: Scores, queries: slice, buffers: Buffers) -> Tensor:
    """Those of the rows over all keys of their joint sequence."""
    assert source.whole is not None
    shape = *source.shape[:2], queries.stop - queries.start, source.whole.shape[3]
    scores = source.whole.rows(queries, buffers.take("whole", shape, source.query))
    masks = [mask if mask.shape[2] == 1 else mask[:, :, queries] for mask in source.whole_masks]
    for mask in (*masks, source.whole.visible(queries)):
        if mask is not None:
            scores.masked_fill_(~mask, HIDDEN)
    top = scores.amax(-1, keepdim=True)
    return scores.sub_(top).exp_().sum(-1).log_() + top[..., 0]


def _count_keys(weights: Tensor, visible: Tensor | None) -> Tensor:
    """How many keys each row has."""
    if visible is None:
        return weights.new_full((1, 1, 1), weights.shape[-1])
    return visible.to(weights.dtype).sum(-1)


def _judge(
    attention: Attention, queries: slice, sound: Tensor, keys: Tensor, mass: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which rows are valid and which broken, and the cross-modal attention mass of those that have one."""
    expected = keys > 0
    if mass is not None and attention.key_mask is not None:  # a sample without the other modality has none
        mass = mass.masked_fill(~attention.key_mask.any(1)[:, None, None], torch.nan)
    if attention.cross_modal_mass is not None:
        mass = attention.cross_modal_mass[:, :, queries]
    if attention.query_mask is not None:
        is_token = attention.query_mask[:, None, queries]
        expected = expected & is_token
        mass = None if mass is None else mass.masked_fill(~is_token, torch.nan)
    return expected & sound, expected & ~sound, mass


def _surely_all(valid: Tensor) -> bool:
    """Whether all are valid; on a GPU, which would have to wait, it is not looked at."""
    return devices.reads_at_once(valid) and bool(valid.all())


class Columns:
    """The weights that all queries give to some keys: the opposite direction's rows, cut the other way.

    Parameters
    ----------
    attention
        Of these rows.
    valid, log_sums
        ``(batch, heads, queries)`` those of all chunks.
    """

    def __init__(self, attention: Attention, valid: Tensor, log_sums: Tensor | None) -> None:
        self._attention, self._valid, self._buffers = attention, valid, Buffers()
        self._has_all = _surely_all(valid)
        source = attention.source
        if isinstance(source, Scores):
            assert log_sums is not None
            self._log_sums = log_sums[:, :, None, :]
        elif source.dtype.itemsize < 4:
            self._total = source.sum(-1, dtype=torch.float32).where(valid, 1)[..., None]

    def read(self, keys: slice) -> Tensor:
        """``(batch, keys, queries)`` summed over the heads; 0 where a mask hides the key, or the row is not valid.

        The next call may write over it.
        """
        source, visible = self._attention.source, self._attention.visible_to(slice(None), keys)
        if not isinstance(source, Scores):
            weights = source[..., keys].detach()
            weights = weights / self._total if weights.dtype.itemsize < 4 else weights
            if visible is not None:
                weights = weights.masked_fill(~visible, 0)
            return (weights if self._has_all else weights.where(self._valid[..., None], 0)).sum(1).mT
        key = source.key[:, :, keys]
        shape = *key.shape[:3], source.query.shape[2]
        columns = torch.matmul(key, source.query.mT, out=self._buffers.take("columns", shape, key))
        # Not as one more column of the product, in which a GPU may round large numbers.
        columns -= self._log_sums
        for bias in source.biases:
            columns += (bias if bias.shape[3] == 1 else bias[..., keys]).mT
        if visible is not None:
            columns.masked_fill_(~visible.mT, HIDDEN)
        if not self._has_all:
            columns.masked_fill_(~self._valid[:, :, None, :], HIDDEN)
        batch, _, *rest = shape
        return torch.sum(columns.exp_(), 1, out=self._buffers.take("summed", (batch, *rest), key))
