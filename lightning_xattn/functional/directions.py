"""Do the two directions of a layer agree which token goes with which?

They are compared over the cells whose query and key are valid rows of their own direction and visible to each other:
the forward map ``X`` is (queries, keys), and the backward map is transposed to the same shape, ``Y``. Where masks
differ by head, a cell of the head-averaged map counts if a head may attend to it; the others contribute 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_xattn.core import devices
from lightning_xattn.core.attention import Attention
from lightning_xattn.functional.bins import sum_bins
from lightning_xattn.functional.row_chunks import Buffers, Columns, count_queries, read_chunks
from lightning_xattn.functional.row_collector import RowCollector, Rows
from lightning_xattn.functional.rows import Weights, prepare_rows

NO_VARIANCE = 1e-6
"""A map whose standard deviation is within this share of its root mean square varies by float32 rounding only."""


KEPT_CELLS = 2**25
"""A batch with at most this number of cells keeps its backward map while the forward direction is read: 134 MB."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """The two head-averaged maps of a layer compared, sample by sample.

    Attributes
    ----------
    alignment
        ``(batch,)``, see `alignment`.
    x, y
        ``(batch, queries, keys)`` the maps with mean 0 and norm 1, so that their inner product is ``map_alignment``; 0
        in cells that do not count, NaN in a sample whose map has no variance. In bins where the ``Rows`` have bins.
    map_alignment
        ``(batch,)`` the alignment of these maps: ``alignment`` itself unless they are in bins.
    is_whole
        ``(batch,)`` bool: every cell counts, so the maps of different samples can be compared.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.75, 0.25], [0.25, 0.75]]]])
    >>> compared = prepare_layer(weights, weights).comparison
    >>> compared.x.tolist(), compared.is_whole
    ([[[0.5, -0.5], [-0.5, 0.5]]], tensor([True]))
    """

    alignment: Tensor
    x: Tensor
    y: Tensor
    map_alignment: Tensor
    is_whole: Tensor


@dataclass(frozen=True, eq=False)
class LayerRows:
    """A layer's one or two directions, made ready for statistics.

    Attributes
    ----------
    directions
        Forward first.
    comparison
        Of the two directions; None where there is one.

    Examples
    --------
    >>> there = Attention(Direction("eeg", "spec"), torch.rand(4, 8, 9, 119).softmax(-1))
    >>> back = Attention(Direction("spec", "eeg"), torch.rand(4, 8, 119, 9).softmax(-1))
    >>> layer = prepare_layer(there, back)
    >>> layer.directions[1]
    Rows(spec_to_eeg: 4 samples, 8 heads, 119 queries, 9 keys)
    >>> bool((layer.comparison.alignment == alignment(there, back)).all())
    True
    """

    directions: tuple[Rows, ...]
    comparison: Comparison | None


def prepare_layer(forward: Weights, backward: Weights | None = None) -> LayerRows:
    """Both directions of a layer in two passes over their rows: the second one also compares the directions.

    Raises
    ------
    SettingError, ShapeError
        As `prepare_rows`.

    Examples
    --------
    >>> prepare_layer(torch.rand(4, 8, 9, 119).softmax(-1)).comparison is None
    True
    """
    if backward is None:
        return LayerRows((prepare_rows(forward),), None)
    if not (isinstance(forward, Attention) and isinstance(backward, Attention) and RowCollector(forward).is_binned):
        there, back = prepare_rows(forward), prepare_rows(backward)
        return LayerRows((there, back), _compare(there, back))
    batch, _, queries, keys = forward.shape
    keeps_map = batch * queries * keys <= KEPT_CELLS
    opposite, collector = RowCollector(backward, keeps_map), RowCollector(forward)
    for chunk in read_chunks(backward):
        opposite.add(chunk)
    back = opposite.finish()
    moments = _Moments(forward, back, opposite.whole_map if keeps_map else None)
    for chunk in read_chunks(forward):
        moments.add(*collector.add(chunk), chunk.queries)
    there = collector.finish()
    return LayerRows((there, back), _compare(there, back, moments))


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
    comparison = prepare_layer(forward, backward).comparison
    assert comparison is not None
    return comparison.alignment


def _compare(there: Rows, back: Rows, moments: _Moments | None = None) -> Comparison:
    if there.is_whole and back.is_whole:
        is_whole, mask = there.valid.new_ones(len(there.valid)), None
    else:
        cells = _full_cells(there) & _full_cells(back).mT
        is_whole = cells.flatten(1).all(1)
        mask = None if _surely(is_whole) else cells.to(there.map_weights.dtype)
    sides = there.map_weights, back.map_weights.mT
    if there.bin_sizes != (1, 1):
        sides = sides[0] / there.map_heads, sides[1] / back.map_heads.mT
        sides = sides[0].nan_to_num(), sides[1].nan_to_num()
    x, y = (_standardise(one, mask) for one in sides)
    aligned = _inner(x, y)
    if there.bin_sizes == (1, 1):
        return Comparison(aligned, x, y, aligned, is_whole)
    if moments is None:
        moments = _Moments(there.attention, back)
        collector = RowCollector(there.attention)
        for chunk in read_chunks(there.attention):
            moments.add(*collector.add(chunk), chunk.queries)
    return Comparison(moments.correlation(), x, y, aligned, is_whole)


def alignment_null(x_sum: Tensor, y_sum: Tensor, aligned: Tensor, samples: Tensor) -> Tensor:
    """Mean alignment of a sample's forward map with another sample's backward map, over all pairs.

    Pearson is an inner product of standardised maps, so the mean over pairs follows from sums over samples:
    ``(<sum x, sum y> - sum <x, y>) / (n (n - 1))``. The alignment in excess of it belongs to the samples; the rest is a
    habit of the model.

    Parameters
    ----------
    x_sum, y_sum
        ``(queries, keys)`` sums of the standardised maps of a `Comparison`.
    aligned
        Sum of the alignments of these maps.
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
    # Not a product of matrices, in which a GPU may round.
    found: Tensor = torch.linalg.vecdot(x.flatten(-2), y.flatten(-2))
    return found


