"""Who agrees with the predictions of an evaluation, what that adds to confidence, and which modality is not used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_xattn import functional
from lightning_xattn.core.wording import name_modality
from lightning_xattn.functional.error_detection import LEAST_GROUPS, LEAST_OF_OUTCOME, AddedValue
from lightning_xattn.functional.intervals import MINIMUM_GROUP, Estimate
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT

if TYPE_CHECKING:
    from lightning_xattn.evaluation.fusion_summary import FusionSummary

LEAST_LABELLED = 20
"""An error model needs so many samples of each class that the model predicts."""

UNUSED_SHARE = 0.05
"""A modality is not used if the 95 % CI of its share of the contributions lies below this."""

UNUSED_EPOCHS = 3
"""The alarm of a modality that is not used is raised after this many recorded epochs in a row."""


@dataclass(frozen=True)
class Cell:
    """Samples with whose prediction, or with whose true class, the same modalities' probes agree.

    Attributes
    ----------
    key
        In curves and files, such as ``only_eeg``.
    name
        In words.
    samples, groups
        Number of samples, and of their groups (None: not known).
    agrees_otherwise
        Whether no modality supports the predictions, and their probes agree with each other on another class.
    share
        Of all samples that have a cell.
    accuracy, confidence
        The model's, over the cell's samples.
    calibration_gap
        Accuracy minus mean confidence, over samples that have both.
    """

    key: str
    name: str
    samples: int
    groups: int | None
    agrees_otherwise: bool
    share: Estimate
    accuracy: Estimate
    confidence: Estimate
    calibration_gap: Estimate


def describe_support(fusion: FusionSummary) -> list[Cell]:
    """The cells of support: which modalities' probes predict what the model predicts; none where not computed."""
    names = [] if fusion.support_problem else name_cells(fusion.modalities)
    return list(_describe_cells(fusion, fusion.support_cell, names, agreeing=len(names) - 2))


def describe_right(fusion: FusionSummary) -> list[Cell]:
    """The same for whose probe is right; none where a probe has a problem, or without targets."""
    names = name_cells(fusion.modalities, right=True) if (fusion.right_cell >= 0).any() else []
    return list(_describe_cells(fusion, fusion.right_cell, names))


def name_cells(modalities: Sequence[str], right: bool = False) -> list[tuple[str, str]]:
    """The key and the name of each cell of support, or of whose probe is ``right``, in the order of their numbers."""
    count = len(modalities)
    none = "neither" if count == 2 else "none"
    if count == 2:
        found = [("both", "both"), *((f"only_{one}", f"only {name_modality(one)}") for one in modalities)]
    else:
        found = [("all", f"all {count}"), *((f"{n}_of_{count}", f"{n} of {count}") for n in range(count - 1, 0, -1))]
    if right:
        return [*found, ("joint_only", "only the joint probe"), (none, none)]
    return [*found, (f"{none}_agree", f"{none} (probes agree)"), (f"{none}_differ", f"{none} (probes differ)")]


def _describe_cells(
    fusion: FusionSummary, cells: Tensor, names: Sequence[tuple[str, str]], agreeing: int = -1
) -> Iterator[Cell]:
    known = cells >= 0
    for number, (key, name) in enumerate(names):
        chosen = cells == number
        share = fusion.proportion(chosen, known)
        numbers = (fusion.estimate(one, among=chosen) for one in ("correct", "confidence", "calibration_gap"))
        groups = None if fusion.group_noun is None else functional.count_groups(fusion.groups[chosen])
        yield Cell(key, name, int(chosen.sum()), groups, number == agreeing, share, *numbers)


def estimate_unsupported(fusion: FusionSummary) -> Estimate:
    """The model's accuracy over the predictions that no modality supports."""
    return fusion.estimate("correct", among=fusion.support_cell >= len(name_cells(fusion.modalities)) - 2)


def overrules(cell: Cell) -> bool:
    """Whether the model clearly overrules its modalities: they agree with each other, and it is overconfident."""
    return cell.agrees_otherwise and cell.calibration_gap.high < 0


def measure_added_value(fusion: FusionSummary) -> AddedValue | str:
    """What support adds to confidence in detecting errors, or why that is not computed."""
    if fusion.support_problem:
        return fusion.support_problem
    outcomes = (fusion.outcomes == CORRECT) | (fusion.outcomes == INCORRECT)
    chosen = outcomes & (fusion.support_cell >= 0) & fusion.numbers["confidence"].isfinite()
    wrong = fusion.outcomes[chosen] == INCORRECT
    if min(int(wrong.sum()), int((~wrong).sum())) < LEAST_OF_OUTCOME:
        return (
            f"it needs {LEAST_OF_OUTCOME} wrong and {LEAST_OF_OUTCOME} correct predictions, this run had "
            f"{int(wrong.sum())} wrong and {int((~wrong).sum())} correct"
        )
    groups, has_groups = fusion.groups[chosen], fusion.group_noun is not None
    if has_groups and functional.count_groups(groups) < LEAST_GROUPS:
        return f"it needs {LEAST_GROUPS} {fusion.group_noun}, this run had {functional.count_groups(groups)}"
    with_each = [functional.count_groups(groups[one]) for one in (wrong, ~wrong)]
    if has_groups and min(with_each) < MINIMUM_GROUP:
        return (
            f"it needs wrong and correct predictions of {MINIMUM_GROUP} {fusion.group_noun} each, this run had wrong "
            f"ones of {with_each[0]} and correct ones of {with_each[1]}"
        )
    labelled = fusion.target[fusion.target >= 0].bincount(minlength=int(fusion.predicted.max()) + 1)
    few = int((labelled[fusion.predicted[chosen].unique()] < LEAST_LABELLED).sum())
    if few:
        which = "class that the model predicts has" if few == 1 else "classes that the model predicts have"
        return f"{few} {which} fewer than {LEAST_LABELLED} labelled samples"
    return functional.added_value(
        fusion.numbers["confidence"][chosen],
        fusion.numbers["support"][chosen],
        wrong,
        fusion.folds[chosen],
        groups if has_groups else None,
    )


def unused(fusion: FusionSummary, modality: str) -> float:
    """Whether the model does not use a modality that adds to the others: 1 or 0, NaN where that is not known.

    1: the joint probe of all modalities is clearly better than that without this one, in accuracy or macro AUROC, and
    the 95 % CI of the modality's share of the contributions lies below `UNUSED_SHARE`. A modality that says the same
    as another, and one whose encoder learned nothing, add nothing, so they are not found.
    """
    if fusion.contribution_problem or fusion.is_regression:
        return math.nan
    share, gain = fusion.share(modality), fusion.estimate(f"joint_gain/{modality}")
    if math.isnan(share.low) or math.isnan(gain.low):
        return math.nan
    adds = gain.low > 0 or fusion.auroc_gains[modality].low > 0
    return float(adds and share.high < UNUSED_SHARE)
