"""Single samples: what each modality's probe predicts, and which modality the model's prediction is mostly from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xattn.attribution.kept_samples import CHOSEN, IDENTITY
from lightning_xattn.core.ids import hashed
from lightning_xattn.core.wording import decimal, name_modality, percent
from lightning_xattn.evaluation.fusion_summary import FusionSummary, interaction_names
from lightning_xattn.functional.shapley import MOSTLY

LEAST_CONTRIBUTION = 0.02
"""The least contribution of a modality that a prediction follows."""

CONFLICTING = 10
"""This many samples of largest conflict are shown."""

NONE_MOSTLY = "no modality clearly for more than two thirds"
"""The words for shares of which none is clearly above ``MOSTLY``."""


@dataclass(frozen=True)
class SampleModalities:
    """The probes and contributions of a sample's modalities; as a string, a sentence.

    Attributes
    ----------
    conflict
        In [0, 1]; NaN where a probe has a problem.
    probes
        By modality, the class that its probe predicts and that class's probability; empty where one has a problem.
    predicted, true
        The names of the classes; None where they are not known.
    confidence
        Probability of the prediction; NaN where it is not known.
    contributions
        By modality, see `Game.phi`; empty where this sample was not permuted.
    followed
        The modality that clearly has more than `MOSTLY` of all contributions to the prediction; None where there is
        none, or contributions are not known.
    """

    conflict: float
    probes: dict[str, tuple[str, float]]
    predicted: str | None
    true: str | None
    confidence: float
    contributions: dict[str, float]
    followed: str | None

    def __str__(self) -> str:
        parts = [
            f"{name_modality(one)}'s probe predicts {name} ({decimal(p)})" for one, (name, p) in self.probes.items()
        ]
        parts += [] if self.predicted is None else [f"the model predicts {self.predicted}{self._describe_followed()}"]
        about = [] if math.isnan(self.confidence) else [f"confidence {decimal(self.confidence)}"]
        about += [] if self.true is None else [f"true class {self.true}"]
        return "; ".join(filter(None, (", ".join(parts), ", ".join(about))))

    def _describe_followed(self) -> str:
        if not self.contributions:
            return ""
        whole = sum(self.contributions.values())
        if min(self.contributions.values()) >= 0 and whole > 0:
            parts = {name: percent(phi / whole, 0) for name, phi in self.contributions.items()}
            listed = ", ".join(f"{name_modality(name)} {share}" for name, share in parts.items())
            shown = f"shares {listed}" if self.followed is None else f"share {parts[self.followed]}"
        else:  # where one opposes the prediction there are no shares
            parts = {name: decimal(phi, signed=True) for name, phi in self.contributions.items()}
            shown = "contributions " + ", ".join(f"{name_modality(name)} {phi}" for name, phi in parts.items())
        if self.followed is None:
            any_contributes = any(phi > 0 for phi in self.contributions.values())
            return f", {NONE_MOSTLY if any_contributes else 'to which no modality contributes'} ({shown})"
        who, (by_probe, _) = name_modality(self.followed), self.probes.get(self.followed, ("", 0.0))
        if by_probe == self.predicted:
            return f" and follows {who} ({shown})"
        # What the model uses of a modality need not be what the modality's probe finds: then it does not follow it.
        contrast = f", though {who}'s own probe predicts {by_probe}" if by_probe else ""
        return f", mostly because of {who} ({shown}){contrast}"


def describe_modalities(summary: FusionSummary, i: int, class_names: Sequence[str]) -> SampleModalities:
    """The probes and contributions of one sample.

    Parameters
    ----------
    summary
        Of the evaluation.
    i
        The sample's place in ``summary.numbers``.
    class_names
        One for each class, or none.
    """

    def name(class_id: int) -> str | None:
        if class_id < 0:
            return None
        return class_names[class_id] if class_id < len(class_names) else f"class {class_id}"

    numbers = summary.numbers
    probes = {} if summary.probe_problems else {one: probe[i] for one, probe in summary.probes.items()}
    predicted = {one: (str(name(int(p.argmax()))), float(p.max())) for one, p in probes.items() if not p.isnan().any()}
    phi = {one: float(numbers[f"phi/{one}"][i]) for one in summary.modalities if f"phi/{one}" in numbers}
    phi = {} if any(map(math.isnan, phi.values())) else phi
    errors = {one: float(numbers[f"error/{one}"][i]) for one in phi}
    return SampleModalities(
        float(numbers["conflict"][i]),
        predicted,
        name(int(summary.predicted[i])),
        name(int(summary.target[i])),
        float(numbers["confidence"][i]),
        phi,
        None if summary.is_regression else _find_followed(phi, errors),
    )


def _find_followed(phi: Mapping[str, float], errors: Mapping[str, float]) -> str | None:
    """The modality with clearly more than `MOSTLY` of all contributions to the prediction, if there is one.

    A margin of two standard errors is left. The errors of a sample's modalities are of the same
    replays: too much for one is too little for another, so they add up.
    """
    for one in phi:
        others = [name for name in phi if name != one]
        # Over two thirds of the whole is over twice as much as all others.
        times = MOSTLY / (1 - MOSTLY)
        least = phi[one] - 2 * errors[one]
        most = sum(max(phi[name], 0.0) + 2 * errors[name] for name in others)
        if least > LEAST_CONTRIBUTION and least > times * most:
            return one
    return None


def most_conflicting(summary: FusionSummary) -> list[int]:
    """The places of the `CONFLICTING` samples of largest conflict, the largest first.

    Where contributions are known, only samples with contributions count, as their followed modality is shown, too.
    """
    conflict = summary.numbers["conflict"]
    if not summary.contribution_problem:
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


def sample_columns(summary: FusionSummary) -> dict[str, Tensor]:
    """The columns of the sample table that are known at the end: ``IDENTITY``, probes and contributions."""
    columns = {name: summary.rows[name] for name in IDENTITY}
    columns |= {name: summary.numbers[name] for name in ("conflict", "support_difference", "only_probe_right")}
    for name, probe in summary.probes.items():
        known = ~probe.isnan().any(1) & (name not in summary.probe_problems)
        columns[f"probe_{name}"] = torch.where(known, probe.argmax(1), -1)
        columns[f"probe_{name}_probability"] = torch.where(known, probe.amax(1), torch.nan)
    undefined = torch.full_like(summary.numbers["confidence"], torch.nan)
    interactions = interaction_names(summary.modalities)
    for name in (*(f"phi/{modality}" for modality in summary.modalities), "followed", *interactions):
        column = f"contribution_{name.removeprefix('phi/').replace('/', '_')}"
        columns[column] = summary.numbers.get(name, undefined)
    return columns
