"""The modalities of a data set: their probes, support, contributions and faithfulness, as tables and lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from lightning_xattn.core.names import shown
from lightning_xattn.core.wording import by_reason, decimal, name_modality, percent
from lightning_xattn.evaluation.fusion_samples import describe_modalities, most_confident_unsupported
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.support import Cell, overrules
from lightning_xattn.functional.error_detection import COVERAGE
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.functional.probe import JOINT
from lightning_xattn.report.document import Block, Item, Items, Paragraph, Table
from lightning_xattn.report.estimates import (
    GROUPED_BY,
    compare_outcomes,
    expect_misses,
    explain_brackets,
    format_estimate,
    format_percent,
    list_subsets,
    merge_names,
)
from lightning_xattn.report.key_points import describe_limits, shown_scores

LISTED = 20
"""How many samples that saved probes read are listed at most."""

_PROBE = (
    "Probe accuracy: how often a linear probe on the pooled output of one modality's encoder predicts the true class; "
    "the joint probe has those of all modalities. No probe was fitted on the sample that it predicts, nor on another "
    "of its group. The model may also use what a linear probe of pooled features cannot detect."
)
_CONTRIBUTION = (
    "Contribution: the part of the predicted class's probability that a modality contributes (Shapley value). It is "
    "what changes when the modality is permuted, that is, replaced by that of another sample. A contribution below 0 "
    "opposes the prediction; a share below 0 or above 100 % means the same of many predictions."
)
_SUPPORT = (
    "Support: a modality supports a prediction if its probe predicts the same class. Where none does, the probes may "
    "agree with each other or differ. Probes are fitted on labels of this evaluation: part of what support adds is "
    "what a better classifier would add.",
    "Calibration gap: the accuracy minus the mean confidence. Below 0, the model is too confident.",
)
_FAITHFULNESS = (
    "Faithfulness: how much more it costs to replace the most attended tokens than the least attended ones, divided "
    "by the cost of replacing all. 1: the prediction depends on the most attended tokens alone; 0: a random order. "
    "The reference is the order by signed gradient x attention."
)


def describe_fusion(fusion: FusionSummary, class_names: Sequence[str]) -> Iterator[Block]:
    """Counts, a table of the modalities, and lists of what concerns all samples."""
    noun = fusion.group_noun
    size = f"{fusion.samples} of {fusion.known_groups} {noun}" if noun else str(fusion.samples)
    counts: list[Item] = [("Samples", size, ()), ("Modalities", ", ".join(fusion.sources), ())]
    for name, count in fusion.missing.items():
        counts.append((f"Samples left out, as they lack {name_modality(name)}", str(count), ()))
    if fusion.unrecorded:
        counts.append(("Samples left out, as their modalities could not be recorded", str(fusion.unrecorded), ()))
    if not fusion.contribution_problem:
        permuted = int(fusion.numbers[f"phi/{fusion.modalities[0]}"].isfinite().sum())
        counts.append(("Samples that were permuted, for contributions and faithfulness", str(permuted), ()))
    if fusion.nonfinite:
        counts.append(("Samples left out, as their fusion inputs are not finite", str(fusion.nonfinite), ()))
    yield Items(counts)
    yield _tabulate_modalities(fusion)
    if fusion.replaced:
        yield _tabulate_faithfulness(fusion)
        reasons = {str(direction): one.without_reference for direction, one in fusion.replaced.items()}
        for reason, names in by_reason({name: reason for name, reason in reasons.items() if reason}).items():
            yield Paragraph(f"No reference of {' and '.join(names)}: {reason}.")
    yield explain_brackets(noun)
    for reason, names in by_reason(fusion.probe_problems).items():
        yield Paragraph(f"No probe on {' and '.join(map(name_modality, names))}: {reason}.")
    if fusion.contribution_problem:
        yield Paragraph(f"Contributions not computed: {fusion.contribution_problem}.")
    if fusion.support_problem:
        yield Paragraph(f"Support not computed: {fusion.support_problem}.")
    yield from tabulate_cells(fusion)
    if whole := list(_describe_whole(fusion)):
        yield Items(whole, "Over all samples")
    if fusion.saved is not None:
        listed = range(min(fusion.samples, LISTED))
        found = [
            (f"Sample {shown(fusion.name_sample(i))}", str(describe_modalities(fusion, i, class_names)), ())
            for i in sorted(listed, key=lambda i: int(fusion.sample_numbers[i]))
        ]
        yield Items(found, "Samples" if fusion.samples <= LISTED else f"{LISTED} of {fusion.samples} samples")
    elif unsupported := most_confident_unsupported(fusion):
        found = [
            (f"Sample {shown(fusion.name_sample(i))}", str(describe_modalities(fusion, i, class_names)), ())
            for i in unsupported
        ]
        yield Items(found, "The most confident predictions that no modality supports")
    if compared := {score: fusion.compare(score) for score in shown_scores(fusion)}:
        yield from compare_outcomes(compared, noun)


def _tabulate_modalities(fusion: FusionSummary) -> Table:
    def probe(name: str) -> str:
        accuracy = format_percent(fusion.estimate(f"right/{name}"))
        return f"{accuracy} (not used)" if name in fusion.probe_problems else accuracy

    columns: dict[str, Callable[[str], str]] = {
        "probe accuracy": probe,
        "macro AUROC": lambda name: format_estimate(fusion.probe_aurocs[name]),
        "calibration error": lambda name: _say(decimal, fusion.calibration_errors[name]),
    }
    of_probes = [*columns]
    if fusion.contribution_problem:
        pass
    elif fusion.is_regression:
        columns["mean size of the contribution"] = lambda name: format_estimate(fusion.size(name))
    else:
        columns["contribution"] = lambda name: format_estimate(fusion.estimate(f"phi/{name}"), signed=True)
        columns["share"] = lambda name: format_percent(fusion.share(name))
    rows = [(name_modality(name), *(cell(name) for cell in columns.values())) for name in fusion.modalities]
    joint = [columns[one](JOINT) if one in of_probes else "" for one in columns]
    model = [format_percent(fusion.estimate("correct")), *[""] * (len(columns) - 1)]
    notes = [_PROBE] if fusion.contribution_problem else [_PROBE, _CONTRIBUTION]
    return Table(("modality", *columns), [*rows, ("joint probe", *joint), ("the model itself", *model)], notes)


def _say(words: Callable[[float], str], value: float) -> str:
    return "undefined" if math.isnan(value) else words(value)


def tabulate_cells(fusion: FusionSummary) -> Iterator[Block]:
    """A table of the cells of support, one of the cells of whose probe is right, and what stands out in them."""
    noun = f" ({fusion.group_noun})" if fusion.group_noun else ""
    columns: dict[str, Callable[[Cell], str]] = {
        f"samples{noun}": lambda cell: f"{cell.samples}" if cell.groups is None else f"{cell.samples} ({cell.groups})",
        "share": lambda cell: format_percent(cell.share),
        "accuracy": lambda cell: format_percent(cell.accuracy),
        "mean confidence": lambda cell: format_percent(cell.confidence),
        "calibration gap": lambda cell: format_percent(cell.calibration_gap),
    }
    of_support, of_right = [*columns], [*columns][:3]
    if fusion.saved is not None and not fusion.has_outcomes:
        there = {cell.key: one for cell, one in zip(fusion.cells, fusion.saved.accuracies, strict=True)}
        columns["accuracy in the labelled evaluation"] = lambda cell: format_percent(there[cell.key])
        of_support = [*of_right[:2], "mean confidence", "accuracy in the labelled evaluation"]
    for title, cells, wanted in (
        ("supported by", fusion.cells, of_support),
        ("whose probe is right", fusion.right_cells, of_right),
    ):
        if cells:
            rows = [(cell.name, *(columns[one](cell) for one in wanted)) for cell in cells]
            heads = [f"the model's {one}" if one == "accuracy" else one for one in wanted]
            yield Table((title, *heads), rows, _SUPPORT if cells is fusion.cells else ())
            yield from _describe_overruled(filter(overrules, cells))


def _describe_overruled(cells: Iterable[Cell]) -> Iterator[Paragraph]:
    for cell in cells:
        yield Paragraph(
            f"The model overrules its modalities in {cell.samples} predictions, where their probes agree with each "
            f"other on another class: accuracy {format_percent(cell.accuracy, '95 % CI ')} at a mean confidence of "
            f"{percent(cell.confidence.mean)}."
        )


def _tabulate_faithfulness(fusion: FusionSummary) -> Table:
    rows = []
    for direction in fusion.replaced:
        found = [format_estimate(fusion.faithfulness(direction, order), signed=True) for order in ("gain", "reference")]
        if fusion.faithfulness_problem(direction).startswith("bypassed"):
            found = ["bypassed", "bypassed"]
        rows.append(
            (
                f"{name_modality(direction.query)} → {name_modality(direction.key)}",
                *found,
                format_estimate(fusion.estimate(f"cost/{direction}")),
            )
        )
    return Table(("replaced keys", "faithfulness", "of the reference", "cost of replacing all"), rows, [_FAITHFULNESS])


def describe_classes(
    fusion: FusionSummary, class_names: Sequence[str], classes_by: str | None, largest: Sequence[int] | None = None
) -> Iterator[Block]:
    """A table of support and shares by class and outcome; empty where neither is computed.

    ``classes_by``: whether classes are those of the "target" or of the "prediction"; None: not known.
    ``largest``: the classes that have rows of their own; None: all.
    """
    if largest is not None:
        fusion, class_names = fusion.merge_classes(largest), merge_names(class_names, largest)
    subsets, names = list_subsets(class_names, fusion.has_outcomes), fusion.modalities
    columns: dict[str, list[Estimate]] = {}
    if not fusion.support_problem:
        for name in names:
            supports = [fusion.estimate(f"supports/{name}", *one.chosen) for one in subsets]
            columns[f"supported by {name_modality(name)}"] = supports
    if not fusion.contribution_problem and not fusion.is_regression:
        for name in names:
            columns[f"share of {name_modality(name)}"] = [fusion.share(name, *one.chosen) for one in subsets]
    if columns:
        cells = [[*map(format_percent, column)] for column in columns.values()]
        yield Table((GROUPED_BY[classes_by], *columns), list(zip([one.name for one in subsets], *cells, strict=True)))
        if intervals := sum(not math.isnan(one.low) for column in columns.values() for one in column):
            yield expect_misses(intervals)


def _describe_whole(fusion: FusionSummary) -> Iterator[Item]:
    added = fusion.added_value
    if not isinstance(added, str):
        risks = f"{percent(added.baseline_risk)} → {percent(added.risk)}"
        areas = f"{decimal(added.baseline_area, 3)} → {decimal(added.area, 3)}"
        yield (
            "Confidence → confidence and support",
            f"errors among the {percent(COVERAGE, 0)} of predictions that look most reliable {risks}; area under "
            f"the risk-coverage curve {areas}; log loss of the error model "
            f"{format_estimate(added.delta_log_loss, signed=True)} nats",
            (),
        )
    unit = "of the output" if fusion.is_regression else "centred logits"
    for name in fusion.interactions:
        pair = name.partition("/")[2]
        label = f"Interaction{f' of {pair}' if pair else ''} ({unit})"
        yield label, format_estimate(fusion.estimate(name), signed=True), ()
    if not fusion.contribution_problem and not fusion.is_regression:
        additive, model = (fusion.estimate(name) for name in ("additive_right", "model_right"))
        if additive.count:
            accuracies = f"{format_percent(additive)}, the model's {format_percent(model)}"
            yield "Accuracy if the modalities only added up (EMAP)", accuracies, ()
    yield from ((label, sentence, ()) for label, sentence in describe_limits(fusion))
