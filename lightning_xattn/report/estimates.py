"""Estimates with their 95 % CI as text, and the subsets of samples that they are of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_xattn.core.wording import decimal, percent, say_interval
from lightning_xattn.evaluation.layer_summary import Comparison, LayerSummary
from lightning_xattn.evaluation.results import REST
from lightning_xattn.evaluation.statistics import Column
from lightning_xattn.functional.intervals import MINIMUM_GROUP, Estimate
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.report.document import Item, Items, Paragraph, Table

GROUPED_BY = {"target": "true class", "prediction": "predicted class", None: "class"}
"""Heading of the classes, by ``classes_by``; None: not known."""

NOT_SHOWN = "not shown to detect errors"

_DETECTION = (
    "AUROC: how well a score detects errors, that is, the chance that of an incorrect and a correct prediction the "
    "incorrect one has the lower score, or the higher one where a high score is the sign of an error. 0.5 is chance; "
    "below 0.5 the score points the other way.",
    "Gap: the mean over correct minus that over incorrect predictions. The gap within classes is averaged over the "
    "classes with both outcomes: classes differ in accuracy and in attention, and that alone makes a gap. The entropy "
    "that is compared is the mean of the directions.",
)


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


def merge_names(class_names: Sequence[str], largest: Sequence[int]) -> list[str]:
    """The names of these classes, and of all others together."""
    return [*(class_names[class_id] for class_id in largest), REST]


def list_layer_subsets(summary: LayerSummary, class_names: Sequence[str]) -> list[Subset]:
    """The subsets that a layer has samples of, and all classes."""
    has_outcomes = any(summary.size(outcome=outcome) for outcome in (CORRECT, INCORRECT))
    return list_subsets(class_names, has_outcomes, summary.n_classes if summary.unclassified else None)


def estimate_mean(
    summary: LayerSummary, column: Column, class_id: int | None = None, outcome: int | None = None
) -> Estimate:
    """Mean of a layer's number over the samples of a class and an outcome, with its 95 % CI."""
    chosen = column, class_id, outcome
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


def expect_misses(intervals: int) -> Paragraph:
    """How many of so many 95 % CIs miss by chance."""
    return Paragraph(
        f"Each of these {intervals} intervals misses the truth once in 20 times: expect about "
        f"{decimal(intervals / 20, 1)} of them to miss by chance."
    )


def compare_outcomes(compared: Mapping[str, Comparison], noun: str | None) -> tuple[Table, Items]:
    """How well scores detect errors, and a verdict on each; ``noun``: the name of the groups."""

    def size(samples: int, groups: int | None) -> str:
        return str(samples) if groups is None else f"{samples} ({groups})"

    rows: list[tuple[str, ...]] = []
    verdicts: list[Item] = []
    for score, one in compared.items():
        sizes = size(one.correct, one.correct_groups), size(one.incorrect, one.incorrect_groups)
        if math.isnan(one.auroc):
            verdict, claim = f"no claim, fewer than {MINIMUM_GROUP} {noun or 'samples'} of an outcome", ("", "", "")
        else:
            within = one.class_adjusted_gap
            verdict = describe_detection(one)
            if verdict != NOT_SHOWN and not within * one.gap > 0.5 * one.gap**2:
                verdict += ", which may be a difference between classes"
            adjusted = "undefined" if math.isnan(within) else decimal(within, 3, signed=True)
            auroc = format_estimate(Estimate(one.auroc, one.low, one.high, 0))
            claim = auroc, decimal(one.gap, 3, signed=True), adjusted
        name = f"{one.error_side} {score}"
        rows.append((name, *sizes, *claim))
        verdicts.append((name, verdict, ()))
    count = f"({noun})" if noun else ""
    sizes = f"correct {count}".strip(), f"incorrect {count}".strip()
    header = "sign of an error", *sizes, "AUROC", "gap", "gap within classes"
    return Table(header, rows, _DETECTION), Items(verdicts)


def describe_detection(one: Comparison) -> str:
    """Whether a score detects errors, or points the other way, if its AUROC's 95 % CI excludes 0.5."""
    if one.low > 0.5:
        return "detects errors"
    return "points the other way" if one.high < 0.5 else NOT_SHOWN
