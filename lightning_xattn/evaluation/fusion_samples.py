"""What is said of a single sample: what each modality says, and which one its prediction is mostly from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xattn.attribution.bottom_k import hashed
from lightning_xattn.attribution.kept_samples import CHOSEN
from lightning_xattn.core.wording import decimal, name_modality, percent
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.functional.shapley import MOSTLY, OPPOSED

CONFLICTING = 10
"""So many samples of largest conflict are shown."""

NONE_MOSTLY = "no modality clearly for more than two thirds"
"""What is said where no share is clearly above ``MOSTLY``."""


@dataclass(frozen=True)
class SampleModalities:
    """What the modalities of a sample say and contribute; as a string, a sentence.

    Attributes
    ----------
    conflict
        In [0, 1]; NaN where a modality cannot be read.
    says
        By modality, the class that its probe says and the probability of it; empty where one cannot be read.
    predicted, true
        The names of the classes; None where they are not known.
    confidence
        Probability of the prediction; NaN where it is not known.
    contributions
        By modality, see `Game.phi`; empty where this sample was not permuted.
    followed
        The modality that clearly has more than `MOSTLY` of what speaks for the prediction; None where there is none, or
        it is not known.
    """

    conflict: float
    says: dict[str, tuple[str, float]]
    predicted: str | None
    true: str | None
    confidence: float
    contributions: dict[str, float]
    followed: str | None

    def __str__(self) -> str:
        says = [f"{name_modality(one)} says {name} ({decimal(p)})" for one, (name, p) in self.says.items()]
        says += [] if self.predicted is None else [f"the model says {self.predicted}{self._say_followed()}"]
        about = [] if math.isnan(self.confidence) else [f"confidence {decimal(self.confidence)}"]
        about += [] if self.true is None else [f"true class {self.true}"]
        return "; ".join(filter(None, (", ".join(says), ", ".join(about))))

    def _say_followed(self) -> str:
        if not self.contributions:
            return ""
        whole = sum(self.contributions.values())
        if min(self.contributions.values()) >= 0 and whole > 0:
            parts = {name: percent(phi / whole, 0) for name, phi in self.contributions.items()}
            carried = ", ".join(f"{name_modality(name)} {share}" for name, share in parts.items())
            shown = f"shares {carried}" if self.followed is None else f"share {parts[self.followed]}"
        else:  # where one speaks against the prediction there are no shares
            parts = {name: decimal(phi, signed=True) for name, phi in self.contributions.items()}
            shown = "contributions " + ", ".join(f"{name_modality(name)} {phi}" for name, phi in parts.items())
        if self.followed is None:
            for_it = any(phi > 0 for phi in self.contributions.values())
            return f", {NONE_MOSTLY if for_it else 'to which no modality contributes'} ({shown})"
        who, (said, _) = name_modality(self.followed), self.says.get(self.followed, ("", 0.0))
        if said == self.predicted:
            return f" and follows {who} ({shown})"
        # What is used of a modality need not be what it says by itself: then the model does not follow it.
        return f", mostly because of {who} ({shown})" + (f", though {who} by itself says {said}" if said else "")


def of_sample(summary: FusionSummary, i: int, class_names: Sequence[str]) -> SampleModalities:
    """What is said of a sample.

    Parameters
    ----------
    summary
        Of the evaluation.
    i
        The sample's place in ``summary.numbers``.
    class_names
        As many as there are classes, or none.
    """

    def name(class_id: int) -> str | None:
        if class_id < 0:
            return None
        return class_names[class_id] if class_id < len(class_names) else f"class {class_id}"

    numbers = summary.numbers
    probes = {} if summary.unreadable else {one: probe[i] for one, probe in summary.probes.items()}
    says = {one: (str(name(int(p.argmax()))), float(p.max())) for one, p in probes.items() if not p.isnan().any()}
    phi = {one: float(numbers[f"phi/{one}"][i]) for one in summary.modalities if f"phi/{one}" in numbers}
    phi = {} if any(map(math.isnan, phi.values())) else phi
    return SampleModalities(
        float(numbers["conflict"][i]),
        says,
        name(int(summary.predicted[i])),
        name(int(summary.target[i])),
        float(numbers["confidence"][i]),
        phi,
        None if summary.of_value else _find_followed(phi, {one: float(numbers[f"error/{one}"][i]) for one in phi}),
    )


def _find_followed(phi: Mapping[str, float], errors: Mapping[str, float]) -> str | None:
    """The modality with clearly more than `MOSTLY` of what speaks for the prediction, if there is one.

    Twice the standard errors are allowed for, as in `opposed`. Those of one sample's modalities are of the same
    permutes: what is too much for the one is too little for another, so they add up.
    """
    for one in phi:
        others = [name for name in phi if name != one]
        # Over two thirds of the whole: over twice as much as all others.
        times = MOSTLY / (1 - MOSTLY)
        least = phi[one] - 2 * errors[one]
        most = sum(max(phi[name], 0.0) + 2 * errors[name] for name in others)
        if least > -OPPOSED and least > times * most:
            return one
    return None


def most_conflicting(summary: FusionSummary) -> list[int]:
    """The places of the `CONFLICTING` samples of largest conflict, the largest first; fewer where it is not known.

    Where contributions are known, of those that were permuted, as else it cannot be said which modality was followed.
    """
    conflict = summary.numbers["conflict"]
    if not summary.uncontributed:
        conflict = conflict.masked_fill(summary.numbers[f"phi/{summary.modalities[0]}"].isnan(), torch.nan)
    order = conflict.nan_to_num(nan=-1).argsort(descending=True, stable=True)[:CONFLICTING].tolist()
    return [i for i in order if not math.isnan(conflict[i])]


def find_samples(summary: FusionSummary, keys: Tensor) -> list[int | None]:
    """The place in ``summary.numbers`` of the sample with each key ``(n,)`` (see ``group_keys``).

    None where there is none, or several.
    """
    places: dict[int, list[int]] = {}
    for i, one in enumerate(summary.rows["hash"].tolist()):
        places.setdefault(one, []).append(i)
    found = [places.get(one, []) for one in hashed(keys, CHOSEN).tolist()]
    return [one[0] if len(one) == 1 else None for one in found]


def sample_columns(summary: FusionSummary, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """What is said of single samples of a process, for the table: their numbers, and the columns."""
    of_rank = summary.rows["process"] == rank
    columns = {name: summary.numbers[name] for name in ("conflict", "support_difference", "probe_right")}
    for name, probe in summary.probes.items():
        known = ~probe.isnan().any(1) & (name not in summary.unreadable)
        columns[f"probe_{name}"] = torch.where(known, probe.argmax(1), -1)
        columns[f"probe_{name}_probability"] = torch.where(known, probe.amax(1), torch.nan)
    undefined = torch.full_like(summary.numbers["confidence"], torch.nan)
    interactions = summary.interactions or ("interaction",)
    for name in (*(f"phi/{one}" for one in summary.modalities), "followed", "opposed", *interactions):
        column = f"contribution_{name.removeprefix('phi/').replace('/', '_')}"
        columns[column] = summary.numbers.get(name, undefined)
    return summary.sample_numbers[of_rank], {name: values[of_rank] for name, values in columns.items()}
