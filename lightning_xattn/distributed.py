"""What several processes need: everybody's sums, and no sample counted twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch.utils.data import DistributedSampler

Value = TypeVar("Value")


def gather(value: Value) -> list[Value]:
    """What each process passed, in the order of their ranks and the same everywhere; ``[value]`` in a single process.

    One collective, which every process must reach.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def count_repeats(loaders: Any, dataloader_idx: int, batch_idx: int, batch_size: int) -> int:
    """How many samples at the end of a batch are there only to give every process equally many.

    ``DistributedSampler`` deals samples out in turn and starts over when they run out, so the place of a sample in
    its process says whether it has been dealt out before.

    Parameters
    ----------
    loaders
        The process's DataLoader, or several in a sequence or a mapping.
    dataloader_idx
        Which of several.
    batch_idx
        How many batches of it came before this one.
    batch_size
        Samples in this batch.
    """
    several = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    loader = several[dataloader_idx] if isinstance(several, (list, tuple)) else several
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return 0
    whole_batch = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if whole_batch is None:
        return 0  # batches of any size: the place of a sample is not known
    seen, dealt = batch_idx * whole_batch, len(sampler.dataset)  # type: ignore[arg-type]  # a sized dataset, or it could not deal it out
    places = range(seen, seen + batch_size)
    return sum(place * sampler.num_replicas + sampler.rank >= dealt for place in places)
