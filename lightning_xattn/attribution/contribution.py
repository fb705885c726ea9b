"""How much each modality contributes to the predictions: modalities are permuted between samples, and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_xattn.attribution.kept_samples import KeptSamples, Part, TokenSource, share_work
from lightning_xattn.attribution.outputs import ModelOutput, are_same_outputs
from lightning_xattn.attribution.recorder import SPLIT_MODEL, ModalityRecorder
from lightning_xattn.attribution.replay import Replay
from lightning_xattn.attribution.root import ReplayError
from lightning_xattn.core.distributed import SINGLE_PROCESS
from lightning_xattn.functional import Permutation, additive_projection, partner_shifts, permuted_subsets, play
from lightning_xattn.functional.shapley import Subset

CONTRIBUTION_SAMPLES = 128
"""How many samples of an evaluation are permuted by default, at most: as many as faithfulness needs."""

FIT_SAMPLES = 64
"""How many by default in an epoch of a fit that tests no faithfulness: a share's standard error is .029, not .024."""

PARTNERS = 4
"""How many partners each sample has by default."""

NOT_REPRODUCED = (
    "running the model again on intact samples gives other outputs, so something besides the modalities reaches the "
    "prediction, or the model differs from run to run"
)
"""Why contributions are not computed where the replay of intact samples gives other outputs."""


MAX_TOKEN_SHAPES = 32
"""Samples are replayed together only with the same numbers of tokens, so many different ones take many replays."""


@dataclass(frozen=True, eq=False)
class Contributions:
    """What each modality contributes to the predictions of some samples; NaN where it is not defined.

    Attributes
    ----------
    samples
        ``(samples, 2)`` which samples these are: their process, and their number in it.
    phi
        ``(samples, modalities)`` Shapley values, in shares of probability; of a regression in its units.
    error
        ``(samples, modalities)`` their standard errors, as not all partners were run.
    interactions
        ``(samples,)`` of the two modalities, "interaction", or of each two of more, "interaction/<a>_<b>"; on centred
        logits, of a regression on its value.
    additive, predicted
        ``(samples,)`` the classes that an additive projection (-1: not known) and the model predict.
    pairs
        How many pairs were replayed.
    is_regression
        Whether the model predicts a value, and no classes.
    whole
        Whether each replay ran the whole module around the fusion, as what comes before it could not be skipped.
    """

    samples: Tensor
    phi: Tensor
    error: Tensor
    interactions: dict[str, Tensor]
    additive: Tensor
    predicted: Tensor
    pairs: int
    is_regression: bool
    whole: bool


class _Job(NamedTuple):
    """Pairs to replay: modalities of ``subset`` from the samples ``rows``, the others from ``columns``."""

    rows: Tensor
    columns: Tensor
    subset: Subset


def compute_contributions(
    kept: KeptSamples, fusion: ModalityRecorder, partners: int | None = PARTNERS
) -> Contributions | str:
    """The contributions of the modalities to the predictions of some samples; or why they are not computed.

    Several processes share the replays, see `share_work`: a collective, which each must reach.

    Parameters
    ----------
    kept
        The samples of all processes.
    fusion
        Has what is needed to replay what lies behind the fusion.
    partners
        How many partners each sample has; None: all others. None of them is of the sample's own group.
    """
    if fusion.problem and fusion.processes is SINGLE_PROCESS:  # several compare theirs in share_work
        return fusion.problem
    if not fusion.processes.hold_whole_model:
        return SPLIT_MODEL
    blocks = kept.permuted.blocks()
    if not blocks:
        return "no sample could be kept"
    if len(blocks) > MAX_TOKEN_SHAPES:
        return f"the samples have {len(blocks)} different numbers of tokens, at most {MAX_TOKEN_SHAPES}: pad them"
    source = TokenSource(blocks)
    try:
        return _compute_shapley_values(source, fusion, kept.modalities, partners)
    except ReplayError as error:
        return str(error)


def _compute_shapley_values(
    source: TokenSource, fusion: ModalityRecorder, names: Sequence[str], partners: int | None
) -> Contributions:
    """Permute the modalities of samples with those of partners, and compute the game's values from the replays."""
    samples, modalities = len(source), len(names)
    predicted = source.model_output.values.argmax(1)
    if samples < 2:
        raise ReplayError("fewer than two samples have finite predictions")
    if source.model_output.values.shape[1] > 1 and len(predicted.unique()) < 2:
        raise ReplayError("one class is predicted for all samples, so the predictions do not show what they depend on")
    shifts = torch.tensor(list(partner_shifts(samples, samples if partners is None else partners)))
    rows = torch.arange(samples).repeat_interleave(len(shifts))
    columns = (rows + shifts.repeat(samples)) % samples
    apart = source.groups[rows] != source.groups[columns]
    if not apart.any():
        raise ReplayError("all samples are of one group")
    rows, columns, every = rows[apart], columns[apart], torch.arange(samples)
    jobs = [_Job(every, every, frozenset())]
    jobs += [_Job(rows, columns, subset) for subset in permuted_subsets(modalities, bool(fusion.found.further))]
    shares = share_work(fusion, partial(_replay_jobs, source, names, jobs))
    whole_runs = any(whole for _, whole in shares)
    by_value, by_logit = dict[Subset, Permutation](), dict[Subset, Permutation]()
    for number, job in enumerate(jobs[1:], start=1):
        output = ModelOutput.joined([outputs[number] for outputs, _ in shares if number in outputs])
        finite = output.values.isfinite().all(1) & output.logits.isfinite().all(1)
        places = job.rows[finite], job.columns[finite]
        by_value[job.subset] = Permutation(*places, output.values[finite])
        by_logit[job.subset] = Permutation(*places, output.logits[finite])
    logits = source.model_output.logits
    game = play(source.model_output.values, by_value, source.groups, predicted, modalities)
    by_logits = play(logits, by_logit, source.groups, predicted, modalities)
    interactions = {
        f"interaction/{names[a]}_{names[b]}" if modalities > 2 else "interaction": by_logits.interaction(a, b)
        for a, b in combinations(range(modalities), 2)
    }
    of_first = frozenset({0})
    projected = additive_projection(samples, {of_first: by_logit[of_first]} if modalities == 2 else by_logit)
    additive = torch.where(projected.isnan().any(1), -1, projected.argmax(1))
    pairs, is_regression = len(rows) * len(by_value), logits.shape[1] == 1
    return Contributions(
        source.samples, game.phi, game.phi_error, interactions, additive, predicted, pairs, is_regression, whole_runs
    )


def _replay_jobs(
    source: TokenSource, names: Sequence[str], jobs: Sequence[_Job], replay: Replay, part: Part
) -> tuple[dict[int, ModelOutput], bool]:
    """The model's outputs for a part of each job's pairs, by the job's number, and whether each was a whole run.

    The first job is the intact samples, whose outputs must be those of the step.
    """
    results: dict[int, ModelOutput] = {}
    with replay.restoring_once():
        for number, job in enumerate(jobs):
            mine = part(len(job.rows))
            if len(mine):
                rows, columns = job.rows[mine], job.columns[mine]
                sources = {name: rows if place in job.subset else columns for place, name in enumerate(names)}
                replayed = [(chosen, replay(values)) for chosen, values in source.batches(sources, rows)]
                chosen, parts = zip(*replayed, strict=True)
                results[number] = ModelOutput.joined(parts)[torch.cat(chosen).argsort()]
                if number == 0 and not are_same_outputs(source.model_output[mine], results[0], replay.precision):
                    raise ReplayError(NOT_REPRODUCED)
    return results, not replay.skips
