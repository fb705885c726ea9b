"""One direction's attention, the pair of directions of a layer, and the axes of their tokens.

One axis order everywhere: ``(batch, heads, queries, keys)``. A *direction* is named ``<query>_to_<key>``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from math import inf
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.core.names import shown
from lightning_xattn.core.scores import Scores


def row_sum_tolerance(dtype: torch.dtype) -> float:
    """How far from 1 the weights of a row may sum up: half precision keeps a sum only up to its rounding."""
    return max(1e-3, 4 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 0)


@dataclass(frozen=True)
class Direction:
    """Which modality's tokens are the queries and which one's the keys, e.g. ``eeg_to_spec``.

    Raises
    ------
    SettingError
        If these are not two different names, or one contains ``_to_`` or a slash.

    Examples
    --------
    >>> Direction.parse("eeg_to_spec").opposite
    Direction(query='spec', key='eeg')
    """

    query: str
    key: str

    def __post_init__(self) -> None:
        names = self.query, self.key
        # A slash separates the parts of a curve's name, and a layer from its direction.
        if not all(names) or self.query == self.key or any(part in name for name in names for part in ("_to_", "/")):
            raise self._misnamed(str(self))

    @classmethod
    def parse(cls, name: str) -> Direction:
        """Read ``<query>_to_<key>``; raises a SettingError if it is not of this form."""
        query, separator, key = name.partition("_to_")
        if not separator:
            raise cls._misnamed(name)
        return cls(query, key)

    @staticmethod
    def _misnamed(name: str) -> SettingError:
        return SettingError(
            "A direction is named '<query>_to_<key>' after two different modalities, whose names hold neither '_to_' "
            f"nor '/', e.g. 'eeg_to_spec'; got '{name}'."
        )

    @property
    def opposite(self) -> Direction:
        """The direction that asks the other way round."""
        return Direction(self.key, self.query)

    def __str__(self) -> str:
        return f"{self.query}_to_{self.key}"


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention weights of one direction of one layer, with the masks that were in force.

    Parameters
    ----------
    direction
        Who asks whom.
    source
        Weights ``(batch, heads, queries, keys)``, rows sum to 1, any floating dtype, before dropout; or the scores that
        they are computed from.
    key_mask
        ``(batch, keys)`` bool, True where the key is a real token (key padding); None: all are.
    visible
        Bool, broadcastable to ``weights``, True where the attention mask lets the query see the key; None: everywhere.
    query_mask
        ``(batch, queries)`` bool, True where the query is a real token; None: all are.
    extra_keys
        How many of the last keys are no tokens but learned or zero slots (``add_bias_kv``, ``add_zero_attn``).
    cross_modal_mass
        ``(batch, heads, queries)`` in [0, 1]: where the weights are a block of a joint self-attention, scaled to sum to
        1, what they summed to before, NaN for a row that is no attention; None: they are no such block.
    is_packed
        Whether the keys of each sample stand before its padding, wherever they are in its sequence.

    Raises
    ------
    ShapeError
        If ``weights`` does not have four axes or a mask does not fit it.

    Examples
    --------
    >>> attention = Attention(Direction("eeg", "spec"), torch.full((4, 8, 9, 119), 1 / 119))
    >>> attention
    Attention(eeg_to_spec: 4 samples, 8 heads, 9 queries, 119 keys)
    >>> attention.token_counts
    {'eeg': 9, 'spec': 119}
    """

    direction: Direction
    source: Tensor | Scores
    key_mask: Tensor | None = None
    visible: Tensor | None = None
    query_mask: Tensor | None = None
    extra_keys: int = 0
    cross_modal_mass: Tensor | None = None
    is_packed: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) != 4:
            raise ShapeError(
                f"Attention of {self.direction} must be (batch, heads, queries, keys); got shape {tuple(self.shape)}."
            )
        batch, heads, queries, keys = self.shape
        for name, mask, expected in (
            ("key_mask", self.key_mask, (batch, keys)),
            ("query_mask", self.query_mask, (batch, queries)),
            ("cross_modal_mass", self.cross_modal_mass, (batch, heads, queries)),
        ):
            if mask is not None and tuple(mask.shape) != expected:
                raise ShapeError(
                    f"{name} of {self.direction} must have shape {expected} to go with weights of shape "
                    f"{tuple(self.shape)}; got {tuple(mask.shape)}."
                )

    def __repr__(self) -> str:
        samples, heads, queries, keys = self.shape
        masks = [name for name in ("key_mask", "visible", "query_mask") if getattr(self, name) is not None]
        masked = f"; {', '.join(masks)}" if masks else ""
        return f"Attention({self.direction}: {samples} samples, {heads} heads, {queries} queries, {keys} keys{masked})"

    def __getitem__(self, samples: slice) -> Attention:
        """The attention of some of the samples."""
        # What is one for all samples, such as an attention mask, stays.
        return self._map_tensors(lambda one: one if len(one) == 1 < len(self) else one[samples])

    def __len__(self) -> int:
        return self.shape[0]

    def cpu(self) -> Attention:
        """The same, detached and on the CPU."""
        return self._map_tensors(lambda one: one.detach().cpu())

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> Attention:
        changed: dict[str, Any] = {
            field.name: value.map_tensors(change) if isinstance(value, Scores) else change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), (Tensor, Scores))
        }
        return replace(self, **changed)

    @property
    def shape(self) -> torch.Size:
        """``(batch, heads, queries, keys)``."""
        return self.source.shape

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.source.device

    @property
    def is_block(self) -> bool:
        """Whether it is a block of a joint self-attention, so that some of a query's attention goes elsewhere."""
        return self.cross_modal_mass is not None or (isinstance(self.source, Scores) and self.source.whole is not None)

    @cached_property
    def weights(self) -> Tensor:
        """``(batch, heads, queries, keys)``, rows sum to 1. Computed from scores it takes much memory, and is kept."""
        if isinstance(self.source, Tensor):
            return self.source
        return self.source.weights(self.visible_to())

    def visible_to(self, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor | None:
        """Which keys these queries can see, whatever mask hides some.

        Returns
        -------
        Tensor or None
            Bool, broadcastable to the weights, with as many keys as are asked for; None: no mask hides any.
        """
        visible = self.visible
        if visible is not None:
            visible = visible[(None,) * (4 - visible.dim())]
            visible = visible.expand(*visible.shape[:-1], self.shape[3])[..., keys]
            visible = visible if visible.shape[2] == 1 else visible[:, :, queries]
        masks = [None if self.key_mask is None else self.key_mask[:, None, None, keys]]
        masks += [self.source.visible(queries, keys)] if isinstance(self.source, Scores) else []
        for mask in masks:
            if mask is not None:
                visible = mask if visible is None else visible & mask
        return visible

    @classmethod
    def of_weights(cls, direction: Direction, weights: Tensor) -> Attention:
        """Attention of weights alone, in which NaN marks what a mask hides (see ``marked_weights``)."""
        hidden = weights.isnan()
        return cls(direction, weights.masked_fill(hidden, 0), visible=~hidden)

    @property
    def marked_weights(self) -> Tensor:
        """The weights, with NaN where a mask hides the key or the query is padding."""
        weights, visible = self.weights, self.visible_to()
        if visible is not None:
            weights = weights.masked_fill(~visible, torch.nan)
        if self.query_mask is not None:
            weights = weights.masked_fill(~self.query_mask[:, None, :, None], torch.nan)
        return weights

    @property
    def tokens(self) -> int:
        """Number of keys that are tokens."""
        return self.shape[3] - self.extra_keys

    @property
    def token_counts(self) -> dict[str, int]:
        """Number of tokens of each modality, that of the queries first."""
        return {self.direction.query: self.shape[2], self.direction.key: self.tokens}


@dataclass(frozen=True, eq=False)
class AttentionPair:
    """One layer's attention in both directions (or in one, when the model has only one).

    Parameters
    ----------
    layer
        Name of the layer, unique within a model.
    forward, backward
        The two directions; ``backward.direction`` is the opposite of ``forward.direction``.

    Raises
    ------
    ShapeError
        If the queries of one direction are not the keys of the other.

    Examples
    --------
    >>> there = Attention(Direction("eeg", "spec"), torch.full((4, 8, 9, 119), 1 / 119))
    >>> back = Attention(Direction("spec", "eeg"), torch.full((4, 8, 119, 9), 1 / 9))
    >>> [str(one.direction) for one in AttentionPair("fusion", there, back).directions]
    ['eeg_to_spec', 'spec_to_eeg']
    """

    layer: str
    forward: Attention
    backward: Attention | None = None

    def __post_init__(self) -> None:
        if self.backward is None:
            return
        there, back = self.forward, self.backward
        if back.direction != there.direction.opposite:
            raise ShapeError(
                f"Layer '{self.layer}' pairs {there.direction} with {back.direction}; "
                f"expected {there.direction.opposite}."
            )
        expected = (len(there), there.tokens, there.shape[2])
        got = (len(back), back.shape[2], back.tokens)
        if got != expected:
            raise ShapeError(
                f"Layer '{self.layer}': {there.direction} has weights of shape {tuple(there.shape)}, so "
                f"{back.direction} must be (batch={expected[0]}, heads, queries={expected[1]}, keys={expected[2]}); "
                f"got {tuple(back.shape)}. Where some keys are no tokens, such as a null key, name one "
                "direction alone: its entropy needs no pair."
            )

    def __repr__(self) -> str:
        return f"AttentionPair('{self.layer}', {', '.join(map(repr, self.directions))})"

    def __getitem__(self, samples: slice) -> AttentionPair:
        """The attention of some of the samples."""
        return AttentionPair(self.layer, *(attention[samples] for attention in self.directions))

    def cpu(self) -> AttentionPair:
        """The same, detached and on the CPU."""
        return AttentionPair(self.layer, *(attention.cpu() for attention in self.directions))

    def renamed(self, names: Mapping[Direction, Direction]) -> AttentionPair:
        """The same with other names of directions."""
        directions = (replace(one, direction=names.get(one.direction, one.direction)) for one in self.directions)
        return AttentionPair(rename_layer(self.layer, names), *directions)

    @property
    def directions(self) -> tuple[Attention, ...]:
        """The recorded directions, forward first."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)


def rename_layer(layer: str, names: Mapping[Direction, Direction]) -> str:
    """The name of a layer that is called after a direction, with another name of that."""
    *before, last = layer.split(".")
    new = next((str(new) for old, new in names.items() if str(old) == last), last)
    return ".".join([*before, new])


def mask_queries(pairs: Sequence[AttentionPair], mask: Tensor | None) -> tuple[AttentionPair, ...]:
    """The same, with a mask ``(batch, queries)`` of the modality whose queries the first unpaired direction has.

    Raises
    ------
    ShapeError
        If the mask does not fit.
    """
    alone = [pair.forward.direction.query for pair in pairs if pair.backward is None]
    return tuple(
        replace(pair, forward=replace(pair.forward, query_mask=mask))
        if mask is not None and pair.backward is None and pair.forward.direction.query == alone[0]
        else pair
        for pair in pairs
    )


def mask_absent(pairs: Sequence[AttentionPair], present: Mapping[str, Tensor]) -> tuple[AttentionPair, ...]:
    """The same, where all tokens of a modality are masked in the samples that lack it.

    Parameters
    ----------
    pairs
        Of each layer.
    present
        By modality ``(batch,)`` bool, True for a sample that has it.
    """

    def mask(one: Attention) -> Attention:
        asks, asked = present.get(one.direction.query), present.get(one.direction.key)
        if asks is None and asked is None:
            return one
        batch, _, queries, keys = one.shape
        masks: dict[str, Tensor | None] = {"query_mask": one.query_mask, "key_mask": one.key_mask}
        for name, there, tokens in (("query_mask", asks, queries), ("key_mask", asked, keys)):
            if there is not None:
                whole, old = there[:, None].expand(batch, tokens), masks[name]
                masks[name] = whole if old is None else old & whole
        mass = one.cross_modal_mass
        if mass is not None and asked is not None:
            mass = mass.masked_fill(~asked[:, None, None], torch.nan)
        return replace(one, cross_modal_mass=mass, query_mask=masks["query_mask"], key_mask=masks["key_mask"])

    return tuple(AttentionPair(pair.layer, *map(mask, pair.directions)) for pair in pairs)


@dataclass(frozen=True)
class TokenAxis:
    """The names or places of one modality's tokens, with which a figure labels them.

    Parameters
    ----------
    title
        Axis title with its unit, e.g. ``"EEG window (s from the labelled moment)"``.
    spans
        ``(start, stop)`` of each token in the title's unit, ascending; for tokens along a continuous axis.
    names
        A name for each token; for tokens without an order, such as regions.

    Raises
    ------
    SettingError
        Unless exactly one of ``spans`` and ``names`` is given, with something for each token.

    Examples
    --------
    >>> axis = TokenAxis("EEG window (s)", spans=[(0, 10), (5, 15), (10, 20)])
    >>> axis.place(1)
    '5 to 15'
    """

    title: str
    spans: Sequence[tuple[float, float]] | None = None
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        given = self.spans if self.names is None else self.names
        is_fitting = _ascend(given) if self.names is None else _are_names(given)
        if (self.spans is None) == (self.names is None) or not isinstance(self.title, str) or not is_fitting:
            raise SettingError(
                f"TokenAxis {self.title!r} needs a title, and either (start, stop) of each token, start below stop and "
                "no token before its predecessor, as TokenAxis('EEG window (s)', spans=[(0, 10), (5, 15)]), or a name "
                f"for each token, as names=['left', 'right']; got spans={self.spans!r}, names={self.names!r}."
            )
        # Both are there to be shown, and the names often come from data.
        object.__setattr__(self, "title", shown(self.title))
        if self.names is not None:
            object.__setattr__(self, "names", [*map(shown, self.names)])

    def __repr__(self) -> str:
        places = [self.place(token) for token in range(len(self))]
        shown = places if len(places) <= 3 else [places[0], "...", places[-1]]
        return f"TokenAxis('{self.title}', {len(self)} tokens: {', '.join(shown)})"

    def __len__(self) -> int:
        tokens = self.spans if self.names is None else self.names
        assert tokens is not None
        return len(tokens)

    def place(self, token: int) -> str:
        """A token's name, or its span in words, such as ``"20 to 30"``."""
        if self.names is not None:
            return self.names[token]
        assert self.spans is not None
        start, stop = self.spans[token]
        return f"{start:g} to {stop:g}"


def _ascend(spans: Any) -> bool:
    """Whether each is a pair of finite numbers, the first below the second, and none begins before its predecessor."""
    try:
        pairs = [(float(start), float(stop)) for start, stop in spans]
    except (TypeError, ValueError):
        return False
    inside = all(-inf < start < stop < inf for start, stop in pairs)
    return len(pairs) > 0 and inside and all(one <= other for (one, _), (other, _) in pairwise(pairs))


def _are_names(names: Any) -> bool:
    ordered = isinstance(names, Collection) and not isinstance(names, (str, Mapping, Set))
    return ordered and len(names) > 0 and all(isinstance(name, str) and name for name in names)


def fitting_axes(axes: Mapping[str, TokenAxis], counts: Mapping[str, int]) -> dict[str, TokenAxis]:
    """The axes with as many tokens as their modality has; a model may pool or group what the data have."""
    return {name: axes[name] for name, count in counts.items() if name in axes and len(axes[name]) == count}
