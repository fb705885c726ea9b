"""The curves of an epoch, ``xattn_<topic>/<scope>/<what>``, and the record that the history has of it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

from lightning_xattn.core.attention import Direction
from lightning_xattn.core.names import shown_tag
from lightning_xattn.evaluation.fusion_summary import FusionSummary, interaction_names
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.statistics import ALIGNMENT, CONFIDENCE, INVALID_ROWS, SCORES, STATISTICS, Column
from lightning_xattn.evaluation.support import estimate_unsupported, name_cells, unused
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.functional.probe import JOINT

UNDEFINED = Estimate(math.nan, math.nan, math.nan, 0)

OUTCOMES = {"correct": CORRECT, "incorrect": INCORRECT}

MAIN = re.compile(
    r"alignment/(all|correct|incorrect|null)|entropy/(correct|incorrect|[^/]+_to_[^/]+/all)"
    r"|probe/[^/]+|support/.+|contribution/(share|size)/[^/]+|faithfulness/[^/]+"
    r"|outcome/\w+_auroc|health/(undefined_share|unused/[^/]+)"
)
"""``<topic>/<what>`` of the main curves: those that are logged unless all are asked for."""

_OF_CLASS = re.compile(r"(alignment|entropy/[^/]+_to_[^/]+)/(?!(all|correct|incorrect|gap|null|head_\d+)$)(?P<name>.+)")
"""The curves of a class that are main curves, too, where there are few classes."""

MAX_CLASS_CURVES = 10
"""With more classes than this, those of single classes are no main curves."""

TOPICS = (
    *("alignment", "entropy", "focus", "support", "probe", "contribution", "faithfulness", "outcome"),
    "health",
)
"""The topics of all curves."""


def main_names(names: Iterable[str]) -> set[str]:
    """The main curves among ``<topic>/<what>``: ``MAIN``, and those of up to ``MAX_CLASS_CURVES`` classes."""
    names = list(names)
    of_class = {name: found["name"] for name in names if (found := _OF_CLASS.fullmatch(name))}
    few = len(set(of_class.values())) <= MAX_CLASS_CURVES
    return {name for name in names if MAIN.fullmatch(name) or (few and name in of_class)}


def main_curves(curves: Mapping[str, float], scope: str) -> dict[str, float]:
    """The main curves of a scope, see `main_names`."""
    chosen = main_names(_relative(name, scope) for name in curves)
    return {name: value for name, value in curves.items() if _relative(name, scope) in chosen}


def mean_curves(
    of_layers: Sequence[Mapping[str, float]], scopes: Sequence[str], scope: str, layers: int
) -> dict[str, float]:
    """The means over layers of alignment, entropy and focus; none of single heads.

    Parameters
    ----------
    of_layers, scopes
        The curves of each layer, and its scope.
    scope
        That of the means.
    layers
        Number of layers of the model; where one of them has not run, the means are NaN.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for curves, of_layer in zip(of_layers, scopes, strict=True):
        for name, value in curves.items():
            values[_relative(name, of_layer)].append(value)
    return {
        _full(name, scope): sum(found) / len(found) if len(scopes) == layers else math.nan
        for name, found in values.items()
        if name.startswith(("alignment/", "entropy/", "focus/")) and "/head_" not in name and len(found) == len(scopes)
    }


def epoch_curves(summary: LayerSummary, scope: str, class_names: Sequence[str]) -> dict[str, float]:
    """The curves of one layer's epoch; NaN where undefined.

    The names depend on the layer and the classes alone, so they are the same in every epoch.

    Parameters
    ----------
    summary
        The epoch.
    scope
        Stage, followed by the dataloader and the layer where there are several, e.g. ``val`` or ``test/fusion.1``.
    class_names
        The names of the classes in curves.
    """
    return {_full(name, scope): _or_nan(value) for name, value in _numbers(summary, class_names)}


def epoch_record(summary: LayerSummary, scope: str, curves: Mapping[str, float]) -> dict[str, Any]:
    """The history's record of a layer's epoch: its curves, numbers of samples, and intervals."""
    record: dict[str, Any] = {"samples": summary.samples, "groups": summary.groups() if summary.group_noun else None}
    record |= {name: getattr(summary, name) for name in ("ties", "unclassified", "wholly_masked")}
    if summary.is_binned and math.isfinite(summary.alignment_of_maps):  # what alignment/null is to be compared with
        record["alignment_of_bins"] = summary.alignment_of_maps
    correct, incorrect = (summary.size(outcome=outcome) for outcome in (CORRECT, INCORRECT))
    record |= _accuracy(correct, incorrect)
    for score in _scores(summary):
        compared = dict(vars(summary.compare(score)))
        ends = {"auroc_low": compared.pop("low"), "auroc_high": compared.pop("high")}
        del compared["auroc"], compared["error_side"]  # a curve, and what never changes
        record |= {f"outcome/{score}_{name}": value for name, value in (compared | ends).items()}
        for name, outcome in OUTCOMES.items():
            record |= _ends(f"{score}/{name}", *summary.interval(score, outcome=outcome))
    return record | _defined(curves, scope)


