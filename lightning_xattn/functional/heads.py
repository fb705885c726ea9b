"""Do the queries of a head, and the heads of a layer, attend to different things?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_xattn.core.errors import SettingError
from lightning_xattn.functional.rows import WEIGHT_FLOOR, Rows, Weights, prepare_rows


def require_heads(expected: int | None, heads: int, where: str) -> None:
    """Refuse another number of heads than expected (None: any), with a SettingError that says where.

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
    queries = rows.valid.sum(-1)
    pooled = rows.weights.sum(2) / queries[..., None]
    excess = _entropy(pooled) - rows.entropy.sum(-1) / queries
    # K counts the keys that some valid query can see.
    seen = rows.keys[..., 0] if rows.visible is None else _keys_seen(rows)
    return torch.where((queries > 1) & (seen > 1), (excess / seen.log()).clamp(0, 1), torch.nan)


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
    heads = rows.weights.shape[1]
    keys = rows.keys.amax(1) if rows.visible is None else rows.visible.any(1).sum(-1)
    defined = rows.valid.all(1) & (keys > 1)
    excess = _entropy(rows.weights.mean(1)) - rows.entropy.mean(1)
    diversity = (excess / keys.log().clamp_max(math.log(heads))).clamp(0, 1)
    if heads == 1:
        return torch.full_like(diversity[:, 0], torch.nan)
    return torch.where(defined, diversity, 0).sum(-1) / defined.sum(-1)


def sink(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """How much of every query's attention goes to one and the same key, from 0 (what uniform attention gives) to 1.

    With ``s = max_k min_q a[q, k]`` over the valid queries it is ``(s - 1 / K) / (1 - 1 / K)``, floored at 0, so that
    one threshold suits few keys and many.

    Returns
    -------
    Tensor
        ``(batch, heads)`` in [0, 1]. NaN with a single valid key or fewer than two valid queries.

    Examples
    --------
    >>> weights = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])  # all queries have the same key
    >>> sink(weights)
    tensor([[1.]])
    """
    rows = prepare_rows(weights, key_mask)
    least = torch.where(rows.valid[..., None], rows.weights, 1).amin(2).amax(-1)
    keys = rows.keys.masked_fill(~rows.valid, 0).amax(-1)
    strength = ((least - 1 / keys) / (1 - 1 / keys)).clamp(0, 1)
    return torch.where((keys > 1) & (rows.valid.sum(-1) > 1), strength, torch.nan)


def _entropy(weights: Tensor) -> Tensor:
    return -(weights * weights.clamp_min(WEIGHT_FLOOR).log()).sum(-1)


def _keys_seen(rows: Rows) -> Tensor:
    assert rows.visible is not None
    return (rows.visible & rows.valid[..., None]).any(2).sum(-1).to(rows.weights.dtype)
