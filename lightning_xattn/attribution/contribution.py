"""Permutation the modalities of an evaluation's samples, and say how much of the predictions each of them carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from lightning_xattn.attribution.inputs import ModalityPlace
from lightning_xattn.attribution.kept_samples import KeptSamples
from lightning_xattn.attribution.recorder import FusionRecorder
from lightning_xattn.attribution.replay import ModelOutput, Replay, ReplayError, gives_back
from lightning_xattn.attribution.token_source import Part, TokenSource, share_work
from lightning_xattn.functional import Permutation, additive_projection, partner_shifts, permuted_subsets, play
from lightning_xattn.functional.shapley import Subset

CONTRIBUTION_SAMPLES = 128
"""So many samples of an evaluation are permuted, at most."""

PARTNERS = 4
"""So many partners of each sample, unless all are wanted."""

NOT_BACK = (
    "running the fusion again on intact samples gives other outputs, so something besides the fusion's tokens reaches "
    "the prediction, or the model differs from run to run"
)
"""Why nothing is said where the replay of what was not permuted says something else."""


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
        ``(samples,)`` class that an additive projection predicts (-1: not known), and the model.
    pairs
        How many pairs were replayed.
    is_regression
        Whether the model says a value, and no classes.
    whole
        Whether each replay ran all of the module around the fusion, as what comes before it could not be skipped.
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


@dataclass(frozen=True, eq=False)
class _Jobs:
    """Pairs to replay: modalities of ``subset`` from the samples ``rows``, the others from ``columns``."""

    rows: Tensor
    columns: Tensor
    subset: Subset


def contributions(kept: KeptSamples, fusion: FusionRecorder, partners: int | None = PARTNERS) -> Contributions | str:
    """Permutation the modalities of samples with those of partners, and play the game; or say why not.

    Several processes share the replays, see `share_work`: a few collectives, which each must reach.

    Parameters
    ----------
    kept
        The samples of all processes.
    fusion
        Has what is needed to replay what lies behind the fusion.
    partners
        How many partners each sample has; None: all others. None of them is of the sample's own group.
    """
    blocks = kept.permuted.blocks()
    if not blocks:
        return fusion.problem or "no sample could be kept"
    source = TokenSource(blocks)
    try:
        return _play(source, fusion, kept.modalities, partners)
    except ReplayError as error:
        return str(error)


def _play(source: TokenSource, fusion: FusionRecorder, names: Sequence[str], partners: int | None) -> Contributions:
    samples, modalities = len(source), len(names)
    predicted = source.model_output.values.argmax(1)
    if samples < 2:
        raise ReplayError("fewer than two samples have finite predictions")
    if source.model_output.values.shape[1] > 1 and len(predicted.unique()) < 2:
        raise ReplayError("one class is predicted for all samples, so nothing shows what it depends on")
    shifts = torch.tensor(list(partner_shifts(samples, samples if partners is None else partners)))
    rows = torch.arange(samples).repeat_interleave(len(shifts))
    columns = (rows + shifts.repeat(samples)) % samples
    apart = source.groups[rows] != source.groups[columns]
    if not apart.any():
        raise ReplayError("all samples are of one group")
    rows, columns, every = rows[apart], columns[apart], torch.arange(samples)
    jobs = [_Jobs(every, every, frozenset())]
    jobs += [_Jobs(rows, columns, subset) for subset in permuted_subsets(modalities)]
    shares = share_work(fusion, partial(_replay_jobs, source, fusion.places, jobs))
    permuted = [
        ModelOutput.joined([said[number] for said, _ in shares if number in said]) for number in range(1, len(jobs))
    ]
    whole_runs = any(whole for _, whole in shares)
    by_value, by_logit = dict[Subset, Permutation](), dict[Subset, Permutation]()
    for one, said in zip(jobs[1:], permuted, strict=True):
        whole = said.values.isfinite().all(1) & said.logits.isfinite().all(1)
        places = one.rows[whole], one.columns[whole]
        by_value[one.subset] = Permutation(*places, said.values[whole])
        by_logit[one.subset] = Permutation(*places, said.logits[whole])
    logits = source.model_output.logits
    game = play(source.model_output.values, by_value, source.groups, predicted, modalities)
    by_logits = play(logits, by_logit, source.groups, predicted, modalities)
    interactions = {
        f"interaction/{names[a]}_{names[b]}" if modalities > 2 else "interaction": by_logits.interaction(a, b)
        for a, b in combinations(range(modalities), 2)
    }
    projected = additive_projection(samples, by_logit)
    additive = torch.where(projected.isnan().any(1), -1, projected.argmax(1))
    pairs, is_regression = len(rows) * len(permuted), logits.shape[1] == 1
    return Contributions(
        source.samples, game.phi, game.phi_error, interactions, additive, predicted, pairs, is_regression, whole_runs
    )


def _replay_jobs(
    source: TokenSource, places: Mapping[str, ModalityPlace], jobs: Sequence[_Jobs], replay: Replay, part: Part
) -> tuple[dict[int, ModelOutput], bool]:
    """What the model says of a part of each job's pairs, by the job's number, and whether each was a whole run.

    The first job is the intact pairs, which must say what they said.
    """
    results: dict[int, ModelOutput] = {}
    for number, job in enumerate(jobs):
        mine = part(len(job.rows))
        if len(mine):
            rows, columns = job.rows[mine], job.columns[mine]
            sources = [rows if place in job.subset else columns for place in range(len(places))]
            chosen, parts = zip(
                *((chosen, replay(tokens)) for chosen, tokens in source.batches(places, sources)), strict=True
            )
            results[number] = ModelOutput.joined(parts)[torch.cat(chosen).argsort()]
            if number == 0 and not gives_back(source.model_output[mine], results[0], replay.precision):
                raise ReplayError(NOT_BACK)
    return results, not replay.skips
