"""Which number tells what, on simulated recordings, of which it is known what each modality shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from lightning_xattn.core.group_keys import group_keys
from lightning_xattn.core.wording import decimal, say_interval
from lightning_xattn.functional import Separation, grouped_separation, score_bins
from lightning_xattn.hms.montage import CLASSES
from lightning_xattn.hms.recordings import Recordings
from lightning_xattn.report.document import Block, Paragraph, Table

QUESTIONS = ("the modalities disagree", "which one the model followed", "the prediction is wrong")


def describe_scores(table: Path, recordings: Recordings) -> Iterator[Block]:
    """How well each score answers each question: the AUROC with its 95 % CI by patients, confidence first.

    Parameters
    ----------
    table
        The folder that ``explain_loader`` wrote of simulated recordings.
    recordings
        Have the columns ``eeg_class`` and ``spectrogram_class`` of the simulator.
    """
    columns = pq.read_table(table).to_pydict()
    rows = [recordings.by_label_id[int(one)] for one in columns["sample_id"]]
    eeg, spec = (
        torch.tensor([CLASSES.index(row.extra[column]) for row in rows])
        for column in ("eeg_class", "spectrogram_class")
    )
    groups = group_keys([row.patient_id for row in rows], "cpu")
    predicted, target = (torch.tensor(columns[name]) for name in ("prediction", "target"))
    disagree = eeg != spec
    followed = disagree & ((predicted == eeg) | (predicted == spec))
    truths = (
        torch.stack([disagree, ~disagree], dim=1),
        torch.stack([followed & (predicted == eeg), followed & (predicted == spec)], dim=1),
        torch.stack([predicted != target, predicted == target], dim=1),
    )
    cells = []
    for name, scores in _signs(columns).items():
        said = [_say(_separate(score, groups, truth)) for score, truth in zip(scores, truths, strict=True)]
        cells.append((name, *said))
    counts = [[int(one) for one in truth.sum(0)] for truth in truths]
    yield Table(("score", *QUESTIONS), cells)
    yield Paragraph(
        f"AUROC with its 95 % CI by patients, on {len(rows)} simulated recordings that the model was not trained "
        f"on; 0.5: nothing is told. {counts[0][0]} of them show another class in the spectrogram than in the EEG; "
        f"where they do, the model followed the EEG {counts[1][0]} times and the spectrogram {counts[1][1]} times; "
        f"{counts[2][0]} predictions are wrong. Signs of disagreement and of errors are a low confidence, alignment "
        "and interaction, a high entropy and conflict, and contributions that differ little; a sign that the EEG was "
        "followed is a large value, for contribution and support_difference the EEG's minus the spectrogram's."
    )


def _signs(columns: Mapping[str, list[Any]]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By name, what is taken as a sign for each of the questions."""

    def column(name: str) -> Tensor:
        return torch.tensor([math.nan if one is None else float(one) for one in columns[name]], dtype=torch.float64)

    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, sign in (("confidence", -1), ("alignment", -1), ("interaction", -1), ("entropy", 1)):
        if name in columns:
            found[name] = (sign * column(name), column(name), sign * column(name))
    if "contribution_followed" in columns:
        difference = column("contribution_followed")
        found["contribution"] = (-difference.abs(), difference, -difference.abs())
    if "conflict" in columns:
        found["probe: conflict, support_difference"] = (
            column("conflict"),
            column("support_difference"),
            column("conflict"),
        )
    return found


def _separate(scores: Tensor, groups: Tensor, truth: Tensor) -> Separation:
    known = scores.isfinite()
    scores = scores[known]
    low, high = (float(scores.min()), float(scores.max())) if len(scores) else (0.0, 1.0)
    bins = score_bins(scores, low, high if high > low else low + 1)
    return grouped_separation(bins, groups[known], truth[known])


def _say(found: Separation) -> str:
    if math.isnan(found.auroc):
        return "too few to say"
    return f"{decimal(found.auroc)} ({say_interval(found.low, found.high, 2)})"
