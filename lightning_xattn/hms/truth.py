"""How well each score answers three questions about simulated recordings, whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.core.ids import group_keys
from lightning_xattn.core.wording import decimal, say_interval
from lightning_xattn.evaluation.statistics import score_bins
from lightning_xattn.evaluation.table import read_columns
from lightning_xattn.functional import separation
from lightning_xattn.hms.montage import CLASSES
from lightning_xattn.hms.recordings import Recordings
from lightning_xattn.report.document import Block, Paragraph, Table

QUESTIONS = ("the modalities disagree", "which one the prediction agrees with", "the prediction is wrong")


def describe_scores(table: Path, recordings: Recordings) -> Iterator[Block]:
    """Describe the AUROC of each score for each question, with its 95 % CI by patients, confidence first.

    ``table`` is the folder that ``explain_loader`` wrote of simulated ``recordings``.
    """
    columns = read_columns(table)
    rows = [recordings.by_label_id[int(one)] for one in columns["sample_id"]]
    eeg, spec = (
        torch.tensor([CLASSES.index(row.extra[column]) for row in rows])
        for column in ("eeg_class", "spectrogram_class")
    )
    groups = group_keys([row.patient_id for row in rows], "cpu")
    predicted, target = (torch.tensor(columns[name]) for name in ("prediction", "target"))
    disagree = eeg != spec
    by_eeg, by_spec = disagree & (predicted == eeg), disagree & (predicted == spec)
    # Of each question the samples whose answer is yes, and those whose answer is no.
    answers = [(disagree, ~disagree), (by_eeg, by_spec), (predicted != target, predicted == target)]
    yield Table(
        ("score", *QUESTIONS),
        [
            (name, *(_describe_auroc(score, groups, *answer) for score, answer in zip(scores, answers, strict=True)))
            for name, scores in _find_signs(columns).items()
        ],
    )
    yield Paragraph(
        f"AUROC with its 95 % CI by patients, on {len(rows)} simulated recordings that the model was not trained on; "
        f"0.5 is chance. {int(disagree.sum())} of them show another class in the spectrogram than in the EEG; "
        f"of these the model predicts the EEG's class {int(by_eeg.sum())} times and the spectrogram's "
        f"{int(by_spec.sum())} times; {int((predicted != target).sum())} predictions are wrong. "
        "Signs of disagreement and of errors are a low confidence, alignment and support, a high entropy and conflict, "
        "and contributions that differ little. The sign that the prediction agrees with the EEG is a large value; for "
        "contribution and support, the EEG's minus the spectrogram's."
    )


def _find_signs(columns: Mapping[str, list[Any]]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The sign of a yes to each question, for each score that the table has."""

    def column(name: str) -> Tensor:
        return torch.tensor([math.nan if one is None else float(one) for one in columns[name]], dtype=torch.float64)

    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, sign in (("confidence", -1), ("alignment", -1), ("entropy", 1)):
        if name in columns:
            found[name] = (sign * column(name), column(name), sign * column(name))
    if "contribution/eeg" in columns:
        difference = column("contribution/eeg") - column("contribution/spec")
        found["contribution"] = (-difference.abs(), difference, -difference.abs())
    if "support" in columns:
        difference = column("supports/eeg") - column("supports/spec")
        found["probe: conflict, support"] = (column("conflict"), difference, -column("support"))
    return found


def _describe_auroc(scores: Tensor, groups: Tensor, yes: Tensor, no: Tensor) -> str:
    known = scores.isfinite()
    scores = scores[known]
    low, high = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 1.0)
    bins = score_bins(scores, low, high if high > low else low + 1)
    found = separation(bins, torch.stack([yes, no], dim=1)[known], groups[known])
    if math.isnan(found.auroc):
        return "too few samples"
    return f"{decimal(found.auroc)} ({say_interval(found.low, found.high, 2)})"
