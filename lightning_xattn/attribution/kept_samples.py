"""The samples of an evaluation that are kept until its end, chosen by stable hashes; and the work on them, shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from lightning_xattn.attribution.outputs import ModelOutput
from lightning_xattn.attribution.ports import Column
from lightning_xattn.attribution.recorder import FusionRecord, ModalityRecorder
from lightning_xattn.attribution.replay import Replay
from lightning_xattn.attribution.root import ReplayError
from lightning_xattn.core.attention import Direction
from lightning_xattn.core.distributed import NUMBER
from lightning_xattn.core.ids import LARGEST, hashed
from lightning_xattn.functional import pooled_tokens, project
from lightning_xattn.functional.outcomes import UNKNOWN

Result = TypeVar("Result")

DISAGREE = "the processes found different modalities in their first batches: name them, modalities={...}"
"""Why nothing is replayed, as the end of a sentence."""

Part = Callable[[int], Tensor]
"""Gets a number of items, and gives the indices of those that this process works on."""

NOT_KEPT = LARGEST
"""The hash of rows that must not be kept."""

Columns = dict[str, Tensor]
"""Columns by name, each with one row per sample; one of them is "hash"."""


class BottomKSample:
    """The rows with the smallest hashes.

    Rows stay on their device. Where all rows have the same shapes, ``add`` never waits for a GPU; else it waits once
    per ``size`` rows.

    Parameters
    ----------
    size
        How many rows are kept at most. May become smaller later.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._blocks: dict[tuple[tuple[str, torch.Size], ...], list[Columns]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Add rows; the shape of a row may differ from that of earlier ones."""
        shapes = tuple((name, values.shape[1:]) for name, values in rows.items())
        self._blocks.setdefault(shapes, []).append(dict(rows))
        self._count += len(rows["hash"])
        if len(self) >= 2 * self.size:
            self._drop_largest_hashes()

    def __add__(self, other: BottomKSample) -> BottomKSample:
        """The sample of the rows of both, as of two processes."""
        both = BottomKSample(min(self.size, other.size))
        for rows in (*self.blocks(), *other.blocks()):
            both.add(rows)
        return both

    def blocks(self) -> list[Columns]:
        """The kept rows in the order of their hashes, one block for each set of shapes. Waits for a GPU."""
        self._drop_largest_hashes()
        kept = []
        for (rows,) in self._blocks.values():
            wanted = rows["hash"] != NOT_KEPT
            kept.append({name: values[wanted] for name, values in rows.items()})
        return kept

    def map(self, change: Callable[[Columns], Columns]) -> BottomKSample:
        """A sample with other columns of the same rows."""
        changed = BottomKSample(self.size)
        for rows in self.blocks():
            changed.add(change(rows))
        return changed

    def cpu(self) -> BottomKSample:
        """The same on the CPU."""
        return self.map(lambda rows: {name: values.cpu() for name, values in rows.items()})

    def _drop_largest_hashes(self) -> None:
        joined = {
            shapes: {name: torch.cat([rows[name] for rows in several]) for name in several[0]}
            for shapes, several in self._blocks.items()
        }
        if not joined:
            return
        lengths = [len(rows["hash"]) for rows in joined.values()]
        ranks = torch.cat([rows["hash"] for rows in joined.values()]).argsort(stable=True).argsort().split(lengths)
        for (shapes, rows), of_block in zip(list(joined.items()), ranks, strict=True):
            # Only where there are several shapes, how many rows of one are kept depends on the hashes.
            count = self.size if len(joined) == 1 else int((of_block < self.size).sum())
            order = rows["hash"].argsort(stable=True)[:count]
            joined[shapes] = {name: values[order] for name, values in rows.items()}
        filled = {shapes: rows for shapes, rows in joined.items() if len(rows["hash"])}
        # Without any row one block stays, which has the columns.
        filled = filled or dict([next(iter(joined.items()))])
        self._blocks = {shapes: [rows] for shapes, rows in filled.items()}
        self._count = sum(len(rows["hash"]) for rows in filled.values())


MAX_SAMPLES = 8192
"""The linear probes are fitted and tested on at most this many samples of an evaluation."""

IDENTITY = ("process", NUMBER)
"""The columns that identify a sample within its evaluation."""

CHOSEN = 0
"""The salt of the hashes that decide which samples are kept."""


@dataclass(eq=False)
class KeptSamples:
    """What is kept of the samples of one process, or with ``+`` of several: those that one process would have kept.

    Parameters
    ----------
    probed
        Rows for the linear probes: "hash", "group", "features/<modality>", and further columns of each sample.
    permuted
        Rows to be permuted and replayed: "hash", "group", ``IDENTITY``, "values", "logits",
        "value/<modality>/<number>" (of further inputs without a modality) and "received/<direction>".

    Attributes
    ----------
    modalities
        Their names; empty before the first sample.
    group_noun
        What groups are called; None where they are not known, so that each sample is its own group.
    nonfinite
        How many samples were left out because the features of a modality are not finite.
    missing
        By modality, how many samples were left out because they lack it.
    unrecorded
        How many samples were in steps whose modalities could not be recorded.
    names
        By ``IDENTITY``, ids of samples that are no numbers; numbers are the column "id" of ``probed``.
    """

    probed: BottomKSample
    permuted: BottomKSample
    modalities: tuple[str, ...] = ()
    group_noun: str | None = None
    nonfinite: Tensor = field(default_factory=lambda: torch.tensor(0))
    missing: dict[str, Tensor] = field(default_factory=dict)
    unrecorded: int = 0
    names: dict[tuple[int, int], str] = field(default_factory=dict)

    def __add__(self, other: KeptSamples) -> KeptSamples:
        unrecorded, names = self.unrecorded + other.unrecorded, self.names | other.names
        if not (self.modalities and other.modalities):
            return replace(self if self.modalities else other, unrecorded=unrecorded, names=names)
        return replace(
            self,
            unrecorded=unrecorded,
            names=names,
            probed=self.probed + other.probed,
            permuted=self.permuted + other.permuted,
            nonfinite=self.nonfinite + other.nonfinite,
            missing={name: count + other.missing[name] for name, count in self.missing.items()},
        )

    def add(
        self,
        inputs: FusionRecord,
        keys: Tensor,
        groups: Tensor | None,
        noun: str | None,
        facts: Columns,
        received: Mapping[str, Tensor],
        present: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a batch.

        Parameters
        ----------
        inputs
            The modalities of the batch.
        keys
            ``(batch,)`` int64 key of each sample, the same in every run: of its id, or of its index.
        groups
            ``(batch,)`` int64 key of each sample's group; None: each sample is its own group.
        noun
            What groups are called.
        facts
            Further columns ``(batch,)`` that are kept of each sample, ``IDENTITY`` among them.
        received
            By direction ``(batch, keys)`` the attention that each key receives, see `received_attention`.
        present
            By modality ``(batch,)`` bool, which samples have it; a sample of which a mask hides all tokens of a
            modality lacks it, too.
        """
        self.modalities, self.group_noun = tuple(inputs.tokens), noun
        groups = keys if groups is None else groups
        features = {name: project(pooled_tokens(*tokens)) for name, tokens in inputs.tokens.items()}
        lacking = {}
        for name, (_, mask) in inputs.tokens.items():
            has_any = torch.ones_like(keys, dtype=torch.bool) if mask is None else mask.any(1)
            lacking[name] = ~(has_any & present[name] if present and name in present else has_any)
        complete = ~torch.stack([*lacking.values()]).any(0)
        finite = torch.stack([one.isfinite().flatten(1).all(1) for one in features.values()]).all(0)
        hashes = torch.where(finite & complete, hashed(keys, CHOSEN), NOT_KEPT)
        rows = {"hash": hashes, "group": groups, **facts}
        self.nonfinite = self.nonfinite.to(keys.device) + (complete & ~finite).sum()
        self.missing = {name: self.missing.get(name, 0) + one.sum() for name, one in lacking.items()}
        self.probed.add(rows | {f"features/{name}": one for name, one in features.items()})
        output = inputs.model_output
        if output is not None and self.permuted.size:
            finite = (output.values.isfinite() & output.logits.isfinite()).all(1)
            kept = {name: rows[name] for name in ("group", *IDENTITY)}
            kept |= {"hash": torch.where(finite, hashes, NOT_KEPT), "values": output.values, "logits": output.logits}
            kept |= {f"value/{name}/{number}": one for (name, number), one in inputs.values.items()}
            kept |= {f"received/{direction}": one for direction, one in received.items()}
            self.permuted.add(kept)

    def add_names(self, names: Mapping[tuple[int, int], str]) -> None:
        """Add ids that are no numbers; those of samples that are not kept are dropped from time to time."""
        self.names |= names
        if len(self.names) >= 4 * self.probed.size:
            kept = {
                one for rows in self.probed.blocks() for one in zip(*(rows[n].tolist() for n in IDENTITY), strict=True)
            }
            self.names = {one: name for one, name in self.names.items() if one in kept}

    def cpu(self) -> KeptSamples:
        """The same on the CPU, to be sent to other processes."""
        missing = {name: count.cpu() for name, count in self.missing.items()}
        return replace(
            self,
            probed=self.probed.cpu(),
            permuted=self.permuted.cpu(),
            nonfinite=self.nonfinite.cpu(),
            missing=missing,
        )

    def without_labels(self) -> KeptSamples:
        """The same without classes, predictions, confidences and outcomes."""

        def drop_labels(rows: Columns) -> Columns:
            unknown = {name: torch.full_like(rows[name], -1) for name in ("class", "target", "prediction")}
            unknown |= {"correct": torch.full_like(rows["correct"], UNKNOWN)}
            return rows | unknown | {"confidence": torch.full_like(rows["confidence"], torch.nan)}

        return replace(self, probed=self.probed.map(drop_labels))


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
        found = {}
        for name in self._token_shapes[int(self.kinds[own[0]])]:
            if name.startswith("value/"):
                _, modality, number = name.split("/")
                found[modality, int(number)] = self.column(name, samples.get(modality, own))
        return found

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
    """The results of all processes, each of which does its part of work that takes replays: one collective.

    Another one, where it has not been gathered yet which of them can replay.

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
    if fusion.readiness is None:
        fusion.readiness = processes.gather(fusion.find_readiness())
    gathered = fusion.readiness
    problems = [found for found, _ in gathered]
    if len({described for _, described in gathered if described}) > 1:
        raise ReplayError(DISAGREE)
    able = [one for one, found in enumerate(problems) if not found]
    if not able:
        raise ReplayError(problems[0])

    def part(count: int) -> Tensor:
        return torch.arange(count).tensor_split(len(able))[able.index(processes.rank)]

    result, problem = None, ""
    if processes.rank in able:
        try:
            replay = fusion.make_replay()
            with replay.keeping_state():
                result = work(replay, part)
        except ReplayError as error:
            problem = str(error)
        except Exception as error:  # which the other processes must hear of
            problem = f"it fails: {error!r}"
    results = processes.gather((problem, result))
    for found, _ in results:
        if found:
            raise ReplayError(found)
    return [one for _, one in results if one is not None]
