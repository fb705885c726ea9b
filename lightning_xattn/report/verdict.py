"""Whether a score tells correct from incorrect predictions, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_xattn.core.wording import decimal, say_interval
from lightning_xattn.evaluation.layer_summary import Comparison
from lightning_xattn.functional.intervals import MINIMUM_GROUP


def describe_comparison(
    score: str, label: str, outcome: Comparison, noun: str | None
) -> tuple[str, str, Sequence[str]]:
    """Put a comparison into words: its label, the verdict, and the gaps behind it.

    Parameters
    ----------
    score, label
        The score's name, and what it is called here.
    outcome
        The comparison.
    noun
        What groups are called; None where they are not known.
    """
    correct, incorrect = (
        f"{outcome.correct} correct" + (f" of {outcome.correct_groups} {noun}" if noun else ""),
        f"{outcome.incorrect} incorrect" + (f" of {outcome.incorrect_groups} {noun}" if noun else ""),
    )
    sizes = f"{correct} and {incorrect} with a defined {score}"
    if math.isnan(outcome.auroc):
        few = (
            f"fewer than {MINIMUM_GROUP} {noun} of either outcome" if noun else f"fewer than {MINIMUM_GROUP} of either"
        )
        return label, f"nothing is claimed with {few} ({sizes})", ()
    if outcome.low > 0.5:
        verdict = "higher in correct predictions"
    elif outcome.high < 0.5:
        verdict = "lower in correct predictions"
    else:
        verdict = "no difference shown"
    within = outcome.class_adjusted_gap
    if verdict != "no difference shown" and not within * outcome.gap > 0.5 * outcome.gap**2:
        verdict += ", which may be a difference between classes"
    adjusted = "undefined (no class has both outcomes)" if math.isnan(within) else decimal(within, 3, signed=True)
    gaps = f"gap {decimal(outcome.gap, 3, signed=True)}, class-adjusted gap {adjusted}"
    by = f" by {noun}" if noun else ""
    found = f"AUROC {decimal(outcome.auroc, 3)}, 95 % CI{by} {say_interval(outcome.low, outcome.high)}"
    return label, f"{verdict}: {found} ({sizes})", [gaps]
