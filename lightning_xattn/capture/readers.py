"""How an attention is read at each function that computes one: a registry, one reader a function.

A reader runs the function, so that the model gets what it asked for bit for bit, and hands the attention to the mode.
If the mode edits the attention, the function runs with other keys and values, or weighs them differently.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from itertools import zip_longest
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_xattn.capture.masks import (
    MASKED,
    RecordedWeights,
    find_visible_keys,
    is_visible,
    separate_padding,
)
from lightning_xattn.capture.tensors import (
    Address,
    are_same,
    describe_kind,
    has_address,
    is_plain,
    run_as_called,
    shape_of,
    to_plain_tensor,
    unreadable_kind,
)
from lightning_xattn.core.scores import Scores

LARGE = 2**22
"""More weights than these are not kept but computed again, where that is possible."""


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

    def record(self, event: Event, read: Read | None = None, given: Tensor | None = None) -> None:
        """Called once it is computed; ``given`` is the tensor with its weights that the model gets."""


def _parameters(operator: Any) -> Call:
    return {argument.name: argument.default_value for argument in operator.default._schema.arguments}


_PARAMETERS: dict[Any, Call] = {
    F.multi_head_attention_forward: {
        name: parameter.default
        for name, parameter in inspect.signature(F.multi_head_attention_forward).parameters.items()
    },
    # Functions without a signature have a schema.
    F.scaled_dot_product_attention: _parameters(torch.ops.aten.scaled_dot_product_attention),
    torch._native_multi_head_attention: _parameters(torch.ops.aten._native_multi_head_attention),
    torch._transformer_encoder_layer_fwd: _parameters(torch.ops.aten._transformer_encoder_layer_fwd),
}


_FLEX: Call = {
    **dict.fromkeys(("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options")),
    **dict.fromkeys(("score_mod_other_buffers", "mask_mod_other_buffers"), ()),
}
"""Of ``flex_attention``, whose operator is not there before it is imported."""


def _arguments(function: Any, args: Sequence[Any], kwargs: Call) -> Call:
    """The arguments of a call by name, with the function's defaults."""
    parameters = _PARAMETERS.get(function, _FLEX)
    return parameters | dict(zip(parameters, args, strict=False)) | kwargs


def _find_problem(**tensors: Tensor | None) -> str | None:
    """Why an attention cannot be read: a tensor that holds no numbers; None: all hold some."""
    kinds = {name: unreadable_kind(one) for name, one in tensors.items() if one is not None}
    return next((f"its {name} is {kind}" for name, kind in kinds.items() if kind is not None), None)


def _ask_function(event: Event, ask: Read) -> RecordedWeights | None:
    """The attention that its own function gives when it is asked; None and a problem in the event where it fails."""
    try:
        return ask()
    except Exception as error:  # whatever a class of the user's raises
        why = (str(error).splitlines() or [type(error).__name__])[0]
        event.problem = f"asked for its weights, it fails ({why})"
        return None


