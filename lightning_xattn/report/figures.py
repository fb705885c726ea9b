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
from lightning_xattn.core.names import shown, shown_tag
from lightning_xattn.core.wording import describe_size, name_modality
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.evaluation.statistics import ALIGNMENT, SCORES, STATISTICS, Column, shown_columns
from lightning_xattn.evaluation.support import name_cells
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.functional.probe import JOINT
from lightning_xattn.report.estimates import estimate_mean
from lightning_xattn.report.headline import describe_headline, list_probes, list_shares, list_support

# matplotlib takes a while to import, and not every run asks for figures.
if TYPE_CHECKING:
    from matplotlib.figure import Figure


SHOWN_CLASSES = 10
"""How many classes have curves and figures of their own, the largest ones; the others have them together."""

SHOWN_EPOCHS = 3
"""From this number of validations on, the card shows its numbers over the epochs."""

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
) -> Figure:
    """Draw one layer's attention card: alignment and entropy by class and outcome, and the mean map of each class.

    Parameters as `epoch_figures` takes them.
    """
    from lightning_xattn.visualizations import Measure, plot_attention_card  # matplotlib, only where figures are wanted

    has_outcomes = any(summary.size(outcome=outcome) for outcome in (CORRECT, INCORRECT))
    measures = []
    for title, column in _attention_columns(summary) if class_names or has_outcomes else ():
        estimates = _estimate_groups(len(class_names), partial(estimate_mean, summary, column))
        # A null of bins has less noise than the alignment of cells.
        has_null = column == ALIGNMENT and not summary.is_binned
        measures.append(Measure(title, *estimates, summary.alignment_null if has_null else math.nan))
    names, counts = _name_maps(summary, class_names)
    known = {}
    if summary.tokens:
        direction, tokens = next(iter(summary.tokens.items()))
        known = fitting_axes(axes, dict(zip((direction.query, direction.key), tokens, strict=True)))
    return plot_attention_card(
        measures,
        {str(one): maps for one, maps in summary.maps.items()},
        counts,
        class_names,
        map_names=names,
        axes=known,
        tokens={str(one): counts for one, counts in summary.tokens.items()},
        classes_by=classes_by if class_names else None,
        group_noun=summary.group_noun,
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
            context=f"{context}; {queries} queries, {keys} keys",
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


def card_figure(result: DatasetResult, records: Sequence[Mapping[str, Any]] = (), context: str = "") -> Figure | None:
    """Draw the card: probe accuracy, contribution and support for the prediction; None where no modality is known.

    Parameters
    ----------
    result
        The evaluation.
    records
        Of one dataloader since a fit began, up to this evaluation; with `SHOWN_EPOCHS` validations or more the card
        shows its numbers over the epochs.
    context
        Where the numbers come from, e.g. ``"val, epoch 3"``.
    """
    from lightning_xattn.visualizations import Cell, plot_card  # matplotlib, only where figures are wanted
    from lightning_xattn.visualizations.card import MODEL

    fusion = result.fusion
    if fusion is None:
        return None
    sentence, size = describe_headline(result).sentence, describe_size(fusion.samples, None, None)
    if fusion.known_groups is not None:
        size = f"{size}, {fusion.known_groups} {fusion.group_noun}"
    context = f"{context}; {size}" if context else size
    validations = [one for one in records if one["stage"] == "val" and "probed_samples" in one]
    if len(validations) >= SHOWN_EPOCHS and records[-1]["stage"] == "val":
        return _draw_epochs(fusion, validations, sentence, context)
    right = {name: fusion.estimate(f"right/{name}") for name in (*fusion.modalities, JOINT)}
    right[MODEL] = fusion.estimate("correct")
    probes = {name: one for name, one in right.items() if math.isfinite(one.mean)}
    shares: dict[str, Estimate] = {}
    if not fusion.contribution_problem and not fusion.is_regression:
        shares = {name: one for name in fusion.modalities if math.isfinite((one := fusion.share(name)).mean)}
    cells = [Cell(one.name, one.share, one.accuracy, one.confidence) for one in fusion.cells if one.samples]
    return plot_card(
        fusion.modalities,
        probes or _as_sentence(list_probes(fusion)),
        shares or _as_sentence(list_shares(fusion)),
        cells or _as_sentence(list_support(fusion)),
        largest_class=fusion.largest_class,
        sentence=sentence,
        group_noun=fusion.group_noun,
        context=context,
    )


def _as_sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _draw_epochs(fusion: FusionSummary, records: Sequence[Mapping[str, Any]], sentence: str, context: str) -> Figure:
    """Draw the card's numbers over the epochs."""
    from lightning_xattn.visualizations import Curve, Panel, plot_epochs
    from lightning_xattn.visualizations.card import MODEL, look_of_modality
    from lightning_xattn.visualizations.drawing import Look

    # Several validations of one epoch differ in their steps alone.
    unit = "epoch" if len({one["epoch"] for one in records}) == len(records) else "step"
    moments = [one[unit] for one in records]
    # What is undefined in an epoch is not in its record.
    known = dict.fromkeys(name for one in records for name in one)

    def over(name: str, scale: float) -> list[float]:
        return [scale * one.get(name, math.nan) for one in records]

    def draw(names: Mapping[str, str], scale: float = 100.0) -> list[Curve]:
        return [
            Curve(title, moments, *(over(f"{name}{end}", scale) for end in ("", "_low", "_high")))
            for name, title in names.items()
            if name in known
        ]

    modalities = {shown_tag(name): name_modality(name) for name in fusion.modalities}
    looks = {title: look_of_modality(place) for place, title in enumerate(modalities.values())}
    looks |= {"joint": Look("0.45", True, "--", "P"), MODEL: Look("black", True, "-", "o")}
    looks |= {"all predictions": looks[MODEL], "supported by all": Look("0.2", False, "--", "o")}
    looks |= {"supported by none": Look("0.45", False, "--", "D")}
    looks |= {name: Look(grey, False, "--", marker) for (_, name), grey, marker in _grey_cells(fusion.modalities)}
    looks |= {f"only {name}": looks[name] for name in modalities.values()}
    probes = {f"probe/{tag}": name for tag, name in modalities.items()} | {f"probe/{JOINT}": "joint"}
    cells = {f"support/{shown_tag(key)}": name for key, name in name_cells(fusion.modalities)}
    accuracy, percents = {"accuracy": MODEL}, (0.0, 100.0)
    panels = [
        Panel("Probe accuracy (%)", draw(probes | accuracy), percents, ("largest class", over("largest_class", 100))),
        Panel(
            "Contribution (%)", draw({f"contribution/share/{tag}": name for tag, name in modalities.items()}), percents
        ),
        Panel("Support (% of predictions)", draw(cells), percents),
        Panel(
            "Accuracy by support (%)",
            draw(
                {
                    "accuracy": "all predictions",
                    "support/accuracy/supported": "supported by all",
                    "support/accuracy/unsupported": "supported by none",
                }
            ),
            percents,
        ),
    ]
    if fusion.is_regression:
        sizes = {f"contribution/size/{tag}": name for tag, name in modalities.items()}
        panels[1] = Panel("Contribution (size)", draw(sizes, 1.0), (0.0, math.inf))
    return plot_epochs(panels, title=sentence, unit=unit, looks=looks, context=context)


def _grey_cells(modalities: Sequence[str]) -> Iterator[tuple[tuple[str, str], str, str]]:
    """Each cell of support with a grey, the lighter the fewer modalities support its predictions, and a marker."""
    cells = name_cells(modalities)
    for place, cell in enumerate(cells):
        yield cell, str(round(0.6 * place / (len(cells) - 1), 2)), "oPXDv^"[place % 6]


def fusion_figures(
    summary: FusionSummary, scope: str, class_names: Sequence[str], *, classes_by: str, context: str
) -> Iterator[tuple[str, Figure]]:
    """Draw each modality's share of the contributions by class and outcome, where it is defined.

    Parameters as `epoch_figures` takes them.
    """
    from lightning_xattn.visualizations import plot_class_comparison  # matplotlib, only where figures are wanted

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

    The card, and each layer's attention card; then shares of the contributions by class, mean attention of each class,
    entropy of each head, and what is compared by class and outcome. A second layer's names end with the layer.
    """
    explained = limit_classes(explained)
    names, classes_by, fusion = explained.class_names, explained.classes_by, explained.fusion
    if fusion is not None:
        context = describe_size(fusion.samples, fusion.known_groups, fusion.group_noun)
        card = card_figure(explained)
        if card is not None:
            yield "card", card
        for tag, figure in fusion_figures(fusion, "all", names, classes_by=classes_by, context=context):
            yield _name_file(tag), figure
    for layer in limit_layers(list(explained.summaries)):
        summary = explained.summaries[layer]
        context = f"layer {shown(layer)}, {describe_size(summary.samples, summary.groups(), summary.group_noun)}"
        end = "" if summary is explained.headline else f"_{layer}"
        said: dict[str, Any] = {"classes_by": classes_by, "axes": explained.axes, "context": context}
        yield f"attention{end}", attention_figure(summary, names, **said)
        for tag, figure in epoch_figures(summary, "all", names, **said):
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
                ""
                if column.direction is None
                else f" {name_modality(column.direction.query)} → {name_modality(column.direction.key)}"
            )
            yield f"{score}{way} ({STATISTICS[score.statistic].scale})", column


def _attention_columns(summary: LayerSummary) -> Iterator[tuple[str, Column]]:
    """Alignment, and the entropy of each direction, with short titles."""
    if ALIGNMENT in summary.columns:
        yield "alignment", ALIGNMENT
    for direction in summary.heads:
        if (column := Column("entropy", direction)) in summary.columns:
            yield f"entropy {name_modality(direction.query)} → {name_modality(direction.key)}", column


def _estimate_groups(
    classes: int, estimate: Callable[[int | None, int | None], Estimate]
) -> tuple[list[Estimate], list[Estimate]]:
    """The estimates of each class, and of correct and of incorrect predictions."""
    return [estimate(i, None) for i in range(classes)], [estimate(None, outcome) for outcome in (CORRECT, INCORRECT)]
