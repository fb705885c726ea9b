"""Where the modalities enter the fusion: which module, and which of its arguments hold which modality."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_xattn.capture.calls import Call, Path, name_argument
from lightning_xattn.capture.tensors import is_plain
from lightning_xattn.core.errors import DiscoveryError, SettingError, ShapeError

Named = int | str
"""An argument of the fusion: its position, or its name, or a key in a dict of tokens."""

ModalitiesSetting = Mapping[str, Named | Sequence[Named]]
"""The argument that holds each modality's tokens, e.g. ``{"eeg": 0, "spec": 1}``. Of several the first holds them, and
the others, such as their mask, go with them."""

RESERVED_MODALITIES = ("share", "size", "followed", "interaction", "emap_accuracy")
"""What stands beside the modalities in curves and columns, which no modality may be called."""

LOWEST_SHOWN = -1000.0
"""What is added to logits and lies below this hides a token."""

MOST_MODALITIES = 4
"""All subsets of this many modalities can be run."""


def check_fusion(fusion: str | None, modalities: ModalitiesSetting | None) -> None:
    """Refuse settings that do not name a fusion and its arguments.

    Raises
    ------
    SettingError
        Saying what was expected.
    """
    if fusion is not None and not isinstance(fusion, str):
        raise SettingError(f"fusion must be a module's path such as 'model.fusion', or None; got {fusion!r}.")
    if modalities is None:
        return
    entries = {name: as_tuple(value) for name, value in modalities.items()} if isinstance(modalities, Mapping) else {}
    places = [place for several in entries.values() for place in several]
    usable = all(
        isinstance(name, str) and re.fullmatch(r"[^/\s]+", name) and name not in RESERVED_MODALITIES and several
        for name, several in entries.items()
    ) and all(isinstance(place, (int, str)) and not isinstance(place, bool) for place in places)
    if not 2 <= len(entries) <= MOST_MODALITIES or not usable or len(set(places)) < len(places):
        raise SettingError(
            f"modalities must map 2 to {MOST_MODALITIES} modalities to positions or names of the fusion's arguments "
            "that hold their tokens, each argument once, e.g. {'eeg': 0, 'spec': 1} or {'eeg': ('eeg', 'eeg_mask'), "
            "'spec': 'spec'}. A modality's name has no '/' and no space, and is none of "
            f"{', '.join(RESERVED_MODALITIES)}. Got {modalities!r}."
        )
    if fusion is None:
        raise SettingError(
            f"modalities names arguments of a fusion: name the fusion too, fusion='path.to.module'. Got {modalities!r}."
        )


def as_tuple(named: Named | Sequence[Named]) -> tuple[Named, ...]:
    """One argument, or several, as a tuple."""
    return (named,) if isinstance(named, (int, str)) or not isinstance(named, Sequence) else tuple(named)


@dataclass(frozen=True)
class TokenMask:
    """An argument that marks which tokens are real and which are padding."""

    path: Path
    label: str
    hidden: bool
    """Whether True stands for padding, as in torch's ``key_padding_mask``; else for a real token."""

    def __str__(self) -> str:
        return f"'{self.label}', True for {'padding' if self.hidden else 'a real token'}"

    def real(self, values: Tensor) -> Tensor:
        """``values`` as bool, True for real tokens."""
        if not values.is_floating_point():
            return ~values.bool() if self.hidden else values.bool()
        # Added to the logits it is below 0 where a token is padding; else it is 1 where a mask of bools is True.
        real = values <= 0 if self.hidden else torch.where((values > 0).any(), values > 0, True)
        return torch.where((values < 0).any(), values >= 0, real)


@dataclass(frozen=True)
class ModalityPlace:
    """One modality among a module's arguments."""

    tokens: tuple[Path, ...]
    """Where its tokens are: more than once where they are keys and values."""
    axis: int
    """Which axis of the tokens is that of the samples, 0 or 1."""
    others: Mapping[Path, int]
    """What goes with them, such as their mask, each with the axis of the samples."""
    mask: TokenMask | None
    """Which of these marks the padding; None: none does."""

    @property
    def axes(self) -> dict[Path, int]:
        """All that is permuted with the modality, with the axis of the samples."""
        return dict.fromkeys(self.tokens, self.axis) | dict(self.others)

    @property
    def kept(self) -> dict[Path, int]:
        """What is kept to be permuted: the tokens once, wherever they stand."""
        return {self.tokens[0]: self.axis, **self.others}