def fusion_curves(
    summary: FusionSummary,
    scope: str,
    class_names: Sequence[str],
    has_attention: bool,
    permutes: bool = True,
    tested: Sequence[Direction] = (),
) -> dict[str, float]:
    """The curves of probes and contributions; NaN where undefined.

    The names depend on the modalities, the classes and the parameters below, so they are the same in every epoch.

    Parameters
    ----------
    summary, scope, class_names
        As in ``epoch_curves``.
    has_attention
        Whether ``epoch_curves`` has the AUROC of the confidence.
    permutes
        Whether contributions are measured at all.
    tested
        The directions whose faithfulness is tested, in this or another epoch.
    """
    numbers = _fusion_numbers(summary)
    if permutes:
        numbers = chain(numbers, _contribution_numbers(summary, class_names, tested))
    return {
        _full(name, scope): _or_nan(value)
        for name, value in numbers
        if not (has_attention and name == f"outcome/{CONFIDENCE}_auroc")
    }


def fusion_record(summary: FusionSummary, scope: str, curves: Mapping[str, float]) -> dict[str, Any]:
    """The history's record of the modalities: their curves and intervals, and why others are missing."""
    record: dict[str, Any] = {"probed_samples": summary.samples, "probe_problems": dict(summary.probe_problems)}
    record["modalities"] = ", ".join(summary.sources)
    record |= {"missing": dict(summary.missing), "unrecorded": summary.unrecorded}
    aurocs = {name: one.mean for name, one in summary.probe_aurocs.items()}
    for name, found in (("probe_macro_auroc", aurocs), ("probe_calibration_error", summary.calibration_errors)):
        record[name] = {modality: one for modality, one in found.items() if math.isfinite(one)}
    record["contribution_problem"] = summary.contribution_problem
    if summary.replaced:  # faithfulness was tested
        problems = {str(direction): summary.faithfulness_problem(direction) for direction in summary.replaced}
        record["faithfulness_problems"] = problems
    record |= _accuracy(*(int((summary.outcomes == outcome).sum()) for outcome in (CORRECT, INCORRECT)))
    record |= {"largest_class": summary.largest_class} if math.isfinite(summary.largest_class) else {}
    record["support_problem"] = summary.support_problem
    record["added_value_problem"] = summary.added_value if isinstance(summary.added_value, str) else ""
    for score in ("support", "confidence"):
        compared = summary.compare(score)
        if math.isfinite(curves.get(_full(f"outcome/{score}_auroc", scope), math.nan)):
            record |= {f"outcome/{score}_auroc_low": compared.low, f"outcome/{score}_auroc_high": compared.high}
    for name, estimate in _fusion_intervals(summary):
        record |= _ends(name, estimate.low, estimate.high)
    return record | _defined(curves, scope)


def _defined(curves: Mapping[str, float], scope: str) -> dict[str, float]:
    """The defined curves under their names in the history."""
    return {_relative(name, scope): value for name, value in curves.items() if math.isfinite(value)}


