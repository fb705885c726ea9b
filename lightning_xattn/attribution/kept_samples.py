"""What is kept of an evaluation's samples where they enter the fusion, until its end shows what each modality says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_xattn.attribution.bottom_k import NOT_KEPT, BottomKSample, Columns, hashed, smallest
from lightning_xattn.attribution.recorder import FusionRecord
from lightning_xattn.attribution.replay import ModelOutput
from lightning_xattn.core.distributed import NUMBER
from lightning_xattn.functional import pooled_tokens, project
from lightning_xattn.functional.outcomes import UNKNOWN
from lightning_xattn.functional.probe import FOLDS

MAX_SAMPLES = 8192
"""So many samples of an evaluation are read, at most."""

MAX_TOKEN_SHAPES = 32
"""So many numbers of tokens may occur; samples with yet others do not contribute."""

IDENTITY = ("process", NUMBER)
"""The columns that tell a sample from all others of an evaluation."""

CHOSEN, _FOLDED = range(2)
"""Salts of the hashes that say which samples are kept, and which fold they are in."""


@dataclass(frozen=True, eq=False)
class FusionPart:
    """What one process has collected."""

    modalities: tuple[str, ...]
    rows: Columns
    """Of the samples that are read: "hash", "fold", "group", "features/<modality>" and what else is kept of each."""
    token_shapes: tuple[Columns, ...]
    """Of those that are permuted, by the numbers of their tokens: "hash", "group", ``IDENTITY``, "values", "logits",
    "tokens/<modality>/<number>" and "received/<direction>"."""
    group_noun: str | None
    """What groups are called; None where they are not known: each sample is its own."""
    is_partial: bool
    """Whether samples were left out because too many numbers of tokens occur."""
    left_out: int
    """Samples that were left out because what enters the fusion is not finite."""

    def cpu(self) -> FusionPart:
        """The same on the CPU, to be sent to other processes."""
        return replace(self, rows=_moved(self.rows), token_shapes=tuple(map(_moved, self.token_shapes)))

    def without_labels(self) -> FusionPart:
        """The same without classes, predictions, confidences and outcomes."""
        unknown = {name: torch.full_like(self.rows[name], -1) for name in ("class", "target", "prediction")}
        unknown |= {"correct": torch.full_like(self.rows["correct"], UNKNOWN)}
        unknown |= {"confidence": torch.full_like(self.rows["confidence"], torch.nan)}
        return replace(self, rows=self.rows | unknown)


def merge_parts(parts: Sequence[FusionPart], sizes: tuple[int, int]) -> FusionPart:
    """Those of several processes as one: the samples that one process would have kept.

    Parameters
    ----------
    parts
        The parts.
    sizes
        How many samples are read and permuted, at most.
    """
    if len(parts) == 1:
        return parts[0]
    by_kind: dict[tuple[torch.Size, ...], list[Columns]] = {}
    for rows in (rows for part in parts for rows in part.token_shapes):
        by_kind.setdefault(_token_shape_of(rows), []).append(rows)
    return FusionPart(
        parts[0].modalities,
        smallest([part.rows for part in parts], sizes[0]),
        tuple(smallest(several, sizes[1]) for several in by_kind.values()),
        parts[0].group_noun,
        any(part.is_partial for part in parts),
        sum(part.left_out for part in parts),
    )


class Collected:
    """Collects a data set's samples, batch after batch.

    Parameters
    ----------
    max_samples
        How many samples are read, at most.
    contribution_samples
        Of how many the tokens are kept, to be permuted.
    """

    def __init__(self, max_samples: int, contribution_samples: int) -> None:
        self._contribution_samples = contribution_samples
        self._read = BottomKSample(max_samples)
        self._permuted: dict[tuple[torch.Size, ...], BottomKSample] = {}
        self._modalities: tuple[str, ...] = ()
        self._group_noun: str | None = None
        self._is_partial = False
        self._left_out = torch.tensor(0)

    def snapshot(self, device: torch.device | str | None = None) -> Collected:
        """What there is so far, there or on another device; adding more leaves it as it is."""
        other = copy(self)
        other._read = self._read.snapshot(device)
        other._permuted = {kind: pool.snapshot(device) for kind, pool in self._permuted.items()}
        other._left_out = self._left_out.to(device)
        return other

    def load(self, part: FusionPart) -> None:
        """Go on from what was collected of the same data set so far."""
        self._modalities, self._group_noun, self._is_partial = part.modalities, part.group_noun, part.is_partial
        self._left_out = torch.tensor(part.left_out)
        self._read.add(part.rows)
        for of_token_shape in part.token_shapes:
            self._permuted.setdefault(_token_shape_of(of_token_shape), BottomKSample(self._contribution_samples)).add(
                of_token_shape
            )

    def add(
        self,
        inputs: FusionRecord,
        keys: Tensor,
        groups: Tensor | None,
        noun: str | None,
        facts: Columns,
        received: Mapping[str, Tensor],
    ) -> None:
        """Add a batch.

        Parameters
        ----------
        inputs
            What entered the fusion.
        keys
            ``(batch,)`` int64, what tells a sample from all others in every run: of its id, or its place.
        groups
            ``(batch,)`` int64 key of its group; None: each sample is its own.
        noun
            What groups are called.
        facts
            Columns ``(batch,)`` that are kept of each sample that is read, ``IDENTITY`` among them.
        received
            By direction ``(batch, keys)`` the attention that each key receives, see `received_attention`.
        """
        self._modalities, self._group_noun = tuple(inputs.tokens), noun
        groups = keys if groups is None else groups
        features = {name: project(pooled_tokens(*tokens)) for name, tokens in inputs.tokens.items()}
        finite = torch.stack([one.isfinite().all(1) for one in features.values()]).all(0)
        hashes = torch.where(finite, hashed(keys, CHOSEN), NOT_KEPT)
        rows = {"hash": hashes, "fold": hashed(groups, _FOLDED) % FOLDS, "group": groups, **facts}
        self._left_out = self._left_out.to(keys.device) + (~finite).sum()
        self._read.add(rows | {f"features/{name}": one for name, one in features.items()})
        if inputs.model_output is not None and self._contribution_samples:
            kept = {name: rows[name] for name in ("hash", "group", *IDENTITY)}
            kept |= {f"received/{direction}": one for direction, one in received.items()}
            self._keep_tokens(inputs, inputs.model_output, kept)

    def _keep_tokens(self, inputs: FusionRecord, model_output: ModelOutput, rows: Columns) -> None:
        sound = (model_output.values.isfinite() & model_output.logits.isfinite()).all(1)
        rows["hash"] = torch.where(sound, rows["hash"], NOT_KEPT)
        rows |= {"values": model_output.values, "logits": model_output.logits}
        rows |= {f"tokens/{name}/{i}": one for name, kept in inputs.permuted.items() for i, one in enumerate(kept)}
        kind = _token_shape_of(rows)
        if kind not in self._permuted and len(self._permuted) == MAX_TOKEN_SHAPES:
            self._is_partial = True
            return
        self._permuted.setdefault(kind, BottomKSample(self._contribution_samples)).add(rows)
        if len(self._permuted) > 1 and sum(map(len, self._permuted.values())) > 4 * self._contribution_samples:
            self._reset()

    def _reset(self) -> None:
        """Of all token_shapes together keep no more tokens than are permuted.

        How many of each are kept depends on the hashes, so a GPU waits for it, once in so many samples; else the pool
        of each token_shape would hold as many.
        """
        whole = torch.cat([pool.hashes() for pool in self._permuted.values()])
        last = whole.sort().values[: self._contribution_samples][-1]
        for pool in self._permuted.values():
            pool.keep_to(last)

    def part(self) -> FusionPart | None:
        """What there is so far; None without any sample. A GPU waits for it."""
        rows = self._read.settled()
        if rows is None:
            return None
        settled = [pool.settled() for pool in self._permuted.values()]
        token_shapes = tuple(rows for rows in settled if rows is not None)
        return FusionPart(
            self._modalities, _moved(rows), token_shapes, self._group_noun, self._is_partial, int(self._left_out)
        )


def _token_shape_of(rows: Mapping[str, Tensor]) -> tuple[torch.Size, ...]:
    return tuple(values.shape[1:] for name, values in rows.items() if name.startswith(("tokens/", "received/")))


def _moved(rows: Columns) -> Columns:
    return {name: values.cpu() for name, values in rows.items()}
