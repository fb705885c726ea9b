"""Single samples: what each modality's probe predicts, who supports the prediction, and what contributes to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xattn.attribution.kept_samples import CHOSEN, IDENTITY
from lightning_xattn.core.ids import hashed
from lightning_xattn.core.wording import decimal, name_modality, percent, say_interval
from lightning_xattn.evaluation.fusion_summary import FusionSummary, interaction_names
from lightning_xattn.evaluation.support import name_cells
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.functional.shapley import MOSTLY

LEAST_CONTRIBUTION = 0.02
"""The least contribution of a modality that a prediction is mostly from."""

UNSUPPORTED = 10
"""This many predictions that no modality supports are listed."""

NONE_MOSTLY = "no modality clearly contributes more than two thirds"
"""The words for shares of which none is clearly above ``MOSTLY``."""


@dataclass(frozen=True)
class SampleModalities:
    """The probes and contributions of a sample's modalities; as a string, what a reader should know of it.

    Attributes
    ----------
    support
        In nats, see `functional.support`; NaN where it is not computed.
    probes
        By modality, the class that its probe predicts and that class's probability; empty where one has a problem.
    supporters
        The modalities whose probe predicts what the model predicts; None where support is not computed.
    similar
        How often the model is right for samples with the same supporters; None where that is not known.
    predicted, true
        The names of the classes; None where they are not known.
    confidence
        Probability of the prediction; NaN where it is not known.
    contributions
        By modality, see `Game.phi`; empty where this sample was not permuted.
    main
        The modality that clearly has more than `MOSTLY` of all contributions to the prediction; None where there is
        none, or contributions are not known.
    similar_noun
        What the similar samples are called.
    """

    support: float
    probes: dict[str, tuple[str, float]]
    supporters: tuple[str, ...] | None
    similar: Estimate | None
    predicted: str | None
    true: str | None
    confidence: float
    contributions: dict[str, float]
    main: str | None
    similar_noun: str = "such samples"

    def __str__(self) -> str:
        probes = [
            f"{'the one' if i else 'the probe'} on {name_modality(one)} {'' if i else 'predicts '}{name} "
            f"({percent(p, 0)})"
            for i, (one, (name, p)) in enumerate(self.probes.items())
        ]
        parts = [", ".join(probes)] if probes else []
        if self.predicted is not None:
            sure = "" if math.isnan(self.confidence) else f" ({percent(self.confidence, 0)})"
            parts.append(f"the model predicts {self.predicted}{sure}{self._describe_support()}")
        elif not math.isnan(self.confidence):
            parts.append(f"confidence {percent(self.confidence, 0)}")
        parts += [self._describe_contributions()] if self.contributions else []
        parts += [] if self.true is None else [f"the true class is {self.true}"]
        said = "; ".join(parts)
        return f"{said[:1].upper()}{said[1:]}.{self._describe_similar()}" if said else ""

    def _describe_support(self) -> str:
        if self.supporters is None:
            return ""
        if not self.supporters:
            none = "neither" if len(self.probes) == 2 else "none"
            agree = len({name for name, _ in self.probes.values()}) == 1
            return (
                f", supported by {none}, though their probes agree with each other"
                if agree
                else f", supported by {none}"
            )
        if len(self.supporters) == len(self.probes):
            return f", supported by {'both' if len(self.probes) == 2 else 'all'}"
        return f", supported by {' and '.join(map(name_modality, self.supporters))} only"

    def _describe_similar(self) -> str:
        one = self.similar
        if one is None or not one.count:
            return "" if one is None else f" There were no {self.similar_noun}."
        interval = "" if math.isnan(one.low) else f" (95 % CI {say_interval(one.low, one.high, 0, as_percent=True)})"
        noun = self.similar_noun if one.count > 1 else self.similar_noun.replace("samples", "sample")
        return f" Of {one.count} {noun} {percent(one.mean, 0)} were right{interval}."

    def _describe_contributions(self) -> str:
        whole = sum(self.contributions.values())
        if min(self.contributions.values()) >= 0 and whole > 0:
            parts = {name: percent(phi / whole, 0) for name, phi in self.contributions.items()}
            listed = ", ".join(f"{name_modality(name)} {share}" for name, share in parts.items())
            shown = f"shares: {listed}"
        else:  # where one opposes the prediction there are no shares
            parts = {name: decimal(phi, signed=True) for name, phi in self.contributions.items()}
            shown = "contributions: " + ", ".join(f"{name_modality(name)} {phi}" for name, phi in parts.items())
        if self.main is not None:
            return f"{name_modality(self.main)} contributes most ({shown})"
        any_contributes = any(phi > 0 for phi in self.contributions.values())
        return f"{NONE_MOSTLY if any_contributes else 'no modality contributes'} ({shown})"


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
    cell, saved = int(summary.support_cell[i]), summary.saved
    class_names = class_names or (saved.class_names if saved else ())
    numbers = summary.numbers
    probes = {} if summary.probe_problems else summary.probe_classes
    predicted = {
        one: (str(name_class(int(classes[i]), class_names)), float(summary.probe_probabilities[one][i]))
        for one, classes in probes.items()
        if classes[i] >= 0
    }
    accuracies = [one.accuracy for one in summary.cells] if saved is None else saved.accuracies
    phi = {one: float(numbers[f"phi/{one}"][i]) for one in summary.modalities if f"phi/{one}" in numbers}
    phi = {} if any(map(math.isnan, phi.values())) else phi
    errors = {one: float(numbers[f"error/{one}"][i]) for one in phi}
    return SampleModalities(
        float(numbers["support"][i]),
        predicted,
        None if cell < 0 else tuple(one for one in summary.modalities if numbers[f"supports/{one}"][i] == 1),
        None if cell < 0 else accuracies[cell],
        name_class(int(summary.predicted[i]), class_names),
        name_class(int(summary.target[i]), class_names),
        float(numbers["confidence"][i]),
        phi,
        None if summary.is_regression else _find_main(phi, errors),
        _name_similar(summary, cell),
    )


def _name_similar(summary: FusionSummary, cell: int) -> str:
    """What the samples of a cell are called."""
    # Of more than two modalities a cell has all samples with as many supporters.
    are_counted = len(summary.modalities) > 2 and 0 < cell < len(summary.modalities)
    noun = "samples that as many modalities support" if are_counted else "such samples"
    return noun if summary.saved is None else f"{noun} of the labelled evaluation"


def name_class(class_id: int, class_names: Sequence[str]) -> str | None:
    """The name of a class, or its number; None where it is not known (-1)."""
    if class_id < 0:
        return None
    return class_names[class_id] if class_id < len(class_names) else f"class {class_id}"


def _find_main(phi: Mapping[str, float], errors: Mapping[str, float]) -> str | None:
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


def most_confident_unsupported(summary: FusionSummary) -> list[int]:
    """The places of the `UNSUPPORTED` most confident predictions that no modality supports, most confident first."""
    first = len(name_cells(summary.modalities)) - 2
    confidence = summary.numbers["confidence"].nan_to_num(nan=0).masked_fill(summary.support_cell < first, -1)
    order = confidence.argsort(descending=True, stable=True)[:UNSUPPORTED].tolist()
    return [i for i in order if confidence[i] >= 0]


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
    """The columns of the sample table that are known at the end: ``IDENTITY``, probes, support and contributions."""
    numbers = summary.numbers
    columns = {name: summary.rows[name] for name in IDENTITY} | {
        name: numbers[name] for name in ("support", "conflict")
    }
    for name, classes in summary.probe_classes.items():
        known = (classes >= 0) & (name not in summary.probe_problems)
        columns[f"supports/{name}"] = numbers[f"supports/{name}"]
        columns[f"probe/{name}"] = torch.where(known, classes, -1)
        columns[f"probe_probability/{name}"] = torch.where(known, summary.probe_probabilities[name], torch.nan)
    undefined = torch.full_like(numbers["confidence"], torch.nan)
    for name in summary.modalities:
        columns[f"contribution/{name}"] = numbers.get(f"phi/{name}", undefined)
    for name in interaction_names(summary.modalities):
        columns[name] = numbers.get(name, undefined)
    return columns
