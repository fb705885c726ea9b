"""The facts of a report put into words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from lightning_xattn.core.attention import Direction
from lightning_xattn.core.names import shown
from lightning_xattn.core.wording import SINGLE_KEY, SINGLE_KEY_REMEDY, decimal, name_modality, percent, say_interval
from lightning_xattn.evaluation.results import AttentionStatistics, PlacedPair
from lightning_xattn.evaluation.statistics import STATISTICS, Column, shown_columns
from lightning_xattn.functional.intervals import MINIMUM_GROUP
from lightning_xattn.report.criteria import (
    AGREEING,
    DISAGREEING,
    IF_CORRECT,
    IF_INCORRECT,
    PATTERNS,
    Criterion,
    uniform_is_sparse,
)
from lightning_xattn.report.facts import BatchFacts, DatasetFacts, LayerFacts, SampleFacts, Subset
from lightning_xattn.report.key_points import describe_training
from lightning_xattn.report.modalities import HOW_TO_READ, describe_fusion
from lightning_xattn.report.rendering import Block, Document, Items, Paragraph, Section, Table
from lightning_xattn.report.verdict import describe_comparison

# Of the samples of a true class the accuracy is the recall, and of those predicted as a class the precision.
_GROUPS = {
    "target": ("true class", "accuracy (recall)"),
    "prediction": ("predicted class", "accuracy (precision)"),
    None: ("class", "accuracy"),
}

PER_SAMPLE = "Per-sample analysis"

TOP_PAIRS = 3
"""So many pairs of each direction are put into words; JSON has all."""

_HOW_TO_READ = (
    "Attention tells which tokens the model attends to, not why it predicts what it predicts. Nor need the two "
    "directions agree in a good model: a low modality agreement alone is no sign of an error, and a high one no proof "
    "of a right prediction. Agreement (alignment) is the correlation of the two directions' maps, averaged over heads, "
    "from -1 to 1 with 0 for unrelated ones. Entropy is 0 where all attention is on one key and 1 where it is uniform."
)
_OF_BATCH = (
    "The confidence is the probability of the predicted class. A pair is (query, key, weight), its weight averaged "
    "over heads; its lift is the weight times the number of keys, 1 for uniform attention. Patterns and checklists are "
    "the guide's rules of thumb, not evidence: a criterion on attention is met when it holds in every direction of "
    "the first layer, and the value shown is the one farthest from it."
)
_OF_DATASET = (
    "The alignment between different samples is that of the one direction of a sample with the other direction of "
    "another, averaged over all such pairs: near 0 where the maps of two samples are unrelated, and well above 0 where "
    "the model attends alike whatever the sample. The mean alignment less this is what belongs to the samples. "
    "The class-adjusted gap is the gap "
    "within each class, averaged over the classes with both outcomes: classes differ in accuracy and in attention, and "
    "that alone makes a gap. The AUROC is the chance that a correct prediction has the higher score of the two, 0.5 "
    "where the score tells nothing."
)


def batch_document(facts: BatchFacts) -> Document:
    """A batch, in the structure of the guide's report."""
    samples = [describe_sample(sample) for sample in facts["per_sample_explanations"]]
    return Document(
        "Cross-modal attention report",
        [
            Section("Batch-level statistics", list(_describe_batch_level(facts))),
            Section(PER_SAMPLE, samples or [Paragraph("No samples.")]),
            Section("How to read this", [Paragraph(_HOW_TO_READ), Paragraph(_OF_BATCH)]),
        ],
    )


def _describe_batch_level(facts: BatchFacts) -> Iterator[Block]:
    statistics, undefined = facts["attention_stats"], facts["undefined"]
    items: list[tuple[str, str, Sequence[str]]] = [
        (f"{_name_direction(name)} Attention{_of_layer(name)}", _list_statistics(of_one, undefined.get(name)), ())
        for name, of_one in statistics.items()
    ]
    defined = sum(not math.isnan(sample["modality_agreement"]) for sample in facts["per_sample_explanations"])
    over = "" if defined == facts["samples"] else f", the mean of {defined} of {facts['samples']} samples"
    alignment = _number(facts["modality_alignment"], undefined.get("modality_alignment"))
    items.append(("Modality Alignment", alignment + (over if defined else ""), ()))
    items.append(("Samples", _describe_outcomes(facts), ()))
    items += [(f"Places of {name_modality(name)} tokens", axis.title, ()) for name, axis in facts["axes"].items()]
    yield Items(items)
    remark = "The mean is 1 / (number of keys) by construction: it says nothing about the model."
    if any(uniform_is_sparse(of_one) for of_one in statistics.values()):
        remark += " Sparsity counts weights below 0.1: with more than ten keys even uniform attention has 100 %."
    if SINGLE_KEY in undefined.values():
        remark += f" {SINGLE_KEY_REMEDY}"
    yield Paragraph(remark)