def _or_nan(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _accuracy(correct: int, incorrect: int) -> dict[str, float]:
    """The accuracy for the history; nothing where no outcome is known."""
    return {"accuracy": correct / (correct + incorrect)} if correct + incorrect else {}


def _fusion_intervals(summary: FusionSummary) -> Iterator[tuple[str, Estimate]]:
    for name in (*summary.modalities, JOINT):
        yield f"probe/{name}", summary.estimate(f"right/{name}")
    yield from _support_numbers(summary)
    for name in summary.modalities:
        if not summary.contribution_problem:
            yield f"contribution/share/{name}", summary.share(name)
    for direction in () if summary.contribution_problem else summary.replaced:
        yield f"faithfulness/{direction}", summary.faithfulness(direction)


def _subsets(class_names: Sequence[str]) -> dict[str, tuple[int | None, int | None]]:
    """The subsets of samples that have curves: class and outcome by name."""
    outcomes = {name: (None, outcome) for name, outcome in OUTCOMES.items()}
    of_classes = {name: (class_id, None) for class_id, name in enumerate(class_names)}
    return {"all": (None, None), **outcomes, **of_classes}


def _fusion_numbers(summary: FusionSummary) -> Iterator[tuple[str, float]]:
    for name in (*summary.modalities, JOINT):
        yield f"probe/{name}", summary.estimate(f"right/{name}").mean
    for name, estimate in _support_numbers(summary):
        yield name, estimate.mean
    for score in ("support", "confidence"):
        yield f"outcome/{score}_auroc", summary.compare(score).auroc


def _support_numbers(summary: FusionSummary) -> Iterator[tuple[str, Estimate]]:
    """The share of each cell of support, the accuracy where all or no modalities support, and what support adds."""
    shares = [cell.share for cell in summary.cells] or [UNDEFINED] * (len(summary.modalities) + 3)
    for (key, _), share in zip(name_cells(summary.modalities), shares, strict=False):
        yield f"support/{key}", share
    yield "support/accuracy/supported", summary.cells[0].accuracy if summary.cells else UNDEFINED
    yield "support/accuracy/unsupported", estimate_unsupported(summary)
    added = summary.added_value
    yield "support/delta_auroc", UNDEFINED if isinstance(added, str) else added.delta_auroc


def _contribution_numbers(
    summary: FusionSummary, class_names: Sequence[str], tested: Sequence[Direction]
) -> Iterator[tuple[str, float]]:
    names, known = summary.modalities, not summary.contribution_problem

    def mean(number: str) -> float:
        return summary.estimate(number).mean if number in summary.numbers else math.nan

    for name in names:
        yield f"health/unused/{name}", unused(summary, name)
    for name in interaction_names(names):
        yield f"contribution/{name}", mean(name)
    # Where nothing was permuted, a model that has predictions or classes is no regression.
    if summary.is_regression or not (known or summary.n_classes or (summary.predicted >= 0).any()):
        for name in names:
            yield f"contribution/size/{name}", summary.size(name).mean if known else math.nan
        return
    undefined = dict.fromkeys(names, math.nan)
    by_samples = {
        which: summary.shares(*samples) if known else undefined for which, samples in _subsets(class_names).items()
    }
    for name in names:
        yield f"contribution/{name}", mean(f"phi/{name}")
        shares = {which: of_names[name] for which, of_names in by_samples.items()}
        yield f"contribution/share/{name}", shares.pop("all")
        yield from ((f"contribution/share/{name}/{which}", share) for which, share in shares.items())
        yield f"contribution/share/{name}/gap", shares["correct"] - shares["incorrect"]
    yield "contribution/emap_accuracy", mean("additive_right")
    for direction in dict.fromkeys([*tested, *summary.replaced]):
        orders: dict[str, Literal["gain", "reference"]] = {"": "gain", "reference/": "reference"}
        for which, order in orders.items():
            there = direction in summary.replaced
            yield f"faithfulness/{which}{direction}", summary.faithfulness(direction, order).mean if there else math.nan
        yield f"faithfulness/cost/{direction}", mean(f"cost/{direction}")


def _numbers(summary: LayerSummary, class_names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """``<topic>/<what>`` and the value of each curve."""
    for column in summary.columns:
        curve = STATISTICS[column.statistic].curve
        if curve is not None and (column.direction is not None or "{direction}" not in curve):
            for which, value in _by_samples(summary, column, class_names):
                if which == "all" or "{which}" in curve:
                    yield curve.format(direction=column.direction, which=which), value
                elif column.head is not None:
                    yield f"{curve.format(direction=column.direction)}/{which}", value
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
    """The means of a number over all samples and over each class; of a head over all samples."""
    if column.head is not None:
        yield f"head_{column.head}", summary.mean(column)
        return
    yield "all", summary.mean(column)
    for class_id, name in enumerate(class_names):
        yield name, summary.mean(column, class_id)


def _scores(summary: LayerSummary) -> list[Column]:
    return [score for score in SCORES if score in summary.columns]


def _ends(name: str, low: float, high: float) -> dict[str, float]:
    """The ends of an interval for the history; nothing where it is undefined."""
    name = shown_tag(name)  # as its curve
    return {f"{name}_low": low, f"{name}_high": high} if math.isfinite(low) and math.isfinite(high) else {}


def _full(name: str, scope: str) -> str:
    topic, _, what = name.partition("/")
    return f"xattn_{topic}/{scope}/{shown_tag(what)}"


def _relative(name: str, scope: str) -> str:
    return name.removeprefix("xattn_").replace(f"/{scope}/", "/", 1)
