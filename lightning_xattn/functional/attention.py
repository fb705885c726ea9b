"""How is a query's attention spread over its keys, and do queries and heads attend to the same things?

Every function of attention takes weights ``(batch, heads, queries, keys)`` with a ``key_mask`` where some keys are
padding, or an ``Attention`` with all of its masks, or what `prepare_rows` makes of either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_xattn.core.attention import Attention, Direction, row_sum_tolerance
from lightning_xattn.core.errors import SettingError, ShapeError

WEIGHT_FLOOR = 1e-12
"""Weights are floored here before a logarithm, so that a weight of 0 has one."""

SPARSITY_THRESHOLD = 0.1
"""A weight below this counts as sparse."""

SINK_QUERIES = 4
"""With fewer valid queries than this no head has a sink."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Attention made ready for statistics: float32 or wider, with hidden keys and invalid rows set to 0.

    Attributes
    ----------
    direction
        Who asks whom.
    weights
        ``(batch, heads, queries, keys)``.
    log_weights
        Natural logarithm of ``weights`` floored at ``WEIGHT_FLOOR``, same shape.
    valid
        ``(batch, heads, queries)`` bool: the query is a real token, the row is finite, sums to 1 and has a key.
    broken
        ``(batch, heads, queries)`` bool: the query is a real token and has a key, yet the row is not finite or does
        not sum to 1.
    keys
        Number of valid keys of each row, float, broadcastable to ``valid``.
    entropy
        ``(batch, heads, queries)``, Shannon entropy in nats; 0 for an invalid row.
    visible
        Bool, broadcastable to ``weights``, True where no mask hides the key; None: everywhere.
    tokens
        How many keys are tokens, from the first on; the rest are slots of ``add_bias_kv`` or ``add_zero_attn``.
    cross_modal_mass
        ``(batch, heads, queries)``, see ``Attention``; NaN where the query is no real token.
    wholly_masked
        ``(batch,)`` bool: masks hide all tokens of one modality, so that no query of the sample has a key, or all of
        its queries are padding. Of a block of a joint sequence only padding counts.

    Examples
    --------
    >>> prepare_rows(Attention(Direction("eeg", "spec"), torch.full((4, 8, 9, 119), 1 / 119)))
    Rows(eeg_to_spec: 4 samples, 8 heads, 9 queries, 119 keys)
    """

    direction: Direction
    weights: Tensor
    log_weights: Tensor
    valid: Tensor
    broken: Tensor
    keys: Tensor
    entropy: Tensor
    visible: Tensor | None
    tokens: int
    cross_modal_mass: Tensor | None
    wholly_masked: Tensor

    def __repr__(self) -> str:
        samples, heads, queries, keys = self.weights.shape
        return f"Rows({self.direction}: {samples} samples, {heads} heads, {queries} queries, {keys} keys)"

    @property
    def token_visible(self) -> Tensor | None:
        """``visible`` over the keys that are tokens."""
        return None if self.visible is None else self.visible[..., : self.tokens]


Weights = Tensor | Attention | Rows
"""Attention as every function takes it, see `prepare_rows`."""


def prepare_rows(weights: Weights, key_mask: Tensor | None = None) -> Rows:
    """Rows that are ready for statistics: invalid ones are set to 0, and what all statistics share is computed once.

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
    return _prepare(weights)


def _prepare(attention: Attention) -> Rows:
    dtype = attention.weights.dtype
    weights = attention.weights.detach().to(torch.promote_types(dtype, torch.float32))
    visible = _visible_keys(attention)
    if visible is None:
        keys = weights.new_full((1, 1, 1), weights.shape[-1])
    else:
        weights = weights.masked_fill(~visible, 0)
        keys = visible.sum(-1).to(weights.dtype)

    total = weights.sum(-1)
    # A comparison with NaN is False and an infinite sum is far from 1, so this is the check for finiteness too.
    valid = (total - 1).abs() <= row_sum_tolerance(dtype)
    expected, cross_modal_mass = keys > 0, attention.cross_modal_mass
    if attention.query_mask is not None:
        is_token = attention.query_mask[:, None, :]
        expected = expected & is_token
        cross_modal_mass = None if cross_modal_mass is None else cross_modal_mass.masked_fill(~is_token, torch.nan)
    broken = expected & ~valid
    valid = expected & valid
    weights = weights.masked_fill(~valid[..., None], 0)
    if dtype.itemsize < 4:
        weights = weights / torch.where(valid, total, 1)[..., None]

    # Large temporaries cost more than the arithmetic, hence in place, and a dot product for the entropy.
    log_weights = weights.clamp_min(WEIGHT_FLOOR).log_()
    return Rows(
        attention.direction,
        weights,
        log_weights,
        valid,
        broken,
        keys,
        entropy=-torch.linalg.vecdot(weights, log_weights),
        visible=visible,
        tokens=attention.tokens,
        cross_modal_mass=cross_modal_mass,
        wholly_masked=_wholly_masked(attention),
    )


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
    return _mean_of_rows(normalised, rows.valid & (rows.keys > 1))


