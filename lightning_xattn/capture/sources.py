"""The source of a layer's attention, and the settings that name it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_xattn.capture.joint import JointSequence
from lightning_xattn.core.attention import Direction
from lightning_xattn.core.errors import SettingError

ReadAttention = Callable[[nn.Module], Tensor | None]
"""Gets the model after a step and returns ``(batch, heads, queries, keys)`` weights, or None if there were none."""

Named = str | ReadAttention
"""A module's path; ``path#2``, the second attention that is computed in a step while it runs; ``path[item]``, an item
of what it returns; or a callable."""


@dataclass(frozen=True)
class Source:
    """Where the attention of one direction of a layer comes from."""

    path: str = ""
    """The module's path; a callable has none."""
    call: int | None = None
    """Which of those computed in a step while the module runs, from 1 on; None: there is one a run."""
    item: tuple[str | int, ...] = ()
    """What to take of what the module returns, key after key; empty: what is computed."""
    turn: int = 0
    turns: int = 1
    """The module runs ``turns`` times in a step, for one direction after the other; for this one in number ``turn``."""
    joint: JointSequence | None = None
    """The sequence in which the direction is a block."""
    read: ReadAttention | None = None
    """The callable."""

    @classmethod
    def parse(cls, named: Named) -> Source:
        """Read ``"path.to.module"``, ``"path#2"``, ``"path[item]..."`` or a callable.

        Raises
        ------
        SettingError
            If it is none of these.
        """
        if callable(named):
            return cls(read=named)
        matched = re.fullmatch(r"([^\[\]#]*)(?:#([1-9]\d*)|((?:\[[^\[\]]+\])*))", named) if named else None
        if matched is None:
            raise SettingError(
                "Expected a module path such as 'model.fusion', with 'model.fusion#2' for the second attention that it "
                "computes, or with an item of what it returns as in 'model.fusion[1]' or 'model.fusion[eeg_to_spec]'; "
                f"got '{named}'."
            )
        path, call, items = matched.groups()
        keys = [item.strip("'\" ") for item in re.findall(r"\[([^\[\]]+)\]", items or "")]
        item = tuple(int(key) if re.fullmatch(r"-?\d+", key) else key for key in keys)
        return cls(path, None if call is None else int(call), item)

    def __str__(self) -> str:
        if self.read is not None:
            return f"callable {getattr(self.read, '__qualname__', self.read)}"
        call = "" if self.call is None else f"#{self.call}"
        return f"{self.path}{call}" + "".join(f"[{item}]" for item in self.item)


@dataclass(frozen=True)
class Layer:
    """The directions that are compared with each other, each with its source."""

    name: str
    """The module path that its directions share."""
    sources: tuple[tuple[Direction, Source], ...]
    """One direction, or forward and backward."""


AttentionSetting = Mapping[str, Named | Sequence[Named]] | JointSequence
"""``{"eeg_to_spec": "model.fusion.eeg_to_spec_attn", ...}``; a sequence names several layers, ``{}`` none."""

SET_IT_ASIDE = "Or record no attention, but the rest: attention={}."
"""What to set where an attention cannot be used."""


def is_set_aside(attention: AttentionSetting | None) -> bool:
    """Whether the setting is that no attention is recorded."""
    return isinstance(attention, Mapping) and not attention


def as_tuple(value: Any) -> tuple[Any, ...]:
    """One name, or several, as a tuple."""
    return (value,) if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)


def check_attention(attention: AttentionSetting) -> None:
    """Refuse settings that do not name attention.

    Raises
    ------
    SettingError
        Saying what was expected.
    """
    if isinstance(attention, JointSequence):
        for path in attention.paths:
            Source.parse(path)
        return
    if is_set_aside(attention):
        return
    entries = attention if isinstance(attention, Mapping) else {}
    named = {direction: as_tuple(value) for direction, value in entries.items()}
    known = all(isinstance(name, str) or callable(name) for names in named.values() for name in names)
    if not named or not all(named.values()) or not known:
        raise SettingError(
            "attention must map directions to module paths, e.g. {'eeg_to_spec': 'model.fusion.a', 'spec_to_eeg': "
            "'model.fusion.b'}, to lists of paths for several layers, or to callables; or be a JointSequence; or {}, "
            f"which is none; got {attention!r}."
        )
    sources = {Direction.parse(name): names for name, names in named.items()}
    for direction, there in sources.items():
        for name in there:
            Source.parse(name)
        if len(set(there)) < len(there):
            raise SettingError(f"attention names a module twice for {direction}: {list(there)!r}.")
        back = sources.get(direction.opposite, there)
        if len(back) != len(there):
            raise SettingError(
                f"attention names {len(there)} layer(s) for {direction} and {len(back)} for {direction.opposite}; "
                "the two must pair up one by one."
            )