def _describe_outcomes(facts: BatchFacts) -> str:
    known = facts["correct"] + facts["incorrect"]
    ties = sum(sample["tied"] for sample in facts["per_sample_explanations"])
    parts = [
        f"{facts['correct']} of {known} predicted correctly" if known else "",
        f"{facts['samples'] - known} without a known outcome" if known < facts["samples"] else "",
        f"{ties} with a tied top vote" if ties else "",
    ]
    return f"{facts['samples']} ({', '.join(filter(None, parts))})" if facts["samples"] else "0"


def _list_statistics(statistics: AttentionStatistics, undefined: str | None) -> str:
    if math.isnan(statistics.mean):
        return _number(math.nan, undefined)
    numbers = (f"{name}={_number(value)}" for name, value in vars(statistics).items() if name != "sparsity")
    values = f"{', '.join(numbers)}, sparsity={_number(statistics.sparsity, digits=2)}%"
    return f"{values} ({undefined})" if undefined else values


def describe_sample(sample: SampleFacts) -> Items:
    """All that is said of a sample."""
    undefined = sample["undefined"]
    items: list[tuple[str, str, Sequence[str]]] = [
        ("Predicted", _describe_prediction(sample), ()),
        ("Ground Truth", _describe_truth(sample), ()),
        ("Modality Agreement", _number(sample["modality_agreement"], undefined.get("modality_agreement")), ()),
    ]
    for name, pairs in sample["top_attention_places"].items():
        if reason := undefined.get(name):
            first, others = f"says nothing ({reason})", []
        else:
            first, *others = [_describe_pair(pair) for pair in pairs[:TOP_PAIRS]] or ["none"]
        items.append((f"Top {_name_direction(name, '→')} attention{_of_layer(name)}", first, others))
    modalities = sample.get("modalities")
    if modalities is not None:
        items.insert(2, ("Modalities", str(modalities), ()))
    items += _describe_interpretation(sample)
    known_as = "" if sample["sample_id"] is None else f" (id {shown(sample['sample_id'])})"
    return Items(items, f"Sample {sample['sample_idx']}{known_as}")


def _describe_prediction(sample: SampleFacts) -> str:
    if sample["predicted_class"] is None:
        return "not known"
    confidence = None if sample["confidence"] is None else f"confidence: {_number(sample['confidence'])}"
    more = ", ".join(part for part in (sample["predicted_name"], confidence) if part)
    return f"{sample['predicted_class']}" + (f" ({more})" if more else "")


def _describe_truth(sample: SampleFacts) -> str:
    if sample["true_class"] is None:
        return "not known, so neither correct nor incorrect"
    truth = str(sample["true_class"])
    if sample["true_name"] and not sample["correct"]:
        truth += f" ({sample['true_name']})"
    truth += {True: " ✓ CORRECT", False: " ✗ INCORRECT", None: ", not compared with a prediction"}[sample["correct"]]
    return truth + (" (its top vote is tied: the first of the tied classes counts)" if sample["tied"] else "")


def _describe_pair(pair: PlacedPair) -> str:
    text = f"({pair['query']}, {pair['key']}, {_number(pair['weight'])}), lift {_number(pair['lift'], digits=2)}"
    if pair["query_place"] is None and pair["key_place"] is None:
        return text
    return f"{text}: {pair['query_place'] or pair['query']} → {pair['key_place'] or pair['key']}"


def _describe_interpretation(sample: SampleFacts) -> Iterator[tuple[str, str, Sequence[str]]]:
    criteria = sample["interpretation"]
    groups = {name: [one for one in criteria if one.group == name] for name in (*PATTERNS, IF_CORRECT, IF_INCORRECT)}
    shown = [name.partition(": ")[2] for name in PATTERNS if all(one.met for one in groups[name])]
    remark = _contradict_agreement(sample, groups[AGREEING], groups[DISAGREEING])
    yield "Patterns", (", ".join(shown) or "none of the guide's four") + remark, ()
    for name in (IF_CORRECT, IF_INCORRECT):
        if criteria := groups[name]:
            met = f"{sum(one.met is True for one in criteria)} of {len(criteria)} met"
            undefined = sum(one.met is None for one in criteria)
            yield name, met + (f", {undefined} undefined" if undefined else ""), [*map(_describe_criterion, criteria)]


