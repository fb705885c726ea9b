"""The attention of one layer over a data set: counts, means by class and outcome, correct against incorrect."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from lightning_xattn.core.attention import Direction
from lightning_xattn.core.wording import SINGLE_KEY, SINGLE_KEY_REMEDY, decimal, name_modality, percent
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.statistics import ALIGNMENT, INVALID_ROWS, STATISTICS, Column, shown_columns
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.report.document import Block, Item, Items, Paragraph, Table
from lightning_xattn.report.estimates import (
    GROUPED_BY,
    Subset,
    compare_outcomes,
    count_outcomes,
    estimate_accuracy,
    estimate_mean,
    expect_misses,
    explain_brackets,
    format_estimate,
    format_percent,
    list_layer_subsets,
    merge_names,
)
from lightning_xattn.report.key_points import shown_layer_scores
from lightning_xattn.report.undefined import undefined_in_layer

HOW_TO_READ_ATTENTION = (
    "Attention shows which tokens the model attends to, not why it predicts what it predicts. The two directions need "
    "not agree in a good model: a low modality agreement alone is no sign of an error, and a high one no proof of a "
    "right prediction. Agreement (alignment) is the correlation of the two directions' maps, averaged over heads, from "
    "-1 to 1, with 0 for unrelated maps. Entropy is 0 where all attention is on one key and 1 where it is uniform."
)
_NULL = (
    "The alignment between different samples correlates one direction of a sample with the other direction of another, "
    "averaged over all such pairs. It is near 0 where the maps of two samples are unrelated, and well above 0 where "
    "the model attends the same way in every sample. The mean alignment minus this is specific to the sample."
)

_ACCURACY = {"target": "accuracy (recall)", "prediction": "accuracy (precision)", None: "accuracy"}
"""Of the samples of a true class the accuracy is the recall, of those of a predicted class the precision."""


def describe_layer(
    summary: LayerSummary,
    class_names: Sequence[str],
    classes_by: str | None,
    other_lengths: int = 0,
    largest: Sequence[int] | None = None,
) -> Iterator[Block]:
    """Counts, a table of means by class and outcome, and what differs between correct and incorrect predictions.

    ``classes_by``: whether classes are those of the "target" or of the "prediction"; None: not known.
    ``other_lengths``: as in ``DatasetResult``, of this layer. ``largest``: the classes that have rows of their own;
    None: all.
    """
    undefined = undefined_in_layer(summary)
    yield Items([*_list_counts(summary, undefined, other_lengths)])
    columns = _table_columns(summary)
    # What compares outcomes within classes takes all of them.
    tabulated = summary if largest is None else summary.with_classes(largest)
    subsets = list_layer_subsets(tabulated, class_names if largest is None else merge_names(class_names, largest))
    has_classes = any(subset.kind == "class" for subset in subsets)
    title, accuracy = (GROUPED_BY[classes_by], _ACCURACY[classes_by]) if has_classes else ("samples", "accuracy")
    size = f"n ({summary.group_noun})" if summary.group_noun else "n"
    estimates = [
        (estimate_accuracy(tabulated, one), *(estimate_mean(tabulated, column, *one.chosen) for column in columns))
        for one in subsets
    ]
    rows = [_table_row(tabulated, *row) for row in zip(subsets, estimates, strict=True)]
    yield Table((title, size, accuracy, *columns.values()), rows, [HOW_TO_READ_ATTENTION, _NULL])
    yield explain_brackets(summary.group_noun)
    intervals = sum(not math.isnan(one.low) for row in estimates for one in row)
    if has_classes and intervals:
        yield expect_misses(intervals)
    if any(SINGLE_KEY in reason for reason in undefined.values()):
        yield Paragraph(SINGLE_KEY_REMEDY)
    if compared := {str(score): summary.compare(score) for score in shown_layer_scores(summary)}:
        yield from compare_outcomes(compared, summary.group_noun)
    else:
        yield Paragraph("Correct and incorrect predictions are not compared: predictions or targets are not known.")


def _list_counts(summary: LayerSummary, undefined: Mapping[str, str], other_lengths: int) -> Iterator[Item]:
    noun = summary.group_noun
    counts = {
        "Samples": f"{summary.samples} of {summary.groups()} {noun}" if noun else str(summary.samples),
        "Samples without a class": summary.unclassified,
        "Samples left out": f"{other_lengths}: their joint sequence has another length than its spans are for"
        if other_lengths
        else 0,
        "Samples in which one modality is wholly masked": summary.wholly_masked,
        "Samples with a tied top vote": f"{summary.ties}; the first of the tied classes counts" if summary.ties else 0,
    }
    yield from ((label, str(value), ()) for label, value in counts.items() if value)
    has_alignment = ALIGNMENT in summary.columns
    share = f"{percent(summary.undefined_share())} of the samples"
    yield f"{'Alignment' if has_alignment else 'Entropy'} undefined", share, ()
    if not has_alignment:
        yield "Alignment", f"undefined ({undefined['alignment']})", ()
    elif reason := undefined.get("alignment_null"):
        yield "Alignment between different samples", f"undefined ({reason})", ()
    else:
        null, of_maps = summary.alignment_null, summary.alignment_of_maps
        what = (
            f"the mean alignment of these bins, {decimal(of_maps, 3)}," if summary.is_binned else "the mean alignment"
        )
        text = f"{decimal(null, 3)} ({what} minus this: {decimal(of_maps - null, 3)})"
        yield "Alignment between different samples" + (", over bins" if summary.is_binned else ""), text, ()
    for name in map(str, summary.heads):
        if name in undefined:
            yield name_direction(name), undefined[name], ()
    if invalid := int(summary.total(INVALID_ROWS)):
        yield "Rows left out", f"{invalid}: padding, fully masked or not finite", ()


def _table_columns(summary: LayerSummary) -> dict[Column, str]:
    """The numbers of the table, with their titles."""
    per_sample = [column for column in summary.columns if column.head is None]
    shown = [one for name, it in STATISTICS.items() if it.reported for one in shown_columns(name, per_sample)]
    return {
        one: f"{name_direction(str(one.direction))} {one.statistic}" if one.direction else one.statistic
        for one in shown
    }


def _table_row(summary: LayerSummary, subset: Subset, estimates: Sequence[Estimate]) -> list[str]:
    """Name, size, accuracy and means of a subset, of which the estimates are."""
    accuracy, *means = estimates
    samples, (correct, incorrect) = summary.size(*subset.chosen), count_outcomes(summary, subset)
    groups = f" ({summary.groups(INVALID_ROWS, *subset.chosen)})" if summary.group_noun else ""
    right = "" if math.isnan(accuracy.mean) else f"{format_percent(accuracy)} {correct}/{correct + incorrect}"
    cells = [subset.name, f"{samples}{groups}", right]
    for one in means:
        partial = f" n={one.count}" if 0 < one.count < samples else ""
        cells.append(format_estimate(one) + partial if samples else "")
    return cells


def name_direction(name: str, arrow: str = " → ") -> str:
    """``eeg_to_spec`` as ``EEG → Spec``, without the layer before it."""
    direction = Direction.parse(name.rpartition("/")[2])
    return f"{name_modality(direction.query)}{arrow}{name_modality(direction.key)}"
