"""One name a modality: in the attention's directions and among the modalities, by where queries and keys come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_xattn.attribution.names import are_alike
from lightning_xattn.attribution.ports import Modality
from lightning_xattn.capture import Layer
from lightning_xattn.core.attention import Direction


def reconcile_names(
    modalities: tuple[Modality, ...],
    layers: Sequence[Layer],
    sides: Mapping[str, Sequence[tuple[str, str]]],
    are_named: bool,
    is_attention_named: bool,
) -> tuple[tuple[Modality, ...], dict[Direction, Direction]]:
    """Modalities and directions with the same names, by where the queries and keys of each attention come from.

    Settings are right. Otherwise a modality gets the name that the attention has for it, unless what holds the
    modalities is called the other way round: then the attention's names say where information flows.
    """
    pairs = []
    for layer in layers:
        for direction, source in layer.sources:
            seen = sides.get(source.path, ())
            number = source.call - 1 if source.call is not None else source.turn
            is_seen = source.read is None and source.joint is None and number < len(seen) and all(seen[number])
            if is_seen and seen[number][0] != seen[number][1]:
                pairs.append((direction, *seen[number]))
    if are_named and is_attention_named:
        return modalities, {}
    names: dict[str, str] = {}
    renamed: dict[Direction, Direction] = {}
    for direction, queries, keys in pairs:
        turned = are_alike(queries, direction.key) and are_alike(keys, direction.query)
        turned = turned and not (are_alike(queries, direction.query) and are_alike(keys, direction.key))
        are_letters = len(direction.query) == len(direction.key) == 1
        if is_attention_named or not (are_named or are_letters or turned):
            names.setdefault(queries, direction.query)
            names.setdefault(keys, direction.key)
        else:
            renamed[direction] = Direction(queries, keys)
            renamed.setdefault(direction.opposite, Direction(keys, queries))
    others = {one.name for one in modalities if one.name not in names}
    if len(set(names.values())) < len(names) or set(names.values()) & others:
        names = {}
    modalities = tuple(replace(one, name=names.get(one.name, one.name)) for one in modalities)
    return modalities, {old: new for old, new in renamed.items() if str(old) != str(new)}
