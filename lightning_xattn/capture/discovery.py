"""Which modules attend across modalities, and in which direction: as told, or from their names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_xattn.attention import Direction
from lightning_xattn.errors import DiscoveryError, SettingError

AttentionPaths = Mapping[str, str | Sequence[str]]
"""``{"eeg_to_spec": "model.fusion.eeg_to_spec_attn", ...}``; a sequence of paths names several layers."""

# What attention modules are called besides their direction: eeg_to_spec_attn, cross_attention_eeg_to_spec, ...
_DECORATION = re.compile(r"(?:^|_)(?:cross|multihead|mha|attn|attention|layer|block|module)(?=_|$)")


@dataclass(frozen=True)
class LayerSites:
    """Where the attention of one layer is computed.

    Parameters
    ----------
    layer
        The layer's name: the module path that its directions share.
    forward, backward
        A direction and the path of the module that computes it; ``backward`` is None when there is only one.
    """

    layer: str
    forward: tuple[Direction, str]
    backward: tuple[Direction, str] | None

    @property
    def sites(self) -> tuple[tuple[Direction, str], ...]:
        """The directions that exist, forward first."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)


def locate_attention(root: nn.Module, attention: AttentionPaths | None = None) -> tuple[LayerSites, ...]:
    """Find the cross-attention layers of a model.

    Parameters
    ----------
    root
        The model; paths are seen from here.
    attention
        Paths by direction; None: every ``nn.MultiheadAttention`` with a direction ``<a>_to_<b>`` in its path.

    Returns
    -------
    tuple of LayerSites
        In the order of the modules.

    Raises
    ------
    DiscoveryError
        If a path names no module or a module that is not recorded, or if nothing is found. The message lists every
        attention module there is.
    SettingError
        If a direction has a malformed name or the two directions of a pair have different numbers of layers.
    """
    layers = _from_names(root) if attention is None else _from_paths(root, attention)
    if not layers:
        raise DiscoveryError(
            "No cross-attention found: looked for nn.MultiheadAttention modules named '<a>_to_<b>...', such as "
            f"'eeg_to_spec_attn' and 'spec_to_eeg_attn'. {_describe(root)} Name them: "
            "AttentionExplainabilityCallback(attention={'<a>_to_<b>': 'path.to.module', '<b>_to_<a>': ...})."
        )
    return tuple(layers)


def _from_paths(root: nn.Module, attention: AttentionPaths) -> list[LayerSites]:
    paths = {Direction.parse(name): _as_paths(value) for name, value in attention.items()}
    modules = dict(root.named_modules())
    for direction, direction_paths in paths.items():
        for path in direction_paths:
            if path not in modules:
                raise DiscoveryError(f"No module '{path}' for {direction}. {_describe(root)}")
            if not isinstance(modules[path], nn.MultiheadAttention):
                raise DiscoveryError(
                    f"Module '{path}' for {direction} is a {type(modules[path]).__name__}; only nn.MultiheadAttention "
                    f"is recorded so far. {_describe(root)}"
                )

    layers = []
    for direction, there in paths.items():
        back = paths.get(direction.opposite)
        if back is not None and direction.opposite in list(paths)[: list(paths).index(direction)]:
            continue  # already paired, from its other side
        if back is not None and len(back) != len(there):
            raise SettingError(
                f"attention names {len(there)} layer(s) for {direction} and {len(back)} for {direction.opposite}; "
                "the two must pair up one by one."
            )
        for i, path in enumerate(there):
            backward = None if back is None else (direction.opposite, back[i])
            name = path if back is None else _common_parent(path, back[i])
            layers.append(LayerSites(name, (direction, path), backward))
    return _with_unique_names(layers)


def _from_names(root: nn.Module) -> list[LayerSites]:
    """Pair modules whose paths are equal but for one component that names a direction."""
    by_layer: dict[str, dict[Direction, str]] = defaultdict(dict)
    for path, _ in _attention_modules(root):
        found = _direction_in(path)
        if found is not None:
            direction, layer = found
            by_layer[layer][direction] = path

    layers = []
    for layer, sites in by_layer.items():
        for direction, path in sites.items():
            back = sites.get(direction.opposite)
            already_paired = back is not None and list(sites).index(direction.opposite) < list(sites).index(direction)
            if not already_paired:
                layers.append(
                    LayerSites(layer, (direction, path), None if back is None else (direction.opposite, back))
                )
    return _with_unique_names(layers)


def _direction_in(path: str) -> tuple[Direction, str] | None:
    """The direction that a module path names, and the path without it; None if it names none, or several."""
    parts = path.split(".")
    named = [i for i, part in enumerate(parts) if "_to_" in part]
    # A block of one direction often holds a self-attention as well: that one does not attend across.
    if not named or any("self" in part for part in parts[named[-1] :]):
        return None
    try:
        direction = Direction.parse(_DECORATION.sub("", parts[named[-1]]).strip("_"))
    except SettingError:
        return None
    return direction, ".".join(parts[: named[-1]] + parts[named[-1] + 1 :])


def _attention_modules(root: nn.Module) -> Iterator[tuple[str, nn.MultiheadAttention]]:
    for path, module in root.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield path, module


def _describe(root: nn.Module) -> str:
    found = [path for path, _ in _attention_modules(root)]
    return f"Found: {', '.join(found)}." if found else f"{type(root).__name__} has no nn.MultiheadAttention at all."


def _as_paths(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _common_parent(path: str, other: str) -> str:
    shared = []
    for a, b in zip(path.split("."), other.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)


def _with_unique_names(layers: list[LayerSites]) -> list[LayerSites]:
    """Add the modalities to a name that several layers share, as with three modalities fused in one module."""
    names = [layer.layer for layer in layers]
    return [
        layer
        if names.count(layer.layer) == 1
        else LayerSites(f"{layer.layer}.{layer.forward[0]}".lstrip("."), layer.forward, layer.backward)
        for layer in layers
    ]
