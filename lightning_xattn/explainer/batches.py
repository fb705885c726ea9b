"""A batch as a user's loader gives it: how many samples it has, some of them alone, the way to the model's device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_xattn.core.errors import DataError


def to_device(batch: Any, model: nn.Module) -> Any:
    """Move a batch to where the model is, through the hooks that a Trainer would call; the batch itself stays.

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
        batch = _rebuild(batch, _copy_graphs)
    # Where there is no accelerator everything is on the CPU; to look through a batch of graphs takes milliseconds.
    stays = device.type == "cpu" and not torch.accelerator.is_available()
    if not hasattr(model, "transfer_batch_to_device"):
        return batch if stays else move_data_to_device(batch, device)
    hooks: Any = model
    batch = hooks.on_before_batch_transfer(batch, 0)
    # Lightning's own, of whichever of its two namespaces, does nothing but move.
    own = type(hooks).transfer_batch_to_device.__qualname__ == "DataHooks.transfer_batch_to_device"
    if not (stays and own):
        batch = hooks.transfer_batch_to_device(batch, device, 0)
    return hooks.on_after_batch_transfer(batch, 0)


def count_samples(batch: Any) -> int:
    """How many samples a batch holds, by the first axis of its tensors and the number of graphs.

    Understood are dicts, lists and tuples of: tensors and arrays; batches of graphs (anything with ``num_graphs``, as
    PyG's); lists of one graph, string or number for each sample. What has no axis, such as a single number, belongs to
    all samples.

    Raises
    ------
    DataError
        If there is something else in it, or its parts hold different numbers of samples, so that it cannot be split.
    """
    counts = dict(_counts(batch, "batch"))
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
    """Some samples of a batch that ``count_samples`` understands, in the same form."""
    chosen = list(indices)

    def take(part: Any) -> Any:
        if _length(part) is None:
            return part
        if _is_graphs(part):
            return type(part).from_data_list(part[chosen])
        return [part[i] for i in chosen] if isinstance(part, (list, tuple)) else part[chosen]

    return _rebuild(batch, take)


def join_samples(parts: Sequence[Any], counts: Sequence[int]) -> Any:
    """What a model gave for the parts of a batch as if for the whole, as far as it is by sample.

    Parameters
    ----------
    parts
        What it gave for each part.
    counts
        How many samples each part has.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        # A model that squeezes its output takes the axis of a single sample off.
        pairs = list(zip(parts, counts, strict=True))
        whole = [part[None] if count == 1 and part.dim() < first.dim() else part for part, count in pairs]
        by_sample = all(part.dim() and len(part) == count for part, count in zip(whole, counts, strict=True))
        alike = len({part.shape[1:] for part in whole}) == 1
        return torch.cat(whole) if by_sample and alike else first
    if isinstance(first, Mapping):
        shared = [key for key in first if all(key in part for part in parts)]
        return {key: join_samples([part[key] for part in parts], counts) for key in shared}
    if isinstance(first, (list, tuple)) and len({len(part) for part in parts}) == 1:
        return [join_samples(items, counts) for items in zip(*parts, strict=True)]
    return first


def _counts(part: Any, place: str) -> Iterator[tuple[str, int | None]]:
    """Where samples are and how many; None for what is not understood."""
    length = _length(part)
    if length is not None:
        yield place, length
    elif isinstance(part, Mapping):
        for key, value in part.items():
            yield from _counts(value, f"{place}[{key!r}]")
    elif isinstance(part, (list, tuple)):
        for i, value in enumerate(part):
            yield from _counts(value, f"{place}[{i}]")
    elif not (part is None or isinstance(part, (str, int, float, Tensor, np.ndarray))):
        yield f"{place} (a {type(part).__name__})", None


def _length(part: Any) -> int | None:
    """How many samples a leaf holds; None for what is no leaf, or has no axis."""
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


def _copy_graphs(part: Any) -> Any:
    if isinstance(part, (list, tuple)):
        return [_copy_graphs(graph) for graph in part]
    return copy.copy(part) if _is_graph(part) or _is_graphs(part) else part


def _rebuild(batch: Any, change: Callable[[Any], Any]) -> Any:
    """The same containers around leaves that are changed."""
    if isinstance(batch, Mapping):
        changed = {key: _rebuild(value, change) for key, value in batch.items()}
        if type(batch) is dict:
            return changed
        same_kind: Any = copy.copy(batch)
        same_kind.update(changed)
        return same_kind
    if isinstance(batch, (list, tuple)) and _length(batch) is None:
        parts = [_rebuild(part, change) for part in batch]
        if isinstance(batch, tuple):
            return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
        return parts
    return change(batch)
