"""The numbers of a report, as they are written to JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, cast

from lightning_xattn.core.names import valid
from lightning_xattn.evaluation.fusion_samples import describe_modalities, most_conflicting
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import DatasetResult, ExplainedBatch, Results
from lightning_xattn.evaluation.statistics import INVALID_ROWS
from lightning_xattn.report.criteria import interpret_sample
from lightning_xattn.report.estimates import (
    Subset,
    count_outcomes,
    estimate_accuracy,
    estimate_mean,
    list_layer_subsets,
    list_subsets,
)
from lightning_xattn.report.key_points import count_training, key_points, shown_layer_scores, shown_scores
from lightning_xattn.report.undefined import undefined_in_batch, undefined_in_layer, undefined_in_sample


def collect_facts(results: Results) -> dict[str, Any]:
    """Dicts, lists, strings and numbers of a batch or a data set; None where a number is undefined.

    A batch has the keys of ``ExplainedBatch`` but for its tensors, counts of ``samples``, ``correct`` and
    ``incorrect`` predictions, and reasons why numbers are ``undefined``, by name. Each sample has its own, and its
    ``interpretation``, see ``interpret_sample``.

    A data set has its ``key_points`` in words. Its ``fusion`` has ``modalities``, ``subsets`` of samples, scores that
    are compared between correct and incorrect predictions (``outcomes``), the faithfulness of the ``attention``, and
    the most ``conflicting`` samples. Each of its ``layers`` has ``groups`` of samples and ``outcomes``.
    """
    facts = _collect_dataset(results) if isinstance(results, DatasetResult) else _collect_batch(results)
    return cast(dict[str, Any], _as_json(facts))


def _collect_batch(results: ExplainedBatch | dict[str, Any]) -> dict[str, Any]:
    samples = results["per_sample_explanations"]
    outcomes = [sample["correct"] for sample in samples]
    among = results.get("dataset")
    return {
        "kind": "batch",
        "class_names": results["class_names"],
        "axes": results["axes"],
        "samples": len(samples),
        "correct": outcomes.count(True),
        "incorrect": outcomes.count(False),
        "attention_stats": results["attention_stats"],
        "modality_alignment": results["modality_alignment"],
        "undefined": undefined_in_batch(results),
        "per_sample_explanations": [
            {**one, "undefined": undefined_in_sample(one), "interpretation": interpret_sample(one, among)}
            for one in samples
        ],
    }


def _collect_dataset(result: DatasetResult) -> dict[str, Any]:
    names = result.class_names
    return {
        "kind": "dataset",
        "class_names": names,
        "classes_by": result.classes_by,
        "axes": result.axes,
        "table": None if result.table is None else str(result.table),
        "training": count_training(result),
        "key_points": {label: sentence for label, sentence, _ in key_points(result).items},
        "fusion": None
        if result.fusion is None
        else _collect_fusion(result.fusion, names) | {"earlier_test": result.earlier_test},
        "layers": [
            _collect_layer(one, names) | {"layer": name, "other_lengths": result.other_lengths.get(name, 0)}
            for name, one in result.summaries.items()
        ],
    }


def _collect_fusion(fusion: FusionSummary, class_names: Sequence[str]) -> dict[str, Any]:
    has_contributions = not fusion.contribution_problem
    has_shares = has_contributions and not fusion.is_regression

    def subset_facts(subset: Subset) -> dict[str, Any]:
        chosen = subset.chosen
        return {
            "group": subset.kind,
            "name": subset.name,
            "conflict": fusion.estimate("conflict", *chosen),
            "supports_first": fusion.estimate("supports_first", *chosen),
            "shares": {name: fusion.share(name, *chosen) for name in fusion.modalities} if has_shares else None,
            "opposed": fusion.estimate("opposed", *chosen) if has_shares else None,
        }

    return {
        "samples": fusion.samples,
        "groups": fusion.known_groups,
        "group_noun": fusion.group_noun,
        "nonfinite": fusion.nonfinite,
        "largest_class": fusion.largest_class,
        "modalities": [
            {
                "name": name,
                "probe_accuracy": fusion.estimate(f"right/{name}"),
                "probe_problem": fusion.probe_problems.get(name, ""),
                "contribution": fusion.estimate(f"phi/{name}") if has_shares else None,
                "share": fusion.share(name) if has_shares else None,
                "size": fusion.size(name) if has_contributions and fusion.is_regression else None,
            }
            for name in fusion.modalities
        ],
        "subsets": [*map(subset_facts, list_subsets(class_names))],
        "only_probe_right": fusion.estimate("only_probe_right"),
        "contribution_problem": fusion.contribution_problem,
        "interactions": {name: fusion.estimate(name) for name in fusion.interactions},
        "emap_accuracy": fusion.estimate("additive_right") if has_shares else None,
        "model_accuracy": fusion.estimate("model_right") if has_shares else None,
        "outcomes": {score: fusion.compare(score) for score in shown_scores(fusion)},
        "attention": [
            {
                "direction": str(direction),
                "faithfulness": fusion.faithfulness(direction),
                "reference": fusion.faithfulness(direction, "reference"),
                "cost": fusion.estimate(f"cost/{direction}"),
                "faithfulness_problem": fusion.faithfulness_problem(direction),
                "without_reference": one.without_reference,
                "at_attention": one.at_attention,
            }
            for direction, one in fusion.replaced.items()
        ],
        "conflicting": [
            {"sample_idx": int(fusion.sample_numbers[i]), "modalities": describe_modalities(fusion, i, class_names)}
            for i in most_conflicting(fusion)
        ],
    }


def _collect_layer(summary: LayerSummary, class_names: Sequence[str]) -> dict[str, Any]:
    return {
        "directions": [*map(str, summary.heads)],
        "samples": summary.samples,
        "group_noun": summary.group_noun,
        "unclassified": summary.unclassified,
        "ties": summary.ties,
        "wholly_masked": summary.wholly_masked,
        "undefined_share": summary.undefined_share(),
        "invalid_rows": int(summary.total(INVALID_ROWS)),
        "alignment_null": summary.alignment_null,
        "undefined": undefined_in_layer(summary),
        "groups": [_collect_subset(summary, subset) for subset in list_layer_subsets(summary, class_names)],
        "outcomes": {str(score): summary.compare(score) for score in shown_layer_scores(summary)},
    }


def _collect_subset(summary: LayerSummary, subset: Subset) -> dict[str, Any]:
    accuracy, (correct, incorrect) = estimate_accuracy(summary, subset), count_outcomes(summary, subset)
    return {
        "group": subset.kind,
        "name": subset.name,
        "class_id": subset.class_id if subset.kind == "class" else None,
        "samples": summary.size(*subset.chosen),
        "groups": summary.groups(INVALID_ROWS, *subset.chosen) if summary.group_noun else None,
        "correct": correct,
        "incorrect": incorrect,
        "accuracy": accuracy.mean,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "numbers": {
            str(column): {
                **vars(estimate_mean(summary, column, subset)),
                "std": summary.std(column, *subset.chosen),
            }
            for column in summary.columns
            if column.head is None
        },
    }


def _as_json(value: Any) -> Any:
    """A value of what JSON knows: dataclasses as dicts, tuples as lists, undefined numbers as None."""
    if is_dataclass(value):
        value = vars(value)
    elif hasattr(value, "tolist"):  # numbers and arrays of numpy and torch
        value = value.tolist()
    if isinstance(value, Mapping):
        return {valid(str(key)): _as_json(item) for key, item in value.items()}
    if isinstance(value, str):
        return valid(value)  # as the sample table has it
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
