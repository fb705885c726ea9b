"""Where the attention of a layer is computed: modules, what to take of them, and the settings that name them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from lightning_xattn.attention import Direction
from lightning_xattn.errors import SettingError

ReadAttention = Callable[[nn.Module], Tensor | None]
"""Gets the model after a step and returns ``(batch, heads, queries, keys)`` weights, or None if there were none."""

Named = str | ReadAttention
"""A module's path, with ``[item]`` behind it for an item of what the module returns; or a callable."""


@dataclass(frozen=True)
class Source:
    """Where one direction of a layer comes from.

    Parameters
    ----------
    path
        The module's path; a callable has none.
    item
        What to take of what the module returns, key after key; empty: what it computes.
    turn, turns
        The module runs ``turns`` times in a step, for one direction after the other; this one is computed in the run
        with number ``turn``.
    block
        Queries and keys of the direction within a joint sequence; None: all.
    read
        The callable.
    """

    path: str = ""
    item: tuple[str | int, ...] = ()
    turn: int = 0
    turns: int = 1
    block: tuple[slice, slice] | None = None
    read: ReadAttention | None = None

    @classmethod
    def parse(cls, named: Named) -> Source:
        """Read ``"path.to.module"``, ``"path.to.module[item]..."`` or a callable.

        Raises
        ------
        SettingError
            If it is neither.
        """
        if callable(named):
            return cls(read=named)
        matched = re.fullmatch(r"([^\[\]]+)((?:\[[^\[\]]+\])*)", named)
        if matched is None:
            raise SettingError(
                f"Expected a module path such as 'model.fusion', with an item of what it returns as in "
                f"'model.fusion[1]' or 'model.fusion[eeg_to_spec]'; got '{named}'."
            )
        items = [item.strip("'\" ") for item in re.findall(r"\[([^\[\]]+)\]", matched[2])]
        return cls(matched[1], tuple(int(item) if re.fullmatch(r"-?\d+", item) else item for item in items))

    def __str__(self) -> str:
        if self.read is not None:
            return f"callable {getattr(self.read, '__qualname__', self.read)}"
        return self.path + "".join(f"[{item}]" for item in self.item)


@dataclass(frozen=True)
class LayerSites:
    """Where the attention of one layer is computed.

    Parameters
    ----------
    layer
        The layer's name: the module path that its directions share.
    forward, backward
        A direction and its source; ``backward`` is None when there is only one.
    """

    layer: str
    forward: tuple[Direction, Source]
    backward: tuple[Direction, Source] | None = None

    @property
    def sites(self) -> tuple[tuple[Direction, Source], ...]:
        """The directions that exist, forward first."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)


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
        For each modality the place of its tokens in the sequence, ``(start, stop)`` as in a slice; a stop of None is
        the end. Tokens that are in no span, such as a class token, belong to no modality.

    Raises
    ------
    SettingError
        If there are fewer than two modalities, or their spans are empty or overlap.

    Examples
    --------
    >>> JointSequence("encoder", spans={"eeg": (0, 9), "spec": (9, 128)})
    """

    attention: str | Sequence[str]
    spans: Mapping[str, tuple[int, int | None]]

    def __post_init__(self) -> None:
        names = list(self.spans) if isinstance(self.spans, Mapping) else []
        if len(names) < 2:
            raise SettingError(
                "JointSequence needs the spans of at least two modalities, e.g. "
                f"{{'eeg': (0, 9), 'spec': (9, 128)}}; got {self.spans!r}."
            )
        if not self.paths or not all(isinstance(path, str) for path in self.paths):
            raise SettingError(f"JointSequence needs a module path or a list of them; got {self.attention!r}.")
        for first, second in pairwise(names):
            Direction.parse(f"{first}_to_{second}")
        end: int | None = 0
        for name, span in sorted(self.spans.items(), key=lambda item: _start(*item)):
            start, stop = span
            if end is None or start < end or not (stop is None or stop > start):
                raise SettingError(
                    f"The spans of a JointSequence must hold tokens and not overlap; that of '{name}' does not: "
                    f"{dict(self.spans)}."
                )
            end = stop

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the layers."""
        return as_names(self.attention)

    def slice_of(self, modality: str) -> slice:
        """The place of a modality's tokens."""
        return slice(*self.spans[modality])


def _start(name: str, span: Any) -> int:
    whole = isinstance(span, tuple) and len(span) == 2 and isinstance(span[0], int) and isinstance(span[1], int | None)
    if not whole or span[0] < 0:
        raise SettingError(f"The span of '{name}' must be (start, stop) with start >= 0; got {span!r}.")
    return int(span[0])


AttentionSetting = Mapping[str, Named | Sequence[Named]] | JointSequence
"""``{"eeg_to_spec": "model.fusion.eeg_to_spec_attn", ...}``; a sequence names several layers."""


def as_names(value: Any) -> tuple[Any, ...]:
    """One name, or several, as a tuple."""
    return (value,) if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)


def check_attention(attention: AttentionSetting) -> None:
    """Refuse what does not say where the attention is.

    Raises
    ------
    SettingError
        Saying what was expected.
    """
    if isinstance(attention, JointSequence):
        return
    entries = list(attention.items()) if isinstance(attention, Mapping) else []
    several = [as_names(value) for _, value in entries]
    known = all(isinstance(name, str) or callable(name) for names in several for name in names)
    if not entries or not all(several) or not known:
        raise SettingError(
            "attention must map directions to module paths, e.g. {'eeg_to_spec': 'model.fusion.a', 'spec_to_eeg': "
            "'model.fusion.b'}, to lists of paths for several layers, or to callables; or be a JointSequence; got "
            f"{attention!r}."
        )
    sources = {Direction.parse(name): names for (name, _), names in zip(entries, several, strict=True)}
    for direction, there in sources.items():
        for named in there:
            Source.parse(named)
        if len(set(there)) < len(there):
            raise SettingError(f"attention names a module twice for {direction}: {list(there)!r}.")
        back = sources.get(direction.opposite, there)
        if len(back) != len(there):
            raise SettingError(
                f"attention names {len(there)} layer(s) for {direction} and {len(back)} for {direction.opposite}; "
                "the two must pair up one by one."
            )
