"""The report of a batch, in the guide's structure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lightning_xattn.core.names import shown
from lightning_xattn.core.wording import SINGLE_KEY, SINGLE_KEY_REMEDY, decimal, name_modality
from lightning_xattn.evaluation.results import AttentionStatistics, ExplainedBatch, PlacedPair, SampleResult
from lightning_xattn.report.criteria import (
    IF_CORRECT,
    IF_INCORRECT,
    PATTERNS,
    Criterion,
    interpret_sample,
    uniform_is_sparse,
)
from lightning_xattn.report.document import Block, Document, Item, Items, Paragraph, Section
from lightning_xattn.report.layers import HOW_TO_READ_ATTENTION, name_direction
from lightning_xattn.report.undefined import undefined_in_batch, undefined_in_sample

PER_SAMPLE = "PER-SAMPLE ANALYSIS"
"""Title of the section with a list for each sample."""

TOP_PAIRS = 3
"""How many pairs of each direction the text has; JSON has all."""

_HOW_TO_READ = (
    "The confidence is the probability of the predicted class. A pair is (query, key, weight), its weight averaged "
    "over heads. Its lift is the weight times the number of keys: 1 for uniform attention. Patterns and checklists are "
    "the guide's rules of thumb, not evidence. A criterion on attention is met if it holds in every direction of the "
    "first layer; the value is that of the direction that is farthest from meeting it."
)


def describe_batch(results: ExplainedBatch | dict[str, Any]) -> Document:
    """Statistics of the batch, then each sample, with the guide's titles."""
    samples = [*map(describe_sample, results["per_sample_explanations"])]
    return Document(
        "Cross-modal attention report",
        [
            Section("BATCH-LEVEL STATISTICS", [*_describe_whole(results)]),
            Section(PER_SAMPLE, samples or [Paragraph("No samples.")]),
            Section("How to read this", [Paragraph(HOW_TO_READ_ATTENTION), Paragraph(_HOW_TO_READ)]),
        ],
    )


def _describe_whole(results: ExplainedBatch | dict[str, Any]) -> Iterator[Block]:
    statistics, undefined = results["attention_stats"], undefined_in_batch(results)
    items: list[Item] = [
        (f"{name_direction(name)} Attention{_name_layer(name)}", _list_statistics(one, undefined.get(name)), ())
        for name, one in statistics.items()
    ]
    samples = results["per_sample_explanations"]
    defined = sum(not math.isnan(one["modality_agreement"]) for one in samples)
    over = f", the mean of {defined} of {len(samples)} samples" if 0 < defined < len(samples) else ""
    alignment = _format(results["modality_alignment"], undefined.get("modality_alignment"))
    items.append(("Modality Alignment", alignment + over, ()))
    items.append(("Samples", _count_outcomes(samples), ()))
    items += [(f"Tokens of {name_modality(name)}", axis.title, ()) for name, axis in results["axes"].items()]
    yield Items(items)
    remark = "The mean is 1 / (number of keys) by construction, whatever the model learned."
    if any(map(uniform_is_sparse, statistics.values())):
        remark += " Sparsity counts weights below 0.1: with more than ten keys even uniform attention has 100 %."
    if SINGLE_KEY in undefined.values():
        remark += f" {SINGLE_KEY_REMEDY}"
    yield Paragraph(remark)


def _count_outcomes(samples: list[SampleResult]) -> str:
    outcomes = [one["correct"] for one in samples]
    known, ties = len(outcomes) - outcomes.count(None), sum(one["tied"] for one in samples)
    parts = [
        f"{outcomes.count(True)} of {known} predicted correctly" if known else "",
        f"{len(outcomes) - known} without a known outcome" if known < len(outcomes) else "",
        f"{ties} with a tied top vote" if ties else "",
    ]
    return f"{len(samples)} ({', '.join(filter(None, parts))})" if samples else "0"


def _list_statistics(statistics: AttentionStatistics, undefined: str | None) -> str:
    if math.isnan(statistics.mean):
        return _format(math.nan, undefined)
    numbers = (f"{name}={_format(value)}" for name, value in vars(statistics).items() if name != "sparsity")
    values = f"{', '.join(numbers)}, sparsity={_format(statistics.sparsity, digits=2)}%"
    return f"{values} ({undefined})" if undefined else values


