"""What modalities are called: by the modules that produce them, by arguments, keys of the batch and the attention."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_xattn.attribution.ports import RESERVED_MODALITIES, Modality
from lightning_xattn.capture import Layer
from lightning_xattn.core.attention import Direction

_DECORATION = frozenset(
    (
        *("encoder", "enc", "encode", "proj", "projection", "projector", "extractor", "pooler", "head"),
        *("emb", "embed", "embedding", "embeddings", "embedder", "features", "feature", "feat", "graphs"),
        *("net", "network", "backbone", "model", "module", "branch", "stream", "tower"),
        *("layer", "layers", "block", "linear", "fc", "mlp", "cnn", "rnn", "lstm", "gru"),
        *("transformer", "norm", "conv", "attention", "key", "to", "in", "input", "inputs", "x"),
        *("tokens", "token", "ids", "id", "raw", "data", "values", "batch"),
        *("mask", "masks", "padding", "pad", "lengths", "length"),
    )
)
"""Words of paths and keys that name no modality."""


def plain_name(label: str) -> str:
    """The words of a path or key that may name a modality, ``"audio"`` of ``"model.audio_encoder.proj"``."""
    for part in reversed(re.split(r"[.\[\]]+", label)):
        words = [word for word in re.split(r"_|(?<=[a-z])(?=[A-Z])", part.strip("_'\"")) if word]
        kept = [word.lower() for word in words if not (_is_decoration(word.lower()) or word.isdigit())]
        if kept and re.search("[a-z]", kept[0]):
            return "_".join(kept)
    return ""


def _is_decoration(word: str) -> bool:
    return word in _DECORATION or word.removesuffix("s") in _DECORATION


def name_groups(groups: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[str]:
    """A name for each group of the paths of its modules and the names of its inputs.

    The modules' come first, unless they are single letters or the same for several groups.
    """
    by_module = [next(filter(None, map(plain_name, modules)), "") for modules, _ in groups]
    by_input = [next(filter(None, map(plain_name, inputs)), "") for _, inputs in groups]
    whole = [next(iter([*modules, *inputs]), "modality").replace(".", "_") for modules, inputs in groups]
    whole = [re.sub(r"[/\s\[\]']+", "_", one).strip("_") for one in whole]
    for names, least in ((by_module, 2), (by_input, 2), (by_module, 1), (whole, 1)):
        usable = all(len(name) >= least and name not in RESERVED_MODALITIES for name in names)
        if usable and len(set(names)) == len(names):
            return list(names)
    return [f"{name}_{number}" for number, name in enumerate(whole, start=1)]


def are_alike(name: str, other: str) -> bool:
    """Whether two names may be of one modality: one is the beginning of the other, or has it as a word."""
    one, two = name.lower(), other.lower()
    return one.startswith(two) or two.startswith(one) or one in two.split("_") or two in one.split("_")


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