def _centre(maps: Tensor, cells: Tensor | None) -> tuple[Tensor, Tensor]:
    """The maps centred over their cells (None: all), 0 elsewhere; and their norms, NaN where a map has no variance."""
    if cells is None:
        scale, centred = torch.linalg.vector_norm(maps, dim=(-1, -2)), maps - maps.mean((-1, -2), keepdim=True)
    else:
        # In place from here on: at this size a new tensor costs more than the arithmetic.
        centred = maps.clone(memory_format=torch.contiguous_format).mul_(cells)
        scale = torch.linalg.vector_norm(centred, dim=(-1, -2))
        count = cells.sum((-1, -2), keepdim=True).clamp_min(1)
        centred.sub_(centred.sum((-1, -2), keepdim=True) / count).mul_(cells)
    norm = torch.linalg.vector_norm(centred, dim=(-1, -2))
    return centred, torch.where(norm > NO_VARIANCE * scale, norm, torch.nan)


def _standardise(maps: Tensor, cells: Tensor | None) -> Tensor:
    """The maps with mean 0 and norm 1 over their cells, NaN where a map has no variance."""
    centred, norm = _centre(maps, cells)
    return centred.div_(norm[:, None, None])


def _full_cells(rows: Rows) -> Tensor:
    """Where all heads count in a cell of the map, and in a bin all cells: ``(batch, queries, keys)`` bool."""
    heads, sizes = rows.valid.shape[1], []
    for tokens, size in zip((rows.valid.shape[2], rows.tokens), rows.bin_sizes, strict=True):
        sizes.append(sum_bins(rows.map_heads.new_ones(tokens), size))
    return rows.map_heads == (heads if rows.bin_sizes == (1, 1) else heads * sizes[0][:, None] * sizes[1])


def _surely(cells: Tensor) -> bool:
    """Whether all are true; on a GPU, which would have to wait, it is not looked at."""
    return devices.reads_at_once(cells) and bool(cells.all())