@dataclass(frozen=True)
class FusionInputs:
    """A fusion and the places of its modalities."""

    path: str
    places: Mapping[str, ModalityPlace]

    def __str__(self) -> str:
        return f"'{self.path}'" if self.path else "the model's own forward"

    @property
    def axes(self) -> dict[Path, int]:
        """All that is permuted, with the axis of the samples."""
        return {path: axis for place in self.places.values() for path, axis in place.axes.items()}

    def tokens(self, call: Call, modality: str) -> tuple[Tensor, Tensor | None]:
        """A modality's tokens, ``(batch, tokens, width)`` or ``(batch, width)``, and its mask, True for real ones.

        Raises
        ------
        ShapeError
            If the mask does not hold one value for each token, as it did in the call that it was found in.
        """
        place = self.places[modality]
        tokens = call[place.tokens[0]].transpose(0, place.axis)
        if place.mask is None:
            return tokens, None
        mask, expected = call[place.mask.path], tokens.shape[:2]
        if mask.numel() != expected.numel():
            raise ShapeError(
                f"'{place.mask.label}' is {tuple(mask.shape)} and no mask of the {tuple(expected)} tokens of {modality}"
            )
        return tokens, place.mask.real(mask.reshape(expected))


class AbsentArgumentError(Exception):
    """An argument of the fusion is None in this call, and may not be in another."""


def find_named_inputs(
    module: nn.Module, path: str, modalities: ModalitiesSetting, call: Call, real: Mapping[str, Tensor]
) -> FusionInputs:
    """The fusion and its modalities as the settings name them.

    Parameters
    ----------
    module, path, call
        The fusion, where it is, and what it was called with.
    modalities
        Which of its arguments hold which modality.
    real
        Of some modalities the tokens that the attention takes as real, ``(batch, tokens)``.

    Raises
    ------
    AbsentArgumentError
        If an argument is None.
    DiscoveryError
        If an argument is not there, is no float tensor, or holds another number of samples than the others.
    """
    tensors = dict(call.tensors())
    labels = {where: name_argument(module, where) for where in tensors}

    def find(name: Named) -> Path:
        found = [
            where
            for where, label in labels.items()
            if (where[0] == name and len(where) == 1 if isinstance(name, int) else name in (label, where[-1]))
        ]
        if not found and _is_none(call, name):
            raise AbsentArgumentError(f"no {name!r}")
        if len(found) != 1:
            known = ", ".join(f"{where[0]!r} ({label}): {_shape(tensors[where])}" for where, label in labels.items())
            raise DiscoveryError(
                f"modalities names argument {name!r} of the fusion '{path}', which has "
                f"{'no such tensor' if not found else f'{len(found)} of them'} in this call; it has {known or 'none'}."
            )
        return found[0]

    found = {name: [find(place) for place in as_tuple(several)] for name, several in modalities.items()}
    shapes = {name: tensors[first].shape for name, (first, *_) in found.items()}
    if not all(tensors[first].is_floating_point() and tensors[first].dim() in (2, 3) for first, *_ in found.values()):
        got = ", ".join(f"{name} {_shape(tensors[first])}" for name, (first, *_) in found.items())
        raise DiscoveryError(
            f"Expected tokens (batch, tokens, width) or (batch, width) of each modality in '{path}'; got {got}."
        )
    axis = _batch_axis(list(shapes.values()))
    if axis is None:
        got = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise DiscoveryError(f"Expected the same number of samples of each modality in '{path}'; got {got}.")
    samples = next(iter(shapes.values()))[axis]
    places = {}
    for name, (first, *others) in found.items():
        shape = tensors[first].transpose(0, axis).shape[:2]
        places[name] = _make_place(
            tensors, labels, (first, axis), others, torch.Size((samples, shape[1])), real.get(name)
        )
    return FusionInputs(path, places)


def _make_place(
    tensors: Mapping[Path, Tensor],
    labels: Mapping[Path, str],
    tokens: tuple[Path, int],
    others: Sequence[Path],
    shape: torch.Size,
    real: Tensor | None,
) -> ModalityPlace:
    """The place of a modality whose tokens (and the axis of their samples) and other arguments are known."""
    first, axis = tokens
    same = [
        other for other, tensor in tensors.items() if other != first and tensor is tensors[first]
    ]  # keys and values
    axes = {other: 0 if tensors[other].shape[:1] == shape[:1] else 1 for other in others}
    mask = _find_mask({other: labels[other] for other in others}, tensors, shape, real)
    return ModalityPlace((first, *same), axis, axes, mask)


def _is_none(call: Call, name: Named) -> bool:
    if isinstance(name, int):
        return 0 <= name < len(call.args) and call.args[name] is None
    return name in call.kwargs and call.kwargs[name] is None


