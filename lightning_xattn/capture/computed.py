"""Attention that a module computes in the open: ``F.scaled_dot_product_attention``, or a softmax of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_xattn.capture.memory import Address, has_address
from lightning_xattn.capture.weights import MASKED, RecordedWeights, from_scores

_SOFTMAX = frozenset({torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax})

_FAR_BELOW = 500.0
"""Scores of tokens do not differ by as much as this; masks of -10,000 do, also after a division by sqrt(width)."""

_LOWEST = -3e4
"""No score of a token is as low as this; masks of the lowest half-precision number, -65504, and lower ones are."""

_MASK = -1e4
"""What masks add that do not reach as far down."""


@dataclass(frozen=True, eq=False)
class Computation:
    """One attention that was computed.

    Attributes
    ----------
    weights
        What was computed.
    result
        Where the softmax put its result; None of a fused kernel.
    """

    weights: RecordedWeights
    result: Address | None = None

    def gave(self, tensor: Tensor) -> bool:
        """Whether the softmax put its result into this tensor (dropout that drops nothing passes it on)."""
        return self.result is not None and self.result.holds(tensor)


Note = Callable[[Computation], None]
PassOver = Callable[[tuple[int, ...]], None]


class WatchComputations(TorchFunctionMode):
    """While it is entered, every attention that is computed is noted; the results stay what they are.

    A fused kernel still computes its output: the weights are computed once more beside it. Of a softmax with four
    axes over its last one the result is copied, before dropout, as the model may change it in place. Passed over are
    kernels' calls with other axes than ``(batch, heads, queries, width)`` or ``(batch, queries, width)``, softmaxes
    with other than four, which may as well be class probabilities, and those over the last axis but one.

    It must not be entered around an ``nn.MultiheadAttention``: with any such mode torch leaves its fast path, and the
    output differs in the last bits.

    Parameters
    ----------
    note
        Called with each computation.
    pass_over
        Called with the shape of what is passed over, keys last.
    """

    def __init__(self, note: Note, pass_over: PassOver) -> None:
        super().__init__()
        self._note, self._pass_over = note, pass_over

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            query, key = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            if query.dim() in (3, 4) and has_address(query):
                with torch._C.DisableTorchFunction():  # unseen by recorders around this one
                    computation = Computation(_beside_fused(*args, **kwargs))
                self._note(computation)
            elif has_address(query):
                self._pass_over((*query.shape[:-1], key.shape[-2]))
        elif function in _SOFTMAX and has_address(result) and result.dim() > 2:
            axis = _axis(*args, **kwargs)
            if axis in (-2, result.dim() - 2):
                self._pass_over(tuple(result.mT.shape))
            elif axis in (-1, result.dim() - 1) and result.dim() != 4:
                self._pass_over(tuple(result.shape))
            elif axis in (-1, 3):
                scores = args[0] if args else kwargs["input"]
                with torch._C.DisableTorchFunction():
                    weights = result.detach().clone()
                    recorded = from_scores(weights, _seen(scores.detach(), weights))
                self._note(Computation(recorded, Address.of(result)))
        return result


def watch_computations(modules: Iterable[nn.Module], note: Note, pass_over: PassOver, hooks: ExitStack) -> None:
    """Note every attention that is computed while any of these modules runs.

    Parameters
    ----------
    modules
        None of them holds an ``nn.MultiheadAttention`` (see ``WatchComputations``); they may hold each other.
    note, pass_over
        See ``WatchComputations``.
    hooks
        Takes the hooks; closing it removes them.
    """
    depth, mode = 0, ExitStack()

    def enter(*_: Any) -> None:
        nonlocal depth
        if depth == 0:
            mode.enter_context(WatchComputations(note, pass_over))
        depth += 1

    def leave(*_: Any) -> None:
        nonlocal depth
        depth = max(depth - 1, 0)
        if depth == 0:
            mode.close()

    def leave_all() -> None:
        # An interrupt from the keyboard passes the hooks by.
        nonlocal depth
        depth = 0
        mode.close()

    hooks.callback(leave_all)
    for module in modules:
        hooks.callback(module.register_forward_pre_hook(enter).remove)
        hooks.callback(module.register_forward_hook(leave, prepend=True, always_call=True).remove)


def _axis(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> int | None:  # noqa: A002 - torch's own name
    return dim


def _seen(scores: Tensor, weights: Tensor) -> Tensor:
    """Which keys a softmax does not hide, from its scores alone, whatever hides some: a mask added or filled in.

    A hidden key gets no weight and lies far below the row's largest score; of a row all keys are hidden whose largest
    score is about what a mask adds.
    """
    largest = scores.amax(-1, keepdim=True)
    hidden = (weights == 0) & (scores <= largest - _FAR_BELOW)
    return ~hidden & (largest > _LOWEST) & ((largest - _MASK).abs() > _FAR_BELOW)


@torch.no_grad()
def _beside_fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> RecordedWeights:
    """``softmax(Q K^T scale + mask)`` in float32, as the kernel's documentation defines it."""
    one_head = query.dim() == 3
    if one_head:
        query, key = query[:, None], key[:, None]
        attn_mask = attn_mask[:, None] if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.float(), key.float()
        if enable_gqa:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
        visible = None
        if is_causal:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()[None, None]
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
            # Copied, as the model may change its mask in place.
            visible = attn_mask.clone() if attn_mask.dtype == torch.bool else attn_mask > MASKED
            if attn_mask.dtype != torch.bool:
                scores = scores + attn_mask.float()
        if visible is not None and (attn_mask is None or attn_mask.dtype == torch.bool):
            scores = scores.masked_fill(~visible, -torch.inf)
        return replace(from_scores(scores.softmax(-1), visible), one_head=one_head)
