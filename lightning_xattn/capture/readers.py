"""How an attention is read at each function that computes one: a registry, one reader a function.

A reader runs the function, so that the model gets what it asked for bit for bit, and hands the attention to the mode.
If the mode edits the attention, the function runs with other keys and values, or weighs them differently.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
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
from lightning_xattn.capture.kernels import find_kernel_reader, read_kernel
from lightning_xattn.capture.masks import (
    RecordedWeights,
    find_visible_keys,
    is_visible,
    separate_padding,
)
from lightning_xattn.capture.tensors import (
    describe_kind,
    has_address,
    is_plain,
    run_as_called,
    shape_of,
    to_plain_tensor,
)
from lightning_xattn.core.scores import Scores

LARGE = 2**22
"""More weights than these are not kept but computed again, where that is possible."""

_PARAMETERS: dict[Any, Call] = {
    F.multi_head_attention_forward: {
        name: parameter.default
        for name, parameter in inspect.signature(F.multi_head_attention_forward).parameters.items()
    },
    # Functions without a signature have a schema.
    torch._native_multi_head_attention: list_parameters(torch.ops.aten._native_multi_head_attention),
    torch._transformer_encoder_layer_fwd: list_parameters(torch.ops.aten._transformer_encoder_layer_fwd),
}


def _read_multihead(function: Any, args: Sequence[Any], kwargs: Call, mode: ReaderContext) -> Any:
    """``F.multi_head_attention_forward``.

    A caller that asks for weights gets the function to compute them per head, and they are averaged for it afterwards
    as the function would have done. For a caller that does not, or that gets them after dropout, they are computed once
    more, which leaves it its fused kernel.
    """
    call = fill_arguments(_PARAMETERS[function], args, kwargs)
    query, key, static = call["query"], call["key"], call["static_k"]
    batched = query.dim() == 3
    extra = int(call["bias_k"] is not None) + int(call["add_zero_attn"])
    keys = (key.shape[0] if static is None else static.shape[1]) + extra
    shape = (query.shape[1] if batched else 1, call["num_heads"], query.shape[0], keys)
    masks = {name: call[name] for name in ("key_padding_mask", "attn_mask")}
    unknown = [
        f"its {name} is {describe_kind(one)}" for name, one in masks.items() if one is not None and not is_plain(one)
    ]
    problem = next(iter(unknown), None) or find_problem(query=query, key=key)
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
            found = no_values(event)
        elif (is_missing or is_large) and all(map(is_plain, parts)):
            found = _project_tokens(call)
        elif is_missing:
            found = _ask_for_weights(function, call)
        else:
            given = weights.detach() if batched else weights.detach()[None]
            # The caller may change in place what it gets; the average that it asked for is a tensor of its own.
            found = given if takes_average else given.clone()
        return _with_masks(found, call, extra)

    mode.record(event, lambda: ask_function(event, read), None if takes_average else weights)
    if takes_average:
        weights = weights.mean(dim=1 if batched else 0)
    return output, weights


def _read_packed(function: Any, args: Sequence[Any], kwargs: Call, mode: ReaderContext) -> Any:
    """The fast paths of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``.

    They are self-attention whose scores are computed once more.
    """
    call = fill_arguments(_PARAMETERS[function], args, kwargs)
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
        source = _project_tokens({"query": asks, "key": asks, **projection, **masks}) if wanted else no_values(event)
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
        weighed = over_heads(edit.weights, len(shape))[..., None, :].to(result.dtype)
        result = result * (weighed.mT if turned else weighed)

    def read() -> RecordedWeights:
        given, weights = (scores.mT, result.mT) if turned else (scores, result)
        visible = find_visible_keys(given.detach(), weights.detach())
        # Copied, as the model may change it in place.
        wanted = event.level is RecordLevel.WEIGHTS
        return RecordedWeights(weights.detach().clone() if wanted else no_values(event), visible=visible)

    if has_address(result):
        mode.record(event, read, result)
    elif problem is not None:
        mode.record(event)
    return result


Reader = Callable[[Any, Sequence[Any], Call, ReaderContext], Any]

READERS: dict[Any, Reader] = {
    F.multi_head_attention_forward: _read_multihead,
    F.scaled_dot_product_attention: read_kernel,
    torch._native_multi_head_attention: _read_packed,
    torch._transformer_encoder_layer_fwd: _read_packed,
    **dict.fromkeys((torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax), _read_softmax),
}


def find_reader(function: Any) -> Reader | None:
    """How the attention is read that a function computes; None if it computes none."""
    reader = READERS.get(function)
    return find_kernel_reader(function) if reader is None else reader
