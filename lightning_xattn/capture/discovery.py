"""Which modules attend across modalities, and in which direction: as told, or from their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_xattn.attention import Direction
from lightning_xattn.errors import DiscoveryError, SettingError

AttentionPaths = Mapping[str, str | Sequence[str]]
"""``{"eeg_to_spec": "model.fusion.eeg_to_spec_attn", ...}``; a sequence of paths names several layers."""

# What attention modules are called besides their direction: eeg_to_spec_attn, cross_attention_eeg_to_spec, ...
_DECORATION = re.compile(r"(?:^|_)(?:cross|multihead|mha|xattn|attn|attention|layer|block|module)?\d*(?=_|$)")


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
        Paths by direction; None: every ``nn.MultiheadAttention`` with a direction ``<a>_to_<b>`` in its path, paired
        with the one in whose path ``a`` and ``b`` change places.

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


def check_paths(attention: AttentionPaths) -> None:
    """Refuse what is not a mapping of directions to module paths.

    Raises
    ------
    SettingError
        Saying what was expected.
    """
    entries = list(attention.items()) if isinstance(attention, Mapping) else []
    paths = [_as_paths(value) for _, value in entries]
    flat = [path for of_direction in paths for path in of_direction]
    if not entries or not all(paths) or not all(isinstance(path, str) for path in flat):
        raise SettingError(
            "attention must map directions to module paths, e.g. {'eeg_to_spec': 'model.fusion.a', 'spec_to_eeg': "
            f"'model.fusion.b'}}, or to lists of paths for several layers; got {attention!r}."
        )
    if len(set(flat)) < len(flat):
        raise SettingError(f"attention names a module twice: {attention!r}. Each module computes one direction.")
    directions = {Direction.parse(name): of_direction for (name, _), of_direction in zip(entries, paths, strict=True)}
    for direction, there in directions.items():
        back = directions.get(direction.opposite, there)
        if len(back) != len(there):
            raise SettingError(
                f"attention names {len(there)} layer(s) for {direction} and {len(back)} for {direction.opposite}; "
                "the two must pair up one by one."
            )


def _from_paths(root: nn.Module, attention: AttentionPaths) -> list[LayerSites]:
    check_paths(attention)
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
        for i, path in enumerate(there):
            backward = None if back is None else (direction.opposite, back[i])
            name = path if back is None else _common_parent(path, back[i])
            layers.append(LayerSites(name, (direction, path), backward))
    return _with_unique_names(layers)


def _from_names(root: nn.Module) -> list[LayerSites]:
    """Pair modules whose paths are equal but for one component, in which two modalities change places."""
    sites = [site for path in _attention_paths(root) if (site := _Site.at(path)) is not None]
    layers, paired = [], set()
    for i, site in enumerate(sites):
        if i in paired:
            continue
        partners = ((j, site.paired_with(other)) for j, other in enumerate(sites[i + 1 :], start=i + 1))
        j, pair = next(((j, pair) for j, pair in partners if pair is not None and j not in paired), (None, None))
        if j is not None and pair is not None:
            paired.add(j)
            direction, layer = pair
            layers.append(LayerSites(layer, (direction, site.path), (direction.opposite, sites[j].path)))
        elif (direction_alone := site.direction) is not None:
            layers.append(LayerSites(site.layer(""), (direction_alone, site.path), None))
    return _with_unique_names(layers)


@dataclass(frozen=True)
class _Site:
    """A module whose path has a component like ``<query>_to_<key>``: what is before, around and behind it."""

    path: str
    before: tuple[str, ...]
    left: str
    right: str
    behind: tuple[str, ...]

    @classmethod
    def at(cls, path: str) -> _Site | None:
        """The last component with ``_to_`` in it; None without one."""
        parts = path.split(".")
        named = [i for i, part in enumerate(parts) if "_to_" in part]
        # A block of one direction often holds a self-attention as well: that one does not attend across.
        if not named or any("self" in part for part in parts[named[-1] :]):
            return None
        left, _, right = parts[named[-1]].partition("_to_")
        return cls(path, tuple(parts[: named[-1]]), left, right, tuple(parts[named[-1] + 1 :]))

    @property
    def direction(self) -> Direction | None:
        """The direction that the name tells by itself, without what attention modules are usually called."""
        try:
            return Direction.parse(_DECORATION.sub("", f"{self.left}_to_{self.right}").strip("_"))
        except SettingError:
            return None

    def layer(self, decoration: str) -> str:
        """The path without the modalities."""
        return ".".join((*self.before, *([decoration] if decoration else []), *self.behind))

    def paired_with(self, other: _Site) -> tuple[Direction, str] | None:
        """The direction and the layer's name if ``other`` is the opposite, whatever else the names share."""
        if (self.before, self.behind) != (other.before, other.behind):
            return None
        # cross_eeg_to_spec_1 and cross_spec_to_eeg_1: take a shared beginning off, then what is left must swap.
        starts = [0] + [i + 1 for i, letter in enumerate(self.left) if letter == "_"]
        for start in starts:
            prefix, query, key = self.left[:start], self.left[start:], other.left[start:]
            suffix = self.right.removeprefix(key)
            swaps = query and key and self.right == key + suffix and other.right == query + suffix
            if swaps and other.left.startswith(prefix) and query != key and not re.match("[a-z]", suffix):
                plain = _DECORATION.sub(lambda found: "".join(re.findall(r"\d+", found[0])), f"{prefix}{suffix}")
                return Direction(query, key), self.layer(plain.strip("_"))
        return None


def _attention_paths(root: nn.Module) -> list[str]:
    return [path for path, module in root.named_modules() if isinstance(module, nn.MultiheadAttention)]


def _describe(root: nn.Module) -> str:
    found = _attention_paths(root)
    return f"Found: {', '.join(found)}." if found else f"{type(root).__name__} has no nn.MultiheadAttention at all."


def _as_paths(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)


def _common_parent(path: str, other: str) -> str:
    shared = []
    for a, b in zip(path.split("."), other.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)


def _with_unique_names(layers: list[LayerSites]) -> list[LayerSites]:
    """Add the direction to a name that is empty or shared, as with three modalities fused in one module."""
    names = [layer.layer for layer in layers]
    return [
        layer
        if layer.layer and names.count(layer.layer) == 1
        else LayerSites(f"{layer.layer}.{layer.forward[0]}".lstrip("."), layer.forward, layer.backward)
        for layer in layers
    ]
