"""How an attention is read at a fused kernel: torch's own, ``flex_attention``, and those of other packages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_xattn.capture.events import (
    Call,
    Edit,
    Event,
    ReaderContext,
    RecordLevel,
    ask_function,
    fill_arguments,
    find_problem,
    list_parameters,
    no_values,
    over_heads,
)
from lightning_xattn.capture.masks import MASKED, RecordedWeights
from lightning_xattn.capture.tensors import is_plain, run_as_called, shape_of, to_plain_tensor
from lightning_xattn.core.scores import Scores

_TORCHS = list_parameters(torch.ops.aten.scaled_dot_product_attention)

_FLEX: Call = {
    **dict.fromkeys(("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options")),
    **dict.fromkeys(("score_mod_other_buffers", "mask_mod_other_buffers"), ()),
}
"""Of ``flex_attention``, whose operator is not there before it is imported."""


def read_kernel(function: Any, args: Sequence[Any], kwargs: Call, mode: ReaderContext) -> Any:
    """``F.scaled_dot_product_attention``, whose weights are computed once more, and ``flex_attention``.

    The scores and masks of the latter are functions of the user's: it is asked for its weights, as are kernels that get
    tensors of a class of their own.
    """
    is_flex = function is not F.scaled_dot_product_attention
    call = fill_arguments(_FLEX if is_flex else _TORCHS, args, kwargs)
    query, key, mask = call["query"], call["key"], call.get("attn_mask")
    if query.dim() < 2 or key.dim() < 2:
        return function(*args, **kwargs)
    shape = _shape_of_kernel(query, key)
    problem = find_problem(query=query, key=key, attn_mask=mask)
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
            return _read_kernel_scores(event, call, mode)
        return ask_function(event, lambda: _weigh_identity(event, function, call, is_flex))

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
        value = value * over_heads(edit.weights, len(event.shape))[..., None].to(key.dtype)
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
            return RecordedWeights(no_values(event), visible=visible)
        asks = query.to(torch.promote_types(query.dtype, torch.float32)) if is_flex else query
        return RecordedWeights(weigh(asks), visible=visible)


def _read_kernel_scores(event: Event, call: Call, mode: ReaderContext) -> RecordedWeights:
    """``Q K^T scale + mask`` in float32, as the kernel's documentation defines it."""
    mask, scale, visible = call["attn_mask"], call["scale"], None
    if mask is not None:  # copied, as the model may change its mask in place
        visible = mode.keep(mask, "visible", lambda one: one if one.dtype == torch.bool else ~(one <= MASKED))
    if visible is not None:
        visible = visible[(None,) * (len(event.shape) - visible.dim())]
    if event.level is not RecordLevel.WEIGHTS:
        return RecordedWeights(no_values(event), visible=visible)
    # Copied, as the model may change in place what it gave the kernel.
    query, key = call["query"].float(), call["key"].float().clone()
    biases: tuple[Tensor, ...] = ()
    if call["enable_gqa"]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    query, key = (one.expand(*event.shape[:-2], *one.shape[-2:]) for one in (query, key))
    if mask is not None and mask.dtype != torch.bool:
        bias = mode.keep(mask, "bias", Tensor.float)
        biases = (bias[(None,) * (len(event.shape) - mask.dim())],)
    scores = Scores(query, key, biases)
    if call["is_causal"]:
        places = [torch.arange(tokens, device=event.device)[None] for tokens in event.shape[-2:]]
        scores = replace(scores, query_places=places[0], key_places=places[1])
    return RecordedWeights(scores, visible=visible)


FLASH = "flash_attn::_flash_attn_forward"
"""The kernel of the package flash_attn, whose tokens are ``(batch, tokens, heads, width)``."""

USE_TORCHS = (
    "use torch's scaled_dot_product_attention, which is as fast and is seen; a Hugging Face model does with "
    "attn_implementation='sdpa'"
)


def _read_flash(function: Any, args: Sequence[Any], kwargs: Call, mode: ReaderContext) -> Any:
    """``flash_attn``, whose scores are computed once more; what else than a causal mask it may do is refused."""
    call = fill_arguments(_list_parameters_of(function), args, kwargs)
    query, key = (call[name].transpose(1, 2) for name in ("q", "k"))
    shape = *query.shape[:3], key.shape[2]
    windows = [call.get(name) for name in ("window_size_left", "window_size_right")]
    others = {
        "a window": any(one not in (None, -1) for one in windows),
        "a soft cap": bool(call.get("softcap")),
        "ALiBi slopes": call.get("alibi_slopes") is not None,
    }
    has = next((name for name, there in others.items() if there), None)
    problem = f"flash_attn computes it with {has}; {USE_TORCHS}" if has else find_problem(q=query, k=key)
    size = 4 * prod(shape[:2]) * sum(shape[2:]) * query.shape[-1]
    event = Event("flash_attn", shape, query.device, problem=problem, size=size)
    if mode.begin(event, call["q"]) is not None:
        raise NotImplementedError(f"The attention of flash_attn cannot be changed; {USE_TORCHS}.")
    result = function(*args, **kwargs)

    def read() -> RecordedWeights:
        if event.level is not RecordLevel.WEIGHTS:
            return RecordedWeights(no_values(event))
        queries, keys = shape[2:]
        of_group = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = Scores(query.float() * call["softmax_scale"], of_group.float().clone())
        if call["causal"]:  # the last query sees all keys
            places = [torch.arange(tokens, device=event.device)[None] for tokens in (queries, keys)]
            scores = replace(scores, query_places=places[0] + keys - queries, key_places=places[1])
        return RecordedWeights(scores)

    mode.record(event, read)
    return result


def _refuse_kernel(function: Any, args: Sequence[Any], kwargs: Call, mode: ReaderContext) -> Any:
    """A kernel of another package, whose arguments mean what is not known here."""
    tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.dim() > 2]
    if len(tensors) >= 3:
        query, key = tensors[:2]
        name = _name_operator(function)
        problem = f"it is computed by the kernel {name}, which is not known here; {USE_TORCHS}"
        shape = *query.shape[:-3], query.shape[-3], key.shape[-3]
        event = Event(name, shape if len(shape) > 2 else (1, *shape), query.device, problem=problem)
        mode.begin(event, query)
        mode.record(event)
    return function(*args, **kwargs)


def _name_operator(function: Any) -> str:
    """The name of a registered operator, such as ``flash_attn::_flash_attn_forward``; "" of another function."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        return str(function._qualified_op_name)
    is_operator = isinstance(function, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))
    return str(function.name()) if is_operator else ""


def _list_parameters_of(function: Any) -> Call:
    overload = function if isinstance(function, torch._ops.OpOverload) else function.default
    return {argument.name: argument.default_value for argument in overload._schema.arguments}


def find_kernel_reader(function: Any) -> Any:
    """How the attention is read that an operator computes, torch's own functions apart; None if it computes none."""
    if not isinstance(function, (torch._ops.OpOverloadPacket, torch._ops.OperatorBase)):
        return None
    name = _name_operator(function)
    if name == "flex_attention":
        return read_kernel
    if name == FLASH:
        return _read_flash
    package, _, operator = name.partition("::")
    is_attention = "attention" in operator or "attn" in operator
    return _refuse_kernel if is_attention and "backward" not in operator and package != "prim" else None
