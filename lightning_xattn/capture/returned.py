"""Weights that a module or a callable returns: which are refused, what zeros mean, which masks go with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.capture.masks import (
    RecordedWeights,
    are_zeros_a_mask,
    find_weighted_keys,
    intersect_masks,
    separate_padding,
)
from lightning_xattn.capture.sources import SET_IT_ASIDE
from lightning_xattn.capture.tensors import describe_kind, is_plain
from lightning_xattn.core.attention import row_sum_tolerance
from lightning_xattn.core.errors import ShapeError

NAME_IT = (
    "Name the attention that you mean: 'path#2' is the second that a module computes, 'path[item]' an item of what it "
    "returns. Or give a callable: attention={'<a>_to_<b>': lambda model: weights}. " + SET_IT_ASIDE
)


def check_weights(weights: Any, who: str, training: bool) -> None:
    """Refuse what is no attention. Looks at the values.

    Raises
    ------
    ShapeError
        If the weights are not ``(batch, heads, queries, keys)`` or ``(batch, queries, keys)``, a row that is not fully
        masked does not sum to 1, or their numbers need not be their values.
    """
    if isinstance(weights, Tensor) and not is_plain(weights):
        raise ShapeError(
            f"{who} {describe_kind(weights)}, whose numbers need not be its values; expected a plain tensor. If they "
            "are, give weights.as_subclass(torch.Tensor)."
        )
    shape = tuple(weights.shape) if isinstance(weights, Tensor) else None
    if shape is None or len(shape) not in (3, 4) or not weights.is_floating_point():
        found = f"a {type(weights).__name__}" if shape is None else f"{weights.dtype} of shape {shape}"
        raise ShapeError(
            f"{who} {found}; expected weights (batch, heads, queries, keys), or (batch, queries, keys) of one head."
        )
    if not looks_like_attention(weights):
        values, sums = weights.float().nan_to_num(), weights.float().sum(-1).nan_to_num()
        found = (
            f"values from {values.min():.3g} to {values.max():.3g}: scores before the softmax are no weights"
            if values.min() < 0
            else f"rows that sum to {sums.min():.3g} ... {sums.max():.3g}"
            + (": weights after dropout are not attention, put the model in eval mode" if training else "")
        )
        raise ShapeError(
            f"{who} shape {shape} with {found}. Expected weights after the softmax and before dropout, whose rows sum "
            f"to 1. {NAME_IT}"
        )


def looks_like_attention(tensor: Tensor) -> bool:
    """Whether all rows of a plain tensor sum to 1, but for fully masked ones (0 or NaN), and none is negative."""
    if not is_plain(tensor) or tensor.dim() not in (3, 4) or not tensor.is_floating_point() or not tensor.numel():
        return False
    sums = tensor.float().sum(-1)
    sound = ((sums - 1).abs() <= row_sum_tolerance(tensor.dtype)) | (sums == 0) | sums.isnan()
    return bool(sound.all() and (sums > 0).any() and not (tensor < 0).any())


def find_whether_zeros_hide(weights: Tensor, who: str, notify: Callable[[str], None]) -> bool:
    """Whether weights of exactly 0 are hidden keys, of which the masks are not known. Looks at the values."""
    if weights.dtype == torch.float16 or are_zeros_a_mask(weights):
        return weights.dtype != torch.float16
    if weights.shape[1] == 1:  # of several heads it shows that they leave out different keys
        notify(
            f"{who} one head, or an average, with weights of exactly 0 that differ from sample to sample and from "
            "query to query. They count as weights, as of a sparse attention. If a mask hides these keys, name "
            "the module whose softmax gives the weights."
        )
    return False


def combine_masks(recorded: RecordedWeights, masks: RecordedWeights | None, zeros_are_hidden: bool) -> RecordedWeights:
    """Returned weights with ``masks``, those of the softmax that made them; None if it was not recorded.

    Without it those keys are hidden to which a sample gives no weight at all (not so in float16, which rounds small
    weights to 0), or, where ``zeros_are_hidden``, all weights of exactly 0.
    """
    weights = recorded.weights
    keys = find_weighted_keys(weights)
    if masks is None:
        visible = (weights != 0).any(1, keepdim=True) if zeros_are_hidden else keys
        return separate_padding(replace(recorded, visible=visible))
    # Kept as a tensor to avoid a device sync.
    kept = ((weights == masks.weights) | masks.weights.isnan()).all()
    key_mask = intersect_masks(keys[:, 0, 0] | kept, masks.key_mask)
    # Rows that were set to 0 after the softmax.
    shown = (weights != 0).any(-1, keepdim=True) | (masks.weights == 0).all(-1, keepdim=True)
    return replace(recorded, key_mask=key_mask, visible=intersect_masks(shown.expand_as(weights), masks.visible))


def hold_same_weights(tensor: Tensor, weights: Tensor) -> bool:
    """Whether a tensor holds these weights, in another form, precision, or averaged over the heads."""
    precision = max(1e-4, *(torch.finfo(kind.dtype).eps for kind in (tensor, weights)))
    return any(
        tensor.numel() == same.numel()
        and torch.allclose(tensor.flatten().float(), same.flatten().float(), 2 * precision, 1e-5, equal_nan=True)
        for same in (weights, weights.mean(1))
    )


def describe_one_head(name: str, average: bool = False) -> str:
    """The message about attention without an axis for heads."""
    remedy = " An average over heads has a larger entropy than the heads; record the heads if you can."
    return f"'{name}' has no axis for heads: it counts as one head, and its first axis as samples.{remedy * average}"
