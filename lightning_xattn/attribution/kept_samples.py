"""The samples of an evaluation that are kept until its end: what the probes read, and what is permuted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_xattn.attribution.bottom_k import NOT_KEPT, BottomKSample, Columns, hashed
from lightning_xattn.attribution.recorder import FusionRecord
from lightning_xattn.attribution.replay import ModelOutput
from lightning_xattn.core.distributed import NUMBER
from lightning_xattn.functional import pooled_tokens, project
from lightning_xattn.functional.outcomes import UNKNOWN
from lightning_xattn.functional.probe import FOLDS

MAX_SAMPLES = 8192
"""The linear probes are fitted and tested on at most this many samples of an evaluation."""

IDENTITY = ("process", NUMBER)
"""The columns that tell a sample from every other one of its evaluation."""

CHOSEN, _FOLDED = range(2)
"""Salts of the hashes that decide which samples are kept, and which fold each is in."""


@dataclass(eq=False)
class KeptSamples:
    """What is kept of the samples of one process, or with ``+`` of several: those that one process would have kept.

    Parameters
    ----------
    probed
        Rows for the linear probes: "hash", "fold", "group", "features/<modality>", and further columns of each sample.
    permuted
        Rows to be permuted and replayed: "hash", "group", ``IDENTITY``, "values", "logits",
        "tokens/<modality>/<number>" and "received/<direction>".

    Attributes
    ----------
    modalities
        Their names; empty before the first sample.
    group_noun
        What groups are called; None where they are not known, so that each sample is its own group.
    nonfinite
        How many samples were left out because their tokens at the fusion are not finite.
    """

    probed: BottomKSample
    permuted: BottomKSample
    modalities: tuple[str, ...] = ()
    group_noun: str | None = None
    nonfinite: Tensor = field(default_factory=lambda: torch.tensor(0))

    def __add__(self, other: KeptSamples) -> KeptSamples:
        if not (self.modalities and other.modalities):
            return self if self.modalities else other
        return replace(
            self,
            probed=self.probed + other.probed,
            permuted=self.permuted + other.permuted,
            nonfinite=self.nonfinite + other.nonfinite,
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
            ``(batch,)`` int64 key of each sample, the same in every run: of its id, or of its index.
        groups
            ``(batch,)`` int64 key of each sample's group; None: each sample is its own group.
        noun
            What groups are called.
        facts
            Further columns ``(batch,)`` that are kept of each sample, ``IDENTITY`` among them.
        received
            By direction ``(batch, keys)`` the attention that each key receives, see `received_attention`.
        """
        self.modalities, self.group_noun = tuple(inputs.tokens), noun
        groups = keys if groups is None else groups
        features = {name: project(pooled_tokens(*tokens)) for name, tokens in inputs.tokens.items()}
        finite = torch.stack([one.isfinite().all(1) for one in features.values()]).all(0)
        hashes = torch.where(finite, hashed(keys, CHOSEN), NOT_KEPT)
        rows = {"hash": hashes, "fold": hashed(groups, _FOLDED) % FOLDS, "group": groups, **facts}
        self.nonfinite = self.nonfinite.to(keys.device) + (~finite).sum()
        self.probed.add(rows | {f"features/{name}": one for name, one in features.items()})
        if inputs.model_output is not None and self.permuted.size:
            kept = {name: rows[name] for name in ("hash", "group", *IDENTITY)}
            kept |= {f"received/{direction}": one for direction, one in received.items()}
            self._add_permuted(inputs, inputs.model_output, kept)

    def _add_permuted(self, inputs: FusionRecord, output: ModelOutput, rows: Columns) -> None:
        finite = (output.values.isfinite() & output.logits.isfinite()).all(1)
        rows["hash"] = torch.where(finite, rows["hash"], NOT_KEPT)
        rows |= {"values": output.values, "logits": output.logits}
        rows |= {f"tokens/{name}/{i}": one for name, kept in inputs.permuted.items() for i, one in enumerate(kept)}
        self.permuted.add(rows)

    def cpu(self) -> KeptSamples:
        """Give the same on the CPU, to be sent to other processes."""
        return replace(self, probed=self.probed.cpu(), permuted=self.permuted.cpu(), nonfinite=self.nonfinite.cpu())

    def without_labels(self) -> KeptSamples:
        """Give the same without classes, predictions, confidences and outcomes."""

        def drop_labels(rows: Columns) -> Columns:
            unknown = {name: torch.full_like(rows[name], -1) for name in ("class", "target", "prediction")}
            unknown |= {"correct": torch.full_like(rows["correct"], UNKNOWN)}
            return rows | unknown | {"confidence": torch.full_like(rows["confidence"], torch.nan)}

        return replace(self, probed=self.probed.map(drop_labels))
