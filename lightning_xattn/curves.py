"""What is logged of an epoch as curves: their names and values, which are shown together, and the history's record."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning_xattn.aggregation import CORRECT, INCORRECT
from lightning_xattn.columns import ALIGNMENT, CONFIDENCE, INVALID_ROWS, SCORES, STATISTICS, Column
from lightning_xattn.fusion.summary import Estimate, FusionSummary
from lightning_xattn.names import shown_tag
from lightning_xattn.summary import LayerSummary

OUTCOMES = {"correct": CORRECT, "incorrect": INCORRECT}

MAIN = re.compile(
    r"alignment/(all|correct|incorrect|null)|entropy/(correct|incorrect|[^/]+_to_[^/]+/all)"
    r"|conflict/(all|correct|incorrect)|reading/[^/]+|contribution/(share|size)/[^/]+|faithfulness/[^/]+"
    r"|outcome/\w+_auroc|health/undefined_share"
)
"""``<topic>/<what>`` of the curves that are acted on: those that are logged unless all are asked for."""

COMPARED = re.compile(
    r"(?!.*_(low|high)$)(accuracy|(alignment|conflict)/all|reading/[^/]+|contribution/share/[^/]+|outcome/\w+_auroc)"
)
"""What a record of the history has that runs are compared by: no ends of intervals."""

_SCOPE = r"{stage}(/[^/]+){0,3}"

CHARTS = {
    "Do correct and incorrect predictions differ?": {
        "alignment: correct, incorrect, null": r"xattn_alignment/{scope}/(correct|incorrect|null)$",
        "conflict: correct, incorrect": r"xattn_conflict/{scope}/(correct|incorrect)$",
        "entropy: correct, incorrect": r"xattn_entropy/{scope}/(correct|incorrect)$",
        "AUROC: how often a score is higher in correct predictions": r"xattn_outcome/{scope}/\w+_auroc$",
    },
    "What do the modalities know, and what is used?": {
        "reading: accuracy of each modality": r"xattn_reading/{scope}/[^/]+$",
        "contribution: share of each modality": r"xattn_contribution/{scope}/share/[^/]+$",
        "faithfulness of the attention": r"xattn_faithfulness/{scope}/[^/]+$",
    },
    "Classes and heads (with curves='all')": {
        "alignment of each class": r"xattn_alignment/{scope}/(?!all$|correct$|incorrect$|gap$|null$)[^/]+$",
        "conflict of each class": r"xattn_conflict/{scope}/(?!all$|correct$|incorrect$|gap$)[^/]+$",
        "entropy of each head": r"xattn_entropy/{scope}/[^/]+/head_\d+$",
    },
}
"""By section and title, the curves that belong in one chart, as a pattern; ``{scope}`` stands for a stage and so on."""


def charts(stages: Iterable[str] = ("val", "test")) -> dict[str, dict[str, str]]:
    """``CHARTS`` of each stage, with the first stage first."""
    return {
        f"{stage}: {section}": {
            title: pattern.replace("{scope}", _SCOPE.replace("{stage}", stage)) for title, pattern in of_section.items()
        }
        for stage in stages
        for section, of_section in CHARTS.items()
    }


def main_curves(curves: Mapping[str, float], scope: str) -> dict[str, float]:
    """Those of a scope's curves that ``MAIN`` has."""
    return {name: value for name, value in curves.items() if MAIN.fullmatch(_relative(name, scope))}