def _read_multihead(function: Any, args: Sequence[Any], kwargs: Call, mode: ReaderContext) -> Any:
    """``F.multi_head_attention_forward``.

    A caller that asks for weights gets the function to compute them per head, and they are averaged for it afterwards
    as the function would have done. For a caller that does not, or that gets them after dropout, they are computed once
    more, which leaves it its fused kernel.
    """
    call = _arguments(function, args, kwargs)
    query, key, static = call["query"], call["key"], call["static_k"]
    batched = query.dim() == 3
    extra = int(call["bias_k"] is not None) + int(call["add_zero_attn"])
    keys = (key.shape[0] if static is None else static.shape[1]) + extra
    shape = (query.shape[1] if batched else 1, call["num_heads"], query.shape[0], keys)
    masks = {name: call[name] for name in ("key_padding_mask", "attn_mask")}
    unknown = [
        f"its {name} is {describe_kind(one)}" for name, one in masks.items() if one is not None and not is_plain(one)
    ]
    problem = next(iter(unknown), None) or _find_problem(query=query, key=key)
    size = 4 * shape[0] * (shape[2] + keys) * query.shape[-1]
    event = Event("multi_head_attention_forward", shape, query.device, (query, key), extra, problem, size=size)
    edit = mode.begin(event, query)
    if edit is not None:
        call |= _edit_multihead(call, edit)
    dropped = call["training"] and call["dropout_p"] > 0
    wanted = event.level is RecordLevel.WEIGHTS
    is_large = prod(shape) > LARGE
    takes_average = wanted and call["need_weights"] and call["average_attn_weights"] and not dropped and not is_large
    if takes_average:
        call["average_attn_weights"] = False
    as_called = edit is None and not takes_average
    output, weights = function(*args, **kwargs) if as_called else function(**call)

    def read() -> RecordedWeights:
        found: Tensor | Scores
        parts = [one for name, one in call.items() if name in _PROJECTED and isinstance(one, Tensor)]
        is_missing = dropped or weights is None or weights.dim() == query.dim()  # an average
        if not wanted:
            found = _no_values(event)
        elif (is_missing or is_large) and all(map(is_plain, parts)):
            found = _project_tokens(call)
        elif is_missing:
            found = _ask_for_weights(function, call)
        else:
            given = weights.detach() if batched else weights.detach()[None]
            # The caller may change in place what it gets; the average that it asked for is a tensor of its own.
            found = given if takes_average else given.clone()
        return _with_masks(found, call, extra)

    mode.record(event, lambda: _ask_function(event, read), None if takes_average else weights)
    if takes_average:
        weights = weights.mean(dim=1 if batched else 0)
    return output, weights


def _read_packed(function: Any, args: Sequence[Any], kwargs: Call, mode: ReaderContext) -> Any:
    """The fast paths of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``.

    They are self-attention whose scores are computed once more.
    """
    call = _arguments(function, args, kwargs)
    tokens, mask = next(iter(call.values())), call["mask"]
    heads = call["num_heads"] if "num_heads" in call else call["num_head"]
    result = function(*args, **kwargs)
    nested = tokens.is_nested
    batch, length = (tokens.size(0), max(map(len, tokens.unbind()))) if nested else tokens.shape[:2]
    size = 8 * batch * length * tokens.size(2)
    shape = (batch, heads, length, length)
    event = Event("a fast path of torch", shape, tokens.device, (tokens, tokens), size=size)
    mode.begin(event, tokens)

    def read() -> RecordedWeights:
        asks, padding, attention_mask = tokens, None, None
        if nested:  # so nn.TransformerEncoder packs padded sequences; what is padding in all of them is gone by then
            lengths = torch.tensor([len(sample) for sample in tokens.unbind()], device=tokens.device)
            asks = tokens.detach().to_padded_tensor(0.0)
            padding = torch.arange(length, device=tokens.device) >= lengths[:, None]
        if mask is not None and call["mask_type"] == 1:
            padding = mask
        elif mask is not None:
            attention_mask = mask if mask.dim() == 2 else mask.expand(batch, heads, -1, -1).flatten(0, 1)
        if call.get("norm_first"):
            weight, bias = call["norm_weight_1"].float(), call["norm_bias_1"].float()
            asks = F.layer_norm(asks.float(), asks.shape[-1:], weight, bias, call["eps"])
        asks = asks.transpose(0, 1)
        projection = {"in_proj_weight": call["qkv_weight"], "in_proj_bias": call["qkv_bias"], "num_heads": heads}
        masks = {"key_padding_mask": padding, "attn_mask": attention_mask}
        wanted = event.level is RecordLevel.WEIGHTS
        source = _project_tokens({"query": asks, "key": asks, **projection, **masks}) if wanted else _no_values(event)
        recorded = _with_masks(source, masks, cropped=nested)
        return recorded if padding is not None else separate_padding(recorded)

    mode.record(event, read)
    return result


