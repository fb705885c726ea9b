"""How much attention does each key get from each query, and which pairs have the most?

A weight depends on how many keys share the attention (0.008 is uniform for 119 keys). The lift compares any two
directions: 3 is three times uniform attention, for any number of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_xattn.functional.row_collector import Rows
from lightning_xattn.functional.rows import Weights, prepare_rows


def lift(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """``a[q, k] * K_q``, with K_q the number of keys that query q can see.

    Returns
    -------
    Tensor
        ``(batch, heads, queries, keys)`` over the keys that are tokens, in [0, K_q], 1 where attention is uniform; NaN
        in rows that are not valid and at keys that a mask hides.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> lift(weights).tolist()
    [[[[1.0, 1.0], [2.0, 0.0]]]]
    """
    rows = prepare_rows(weights, key_mask)
    values = (rows.weights * rows.keys[..., None])[..., : rows.tokens]
    defined = rows.valid[..., None]
    if rows.token_visible is not None:
        defined = defined & rows.token_visible
    return values.masked_fill(~defined, torch.nan)


def lift_map(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """``lift`` averaged over the heads where it is defined: ``(batch, queries, keys)``, else NaN.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> lift_map(weights).tolist()
    [[[1.0, 1.0], [2.0, 0.0]]]
    """
    return lift(weights, key_mask).nanmean(1)


def received_lift(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """``lift`` averaged over heads and queries: how much attention a key receives.

    Returns
    -------
    Tensor
        ``(batch, keys)`` over the keys that are tokens, 1 where it is what uniform attention gives; NaN for a key that
        no valid row can see.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> received_lift(weights)
    tensor([[1.5000, 0.5000]])
    """
    return lift(weights, key_mask).nanmean((1, 2))


class TopPair(NamedTuple):
    """A query and a key.

    Attributes
    ----------
    query, key
        Their places among the tokens.
    weight
        Mean attention, in [0, 1].
    lift
        Mean of ``weight * K_q``: how many times what uniform attention gives.

    Examples
    --------
    >>> TopPair(query=1, key=0, weight=0.75, lift=1.5).key
    0
    """

    query: int
    key: int
    weight: float
    lift: float


def top_pairs(weights: Weights, top_k: int, key_mask: Tensor | None = None) -> list[TopPair]:
    """Largest weights of the map that is averaged over batch and heads, the largest first.

    Cells that no valid row sees, and keys that are no tokens, are left out, so there may be fewer than ``top_k``. A
    head that may not attend to a key contributes weight 0 where another head may; the lift is the mean of the others.
    Equal weights stand in the order of queries, then of keys.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [0.75, 0.25]]]])
    >>> top_pairs(weights, top_k=1)
    [TopPair(query=1, key=0, weight=0.75, lift=1.5)]
    """
    rows = prepare_rows(weights, key_mask)
    weights, lifts = _mean_maps(rows, (0, 1))
    (pairs,) = _largest(weights[None], lifts[None], top_k)
    return pairs


def sample_top_pairs(weights: Weights, top_k: int, key_mask: Tensor | None = None) -> list[list[TopPair]]:
    """For each sample what ``top_pairs`` gives of it alone: the map is averaged over heads.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [0.75, 0.25]]]])
    >>> sample_top_pairs(weights, top_k=1)
    [[TopPair(query=1, key=0, weight=0.75, lift=1.5)]]
    """
    rows = prepare_rows(weights, key_mask)
    return _largest(*_mean_maps(rows, (1,)), top_k)


def head_top_pairs(weights: Weights, top_k: int, key_mask: Tensor | None = None) -> list[list[TopPair]]:
    """For each head what ``top_pairs`` gives of it alone: the map is averaged over the batch.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5]], [[0.25, 0.75]]]])  # two heads
    >>> [pair.key for (pair,) in head_top_pairs(weights, top_k=1)]
    [0, 1]
    """
    rows = prepare_rows(weights, key_mask)
    return _largest(*_mean_maps(rows, (0,)), top_k)


def _mean_maps(rows: Rows, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean weight and mean lift of each cell over the batch (axis 0), the heads (1) or both; NaN where none sees it."""
    lifts = lift(rows)
    seen = (~lifts.isnan()).sum(over)
    if 1 in over:
        weights, count = _sum_heads(rows)
        weights, count = (weights.sum(0), count.sum(0)) if 0 in over else (weights, count)
    else:
        weights, count = rows.weights[..., : rows.tokens].sum(0), seen
    return weights / count, lifts.nansum(over) / seen


def _sum_heads(rows: Rows) -> tuple[Tensor, Tensor]:
    """As ``Rows.map_weights`` and ``Rows.map_heads``, of each token: ``(batch, queries, keys)``."""
    weights = rows.weights[..., : rows.tokens].sum(1)
    seen = rows.valid[..., None] if rows.token_visible is None else rows.valid[..., None] & rows.token_visible
    heads = (~rows.broken).sum(1)[..., None]
    return weights, torch.where(seen.any(1), heads, 0).expand(weights.shape)


def _largest(weights: Tensor, lifts: Tensor, top_k: int) -> list[list[TopPair]]:
    """Of each of ``(maps, queries, keys)``."""
    keys = weights.shape[-1]
    weights, lifts = weights.flatten(1), lifts.flatten(1)
    # Not topk: it does not say in which order it puts equal weights.
    order = weights.nan_to_num(nan=-1.0).argsort(dim=1, descending=True, stable=True)[:, :top_k]
    columns = (order.tolist(), weights.gather(1, order).tolist(), lifts.gather(1, order).tolist())
    return [
        [
            TopPair(cell // keys, cell % keys, weight, lift)
            for cell, weight, lift in zip(*of_map, strict=True)
            if weight == weight  # NaN is not
        ]
        for of_map in zip(*columns, strict=True)
    ]
