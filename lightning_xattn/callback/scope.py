"""Which evaluation runs, and under which name and step its numbers are logged."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, Trainer

from lightning_xattn.core.names import shown


def stage_of(trainer: Trainer) -> str:
    """The stage of the evaluation that runs: "val", "test" or "predict"."""
    return "predict" if trainer.predicting else "test" if trainer.testing else "val"


def logged_step(trainer: Trainer) -> int:
    """The step at which Lightning logs the scalars of an evaluation's end."""
    # Lightning has no public name for it: global_step counts every optimiser's steps.
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def moment(trainer: Trainer) -> dict[str, Any]:
    """The stage, epoch and step of the evaluation that runs."""
    return {"stage": stage_of(trainer), "epoch": trainer.current_epoch, "step": logged_step(trainer)}


def scope_of(trainer: Trainer, callback: Callback, kind: type[Callback], dataloader: int, layer: str) -> str:
    """The part of a curve's name that says where it is from, as ``val/callback_1/dataloader_1/<layer>``.

    The first callback of its kind, dataloader 0 and a layer "" are left out.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
    ours = [one for one in callbacks if isinstance(one, kind)]
    scope = stage_of(trainer)
    scope += f"/callback_{ours.index(callback)}" if callback in ours[1:] else ""
    scope += f"/dataloader_{dataloader}" if dataloader else ""
    return scope + (f"/{shown(layer)}" if layer else "")