def _find_mask(
    labels: Mapping[Path, str], tensors: Mapping[Path, Tensor], shape: torch.Size, real: Tensor | None
) -> TokenMask | None:
    """The mask among a modality's other arguments; None without one. Looks at the values.

    Positions, times and types of tokens have a mask's shape, too. A mask has a mask's values, and hides the tokens that
    the attention hides. Where no attention is known, or nothing is hidden, it is named as a mask or is bool.
    """
    for path, label in labels.items():
        values = tensors[path]
        if values.numel() != shape.numel() or not is_plain(values) or not _may_be_mask(values):
            continue
        values = values.reshape(shape)
        called = values.dtype == torch.bool or any(word in label.lower() for word in ("mask", "pad", "valid"))
        by_name = "pad" in label.lower()
        if real is None:
            if called:
                return TokenMask(path, label, by_name)
            continue
        for hidden in (by_name, not by_name):
            mask = TokenMask(path, label, hidden)
            if mask.real(values).equal(real) and (called or not real.all()):
                return mask
    return None


def _may_be_mask(values: Tensor) -> bool:
    """Whether all are 0 or 1, or 0 or so far below that a softmax hides them."""
    return bool(((values == 0) | (values == 1)).all() or ((values == 0) | (values < LOWEST_SHOWN)).all())


def guess_inputs(
    module: nn.Module, path: str, call: Call, counts: Mapping[str, int], samples: int, real: Mapping[str, Tensor]
) -> list[FusionInputs]:
    """Guesses which arguments of a module hold one token sequence for each modality, by names or numbers of tokens.

    Parameters
    ----------
    module, path, call
        The module, where it is, and what it was called with.
    counts
        How many tokens each modality has in the attention.
    samples
        How many samples there are.
    real
        Of some modalities the tokens that the attention takes as real, ``(batch, tokens)``.

    Returns
    -------
    list of FusionInputs
        Two where the axis of the samples may be that of the tokens; none where it is not clear.
    """
    guesses: list[FusionInputs] = []
    for axis in (0, 1) if set(counts).isdisjoint(RESERVED_MODALITIES) else ():
        found = _guess_places(module, call, counts, samples, axis, real)
        if found is not None:
            guesses.append(FusionInputs(path, found))
    return guesses


def _guess_places(
    module: nn.Module, call: Call, counts: Mapping[str, int], samples: int, axis: int, real: Mapping[str, Tensor]
) -> dict[str, ModalityPlace] | None:
    tensors = {
        where: tensor
        for where, tensor in call.tensors()
        if tensor.dim() in (2, 3) and tensor.shape[: axis + 1][-1] == samples
    }
    sequences: dict[Path, int] = {}
    for where, tensor in tensors.items():
        if tensor.is_floating_point() and (tensor.dim() == 3 or axis == 0):
            again = any(tensor is tensors[other] for other in sequences)
            if not again:
                sequences[where] = tensor.shape[1 - axis] if tensor.dim() == 3 else 1
    around = {where: tensor for where, tensor in call.tensors() if 2 <= tensor.dim() <= 4}
    labels = {where: name_argument(module, where) for where in around}
    found: dict[str, Path] = {}
    for name, count in counts.items():
        named = [
            where for where in sequences if _is_named_after(labels[where], name, counts) and tensors[where].dim() == 3
        ]
        counted = [where for where, tokens in sequences.items() if tokens == count]
        several = sum(other == count for other in counts.values()) > 1
        choice = named if len(named) == 1 else [] if several else counted
        if len(choice) != 1:
            return None
        found[name] = choice[0]
    if len(set(found.values())) < len(found):
        return None
    places = {}
    for name, where in found.items():
        as_long = [other for other in found.values() if sequences[other] == sequences[where]]
        others = [
            other
            for other, tensor in around.items()
            if other not in found.values()
            and not any(tensor is tensors[one] for one in found.values())
            and samples in tensor.shape[:2]
            and tensor.shape[-1] == sequences[where]
            and tensor.numel() == samples * sequences[where]
            and (len(as_long) == 1 or _is_named_after(labels[other], name, counts))
        ]
        shape = torch.Size((samples, sequences[where]))
        places[name] = _make_place(around, labels, (where, axis), others, shape, real.get(name))
    return places


def _is_named_after(label: str, modality: str, modalities: Mapping[str, int]) -> bool:
    """Whether an argument is called after a modality and after no other."""
    words = set(re.findall(r"[^\W_]+", label.lower()))
    return modality.lower() in words and not any(other.lower() in words for other in modalities if other != modality)


def _batch_axis(shapes: Sequence[torch.Size]) -> int | None:
    if len({shape[0] for shape in shapes}) == 1:
        return 0
    return 1 if all(len(shape) == 3 for shape in shapes) and len({shape[1] for shape in shapes}) == 1 else None


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
