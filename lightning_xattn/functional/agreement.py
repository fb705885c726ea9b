"""Do the queries of a head, the heads of a layer, and its two directions attend to the same things?

The two directions are compared over the cells whose query and key are valid rows of their own direction and visible to
each other: the forward map ``X`` is (queries, keys), and the backward map is transposed to the same shape, ``Y``.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_xattn.core.errors import SettingError
from lightning_xattn.functional.rows import WEIGHT_FLOOR, Rows, Weights, prepare_rows

NO_VARIANCE = 1e-6
"""A map whose standard deviation is within this share of its root mean square varies by float32 rounding only."""


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


def alignment(forward: Weights, backward: Weights) -> Tensor:
    """Pearson correlation of the two head-averaged maps: the headline number (``modality_agreement``).

    Returns
    -------
    Tensor
        ``(batch,)`` in [-1, 1]; NaN where either map has no variance, as with a single key.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.75, 0.25], [0.25, 0.75]]]])
    >>> alignment(weights, weights)
    tensor([1.])
    """
    x, y, _ = standardised_maps(forward, backward)
    return _inner(x, y)


def standardised_maps(forward: Weights, backward: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """The two head-averaged maps with mean 0 and norm 1, so that their inner product is the ``alignment``.

    Returns
    -------
    x, y
        ``(batch, queries, keys)``, 0 in cells that do not count, NaN in a sample whose map has no variance.
    whole
        ``(batch,)`` bool: every cell counts, so the maps of different samples can be compared.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.75, 0.25], [0.25, 0.75]]]])
    >>> x, y, whole = standardised_maps(weights, weights)
    >>> x.tolist(), whole
    ([[[0.5, -0.5], [-0.5, 0.5]]], tensor([True]))
    """
    forward, backward = prepare_rows(forward), prepare_rows(backward)
    x = forward.weights[..., : forward.tokens].mean(1)
    y = backward.weights[..., : backward.tokens].mean(1).transpose(-1, -2)
    # A head average needs the row in every head.
    there, back = (mask if mask is None else mask.all(1) for mask in (forward.token_visible, backward.token_visible))
    cells = _shared_cells(forward.valid.all(1), backward.valid.all(1), there, back)
    (x, x_norm), (y, y_norm) = (_centre(maps, cells) for maps in (x, y))
    whole = cells.bool().all((1, 2))
    return x / x_norm[:, None, None], y / y_norm[:, None, None], whole


def alignment_null(x_sum: Tensor, y_sum: Tensor, aligned: Tensor, samples: Tensor) -> Tensor:
    """Mean alignment of a sample's forward map with another sample's backward map, over all pairs.

    Pearson is an inner product of standardised maps, so the mean over pairs follows from sums over samples:
    ``(<sum x, sum y> - sum <x, y>) / (n (n - 1))``. The alignment in excess of it belongs to the samples; the rest is a
    habit of the model.

    Parameters
    ----------
    x_sum, y_sum
        ``(queries, keys)`` sums of ``standardised_maps``.
    aligned
        Sum of the samples' alignments.
    samples
        Number of samples, n.

    Returns
    -------
    Tensor
        A number in [-1, 1]; NaN for fewer than two samples.

    Examples
    --------
    >>> sums = torch.tensor([[1.0, 1.0]])  # of two samples, whose maps are (1, 0) and (0, 1) in both directions
    >>> alignment_null(sums, sums, aligned=torch.tensor(2.0), samples=torch.tensor(2))
    tensor(0.)
    """
    pairs = samples * (samples - 1)
    return torch.where(pairs > 0, ((x_sum * y_sum).sum() - aligned) / pairs, torch.nan)


def head_alignment_matrix(forward: Weights, backward: Weights) -> Tensor:
    """Pearson correlation of every forward head i with every backward head j.

    Heads of the two directions share no parameters, so the diagonal, of heads with equal indices, is a convention.

    Returns
    -------
    Tensor
        ``(batch, heads, heads)``, axes (forward, backward), in [-1, 1], NaN where undefined.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.75, 0.25], [0.25, 0.75]]]])
    >>> head_alignment_matrix(weights, weights)
    tensor([[[1.]]])
    """
    forward, backward = prepare_rows(forward), prepare_rows(backward)
    x = forward.weights[:, :, None, :, : forward.tokens]
    y = backward.weights[:, None, :, :, : backward.tokens].transpose(-1, -2)
    x, y = torch.broadcast_tensors(x, y)
    there, back = forward.token_visible, backward.token_visible
    cells = _shared_cells(
        forward.valid[:, :, None],
        backward.valid[:, None],
        None if there is None else there[:, :, None],
        None if back is None else back[:, None],
    )
    (x, x_norm), (y, y_norm) = (_centre(maps, cells) for maps in (x, y))
    return _inner(x, y) / (x_norm * y_norm)


def best_head_matching(matrix: Tensor) -> list[tuple[int, int]]:
    """One-to-one matching of heads with the largest total alignment (Hungarian algorithm, from scipy).

    Parameters
    ----------
    matrix
        ``(heads, heads)`` alignments, axes (forward, backward); undefined pairs count as the worst, -1.

    Returns
    -------
    list of (forward head, backward head)
        In the order of the forward heads.

    Examples
    --------
    >>> best_head_matching(torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
    [(0, 1), (1, 0)]
    """
    rows, columns = linear_sum_assignment(matrix.nan_to_num(nan=-1.0).cpu().numpy(), maximize=True)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True)]


def _entropy(weights: Tensor) -> Tensor:
    return -(weights * weights.clamp_min(WEIGHT_FLOOR).log()).sum(-1)


def _keys_seen(rows: Rows) -> Tensor:
    assert rows.visible is not None
    return (rows.visible & rows.valid[..., None]).any(2).sum(-1).to(rows.weights.dtype)


def _shared_cells(rows: Tensor, columns: Tensor, there: Tensor | None, back: Tensor | None) -> Tensor:
    """1 where a cell counts, 0 elsewhere: its query and its key are valid rows and see each other."""
    cells = rows[..., :, None] & columns[..., None, :]
    cells = cells if there is None else cells & there
    return (cells if back is None else cells & back.transpose(-1, -2)).float()


def _inner(x: Tensor, y: Tensor) -> Tensor:
    # A product of matrices, as it needs no memory for the single terms.
    return (x.flatten(-2)[..., None, :] @ y.flatten(-2)[..., :, None])[..., 0, 0]


def _centre(maps: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """The maps centred over their cells, with 0 elsewhere; and their norms, NaN where a map has no variance."""
    # In place from here on: at this size a new tensor costs more than the arithmetic.
    centred = maps.clone(memory_format=torch.contiguous_format).mul_(cells)
    scale = torch.linalg.vector_norm(centred, dim=(-1, -2))
    count = cells.sum((-1, -2), keepdim=True).clamp_min(1)
    centred.sub_(centred.sum((-1, -2), keepdim=True) / count).mul_(cells)
    norm = torch.linalg.vector_norm(centred, dim=(-1, -2))
    return centred, torch.where(norm > NO_VARIANCE * scale, norm, torch.nan)
