"""The numbers of a report, as they are written to JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, cast

from lightning_xattn.core.names import valid
from lightning_xattn.evaluation.fusion_samples import describe_modalities, most_confident_unsupported
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import DatasetResult, ExplainedBatch, Results
from lightning_xattn.evaluation.statistics import INVALID_ROWS
from lightning_xattn.evaluation.support import unused
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

    A data set has its ``key_points`` in words. Its ``fusion`` has ``subsets`` of samples, each with the means of all
    ``numbers`` of a `FusionSummary` and the ``shares`` of the modalities; scores that are compared between correct and
    incorrect predictions (``outcomes``); the faithfulness of the ``attention``; and the most confident
    predictions that no modality supports (``unsupported``).
    Each of its ``layers`` has ``groups`` of samples and ``outcomes``.
    """
    facts = _collect_dataset(results) if isinstance(results, DatasetResult) else _collect_batch(results)
    return cast(dict[str, Any], _as_json(facts))


def _collect_batch(results: ExplainedBatch | dict[str, Any]) -> dict[str, Any]:
    samples = results["per_sample_explanations"]
    outcomes = [sample["correct"] for sample in samples]
    return {
        "kind": "batch",
        **{key: results[key] for key in ("class_names", "axes", "attention_stats", "modality_alignment")},
        "samples": len(samples),
        "correct": outcomes.count(True),
        "incorrect": outcomes.count(False),
        "undefined": undefined_in_batch(results),
        "per_sample_explanations": [
            {**sample, "undefined": undefined_in_sample(sample), "interpretation": interpret_sample(sample)}
            for sample in samples
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
        "fusion": None if result.fusion is None else _collect_fusion(result.fusion, names),
        "layers": [
            _collect_layer(one, names) | {"layer": name, "other_lengths": result.other_lengths.get(name, 0)}
            for name, one in result.summaries.items()
        ],
    }


def _collect_fusion(fusion: FusionSummary, class_names: Sequence[str]) -> dict[str, Any]:
    has_shares = not fusion.contribution_problem and not fusion.is_regression
    # A mean of standard errors is no number to report.
    means = [name for name in fusion.numbers if not name.startswith("error/")]

    def collect_subset(subset: Subset) -> dict[str, Any]:
        chosen = subset.chosen
        return {
            "group": subset.kind,
            "name": subset.name,
            "numbers": {name: fusion.estimate(name, *chosen) for name in means},
            "shares": {name: fusion.share(name, *chosen) for name in fusion.modalities} if has_shares else None,
        }

    return {
        "modalities": fusion.modalities,
        "sources": fusion.sources,
        "samples": fusion.samples,
        "groups": fusion.known_groups,
        "group_noun": fusion.group_noun,
        "nonfinite": fusion.nonfinite,
        "missing": fusion.missing,
        "unrecorded": fusion.unrecorded,
        "largest_class": fusion.largest_class,
        "probe_problems": fusion.probe_problems,
        "probe_macro_auroc": fusion.probe_aurocs,
        "probe_calibration_error": fusion.calibration_errors,
        "joint_auroc_gain": fusion.auroc_gains,
        "support_problem": fusion.support_problem,
        "support": fusion.cells,
        "right": fusion.right_cells,
        "added_value_problem": fusion.added_value if isinstance(fusion.added_value, str) else "",
        "added_value": None if isinstance(fusion.added_value, str) else fusion.added_value,
        "unused": {name: unused(fusion, name) for name in fusion.modalities},
        "contribution_problem": fusion.contribution_problem,
        "sizes": None if fusion.contribution_problem else {name: fusion.size(name) for name in fusion.modalities},
        "subsets": [*map(collect_subset, list_subsets(class_names))],
        "outcomes": {score: fusion.compare(score) for score in shown_scores(fusion)},
        "attention": [
            {
                "direction": str(direction),
                "faithfulness": fusion.faithfulness(direction),
                "reference": fusion.faithfulness(direction, "reference"),
                "faithfulness_problem": fusion.faithfulness_problem(direction),
                "without_reference": one.without_reference,
                "at_attention": one.at_attention,
            }
            for direction, one in fusion.replaced.items()
        ],
        "unsupported": [
            {
                "sample_idx": int(fusion.sample_numbers[i]),
                "sample_id": fusion.name_sample(i),
                "modalities": describe_modalities(fusion, i, class_names),
            }
            for i in most_confident_unsupported(fusion)
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
    chosen, (correct, incorrect) = subset.chosen, count_outcomes(summary, subset)
    return {
        "group": subset.kind,
        "name": subset.name,
        "class_id": subset.class_id if subset.kind == "class" else None,
        "samples": summary.size(*chosen),
        "groups": summary.groups(INVALID_ROWS, *chosen) if summary.group_noun else None,
        "correct": correct,
        "incorrect": incorrect,
        "accuracy": estimate_accuracy(summary, subset),
        "numbers": {
            str(column): vars(estimate_mean(summary, column, *chosen)) | {"std": summary.std(column, *chosen)}
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
