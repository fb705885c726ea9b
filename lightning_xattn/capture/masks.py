"""What one attention computed, and what its masks hide."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_xattn.core import devices
from lightning_xattn.core.scores import Scores

MASKED = -1e3
"""A float mask at or below this hides the key: ``exp`` of it, even beside a bias, is 0 in every floating dtype."""

_FAR_BELOW = 500.0
"""Scores of tokens do not differ by as much as this; masks of -10,000 do, also divided by sqrt(width)."""

_LOWEST = -3e4
"""No score of a token is as low as this; masks of the lowest half-precision number, -65504, and lower ones are."""

_MASK = -1e4
"""What masks add that do not reach as far down."""


@dataclass(frozen=True, eq=False)
class RecordedWeights:
    """The weights of one attention and the masks that were in force; see ``Attention`` for what has no words here."""

    source: Tensor | Scores
    """Weights ``(batch, heads, queries, keys)``, detached, before dropout, or the scores that they come from."""
    key_mask: Tensor | None = None
    visible: Tensor | None = None
    extra_keys: int = 0
    cross_modal_mass: Tensor | None = None
    cropped: bool = False
    """Whether tokens that are padding in every sample may have been cut off at the end."""
    within: bool = False
    """Whether the query is the key, so that it attends within one sequence."""
    one_head: bool = False
    """Whether the weights came without an axis for heads."""
    is_packed: bool = False
    """Whether the keys of each sample stand before its padding, wherever they are in its sequence."""
    length: int | None = None
    """How many tokens the joint sequence has that this is a block of; None: it is no block."""

    @property
    def shape(self) -> torch.Size:
        """``(batch, heads, queries, keys)``, or ``(rows, queries, keys)`` where heads are not yet apart."""
        return self.source.shape

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.source.device

    @property
    def weights(self) -> Tensor:
        """All weights, computed from scores where these are known."""
        if isinstance(self.source, Tensor):
            return self.source
        mask, visible = self.key_mask, self.visible
        if mask is not None:
            visible = mask[:, None, None] if visible is None else visible & mask[:, None, None]
        return self.source.weights(visible)

    @property
    def token_mask(self) -> Tensor | None:
        """``key_mask`` over the keys that are tokens."""
        return None if self.key_mask is None else self.key_mask[:, : self.key_mask.shape[1] - self.extra_keys]

    @property
    def padding_of_its_own(self) -> Tensor | None:
        """The real tokens of a self-attention, ``(batch, tokens)``; None if its masks do not show them.

        Under a mask that differs from query to query, such as a causal one, a token is padding that nobody sees, not
        even itself; if every token is hidden from itself, that is no evidence.
        """
        if self.visible is None or self.visible.shape[-2] == 1:
            return self.token_mask
        batch, _, tokens, keys = self.shape
        # What is one for all samples is looked at once.
        visible = self.visible.expand(-1, -1, tokens, keys)[..., : keys - self.extra_keys]
        itself = visible.diagonal(dim1=-2, dim2=-1).any(1)
        real = visible.any(dim=1).any(dim=1) | ~itself.any(1, keepdim=True)
        return intersect_masks(real.expand(batch, -1), self.token_mask)

    def padded_to(self, tokens: int) -> RecordedWeights:
        """The same self-attention over this number of tokens: those that were cut off are added as padding."""
        missing = tokens - self.shape[-1]
        if missing <= 0:
            return self
        batch, _, _, keys = self.shape
        known = (
            torch.ones(batch, keys, dtype=torch.bool, device=self.device) if self.key_mask is None else self.key_mask
        )
        visible = None if self.visible is None else F.pad(self.visible.expand(self.shape), (0, missing) * 2)
        source: Tensor | Scores
        if isinstance(self.source, Scores) and not self.source.biases and self.source.query_places is None:
            source = self.source.unfolded(lambda one: F.pad(one, (0, 0, 0, missing)))
        else:
            source = F.pad(self.weights, (0, missing, 0, missing))
        return replace(self, source=source, key_mask=F.pad(known, (0, missing)), visible=visible)


def intersect_masks(mask: Tensor, other: Tensor | None) -> Tensor:
    """What a mask shows and another one, if there is one, shows as well."""
    return mask if other is None else mask & other


def separate_padding(recorded: RecordedWeights) -> RecordedWeights:
    """The same, with a key mask for padding apart from other masks.

    Keys that no query sees are padding where all queries (but those that see nothing) see the same keys. Under any
    other mask, such as a causal one, a key that no query sees may be a real token.
    """
    if recorded.visible is None or recorded.key_mask is not None:
        return recorded
    batch, _, _, keys = recorded.shape
    visible = recorded.visible.expand(-1, -1, -1, keys)
    seen = visible.any(dim=1, keepdim=True).any(dim=2, keepdim=True)
    only_padding_hides = ((visible == seen) | ~visible.any(dim=3, keepdim=True)).all(dim=3).all(dim=2).all(dim=1)
    key_mask = (seen[:, 0, 0] | ~only_padding_hides[:, None]).expand(batch, keys)
    only_padding = visible.shape[1] == visible.shape[2] == 1
    return replace(recorded, key_mask=key_mask, visible=None if only_padding else visible)


@dataclass(frozen=True)
class Axes:
    """How the rows of an attention with three axes are split into samples and heads."""

    heads: int | None = None
    """How many heads are folded into the samples; None: there is no axis for heads, and rows are samples."""
    heads_first: bool = False
    """Whether the samples lie within a head."""

    def apply(self, recorded: RecordedWeights) -> RecordedWeights:
        """The attention as ``(batch, heads, queries, keys)``, with a key mask for padding apart from other masks.

        Those of ``F.multi_head_attention_forward`` are apart already.
        """
        if len(recorded.shape) == 4:
            return separate_padding(recorded)

        def unfold(tensor: Tensor) -> Tensor:
            if self.heads is None or len(tensor) == 1:
                return tensor[:, None]
            split: Tensor = tensor.unflatten(0, (self.heads, -1) if self.heads_first else (-1, self.heads))
            return split.transpose(0, 1) if self.heads_first else split

        visible = None if recorded.visible is None else unfold(recorded.visible)
        source = recorded.source
        source = unfold(source) if isinstance(source, Tensor) else source.unfolded(unfold)
        unfolded = replace(recorded, source=source, visible=visible, one_head=self.heads is None)
        return separate_padding(unfolded)


def find_visible_keys(scores: Tensor, weights: Tensor) -> Tensor | None:
    """Which keys a softmax does not hide, from its scores alone, whatever hides some: a mask added or filled in.

    None where the scores are so close to each other that nothing can be hidden; a GPU, which would have to wait for the
    answer, is not asked.

    A hidden key gets no weight and lies far below the row's largest score; of a row all keys are hidden whose largest
    score is about what a mask adds. A row with NaN or an infinite score is broken, not hidden: it counts as
    seeing what the other rows see.
    """
    if devices.reads_at_once(scores) and scores.numel():
        low, high = (float(one) for one in scores.aminmax())
        if high - low < _FAR_BELOW and low > _MASK + _FAR_BELOW:
            return None
    largest = scores.amax(-1, keepdim=True)
    hidden = (weights == 0) & (scores <= largest - _FAR_BELOW)
    broken = largest.isnan() | largest.isposinf()
    visible = ~hidden & (largest > _LOWEST) & ((largest - _MASK).abs() > _FAR_BELOW)
    elsewhere = (visible & ~broken).any(-2, keepdim=True)
    elsewhere = elsewhere | ~elsewhere.any(-1, keepdim=True)
    return torch.where(broken, elsewhere, visible)


def find_weighted_keys(weights: Tensor) -> Tensor:
    """Keys ``(batch, 1, 1, keys)`` to which a sample gives any weight; all in float16, which rounds small ones to 0."""
    if weights.dtype == torch.float16:
        return torch.ones_like(weights[:, :1, :1], dtype=torch.bool)
    return (weights != 0).any(dim=1, keepdim=True).any(dim=2, keepdim=True)


def is_visible(mask: Tensor) -> Tensor:
    """Where a mask of ``nn.MultiheadAttention`` (True hides, or added to the scores) shows the key.

    NaN shows it, so that its row is broken, and not hidden.
    """
    return ~mask if mask.dtype == torch.bool else ~(mask <= MASKED)
