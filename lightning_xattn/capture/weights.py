"""What one call of an attention module computed, and how its masks are read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -1e3
"""A float mask at or below this hides the key: ``exp`` of it, even beside a bias, is 0 in every floating dtype."""


@dataclass(frozen=True, eq=False)
class RecordedWeights:
    """What one call of an attention module computed.

    Attributes
    ----------
    weights
        ``(batch, heads, queries, keys)``, detached, before dropout.
    key_mask
        ``(batch, keys)`` bool, True for a real token; None: all are.
    visible
        Bool broadcastable to ``weights``, True where the attention mask lets the query see the key; None: all.
    extra_keys
        How many of the last keys are slots of ``add_bias_kv`` or ``add_zero_attn``.
    crossing
        ``(batch, heads, queries)``, see ``Attention``.
    cropped
        Whether tokens that are padding in every sample may have been cut off at the end.
    within
        Whether the query is the key, so that it attends within one sequence.
    one_head
        Whether the weights came without an axis for heads.
    """

    weights: Tensor
    key_mask: Tensor | None = None
    visible: Tensor | None = None
    extra_keys: int = 0
    crossing: Tensor | None = None
    cropped: bool = False
    within: bool = False
    one_head: bool = False

    @property
    def token_mask(self) -> Tensor | None:
        """``key_mask`` over the keys that are tokens."""
        return None if self.key_mask is None else self.key_mask[:, : self.key_mask.shape[1] - self.extra_keys]

    def padded_to(self, tokens: int) -> RecordedWeights:
        """The same self-attention over so many tokens, those that were cut off put back as padding."""
        missing = tokens - self.weights.shape[-1]
        if missing <= 0:
            return self
        batch, _, _, keys = self.weights.shape
        known = self.weights.new_ones(batch, keys, dtype=torch.bool) if self.key_mask is None else self.key_mask
        visible = None if self.visible is None else F.pad(self.visible.expand(self.weights.shape), (0, missing) * 2)
        weights = F.pad(self.weights, (0, missing, 0, missing))
        return replace(self, weights=weights, key_mask=F.pad(known, (0, missing)), visible=visible)


def from_scores(weights: Tensor, visible: Tensor | None) -> RecordedWeights:
    """Weights with the mask that was in force, in which padding is told apart.

    Keys that no query sees are padding where all queries (but those that see nothing) see the same keys. Under any
    other mask, such as a causal one, a key that no query sees may be a real token.

    Parameters
    ----------
    weights
        ``(batch, heads, queries, keys)``.
    visible
        Bool with four axes, broadcastable to ``weights``; None: every key is seen.
    """
    if visible is None:
        return RecordedWeights(weights)
    batch, _, _, keys = weights.shape
    visible = visible.expand(-1, -1, -1, keys)
    seen = visible.any(dim=1, keepdim=True).any(dim=2, keepdim=True)
    alike = ((visible == seen) | ~visible.any(dim=3, keepdim=True)).all(dim=3).all(dim=2).all(dim=1)
    key_mask = (seen[:, 0, 0] | ~alike[:, None]).expand(batch, keys)
    only_padding = visible.shape[1] == visible.shape[2] == 1
    return RecordedWeights(weights, key_mask, None if only_padding else visible)


def is_visible(mask: Tensor) -> Tensor:
    """Where a mask of ``nn.MultiheadAttention`` (True hides, or added to the scores) shows the key."""
    return ~mask if mask.dtype == torch.bool else mask > MASKED


def additive(mask: Tensor) -> Tensor:
    """The same mask, to be added to the scores."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, -torch.inf)
