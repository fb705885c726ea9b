"""Do the two directions of a layer agree which token goes with which?

They are compared over the cells whose query and key are valid rows of their own direction and visible to each other:
the forward map ``X`` is (queries, keys), and the backward map is transposed to the same shape, ``Y``. Where masks
differ by head, a cell of the head-averaged map counts if a head may attend to it; the others contribute 0.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_xattn.functional.attention import Weights, prepare_rows, sum_heads

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
    sides = [prepare_rows(forward), prepare_rows(backward)]
    (x, there), (y, back) = map(sum_heads, sides)
    heads, opposite_heads = (rows.weights.shape[1] for rows in sides)
    # A head whose row is broken leaves the row out.
    counted = (there == heads) & (back == opposite_heads).transpose(-1, -2)
    cells, whole = counted.float(), counted.all((1, 2))
    (x, x_norm), (y, y_norm) = (_centre(maps, cells) for maps in (x, y.transpose(-1, -2)))
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
