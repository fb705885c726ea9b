"""Which softmaxes and kernels are attention to tokens, and what their axes are, by the tokens that a module got."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from lightning_xattn.capture.calls import Run, find_readable_tensors, name_argument
from lightning_xattn.capture.events import Event
from lightning_xattn.capture.masks import Axes
from lightning_xattn.capture.tensors import has_address

_HEAD_COUNTS = ("num_heads", "n_heads", "n_head", "nhead", "nheads", "heads", "num_attention_heads", "head_num")


def find_token_inputs(run: Run, shape: Sequence[int]) -> list[Tensor]:
    """Those of a module's inputs that may be tokens: floating, with three axes or more, and no scores or masks.

    ``shape`` is that of its attention, ``(..., queries, keys)``.
    """
    has_weights = next(run.module.parameters(), None) is not None  # what has none, such as nn.Softmax, may get scores
    scores = set() if has_weights else {tuple(shape), (shape[0], *shape[2:]) if shape[1] == 1 else None}
    tensors = [
        value
        for value in find_readable_tensors((run.call.args, run.call.kwargs)).values()
        if value.is_floating_point() and value.dim() > 2 and tuple(value.shape) not in scores
    ]
    masks = (tuple(shape[-2:]), (1, shape[-1]))
    # Sequences as long and wide as there are queries and keys look like masks, too.
    widths = {one.shape[-1] for one in tensors if one.shape[-2:] not in masks}
    sequences = [one for one in tensors if one.dim() == 3]
    return [one for one in tensors if one.shape[-1] in widths] or sequences


@dataclass(frozen=True)
class Tokens:
    """The tokens among a module's inputs, or among those of the next one around it that got any."""

    batch: int | None
    """Number of samples; None where the inputs do not agree."""
    counts: tuple[int, ...]
    """Number of tokens of each different sequence."""
    elsewhere: frozenset[int]
    """What else may be a number of tokens: of images' pixels, and of sequences with a class token or a null key."""
    widths: frozenset[int]
    """Of the sequences."""
    sequence_first: int | None
    """How many samples there are if all sequences are ``(tokens, batch, width)``; None: they are not."""
    kinds: int
    """Number of different sequences and of images' shapes."""

    @classmethod
    def of(cls, run: Run, shape: Sequence[int]) -> Tokens:
        """The tokens of a module whose attention has this shape, ``(..., queries, keys)``."""
        tokens = next((found for outer in run.outwards() if (found := find_token_inputs(outer, shape))), [])
        sequences = list({value.data_ptr(): value for value in tokens if value.dim() == 3}.values())
        maps = [value.shape for value in tokens if value.dim() > 3]
        batches = {len(value) for value in tokens}
        batches = batches - {1} or batches  # what is of one sample among others goes for all of them
        second = {value.shape[1] for value in sequences} if sequences and not maps else set()
        sequence_first = second.pop() if len(second) == 1 else None
        batch, axis = (batches.pop(), 1) if len(batches) == 1 else (sequence_first, 0)
        counts = tuple(value.shape[axis] for value in sequences)
        others = tuple(value.shape[0] for value in sequences)
        if sequence_first is not None and not {*shape[-2:]} <= {*counts} and {*shape[-2:]} <= {*others}:
            batch, axis, counts = sequence_first, 0, others  # (tokens, batch, width)
        return cls(
            batch,
            counts,
            frozenset(n for one in maps for n in (prod(one[2:]), prod(one[1:-1]))) | {n + 1 for n in counts},
            frozenset(value.shape[2] for value in sequences),
            sequence_first,
            sum(value.shape[1 - axis] in (batch, shape[0]) for value in sequences) + len(set(maps)),
        )

    def are_asked_by(self, shape: Sequence[int]) -> bool:
        """Whether the last two axes are numbers of tokens, as those of attention are."""
        return {*shape[-2:]} <= {*self.counts, *self.elsewhere}