def _contradict_agreement(sample: SampleFacts, high: Sequence[Criterion], low: Sequence[Criterion]) -> str:
    """Why a pattern of agreement is none of the modalities' classes, where these say the opposite; else empty."""
    modalities = sample.get("modalities")
    if modalities is None or len(modalities.probes) < 2:
        return ""
    said = {name for name, _ in modalities.probes.values()}
    if all(one.met for one in high) and len(said) > 1:
        return " (of their attention: by themselves the modalities say different classes)"
    if all(one.met for one in low) and len(said) == 1:
        return f" (of their attention: by themselves the modalities all say {said.pop()})"
    return ""


def _describe_criterion(criterion: Criterion) -> str:
    mark = {True: "✓", False: "✗", None: "?"}[criterion.met]
    percent = criterion.criterion.endswith("%") and criterion.met is not None
    value = f"{_number(criterion.value, digits=1)} %" if percent else _number(criterion.value)
    where = f"{_name_direction(criterion.direction, '→')} " if criterion.direction else ""
    remarks = "".join(f"; {one}" for one in (criterion.caveat, criterion.evidence) if one)
    return f"{mark} {criterion.criterion} ({where}{value}{remarks})"


def dataset_document(facts: DatasetFacts) -> Document:
    """A whole data set: its modalities, and a section for each layer."""
    several = len(facts["layers"]) > 1
    sections, fusion = [], facts["fusion"]
    if fusion is not None:
        blocks = list(describe_fusion(fusion, facts["classes_by"]))
        sections.append(Section("What each modality says and contributes", blocks))
    sections += [
        Section(
            "Whole data set",
            list(describe_layer(layer, facts["classes_by"])),
            about=f"(layer {layer['layer']})" if several else "",
        )
        for layer in facts["layers"]
    ]
    if facts["table"]:
        where = f"The numbers of each sample are in {facts['table']}. {describe_training(facts['training'])}"
        sections.append(Section("Samples", [Paragraph(where)]))
    nouns = dict.fromkeys(one["group_noun"] for one in (*facts["layers"], *([] if fusion is None else [fusion])))
    of_layers, of_fusion = (
        [_HOW_TO_READ, _OF_DATASET] if facts["layers"] else [],
        [] if fusion is None else [HOW_TO_READ],
    )
    how_to_read = [*of_fusion, *of_layers, *map(_describe_independence, nouns)]
    sections.append(Section("How to read this", [*map(Paragraph, how_to_read)]))
    return Document("Cross-modal attention report", sections)


def _describe_independence(group_noun: str | None) -> str:
    if group_noun is None:
        return (
            "Samples are taken as independent of each other, since no groups are known. With several samples of one "
            "patient or one recording every interval is too narrow: name their groups, groups=<key or callable>."
        )
    return (
        f"Intervals are by {group_noun}: samples of one {group_noun.removesuffix('s')} may be alike, so many samples "
        f"of few {group_noun} tell little. Nothing is claimed of fewer than {MINIMUM_GROUP} {group_noun}."
    )


def describe_layer(facts: LayerFacts, classes_by: str | None) -> Iterator[Block]:
    """One layer over a data set: how many samples, what is undefined, means by class and outcome, correct or not.

    ``classes_by`` says whether classes are those of the "target" or of the "prediction"; None: that is not known.
    """
    yield Items(list(_describe_counts(facts)))
    columns = _table_columns(facts)
    yield _tabulate(facts, classes_by, columns)
    if remark := _describe_intervals(facts, list(columns)):
        yield Paragraph(remark)
    if any(SINGLE_KEY in reason for reason in facts["undefined"].values()):
        yield Paragraph(SINGLE_KEY_REMEDY)
    outcomes = [describe_outcome(facts, score) for score in facts["outcomes"]]
    if outcomes:
        yield Items(outcomes, "Correct against incorrect predictions")
    else:
        yield Paragraph("Correct and incorrect predictions are not compared: predictions or targets are not known.")


def _describe_counts(facts: LayerFacts) -> Iterator[tuple[str, str, Sequence[str]]]:
    noun, whole = facts["group_noun"], facts["groups"][0]
    yield "Samples", f"{facts['samples']} of {whole['groups']} {noun}" if noun else str(facts["samples"]), ()
    if facts["unclassified"]:
        yield "Samples without a class", str(facts["unclassified"]), ()
    if facts["other_lengths"]:
        why = "their joint sequence has another length than its spans are for"
        yield "Samples left out", f"{facts['other_lengths']}: {why}", ()
    if facts["wholly_masked"]:
        yield "Samples of which one modality is wholly masked", str(facts["wholly_masked"]), ()
    if facts["ties"]:
        yield "Samples with a tied top vote", f"{facts['ties']}; the first of the tied classes counts", ()
    headline = "Entropy" if "alignment" in facts["undefined"] else "Alignment"
    yield f"{headline} undefined", f"{percent(facts['undefined_share'])} of the samples", ()
    if headline == "Alignment":
        yield "Alignment between different samples", _describe_null(facts), ()
    else:
        yield "Alignment", _number(math.nan, facts["undefined"]["alignment"]), ()
    for name in facts["directions"]:
        if name in facts["undefined"]:
            yield _name_direction(name), facts["undefined"][name], ()
    if facts["invalid_rows"]:
        yield "Rows left out", f"{facts['invalid_rows']}: padding, fully masked or not finite", ()


