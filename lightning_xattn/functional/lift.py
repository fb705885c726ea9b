"""How many times more attention than uniform attention would give: the number that compares any two directions.

A weight depends on how many keys share the attention (0.008 is uniform for 119 keys); a lift of 3 is three times
uniform for any number of keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
