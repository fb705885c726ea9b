"""One attention that is computed while a model runs, and what a reader needs of the mode that watches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_xattn.capture.masks import RecordedWeights
from lightning_xattn.capture.tensors import Address, are_same, unreadable_kind


class RecordLevel(Enum):
    """What is to be recorded of an attention."""

    NOTHING = 0
    MASKS = 1
    WEIGHTS = 2


@dataclass(eq=False)
class Event:
    """One attention that is computed."""

    by: str
    """The name of the function."""
    shape: tuple[int, ...]
    """``(batch, heads, queries, keys)`` or ``(rows, queries, keys)``, as the function has it; of what cannot be read
    any axes, the last two being those of queries and keys."""
    device: torch.device
    tokens: tuple[Tensor, Tensor] | None = None
    """The tokens that ask and those that are asked, if the function gets tokens; its axes and masks are then known."""
    extra_keys: int = 0
    """How many of the last keys are no tokens."""
    problem: str | None = None
    """Why it cannot be read; None: it can."""
    over_keys: bool = True
    """Whether the keys are surely keys: not so of a softmax over other axes than the last of four."""
    level: RecordLevel = RecordLevel.NOTHING
    recorded: RecordedWeights | None = None
    """The weights and masks with the axes of ``shape``; None of what is not wanted, or cannot be read."""
    result: Address | None = None
    """Where the function put the weights; None if it put them nowhere."""
    folded: dict[bool, int] = field(default_factory=dict)
    """The number of heads that were folded into its rows, by whether heads come before the samples."""
    reached_by: frozenset[Event] = frozenset()
    """The attention whose output reaches what asks, if that is followed."""
    used: Tensor | None = None
    """What the module multiplied its values with, if that is not what the softmax gave."""
    size: int = 0
    """How many bytes it takes to record it; 0: as many as its weights have."""

    def __post_init__(self) -> None:
        self.size = self.size or 4 * prod(self.shape)

    @cached_property
    def within(self) -> bool:
        """Whether the tokens that ask are surely those that are asked."""
        return self.tokens is not None and are_same(*self.tokens)

    def gave(self, tensor: Tensor) -> bool:
        """Whether the function put its weights into this tensor (dropout that drops nothing passes them on)."""
        return self.result is not None and self.result.holds(tensor)


@dataclass(frozen=True, eq=False)
class Edit:
    """What is to be changed of an attention before it is computed, whose samples are the first axis of its rows."""

    tokens: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """Gets keys and values ``(samples, ..., keys, width)`` as the function has them, and gives those to take; None:
    these. A softmax has none, and does not call it."""
    weights: Tensor | None = None
    """``(samples, keys)`` by which the weights that go to each key are multiplied, after the softmax; None: by 1."""


Read = Callable[[], RecordedWeights | None]
"""Gives weights and masks; if only masks are wanted, weights without values. None: the event has a problem."""


Call = dict[str, Any]
"""The arguments of a function by their names."""


class ReaderContext(Protocol):
    """What a reader hands an attention to."""

    def begin(self, event: Event, asks: Tensor) -> Edit | None:
        """Called before it is computed, with what asks (queries or scores): what is to be changed; None: nothing."""

    def keep(self, mask: Tensor, what: str, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What is made of a copy of a mask, once in a step for all attention that gets the same mask unchanged."""

    def record(self, event: Event, read: Read | None = None, given: Tensor | None = None) -> None:
        """Called once it is computed; ``given`` is the tensor with its weights that the model gets."""


def list_parameters(operator: Any) -> Call:
    """The parameters of an operator of torch's by name, with its defaults."""
    return {argument.name: argument.default_value for argument in operator.default._schema.arguments}


def find_problem(**tensors: Tensor | None) -> str | None:
    """Why an attention cannot be read: a tensor that holds no numbers; None: all hold some."""
    kinds = {name: unreadable_kind(one) for name, one in tensors.items() if one is not None}
    return next((f"its {name} is {kind}" for name, kind in kinds.items() if kind is not None), None)


def ask_function(event: Event, ask: Read) -> RecordedWeights | None:
    """The attention that its own function gives when it is asked; None and a problem in the event where it fails."""
    try:
        return ask()
    except Exception as error:  # whatever a class of the user's raises
        why = (str(error).splitlines() or [type(error).__name__])[0]
        event.problem = f"asked for its weights, it fails ({why})"
        return None


def no_values(event: Event) -> Tensor:
    """What stands for the weights of an attention of which only masks are wanted."""
    return torch.empty((), device=event.device).expand(event.shape)


def over_heads(weights: Tensor, axes: int) -> Tensor:
    """``(samples, keys)`` with an axis for the heads, if there are as many axes."""
    return weights if axes == 3 else weights[:, None]


def fill_arguments(parameters: Call, args: Sequence[Any], kwargs: Call) -> Call:
    """The arguments of a call by name, with the function's defaults."""
    return parameters | dict(zip(parameters, args, strict=False)) | kwargs