def _describe_null(facts: LayerFacts) -> str:
    null = _number(facts["alignment_null"], facts["undefined"].get("alignment_null"), digits=3)
    if math.isnan(facts["alignment_null"]):
        return null
    excess = facts["groups"][0]["numbers"]["alignment"]["mean"] - facts["alignment_null"]
    return f"{null} (the mean alignment less this: {decimal(excess, 3)})"


def _table_columns(facts: LayerFacts) -> dict[str, str]:
    """The numbers that the table has, and their titles."""
    known = [*map(Column.parse, facts["groups"][0]["numbers"])]
    shown = [column for name, one in STATISTICS.items() if one.reported for column in shown_columns(name, known)]
    return {
        str(one): f"{_name_direction(str(one.direction))} {one.statistic}" if one.direction else one.statistic
        for one in shown
    }


def _tabulate(facts: LayerFacts, classes_by: str | None, columns: Mapping[str, str]) -> Table:
    by_class = any(group["group"] == "class" for group in facts["groups"])
    title, accuracy = _GROUPS[classes_by] if by_class else ("samples", "accuracy")
    rows = [
        (group["name"], _say_size(group), _accuracy_of(group), *(_mean(group, name) for name in columns))
        for group in facts["groups"]
    ]
    size = f"n ({facts['group_noun']})" if facts["group_noun"] else "n"
    return Table((title, size, accuracy, *columns.values()), rows)


def _say_size(group: Subset) -> str:
    return str(group["samples"]) + ("" if group["groups"] is None else f" ({group['groups']})")


def _describe_intervals(facts: LayerFacts, columns: Sequence[str]) -> str:
    """What the brackets behind the means are, and why means have none; empty where there are no means."""
    numbers = [group["numbers"][name] for group in facts["groups"] for name in columns]
    few = f"fewer than {MINIMUM_GROUP} {facts['group_noun'] or 'samples'}, of which nothing is claimed"
    by = f", by {facts['group_noun']}" if facts["group_noun"] else ", samples taken as independent"
    told = any(not math.isnan(one["low"]) for one in numbers)
    parts = [
        f"In brackets: 95 % CI{by}." if told else "",
        f"No interval: {few}." if any(one["count"] and math.isnan(one["low"]) for one in numbers) else "",
    ]
    return " ".join(filter(None, parts))


def _accuracy_of(group: Subset) -> str:
    if math.isnan(group["accuracy"]):
        return ""
    low, high = group["accuracy_low"], group["accuracy_high"]
    interval = "" if math.isnan(low) else f" ({say_interval(low, high, 1, as_percent=True)})"
    return f"{percent(group['accuracy'])}{interval} {group['correct']}/{group['correct'] + group['incorrect']}"


def _mean(group: Subset, name: str) -> str:
    number = group["numbers"][name]
    if math.isnan(number["mean"]):
        return "undefined" if group["samples"] else ""
    over = "" if number["count"] == group["samples"] else f" n={number['count']}"
    interval = "" if math.isnan(number["low"]) else f" ({say_interval(number['low'], number['high'])})"
    return f"{decimal(number['mean'], 3)}{interval}{over}"


def describe_outcome(facts: LayerFacts, score: str) -> tuple[str, str, Sequence[str]]:
    """Whether a score tells correct from incorrect predictions: its label, the verdict, and the gaps behind it."""
    # The table has that of each direction.
    both = "direction" in STATISTICS[score].levels and len(facts["directions"]) > 1
    label = f"{score} (of a sample, the mean of both directions)" if both else score
    return describe_comparison(score, label, facts["outcomes"][score], facts["group_noun"])


def _number(value: float, reason: str | None = None, digits: int = 4) -> str:
    if math.isnan(value):
        return f"undefined ({reason})" if reason else "undefined"
    return decimal(value, digits)


def _name_direction(name: str, arrow: str = " → ") -> str:
    """``eeg_to_spec`` as ``EEG → Spec``, whatever layer stands before it."""
    direction = Direction.parse(name.rpartition("/")[2])
    return f"{name_modality(direction.query)}{arrow}{name_modality(direction.key)}"


def _of_layer(name: str) -> str:
    layer = name.rpartition("/")[0]
    return f", layer {layer}" if layer else ""
