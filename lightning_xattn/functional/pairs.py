"""Which query and key have the most attention?"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_xattn.functional.rows import Rows, Weights, prepare_rows


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

    A cell's mean runs over the valid rows that see its key; cells that none sees, and keys that are no tokens, are
    left out, so there may be fewer than ``top_k``. Equal weights stand in the order of queries, then of keys.

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
    """Mean weight and mean lift of each cell; NaN where no valid row sees the key."""
    weights = rows.weights[..., : rows.tokens]
    seen = rows.valid[..., None] if rows.token_visible is None else rows.valid[..., None] & rows.token_visible
    count = seen.expand(weights.shape).sum(over)
    return weights.sum(over) / count, (weights * rows.keys[..., None]).sum(over) / count


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
