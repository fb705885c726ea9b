"""Tensor parallelism: what the processes have that run the same samples through one model together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.recorder import FusionRecord
from lightning_xattn.capture import Layer
from lightning_xattn.capture.labels import Labels
from lightning_xattn.core.attention import Attention, AttentionPair, Direction
from lightning_xattn.core.distributed import Processes
from lightning_xattn.core.errors import DataError

Place = tuple[str, Direction]
"""A layer's name and one of its directions."""


def split_heads(
    attention: Iterable[AttentionPair], layers: Sequence[Layer], model: nn.Module, processes: Processes
) -> set[Place]:
    """Where each of these processes has computed some of the heads. A collective for each direction among them.

    What all of them compute is the same to the bit, as all have got the same; heads differ, if only by rounding.

    Raises
    ------
    DataError
        If their attention differs, and no layer around it is split by columns, as those are that project to heads.
    """
    sources = {one.name: dict(one.sources) for one in layers}
    split = set()
    for pair in attention:
        for one in pair.directions:
            theirs = processes.ask_peers(one.weights)
            if _are_equal(theirs):
                continue
            source = sources[pair.layer][one.direction]
            if source.read is None and _splits_columns(model.get_submodule(source.path)):
                split.add((pair.layer, one.direction))
            elif not _are_alike(theirs):
                raise DataError(
                    f"The processes of a tensor-parallel group computed different attention {one.direction} for the "
                    f"same samples, though no layer in '{source}' is parallelized with ColwiseParallel, which splits "
                    "heads. They may have different weights: call seed_everything() before the model is made. Or each "
                    "has a part of the queries: give it all of them."
                )
    return split


def with_all_heads(
    attention: Iterable[AttentionPair], split: Collection[Place], processes: Processes
) -> tuple[AttentionPair, ...]:
    """The same with the heads of all these processes, in their order, where they are split."""
    pairs = []
    for pair in attention:
        are_split = [(pair.layer, one.direction) in split for one in pair.directions]
        if any(are_split):
            both = zip(pair.directions, are_split, strict=True)
            pair = AttentionPair(pair.layer, *(_whole(one, is_split, processes) for one, is_split in both))
        pairs.append(pair)
    return tuple(pairs)


def _whole(one: Attention, is_split: bool, processes: Processes) -> Attention:
    # A token that no head of one process sees may be one that a head of another sees, so it is no padding. What pads
    # the keys of a direction pads the queries of the other, too.
    key_mask, query_mask = (
        None if mask is None else processes.join(mask[None], 0).any(0) for mask in (one.key_mask, one.query_mask)
    )
    if not is_split:
        return replace(one, key_mask=key_mask, query_mask=query_mask)
    heads, visible = one.weights.shape[1], one.visible
    if one.key_mask is not None:
        here = one.key_mask[:, None, None, :]
        visible = here if visible is None else visible & here
    if visible is not None:
        visible = processes.join(visible.expand(torch.broadcast_shapes(visible.shape, (1, heads, 1, 1))), 1)
    return replace(
        one,
        weights=processes.join(one.weights, 1),
        visible=visible,
        key_mask=key_mask,
        query_mask=query_mask,
        cross_modal_mass=None if one.cross_modal_mass is None else processes.join(one.cross_modal_mass, 1),
    )


def check_alike(labels: Labels, inputs: FusionRecord | None, processes: Processes) -> None:
    """Refuse a model of which these processes have parts where it is read. A collective for each thing.

    Raises
    ------
    DataError
        If they have different predictions for the same samples, or different tokens at the fusion.
    """
    parts: dict[str, Tensor | None] = {
        "predictions": labels.predicted if labels.confidence is None else labels.confidence
    }
    if inputs is not None:
        parts |= {f"tokens of '{name}' at the fusion": tokens for name, (tokens, _) in inputs.tokens.items()}
    for name, part in parts.items():
        if part is not None and not _are_alike(processes.ask_peers(part)):
            raise DataError(
                f"The processes of a tensor-parallel group have different {name} for the same samples: each seems to "
                "have a part of them. Let each have the whole: parallelize what makes them with "
                "output_layouts=Replicate()."
            )


def _are_equal(several: Sequence[Tensor]) -> bool:
    return all(
        one.shape == several[0].shape and torch.equal(one.nan_to_num(), several[0].nan_to_num()) for one in several
    )


def _are_alike(several: Sequence[Tensor]) -> bool:
    """Whether they differ by no more than rounding, by the size of the values."""
    first = several[0]
    if any(one.shape != first.shape for one in several):
        return False
    if not first.is_floating_point():
        return _are_equal(several)
    size = first.double().nan_to_num(0, 0, 0).norm() / max(first.numel(), 1) ** 0.5
    tolerance = float(size) * max(1e-5, 8 * torch.finfo(first.dtype).eps)
    return all(torch.allclose(one.double(), first.double(), 0, tolerance, equal_nan=True) for one in several)


def _splits_columns(module: nn.Module) -> bool:
    """Whether tensor parallelism has given each process some of the outputs of a linear layer in it."""
    from torch.distributed.tensor import DTensor, Shard  # absent where torch has no torch.distributed

    weights = [one.weight for one in module.modules() if isinstance(one, nn.Linear)]
    return any(
        name == "tensor_parallel" and isinstance(placement, Shard) and placement.dim == 0
        for weight in weights
        if isinstance(weight, DTensor)
        for name, placement in zip(weight.device_mesh.mesh_dim_names or (), weight.placements, strict=True)
    )
