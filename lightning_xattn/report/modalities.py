"""The modalities of a data set: their probes, conflict, contributions and faithfulness, as tables and lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lightning_xattn.core.wording import by_reason, decimal, name_modality
from lightning_xattn.evaluation.fusion_samples import describe_modalities, most_conflicting
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.functional.probe import JOINT
from lightning_xattn.report.document import Block, Item, Items, Paragraph, Table
from lightning_xattn.report.estimates import (
    GROUPED_BY,
    compare_outcomes,
    explain_brackets,
    format_estimate,
    format_percent,
    list_subsets,
)
from lightning_xattn.report.key_points import shown_scores

HOW_TO_READ_MODALITIES = (
    "Probe: a linear probe predicts the class from what one modality brings into the fusion. No probe has seen the "
    "sample that it predicts, nor any other of its group. Conflict is the chance that the probes, each drawing a class "
    "from its probabilities, draw different ones. A modality supports the prediction more than another if its probe "
    "gives the predicted class a higher probability.",
    "Contribution: the part of the predicted class's probability that a modality contributes (Shapley value), which is "
    "what changes when the modality is permuted, that is, replaced by that of another sample. A contribution below 0 "
    "opposes the prediction. A share below 0 or above 100 % means the same of many predictions. "
    "A main modality is named only where the 95 % CI of its share lies above two thirds.",
    "Faithfulness: how much more it costs to replace the most attended tokens than the least attended ones, divided "
    "by the cost of replacing all. 1: the prediction depends on the most attended tokens alone; 0: a random order. "
    "The reference is the order by signed gradient x attention.",
    "None of these numbers shows that a prediction is right. Confidence is the baseline that any other score has to "
    "beat.",
)


def describe_fusion(fusion: FusionSummary, class_names: Sequence[str], classes_by: str | None) -> Iterator[Block]:
    """Counts, a table of the modalities, one by class and outcome, and lists of what concerns all samples.

    ``classes_by``: whether classes are those of the "target" or of the "prediction"; None: not known.
    """
    noun = fusion.group_noun
    size = f"{fusion.samples} of {fusion.known_groups} {noun}" if noun else str(fusion.samples)
    counts: list[Item] = [("Samples", size, ()), ("Modalities", ", ".join(fusion.sources), ())]
    for name, count in fusion.missing.items():
        counts.append((f"Samples left out, as they lack {name_modality(name)}", str(count), ()))
    if fusion.unrecorded:
        counts.append(("Samples left out, as their modalities could not be recorded", str(fusion.unrecorded), ()))
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
    yield from _tabulate_subsets(fusion, class_names, classes_by)
    if whole := list(_describe_whole(fusion)):
        yield Items(whole, "Over all samples")
    if conflicting := most_conflicting(fusion):
        among = "" if fusion.contribution_problem else ", among those that were permuted"
        found = [
            (f"Sample {int(fusion.sample_numbers[i])}", str(describe_modalities(fusion, i, class_names)), ())
            for i in conflicting
        ]
        yield Items(found, f"Samples of largest conflict{among}")
    if compared := {score: fusion.compare(score) for score in shown_scores(fusion)}:
        yield from compare_outcomes(compared, noun)


def _tabulate_modalities(fusion: FusionSummary) -> Table:
    def probe(name: str) -> str:
        accuracy = format_percent(fusion.estimate(f"right/{name}"))
        return f"{accuracy} (not used)" if name in fusion.probe_problems else accuracy

    columns: dict[str, Callable[[str], str]] = {
        "probe accuracy": probe,
        "macro AUROC": lambda name: format_estimate(fusion.probe_aurocs[name]),
        "calibration error": lambda name: decimal(fusion.calibration_errors[name]),
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
    return Table(("modality", *columns), [*rows, ("all together", *joint)])


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
    return Table(("replaced keys", "faithfulness", "of the reference", "cost of replacing all"), rows)


def _tabulate_subsets(fusion: FusionSummary, class_names: Sequence[str], classes_by: str | None) -> Iterator[Table]:
    subsets, names = list_subsets(class_names), fusion.modalities
    columns: dict[str, list[str]] = {}
    if not fusion.probe_problems:
        columns["conflict"] = [format_estimate(fusion.estimate("conflict", *one.chosen)) for one in subsets]
        if len(names) == 2:
            supports = [fusion.estimate("supports_first", *one.chosen) for one in subsets]
            columns[f"supported more by {name_modality(names[0])}"] = [*map(format_percent, supports)]
    if not fusion.contribution_problem and not fusion.is_regression:
        for name in names:
            shares = [fusion.share(name, *one.chosen) for one in subsets]
            columns[f"share of {name_modality(name)}"] = [*map(format_percent, shares)]
    if columns:
        rows = zip([one.name for one in subsets], *columns.values(), strict=True)
        yield Table((GROUPED_BY[classes_by], *columns), list(rows))


def _describe_whole(fusion: FusionSummary) -> Iterator[Item]:
    right = fusion.estimate("only_probe_right")
    if right.count:
        yield "Wrong predictions for which the probe on a modality is right", format_percent(right), ()
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
