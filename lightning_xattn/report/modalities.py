"""What a report says of the modalities: what each says by itself, whether they agree, and how much each contributes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, TypedDict

from lightning_xattn.aggregation import CORRECT, INCORRECT
from lightning_xattn.functional.contribution import OPPOSED
from lightning_xattn.fusion.summary import Estimate, FusionSummary
from lightning_xattn.messages import decimal
from lightning_xattn.report.rendering import Block, Items, Paragraph, Table
from lightning_xattn.report.verdict import describe_comparison
from lightning_xattn.summary import Comparison

HOW_TO_READ = (
    "A modality's reading is what a linear probe finds in what it brings into the fusion; no sample is read by a probe "
    "that has seen it or its group. Conflict is the chance that the readings, each drawing a class, draw different "
    "ones. Lean says whose reading supports the prediction more. A contribution is the part of the predicted class's "
    "probability that a modality carries (Shapley value): what changes when it is exchanged for that of other samples. "
    "Below 0 it speaks against the prediction (opposed: below -0.02). A reading tells what a modality knows, a "
    "contribution what the model uses. Neither says that a prediction is right: confidence is the baseline that any "
    "sign of that has to beat."
)

CONFLICTING = 10
"""So many samples of largest conflict are named."""


class ModalityFacts(TypedDict):
    """One modality over a data set."""

    name: str
    reading_accuracy: Estimate
    unreadable: str
    """Why it cannot be read; "" where it can."""
    contribution: Estimate | None
    """Mean of its signed contribution; None where contributions cannot be told."""
    share: Estimate | None


class ModalitySubset(TypedDict):
    """All samples, or those of one class or outcome."""

    group: Literal["all", "class", "outcome"]
    name: str
    conflict: Estimate
    leans_first: Estimate
    """Share of the samples in which the first modality's reading supports the prediction more."""
    shares: dict[str, Estimate] | None
    """Of the mean contribution, by modality."""
    opposed: Estimate | None


class ConflictingSample(TypedDict):
    """A sample of which the modalities say different things."""

    sample_idx: int
    """Its place among the samples of its process."""
    conflict: float
    says: dict[str, tuple[str, float]]
    """By modality, the class that its reading says and the probability of it."""
    predicted: str
    true: str | None
    confidence: float
    contributions: dict[str, float] | None
    """By modality; None where this sample was not exchanged."""


class FusionFacts(TypedDict):
    """The modalities of a data set."""

    samples: int
    groups: int | None
    group_noun: str | None
    left_out: int
    largest_class: float
    """Share of the largest class, which a reading has to beat."""
    modalities: list[ModalityFacts]
    subsets: list[ModalitySubset]
    untapped: Estimate
    """Share of the wrong predictions of which a modality's own reading is right."""
    uncontributed: str
    """Why contributions cannot be told; "" where they can."""
    interaction: Estimate | None
    emap_accuracy: Estimate | None
    """Accuracy of an additive projection, and of the model on the same samples."""
    model_accuracy: Estimate | None
    outcomes: dict[str, Comparison]
    """Confidence, the baseline, and conflict: do they tell correct from incorrect predictions?"""
    conflicting: list[ConflictingSample]
    """Those of largest conflict, the largest first."""


def collect_fusion(summary: FusionSummary, class_names: Sequence[str]) -> FusionFacts:
    """What is said of the modalities, as numbers."""
    told = not summary.uncontributed
    subsets: list[tuple[Literal["all", "class", "outcome"], str, int | None, int | None]] = [("all", "all", None, None)]
    subsets += [("class", name, class_id, None) for class_id, name in enumerate(class_names)]
    subsets += [("outcome", name, None, outcome) for name, outcome in (("correct", CORRECT), ("incorrect", INCORRECT))]
    whole = summary.estimate("confidence")
    return {
        "samples": summary.samples,
        "groups": summary.known_groups,
        "group_noun": summary.group_noun,
        "left_out": summary.left_out,
        "largest_class": summary.largest_class,
        "modalities": [
            {
                "name": name,
                "reading_accuracy": summary.estimate(f"right/{name}"),
                "unreadable": summary.unreadable.get(name, ""),
                "contribution": summary.estimate(f"phi/{name}") if told else None,
                "share": summary.share(name) if told else None,
            }
            for name in summary.modalities
        ],
        "subsets": [
            {
                "group": group,
                "name": name,
                "conflict": summary.estimate("conflict", *which),
                "leans_first": summary.estimate("leans_first", *which),
                "shares": {one: summary.share(one, *which) for one in summary.modalities} if told else None,
                "opposed": summary.estimate("opposed", *which) if told else None,
            }
            for group, name, *which in subsets
        ],
        "untapped": summary.estimate("untapped"),
        "uncontributed": summary.uncontributed,
        "interaction": summary.estimate("interaction") if told else None,
        "emap_accuracy": summary.estimate("additive_right") if told else None,
        "model_accuracy": summary.estimate("model_right") if told else None,
        "outcomes": {score: summary.compare(score) for score in ("confidence", "conflict") if whole.count},
        "conflicting": list(_collect_conflicting(summary, class_names)),
    }


