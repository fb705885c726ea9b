"""A batch as the user's loader yields it: count its samples, take some of them, move it to the model's device.

Containers are those of ``torch.utils._pytree`` and other mappings. Graphs are leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map, tree_map_with_path

from lightning_xattn.core.errors import DataError


def to_device(batch: Any, model: nn.Module) -> Any:
    """A batch on the model's device, moved by the hooks that a Trainer would call; the given batch does not change.

    Parameters
    ----------
    batch
        Tensors and objects with a method ``to``, in dicts, lists and tuples.
    model
        A ``LightningModule`` (its ``on_before_batch_transfer``, ``transfer_batch_to_device`` and
        ``on_after_batch_transfer`` are called) or another module.
    """
    first = next(iter(model.parameters()), next(iter(model.buffers()), None))
    device = torch.device("cpu") if first is None else first.device
    if device.type != "cpu":
        # Graphs are moved in place: a list of batches would pile up on the GPU.
        batch = tree_map(lambda part: copy.copy(part) if _is_graph(part) or _is_graphs(part) else part, batch)
    # Without an accelerator everything is on the CPU, and searching a batch of graphs takes milliseconds.
    stays = device.type == "cpu" and not torch.accelerator.is_available()
    if not hasattr(model, "transfer_batch_to_device"):
        return batch if stays else move_data_to_device(batch, device)
    hooks: Any = model
    batch = hooks.on_before_batch_transfer(batch, 0)
    # Lightning's own hook, in either of its two namespaces, only moves.
    is_lightnings = type(hooks).transfer_batch_to_device.__qualname__ == "DataHooks.transfer_batch_to_device"
    if not (stays and is_lightnings):
        batch = hooks.transfer_batch_to_device(batch, device, 0)
    return hooks.on_after_batch_transfer(batch, 0)


def count_samples(batch: Any) -> int:
    """How many samples a batch holds, by the first axis of its tensors and the number of its graphs.

    A batch may hold, in dicts, lists and tuples: tensors and arrays; batches of graphs (anything with ``num_graphs``,
    as of PyG); lists with one graph, string or number for each sample. A value without an axis, such as a single
    number, belongs to all samples.

    Raises
    ------
    DataError
        If the batch holds anything else, or its parts hold different numbers of samples, so that it cannot be split.
    """
    counts = _count_by_place(batch, "batch")
    if len(set(counts.values())) != 1 or None in counts.values():
        found = ", ".join(f"{place}: {'?' if count is None else count}" for place, count in list(counts.items())[:12])
        raise DataError(
            "The batch cannot be split: expected parts that all hold the same number of samples, found "
            f"{found or 'none'}. Make smaller batches in the loader instead."
        )
    (count,) = set(counts.values())
    assert count is not None
    return count


def take_samples(batch: Any, indices: Sequence[int]) -> Any:
    """Some samples of a batch that ``count_samples`` accepts, in the same containers."""
    chosen = list(indices)

    def take(part: Any) -> Any:
        if isinstance(part, Mapping):
            taken: Any = copy.copy(part)
            taken.update(take_samples(dict(part), chosen))
            return taken
        if _length(part) is None:
            return part
        if _is_graphs(part):
            return type(part).from_data_list(part[chosen])
        return [part[i] for i in chosen] if isinstance(part, (list, tuple)) else part[chosen]

    return tree_map(take, batch, is_leaf=_holds_samples)


def join_samples(parts: Sequence[Any], counts: Sequence[int]) -> Any:
    """The outputs of a model for the parts of a batch, joined; the first part's where an output is not by sample.

    Parameters
    ----------
    parts
        The outputs for each part.
    counts
        The number of samples of each part.
    """
    by_path = [dict(tree_flatten_with_path(part)[0]) for part in parts]

    def join(path: Any, first: Any) -> Any:
        leaves = [leaf for part in by_path if isinstance(leaf := part.get(path), Tensor)]
        if len(leaves) < len(parts):
            return first
        # A model that squeezes its output removes the axis of a single sample.
        pairs = list(zip(leaves, counts, strict=True))
        leaves = [leaf[None] if count == 1 and leaf.dim() < first.dim() else leaf for leaf, count in pairs]
        is_by_sample = all(leaf.dim() and len(leaf) == count for leaf, count in zip(leaves, counts, strict=True))
        return torch.cat(leaves) if is_by_sample and len({leaf.shape[1:] for leaf in leaves}) == 1 else first

    return tree_map_with_path(join, parts[0])


def _count_by_place(batch: Any, place: str) -> dict[str, int | None]:
    """The number of samples of each part that has an axis of samples; None for a part of an unknown type."""
    counts: dict[str, int | None] = {}
    for path, part in tree_flatten_with_path(batch, is_leaf=_holds_samples)[0]:
        where = place + keystr(path)
        if isinstance(part, Mapping):
            counts |= _count_by_place(dict(part), where)
        elif _holds_samples(part):
            counts[where] = _length(part)
        elif not (part is None or isinstance(part, (str, int, float, Tensor, np.ndarray))):
            counts[f"{where} (a {type(part).__name__})"] = None
    return counts


def _holds_samples(part: Any) -> bool:
    return _length(part) is not None


def _length(part: Any) -> int | None:
    """The number of samples of a leaf; None for a container, and for a leaf without an axis."""
    if isinstance(part, (Tensor, np.ndarray)):
        return len(part) if part.ndim else None
    if _is_graphs(part):
        return int(part.num_graphs)
    if isinstance(part, (list, tuple)) and part and all(isinstance(x, (str, int, float)) or _is_graph(x) for x in part):
        return len(part)
    return None


def _is_graphs(part: Any) -> bool:
    return hasattr(part, "num_graphs") and hasattr(part, "from_data_list")


def _is_graph(part: Any) -> bool:
    return hasattr(part, "num_nodes") and not hasattr(part, "num_graphs")
