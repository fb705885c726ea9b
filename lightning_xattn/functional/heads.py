"""What do the heads attend to, does it depend on the query, and do they differ?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_xattn.core.errors import SettingError
from lightning_xattn.functional.rows import Weights, prepare_rows, shannon_entropy

SINK_QUERIES = 4
"""With fewer valid queries than this no head has a sink."""


def received_attention(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """How much attention a key receives: its weight, averaged over heads and queries.

    Returns
    -------
    Tensor
        ``(batch, keys)`` over the keys that are tokens, in [0, 1]; NaN for a key that no valid row can see.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> received_attention(weights)
    tensor([[0.7500, 0.2500]])
    """
    rows = prepare_rows(weights, key_mask)
    count = rows.valid.shape[1] * rows.counts if isinstance(rows.counts, int) else rows.counts.sum(1, keepdim=True)
    received = rows.received.sum(1) / count
    if rows.seen is not None:
        received = received.masked_fill(~rows.seen.any(1), torch.nan)
    return received[:, : rows.tokens]


def require_heads(expected: int | None, heads: int, where: str) -> None:
    """Refuse another number of heads than expected (None: any), with a SettingError that names ``where``.

    Examples
    --------
    >>> require_heads(8, 4, "eeg_to_spec")
    Traceback (most recent call last):
        ...
    lightning_xattn.core.errors.SettingError: ...
    """
    if expected not in (None, heads):
        raise SettingError(
            f"{where}: expected num_heads={expected}, but there are {heads} heads. Pass num_heads={heads}, or None to "
            "take what there is."
        )


def query_selectivity(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """How much a head's attention depends on the query: ``[H(mean_q a_q) - mean_q H(a_q)] / ln K``.

    Returns
    -------
    Tensor
        ``(batch, heads)`` in [0, 1]. 0: every query attends alike and the head is a fixed pooling. NaN with a
        single valid key (K) or a single valid query, which cannot differ from itself.

    Examples
    --------
    >>> weights = torch.eye(2)[None, None]  # each query has a key of its own
    >>> query_selectivity(weights)
    tensor([[1.]])
    """
    rows = prepare_rows(weights, key_mask)
    queries, seen = rows.counts, rows.keys_seen
    pooled = rows.received / (queries if isinstance(queries, int) else queries[..., None])
    excess = shannon_entropy(pooled) - rows.mean(rows.entropy)
    return _where_both((queries, 2), (seen, 2), (excess / _log(seen)).clamp(0, 1))


def head_diversity(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """How much the heads differ: ``mean_q [H(mean_h a_h) - mean_h H(a_h)] / min(ln H, ln K_q)``.

    The generalised Jensen-Shannon divergence between heads, over the queries that are valid in every head. ``K_q`` is
    the number of keys that any head can see, as the mean is over all of them.

    Returns
    -------
    Tensor
        ``(batch,)`` in [0, 1]. 0: all heads alike. NaN with one head or where no row has two valid keys.

    Examples
    --------
    >>> weights = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # each head has a key of its own
    >>> head_diversity(weights)
    tensor([1.])
    """
    rows = prepare_rows(weights, key_mask)
    heads = rows.valid.shape[1]
    if rows.head_mean_entropy is None:
        return torch.full_like(rows.entropy[:, 0, 0], torch.nan)
    excess = rows.head_mean_entropy - rows.entropy.mean(1)
    diversity = (excess / rows.head_keys.log().clamp_max(math.log(heads))).clamp(0, 1)
    if rows.is_whole and rows.attention.shape[3] > 1:
        return diversity.mean(-1)
    defined = rows.valid.all(1) & (rows.head_keys > 1)
    return torch.where(defined, diversity, 0).sum(-1) / defined.sum(-1)


def sink(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """Largest mean weight that one key receives: ``max_k mean_q a[q, k]``, ``(batch, heads)`` in [1 / K, 1].

    The mean is over the valid queries. A key that is masked for a query has weight 0 there. A single query that looks
    elsewhere hides no sink.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.9, 0.1], [0.7, 0.3]]]])
    >>> sink(weights)
    tensor([[0.8000]])
    """
    rows = prepare_rows(weights, key_mask)
    return rows.received.amax(-1) / rows.counts


def sink_excess(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """How far a ``sink`` is above uniform attention: ``(sink - 1 / K) / (1 - 1 / K)``, ``(batch, heads)`` in [0, 1].

    K counts the keys that some valid query can see. One threshold suits few keys and many.

    Returns
    -------
    Tensor
        ``(batch, heads)``; NaN with a single valid key or fewer than ``SINK_QUERIES`` valid queries, which may all look
        at one key by chance.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.9, 0.1], [0.7, 0.3], [0.9, 0.1], [0.7, 0.3]]]])
    >>> sink_excess(weights)
    tensor([[0.6000]])
    """
    rows = prepare_rows(weights, key_mask)
    keys = rows.keys_seen
    uniform = 1 / keys
    rest = 1 - uniform if isinstance(uniform, Tensor) else max(1 - uniform, torch.finfo(rows.received.dtype).tiny)
    return _where_both((keys, 2), (rows.counts, SINK_QUERIES), ((sink(rows) - uniform) / rest).clamp(0, 1))


Count = Tensor | int


def _log(count: Count) -> Tensor | float:
    return count.log() if isinstance(count, Tensor) else math.log(max(count, 2))


def _where_both(one: tuple[Count, int], other: tuple[Count, int], values: Tensor) -> Tensor:
    """The values where two counts are as large as their limits, else NaN; of numbers nothing is computed."""
    first, second = (count >= least for count, least in (one, other))
    if isinstance(first, bool) and isinstance(second, bool):
        return values if first and second else torch.full_like(values, torch.nan)
    return torch.where(torch.as_tensor(first, device=values.device) & second, values, torch.nan)