def _collect_conflicting(summary: FusionSummary, class_names: Sequence[str]) -> Iterator[ConflictingSample]:
    numbers, conflict = summary.numbers, summary.numbers["conflict"]

    def name(class_id: int) -> str:
        return class_names[class_id] if class_id < len(class_names) else f"class {class_id}"

    for i in conflict.nan_to_num(nan=-1).argsort(descending=True, stable=True)[:CONFLICTING].tolist():
        if math.isnan(conflict[i]) or summary.predicted[i] < 0:
            continue
        phi = {one: float(numbers[f"phi/{one}"][i]) for one in summary.modalities if f"phi/{one}" in numbers}
        yield {
            "sample_idx": int(summary.sample_numbers[i]),
            "conflict": float(conflict[i]),
            "says": {
                one: (name(int(reading[i].argmax())), float(reading[i].max()))
                for one, reading in summary.readings.items()
            },
            "predicted": name(int(summary.predicted[i])),
            "true": name(int(summary.target[i])) if summary.target[i] >= 0 else None,
            "confidence": float(numbers["confidence"][i]),
            "contributions": phi if phi and not any(map(math.isnan, phi.values())) else None,
        }


def describe_fusion(facts: FusionFacts, group_by: str) -> Iterator[Block]:
    """The modalities in words: a table of each, one by class and outcome, and what tells errors."""
    noun = facts["group_noun"]
    counts = [("Samples", f"{facts['samples']} of {facts['groups']} {noun}" if noun else str(facts["samples"]), ())]
    if facts["left_out"]:
        counts.append(("Samples left out, as what enters the fusion is not finite", str(facts["left_out"]), ()))
    yield Items(counts)
    modalities = facts["modalities"]
    yield Table(
        ("modality", "says: accuracy of its reading", "carries: contribution", "share"),
        [
            (
                one["name"],
                _estimate(one["reading_accuracy"]) + (" (cannot be read)" if one["unreadable"] else ""),
                _estimate(one["contribution"], signed=True),
                _estimate(one["share"]),
            )
            for one in modalities
        ],
    )
    for one in modalities:
        if one["unreadable"]:
            yield Paragraph(f"{one['name']} cannot be read by itself: {one['unreadable']}.")
    if facts["uncontributed"]:
        yield Paragraph(f"Contributions cannot be told: {facts['uncontributed']}.")
    yield from _describe_subsets(facts, group_by)
    items = list(_describe_wholes(facts))
    if items:
        yield Items(items, "Over all samples")
    if facts["conflicting"]:
        lines = [(f"Sample {one['sample_idx']}", _describe_conflicting(one), ()) for one in facts["conflicting"]]
        yield Items(lines, "Samples of largest conflict")
    outcomes = [describe_comparison(score, score, one, noun) for score, one in facts["outcomes"].items()]
    if outcomes:
        yield Items(outcomes, "Correct against incorrect predictions, confidence first")


def _describe_subsets(facts: FusionFacts, group_by: str) -> Iterator[Block]:
    names = [one["name"] for one in facts["modalities"]]
    readable = not any(one["unreadable"] for one in facts["modalities"])
    columns: list[tuple[str, list[Estimate | None]]] = []
    subsets = facts["subsets"]
    if readable:
        columns.append(("conflict", [one["conflict"] for one in subsets]))
        if len(names) == 2:
            columns.append((f"leans to {names[0]}", [one["leans_first"] for one in subsets]))
    if not facts["uncontributed"]:
        for name in names:
            columns.append(
                (f"share of {name}", [None if one["shares"] is None else one["shares"][name] for one in subsets])
            )
        columns.append(("opposed", [one["opposed"] for one in subsets]))
    if columns:
        title = {"target": "true class", "prediction": "predicted class"}[group_by]
        rows = [(one["name"], *(_estimate(values[i]) for _, values in columns)) for i, one in enumerate(subsets)]
        yield Table((title, *(name for name, _ in columns)), rows)


def _describe_wholes(facts: FusionFacts) -> Iterator[tuple[str, str, Sequence[str]]]:
    if facts["untapped"].count:
        yield "Wrong predictions of which a modality's own reading is right", _estimate(facts["untapped"]), ()
    if facts["interaction"] is not None:
        yield "Interaction (centred logits)", _estimate(facts["interaction"], signed=True), ()
    additive, model = facts["emap_accuracy"], facts["model_accuracy"]
    if additive is not None and model is not None and additive.count:
        yield (
            "Accuracy if the modalities only added up (EMAP)",
            f"{_estimate(additive)}, the model's {_estimate(model)}",
            (),
        )


def _describe_conflicting(one: ConflictingSample) -> str:
    says = ", ".join(f"{modality} says {name} ({decimal(p)})" for modality, (name, p) in one["says"].items())
    true = "" if one["true"] is None else f", true class {one['true']}"
    return f"{says}; {_describe_followed(one)}; confidence {decimal(one['confidence'])}{true}"


def _describe_followed(one: ConflictingSample) -> str:
    """Whom the model followed, where its contribution is clearly the largest."""
    predicted, phi = f"the model says {one['predicted']}", one["contributions"]
    if phi is None:
        return predicted
    first, second, *_ = sorted(phi, key=lambda name: -phi[name])
    shown = ", ".join(f"{name} {decimal(value, signed=True)}" for name, value in phi.items())
    followed = f" and follows {first}" if phi[first] - phi[second] > -OPPOSED else ""
    return f"{predicted}{followed} (contributions: {shown})"


def _estimate(one: Estimate | None, signed: bool = False) -> str:
    if one is None or math.isnan(one.mean):
        return "undefined"
    interval = "" if math.isnan(one.low) else f" ({decimal(one.low, 3)} to {decimal(one.high, 3)})"
    return f"{decimal(one.mean, 3, signed=signed)}{interval}"
