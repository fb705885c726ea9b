"""What a report says of the modalities: what each says by itself, whether they agree, and how much each contributes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypedDict

from lightning_xattn.core.attention import Direction
from lightning_xattn.core.wording import by_reason, decimal, name_modality, percent, say_interval
from lightning_xattn.evaluation.fusion_samples import (
    NONE_MOSTLY,
    SampleModalities,
    describe_modalities,
    most_conflicting,
)
from lightning_xattn.evaluation.fusion_summary import Estimate, FusionSummary
from lightning_xattn.evaluation.layer_summary import Comparison
from lightning_xattn.evaluation.results import EarlierTest
from lightning_xattn.functional.intervals import MINIMUM_GROUP
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.functional.shapley import MOSTLY
from lightning_xattn.report.rendering import Block, Items, Paragraph, Table
from lightning_xattn.report.verdict import describe_comparison

HOW_TO_READ = (
    "Knows: what a linear probe reads of the class in what a modality brings into the fusion; no sample is read by a "
    "probe that has seen it or its group. Conflict is the chance that the probes, each drawing a class, draw "
    "different ones; the support difference says whose probe supports the prediction more. Uses: a contribution is "
    "the part of the predicted class's probability that a modality carries (Shapley value), which is what changes "
    "when it is permuted "
    "for that of other samples; below 0 it speaks against the prediction (opposed: below -0.02). A share of all "
    "contributions below 0 or above 100 % means the same of many predictions; mostly one modality is said only where "
    "the 95 % CI of its share lies above two thirds. Shows: faithfulness is what replacing the most attended tokens "
    "costs more than replacing the least attended, over what it costs to replace all; 1: the first hold all of it, 0: "
    "what a random order gives. Its reference is the order by signed gradient x attention. None of these says that a "
    "prediction is right: confidence is the baseline that any sign of that has to beat."
)


class ModalityFacts(TypedDict):
    """One modality over a data set."""

    name: str
    probe_accuracy: Estimate
    unreadable: str
    """Why it cannot be read; "" where it can."""
    contribution: Estimate | None
    """Mean of its signed contribution; None where contributions cannot be told."""
    share: Estimate | None
    size: Estimate | None
    """Mean of its absolute contribution; None where the predictions are classes."""


class ModalitySubset(TypedDict):
    """All samples, or those of one class or outcome."""

    group: Literal["all", "class", "outcome"]
    name: str
    conflict: Estimate
    supports_first: Estimate
    """Share of the samples in which the first modality's probe supports the prediction more."""
    shares: dict[str, Estimate] | None
    """Of the mean contribution, by modality."""
    opposed: Estimate | None


class DirectionFacts(TypedDict):
    """Whether the attention of a direction ranks the tokens that the predictions depend on."""

    direction: str
    faithfulness: Estimate
    reference: Estimate
    """The same of the order by signed gradient x attention."""
    cost: Estimate
    """By how much the probability of the prediction falls where all tokens are replaced."""
    unfaithful: str
    """Why it cannot be told; "" where it can."""
    without_reference: str
    """Why there is no reference; "" where there is."""
    at_attention: bool
    """Whether tokens are replaced where the attention gets them; else where they enter the fusion."""


class FusionFacts(TypedDict):
    """The modalities of a data set."""

    samples: int
    groups: int | None
    group_noun: str | None
    left_out: int
    largest_class: float
    """Share of the largest class, which a probe has to beat."""
    modalities: list[ModalityFacts]
    subsets: list[ModalitySubset]
    probe_right: Estimate
    """Share of the wrong predictions of which a modality's own probe is right."""
    uncontributed: str
    """Why contributions cannot be told; "" where they can."""
    interactions: dict[str, Estimate]
    """What modalities do together that none does alone: of the two, or of each two of more."""
    emap_accuracy: Estimate | None
    """Accuracy of an additive projection, and of the model on the same samples."""
    model_accuracy: Estimate | None
    outcomes: dict[str, Comparison]
    """Confidence, the baseline, and conflict: do they tell correct from incorrect predictions?"""
    attention: list[DirectionFacts]
    """Of the first layer; empty where it was not tested."""
    earlier_test: EarlierTest | None
    """What the last test before found, in the fit that this evaluation is of, where it was not tested itself."""
    conflicting: list[ConflictingSample]
    """Those of largest conflict, the largest first."""
    verdict: list[str]
    """What the modalities know, what the model uses and, if it was tested, what attention shows: a sentence each."""