def mean_curves(of_layers: Sequence[Mapping[str, float]], scopes: Sequence[str], scope: str) -> dict[str, float]:
    """Means over layers of what says how they attend: not of single heads, nor of what is no mean.

    Parameters
    ----------
    of_layers, scopes
        The curves of each layer, and its scope.
    scope
        Under which the means stand.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for curves, of_layer in zip(of_layers, scopes, strict=True):
        for name, value in curves.items():
            values[_relative(name, of_layer)].append(value)
    return {
        _full(name, scope): sum(found) / len(found)
        for name, found in values.items()
        if name.startswith(("alignment/", "entropy/", "focus/")) and "/head_" not in name and len(found) == len(scopes)
    }


def best_epoch(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What runs are compared by, of the validation of a fit that predicted the most samples correctly.

    Parameters
    ----------
    records
        The history of one dataloader and layer since the fit began.

    Returns
    -------
    dict of str to float
        ``xattn_best/<what>`` and its value; empty where no accuracy is known.
    """
    known = [one for one in records if one["stage"] == "val" and "accuracy" in one]
    if not known:
        return {}
    best = max(known, key=lambda one: one["accuracy"])
    return {f"xattn_best/{name}": value for name, value in best.items() if COMPARED.fullmatch(name)}


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
    numbers = _numbers(summary, class_names)
    return {_full(name, scope): value for name, value in numbers if math.isfinite(value)}


def epoch_record(summary: LayerSummary, scope: str, curves: Mapping[str, float]) -> dict[str, Any]:
    """What the history says of an epoch: its curves, how many samples are behind them, and how sure comparisons are."""
    groups = summary.groups() if summary.group_noun else None
    record: dict[str, Any] = {"samples": summary.samples, "groups": groups}
    record |= {"ties": summary.ties, "unclassified": summary.unclassified}
    correct, incorrect = (summary.size(outcome=outcome) for outcome in (CORRECT, INCORRECT))
    record |= _accuracy(correct, incorrect)
    for score in _scores(summary):
        compared = dict(vars(summary.compare(score)))
        ends = {"auroc_low": compared.pop("low"), "auroc_high": compared.pop("high")}
        del compared["auroc"]  # a curve
        record |= {f"outcome/{score}_{name}": value for name, value in (compared | ends).items()}
        for name, outcome in OUTCOMES.items():
            record |= _ends(f"{score}/{name}", *summary.interval(score, outcome=outcome))
    return record | {_relative(name, scope): value for name, value in curves.items()}


def fusion_curves(
    summary: FusionSummary, scope: str, class_names: Sequence[str], has_attention: bool
) -> dict[str, float]:
    """Scalars of what the modalities say and contribute, named as in ``epoch_curves``, which has what both have."""
    curves = {}
    for name, value in _fusion_numbers(summary, class_names):
        if math.isfinite(value) and not (has_attention and name == f"outcome/{CONFIDENCE}_auroc"):
            curves[_full(name, scope)] = value
    return curves


def fusion_record(summary: FusionSummary, scope: str, curves: Mapping[str, float]) -> dict[str, Any]:
    """What the history says of the modalities: their curves, why what is missing is missing, and how sure it is."""
    record: dict[str, Any] = {"read_samples": summary.samples, "unreadable": dict(summary.unreadable)}
    record["uncontributed"] = summary.uncontributed
    record |= _accuracy(*(int((summary.outcomes == outcome).sum()) for outcome in (CORRECT, INCORRECT)))
    record |= {"largest_class": summary.largest_class} if math.isfinite(summary.largest_class) else {}
    for score in ("conflict", "confidence"):
        compared = summary.compare(score)
        if _full(f"outcome/{score}_auroc", scope) in curves:
            record |= {f"outcome/{score}_auroc_low": compared.low, f"outcome/{score}_auroc_high": compared.high}
    for name, estimate in _fusion_intervals(summary):
        record |= _ends(name, estimate.low, estimate.high)
    return record | {_relative(name, scope): value for name, value in curves.items()}


def _accuracy(correct: int, incorrect: int) -> dict[str, float]:
    """For the history; nothing where no outcome is known."""
    return {"accuracy": correct / (correct + incorrect)} if correct + incorrect else {}


def _fusion_intervals(summary: FusionSummary) -> Iterator[tuple[str, Estimate]]:
    for name, outcome in OUTCOMES.items():
        yield f"conflict/{name}", summary.estimate("conflict", outcome=outcome)
    for name in summary.modalities:
        yield f"reading/{name}", summary.estimate(f"right/{name}")
        if not summary.uncontributed:
            yield f"contribution/share/{name}", summary.share(name)


