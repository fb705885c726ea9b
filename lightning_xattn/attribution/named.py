"""Modalities as settings name them: paths of modules, items, keys of the batch, or arguments of a fusion."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from torch import Tensor, nn

from lightning_xattn.attribution.discovery import describe_candidates
from lightning_xattn.attribution.evidence import Evidence
from lightning_xattn.attribution.ports import (
    Key,
    LeftOutError,
    ModalitiesSetting,
    Modality,
    Place,
    as_tuple,
    find_mask,
    is_absent,
)
from lightning_xattn.attribution.root import ReplayError
from lightning_xattn.capture.calls import Call, Path, name_argument, samples_axis
from lightning_xattn.capture.sources import Source
from lightning_xattn.capture.wrappers import find_module
from lightning_xattn.core.errors import DiscoveryError, SettingError


def find_named_modalities(
    evidence: Evidence, fusion: str | None, setting: ModalitiesSetting, real: Mapping[str, Tensor]
) -> list[Modality]:
    """The modalities as the settings name them.

    Parameters
    ----------
    evidence
        Of the root.
    fusion, setting
        The settings.
    real
        Of some modalities the tokens that the attention takes as real, ``(batch, tokens)``.

    Raises
    ------
    DiscoveryError
        If a name is not there; the message has what is.
    LeftOutError
        If an argument of the fusion is None in this call.
    ReplayError
        If the fusion did not run.
    """
    if fusion is not None:
        return _name_arguments(evidence, fusion, setting, real)
    modalities = []
    for name, several in setting.items():
        places = [place for one in as_tuple(several) for place in _resolve(evidence, str(one))]
        places.sort(key=lambda place: place.kind == "input")
        modalities.append(Modality(name, tuple(places), " and ".join(map(str, as_tuple(several)))))
    return modalities


def _resolve(evidence: Evidence, name: str) -> list[Place]:
    """What a path of a module, an item of its output or a key names."""
    inputs = [path for path in evidence.inputs if name in (evidence.name_input(path), str(path[-1]))]
    model, source, path = evidence.root.model, Source(), None
    with suppress(SettingError):  # a key of the batch may have any name
        source = Source.parse(name)
        path = find_module(model, source.path)
    if path is None and source.item and not inputs:  # an item of a list of modules
        path = find_module(model, ".".join([source.path, *map(str, source.item)]))
        source = replace(source, item=())
    calls = [call for call in evidence.calls if path is not None and call.path == path]
    if source.call is not None:
        calls = calls[source.call - 1 : source.call]
    item = tuple(map(str, source.item))
    given = [place for call in calls for place in evidence.output_places(call)]
    places = [place for place in given if tuple(map(str, place.where[: len(item)])) == item]
    places = places or list(evidence.input_places(inputs))
    if places:
        return places
    if calls:
        shapes = ", ".join(str(tuple(one.shape)) for one in calls[0].tensors.values()) or "no tensor"
        what = f"returns nothing with the {len(evidence.rows)} samples on an axis of its own: {shapes}"
    else:
        what = f"{'is no module and no input' if path is None else 'did not run in this step'} of {evidence.root}"
    raise DiscoveryError(f"modalities names '{name}', which {what}. There are {describe_candidates(evidence)}.")


def _name_arguments(
    evidence: Evidence, fusion: str, setting: ModalitiesSetting, real: Mapping[str, Tensor]
) -> list[Modality]:
    path = find_module(evidence.root.model, fusion)
    calls = [call for call in evidence.calls if call.path == path]
    if not calls:
        raise ReplayError(
            f"the fusion '{fusion}' was not seen in what gives the predictions: it did not run, or is no part of it"
        )
    if len(calls) > 1:
        raise DiscoveryError(
            f"The fusion '{fusion}' runs {len(calls)} times in a step, so it is ambiguous what enters it. Name a "
            "module that runs once."
        )
    call = evidence.arguments[calls[0].key]
    return name_arguments(calls[0].module, fusion, calls[0].key, setting, call, len(evidence.rows), real)


def name_arguments(
    module: nn.Module,
    fusion: str,
    key: Key,
    setting: ModalitiesSetting,
    call: Call,
    samples: int,
    real: Mapping[str, Tensor],
) -> list[Modality]:
    """The modalities among a fusion's arguments.

    Raises
    ------
    LeftOutError
        If an argument is None.
    DiscoveryError
        If an argument is not there, is no float tensor, or holds no axis of samples.
    """
    tensors = dict(call.tensors())
    labels = {where: name_argument(module, where) for where in tensors}

    def find(name: int | str) -> Path:
        found = [
            where
            for where, label in labels.items()
            if (where[0] == name and len(where) == 1 if isinstance(name, int) else name in (label, where[-1]))
        ]
        if not found and is_absent(call, name):
            raise LeftOutError(f"the fusion '{fusion}' got no {name!r}")
        if len(found) != 1:
            known = ", ".join(f"{where[0]!r} ({label}): {_shape(tensors[where])}" for where, label in labels.items())
            raise DiscoveryError(
                f"modalities names argument {name!r} of the fusion '{fusion}', which has "
                f"{'no such tensor' if not found else f'{len(found)} of them'} in this call; it has {known or 'none'}."
            )
        return found[0]

    modalities = []
    named = {name: [find(place) for place in as_tuple(several)] for name, several in setting.items()}
    firsts = [tensors[paths[0]] for paths in named.values()]
    axis = next((one for one in (0, 1) if all(t.dim() > one and t.shape[one] == samples for t in firsts)), None)
    if axis is None or not all(one.is_floating_point() for one in firsts):
        got = ", ".join(f"{name} {_shape(tensors[paths[0]])}" for name, paths in named.items())
        raise DiscoveryError(
            f"Expected a floating tensor of each modality in '{fusion}', with the {samples} samples on its first axis, "
            f"or on its second of all; got {got}."
        )
    for name, (first, *others) in named.items():
        same = [one for one, tensor in tensors.items() if one != first and tensor is tensors[first]]
        axes = dict.fromkeys([first, *same], axis)
        for other in others:
            own = samples_axis(tensors[other], samples)
            if own is None:
                raise DiscoveryError(
                    f"'{labels[other]}' of '{fusion}' has no axis of {samples} samples: {_shape(tensors[other])}."
                )
            axes[other] = own
        tokens = tensors[first].transpose(0, axis)
        mask = find_mask({one: labels[one] for one in others}, tensors, tokens.shape[:2], real.get(name))
        places = tuple(Place("argument", *key, where, own) for where, own in axes.items())
        modalities.append(Modality(name, places, f"{labels[first]} of {fusion}", mask))
    return modalities


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
