"""The layers whose modules attend across modalities, found by the setting or by the modules' names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import combinations, takewhile, zip_longest

from torch import nn

from lightning_xattn.capture.joint import JointSequence
from lightning_xattn.capture.sources import AttentionSetting, Layer, Source, as_tuple, check_attention
from lightning_xattn.capture.wrappers import find_module, plain_path, scripted_modules
from lightning_xattn.core.attention import Direction
from lightning_xattn.core.errors import DiscoveryError, SettingError

# What attention modules are called besides their direction: eeg_to_spec_attn, cross_attention_eeg_to_spec, ...
_DECORATION = re.compile(r"(?:^|_)(?:cross|multihead|mha|xattn|attn|attention|layer|block|module)?\d*(?=_|$)")


def locate_attention(root: nn.Module, attention: AttentionSetting | None = None) -> tuple[Layer, ...]:
    """Find the cross-attention layers of a model.

    Parameters
    ----------
    root
        The model; paths start here, with or without what wrappers add to them.
    attention
        See ``AttentionSetting``; None: every ``nn.MultiheadAttention`` with a direction ``<a>_to_<b>`` in its path,
        paired with the one in whose path ``a`` and ``b`` change places.

    Returns
    -------
    tuple of Layer
        In the order of the modules; empty without a setting and without a name that holds a direction: then only
        a pass through the model can show them.

    Raises
    ------
    DiscoveryError
        If a path names no module; the message lists every attention module there is.
    SettingError
        If ``attention`` is malformed.
    """
    if attention is None:
        return tuple(layers_by_name(root, _multihead_paths(root)))
    check_attention(attention)
    if isinstance(attention, JointSequence):
        return tuple(_joint_layers(root, attention))
    return tuple(_named_layers(root, attention))


def describe_attention(root: nn.Module) -> str:
    """What attention modules there are, and what hides some, as sentences."""
    found = [plain_path(root, path) for path in _multihead_paths(root)]
    text = f"Found: {', '.join(found)}." if found else f"{type(root).__name__} has no nn.MultiheadAttention at all."
    scripted = list(scripted_modules(root))
    if scripted:
        text += f" TorchScript hides what is in {', '.join(scripted)}: record what was scripted, before torch.jit."
    return text


def _named_layers(root: nn.Module, attention: AttentionSetting) -> list[Layer]:
    assert not isinstance(attention, JointSequence)
    sources = {
        Direction.parse(name): [
            source for named in as_tuple(value) for source in _expand(root, Source.parse(named), name)
        ]
        for name, value in attention.items()
    }
    _number_turns(root, sources)
    layers = []
    while sources:
        direction = next(iter(sources))
        there, back = sources.pop(direction), sources.pop(direction.opposite, None)
        if back is not None and len(back) != len(there):
            raise DiscoveryError(
                f"{direction} is computed by {', '.join(map(str, there))} and {direction.opposite} by "
                f"{', '.join(map(str, back))}; the two must pair up one by one."
            )
        for source, opposite in zip_longest(there, back or ()):
            name = common_parent(source.path, (opposite or source).path)
            pair = ((direction, source), (direction.opposite, opposite or source))
            layers.append(Layer(plain_path(root, name), pair if opposite else pair[:1]))
    return with_unique_names(layers)


def _joint_layers(root: nn.Module, joint: JointSequence) -> list[Layer]:
    layers = []
    for path in joint.paths:
        for source in _expand(root, Source.parse(path), "the joint sequence", joint=True):
            whole, name = replace(source, joint=joint), plain_path(root, source.path)
            for direction in (Direction(*modalities) for modalities in combinations(joint.spans, 2)):
                layers.append(Layer(name, ((direction, whole), (direction.opposite, whole))))
    return with_unique_names(layers)


def _expand(root: nn.Module, source: Source, what: str, *, joint: bool = False) -> list[Source]:
    """The modules that compute the attention of a named module: itself, or those in it that are known to."""
    if source.read is not None:
        return [source]
    path = find_module(root, source.path)
    if path is None:
        paths = [plain_path(root, path) for path, _ in root.named_modules() if path]
        near = get_close_matches(source.path, paths, n=3, cutoff=0.5)
        near_ones = f" Did you mean {' or '.join(repr(path) for path in near)}?" if near else ""
        raise DiscoveryError(f"No module '{source.path}' for {what}.{near_ones} {describe_attention(root)}")
    inner = [path] if source.item or source.call else _attention_in(root, path, joint)
    return [replace(source, path=path) for path in inner]


def _attention_in(root: nn.Module, path: str, joint: bool) -> list[str]:
    module = root.get_submodule(path)
    if isinstance(module, nn.TransformerDecoderLayer):
        return [f"{path}.multihead_attn"]
    if isinstance(module, nn.TransformerDecoder) or (joint and isinstance(module, nn.TransformerEncoder)):
        return _attention_in(root, f"{path}.layers", joint)
    if isinstance(module, nn.ModuleList):
        present = [i for i, child in enumerate(module) if child is not None]
        return [inner for i in present for inner in _attention_in(root, f"{path}.{i}", joint)]
    # In its fast path an encoder layer computes the attention of what it holds.
    parent = path.rpartition(".")[0]
    return [parent if isinstance(root.get_submodule(parent), nn.TransformerEncoderLayer) else path]


def _number_turns(root: nn.Module, sources: dict[Direction, list[Source]]) -> None:
    """A module that is named for several directions computes them in this order, one run after the other."""
    users: dict[nn.Module, list[tuple[Direction, int]]] = defaultdict(list)
    for direction, of_direction in sources.items():
        for i, source in enumerate(of_direction):
            if source.read is None and not source.item and source.call is None:
                users[root.get_submodule(source.path)].append((direction, i))
    for directions in users.values():
        same = [sources[direction][i].path for direction, i in directions]
        if len({direction for direction, _ in directions}) < len(directions):
            raise DiscoveryError(
                f"{' and '.join(same)} are one module, which several layers share, so its runs are mixed up. Name "
                "it once, for its first run, or give a callable for each layer."
            )
        for turn, (direction, i) in enumerate(directions):
            sources[direction][i] = replace(sources[direction][i], path=same[0], turn=turn, turns=len(directions))


def layers_by_name(root: nn.Module, paths: Iterable[str]) -> list[Layer]:
    """Pair modules whose paths are equal but for one component, in which two modalities change places.

    Raises
    ------
    DiscoveryError
        If one module has several of the names.
    """
    sites = [site for path in paths if (site := _Site.at(path, plain_path(root, path))) is not None]
    modules = [root.get_submodule(site.path) for site in sites]
    if len(set(modules)) < len(modules):
        raise DiscoveryError(
            f"{', '.join(site.path for site in sites)}: some are one module, and their order is not known. Name them "
            "in the order in which they run: attention={'<a>_to_<b>': 'path', '<b>_to_<a>': 'path'}."
        )
    layers = []
    while sites:
        site = sites.pop(0)
        pairs = ((other, pair) for other in sites if (pair := site.paired_with(other)) is not None)
        if (found := next(pairs, None)) is not None:
            other, (direction, layer) = found
            sites.remove(other)
            layers.append(Layer(layer, ((direction, Source(site.path)), (direction.opposite, Source(other.path)))))
        elif (direction_alone := site.direction) is not None:
            layers.append(Layer(site.layer(""), ((direction_alone, Source(site.path)),)))
    return with_unique_names(layers)


@dataclass(frozen=True)
class _Site:
    """A module whose path has a component like ``<query>_to_<key>``: what is before, around and behind it."""

    path: str
    before: tuple[str, ...]
    left: str
    right: str
    behind: tuple[str, ...]

    @classmethod
    def at(cls, path: str, plain: str) -> _Site | None:
        """The last component with ``_to_`` in it, in the path without wrappers; None without one."""
        parts = plain.split(".")
        named = [i for i, part in enumerate(parts) if "_to_" in part]
        # A block of one direction often holds a self-attention as well: that one does not attend across.
        if not named or any("self" in part for part in parts[named[-1] :]):
            return None
        left, _, right = parts[named[-1]].partition("_to_")
        return cls(path, tuple(parts[: named[-1]]), left, right, tuple(parts[named[-1] + 1 :]))

    @property
    def direction(self) -> Direction | None:
        """The direction in the name itself, without what attention modules are usually called."""
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


def _multihead_paths(root: nn.Module) -> list[str]:
    modules = root.named_modules(remove_duplicate=False)
    return [path for path, module in modules if isinstance(module, nn.MultiheadAttention)]


def common_parent(path: str, other: str) -> str:
    """The path that two modules share."""
    parts = zip(path.split("."), other.split("."), strict=False)
    return ".".join(part for part, _ in takewhile(lambda both: both[0] == both[1], parts))


def with_unique_names(layers: list[Layer]) -> list[Layer]:
    """Add the direction to a name that is empty or shared, as with three modalities fused in one module."""
    for what in (0, 1):  # of the first: the direction and, where that does not differ either, the source
        names = [layer.name for layer in layers]
        layers = [
            layer
            if layer.name and names.count(layer.name) == 1
            else replace(layer, name=f"{layer.name}.{layer.sources[0][what]}".lstrip("."))
            for layer in layers
        ]
    return layers