_PROJECTED = (
    *("query", "key", "in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "bias_k", "static_k"),
)
"""The arguments of ``F.multi_head_attention_forward`` that its weights are made of, beside its masks."""


def _ask_for_weights(function: Any, call: Call) -> Tensor:
    """The weights ``(batch, heads, queries, keys)`` that ``F.multi_head_attention_forward`` gives when it is asked."""
    with run_as_called():
        _, given = function(**call | {"training": False, "need_weights": True, "average_attn_weights": False})
    weights = to_plain_tensor(given)
    return weights if weights.dim() == 4 else weights[None]


def _project_tokens(call: Call) -> Scores:
    """``Q K^T / sqrt(d) + masks`` ``(batch, heads, queries, keys)`` of tokens that are not projected yet.

    In float32 whatever the model's precision: a product of unscaled half-precision numbers can overflow where the
    fused kernel, which scales first, does not.
    """
    heads = call["num_heads"]
    query_weight, key_weight, _ = _split_projection(call)
    bias = call["in_proj_bias"]
    query_bias, key_bias, _ = (None, None, None) if bias is None else bias.float().chunk(3)

    def split(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tokens = tokens[:, None] if tokens.dim() == 2 else tokens  # (tokens, batch, width) from here on
        by_head: Tensor = F.linear(tokens.float(), weight.float(), bias).unflatten(-1, (heads, -1))
        return by_head.permute(1, 2, 0, 3)

    query, key = split(call["query"], query_weight, query_bias), split(call["key"], key_weight, key_bias)
    if call.get("static_k") is not None:
        key = call["static_k"].float().unflatten(0, (-1, heads))
    extra = 0
    if call.get("bias_k") is not None:
        learned = call["bias_k"].float().reshape(1, heads, 1, -1)
        key, extra = torch.cat([key, learned.expand(len(key), -1, -1, -1)], dim=2), 1
    if call.get("add_zero_attn"):
        key, extra = F.pad(key, (0, 0, 0, 1)), extra + 1
    padding, attention_mask = call["key_padding_mask"], call["attn_mask"]
    biases = [
        None if padding is None else padding.reshape(len(key), 1, 1, -1),
        None if attention_mask is None else _per_head(attention_mask, heads),
    ]
    # What a mask of booleans hides, or one of numbers hides altogether, is no bias: ``_with_masks`` has it.
    added = (F.pad(one.float(), (0, extra)) for one in biases if one is not None and one.dtype != torch.bool)
    return Scores(query * query.shape[-1] ** -0.5, key, tuple(one.clone() for one in added))


def _split_projection(call: Call) -> list[Any]:
    if call.get("use_separate_proj_weight"):
        return [call.get(f"{name}_proj_weight") for name in "qkv"]
    return list(call["in_proj_weight"].chunk(3))


def _with_masks(source: Tensor | Scores, call: Call, extra: int = 0, cropped: bool = False) -> RecordedWeights:
    padding, attention_mask = call["key_padding_mask"], call["attn_mask"]
    key_mask = visible = None
    if padding is not None:
        key_mask = F.pad(is_visible(padding.reshape(source.shape[0], -1)), (0, extra), value=True)
    if attention_mask is not None:
        visible = F.pad(is_visible(_per_head(attention_mask, source.shape[1])), (0, extra), value=True)
    return RecordedWeights(source, key_mask, visible, extra, cropped=cropped)


def _no_values(event: Event) -> Tensor:
    return torch.empty((), device=event.device).expand(event.shape)


def _per_head(mask: Tensor, heads: int) -> Tensor:
    """Broadcastable to the weights: ``(queries, keys)`` for all, or ``(batch * heads, queries, keys)``."""
    return mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, heads))


def _edit_multihead(call: Call, edit: Edit) -> Call:
    """Other arguments of ``multi_head_attention_forward``, whose samples are the second axis."""
    key, value = call["key"], call["value"]
    if edit.tokens is not None:
        key, value = (one.transpose(0, -2) for one in edit.tokens(key.transpose(0, -2), value.transpose(0, -2)))
    if edit.weights is None:
        return {"key": key, "value": value}
    # To weigh what the values are projected to, their bias must be weighed, too: it is one more weight of each value,
    # to which a 1 is added.
    separate = _split_projection(call)
    bias = call["in_proj_bias"]
    if bias is not None:
        of_values = bias.chunk(3)[2]
        separate[2] = torch.cat([separate[2], of_values[:, None]], dim=1)
        value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
        bias = torch.cat([*bias.chunk(3)[:2], torch.zeros_like(of_values)])
    weighed = value * edit.weights.T[..., None].to(value.dtype)
    weights = {f"{name}_proj_weight": one for name, one in zip("qkv", separate, strict=True)}
    return {"key": key, "value": weighed, "use_separate_proj_weight": True, "in_proj_bias": bias} | weights


