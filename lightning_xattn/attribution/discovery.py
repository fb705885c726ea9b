"""Which inputs reach the predictions by which modules: the modalities, as pure functions of the evidence."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lightning_xattn.attribution.evidence import Evidence
from lightning_xattn.attribution.names import name_groups, plain_name
from lightning_xattn.attribution.ports import MOST_MODALITIES, Modality, Place
from lightning_xattn.attribution.root import ReplayError
from lightning_xattn.capture.calls import Path
from lightning_xattn.capture.dataflow import LabelledCall
from lightning_xattn.capture.wrappers import plain_path


@dataclass(frozen=True, eq=False)
class Group:
    """Inputs that reach the prediction together, and the outermost calls that only these reach; none of raw inputs."""

    inputs: tuple[Path, ...]
    calls: tuple[LabelledCall, ...]


def find_modalities(evidence: Evidence, attending: Collection[str]) -> list[Modality]:
    """The modalities that a root shows by itself; empty where there are fewer than two.

    Parameters
    ----------
    evidence
        Of the root.
    attending
        The paths of the modules that attend across modalities, which encode none.

    Raises
    ------
    ReplayError
        If there are too many.
    """
    found = _find_groups(evidence, attending)
    if len(found) > MOST_MODALITIES:
        described = ", ".join(_describe(evidence, group, places) for group, places in found)
        raise ReplayError(
            f"{len(found)} modalities were found, of which at most {MOST_MODALITIES} can be exchanged: "
            f"{described}. Take several together, as in modalities={{'<a>': ['path', 'path'], '<b>': 'path'}}"
        )
    usable = [(group, places) for group, places in found if places]
    if len(usable) < 2:
        return []
    words = [_words(evidence, group, places) for group, places in usable]
    return [
        Modality(name, places, _describe(evidence, group, places))
        for name, (group, places) in zip(name_groups(words), usable, strict=True)
    ]


def describe_candidates(evidence: Evidence) -> str:
    """Modules and inputs that may hold modalities, as a user would name them."""
    root = evidence.root.path
    found: dict[str, tuple[int, ...]] = {}
    for call in evidence.calls:
        depth = sum(1 for _ in call.outwards())
        if depth <= 2 and call.path not in ("", root) and evidence.reaches(call):
            shape = next((tuple(one.shape) for _, one in call.tensors.items()), ())
            found.setdefault(plain_path(evidence.root.model, call.path), shape)
    inputs = {
        evidence.name_input(path): tuple(getattr(evidence.root.call[path], "shape", ())) for path in evidence.reaching
    }
    parts = [f"'{name}' {shape}" for name, shape in [*list(found.items())[:8], *list(inputs.items())[:6]]]
    return ", ".join(parts) or "none"


def _group_inputs(evidence: Evidence, attending: Collection[str], is_deep: bool = False) -> list[Group]:
    """Inputs that reach the predictions by modules of their own, as the labels show."""
    reaching = evidence.reaching
    every = sum(reaching.values())
    candidates = [call for call in evidence.calls if _may_encode(evidence, call, every, attending)]
    pure: list[LabelledCall] = []
    for call in candidates:
        inner = {one.made & every for one in candidates if one is not call and call in one.outwards()}
        if is_deep and any(not one & other for one in inner for other in inner):
            continue
        if not any(outer in pure for outer in call.outwards()) and not _fuses(call, candidates, every):
            pure.append(call)
    sets = {call.made & every for call in pure}
    merged = _merge(sets)
    if len(merged) < 2:  # what several of them share, such as a mask for both, joins none
        shared = 0
        for one in sets:
            for other in sets:
                shared |= one & other if one != other else 0
        merged = _merge({one & ~shared for one in sets} - {0})
    found = []
    for labels in merged:
        calls = tuple(call for call in pure if call.made & labels)
        found.append(Group(tuple(path for path, label in reaching.items() if label & labels), calls))
    return found


def _may_encode(evidence: Evidence, call: LabelledCall, every: int, attending: Collection[str]) -> bool:
    """Whether only some of the inputs reach a call, and it the predictions, and no recorded attention is in it."""
    labels = call.made & every
    reaches = evidence.reaches(call)
    attends = any(path == call.path or path.startswith(f"{call.path}.") for path in attending)
    return bool(labels) and labels != every and reaches and not attends


def _fuses(call: LabelledCall, candidates: Sequence[LabelledCall], every: int) -> bool:
    """Whether a call gets what calls outside of it have made of different inputs."""
    outside = [one for one in candidates if call not in one.outwards()]
    sets = [one.made & every for one in outside if any(own & call.got for own in one.own.values())]
    return any(not one & other for one in sets for other in sets)


def _find_groups(evidence: Evidence, attending: Collection[str]) -> list[tuple[Group, tuple[Place, ...]]]:
    """The groups that are modalities, each with what holds it."""
    groups = _group_inputs(evidence, attending)
    if len(groups) < 2:  # one module may embed several
        deeper = _group_inputs(evidence, attending, is_deep=True)
        groups = deeper if len(deeper) > 1 else groups
    groups = [group for group in groups if any(_varies(evidence, path) for path in group.inputs)]
    grouped = {path for group in groups for path in group.inputs}
    groups, raw = _join_masks(evidence, groups, [path for path in evidence.reaching if path not in grouped])
    # Beside groups, masks, lengths and single numbers are further inputs.
    alone = [path for path in raw if _may_be_alone(evidence, path, len(groups) > 1)]
    if len(groups) < 2 or len(groups) + len(alone) <= MOST_MODALITIES:
        groups += [Group((path,), ()) for path in alone]
    are_usable = 2 <= len(groups) <= MOST_MODALITIES  # choosing takes runs
    if are_usable:
        heaviest = {_places_of(evidence, _heaviest(group)): group.inputs for group in groups if group.calls}
        evidence.try_together({places: inputs for places, inputs in heaviest.items() if places})
    return [(group, _choose_places(evidence, group) if are_usable else ()) for group in groups]


def _varies(evidence: Evidence, path: Path) -> bool:
    """Whether samples differ in an input: the same types of tokens for all are no modality."""
    value, axis = evidence.root.call[path], evidence.root.axes.get(path)
    if axis is None or not isinstance(value, Tensor) or value.is_nested or evidence.root.samples < 2:
        return True
    return bool((value != value.narrow(axis, 0, 1)).any())


def _may_be_alone(evidence: Evidence, path: Path, has_to_float: bool) -> bool:
    """Whether an input may be a modality that no module encodes."""
    value = evidence.root.call[path]
    is_large = not isinstance(value, Tensor) or value.numel() > evidence.root.samples
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return evidence.root.axes[path] is not None and is_large and (floats or not has_to_float)


def _join_masks(evidence: Evidence, groups: list[Group], raw: list[Path]) -> tuple[list[Group], list[Path]]:
    """Let raw inputs with one value for each token of one group alone join that group, as its mask."""
    left = []
    for path in raw:
        value = evidence.root.call[path]
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        fitting = [i for i, group in enumerate(groups) if shape is not None and shape in _token_shapes(evidence, group)]
        named = [i for i in fitting if _shares_word(evidence.name_input(path), _label_words(evidence, groups[i]))]
        chosen = named if len(named) == 1 else fitting
        if len(chosen) == 1 and shape is not None and len(shape) > 1:
            group = groups[chosen[0]]
            groups[chosen[0]] = replace(group, inputs=(*group.inputs, path))
        else:
            left.append(path)
    return groups, left


def _token_shapes(evidence: Evidence, group: Group) -> set[tuple[int, ...]]:
    values = [evidence.root.call[path] for path in group.inputs]
    shapes = {tuple(one.shape[:2]) for one in values if isinstance(one, Tensor) and one.dim() > 1}
    made = [tensor for call in group.calls for _, tensor in call.tensors.items()]
    return shapes | {(evidence.root.samples, *one.shape[1:2]) for one in made if one.dim() == 3}


def _choose_places(evidence: Evidence, group: Group) -> tuple[Place, ...]:
    """The heaviest outermost module whose patching equals exchanging its inputs, or more of them, or the inputs."""
    inputs = evidence.input_places(group.inputs)
    if not group.calls:
        return inputs
    made = [(call, own) for call in group.calls for own in call.own.values()]
    first = [call for call in group.calls if not any(own & call.got for other, own in made if other is not call)]
    chosen: tuple[Place, ...] = ()
    around: list[Path] = []
    for calls in (_heaviest(group), first, list(group.calls)):
        places = _places_of(evidence, calls)
        if not places:
            continue
        chosen, around = places, evidence.reached_around(places, group.inputs)
        if not around and evidence.equals_exchange(places, group.inputs):
            return places
    # What goes around the modules is exchanged at the inputs, too.
    if chosen and around:
        both = (*chosen, *evidence.input_places(around))
        if evidence.equals_exchange(both, group.inputs):
            return both
    return (*chosen, *inputs)


def _heaviest(group: Group) -> list[LabelledCall]:
    """The calls of the module with the most parameters."""
    by_module: dict[str, list[LabelledCall]] = {}
    for call in group.calls:
        by_module.setdefault(call.path, []).append(call)
    return max(by_module.values(), key=lambda calls: _weight(calls[0].module))


def _places_of(evidence: Evidence, calls: Sequence[LabelledCall]) -> tuple[Place, ...]:
    return tuple(place for call in calls for place in evidence.output_places(call))


def _label_words(evidence: Evidence, group: Group) -> list[str]:
    return [evidence.name_input(path) for path in group.inputs] + [call.path for call in group.calls]


def _words(evidence: Evidence, group: Group, places: Sequence[Place]) -> tuple[list[str], list[str]]:
    modules = [plain_path(evidence.root.model, place.path) for place in places if place.kind == "output"]
    return list(dict.fromkeys(modules)), [evidence.name_input(path) for path in group.inputs]


def _describe(evidence: Evidence, group: Group, places: Sequence[Place]) -> str:
    modules, inputs = _words(evidence, group, places)
    is_input = any(place.kind == "input" for place in places) or not places
    return " and ".join([*modules, *(inputs if is_input else [])])


def _merge(sets: set[int]) -> list[int]:
    """Sets of labels that overlap as one."""
    merged: list[int] = []
    for one in sorted(sets):
        apart = [other for other in merged if not other & one]
        joined = one
        for other in merged:
            joined |= other if other & one else 0
        merged = [*apart, joined]
    return sorted(merged, key=lambda labels: labels & -labels)


def _weight(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shares_word(label: str, others: Sequence[str]) -> bool:
    own = plain_name(label)
    return bool(own) and own in {plain_name(other) for other in others}