class ConflictingSample(TypedDict):
    """A sample of which the modalities say different things."""

    sample_idx: int
    """Its place among the samples of its process."""
    modalities: SampleModalities


def collect_fusion(
    summary: FusionSummary, class_names: Sequence[str], earlier_test: EarlierTest | None = None
) -> FusionFacts:
    """What is said of the modalities, as numbers; ``earlier_test`` as in ``DatasetResult``."""
    told = not summary.contribution_problem
    of_classes = told and not summary.is_regression
    subsets: list[tuple[Literal["all", "class", "outcome"], str, int | None, int | None]] = [("all", "all", None, None)]
    subsets += [("class", name, class_id, None) for class_id, name in enumerate(class_names)]
    subsets += [("outcome", name, None, outcome) for name, outcome in (("correct", CORRECT), ("incorrect", INCORRECT))]
    whole = summary.estimate("confidence")
    facts: FusionFacts = {
        "samples": summary.samples,
        "groups": summary.known_groups,
        "group_noun": summary.group_noun,
        "left_out": summary.nonfinite,
        "largest_class": summary.largest_class,
        "modalities": [
            {
                "name": name,
                "probe_accuracy": summary.estimate(f"right/{name}"),
                "unreadable": summary.probe_problems.get(name, ""),
                "contribution": summary.estimate(f"phi/{name}") if of_classes else None,
                "share": summary.share(name) if of_classes else None,
                "size": summary.size(name) if told and summary.is_regression else None,
            }
            for name in summary.modalities
        ],
        "subsets": [
            {
                "group": group,
                "name": name,
                "conflict": summary.estimate("conflict", *which),
                "supports_first": summary.estimate("supports_first", *which),
                "shares": {one: summary.share(one, *which) for one in summary.modalities} if of_classes else None,
                "opposed": summary.estimate("opposed", *which) if of_classes else None,
            }
            for group, name, *which in subsets
        ],
        "probe_right": summary.estimate("probe_right"),
        "uncontributed": summary.contribution_problem,
        "interactions": {name: summary.estimate(name) for name in summary.interactions},
        "emap_accuracy": summary.estimate("additive_right") if of_classes else None,
        "model_accuracy": summary.estimate("model_right") if of_classes else None,
        "outcomes": {score: summary.compare(score) for score in ("confidence", "conflict") if whole.count},
        "attention": [
            {
                "direction": str(direction),
                "faithfulness": summary.faithfulness(direction),
                "reference": summary.faithfulness(direction, "reference"),
                "cost": summary.estimate(f"cost/{direction}"),
                "unfaithful": summary.faithfulness_problem(direction),
                "without_reference": one.without_reference,
                "at_attention": one.at_attention,
            }
            for direction, one in summary.replaced.items()
        ],
        "earlier_test": earlier_test,
        "conflicting": [
            {"sample_idx": int(summary.sample_numbers[i]), "modalities": describe_modalities(summary, i, class_names)}
            for i in most_conflicting(summary)
        ],
        "verdict": [],
    }
    return {**facts, "verdict": list(_verdict(facts))}


def _verdict(facts: FusionFacts) -> Iterator[str]:
    """What the modalities know, what the model uses of them, and what its attention shows."""
    modalities = facts["modalities"]
    readable = [one for one in modalities if not one["unreadable"]]
    known = [
        f"{name_modality(one['name'])} alone is right in {percent(one['probe_accuracy'].mean)}" for one in readable
    ]
    known[-1:] = [f"{last} of the samples" for last in known[-1:]]
    known += [f"{name_modality(one['name'])} cannot be read" for one in modalities if one["unreadable"]]
    largest = facts["largest_class"]
    about = "" if math.isnan(largest) else f" (the largest class has {percent(largest)})"
    yield f"Knows: {', '.join(known)}{about}."
    shares = {one["name"]: one["share"] for one in modalities if one["share"] is not None}
    told = {name: share for name, share in shares.items() if not math.isnan(share.mean)}
    sizes = [(name_modality(one["name"]), one["size"]) for one in modalities if one["size"] is not None]
    if sizes:
        moved = ", ".join(f"{name} moves the output by {decimal(size.mean, 3)}" for name, size in sizes)
        yield f"Uses: {moved}, on average over samples."
    elif told:
        carried = "; ".join(f"{name_modality(name)} {_say_share(share)}" for name, share in told.items())
        yield f"Uses: {_say_most(told, facts['group_noun'])} (shares: {carried})."
    else:
        yield f"Uses: cannot be told ({facts['uncontributed'] or 'contributions do not add up to more than 0'})."
    if facts["attention"]:
        yield f"Shows: {'; '.join(_say_tested(one) for one in facts['attention'])}."
    elif facts["earlier_test"] is not None:
        yield _say_earlier(facts["earlier_test"])