def find_candidates(run: Run, across: bool) -> list[Event]:
    """Those of the softmaxes and kernels in a run that may be attention to tokens.

    ``across``: attention from one sequence to another is meant, so what surely attends within one is left out, unless
    there is no other.
    """
    tokens = {event.shape: Tokens.of(run, event.shape) for event in run.events}
    found = [
        event for event in run.events if tokens[event.shape].are_asked_by(event.shape) or event.over_keys
    ] or [  # with queries of the module's own
        event
        for event in run.events
        if event.shape[-1] in tokens[event.shape].counts and event.shape[-2] > 1 and event.problem is None
    ]
    return [event for event in found if not (across and event.within)] or found


def describe_event(event: Event, run: Run) -> str:
    """The shape of an attention, and which tokens ask which, as far as numbers of tokens show."""
    queries, keys = event.shape[-2], event.shape[-1] - event.extra_keys
    who = f"{queries} queries{_name_tokens(queries, run)} ask {keys} keys{_name_tokens(keys, run)}"
    return f"{event.shape}: {who}" + (f" (cannot be read: {event.problem})" if event.problem else "")


def _name_tokens(count: int, run: Run) -> str:
    """The argument with this number of tokens, if it is one."""
    named = [(name_argument(run.module, path), one) for path, one in run.call.tensors() if has_address(one)]
    found = {t.data_ptr(): name for name, t in reversed(named) if t.dim() == 3 and t.shape[1] == count}
    return f" ({found.popitem()[1]})" if len(found) == 1 else ""


def find_axes(shape: Sequence[int], run: Run, event: Event | None = None) -> Axes | str:
    """What the axes of an attention are, or why that is in doubt, as a clause.

    Rows of three axes are samples and heads if both were folded into them, and no other evidence contradicts.
    ``event`` is what computed it; None of weights that are returned.
    """
    tokens = Tokens.of(run, shape)
    if len(shape) == 4:
        return _doubt(shape, tokens, event is not None and event.by != "softmax") or Axes()
    rows = shape[0]
    known = [count for count in (tokens.batch, tokens.sequence_first) if count is not None]
    own = find_head_count(run)
    folded = {} if event is None else event.folded
    heads_first, heads = next(iter(folded.items())) if len(folded) == 1 else (False, None)
    agrees = own == heads or (own is None and tokens.are_asked_by(shape))
    if heads and agrees and rows % heads == 0 and rows // heads in known:
        return Axes(heads, heads_first)
    if not known or rows in known:
        return Axes()
    has = "no attribute for its number of heads" if own is None else f"{own} heads by its attribute"
    order = "is known" if heads else "is not known"
    return (
        f"its first axis seems to hold more than the {known[0]} samples: heads, windows or frames. It has {rows} rows, "
        f"the module got {' or '.join(str(count) for count in dict.fromkeys(known))} samples and has {has}, and the "
        f"order in which they are folded {order}"
    )


def _doubt(shape: Sequence[int], tokens: Tokens, surely_keys: bool) -> str | None:
    """Why axes seem not to be ``(batch, heads, queries, keys)``; None: no evidence."""
    rows, heads, queries, keys = shape
    if tokens.batch not in (None, rows) and tokens.sequence_first != rows:
        if heads == tokens.batch:
            return "it seems to be (heads, batch, queries, keys)"
        if rows % tokens.batch == 0:
            return f"its first axis seems to hold more than the {tokens.batch} samples: heads, windows or frames"
    others = Counter(tokens.counts) - Counter([keys])
    if rows == tokens.batch and queries != 1 and queries not in tokens.counts and heads in others:
        return "it seems to be (batch, queries, heads, keys)"
    if not surely_keys and heads * keys in tokens.widths and keys not in {*tokens.counts, *tokens.elsewhere}:
        return "its last axis seems to be the width of a head, so that it is no attention to tokens"
    return None


def find_head_count(run: Run) -> int | None:
    """The number of heads by a module's attributes, or by those of the modules in it or around it."""
    for outer in run.outwards():
        # A module's own word counts before that of those in it.
        for modules in ((outer.module,), outer.module.modules()):
            if counts := {_own_head_count(module) for module in modules} - {None}:
                return counts.pop() if len(counts) == 1 else None
    return None


def _own_head_count(module: nn.Module) -> int | None:
    counts = (vars(module).get(name) for name in _HEAD_COUNTS)
    return next((count for count in counts if isinstance(count, int) and not isinstance(count, bool)), None)