def describe_sample(sample: SampleResult) -> Items:
    """A sample's prediction, outcome, agreement, top pairs, patterns and checklists."""
    undefined, modalities = undefined_in_sample(sample), sample.get("modalities")
    items: list[Item] = [("Predicted", _describe_prediction(sample), ()), ("Ground Truth", _describe_truth(sample), ())]
    items += [] if modalities is None else [("Modalities", str(modalities), ())]
    agreement = _format(sample["modality_agreement"], undefined.get("modality_agreement"))
    items.append(("Modality Agreement", agreement, ()))
    for name, pairs in sample["top_attention_places"].items():
        if reason := undefined.get(name):
            first, others = f"undefined ({reason})", []
        else:
            first, *others = [*map(_describe_pair, pairs[:TOP_PAIRS])] or ["none"]
        items.append((f"Top {name_direction(name, '→')} attention{_name_layer(name)}", first, others))
    items += _describe_criteria(interpret_sample(sample))
    known_as = "" if sample["sample_id"] is None else f" (id {shown(sample['sample_id'])})"
    return Items(items, f"Sample {sample['sample_idx']}{known_as}")


def _describe_prediction(sample: SampleResult) -> str:
    if sample["predicted_class"] is None:
        return "not known"
    confidence = "" if sample["confidence"] is None else f"confidence: {_format(sample['confidence'])}"
    more = ", ".join(filter(None, (sample["predicted_name"], confidence)))
    return f"{sample['predicted_class']}" + (f" ({more})" if more else "")


def _describe_truth(sample: SampleResult) -> str:
    if sample["true_class"] is None:
        return "not known, so neither correct nor incorrect"
    truth = str(sample["true_class"])
    if sample["true_name"] and not sample["correct"]:
        truth += f" ({sample['true_name']})"
    truth += {True: " ✓ CORRECT", False: " ✗ INCORRECT", None: ", not compared with a prediction"}[sample["correct"]]
    return truth + (" (its top vote is tied: the first of the tied classes counts)" if sample["tied"] else "")


def _describe_pair(pair: PlacedPair) -> str:
    text = f"({pair['query']}, {pair['key']}, {_format(pair['weight'])}), lift {_format(pair['lift'], digits=2)}"
    if pair["query_place"] is None and pair["key_place"] is None:
        return text
    return f"{text}: {pair['query_place'] or pair['query']} → {pair['key_place'] or pair['key']}"


def _describe_criteria(criteria: list[Criterion]) -> Iterator[Item]:
    groups = {name: [one for one in criteria if one.group == name] for name in (*PATTERNS, IF_CORRECT, IF_INCORRECT)}
    met = [name.partition(": ")[2] for name in PATTERNS if all(one.met for one in groups[name])]
    yield "Patterns of attention", ", ".join(met) or "none of the guide's four", ()
    for name in (IF_CORRECT, IF_INCORRECT):
        if checklist := groups[name]:
            undefined = sum(one.met is None for one in checklist)
            counts = f"{sum(one.met is True for one in checklist)} of {len(checklist)} met"
            counts += f", {undefined} undefined" if undefined else ""
            yield name, counts, [*map(_describe_criterion, checklist)]


def _describe_criterion(criterion: Criterion) -> str:
    mark = {True: "✓", False: "✗", None: "?"}[criterion.met]
    is_percentage = criterion.criterion.endswith("%") and criterion.met is not None
    value = f"{_format(criterion.value, digits=1)} %" if is_percentage else _format(criterion.value)
    where = f"{name_direction(criterion.direction, '→')} " if criterion.direction else ""
    remarks = f"; {criterion.caveat}" if criterion.caveat else ""
    return f"{mark} {criterion.criterion} ({where}{value}{remarks})"


def _format(value: float, reason: str | None = None, digits: int = 4) -> str:
    if math.isnan(value):
        return f"undefined ({reason})" if reason else "undefined"
    return decimal(value, digits)


def _name_layer(name: str) -> str:
    layer = name.rpartition("/")[0]
    return f", layer {layer}" if layer else ""
