"""The figures of an explained data set: those of the callback's epochs, and the classes compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_xattn.aggregation import CORRECT, INCORRECT, LayerSummary
from lightning_xattn.epoch import epoch_figures
from lightning_xattn.explanation import DatasetExplanation
from lightning_xattn.phrases import describe_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_xattn.visualizations import Group


def dataset_figures(explained: DatasetExplanation) -> Iterator[tuple[str, Figure]]:
    """Draw a data set: a name that can be a file's, and the figure, one at a time.

    Mean attention of each class, entropy of each head, alignment of correct against incorrect predictions, and
    alignment and entropy by class and outcome with their 95 % intervals. A second layer's names end with the layer.
    """
    from lightning_xattn.visualizations import plot_class_comparison  # matplotlib, only where figures are wanted

    names, group_by = explained.class_names, explained.group_by
    for layer, summary in explained.summaries.items():
        context = f"layer {layer}, {describe_size(summary.samples, summary.groups(), summary.group_noun)}"
        end = "" if summary is explained.headline else f"_{layer}"
        for tag, figure in epoch_figures(
            summary, "all", names, group_by=group_by, axes=explained.axes, context=context
        ):
            yield tag.removeprefix("xattn_").replace("/all/", "_") + end, figure
        if names:
            quantities = {title: _groups(summary, column) for title, column in _columns(summary)}
            figure = plot_class_comparison(
                quantities, names, group_by=group_by, group_noun=summary.group_noun, context=context
            )
            yield f"class_comparison{end}", figure


def _columns(summary: LayerSummary) -> Iterator[tuple[str, str]]:
    if "alignment" in summary.columns:
        yield "alignment (Pearson r)", "alignment"
    for direction in summary.heads:
        yield f"entropy {direction.query} → {direction.key} (0: one key, 1: uniform)", f"{direction}/entropy"


def _groups(summary: LayerSummary, column: str) -> tuple[list[Group], list[Group]]:
    from lightning_xattn.visualizations import Group

    def group(class_id: int | None, outcome: int | None) -> Group:
        which = column, class_id, outcome
        groups = summary.groups(*which) if summary.group_noun else None
        return Group(summary.count(*which), summary.mean(*which), *summary.interval(*which), groups)

    classes = [group(class_id, None) for class_id in range(summary.n_classes)]
    return classes, [group(None, outcome) for outcome in (CORRECT, INCORRECT)]
