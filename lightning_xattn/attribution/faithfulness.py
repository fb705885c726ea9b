"""Whether predictions depend on the keys in the order in which the attention ranks them: keys are replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor

from lightning_xattn.attribution.kept_samples import KeptSamples, Part, TokenSource, share_work
from lightning_xattn.attribution.recorder import ModalityRecorder
from lightning_xattn.attribution.replay import AttentionPlace, Replay, Values
from lightning_xattn.attribution.root import ReplayError
from lightning_xattn.capture.events import Edit
from lightning_xattn.core.attention import Direction
from lightning_xattn.functional import partner_shifts, ranking_gain, replacements
from lightning_xattn.functional.faithfulness import LEAST_SAMPLES, REPLACED_SHARES

REPLACEMENTS = 2 * len(REPLACED_SHARES) + 1
"""How many replacements are run of each order, see `replacements`."""


@dataclass(frozen=True, eq=False)
class Replaced:
    """What replacing the keys of a direction does to the predictions of some samples; NaN where it is not defined.

    Attributes
    ----------
    samples
        ``(samples, 2)`` which samples these are, see ``IDENTITY``.
    gain, reference
        ``(samples,)`` see `ranking_gain`, of the order of the attention, and of signed gradient x attention.
    cost
        ``(samples,)`` by how much the probability of the prediction falls if all keys are replaced.
    at_attention
        Whether they were replaced at the attention's own keys and values; else in what holds their modality.
    problem
        Why it is not computed; "" where it is.
    without_reference
        Why there is no reference; "" where there is.
    """

    samples: Tensor
    gain: Tensor
    reference: Tensor
    cost: Tensor
    at_attention: bool
    problem: str = ""
    without_reference: str = ""


def replace_keys(kept: KeptSamples, fusion: ModalityRecorder) -> dict[Direction, Replaced]:
    """What replacing the keys of each direction of the first layer by those of a partner does, or why it is not run.

    Several processes share the replays, see `share_work`: a collective, which each must reach.

    Parameters
    ----------
    kept
        The samples of all processes; a replay of the intact samples gives their outputs back.
    fusion
        Has what is needed to replay what lies behind the fusion.
    """
    blocks = kept.permuted.blocks()
    source = TokenSource(blocks)
    names = [name for rows in blocks for name in rows if name.startswith("received/")]
    directions = [Direction.parse(name.removeprefix("received/")) for name in dict.fromkeys(names)]
    shares: Sequence[Mapping[Direction, _Share]] = []
    problem = ""
    if source.model_output.values.shape[1] == 1:
        problem = "the model predicts no classes"
    elif len(source) < LEAST_SAMPLES:
        problem = f"it needs {LEAST_SAMPLES} samples, and {len(source)} were permuted"
    elif directions:
        try:
            shares = share_work(fusion, partial(_replace_part, source, fusion, directions, _choose_partners(source)))
        except ReplayError as error:
            problem = str(error)
    nothing = replace(_Share.empty(source), problem=problem)
    return {
        direction: _describe_share(source, reduce(add, (share[direction] for share in shares), nothing))
        for direction in directions
    }


@dataclass(frozen=True, eq=False)
class _Share:
    """The results of one process for a direction, or with ``+`` of several.

    ``table`` ``(samples, 2 * REPLACEMENTS)`` has the probability of the intact prediction's class; NaN of the other
    samples.
    """

    table: Tensor
    at_attention: bool = True
    problem: str = ""
    without_reference: str = ""

    @classmethod
    def empty(cls, source: TokenSource) -> _Share:
        """The results for no sample."""
        return cls(source.model_output.values.new_full((len(source), 2 * REPLACEMENTS), torch.nan))

    def __add__(self, other: _Share) -> _Share:
        return _Share(
            torch.where(self.table.isnan(), other.table, self.table),
            self.at_attention and other.at_attention,
            self.problem or other.problem,
            self.without_reference or other.without_reference,
        )


def _describe_share(source: TokenSource, share: _Share) -> Replaced:
    table = _Share.empty(source).table if share.problem else share.table
    by_attention, by_slope = table.split(REPLACEMENTS, dim=1)
    gain, problem = ranking_gain(by_attention), share.problem
    ranked = int(gain.isfinite().sum())
    if not problem and ranked < LEAST_SAMPLES:
        problem = f"it needs {LEAST_SAMPLES} samples, and {ranked} have several keys and a partner of another group"
    cost = source.model_output.values.amax(1) - by_attention[:, -1]
    reference = ranking_gain(by_slope)
    return Replaced(source.samples, gain, reference, cost, share.at_attention, problem, share.without_reference)


def _choose_partners(source: TokenSource) -> Tensor:
    """Each sample's partner: another one with as many tokens, of another group; itself where there is none."""
    every = torch.arange(len(source))
    partners = every.clone()
    for shift in partner_shifts(len(source), len(source)):
        other = (every + shift) % len(source)
        fits = (source.groups != source.groups[other]) & (source.kinds == source.kinds[other])
        partners = torch.where((partners == every) & fits, other, partners)
    return partners


