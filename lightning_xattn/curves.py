"""The names of what is logged: an epoch's curves, and its record in the history."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_xattn.aggregation import CORRECT, INCORRECT
from lightning_xattn.columns import ALIGNMENT, CONFIDENCE, INVALID_ROWS, SCORES, STATISTICS, Column
from lightning_xattn.fusion.summary import FusionSummary
from lightning_xattn.summary import LayerSummary


def epoch_curves(summary: LayerSummary, scope: str, class_names: Sequence[str]) -> dict[str, float]:
    """Scalars of one layer's epoch, as ``xattn_<topic>/<scope>/<what>``; undefined numbers are left out.

    Parameters
    ----------
    summary
        The epoch.
    scope
        Stage, followed by the dataloader and the layer where there are several, e.g. ``val`` or ``test/fusion.1``.
    class_names
        What the classes are called in curves.
    """
    curves = {}
    for name, value in _numbers(summary, class_names):
        topic, _, what = name.partition("/")
        if math.isfinite(value):
            curves[f"xattn_{topic}/{scope}/{what}"] = value
    return curves


def epoch_record(summary: LayerSummary, scope: str, curves: dict[str, float]) -> dict[str, float | None]:
    """What the history says of an epoch: its curves, how many samples are behind them, and how sure comparisons are."""
    groups = summary.groups() if summary.group_noun else None
    record: dict[str, float | None] = {"samples": summary.samples, "groups": groups}
    record |= {"ties": summary.ties, "unclassified": summary.unclassified}
    for score in _scores(summary):
        compared = dict(vars(summary.compare(score)))
        ends = {"auroc_low": compared.pop("low"), "auroc_high": compared.pop("high")}
        del compared["auroc"]  # a curve
        record |= {f"outcome/{score}_{name}": value for name, value in (compared | ends).items()}
    return record | {name.removeprefix("xattn_").replace(f"/{scope}/", "/"): value for name, value in curves.items()}


def fusion_curves(
    summary: FusionSummary, scope: str, class_names: Sequence[str], has_attention: bool
) -> dict[str, float]:
    """Scalars of what the modalities say and contribute, named as in ``epoch_curves``, which has what both have."""
    curves = {}
    for name, value in _fusion_numbers(summary, class_names):
        topic, _, what = name.partition("/")
        if math.isfinite(value) and not (has_attention and what == f"{CONFIDENCE}_auroc"):
            curves[f"xattn_{topic}/{scope}/{what}"] = value
    return curves


def fusion_record(
    summary: FusionSummary, scope: str, curves: dict[str, float], class_names: Sequence[str]
) -> dict[str, Any]:
    """What the history says of the modalities: the curves, by class too, why what is missing is, and how sure it is."""
    record: dict[str, Any] = {"read_samples": summary.samples, "unreadable": dict(summary.unreadable)}
    record["uncontributed"] = summary.uncontributed
    for score in ("conflict", "confidence"):
        compared = summary.compare(score)
        if math.isfinite(compared.auroc):
            record |= {f"outcome/{score}_auroc_low": compared.low, f"outcome/{score}_auroc_high": compared.high}
    return record | {name.removeprefix("xattn_").replace(f"/{scope}/", "/"): value for name, value in curves.items()}


def _fusion_numbers(summary: FusionSummary, class_names: Sequence[str]) -> Iterator[tuple[str, float]]:
    for name in summary.modalities:
        yield f"reading/{name}", summary.estimate(f"right/{name}").mean
    subsets: dict[str, tuple[int | None, int | None]]
    subsets = {"all": (None, None), "correct": (None, CORRECT), "incorrect": (None, INCORRECT)}
    subsets |= {name: (class_id, None) for class_id, name in enumerate(class_names)}
    for topic, number in (("conflict", "conflict"), ("lean", "leans_first")):
        for which, subset in subsets.items():
            yield f"{topic}/{which}", summary.estimate(number, *subset).mean
    for score in ("conflict", "confidence"):
        yield f"outcome/{score}_auroc", summary.compare(score).auroc
    if summary.uncontributed:
        return
    for name in summary.modalities:
        yield f"contribution/{name}", summary.estimate(f"phi/{name}").mean
        yield f"contribution/share/{name}", summary.share(name).mean
    for number, curve in (("opposed", "opposed"), ("interaction", "interaction"), ("additive_right", "emap_accuracy")):
        yield f"contribution/{curve}", summary.estimate(number).mean


def _numbers(summary: LayerSummary, class_names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """``<topic>/<what>`` and value of each curve."""
    for column in summary.columns:
        curve = STATISTICS[column.statistic].curve
        if curve is not None and (column.direction is not None or "{direction}" not in curve):
            for which, value in _by_samples(summary, column, class_names):
                if which == "all" or "{which}" in curve:
                    yield curve.format(direction=column.direction, which=which), value
    if ALIGNMENT in summary.columns:
        yield "alignment/null", summary.alignment_null
    for score in _scores(summary):
        yield f"outcome/{score}_auroc", summary.compare(score).auroc
    yield "health/undefined_share", summary.undefined_share()
    yield "health/invalid_rows", summary.total(INVALID_ROWS)


def _by_samples(summary: LayerSummary, column: Column, class_names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """The means of a number over all samples, each class, and where it is compared, each outcome."""
    if column.head is not None:
        yield f"head_{column.head}", summary.mean(column)
        return
    yield "all", summary.mean(column)
    for class_id, name in enumerate(class_names):
        yield name, summary.mean(column, class_id)
    if column in SCORES:
        yield "correct", summary.mean(column, outcome=CORRECT)
        yield "incorrect", summary.mean(column, outcome=INCORRECT)
        yield "gap", summary.gap(column)


def _scores(summary: LayerSummary) -> list[Column]:
    return [score for score in SCORES if score in summary.columns]