class _Moments:
    """Sums over the cells of two maps, some queries at a time, from which their Pearson correlation follows.

    Each map is shifted by its mean without masks, so that the squares lose no digits.
    """

    def __init__(self, forward: Attention, back: Rows, back_map: Tensor | None = None) -> None:
        self._back, self._map, self._buffers = back, back_map, Buffers()
        self._block, self._block_start = torch.empty(0, 0), 0
        self._columns = Columns(back.attention, back.valid, back.log_sums) if back_map is None else None
        self._heads = forward.shape[1]
        # Sums over heads instead of means, as a correlation is the same; less what they are without masks.
        self._shifts = self._heads / forward.shape[3], back.valid.shape[1] / back.attention.shape[3]
        self._whole_rows = (back.valid.any(1) & ~back.broken.any(1))[:, None, :]
        self._has_all = _surely(self._whole_rows)
        dtype = torch.float32 if forward.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        # How many cells; the sums of x, of y, of their squares and of their product.
        self._sums = torch.zeros(6, len(forward), dtype=dtype, device=forward.device)

    def add(self, total: Tensor, heads: Tensor, queries: slice) -> None:
        """Add the cells of some queries, as `RowCollector.add` gives them."""
        back = self._back
        y = self._columns.read(queries).sub_(self._shifts[1]) if self._columns is not None else self._read_map(queries)
        # Not in place, as of a single head the total is the weights themselves.
        x = torch.sub(total, self._shifts[0], out=self._buffers.take("x", total.shape, total))
        visible, cells = back.attention.visible_to(slice(None), queries), heads == self._heads
        if visible is None and self._has_all and _surely(cells):
            count = x.new_full((len(x),), x.shape[1] * x.shape[2])
        else:
            cells = cells & self._whole_rows
            if visible is not None:
                seen = visible[:, 0] if visible.shape[1] == 1 else (visible & back.valid[..., None]).any(1)
                cells = cells & seen.mT
            counted = cells.to(x.dtype).expand(x.shape)
            count, x, y = counted.sum((1, 2)), x.mul_(counted), y.mul_(counted)
        x, y = x.flatten(1), y.flatten(1)
        product = self._buffers.take("product", x.shape, x)
        products = [torch.mul(one, other, out=product).sum(1) for one, other in ((x, x), (y, y), (x, y))]
        self._sums += torch.stack([count, x.sum(1), y.sum(1), *products])

    def _read_map(self, queries: slice) -> Tensor:
        """``(batch, queries, keys)`` of the backward direction's map, less its shift.

        Columns of a large map are read many at a time, as each of its rows is on another page of the memory.
        """
        if queries.stop > self._block_start + self._block.shape[1] or not len(self._block):
            assert self._map is not None
            batch, keys, every = self._map.shape
            width = max(queries.stop - queries.start, count_queries(batch * keys))
            block = self._map[..., queries.start : min(queries.start + width, every)]
            shape = batch, block.shape[2], keys
            block = torch.sub(block, self._shifts[1], out=self._buffers.take("columns", block.shape, block))
            self._block, self._block_start = self._buffers.take("block", shape, block), queries.start
            for transposed, one in zip(self._block, block, strict=True):  # torch has a fast way for a single matrix
                transposed.copy_(one.mT)
        start = queries.start - self._block_start
        return self._block[:, start : start + queries.stop - queries.start]

    def correlation(self) -> Tensor:
        """``(batch,)`` Pearson's, NaN where a map has no variance."""
        count, x, y, xx, yy, xy = self._sums
        variances = []
        for total, squares, shift in ((x, xx, self._shifts[0]), (y, yy, self._shifts[1])):
            about_mean = squares - total**2 / count
            about_zero = squares + 2 * shift * total + count * shift**2
            variances.append(about_mean.where(about_mean > NO_VARIANCE**2 * about_zero, torch.nan))
        found: Tensor = (xy - x * y / count) / (variances[0] * variances[1]).sqrt()
        return found.clamp(-1, 1).float()
