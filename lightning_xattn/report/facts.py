"""What a report says, as numbers: the one structure that is written as JSON and put into words.

Nothing in it is a tensor. Undefined numbers are NaN (null in JSON) and have a reason under ``undefined`` where there
is one to give.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypedDict, cast

from lightning_xattn.core.attention import TokenAxis
from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.wording import SINGLE_KEY
from lightning_xattn.evaluation.layer_summary import Comparison, LayerSummary
from lightning_xattn.evaluation.results import AttentionStatistics, DatasetResult, ExplainedBatch, Results, SampleResult
from lightning_xattn.evaluation.statistics import ALIGNMENT, INVALID_ROWS, SCORES, Column
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.report.criteria import Criterion, first_layer, interpret_sample
from lightning_xattn.report.modalities import FusionFacts, collect_fusion

NO_ROW = "no valid row (all are padding, fully masked or not finite)"
ONE_DIRECTION = "only one direction of attention is recorded"
NO_VARIATION = "a map that does not vary over the cells which both directions share, as uniform attention"


class SampleFacts(SampleResult):
    """A sample's explanation, and what follows from it."""

    undefined: dict[str, str]
    """Why ``modality_agreement`` or the statistics of a direction are undefined, by name."""
    interpretation: list[Criterion]
    """The guide's patterns and checklists, see ``interpret_sample``."""


class BatchFacts(TypedDict):
    """A batch: the keys of ``ExplainedBatch`` but for its tensors, and what follows from them."""

    kind: Literal["batch"]
    class_names: list[str]
    axes: dict[str, TokenAxis]
    samples: int
    correct: int
    """Samples predicted correctly, and incorrectly; those without a target are neither."""
    incorrect: int
    attention_stats: dict[str, AttentionStatistics]
    modality_alignment: float
    undefined: dict[str, str]
    """Why ``modality_alignment`` or the statistics of a direction are undefined, by name."""
    per_sample_explanations: list[SampleFacts]


class Number(TypedDict):
    """A group's mean."""

    count: int
    """Samples where the number is defined."""
    groups: int | None
    """How many groups (patients, recordings) they belong to; None where groups are not known."""
    mean: float
    std: float
    """Standard deviation with n - 1."""
    low: float
    """Lower and upper end of the mean's 95 % CI; NaN with fewer than ``MINIMUM_GROUP`` groups, or samples."""
    high: float


class Subset(TypedDict):
    """All samples, or those of one class or outcome."""

    group: Literal["all", "class", "unclassified", "outcome"]
    name: str
    class_id: int | None
    samples: int
    groups: int | None
    correct: int
    incorrect: int
    accuracy: float
    """``correct / (correct + incorrect)``: of a true class its recall, of a predicted class its precision."""
    accuracy_low: float
    """Lower and upper end of its 95 % CI, see ``grouped_proportion_interval``; NaN as of a mean."""
    accuracy_high: float
    numbers: dict[str, Number]
    """By name, see ``sample_statistics``; those of single heads are left out."""


class LayerFacts(TypedDict):
    """One layer's numbers over a data set."""

    layer: str
    directions: list[str]
    samples: int
    group_noun: str | None
    """What groups are called, such as "patients"; None where they are not known: samples count as independent."""
    unclassified: int
    ties: int
    other_lengths: int
    """Samples that were left out because their joint sequence has another length than its spans are for."""
    wholly_masked: int
    """Samples of which one modality is wholly masked, so that they have no attention across."""
    undefined_share: float
    invalid_rows: int
    alignment_null: float
    """Mean alignment between different samples."""
    undefined: dict[str, str]
    """Why a direction says nothing for some samples, or why ``alignment_null`` is undefined, by name."""
    groups: list[Subset]
    outcomes: dict[str, Comparison]
    """By score, ``alignment`` and ``entropy``; empty without predictions or targets."""


class TrainingFacts(TypedDict):
    """How many samples the model was trained on."""

    samples: int
    seen: int
    """Those that it was trained on."""
    related: int | None
    """Those of whose group it was trained on others; None where groups are not known."""


