"""An epoch's figures, and those of a data set: what the summaries say, handed to what draws it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_xattn.core.attention import Direction, TokenAxis, fitting_axes
from lightning_xattn.core.files import path_of
from lightning_xattn.core.names import shown
from lightning_xattn.core.wording import decimal, describe_size
from lightning_xattn.evaluation.fusion_samples import describe_modalities, most_conflicting
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.evaluation.statistics import ALIGNMENT, SCORES, STATISTICS, Column, shown_columns
from lightning_xattn.functional.outcomes import BINS, CORRECT, INCORRECT
from lightning_xattn.report.estimates import estimate_mean, list_subsets
from lightning_xattn.report.key_points import format_auroc

# matplotlib takes a while to import, and not every run asks for figures.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_xattn.visualizations import Mean, OutcomeSummary


SHOWN_CLASSES = 10
"""How many classes have curves and figures of their own, the largest ones; the others have them together."""

SHOWN_LAYERS = 4
"""How many layers have curves and figures, spread from the first to the last."""


def limit_layers(layers: Sequence[str]) -> list[str]:
    """At most ``SHOWN_LAYERS`` of them, evenly from the first to the last."""
    if len(layers) <= SHOWN_LAYERS:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (SHOWN_LAYERS - 1))] for i in range(SHOWN_LAYERS)]


def limit_classes(result: DatasetResult, kept: Sequence[int] | None = None) -> DatasetResult:
    """The same with the largest ``SHOWN_CLASSES`` classes, or with these, and the others as one."""
    if len(result.class_names) <= SHOWN_CLASSES + 1:
        return result
    return result.merge_classes(result.largest_classes(SHOWN_CLASSES) if kept is None else kept)


def epoch_figures(
    summary: LayerSummary,
    scope: str,
    class_names: Sequence[str],
    *,
    classes_by: str,
    axes: Mapping[str, TokenAxis],
    context: str,
) -> Iterator[tuple[str, Figure]]:
    """Draw one layer's epoch: tag and figure, one at a time.

    Parameters
    ----------
    summary, scope, class_names
        As in ``epoch_curves``, with the classes' own names.
    classes_by
        Whether the classes are those of the "target" or of the "prediction".
    axes
        What the tokens of a modality are, by modality; one whose length does not fit is not used.
    context
        Where the numbers come from, for the titles, e.g. ``"val, epoch 3"``.
    """
    # Imported here because matplotlib takes a while, and not every run asks for figures.
    from lightning_xattn.visualizations import plot_class_attention, plot_head_entropy, plot_outcome_alignment

    names = list(class_names) or ["all samples"]
    grouping = classes_by if class_names else None
    ids = range(len(names))
    counts = [summary.size(class_id=i) for i in ids]

    def draw_maps(
        direction: Direction, maps: Tensor, sizes: list[int], of: list[str], classes_by: str | None
    ) -> Figure:
        _, queries, keys = maps.shape
        known = fitting_axes(axes, {direction.query: queries, direction.key: keys})
        return plot_class_attention(
            maps,
            sizes,
            of,
            direction=str(direction),
            query_axis=known.get(direction.query),
            key_axis=known.get(direction.key),
            classes_by=classes_by,
            context=f"{context}; {queries} {shown(direction.query)} queries ask {keys} {shown(direction.key)} keys",
        )

    outcomes = [summary.size(outcome=outcome) for outcome in (CORRECT, INCORRECT)]
    for direction, maps in summary.maps.items():
        yield f"xattn_map/{scope}/{direction}", draw_maps(direction, maps, counts, names, grouping)
        if sum(outcomes):
            by_outcome = summary.outcome_maps[direction][[CORRECT, INCORRECT]]
            figure = draw_maps(direction, by_outcome, outcomes, ["correct", "incorrect"], None)
            yield f"xattn_map/{scope}/{direction}_by_outcome", figure
    entropy = {
        str(direction): [
            [summary.mean(Column("entropy", direction, head), class_id=i) for head in range(heads)] for i in ids
        ]
        for direction, heads in summary.heads.items()
    }
    yield (
        f"xattn_entropy/{scope}/by_head",
        plot_head_entropy(entropy, counts, names, classes_by=grouping, context=context),
    )
    if class_names and ALIGNMENT in summary.columns:
        compared = summary.compare(ALIGNMENT)
        figure = plot_outcome_alignment(
            _alignment_of(summary, CORRECT),
            _alignment_of(summary, INCORRECT),
            torch.linspace(*SCORES[ALIGNMENT], BINS + 1),
            (compared.auroc, compared.low, compared.high),
            names,
            null=summary.alignment_null,
            classes_by=grouping,
            group_noun=summary.group_noun,
            context=context,
        )
        yield f"xattn_alignment/{scope}/by_outcome", figure


def overview_figure(records: Sequence[Mapping[str, Any]], context: str) -> Figure:
    """Draw what is acted on over the epochs: the records of one dataloader and layer since a fit began, up to now."""
    from lightning_xattn.visualizations import Curve, Panel, plot_epochs  # matplotlib, only where figures are wanted

    last = records[-1]
    shown = [one for one in records if one["stage"] == "val"] if last["stage"] == "val" else [last]
    # Several validations of one epoch differ in their steps alone.
    unit = "epoch" if len({one["epoch"] for one in shown}) == len(shown) else "step"
    moments = [one[unit] for one in shown]

    # What is undefined in an epoch is not in its record.
    known = dict.fromkeys(name for one in shown for name in one)

    def over(name: str) -> list[float]:
        return [one.get(name, math.nan) for one in shown]

    def curve(name: str, label: str) -> Curve:
        return Curve(label, moments, over(name), over(f"{name}_low"), over(f"{name}_high"))

    def by_outcome(topic: str) -> list[Curve]:
        return [curve(f"{topic}/{name}", name) for name in ("correct", "incorrect")]

    def of_each(topic: str) -> list[Curve]:
        names = [name.removeprefix(topic) for name in known if name.startswith(topic)]
        wanted = [name for name in names if "/" not in name and not name.endswith(("_low", "_high"))]
        return [curve(f"{topic}{name}", name) for name in wanted]

    scores = [name for name in ("confidence", "conflict", "alignment", "entropy") if f"outcome/{name}_auroc" in known]
    panels = []
    if "alignment/all" in known:
        null = "null", over("alignment/null")
        panels.append(Panel("alignment", by_outcome("alignment"), (-1, 1), null))
    if any(name.startswith("entropy/") for name in known):
        panels.append(Panel("entropy", by_outcome("entropy"), (0, 1)))
    if "probed_samples" in known:
        largest = "largest class", over("largest_class")
        panels.append(Panel("conflict of the probes", by_outcome("conflict"), (0, 1)))
        panels.append(Panel("accuracy of each probe", of_each("probe/"), (0, 1), largest))
        if any(name.startswith("contribution/size/") for name in known):
            panels.append(Panel("size of the contribution", of_each("contribution/size/"), (0, math.inf)))
        else:
            panels.append(Panel("share of the contribution", of_each("contribution/share/"), (-1, 2)))
    told = Panel(
        "higher in correct (AUROC)",
        [curve(f"outcome/{score}_auroc", score) for score in scores],
        (0, 1),
        ("nothing", [0.5] * len(moments)),
    )
    panels += [told] if scores else []
    return plot_epochs(panels, unit=unit, context=context)


def fusion_figures(
    summary: FusionSummary,
    scope: str,
    class_names: Sequence[str],
    *,
    all_names: Sequence[str],
    classes_by: str,
    context: str,
) -> Iterator[tuple[str, Figure]]:
    """Draw what the modalities of an epoch say and contribute, where it can be told.

    Parameters as `epoch_figures`; ``all_names`` are those of all classes, where ``class_names`` are a few of them.
    """
    from lightning_xattn.visualizations import (
        Mean,
        SampleRow,
        plot_conflict,
        plot_conflicting_samples,
        plot_contribution_shares,
    )

    def share(modality: str, class_id: int | None, outcome: int | None) -> Mean:
        found = summary.share(modality, class_id, outcome)
        return Mean(found.count, found.mean, found.low, found.high, found.groups)

    numbers = summary.numbers
    known = (summary.outcomes == CORRECT) | (summary.outcomes == INCORRECT)
    known &= numbers["conflict"].isfinite() & numbers["confidence"].isfinite()
    if known.any():
        compared = {score: summary.compare(score) for score in ("confidence", "conflict")}
        claims = {
            score: f"{score}: AUROC {format_auroc(one)}" for score, one in compared.items() if math.isfinite(one.auroc)
        }
        figure = plot_conflict(
            numbers["conflict"][known],
            numbers["confidence"][known],
            summary.outcomes[known] == CORRECT,
            claims=claims,
            context=context,
        )
        yield f"xattn_conflict/{scope}/confidence", figure
    if not summary.contribution_problem and not summary.is_regression:
        shares = {
            modality: (
                [share(modality, class_id, None) for class_id in range(len(class_names))],
                [share(modality, None, outcome) for outcome in (CORRECT, INCORRECT)],
            )
            for modality in summary.modalities
        }
        yield (
            f"xattn_contribution/{scope}/shares",
            plot_contribution_shares(
                shares,
                class_names,
                classes_by=classes_by if class_names else None,
                group_noun=summary.group_noun,
                context=context,
            ),
        )
    rows = []
    for i in most_conflicting(summary):
        one = describe_modalities(summary, i, all_names)
        true = "" if one.true is None else f"\ntrue: {one.true}"
        title = f"{int(summary.sample_numbers[i])}: {one.predicted} ({decimal(one.confidence)}){true}"
        rows.append(SampleRow(title, one.probes, one.contributions))
    if rows:
        yield f"xattn_conflict/{scope}/samples", plot_conflicting_samples(rows, context=context)


def dataset_figures(explained: DatasetResult) -> Iterator[tuple[str, Figure]]:
    """Draw a data set: a name that can be a file's, and the figure, one at a time.

    Conflict against confidence, contributions, and the samples of largest conflict; mean attention of each class,
    entropy of each head, alignment of correct against incorrect predictions, and what is compared by class and outcome
    with its 95 % intervals. A second layer's names end with the layer.
    """
    from lightning_xattn.visualizations import plot_class_comparison  # matplotlib, only where figures are wanted

    all_names, explained = explained.class_names, limit_classes(explained)
    names, classes_by, fusion = explained.class_names, explained.classes_by, explained.fusion
    if fusion is not None:
        context = describe_size(fusion.samples, fusion.known_groups, fusion.group_noun)
        for tag, figure in fusion_figures(
            fusion, "all", names, all_names=all_names, classes_by=classes_by, context=context
        ):
            yield tag.removeprefix("xattn_").replace("/all/", "_"), figure
    for layer in limit_layers(list(explained.summaries)):
        summary = explained.summaries[layer]
        context = f"layer {shown(layer)}, {describe_size(summary.samples, summary.groups(), summary.group_noun)}"
        end = "" if summary is explained.headline else f"_{layer}"
        for tag, figure in epoch_figures(
            summary, "all", names, classes_by=classes_by, axes=explained.axes, context=context
        ):
            yield tag.removeprefix("xattn_").replace("/all/", "_") + end, figure
        if names:
            quantities = {title: _means(summary, column) for title, column in _compared(summary)}
            nulls = {title: summary.alignment_null for title, column in _compared(summary) if column == ALIGNMENT}
            figure = plot_class_comparison(
                quantities, names, nulls=nulls, classes_by=classes_by, group_noun=summary.group_noun, context=context
            )
            yield f"class_comparison{end}", figure


def save_dataset_figures(explained: DatasetResult, folder: str | PathLike[str]) -> None:
    """Write every figure of ``dataset_figures`` into a folder, as PNG."""
    from lightning_xattn.visualizations.output import save  # matplotlib, only where figures are wanted

    for name, figure in dataset_figures(explained):
        path = Path(folder) / path_of(name)
        save(figure, path.with_name(f"{path.name}.png"))


def _compared(summary: LayerSummary) -> Iterator[tuple[str, Column]]:
    """The numbers that are compared between outcomes, with titles."""
    for score in SCORES:
        for column in shown_columns(score.statistic, summary.columns):
            way = column.direction
            asks = "" if way is None else f" {shown(way.query)} → {shown(way.key)}"
            yield f"{score}{asks} ({STATISTICS[score.statistic].scale})", column


def _means(summary: LayerSummary, column: Column) -> tuple[list[Mean], list[Mean]]:
    """Of each class, and of each outcome."""
    from lightning_xattn.visualizations import Mean

    *classes, correct, incorrect = [
        Mean(one.count, one.mean, one.low, one.high, one.groups)
        for subset in list_subsets([""] * summary.n_classes)[1:]
        for one in [estimate_mean(summary, column, subset)]
    ]
    return classes, [correct, incorrect]


def _alignment_of(summary: LayerSummary, outcome: int) -> OutcomeSummary:
    from lightning_xattn.visualizations import OutcomeSummary

    ids = range(summary.n_classes)
    return OutcomeSummary(
        histogram=summary.histogram(ALIGNMENT, outcome),
        mean=summary.mean(ALIGNMENT, outcome=outcome),
        class_means=[summary.mean(ALIGNMENT, class_id=i, outcome=outcome) for i in ids],
        class_intervals=[summary.interval(ALIGNMENT, class_id=i, outcome=outcome) for i in ids],
        class_counts=[summary.count(ALIGNMENT, class_id=i, outcome=outcome) for i in ids],
        groups=summary.groups(ALIGNMENT, outcome=outcome) if summary.group_noun else None,
    )
