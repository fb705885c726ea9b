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
    _, processes = process()
    if processes == 1:
        return [value]
    gathered: list[Any] = [None] * processes
    dist.all_gather_object(gathered, value)
    return gathered


def process() -> tuple[int, int]:
    """The rank of this process, and how many processes there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def own_places(loaders: Any, dataloader_idx: int, batch_idx: int, batch_size: int) -> range | None:
    """Where the samples of a batch stand in the data set, without those that another process has.

    ``DistributedSampler`` deals samples out in turn and starts over when they run out: at its end a batch may have
    samples that are there only to give every process equally many.

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

    Returns
    -------
    range or None
        None where no ``DistributedSampler`` deals samples out, or batches are of any size: all of them are its own.
    """
    several = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    loader = several[dataloader_idx] if isinstance(several, (list, tuple)) else several
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return None
    whole_batch = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if whole_batch is None:
        return None  # the place of a sample is not known
    step = sampler.num_replicas
    first = batch_idx * whole_batch * step + sampler.rank
    places = range(first, first + batch_size * step, step)
    return places[: sum(place < len(sampler.dataset) for place in places)]  # type: ignore[arg-type]  # a sized dataset, or it could not deal it out
