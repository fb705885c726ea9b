"""What an epoch leaves behind: the curves with their names, and the figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from lightning_xattn.aggregation import CORRECT, INCORRECT, SCORE_RANGES, LayerSummary
from lightning_xattn.attention import TokenAxis
from lightning_xattn.functional.outcomes import BINS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_xattn.visualizations import OutcomeSummary


def epoch_curves(summary: LayerSummary, scope: str, class_names: Sequence[str]) -> dict[str, float]:
    """Scalars of one layer's epoch, as ``xattn_<topic>/<scope>/<what>``; undefined numbers are left out.

    Parameters
    ----------
    summary
        The epoch.
    scope
        Stage, followed by the dataloader and the layer where there are several, e.g. ``val`` or ``test/fusion.1``.
    class_names
        As many as the summary has classes.
    """
    return {
        f"xattn_{topic}/{scope}/{what}": value
        for topic, what, value in _numbers(summary, class_names)
        if math.isfinite(value)
    }


def epoch_counts(summary: LayerSummary) -> dict[str, float | None]:
    """What the history says beside the curves: how many samples are behind them, and how sure the comparison is."""
    record: dict[str, float | None] = {"ties": summary.ties, "unclassified": summary.unclassified}
    for score in SCORE_RANGES:
        if score in summary.columns:
            found = summary.separation(score)
            record |= {
                f"outcome/{score}_correct": found.correct,
                f"outcome/{score}_incorrect": found.incorrect,
                f"outcome/{score}_correct_groups": found.correct_groups,
                f"outcome/{score}_incorrect_groups": found.incorrect_groups,
                f"outcome/{score}_auroc_low": found.low,
                f"outcome/{score}_auroc_high": found.high,
                f"outcome/{score}_cliffs_delta": found.cliffs_delta,
                f"outcome/{score}_gap": summary.gap(score),
                f"outcome/{score}_class_adjusted_gap": summary.class_adjusted_gap(score),
            }
    return record


def epoch_figures(
    summary: LayerSummary,
    scope: str,
    class_names: Sequence[str],
    *,
    group_by: str,
    axes: Mapping[str, TokenAxis],
    context: str,
) -> Iterator[tuple[str, Figure]]:
    """Draw one layer's epoch: tag and figure, one at a time.

    Parameters
    ----------
    summary, scope, class_names
        As in ``epoch_curves``.
    group_by
        Whether the classes are those of the "target" or of the "prediction".
    axes
        What the tokens of a modality are, by modality; one whose length does not fit is not used.
    context
        Where the numbers come from, for the titles, e.g. ``"val, epoch 3"``.
    """
    # Imported here because matplotlib takes a while, and not every run asks for figures.
    from lightning_xattn.visualizations import plot_class_attention, plot_head_entropy, plot_outcome_alignment

    names = list(class_names) or ["all samples"]
    grouping = group_by if class_names else None
    ids = range(len(names))
    counts = [summary.size(class_id=i) for i in ids]
    for direction, maps in summary.maps.items():
        figure = plot_class_attention(
            maps,
            counts,
            names,
            direction=str(direction),
            query_axis=_fitting(axes.get(direction.query), maps.shape[1]),
            key_axis=_fitting(axes.get(direction.key), maps.shape[2]),
            group_by=grouping,
            context=f"{context}; {maps.shape[1]} {direction.query} queries ask {maps.shape[2]} {direction.key} keys",
        )
        yield f"xattn_map/{scope}/{direction}", figure
    entropy = {
        str(direction): [
            [summary.mean(f"{direction}/entropy/head_{head}", class_id=i) for head in range(heads)] for i in ids
        ]
        for direction, heads in summary.heads.items()
    }
    yield (
        f"xattn_entropy/{scope}/by_head",
        plot_head_entropy(entropy, counts, names, group_by=grouping, context=context),
    )
    if class_names and "alignment" in summary.columns:
        separation = summary.separation("alignment")
        figure = plot_outcome_alignment(
            _outcome(summary, CORRECT),
            _outcome(summary, INCORRECT),
            torch.linspace(*SCORE_RANGES["alignment"], BINS + 1),
            (separation.auroc, separation.low, separation.high),
            names,
            group_by=grouping,
            group_noun=summary.group_noun,
            context=context,
        )
        yield f"xattn_alignment/{scope}/by_outcome", figure


def _outcome(summary: LayerSummary, outcome: int) -> OutcomeSummary:
    from lightning_xattn.visualizations import OutcomeSummary

    ids = range(summary.n_classes)
    return OutcomeSummary(
        histogram=summary.histogram("alignment", outcome),
        mean=summary.mean("alignment", outcome=outcome),
        class_means=[summary.mean("alignment", class_id=i, outcome=outcome) for i in ids],
        class_intervals=[summary.interval("alignment", class_id=i, outcome=outcome) for i in ids],
        class_counts=[summary.count("alignment", class_id=i, outcome=outcome) for i in ids],
        groups=summary.groups("alignment", outcome=outcome) if summary.group_noun else None,
    )


def _fitting(axis: TokenAxis | None, tokens: int) -> TokenAxis | None:
    return axis if axis is not None and len(axis) == tokens else None


def _numbers(summary: LayerSummary, class_names: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    """Topic, name within the topic, and value."""
    classes = list(enumerate(class_names))
    if "alignment" in summary.columns:
        yield "alignment", "all", summary.mean("alignment")
        for i, name in classes:
            yield "alignment", name, summary.mean("alignment", class_id=i)
        yield "alignment", "correct", summary.mean("alignment", outcome=CORRECT)
        yield "alignment", "incorrect", summary.mean("alignment", outcome=INCORRECT)
        yield "alignment", "gap", summary.gap("alignment")
        yield "alignment", "null", summary.alignment_null
    for direction, heads in summary.heads.items():
        yield "entropy", f"{direction}/all", summary.mean(f"{direction}/entropy")
        for i, name in classes:
            yield "entropy", f"{direction}/{name}", summary.mean(f"{direction}/entropy", class_id=i)
        for head in range(heads):
            yield "entropy", f"{direction}/head_{head}", summary.mean(f"{direction}/entropy/head_{head}")
        for name in ("max", "sparsity", "effective_keys", "crossing"):
            if f"{direction}/{name}" in summary.columns:
                yield "focus", f"{direction}/{name}", summary.mean(f"{direction}/{name}")
        for name in ("head_diversity", "query_selectivity"):
            yield "health", f"{name}/{direction}", summary.mean(f"{direction}/{name}")
    for score in SCORE_RANGES:
        if score in summary.columns:
            yield "outcome", f"{score}_auroc", summary.separation(score).auroc
    yield "health", "undefined_share", summary.undefined_share()
    yield "health", "invalid_rows", summary.total("invalid_rows")
