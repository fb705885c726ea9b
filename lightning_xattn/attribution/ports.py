"""Where a modality can be taken out of a run and another sample's put in: outputs of modules, arguments, inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_xattn.capture.calls import Call, Path
from lightning_xattn.capture.tensors import is_plain
from lightning_xattn.core.errors import SettingError

Named = int | str
"""A module's path, a key of the batch, or of a fusion that is named an argument's position or name."""

ModalitiesSetting = Mapping[str, Named | Sequence[Named]]
"""What holds each modality, e.g. ``{"audio": "audio_encoder", "text": ["tokens", "text_encoder"]}``: paths of modules,
items of what they return (``"encoder[0]"``), their second call (``"encoder#2"``), keys of the batch. With a fusion that
is named: positions or names of its arguments, of which the first holds the tokens and others, such as their mask, go
with them."""

Key = tuple[str, int]
"""A module's path and the number of its call within what runs again, from 0 on."""

Column = tuple[str, int]
"""A modality and the number of its tensor in ``Modality.places``, or from -1 downwards in ``Modality.features``; of
further inputs the modality is ""."""

RESERVED_MODALITIES = ("share", "size", "interaction", "emap_accuracy", "joint")
"""What stands beside the modalities in curves and columns, which no modality may be called."""

LOWEST_SHOWN = -1000.0
"""What is added to logits and lies below this hides a token."""

MOST_MODALITIES = 4
"""All subsets of this many modalities can be run."""


def check_modalities(fusion: str | None, modalities: ModalitiesSetting | None) -> None:
    """Refuse settings that do not name modalities.

    Raises
    ------
    SettingError
        Saying what was expected.
    """
    if fusion is None and modalities is None:
        return
    entries = {name: as_tuple(value) for name, value in modalities.items()} if isinstance(modalities, Mapping) else {}
    places = [place for several in entries.values() for place in several]
    kinds = (str,) if fusion is None else (int, str)
    are_names = all(isinstance(place, kinds) and not isinstance(place, bool) and place != "" for place in places)
    is_usable = fusion is None or isinstance(fusion, str)
    is_usable &= 2 <= len(entries) <= MOST_MODALITIES and are_names and len(set(places)) == len(places)
    if not is_usable or not all(is_modality_name(name) and several for name, several in entries.items()):
        raise SettingError(
            f"modalities must map 2 to {MOST_MODALITIES} modalities to paths of modules or keys of the batch, each "
            "once, e.g. modalities={'audio': 'audio_encoder', 'text': ['tokens', 'text_encoder']}; or to positions or "
            "names of the arguments of a fusion, each once, e.g. fusion='path.to.module', modalities={'<a>': 0, '<b>': "
            "1} or {'<a>': ('x', 'x_mask'), '<b>': 'y'}. A modality's name has no '/' and no space, and is none of "
            f"{', '.join(RESERVED_MODALITIES)}. Got fusion={fusion!r}, modalities={modalities!r}."
        )


def is_modality_name(name: Any) -> bool:
    """Whether a modality may have this name in curves and columns."""
    return isinstance(name, str) and bool(re.fullmatch(r"[^/\s]+", name)) and name not in RESERVED_MODALITIES


def as_tuple(named: Named | Sequence[Named]) -> tuple[Named, ...]:
    """One name, or several, as a tuple."""
    return (named,) if isinstance(named, (int, str)) or not isinstance(named, Sequence) else tuple(named)


@dataclass(frozen=True)
class TokenMask:
    """An argument that marks which tokens are real and which are padding.

    Attributes
    ----------
    where, label
        Where it is in the call, and its name.
    hidden
        Whether True stands for padding, as in torch's ``key_padding_mask``; else for a real token.
    """

    where: Path
    label: str
    hidden: bool

    def real(self, values: Tensor) -> Tensor:
        """``values`` as bool, True for real tokens."""
        if not values.is_floating_point():
            return ~values.bool() if self.hidden else values.bool()
        # Added to the logits it is below 0 where a token is padding; else it is 1 where a mask of bools is True.
        real = values <= 0 if self.hidden else torch.where((values > 0).any(), values > 0, True)
        return torch.where((values < 0).any(), values >= 0, real)


class Place(NamedTuple):
    """A tensor that a run hands on, in whose place that of other samples can be put.

    Attributes
    ----------
    kind
        "output" of a module's call, "argument" of it, or "input" of what runs.
    path, turn
        The module's path, and the number of its call within what runs, from 0 on; "" and 0 of an input.
    where, axis
        Where the tensor is, and its axis of the samples.
    """

    kind: str
    path: str
    turn: int
    where: Path
    axis: int

    @property
    def key(self) -> Key:
        """The module's path and the number of its call."""
        return self.path, self.turn


@dataclass(frozen=True, eq=False)
class Modality:
    """A modality in a run.

    Attributes
    ----------
    places
        All that is permuted between samples.
    source
        What holds it, as a user would write it in ``modalities=``.
    mask
        An argument that marks its padding; None: the attention's mask does, or nothing.
    features
        What linear probes get, with its mask; empty: ``places``, of which they get the first.
    permuted
        The inputs that are permuted instead of what holds it, as a user would name them; "" if none are.
    """

    name: str
    places: tuple[Place, ...]
    source: str
    mask: TokenMask | None = None
    features: tuple[Place, ...] = ()
    permuted: str = ""

    def __str__(self) -> str:
        return f"{self.name} = {self.source}" + (f" (permuted: {self.permuted})" if self.permuted else "")


class LeftOutError(Exception):
    """Why the modalities of a step are not recorded, as the end of a sentence; those of another one may be."""


def find_mask(
    labels: Mapping[Path, str], tensors: Mapping[Path, Tensor], shape: torch.Size, real: Tensor | None
) -> TokenMask | None:
    """The mask among a modality's other arguments; None without one. Looks at the values.

    Positions, times and types of tokens have a mask's shape, too. A mask has a mask's values, and hides the tokens that
    the attention hides. Where no attention is known, or nothing is hidden, it is named as a mask or is bool.
    """
    for where, label in labels.items():
        values = tensors[where]
        if values.numel() != shape.numel() or not is_plain(values) or not _may_be_mask(values):
            continue
        values = values.reshape(shape)
        called = values.dtype == torch.bool or any(word in label.lower() for word in ("mask", "pad", "valid"))
        by_name = "pad" in label.lower()
        if real is None:
            if called:
                return TokenMask(where, label, by_name)
            continue
        for hidden in (by_name, not by_name):
            mask = TokenMask(where, label, hidden)
            if mask.real(values).equal(real) and (called or not real.all()):
                return mask
    return None


def _may_be_mask(values: Tensor) -> bool:
    """Whether all are 0 or 1, or 0 or so far below that a softmax hides them."""
    return bool(((values == 0) | (values == 1)).all() or ((values == 0) | (values < LOWEST_SHOWN)).all())


def is_absent(call: Call, name: Named) -> bool:
    """Whether an argument is None in this call."""
    if isinstance(name, int):
        return 0 <= name < len(call.args) and call.args[name] is None
    return name in call.kwargs and call.kwargs[name] is None
