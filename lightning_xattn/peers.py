"""Tensor parallelism: what the processes have that run the same samples through one model together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lightning_xattn.attention import Attention, AttentionPair
from lightning_xattn.capture import Layer
from lightning_xattn.distributed import Processes
from lightning_xattn.errors import DataError
from lightning_xattn.fusion.recorder import FusionInputs
from lightning_xattn.labels import Labels


def splits_heads(
    attention: Iterable[AttentionPair], layers: Iterable[Layer], model: nn.Module, processes: Processes
) -> bool:
    """Whether each of these processes has computed some of the heads. A collective for each direction among them.

    Raises
    ------
    DataError
        If their attention differs, and no layer around it is split by columns, as those are that project to heads.
    """
    sources = {one.name: dict(one.sources) for one in layers}
    splits = False
    for pair in attention:
        for one in pair.directions:
            if processes.agree(one.weights):
                continue
            path = sources[pair.layer][one.direction].path
            if not any(map(_is_split_by_columns, model.get_submodule(path).parameters())):
                raise DataError(
                    f"The processes of a tensor-parallel group have other attention {one.direction} of the same "
                    f"samples, though no layer in '{path or 'the model'}' is parallelized with ColwiseParallel, which "
                    "splits heads. They may have other weights: seed_everything() before the model is made. Or each "
                    "has a part of the queries: give it all of them."
                )
            splits = True
    return splits


def with_all_heads(attention: Iterable[AttentionPair], processes: Processes) -> tuple[AttentionPair, ...]:
    """The same with the heads of all these processes, in their order."""

    def whole(one: Attention) -> Attention:
        heads = one.weights.shape[1]
        by_head = one.visible is not None and one.visible.dim() == 4 and one.visible.shape[1] == heads
        return replace(
            one,
            weights=processes.join(one.weights, 1),
            visible=processes.join(one.visible, 1) if by_head and one.visible is not None else one.visible,
            crossing=None if one.crossing is None else processes.join(one.crossing, 1),
        )

    return tuple(AttentionPair(pair.layer, *map(whole, pair.directions)) for pair in attention)


def check_alike(labels: Labels, inputs: FusionInputs | None, processes: Processes) -> None:
    """Refuse a model of which these processes have parts where it is read. A collective for each thing.

    Raises
    ------
    DataError
        If they have other predictions of the same samples, or other tokens at the fusion.
    """
    parts: dict[str, Tensor | None] = {
        "predictions": labels.predicted if labels.confidence is None else labels.confidence
    }
    if inputs is not None:
        parts |= {f"tokens of '{name}' at the fusion": tokens for name, (tokens, _) in inputs.tokens.items()}
    for name, part in parts.items():
        if part is not None and not processes.agree(part):
            raise DataError(
                f"The processes of a tensor-parallel group have other {name} of the same samples: each seems to have "
                "a part of them. Let each have the whole: parallelize what makes them with "
                "output_layouts=Replicate()."
            )


def _is_split_by_columns(parameter: Tensor) -> bool:
    """Whether tensor parallelism has given each process some of the rows of a weight, so of the layer's outputs."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return any(
        name == "tensor_parallel" and isinstance(placement, Shard) and placement.dim == 0
        for name, placement in zip(names, parameter.placements, strict=True)
    )
