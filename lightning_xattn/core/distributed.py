"""What an evaluation on several processes needs: the sums of all, and no sample counted twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.utils.data import DistributedSampler

Value = TypeVar("Value")


NUMBER = "sample_idx"
"""The column of the sample table with a sample's number, from 0 on, in its process and evaluation."""


@dataclass(frozen=True)
class Processes:
    """The processes that run an evaluation together, as one of them sees them; by default a single one."""

    rank: int = 0
    """The number of this process, which has a part of the data of its own."""
    count: int = 1
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
    """The indices in the data set of a batch's samples, without those that another process has.

    ``DistributedSampler`` deals samples out in turn and starts over when they run out: the last batches may repeat
    samples so that every process has the same number.

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
        return None  # the indices are not known
    step = sampler.num_replicas
    first = batch_idx * whole_batch * step + sampler.rank
    indices = range(first, first + batch_size * step, step)
    return indices[: sum(index < len(sampler.dataset) for index in indices)]  # type: ignore[arg-type]  # a sized dataset, or it could not deal it out