def _say_most(shares: Mapping[str, Estimate], noun: str | None) -> str:
    """Which modality most of the predictions are from, if the interval of its share allows to say so."""
    most = max(shares, key=lambda name: shares[name].mean)
    if math.isnan(shares[most].low):
        return f"which modality mostly is not claimed of fewer than {MINIMUM_GROUP} {noun or 'samples'}"
    return f"mostly {name_modality(most)}" if shares[most].low > MOSTLY else NONE_MOSTLY


def _say_earlier(test: EarlierTest) -> str:
    said = [_say_shown(one, *values, test.problems[one]) for one, values in test.faithfulness.items()]
    return f"Shows: not tested in this epoch; of epoch {test.epoch}, the last one that was: {'; '.join(said)}."


def _say_tested(one: DirectionFacts) -> str:
    found = one["faithfulness"]
    return _say_shown(one["direction"], found.mean, found.low, found.high, one["unfaithful"])


def _say_shown(direction: str, value: float, low: float, high: float, unfaithful: str) -> str:
    key = name_modality(Direction.parse(direction).key)
    if unfaithful:
        return f"of {key} it cannot be told ({unfaithful})"
    interval = f"{decimal(value)}, 95 % CI {say_interval(low, high, 2)}"
    if low > 0:
        return f"attention ranks what the model uses of {key} ({interval})"
    if high < 0:
        return f"attention ranks what the model uses of {key} the wrong way round ({interval})"
    return f"attention is not seen to rank what the model uses of {key} ({interval})"


def describe_fusion(facts: FusionFacts, classes_by: str | None) -> Iterator[Block]:
    """The modalities in words: a table of each, one by class and outcome, and what tells errors.

    ``classes_by`` says whether classes are those of the "target" or of the "prediction"; None: that is not known.
    """
    noun = facts["group_noun"]
    counts = [("Samples", f"{facts['samples']} of {facts['groups']} {noun}" if noun else str(facts["samples"]), ())]
    if facts["left_out"]:
        counts.append(("Samples left out, as what enters the fusion is not finite", str(facts["left_out"]), ()))
    yield Items(counts)
    yield Paragraph(" ".join(facts["verdict"]))
    by = f"by {noun}" if noun else "samples taken as independent"
    yield Paragraph(f"In brackets: 95 % CI, {by}; none of fewer than {MINIMUM_GROUP} {noun or 'samples'}.")
    modalities = facts["modalities"]
    shown = {Direction.parse(one["direction"]).key: one for one in facts["attention"]}
    of_value = any(one["size"] for one in modalities)
    uses = ("uses: mean size of its contribution",) if of_value else ("uses: contribution", "share")
    yield Table(
        ("modality", "knows: accuracy of its probe", *uses, *(["shows: faithfulness"] if shown else [])),
        [
            (
                name_modality(one["name"]),
                _in_percent(one["probe_accuracy"]) + (" (cannot be read)" if one["unreadable"] else ""),
                *([_estimate(one["size"])] if of_value else []),
                *([] if of_value else [_estimate(one["contribution"], signed=True), _in_percent(one["share"])]),
                *([_faithfulness(shown.get(one["name"]))] if shown else []),
            )
            for one in modalities
        ],
    )
    unreadable = {name_modality(one["name"]): one["unreadable"] for one in modalities if one["unreadable"]}
    for reason, names in by_reason(unreadable).items():
        alone = "itself" if len(names) == 1 else "themselves"
        yield Paragraph(f"{' and '.join(names)} cannot be read by {alone}: {reason}.")
    if facts["uncontributed"]:
        yield Paragraph(f"Contributions cannot be told: {facts['uncontributed']}.")
    yield from _describe_subsets(facts, classes_by)
    items = list(_describe_wholes(facts))
    if items:
        yield Items(items, "Over all samples")
    if facts["attention"]:
        yield Items([_describe_direction(one) for one in facts["attention"]], "Does attention rank what is used?")
    if facts["conflicting"]:
        lines = [(f"Sample {one['sample_idx']}", str(one["modalities"]), ()) for one in facts["conflicting"]]
        among = "" if facts["uncontributed"] else ", of those that were permuted"
        yield Items(lines, f"Samples of largest conflict{among}")
    outcomes = [describe_comparison(score, score, one, noun) for score, one in facts["outcomes"].items()]
    if outcomes:
        yield Items(outcomes, "Correct against incorrect predictions, confidence first")


