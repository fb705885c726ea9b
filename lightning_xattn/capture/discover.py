"""Which of the attention that a first step has shown goes across modalities, and what pairs up."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from torch import nn

from lightning_xattn.capture.calls import Run
from lightning_xattn.capture.events import Event, RecordLevel
from lightning_xattn.capture.extractor import NAME_IT, AttentionExtractor
from lightning_xattn.capture.layers import common_parent, describe_attention, layers_by_name, with_unique_names
from lightning_xattn.capture.masks import RecordedWeights
from lightning_xattn.capture.sources import SET_IT_ASIDE, Layer, Source
from lightning_xattn.capture.tensors import are_same
from lightning_xattn.capture.tokens import Tokens, describe_event, find_candidates, find_token_inputs
from lightning_xattn.capture.wrappers import plain_path
from lightning_xattn.core.attention import Direction
from lightning_xattn.core.errors import DiscoveryError, ShapeError

NAME_THEM = "Name them: attention={'<a>_to_<b>': 'path.to.module', '<b>_to_<a>': ...}."

BUDGET = 64 * 2**20
"""Bytes of weights that a first step may keep: what it does not keep is recorded from the next step on."""


@dataclass(frozen=True, eq=False)
class Found:
    """One attention that a first step has shown."""

    path: str
    """The module that computed it: the innermost one that got tokens."""
    number: int
    """Which of those it is that are computed in the step while this module runs, from 1 on."""
    turn: int
    """How many times the module had run before."""
    event: Event
    recorded: RecordedWeights | None
    """Its weights ``(batch, heads, queries, keys)`` and masks; None if they were not kept."""
    masks: RecordedWeights | None
    """Of self-attention whose masks show which of its tokens are real, with these in place of weights."""
    extractor: AttentionExtractor
    """What has read it, and knows how its rows are split into samples and heads."""
    alone: bool
    """Whether the module's path names it, as there is no other in its run."""
    mixed: bool
    """Whether the module got tokens of two kinds."""
    who: str
    """Shape, and which tokens ask which."""
    doubt: str | None = None
    """Why it is not clear whether this is the module's attention."""

    @property
    def tokens(self) -> tuple[int, int]:
        """Number of queries and of keys that are tokens."""
        return self.event.shape[-2], self.event.shape[-1] - self.event.extra_keys

    @property
    def may_cross(self) -> bool:
        """Whether it is not surely self-attention: keys may also be more than queries as some are kept, or pooled."""
        return self.mixed or self.tokens[0] != self.tokens[1]

    @property
    def sides(self) -> tuple[int, int] | None:
        """What distinguishes queries from keys: their number, or else where they stand in memory."""
        if self.tokens[0] != self.tokens[1]:
            return self.tokens
        given = self.event.tokens
        return None if given is None else (given[0].data_ptr(), given[1].data_ptr())

    def mirrors(self, other: Found) -> bool:
        """Whether the tokens that ask here are the very ones that are asked in the other."""
        here, there = self.event.tokens, other.event.tokens
        return here is not None and there is not None and are_same(here[0], there[1]) and are_same(here[1], there[0])