def _read_kernel(function: Any, args: Sequence[Any], kwargs: Call, mode: ReaderContext) -> Any:
    """``F.scaled_dot_product_attention``, whose weights are computed once more, and ``flex_attention``.

    The scores and masks of the latter are functions of the user's: it is asked for its weights, as are kernels that get
    tensors of a class of their own.
    """
    call, is_flex = _arguments(function, args, kwargs), function not in READERS
    query, key, mask = call["query"], call["key"], call.get("attn_mask")
    if query.dim() < 2 or key.dim() < 2:
        return function(*args, **kwargs)
    shape = _shape_of_kernel(query, key)
    problem = _find_problem(query=query, key=key, attn_mask=mask)
    if problem is None and len(shape) not in (3, 4):
        problem = "it has other axes than (batch, heads, queries, keys)"
    by = "flex_attention" if is_flex else "scaled_dot_product_attention"
    is_known = not is_flex and all(is_plain(one) for one in (query, key, mask) if one is not None)
    size = 4 * prod(shape[:-2]) * sum(shape[-2:]) * query.shape[-1] if is_known and problem is None else 0
    event = Event(by, shape, query.device, problem=problem, over_keys=len(shape) in (3, 4), size=size)
    edit = mode.begin(event, query)
    call |= {} if edit is None else _edit_kernel(call, edit, event)
    result = function(*args, **kwargs) if edit is None else function(**call)

    def read() -> RecordedWeights | None:
        if is_known:
            return _read_kernel_scores(event, call)
        return _ask_function(event, lambda: _weigh_identity(event, function, call, is_flex))

    mode.record(event, read)
    return result


