"""Whether a model ends an evaluation with the weights that it ran with, as replays need them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.parameter import is_lazy

PARAMETERS, MOST_VALUES = 8, 2**20
"""How many parameters are compared, and how many values each of them has at most."""


def sample_weights(module: LightningModule) -> list[tuple[Tensor, Tensor]]:
    """Some of the trained parameters, each with the sum of its absolute values, on its device."""
    trained = [
        one
        for one in module.parameters()
        if one.requires_grad and not is_lazy(one) and not hasattr(one, "to_local") and one.numel() <= MOST_VALUES
    ]
    chosen = (
        dict.fromkeys(round(i * (len(trained) - 1) / (PARAMETERS - 1)) for i in range(PARAMETERS)) if trained else ()
    )
    with torch.no_grad():
        return [(trained[i], trained[i].abs().sum()) for i in chosen]


def have_changed(sample: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether parameters have other values than when they were sampled. A GPU waits for the answer."""
    with torch.no_grad():
        return any(not one.abs().sum().equal(before) for one, before in sample)


def describe_change(trainer: Trainer, callback: Callback) -> str:
    """Why nothing is replayed at the end of an evaluation whose batches had other weights, as the end of a sentence."""
    hook = f"on_{'test' if trainer.testing else 'validation'}_epoch_end"
    # Those that do something then.
    kinds = [type(one) for one in _callbacks_before(trainer, callback)]
    before = [kind.__name__ for kind in kinds if getattr(kind, hook).__qualname__ != f"Callback.{hook}"]
    order = ", ".join(["AttentionExplainabilityCallback(...)", *(f"{name}(...)" for name in before)])
    remedy = f". Let those come later: callbacks=[{order}]" if before else ""
    return (
        "the model has other weights at the end of the evaluation than in its first batch: a callback that averages "
        f"weights has put others back, or the model's own forward changes them{remedy}"
    )


def _callbacks_before(trainer: Trainer, callback: Callback) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
    return callbacks[: callbacks.index(callback)] if callback in callbacks else []