@dataclass(eq=False)
class Survey:
    """What a first step shows of a model."""

    root: nn.Module
    found: list[Found] = field(default_factory=list)
    """All attention to tokens."""
    _owned: set[Event] = field(default_factory=set)
    _counts: Counter[str] = field(default_factory=Counter)
    _budget: int = field(default_factory=lambda: BUDGET)

    def choose_level(self, run: Run, event: Event) -> RecordLevel:
        """Weights of what may go across, as far as the budget reaches, and masks of the rest that is not larger."""
        size = event.size
        crosses = not event.within and (Tokens.of(run, event.shape).kinds > 1 or event.shape[-2] != event.shape[-1])
        may_cross = not event.within and 4 * size <= self._budget  # as the flow of data may show afterwards
        if (crosses and size <= self._budget) or may_cross:
            self._budget -= size
            return RecordLevel.WEIGHTS
        return RecordLevel.MASKS if size <= BUDGET else RecordLevel.NOTHING

    def note_run(self, run: Run, output: Any) -> None:
        """Note what a run computed that ends now."""
        before = self._counts[run.path]
        self._counts[run.path] += len(run.events)
        mine = [
            event
            for event in run.events
            if event not in self._owned and (run.outer is None or find_token_inputs(run, event.shape))
        ]
        self._owned |= set(mine)
        mine = [event for event in find_candidates(run, across=False) if event in mine]
        across = find_candidates(run, across=True)
        for event in mine:
            extractor, recorded, doubt = AttentionExtractor(None, Source(run.path)), None, None
            number = before + run.events.index(event) + 1
            try:
                recorded = extractor.unfold(event.recorded, event, run)
                if event.level is RecordLevel.WEIGHTS and len(mine) == 1:
                    recorded = extractor.find_weights(run, output)
            except (DiscoveryError, ShapeError) as error:
                recorded, doubt = None, str(error).removesuffix(f". {NAME_IT}")
            mixed = not event.within if event.tokens is not None else Tokens.of(run, event.shape).kinds > 1
            found = Found(
                path=run.path,
                number=number,
                turn=run.turn,
                event=event,
                # A first step of a large model holds little.
                recorded=recorded if event.level is RecordLevel.WEIGHTS else None,
                masks=None if mixed else _keep_padding(recorded),
                extractor=extractor,
                alone=across == [event],
                mixed=mixed,
                who=describe_event(event, run),
                doubt=doubt,
            )
            self.found.append(found)
            if event.level is RecordLevel.MASKS:
                event.recorded = None
            event.used, event.tokens = None, event.tokens if mixed else None

    def source(self, found: Found) -> Source:
        """What to name to get this attention."""
        if not found.path or not found.alone:
            return Source(found.path, found.number)
        turns = 1 + max(other.turn for other in self.found if other.path == found.path)
        return Source(found.path, turn=found.turn, turns=turns)

    def name(self, found: Found) -> str:
        """The same as a user would write it."""
        source = self.source(found)
        call = found.number if source.call is None and source.turns > 1 else source.call
        return str(Source(plain_path(self.root, found.path), call))

    def list(self, found: Sequence[Found]) -> str:
        """Attention as a user would name it, with its shape and tokens."""
        return "; ".join(f"'{self.name(one)}' {one.who}" for one in found)

    def describe(self, what: str) -> str:
        """A message with all that ran, as it can be named, and how."""
        ran = self.list(self.found)
        ran = f"What ran: {ran}." if ran else f"No attention ran. {describe_attention(self.root)}"
        return (
            f"{what}. {ran} {NAME_THEM} For modalities that share one sequence: "
            "attention=JointSequence('path.to.module', spans={'<a>': (start, stop), '<b>': (start, stop)}). "
            + SET_IT_ASIDE
        )


def _keep_padding(recorded: RecordedWeights | None) -> RecordedWeights | None:
    real = None if recorded is None else recorded.padding_of_its_own
    return None if recorded is None or real is None else RecordedWeights(real, real, cropped=recorded.cropped)


def choose_layers(survey: Survey) -> tuple[tuple[Layer, ...], list[Found]]:
    """The layers that a first step has shown, and what may go across but was left out.

    Where names give directions, by the names; else by which tokens ask which. What is in doubt is left out, unless it
    is all there is.

    Raises
    ------
    DiscoveryError
        If nothing attends across, or it is not clear what pairs up or what the axes are; the message lists all that
        ran, as it can be named.
    """
    crossing = [found for found in survey.found if found.may_cross]
    layers = _by_name(survey, crossing)
    if not layers:
        across = [found for found in crossing if found.mixed]
        # A single query, as of a head that pools, is nobody's token.
        clear = [found for found in across if found.doubt is None and found.tokens[0] > 1]
        layers = _make_pair(survey, clear or across)
    chosen = {id(found) for layer in layers for _, source in layer.sources for found in _find_all_shown(survey, source)}
    doubt = next((found.doubt for found in survey.found if id(found) in chosen and found.doubt is not None), None)
    if doubt is not None:
        raise DiscoveryError(survey.describe(doubt))
    return tuple(layers), [found for found in crossing if id(found) not in chosen]


