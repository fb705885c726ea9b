"""Do the two directions of a layer agree on which query goes with which key?

For one sample the forward map ``X`` is (queries, keys) and the backward map is transposed to the same shape, ``Y``.
Both are compared over the cells whose query and key are valid rows of their own direction and visible to each other.
Each direction is given as `prepare_rows` takes it.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_xattn.core.errors import ShapeError
from lightning_xattn.functional.rows import Rows, Weights, prepare_rows

NO_VARIANCE = 1e-6
"""A map whose standard deviation is within this share of its root mean square varies by float32 rounding only."""


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
    cells = _cells(forward, backward, per_head=False)
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


def head_alignment(forward: Weights, backward: Weights) -> Tensor:
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

    Examples
    --------
    >>> weights = torch.tensor([[[[0.75, 0.25], [0.25, 0.75]]]])
    >>> head_alignment(weights, weights)
    tensor([[1.]])
    """
    forward, backward = prepare_rows(forward), prepare_rows(backward)
    _require_equal_heads(forward, backward)
    x = forward.weights[..., : forward.tokens]
    y = backward.weights[..., : backward.tokens].transpose(-1, -2)
    return _pearson(x, y, _cells(forward, backward, per_head=True))


def head_alignment_matrix(forward: Weights, backward: Weights) -> Tensor:
    """Pearson correlation of every forward head i with every backward head j.

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
    cells = _both(
        forward.valid[:, :, None],
        backward.valid[:, None],
        None if there is None else there[:, :, None],
        None if back is None else back[:, None],
    )
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

    Examples
    --------
    >>> best_head_matching(torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
    [(0, 1), (1, 0)]
    """
    rows, columns = linear_sum_assignment(matrix.nan_to_num(nan=-1.0).cpu().numpy(), maximize=True)
    return [(int(i), int(j)) for i, j in zip(rows, columns, strict=True)]


def _cells(forward: Rows, backward: Rows, *, per_head: bool) -> Tensor:
    """1 where a cell counts, 0 elsewhere: its query and its key are valid rows and see each other."""
    rows, columns = forward.valid, backward.valid
    there, back = forward.token_visible, backward.token_visible
    if not per_head:
        # A head average needs the row in every head.
        rows, columns = rows.all(1), columns.all(1)
        there, back = (mask if mask is None else mask.all(1) for mask in (there, back))
    return _both(rows, columns, there, back)


def _both(rows: Tensor, columns: Tensor, there: Tensor | None, back: Tensor | None) -> Tensor:
    cells = rows[..., :, None] & columns[..., None, :]
    cells = cells if there is None else cells & there
    return (cells if back is None else cells & back.transpose(-1, -2)).float()


def _pearson(x: Tensor, y: Tensor, cells: Tensor) -> Tensor:
    """Pearson correlation over the last two axes; NaN without variance."""
    (x, x_norm), (y, y_norm) = (_centre(maps, cells) for maps in (x, y))
    return _inner(x, y) / (x_norm * y_norm)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    # A product of matrices, as it needs no memory for the single terms.
    return (x.flatten(-2)[..., None, :] @ y.flatten(-2)[..., :, None])[..., 0, 0]


def _centre(maps: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Centre maps over their cells, with 0 elsewhere; and their norms, NaN where a map has no variance."""
    # In place from here on: at this size a new tensor costs more than the arithmetic.
    centred = maps.clone(memory_format=torch.contiguous_format).mul_(cells)
    scale = torch.linalg.vector_norm(centred, dim=(-1, -2))
    count = cells.sum((-1, -2), keepdim=True).clamp_min(1)
    centred.sub_(centred.sum((-1, -2), keepdim=True) / count).mul_(cells)
    norm = torch.linalg.vector_norm(centred, dim=(-1, -2))
    return centred, torch.where(norm > NO_VARIANCE * scale, norm, torch.nan)


def _require_equal_heads(forward: Rows, backward: Rows) -> None:
    there, back = forward.weights.shape[1], backward.weights.shape[1]
    if there != back:
        raise ShapeError(
            f"Comparing head h with head h needs as many heads in both directions; got {there} and {back}. "
            "Use head_alignment_matrix, which compares all pairs."
        )
