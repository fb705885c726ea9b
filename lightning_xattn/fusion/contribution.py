"""Exchange the modalities of an evaluation's samples, and say how much of the predictions each of them carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xattn.distributed import gather, process
from lightning_xattn.functional import (
    Exchange,
    additive_projection,
    exchanged_subsets,
    partner_shifts,
    play,
)
from lightning_xattn.functional.contribution import Subset
from lightning_xattn.fusion.arguments import Path
from lightning_xattn.fusion.collected import IDENTITY, MAX_GEOMETRIES, FusionPart
from lightning_xattn.fusion.entrance import ModalityPlace
from lightning_xattn.fusion.pool import Rows
from lightning_xattn.fusion.recorder import FusionRecorder
from lightning_xattn.fusion.replay import Replay, ReplayError, Spoken, gives_back

CONTRIBUTION_SAMPLES = 128
"""So many samples of an evaluation are exchanged, at most."""

PARTNERS = 4
"""So many partners of each sample, unless all are wanted."""

NOT_BACK = (
    "the intact samples' outputs do not come back, so something besides the fusion's tokens reaches the prediction, or "
    "it differs from run to run"
)
"""Why nothing is said where the replay of what was not exchanged says something else."""


@dataclass(frozen=True, eq=False)
class Contributions:
    """What each modality contributes to the predictions of some samples; NaN where it is not defined.

    Attributes
    ----------
    samples
        ``(samples, 2)`` which samples these are: their process, and their number in it.
    phi
        ``(samples, modalities)`` Shapley values, in shares of probability; of a regression in its units.
    interaction
        ``(samples,)`` of the first two modalities, on centred logits; of a regression on its value.
    additive, predicted
        ``(samples,)`` class that an additive projection predicts (-1: not known), and the model.
    pairs
        How many pairs were replayed.
    whole
        Whether each replay ran all of the module around the fusion, as what comes before it could not be skipped.
    """

    samples: Tensor
    phi: Tensor
    interaction: Tensor
    additive: Tensor
    predicted: Tensor
    pairs: int
    whole: bool


@dataclass(frozen=True, eq=False)
class _Jobs:
    """Pairs to replay: modalities of ``subset`` from the samples ``rows``, the others from ``columns``."""

    rows: Tensor
    columns: Tensor
    subset: Subset


class TokenSource:
    """The kept samples, whatever the numbers of their tokens.

    Parameters
    ----------
    geometries
        Samples with the same numbers of tokens together, see ``Collected``.
    size
        At most so many are taken, those with the smallest hashes.
    """

    def __init__(self, geometries: Sequence[Rows], size: int) -> None:
        self._geometries = geometries
        whole = {
            name: torch.cat([rows[name].cpu() for rows in geometries])
            for name in ("hash", "group", *IDENTITY, "values", "logits")
        }
        order = whole["hash"].argsort(stable=True)[:size]
        # Not by their hashes: the same id may occur twice.
        self.samples = torch.stack([whole[name] for name in IDENTITY], dim=1)[order]
        self.groups = whole["group"][order]
        self.spoken = Spoken(whole["values"][order], whole["logits"][order])
        counts = torch.tensor([len(rows["hash"]) for rows in geometries])
        self._geometry = torch.arange(len(geometries)).repeat_interleave(counts)[order]
        self._row = torch.cat([torch.arange(int(count)) for count in counts])[order]

    def __len__(self) -> int:
        return len(self.samples)

    def replay(self, replay: Replay, places: Mapping[str, ModalityPlace], jobs: _Jobs) -> Spoken:
        """What the model says of each pair."""
        sources = [jobs.rows if place in jobs.subset else jobs.columns for place in range(len(places))]
        # Pairs with the same numbers of tokens of each modality fit into one batch.
        kinds = torch.stack([self._geometry[source] for source in sources], dim=1)
        _, kind = kinds.unique(dim=0, return_inverse=True)
        order, parts = [], []
        for one in range(int(kind.max()) + 1):
            chosen = (kind == one).nonzero()[:, 0]
            tokens: dict[Path, Tensor] = {}
            for (name, place), source in zip(places.items(), sources, strict=True):
                rows = self._geometries[int(self._geometry[source[chosen[0]]])]
                for i, (path, axis) in enumerate(place.kept.items()):
                    stored = rows[f"tokens/{name}/{i}"]
                    tokens[path] = stored[self._row[source[chosen]].to(stored.device)].movedim(0, axis)
                tokens |= dict.fromkeys(place.tokens[1:], tokens[place.tokens[0]])
            parts.append(replay(tokens))
            order.append(chosen)
        back = torch.cat(order).argsort()
        whole = Spoken.joined(parts)
        return whole[back]


def contributions(
    part: FusionPart, fusion: FusionRecorder, size: int, partners: int | None = PARTNERS
) -> Contributions | str:
    """Exchange the modalities of samples with those of partners, and play the game; or say why not.

    Where there are several processes each replays its share: two collectives, which each must reach.

    Parameters
    ----------
    part
        What all processes have collected.
    fusion
        Has what is needed to replay what lies behind the fusion.
    size
        At most so many samples are taken.
    partners
        How many partners each sample has; None: all others. None of them is of the sample's own group.
    """
    if part.is_partial:
        return f"more than {MAX_GEOMETRIES} different numbers of tokens occur: pad them to fewer lengths"
    if not part.geometries:
        return fusion.problem or "no sample could be kept"
    source = TokenSource(part.geometries, size)
    try:
        return _play(source, fusion, part.modalities, partners)
    except ReplayError as error:
        return str(error)


def _play(source: TokenSource, fusion: FusionRecorder, names: Sequence[str], partners: int | None) -> Contributions:
    samples, modalities = len(source), len(names)
    predicted = source.spoken.values.argmax(1)
    if samples < 2:
        raise ReplayError("it takes two samples")
    if source.spoken.values.shape[1] > 1 and len(predicted.unique()) < 2:
        raise ReplayError("one class is predicted for all samples, so nothing shows what it depends on")
    shifts = torch.tensor(list(partner_shifts(samples, samples if partners is None else partners)))
    rows = torch.arange(samples).repeat_interleave(len(shifts))
    columns = (rows + shifts.repeat(samples)) % samples
    apart = source.groups[rows] != source.groups[columns]
    if not apart.any():
        raise ReplayError("all samples are of one group")
    rows, columns, every = rows[apart], columns[apart], torch.arange(samples)
    jobs = [_Jobs(every, every, frozenset())]
    jobs += [_Jobs(rows, columns, subset) for subset in exchanged_subsets(modalities)]
    (_, *exchanged), whole_runs = _shared(source, fusion, jobs)
    by_value, by_logit = dict[Subset, Exchange](), dict[Subset, Exchange]()
    for one, said in zip(jobs[1:], exchanged, strict=True):
        whole = said.values.isfinite().all(1) & said.logits.isfinite().all(1)
        places = one.rows[whole], one.columns[whole]
        by_value[one.subset] = Exchange(*places, said.values[whole])
        by_logit[one.subset] = Exchange(*places, said.logits[whole])
    logits = source.spoken.logits
    phi = play(source.spoken.values, by_value, source.groups, predicted, modalities).phi
    interaction = play(logits, by_logit, source.groups, predicted, modalities).interaction()
    projected = additive_projection(logits, by_logit)
    additive = torch.where(projected.isnan().any(1), -1, projected.argmax(1))
    pairs = len(rows) * len(exchanged)
    return Contributions(source.samples, phi, interaction, additive, predicted, pairs, whole_runs)


def _shared(source: TokenSource, fusion: FusionRecorder, jobs: Sequence[_Jobs]) -> tuple[list[Spoken], bool]:
    """What the model says of each job's pairs, and whether each was a whole run; the first job is the intact pairs.

    The processes that can replay share the work: one whose first step showed nothing, as of samples that are not
    finite, cannot.

    Raises
    ------
    ReplayError
        If none can, a replay fails, or the intact samples' outputs do not come back.
    """
    rank, _ = process()
    replay, problem = None, ""
    try:
        replay = fusion.replay()
    except ReplayError as error:
        problem = str(error)
    problems = gather(problem)
    able = [one for one, found in enumerate(problems) if not found]
    if not able:
        raise ReplayError(problems[0])
    results: dict[int, Spoken] = {}
    try:
        for number, job in enumerate(jobs if replay is not None else ()):
            mine = torch.arange(len(job.rows)).tensor_split(len(able))[able.index(rank)]
            if replay is not None and len(mine):
                share = _Jobs(job.rows[mine], job.columns[mine], job.subset)
                results[number] = source.replay(replay, fusion.places, share)
                if number == 0 and not gives_back(source.spoken[mine], results[0], replay.is_half):
                    raise ReplayError(NOT_BACK)
    except ReplayError as error:
        problem = str(error)
    whole_runs = replay is not None and not replay.skips
    processes = gather(("" if replay is None else problem, results, whole_runs))
    for found, *_ in processes:
        if found:
            raise ReplayError(found)
    said = [
        Spoken.joined([of_one[number] for _, of_one, _ in processes if number in of_one]) for number in range(len(jobs))
    ]
    return said, any(one for *_, one in processes)