def _find_all_shown(survey: Survey, source: Source) -> list[Found]:
    """What a step has shown of a source: of its module, of those in it, or of the one that got its tokens."""
    inside, around = f"{source.path}.".lstrip("."), [found for found in survey.found if found.path]
    of_module = (
        [found for found in survey.found if found.path == source.path]
        or [found for found in survey.found if found.path.startswith(inside)]
        or [found for found in around if source.path.startswith(f"{found.path}.")]
    )
    by_turn = source.call is None
    return [one for one in of_module if (one.turn == source.turn if by_turn else one.number == source.call)]


def find_shown(survey: Survey, source: Source) -> Found | None:
    """The one attention that a first step has shown of a source that it has shown; None if it did not run."""
    return next(iter(_find_all_shown(survey, source)), None)


def _by_name(survey: Survey, crossing: Sequence[Found]) -> list[Layer]:
    layers = layers_by_name(survey.root, dict.fromkeys(found.path for found in crossing))

    def numbered(source: Source) -> Source:
        """The source with the number of the attention that surely crosses, in a module that computes several."""
        of_module = [found for found in survey.found if found.path == source.path]
        in_a_run = [found for found in of_module if found.turn == of_module[0].turn]
        across = [one for one in in_a_run if one.may_cross and (one.event.tokens or one.tokens[0] != one.tokens[1])]
        if len(in_a_run) == 1:
            return source
        if len(across) == 1 and not any(found.doubt for found in in_a_run if found is not across[0]):
            return Source(source.path, across[0].number)
        raise DiscoveryError(survey.describe(f"It is ambiguous which attention of module '{source.path}' is meant"))

    return [
        Layer(layer.name, tuple((direction, numbered(source)) for direction, source in layer.sources))
        for layer in layers
    ]


def _make_pair(survey: Survey, across: Sequence[Found]) -> list[Layer]:
    """Pair attention of opposite directions, in the order in which it ran."""
    if not across:
        raise DiscoveryError(survey.describe("No cross-attention ran"))
    groups: dict[frozenset[int], list[Found]] = defaultdict(list)
    for found in across:
        if found.sides is not None:
            groups[frozenset(found.sides)].append(found)
    if not groups:
        raise DiscoveryError(survey.describe(f"It is ambiguous whether '{survey.name(across[0])}' goes across"))
    equal = [group for group in groups.values() if group[0].tokens[0] == group[0].tokens[1]]
    if len(equal) > 1:
        raise DiscoveryError(survey.describe("It is ambiguous which tokens belong to one modality"))
    # A letter for each number of tokens, in the order in which they ask.
    across = [found for group in groups.values() for found in group]
    asking = dict.fromkeys(count for found in across for count in found.tokens if found.sides == found.tokens)
    letters = {count: chr(ord("a") + i) for i, count in enumerate(asking)}
    layers: list[Layer] = []
    for group in groups.values():
        there = [found for found in group if found.sides == group[0].sides]
        back = [found for found in group if found.sides != group[0].sides]
        if group in equal and not back:
            # Other tensors are not yet other modalities: queries and keys may be made of the same tokens.
            raise DiscoveryError(survey.describe(f"It is ambiguous whether '{survey.name(group[0])}' goes across"))
        if not _run_in_order(there, back):
            raise DiscoveryError(survey.describe("It is ambiguous which of these belong together"))
        queries, keys = there[0].tokens
        forward = Direction("a", "b") if queries == keys else Direction(letters[queries], letters[keys])
        for found, opposite in zip_longest(there, back):
            path = common_parent(found.path, (opposite or found).path)
            pair = ((forward, survey.source(found)), (forward.opposite, survey.source(opposite or found)))
            layers.append(Layer(plain_path(survey.root, path), pair if opposite else pair[:1]))
    return with_unique_names(layers)