def _fusion_numbers(summary: FusionSummary, class_names: Sequence[str]) -> Iterator[tuple[str, float]]:
    for name in summary.modalities:
        yield f"reading/{name}", summary.estimate(f"right/{name}").mean
    outcomes = {name: (None, outcome) for name, outcome in OUTCOMES.items()}
    subsets: dict[str, tuple[int | None, int | None]] = {"all": (None, None), **outcomes}
    subsets |= {name: (class_id, None) for class_id, name in enumerate(class_names)}
    for topic, number in (("conflict", "conflict"), ("lean", "leans_first")):
        means = {which: summary.estimate(number, *subset).mean for which, subset in subsets.items()}
        yield from ((f"{topic}/{which}", mean) for which, mean in means.items())
        yield f"{topic}/gap", means["correct"] - means["incorrect"]
    for score in ("conflict", "confidence"):
        yield f"outcome/{score}_auroc", summary.compare(score).auroc
    if summary.uncontributed:
        return
    for name in summary.interactions:
        yield f"contribution/{name}", summary.estimate(name).mean
    if summary.of_value:
        for name in summary.modalities:
            yield f"contribution/size/{name}", summary.size(name).mean
        return
    for name in summary.modalities:
        yield f"contribution/{name}", summary.estimate(f"phi/{name}").mean
        shares = {which: summary.share(name, *subset).mean for which, subset in subsets.items()}
        yield f"contribution/share/{name}", shares.pop("all")
        yield from ((f"contribution/share/{name}/{which}", mean) for which, mean in shares.items())
        yield f"contribution/share/{name}/gap", shares["correct"] - shares["incorrect"]
    yield "contribution/opposed", summary.estimate("opposed").mean
    yield "contribution/emap_accuracy", summary.estimate("additive_right").mean
    for direction in summary.replaced:
        yield f"faithfulness/{direction}", summary.faithfulness(direction).mean
        yield f"faithfulness/reference/{direction}", summary.faithfulness(direction, "reference").mean
        yield f"faithfulness/cost/{direction}", summary.estimate(f"cost/{direction}").mean


def _numbers(summary: LayerSummary, class_names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """``<topic>/<what>`` and value of each curve."""
    for column in summary.columns:
        curve = STATISTICS[column.statistic].curve
        if curve is not None and (column.direction is not None or "{direction}" not in curve):
            for which, value in _by_samples(summary, column, class_names):
                if which == "all" or "{which}" in curve:
                    yield curve.format(direction=column.direction, which=which), value
        if curve is not None and column in SCORES:
            for name, outcome in OUTCOMES.items():
                yield f"{column}/{name}", summary.mean(column, outcome=outcome)
            yield f"{column}/gap", summary.gap(column)
    if ALIGNMENT in summary.columns:
        yield "alignment/null", summary.alignment_null
    for score in _scores(summary):
        yield f"outcome/{score}_auroc", summary.compare(score).auroc
    yield "health/undefined_share", summary.undefined_share()
    yield "health/invalid_rows", summary.total(INVALID_ROWS)


def _by_samples(summary: LayerSummary, column: Column, class_names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """The means of a number over all samples, and over each class; of a head over all."""
    if column.head is not None:
        yield f"head_{column.head}", summary.mean(column)
        return
    yield "all", summary.mean(column)
    for class_id, name in enumerate(class_names):
        yield name, summary.mean(column, class_id)


def _scores(summary: LayerSummary) -> list[Column]:
    return [score for score in SCORES if score in summary.columns]


def _ends(name: str, low: float, high: float) -> dict[str, float]:
    """An interval for the history; nothing where there is none."""
    name = shown_tag(name)  # as its curve
    return {f"{name}_low": low, f"{name}_high": high} if math.isfinite(low) and math.isfinite(high) else {}


def _full(name: str, scope: str) -> str:
    topic, _, what = name.partition("/")
    return f"xattn_{topic}/{scope}/{shown_tag(what)}"


def _relative(name: str, scope: str) -> str:
    return name.removeprefix("xattn_").replace(f"/{scope}/", "/", 1)