def _replace_part(
    source: TokenSource,
    fusion: ModalityRecorder,
    directions: Sequence[Direction],
    partners: Tensor,
    replay: Replay,
    part: Part,
) -> dict[Direction, _Share]:
    """The results of one process for each direction."""
    found = {}
    for direction in directions:
        share = _Share.empty(source)
        try:
            if not any(modality.name == direction.key for modality in fusion.modalities):
                raise ReplayError(f"no modality is called {direction.key}")
            for kind in source.kinds.unique():
                of_kind = (source.kinds == kind).nonzero()[:, 0]
                samples = of_kind[part(len(of_kind))]
                # Not all steps may have had this attention.
                if len(samples) and source.has(f"received/{direction}", samples):
                    share += _replace_keys(source, fusion, direction, (samples, partners[samples]), replay)
        except ReplayError as error:
            share = replace(share, problem=str(error))
        found[direction] = share
    return found


def _replace_keys(
    source: TokenSource, fusion: ModalityRecorder, direction: Direction, pairs: tuple[Tensor, Tensor], replay: Replay
) -> _Share:
    """The results for samples with the same numbers of tokens, and their partners."""
    samples, partners = pairs
    received, theirs = (source.column(f"received/{direction}", one).cpu() for one in pairs)
    received = received.masked_fill(theirs.isnan() | (samples == partners)[:, None], torch.nan)
    place = fusion.find_attention(direction, source.token_count(direction.opposite, samples), received.shape[1])
    tokens, others = (source.values({}, one) for one in pairs)
    keys = None if place is None else _find_keys(replay, place, others, len(samples))
    classes = source.model_output.values[samples].argmax(1)
    # Of all samples, so that it is the same whatever the processes.
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.rand(len(source), received.shape[1], generator=generator).argsort(1)[samples]

    def run(changes: Sequence[Tensor]) -> list[Tensor]:
        """The probabilities after each of several replacements ``(samples, keys)``."""
        if keys is None or place is None:
            outputs = [replay(_replace_at_modality(direction, tokens, others, chosen)) for chosen in changes]
        else:
            edits = [partial(_replace_at_attention, keys, chosen) for chosen in changes]
            outputs = replay.run_edits(tokens, place, edits)
        return [output.values.gather(1, classes[:, None])[:, 0] for output in outputs]

    def table(scores: Tensor, columns: Sequence[Tensor]) -> Tensor:
        values = torch.stack(list(columns), dim=1)
        ranked = ((~scores.isnan()).sum(1) > 1) & values.isfinite().all(1)
        return values.masked_fill(~ranked[:, None], torch.nan)

    by_attention, by_slope, problem = replacements(received, shuffled).unbind(1), list[Tensor](), ""
    slopes = torch.full_like(received, torch.nan)
    try:
        if place is None:
            raise ReplayError("where it is computed is not known")
        slopes = replay.compute_key_slopes(tokens, place, classes).masked_fill(received.isnan(), torch.nan)
        by_slope = list(replacements(slopes, shuffled).unbind(1)[:-1])  # the last is of all keys, as the other's
    except ReplayError as error:
        problem = str(error)
    found = run([*by_attention, *by_slope])
    values = table(received, found[:REPLACEMENTS])
    reference = torch.full_like(values, torch.nan)
    if by_slope:
        reference = table(slopes, [*found[REPLACEMENTS:], values[:, -1]])
    whole = _Share.empty(source).table.index_copy(0, samples, torch.cat([values, reference], dim=1))
    return _Share(whole, keys is not None, without_reference=problem)


def _find_keys(replay: Replay, place: AttentionPlace, tokens: Values, samples: int) -> tuple[Tensor, ...] | None:
    """The keys and values that an attention gets, ``(samples, ..., keys, width)``; None where they are not seen."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found.append((key.clone(), value.clone()))
        return key, value

    try:
        replay(tokens, place, lambda rows: Edit(tokens=keep))
    except ReplayError:
        return None
    return tuple(torch.cat(parts)[:samples] for parts in zip(*found, strict=True)) or None


def _replace_at_attention(keys: Sequence[Tensor], chosen: Tensor, rows: Tensor) -> Edit:
    """Put others' keys and values in the chosen places ``(samples, keys)`` of an attention."""

    def replace(*own: Tensor) -> tuple[Tensor, Tensor]:
        places = chosen[rows].to(own[0].device)
        places = places.reshape(len(rows), *(1,) * (own[0].dim() - 3), -1, 1)
        key, value = (
            torch.where(places, theirs[rows.to(theirs.device)], one) for theirs, one in zip(keys, own, strict=True)
        )
        return key, value

    return Edit(tokens=replace)


def _replace_at_modality(
    direction: Direction, tokens: Values, others: Values, chosen: Tensor
) -> dict[tuple[str, int], Tensor]:
    """Put others' tokens in the chosen places ``(samples, keys)`` of what holds their modality.

    Raises
    ------
    ReplayError
        If it has not as many tokens there as the attention has keys.
    """
    places = chosen[..., None].to(next(iter(tokens.values())).device)
    changed = {
        column: torch.where(places, others[column], own)
        for column, own in tokens.items()
        if column[0] == direction.key and own.dim() == 3 and own.shape[1] == chosen.shape[1]
    }
    if not changed:
        raise ReplayError(f"its {chosen.shape[1]} keys are not the tokens of what holds {direction.key}")
    return {**tokens, **changed}