class DatasetFacts(TypedDict):
    """A whole data set."""

    kind: Literal["dataset"]
    class_names: list[str]
    classes_by: str
    """What the classes of the groups are: "target" (true class) or "prediction" (predicted class)."""
    axes: dict[str, TokenAxis]
    table: str | None
    training: TrainingFacts | None
    """What the model was trained on; None where that, or the ids of the samples, is not known."""
    fusion: FusionFacts | None
    """The modalities; None where it is not known what enters the fusion."""
    layers: list[LayerFacts]


def collect_facts(results: Results) -> BatchFacts | DatasetFacts:
    """Everything that a report says about the results.

    Raises
    ------
    SettingError
        If the results are neither a batch's nor a data set's.
    """
    if isinstance(results, DatasetResult):
        return {
            "kind": "dataset",
            "class_names": list(results.class_names),
            "classes_by": results.classes_by,
            "axes": results.axes,
            "table": None if results.table is None else str(results.table),
            "training": _collect_training(results),
            "fusion": None
            if results.fusion is None
            else collect_fusion(results.fusion, results.class_names, results.earlier_test),
            "layers": [
                collect_layer(name, one, results.class_names, results.other_lengths.get(name, 0))
                for name, one in results.summaries.items()
            ],
        }
    needed = ("attention_stats", "modality_alignment", "per_sample_explanations", "class_names", "axes")
    got = list(results) if isinstance(results, Mapping) else type(results).__name__
    missing = [key for key in needed if key not in got]
    if missing:
        raise SettingError(
            "A report needs the results of explain_batch or explain_loader, or a dict with the keys of the former; "
            f"got {got}, without {', '.join(missing)}."
        )
    return _collect_batch(cast(ExplainedBatch, results))


def _collect_training(results: DatasetResult) -> TrainingFacts | None:
    if results.table is None or results.trained_on is None:
        return None
    from lightning_xattn.evaluation.table import read_rows  # pyarrow, only where a table is read

    rows = list(read_rows(results.table, next(iter(results.summaries), None), ("sample_id", "group")))
    told = [results.trained_on.info(row.get("sample_id"), row.get("group")) for row in rows]
    if not any(told):
        return None
    has_groups = bool(results.trained_on.groups) and any(row.get("group") is not None for row in rows)
    related = told.count("related") if has_groups else None
    return {"samples": len(told), "seen": told.count("seen"), "related": related}


def _collect_batch(results: ExplainedBatch) -> BatchFacts:
    dataset = results.get("dataset")
    samples = [_collect_sample(sample, dataset) for sample in results["per_sample_explanations"]]
    outcomes = [sample["correct"] for sample in samples]
    undefined = _undefined_directions(results["attention_stats"])
    if math.isnan(results["modality_alignment"]):
        reasons = {sample["undefined"].get("modality_agreement", "") for sample in samples}
        undefined["modality_alignment"] = "; ".join(sorted(reasons)) or "no samples"
    return {
        "kind": "batch",
        "class_names": list(results["class_names"]),
        "axes": results["axes"],
        "samples": len(samples),
        "correct": sum(outcome is True for outcome in outcomes),
        "incorrect": sum(outcome is False for outcome in outcomes),
        "attention_stats": results["attention_stats"],
        "modality_alignment": results["modality_alignment"],
        "undefined": undefined,
        "per_sample_explanations": samples,
    }


def _collect_sample(sample: SampleResult, dataset: DatasetResult | None) -> SampleFacts:
    undefined = _undefined_directions(sample["attention_stats"])
    if math.isnan(sample["modality_agreement"]):
        undefined["modality_agreement"] = _undefined_agreement(sample["attention_stats"])
    return {**sample, "undefined": undefined, "interpretation": interpret_sample(sample, dataset)}


def _undefined_directions(statistics: Mapping[str, AttentionStatistics]) -> dict[str, str]:
    # Each valid row has a mean, and each with two keys has an entropy.
    return {
        name: NO_ROW if math.isnan(of_one.mean) else SINGLE_KEY
        for name, of_one in statistics.items()
        if math.isnan(of_one.entropy)
    }


