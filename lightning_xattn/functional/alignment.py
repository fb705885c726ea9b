"""Do the two directions of a layer agree on which query goes with which key?

For one sample the forward map ``X`` is (queries, keys) and the backward map is transposed to the same shape, ``Y``.
Both are compared over the cells whose query and key are valid rows of their own direction and visible to each other.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_xattn.errors import ShapeError
from lightning_xattn.functional.rows import Rows

NO_VARIANCE = 1e-6
"""A map whose standard deviation is within this share of its root mean square varies by float32 rounding only."""


def alignment(forward: Rows, backward: Rows) -> Tensor:
    """Pearson correlation of the two head-averaged maps: the headline number (``modality_agreement``).

    Returns
    -------
    Tensor
        ``(batch,)`` in [-1, 1]; NaN where either map has no variance, as with a single key.
    """
    x = forward.weights[..., : forward.tokens].mean(1)
    y = backward.weights[..., : backward.tokens].mean(1).transpose(-1, -2)
    return _pearson(x, y, _cells(forward, backward, per_head=False))


def head_alignment(forward: Rows, backward: Rows) -> Tensor:
    """Pearson correlation of head h of one direction with head h of the other.

    Heads of the two directions share no parameters, so equal indices are a convention:
    ``head_alignment_matrix`` compares all pairs.

    Returns
    -------
    Tensor
        ``(batch, heads)`` in [-1, 1], NaN where undefined.

    Raises
    ------
    ShapeError
        If the directions have different numbers of heads.
    """
    _require_equal_heads(forward, backward)
    x = forward.weights[..., : forward.tokens]
    y = backward.weights[..., : backward.tokens].transpose(-1, -2)
    return _pearson(x, y, _cells(forward, backward, per_head=True))


def head_alignment_matrix(forward: Rows, backward: Rows) -> Tensor:
    """Pearson correlation of every forward head i with every backward head j.

    Returns
    -------
    Tensor
        ``(batch, heads, heads)``, axes (forward, backward), in [-1, 1], NaN where undefined.
    """
    x = forward.weights[:, :, None, :, : forward.tokens]
    y = backward.weights[:, None, :, :, : backward.tokens].transpose(-1, -2)
    row_valid = forward.valid[:, :, None, :, None]
    column_valid = backward.valid[:, None, :, None, :]
    cells = row_valid & column_valid
    if forward.token_visible is not None:
        cells = cells & forward.token_visible[:, :, None]
    if backward.token_visible is not None:
        cells = cells & backward.token_visible[:, None].transpose(-1, -2)
    return _pearson(x, y, cells)


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
    """
    rows, columns = linear_sum_assignment(matrix.nan_to_num(nan=-1.0).cpu().numpy(), maximize=True)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True)]


def alignment_interaction(forward: Rows, backward: Rows) -> Tensor:
    """Pearson correlation of the doubly centred log-maps, head h with head h.

    Taking row and column means off ``ln a`` leaves the same as taking them off the logits: the softmax normaliser
    and the overall popularity of a key cancel, and which query goes with which key is left.

    Returns
    -------
    Tensor
        ``(batch, heads)`` in [-1, 1], NaN where undefined.

    Raises
    ------
    ShapeError
        If the directions have different numbers of heads.
    """
    _require_equal_heads(forward, backward)
    cells = _cells(forward, backward, per_head=True)
    x = forward.log_weights[..., : forward.tokens]
    y = backward.log_weights[..., : backward.tokens].transpose(-1, -2)
    return _pearson(x, y, cells, double_centred=True)


def round_trip_lift(forward: Rows, backward: Rows) -> Tensor:
    """``sum_q sum_k A[q, k] B[k, q]``: how much likelier than chance attention returns to where it started.

    Returns
    -------
    Tensor
        ``(batch, heads)``: 1 at chance, up to min(queries, keys); NaN without a valid row in both directions.

    Raises
    ------
    ShapeError
        If the directions have different numbers of heads.
    """
    _require_equal_heads(forward, backward)
    there = forward.weights[..., : forward.tokens]
    back = backward.weights[..., : backward.tokens].transpose(-1, -2)
    defined = forward.valid.any(-1) & backward.valid.any(-1)
    return torch.where(defined, (there * back).sum((-1, -2)), torch.nan)


def _cells(forward: Rows, backward: Rows, *, per_head: bool) -> Tensor:
    """Where both maps may be compared: ``(batch, heads or nothing, queries, keys)`` bool, or broadcastable to it."""
    row_valid, column_valid = forward.valid, backward.valid
    masks = [forward.token_visible, backward.token_visible]
    if not per_head:
        # A head average needs the row in every head.
        row_valid, column_valid = row_valid.all(1), column_valid.all(1)
        masks = [mask if mask is None else mask.all(1) for mask in masks]
    cells = row_valid[..., :, None] & column_valid[..., None, :]
    there, back = masks
    if there is not None:
        cells = cells & there
    if back is not None:
        cells = cells & back.transpose(-1, -2)
    return cells


def _pearson(x: Tensor, y: Tensor, cells: Tensor, *, double_centred: bool = False) -> Tensor:
    """Pearson correlation over the last two axes where ``cells`` is True; NaN without variance."""
    x, y = _centre(x, cells, double_centred), _centre(y, cells, double_centred)
    return (x * y).sum((-1, -2))


def _centre(values: Tensor, cells: Tensor, double: bool) -> Tensor:
    """Standardise maps over their cells to mean 0 and norm 1; all NaN where a map has no variance."""
    count = cells.sum((-1, -2), keepdim=True)
    kept = torch.where(cells, values, 0)
    scale = torch.linalg.vector_norm(kept, dim=(-1, -2), keepdim=True)
    if double:
        rows = kept.sum(-1, keepdim=True) / cells.sum(-1, keepdim=True).clamp_min(1)
        columns = kept.sum(-2, keepdim=True) / cells.sum(-2, keepdim=True).clamp_min(1)
        kept = torch.where(cells, kept - rows - columns, 0)
    # The grand mean goes last: with irregular masks double centring alone does not leave the mean at 0.
    centred = torch.where(cells, kept - kept.sum((-1, -2), keepdim=True) / count.clamp_min(1), 0)
    norm = torch.linalg.vector_norm(centred, dim=(-1, -2), keepdim=True)
    return torch.where(norm > NO_VARIANCE * scale, centred / norm, torch.nan)


def _require_equal_heads(forward: Rows, backward: Rows) -> None:
    there, back = forward.weights.shape[1], backward.weights.shape[1]
    if there != back:
        raise ShapeError(
            f"Comparing head h with head h needs as many heads in both directions; got {there} and {back}. "
            "Use head_alignment_matrix, which compares all pairs."
        )
