"""How is a query's attention spread over its keys?

Every function of attention takes weights ``(batch, heads, queries, keys)`` with a ``key_mask`` where some keys are
padding, or an ``Attention`` with all of its masks, or what `prepare_rows` makes of either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_xattn.core.attention import Attention, Direction
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.functional.row_chunks import WEIGHT_FLOOR, read_chunks
from lightning_xattn.functional.row_collector import RowCollector, Rows

Weights = Tensor | Attention | Rows
"""Attention as every function takes it, see `prepare_rows`."""


def prepare_rows(weights: Weights, key_mask: Tensor | None = None) -> Rows:
    """What statistics need of the rows, all of it computed once.

    A row is valid when its query is a real token, it has at least one valid key, it is finite and sums to 1
    within ``row_sum_tolerance``. A row of half precision is scaled back to sum to 1.

    Parameters
    ----------
    weights
        ``(batch, heads, queries, keys)``, after the softmax and before dropout; or an ``Attention``; or ``Rows``, which
        come back as they are.
    key_mask
        ``(batch, keys)`` bool, True where the key is a real token; None: all are. Only with a tensor.

    Raises
    ------
    SettingError
        If ``weights`` is of another type, or has its masks and gets another one.
    ShapeError
        If the weights do not have four axes, or the mask does not fit them.

    Examples
    --------
    >>> prepare_rows(torch.tensor([[[[0.5, 0.5, 0.0]]]]), key_mask=torch.tensor([[True, True, False]])).keys
    tensor([[[2.]]])
    >>> weights = torch.tensor([[[[0.5, 0.5], [0.9, 0.9]]]])  # the second row is no attention
    >>> prepare_rows(Attention(Direction("eeg", "spec"), weights)).valid
    tensor([[[ True, False]]])
    """
    if key_mask is not None and isinstance(weights, (Attention, Rows)):
        raise SettingError(f"key_mask goes with a tensor alone: {weights!r} has its masks already.")
    if isinstance(weights, Rows):
        return weights
    if isinstance(weights, Tensor):
        weights = Attention(Direction("query", "key"), weights, key_mask)
    if not isinstance(weights, Attention):
        raise SettingError(
            f"Weights must be a tensor (batch, heads, queries, keys), an Attention or Rows; got a "
            f"{type(weights).__name__}. torch.as_tensor(weights) makes a tensor."
        )
    collector = RowCollector(weights)
    for chunk in read_chunks(weights):
        collector.add(chunk)
    return collector.finish()


def has_single_keys(rows: Rows, samples: int | slice = slice(None)) -> bool:
    """Whether these samples have valid rows, all of them of a single valid key: their attention holds no information.

    Examples
    --------
    >>> has_single_keys(prepare_rows(Attention(Direction("eeg", "spec"), torch.ones(1, 8, 9, 1))))
    True
    """
    valid, several = rows.valid[samples], (rows.valid & (rows.keys > 1))[samples]
    return bool(valid.any()) and not bool(several.any())


def entropy(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """``-sum a ln a / ln K_q``, ``(batch, heads)`` in [0, 1]: 0 = one key, 1 = diffuse; leaves out rows of one key.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> entropy(weights)
    tensor([[0.5000]])
    >>> entropy(weights, key_mask=torch.tensor([[True, True]]))
    tensor([[0.5000]])
    """
    rows = prepare_rows(weights, key_mask)
    normalised = (rows.entropy / rows.keys.log()).clamp(0, 1)
    is_defined = rows.is_whole and rows.attention.shape[3] > 1
    return rows.mean(normalised, None if is_defined else rows.valid & (rows.keys > 1))


def effective_keys(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """``exp(-sum a ln a)``, ``(batch, heads)`` in [1, K_q]: how many keys a row really uses.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> effective_keys(weights)
    tensor([[1.5000]])
    """
    rows = prepare_rows(weights, key_mask)
    return rows.mean(rows.entropy.exp())


def effective_share(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """``exp(-sum a ln a) / K_q``, ``(batch, heads)`` in [1 / K_q, 1]: which share of its keys a row really uses.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> effective_share(weights)
    tensor([[0.7500]])
    """
    rows = prepare_rows(weights, key_mask)
    return rows.mean(rows.entropy.exp() / rows.keys)


def max_weight(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """Largest weight of a row, ``(batch, heads)`` in [1 / K_q, 1]: a head's "confidence" (Voita et al. 2019).

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> max_weight(weights)
    tensor([[0.7500]])
    """
    rows = prepare_rows(weights, key_mask)
    return rows.mean(rows.largest)


def min_weight(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """Smallest weight of a row over its valid keys, ``(batch, heads)`` in [0, 1 / K_q].

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> min_weight(weights)
    tensor([[0.2500]])
    """
    rows = prepare_rows(weights, key_mask)
    weights = rows.weights if rows.visible is None else rows.weights.masked_fill(~rows.visible, torch.inf)
    return rows.mean(weights.amin(-1))


def sparsity(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """Percentage of valid keys below ``SPARSITY_THRESHOLD``, ``(batch, heads)`` in [0, 100].

    With more than ``1 / SPARSITY_THRESHOLD`` keys even uniform attention scores 100.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> sparsity(weights)
    tensor([[25.]])
    """
    rows = prepare_rows(weights, key_mask)
    # Hidden keys have weight 0, so they are below every threshold: they are taken out again.
    hidden = rows.attention.shape[3] - rows.keys
    return rows.mean(100 * (rows.sparse - hidden) / rows.keys)


def std(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """Population standard deviation of a row over its valid keys, ``(batch, heads)``.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> std(weights)
    tensor([[0.2500]])
    """
    rows = prepare_rows(weights, key_mask)
    centred = rows.weights - 1 / rows.keys[..., None]
    if rows.visible is not None:
        centred = centred.masked_fill(~rows.visible, 0)
    return rows.mean(torch.linalg.vector_norm(centred, dim=-1) / rows.keys.sqrt())


def mean(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """Mean weight of a row, ``(batch, heads)``: always ``1 / K_q``, whatever the model learned.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> mean(weights)
    tensor([[0.5000]])
    """
    rows = prepare_rows(weights, key_mask)
    return rows.mean((1 / rows.keys).expand(rows.valid.shape))


def cross_modal_mass(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """Share of a query's attention that crosses over to the other modality of a joint sequence, ``(batch, heads)``.

    In [0, 1], averaged over the queries that are real tokens. As in a joint sequence a query may attend to its own
    modality too, this is the weight of all other numbers, which describe the cross-modal part alone.

    Raises
    ------
    ShapeError
        If the rows are not from a joint sequence.

    Examples
    --------
    >>> weights, before = torch.full((1, 1, 2, 4), 0.25), torch.tensor([[[0.2, 0.4]]])
    >>> cross_modal_mass(prepare_rows(Attention(Direction("eeg", "spec"), weights, cross_modal_mass=before)))
    tensor([[0.3000]])
    """
    rows = prepare_rows(weights, key_mask)
    if rows.cross_modal_mass is None:
        raise ShapeError(f"The attention {rows.direction} is no block of a joint sequence, so nothing crosses over.")
    return rows.cross_modal_mass.nanmean(-1)


ROW_STATISTICS = {
    "entropy": entropy,
    "effective_keys": effective_keys,
    "effective_share": effective_share,
    "max": max_weight,
    "min": min_weight,
    "sparsity": sparsity,
    "std": std,
    "mean": mean,
}
"""Every row statistic by name: each the mean over the valid rows of a head, NaN where no row defines it."""


def row_statistics(weights: Weights, key_mask: Tensor | None = None) -> dict[str, Tensor]:
    """All of ``ROW_STATISTICS``, each ``(batch, heads)``.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> numbers = row_statistics(weights)
    >>> numbers["max"], numbers["min"]
    (tensor([[0.7500]]), tensor([[0.2500]]))
    """
    rows = prepare_rows(weights, key_mask)
    return {name: statistic(rows) for name, statistic in ROW_STATISTICS.items()}


def shannon_entropy(weights: Tensor) -> Tensor:
    """``-sum a ln a`` in nats over the last axis, of numbers that sum to 1 there.

    Examples
    --------
    >>> shannon_entropy(torch.tensor([0.5, 0.5]))
    tensor(0.6931)
    """
    return weights.clamp_min(WEIGHT_FLOOR).log_().mul_(weights).sum(-1).neg_()