def _undefined_agreement(statistics: Mapping[str, AttentionStatistics]) -> str:
    layer = first_layer(statistics)
    if len(layer) < 2:
        return ONE_DIRECTION
    return next(iter(_undefined_directions(layer).values()), NO_VARIATION)


def collect_layer(layer: str, summary: LayerSummary, class_names: Sequence[str], other_lengths: int = 0) -> LayerFacts:
    """One layer's numbers, for a report on it alone; ``other_lengths`` is what `DatasetResult` says of the layer."""
    undefined = dict(_undefined_samples(summary))
    if ALIGNMENT not in summary.columns:
        undefined["alignment"] = ONE_DIRECTION
    elif math.isnan(summary.alignment_null):
        undefined["alignment_null"] = "it needs two samples with an alignment, and all of the same tokens"
    groups = list(_collect_subsets(summary, class_names))
    known = groups[0]["correct"] + groups[0]["incorrect"]
    scores = [score for score in SCORES if score in summary.columns and known]
    return {
        "layer": layer,
        "directions": [str(direction) for direction in summary.heads],
        "samples": summary.samples,
        "group_noun": summary.group_noun,
        "unclassified": summary.unclassified,
        "ties": summary.ties,
        "other_lengths": other_lengths,
        "wholly_masked": summary.wholly_masked,
        "undefined_share": summary.undefined_share(),
        "invalid_rows": int(summary.total(INVALID_ROWS)),
        "alignment_null": summary.alignment_null,
        "undefined": undefined,
        "groups": groups,
        "outcomes": {str(score): summary.compare(score) for score in scores},
    }


def _undefined_samples(summary: LayerSummary) -> Iterator[tuple[str, str]]:
    for direction in summary.heads:
        rows, entropies = (summary.count(Column(name, direction)) for name in ("max", "entropy"))
        parts = [
            f"{count} of {summary.samples} samples with {reason}"
            for count, reason in ((rows - entropies, SINGLE_KEY), (summary.samples - rows, NO_ROW))
            if count
        ]
        if parts:
            yield str(direction), "; ".join(parts)


def _collect_subsets(summary: LayerSummary, class_names: Sequence[str]) -> Iterator[Subset]:
    yield _collect_subset(summary, "all", "all")
    for class_id, name in enumerate(class_names):
        yield _collect_subset(summary, "class", name, class_id=class_id)
    if summary.unclassified:
        yield _collect_subset(summary, "unclassified", "no class", class_id=summary.n_classes)
    if any(summary.size(outcome=outcome) for outcome in (CORRECT, INCORRECT)):
        yield _collect_subset(summary, "outcome", "correct", outcome=CORRECT)
        yield _collect_subset(summary, "outcome", "incorrect", outcome=INCORRECT)


def _collect_subset(
    summary: LayerSummary,
    group: Literal["all", "class", "unclassified", "outcome"],
    name: str,
    class_id: int | None = None,
    outcome: int | None = None,
) -> Subset:
    correct, incorrect = (
        summary.size(class_id, which) if outcome in (None, which) else 0 for which in (CORRECT, INCORRECT)
    )
    # The accuracy within an outcome is 1 or 0 by construction.
    has_accuracy = correct + incorrect > 0 and group != "outcome"
    accuracy_low, accuracy_high = summary.accuracy_interval(class_id) if has_accuracy else (math.nan, math.nan)
    numbers: dict[str, Number] = {}
    for column in summary.columns:
        if column.head is None:
            low, high = summary.interval(column, class_id, outcome)
            numbers[str(column)] = {
                "count": summary.count(column, class_id, outcome),
                "groups": summary.groups(column, class_id, outcome) if summary.group_noun else None,
                "mean": summary.mean(column, class_id, outcome),
                "std": summary.std(column, class_id, outcome),
                "low": low,
                "high": high,
            }
    return {
        "group": group,
        "name": name,
        "class_id": class_id if group == "class" else None,
        "samples": summary.size(class_id, outcome),
        "groups": summary.groups(INVALID_ROWS, class_id, outcome) if summary.group_noun else None,
        "correct": correct,
        "incorrect": incorrect,
        "accuracy": correct / (correct + incorrect) if has_accuracy else math.nan,
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
        "numbers": numbers,
    }
