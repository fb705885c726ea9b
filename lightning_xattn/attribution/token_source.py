"""The samples whose tokens were kept, to be permuted; and the work on them, shared by processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_xattn.attribution.kept_samples import IDENTITY, Columns
from lightning_xattn.attribution.outputs import ModelOutput
from lightning_xattn.attribution.ports import Column
from lightning_xattn.attribution.recorder import ModalityRecorder
from lightning_xattn.attribution.replay import Replay
from lightning_xattn.attribution.root import ReplayError
from lightning_xattn.core.attention import Direction

Result = TypeVar("Result")

DISAGREE = "the processes found different modalities in their first batches: name them, modalities={...}"
"""Why nothing is replayed, as the end of a sentence."""

Part = Callable[[int], Tensor]
"""Gets a number of items, and gives the indices of those that this process works on."""


class TokenSource:
    """The kept samples of an evaluation, whatever the numbers of their tokens.

    Parameters
    ----------
    token_shapes
        Samples with the same numbers of tokens together, see ``KeptSamples.permuted``.

    Attributes
    ----------
    samples
        ``(samples, 2)`` their ``IDENTITY``. Not their hashes: the same id may occur twice.
    groups
        ``(samples,)`` int64 key of the group.
    kinds
        ``(samples,)`` which of the token_shapes.
    model_output
        The model's outputs for them.
    """

    def __init__(self, token_shapes: Sequence[Columns]) -> None:
        self._token_shapes = token_shapes
        whole = {
            name: torch.cat([rows[name].cpu() for rows in token_shapes])
            for name in ("hash", "group", *IDENTITY, "values", "logits")
        }
        order = whole["hash"].argsort(stable=True)
        self.samples = torch.stack([whole[name] for name in IDENTITY], dim=1)[order]
        self.groups = whole["group"][order]
        self.model_output = ModelOutput(whole["values"][order], whole["logits"][order])
        counts = torch.tensor([len(rows["hash"]) for rows in token_shapes])
        self.kinds = torch.arange(len(token_shapes)).repeat_interleave(counts)[order]
        self._row = torch.cat([torch.arange(int(count)) for count in counts])[order]

    def __len__(self) -> int:
        return len(self.samples)

    def column(self, name: str, samples: Tensor) -> Tensor:
        """One of the columns that are kept of samples of one token_shape."""
        values = self._token_shapes[int(self.kinds[samples[0]])][name]
        return values[self._row[samples].to(values.device)]

    def has(self, name: str, samples: Tensor) -> bool:
        """Whether a column is kept of samples of one token_shape."""
        return name in self._token_shapes[int(self.kinds[samples[0]])]

    def token_count(self, direction: Direction, samples: Tensor) -> int | None:
        """How many keys a direction has in samples of one token_shape; None where it was not recorded."""
        name = f"received/{direction}"
        return self.column(name, samples).shape[1] if self.has(name, samples) else None

    def values(self, samples: Mapping[str, Tensor], own: Tensor) -> dict[Column, Tensor]:
        """What a replay takes, see ``Values``.

        Parameters
        ----------
        samples
            By modality which samples it is taken from, ``(pairs,)``, all of one token_shape.
        own
            The samples from which everything else is taken.
        """
        names = [name for name in self._token_shapes[int(self.kinds[own[0]])] if name.startswith("value/")]
        columns = [(modality, int(number), name) for name in names for _, modality, number in [name.split("/")]]
        return {(one, number): self.column(name, samples.get(one, own)) for one, number, name in columns}

    def batches(self, samples: Mapping[str, Tensor], own: Tensor) -> Iterator[tuple[Tensor, dict[Column, Tensor]]]:
        """Pairs with the same numbers of tokens of each modality, which fit into one batch: which ones, and `values`.

        Parameters
        ----------
        samples, own
            As `values` takes them, but of any token_shapes.
        """
        kinds = torch.stack([self.kinds[one] for one in (*samples.values(), own)], dim=1)
        _, kind = kinds.unique(dim=0, return_inverse=True)
        for one in range(int(kind.max()) + 1):
            chosen = (kind == one).nonzero()[:, 0]
            yield chosen, self.values({name: several[chosen] for name, several in samples.items()}, own[chosen])


def share_work(fusion: ModalityRecorder, work: Callable[[Replay, Part], Result]) -> list[Result]:
    """The results of all processes, each of which does its part of work that takes replays: two collectives.

    A process that cannot replay, as its first samples are not finite, has no part in it.

    Parameters
    ----------
    fusion
        Has what is needed to replay what lies behind the fusion.
    work
        Does a process's part.

    Returns
    -------
    list
        The result of each process, in the order of their parts.

    Raises
    ------
    ReplayError
        If none can replay, or the work of one fails.
    """
    processes = fusion.processes
    replay, result, problem = None, None, ""
    try:
        replay = fusion.make_replay()
    except ReplayError as error:
        problem = str(error)
    gathered = processes.gather((problem, fusion.identify_modalities()))
    problems = [found for found, _ in gathered]
    if len({described for _, described in gathered if described}) > 1:
        raise ReplayError(DISAGREE)
    able = [one for one, found in enumerate(problems) if not found]
    if not able:
        raise ReplayError(problems[0])

    def part(count: int) -> Tensor:
        return torch.arange(count).tensor_split(len(able))[able.index(processes.rank)]

    if replay is not None:
        try:
            with replay.keeping_state():
                result = work(replay, part)
        except ReplayError as error:
            problem = str(error)
        except Exception as error:  # which the other processes must hear of
            problem = f"it fails: {error!r}"
    results = processes.gather(("" if replay is None else problem, result))
    for found, _ in results:
        if found:
            raise ReplayError(found)
    return [one for _, one in results if one is not None]
