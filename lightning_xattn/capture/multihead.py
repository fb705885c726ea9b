"""Attention of ``nn.MultiheadAttention``, by itself or inside an ``nn.TransformerEncoderLayer``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks_with_kwargs, register_module_forward_hook

from lightning_xattn.capture.memory import are_same
from lightning_xattn.capture.weights import RecordedWeights, additive, is_visible

_MULTIHEAD_CALL = inspect.signature(nn.MultiheadAttention.forward)
_AVERAGE = list(_MULTIHEAD_CALL.parameters).index("average_attn_weights") - 1  # without self
_ENCODER_LAYER_CALL = inspect.signature(nn.TransformerEncoderLayer.forward)


def is_original(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module computes what ``kind`` does: one with a forward of its own or its class's may not."""
    return isinstance(module, kind) and type(module).forward is kind.forward and "forward" not in vars(module)


def is_original_encoder_layer(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether the layer attends as torch's does, in its fast path and beside it."""
    own_block = "_sa_block" in vars(layer) or type(layer)._sa_block is not nn.TransformerEncoderLayer._sa_block
    return (
        is_original(layer, nn.TransformerEncoderLayer)
        and not own_block
        and is_original(layer.self_attn, nn.MultiheadAttention)
    )


def watch_multihead_attention(
    module: nn.MultiheadAttention, record: Callable[[Any, RecordedWeights], None], hooks: ExitStack
) -> None:
    """Record every call of an ``nn.MultiheadAttention``; what the caller gets stays bit for bit the same.

    A caller that asks for weights gets the module to compute them per head, and they are averaged for it afterwards
    as the module would have done. A caller that does not ask keeps its fused kernel: the weights are computed once
    more beside it. The same goes for self-attention whose weights are averaged by a fast path, and for dropout in
    training mode, which the returned weights would contain.

    Parameters
    ----------
    module
        The module to watch; its forward is the original one.
    record
        Called for each call of the module with its query and key, as they were passed, and its weights.
    hooks
        Takes the hooks; closing it removes them.
    """
    asked_for_average = False

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        bound = _MULTIHEAD_CALL.bind(module, *args, **kwargs)
        bound.apply_defaults()
        return bound

    def ask_per_head(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        nonlocal asked_for_average
        call = bind(args, kwargs).arguments
        # Self-attention may take a fast path, which averages in another way than read does; nested tokens always do.
        fast = call["query"] is call["key"] is call["value"]
        asked_for_average = call["need_weights"] and call["average_attn_weights"] and not fast
        if not asked_for_average:
            return None
        if len(args) > _AVERAGE:
            return (*args[:_AVERAGE], False, *args[_AVERAGE + 1 :]), kwargs
        return args, kwargs | {"average_attn_weights": False}

    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = bind(args, kwargs).arguments
        within, nested = are_same(call["query"], call["key"]), call["query"].is_nested
        if nested:
            tokens, padding = _unpack(call["query"])
            call = call | {"query": tokens, "key": tokens, "key_padding_mask": padding}
        batched = call["query"].dim() == 3
        returned = output[1]
        averaged = returned is not None and returned.dim() < call["query"].dim() + 1
        if returned is None or nested or averaged or (module.training and module.dropout > 0):
            weights = _recompute(module, call)
        else:
            weights = returned.detach() if batched else returned.detach()[None]
            # The caller may change in place what it gets; the average that it asked for is a tensor of its own.
            weights = weights if asked_for_average else weights.clone()
        recorded = _with_masks(module, call, weights)
        record((call["query"], call["key"]), replace(recorded, within=within, cropped=nested))
        if not asked_for_average:
            return None
        per_head = returned if batched else returned[None]
        averaged = per_head.mean(dim=1)
        return output[0], averaged if batched else averaged[0]

    hooks.callback(module.register_forward_pre_hook(ask_per_head, with_kwargs=True).remove)
    # Before every other hook on the output, so that those see what the caller gets; this also lets recorders nest.
    hooks.callback(module.register_forward_hook(read, with_kwargs=True, prepend=True).remove)


def watch_encoder_layer(
    layer: nn.TransformerEncoderLayer, record: Callable[[RecordedWeights], None], hooks: ExitStack
) -> None:
    """Record the self-attention of an ``nn.TransformerEncoderLayer``, computed once more from the layer's input.

    A hook on the layer, or on anything in it, would turn its fast path off, whose output differs in the last bits.
    Torch's hook for all modules does not, so the fast path stays on.

    Parameters
    ----------
    layer
        The layer to watch; its forward is the original one.
    record
        Called for each call of the layer with its weights.
    hooks
        Takes the hook; closing it removes it.
    """
    attention = layer.self_attn

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if module is not layer:
            return
        bound = _ENCODER_LAYER_CALL.bind(layer, *args, **kwargs)
        bound.apply_defaults()
        with torch.no_grad():
            tokens, padding = bound.arguments["src"], bound.arguments["src_key_padding_mask"]
            nested = tokens.is_nested
            if nested:
                tokens, padding = _unpack(tokens)
            if layer.norm_first:
                # A copy if it counts what it sees, and by its forward, as its hooks must not see a second call.
                counts = any(True for _ in layer.norm1.buffers())
                tokens = (copy.deepcopy(layer.norm1) if counts else layer.norm1).forward(tokens)
            call = {
                "query": tokens,
                "key": tokens,
                "key_padding_mask": padding,
                "attn_mask": bound.arguments["src_mask"],
            }
            weights = _with_masks(attention, call, _recompute(attention, call))
        record(replace(weights, cropped=nested, within=True))

    handle = register_module_forward_hook(read, with_kwargs=True)
    # torch 2.13 forgets this entry when the hook is removed, and then takes every module for a watched one.
    hooks.callback(_global_forward_hooks_with_kwargs.pop, handle.id, None)
    hooks.callback(handle.remove)


def _unpack(nested: Tensor) -> tuple[Tensor, Tensor]:
    """Nested tokens as ``(batch, tokens, width)``, and which of them are padding.

    ``nn.TransformerEncoder`` packs padded sequences so; what is padding in every sample is gone by then.
    """
    lengths = torch.tensor([len(sample) for sample in nested.unbind()], device=nested.device)
    tokens = nested.detach().to_padded_tensor(0.0)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]


@contextmanager
def _unchanging(module: nn.Module) -> Iterator[None]:
    """While it is entered, reading a parametrized weight gives what its last use got.

    In training, that of ``spectral_norm`` takes a step whenever it is read.
    """
    inner = [part for part in getattr(module, "parametrizations", nn.ModuleDict()).modules() if part.training]
    for part in inner:
        part.training = False
    try:
        yield
    finally:
        for part in inner:
            part.training = True


@torch.no_grad()
def _recompute(module: nn.MultiheadAttention, call: dict[str, Any]) -> Tensor:
    """``softmax(Q K^T / sqrt(d) + masks)`` from the module's own projections, ``(batch, heads, queries, keys)``.

    In float32 whatever the model's precision: a product of unscaled half-precision numbers can overflow where the
    fused kernel, which scales first, does not.
    """
    with torch.autocast(call["query"].device.type, enabled=False), _unchanging(module):
        return _softmax_of_scores(module, call)


def _softmax_of_scores(module: nn.MultiheadAttention, call: dict[str, Any]) -> Tensor:
    query, key = _batch_first(module, call["query"]), _batch_first(module, call["key"])
    if module._qkv_same_embed_dim:
        query_weight, key_weight, _ = module.in_proj_weight.chunk(3)
    else:
        query_weight, key_weight = module.q_proj_weight, module.k_proj_weight
    query_bias = key_bias = None
    if module.in_proj_bias is not None:
        query_bias, key_bias, _ = module.in_proj_bias.chunk(3)
    query, key = _project(query, query_weight, query_bias), _project(key, key_weight, key_bias)
    if module.bias_k is not None:
        key = torch.cat([key, module.bias_k.to(key.dtype).expand(len(key), 1, -1)], dim=1)
    if module.add_zero_attn:
        key = torch.cat([key, key.new_zeros(len(key), 1, key.shape[2])], dim=1)

    query, key = (x.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2) for x in (query, key))
    logits = (query * module.head_dim**-0.5) @ key.transpose(-1, -2)
    extra = _extra_keys(module)
    padding, attention_mask = call["key_padding_mask"], call["attn_mask"]
    if padding is not None:
        logits = logits + F.pad(additive(padding.reshape(len(key), 1, 1, -1)), (0, extra))
    if attention_mask is not None:
        logits = logits + F.pad(additive(_per_head(attention_mask, module)), (0, extra))
    weights: Tensor = logits.softmax(-1)
    return weights


def _project(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(tokens.float(), weight.float(), None if bias is None else bias.float())


def _with_masks(module: nn.MultiheadAttention, call: dict[str, Any], weights: Tensor) -> RecordedWeights:
    padding, attention_mask = call["key_padding_mask"], call["attn_mask"]
    extra = _extra_keys(module)
    key_mask = visible = None
    if padding is not None:
        key_mask = F.pad(is_visible(padding.reshape(len(weights), -1)), (0, extra), value=True)
    if attention_mask is not None:
        visible = F.pad(is_visible(_per_head(attention_mask, module)), (0, extra), value=True)
    return RecordedWeights(weights, key_mask, visible, extra)


def _batch_first(module: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    if tokens.dim() == 2:
        return tokens[None]
    return tokens if module.batch_first else tokens.transpose(0, 1)


def _per_head(mask: Tensor, module: nn.MultiheadAttention) -> Tensor:
    """Broadcastable to the weights: ``(queries, keys)`` for all, or ``(batch * heads, queries, keys)``."""
    return mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, module.num_heads))


def _extra_keys(module: nn.MultiheadAttention) -> int:
    return int(module.bias_k is not None) + int(module.add_zero_attn)
