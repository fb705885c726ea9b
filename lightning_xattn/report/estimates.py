"""Estimates with their 95 % CI as text, and the subsets of samples that they are of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_xattn.core.wording import decimal, percent, say_interval
from lightning_xattn.evaluation.fusion_summary import Estimate
from lightning_xattn.evaluation.layer_summary import Comparison, LayerSummary
from lightning_xattn.evaluation.statistics import Column
from lightning_xattn.functional.intervals import MINIMUM_GROUP
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.report.document import Item, Paragraph

GROUPED_BY = {"target": "true class", "prediction": "predicted class", None: "class"}
"""Heading of the classes, by ``classes_by``; None: not known."""


@dataclass(frozen=True)
class Subset:
    """All samples, or those of one class or outcome."""

    kind: Literal["all", "class", "unclassified", "outcome"]
    name: str
    class_id: int | None = None
    outcome: int | None = None

    @property
    def chosen(self) -> tuple[int | None, int | None]:
        """The class and the outcome, as the summaries' methods take them."""
        return self.class_id, self.outcome


def list_subsets(
    class_names: Sequence[str], has_outcomes: bool = True, unclassified: int | None = None
) -> list[Subset]:
    """All samples, each class, samples without a class (whose class id is ``unclassified``), and each outcome."""
    found = [Subset("all", "all")]
    found += [Subset("class", name, class_id) for class_id, name in enumerate(class_names)]
    found += [] if unclassified is None else [Subset("unclassified", "no class", unclassified)]
    outcomes = [Subset("outcome", "correct", None, CORRECT), Subset("outcome", "incorrect", None, INCORRECT)]
    return found + (outcomes if has_outcomes else [])


def list_layer_subsets(summary: LayerSummary, class_names: Sequence[str]) -> list[Subset]:
    """The subsets that a layer has samples of, and all classes."""
    has_outcomes = any(summary.size(outcome=outcome) for outcome in (CORRECT, INCORRECT))
    return list_subsets(class_names, has_outcomes, summary.n_classes if summary.unclassified else None)


def estimate_mean(summary: LayerSummary, column: Column, subset: Subset) -> Estimate:
    """Mean of a layer's number over a subset, with its 95 % CI."""
    chosen = column, *subset.chosen
    groups = summary.groups(*chosen) if summary.group_noun else None
    return Estimate(summary.mean(*chosen), *summary.interval(*chosen), summary.count(*chosen), groups)


def count_outcomes(summary: LayerSummary, subset: Subset) -> tuple[int, int]:
    """Number of correct and of incorrect predictions in a subset."""
    class_id, only = subset.chosen
    correct, incorrect = (
        summary.size(class_id, outcome) if only in (None, outcome) else 0 for outcome in (CORRECT, INCORRECT)
    )
    return correct, incorrect


def estimate_accuracy(summary: LayerSummary, subset: Subset) -> Estimate:
    """Share of correct predictions in a subset, with its 95 % CI; NaN within an outcome, where it is 1 or 0 anyway."""
    correct, incorrect = count_outcomes(summary, subset)
    known = correct + incorrect
    if not known or subset.kind == "outcome":
        return Estimate(math.nan, math.nan, math.nan, known, None)
    return Estimate(correct / known, *summary.accuracy_interval(subset.class_id), known, None)


def format_estimate(one: Estimate, signed: bool = False) -> str:
    """As ``0.635 (0.622 to 0.647)``; "undefined" if it is."""
    if math.isnan(one.mean):
        return "undefined"
    interval = "" if math.isnan(one.low) else f" ({say_interval(one.low, one.high)})"
    return f"{decimal(one.mean, 3, signed=signed)}{interval}"


def format_percent(one: Estimate, ci: str = "") -> str:
    """As ``77.9 % (74.4 to 81.4 %)``, with ``ci`` before the interval; "undefined" if it is."""
    if math.isnan(one.mean):
        return "undefined"
    interval = "" if math.isnan(one.low) else f" ({ci}{say_interval(one.low, one.high, 1, as_percent=True)})"
    return f"{percent(one.mean)}{interval}"


def explain_brackets(noun: str | None) -> Paragraph:
    """What the brackets behind estimates are; ``noun``: the name of the groups, None where they are not known."""
    by = f"by {noun}" if noun else "samples taken as independent"
    return Paragraph(f"In brackets: 95 % CI, {by}; none with fewer than {MINIMUM_GROUP} {noun or 'samples'}.")


def describe_comparison(score: str, label: str, found: Comparison, noun: str | None) -> Item:
    """Whether a score differs between correct and incorrect predictions, as an item.

    Parameters
    ----------
    score, label
        The score's name, and the item's label.
    found
        The comparison.
    noun
        Name of the groups; None where groups are not known.
    """
    correct, incorrect = (
        f"{count} {name}" + (f" of {groups} {noun}" if noun else "")
        for name, count, groups in (
            ("correct", found.correct, found.correct_groups),
            ("incorrect", found.incorrect, found.incorrect_groups),
        )
    )
    sizes = f"{correct} and {incorrect} with a defined {score}"
    if math.isnan(found.auroc):
        few = (
            f"fewer than {MINIMUM_GROUP} {noun} of either outcome" if noun else f"fewer than {MINIMUM_GROUP} of either"
        )
        return label, f"no claim with {few} ({sizes})", ()
    within = found.class_adjusted_gap
    verdict = "no difference shown"
    if found.low > 0.5 or found.high < 0.5:
        verdict = f"{'higher' if found.low > 0.5 else 'lower'} in correct predictions"
        if not within * found.gap > 0.5 * found.gap**2:
            verdict += ", which may be a difference between classes"
    adjusted = "undefined (no class has both outcomes)" if math.isnan(within) else decimal(within, 3, signed=True)
    by = f" by {noun}" if noun else ""
    auroc = f"AUROC {decimal(found.auroc, 3)}, 95 % CI{by} {say_interval(found.low, found.high)}"
    gaps = f"gap {decimal(found.gap, 3, signed=True)}, class-adjusted gap {adjusted}"
    return label, f"{verdict}: {auroc} ({sizes})", [gaps]