def _shape_of_kernel(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """That of its weights: samples and heads of which there is one are broadcast, as are a group's keys."""
    (*of_queries, queries, _), (*of_keys, keys, _) = shape_of(query), shape_of(key)
    rows = [max(sizes) for sizes in zip_longest(of_queries[::-1], of_keys[::-1], fillvalue=1)]
    return *rows[::-1], queries, keys


def _edit_kernel(call: Call, edit: Edit, event: Event) -> Call:
    """Other keys and values, whose samples are the first axis; those that are the same for all have one of each."""
    key, value = (
        one.expand(event.shape[0], *one.shape[1:]) if len(one) == 1 else one for one in (call["key"], call["value"])
    )
    if edit.tokens is not None:
        key, value = edit.tokens(key, value)
    if edit.weights is not None:
        value = value * _over_heads(edit.weights, len(event.shape))[..., None].to(key.dtype)
    return {"key": key, "value": value}


def _weigh_identity(event: Event, function: Any, call: Call, is_flex: bool) -> RecordedWeights:
    """How a function weighs an identity matrix as values: with its weights, whatever its masks are.

    A key is hidden to which a query of 0 gives no weight.
    """
    query, value, (queries, keys) = call["query"], call["value"], event.shape[-2:]
    whole = torch.eye(keys, dtype=value.dtype, device=value.device).expand(*value.shape[:-2], keys, keys)
    # Where keys are many and queries few, no more at once than the weights, or the values, need.
    columns = whole.split(max(queries, value.shape[-1]), dim=-1)

    def weigh(query: Tensor) -> Tensor:
        # What flex_attention gives is rounded as its queries are, while its scores are not.
        changed = {"key": call["key"].to(query.dtype)} if is_flex else {"dropout_p": 0.0}
        given = [function(**call | changed | {"query": query, "value": some.to(query.dtype)}) for some in columns]
        weights = torch.cat([to_plain_tensor(one[0] if is_flex else one) for one in given], dim=-1)
        if weights.shape != event.shape:
            raise ValueError(f"it gives {tuple(weights.shape)}")
        return weights

    with run_as_called():
        # A bias by distance, as of ALiBi, may add -500, of which exp is 0 in single precision.
        finest = torch.float32 if query.device.type == "mps" else torch.float64
        visible = weigh(torch.zeros_like(query, dtype=finest if is_flex else None)) > 0
        if event.level is not RecordLevel.WEIGHTS:
            return RecordedWeights(_no_values(event), visible=visible)
        asks = query.to(torch.promote_types(query.dtype, torch.float32)) if is_flex else query
        return RecordedWeights(weigh(asks), visible=visible)


def _over_heads(weights: Tensor, axes: int) -> Tensor:
    """``(samples, keys)`` with an axis for the heads, if there are as many axes."""
    return weights if axes == 3 else weights[:, None]


def _read_kernel_scores(event: Event, call: Call) -> RecordedWeights:
    """``Q K^T scale + mask`` in float32, as the kernel's documentation defines it."""
    mask, scale, visible = call["attn_mask"], call["scale"], None
    if mask is not None:
        # Copied, as the model may change its mask in place.
        visible = mask.clone() if mask.dtype == torch.bool else ~(mask <= MASKED)
    if visible is not None:
        visible = visible[(None,) * (len(event.shape) - visible.dim())]
    if event.level is not RecordLevel.WEIGHTS:
        return RecordedWeights(_no_values(event), visible=visible)
    # Copied, as the model may change in place what it gave the kernel.
    query, key = call["query"].float(), call["key"].float().clone()
    biases: tuple[Tensor, ...] = ()
    if call["enable_gqa"]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    query, key = (one.expand(*event.shape[:-2], *one.shape[-2:]) for one in (query, key))
    if mask is not None and mask.dtype != torch.bool:
        biases = (mask[(None,) * (len(event.shape) - mask.dim())].float().clone(),)
    scores = Scores(query, key, biases)
    if call["is_causal"]:
        places = [torch.arange(tokens, device=event.device)[None] for tokens in event.shape[-2:]]
        scores = replace(scores, query_places=places[0], key_places=places[1])
    return RecordedWeights(scores, visible=visible)


def _read_softmax(function: Any, args: Sequence[Any], kwargs: Call, mode: ReaderContext) -> Any:
    """A softmax over the last axis, or the last but one, of at least three; its result is copied, before dropout."""
    call = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    scores, axis = call["input"], call.get("dim")
    turned = axis in (-2, scores.dim() - 2)
    if scores.dim() < 3 or not (turned or axis in (-1, scores.dim() - 1)):
        return function(*args, **kwargs)
    sizes = shape_of(scores)
    shape = (*sizes[:-2], sizes[-1], sizes[-2]) if turned else sizes
    problem = None if is_plain(scores) else f"its scores are {describe_kind(scores)}"
    if problem is None and len(shape) > 4:
        problem = "it has other axes than (batch, heads, queries, keys)"
    event = Event("softmax", shape, scores.device, problem=problem, over_keys=len(shape) == 4 and not turned)
    edit = mode.begin(event, scores)
    result = function(*args, **kwargs)
    if edit is not None and edit.weights is not None:
        weighed = _over_heads(edit.weights, len(shape))[..., None, :].to(result.dtype)
        result = result * (weighed.mT if turned else weighed)

    def read() -> RecordedWeights:
        given, weights = (scores.mT, result.mT) if turned else (scores, result)
        visible = find_visible_keys(given.detach(), weights.detach())
        # Copied, as the model may change it in place.
        wanted = event.level is RecordLevel.WEIGHTS
        return RecordedWeights(weights.detach().clone() if wanted else _no_values(event), visible=visible)

    if has_address(result):
        mode.record(event, read, result)
    elif problem is not None:
        mode.record(event)
    return result


Reader = Callable[[Any, Sequence[Any], Call, ReaderContext], Any]

READERS: dict[Any, Reader] = {
    F.multi_head_attention_forward: _read_multihead,
    F.scaled_dot_product_attention: _read_kernel,
    torch._native_multi_head_attention: _read_packed,
    torch._transformer_encoder_layer_fwd: _read_packed,
    **dict.fromkeys((torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax), _read_softmax),
}


def find_reader(function: Any) -> Reader | None:
    """How the attention is read that a function computes; None if it computes none."""
    reader = READERS.get(function)
    if reader is None and isinstance(function, torch._ops.HigherOrderOperator) and function.name() == "flex_attention":
        return _read_kernel
    return reader