def _describe_subsets(facts: FusionFacts, classes_by: str | None) -> Iterator[Block]:
    names = [one["name"] for one in facts["modalities"]]
    readable = not any(one["unreadable"] for one in facts["modalities"])
    columns: list[tuple[str, list[str]]] = []
    subsets = facts["subsets"]
    if readable:
        columns.append(("conflict", [_estimate(one["conflict"]) for one in subsets]))
        if len(names) == 2:
            columns.append(
                (f"supports to {name_modality(names[0])}", [_in_percent(one["supports_first"]) for one in subsets])
            )
    if subsets[0]["shares"] is not None:
        for name in names:
            shares = [_in_percent(None if one["shares"] is None else one["shares"][name]) for one in subsets]
            columns.append((f"share of {name_modality(name)}", shares))
        columns.append(("opposed", [_in_percent(one["opposed"]) for one in subsets]))
    if columns:
        title = {"target": "true class", "prediction": "predicted class", None: "class"}[classes_by]
        rows = [(one["name"], *(cells[i] for _, cells in columns)) for i, one in enumerate(subsets)]
        yield Table((title, *(name for name, _ in columns)), rows)


def _describe_wholes(facts: FusionFacts) -> Iterator[tuple[str, str, Sequence[str]]]:
    if facts["probe_right"].count:
        yield "Wrong predictions of which a modality's own probe is right", _in_percent(facts["probe_right"]), ()
    on = "of the output" if any(one["size"] for one in facts["modalities"]) else "centred logits"
    for name, interaction in facts["interactions"].items():
        _, _, which = name.partition("/")
        yield f"Interaction{f' of {which}' if which else ''} ({on})", _estimate(interaction, signed=True), ()
    additive, model = facts["emap_accuracy"], facts["model_accuracy"]
    if additive is not None and model is not None and additive.count:
        yield (
            "Accuracy if the modalities only added up (EMAP)",
            f"{_in_percent(additive)}, the model's {_in_percent(model)}",
            (),
        )


def _describe_direction(one: DirectionFacts) -> tuple[str, str, Sequence[str]]:
    direction = Direction.parse(one["direction"])
    label = f"{name_modality(direction.query)} → {name_modality(direction.key)}"
    cost = f"it costs {_estimate(one['cost'])} to replace all tokens of {name_modality(direction.key)}"
    where = "where the attention gets them" if one["at_attention"] else "where they enter the fusion"
    if one["unfaithful"]:
        return label, f"cannot be told: {one['unfaithful']}", ()
    reference = (
        f"no reference: {one['without_reference']}"
        if one["without_reference"]
        else f"reference {_estimate(one['reference'], signed=True)}"
    )
    return label, f"{_say_tested(one)}; {reference}", [f"{cost}, {where}"]


def _faithfulness(one: DirectionFacts | None) -> str:
    if one is None or one["unfaithful"]:
        return "bypassed" if one is not None and one["unfaithful"].startswith("bypassed") else "undefined"
    return _estimate(one["faithfulness"], signed=True)


def _estimate(one: Estimate | None, signed: bool = False) -> str:
    if one is None or math.isnan(one.mean):
        return "undefined"
    interval = "" if math.isnan(one.low) else f" ({say_interval(one.low, one.high)})"
    return f"{decimal(one.mean, 3, signed=signed)}{interval}"


def _in_percent(one: Estimate | None) -> str:
    """A proportion, or a share of the contribution, in percent."""
    if one is None or math.isnan(one.mean):
        return "undefined"
    interval = "" if math.isnan(one.low) else f" ({say_interval(one.low, one.high, 1, as_percent=True)})"
    return f"{percent(one.mean)}{interval}"


def _say_share(one: Estimate) -> str:
    """The same within brackets."""
    interval = "" if math.isnan(one.low) else f", 95 % CI {say_interval(one.low, one.high, 1, as_percent=True)}"
    return f"{percent(one.mean)}{interval}"
