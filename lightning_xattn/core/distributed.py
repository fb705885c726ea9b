"""What several processes need: everybody's sums, and no sample counted twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

Value = TypeVar("Value")


NUMBER = "sample_idx"
"""The column of the sample table that says which sample, from 0 on, of its process and evaluation a row is of."""


@dataclass(frozen=True, eq=False)
class Processes:
    """The processes that run an evaluation together, as one of them sees them; by default it is alone."""

    rank: int = 0
    """Which part of the data this one has."""
    count: int = 1
    """How many parts there are."""
    peers: dist.ProcessGroup | None = None
    """Those that have the same part, as the model's layers are split among them (tensor parallelism)."""
    run_alone: bool = True
    """Whether each has the whole model; else all must run it at once, equally often."""

    @property
    def is_first_peer(self) -> bool:
        """Whether this one speaks for those that have the same part of the data."""
        return self.peers is None or dist.get_rank(self.peers) == 0

    def gather(self, value: Value) -> list[Value]:
        """What there is of each part of the data, in order and the same everywhere; ``[value]`` of a single process.

        One collective, which every process must reach.
        """
        if self.count == 1 and self.peers is None:
            return [value]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (value,) if self.is_first_peer else ())
        return [one for several in gathered for one in several]

    def ask_peers(self, tensor: Tensor) -> list[Tensor]:
        """What each of the peers has, on the CPU; one collective among them, for which a GPU waits."""
        theirs: list[Any] = [None] * dist.get_world_size(self.peers)
        dist.all_gather_object(theirs, tensor.detach().cpu(), group=self.peers)
        return theirs

    def join(self, tensor: Tensor, dim: int) -> Tensor:
        """The parts of a tensor that the peers have, all of one shape, as one; one collective among them."""
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.peers))]
        dist.all_gather(parts, tensor, group=self.peers)
        return torch.cat(parts, dim)


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
