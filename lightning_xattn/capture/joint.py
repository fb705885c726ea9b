"""The directions within one self-attention over the tokens of several modalities."""

from __future__ import annotations

import torch

from lightning_xattn.attention import row_sum_tolerance
from lightning_xattn.capture.weights import RecordedWeights
from lightning_xattn.errors import ShapeError


def cut_direction(joint: RecordedWeights, queries: slice, keys: slice, name: str) -> RecordedWeights:
    """One direction out of a joint self-attention: a block of it, whose rows are scaled to sum to 1.

    ``crossing`` keeps what a row's weights summed to in the block, the share of its attention that crosses over. A row
    of which nothing crosses has no distribution over these keys: none of them is visible to it.

    Parameters
    ----------
    joint
        Self-attention ``(batch, heads, tokens, tokens)``.
    queries, keys
        The places of the two modalities.
    name
        Of the module, for messages.

    Raises
    ------
    ShapeError
        If this is no self-attention or has fewer tokens than the places.
    """
    stops = [place.stop or place.start + 1 for place in (queries, keys)]
    if joint.cropped:
        joint = joint.padded_to(max(stops))
    _, _, n_queries, n_keys = joint.weights.shape
    if n_queries != n_keys - joint.extra_keys or n_queries < max(stops):
        raise ShapeError(
            f"Expected '{name}' to attend within one sequence of at least {max(stops)} tokens, which the spans of the "
            f"JointSequence need; its attention has {n_queries} queries and {n_keys} keys."
        )
    queries, keys = (slice(*place.indices(n_queries)) for place in (queries, keys))
    weights = joint.weights[:, :, queries]
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    # Below this a sum is made of numbers with no precision left.
    least = n_keys * torch.finfo(joint.weights.dtype).smallest_normal
    total = weights.sum(-1)
    block = weights[..., keys]
    crossing = block.sum(-1)
    crosses = crossing > least

    key_mask = None if joint.key_mask is None else joint.key_mask[:, keys]
    sound = (total - 1).abs() <= row_sum_tolerance(joint.weights.dtype)
    if joint.key_mask is not None:
        sound = sound & joint.key_mask[:, None, queries]
    visible = crosses[..., None].expand(block.shape)
    if joint.visible is not None:
        visible = visible & joint.visible.expand(joint.weights.shape)[:, :, queries, keys]
    return RecordedWeights(
        block / torch.where(crosses, crossing, 1)[..., None],
        key_mask,
        visible,
        crossing=torch.where(sound, crossing, torch.nan),
    )
