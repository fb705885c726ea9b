"""Whether predictions depend on the keys in the order in which the attention ranks them: keys are replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_xattn.attribution.kept_samples import KeptSamples
from lightning_xattn.attribution.recorder import ModalityRecorder
from lightning_xattn.attribution.replay import AttentionPlace, Replay, Values
from lightning_xattn.attribution.root import ReplayError
from lightning_xattn.attribution.token_source import Part, TokenSource, share_work
from lightning_xattn.capture.readers import Edit
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

    Several processes share the replays, see `share_work`: a few collectives, which each must reach.

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
    shares: Sequence[Mapping[Direction, _Share | str]] = []
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
    return {
        direction: _join_shares(source, [problem] if problem else [share[direction] for share in shares])
        for direction in directions
    }


@dataclass(frozen=True, eq=False)
class _Share:
    """The results of one process for a direction."""

    samples: Tensor
    values: Tensor
    """``(samples, 2 * REPLACEMENTS)`` probability of the intact prediction's class."""
    at_attention: bool = True
    without_reference: str = ""


def _join_shares(source: TokenSource, shares: Sequence[_Share | str]) -> Replaced:
    """The results of all processes for a direction, or why one of them has none."""
    problem = next((one for one in shares if isinstance(one, str)), "")
    found = [one for one in shares if not isinstance(one, str)]
    model_output = source.model_output.values
    table = model_output.new_full((len(source), 2 * REPLACEMENTS), torch.nan)
    for one in found if not problem else ():
        table[one.samples] = one.values
    by_attention, by_slope = table.split(REPLACEMENTS, dim=1)
    gain = ranking_gain(by_attention)
    ranked = int(gain.isfinite().sum())
    if not problem and ranked < LEAST_SAMPLES:
        problem = f"it needs {LEAST_SAMPLES} samples, and {ranked} have several keys and a partner of another group"
    return Replaced(
        source.samples,
        gain,
        ranking_gain(by_slope),
        model_output.amax(1) - by_attention[:, -1],
        all(one.at_attention for one in found),
        problem,
        next((one.without_reference for one in found if one.without_reference), ""),
    )


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
) -> dict[Direction, _Share | str]:
    """The results of one process for each direction, or why there are none."""
    found: dict[Direction, _Share | str] = {}
    for direction in directions:
        shares = [_Share(torch.empty(0, dtype=torch.long), torch.empty(0, 2 * REPLACEMENTS))]
        try:
            if not any(modality.name == direction.key for modality in fusion.modalities):
                raise ReplayError(f"no modality is called {direction.key}")
            for kind in source.kinds.unique():
                of_kind = (source.kinds == kind).nonzero()[:, 0]
                samples = of_kind[part(len(of_kind))]
                # Not all steps may have had this attention.
                if len(samples) and source.has(f"received/{direction}", samples):
                    shares.append(_replace_keys(source, fusion, direction, (samples, partners[samples]), replay))
        except ReplayError as error:
            found[direction] = str(error)
            continue
        found[direction] = _Share(
            torch.cat([one.samples for one in shares]),
            torch.cat([one.values for one in shares]),
            all(one.at_attention for one in shares),
            next((one.without_reference for one in shares if one.without_reference), ""),
        )
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

    def run(scores: Tensor, last: Tensor | None = None) -> Tensor:
        """The table of these scores; the last column, of all keys, may be known from others."""
        columns = []
        *several, every = replacements(scores, shuffled).unbind(1)
        for chosen in several if last is not None else [*several, every]:
            if keys is None:
                output = replay(_replace_at_modality(fusion, direction, tokens, others, chosen))
            else:
                output = replay(tokens, place, partial(_replace_at_attention, keys, chosen))
            columns.append(output.values.gather(1, classes[:, None])[:, 0])
        values = torch.stack(columns if last is None else [*columns, last], dim=1)
        ranked = ((~scores.isnan()).sum(1) > 1) & values.isfinite().all(1)
        return values.masked_fill(~ranked[:, None], torch.nan)

    values, problem = run(received), ""
    try:
        if place is None:
            raise ReplayError("where it is computed is not known")
        slopes = replay.compute_key_slopes(tokens, place, classes).masked_fill(received.isnan(), torch.nan)
        reference = run(slopes, values[:, -1])
    except ReplayError as error:
        reference, problem = torch.full_like(values, torch.nan), str(error)
    return _Share(samples, torch.cat([values, reference], dim=1), keys is not None, problem)


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
    fusion: ModalityRecorder,
    direction: Direction,
    tokens: Values,
    others: Values,
    chosen: Tensor,
) -> dict[tuple[str, int], Tensor]:
    """Put others' tokens in the chosen places ``(samples, keys)`` of what holds their modality.

    Raises
    ------
    ReplayError
        If it has not as many tokens there as the attention has keys.
    """
    name = str(direction.key)
    changed = dict(tokens)
    for (modality, number), own in tokens.items():
        if modality == name and own.dim() == 3 and own.shape[1] == chosen.shape[1]:
            places = chosen[..., None].to(own.device)
            changed[modality, number] = torch.where(places, others[modality, number], own)
    if all(changed[key] is tokens[key] for key in tokens):
        raise ReplayError(f"its {chosen.shape[1]} keys are not the tokens of what holds {name}")
    return changed