def effective_keys(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """``exp(-sum a ln a)``, ``(batch, heads)`` in [1, K_q]: how many keys a row really uses.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> effective_keys(weights)
    tensor([[1.5000]])
    """
    rows = prepare_rows(weights, key_mask)
    return _mean_of_rows(rows.entropy.exp(), rows.valid)


def effective_share(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """``exp(-sum a ln a) / K_q``, ``(batch, heads)`` in [1 / K_q, 1]: which share of its keys a row really uses.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> effective_share(weights)
    tensor([[0.7500]])
    """
    rows = prepare_rows(weights, key_mask)
    return _mean_of_rows(rows.entropy.exp() / rows.keys, rows.valid)


def max_weight(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """Largest weight of a row, ``(batch, heads)`` in [1 / K_q, 1]: a head's "confidence" (Voita et al. 2019).

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> max_weight(weights)
    tensor([[0.7500]])
    """
    rows = prepare_rows(weights, key_mask)
    return _mean_of_rows(rows.weights.amax(-1), rows.valid)


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
    return _mean_of_rows(weights.amin(-1), rows.valid)


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
    return _percent_below(rows, SPARSITY_THRESHOLD)


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
    return _mean_of_rows(torch.linalg.vector_norm(centred, dim=-1) / rows.keys.sqrt(), rows.valid)


def mean(weights: Weights, key_mask: Tensor | None = None) -> Tensor:
    """Mean weight of a row, ``(batch, heads)``: always ``1 / K_q``, whatever the model learned.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    >>> mean(weights)
    tensor([[0.5000]])
    """
    rows = prepare_rows(weights, key_mask)
    return _mean_of_rows((1 / rows.keys).expand(rows.valid.shape), rows.valid)


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


def _mean_of_rows(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, 0).sum(-1) / where.sum(-1)


def _percent_below(rows: Rows, threshold: Tensor | float) -> Tensor:
    # Hidden keys were set to 0, so they are below every threshold: take them out again.
    hidden = rows.weights.shape[-1] - rows.keys
    below = (rows.weights < threshold).sum(-1) - hidden
    return _mean_of_rows(100 * below / rows.keys, rows.valid)


def _visible_keys(attention: Attention) -> Tensor | None:
    """Where no mask hides the key, with the weights' axes and as many keys; None when nothing is masked."""
    visible = attention.visible
    if visible is not None:
        visible = visible[(None,) * (4 - visible.dim())]
        visible = visible.expand(*visible.shape[:-1], attention.weights.shape[3])
    if attention.key_mask is not None:
        padding = attention.key_mask[:, None, None, :]
        visible = padding if visible is None else visible & padding
    return visible


def _wholly_masked(attention: Attention) -> Tensor:
    # What an attention mask hides of a joint sequence may be the other modality as such, as a causal mask does.
    seen = _visible_keys(attention if attention.cross_modal_mass is None else replace(attention, visible=None))
    masked = torch.zeros(len(attention.weights), dtype=torch.bool, device=attention.weights.device)
    if seen is not None:
        masked = masked | ~seen[..., : attention.tokens].flatten(1).any(1)
    return masked if attention.query_mask is None else masked | ~attention.query_mask.any(1)


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
    valid = rows.valid[..., None]
    received = rows.weights.sum((1, 2)) / valid.sum((1, 2))
    if rows.visible is not None:
        seen = (valid & rows.visible).any(2).any(1)
        received = received.masked_fill(~seen, torch.nan)
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
    queries = rows.valid.sum(-1)
    pooled = rows.weights.sum(2) / queries[..., None]
    excess = _entropy(pooled) - rows.entropy.sum(-1) / queries
    seen = _keys_seen(rows)
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
    return rows.weights.sum(2).amax(-1) / rows.valid.sum(-1)


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
    keys = _keys_seen(rows)
    excess = ((sink(rows) - 1 / keys) / (1 - 1 / keys)).clamp(0, 1)
    return torch.where((keys > 1) & (rows.valid.sum(-1) >= SINK_QUERIES), excess, torch.nan)


def sum_heads(rows: Rows) -> tuple[Tensor, Tensor]:
    """The weights of all heads together, and how many heads they are from; the quotient is the head-averaged map.

    A head that may not attend to a key counts, with weight 0, where another head may. A broken row does not count.

    Returns
    -------
    weights, heads
        ``(batch, queries, keys)`` over the keys that are tokens; 0 heads where no valid row sees the key.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5]], [[1.0, 0.0]]]])  # two heads
    >>> visible = torch.tensor([[[[True, True]], [[True, False]]]])
    >>> total, heads = sum_heads(prepare_rows(Attention(Direction("eeg", "spec"), weights, visible=visible)))
    >>> total / heads
    tensor([[[0.7500, 0.2500]]])
    """
    weights = rows.weights[..., : rows.tokens].sum(1)
    seen = rows.valid[..., None] if rows.token_visible is None else rows.valid[..., None] & rows.token_visible
    heads = (~rows.broken).sum(1)[..., None]
    return weights, torch.where(seen.any(1), heads, 0).expand(weights.shape)


def _entropy(weights: Tensor) -> Tensor:
    return -(weights * weights.clamp_min(WEIGHT_FLOOR).log()).sum(-1)


def _keys_seen(rows: Rows) -> Tensor:
    """K: how many keys some valid query can see, broadcastable to ``(batch, heads)``."""
    if rows.visible is None:
        return rows.keys[..., 0]
    return (rows.visible & rows.valid[..., None]).any(2).sum(-1).to(rows.weights.dtype)
