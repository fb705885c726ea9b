"""What probes predict of each sample, and who agrees, from their log probabilities of a few samples at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xattn import functional
from lightning_xattn.core.chunks import rows_at_once
from lightning_xattn.functional.linear_probe import LinearProbe

Names = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ProbeNumbers:
    """The numbers of each sample, which are all that is kept of its log probabilities.

    Attributes
    ----------
    most_probable
        By a probe's modalities ``(samples,)`` int64 the class that it predicts; -1 where it cannot read the sample.
    probability
        By a probe's modalities ``(samples,)`` that of the most probable class; NaN where it cannot read the sample.
    of_target
        By a probe's modalities ``(samples,)`` log probability of the true class; anything where that is not known.
    supports
        ``(modalities, samples)``, see `functional.supports`.
    support, conflict
        ``(samples,)``, see `functional.support` and `functional.conflict`.
    support_cell, right_cell
        ``(samples,)`` int64, see `functional.support_cells` and `functional.right_cells`.
    """

    most_probable: dict[Names, Tensor]
    probability: dict[Names, Tensor]
    of_target: dict[Names, Tensor]
    supports: Tensor
    support: Tensor
    conflict: Tensor
    support_cell: Tensor
    right_cell: Tensor

    @classmethod
    def of(
        cls, probes: Mapping[Names, LinearProbe], modalities: Names, predicted: Tensor, target: Tensor, folds: Tensor
    ) -> ProbeNumbers:
        """The numbers of all samples.

        Parameters
        ----------
        probes
            By modalities: of each alone, of all together, and others.
        modalities
            All of them.
        predicted, target
            ``(samples,)`` int64 class ids; -1: none.
        folds
            ``(samples,)`` int64, those of the probes: a fit is made once where samples of a fold come together.
        """
        # Classes that no fit knows have no probability: to leave them out changes no number.
        classes = probes[modalities].classes
        predicted, target = find_places(classes, predicted), find_places(classes, target)
        order, rows = folds.argsort(stable=True), rows_at_once(len(classes) * len(probes))
        parts = [_read(probes, modalities, some, predicted[some], target[some]) for some in order.split(rows)]
        place = order.argsort()

        def join(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts], dim=-1)[..., place]

        def join_all(name: str) -> dict[Names, Tensor]:
            return {several: torch.cat([getattr(part, name)[several] for part in parts])[place] for several in probes}

        return cls(
            join_all("most_probable"),
            join_all("probability"),
            join_all("of_target"),
            join("supports"),
            join("support"),
            join("conflict"),
            join("support_cell"),
            join("right_cell"),
        )

    def is_read(self, several: Names) -> Tensor:
        """``(samples,)`` bool: whether the probe on these modalities reads the sample."""
        return self.most_probable[several] >= 0


def find_places(classes: Tensor, ids: Tensor) -> Tensor:
    """The place of each class id among ascending ``classes``; -1 where it is none of them."""
    place = torch.searchsorted(classes, ids).clamp_max(len(classes) - 1)
    return torch.where(classes[place] == ids, place, -1)


def _read(
    probes: Mapping[Names, LinearProbe], modalities: Names, rows: Tensor, predicted: Tensor, target: Tensor
) -> ProbeNumbers:
    """The numbers of some samples, of which these are the places of classes."""
    logs = {several: probe.of_known_classes(rows) for several, probe in probes.items()}
    best = {several: one.max(1) for several, one in logs.items()}
    is_read = {several: ~one.isnan().any(1) for several, one in logs.items()}
    alone, joint = torch.stack([logs[name,] for name in modalities]), logs[modalities]
    own = target.clamp_min(0)[:, None]
    return ProbeNumbers(
        {
            several: torch.where(is_read[several], probes[several].classes[one.indices], -1)
            for several, one in best.items()
        },
        {several: one.values.exp() for several, one in best.items()},
        {several: one.gather(1, own)[:, 0] for several, one in logs.items()},
        functional.supports(alone, predicted),
        functional.support(alone, predicted),
        functional.conflict(alone.exp()),
        functional.support_cells(alone, predicted),
        functional.right_cells(alone, joint, target),
    )
