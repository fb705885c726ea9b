"""What several processes need: everybody's sums, and no sample counted twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.utils.data import DistributedSampler

Value = TypeVar("Value")


NUMBER = "sample_idx"
"""The column of the sample table that says which sample, from 0 on, of its process and evaluation a row is of."""


@dataclass(frozen=True)
class Processes:
    """The processes that run an evaluation together, as one of them sees them; by default it is alone."""

    rank: int = 0
    """Which part of the data this one has."""
    count: int = 1
    """How many parts there are."""
    hold_whole_model: bool = True
    """Whether each process holds the whole model; else all of them must run it at once, equally often."""

    def gather(self, value: Value) -> list[Value]:
        """What each process has, in order and the same everywhere; ``[value]`` of a single process.

        One collective, which every process must reach.
        """
        if self.count == 1:
            return [value]
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, value)
        return gathered


SINGLE_PROCESS = Processes()


def unique_sample_indices(loaders: Any, dataloader_idx: int, batch_idx: int, batch_size: int) -> range | None:
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
