"""One self-attention over the tokens of several modalities, and the directions within it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.capture.masks import RecordedWeights
from lightning_xattn.core.attention import Direction, row_sum_tolerance
from lightning_xattn.core.errors import SettingError, ShapeError, check_whole_number
from lightning_xattn.core.scores import Scores, Tokens, pick

Span = tuple[int, int | None]
"""``(start, stop)`` as in a slice: below 0 from the end, a stop of None is the end."""

Places = slice | Tensor
"""Where a modality's tokens are: the same places in each sample, or a mask ``(batch, tokens)``, True for its tokens."""


@dataclass(frozen=True)
class JointSequence:
    """Self-attention over the tokens of several modalities in one sequence.

    Each ordered pair of modalities is a direction: its queries' rows and its keys' columns of the one attention,
    scaled to sum to 1 over these keys. How much of the attention crosses over is a number of its own.

    Parameters
    ----------
    attention
        Path of the self-attention, or of an ``nn.TransformerEncoder`` with its layers; several for several layers.
    spans
        For each modality the place of its tokens in the sequence, as in a slice: ``(0, 9)``, ``(9, None)`` to the end,
        ``(-144, None)`` for the last 144. A callable gets the batch and returns such a pair, for sequences that are
        only as long as the longest of each batch; or a mask ``(batch, tokens)``, True for the modality's tokens, which
        may be at other places in each sample, as of images between words. Tokens in no span, such as a class token,
        belong to no modality.
    length
        How many tokens the sequence has. None: as many as the spans reach over, where each holds a fixed number of
        tokens; else any number, of which the span that reaches from one end to the other takes up the rest, as
        ``(9, None)`` does; a callable knows its batch. A first batch of another length is an error, and a later one is
        left out and counted: at the same places it would have other tokens.

    Raises
    ------
    SettingError
        If there are fewer than two modalities, their spans are empty or overlap, or it takes a length to tell whether
        they do.

    Notes
    -----
    A sequence that has the right length and other tokens at some places is not noticed, such as one whose text is three
    tokens longer and whose image is three tokens shorter. Nor is it noticed that another modality than the one whose
    span takes up the rest has changed its length. Give a callable then.

    Examples
    --------
    >>> joint = JointSequence("encoder", spans={"eeg": (0, 9), "spec": (9, 128)})
    >>> joint.slices(batch=None)
    {'eeg': slice(0, 9, None), 'spec': slice(9, 128, None)}
    >>> tokens = {"text": lambda batch: (0, batch["input_ids"].shape[1]), "image": (-144, None)}
    >>> JointSequence("encoder", tokens).slices({"input_ids": torch.zeros(2, 12)})
    {'text': slice(0, 12, None), 'image': slice(-144, None, None)}
    >>> tokens = {"image": lambda batch: batch["input_ids"] == 7, "text": lambda batch: batch["input_ids"] != 7}
    >>> JointSequence("decoder", tokens).slices({"input_ids": torch.tensor([[1, 7, 7, 2]])})["image"]
    tensor([[False,  True,  True, False]])
    """

    attention: str | Sequence[str]
    spans: Mapping[str, Span | Callable[[Any], Span | Tensor]]
    length: int | None = None

    def __post_init__(self) -> None:
        names = list(self.spans) if isinstance(self.spans, Mapping) else []
        if len(names) < 2:
            raise SettingError(
                "JointSequence needs the spans of at least two modalities, e.g. "
                f"{{'eeg': (0, 9), 'spec': (9, 128)}}; got {self.spans!r}."
            )
        paths = self.paths if isinstance(self.attention, (str, Sequence)) else ()
        if not paths or not all(isinstance(path, str) for path in paths) or len(set(paths)) < len(paths):
            raise SettingError(
                f"JointSequence needs a module path or a list of different ones; got {self.attention!r}."
            )
        for first, second in pairwise(names):
            Direction.parse(f"{first}_to_{second}")
        check_whole_number("length", self.length, optional=True)
        fixed = {name: _check_span(name, span) for name, span in self.spans.items() if not callable(span)}
        _place_spans(fixed, self.length)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the layers."""
        return (self.attention,) if isinstance(self.attention, str) else tuple(self.attention)

    @property
    def counts_from_the_end(self) -> bool:
        """Whether a span starts or stops a number of tokens before the end."""
        return any(not callable(span) and (span[0] < 0 or (span[1] or 0) < 0) for span in self.spans.values())

    @property
    def last_takes_the_rest(self) -> bool:
        """Whether the last modality has as many tokens as are left, and nothing else is said of the length."""
        return not (self.expected_length or self.counts_from_the_end or any(map(callable, self.spans.values())))

    @property
    def expected_length(self) -> int | None:
        """How many tokens the sequence must have for the spans to hold what they are meant to; None: any number."""
        spans = [span for span in self.spans.values() if not callable(span)]
        if self.length is not None or len(spans) < len(self.spans) or any(map(_takes_the_rest, spans)):
            return self.length
        from_the_start = max((stop or 0 for start, stop in spans if start >= 0), default=0)
        return from_the_start + max((-start for start, _ in spans if start < 0), default=0)

    def slices(self, batch: Any) -> dict[str, Places]:
        """The place of each modality's tokens.

        Raises
        ------
        SettingError
            If a callable returns neither a span nor a mask.
        """
        spans = {name: span(batch) if callable(span) else span for name, span in self.spans.items()}
        return {
            name: span.bool() if isinstance(span, Tensor) and span.dim() == 2 else slice(*_check_span(name, span))
            for name, span in spans.items()
        }


def _check_span(name: str, span: Any) -> Span:
    whole = isinstance(span, (tuple, list)) and len(span) == 2
    numbers = whole and _is_number(span[0]) and (span[1] is None or _is_number(span[1]))
    if not numbers or (span[0] < 0 and span[1] is not None and span[1] >= 0):
        raise SettingError(
            f"The span of '{name}' must be (start, stop) as in a slice, such as (0, 9), (9, None) or (-144, None), or "
            "a callable that makes one of the batch, or a mask (batch, tokens) that is True for the modality's tokens; "
            f"got {span!r}."
        )
    return span[0], span[1]


def _takes_the_rest(span: Span) -> bool:
    """Whether a span is as long as the sequence allows."""
    start, stop = span
    return start >= 0 and (stop is None or stop < 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _place_spans(spans: Mapping[str, Span], length: int | None) -> dict[str, slice]:
    """Spans in a sequence of this length, counted from its start; None: it is longer than all of them.

    Raises
    ------
    SettingError
        If one reaches beyond it, holds no token or overlaps with another.
    """
    tokens = sum(_find_reach(span) for span in spans.values()) + 1 if length is None else length
    places = {name: slice(*slice(*span).indices(tokens)) for name, span in spans.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1].start):
        if _find_reach(spans[name]) > tokens or not end <= place.start < place.stop:
            of_length = f"of length={length}" if length else "whatever its length, unless it is given (length=128)"
            raise SettingError(
                f"The spans of a JointSequence must hold tokens and not overlap in a sequence {of_length}; that of "
                f"'{name}' does not: {dict(spans)}."
            )
        end = place.stop
    return places


def _find_reach(span: Span) -> int:
    """How many tokens a sequence must have to hold a span."""
    start, stop = span[0], span[1] or 0
    return max(start + 1, -start, stop, -stop)


def cut_direction(joint: RecordedWeights, queries: Places, keys: Places, name: str) -> RecordedWeights:
    """One direction out of a joint self-attention: a block of it, whose rows are scaled to sum to 1.

    ``cross_modal_mass`` keeps what a row's weights summed to in the block, the share of its attention on the other
    modality. A row without such attention has no distribution over these keys: none of them is visible to it.

    Parameters
    ----------
    joint
        Self-attention ``(batch, heads, tokens, tokens)`` of the module ``name``.
    queries, keys
        The places of the two modalities. Where a mask says that samples have different numbers of tokens, those that a
        sample lacks count as padding.

    Raises
    ------
    ShapeError
        If the attention is no self-attention, has fewer tokens than the places, or the places overlap in it.
    """
    length, n_keys = joint.shape[2:]
    for mask in (queries, keys):
        if isinstance(mask, Tensor) and joint.cropped:
            joint = joint.padded_to(mask.shape[1])
    spans = [(one.start, one.stop) for one in (queries, keys) if isinstance(one, slice)]
    reach = max(map(_find_reach, spans), default=1)
    if length != n_keys - joint.extra_keys or (length < reach and not joint.cropped):
        raise ShapeError(
            f"Expected '{name}' to attend within one sequence of at least {reach} tokens, which the spans of the "
            f"JointSequence need; its attention has {length} queries and {n_keys} keys."
        )
    if isinstance(queries, slice) and isinstance(keys, slice):
        queries, keys, tokens = _place_both(joint, queries, keys, name)
        joint = joint.padded_to(tokens) if joint.cropped else joint
        rows: Tokens = queries
        columns: Tokens = keys
        real_queries = real_keys = None
    else:
        rows, real_queries = _find_tokens(queries, joint, name)
        columns, real_keys = _find_tokens(keys, joint, name)
        if bool((_as_mask(queries, joint) & _as_mask(keys, joint)).any()):
            raise ShapeError(f"The modalities of a JointSequence must not share tokens; two of '{name}' do.")
    key_mask = joint.padding_of_its_own
    of_queries = real_queries
    if key_mask is not None:
        tokens_of = [_take_tokens(key_mask, one, joint) for one in (queries, keys)]
        of_queries, key_mask = tokens_of[0] if real_queries is None else real_queries & tokens_of[0], tokens_of[1]
    if real_keys is not None:
        key_mask = real_keys if key_mask is None else real_keys & key_mask
    visible = None if joint.visible is None else pick(pick(_whole_axis(joint), rows, 2), columns, 3)
    if isinstance(joint.source, Scores):
        masks = [None if joint.key_mask is None else joint.key_mask[:, None, None]]
        masks += [] if joint.visible is None else [pick(joint.visible, rows, 2)]
        block_scores = replace(
            joint.source.take(rows, columns), whole_masks=tuple(mask for mask in masks if mask is not None)
        )
        return RecordedWeights(block_scores, key_mask, visible, is_packed=real_keys is not None, length=length)
    dtype = joint.source.dtype
    weights = pick(joint.source, rows, 2).to(torch.promote_types(dtype, torch.float32))
    block = pick(weights, columns, 3)
    if real_keys is not None:
        block = block * real_keys[:, None, None]
    cross_modal_mass = block.sum(-1)
    # Below this a sum is made of numbers with no precision left.
    crosses = cross_modal_mass > n_keys * torch.finfo(dtype).smallest_normal
    sound = (weights.sum(-1) - 1).abs() <= row_sum_tolerance(dtype)
    if of_queries is not None:
        sound = sound & of_queries[:, None]
    if key_mask is not None:  # a sample without the other modality has no share of attention on it
        sound = sound & key_mask.any(1)[:, None, None]
    crosses_somewhere = crosses[..., None].expand(block.shape)
    return RecordedWeights(
        block / torch.where(crosses, cross_modal_mass, 1)[..., None],
        key_mask,
        crosses_somewhere if visible is None else crosses_somewhere & visible,
        cross_modal_mass=torch.where(sound, cross_modal_mass, torch.nan),
        is_packed=real_keys is not None,
        length=length,
    )


def _whole_axis(joint: RecordedWeights) -> Tensor:
    """What a mask of all keys shows, with an axis for all keys."""
    assert joint.visible is not None
    return joint.visible.expand(*joint.visible.shape[:-1], joint.shape[3])


def _place_both(joint: RecordedWeights, queries: slice, keys: slice, name: str) -> tuple[slice, slice, int]:
    """Two spans, counted from the start of a sequence, and the number of tokens that they reach over."""
    spans = {"queries": (queries.start, queries.stop), "keys": (keys.start, keys.stop)}
    tokens = max(joint.shape[2], *map(_find_reach, spans.values()))
    try:
        places = _place_spans(spans, tokens)
    except SettingError as error:
        raise ShapeError(f"'{name}' has a sequence of {tokens} tokens. {error}") from None
    return places["queries"], places["keys"], max(places["queries"].stop, places["keys"].stop)


def _as_mask(tokens: Places, joint: RecordedWeights) -> Tensor:
    """Which tokens of each sample ``(batch, tokens)`` are at these places."""
    if isinstance(tokens, Tensor):
        return tokens.to(joint.device)
    mask = torch.zeros(joint.shape[::2], dtype=torch.bool, device=joint.device)
    mask[:, tokens] = True
    return mask


def _find_tokens(tokens: Places, joint: RecordedWeights, name: str) -> tuple[Tensor, Tensor]:
    """The places ``(batch, tokens)`` of each sample's tokens, and which of them are real."""
    mask = _as_mask(tokens, joint)
    if mask.shape != joint.shape[::2]:
        raise ShapeError(
            f"Expected a mask (batch, tokens) {tuple(joint.shape[::2])} of the sequence of '{name}' from the "
            f"callable of a JointSequence; got {tuple(mask.shape)}."
        )
    counts = mask.sum(1)
    most = max(1, int(counts.max()))  # where no sample has a token, one of them stands in as padding
    real = torch.arange(most, device=mask.device) < counts[:, None]
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :most], real


def _take_tokens(values: Tensor, tokens: Places, joint: RecordedWeights) -> Tensor:
    """Of ``(batch, tokens)`` those at these places."""
    return values[:, tokens] if isinstance(tokens, slice) else values.gather(1, _find_tokens(tokens, joint, "")[0])