def choose_layers_by_flow(survey: Survey, sides: Mapping[str, Sequence[tuple[str, str]]]) -> tuple[Layer, ...]:
    """The layers whose queries come from one modality and whose keys from another, as a labelled run has shown.

    Parameters
    ----------
    survey
        Of the same step.
    sides
        By a module's path, the modalities of the queries and the keys of each attention that is computed in it, or "".

    Raises
    ------
    DiscoveryError
        If there are none, or it is not clear what pairs up.
    """
    groups: dict[frozenset[str], list[tuple[Direction, Found]]] = defaultdict(list)
    for found in survey.found:
        of_module = sides.get(found.path, ())
        query, key = of_module[found.number - 1] if found.number <= len(of_module) else ("", "")
        if query and key and query != key and found.doubt is None:
            groups[frozenset((query, key))].append((Direction(query, key), found))
    if not groups:
        raise DiscoveryError(survey.describe("No cross-attention ran"))
    layers = []
    for group in groups.values():
        forward = group[0][0]
        there = [found for direction, found in group if direction == forward]
        back = [found for direction, found in group if direction != forward]
        if back and len(there) != len(back):
            raise DiscoveryError(survey.describe("It is ambiguous which of these belong together"))
        for one, opposite in zip_longest(there, back):
            path = common_parent(one.path, (opposite or one).path)
            sources = [(forward, survey.source(one))]
            sources += [] if opposite is None else [(forward.opposite, survey.source(opposite))]
            layers.append(Layer(plain_path(survey.root, path), tuple(sources)))
    return tuple(with_unique_names(layers))


def _run_in_order(there: Sequence[Found], back: Sequence[Found]) -> bool:
    """Whether attention of one direction and of the other goes together in the order in which it ran."""
    if back and len(there) != len(back):
        return False
    pairs = list(zip(there, back, strict=False))
    if any(found.mirrors(other) and not found.mirrors(opposite) for found, opposite in pairs for other in back):
        return False
    layers = _number_layers(there)
    return len(there) == 1 or (len(set(layers)) == len(there) and _number_layers(back or there) == layers)


def _number_layers(found: Sequence[Found]) -> list[tuple[str, ...]]:
    """Of the numbers in each path those that differ from layer to layer."""
    numbers = zip(*(re.findall(r"\d+", one.path) for one in found), strict=False)
    return list(zip(*(of_all for of_all in numbers if len(set(of_all)) > 1), strict=True))


def find_padding_source(survey: Survey, source: Source) -> AttentionExtractor | None:
    """Extracts the self-attention whose masks say which queries of a source are padding.

    It attends within as many tokens as there are queries, which keys must not be, and what it gives reaches the
    queries; of several the one nearest in the module tree. None where there is none, or where several that are as near
    have different masks.
    """
    shown = find_shown(survey, source)
    if shown is None or shown.tokens[0] == shown.tokens[1]:
        return None
    within = [
        one
        for one in survey.found
        if one.tokens == (shown.tokens[0], shown.tokens[0])
        and not one.mixed
        and one.doubt is None
        and one.event in shown.event.reached_by
    ]
    near = [len(common_parent(one.path, shown.path)) for one in within]
    nearest = [one for one, distance in zip(within, near, strict=True) if distance == max(near)]
    masks = [one.masks.weights for one in nearest if one.masks is not None]
    have_one_mask = len(masks) in (0, len(nearest)) and all(mask.equal(masks[0]) for mask in masks)
    if not nearest or not have_one_mask:
        return None
    # From the next step on it is this attention that is read, and of this step its mask alone.
    supplier = nearest[-1].extractor
    supplier.source, supplier.has_run = Source(nearest[-1].path, nearest[-1].number), True
    supplier.kept = nearest[-1].masks
    return supplier
