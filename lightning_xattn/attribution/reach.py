"""Which inputs belong to which modality, and which modalities an attention's sides come from: functions of evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_xattn.attribution.evidence import Evidence
from lightning_xattn.attribution.ports import Modality
from lightning_xattn.capture.calls import Path


@dataclass(frozen=True)
class Reach:
    """Which inputs reach which modalities.

    Attributes
    ----------
    owned
        By modality, the inputs that belong to it.
    ways
        How inputs reach the predictions otherwise than by the features of their modality, as clauses.
    """

    owned: Mapping[str, Sequence[Path]]
    ways: Sequence[str]


def find_sides(evidence: Evidence, modalities: Sequence[Modality]) -> dict[str, list[tuple[str, str]]]:
    """By a module's path, the modalities that the queries and the keys of each attention in it come from, or ""."""

    def find(side: int) -> set[str]:
        return {one.name for one in modalities if any(evidence.labels_of(place) & side for place in one.places)}

    found: dict[str, list[tuple[str, str]]] = {}
    for call, queries, keys in evidence.attention:
        of_queries, of_keys = find(queries), find(keys)
        # Behind a first attention one side holds what the other one does, and something of its own.
        if of_keys < of_queries:
            of_queries -= of_keys
        elif of_queries < of_keys:
            of_keys -= of_queries
        pair = tuple(names.pop() if len(names) == 1 else "" for names in (of_queries, of_keys))
        for path in [""] if call is None else [outer.path for outer in call.outwards()]:
            found.setdefault(path, []).append((pair[0], pair[1]))
    return found


def find_reach(evidence: Evidence, modalities: Sequence[Modality]) -> Reach:
    """Which inputs belong to which modality, and by which other ways they reach the predictions.

    An input belongs to the modality whose features alone it reaches; of several to the one whose inputs all reach
    the others, too. An input that several share otherwise, such as a mask for both, belongs to none.
    """
    made = {call.key: call.made for call in evidence.calls}
    inputs: dict[str, set[Path]] = {}
    for one in modalities:
        labels = 0
        for place in one.features or one.places:
            labels |= made[place.key] if place.kind == "output" else evidence.labels_of(place)
        inputs[one.name] = {path for path, label in evidence.inputs.items() if label & labels}
    owned: dict[str, list[Path]] = {name: [] for name in inputs}
    ways: list[str] = []
    for path in evidence.inputs:
        reached = [name for name, paths in inputs.items() if path in paths]
        for name in reached:
            others = [other for other in reached if other != name]
            if all(inputs[name] < inputs[other] for other in others):
                owned[name].append(path)
                ways += [f"{evidence.name_input(path)} also reaches {' and '.join(others)}"] if others else []
    mixed = set.intersection(*inputs.values())
    if len(mixed) > 1 and not any(owned.values()):  # one input that holds several modalities is no finding
        names = " and ".join(evidence.name_input(path) for path in evidence.inputs if path in mixed)
        ways.append(f"{names} each reach {' and '.join(inputs)}")
    permuted = [place for one in modalities for place in one.places]
    for path in evidence.reached_around(permuted, [path for paths in owned.values() for path in paths]):
        name = next(name for name, paths in owned.items() if path in paths)
        ways.append(f"{evidence.name_input(path)} also reaches the prediction past {name}")
    return Reach(owned, ways)
