"""The figures of an epoch and of a data set: the numbers of the summaries, drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_xattn.core.attention import TokenAxis, fitting_axes
from lightning_xattn.core.files import path_of
from lightning_xattn.core.names import shown
from lightning_xattn.core.wording import describe_size, name_modality
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.evaluation.statistics import ALIGNMENT, ERROR_SIDES, SCORES, STATISTICS, Column, shown_columns
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.report.estimates import estimate_mean

# matplotlib takes a while to import, and not every run asks for figures.
if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def attention_figure(
    summary: LayerSummary, class_names: Sequence[str], *, classes_by: str, axes: Mapping[str, TokenAxis], context: str
) -> Figure | None:
    """Draw one layer's mean attention of each class on one page, both directions; None where there are no mean maps.

    Parameters as `epoch_figures` takes them.
    """
    from lightning_xattn.visualizations import plot_attention_by_class  # matplotlib, only where figures are wanted

    if not summary.maps:
        return None
    names, counts = _name_maps(summary, class_names)
    direction, tokens = next(iter(summary.tokens.items()))
    return plot_attention_by_class(
        {str(one): maps for one, maps in summary.maps.items()},
        counts,
        names,
        axes=fitting_axes(axes, dict(zip((direction.query, direction.key), tokens, strict=True))),
        tokens={str(one): counts for one, counts in summary.tokens.items()},
        classes_by=classes_by if names != ["all samples"] else None,
        context=context,
    )


def _name_maps(summary: LayerSummary, class_names: Sequence[str]) -> tuple[list[str], list[int]]:
    """What each mean map is of, and of how many samples: each class, or all samples."""
    maps = next(iter(summary.maps.values()), ())
    if not class_names or len(maps) < len(class_names):
        return ["all samples"], [summary.samples]
    return list(class_names), [summary.size(class_id=i) for i in range(len(class_names))]


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
    from lightning_xattn.visualizations import plot_class_attention, plot_class_comparison, plot_head_entropy

    names = list(class_names) or ["all samples"]
    grouping = classes_by if class_names else None
    ids = range(len(names))
    counts = [summary.size(class_id=i) for i in ids]

    outcomes = [summary.size(outcome=outcome) for outcome in (CORRECT, INCORRECT)]
    of_maps, in_maps = _name_maps(summary, class_names)
    for direction, maps in summary.maps.items():
        by_outcome = summary.outcome_maps[direction][[CORRECT, INCORRECT]] if sum(outcomes) else maps[:0]
        queries, keys = summary.tokens[direction]
        known = fitting_axes(axes, {direction.query: queries, direction.key: keys})
        figure = plot_class_attention(
            torch.cat([maps, by_outcome]),
            [*in_maps, *outcomes][: len(maps) + len(by_outcome)],
            [*of_maps, "correct", "incorrect"][: len(maps) + len(by_outcome)],
            direction=str(direction),
            query_axis=known.get(direction.query),
            key_axis=known.get(direction.key),
            tokens=(queries, keys),
            classes_by=grouping if len(of_maps) > 1 else None,
            context=f"{context}; {queries} {shown(direction.query)} queries ask {keys} {shown(direction.key)} keys",
        )
        yield f"xattn_map/{scope}/{direction}", figure
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
    if class_names:
        compared = dict(_compared_columns(summary))
        figure = plot_class_comparison(
            {
                title: _estimate_groups(len(names), partial(estimate_mean, summary, column))
                for title, column in compared.items()
            },
            names,
            nulls={
                title: summary.alignment_null
                for title, column in compared.items()
                if column == ALIGNMENT and not summary.is_binned  # which is of bins, and has less noise
            },
            classes_by=grouping,
            group_noun=summary.group_noun,
            context=context,
        )
        yield f"xattn_outcome/{scope}/class_comparison", figure


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

    def draw(title: str, name: str) -> Curve:
        return Curve(title, moments, *(over(name + end) for end in ("", "_low", "_high")))

    def draw_each(topic: str, names: Sequence[str] = ()) -> list[Curve]:
        """The curves of a topic: those of these names, or all of it but for ends of intervals and parts."""
        found = [name.removeprefix(topic) for name in known if name.startswith(topic)]
        names = names or [name for name in found if "/" not in name and not name.endswith(("_low", "_high"))]
        return [draw(name, topic + name) for name in names]

    outcomes = ("correct", "incorrect")
    panels = []
    if "alignment/all" in known:
        # A null of bins has less noise than the alignment of cells.
        null = ("", []) if "alignment_of_bins" in known else ("null", over("alignment/null"))
        panels.append(Panel("alignment", draw_each("alignment/", outcomes), (-1, 1), null))
    if any(name.startswith("entropy/") for name in known):
        panels.append(Panel("entropy", draw_each("entropy/", outcomes), (0, 1)))
    if "probed_samples" in known:
        cells = [one.name for one in draw_each("support/") if one.name != "delta_auroc"]
        supported = [draw(name.replace("_", " "), f"support/{name}") for name in cells]
        panels.append(Panel("predictions supported by", supported, (0, 1)))
        largest = "largest class", over("largest_class")
        panels.append(Panel("accuracy of each probe", draw_each("probe/"), (0, 1), largest))
        if any(name.startswith("contribution/size/") for name in known):
            panels.append(Panel("size of the contribution", draw_each("contribution/size/"), (0, math.inf)))
        else:
            panels.append(Panel("share of the contribution", draw_each("contribution/share/"), (-1, 2)))
    scores = [name for name in ("confidence", "support", "alignment", "entropy") if f"outcome/{name}_auroc" in known]
    if scores:
        curves = [draw(f"{ERROR_SIDES[name]} {name}", f"outcome/{name}_auroc") for name in scores]
        panels.append(Panel("detects errors (AUROC)", curves, (0, 1), ("chance", [0.5] * len(moments))))
    return plot_epochs(panels, unit=unit, context=context)


def fusion_figures(
    summary: FusionSummary, scope: str, class_names: Sequence[str], *, classes_by: str, context: str
) -> Iterator[tuple[str, Figure]]:
    """Draw who supports the predictions, and each modality's share of the contributions, where these are defined.

    Parameters as `epoch_figures` takes them.
    """
    from lightning_xattn.visualizations import plot_class_comparison, plot_support  # only where figures are wanted

    if summary.cells:
        cells = [(one.name, one.samples, one.share, one.accuracy, one.confidence) for one in summary.cells]
        yield f"xattn_support/{scope}/cells", plot_support(cells, group_noun=summary.group_noun, context=context)
    has_outcomes = bool(((summary.outcomes == CORRECT) | (summary.outcomes == INCORRECT)).any())
    if summary.contribution_problem or summary.is_regression or not (class_names or has_outcomes):
        return

    def share(modality: str, class_id: int | None, outcome: int | None) -> Estimate:
        found = summary.share(modality, class_id, outcome)
        return replace(found, mean=100 * found.mean, low=100 * found.low, high=100 * found.high)

    figure = plot_class_comparison(
        {
            f"share of {name_modality(name)} (% of the contributions)": _estimate_groups(
                len(class_names), partial(share, name)
            )
            for name in summary.modalities
        },
        class_names,
        limits=(-60, 160),  # an interval of few samples may reach far beyond any share
        classes_by=classes_by if class_names else None,
        group_noun=summary.group_noun,
        context=context,
    )
    yield f"xattn_contribution/{scope}/shares", figure


def dataset_figures(explained: DatasetResult) -> Iterator[tuple[str, Figure]]:
    """Draw a data set: a name that can be a file's, and the figure, one at a time.

    Shares of the modalities in the contributions; mean attention of each class, entropy of each head, and what is
    compared by class and outcome with its 95 % intervals. A second layer's names end with the layer.
    """
    explained = limit_classes(explained)
    names, classes_by, fusion = explained.class_names, explained.classes_by, explained.fusion
    if fusion is not None:
        context = describe_size(fusion.samples, fusion.known_groups, fusion.group_noun)
        for tag, figure in fusion_figures(fusion, "all", names, classes_by=classes_by, context=context):
            yield _name_file(tag), figure
    for layer in limit_layers(list(explained.summaries)):
        summary = explained.summaries[layer]
        context = f"layer {shown(layer)}, {describe_size(summary.samples, summary.groups(), summary.group_noun)}"
        end = "" if summary is explained.headline else f"_{layer}"
        for tag, figure in epoch_figures(
            summary, "all", names, classes_by=classes_by, axes=explained.axes, context=context
        ):
            yield _name_file(tag) + end, figure


def save_dataset_figures(explained: DatasetResult, folder: str | PathLike[str]) -> None:
    """Write every figure of ``dataset_figures`` into a folder, as PNG."""
    from lightning_xattn.visualizations.output import save  # matplotlib, only where figures are wanted

    for name, figure in dataset_figures(explained):
        path = Path(folder) / path_of(name)
        save(figure, path.with_name(f"{path.name}.png"))


def _name_file(tag: str) -> str:
    return tag.removeprefix("xattn_").removeprefix("outcome/all/").replace("/all/", "_")


def _compared_columns(summary: LayerSummary) -> Iterator[tuple[str, Column]]:
    """The numbers that are compared between outcomes, with titles."""
    for score in SCORES:
        for column in shown_columns(score.statistic, summary.columns):
            way = (
                "" if column.direction is None else f" {shown(column.direction.query)} → {shown(column.direction.key)}"
            )
            yield f"{score}{way} ({STATISTICS[score.statistic].scale})", column


def _estimate_groups(
    classes: int, estimate: Callable[[int | None, int | None], Estimate]
) -> tuple[list[Estimate], list[Estimate]]:
    """The estimates of each class, and of correct and of incorrect predictions."""
    return [estimate(i, None) for i in range(classes)], [estimate(None, outcome) for outcome in (CORRECT, INCORRECT)]
